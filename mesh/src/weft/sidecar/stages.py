"""Stages that need nothing but the call: time, approval of the definition, size, failures, and how many at once."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field, replace
from typing import Final

from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft_protocols.mcp import BUSY, CIRCUIT_OPEN, LATE, QUARANTINED, TOO_LARGE, UPSTREAM_FAILED

ENDLESS: Final = ("subscriptions/listen",)
"""Methods that end when their caller leaves, and count as no call under way."""


class Deadline(Passing):
    """A call has as long as its caller waits, and no longer than its server may take."""

    async def before(self, call: Call) -> Call | Refusal:
        """Refuse what is too late already."""
        if call.method in ENDLESS:
            return call
        now = time.time()
        if call.deadline is not None and call.deadline <= now:
            return Refusal(LATE, "the deadline had passed before the call was made", in_band=True)
        most = now + call.limits.timeout
        return replace(call, deadline=most if call.deadline is None else min(most, call.deadline))


class Pinned(Passing):
    """What is called has the definition that was approved."""

    async def before(self, call: Call) -> Call | Refusal:
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
    """A result is no larger than its server may answer."""

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Put an error in place of a result that is."""
        if outcome.result is None:
            return outcome
        size = len(json.dumps(outcome.result, separators=(",", ":"), ensure_ascii=False).encode())
        if size <= call.limits.response_bytes:
            return outcome
        refusal = Refusal(
            TOO_LARGE,
            f"the result of {call.name or call.method} has {size} bytes; {call.server} may answer "
            f"{call.limits.response_bytes}",
            {"size": size, "limit": call.limits.response_bytes},
            in_band=True,
        )
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

    async def before(self, call: Call) -> Call | Refusal:
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
    taken: int = 0
    waiting: list[asyncio.Future[None]] = field(default_factory=list)


class Concurrency:
    """So many calls of one server are under way at once; others wait a little."""

    def __init__(self) -> None:
        self._places: dict[str, _Places] = {}

    async def before(self, call: Call) -> Call | Refusal:
        """Take a place."""
        if call.method in ENDLESS:
            return call
        places = self._places.setdefault(call.server, _Places())
        if places.taken < call.limits.concurrency:
            places.taken += 1
            return call
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        places.waiting.append(turn)
        try:
            async with asyncio.timeout(call.limits.queue_timeout):
                await turn
        except TimeoutError:
            if turn.done() and not turn.cancelled():
                self._free(places)
            return Refusal(
                BUSY,
                f"{call.server} has {call.limits.concurrency} calls under way; try again later",
                {"retryAfter": call.limits.queue_timeout},
                in_band=True,
            )
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free(places)
            raise
        finally:
            if turn in places.waiting:
                places.waiting.remove(turn)
        return call

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Give the place to whoever waits longest."""
        if call.method not in ENDLESS:
            self._free(self._places[call.server])
        return outcome

    @staticmethod
    def _free(places: _Places) -> None:
        while places.waiting:
            turn = places.waiting.pop(0)
            if not turn.done():
                turn.set_result(None)
                return
        places.taken -= 1
