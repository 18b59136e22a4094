"""Stages that need nothing but the call: time, approval of the definition, size, failures, and how many at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Final

from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
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
    taken: Counter[str] = field(default_factory=Counter)
    """How many each caller has."""
    waiting: list[tuple[str, asyncio.Future[None]]] = field(default_factory=list)


class Concurrency:
    """So many calls of one server are under way at once; others wait a little.

    A place that becomes free is given to the caller who has the fewest: one who asks much keeps nobody out.
    """

    def __init__(self) -> None:
        self._places: dict[str, _Places] = {}

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Take a place."""
        if call.method in ENDLESS:
            return call
        places = self._places.setdefault(call.server, _Places())
        if places.taken.total() < call.limits.concurrency:
            places.taken[call.caller] += 1
            return call
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (call.caller, turn)
        places.waiting.append(place)
        try:
            async with asyncio.timeout(call.limits.queue_timeout):
                await turn
        except TimeoutError:
            if turn.done() and not turn.cancelled():
                self._free(places, call.caller)
            return Refusal(
                BUSY,
                f"{call.server} has {call.limits.concurrency} calls under way; try again later",
                {"retryAfter": call.limits.queue_timeout},
                in_band=True,
            )
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free(places, call.caller)
            raise
        finally:
            if place in places.waiting:
                places.waiting.remove(place)
        return call

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Give the place to whoever waits longest."""
        if call.method not in ENDLESS:
            self._free(self._places[call.server], call.caller)
        return outcome

    @staticmethod
    def _free(places: _Places, caller: str) -> None:
        places.taken[caller] -= 1
        if not places.taken[caller]:
            del places.taken[caller]
        places.waiting = [place for place in places.waiting if not place[1].done()]
        if places.waiting:
            place = min(places.waiting, key=lambda one: places.taken[one[0]])
            places.waiting.remove(place)
            places.taken[place[0]] += 1
            place[1].set_result(None)
