"""Requests about approvals as they are sent: read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from weft.core.approversconf import ROLE
from weft_coordinator.decide.approvals import STATES, TASK, TOOL, Approval, Bound, Filter, Need
from weft_coordinator.decide.registry import Fields
from weft_protocols import subjects

RISKS: Final = ("", "low", "medium", "high", "critical")
MAX_TITLE: Final = 500
"""Characters."""
MAX_DETAILS: Final = 16_384
"""Bytes of JSON."""
MAX_NEEDS: Final = 20
"""Roles."""
MAX_COUNT: Final = 99
"""Persons of one role."""
EXPIRES: Final = 86_400
"""Seconds for which a request is open where it does not say."""
LONGEST: Final = 30 * 86_400
"""Seconds for which it can be."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A person's decision as it is sent."""

    id: str
    """The id, or the beginning of it."""
    who: str
    role: str
    allow: bool
    reason: str


def request(body: Mapping[str, Any], caller: str, *, sidecar: bool, now: int) -> Approval:
    """A request of an agent for itself, or of a sidecar for an agent. Who is in its chain is not known here.

    Raises InvalidParams with every field that is wrong.
    """
    fields = Fields(body)
    title, risk = fields.text("title", limit=MAX_TITLE), fields.text("risk", default="")
    details = json.dumps(fields.object("details", limit=MAX_DETAILS) or {}, sort_keys=True)
    seconds = fields.real("expires", default=EXPIRES)
    if risk not in RISKS:
        fields.mistake("risk", f"must be one of {', '.join(RISKS[1:])}")
    if not 0 < seconds <= LONGEST:
        fields.mistake("expires", f"must be more than 0 and at most {LONGEST} seconds")
    needs = _needs(fields, body.get("needs"))
    if sidecar:
        bound = tool_call(fields)
    else:
        content = json.dumps([title, details, risk, [[need.role, need.count] for need in needs]])
        task, key = _task(fields), fields.text("key", limit=1024)
        digest = sha256(content.encode()).hexdigest()
        bound = Bound(TASK, caller, task, key, "", "", digest, "", "")
        if not task:
            fields.mistake("task", "must be the id of a task")
    fields.check(f"approval-request of {caller}")
    return Approval("", bound, title, details, risk, needs, "", (), (), now + int(seconds * 1000))


def tool_call(fields: Fields) -> Bound:
    """The call of a tool that a sidecar names; mistakes are the fields'."""
    arguments = fields.text("arguments")
    if arguments and not subjects.DIGEST.match(arguments):
        fields.mistake("arguments", "must be the SHA-256 of the arguments, 64 lower-case hex digits")
    return Bound(
        TOOL,
        fields.token("agent"),
        _task(fields),
        fields.text("key", limit=1024, default=""),
        fields.text("server"),
        fields.text("tool"),
        arguments,
        fields.text("definition"),
        fields.text("policy", default=""),
    )


def verdict(body: Mapping[str, Any]) -> Verdict:
    """A decision of a person. Raises InvalidParams."""
    fields = Fields(body)
    allow = body.get("allow")
    reason = fields.text("reason", limit=1000, default="").strip()
    made = Verdict(
        prefix(fields),
        fields.text("as", limit=64),
        fields.text("role", limit=64, default=""),
        allow is True,
        reason,
    )
    if not isinstance(allow, bool):
        fields.mistake("allow", "must be true or false")
    elif not allow and not reason:
        fields.mistake("reason", "is missing: who denies says why")
    fields.check("approval-decide")
    return made


def listing(body: Mapping[str, Any]) -> tuple[Filter, int]:
    """Which approvals are listed, and how many at most. Raises InvalidParams."""
    fields = Fields(body)
    states = fields.texts("states", limit=len(STATES))
    if unknown := [state for state in states if state not in STATES]:
        fields.mistake("states", f"has {unknown[0]!r}, which is none of {', '.join(STATES)}")
    agent, role, task = (fields.text(name, default="") for name in ("agent", "role", "task"))
    limit = fields.number("limit", default=100)
    fields.check("approvals")
    return Filter(states, agent, role, task), limit


def prefix(fields: Fields) -> str:
    """The id of an approval, or the beginning of it."""
    found = fields.text("id", limit=64)
    if found and (len(found) < 4 or not set(found) <= set("0123456789abcdef")):
        fields.mistake("id", "must be at least 4 lower-case hex digits")
    return found


def _task(fields: Fields) -> str:
    task = fields.text("task", default="")
    if task and not subjects.TASK_ID.match(task):
        fields.mistake("task", "must be 32 lower-case hex digits")
    return task


def _needs(fields: Fields, told: Any) -> tuple[Need, ...]:
    """Roles and how many of each, every role once."""
    made: list[Need] = []
    for one in told if isinstance(told, list) and 0 < len(told) <= MAX_NEEDS else [None]:
        match one:
            case [str(role), int(count)] if 1 <= count <= MAX_COUNT and _is_role(role) and type(count) is int:
                made.append(Need(role, count))
            case _:
                fields.mistake("needs", f"must be 1 to {MAX_NEEDS} lists of a role and a number from 1 to {MAX_COUNT}")
                return (Need(""),)
    if len({need.role for need in made}) != len(made):
        fields.mistake("needs", "names a role twice")
    return tuple(made)


def _is_role(text: str) -> bool:
    return not text or bool(ROLE.fullmatch(text))
