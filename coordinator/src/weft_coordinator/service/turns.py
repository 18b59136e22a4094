"""Whose turn it is in a context, for agents that work on the messages of a context strictly in order.

Any coordinator answers: what it has read of the log decides, and a task whose turn came keeps it for good. A replica
that must wait is told when it may be worth asking again; it asks again by itself in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgpack

from weft.core.broker import Broker
from weft.core.supervise import Tasks
from weft_coordinator.decide.index import Entry, TaskIndex
from weft_coordinator.decide.order import Order
from weft_coordinator.decide.registry import Fields
from weft_coordinator.service.part import Body, Handler, Part
from weft_coordinator.shell.hints import Hints
from weft_coordinator.shell.tail import Tail
from weft_protocols import subjects
from weft_protocols.errors import BrokerError
from weft_protocols.records import Control

TELL: Final = 20_000
"""Milliseconds for which a replica that asked is told."""
MOST: Final = 100
"""Earlier tasks named in an answer."""


class Turning(Part):
    """Answers `turn`.

    Args:
        index: The tasks.
        tail: Brings it up to date, and tells what changed.
        clock: Unix milliseconds.
    """

    def __init__(self, broker: Broker, *, index: TaskIndex, tail: Tail, clock: Callable[[], int]) -> None:
        self._broker = broker
        self._tail = tail
        self._clock = clock
        self._order = Order(index)
        self._asked: dict[tuple[str, str], dict[str, int]] = {}
        """By agent and context: replicas that wait, and until when they are told."""
        self._agents: frozenset[str] = frozenset()
        """Agents of which somebody waits."""
        self._hints = Hints(broker, tail, concerns=self._concerns)
        self._tasks = Tasks("turns")
        tail.on_change(self._changed)

    @property
    def operations(self) -> Mapping[str, Handler]:
        """`turn`."""
        return {"turn": self._turn}

    async def _turn(self, body: Body, caller: str) -> dict[str, Any]:
        """Whether every earlier task of a context of the caller has ended, and which have not."""
        fields = Fields(body)
        context, task = fields.text("context", limit=1024), fields.text("task")
        replica = fields.token("replica") if "replica" in body else ""
        fields.check(f"turn of {caller}")
        await self._tail.sync()
        before = self._order.before(caller, context, task)
        if before is None:
            return {"go": False, "after": []}  # a replica of the stream that lags was read
        if before and replica:
            self._asked.setdefault((caller, context), {})[replica] = self._clock() + TELL
            await self._listen()
        return {"go": not before, "after": list(before[:MOST])}

    async def aclose(self) -> None:
        """Tell nobody any more."""
        await self._hints.aclose()
        await self._tasks.aclose()

    # Telling -----------------------------------------------------------------------------------

    def _changed(self, entries: Sequence[Entry]) -> None:
        self._order.changed(entries)
        for entry in entries if self._asked else ():
            if entry.ended and (waiting := self._asked.pop((entry.agent, entry.context), None)) is not None:
                self._ended(entry, waiting)

    def _ended(self, entry: Entry, waiting: Mapping[str, int]) -> None:
        """Whoever waits in its context asks again."""
        now = self._clock()
        data = Control("turn", data=bytes(msgpack.packb({"context": entry.context}))).encode()
        for replica, until in waiting.items():
            if until > now:
                self._tell(subjects.ctl(entry.agent, replica), data)
        self._tasks.start(self._listen())

    def _tell(self, subject: str, data: bytes) -> None:
        try:
            self._broker.send(subject, data)
        except BrokerError:
            return  # it asks again by itself

    def _concerns(self, agent: str, task: str) -> bool:
        return agent in self._agents

    async def _listen(self) -> None:
        """Hear when tasks end of agents of which somebody waits."""
        live = subjects.GRAMMAR["live"]

        def wanted() -> list[str]:
            now = self._clock()
            for place, replicas in list(self._asked.items()):
                if all(until <= now for until in replicas.values()):
                    del self._asked[place]
            self._agents = frozenset(agent for agent, _ in self._asked)
            return [live.pattern(agent=agent) for agent in self._agents]

        await self._hints.listen(wanted)
