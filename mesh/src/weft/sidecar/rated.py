"""So many calls in so much time, for all sidecars together: what the policy obliges to, and a server's `rate`."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Final

from weft.client.limits import SharedLimits
from weft.policy.model import Limit, Request
from weft.sidecar import owed
from weft.sidecar.guards import EVERY_TOOL
from weft.sidecar.pipeline import MADE, Call, Outcome, Passing, Refusal
from weft_protocols.mcp import RATE_LIMITED

COUNTED: Final = {"tools/call": "call", "prompts/get": "get", "resources/read": "read", "completion/complete": "get"}
"""Methods whose calls are counted, and what the policy calls them. Lists are not."""
_TAKEN: Final = "rated"
"""Fact: what was counted, and when (monotonic seconds)."""


class Rated(Passing):
    """Refuses calls over a limit.

    A call that a later stage refuses, such as one that has to wait for an approval, is not counted.
    """

    def __init__(self, limits: SharedLimits) -> None:
        self._limits = limits

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Count it."""
        limits = limits_of(call)
        if not limits:
            return call
        over = await self._limits.take(limits, _request(call))
        if over is None:
            return call.with_fact(_TAKEN, (limits, time.monotonic()))
        wait = max(0.1, math.ceil(over.seconds * 10) / 10)
        told = {"retryAfter": wait, "limit": over.limit.words, "rule": over.limit.policy}
        what = f"{call.server}.{call.name}" if call.name else call.server
        return Refusal(
            RATE_LIMITED,
            f"{what} was called too often ({over.limit.words}, by {over.limit.policy}); try again in {wait:g} s",
            told,
            in_band=True,
        )

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Do not count what was not made."""
        refused = outcome.refused
        if _TAKEN not in call.facts or refused is None or refused.code in MADE:
            return outcome
        limits, at = call.facts[_TAKEN]
        # What was to come in that time has come: to give back more would let more pass than the limit says.
        elapsed = time.monotonic() - at
        await self._limits.give_back([one for one in limits if elapsed * one.rate < 1], _request(call))
        return outcome


def limits_of(call: Call) -> tuple[Limit, ...]:
    """Every limit a call counts for."""
    if call.method not in COUNTED:
        return ()
    own = call.guards.rates_of(call.name if call.method == "tools/call" else "")
    return (*owed.obligations(call).limits, *(_named(one, call.server) for one in own))


def _named(limit: Limit, server: str) -> Limit:
    """A limit of a server's settings, told apart from those of other servers and tools."""
    tool = "" if limit.policy == EVERY_TOOL else f".{limit.policy}"
    return replace(limit, policy=f"settings of {server}{tool}")


def _request(call: Call) -> Request:
    """What limits tell calls apart by."""
    return Request(call.caller, COUNTED[call.method], call.server, call.name)
