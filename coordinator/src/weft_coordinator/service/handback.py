"""Hands back at once what a replica held that is gone, whatever the acknowledgement wait.

The broker tells when a connection closes. Two seconds later, if it did not come back and nobody listens to what is
said to the replica, its deliveries are answered for it: the broker delivers them to the next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Any, Final

from weft.core.broker import Broker, Delivered
from weft.core.history import StreamReader
from weft.core.supervise import Tasks
from weft_coordinator.decide import handback
from weft_coordinator.decide.handback import Connections, Peer, Work
from weft_coordinator.decide.index import Entry, TaskIndex
from weft_coordinator.service.part import Part
from weft_coordinator.shell.leader import Leader
from weft_coordinator.shell.tail import Tail
from weft_protocols import subjects
from weft_protocols.connections import COORDINATOR
from weft_protocols.errors import TimedOut, Unreachable, WeftError
from weft_protocols.records import Control
from weft_protocols.resources import STREAM

log = logging.getLogger("weft.coordinator")

PING: Final = 1.0
"""Seconds a replica that is connected after all has to be found so."""
MARGIN: Final = 0.01
"""Seconds beyond the wait, so that what is due counts as due."""


class HandBack(Part):
    """What the broker tells of connections, and what follows.

    Args:
        leader: Tells whether this coordinator leads: only then is anything handed back.
        clock: Unix milliseconds.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        index: TaskIndex,
        tail: Tail,
        reader: StreamReader,
        leader: Callable[[], Leader],
        clock: Callable[[], int],
    ) -> None:
        self.handed_back = 0
        """Deliveries handed back by this coordinator."""
        self._broker = broker
        self._index = index
        self._tail = tail
        self._reader = reader
        self._leader = leader
        self._clock = clock
        self._connections = Connections()
        self._lives = 0
        """Connections to the broker this coordinator has lost."""
        self._turns: dict[str, asyncio.Lock] = {}
        self._tasks = Tasks("hand-back")
        broker.on_lost(self._doubt)
        broker.on_reconnect(self._doubt)

    def on_connected(self, message: Delivered) -> None:
        """The broker tells of a connection."""
        found = handback.connection(message.data)
        if found is not None:
            self._connections.opened(*found)

    def on_disconnected(self, message: Delivered) -> None:
        """The broker tells of a connection that ended."""
        found = handback.connection(message.data)
        if found is not None and self._connections.closed(*found, now=self._clock()):
            self._tasks.start(self._look_after(found[0]), name=f"hand-back of {found[0]}")

    async def tick(self, now: int) -> None:
        """Hand back what nobody did while nobody led, or could not."""
        for agent in {agent for agent, _ in self._connections.gone(now, after=2 * handback.WAIT)} - {COORDINATOR}:
            self._tasks.start(self._act(agent, None), name=f"hand-back for {agent}")

    async def aclose(self) -> None:
        """Leave what is under way to the coordinator that leads next."""
        await self._tasks.aclose()

    @property
    def busy(self) -> bool:
        """Whether somebody's connection is closed and it is not decided yet what that means."""
        return len(self._tasks) > 0

    async def idle(self) -> None:
        """Return when everybody who closed a connection was looked after."""
        await self._tasks.idle()

    def _doubt(self) -> None:
        # Who else lost its connection is not known, nor who came back: the acknowledgement wait has to do.
        self._lives += 1
        self._connections.forget()

    async def _look_after(self, peer: Peer) -> None:
        delivered = await self._delivered(peer[0], "work") if self._leader().leading else None
        await asyncio.sleep(handback.WAIT / 1000 + MARGIN)
        await self._act(peer[0], delivered)

    async def _act(self, agent: str, delivered: handback.Delivered | None) -> None:
        leader = self._leader()
        async with self._turns.setdefault(agent, asyncio.Lock()):
            due = self._connections.gone(self._clock(), agent=agent)
            if not due or leader.leading == (agent == COORDINATOR):
                return  # it came back, or it is for the leader to do, or about a leader that is none
            lives = self._lives
            try:
                gone = [peer[1] for peer in due if await self._is_gone(peer)]
                if lives != self._lives:
                    return
                if agent != COORDINATOR:
                    await self._hand_back(agent, gone, delivered)
                else:
                    leader.are_gone(gone)
                self._connections.forget(peer for peer in due if peer in self._connections.gone(self._clock()))
            except WeftError as error:
                log.warning("what %s held waits for the acknowledgement wait: %s", agent, error)

    async def _is_gone(self, peer: Peer) -> bool:
        """Whether the broker says that nobody listens to what is said to it."""
        try:
            await self._broker.request(subjects.ctl(*peer), Control("ping").encode(), timeout=PING)
        except Unreachable:
            return self._broker.connected
        except TimedOut:
            return False  # it is there, and cannot answer across accounts
        return False

    async def _hand_back(self, agent: str, gone: Collection[str], delivered: handback.Delivered | None) -> None:
        if not gone:
            return
        await self._tail.sync()
        mine = {entry.task: entry for entry in self._unfinished(agent)}
        claims = {
            one.subject.rsplit(".", 1)[-1]: one.data
            for one in await self._reader.lasts(STREAM, [subjects.claim(agent, task) for task in mine])
        }
        held = handback.held(agent, gone, claims)
        work = list(held.values())
        if delivered is not None:
            created = [entry.seq for entry in mine.values() if entry.task not in claims and not entry.events]
            work += [("work", sequence) for sequence in created if delivered.covers(sequence)]
        if not work:
            return
        now = {lane: await self._delivered(agent, lane) for lane in subjects.LANES}
        work += await self._follow_ups(agent, held, now["input"])
        for one in work:
            lane = now[one[0]]
            if lane is None:
                raise TimedOut(f"the broker does not say how far {one[0]} was delivered")
            self._broker.send(handback.acknowledgement(agent, one, count=lane.count), b"-NAK")
        self.handed_back += len(work)
        log.warning("replica %s of %s is gone: handed %d deliveries back", ", ".join(gone), agent, len(work))

    def _unfinished(self, agent: str) -> list[Entry]:
        return [one for one in self._index.open if one.agent == agent]

    async def _follow_ups(self, agent: str, tasks: Collection[str], delivered: handback.Delivered | None) -> list[Work]:
        """Follow-ups to these tasks that were delivered and not acknowledged yet."""
        if not tasks or delivered is None or delivered.floor >= delivered.last:
            return []
        found: list[Work] = []
        start, pattern = delivered.floor + 1, subjects.GRAMMAR["input"].pattern(agent=agent)
        while True:
            batch = await self._reader.batch(STREAM, pattern, start=start)
            found += [
                ("input", one.seq)
                for one in batch.messages
                if delivered.covers(one.seq) and one.subject.rsplit(".", 1)[-1] in tasks
            ]
            if not batch.more or not batch.messages or batch.messages[-1].seq > delivered.last:
                return found
            start = batch.messages[-1].seq + 1

    async def _delivered(self, agent: str, lane: str) -> handback.Delivered | None:
        """How far a lane was delivered; None where that cannot be told."""
        try:
            info: dict[str, Any] = await self._broker.api(f"CONSUMER.INFO.{STREAM}.{subjects.consumer(agent, lane)}")
            delivered = info["delivered"]
            return handback.Delivered(
                delivered["stream_seq"], info["ack_floor"]["stream_seq"], delivered["consumer_seq"]
            )
        except WeftError as error:
            log.debug("%s of %s: %s", lane, agent, error)
            return None
