"""Records of calls: `Recorded` is the first stage and sees how every call ended, `Intended` the last before the server.

A call that could not be recorded is not made, unless its server's settings say otherwise.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

from weft.core.broker import Broker, sequence_of
from weft.core.supervise import Tasks
from weft.policy.patterns import PRESIDIO
from weft.policy.redaction import MARK, Redactor, kinds, redactor
from weft.sidecar import owed
from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft.sidecar.presidio.recognizer import Recognizer, Unrecognized
from weft.sidecar.weight import aside, heavy
from weft_protocols import headers as h
from weft_protocols.audit import AuditRecord, Kind, plain_form
from weft_protocols.canonical import SAFE_INTEGER
from weft_protocols.errors import BrokerError, TooLarge, WeftError
from weft_protocols.mcp import CODES, UNRECORDED

log = logging.getLogger("weft.sidecar")

RECORDED: Final = ("tools/call", "prompts/get", "resources/read")
"""Methods whose every call is recorded; of the others, refusals."""
SHOWN: Final = 16 * 1024
"""Bytes of arguments that a record has at most; of larger ones it has the digest."""
TAKEN_OUT: Final = frozenset({"secrets", "pii"})
"""Classes of data that stand in no record, whatever may be in results."""
BEFORE: Final = 5.0
"""Seconds an intent has to be stored."""
PATIENCE: Final = 15.0
"""Seconds an outcome has to be stored."""
BREATH: Final = 0.002
"""Seconds in which an answer gets out before its record is made."""
AT_ONCE: Final = 32
"""Records that are made without letting others have a turn."""
_MARK: Final = MARK.encode()
BEHIND: Final = 256
"""Outcomes that are being stored; with more, calls wait for theirs."""


class Recorder:
    """Writes records. Outcomes are stored behind the calls' backs, within `aclose` at the latest."""

    def __init__(self, broker: Broker, recognizer: Recognizer | None = None) -> None:
        self._broker = broker
        self._recognizer = recognizer or Recognizer()
        self.by = f"sidecar/{os.uname().nodename.partition('.')[0][:32]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.lost = 0
        """Records that could not be stored."""
        self._redactor = redactor(TAKEN_OUT)
        self._tasks = Tasks("audit records")
        self._waiting: list[tuple[Kind, Call, Outcome]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._open = 0
        """Outcomes that are not known to be stored."""
        self._idle = asyncio.Event()
        self._idle.set()

    def made(
        self, kind: Kind, call: Call, outcome: Outcome | None = None, arguments: Redactor | None = None
    ) -> AuditRecord:
        """The record of a call. Of one that has an intent, that with how it ended.

        `arguments` is what shown arguments are looked through with; without it, none are shown.
        """
        intent = call.facts.get(owed.RECORD)
        ended = _json(self._outcome(call, outcome)) if outcome is not None else {}
        if isinstance(intent, AuditRecord):  # what is known of a call changes no more once it is made
            return replace(intent, kind=kind, at=int(time.time() * 1000), outcome=ended)
        decision = owed.decision(call)
        why: dict[str, Any] = {
            "approvals": call.facts.get(owed.APPROVALS),
            "fence": call.facts.get(owed.FENCE),
        }
        if decision is not None:
            would = decision.shadow.encode() if decision.shadow is not None else None
            why |= {
                "policy": decision.version,
                "decision": "allow" if decision.allow else "deny",
                "rules": list(decision.reasons),
                "errors": list(decision.errors),
                "obligations": _json(decision.obligations.encode()) if decision.obligations else None,
                "shadow": _json(would) if would is not None else None,
            }
        return AuditRecord(
            kind,
            str(call.facts.get(owed.CALL) or uuid.uuid4().hex),
            int(time.time() * 1000),
            self.by,
            who=_json(_who(call)),
            what=_json(self._what(call, arguments)),
            why=_json(why),
            how={
                "sandbox": call.facts.get(owed.SANDBOX),
                "within": call.facts.get(owed.WITHIN),
                "deadline": int(call.deadline * 1000) if call.deadline is not None else None,
            },
            outcome=ended,
        )

    async def written(self, kind: Kind, call: Call, outcome: Outcome | None = None) -> AuditRecord:
        """The same, without holding up others where much is to be digested."""
        result = outcome.result if outcome is not None else None
        large = heavy(call.arguments) or heavy(result)
        shows = call.guards.show_arguments and not isinstance(call.facts.get(owed.RECORD), AuditRecord)
        arguments = await self._for_arguments(call, large=large) if shows else None
        return await aside(self.made, kind, call, outcome, arguments, large=large)

    async def _for_arguments(self, call: Call, *, large: bool) -> Redactor | None:
        """What arguments are looked through with before they are shown; None if they cannot be."""
        asked = owed.redactions(call) & {PRESIDIO}
        if not asked or len(json.dumps(call.arguments)) > 2 * SHOWN:
            return self._redactor
        try:
            return await self._recognizer.redactor(
                TAKEN_OUT | asked, lambda one: one.value(dict(call.arguments)), large=large, within=BEFORE
            )
        except Unrecognized as error:
            log.warning("arguments of a call of %s are left out of its record: %s", call.caller, error)
            return None

    async def store(self, record: AuditRecord, *, timeout: float) -> None:
        """Store a record. Raises BrokerError if it is not known to be stored, ValueError if it cannot be."""
        await self._broker.publish(record.subject, record.encode(), headers=_headers(record), timeout=timeout)

    async def store_later(self, kind: Kind, call: Call, outcome: Outcome) -> None:
        """Have the record of an outcome made and stored, after whoever waits for the answer has it.

        Waits for that only where too many are being stored.
        """
        if self._open >= BEHIND:
            await self._kept(kind, call, outcome)
            return
        self._open += 1
        self._idle.clear()
        self._waiting.append((kind, call, outcome))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(BREATH, self._flush)

    async def aclose(self) -> None:
        """Store what is under way, for a while."""
        try:
            async with asyncio.timeout(BEFORE):
                await self._idle.wait()
        except TimeoutError:
            log.error("%d audit records are not known to be stored", self._open)
        await self._tasks.aclose()

    def _flush(self) -> None:
        """Make and send what waits: one after the other, without a task for each."""
        now, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
        self._timer = asyncio.get_running_loop().call_later(0, self._flush) if self._waiting else None
        for kind, call, outcome in now:
            if not isinstance(call.facts.get(owed.RECORD), AuditRecord) or heavy(outcome.result):
                self._tasks.start(self._late(kind, call, outcome), name="an audit record")
                continue
            try:
                record = self.made(kind, call, outcome)
                self._broker.publish_then(
                    record.subject, record.encode(), headers=_headers(record), then=partial(self._answered, record)
                )
            except Exception:  # noqa: BLE001 - it is tried again there, and whatever it is said
                self._tasks.start(self._late(kind, call, outcome), name="an audit record")

    def _answered(self, record: AuditRecord, data: bytes, _: bytes | None, error: WeftError | None) -> None:
        """The broker's answer to a record. One that is not stored is sent again: it is stored once all the same."""
        try:
            if error is not None:
                raise error
            sequence_of(data)
        except WeftError:
            self._tasks.start(self._again(record), name="an audit record")
        else:
            self._done()

    async def _again(self, record: AuditRecord) -> None:
        try:
            await self.store(record, timeout=PATIENCE)
        except (BrokerError, ValueError) as error:
            self._lose(record.kind, record.id, error)
        finally:
            self._done()

    async def _late(self, kind: Kind, call: Call, outcome: Outcome) -> None:
        try:
            await self._kept(kind, call, outcome)
        finally:
            self._done()

    def _done(self) -> None:
        self._open -= 1
        if not self._open:
            self._idle.set()

    async def _kept(self, kind: Kind, call: Call, outcome: Outcome) -> None:
        try:
            await self.store(await self.written(kind, call, outcome), timeout=PATIENCE)
        except (BrokerError, ValueError, RecursionError) as error:
            self._lose(kind, str(call.facts.get(owed.CALL, "")), error)

    def _lose(self, kind: Kind, ident: str, error: Exception) -> None:
        self.lost += 1
        log.error("the %s of call %s is not stored: %s", kind, ident, error)

    def _what(self, call: Call, looking: Redactor | None) -> dict[str, Any]:
        arguments = dict(call.arguments)
        made: dict[str, Any] = {
            "server": call.server,
            "method": call.method,
            "name": self._redactor.text(call.name[:512]),
            "definition": call.definition_digest,
        }
        if not arguments:
            return made
        data = plain_form(arguments)
        made["arguments"] = hashlib.sha256(data).hexdigest()
        if call.guards.show_arguments:
            value = looking.value(arguments) if looking is not None and len(data) <= 2 * SHOWN else None
            size = len(data) if value is arguments else len(plain_form(value))
            made["shown"] = _json(value) if size <= SHOWN else None
        return made

    def _outcome(self, call: Call, outcome: Outcome) -> dict[str, Any]:
        made: dict[str, Any] = {"ms": int(outcome.seconds * 1000)}
        if outcome.cancelled:
            return made | {"status": "cancelled"}
        if outcome.result is not None:
            failed = outcome.result.get("isError") is True
            replayed = call.facts.get(owed.REPLAYED)
            try:
                data = plain_form(dict(outcome.result))
            except RecursionError:  # just too deep for here, though not for where it was measured
                data = b""
            return made | {
                "status": "replayed" if replayed else "failed" if failed else "ok",
                "bytes": len(data),
                "redactions": _redactions(call, data),
                "result": hashlib.sha256(data).hexdigest() if data else "",
            }
        code, message = (outcome.error.code, str(outcome.error)) if outcome.error is not None else (0, "")
        return made | {
            "status": "refused" if outcome.refused is not None else "error",
            "code": code,
            "kind": CODES.get(code, ("", ""))[0],
            "message": self._redactor.text(message[:SHOWN])[:500],
            "redactions": _redactions(call, message.encode(errors="replace")),
        }


class Recorded(Passing):
    """Gives a call its id, and records how it ended, or why it was not made."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Give it an id."""
        return call.with_fact(owed.CALL, secrets.token_hex(16))

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Record it."""
        last = outcome.call or call
        stored = owed.RECORD in last.facts or owed.REPLAYED in last.facts
        if call.method in RECORDED or outcome.refused is not None:
            kind: Kind = "outcome" if stored or outcome.refused is None else "denial"
            await self._recorder.store_later(kind, last, outcome)
        return outcome


class Intended(Passing):
    """Records a call before it is made."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse what cannot be recorded."""
        if call.method not in RECORDED:
            return call
        record: AuditRecord | None = None
        try:
            record = await self._recorder.written("intent", call)
            await self._recorder.store(record, timeout=BEFORE)
        except (BrokerError, ValueError, RecursionError, TooLarge) as error:
            log.error("the intent of a call of %s is not stored: %s", call.caller, error)
            if call.guards.required:
                return Refusal(UNRECORDED, "the call could not be recorded and is not made; try again", in_band=True)
        return call.with_fact(owed.RECORD, record)


def _headers(record: AuditRecord) -> bytes:
    return h.block(h.fields({h.DEDUPLICATION_ID: f"{record.id}:{record.kind}"}))


def _who(call: Call) -> dict[str, Any]:
    return {
        "agent": call.caller,
        "version": call.agent_version,
        "skill": call.skill,
        "sender": call.sender,
        "task": call.task,
        "chain": list(call.chain),
        "front": call.front,
        "request": call.request,
    }


def _redactions(call: Call, shown: bytes) -> dict[str, int]:
    """What was taken out, by kind: as it was counted, and as the marks say that stand in what the caller gets."""
    counted = call.facts.get(owed.REDACTED) or {}
    if _MARK not in shown:
        return dict(counted)
    return dict(Counter(counted) | kinds(shown.decode()))


def _json(value: Any) -> Any:
    """A JSON value that has a canonical form: what has none is text."""
    kind = type(value)
    if kind is str:
        return value if value.isascii() else value.encode(errors="backslashreplace").decode()
    if kind is dict:
        return {_json(key if type(key) is str else str(key)): _json(one) for key, one in value.items()}
    if kind is list or kind is tuple:
        return [_json(one) for one in value]
    if kind is int:
        return value if -SAFE_INTEGER <= value <= SAFE_INTEGER else str(value)
    if kind is float:
        return value if math.isfinite(value) else str(value)
    return _json(dict(value)) if isinstance(value, Mapping) else value
