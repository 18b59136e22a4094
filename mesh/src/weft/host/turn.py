"""Tasks of an agent with `ordering="context"` that wait for their turn.

A task may begin once every task that was accepted before it in its context has ended, on whichever replica. Whether
that is so a coordinator knows. Who has to wait holds no slot and no claim. Its message is signed in progress, so that
it comes to another replica if this one dies. Without a coordinator it waits, and nothing is lost.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import random
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import msgpack

from weft.client import coordinator
from weft.core.broker import Delivered
from weft.core.pull import Delivery
from weft.host.owner import Owner
from weft.host.run import Run, Work
from weft.host.slots import SlotHold
from weft.host.waits import Waits
from weft_protocols.errors import CycleEdge, DeadlockError, WeftError
from weft_protocols.records import Control

log = logging.getLogger("weft.host")

FIRST: Final = 0.1
"""Seconds until a turn is asked for again; doubled each time."""
MOST: Final = 2.0
"""Seconds between two such questions at most."""
LOCAL: Final = 5.0
"""Seconds after which a task that waits behind another one here looks again, whatever it was told."""
ROOM: Final = 1000
"""Messages a replica keeps while they wait; further ones are handed back for a while."""
FULL: Final = 2.0
"""Seconds until such a one comes again."""
_TEXT: Final = re.compile(r"[^\x20-\x7e]")


@dataclass(slots=True, eq=False)
class Queued:
    """A task that waits for its turn."""

    work: Work
    delivery: Delivery
    waits: Waits
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it may be worth asking."""
    asked: bool = False
    """Whether a coordinator has answered once."""
    refusal: str = ""
    """Why it must not begin at all."""

    @property
    def sequence(self) -> int:
        """Its place in the order."""
        return self.work.sequence


class Queue:
    """The tasks of one replica that wait for their turn."""

    def __init__(self, replica: Owner) -> None:
        self._replica = replica
        self._waiting: dict[str, Queued] = {}
        self._contexts: dict[str, list[Queued]] = {}
        self._here: dict[str, dict[str, int]] = {}
        """By context: the tasks that run here, and where each is in the order."""
        self._leaving = False

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._waiting

    async def turn(self, work: Work, delivery: Delivery, *, slot: SlotHold) -> Queued | None:
        """Wait for a task's turn; None where its delivery is answered already.

        What is returned has the delivery to go on with, and a `refusal` where the task must not begin.
        """
        replica = self._replica
        known = self._waiting.get(work.task_id)
        if known is not None:
            # Signs of life came too late for the broker: it waits here already.
            replica.settle(known.delivery.ack, b"")
            known.delivery = delivery
            return None
        queued = Queued(work, delivery, Waits(work.task_id, observers=replica.observers))
        if self._leaving or len(self._waiting) >= ROOM:
            replica.again(delivery.ack, 0.0 if self._leaving else FULL)
            return None
        self._waiting[work.task_id] = queued
        chain = self._contexts.setdefault(work.context_id, [])
        bisect.insort(chain, queued, key=lambda one: one.sequence)
        try:
            await self._wait(queued, slot)
        finally:
            del self._waiting[work.task_id]
            chain.remove(queued)
            if not chain:
                self._contexts.pop(work.context_id, None)
        if self._is_leaving():
            replica.settle(queued.delivery.ack, b"-NAK")
            return None
        return queued

    def began(self, run: Run) -> None:
        """A task runs here now."""
        if self._replica.agent.ordering is not None:
            self._here.setdefault(run.work.context_id, {})[run.task_id] = run.work.sequence

    def ended(self, run: Run) -> None:
        """A task is not here any more: the next one of its context may have its turn."""
        context = run.work.context_id
        here = self._here.get(context)
        if here is not None:
            here.pop(run.task_id, None)
            if not here:
                del self._here[context]
            self.look(context)

    def look(self, context: str) -> None:
        """It may be worth asking for the first task of a context."""
        for queued in self._contexts.get(context, ())[:1]:
            queued.moved.set()

    def told(self, control: Control, _: Delivered) -> None:
        """A coordinator's word that a task of a context has ended."""
        try:
            self.look(str(msgpack.unpackb(control.data)["context"]))
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            log.warning("control message dropped: %s", error)

    def refuse(self, task_id: str, text: str) -> bool:
        """Have a task that waits for its turn be rejected with a text; False if it does not wait here."""
        queued = self._waiting.get(task_id)
        if queued is None:
            return False
        queued.refusal = text
        queued.moved.set()
        return True

    def leave(self) -> None:
        """Hand everything back."""
        self._leaving = True
        for queued in self._waiting.values():
            queued.moved.set()

    async def _wait(self, queued: Queued, slot: SlotHold) -> None:
        """Return when it is the task's turn, or it need not wait for it any more."""
        before = await self._ask(queued)
        if before == ():
            return
        pause = FIRST
        with ExitStack() as reported:
            said: tuple[str, ...] | None = None
            async with slot.waiting():
                while not self._over(queued):
                    here = self._before(queued)
                    behind = here or before or ()
                    if behind != said:
                        reported.close()
                        reported.enter_context(queued.waits.open("order", behind))
                        said = behind
                    queued.moved.clear()
                    try:
                        async with asyncio.timeout(LOCAL if here else pause * random.uniform(0.7, 1.0)):
                            await queued.moved.wait()
                        pause = FIRST
                    except TimeoutError:
                        pause = min(MOST, pause * 2)
                    if not self._over(queued) and not (queued.asked and self._before(queued)):
                        before = await self._ask(queued)
                        if before == ():
                            return

    def _before(self, queued: Queued) -> tuple[str, ...]:
        """The task here that goes before this one, if there is one: nobody has to be asked as long as it is there."""
        context, sequence = queued.work.context_id, queued.sequence
        chain = self._contexts[context]
        at = chain.index(queued)
        if at:
            return (chain[at - 1].work.task_id,)
        running = self._here.get(context, {}).items()
        return tuple(task for task, place in running if place < sequence)[:1]

    def _over(self, queued: Queued) -> bool:
        return bool(queued.refusal) or self._is_leaving()

    def _is_leaving(self) -> bool:
        return self._leaving

    async def _ask(self, queued: Queued) -> tuple[str, ...] | None:
        """Tasks that go before this one; None where nobody knows."""
        work = queued.work
        body = {
            "task": work.task_id,
            "context": work.context_id,
            "seq": work.sequence,
            "replica": self._replica.id,
        }
        try:
            answer = await coordinator.call(self._replica.broker, "turn", body)
        except WeftError as error:
            log.debug("task %s waits for its turn: %s", work.task_id, error)
            return None
        before = _tasks(answer)
        if answer.get("go") is True:
            return ()
        queued.asked = True
        queued.refusal = queued.refusal or circular(work, before)
        return before or ("",)


def _tasks(answer: dict[str, Any]) -> tuple[str, ...]:
    told = answer.get("after")
    return tuple(str(one) for one in told) if isinstance(told, list) else ()


def circular(work: Work, before: Iterable[str]) -> str:
    """Why a task can never have its turn: one that goes before it waits for it, as its chain says; else empty."""
    chain = [item for item in work.headers.get("weft-chain", "").split(",") if item]
    ancestors = [(agent, task) for agent, _, task in (_TEXT.sub("", item).partition("/") for item in chain)]
    earlier = set(before)
    for at, (agent, task) in enumerate(ancestors):
        if task in earlier and agent == work.agent:
            down = (*ancestors[at:], (work.agent, work.task_id))
            waits = [CycleEdge(*parent, "child", child, child) for parent, (_, child) in pairwise(down)]
            turn = CycleEdge(work.agent, work.task_id, "order", task, task)
            return f"DeadlockError: {DeadlockError(cycle=(turn, *waits))}"
    return ""
