"""Lets finished tasks leave the stream, once every coordinator has them in its file."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from weft.core.broker import Broker
from weft.core.retentionconf import Retention
from weft.core.supervise import Tasks
from weft_coordinator.decide.index import Entry
from weft_coordinator.decide.registry import Fields
from weft_coordinator.decide.retention import Rule, prefix, single
from weft_coordinator.service.part import Body, Handler, Part
from weft_coordinator.shell.copies import ALIVE, Copies
from weft_coordinator.shell.projection import Projection
from weft_coordinator.shell.tail import Tail
from weft_protocols import subjects
from weft_protocols.errors import InvalidConfig, PermissionDenied, WeftError
from weft_protocols.resources import STREAM
from weft_protocols.subjects import GRAMMAR

log = logging.getLogger("weft.coordinator")

LOOK: Final = 4000
"""Tasks looked at in one step of a round."""
STEPS: Final = 25
"""Steps of one round at most; the next one goes on."""
SHARE: Final = 0.1
"""Share of the time in which the broker may be busy with removing."""


class Archive(Part):
    """Retention, and making the file anew.

    Most tasks leave many at a time: everything before the first message that must stay. Those behind a task that stays
    leave one by one, which costs more, and only so fast that the broker's other work does not suffer.

    Args:
        retention: How long tasks stay; asked at every round.
        leading: Whether this coordinator may remove anything.
        grace: Seconds from a task's end in which it stays in any case, so that who follows it sees its end.
        every: Seconds between two rounds while the stream is not too large.
    """

    def __init__(
        self,
        broker: Broker,
        projection: Projection,
        tail: Tail,
        copies: Copies,
        *,
        retention: Callable[[], Retention],
        leading: Callable[[], bool],
        grace: float = 10.0,
        every: float = 10.0,
    ) -> None:
        self._broker = broker
        self._projection = projection
        self._tail = tail
        self._copies = copies
        self._retention = retention
        self._leading = leading
        self._grace = grace
        self._every = every
        self._tasks = Tasks("archive")
        self._clear()
        self._ticked = 0.0
        self._last: Retention | None = None
        self._rebuild: dict[str, Any] = {"running": False, "began": 0, "seconds": 0.0, "error": ""}

    def _clear(self) -> None:
        self._row = -1
        self._steps_row = -1
        self._single_row = -1
        self._steps_until = self._until = self._marked = 0
        self._purged: set[int] = set()
        self._next = 0.0

    @property
    def operations(self) -> Mapping[str, Handler]:
        """By name."""
        return {"rebuild": self._on_rebuild}

    # The leader's work --------------------------------------------------------------------------

    async def lead(self) -> None:
        """Begin with the whole stream."""
        self._clear()

    async def tick(self, now: int) -> None:
        """Begin a round if it is time for one and none is under way."""
        at, late = time.monotonic(), time.monotonic() - self._ticked > ALIVE
        self._ticked = at
        # Who was away that long does not know who else is there.
        if late or len(self._tasks) or at < self._next:
            return
        self._next = at + self._every
        self._tasks.start(self._round(now), name="retention")

    async def _round(self, now: int) -> None:
        try:
            await self.run(now)
        except WeftError as error:
            log.warning("finished tasks stay in the stream: %s; trying again", error)

    async def run(self, now: int) -> None:
        """Remove what may leave at `now`, unix milliseconds."""
        policy = self._policy()
        state = (await self._broker.api(f"STREAM.INFO.{STREAM}"))["state"]
        if self._row < 0:
            self._row = self._steps_row = await self._projection.store.row_at(int(state["first_seq"]))
            self._purged = await self._projection.store.purged()
        if 0 < policy.max_bytes < state["bytes"]:
            await self._leave(self._rule(now, self._grace), enough=policy.max_bytes)
            self._next = 0.0
        if policy.steps is not None:
            await self._leave_steps(self._rule(now, policy.steps))
        if policy.keep is not None:
            await self._leave(self._rule(now, policy.keep))

    def _policy(self) -> Retention:
        """What holds; while somebody is making a mistake in `mesh.yaml`, what held before."""
        try:
            self._last = self._retention()
        except InvalidConfig as error:
            if self._last is None:
                raise
            log.warning("mesh.yaml is not read: %s", error)
        return self._last

    def _rule(self, now: int, keep: float) -> Rule:
        before = now * 1_000_000 - int(max(keep, self._grace) * 1_000_000_000)
        return Rule(before, self._copies.floor(), self._is_held)

    def _is_held(self, entry: Entry) -> bool:
        above = self._projection.index.parent(entry)
        return above is not None and not above.ended

    async def _leave_steps(self, rule: Rule) -> None:
        """The steps of finished tasks, all that come before a step that stays."""
        until = 0
        for _ in range(STEPS):
            found = await self._projection.store.after_row(self._steps_row, LOOK)
            gone = prefix(found, rule, all=len(found) < LOOK)
            self._steps_row, until = max(self._steps_row, gone.row), max(until, gone.until)
            if not gone.whole or len(found) < LOOK:
                break
        if until > self._steps_until:
            await self._purge(until, filter=GRAMMAR["step"].wildcard)
            self._steps_until = until

    async def _leave(self, rule: Rule, *, enough: int = 0) -> None:
        """Everything before the first message that stays, then single tasks; until the stream has `enough` bytes."""
        cut: list[Entry] = []
        for _ in range(STEPS):
            found = await self._projection.store.after_row(self._row, LOOK)
            gone = prefix(found, rule, all=len(found) < LOOK)
            self._row = max(self._row, gone.row)
            cut += gone.cut
            if gone.until > self._until:
                await self._purge(gone.until)
                self._until = gone.until
            if not gone.whole or len(found) < LOOK or (enough and await self._bytes() <= enough):
                break
        await self._remove([one for one in cut if one.last >= self._until])
        if not (enough and await self._bytes() <= enough):
            await self._leave_one_by_one(rule)

    async def _leave_one_by_one(self, rule: Rule) -> None:
        """Tasks behind one that stays."""
        self._purged = {row for row in self._purged if row > self._row}
        row = max(self._single_row, self._row)
        found = await self._projection.store.after_row(row, LOOK)
        self._single_row = found[-1].row if len(found) == LOOK else -1
        await self._remove([one for one in single(found, rule) if one.row not in self._purged])

    async def _remove(self, due: list[Entry]) -> None:
        """Tasks, one by one."""
        if not due:
            return
        await self._mark(max(one.last for one in due))
        for entry in due:
            for subject in await self._projection.store.subjects_of(entry):
                await self._purge(0, filter=subject)
        gone = [one.row for one in due if one.row > self._row]
        self._purged |= set(gone)
        await self._projection.store.note_purged(gone, upto=self._row)

    async def _mark(self, until: int) -> None:
        """Say that what follows may be gone, before it is."""
        if until > self._marked:
            await self._tail.mark.write(until)
            await self._projection.store.mark_archived(until)
            self._marked = until

    async def _purge(self, until: int, *, filter: str = "") -> None:
        """Remove messages, and leave the broker alone for a while."""
        if not self._leading():
            raise PermissionDenied("another coordinator leads now")
        if until:
            await self._mark(until - 1)
        begun = time.monotonic()
        body = {**({"seq": until} if until else {}), **({"filter": filter} if filter else {})}
        await self._broker.api(f"STREAM.PURGE.{STREAM}", body)
        await asyncio.sleep((time.monotonic() - begun) * (1 - SHARE) / SHARE)

    async def _bytes(self) -> int:
        return int((await self._broker.api(f"STREAM.INFO.{STREAM}"))["state"]["bytes"])

    # Every coordinator's ------------------------------------------------------------------------

    def beat(self) -> None:
        """Tell the other coordinators how far this one is, and do what they ask for."""
        self._copies.say()
        if self._copies.on_rebuild.is_set():
            self._copies.on_rebuild.clear()
            self._begin_rebuild()

    async def facts(self) -> dict[str, Any]:
        """What `status` tells of the projection."""
        store = self._projection.store
        state = (await self._broker.api(f"STREAM.INFO.{STREAM}"))["state"]
        size = await store.size()
        return {
            "file": str(store.file.path),
            "position": store.position,
            "lag": max(0, int(state["last_seq"]) - store.position),
            **asdict(size),
            "archived": await store.row_at(int(state["first_seq"])) + size.purged,
            "missing": store.missing,
            "coordinators": len(self._copies.peers) + 1,
            "stream": {"messages": state["messages"], "bytes": state["bytes"], "first": state["first_seq"]},
            "rebuild": dict(self._rebuild),
        }

    async def _on_rebuild(self, body: Body, caller: str) -> dict[str, Any]:
        """Have every coordinator make its file anew; the answer comes before they have."""
        if caller != subjects.OPERATOR:
            raise PermissionDenied(
                f"rebuild is for the operator of the mesh; connect with identity {subjects.OPERATOR}"
            )
        Fields(body).check("rebuild")
        self._copies.rebuild_all()
        return {"started": self._begin_rebuild(), "coordinators": len(self._copies.peers) + 1}

    def _begin_rebuild(self) -> bool:
        """Whether one was begun: not while one is under way."""
        if self._rebuild["running"]:
            return False
        self._rebuild = {"running": True, "began": time.time_ns() // 1_000_000, "seconds": 0.0, "error": ""}
        self._tasks.start(self._remake(), name="rebuild")
        return True

    async def _remake(self) -> None:
        begun = time.monotonic()
        try:
            await self._tail.rebuild()
        except WeftError as error:
            self._rebuild["error"] = str(error)
            log.warning("the file could not be made anew: %s", error)
        finally:
            self._clear()
            self._rebuild |= {"running": False, "seconds": round(time.monotonic() - begun, 3)}
        log.info("the file was made anew in %.2f s", time.monotonic() - begun)

    async def aclose(self) -> None:
        """Stop; what was begun is gone on with by whoever leads next."""
        await self._tasks.aclose()
