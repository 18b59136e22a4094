"""What every request to a server passes: stages before it, the server, the same stages after it, in reverse.

A stage is one concern. It may refuse, may change the call on its way in and the outcome on its way out, and gets to
see every outcome of a call it let pass, so that what it took is given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, Final, Protocol

from weft.sidecar.guards import Guards
from weft.sidecar.settings import Limits
from weft_protocols.errors import ToolError
from weft_protocols.mcp import CODES, INTERNAL_ERROR, LATE, META_REFUSAL, TOO_LARGE

log = logging.getLogger("weft.sidecar")

AFTER: Final = 5.0
"""Seconds that stages have for what comes after a call that was cancelled."""
MADE: Final = (LATE, TOO_LARGE)
"""Codes of refusals of what was answered, or might have been: of the others the server was not asked."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to one server, as the stages see it."""

    caller: str
    """Who asks, as the broker or the token's issuer proved it."""
    server: str
    method: str
    """As in MCP: `tools/call`, `resources/read`, …"""
    name: str
    """The server's own name of the tool or prompt, or the URI; empty where the method is about none."""
    params: Mapping[str, Any]
    """The whole params, names being the server's own."""
    limits: Limits = field(default_factory=Limits)
    modern: bool = True
    """Whether the caller speaks MCP 2026-07-28."""
    front: str = "nats"
    """How it came: `nats`, `http` or `stdio`."""
    request: str = ""
    """The caller's own token of this request."""
    task: str = ""
    """Id of the caller's task it is part of; empty where it is part of none."""
    chain: tuple[str, ...] = ()
    """The delegation chain, `agent/task` items, the root first and the caller's own task last."""
    agent_version: str = ""
    skill: str = ""
    """The skill at work, as the agent says; empty if it is not known."""
    sender: str = ""
    """Who sent the task, as the agent says; empty if it is not known."""
    deadline: float | None = None
    """Unix seconds after which nobody waits for the outcome."""
    definition: Mapping[str, Any] | None = None
    """What the server says about the tool or prompt now."""
    definition_digest: str = ""
    quarantine: str = ""
    """Why the definition is not approved; empty if it is."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What stages found out, for later ones and for the record."""
    guards: Guards = field(default_factory=Guards)
    """What else its server's registration asks for."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Arguments of a tool or a prompt."""
        found = self.params.get("arguments")
        return found if isinstance(found, dict) else {}

    @property
    def meta(self) -> Mapping[str, Any]:
        """`_meta` of the request."""
        found = self.params.get("_meta")
        return found if isinstance(found, dict) else {}

    def with_arguments(self, arguments: Mapping[str, Any]) -> Call:
        """The call with other arguments."""
        return replace(self, params={**self.params, "arguments": dict(arguments)})

    def with_fact(self, name: str, value: Any) -> Call:
        """The call with one more thing found out."""
        values = list(_VALUES(self))  # `replace` looks at every field by name
        values[_FACTS] = {**self.facts, name: value}
        return Call(*values)


_NAMES: Final = [one.name for one in fields(Call)]
_VALUES: Final = attrgetter(*_NAMES)
_FACTS: Final = _NAMES.index("facts")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call is not made."""

    code: int
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
    in_band: bool = False
    """Whether a tool's caller gets it as a result that is an error: what a model can act on."""

    @property
    def error(self) -> ToolError:
        """As an error."""
        return ToolError(self.message, code=self.code, data=dict(self.data) or None)

    def result(self, *, modern: bool) -> dict[str, Any]:
        """As the result of a tool call."""
        kind = CODES.get(self.code, ("refused", ""))[0]
        made: dict[str, Any] = {
            "content": [{"type": "text", "text": self.message}],
            "isError": True,
            "_meta": {META_REFUSAL: {"code": self.code, "kind": kind, **self.data}},
        }
        return {"resultType": "complete", **made} if modern else made


class Refused(ToolError):
    """A refusal by whatever is behind the stages."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message, code=refusal.code, data=dict(refusal.data) or None)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended."""

    result: Mapping[str, Any] | None = None
    error: ToolError | None = None
    refused: Refusal | None = None
    """Which stage's refusal it was, where the server was not asked."""
    cancelled: bool = False
    made: bool = True
    """Of a cancelled call: whether every stage had let it pass, so that its server may have been asked."""
    seconds: float = 0.0
    call: Call | None = None
    """The call as it was when it ended, with everything that was found out about it."""


class Stage(Protocol):
    """One concern of the pipeline."""

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Let the call pass, changed or not, or refuse it, or say how it ended without making it."""
        ...

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """See how a call that passed ended; the outcome, changed or not. Also called after a cancellation."""
        ...


class Passing:
    """A stage that does nothing, to be built on."""

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Let it pass."""
        return call

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Leave it as it is."""
        return outcome


Execute = Callable[[Call], Awaitable[dict[str, Any]]]


class Pipeline:
    """The stages in their order."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)

    async def run(self, call: Call, execute: Execute) -> dict[str, Any]:
        """The result of a call. Raises ToolError for its error, or for a refusal that is not in band."""
        outcome = await self.outcome(call, execute)
        if outcome.result is not None:
            return dict(outcome.result)
        if outcome.refused is not None and outcome.refused.in_band and call.method == "tools/call":
            return outcome.refused.result(modern=call.modern)
        raise outcome.error or ToolError("the call has no outcome")

    async def outcome(self, call: Call, execute: Execute) -> Outcome:
        """How a call ended."""
        passed: list[tuple[Stage, Call]] = []
        begun = time.monotonic()
        outcome = Outcome(cancelled=True)
        try:
            outcome = await self._through(call, execute, passed)
            return await _back(passed, replace(outcome, seconds=time.monotonic() - begun))
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AFTER):
                    last = passed[-1][1] if passed else call
                    made = len(passed) == len(self.stages)
                    seconds = time.monotonic() - begun
                    await _back(passed, Outcome(cancelled=True, made=made, seconds=seconds, call=last))
            raise
        except Exception as error:  # what nobody thought of in a stage or an answer: all is given back and recorded
            log.error("%s of %s at %s failed", call.method, call.caller, call.server, exc_info=error)
            failed = Outcome(error=_failure(), call=passed[-1][1] if passed else call)
            return await _back(passed, replace(failed, seconds=time.monotonic() - begun))

    async def _through(self, call: Call, execute: Execute, passed: list[tuple[Stage, Call]]) -> Outcome:
        for stage in self.stages:
            decided = await stage.before(call)
            if isinstance(decided, Refusal):
                return Outcome(error=decided.error, refused=decided, call=call)
            if isinstance(decided, Outcome):
                return decided if decided.call is not None else replace(decided, call=call)
            call = decided
            passed.append((stage, call))
        left = None if call.deadline is None else max(0.0, call.deadline - time.time())
        limit = asyncio.timeout(left)
        try:
            async with limit:
                return Outcome(result=await execute(call), call=call)
        except TimeoutError:
            if not limit.expired():
                raise
            late = Refusal(LATE, f"{call.server} did not answer {call.method} {call.name} in time", in_band=True)
            return Outcome(error=late.error, refused=late, call=call)
        except Refused as error:
            return Outcome(error=error, refused=error.refusal, call=call)
        except ToolError as error:
            return Outcome(error=error, call=call)


async def _back(passed: list[tuple[Stage, Call]], outcome: Outcome) -> Outcome:
    while passed:
        stage, call = passed.pop()
        try:
            outcome = await stage.after(call, outcome)
        except Exception as error:  # the other stages are to give back what they took
            log.error("%s failed after %s of %s", type(stage).__name__, call.method, call.caller, exc_info=error)
            outcome = replace(outcome, result=None, error=_failure())
    return outcome


def _failure() -> ToolError:
    return ToolError("the sidecar failed; its log says why", code=INTERNAL_ERROR)
