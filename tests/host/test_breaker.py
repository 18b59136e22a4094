"""Circuits to agents whose tasks fail, fallbacks, and deadlines that cannot be met."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

import weft
from weft.client import coordinator as coord
from weft.host.breaker import Breaker, BreakerPolicy
from weft.host.pace import Paces
from weft.host.retry import RetryPolicy
from weft.testing.agents import LocalReplica, Process, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft_protocols.errors import InvalidConfig

Unique = Callable[[str], str]
POLICY = BreakerPolicy(window=10.0, calls=4, ratio=0.5, open_for=1.0, longest=4.0, jitter=0.0)


def ends(breaker: Breaker, *, at: float, failed: str, probe: bool = False, random: float = 0.5) -> None:
    for one in failed:
        breaker.end(at, failed=one == "x", probe=probe, random=random)


def state(breaker: Breaker) -> str:
    return breaker.state


def test_a_circuit_opens_when_enough_of_enough_calls_failed() -> None:
    cases = {"xxx": "closed", "xxxx": "open", "..xx": "open", "...x": "closed", "xx..": "closed"}
    for failed, expected in cases.items():
        breaker = Breaker(POLICY)
        ends(breaker, at=0.0, failed=failed)
        assert state(breaker) == expected, failed


def test_calls_that_ended_long_ago_do_not_count() -> None:
    breaker = Breaker(POLICY)
    ends(breaker, at=0.0, failed="xxx")
    ends(breaker, at=11.0, failed="...x")
    assert state(breaker) == "closed"
    ends(breaker, at=12.0, failed="xx")
    assert state(breaker) == "open"


def test_one_call_finds_out_and_closes_the_circuit_or_opens_it_for_longer() -> None:
    breaker = Breaker(POLICY)
    ends(breaker, at=0.0, failed="xxxx")
    assert breaker.wait(0.4) == pytest.approx(0.6)
    assert breaker.wait(1.0) == 0.0
    assert breaker.begin(1.0)
    assert breaker.wait(1.0) > 0, "a second one has to wait for the first"
    ends(breaker, at=1.5, failed="x.x.")  # calls from before
    assert state(breaker) == "half-open"
    ends(breaker, at=1.5, failed="x", probe=True)
    assert (state(breaker), breaker.wait(1.5)) == ("open", 2.0)
    assert breaker.begin(3.5)
    ends(breaker, at=3.6, failed="x", probe=True)
    assert breaker.begin(7.6)
    ends(breaker, at=7.6, failed="x", probe=True)
    assert breaker.wait(7.6) == 4.0, "the longest"
    assert breaker.begin(11.6)
    ends(breaker, at=11.7, failed=".", probe=True)
    assert (state(breaker), breaker.wait(11.7)) == ("closed", 0.0)
    ends(breaker, at=11.8, failed="xxx")
    assert state(breaker) == "closed", "it begins anew"


def test_a_call_that_never_found_out_makes_room_for_the_next() -> None:
    breaker = Breaker(POLICY)
    ends(breaker, at=0.0, failed="xxxx")
    breaker.begin(1.0)
    breaker.give_up(1.1, probe=True)
    assert breaker.wait(1.1) == 0.0
    breaker.begin(1.2)
    assert breaker.wait(5.0) == 0.0, "one that is not heard of again"


def test_the_pause_is_spread_by_chance() -> None:
    policy = BreakerPolicy(calls=1, open_for=10.0, jitter=0.4)
    pauses = []
    for random in (0.0, 1.0):
        breaker = Breaker(policy)
        ends(breaker, at=0.0, failed="x", random=random)
        pauses.append(breaker.wait(0.0))
    assert pauses == [8.0, 12.0]


@pytest.mark.parametrize("wrong", [{"window": 0}, {"calls": 0}, {"ratio": 0}, {"jitter": 2}, {"longest": 1}])
def test_a_policy_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        BreakerPolicy(**wrong)


def test_only_what_even_a_quick_run_cannot_do_is_hopeless() -> None:
    paces = Paces()
    for n in range(20):
        assert paces.hopeless("s", 0.0) == 0.0, "too little is known"
        paces.took("s", 2.0 if n % 2 else 1.0)
    assert paces.hopeless("s", 0.6) == 0.0
    assert 1.3 < paces.hopeless("s", 0.1) < 1.7
    assert paces.hopeless("other", 0.0) == 0.0
    found = [paces.hopeless("s", 0.0) for _ in range(19)]
    assert found.count(0.0) == 2, "some are run all the same"


def broken(name: str, errors: dict[str, Exception | None]) -> weft.Agent:
    agent = weft.Agent(name, attempts=1)

    @agent.skill()
    async def work(task: weft.Task) -> str:
        if (error := errors.get(name)) is not None:
            raise error
        return f"{name} did"

    return agent


async def test_dead_letters_open_the_circuit_and_one_task_that_works_closes_it(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    errors: dict[str, Exception | None] = {}
    child = broken(unique("child"), errors)
    policy = BreakerPolicy(calls=3, open_for=0.3, jitter=0.0)
    parent = weft.Agent(unique("parent"), attempts=1, breaker=policy)

    @parent.skill()
    async def work(task: weft.Task) -> list[str]:
        found = []
        for n in range(int(task.text)):
            try:
                found.append((await task.delegate(child.name, f"{task.id}-{n}")).text)
            except weft.CircuitOpen as error:
                found.append("open" if 0 < error.retry_after <= 0.3 else str(error.retry_after))
            except weft.TaskEnded as error:
                found.append(type(error).__name__)
        return found

    async with running(mesh, child, parent) as (_, replica):
        errors[child.name] = weft.Reject("not mine")
        assert (await caller.send(parent.name, "4")).data == ["TaskRejected"] * 4
        errors[child.name] = weft.Fail("on purpose")
        assert (await caller.send(parent.name, "4")).data == ["TaskFailed"] * 4
        errors[child.name] = ConnectionError("down")
        found = (await caller.send(parent.name, "12")).data
        assert found == ["TaskFailed"] * 8 + ["open"] * 4
        errors[child.name] = None
        await eventually(lambda: not replica.replica.circuits.open())
        assert (await caller.send(parent.name, "3")).data == [f"{child.name} did"] * 3


async def test_an_open_circuit_that_nobody_catches_is_tried_again_when_it_may_be_closed(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    errors: dict[str, Exception | None] = {}
    child = broken(unique("child"), errors)
    retry = RetryPolicy(attempts=2, initial=30.0)
    parent = weft.Agent(unique("parent"), retry=retry, breaker=BreakerPolicy(calls=1, open_for=0.3, jitter=0.0))

    @parent.skill()
    async def work(task: weft.Task) -> str:
        return (await task.delegate(child.name, task.id)).text

    async with running(mesh, child, parent):
        errors[child.name] = ConnectionError("down")
        assert (await caller.send(parent.name, "go")).state is weft.State.FAILED
        errors[child.name] = None
        assert (await caller.send(parent.name, "go")).text == f"{child.name} did"


async def register(*replicas: LocalReplica) -> None:
    for one in replicas:
        body = {**one.replica.agent.describe(), "replica": one.id, "pid": os.getpid(), "slots": 4}
        await coord.register(one.replica.broker, body)


async def test_a_fallback_does_what_the_agents_before_it_cannot(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    """One does not exist, one leaves a dead letter, the third does it; a replay finds the same one's result."""
    errors: dict[str, Exception | None] = {}
    nobody, bad, good, parent = unique("x"), broken(unique("b"), errors), broken(unique("c"), errors), unique("parent")
    errors[bad.name] = ConnectionError("down")
    agent = weft.Agent(parent, retry=RetryPolicy(attempts=2, initial=0.01))
    views: list[weft.TaskView] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        views.append(await task.delegate(nobody, "go", fallback=[bad.name, good.name]))
        if task.attempt == 1:
            raise ConnectionError("after it")
        return views[-1].text

    @agent.skill()
    async def all_bad(task: weft.Task) -> str:
        with pytest.raises(weft.TaskFailed, match=bad.name):
            await task.delegate(nobody, "go", fallback=[bad.name])
        errors[good.name] = weft.Fail("no")
        with pytest.raises(weft.TaskFailed, match=good.name):
            await task.delegate(good.name, "go", fallback=[bad.name])
        return "done"

    async with running(mesh, bad, good, agent) as replicas:
        await register(*replicas)
        async with await caller.submit(parent, "go") as handle:
            assert (await handle.result()).text == f"{good.name} did"
            (await StoredTask.read(mesh, parent, handle.id)).check()
        assert (await caller.send(parent, "go", skill="all_bad")).text == "done"
    assert [(view.agent, view.id) for view in views] == [(good.name, views[0].id)] * 2


async def test_a_task_that_cannot_be_done_in_time_is_failed_at_once(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent, always = weft.Agent(unique("paced")), weft.Agent(unique("always"), shed=False)
    started: list[str] = []

    @agent.skill("nap")
    @always.skill("nap")
    async def nap(task: weft.Task) -> None:
        started.append(task.text)
        await asyncio.sleep(0.3)

    async with running(mesh, agent, always):
        for one in (agent, always):
            handles = [await caller.submit(one.name, "warm") for _ in range(20)]
            for handle in handles:
                async with handle:
                    await handle.result()
            view = await caller.send(one.name, "late", deadline=0.15)
            assert view.state is weft.State.FAILED
            if one is agent:
                assert "s are left to its deadline, and nap typically takes 0.3" in view.text
                assert "late" not in started
            else:
                assert "late" in started
            assert (await caller.send(one.name, "in time", deadline=20.0)).state is weft.State.COMPLETED
