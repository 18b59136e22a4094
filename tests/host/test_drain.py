"""How a replica leaves: told to, cut off, or without its parent. Real processes."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import weft
from weft.testing.agents import LocalReplica, ReplicaProcess, ReplicaProcesses, eventually
from weft.testing.broker import BrokerMesh
from weft.testing.scratch import Scratch
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, seen, settled
from weft_protocols.errors import Unavailable

Unique = Callable[[str], str]


async def test_told_to_leave_it_finishes_what_it_runs_and_takes_nothing_new(
    mesh: BrokerMesh, caller: weft.Mesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    """Fails if running work is cut off, new work is taken, the exit code is not 0, or a second signal does harm."""
    leaving = await workers.start()
    async with await caller.submit(workers.agent, {"at": "gate"}, skill="work") as handle:
        await heard(handle, "at the gate")
        leaving.terminate()
        leaving.terminate()
        await leaving.said("leaving: 1 tasks are here")
        queued = await caller.submit(workers.agent, "later")
        leaving.terminate()
        scratch.open("gate")
        assert (await handle.result()).data == ["before-0", "before-1", "after"]
        assert await leaving.exited() == 0
        (await StoredTask.read(mesh, workers.agent, handle.id)).check()
        await workers.start()
        assert (await queued.result()).text == "later"
        stored = await StoredTask.read(mesh, workers.agent, queued.id)
        await queued.aclose()
    assert stored.claims[0][1].replica != leaving.id


async def test_what_is_not_done_in_time_is_handed_back_and_goes_on_elsewhere_at_once(
    mesh: BrokerMesh, caller: weft.Mesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    """Fails if the next replica has to wait for the lease to end, or the hand-back counts as an attempt."""
    leaving = await workers.start(WEFT_GRACE="0.2")
    async with await caller.submit(workers.agent, {"at": "gate"}, skill="work") as handle:
        await heard(handle, "at the gate")
        other = await workers.start()
        began = time.monotonic()
        leaving.terminate()
        await scratch.left("start", 2)
        took = time.monotonic() - began
        assert await leaving.exited() == 0
        scratch.open("gate")
        assert (await handle.result()).data == ["before-0", "before-1", "after"]
        stored = await StoredTask.read(mesh, workers.agent, handle.id)
    assert took < 2.5, "the lease is 4 s"
    stored.check()
    assert stored.attempts == [1, 1]
    assert [line[2:] for line in scratch.found("start")] == [["1", str(leaving.pid)], ["1", str(other.pid)]]
    assert [line[1] for line in scratch.found("step")] == ["before-0", "before-1", "after"]


async def test_an_open_question_is_handed_back_at_once(
    mesh: BrokerMesh, caller: weft.Mesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    """Fails if leaving waits its whole grace for an answer that may take days."""
    leaving = await workers.start(WEFT_GRACE="60")
    async with await caller.submit(workers.agent, {}, skill="questions") as handle:
        await heard(handle, "question 0")
        await workers.start()
        leaving.terminate()
        assert await leaving.exited(timeout=10) == 0
        await eventually(lambda: [event.text for event in seen(handle)].count("question 0") == 2)
        assert (await handle.send("yes")).data == ["yes"]
        stored = await StoredTask.read(mesh, workers.agent, handle.id)
        await settled(mesh, workers.agent)
    stored.check()
    assert set(stored.attempts) == {1}


async def test_a_replica_whose_parent_is_gone_leaves(
    mesh: BrokerMesh, caller: weft.Mesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    orphan = await workers.start()
    async with await caller.submit(workers.agent, {"at": "gate"}, skill="work") as handle:
        await heard(handle, "at the gate")
        orphan.orphan()
        scratch.open("gate")
        assert (await handle.result()).data == ["before-0", "before-1", "after"]
    assert await orphan.exited() == 0


async def test_handlers_that_do_not_stop_cannot_hold_the_process(
    mesh: BrokerMesh, caller: weft.Mesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    """Fails if a thread, or a handler that ignores its cancellation, keeps a leaving process or its tasks."""
    leaving = await workers.start(WEFT_GRACE="0.1")
    handles = [
        await caller.submit(workers.agent, {"seconds": 120}, skill="blocking"),
        await caller.submit(workers.agent, "gate", skill="stubborn"),
    ]
    await scratch.left("start", 2)
    other = await workers.start(WEFT_GRACE="0.1")
    leaving.terminate()
    assert await leaving.exited(timeout=15) == 0
    await scratch.left("start", 4)
    assert all(line[2:] == ["1", str(other.pid)] for line in scratch.found("start")[2:])
    scratch.open("gate")
    assert (await handles[1].result()).text == "done anyway"
    for handle in handles:
        (await StoredTask.read(mesh, workers.agent, handle.id)).check() if handle is handles[1] else None
        await handle.aclose()


async def test_a_replica_whose_account_is_revoked_ends_at_once(
    mesh: BrokerMesh, caller: weft.Mesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    """P6. Fails if a process that was cut off lingers, or its exit code does not say why it ended."""
    process = await workers.start(WEFT_GRACE="60")
    handle = await caller.submit(workers.agent, {"seconds": 120}, skill="blocking")
    stubborn = await caller.submit(workers.agent, "gate", skill="stubborn")
    await scratch.left("start", 2)
    await mesh.server.revoke(workers.agent)
    assert await process.exited(timeout=8) == 4
    assert any(workers.agent in line and "error:" in line for line in process.output)
    for one in (handle, stubborn):
        await one.aclose()


async def test_a_replica_leaves_by_an_interrupt_as_well(
    mesh: BrokerMesh, caller: weft.Mesh, workers: ReplicaProcesses
) -> None:
    process = await workers.start()
    os.kill(process.pid, signal.SIGINT)
    assert await process.exited() == 0


@pytest.mark.parametrize(
    ("target", "identity", "code", "said"),
    [
        ("nowhere.py", "local", 2, "there is no such file"),
        ("{here}/worker.py:nobody", "local", 2, "nobody is not there; agents in it: agent"),
        ("{here}/worker.py", "unheard-of", 4, "knows no identity 'unheard-of'"),
    ],
)
async def test_a_replica_that_cannot_start_says_why_and_what_kind_of_error_it_is(
    mesh: BrokerMesh, scratch: Scratch, target: str, identity: str, code: int, said: str
) -> None:
    place = target.format(here=Path(__file__).parent)
    process = ReplicaProcess(mesh, place, identity=identity, env=scratch.env)
    with pytest.raises(Unavailable, match=f"ended with {code}"):
        await process.start()
    assert any(line.startswith("error: ") and said in line for line in process.output)
    await process.aclose()


async def test_draining_under_load_loses_and_repeats_nothing(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """P1. Fails if a delivery that is on its way when a replica leaves counts as an attempt, or runs twice."""
    agent = weft.Agent(unique("rolling"), concurrency=4)
    runs: list[tuple[str, int]] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append((task.text, task.attempt))
        await asyncio.sleep(0.01)
        return task.text

    await mesh.add_agent(agent.name)
    replica = await LocalReplica.start(mesh, agent)
    handles = [await caller.submit(agent.name, str(n)) for n in range(100)]
    for n in (10, 25, 40, 55, 70):
        await eventually(lambda n=n: len(runs) > n)  # type: ignore[misc]
        following = await LocalReplica.start(mesh, agent)
        await replica.stop()
        replica = following
    views = [await handle.result(30) for handle in handles]
    for handle in handles:
        await handle.aclose()
    await replica.stop()
    assert [view.text for view in views] == [str(n) for n in range(100)]
    assert len(runs) == 100
    assert {attempt for _, attempt in runs} == {1}
