"""Records of calls: `Recorded` is the first stage and sees how every call ended, `Intended` the last before the server.

A call that could not be recorded is not made, unless its server's settings say otherwise.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final

from weft.core.broker import Broker
from weft.core.supervise import Tasks
from weft.policy.redaction import MARK, Redactor
from weft.sidecar import owed
from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft_protocols import headers as h
from weft_protocols.audit import AuditRecord, Kind, digest
from weft_protocols.errors import BrokerError, TooLarge
from weft_protocols.mcp import CODES, UNRECORDED

log = logging.getLogger("weft.sidecar")

RECORDED: Final = ("tools/call", "prompts/get", "resources/read")
"""Methods whose every call is recorded; of the others, refusals."""
SHOWN: Final = 16 * 1024
"""Bytes of arguments that a record has at most; of larger ones it has the digest."""
BEFORE: Final = 5.0
"""Seconds an intent has to be stored."""
BEHIND: Final = 256
"""Outcomes that are being stored; with more, calls wait for theirs."""
_ID: Final = "call"


class Recorder:
    """Writes records. Outcomes are stored behind the calls' backs, within `aclose` at the latest."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.by = f"sidecar/{os.uname().nodename.partition('.')[0][:32]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.lost = 0
        """Records that could not be stored."""
        self._redactor = Redactor(("secrets", "pii"))
        self._tasks = Tasks("audit records")

    def made(self, kind: Kind, call: Call, outcome: Outcome | None = None) -> AuditRecord:
        """The record of a call."""
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
            str(call.facts.get(_ID) or uuid.uuid4().hex),
            int(time.time() * 1000),
            self.by,
            who=_who(call),
            what=self._what(call),
            why=why,
            how={
                "sandbox": call.facts.get(owed.SANDBOX),
                "deadline": int(call.deadline * 1000) if call.deadline is not None else None,
            },
            outcome=_outcome(call, outcome) if outcome is not None else {},
        )

    async def store(self, record: AuditRecord, *, timeout: float) -> None:
        """Store a record. Raises BrokerError if it is not known to be stored, ValueError if it cannot be."""
        lines = h.block(h.fields({h.DEDUPLICATION_ID: f"{record.id}:{record.kind}"}))
        await self._broker.publish(record.subject, record.encode(), headers=lines, timeout=timeout)

    async def store_later(self, record: AuditRecord) -> None:
        """Have a record stored, and wait for that only where too many are being stored."""
        if len(self._tasks) < BEHIND:
            self._tasks.start(self._kept(record), name=f"record {record.id}")
        else:
            await self._kept(record)

    async def aclose(self) -> None:
        """Store what is under way, for a while."""
        try:
            async with asyncio.timeout(BEFORE):
                await self._tasks.idle()
        except TimeoutError:
            log.error("%d audit records are not known to be stored", len(self._tasks))
        await self._tasks.aclose()

    async def _kept(self, record: AuditRecord) -> None:
        try:
            await self.store(record, timeout=15.0)
        except (BrokerError, ValueError) as error:
            self.lost += 1
            log.error("audit record %s of %s is not stored: %s", record.kind, record.id, error)

    def _what(self, call: Call) -> dict[str, Any]:
        arguments = dict(call.arguments)
        made: dict[str, Any] = {
            "server": call.server,
            "method": call.method,
            "name": self._redactor.text(call.name[:512]),
            "definition": call.definition_digest,
        }
        if arguments:
            made["arguments"] = digest(arguments)
        if arguments and call.guards.show_arguments:
            shown = _json(self._redactor.value(arguments))
            made["shown"] = shown if len(json.dumps(shown)) <= SHOWN else None
        return made


class Recorded(Passing):
    """Gives a call its id, and records how it ended, or why it was not made."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Give it an id."""
        return call.with_fact(_ID, uuid.uuid4().hex)

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Record it."""
        last = outcome.call or call
        stored = owed.RECORD in last.facts or owed.REPLAYED in last.facts
        if call.method in RECORDED or outcome.refused is not None:
            kind: Kind = "outcome" if stored or outcome.refused is None else "denial"
            await self._recorder.store_later(self._recorder.made(kind, last, outcome))
        return outcome


class Intended(Passing):
    """Records a call before it is made."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse what cannot be recorded."""
        if call.method not in RECORDED:
            return call
        record = self._recorder.made("intent", call)
        try:
            await self._recorder.store(record, timeout=BEFORE)
        except (BrokerError, ValueError, TooLarge) as error:
            log.error("the intent of a call of %s is not stored: %s", call.caller, error)
            if call.guards.required:
                return Refusal(UNRECORDED, "the call could not be recorded and is not made; try again", in_band=True)
        return call.with_fact(owed.RECORD, record.id)


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


def _outcome(call: Call, outcome: Outcome) -> dict[str, Any]:
    made: dict[str, Any] = {"ms": int(outcome.seconds * 1000)}
    if outcome.result is not None:
        failed = outcome.result.get("isError") is True
        replayed = call.facts.get(owed.REPLAYED)
        data = json.dumps(outcome.result, separators=(",", ":"), ensure_ascii=False)
        return made | {
            "status": "replayed" if replayed else "failed" if failed else "ok",
            "bytes": len(data.encode()),
            "redactions": data.count(MARK) or None,
            "result": digest(dict(outcome.result)),
        }
    if outcome.cancelled:
        return made | {"status": "cancelled"}
    error = outcome.error
    code = error.code if error is not None else 0
    return made | {
        "status": "refused" if outcome.refused is not None else "error",
        "code": code,
        "kind": CODES.get(code, ("", ""))[0],
        "message": str(error)[:500] if error is not None else "",
    }


def _json(value: Any) -> Any:
    """A JSON value that has a canonical form: what has none is text."""
    if isinstance(value, Mapping):
        return {str(key): _json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**53 - 1:
        return str(value)
    return value
