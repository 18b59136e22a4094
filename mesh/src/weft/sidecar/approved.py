"""Calls that persons have to approve: asked for once, bound to exactly this call, and used once.

The coordinator keeps what was asked and decided, and hands an approval out to one call. So a call that was approved is
refused until then with the approval's id, and whoever makes it again attaches to the same request.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from weft.client import approvals as api
from weft.client.approvals import ApprovalInfo, ToolCall
from weft.core.broker import Broker
from weft.policy.redaction import Redactor
from weft.sidecar import owed
from weft.sidecar.pipeline import MADE, Call, Outcome, Passing, Refusal
from weft_protocols.audit import digest
from weft_protocols.errors import BrokerError, Fenced, InvalidParams, WeftError
from weft_protocols.mcp import DENIED, META_STEP, PENDING
from weft_protocols.subjects import step_token

log = logging.getLogger("weft.sidecar")

ASK_WITHIN: Final = 5.0
"""Seconds the coordinator has to answer."""
AGAIN: Final = 2.0
"""Seconds after which a call can be made again where nobody could be asked."""
USES: Final = 3
"""Attempts at one use whose answer got lost."""
SHOWN: Final = 12 * 1024
"""Bytes of arguments that approvers are shown at most."""
LONGEST_KEY: Final = 1000
LONGEST_NAME: Final = 200
ROUNDS: Final = ("inputResponses", "requestState")
_USED: Final = "approval"
"""Fact: id of the approval that was used, and by which token."""
METHODS: Final = ("tools/call", "prompts/get", "resources/read")


class Persons(Protocol):
    """Asks persons, and uses what they approved; see `weft.client.approvals`. Raises WeftError if that cannot be."""

    async def ask(
        self, wanted: ToolCall, *, title: str, needs: Sequence[tuple[str, int]], risk: str, details: Mapping[str, Any]
    ) -> ApprovalInfo:
        """How the request for this call stands, which is made if there is none."""
        ...

    async def use(self, id_: str, wanted: ToolCall, *, by: str) -> str:
        """Empty if the call may be made now, else why not."""
        ...

    async def give_back(self, id_: str, *, by: str) -> bool:
        """What `by` used can be used again: the call was not made."""
        ...


class _ByPersons:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def ask(
        self, wanted: ToolCall, *, title: str, needs: Sequence[tuple[str, int]], risk: str, details: Mapping[str, Any]
    ) -> ApprovalInfo:
        return await api.ask(
            self._broker, wanted, title=title, needs=needs, risk=risk, details=details, timeout=ASK_WITHIN
        )

    async def use(self, id_: str, wanted: ToolCall, *, by: str) -> str:
        return await api.use(self._broker, id_, wanted, by=by, timeout=ASK_WITHIN)

    async def give_back(self, id_: str, *, by: str) -> bool:
        return await api.give_back(self._broker, id_, by=by, timeout=ASK_WITHIN)


def by_persons(broker: Broker) -> Persons:
    """Asks by the coordinator that leads."""
    return _ByPersons(broker)


class Approved(Passing):
    """Lets a call pass that persons have approved, if the policy asks for that.

    One that was not made after all, such as code that came to a call which needs another approval, gives its approval
    back: making it again asks nobody anew.
    """

    def __init__(self, persons: Persons) -> None:
        self._persons = persons
        self._redactor = Redactor(("secrets",))

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Use what was approved; refuse what was not, or not yet."""
        needed = owed.obligations(call).approvals
        if not needed or call.method not in METHODS:
            return call
        wanted = bound(call)
        try:
            # What another call used in the same moment is asked for anew.
            for _ in range(2):
                told = await self._ask(call, wanted)
                if told.state != "approved":
                    return _refused(call, told)
                by = uuid.uuid4().hex
                why = await self._use(told.id, wanted, by)
                if not why:
                    return call.with_fact(owed.APPROVALS, [_said(told)]).with_fact(_USED, (told.id, by))
                log.info("approval %s cannot be used: %s", told.id, why)
        except (InvalidParams, Fenced) as error:
            return Refusal(
                DENIED, f"{_named(call)} needs an approval, which cannot be asked for: {error}", in_band=True
            )
        except (WeftError, TimeoutError) as error:
            log.warning("nobody can be asked to approve a call of %s: %s", call.caller, error)
        return Refusal(
            PENDING,
            f"{_named(call)} needs an approval, and nobody can be asked for it now; make the same call again later",
            {"retryAfter": AGAIN},
            in_band=True,
        )

    async def _ask(self, call: Call, wanted: ToolCall) -> ApprovalInfo:
        return await self._persons.ask(
            wanted,
            title=f"{call.caller}: {_named(call)}",
            needs=[(one.role, one.count) for one in owed.obligations(call).approvals],
            risk=_risk(call),
            details=self._details(call),
        )

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Give back what was used for nothing."""
        if _USED in call.facts and outcome.refused is not None and outcome.refused.code not in MADE:
            id_, by = call.facts[_USED]
            try:
                await self._persons.give_back(id_, by=by)
            except (WeftError, TimeoutError) as error:
                log.warning("approval %s of a call that was not made is used up: %s", id_, error)
        return outcome

    async def _use(self, id_: str, wanted: ToolCall, by: str) -> str:
        for left in reversed(range(USES)):
            try:
                return await self._persons.use(id_, wanted, by=by)
            except (BrokerError, TimeoutError):
                if not left:
                    raise
        return "it is not known whether it was used"

    def _details(self, call: Call) -> dict[str, Any]:
        """What persons see of it. Secrets are taken out; nobody approves what was cut without being told."""
        rounds = _rounds(call)
        shown = self._redactor.value({"arguments": dict(call.arguments), **({"answers": rounds} if rounds else {})})
        made: dict[str, Any] = dict(shown)
        text = json.dumps(shown["arguments"] if not rounds else shown, ensure_ascii=True)
        if len(text) > SHOWN:
            made = {"arguments": text[:SHOWN], "cut": f"{len(text) - SHOWN} of {len(text)} characters are not shown"}
        decision = owed.decision(call)
        return made | {"method": call.method, "rules": list(decision.reasons) if decision is not None else []}


def bound(call: Call) -> ToolCall:
    """What an approval of a call is bound to."""
    decision = owed.decision(call)
    step = call.meta.get(META_STEP)
    key = step if isinstance(step, str) else ""
    return ToolCall(
        agent=call.caller,
        server=call.server,
        tool=call.name if len(call.name) <= LONGEST_NAME else step_token(call.name),
        arguments=digest([dict(call.arguments), rounds] if (rounds := _rounds(call)) else dict(call.arguments)),
        definition=call.definition_digest or digest([call.method, call.name]),
        policy=str(decision.version) if decision is not None else "",
        task=call.task,
        key=key if len(key) <= LONGEST_KEY else step_token(key),
    )


def _rounds(call: Call) -> dict[str, Any]:
    """What a call of several rounds carries besides its arguments: it decides as much about what happens."""
    return {name: call.params[name] for name in ROUNDS if name in call.params}


def _refused(call: Call, told: ApprovalInfo) -> Refusal:
    if told.state == "pending":
        needs = " and ".join(f"{count} of {role or 'the approvers'}" for role, count in told.open or told.needs)
        left = max(0, round(told.expires / 1000 - time.time()))
        return Refusal(
            PENDING,
            f"{_named(call)} waits for an approval by {needs}: {told.id}. It was not called. Once it is approved "
            f"(`mesh approvals approve {told.id}`), the same call with the same arguments is made",
            {"approval": told.id, "needs": [list(one) for one in told.needs], "expiresIn": left},
            in_band=True,
        )
    said = {"denied": "was denied", "expired": "was not approved in time", "withdrawn": "was withdrawn"}
    why = f": {told.why}" if told.why else ""
    return Refusal(
        DENIED,
        f"{_named(call)} is not called: approval {told.id} {said.get(told.state, f'is {told.state}')}{why}",
        {"approval": told.id, "state": told.state, "reason": "unapproved"},
        in_band=True,
    )


def _said(told: ApprovalInfo) -> dict[str, Any]:
    """As the record has it."""
    by = [{"who": one["who"], "role": one["role"], "at": one["at"]} for one in told.decisions if one["allow"]]
    return {"id": told.id, "by": by, "asked": told.asked}


def _named(call: Call) -> str:
    return f"{call.server}.{call.name}" if call.method != "resources/read" else f"{call.name[:200]} of {call.server}"


def _risk(call: Call) -> str:
    """By what the approved definition says of the tool."""
    notes = call.definition.get("annotations") if call.definition is not None else None
    said = notes if isinstance(notes, dict) else {}
    if call.method != "tools/call" or said.get("readOnlyHint") is True:
        return "low"
    return "high" if said.get("destructiveHint") is True else "medium"
