"""Tasks that left memory: the leader records what each waits for, and wakes it once it may go on.

A wake is a message on the task's input lane, so that any replica of its agent takes it. It is stored before it is
decided that the task was woken: a leader that is lost in between leaves a task that is woken twice, which does no harm.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from weft.core.broker import Broker
from weft.core.pull import Delivery
from weft.core.supervise import Tasks
from weft_coordinator.decide import parked as rules
from weft_coordinator.decide.index import Entry, TaskIndex
from weft_coordinator.decide.parked import Parked, ParkedTasks
from weft_coordinator.service.due import KEPT, SCHEDULE, TARGET
from weft_coordinator.service.part import Body, Handler, Part
from weft_coordinator.shell.hints import Hints
from weft_coordinator.shell.leader import Leader
from weft_coordinator.shell.tail import Tail
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.errors import WeftError
from weft_protocols.resources import COORD, DUE, SCHEDULES

log = logging.getLogger("weft.coordinator")

TIMER: Final = "t-"
"""Beginning of the names of timers."""
KEEP: Final = "24h"
"""How long the broker keeps that a timer is due. One that is forgotten is found by its time all the same."""
FAR: Final = 60_000
"""Milliseconds until a timer is due, for which it is worth taking back."""
AT_ONCE: Final = 64
"""Wakes being stored at a time."""


class Waking(Part):
    """Parks and wakes.

    Args:
        index: The tasks, to see which children have ended.
        tail: Brings the index up to date.
        ledger: Of parked tasks.
        clock: Unix milliseconds.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        index: TaskIndex,
        tail: Tail,
        ledger: ParkedTasks,
        leader: Leader,
        clock: Callable[[], int],
    ) -> None:
        self._broker = broker
        self._index = index
        self._tail = tail
        self._ledger = ledger
        self._leader = leader
        self._clock = clock
        self._tasks = Tasks("wakes")
        self._room = asyncio.Semaphore(AT_ONCE)
        self._waking: set[tuple[str, str]] = set()
        self._hints = Hints(broker, tail, concerns=lambda agent, task: bool(ledger.parents(agent, task)))
        self.settled: Callable[[str], str] = lambda id_: "it cannot be known here"
        """Why a task that waits for an approval may go on, by the approval's id; empty while it may not."""
        self._new = True
        """Whether nothing was looked at since this coordinator began to lead."""
        tail.on_change(self._changed)

    @property
    def leader_operations(self) -> Mapping[str, Handler]:
        """`park`."""
        return {"park": self._park}

    # Parking -----------------------------------------------------------------------------------

    async def _park(self, body: Body, caller: str) -> dict[str, Any]:
        """A replica wants a task of its agent, the caller, to be woken later."""
        parked = rules.parse(body, caller)
        if parked.until > self._clock():
            # First, so that whoever is parked has its timer. One that nobody is parked for is ignored when it is due.
            await self._schedule(parked)
        await self._leader.decide(lambda _: self._ledger.park(parked))
        await self._listen()
        if parked.children:
            self._hints.read_on()
        self._look(parked)
        return {"parked": True}

    async def _schedule(self, parked: Parked) -> None:
        at = datetime.fromtimestamp(parked.until / 1000, UTC).isoformat(timespec="milliseconds")
        values = {
            SCHEDULE: f"@at {at.replace('+00:00', 'Z')}",
            TARGET: f"{DUE}.{TIMER}{parked.task}",
            KEPT: KEEP,
        }
        timer = str(parked.until).encode()
        await self._broker.publish(f"{SCHEDULES}.{TIMER}{parked.task}", timer, headers=h.block(h.fields(values)))

    async def _unschedule(self, parked: Parked) -> None:
        """Take back a timer that is far from due. Before the wake: after it the task may have set another one."""
        if parked.until > self._clock() + FAR:
            await self._broker.api(f"STREAM.PURGE.{COORD}", {"filter": f"{SCHEDULES}.{TIMER}{parked.task}"})

    async def due(self, task: str, timer: Delivery) -> None:
        """A timer is due: returns once every task it was for is woken. Raises WeftError where one could not be.

        That it is due the broker says, whatever this coordinator's clock does.
        """
        until = int(timer.data) if timer.data.isdigit() else self._clock() + 1000
        for parked in self._ledger.named(task):
            if parked.until and parked.until <= until and parked.id not in self._waking:
                self._waking.add(parked.id)
                try:
                    await self._wake(parked, "its time has come")
                finally:
                    self._waking.discard(parked.id)

    # Noticing ----------------------------------------------------------------------------------

    async def lead(self) -> None:
        """What happened before is looked at in the first `tick`."""
        self._new = True

    def deposed(self) -> None:
        """Somebody else wakes."""
        self._hints.stop()
        self._waking.clear()

    async def tick(self, now: int) -> None:
        """Look again at what may have been missed: all of it once, then what is overdue."""
        if self._new:
            await self._tail.sync()
            self._new = False
            for parked in self._ledger.all():
                self._look(parked)
        else:
            for parked in self._ledger.due(now):
                self._look(parked)
        await self._listen()

    async def aclose(self) -> None:
        """Stop waking."""
        self.deposed()
        await self._hints.aclose()
        await self._tasks.aclose()

    def _changed(self, entries: Sequence[Entry]) -> None:
        for entry in entries if self._leader.leading and len(self._ledger) else ():
            self._moved(entry)

    def _moved(self, entry: Entry) -> None:
        """A task came into another state: its parent may go on, and it is not parked any more if it has ended."""
        for parked in self._ledger.parents(entry.agent, entry.task):
            if parked.agent == entry.caller:
                self._look(parked)
        if entry.ended:
            own = self._ledger.get(entry.agent, entry.task)
            if own is not None and own.caller == entry.caller:
                self._tasks.start(self._forget(own))

    async def _listen(self) -> None:
        """Hear of children's ends as they are stored."""
        live = subjects.GRAMMAR["live"]

        def wanted() -> list[str]:
            agents = self._ledger.waiting_agents() if self._leader.leading else ()
            return [live.pattern(caller=agent) for agent in agents]

        await self._hints.listen(wanted)

    # Waking ------------------------------------------------------------------------------------

    def look(self, agent: str, task: str) -> None:
        """Something happened that a task may wait for."""
        parked = self._ledger.get(agent, task) if self._leader.leading else None
        if parked is not None:
            self._look(parked)

    def _look(self, parked: Parked) -> None:
        """Wake a task if it may go on."""
        if parked.id in self._waking:
            return
        own = self._index.find(parked.agent, parked.task, caller=parked.caller)
        if own is not None and own.ended:
            self._tasks.start(self._forget(parked))
            return
        why = rules.reason(
            parked,
            lambda agent, task: self._child(parked, agent, task),
            settled=self.settled,
            now=self._clock(),
        )
        if why:
            self._waking.add(parked.id)
            self._tasks.start(self._try(parked, why), name=f"wake of {parked.task}")

    def _child(self, parked: Parked, agent: str, task: str) -> Entry | None:
        return self._index.find(agent, task, caller=parked.agent)

    async def _try(self, parked: Parked, why: str) -> None:
        try:
            await self._wake(parked, why)
        except WeftError as error:
            log.warning("task %s of %s is not woken: %s; trying again", parked.task, parked.agent, error)
            self._new = True
        finally:
            self._waking.discard(parked.id)
        again = self._ledger.get(*parked.id) if self._leader.leading else None
        if again is not None and again != parked:
            self._look(again)

    async def _wake(self, parked: Parked, why: str) -> None:
        """Store the wake, then decide that it is: the other way round one could be lost."""
        if self._ledger.get(*parked.id) != parked:
            return
        subject = subjects.input(parked.agent, parked.slice, parked.caller, parked.task)
        values = {h.VERSION: h.A2A_VERSION, h.METHOD: h.WAKE, h.ORIGIN: "coordinator", h.CLAIM: str(parked.claim)}
        async with self._room:
            await self._unschedule(parked)
            await self._broker.publish(subject, why.encode(), headers=h.block(h.fields(values)))
        await self._leader.decide(lambda _: self._ledger.wake(parked))

    async def _forget(self, parked: Parked) -> None:
        """A parked task has ended: it was cancelled."""
        try:
            await self._unschedule(parked)
            await self._leader.decide(lambda _: self._ledger.wake(parked))
        except WeftError as error:
            log.debug("task %s stays recorded as parked: %s", parked.task, error)
