"""The coordinator's side of locks and deadlocks, spoken to as replicas and the operator speak."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack
import pytest

from weft.client import coordinator as coord
from weft.client.asks import Asks
from weft.core.broker import Broker, Delivered
from weft.testing import locklog
from weft.testing.agents import eventually
from weft_protocols import subjects
from weft_protocols.errors import Fenced, InvalidParams, PermissionDenied, Unavailable, WeftError
from weft_protocols.records import Control

if TYPE_CHECKING:
    from tests.coordinator.conftest import Sent, Stage

pytestmark = pytest.mark.anyio


@dataclass
class Speaking:
    """A replica as the coordinator hears it, and what it is told."""

    broker: Broker
    agent: str
    id: str
    confirms: bool | None = True
    """What it answers when it is asked whether a wait goes on; None for nothing."""
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def start(self) -> Speaking:
        await self.broker.subscribe(subjects.ctl(self.agent, self.id), self._on_control)
        await self.broker.flush()
        return self

    def _on_control(self, message: Delivered) -> None:
        control = Control.decode(message.data)
        told = msgpack.unpackb(control.data)
        self.told.append((control.op, told))
        if control.op == "waiting?" and self.confirms is not None:
            answer = {"question": told["question"], "waits": self.confirms}
            self.broker.send(subjects.coord("confirm", self.agent), json.dumps(answer).encode())

    def ops(self, op: str) -> list[dict[str, Any]]:
        return [told for name, told in self.told if name == op]

    async def call(self, operation: str, **body: Any) -> dict[str, Any]:
        return await coord.call(self.broker, operation, body)

    async def lock(self, sent: Sent, *names: str, request: str = "", **options: Any) -> dict[str, Any]:
        body = {
            "task": sent.task,
            "replica": self.id,
            "request": request or f"{sent.task}-{'+'.join(names)}",
            "claim": 1,
            "names": list(names),
            "mode": "exclusive",
            "wait": None,
            "lease": 30.0,
            "reentrant": False,
            "priority": 0,
            "work": 0,
            "created": 0,
        }
        return await self.call("lock", **{**body, **options})

    async def unlock(self, sent: Sent, *names: str, claim: int = 1) -> bool:
        return bool((await self.give(sent, *names, claim=claim))["released"])

    async def give(self, sent: Sent, *names: str, claim: int = 1, **more: Any) -> dict[str, Any]:
        """What is answered when something is given back."""
        request = f"{sent.task}-{'+'.join(names)}"
        return await self.call("unlock", task=sent.task, request=request, claim=claim, **more)

    async def session(self, *, held: list[str], waiting: list[str] | None = None, waits: int = 0) -> dict[str, Any]:
        return await self.call("session", replica=self.id, held=held, waiting=waiting or [], waits=waits)

    async def waits(self, sent: Sent, wait: str, *targets: tuple[str, str], need: int = 1) -> dict[str, Any]:
        told = [[sent.task, wait, need, [list(target) for target in targets]]]
        return await self.call("waits", replica=self.id, set=told, clear=[])


class Cast:
    """Agents with one replica each."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._count = 0

    async def replica(self, agent: str = "") -> Speaking:
        agent = agent or self.stage.agent()
        self._count += 1
        return await Speaking(await self.stage.broker(agent), agent, f"r{self._count}").start()

    async def operator(self, operation: str, **body: Any) -> dict[str, Any]:
        return await coord.call(await self.stage.broker("operator"), operation, body)

    async def deadlocks(self) -> int:
        return int((await self.operator("graph"))["deadlocks"]["count"])


@pytest.fixture
async def cast(stage: Stage) -> AsyncIterator[Cast]:
    """Whatever a test did, the log breaks no law."""
    yield Cast(stage)
    assert not locklog.check(await locklog.decided(await stage.broker("coordinator")), overtaken=1)


async def test_a_request_that_is_repeated_has_the_answer_it_had(cast: Cast, stage: Stage) -> None:
    replica = await cast.replica()
    sent = await stage.send(replica.agent)
    first = await replica.lock(sent, "a")
    assert first["state"] == "granted"
    assert await replica.lock(sent, "a") == first
    assert await replica.unlock(sent, "a")
    assert not await replica.unlock(sent, "a")
    assert (await replica.lock(sent, "a"))["token"] > first["token"]
    await replica.unlock(sent, "a")


async def test_a_later_claim_takes_a_request_over_and_an_earlier_one_is_refused(cast: Cast, stage: Stage) -> None:
    old = await cast.replica()
    new = await cast.replica(old.agent)
    sent = await stage.send(old.agent)
    first = await old.lock(sent, "takeover", claim=5)
    second = await new.lock(sent, "takeover", claim=9)
    assert second["token"] > first["token"]
    with pytest.raises(Fenced):
        await old.lock(sent, "takeover", claim=5)
    request = f"{sent.task}-takeover"
    assert (await old.session(held=[request]))["lost"] == [request]
    assert not await old.unlock(sent, "takeover", claim=5)
    assert (await new.session(held=[request]))["held"] == {request: {"token": second["token"], "lease": 30.0}}
    assert await new.unlock(sent, "takeover", claim=9)


async def test_only_a_running_task_of_the_caller_gets_a_lock(cast: Cast, stage: Stage) -> None:
    replica, other = await cast.replica(), await cast.replica()
    foreign = await stage.send(other.agent)
    with pytest.raises(InvalidParams, match="has no task"):
        await replica.lock(foreign, "mine")
    ended = await stage.done(replica.agent)
    await cast.operator("status")  # the end is read
    with pytest.raises(Fenced, match="has ended"):
        await replica.lock(ended, "mine")
    with pytest.raises(InvalidParams, match="mode"):
        await other.lock(foreign, "mine", mode="read")


async def test_a_grant_is_told_to_whoever_waited_and_the_session_says_it_again(cast: Cast, stage: Stage) -> None:
    holder, waiter = await cast.replica(), await cast.replica()
    first, second = await stage.send(holder.agent), await stage.send(waiter.agent)
    await holder.lock(first, "told")
    assert await waiter.lock(second, "told") == {"state": "waiting", "ahead": 0}
    request = f"{second.task}-told"
    assert set((await waiter.session(held=[], waiting=[request]))["waiting"]) == {request}
    await holder.unlock(first, "told")
    (granted,) = await eventually(lambda: waiter.ops("lock"))
    assert granted["state"] == "granted"
    held = (await waiter.session(held=[], waiting=[request]))["held"]
    assert held[request]["token"] == granted["token"]
    await waiter.unlock(second, "told")


async def test_a_silent_replica_loses_what_it_has_when_its_lease_ends_and_not_before(cast: Cast, stage: Stage) -> None:
    silent, waiter = await cast.replica(), await cast.replica()
    first, second = await stage.send(silent.agent), await stage.send(waiter.agent)
    now = asyncio.get_running_loop().time
    await silent.lock(first, "leased", lease=1.0)
    await asyncio.sleep(0.5)
    begun = now()
    request = f"{first.task}-leased"
    assert (await silent.session(held=[request]))["lost"] == []
    await waiter.lock(second, "leased")
    await eventually(lambda: [one for one in waiter.ops("lock") if one["state"] == "granted"])
    assert 0.95 < now() - begun < 5.0
    assert (await silent.session(held=[request]))["lost"] == [request]
    assert [one["state"] for one in silent.ops("lock")] == ["lost"]
    await waiter.unlock(second, "leased")


async def test_what_a_session_does_not_name_is_given_back(cast: Cast, stage: Stage) -> None:
    replica = await cast.replica()
    sent = await stage.send(replica.agent)
    await replica.lock(sent, "named")
    await replica.lock(sent, "forgotten")
    named = f"{sent.task}-named"
    assert set((await replica.session(held=[named]))["held"]) == {named}
    names = [lock["name"] for lock in (await cast.operator("locks"))["locks"]]
    assert "named" in names
    assert "forgotten" not in names
    await replica.unlock(sent, "named")


async def test_a_task_that_ends_without_a_word_holds_nothing_more(cast: Cast, stage: Stage) -> None:
    replica, waiter = await cast.replica(), await cast.replica()
    first, second = await stage.send(replica.agent), await stage.send(waiter.agent)
    await replica.lock(first, "ended")
    await waiter.lock(second, "ended")
    await (await stage.claim(first)).complete()
    await eventually(lambda: waiter.ops("lock"))
    assert await waiter.unlock(second, "ended")


async def test_locks_are_shown_to_the_operator_and_taken_away_with_a_reason(cast: Cast, stage: Stage) -> None:
    replica = await cast.replica()
    first, second = await stage.send(replica.agent), await stage.send(replica.agent)
    token = (await replica.lock(first, "shown"))["token"]
    await replica.lock(second, "shown")
    (lock,) = [lock for lock in (await cast.operator("locks"))["locks"] if lock["name"] == "shown"]
    (held,) = lock["holders"]
    assert (held["agent"], held["task"], held["replica"], held["token"]) == (
        replica.agent,
        first.task,
        replica.id,
        token,
    )
    assert [one["task"] for one in lock["waiters"]] == [second.task]
    for operation in ("locks", "graph", "lock-release"):
        with pytest.raises(PermissionDenied):
            await replica.call(operation, name="shown", reason="because")
    with pytest.raises(InvalidParams, match="reason"):
        await cast.operator("lock-release", name="shown")
    with pytest.raises(InvalidParams, match="is not held"):
        await cast.operator("lock-release", name="nobody has it", reason="because")
    await cast.operator("lock-release", name="shown", task=first.task, reason="because")
    await eventually(lambda: len(replica.ops("lock")) == 2)
    lost, granted = replica.ops("lock")
    assert "because" in lost["reason"]
    assert granted["token"] > token
    await replica.unlock(second, "shown")


# Deadlocks --------------------------------------------------------------------------------------


async def crossed(cast: Cast, stage: Stage, name: str) -> tuple[Speaking, Sent, Speaking, Sent]:
    """Two replicas whose tasks wait for each other's lock."""
    one, two = await cast.replica(), await cast.replica()
    first, second = await stage.send(one.agent), await stage.send(two.agent)
    await one.lock(first, f"{name}-a")
    await two.lock(second, f"{name}-b")
    await one.lock(first, f"{name}-b")
    return one, first, two, second


async def test_two_tasks_that_wait_for_each_other_are_told_apart_by_the_youngest_giving_way(
    cast: Cast, stage: Stage
) -> None:
    before = await cast.deadlocks()
    one, first, two, second = await crossed(cast, stage, "cross")
    await two.lock(second, "cross-a")
    (told,) = await eventually(lambda: [told for told in two.ops("lock") if told["state"] == "deadlock"])
    assert told["request"] == f"{second.task}-cross-a"
    assert {(edge[1], edge[2], edge[3], edge[4]) for edge in told["cycle"]} == {
        (first.task, "lock", "cross-b", second.task),
        (second.task, "lock", "cross-a", first.task),
    }
    assert await cast.deadlocks() == before + 1
    assert not [told for told in one.ops("lock") if told["state"] == "deadlock"]
    await two.unlock(second, "cross-b")
    assert (await eventually(lambda: one.ops("lock")))[0]["state"] == "granted"
    await one.session(held=[])


@pytest.mark.parametrize("recalled", [False, True])
async def test_who_is_promised_a_lock_waits_for_it_all_the_same(cast: Cast, stage: Stage, recalled: bool) -> None:
    other, replica = await cast.replica(), await cast.replica()
    holder = await stage.send(other.agent)
    first, second = await stage.send(replica.agent), await stage.send(replica.agent)
    await other.lock(holder, "next")
    await replica.lock(second, "own")
    for task in (first, second):
        await replica.lock(task, "next")
    await other.unlock(holder, "next")
    await eventually(lambda: [told["state"] for told in replica.ops("lock")] == ["granted", "promised"])
    owner, claim = replica, 1
    if recalled:  # as a takeover of the holder does
        owner, claim = await cast.replica(replica.agent), 2
        await owner.lock(first, "next", claim=claim)
        await eventually(lambda: [told["state"] for told in replica.ops("lock")][2:] == ["recalled"])
    await owner.lock(first, "own", claim=claim)
    told = await eventually(
        lambda: [d for one in (replica, owner) for d in one.ops("lock") if d["state"] == "deadlock"]
    )
    assert {(edge[1], edge[3], edge[4]) for edge in told[0]["cycle"]} == {
        (first.task, "own", second.task),
        (second.task, "next", first.task),
    }
    for one in (replica, owner):
        await one.session(held=[])


async def test_nobody_gives_way_before_every_replica_has_said_that_its_wait_goes_on(cast: Cast, stage: Stage) -> None:
    before = await cast.deadlocks()
    one, _, two, second = await crossed(cast, stage, "doubt")
    one.confirms = False
    await two.lock(second, "doubt-a")
    await eventually(lambda: len(one.ops("waiting?")) > 1)  # asked, and asked again
    assert await cast.deadlocks() == before
    one.confirms = True
    await eventually(lambda: [told for told in two.ops("lock") if told["state"] == "deadlock"])
    await one.session(held=[])
    await two.session(held=[])


async def test_nobody_gives_way_on_the_word_of_a_replica_that_does_not_answer(cast: Cast, stage: Stage) -> None:
    before = await cast.deadlocks()
    one, _, two, second = await crossed(cast, stage, "mute")
    one.confirms = None
    await two.lock(second, "mute-a")
    await eventually(lambda: two.ops("waiting?"))
    with pytest.raises(TimeoutError):
        await eventually(lambda: [told for told in two.ops("lock") if told["state"] == "deadlock"], timeout=1.0)
    assert await cast.deadlocks() == before
    await one.session(held=[])
    await two.session(held=[])


async def test_a_child_is_waited_for_like_a_lock(cast: Cast, stage: Stage) -> None:
    parent, child = await cast.replica(), await cast.replica()
    above = await stage.send(parent.agent)
    below = await stage.send(child.agent)
    await parent.lock(above, "family")
    await child.lock(below, "family")
    assert (await parent.waits(above, "w1", ("child", below.task)))["known"] == 1
    told = await eventually(lambda: child.ops("lock") + parent.ops("deadlock"))
    assert [edge[2] for edge in told[0]["cycle"]].count("child") == 1
    # It comes again, and then the other one is told.
    await child.lock(below, "family")
    (asked,) = await eventually(lambda: parent.ops("deadlock"))
    assert (asked["task"], asked["wait"]) == (above.task, "w1")
    await parent.session(held=[])
    await child.session(held=[])


async def test_a_wait_with_a_way_out_is_no_deadlock(cast: Cast, stage: Stage) -> None:
    before = await cast.deadlocks()
    parent, child = await cast.replica(), await cast.replica()
    above, below, other = [await stage.send(agent) for agent in (parent.agent, child.agent, child.agent)]
    await parent.lock(above, "or")
    await child.lock(below, "or")
    await parent.waits(above, "race", ("child", below.task), ("child", other.task), need=1)
    with pytest.raises(TimeoutError):
        await eventually(lambda: parent.ops("waiting?") + child.ops("waiting?"), timeout=1.5)
    await parent.waits(above, "race", ("child", below.task), ("child", other.task), need=2)
    await eventually(lambda: child.ops("lock") + parent.ops("deadlock"))
    assert await cast.deadlocks() == before + 1
    await parent.session(held=[])
    await child.session(held=[])


async def test_nobody_speaks_for_another_agents_task(cast: Cast, stage: Stage) -> None:
    replica, other = await cast.replica(), await cast.replica()
    foreign = await stage.send(other.agent)
    assert (await replica.waits(foreign, "w", ("child", foreign.task)))["known"] == 0
    with pytest.raises(InvalidParams, match="not a wait"):
        await replica.call("waits", replica="r", set=[["x"]])
    edges = (await cast.operator("graph"))["edges"]
    assert not [edge for edge in edges if edge["task"] == foreign.task]


# Promises ---------------------------------------------------------------------------------------


async def test_who_asks_behind_his_own_replica_is_told_whom_he_follows_and_his_token(cast: Cast, stage: Stage) -> None:
    replica = await cast.replica()
    one, two, three = [await stage.send(replica.agent) for _ in range(3)]
    await replica.lock(one, "p")
    second, third = await replica.lock(two, "p"), await replica.lock(three, "p")
    assert (second["after"], third["after"]) == (f"{one.task}-p", f"{two.task}-p")
    told = await replica.session(held=[f"{one.task}-p"], waiting=[f"{two.task}-p", f"{three.task}-p"])
    assert told["waiting"][f"{two.task}-p"] == {key: second[key] for key in ("promised", "after")}
    assert await replica.give(one, "p", to=[f"{two.task}-p"]) == {"released": True}
    await replica.unlock(two, "p")
    (granted,) = await eventually(lambda: replica.ops("lock"))
    assert granted["state"] == "granted", "the second one was handed on, so that only the third one is told"
    assert (granted["request"], granted["token"]) == (f"{three.task}-p", third["promised"])
    await replica.session(held=[])


async def test_a_place_that_becomes_the_next_one_is_promised_by_a_message(cast: Cast, stage: Stage) -> None:
    first = await cast.replica()
    second = await cast.replica(first.agent)
    one, two, three = [await stage.send(first.agent) for _ in range(3)]
    await first.lock(one, "p")
    assert "promised" not in await second.lock(two, "p")
    assert "promised" not in await second.lock(three, "p")
    await first.unlock(one, "p")
    await eventually(lambda: len(second.ops("lock")) == 2)
    granted, promised = second.ops("lock")
    assert (granted["state"], promised["state"]) == ("granted", "promised")
    assert promised["after"] == granted["request"]
    await second.lock(two, "p", claim=2)
    recalled = await eventually(lambda: second.ops("lock")[2:])
    assert [(one["request"], one["state"]) for one in recalled] == [(f"{three.task}-p", "recalled")]
    for replica in (first, second):
        await replica.session(held=[])


async def test_what_was_handed_on_against_the_order_is_refused(cast: Cast, stage: Stage) -> None:
    replica = await cast.replica()
    one, two, three = [await stage.send(replica.agent) for _ in range(3)]
    for sent in (one, two, three):
        await replica.lock(sent, "p")
    answer = await replica.give(one, "p", to=[f"{three.task}-p"])
    assert answer == {"released": True, "refused": [f"{three.task}-p"]}
    assert (await eventually(lambda: replica.ops("lock")))[0]["request"] == f"{two.task}-p"
    await replica.session(held=[])


async def test_a_token_that_was_promised_counts_as_soon_as_it_is_shown(cast: Cast, stage: Stage) -> None:
    """A tool is called under it before the coordinator hears that the lock was handed on."""
    replica = await cast.replica()
    one, two = [await stage.send(replica.agent) for _ in range(2)]
    first, second = (await replica.lock(one, "p"))["token"], (await replica.lock(two, "p"))["promised"]

    async def held(sent: Sent, token: int) -> bool:
        told = await cast.operator("lock-check", name="p", token=token, agent=replica.agent, task=sent.task)
        return bool(told["held"])

    assert await held(one, first)
    assert not await held(one, second)
    assert not await held(two, second + 1)
    assert await held(one, first)
    assert await held(two, second)
    assert not await held(one, first)
    assert not await replica.unlock(one, "p")
    assert await replica.unlock(two, "p")


async def test_a_lock_that_was_handed_on_and_given_back_lets_the_next_one_on(cast: Cast, stage: Stage) -> None:
    """The message got lost by which the one before was given back."""
    replica, other = await cast.replica(), await cast.replica()
    one, two = [await stage.send(replica.agent) for _ in range(2)]
    after = await stage.send(other.agent)
    await replica.lock(one, "p")
    token = (await replica.lock(two, "p"))["promised"]
    await other.lock(after, "p")
    assert await replica.give(two, "p", token=token) == {"released": True}
    assert (await eventually(lambda: other.ops("lock")))[0]["state"] == "granted"
    assert not await replica.unlock(one, "p")
    await other.session(held=[])


# Leaders ----------------------------------------------------------------------------------------


async def test_the_next_leader_knows_who_holds_and_waits_and_asks_replicas_for_the_rest(fresh_stage: Stage) -> None:
    cast = Cast(fresh_stage)
    first, _ = await fresh_stage.coordinator(), await fresh_stage.coordinator()
    holder, waiter = await cast.replica(), await cast.replica()
    one, two = await fresh_stage.send(holder.agent), await fresh_stage.send(waiter.agent)
    token = (await holder.lock(one, "kept", lease=3.0))["token"]
    await waiter.lock(two, "kept")
    await waiter.waits(two, "w", ("order", one.task))
    await fresh_stage.stop(first)
    await eventually(lambda: holder.ops("resync") and waiter.ops("resync"))
    request, wanted = f"{one.task}-kept", f"{two.task}-kept"

    async def known() -> dict[str, Any]:
        try:
            return await holder.session(held=[request])
        except Unavailable:
            return {}

    told = await eventually(known)
    assert told["held"][request]["token"] == token
    assert (await waiter.session(held=[], waiting=[wanted], waits=1))["resync"]
    await waiter.waits(two, "w", ("order", one.task))

    async def agreed() -> bool:
        return not (await waiter.session(held=[], waiting=[wanted], waits=1))["resync"]

    await eventually(agreed)
    await holder.unlock(one, "kept")
    assert (await eventually(lambda: waiter.ops("lock")))[0]["token"] > token
    assert not locklog.check(await locklog.decided(await fresh_stage.broker("coordinator")))


async def test_what_is_asked_together_is_one_message_and_each_part_has_its_own_answer(cast: Cast, stage: Stage) -> None:
    replica = await cast.replica()
    sent, other = await stage.send(replica.agent), await stage.send(replica.agent)
    await replica.lock(sent, "a")
    before = (await cast.operator("status"))["answered"]
    asks = Asks(replica.broker, replica.agent)
    body = {"task": sent.task, "replica": replica.id, "claim": 1, "names": ["a"], "wait": None}
    async with asyncio.TaskGroup() as group:
        unlocked = group.create_task(
            asks.call("unlock", {"task": sent.task, "request": f"{sent.task}-a", "claim": 1}, timeout=5)
        )
        locked = group.create_task(asks.call("lock", {**body, "request": f"{sent.task}-b"}, timeout=5))
        waiting = group.create_task(asks.call("lock", {**body, "task": other.task, "request": "c"}, timeout=5))
        wrong = group.create_task(_error(asks.call("lock", {**body, "names": 7}, timeout=5)))
        secret = group.create_task(_error(asks.call("locks", {}, timeout=5)))
    assert unlocked.result() == {"released": True}
    assert locked.result()["state"] == "granted"
    assert isinstance(wrong.result(), InvalidParams)
    assert waiting.result()["state"] == "waiting"
    assert isinstance(secret.result(), InvalidParams), "only what is asked often can be asked together"
    assert (await cast.operator("status"))["answered"] == before + 2  # one answer, and the status before this one
    await replica.session(held=[])


@pytest.mark.parametrize("asks", [None, [], 7, [["unlock", {}]] * 1001])
async def test_what_is_no_list_of_questions_is_refused(cast: Cast, asks: Any) -> None:
    replica = await cast.replica()
    with pytest.raises(InvalidParams, match="asks must be a list"):
        await replica.call("several", asks=asks)


@pytest.mark.parametrize("ask", [["unlock"], ["several", {"asks": []}], [1, {}], "unlock", ["status", {}]])
async def test_a_part_that_is_no_question_is_refused_and_the_others_answered(cast: Cast, ask: Any) -> None:
    replica = await cast.replica()
    session = ["session", {"replica": replica.id, "held": [], "waiting": []}]
    wrong, right = (await replica.call("several", asks=[ask, session]))["answers"]
    assert wrong["error"]["type"] == "InvalidParams"
    assert right["held"] == {}


async def _error(asked: Awaitable[Any]) -> BaseException | None:
    try:
        await asked
    except WeftError as error:
        return error
    return None
