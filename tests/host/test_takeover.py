"""Who owns a task, and that whoever was declared dead writes nothing more (P1, P2)."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from a2a.types import a2a_pb2 as pb

import weft
from weft.core.broker import sequence_of
from weft.host import takeover
from weft.host.run import Run
from weft.testing.agents import LocalReplica, ReplicaProcesses, client, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.scratch import Scratch
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, seen, settled
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.errors import Conflict
from weft_protocols.records import DEAD_LETTER_KEY, Claim, DeadLetter

Unique = Callable[[str], str]


async def test_when_a_worker_is_killed_another_completes_its_task(
    mesh: BrokerMesh, caller: weft.Mesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    """P1, P3. Fails if the task stays undone, ends twice, or repeats a step that was recorded."""
    first = await workers.start()
    async with await caller.submit(workers.agent, {"at": "gate"}, skill="work") as handle:
        await scratch.left("start")
        await heard(handle, "at the gate")
        second = await workers.start()
        first.kill()
        assert await first.exited() == -9
        await scratch.left("start", 2)
        scratch.open("gate")
        view = await handle.result(30)
        stored = await StoredTask.read(mesh, workers.agent, handle.id)
    assert view.data == ["before-0", "before-1", "after"]
    assert [line[1] for line in scratch.found("step")] == ["before-0", "before-1", "after"]
    stored.check()
    assert stored.attempts == [1, 2]
    begun = [(e.replica, e.attempt) for e in seen(handle) if e.replica]
    assert begun == [(first.id, 1), (second.id, 2)]


async def test_a_worker_that_stalls_past_its_lease_writes_nothing_more_when_it_wakes(
    mesh: BrokerMesh, caller: weft.Mesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    """P2. Fails if one event or step of the stalled worker is stored after the new claim, or after the end."""
    stalled = await workers.start()
    async with await caller.submit(workers.agent, "", skill="hammer") as handle:
        await scratch.left("step", 2)
        stalled.pause()
        other = await workers.start()
        await scratch.left("start", 2)
        stalled.proceed()
        tried = len([line for line in scratch.found("step") if line[3] == str(stalled.pid)])
        # The stalled one has found out: its handler was stopped, and it serves other tasks.
        await eventually(lambda: scratch.found("step") and fenced(stalled.output))
        scratch.open("enough")
        assert (await handle.result(30)).text == "enough"
        stored = await StoredTask.read(mesh, workers.agent, handle.id)
        assert (await caller.send(workers.agent, "alive")).text == "alive"
    assert tried >= 2
    stored.check()
    assert stored.attempts == [1, 2]
    new = next(sequence for sequence, claim in stored.claims if claim.replica == other.id)
    writers = {e.text for raw, e in zip(stored.events, seen(handle), strict=True) if raw.seq > new and e.text.isdigit()}
    assert writers == {str(other.pid)}


async def test_the_broker_refuses_a_stale_claim_event_and_step(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """P2 at its root: nothing in Python has to be right for the refusal."""
    agent = weft.Agent(unique("fence"))
    gate = asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> str:
        await gate.wait()
        return "done"

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await eventually(lambda: replica.owned)
        broker = await mesh.connect(agent.name)
        try:
            token, claim = await newest_claim(replica, agent.name, handle.id)
            newer = await takeover.write_claim(broker, agent.name, task_id=handle.id, claim=claim, expected=token)
            old = h.block(takeover.fence(agent.name, handle.id, token))
            new = h.block(takeover.fence(agent.name, handle.id, newer))
            event = subjects.event(agent.name, handle.id, "local", claim.origin)
            step = subjects.step(agent.name, handle.id, "k")
            for subject in (event, step):
                with pytest.raises(Conflict, match="10071"):
                    sequence_of((await broker.publish_once(subject, b"", headers=old))[0])
            with pytest.raises(Conflict):
                await takeover.write_claim(
                    broker, agent.name, task_id=handle.id, claim=other_claim(claim), expected=token
                )
            sequence_of((await broker.publish_once(step, b"", headers=new))[0])
        finally:
            await broker.close()
        gate.set()
        view = await handle.result(20)
    # The replica found out by its next write; its task was delivered again and it claimed it anew.
    assert view.text == "done"


async def test_two_replicas_never_run_one_first_delivery(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("spread"), concurrency=2)
    runs: list[str] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append(task.id)
        await asyncio.sleep(0.01)
        return task.replica

    async with running(mesh, agent, replicas=3) as replicas:
        views = await asyncio.gather(*(caller.send(agent.name, str(n)) for n in range(60)))
    assert len(runs) == len(set(runs)) == 60
    assert {view.text for view in views} == {replica.id for replica in replicas}


async def test_a_replica_that_gets_its_own_task_again_does_not_run_it_twice(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if late signs of life make a replica compete with itself, or the newer delivery is never settled."""
    agent = weft.Agent(unique("late"))
    runs: list[int] = []
    gate = asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append(task.attempt)
        await gate.wait()
        return "done"

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await eventually(lambda: replica.owned)
        _, claim = await newest_claim(replica, agent.name, handle.id)
        # What the broker does when it missed the signs: the same message, delivered once more.
        replica.replica.broker.send(claim.delivery, b"-NAK")
        await eventually(lambda: replica.replica.live[handle.id].deliveries != [claim.delivery])
        gate.set()
        assert (await handle.result()).text == "done"
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        await settled(mesh, agent.name)
    assert runs == [1]
    assert stored.attempts == [1]
    stored.check()


async def test_a_task_that_has_ended_is_only_acknowledged_when_it_comes_again(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if the crash of a worker between its last event and its acknowledgement runs the task again."""
    agent = weft.Agent(unique("again"))
    runs: list[int] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append(task.attempt)
        return "done"

    async with running(mesh, agent, replicas=2) as (first, second):
        for replica in (first, second):
            replica.replica.settle = without_ack(replica)  # type: ignore[method-assign]
        async with await caller.submit(agent.name, "go") as handle:
            assert (await handle.result()).text == "done"
            for replica in (first, second):
                del replica.replica.settle
            await settled(mesh, agent.name)
            stored = await StoredTask.read(mesh, agent.name, handle.id)
    assert runs == [1]
    stored.check()


async def test_the_same_message_under_another_context_is_the_same_task(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """P3. Fails if another slice of the subject, which the broker cannot compare, makes a second task."""
    agent = weft.Agent(unique("twice"))
    runs: list[str] = []
    gate = asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append(task.context_id)
        await gate.wait()
        return task.context_id

    async with running(mesh, agent, replicas=2) as replicas:
        async with await caller.submit(agent.name, "go", message_id="m1", context_id="one") as handle:
            await eventually(lambda: any(replica.owned for replica in replicas))
            for context in ("two", "three"):
                assert ids.slice_of(context) != ids.slice_of("one")
                await send_raw(caller, agent.name, message_id="m1", context_id=context)
            again = await caller.submit(agent.name, "go", message_id="m1", context_id="one")
            gate.set()
            assert (await handle.result()).text == "one"
            assert (await again.result()).text == "one"
            await again.aclose()
            late = await send_raw(caller, agent.name, message_id="m1", context_id="four")
            await settled(mesh, agent.name)
            stored = await StoredTask.read(mesh, agent.name, handle.id)
    assert late == handle.id
    assert runs == ["one"]
    assert len(stored.ends) == 1


async def test_a_message_with_the_id_of_another_task_is_dropped_and_blocks_nothing(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if the subject's task id is believed: somebody could take, or block, the task of another message."""
    agent = weft.Agent(unique("forged"))
    texts: list[str] = []

    @agent.skill()
    async def work(text: str) -> str:
        texts.append(text)
        return text

    async with running(mesh, agent):
        real = ids.task_id("local", agent.name, "real")
        await send_raw(caller, agent.name, message_id="forged", context_id="there", task_id=real, text="forged")
        await settled(mesh, agent.name)
        assert (await caller.send(agent.name, "real", message_id="real", context_id="here")).text == "real"
        await settled(mesh, agent.name)
    assert texts == ["real"]


async def test_a_handler_that_raises_is_tried_again_and_then_leaves_a_dead_letter(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("raises"), attempts=2)
    runs: list[int] = []

    @agent.skill()
    async def work(task: weft.Task) -> None:
        runs.append(task.attempt)
        raise ConnectionError(f"no route, attempt {task.attempt}")

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        view = await handle.result()
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        events = seen(handle)
    assert runs == [1, 2]
    assert view.state is weft.State.FAILED
    assert view.text == "failed after 2 of 2 attempts: ConnectionError: no route, attempt 2"
    assert "attempt 1 failed (ConnectionError: no route, attempt 1); again in" in [e.text for e in events][1]
    assert h.get(stored.ends[0].headers, h.DEAD_LETTER.encode()) == b"1"
    (letter,) = (DeadLetter.decode(record.data) for record in stored.steps[DEAD_LETTER_KEY])
    assert (letter.agent, letter.task, letter.caller) == (agent.name, handle.id, "local")
    assert (letter.attempts, letter.replica, letter.version) == (2, replica.id, agent.version)
    assert letter.reason == view.text
    assert letter.message == stored.messages[0].seq
    stored.check()


@pytest.mark.parametrize("kind", ["exits", "cancelled", "thread", "step"])
async def test_a_handler_that_ends_like_a_process_or_a_cancel_has_only_failed(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, kind: str
) -> None:
    """Fails if `sys.exit` in a handler ends the replica, or a stray cancellation loses the attempt in silence."""
    agent = weft.Agent(unique("stray"), attempts=1)

    @agent.skill("exits")
    async def leaves() -> None:
        sys.exit(3)

    @agent.skill("thread")
    def leaves_in_a_thread() -> None:
        sys.exit(3)

    @agent.skill("step")
    async def leaves_in_a_step(task: weft.Task) -> None:
        async def leave() -> None:
            sys.exit(3)

        await task.gather(task.step("a", leave), task.sleep(60))

    @agent.skill("cancelled")
    async def cancels() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go", skill=kind, timeout=5)
        assert view.state is weft.State.FAILED
        assert ("awaited something that was cancelled" if kind == "cancelled" else "sys.exit(3)") in view.text
        again = await caller.send(agent.name, "go", skill=kind, timeout=5)
        assert again.state is weft.State.FAILED


async def test_a_task_that_kills_every_worker_is_given_up_after_its_attempts(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a poisonous task goes round for ever, or ends without saying why."""
    agent = weft.Agent(unique("poison"), attempts=2)
    started: list[str] = []

    @agent.skill()
    async def work(task: weft.Task) -> None:
        started.append(task.replica)
        await asyncio.Event().wait()

    async with running(mesh, agent, replicas=3) as replicas, await caller.submit(agent.name, "go") as handle:
        for n in range(2):
            await eventually(lambda n=n: len(started) > n)  # type: ignore[misc]
            await next(replica for replica in replicas if replica.id == started[n]).crash()
        view = await handle.result(20)
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    assert len(started) == 2
    assert view.state is weft.State.FAILED
    assert view.text == "given up after 2 attempts"
    assert DEAD_LETTER_KEY in stored.steps
    stored.check()


async def test_tasks_outlive_a_kill_of_the_broker(fresh_mesh: BrokerMesh) -> None:
    """P1. Fails if an accepted task is lost or ends twice when the broker is killed and started again in the middle."""
    agent = weft.Agent("steady", concurrency=8)
    through = asyncio.Semaphore(0)

    @agent.skill()
    async def work(task: weft.Task, n: int) -> list[int]:
        done = []
        for part in range(4):
            done.append(await task.step(f"part-{part}", lambda p: n * 10 + p, part))
            await task.update(f"part {part}")
            await through.acquire() if part == 1 else None
        return done

    async with running(fresh_mesh, agent, replicas=2), client(fresh_mesh) as caller:
        handles = [await caller.submit("steady", {"n": n}) for n in range(24)]
        await eventually(lambda: sum(any(e.text == "part 1" for e in seen(handle)) for handle in handles) >= 8)
        await kill_and_restart(fresh_mesh)
        for _ in handles:
            through.release()
        views = [await handle.result(40) for handle in handles]
        for handle in handles:
            (await StoredTask.read(fresh_mesh, "steady", handle.id)).check()
            await handle.aclose()
    assert [view.data for view in views] == [[n * 10 + p for p in range(4)] for n in range(24)]


async def test_a_cancel_that_comes_while_a_task_is_being_taken_over_is_heeded(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """P1. Fails if stopping a task between its claim and its handler leaves it owned by nobody, signed for ever."""
    agent = weft.Agent(unique("meanwhile"))
    runs: list[int] = []
    claimed, gate = asyncio.Event(), asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> None:
        runs.append(task.attempt)
        await asyncio.Event().wait()

    async with running(mesh, agent) as (first,), await caller.submit(agent.name, "go") as handle:
        await eventually(lambda: runs)
        async with running(mesh, agent) as (second,):
            begin_again = second.replica.begin_again

            async def slowly(run: Run, *, said: str = "") -> Run | None:
                claimed.set()
                await gate.wait()
                return await begin_again(run, said=said)

            second.replica.begin_again = slowly  # type: ignore[method-assign]
            await first.crash()
            await claimed.wait()
            await caller.send_cancel(agent.name, handle.id, context_id=handle.context_id)
            await eventually(lambda: second.replica.live[handle.id].stop is not None)
            gate.set()
            assert (await handle.result()).state is weft.State.CANCELED
            stored = await StoredTask.read(mesh, agent.name, handle.id)
            await settled(mesh, agent.name)
            assert second.replica._held == set()
    assert runs == [1]
    stored.check()


async def test_records_are_found_when_the_broker_no_longer_recognises_repeats(fresh_mesh: BrokerMesh) -> None:
    """P3. Fails if steps, children's lists or questions rely on the duplicate window, which a long task outlives."""
    await forget_repeats_after(fresh_mesh, 0.1)
    agent = weft.Agent("patient")
    ran: list[str] = []

    @agent.skill()
    async def work(task: weft.Task) -> list[str]:
        def once() -> str:
            ran.append("once")
            return "once"

        done = await task.step("once", once)
        return [done, (await task.ask("question")).text]

    async with running(fresh_mesh, agent, replicas=2) as replicas, client(fresh_mesh) as caller:
        async with await caller.submit("patient", "go") as handle:
            await heard(handle, "question")
            await next(replica for replica in replicas if replica.owned).crash()
            await handle.send("yes", timeout=20)
            await heard(handle, weft.State.COMPLETED)
            assert (await handle.result()).data == ["once", "yes"]
            (await StoredTask.read(fresh_mesh, "patient", handle.id)).check()
    assert ran == ["once"]


# What the tests look at -----------------------------------------------------------------------------


def fenced(output: object) -> bool:
    """Whether a process said that somebody else owns its task."""
    return any("a newer claim owns" in str(line) for line in list(output))  # type: ignore[call-overload]


async def newest_claim(replica: LocalReplica, agent: str, task_id: str) -> tuple[int, Claim]:
    """The last claim of a task."""
    found = await takeover.last_claim(replica.replica.broker, agent, task_id)
    assert found is not None
    return found


def other_claim(claim: Claim) -> Claim:
    """What another replica would have written."""
    return replace(claim, replica="somebody-else", attempt=claim.attempt + 1)


def without_ack(replica: LocalReplica) -> Callable[..., None]:
    """A `settle` that stops signing and never reaches the broker, as when a worker dies just then."""

    def settle(ack: str, answer: bytes = b"+ACK") -> None:
        replica.replica._held.discard(ack)

    return settle


async def send_raw(
    caller: weft.Mesh, agent: str, *, message_id: str, context_id: str, task_id: str = "", text: str = "go"
) -> str:
    """A creating message on the subject of its context, whatever the client would do; its task id."""
    task_id = task_id or ids.task_id("local", agent, message_id)
    message = pb.Message(message_id=message_id, context_id=context_id, parts=[pb.Part(text=text)], role=pb.ROLE_USER)
    headers = h.block(
        h.fields({h.EXPECTED_SEQUENCE: "0", h.VERSION: h.A2A_VERSION, h.ORIGIN: caller.origin}),
    )
    await caller.broker.publish(
        subjects.task(agent, ids.slice_of(context_id), "local", task_id),
        pb.SendMessageRequest(message=message).SerializeToString(),
        headers=headers,
    )
    return task_id


async def forget_repeats_after(mesh: BrokerMesh, seconds: float) -> None:
    """Shorten the time in which the broker recognises a message it has stored."""
    broker = await mesh.connect("coordinator")
    try:
        config = (await broker.api("STREAM.INFO.MESH"))["config"]
        await broker.api("STREAM.UPDATE.MESH", {**config, "duplicate_window": int(seconds * 1e9)})
    finally:
        await broker.close()


async def kill_and_restart(mesh: BrokerMesh) -> None:
    """SIGKILL the broker and start it again on the same port."""
    os.kill(mesh.server.pid, signal.SIGKILL)
    await mesh.server.wait()
    await mesh.server.start()
