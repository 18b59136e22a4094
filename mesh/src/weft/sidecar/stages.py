"""Stages that need nothing but the call: time, approval of the definition, size, failures, and how many at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field, replace
from typing import Any, Final

from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft.sidecar.settings import Limits
from weft.sidecar.weight import measured
from weft_protocols.mcp import (
    BUSY,
    CIRCUIT_OPEN,
    INVALID_PARAMS,
    LATE,
    QUARANTINED,
    TOO_LARGE,
    UPSTREAM_FAILED,
    error_object,
)

ENDLESS: Final = ("subscriptions/listen",)
"""Methods that end when their caller leaves, and count as no call under way."""
DEEPEST: Final = 200
"""Levels of lists and objects in an answer: readers of JSON give up at some thousand, in deep stacks before."""
KINDS: Final = {"tools/call": "tool", "prompts/get": "prompt"}
"""Methods that use what has a definition, and its kind."""


class Deadline(Passing):
    """A call has as long as its caller waits, and no longer than its server may take."""

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse what is too late already."""
        if call.method in ENDLESS:
            return call
        now = time.time()
        if call.deadline is not None and call.deadline <= now:
            return Refusal(LATE, "the deadline had passed before the call was made", in_band=True)
        most = now + call.limits.timeout
        return replace(call, deadline=most if call.deadline is None else min(most, call.deadline))


class Known(Passing):
    """What is called is offered."""

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse what is not."""
        kind = KINDS.get(call.method)
        if kind is None or call.definition is not None:
            return call
        return Refusal(INVALID_PARAMS, f"Unknown {kind}: {call.server} offers no {call.name[:80]!r}")


class Pinned(Passing):
    """What is called has the definition that was approved."""

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse what is in quarantine."""
        if not call.quarantine:
            return call
        return Refusal(
            QUARANTINED,
            f"{call.name!r} of {call.server} is in quarantine ({call.quarantine}); "
            f"`mesh tools approve {call.server}` shows what it is and approves it",
            {"server": call.server, "name": call.name, "reason": call.quarantine},
        )


class ResponseSize(Passing):
    """What a server answers, a result or an error, is no larger than it may be and nests no deeper than others read."""

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Put an error in place of what is."""
        answer: Any = outcome.result
        if answer is None and outcome.refused is None and outcome.error is not None:
            answer = error_object(outcome.error)
        if answer is None:
            return outcome
        size, limit, what = measured(answer, DEEPEST), call.limits.response_bytes, call.name or call.method
        if size is not None and size <= limit:
            return outcome
        told = f"the answer of {what} has {size} bytes; {call.server} may answer {limit}"
        if size is None:
            told = f"the answer of {what} nests deeper than {DEEPEST} levels"
        refusal = Refusal(TOO_LARGE, told, {"size": size, "limit": limit} if size is not None else {}, in_band=True)
        return replace(outcome, result=None, error=refusal.error, refused=refusal)


@dataclass(slots=True)
class _Circuit:
    failures: int = 0
    opened: float = 0.0
    """Monotonic seconds; 0 while it is closed."""
    trying: bool = False
    """Whether one call is under way to see if the server works again."""


class Breaker:
    """After some failures in a row a server is left alone for a while; then one call tries it."""

    def __init__(self) -> None:
        self._circuits: dict[str, _Circuit] = {}

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse calls to a server that fails."""
        circuit = self._circuits.setdefault(call.server, _Circuit())
        if not circuit.opened:
            return call
        left = circuit.opened + call.limits.reset - time.monotonic()
        if left > 0 or circuit.trying:
            wait = round(max(left, 1.0), 1)
            return Refusal(
                CIRCUIT_OPEN,
                f"{call.server} failed {circuit.failures} times in a row; try again in {wait:g} s",
                {"retryAfter": wait},
                in_band=True,
            )
        circuit.trying = True
        return call

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Count."""
        circuit = self._circuits.setdefault(call.server, _Circuit())
        circuit.trying = False
        failed = outcome.error is not None and outcome.error.code in (UPSTREAM_FAILED, LATE)
        if failed:
            circuit.failures += 1
            if circuit.failures >= call.limits.failures:
                circuit.opened = time.monotonic()
        elif not outcome.cancelled and outcome.refused is None:
            circuit.failures, circuit.opened = 0, 0.0
        return outcome


@dataclass(slots=True)
class _Places:
    """The places of one server, and who waits for one: agents by turns, each agent's calls in their order."""

    taken: Counter[str] = field(default_factory=Counter)
    """By agent."""
    waiting: OrderedDict[str, deque[asyncio.Future[None]]] = field(default_factory=OrderedDict)
    """By agent, whoever's turn is next first."""

    def free(self, agent: str, limits: Limits) -> bool:
        """Whether there is a place for an agent."""
        return self.taken.total() < limits.concurrency and self.taken[agent] < limits.share

    def leave(self, agent: str, limits: Limits) -> None:
        """Give a place back, and places to those whose turn it is."""
        self.taken[agent] -= 1
        if not self.taken[agent]:
            del self.taken[agent]
        while (following := next((one for one in self.waiting if self.free(one, limits)), None)) is not None:
            turn = self.waiting[following].popleft()
            if self.waiting[following]:
                self.waiting.move_to_end(following)
            else:
                del self.waiting[following]
            if not turn.done():
                self.taken[following] += 1
                turn.set_result(None)

    def forget(self, agent: str, turn: asyncio.Future[None]) -> None:
        """Somebody waits no more."""
        queue = self.waiting.get(agent)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self.waiting[agent]


class Concurrency:
    """So many calls of one server are under way at once, and so many of one agent; others wait a little."""

    def __init__(self) -> None:
        self._places: dict[str, _Places] = {}

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Take a place."""
        if call.method in ENDLESS:
            return call
        places, limits = self._places.setdefault(call.server, _Places()), call.limits
        if places.free(call.caller, limits):
            places.taken[call.caller] += 1
            return call
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        places.waiting.setdefault(call.caller, deque()).append(turn)
        try:
            async with asyncio.timeout(limits.queue_timeout):
                await turn
        except (TimeoutError, asyncio.CancelledError) as error:
            if turn.done() and not turn.cancelled():
                places.leave(call.caller, limits)
            if isinstance(error, asyncio.CancelledError):
                raise
            whose, most = ("", limits.concurrency)
            if places.taken[call.caller] >= limits.share < limits.concurrency:
                whose, most = f" of {call.caller}", limits.share
            return Refusal(
                BUSY,
                f"{call.server} has {most} calls{whose} under way; try again later",
                {"retryAfter": limits.queue_timeout},
                in_band=True,
            )
        finally:
            places.forget(call.caller, turn)
        return call

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Give the place to whoever's turn it is."""
        if call.method not in ENDLESS:
            self._places[call.server].leave(call.caller, call.limits)
        return outcome
