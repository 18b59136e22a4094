"""A replica that is gone gives up its work at once, whatever the acknowledgement wait; one that is there keeps it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from weft.core.broker import Broker, Delivered
from weft.core.pull import Delivery, PullLoop
from weft.core.supervise import Tasks
from weft.testing.agents import ReplicaProcess, ReplicaProcesses, client, eventually
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft.testing.scratch import Scratch
from weft.testing.stored import StoredTask
from weft_coordinator.decide import handback
from weft_coordinator.decide.handback import Connections
from weft_coordinator.service.app import Coordinator
from weft_protocols import connections, subjects
from weft_protocols.errors import TimedOut, Unreachable
from weft_protocols.records import HANDED_BACK, SUSPENDED, Claim
from weft_protocols.states import State

WORKER = Path(__file__).parents[1] / "host" / "worker.py"
AGENTS = tuple(f"worker-{n}" for n in range(12))


# The rule ----------------------------------------------------------------------------------------------


def event(account: str, name: str, cid: int = 1, server: str = "S") -> bytes:
    return json.dumps({"server": {"id": server}, "client": {"acc": account, "name": name, "id": cid}}).encode()


def test_a_connection_is_known_by_its_name_and_proven_by_its_account() -> None:
    name = connections.of_replica("analyst", "7-ab")
    assert handback.connection(event("analyst", name, 3)) == (("analyst", "7-ab"), "S/3")
    assert handback.connection(event("mallory", name)) is None
    assert handback.connection(event("MESH", connections.of_coordinator("c1"))) == (("coordinator", "c1"), "S/1")
    assert handback.connection(event("coordinator", connections.of_coordinator("c1"))) is None
    for other in (event("analyst", "agent analyst"), event("analyst", "agent analyst >"), b"", b"[]", b'{"client": 1}'):
        assert handback.connection(other) is None


def test_only_who_does_not_come_back_within_two_seconds_is_gone() -> None:
    seen, peer = Connections(), ("analyst", "r1")
    seen.opened(peer, "S/1")
    assert seen.closed(peer, "S/1", now=1000)
    assert seen.gone(2999) == []
    assert seen.gone(3000) == [peer]
    assert seen.gone(3000, agent="other") == []
    seen.opened(peer, "S/2")
    assert seen.gone(9000) == []


def test_the_end_of_an_older_connection_says_nothing() -> None:
    seen, peer = Connections(), ("analyst", "r1")
    seen.opened(peer, "S/1")
    seen.opened(peer, "T/1")
    assert not seen.closed(peer, "S/1", now=1000)
    assert seen.gone(9000) == []
    assert seen.closed(peer, "T/1", now=9000)


def test_after_its_own_reconnect_a_coordinator_takes_nobody_for_gone() -> None:
    seen = Connections()
    seen.closed(("analyst", "r1"), "S/1", now=1000)
    seen.forget()
    assert seen.gone(9000) == []


def claim(replica: str, delivery: str, state: str = "held") -> bytes:
    return Claim(replica, "1", 1, "local", "o", "c", "00", 5, delivery=delivery, state=state).encode()


def test_only_what_the_replica_holds_is_handed_back_and_only_to_its_own_agents_consumers() -> None:
    mine = "$JS.ACK.MESH.analyst=work.1.5.2.1795996216155820092.0"
    claims = {
        "held": claim("r1", mine),
        "answer": claim("r1", "$JS.ACK.MESH.analyst=input.1.9.2.1.0"),
        "others": claim("r2", mine),
        "waits": claim("r1", "", SUSPENDED),
        "back": claim("r1", mine, HANDED_BACK),
        "foreign": claim("r1", "$JS.ACK.MESH.other=work.1.5.2.1.0"),
        "forged": claim("r1", "mesh.decided"),
        "broken": b"\xc1",
    }
    assert handback.held("analyst", {"r1"}, claims) == {"held": ("work", 5), "answer": ("input", 9)}
    assert handback.acknowledgement("analyst", ("work", 5), count=7) == "$JS.ACK.MESH.analyst=work.1.5.7.0.0"


# With a broker and processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def strict(anyio_backend: str) -> AsyncIterator[BrokerMesh]:
    """A broker that waits 30 s for a sign of life."""
    async with await start_test_mesh(AGENTS, durability="strict") as mesh:
        yield mesh


@pytest.fixture(scope="module")
async def leader(strict: BrokerMesh) -> AsyncIterator[Coordinator]:
    """The coordinator of that mesh."""
    broker = await strict.connect("coordinator")
    made = Coordinator(broker)
    await made.start()
    yield made
    await made.aclose()
    await broker.close()


@pytest.fixture(scope="module")
def names() -> Callable[[], str]:
    left = iter(AGENTS)
    return lambda: next(left)


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(tmp_path)


@pytest.fixture
async def workers(
    strict: BrokerMesh, leader: Coordinator, names: Callable[[], str], scratch: Scratch
) -> AsyncIterator[ReplicaProcesses]:
    """Replicas of `worker.py` beside a coordinator."""
    async with ReplicaProcesses(strict, WORKER, identity=names(), env=scratch.env) as made:
        yield made


async def test_a_killed_replicas_task_begins_again_within_four_seconds_under_a_wait_of_thirty(
    strict: BrokerMesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    first = await workers.start()
    async with client(strict) as caller:
        for _ in range(3):  # an answer about work is refused if it seems to be about work that was finished before
            await caller.send(workers.agent, "hello", skill="echo")
        handle = await caller.submit(workers.agent, {"at": "gate"}, skill="work")
        await scratch.left("start")
        second = await workers.start()
        began = time.monotonic()
        first.kill()
        await scratch.left("start", 2)
        assert time.monotonic() - began < 4.0
        scratch.open("gate")
        await handle.result(30)
        await handle.aclose()
        stored = await StoredTask.read(strict, workers.agent, handle.id)
    stored.check()
    assert stored.attempts == [1, 2]
    assert [one.replica for _, one in stored.claims][:2] == [first.id, second.id]


@pytest.mark.soak
async def test_two_hundred_tasks_of_one_replica_begin_again_elsewhere(
    strict: BrokerMesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    first = await workers.start(CONCURRENCY="200")
    async with client(strict) as caller:
        handles = [await caller.submit(workers.agent, {"at": "gate", "steps": 0}, skill="work") for _ in range(200)]
        await scratch.left("start", 200)
        second = await workers.start(CONCURRENCY="200")
        first.kill()
        began = time.monotonic()
        await scratch.left("start", 400)
        assert time.monotonic() - began < 25.0
        scratch.open("gate")
        for handle in handles:
            await handle.result(30)
            await handle.aclose()
    again = [line for line in scratch.found("start") if line[2] == "2"]
    assert len({line[1] for line in again}) == len(again) == 200
    assert {line[3] for line in again} == {str(second.pid)}


async def test_what_was_delivered_and_not_even_claimed_is_handed_back_too(
    strict: BrokerMesh, workers: ReplicaProcesses, leader: Coordinator
) -> None:
    settings = strict.settings(workers.agent)
    gone = await Broker.connect(settings, name=connections.of_replica(workers.agent, "r1"))
    got: list[Delivery] = []
    pull = PullLoop(gone, stream="MESH", consumer=subjects.consumer(workers.agent, "work"), handler=got.append)
    (await pull.start()).want(1)
    async with client(strict) as caller, await caller.submit(workers.agent, "hello", skill="echo") as handle:
        await eventually(lambda: got)
        await workers.start()
        await gone.close()
        assert (await handle.result(10)).text == "hello"
        stored = await StoredTask.read(strict, workers.agent, handle.id)
    assert stored.attempts == [1]


async def test_an_answer_on_its_way_to_a_killed_replica_reaches_the_next_one(
    strict: BrokerMesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    first = await workers.start()
    async with client(strict) as caller:
        handle = await caller.submit(workers.agent, {"count": 1, "at": "gate"}, skill="questions")
        assert (await handle.result(10)).state is State.INPUT_REQUIRED
        async with asyncio.TaskGroup() as group:
            answered = group.create_task(caller.send(workers.agent, "blue", task_id=handle.id))
            await scratch.left("answered")
            await workers.start()
            first.kill()
            scratch.open("gate")
        assert answered.result().data == ["blue"]
        await handle.aclose()


async def test_a_replica_that_listens_keeps_its_work_even_if_it_stands_still(
    strict: BrokerMesh, workers: ReplicaProcesses, leader: Coordinator, scratch: Scratch
) -> None:
    """Fails if the end of a connection alone is enough. The replica is stopped and its connection is open."""
    first = await workers.start()
    async with client(strict) as caller, await caller.submit(workers.agent, {"at": "gate"}, skill="work") as handle:
        await scratch.left("start")
        await workers.start()
        await leader.handback.idle()
        before = leader.handback.handed_back
        first.pause()
        leader.handback.on_disconnected(Delivered("", "", await _end_of(strict, workers.agent, first), None))
        await eventually(lambda: leader.handback.busy)
        await leader.handback.idle()
        assert leader.handback.handed_back == before
        first.proceed()
        scratch.open("gate")
        await handle.result(30)
        stored = await StoredTask.read(strict, workers.agent, handle.id)
    assert stored.attempts == [1]


async def _end_of(mesh: BrokerMesh, agent: str, replica: ReplicaProcess) -> bytes:
    """What the broker would tell if the connection a replica has were closed."""
    system = await mesh.connect("SYS")
    told = json.loads((await system.request("$SYS.REQ.SERVER.PING.CONNZ", b"")).data)
    await system.close()
    name = connections.of_replica(agent, replica.id)
    cid = next(one["cid"] for one in told["data"]["connections"] if one.get("name") == name)
    return event(agent, name, cid, told["server"]["id"])


class Road:
    """A way to the broker that can be closed for a while."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.passable = True

    async def open(self) -> asyncio.Server:
        return await asyncio.start_server(self._through, "127.0.0.1", 0)

    def cut(self) -> None:
        self.passable = False
        for end in self._ends:
            end.close()
        self._ends.clear()

    async def _through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.passable:
            writer.close()
            return
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._ends += [writer, there_writer]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pass(reader, there_writer))
            group.create_task(self._pass(there_reader, writer))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()


async def test_a_replica_whose_connection_is_back_after_a_second_keeps_its_work(
    strict: BrokerMesh, workers: ReplicaProcesses, leader: Coordinator, scratch: Scratch
) -> None:
    road = Road(strict.server.port)
    server = await road.open()
    port = server.sockets[0].getsockname()[1]
    await workers.start(WEFT_URL=f"nats://127.0.0.1:{port}")
    async with client(strict) as caller, await caller.submit(workers.agent, {"at": "gate"}, skill="work") as handle:
        await scratch.left("start")
        await workers.start()
        await leader.handback.idle()
        before = leader.handback.handed_back
        road.cut()
        await eventually(lambda: leader.handback.busy)
        asyncio.get_running_loop().call_later(1.0, setattr, road, "passable", True)
        await leader.handback.idle()
        assert road.passable
        assert leader.handback.handed_back == before
        scratch.open("gate")
        await handle.result(30)
        stored = await StoredTask.read(strict, workers.agent, handle.id)
    assert stored.attempts == [1]
    road.cut()
    server.close()
    await server.wait_closed()


async def test_when_the_broker_restarts_and_everybody_reconnects_nothing_is_handed_back(
    anyio_backend: str, scratch: Scratch
) -> None:
    async with await start_test_mesh(["worker"], durability="strict") as mesh:
        broker = await mesh.connect("coordinator")
        leader = Coordinator(broker)
        await leader.start()
        replicas = ReplicaProcesses(mesh, WORKER, identity="worker", env={**scratch.env, "CONCURRENCY": "2"})
        async with replicas, client(mesh) as caller:
            started: list[ReplicaProcess] = [await replicas.start() for _ in range(2)]
            handles = [await caller.submit("worker", {"at": "gate"}, skill="work") for _ in range(4)]
            await scratch.left("start", 4)
            await mesh.server.stop()
            await mesh.server.start()
            for one in started:
                await eventually(lambda one=one: _listens(broker, one))  # type: ignore[misc]
            await leader.handback.idle()
            scratch.open("gate")
            for handle in handles:
                await handle.result(30)
                stored = await StoredTask.read(mesh, "worker", handle.id)
                assert stored.attempts == [1]
                await handle.aclose()
        assert leader.handback.handed_back == 0
        await leader.aclose()
        await broker.close()


async def _listens(broker: Broker, replica: ReplicaProcess) -> bool:
    try:
        await broker.request(subjects.ctl("worker", replica.id), b"", timeout=0.5)
    except TimedOut:
        return True
    except Unreachable:
        return False
    return True


async def test_when_the_leader_and_a_replica_die_together_the_standby_leads_and_hands_back(
    anyio_backend: str, scratch: Scratch
) -> None:
    """Neither the leader's lease of 20 s nor the acknowledgement wait of 30 s is waited for."""
    async with await start_test_mesh(["worker"], durability="strict") as mesh:
        brokers = [
            await Broker.connect(mesh.settings("coordinator"), name=connections.of_coordinator(id)) for id in "ab"
        ]
        first, second = (Coordinator(broker, id=id) for broker, id in zip(brokers, "ab", strict=True))
        await first.start()
        await second.start()
        standing_by = Tasks("the standby")
        stop = asyncio.Event()
        standing_by.start(second.run(stop))
        assert first.leader.leading
        replicas = ReplicaProcesses(mesh, WORKER, identity="worker", env=scratch.env)
        async with replicas, client(mesh) as caller:
            gone = await replicas.start()
            handle = await caller.submit("worker", {"at": "gate"}, skill="work")
            await scratch.left("start")
            await replicas.start()
            began = time.monotonic()
            gone.kill()
            await brokers[0].close()
            await eventually(lambda: second.leader.leading)
            assert time.monotonic() - began < 10
            await scratch.left("start", 2)
            assert time.monotonic() - began < 15
            scratch.open("gate")
            await handle.result(30)
            await handle.aclose()
        stop.set()
        await standing_by.idle()
        for coordinator in (first, second):
            await coordinator.aclose()
        await brokers[1].close()
