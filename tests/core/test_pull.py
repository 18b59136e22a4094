"""The pull loop: never more asked for than wanted, nothing lost and nothing stuck whatever happens to the server."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from weft.core import broker as broker_module
from weft.core.broker import Broker
from weft.core.pull import Delivery, PullLoop
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.accounts import NEXT
from weft_protocols.errors import Conflict
from weft_protocols.resources import STREAM

pytestmark = pytest.mark.anyio

ONCE = h.block(h.fields({h.EXPECTED_SEQUENCE: "0"}))
ACK_WAIT = 4.0
"""Seconds after which the broker delivers again: what takes less was not lost."""


@dataclass
class Puller:
    """A pull loop whose messages are kept."""

    broker: Broker
    loop: PullLoop
    deliveries: list[Delivery] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    each: Callable[[Delivery], None] = lambda _: None

    def take(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        self.arrived.set()
        self.each(delivery)

    def ack(self, delivery: Delivery) -> None:
        if self.broker.connected:
            self.broker.send(delivery.ack, b"+ACK")

    async def have(self, count: int, *, timeout: float = ACK_WAIT - 1) -> None:
        async with asyncio.timeout(timeout):
            while len(self.deliveries) < count:
                self.arrived.clear()
                await self.arrived.wait()


class Stage:
    """An agent, its pullers, a caller that publishes, and a member of the mesh that looks on."""

    def __init__(self, mesh: BrokerMesh, agent: str, *, caller: Broker, operator: Broker) -> None:
        self.mesh = mesh
        self.agent = agent
        self.caller = caller
        self.operator = operator
        self.asked: list[int] = []
        """Batch of every pull the server got."""
        self._pullers: list[Puller] = []
        self._numbers = itertools.count()

    @property
    def consumer(self) -> str:
        return subjects.consumer(self.agent, "work")

    async def listen(self) -> None:
        def on_pull(message: Any) -> None:
            self.asked.append(json.loads(message.data)["batch"])

        await self.operator.subscribe(f"{NEXT}.{STREAM}.{self.consumer}", on_pull)
        await self.operator.flush()

    async def puller(self, *, steady: bool = False, expires: float = 30.0, heartbeat: float = 5.0) -> Puller:
        broker = await self.mesh.connect(self.agent)
        taken: list[Puller] = []
        loop = PullLoop(
            broker,
            stream=STREAM,
            consumer=self.consumer,
            handler=lambda delivery: taken[0].take(delivery),
            steady=steady,
            expires=expires,
            heartbeat=heartbeat,
        )
        taken.append(Puller(broker, loop))
        self._pullers.append(taken[0])
        await loop.start()
        return taken[0]

    async def publish(self, count: int) -> list[str]:
        """Tasks for the agent; their ids."""
        made = [ids.task_id("local", self.agent, f"m-{next(self._numbers)}") for _ in range(count)]
        async with asyncio.TaskGroup() as group:
            for task in made:
                group.create_task(self._publish(task))
        return made

    async def _publish(self, task: str) -> None:
        # Where an acknowledgement was lost in a restart, the second try meets the first.
        with contextlib.suppress(Conflict):
            subject = subjects.task(self.agent, "00", "local", task)
            await self.caller.publish(subject, task.encode(), headers=ONCE)

    async def info(self) -> dict[str, Any]:
        return await self.operator.api(f"CONSUMER.INFO.{STREAM}.{self.consumer}")

    async def settled(self) -> bool:
        """True once nothing is under way any more: a round trip of the consumer and of every connection."""
        await self.info()
        for puller in self._pullers:
            if puller.broker.connected:
                await puller.broker.flush()
        if self.operator.connected:
            await self.operator.flush()  # what the server heard of them before is heard here as well
        return True

    async def aclose(self) -> None:
        for puller in self._pullers:
            await puller.loop.stop()
            await puller.broker.close()
        await self.caller.close()
        await self.operator.close()


async def staged(mesh: BrokerMesh, agent: str, *, watch: bool = True) -> Stage:
    await mesh.add_agent(agent)
    stage = Stage(mesh, agent, caller=await mesh.connect("local"), operator=await mesh.connect("coordinator"))
    if watch:  # with a listener on it, a consumer that is gone is silent instead of refused
        await stage.listen()
    return stage


@pytest.fixture
async def stage(mesh: BrokerMesh, unique: Callable[[str], str]) -> AsyncIterator[Stage]:
    made = await staged(mesh, unique("puller"))
    yield made
    await made.aclose()


@pytest.fixture
async def fresh(fresh_mesh: BrokerMesh) -> AsyncIterator[Stage]:
    """On a server of the test's own, to be killed."""
    made = await staged(fresh_mesh, "puller")
    yield made
    await made.aclose()


def stop(pid: int) -> None:
    """Have the server stand still; it does when this returns."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)


async def kill(mesh: BrokerMesh) -> None:
    os.kill(mesh.server.pid, signal.SIGKILL)
    await mesh.server.wait()


async def restart(mesh: BrokerMesh) -> None:
    await kill(mesh)
    await mesh.server.start()


def hang_up(broker: Broker) -> None:
    """The connection breaks; the client will reconnect."""
    broker._wire._abort()


# Credit --------------------------------------------------------------------------------------------


async def test_it_asks_for_what_is_wanted_and_gets_no_more(stage: Stage) -> None:
    puller = await stage.puller()
    await stage.publish(20)
    await stage.settled()
    assert puller.deliveries == []
    puller.loop.want(5)
    await puller.have(5)
    await stage.settled()
    assert len(puller.deliveries) == 5
    assert stage.asked == [5]
    puller.loop.want(3)
    await puller.have(8)
    await stage.settled()
    assert len(puller.deliveries) == 8
    assert sum(stage.asked) == 8
    assert (await stage.info())["num_pending"] == 12


async def test_a_wish_that_is_repeated_is_not_asked_for_again(stage: Stage) -> None:
    puller = await stage.puller()
    for _ in range(10):
        puller.loop.want(4)
    await stage.settled()
    assert stage.asked == [4]
    await stage.publish(1)
    await puller.have(1)
    puller.loop.want(3)  # three of the four are open still
    await stage.settled()
    assert stage.asked == [4]
    puller.loop.want(8)
    await stage.settled()
    assert sum(stage.asked) == 9


async def test_a_delivery_tells_where_it_came_from_and_how_often(stage: Stage) -> None:
    puller = await stage.puller()
    puller.loop.want(1)
    (task,) = await stage.publish(1)
    await puller.have(1)
    (first,) = puller.deliveries
    assert first.subject == subjects.task(stage.agent, "00", "local", task)
    assert first.data == task.encode()
    assert h.get(first.headers, h.EXPECTED_SEQUENCE.encode()) == b"0"
    stored = await stage.operator.last(STREAM, first.subject)
    assert stored is not None
    assert (first.sequence, first.times) == (stored.seq, 1)
    puller.broker.send(first.ack, b"-NAK")
    puller.loop.want(1)
    await puller.have(2)
    assert (puller.deliveries[1].sequence, puller.deliveries[1].times) == (stored.seq, 2)


async def test_never_more_is_outstanding_than_wanted_however_often_the_connection_breaks(stage: Stage) -> None:
    """Fails if a pull of a connection that broke is served over the next one on top of what was asked anew."""
    puller = await stage.puller(heartbeat=0.4, expires=2.0)
    room, held, most = 4, list[Delivery](), [0]
    done: Counter[str] = Counter()

    def hold(delivery: Delivery) -> None:
        held.append(delivery)
        most[0] = max(most[0], len(held))

    puller.each = hold
    puller.loop.want(room)
    expected = set(await stage.publish(80))
    breaks = 0
    async with asyncio.timeout(20):
        while set(done) < expected:
            while not held:
                puller.arrived.clear()
                await puller.arrived.wait()
            if len(done) >= 15 * (breaks + 1) and breaks < 4:
                breaks += 1
                again = asyncio.Event()
                undo = puller.broker.on_reconnect(again.set)
                hang_up(puller.broker)
                await again.wait()
                undo()
            delivery = held.pop(0)
            puller.ack(delivery)
            done[delivery.data.decode()] += 1
            puller.loop.want(room - len(held))
    assert breaks == 4
    assert most[0] <= room


# Asking again --------------------------------------------------------------------------------------


async def test_it_asks_again_when_a_pull_has_expired(stage: Stage) -> None:
    puller = await stage.puller(expires=0.5, heartbeat=0.2)
    puller.loop.want(3)
    await eventually(lambda: len(stage.asked) >= 3, timeout=5.0)
    assert set(stage.asked) == {3}
    expected = await stage.publish(3)
    await puller.have(3, timeout=1.0)
    assert sorted(one.data.decode() for one in puller.deliveries) == sorted(expected)
    await stage.publish(3)
    await stage.settled()
    assert len(puller.deliveries) == 3


async def test_room_that_was_used_is_not_asked_for_again_when_the_rest_of_a_pull_expires(stage: Stage) -> None:
    puller = await stage.puller(expires=0.5, heartbeat=0.2)
    puller.loop.want(5)
    await stage.publish(3)
    await puller.have(3)
    await eventually(lambda: len(stage.asked) >= 4, timeout=5.0)
    assert stage.asked[:4] == [5, 2, 2, 2]
    await stage.publish(5)
    await puller.have(5)
    await stage.settled()
    assert len(puller.deliveries) == 5


async def test_a_steady_loop_is_filled_up_as_messages_come(stage: Stage) -> None:
    puller = await stage.puller(steady=True)
    puller.loop.want(8)
    expected = await stage.publish(100)
    await puller.have(100, timeout=1.0)
    assert sorted(one.data.decode() for one in puller.deliveries) == sorted(expected)
    await stage.settled()
    assert sum(stage.asked) <= 108


async def test_it_asks_again_after_a_reconnect(stage: Stage) -> None:
    puller = await stage.puller()
    puller.loop.want(5)
    await stage.settled()
    again = asyncio.Event()
    puller.broker.on_reconnect(again.set)
    hang_up(puller.broker)
    async with asyncio.timeout(5):
        await again.wait()
    await stage.publish(20)
    await puller.have(5)
    await stage.settled()
    assert len(puller.deliveries) == 5


async def test_it_asks_again_after_a_restart_of_the_server(fresh: Stage) -> None:
    puller = await fresh.puller()
    puller.loop.want(5)
    await fresh.settled()
    await restart(fresh.mesh)
    await fresh.publish(20)
    await puller.have(5)
    await eventually(fresh.settled)
    assert len(puller.deliveries) == 5


async def test_it_asks_again_after_a_silence_but_not_for_more_than_before(
    fresh: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    puller = await fresh.puller(heartbeat=0.2)
    puller.loop.want(5)
    await fresh.settled()
    pid = fresh.mesh.server.pid
    stop(pid)
    try:
        await eventually(lambda: "silent for" in caplog.text, timeout=5.0)
    finally:
        os.kill(pid, signal.SIGCONT)
    await fresh.publish(20)
    await puller.have(5)
    await eventually(lambda: len(fresh.asked) >= 2, timeout=5.0)
    await fresh.settled()
    assert len(puller.deliveries) == 5


async def test_an_absent_consumer_is_told_once_and_pulled_from_when_it_is_back(
    mesh: BrokerMesh, unique: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="weft.pull")
    stage = await staged(mesh, unique("puller"), watch=False)
    try:
        puller = await stage.puller()
        puller.loop.want(4)
        await stage.settled()
        await stage.operator.api(f"CONSUMER.DELETE.{STREAM}.{stage.consumer}")
        # The pull that was open is ended, and those that follow find nobody.
        await eventually(lambda: caplog.text.count("work: 503") >= 2, timeout=5.0)
        expected = await stage.publish(4)
        await mesh.apply_topology()
        await puller.have(4)
        assert sorted(one.data.decode() for one in puller.deliveries) == sorted(expected)
        (warning,) = [r for r in caplog.records if r.name == "weft.pull" and r.levelno == logging.WARNING]
        assert f"{stage.consumer}: 409 Consumer Deleted" in warning.getMessage()
        await stage.settled()
        assert len(puller.deliveries) == 4
    finally:
        await stage.aclose()


async def test_a_consumer_that_is_not_there_yet_is_pulled_from_when_it_is(
    mesh: BrokerMesh, unique: Callable[[str], str]
) -> None:
    agent = unique("puller")
    await mesh.server.declare(agents=(agent,))
    stage = Stage(mesh, agent, caller=await mesh.connect("local"), operator=await mesh.connect("coordinator"))
    try:
        puller = await stage.puller()
        puller.loop.want(2)
        await puller.broker.flush()
        await stage.publish(1)
        await mesh.apply_topology()
        await puller.have(1)
    finally:
        await stage.aclose()


# Nothing is lost, nothing is stuck -------------------------------------------------------------------


async def test_the_pulls_of_a_puller_that_died_swallow_nothing(stage: Stage) -> None:
    dead, alive = await stage.puller(), await stage.puller()
    dead.loop.want(50)
    await stage.settled()
    broken = asyncio.Event()
    dead.broker.on_lost(broken.set)
    hang_up(dead.broker)
    await broken.wait()
    await dead.broker.close()
    alive.loop.want(40)
    expected = await stage.publish(20)
    await alive.have(20, timeout=ACK_WAIT / 2)
    assert sorted(one.data.decode() for one in alive.deliveries) == sorted(expected)
    assert {one.times for one in alive.deliveries} == {1}


async def test_what_was_sent_to_a_puller_that_stops_still_reaches_it(stage: Stage) -> None:
    """Fails if what was under way when the loop was stopped has to wait for its redelivery.

    The server itself may drop a message it sends in the very moment in which it learns that nobody listens.
    """
    leaving, staying = await stage.puller(), await stage.puller()
    leaving.loop.want(300)
    await stage.settled()
    async with asyncio.TaskGroup() as group:
        publishing = group.create_task(stage.publish(300))
        await leaving.have(20)
        await leaving.loop.stop()
    for delivery in leaving.deliveries:
        leaving.ack(delivery)
    left = len(leaving.deliveries)
    await leaving.broker.flush()
    staying.loop.want(300)
    expected = set(publishing.result())
    await eventually(
        lambda: {one.data.decode() for one in (*leaving.deliveries, *staying.deliveries)} == expected,
        timeout=2 * ACK_WAIT,
    )
    assert left >= 20
    assert len([one for one in staying.deliveries if one.times > 1]) <= 3
    await leaving.loop.stop()


async def test_a_stopped_loop_asks_for_nothing(stage: Stage) -> None:
    puller = await stage.puller(expires=0.3, heartbeat=0.1)
    puller.loop.want(2)
    await stage.settled()
    await puller.loop.stop()
    await stage.settled()
    asked = len(stage.asked)
    puller.loop.want(10)
    await stage.settled()
    again = asyncio.Event()
    puller.broker.on_reconnect(again.set)
    hang_up(puller.broker)
    async with asyncio.timeout(5):
        await again.wait()
    await stage.publish(1)
    await stage.settled()
    assert (len(stage.asked), puller.deliveries) == (asked, [])


async def test_a_handler_that_raises_costs_its_own_message_only(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    puller = await stage.puller()

    def fail_first(delivery: Delivery) -> None:
        if len(puller.deliveries) == 1:
            raise LookupError("the first one fails")

    puller.each = fail_first
    puller.loop.want(3)
    await stage.publish(3)
    await puller.have(3)
    assert "the first one fails" in caplog.text


async def test_five_hundred_messages_arrive_through_restarts_and_broken_connections(
    fresh: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "RETRY_FOR", 30.0)
    pullers = [await fresh.puller(heartbeat=0.4, expires=2.0) for _ in range(2)]
    arrived: Counter[str] = Counter()
    for puller in pullers:

        def settle(delivery: Delivery, puller: Puller = puller) -> None:
            arrived[delivery.data.decode()] += 1
            puller.ack(delivery)
            puller.loop.want(16)

        puller.each = settle
        puller.loop.want(16)
    expected: set[str] = set()

    async def publish() -> None:
        for _ in range(25):
            expected.update(await fresh.publish(20))

    async def disturb() -> None:
        for count in (100, 250):
            await eventually(lambda count=count: len(arrived) >= count)  # type: ignore[misc]
            await restart(fresh.mesh)
        await eventually(lambda: len(arrived) >= 350)
        hang_up(pullers[0].broker)
        await eventually(lambda: len(arrived) >= 400)
        await pullers[1].broker.close()

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(publish())
        group.create_task(disturb())
    assert len(expected) == 500
    await eventually(lambda: set(arrived) == expected, timeout=ACK_WAIT * 3)

    async def nothing_left() -> bool:
        info = await fresh.info()
        return bool(info["num_pending"] == 0 and info["num_ack_pending"] == 0)

    await eventually(nothing_left, timeout=ACK_WAIT * 3)
