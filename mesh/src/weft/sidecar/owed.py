"""What a call owes besides its form: from the policy that allowed it, and from its server's registration. Pure."""

from __future__ import annotations

from typing import Final

from weft.policy.model import Decision, Obligations
from weft.sidecar.pipeline import Call
from weft_protocols.mcp import META_STEP

DECISION: Final = "decision"
"""Fact: the policy's `Decision`, left by the stage that asked it."""
APPROVALS: Final = "approvals"
"""Fact: what was approved and by whom, JSON, left by the stage that looked for it."""
FENCE: Final = "fence"
"""Fact: the locks whose tokens were checked, a list of `{name, token}`."""
SANDBOX: Final = "sandbox"
"""Fact: the level the server runs in."""
CALL: Final = "call"
"""Fact: id of the call in all of its records."""
WITHIN: Final = "within"
"""Fact: id of the call whose code made this one."""
RECORD: Final = "record"
"""Fact: the intent, an `AuditRecord`; None where it could not be recorded and need not be."""
REDACTED: Final = "redacted"
"""Fact: what was taken out of what came back, a count by kind."""
REPLAYED: Final = "replayed"
"""Fact: the result is that of an earlier attempt."""
NOTHING: Final = Obligations()


def decision(call: Call) -> Decision | None:
    """What the policy said; None where none was asked."""
    found = call.facts.get(DECISION)
    return found if isinstance(found, Decision) else None


def obligations(call: Call) -> Obligations:
    """What the policy obliges to; nothing where none was asked."""
    found = decision(call)
    return found.obligations if found is not None else NOTHING


def locks(call: Call) -> tuple[str, ...]:
    """Every lock it needs. Raises ValueError for an argument that cannot be part of a name."""
    return tuple(dict.fromkeys((*call.guards.locks_of(call.name, call.arguments), *obligations(call).locks)))


def redactions(call: Call) -> frozenset[str]:
    """Classes of data that are taken out of what comes back."""
    return frozenset((*call.guards.redact, *obligations(call).redact))


def has_effects(call: Call) -> bool:
    """Whether a repeated call would be a second effect.

    A task that runs again because it waited for an approval must not need another one to get where it was.
    """
    owes = obligations(call)
    return call.guards.has_effects(call.name) or owes.side_effects or (bool(owes.approvals) and META_STEP in call.meta)


def is_idempotent(call: Call) -> bool:
    """Whether its server says that the same call again changes nothing."""
    notes = call.definition.get("annotations") if call.definition is not None else None
    return isinstance(notes, dict) and notes.get("idempotentHint") is True
