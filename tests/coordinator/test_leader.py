"""One coordinator leads; what it decides is stored in order, by it alone, and read alike by all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from weft.core.broker import Broker
from weft.core.history import StreamReader
from weft.core.supervise import Tasks
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh
from weft_coordinator.decide import laws
from weft_coordinator.decide.ledger import Event, Ledgers
from weft_coordinator.shell.decided import Commit, DecidedLog
from weft_coordinator.shell.leader import Leader, Term, Terms
from weft_protocols.errors import TimedOut, Unavailable
from weft_protocols.resources import COORD, DECIDED, LEASE, SNAPSHOTS

pytestmark = pytest.mark.anyio


class Tally:
    """A ledger that keeps what was added, with the events' numbers."""

    kinds = frozenset({"add"})

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}
        self.last = 0

    def apply(self, event: Event, *, number: int, at: int) -> None:
        if event[1] == "poison":
            raise ValueError("cannot be folded")
        self.sums[event[1]] = self.sums.get(event[1], 0) + event[2]
        self.last = number

    def dump(self) -> Any:
        return [self.sums, self.last]

    def load(self, dumped: Any) -> None:
        self.sums, self.last = dict(dumped[0]) if dumped else {}, dumped[1] if dumped else 0


class Node:
    """A coordinator of which there is only the leader."""

    def __init__(self, broker: Broker, id: str) -> None:
        self.broker = broker
        self.tally = Tally()
        self.reader = StreamReader(broker)
        self.decided = DecidedLog(broker, self.reader, Ledgers((Terms(), self.tally)))
        self.failing = False
        self.tried = 0
        self.leader = Leader(
            broker,
            self.decided,
            id=id,
            clock=lambda: time.time_ns() // 1_000_000,
            lead=self.lead,
            deposed=lambda: None,
        )

    async def lead(self) -> None:
        self.tried += 1
        if self.failing:
            raise RuntimeError("a part cannot lead")

    async def start(self) -> Node:
        await self.reader.open()
        await self.leader.start()
        return self

    async def stop(self) -> None:
        await self.leader.stop()
        await self.reader.close()
        await self.broker.close()

    async def add(self, name: str, amount: int = 1) -> list[int]:
        return await self.leader.decide(lambda now: [("add", name, amount)])


class Nodes:
    def __init__(self, mesh: BrokerMesh) -> None:
        self.mesh = mesh
        self._made: list[Node] = []

    async def node(self, id: str, *, start: bool = True) -> Node:
        made = Node(await self.mesh.connect("coordinator"), id)
        self._made.append(made)
        return await made.start() if start else made

    async def fresh(self) -> Node:
        """One that reads everything and does not stand for election."""
        made = Node(await self.mesh.connect("coordinator"), "reader")
        self._made.append(made)
        await made.reader.open()
        await made.decided.sync()
        return made

    async def log(self) -> list[Commit]:
        reader = await StreamReader(broker := await self.mesh.connect("coordinator")).open()
        found = [Commit.decode(one.data) for one in await reader.all(COORD, DECIDED)]
        await reader.close()
        await broker.close()
        return found

    async def aclose(self) -> None:
        for node in self._made:
            await node.stop()


@pytest.fixture
async def nodes(mesh: BrokerMesh) -> AsyncIterator[Nodes]:
    """Coordinators on an empty log, which breaks no law in the end."""
    broker = await mesh.connect("coordinator")
    await broker.api(f"STREAM.PURGE.{COORD}")
    made = Nodes(mesh)
    try:
        yield made
        assert laws.violations(await made.log()) == []
    finally:
        await made.aclose()
        await broker.close()


async def test_many_decisions_at_once_become_few_commits_and_keep_their_order(nodes: Nodes) -> None:
    one = await nodes.node("a")
    before = one.leader.commits
    numbers = await asyncio.gather(*(one.add(f"n{n % 7}", n) for n in range(500)))
    assert one.leader.commits - before < 50
    assert [first for first, *_ in numbers] == list(range(2, 502))
    other = await nodes.fresh()
    assert other.tally.dump() == one.tally.dump()
    assert (other.decided.number, other.decided.epoch) == (501, 1)


async def test_an_answer_without_events_waits_for_what_it_may_depend_on(nodes: Nodes) -> None:
    one = await nodes.node("a")
    first = one.leader.submit(lambda now: [("add", "x", 1)])
    second = one.leader.submit(lambda now: [])
    assert one.tally.sums == {"x": 1}
    assert not second.done()
    await second
    assert first.done()


async def test_what_a_decision_raises_is_raised_and_nothing_is_decided(nodes: Nodes) -> None:
    one = await nodes.node("a")

    def refuse(now: int) -> Sequence[Event]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await one.leader.decide(refuse)
    assert await one.add("x") == [2]


async def test_events_of_another_version_are_numbered_and_left_out(nodes: Nodes) -> None:
    one = await nodes.node("a")
    await one.leader.decide(lambda now: [("tomorrow", {"deep": [1]}), ("add", "x", 1)])
    other = await nodes.fresh()
    assert (other.tally.sums, other.tally.last, other.decided.number) == ({"x": 1}, 3, 3)


async def test_a_standby_leads_at_once_when_the_leader_stops(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    # It must hear of it: looking at the lease by itself would come too late.
    monkeypatch.setattr("weft_coordinator.shell.leader.LOOK", 60.0)
    one, two = await nodes.node("a"), await nodes.node("b")
    await one.add("x", 5)
    with pytest.raises(Unavailable, match="a does"):
        two.leader.submit(lambda now: [])
    await one.leader.stop()
    await eventually(lambda: two.leader.leading)
    assert await two.add("x") == [4]
    assert two.tally.sums == {"x": 6}
    assert two.leader.epoch == 2


async def test_a_deposed_leaders_decisions_are_refused_and_not_in_the_log(nodes: Nodes) -> None:
    one, two = await nodes.node("a"), await nodes.node("b")
    await one.add("x")
    two.leader.are_gone(["a"])
    await eventually(lambda: two.leader.leading)
    assert one.leader.term.leader == "a"  # it does not know yet
    pending = [one.leader.submit(lambda now: [("add", "phantom", 1)]) for _ in range(3)]
    assert one.tally.sums == {"x": 1, "phantom": 3}
    for done in pending:
        with pytest.raises(Unavailable):
            await done
    await two.add("y")
    with pytest.raises(Unavailable, match="does not lead"):
        one.leader.submit(lambda now: [])
    await one.decided.sync()
    assert one.tally.sums == two.tally.sums == {"x": 1, "y": 1}


async def test_a_commit_whose_acknowledgement_is_lost_is_stored_once_and_deposes_nobody(nodes: Nodes) -> None:
    one = await nodes.node("a")
    publish = one.broker.publish_once
    lost: list[str] = []

    def lossy(subject: str, data: bytes, **options: Any) -> asyncio.Future[tuple[bytes, bytes | None]]:
        sent = publish(subject, data, **options)
        if subject != DECIDED or lost:
            return sent
        lost.append(subject)
        answer: asyncio.Future[tuple[bytes, bytes | None]] = asyncio.get_running_loop().create_future()
        sent.add_done_callback(lambda _: answer.set_exception(TimedOut("no answer")))
        return answer

    one.broker.publish_once = lossy  # type: ignore[method-assign]
    assert await one.add("x") == [2]
    assert lost
    assert one.leader.leading
    assert await one.add("x") == [3]
    assert (await nodes.fresh()).tally.sums == {"x": 2}


async def test_a_commit_that_is_stored_after_the_log_was_read_anew_is_read_like_anybodys(nodes: Nodes) -> None:
    """Its leader was deposed while the broker stood still; without it the next reign would begin with less than all."""
    one = await nodes.node("a")
    await one.add("x")
    publish, go = one.broker.publish_once, asyncio.Event()

    async def late(subject: str, data: bytes, **options: Any) -> tuple[bytes, bytes | None]:
        if subject == DECIDED:
            await go.wait()
        return await publish(subject, data, **options)

    tasks = Tasks("late writes")
    one.broker.publish_once = lambda *args, **options: tasks.start(late(*args, **options))  # type: ignore[method-assign]
    pending = one.leader.submit(lambda now: [("add", "y", 1)])
    await asyncio.sleep(0)
    with pytest.raises(ValueError):
        one.leader.submit(lambda now: [("add", "poison", 1)])
    await one.decided.sync()
    assert one.tally.sums == {"x": 1}
    go.set()
    with pytest.raises(Unavailable):
        await pending
    await eventually(lambda: one.leader.leading)
    assert one.tally.sums == {"x": 1, "y": 1}
    await one.add("z")
    assert (await nodes.fresh()).tally.sums == {"x": 1, "y": 1, "z": 1}


@pytest.mark.parametrize("event", [("add", "poison", 1), ("add", "x", 1, object())], ids=["fold", "write"])
async def test_an_event_that_cannot_be_folded_or_written_leaves_no_trace_and_the_leader_goes_on(
    nodes: Nodes, event: Event
) -> None:
    one = await nodes.node("a")
    await one.add("x")
    with pytest.raises((Unavailable, ValueError)):
        await one.leader.decide(lambda now: [("add", "y", 1), event])
    await eventually(lambda: one.leader.leading)
    assert one.tally.sums == {"x": 1}
    await one.add("x")
    assert (await nodes.fresh()).tally.sums == {"x": 2}


async def test_a_coordinator_that_cannot_lead_lets_go_and_tries_again_later(nodes: Nodes) -> None:
    one, two = await nodes.node("a"), await nodes.node("b")
    two.failing = True
    await one.leader.stop()
    await eventually(lambda: two.tried)

    async def let_go() -> bool:
        stored = await one.broker.last(COORD, LEASE)
        return stored is None or not Term.decode(stored.data).leader

    await eventually(let_go)
    two.failing = False
    await eventually(lambda: two.leader.leading)
    assert await two.add("x") == [4]


async def test_after_a_snapshot_the_log_is_short_and_a_new_coordinator_reads_the_same(nodes: Nodes) -> None:
    one = await nodes.node("a")
    old = await nodes.fresh()  # has read nothing of what will be let go of
    one.decided.snapshot_after = 40
    for n in range(60):
        await one.add(f"n{n % 5}", n)
    await eventually(lambda: one.decided.since_snapshot < 40)
    await one.add("late")
    assert len(await nodes.log()) < 30
    assert await one.reader.last(COORD, f"{SNAPSHOTS}.head") is not None
    for other in (await nodes.fresh(), old):
        await other.decided.sync()
        assert other.decided.ledgers.dump() == one.decided.ledgers.dump()
        assert (other.decided.number, other.decided.sequence) == (one.decided.number, one.decided.sequence)
    await one.leader.stop()
    two = await nodes.node("b")
    assert await two.add("n0") == [64]


async def test_snapshots_made_while_decisions_come_lose_none(nodes: Nodes) -> None:
    one = await nodes.node("a")
    stop = asyncio.Event()
    made = 0

    async def busy(name: str) -> None:
        nonlocal made
        while not stop.is_set():
            await one.add(name)
            made += 1

    async with asyncio.TaskGroup() as group:
        for n in range(20):
            group.create_task(busy(f"n{n}"))
        for _ in range(3):
            one.decided.snapshot_after = 100
            await eventually(lambda: one.decided.snapshot_after > 100)
        stop.set()
    other = await nodes.fresh()
    assert sum(other.tally.sums.values()) == made
    assert other.decided.ledgers.dump() == one.decided.ledgers.dump()


async def test_only_the_leader_can_make_a_snapshot(nodes: Nodes) -> None:
    one, two = await nodes.node("a"), await nodes.node("b")
    await one.add("x")
    two.leader.are_gone(["a"])
    await eventually(lambda: two.leader.leading)
    one.decided.since_snapshot, one.decided.snapshot_after = 10, 5
    with pytest.raises(Unavailable):
        await one.add("phantom")
    assert await one.reader.last(COORD, f"{SNAPSHOTS}.head") is None


async def test_a_snapshot_that_is_late_is_not_taken_for_one_of_what_was_read_meanwhile(nodes: Nodes) -> None:
    one, two = await nodes.node("a"), await nodes.node("b")
    head = f"{SNAPSHOTS}.head"
    publish, held, go, tried = one.broker.publish_once, asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def late(subject: str, data: bytes, **options: Any) -> tuple[bytes, bytes | None]:
        try:
            return await publish(subject, data, **options)
        finally:
            if subject == head:
                tried.set()
            elif subject.startswith(SNAPSHOTS):
                held.set()
                await go.wait()

    tasks = Tasks("late writes")
    one.broker.publish_once = lambda *args, **options: tasks.start(late(*args, **options))  # type: ignore[method-assign]
    one.decided.since_snapshot, one.decided.snapshot_after = 10, 5
    await one.add("x")
    await held.wait()
    two.leader.are_gone(["a"])
    await eventually(lambda: two.leader.leading)
    await two.add("y")
    with pytest.raises(ValueError):
        one.leader.submit(lambda now: [("add", "poison", 1)])
    await one.decided.sync()
    go.set()
    await tried.wait()
    await two.add("z")
    assert (await nodes.fresh()).tally.sums == {"x": 1, "y": 1, "z": 1}
    assert await one.reader.last(COORD, head) is None


async def test_a_lease_that_is_no_lease_hinders_nobody(nodes: Nodes) -> None:
    broker = await nodes.mesh.connect("coordinator")
    await broker.publish(LEASE, b"\xc1")
    await broker.close()
    one = await nodes.node("a")
    assert one.leader.leading
    assert Term.decode(b"\xc1").leader == ""


def test_the_laws_name_what_is_broken() -> None:
    def commit(epoch: int, first: int, *events: Event, at: int = 10_000) -> Commit:
        return Commit(epoch, at, first, events)

    led, add = ("led", "a"), ("add", "x", 1)
    good = [commit(1, 1, led), commit(1, 2, add, add), commit(2, 4, led, add)]
    assert laws.violations(good) == []
    for law, bad in (
        (1, [*good, commit(1, 6, led)]),
        (2, [*good, commit(3, 6, add)]),
        (2, [*good, commit(2, 6, led)]),
        (3, [*good, commit(2, 7, add)]),
        (3, [*good, commit(2, 5, add)]),
        (4, [*good, commit(2, 6, add, at=1)]),
    ):
        assert [one.split(":")[0] for one in laws.violations(bad)] == [f"law {law}"]
