"""A lock that goes from one task of a replica to the next as promised, before the coordinator hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import weft
from weft.client import coordinator as coord
from weft.core.broker import Broker
from weft.host import session
from weft.testing import locklog
from weft.testing.agents import Process, client, coordinator_process, eventually, running
from weft.testing.broker import BrokerMesh
from weft_protocols.errors import LockTimeout

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("coordinator")]

Unique = Callable[[str], str]


class Book:
    """A record of which a handler says when it has it to itself."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.tokens: list[int] = []
        self.who: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def alone(self, who: str, token: int) -> None:
        """Be inside until the gate is open."""
        assert not self.inside, f"{who} comes in while {self.inside} is there"
        self.inside.append(who)
        self.tokens.append(token)
        self.who.append(who)
        await self.gate(who).wait()
        self.inside.remove(who)


def clerk(name: str, book: Book) -> weft.Agent:
    agent = weft.Agent(name, concurrency=50)

    @agent.skill()
    async def hold(task: weft.Task, who: str, name: str, helper: str = "", mode: str = "exclusive") -> int:
        if helper:
            await task.delegate(helper, "help")
        async with task.lock(name, wait=None, mode=mode) as lock:
            await book.alone(who, lock.token)
            return lock.token

    @agent.skill()
    async def enter(task: weft.Task, who: str, name: str) -> int:
        """Be inside, and let another branch in once the gate `branch` is open."""

        async def outer() -> None:
            async with task.lock(name, wait=None) as lock:
                await book.alone(who, lock.token)

        async def inner() -> int:
            await book.gate("branch").wait()
            async with task.lock(name, wait=None, reentrant=True) as lock:
                return lock.token

        return (await asyncio.gather(outer(), inner()))[1]

    @agent.skill()
    async def passes(_: weft.Task) -> str:
        """Needs no lock: once it has passed, whatever its replica did without a message is done."""
        return "passed"

    return agent


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was promised is acted on however long the coordinator says nothing: this machine may be slow."""
    monkeypatch.setattr(session, "FRESH", 60.0)


async def log_of(mesh: BrokerMesh) -> list[locklog.Numbered]:
    """What the coordinator decided; it breaks no law."""
    reader = await mesh.connect("coordinator")
    events = await locklog.decided(reader)
    await reader.close()
    assert not locklog.check(events)
    return events


async def queued(operator: Broker, name: str, count: int) -> None:
    """Return once so many wait for a lock."""

    async def there() -> bool:
        locks = (await coord.call(operator, "locks"))["locks"]
        return any(lock["name"] == name and lock["waiting"] == count for lock in locks)

    await eventually(there)


async def line(
    caller: weft.Mesh, operator: Broker, agent: str, book: Book, name: str, *who: str, **options: Any
) -> list[weft.Handle]:
    """Tasks that ask for a lock one after the other; the first one has it."""
    handles = []
    for n, one in enumerate(who):
        more = options if n == 0 else {}
        handles.append(await caller.submit(agent, {"who": one, "name": name, **more.get("message", {})}, skill="hold"))
        if n == 0:
            await eventually(lambda: book.inside == [who[0]])
        await queued(operator, name, n)
    return handles


@pytest.mark.usefixtures("patient")
async def test_the_next_task_of_the_replica_has_a_lock_while_the_coordinator_stands_still(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, operator: Broker, coordinator: Process
) -> None:
    book, name = Book(), unique("book")
    agent = clerk(unique("clerk"), book)
    async with running(mesh, agent):
        handles = await line(caller, operator, agent.name, book, name, "one", "two", "three")
        coordinator.pause()
        try:
            for who in ("one", "two"):
                book.gate(who).set()
            await eventually(lambda: book.inside == ["three"])
        finally:
            coordinator.proceed()
        book.gate("three").set()
        told = [(await handle.result()).data for handle in handles]
    assert told == book.tokens
    assert book.who == ["one", "two", "three"]
    promised = [number for number, event in await log_of(mesh) if event[0] == "lock.promised"]
    assert book.tokens[1:] == promised[-2:]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("why", ["delegated", "shared", "old"])
async def test_where_it_may_not_hold_any_more_what_was_promised_waits_for_the_coordinator(
    why: str,
    mesh: BrokerMesh,
    unique: Unique,
    caller: weft.Mesh,
    operator: Broker,
    coordinator: Process,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The task before delegated, so that a child of it may be inside; or the coordinator is silent for too long."""
    book, name = Book(), unique("book")
    agent, helper = clerk(unique("clerk"), book), weft.Agent(unique("helper"))

    @helper.skill()
    async def helps(_: weft.Task) -> str:
        return "done"

    message = {"delegated": {"helper": helper.name}, "shared": {"mode": "shared"}}.get(why, {})
    async with running(mesh, agent, helper):
        handles = await line(caller, operator, agent.name, book, name, "one", "two", message=message)
        if why == "old":
            monkeypatch.setattr(session, "FRESH", -1.0)
        coordinator.pause()
        try:
            book.gate("one").set()
            await eventually(lambda: not book.inside)
            await caller.send(agent.name, "by", skill="passes")
            assert book.inside == []
        finally:
            coordinator.proceed()
        await eventually(lambda: book.inside == ["two"])
        book.gate("two").set()
        assert [(await handle.result()).data for handle in handles] == book.tokens


@pytest.mark.usefixtures("patient")
async def test_a_task_that_asks_to_be_let_in_again_does_not_hand_its_lock_on(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh, operator: Broker, coordinator: Process
) -> None:
    """It asks while its lock is given back: the coordinator lets it in, and recalls what was promised."""
    book, name = Book(), unique("book")
    agent = clerk(unique("clerk"), book)
    async with running(mesh, agent):
        await caller.submit(agent.name, {"who": "one", "name": name}, skill="enter")
        await eventually(lambda: book.inside == ["one"])
        last = await caller.submit(agent.name, {"who": "two", "name": name}, skill="hold")
        await queued(operator, name, 1)
        coordinator.pause()
        try:
            book.gate("branch").set()
            await caller.send(agent.name, "by", skill="passes")  # meanwhile it has asked
            book.gate("one").set()
            await eventually(lambda: not book.inside)
            await caller.send(agent.name, "by", skill="passes")
            assert book.inside == []
        finally:
            coordinator.proceed()
        book.gate("two").set()
        assert (await last.result()).data == book.tokens[-1]


async def test_two_replicas_that_hand_on_and_give_up_keep_the_order_and_are_never_both_inside(
    mesh: BrokerMesh, unique: Unique, caller: weft.Mesh
) -> None:
    name, inside = unique("busy"), list[str]()
    tokens: list[int] = []
    late: list[str] = []
    agents = [weft.Agent(unique("busy"), concurrency=50) for _ in range(2)]
    for agent in agents:

        @agent.skill()
        async def cycle(task: weft.Task, count: int) -> int:
            held = 0
            for n in range(count):
                try:
                    async with task.lock(name, wait=0.05 if n % 3 == 2 else None) as lock:
                        assert not inside
                        inside.append(task.id)
                        tokens.append(lock.token)
                        await asyncio.sleep(0)
                        inside.remove(task.id)
                        held += 1
                except LockTimeout:
                    late.append(task.id)
            return held

    async with running(mesh, *agents):
        handles = [await caller.submit(agents[n % 2].name, {"count": 30}) for n in range(24)]
        held = [(await handle.result()).data for handle in handles]
    assert sum(held) == len(tokens) == 24 * 30 - len(late)
    assert tokens == sorted(set(tokens))
    promised = [event for _, event in await log_of(mesh) if event[0] == "lock.promised"]
    assert promised, "nothing was promised, so that nothing was tried"


async def test_a_leader_that_is_killed_while_locks_are_handed_on_leaves_nobody_inside_with_another(
    fresh_mesh: BrokerMesh,
) -> None:
    inside, tokens = list[str](), list[int]()
    agent = weft.Agent("busy", concurrency=50)
    half = asyncio.Event()

    @agent.skill()
    async def cycle(task: weft.Task, count: int) -> int:
        for _ in range(count):
            async with task.lock("one", wait=None) as lock:
                assert not inside
                inside.append(task.id)
                tokens.append(lock.token)
                await asyncio.sleep(0)
                inside.remove(task.id)
            if len(tokens) > 200:
                half.set()
        return count

    async with running(fresh_mesh, agent), client(fresh_mesh) as caller:
        async with coordinator_process(fresh_mesh) as first, coordinator_process(fresh_mesh):
            handles = [await caller.submit("busy", {"count": 40}) for _ in range(16)]
            await half.wait()
            first.kill()
            async with asyncio.timeout(60):
                assert [(await handle.result()).data for handle in handles] == [40] * 16
        await log_of(fresh_mesh)
    assert len(tokens) == 16 * 40
    assert tokens == sorted(set(tokens))
