"""Calls that need a lock carry its fencing token: the coordinator says whether it holds, and no token goes back."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from weft.client.coordinator import call as ask_coordinator
from weft.core.broker import Broker
from weft.sidecar import owed
from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft_protocols.errors import Unavailable, WeftError
from weft_protocols.mcp import FENCED, INVALID_PARAMS, META_FENCE

log = logging.getLogger("weft.sidecar")

CHECK_WITHIN: Final = 3.0
"""Seconds the coordinator has to say whether a token holds."""
REMEMBERED: Final = 100_000
"""Names whose highest token is remembered, those used last."""
MOST: Final = 32
"""Fences in one call."""

Check = Callable[[str, int, str, str], Awaitable[bool]]
"""Whether a lock (name) is held with a token by a task (agent, task). Raises WeftError if that cannot be told."""


def by_coordinator(broker: Broker) -> Check:
    """Asks the coordinator that leads."""

    async def check(name: str, token: int, agent: str, task: str) -> bool:
        body = {"name": name, "token": token, "agent": agent, "task": task}
        return bool((await ask_coordinator(broker, "lock-check", body, timeout=CHECK_WITHIN))["held"])

    return check


class Fenced(Passing):
    """The locks of a tool are held by the task that calls it."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._highest: OrderedDict[str, int] = OrderedDict()

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse a call without the current token of each lock it needs."""
        if call.method != "tools/call":
            return call
        try:
            names = owed.locks(call)
        except ValueError as error:
            return Refusal(INVALID_PARAMS, str(error), in_band=True)
        if not names:
            return call
        given = _given(call.meta)
        for name in names:
            refused = await self._refused(call, name, given.get(name))
            if refused:
                reason, message = refused
                return Refusal(FENCED, message, {"lock": name, "reason": reason}, in_band=True)
        return call.with_fact(owed.FENCE, [{"name": name, "token": given[name]} for name in names])

    async def _refused(self, call: Call, name: str, token: int | None) -> tuple[str, str] | None:
        """Why a token will not do; None if it does."""
        tool = f"{call.server}.{call.name}"
        if token is None:
            return "missing", f"{tool} needs lock {name!r}: hold it by task.lock and call with fence=lock"
        if token < self._highest.get(name, 0):
            return "stale", f"lock {name!r} was given to somebody else since: token {token} holds no more"
        if not call.task:
            return "missing", f"{tool} needs lock {name!r}, which only a task can hold"
        try:
            held = await self._check(name, token, call.caller, call.task)
        except (WeftError, TimeoutError) as error:
            why = error if not isinstance(error, Unavailable) else "no coordinator answers"
            log.warning("lock %r of %s cannot be verified: %s", name, call.caller, error)
            return "unverified", f"whether lock {name!r} is held cannot be told now ({why}); try again"
        if not held:
            return "stale", f"lock {name!r} is not held by task {call.task} with token {token}"
        if token < self._highest.get(name, 0):  # somebody else came while the coordinator was asked
            return "stale", f"lock {name!r} was given to somebody else since: token {token} holds no more"
        self._remember(name, token)
        return None

    def _remember(self, name: str, token: int) -> None:
        self._highest[name] = token
        self._highest.move_to_end(name)
        if len(self._highest) > REMEMBERED:
            self._highest.popitem(last=False)


def _given(meta: Mapping[str, Any]) -> dict[str, int]:
    """Tokens by name of the lock, as the caller says; what is none is left out."""
    found = meta.get(META_FENCE)
    made: dict[str, int] = {}
    for one in (found if isinstance(found, list) else [found])[:MOST]:
        if isinstance(one, dict) and isinstance(one.get("name"), str):
            token = one.get("token")
            if isinstance(token, int) and not isinstance(token, bool) and token > 0:
                made[one["name"]] = token
    return made
