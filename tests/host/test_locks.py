"""Locks of tasks: who holds what, in which order, and how a holder that is too late learns of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import weft
from weft.client import coordinator as coord
from weft.client.asks import Asks
from weft.core.broker import Broker
from weft.core.supervise import Tasks
from weft.host.locking import Lock
from weft.host.session import Session
from weft.testing import locklog
from weft.testing.agents import Process, ReplicaProcesses, client, coordinator_process, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.scratch import Scratch
from weft_protocols.errors import InvalidParams, LockLost, LockTimeout, UsageError

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("coordinator")]

Unique = Callable[[str], str]


@pytest.fixture(scope="module", autouse=True)
async def laws(mesh: BrokerMesh, coordinator: Process) -> AsyncIterator[None]:
    """Whatever the tests did, the coordinator's log breaks no law of locks."""
    yield
    reader = await mesh.connect("coordinator")
    try:
        assert not locklog.check(await locklog.decided(reader))
    finally:
        await reader.close()


async def lock_of(operator: Broker, name: str) -> dict[str, Any]:
    """A lock as the operator sees it; empty where nobody holds or wants it."""
    locks = (await coord.call(operator, "locks"))["locks"]
    return next((lock for lock in locks if lock["name"] == name), {})


async def waiters(operator: Broker, name: str) -> int:
    return len((await lock_of(operator, name)).get("waiters", ()))


async def waiting(operator: Broker, name: str, count: int) -> None:
    """Return once so many wait for a lock."""

    async def so_many() -> bool:
        return await waiters(operator, name) == count

    await eventually(so_many)


class Log:
    """What handlers in this process did, and gates they wait at."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []
        self.tokens: list[int] = []
        self.gates: dict[str, asyncio.Event] = {}

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    def held(self) -> list[str]:
        """Who is inside now."""
        now: list[str] = []
        for what, who in self.lines:
            now.append(who) if what == "in" else now.remove(who)
        return now

    async def alone(self, who: str) -> None:
        """Return once somebody is inside alone."""
        await eventually(lambda: self.held() == [who])


def holder(name: str, log: Log) -> weft.Agent:
    """Locks what it is told, says its name, waits at the gate of its name."""
    agent = weft.Agent(name, concurrency=20)

    @agent.skill()
    async def hold(
        task: weft.Task,
        who: str,
        names: list[str],
        mode: str = "exclusive",
        wait: float | None = None,
        lease: float = 30.0,
    ) -> int:
        async with task.lock(names, mode=mode, wait=wait, lease=lease) as lock:
            log.tokens.append(lock.token)
            log.lines.append(("in", who))
            try:
                await log.gate(who).wait()
            finally:
                log.lines.append(("out", who))
            return lock.token

    return agent


async def test_two_agents_hold_one_name_one_after_the_other_in_the_order_they_asked(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, operator: Broker
) -> None:
    log = Log()
    agents = [holder(unique("holder"), log) for _ in range(2)]
    async with running(mesh, *agents):
        handles = []
        for n in range(6):
            message = {"who": str(n), "names": ["in-order"]}
            handles.append(await caller.submit(agents[n % 2].name, message))
            await eventually(lambda: log.held() == ["0"])
            await waiting(operator, "in-order", n)
        for n in range(6):
            await log.alone(str(n))
            log.gate(str(n)).set()
        assert [(await handle.result()).data for handle in handles] == log.tokens
    assert log.tokens == sorted(set(log.tokens))
    assert await lock_of(operator, "in-order") == {}


async def test_shared_holders_are_inside_together_and_an_exclusive_one_waits_for_all_of_them(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, operator: Broker
) -> None:
    log = Log()
    agent = holder(unique("holder"), log)
    async with running(mesh, agent):
        for who in ("reader-1", "reader-2"):
            await caller.submit(agent.name, {"who": who, "names": ["book"], "mode": "shared"})
        await eventually(lambda: len(log.held()) == 2)
        await caller.submit(agent.name, {"who": "writer", "names": ["book"]})
        await waiting(operator, "book", 1)
        await caller.submit(agent.name, {"who": "late", "names": ["book"], "mode": "shared"})
        await waiting(operator, "book", 2)
        log.gate("reader-1").set()
        await eventually(lambda: log.held() == ["reader-2"])
        log.gate("reader-2").set()
        await eventually(lambda: log.held() == ["writer"])
        log.gate("writer").set()
        await eventually(lambda: log.held() == ["late"])
        log.gate("late").set()


async def test_several_names_are_held_together_and_whoever_waits_for_them_holds_none(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, operator: Broker
) -> None:
    log = Log()
    agent = holder(unique("holder"), log)
    async with running(mesh, agent):
        await caller.submit(agent.name, {"who": "first", "names": ["left"]})
        await eventually(lambda: log.held() == ["first"])
        await caller.submit(agent.name, {"who": "both", "names": ["right", "left"]})
        await eventually(lambda: waiters(operator, "right"))
        assert (await lock_of(operator, "right"))["holders"] == []
        log.gate("first").set()
        await eventually(lambda: log.held() == ["both"])
        locked = [await lock_of(operator, name) for name in ("left", "right")]
        assert len({one["holders"][0]["token"] for one in locked}) == 1
        log.gate("both").set()


async def test_a_wait_that_is_over_leaves_nothing_behind(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, operator: Broker
) -> None:
    log = Log()
    agent = holder(unique("holder"), log)

    @agent.skill()
    async def impatient(task: weft.Task, wait: float) -> str:
        try:
            async with task.lock("busy", wait=wait):
                return "got it"
        except LockTimeout as error:
            return str(error)

    async with running(mesh, agent):
        await caller.submit(agent.name, {"who": "first", "names": ["busy"]}, skill="hold")
        await eventually(lambda: log.held() == ["first"])
        said = [
            (await (await caller.submit(agent.name, {"wait": wait}, skill="impatient")).result()).text
            for wait in (0, 0.2)
        ]
        assert "does not wait" in said[0]
        assert "within 0.2 s; nothing is held" in said[1]
        assert await waiters(operator, "busy") == 0
        log.gate("first").set()
        await eventually(lambda: not log.held())
        handle = await caller.submit(agent.name, {"wait": 5}, skill="impatient")
        assert (await handle.result()).text == "got it"


async def test_a_waiting_task_holds_no_slot_and_a_lock_keeps_a_task_in_memory(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh
) -> None:
    agent = weft.Agent(unique("narrow"), concurrency=1, suspend_after=0.05)
    events: list[str] = []

    @agent.skill()
    async def asks(task: weft.Task) -> str:
        async with task.lock("desk") as lock:
            events.append(f"asks {task.attempt}")
            answer = await task.ask("go on?")
            lock.check()
            events.append("answered")
            return answer.text

    @agent.skill()
    async def waits(task: weft.Task) -> str:
        events.append("waits")
        async with task.lock("desk", wait=None):
            events.append("has it")
            return "had it"

    async with running(mesh, agent) as (replica,):
        first = await caller.submit(agent.name, "go", skill="asks")
        await first.result()
        second = await caller.submit(agent.name, "go", skill="waits")
        await eventually(lambda: "waits" in events)
        await asyncio.sleep(0.2)  # several times `suspend_after`
        assert len(replica.owned) == 2
        await caller.send(agent.name, "yes", task_id=first.id, context_id=first.context_id)
        assert (await second.result()).text == "had it"
        assert events == ["asks 1", "waits", "answered", "has it"]


def locks_twice(agent: weft.Agent, name: str) -> None:
    """Have its tasks take one lock two times, and give the tokens."""

    @agent.skill()
    async def work(task: weft.Task) -> list[int]:
        tokens = []
        for _ in range(2):
            async with task.lock(name, wait=None) as lock:
                tokens.append(lock.token)
        return tokens


async def test_a_lock_whose_return_was_not_heard_can_be_taken_again_by_its_task(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a task that comes back to a lock, while the leader changes, is told that it would wait for itself."""
    agent = weft.Agent(unique("again"))
    send_back, lost = Session._send_back, list[str]()

    def lose(self: Session, request: str, body: dict[str, Any], **options: Any) -> None:
        lost.append(request)
        if len(lost) > 1:
            send_back(self, request, body, **options)

    monkeypatch.setattr(Session, "_send_back", lose)

    locks_twice(agent, "again")
    async with running(mesh, agent):
        first, second = (await (await caller.submit(agent.name, "go")).result()).data
    assert first < second
    assert lost[0] in lost[1:]


async def test_a_return_that_is_heard_after_the_next_request_lets_its_task_in_all_the_same(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are in one message, in the wrong order: the first was lost with a leader and is said again."""
    agent = weft.Agent(unique("again"))
    send_back, ask = Session._send_back, Asks.ask
    lost, again = list[tuple[Session, str, dict[str, Any]]](), list[str]()

    def lose(self: Session, request: str, body: dict[str, Any], **options: Any) -> None:
        if lost or again:
            send_back(self, request, body, **options)
        else:
            lost.append((self, request, body))

    def behind(self: Asks, operation: str, body: Any, then: Any, **options: Any) -> None:
        ask(self, operation, body, then, **options)
        if operation == "lock" and lost:
            again.append(lost[0][1])
            send_back(*lost.pop())

    monkeypatch.setattr(Session, "_send_back", lose)
    monkeypatch.setattr(Asks, "ask", behind)

    locks_twice(agent, "behind")
    async with running(mesh, agent):
        first, second = (await (await caller.submit(agent.name, "go")).result()).data
    assert again
    assert first < second


async def test_an_operator_takes_a_lock_away_and_the_holder_learns_why_at_its_next_use(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, operator: Broker
) -> None:
    agent = weft.Agent(unique("holder"))
    inside, go = asyncio.Event(), asyncio.Event()
    uses: list[str] = []

    async def use_all(task: weft.Task, lock: Lock) -> None:
        async with lock:
            inside.set()
            await eventually(lambda: lock.lost)
            for use in (
                lock.check,
                lambda: lock.token,
                lambda: task.update("x"),
                lambda: task.step("s", str),
                lambda: task.delegate("somebody", "x"),
                lambda: task.sleep(1),
                lambda: task.artifact("a", "b"),
            ):
                try:
                    given = use()
                    if asyncio.iscoroutine(given):
                        await given
                except LockLost as error:
                    uses.append(str(error))

    @agent.skill()
    async def hold(task: weft.Task) -> str:
        with pytest.raises(LockLost, match="was lost inside its block: the operator released it: it hangs"):
            await use_all(task, task.lock("taken"))
        go.set()
        await task.update("outside of the block nothing is lost")
        return "told"

    async with running(mesh, agent):
        handle = await caller.submit(agent.name, "go")
        await inside.wait()
        with pytest.raises(InvalidParams):
            await coord.call(operator, "lock-release", {"name": "taken", "reason": ""})
        told = await coord.call(operator, "lock-release", {"name": "taken", "reason": "it hangs"})
        assert [one["task"] for one in told["released"]] == [handle.id]
        assert (await handle.result()).text == "told"
    assert len(uses) == 7
    assert all("the operator released it: it hangs" in use for use in uses)


async def test_a_branch_outside_of_the_block_is_not_told_of_its_loss(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, operator: Broker
) -> None:
    agent = weft.Agent(unique("holder"))
    lost = asyncio.Event()

    @agent.skill()
    async def hold(task: weft.Task) -> list[str]:
        async def inside() -> str:
            try:
                async with task.lock("half") as lock:
                    await coord.call(operator, "lock-release", {"name": "half", "reason": "for the test"})
                    await eventually(lambda: lock.lost)
                    lost.set()
            except LockLost:
                return "lost"
            return "kept"

        async def outside() -> str:
            await lost.wait()
            return str(await task.step("elsewhere", str, "unharmed"))

        return await task.gather(inside(), outside())

    async with running(mesh, agent):
        assert (await (await caller.submit(agent.name, "go")).result()).data == ["lost", "unharmed"]


async def test_a_task_that_lost_its_lock_is_tried_again_but_nothing_inside_the_block(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, operator: Broker
) -> None:
    agent, name = weft.Agent(unique("again"), retry=weft.RetryPolicy(initial=0.05)), unique("shaky")
    tokens, tries = list[int](), list[int]()

    @agent.skill()
    async def work(task: weft.Task) -> int:
        async with task.lock(name, wait=None) as lock:
            tokens.append(lock.token)

            async def body() -> int:
                tries.append(task.attempt)
                if task.attempt == 1:
                    await coord.call(operator, "lock-release", {"name": name, "reason": "for the test"})
                    await eventually(lambda: lock.lost)
                return lock.token

            return int(await task.step("write", body, step_options=weft.StepOptions(retries=5)))

    async with running(mesh, agent):
        told = (await (await caller.submit(agent.name, "go")).result()).data
    assert tries == [1, 2]
    assert tokens == [tokens[0], told]
    assert told > tokens[0]


async def test_what_a_task_left_locked_is_free_when_it_ends(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, operator: Broker
) -> None:
    agent = weft.Agent(unique("holder"))
    branches = Tasks("branches a handler left")

    @agent.skill()
    async def leave(task: weft.Task) -> str:
        held = asyncio.Event()

        async def hold() -> None:
            async with task.lock("left behind"):
                held.set()
                await asyncio.Event().wait()

        branches.start(hold())
        await held.wait()
        return "gone"

    async with running(mesh, agent):
        assert (await (await caller.submit(agent.name, "go")).result()).text == "gone"

        async def free() -> bool:
            return await lock_of(operator, "left behind") == {}

        await eventually(free)
        await branches.aclose()


async def test_wrong_locks_are_refused_with_what_is_wrong(mesh: BrokerMesh, unique: Unique, caller: weft.Mesh) -> None:
    agent = weft.Agent(unique("wrong"))
    said: list[str] = []

    @agent.skill()
    async def wrong(task: weft.Task) -> str:
        for names, options in (
            ((), {}),
            (("",), {}),
            (("a\nb",), {}),
            (("x" * 201,), {}),
            (("a",), {"mode": "read"}),
            (("a",), {"wait": -1}),
            (("a",), {"lease": 0.5}),
        ):
            with pytest.raises(InvalidParams) as caught:
                task.lock(*names, **options)
            said.append(str(caught.value))
        lock = task.lock("once")
        with pytest.raises(LockLost, match="not held"):
            lock.check()
        async with lock:
            with pytest.raises(InvalidParams, match="would wait for itself"):
                async with task.lock("once"):
                    pass
        with pytest.raises(UsageError):
            async with lock:
                pass
        return "ok"

    async with running(mesh, agent):
        view = await (await caller.submit(agent.name, "go")).result()
        assert view.text == "ok", view
    assert len(said) == 7


async def test_a_stopped_holder_loses_its_lock_to_the_next_and_learns_of_it_when_it_goes_on(
    workers: ReplicaProcesses, scratch: Scratch, mesh: BrokerMesh, unique: Unique, caller: weft.Mesh
) -> None:
    log = Log()
    other = holder(unique("other"), log)
    replica = await workers.start()
    async with running(mesh, other):
        await caller.submit(workers.agent, {"name": "stalled", "at": "go", "lease": 1.0}, skill="locked")
        ((_, _, _, token, _),) = await scratch.left("locked")
        replica.pause()
        try:
            await caller.submit(other.name, {"who": "next", "names": ["stalled"]})
            await eventually(lambda: log.held() == ["next"])
        finally:
            scratch.open("go")
            replica.proceed()
        ((_, _, _, lost, _), *_) = await scratch.left("lost")
        assert lost == token
        assert log.tokens[0] > int(token)
        log.gate("next").set()


async def test_the_next_attempt_of_a_killed_holder_takes_its_lock_over_at_once_with_a_greater_token(
    workers: ReplicaProcesses, scratch: Scratch, caller: weft.Mesh, operator: Broker
) -> None:
    replica = await workers.start()
    handle = await caller.submit(workers.agent, {"name": "killed", "at": "go"}, skill="locked")
    ((_, task, _, first, _),) = await scratch.left("locked")
    rival = await caller.submit(workers.agent, {"name": "killed"}, skill="locked")
    await eventually(lambda: waiters(operator, "killed"))
    replica.kill()
    await workers.start()
    _, (_, again, attempt, second, _) = await scratch.left("locked", 2)
    assert (again, attempt) == (task, "2")
    assert int(second) > int(first)
    assert await waiters(operator, "killed") == 1
    scratch.open("go")
    assert (await handle.result()).data == int(second)
    assert (await rival.result()).data > int(second)


async def test_others_get_the_lock_of_a_killed_holder_when_its_lease_ends(
    workers: ReplicaProcesses, scratch: Scratch, mesh: BrokerMesh, unique: Unique, caller: weft.Mesh
) -> None:
    log = Log()
    other = holder(unique("other"), log)
    replica = await workers.start()
    async with running(mesh, other):
        await caller.submit(workers.agent, {"name": "orphaned", "at": "never", "lease": 1.0}, skill="locked")
        ((_, _, _, token, _),) = await scratch.left("locked")
        replica.kill()
        handle = await caller.submit(other.name, {"who": "heir", "names": ["orphaned"]})
        await eventually(lambda: log.held() == ["heir"])
        log.gate("heir").set()
        assert (await handle.result()).data > int(token)


async def test_locks_outlive_the_coordinator_and_nobody_waits_in_vain(fresh_mesh: BrokerMesh) -> None:
    """Held and waited for while it is killed, asked for while there is none: another one knows it all."""
    log = Log()
    agent, other = holder("holder", log), holder("other", log)
    async with running(fresh_mesh, agent, other), client(fresh_mesh) as caller:
        async with coordinator_process(fresh_mesh) as first:
            await caller.submit("holder", {"who": "one", "names": ["kept"]})
            await eventually(lambda: log.held() == ["one"])
            await caller.submit("other", {"who": "two", "names": ["kept"]})
            operator = await fresh_mesh.connect("operator")
            await eventually(lambda: waiters(operator, "kept"))
            first.kill()
            await first.exited()
        handles = [await caller.submit("holder", {"who": "three", "names": ["other"]})]
        log.gate("one").set()
        await eventually(lambda: log.held() == [])
        async with coordinator_process(fresh_mesh):
            await eventually(lambda: sorted(log.held()) == ["three", "two"])
            handles.append(await caller.submit("holder", {"who": "four", "names": ["kept"]}))
            await eventually(lambda: waiters(operator, "kept"))
            for who in ("two", "three", "four"):
                log.gate(who).set()
            async with asyncio.timeout(20):
                third, fourth = [(await handle.result()).data for handle in handles]
            assert third in log.tokens
            assert fourth == log.tokens[-1] == max(log.tokens)
            reader = await fresh_mesh.connect("coordinator")
            events = await locklog.decided(reader)
            assert not locklog.check(events)
            assert [event[0] for _, event in events].count("led") == 2
            await reader.close()
        await operator.close()
