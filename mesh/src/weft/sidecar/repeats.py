"""A call with side effects is made once for a task, however often the task runs: its result is recorded and repeated.

The record is made before the call, under a name that is the task's, the call's, the tool's and the arguments'. Where
one is found without a result, the call may have had its effect: it is not made again unless its server says that this
changes nothing.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final

from weft.core import blobs
from weft.core.broker import Broker, Stored
from weft.sidecar import owed
from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft_protocols import headers as h
from weft_protocols.audit import digest
from weft_protocols.errors import BrokerError, Conflict, ToolError, WeftError
from weft_protocols.mcp import (
    LATE,
    META_STEP,
    TOO_LARGE,
    UNKNOWN_OUTCOME,
    UNRECORDED,
    UPSTREAM_FAILED,
    error_from,
    error_object,
)
from weft_protocols.resources import EFFECT_RECORDS, EFFECTS

log = logging.getLogger("weft.sidecar")

HEADROOM: Final = 4096
BEGUN: Final = "begun"
DONE: Final = "done"
VOID: Final = "void"
"""States of a record: it may have been made; it was, and this came of it; it was certainly not."""
_MARK: Final = "effect"
"""Fact: subject and sequence of the record that was begun."""


class Repeats(Passing):
    """Makes each call with side effects once."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._own = uuid.uuid4().hex

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Begin a record, or answer from the one there is."""
        if call.method != "tools/call" or not call.task or not owed.has_effects(call):
            return call
        subject = subject_of(call)
        try:
            found = await self._broker.last(EFFECTS, subject)
            for _ in range(2):
                known = _read(found)
                if known.get("state") in (BEGUN, DONE) and not (known["state"] == BEGUN and owed.is_idempotent(call)):
                    return await self._known(call, known)
                begun = {"state": BEGUN, "at": int(time.time() * 1000), "by": self._own, "request": call.request}
                try:
                    sequence = await self._write(subject, begun, after=found.seq if found is not None else 0)
                except Conflict:
                    # Somebody began it meanwhile, or this is what an attempt to write it left.
                    found = await self._broker.last(EFFECTS, subject)
                    known = _read(found)
                    if found is None or known.get("by") != self._own or known.get("request") != call.request:
                        continue
                    sequence = found.seq
                return call.with_fact(_MARK, (subject, sequence))
        except BrokerError as error:
            log.warning("a call of %s with side effects cannot be recorded: %s", call.caller, error)
        return Refusal(UNRECORDED, f"{call.name} has side effects, and the call cannot be recorded now; try again")

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Record what came of it, as far as that is known."""
        mark = call.facts.get(_MARK)
        told = _told(outcome) if mark is not None else None
        if mark is None or told is None:
            return outcome
        subject, sequence = mark
        try:
            await self._write(subject, await self._fitting(told), after=sequence)
        except (WeftError, TimeoutError) as error:
            log.error("what came of %s of task %s is not recorded: %s", call.name, call.task, error)
        return outcome

    async def _known(self, call: Call, known: Mapping[str, Any]) -> Refusal | Outcome:
        if known["state"] == BEGUN:
            return Refusal(
                UNKNOWN_OUTCOME,
                f"an earlier attempt of task {call.task} called {call.server}.{call.name}, and what came of it is not "
                "known; it is not repeated: find out at the server, then go on accordingly",
                {"begun": known.get("at"), "server": call.server, "name": call.name},
            )
        told = dict(known)
        if "blob" in told:
            try:
                told = json.loads(await blobs.get(self._broker, blobs.BlobRef.parse(str(told["blob"]))))
            except (WeftError, ValueError):
                return Refusal(
                    UNKNOWN_OUTCOME,
                    f"{call.server}.{call.name} was called by an earlier attempt of task {call.task} and ended; its "
                    "result was too large to be kept",
                )
        again = call.with_fact(owed.REPLAYED, True)
        if "error" in told:
            return Outcome(error=error_from(told["error"]), call=again)
        return Outcome(result=told.get("result"), call=again)

    async def _fitting(self, told: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(told, separators=(",", ":")).encode()
        if len(data) + HEADROOM <= self._broker.max_payload:
            return told
        ref = await blobs.put(self._broker, data)
        return {"state": told["state"], "at": told["at"], "blob": ref.url}

    async def _write(self, subject: str, record: Mapping[str, Any], *, after: int) -> int:
        lines = h.block(h.fields({h.EXPECTED_SEQUENCE: str(after)}))
        data = json.dumps(record, separators=(",", ":")).encode()
        return await self._broker.publish(subject, data, headers=lines)


def subject_of(call: Call) -> str:
    """Where the record of a call is."""
    step = call.meta.get(META_STEP)
    named = [call.server, call.name, step if isinstance(step, str) else "", digest(dict(call.arguments))]
    answers = [call.params.get("requestState"), call.params.get("inputResponses")]
    if any(one is not None for one in answers):
        named.append(digest(answers))  # the next round of a call that asked something
    return f"{EFFECT_RECORDS}.{call.caller}.{call.task}.{digest(named)}"


def _read(found: Stored | None) -> dict[str, Any]:
    if found is None:
        return {}
    try:
        made = json.loads(found.data)
    except ValueError:
        return {"state": BEGUN}
    return made if isinstance(made, dict) else {"state": BEGUN}


def _told(outcome: Outcome) -> dict[str, Any] | None:
    """What is recorded of an outcome; None if it is not known what the call did."""
    at = int(time.time() * 1000)
    if outcome.cancelled:
        return None if outcome.made else {"state": VOID, "at": at}
    if outcome.result is not None:
        return {"state": DONE, "at": at, "result": dict(outcome.result)}
    error = outcome.error or ToolError("the call has no outcome")
    if outcome.refused is not None:
        return None if outcome.refused.code == LATE else _refused(outcome.refused, at)
    if error.code == UPSTREAM_FAILED:
        # A server that could not be started was not called; one that ended was.
        unstarted = isinstance(error.data, Mapping) and "retryAfter" in error.data
        return {"state": VOID, "at": at} if unstarted else None
    if error.code == LATE:
        return None
    return {"state": DONE, "at": at, "error": error_object(error)}


def _refused(refusal: Refusal, at: int) -> dict[str, Any]:
    """A later stage refused the call, or what came back: only then it was made."""
    if refusal.code == TOO_LARGE:
        return {"state": DONE, "at": at, "error": error_object(refusal.error)}
    return {"state": VOID, "at": at}
