"""What parked tasks wait for, as rules and as a ledger, and that the leader wakes them."""

from __future__ import annotations

import uuid
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.client import coordinator
from weft.testing.agents import eventually
from weft.testing.stored import StoredTask
from weft_coordinator.decide.index import Entry, TaskIndex
from weft_coordinator.decide.order import Order
from weft_coordinator.decide.parked import WOKEN, Child, Parked, ParkedTasks, parse, reason
from weft_protocols import headers as h
from weft_protocols.errors import InvalidParams, Unavailable
from weft_protocols.states import State

if TYPE_CHECKING:
    from tests.coordinator.conftest import Sent, Stage

TASK = "0" * 31


def parked(n: int = 1, **fields: Any) -> Parked:
    """Task n, which waits for the end of time."""
    base = Parked("worker", f"{TASK}{n:x}", "local", "ctx", "07", 10, "_sleep", 0, (), 0)
    return replace(base, **fields)


def child(n: int, seen: int = 0) -> Child:
    return Child("helper", f"{TASK}{n:x}", seen)


def entry(state: State, *, status: int = 2) -> Entry:
    return Entry("helper", "worker", "t", state=int(state), status=status)


def folded(*asked: Parked) -> ParkedTasks:
    """A ledger that decided these in turn."""
    ledger = ParkedTasks()
    for one in asked:
        take(ledger, ledger.park(one))
    return ledger


def take(ledger: ParkedTasks, events: list[Any]) -> None:
    for event in events:
        ledger.apply(event, number=1, at=1)


# Rules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "need", "wakes"),
    [
        ([State.WORKING, State.WORKING], 1, False),
        ([State.COMPLETED, State.WORKING], 1, True),
        ([State.COMPLETED, State.WORKING], 2, False),
        ([State.COMPLETED, State.COMPLETED], 2, True),
        ([State.COMPLETED, State.WORKING, State.COMPLETED], 2, True),
        ([State.FAILED, State.WORKING], 2, True),
        ([State.CANCELED, State.WORKING], 2, True),
        ([State.INPUT_REQUIRED, State.WORKING], 2, True),
        ([State.AUTH_REQUIRED], 1, True),
        ([None], 1, False),
    ],
)
def test_a_task_goes_on_when_enough_children_have_ended_or_one_needs_it(
    states: list[State | None], need: int, wakes: bool
) -> None:
    children = tuple(child(n) for n in range(len(states)))
    found = {
        (one.agent, one.task): entry(state) if state is not None else None
        for one, state in zip(children, states, strict=True)
    }
    why = reason(parked(9, children=children, need=need), lambda agent, task: found[agent, task], now=1000)
    assert bool(why) is wakes


def test_a_question_that_the_parent_knows_does_not_wake_it_again() -> None:
    """Fails if a parent that asks its own caller for a child's sake is woken for ever."""
    asks = entry(State.INPUT_REQUIRED, status=5)
    assert reason(parked(children=(child(2, seen=4),), need=1), lambda *_: asks, now=0)
    assert not reason(parked(children=(child(2, seen=5),), need=1), lambda *_: asks, now=0)


def test_a_task_goes_on_when_its_time_has_come() -> None:
    assert not reason(parked(until=1000), lambda *_: None, now=999)
    assert reason(parked(until=1000), lambda *_: None, now=1000)


def test_a_later_claim_counts_and_an_earlier_one_changes_nothing() -> None:
    """Fails if a replica that was declared dead changes what its successor waits for, or uses up its wake."""
    late, early = parked(claim=20, until=5), parked(claim=10, until=7)
    ledger = folded(early, late)
    assert ledger.get("worker", late.task) == late
    assert ledger.park(early) == []
    assert ledger.park(late) == [], "the same twice"
    assert ledger.wake(early) == []
    take(ledger, [(WOKEN, *early.id, early.claim)])
    assert ledger.get("worker", late.task) == late
    take(ledger, ledger.wake(late))
    assert len(ledger) == 0


def test_a_leader_that_takes_over_knows_what_its_predecessor_parked() -> None:
    before = folded(parked(1, until=5), parked(2, children=(child(3), child(4, seen=2)), need=2), parked(5, until=1))
    after = ParkedTasks()
    after.load(before.dump())
    assert after.all() == before.all()
    assert [one.task[-1] for one in after.due(10)] == ["5", "1"]
    assert [one.task[-1] for one in after.parents("helper", child(4).task)] == ["2"]


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 20), st.sets(st.integers(8, 12)), st.booleans()),
        max_size=40,
    )
)
def test_what_can_be_looked_up_is_what_is_parked(steps: list[tuple[int, int, int, set[int], bool]]) -> None:
    """Fails if a task that was woken is still found by its time or its child, or one that is parked is not."""
    ledger = ParkedTasks()
    for n, claim, until, children, wakes in steps:
        one = parked(n, claim=claim, until=until, children=tuple(child(m) for m in sorted(children)), need=1)
        take(ledger, ledger.wake(one) if wakes else ledger.park(one))
        known = ledger.all()
        assert {found.id for found in ledger.due(15)} == {one.id for one in known if 0 < one.until <= 15}
        for m in range(8, 13):
            waits = {one.id for one in known if child(m) in one.children}
            assert {found.id for found in ledger.parents("helper", child(m).task)} == waits
        assert ledger.waiting_agents() == ({"worker"} if any(one.children for one in known) else set())


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "x"},
        {"slice": "7"},
        {"claim": -1},
        {"caller": "a.b"},
        {"until": None},
        {"children": [["helper"]]},
        {"children": [["help er", TASK + "1"]]},
        {"children": "all"},
    ],
)
def test_a_request_that_is_wrong_is_refused_with_what_is_wrong(wrong: dict[str, Any]) -> None:
    body = {"task": TASK + "1", "caller": "local", "context": "c", "slice": "07", "claim": 1, "until": 5, "need": 0}
    parse(body, "worker")
    with pytest.raises(InvalidParams, match=next(iter(wrong))):
        parse({**body, **wrong}, "worker")


def test_the_order_of_a_context_is_that_of_acceptance_and_ends_leave_it() -> None:
    index = TaskIndex()
    entries = [
        Entry("worker", "local", f"t{n}", context="c" if n < 4 else "d", created=1, first=n + 1) for n in range(6)
    ]
    index.adopt(entries[:2])
    order = Order(index)
    order.changed(entries[:1:-1])  # whatever the order in which they are told
    assert order.before("worker", "c", "t3") == ("t0", "t1", "t2")
    assert order.before("worker", "c", "t0") == ()
    assert order.before("worker", "d", "t5") == ("t4",)
    assert order.before("worker", "c", "t9") is None, "not read yet: what was accepted before it is not known"
    assert order.before("other", "c", "t3") is None
    entries[1].state = int(State.CANCELED)
    order.changed(entries[1:2])
    assert order.before("worker", "c", "t3") == ("t0", "t2")
    assert order.before("worker", "c", "t1") == (), "it has ended itself"
    index.clear()
    index.adopt(entries[2:3])
    assert order.before("worker", "c", "t2") == (), "the index was made anew"
    for one in entries:
        one.state = int(State.COMPLETED)
    order.changed(entries)
    assert len(order) == 0


# On the broker -------------------------------------------------------------------------------------


def request(sent: Sent, **fields: Any) -> dict[str, Any]:
    base = {"task": sent.task, "caller": sent.caller, "context": sent.context, "slice": "07", "claim": 1, "key": "k"}
    return {**base, **fields}


async def wakes(stage: Stage, sent: Sent) -> int:
    """How many wakes are stored for a task."""
    stored = await StoredTask.read(stage.mesh, sent.agent, sent.task)
    return sum(h.get(one.headers, b"A2A-Method") == b"Wake" for one in stored.messages)


@pytest.mark.anyio
async def test_a_task_is_woken_by_its_child_also_where_that_ended_before_it_was_parked(stage: Stage) -> None:
    parent_agent, child_agent = stage.agent(), stage.agent()
    broker = await stage.broker(parent_agent)
    for early in (False, True):
        sent = await stage.send(parent_agent)
        of = await stage.send(child_agent, caller=parent_agent)
        worker = await stage.claim(of)
        if early:
            await worker.complete()
        await coordinator.call(broker, "park", request(sent, children=[[child_agent, of.task]], need=1))
        if not early:
            assert await wakes(stage, sent) == 0
            await worker.complete()
        await eventually(partial(wakes, stage, sent))
        assert await wakes(stage, sent) == 1


@pytest.mark.anyio
async def test_nobody_else_s_child_wakes_a_task(stage: Stage) -> None:
    """Fails if an agent can learn when a task ends that it did not send."""
    agent, other = stage.agent(), stage.agent()
    broker = await stage.broker(agent)
    sent, own = await stage.send(agent), await stage.send(other, caller=agent)
    foreign = await stage.done(other, caller="local")
    await coordinator.call(broker, "park", request(sent, children=[[other, foreign.task], [other, own.task]], need=1))
    await (await stage.claim(own)).status("working")
    await coordinator.call(broker, "park", request(await stage.send(agent), children=[[other, own.task]], need=1))
    assert await wakes(stage, sent) == 0


@pytest.mark.anyio
async def test_a_timer_wakes_a_task_once_and_in_time(stage: Stage) -> None:
    agent = stage.agent()
    broker = await stage.broker(agent)
    running = stage._running[0].coordinator
    sent = await stage.send(agent)
    until = running.leader._clock() + 400
    await coordinator.call(broker, "park", request(sent, until=until))
    await eventually(lambda: wakes(stage, sent))
    assert running.leader._clock() - until < 900, "found by the broker's timer, not by looking at the time"
    assert await wakes(stage, sent) == 1


@pytest.mark.anyio
async def test_a_time_that_never_comes_does_not_come_at_once(stage: Stage) -> None:
    agent = stage.agent()
    broker = await stage.broker(agent)
    clock = stage._running[0].coordinator.leader._clock
    never, soon = await stage.send(agent), await stage.send(agent)
    await coordinator.call(broker, "park", request(never, until=2**52))
    await coordinator.call(broker, "park", request(soon, until=clock() + 400))
    await eventually(lambda: wakes(stage, soon))
    assert await wakes(stage, never) == 0


@pytest.mark.anyio
async def test_a_task_that_was_cancelled_is_not_parked_any_more(stage: Stage) -> None:
    agent = stage.agent()
    broker = await stage.broker(agent)
    ledger = next(part for part in stage._running[0].coordinator._parts if type(part).__name__ == "Waking")._ledger  # type: ignore[attr-defined]
    sent = await stage.send(agent)
    worker = await stage.claim(sent)
    await coordinator.call(broker, "park", request(sent, until=2**52))
    assert ledger.get(agent, sent.task) is not None
    await worker.status("canceled")
    await eventually(lambda: ledger.get(agent, sent.task) is None)
    assert await wakes(stage, sent) == 0


@pytest.mark.anyio
async def test_without_a_leader_nothing_is_parked(fresh_stage: Stage) -> None:
    stage = fresh_stage
    agent = stage.agent()
    sent = replace(await stage.send(agent), task=uuid.uuid4().hex)
    with pytest.raises(Unavailable):
        await coordinator.call(await stage.broker(agent), "park", request(sent, until=2**52), timeout=0.5)


def test_half_a_character_is_refused_before_it_can_be_decided() -> None:
    """Fails if a text that no log takes ends a coordinator's time as the leader."""
    body = {"task": f"{TASK}1", "caller": "local", "slice": "07", "claim": 1, "until": 1}
    for name in ("context", "key"):
        with pytest.raises(InvalidParams, match=f"{name} has half a character"):
            parse({**body, name: "half \ud800"}, "worker")


def test_an_approval_that_is_settled_wakes_and_an_older_log_has_none() -> None:
    waiting = parked(approvals=("a1", "a2"))
    assert Parked.of(waiting.event()[1:]) == waiting
    assert Parked.of(waiting.event()[1:-1]) == replace(waiting, approvals=())
    assert reason(waiting, lambda agent, task: None, now=1, settled=lambda id_: "") == ""
    assert reason(waiting, lambda agent, task: None, now=1, settled={"a1": "", "a2": "denied"}.__getitem__) == "denied"
