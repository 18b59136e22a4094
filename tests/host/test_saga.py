"""What a task did is undone, in reverse order, when it ends other than well, whatever is killed in between."""

import asyncio
from collections.abc import Callable
from functools import partial

import pytest

import weft
from weft.host import saga
from weft.host.retry import RetryPolicy
from weft.testing.agents import LocalReplica, ReplicaProcesses, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.scratch import Scratch
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, settled
from weft_protocols.errors import StepChanged, UsageError
from weft_protocols.records import DEAD_LETTER_KEY

Unique = Callable[[str], str]
UNDONE: list[tuple[str, str]] = []
BROKEN: dict[str, int] = {}
"""How often the compensation of an effect fails."""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saga, "POLICY", RetryPolicy(attempts=3, initial=0.001))
    UNDONE.clear()
    BROKEN.clear()


def undo(name: str, *, idempotency_key: str) -> None:
    if BROKEN.get(name, 0):
        BROKEN[name] -= 1
        raise ConnectionError(f"{name} is stuck")
    UNDONE.append((name, idempotency_key))


async def never(name: str) -> None:
    await asyncio.Event().wait()


def names() -> list[str]:
    return [name for name, _ in UNDONE]


def booking(name: str, *, end: Callable[[weft.Task], None], **options: float) -> weft.Agent:
    """An agent that does three things and then ends as it is told."""
    agent = weft.Agent(name, **options)  # type: ignore[arg-type]

    @agent.skill()
    async def book(task: weft.Task) -> str:
        for what in ("flight", "hotel", "car"):
            await task.on_rollback(what, undo, what)
            await task.step(f"book-{what}", lambda what=what: what)
        end(task)
        if task.text == "ask":
            await task.ask("sure?")
        if task.text == "wait":
            await asyncio.Event().wait()
        return "booked"

    return agent


def fails(task: weft.Task) -> None:
    raise weft.Fail("no money")


def rejects(task: weft.Task) -> None:
    raise weft.Reject("not for you")


def breaks(task: weft.Task) -> None:
    if task.attempt > 1:
        assert UNDONE == [], "an attempt that will be tried again undoes nothing"
    raise ConnectionError("no route")


def goes_on(task: weft.Task) -> None:
    pass


@pytest.mark.parametrize(
    ("end", "state", "said"),
    [
        (fails, weft.State.FAILED, "no money"),
        (rejects, weft.State.REJECTED, "not for you"),
        (breaks, weft.State.FAILED, "failed after 2 of 2 attempts: ConnectionError: no route"),
    ],
)
async def test_a_task_that_ends_other_than_well_is_undone_in_reverse_before_its_end(
    mesh: BrokerMesh,
    caller: weft.Mesh,
    unique: Unique,
    end: Callable[[weft.Task], None],
    state: weft.State,
    said: str,
) -> None:
    BROKEN["hotel"] = 2  # two tries fail, the third does not
    agent = booking(unique("booking"), end=end, attempts=2)
    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        view = await handle.result()
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    assert (view.state, view.text) == (state, said)
    assert view.metadata[saga.METADATA] == {"undone": ["car", "hotel", "flight"], "failed": {}}
    assert names() == ["car", "hotel", "flight"]
    assert len({key for _, key in UNDONE}) == 3
    assert (DEAD_LETTER_KEY in stored.steps) == (end is breaks)
    stored.check()


async def test_a_task_that_succeeds_undoes_nothing(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = booking(unique("booking"), end=goes_on)
    async with running(mesh, agent):
        assert (await caller.send(agent.name, "go")).text == "booked"
    assert UNDONE == []


@pytest.mark.parametrize("when", ["wait", "ask", "suspended"])
async def test_a_task_that_is_cancelled_is_undone(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, when: str
) -> None:
    """Fails if a task that has left memory is cancelled without being undone."""
    agent = booking(unique("booking"), end=goes_on, suspend_after=0.05 if when == "suspended" else 30.0)
    async with running(mesh, agent) as (replica,):
        async with await caller.submit(agent.name, when.replace("suspended", "ask")) as handle:
            if when == "wait":
                await eventually(lambda: registered(replica) == 3)
            else:
                await handle.result()
            if when == "suspended":
                await eventually(lambda: not replica.owned)
            view = await handle.cancel(reason="changed my mind")
            await settled(mesh, agent.name)
    assert (view.state, view.message.text if view.message else "") == (weft.State.CANCELED, "changed my mind")
    assert names() == ["car", "hotel", "flight"]


def registered(replica: LocalReplica) -> int:
    return sum(len(run.rollback.undos) for run in replica.replica.live.values() if run.rollback is not None)


async def test_what_could_not_be_undone_is_said_and_does_not_keep_the_rest(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    BROKEN["hotel"] = 99
    agent = booking(unique("booking"), end=fails)
    async with running(mesh, agent):
        view = await caller.send(agent.name, "go")
    assert view.text == "no money; not rolled back: hotel (ConnectionError: hotel is stuck)"
    failed = {"hotel": "ConnectionError: hotel is stuck"}
    assert view.metadata[saga.METADATA] == {"undone": ["car", "flight"], "failed": failed}


async def test_undoing_has_a_limit_in_time(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("slow"), rollback_timeout=0.2)

    @agent.skill()
    async def work(task: weft.Task) -> None:
        await task.on_rollback("first", undo, "first")
        await task.on_rollback("slow", never, "slow")
        await task.on_rollback("last", undo, "last")
        raise weft.Fail("no")

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go")
    why = "no time was left of 0.2 s"
    assert view.metadata[saga.METADATA] == {"undone": ["last"], "failed": {"slow": why, "first": why}}


async def test_a_cancel_does_not_stop_what_is_being_undone(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("busy"), rollback_timeout=1.0, cancel_grace=0.1)

    @agent.skill()
    async def work(task: weft.Task) -> None:
        await task.on_rollback("first", undo, "first")
        await task.on_rollback("slow", never, "slow")
        raise weft.Fail("no")

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "rolling back 2 effects")
        with pytest.raises(weft.WeftError, match="had ended as failed before"):
            await handle.cancel()
        assert (await handle.result()).state is weft.State.FAILED


async def test_a_compensation_that_no_other_replica_could_run_is_refused(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("closures"))

    @agent.skill()
    async def work(task: weft.Task) -> str:
        for wrong in (lambda: None, partial(undo, "x"), task.update):
            with pytest.raises(UsageError, match="cannot be found again by another replica"):
                await task.on_rollback("a", wrong)
        with pytest.raises(UsageError, match="plain values"):
            await task.on_rollback("a", undo, object())
        await task.on_rollback("a", undo, "a")
        await task.on_rollback("a", undo, "a")
        with pytest.raises(StepChanged):
            await task.on_rollback("a", undo, "b")
        return "done"

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        assert (await handle.result()).text == "done"
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    assert len(stored.steps["_rollback"]) == 1
    stored.check()


async def test_a_worker_killed_while_it_undoes_is_followed_by_one_that_goes_on_undoing(
    mesh: BrokerMesh, caller: weft.Mesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    """Fails if the handler runs again, if something is undone twice that was recorded, or not at all."""
    first = await workers.start()
    async with await caller.submit(workers.agent, {"effects": 3, "at": "gate"}, skill="saga") as handle:
        await scratch.left("undo", 2)
        second = await workers.start()
        first.kill()
        await scratch.left("undo", 3)
        scratch.open("gate")
        await heard(handle, weft.State.FAILED)
        view = await handle.result()
        stored = await StoredTask.read(mesh, workers.agent, handle.id)
    assert view.text == "no"
    assert view.metadata[saga.METADATA] == {"undone": ["undo-2", "undo-1", "undo-0"], "failed": {}}
    assert len(scratch.found("start")) == 1
    undone = [(line[1], line[3]) for line in scratch.found("undone")]
    pids = (str(first.pid), str(second.pid))
    assert undone == [("effect-2", pids[0]), ("effect-1", pids[1]), ("effect-0", pids[1])]
    tried = [line[2] for line in scratch.found("undo") if line[1] == "effect-1"]
    assert len(tried) == 2
    assert len(set(tried)) == 1
    stored.check()
