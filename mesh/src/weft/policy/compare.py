"""How two policies differ: in their rules, and in what they decide about requests that were recorded. Pure."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from weft.policy.bundle import Compiled
from weft.policy.expressions import Reads
from weft.policy.model import Decision, Obligations, PolicyEngine, Request
from weft.policy.redaction import MARK

SAME: Final = "same"
LONGEST: Final = 1000
"""Characters of a text in a record."""
SHOWN: Final = 200
"""Characters that are kept of a longer one."""


@dataclass(frozen=True, slots=True)
class Change:
    """A rule that is not in both, or not the same in both."""

    rule: str
    kind: str
    """`added`, `removed` or `changed`; groups of agents are `groups.yaml`."""
    lines: tuple[str, ...]
    """What it says, or a unified difference."""


def changes(before: Compiled, after: Compiled) -> list[Change]:
    """What changes from one policy to another, by id of the rule."""
    old = {rule.id: rule.chunk.text for rule in before.rules} | _groups(before)
    new = {rule.id: rule.chunk.text for rule in after.rules} | _groups(after)
    made = []
    for rule in sorted({*old, *new}):
        if rule not in old:
            made.append(Change(rule, "added", tuple(f"+{line}" for line in new[rule].splitlines())))
        elif rule not in new:
            made.append(Change(rule, "removed", tuple(f"-{line}" for line in old[rule].splitlines())))
        elif old[rule] != new[rule]:
            lines = difflib.unified_diff(old[rule].splitlines(), new[rule].splitlines(), lineterm="", n=3)
            made.append(Change(rule, "changed", tuple(lines)[2:]))
    return made


def _groups(policy: Compiled) -> dict[str, str]:
    if not policy.groups:
        return {}
    return {"groups.yaml": "\n".join(f"{name}: {', '.join(agents)}" for name, agents in sorted(policy.groups.items()))}


def verdict(before: Decision, after: Decision) -> str:
    """How a decision changes: `allow>deny`, `deny>allow`, `obligations`, or `same`."""
    return difference(before.allow, before.obligations, after.allow, after.obligations)


def difference(allowed: bool, owed: Obligations, allows: bool, owes: Obligations) -> str:
    """The same of its parts."""
    if allowed != allows:
        return "allow>deny" if allowed else "deny>allow"
    return "obligations" if allowed and owed != owes else SAME


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request that was decided, as a record has it."""

    request: Request
    allow: bool
    reasons: tuple[str, ...] = ()
    obligations: Mapping[str, Any] | None = None
    """In JSON; None if the record does not say."""
    unshown: bool = False
    """Whether it had arguments that the record does not show."""

    @classmethod
    def decode(cls, raw: Any) -> Recorded:
        """Out of a record, also one that a sidecar stored. Raises ValueError if it holds no decision."""
        unshown = False
        if isinstance(raw, Mapping) and isinstance(raw.get("who"), Mapping) and isinstance(raw.get("what"), Mapping):
            unshown = bool(raw["what"].get("arguments")) and not isinstance(raw["what"].get("shown"), Mapping)
            raw = _audited(raw)
        if isinstance(raw, Mapping) and isinstance(raw.get("policy"), Mapping):
            raw = raw["policy"]
        if not isinstance(raw, Mapping) or raw.get("decision") not in ("allow", "deny"):
            raise ValueError("it holds no decision")
        if not isinstance(raw.get("request"), Mapping):
            raise ValueError("it does not hold the request")
        owed = raw.get("obligations")
        reasons = raw.get("reasons") or ()
        return cls(
            Request.decode(raw["request"]),
            raw["decision"] == "allow",
            tuple(str(one) for one in reasons),
            owed if isinstance(owed, Mapping) else None,
            unshown,
        )


ACTIONS: Final = {"tools/call": "call", "prompts/get": "get", "resources/read": "read"}
"""What a policy calls the methods that records are about."""


def _audited(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The decision in a sidecar's record of a call."""
    who, what, why = raw["who"], raw["what"], raw.get("why")
    if raw.get("kind") == "outcome":
        raise ValueError("the record of how a call ended: its decision is in that of the intent")
    if what.get("method") not in ACTIONS or not isinstance(why, Mapping):
        return {}
    request = {
        "agent": who.get("agent", ""),
        "action": ACTIONS[what["method"]],
        "server": what.get("server", ""),
        "name": what.get("name", ""),
        "version": who.get("version", ""),
        "skill": who.get("skill", ""),
        "task": who.get("task", ""),
        "caller": who.get("sender", ""),
        "chain": who.get("chain", []),
        "front": who.get("front", ""),
        "time": raw.get("at", 0) / 1000,
        "arguments": what.get("shown") or {},
    }
    said = {"decision": why.get("decision"), "reasons": why.get("rules", []), "obligations": why.get("obligations")}
    return {"request": request, **said}


def record(request: Request, decision: Decision, *, redact: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """What a record keeps of a decision, so that any policy can decide about the request anew.

    Args:
        request: what was asked.
        decision: what was decided about it.
        redact: takes secrets out of the arguments, e.g. `Redactor.value`; texts that are very long are cut anyhow.
    """
    asked = request.encode()
    if "arguments" in asked:
        arguments = dict(request.arguments)
        asked["arguments"] = _cut(redact(arguments) if redact is not None else arguments)
    return {"request": asked, **decision.encode()}


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= LONGEST else f"{value[:SHOWN]}{MARK}{len(value) - SHOWN} characters]"
    if isinstance(value, Mapping):
        return {name: _cut(one) for name, one in value.items()}
    return [_cut(one) for one in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, slots=True)
class Flip:
    """A recorded decision that the candidate would make otherwise."""

    recorded: Recorded
    decision: Decision
    kind: str


@dataclass(frozen=True, slots=True)
class Replay:
    """What a candidate makes of records."""

    same: int
    flips: tuple[Flip, ...]
    redacted: int
    """Records that cannot be decided anew: an argument that rules read was redacted, or cut."""


def replay(engine: PolicyEngine, needs: Callable[[Request], Reads], recorded: Iterable[Recorded]) -> Replay:
    """Decide about recorded requests anew.

    Args:
        engine: the candidate.
        needs: a function of a request to what the candidate's rules read of it.
        recorded: the requests.
    """
    same, redacted = 0, 0
    flips = []
    for one in recorded:
        reads = needs(one.request)
        read = {n: v for n, v in one.request.arguments.items() if reads.everything or n in reads.arguments}
        if _is_redacted([read, one.request.name]) or (one.unshown and (reads.everything or reads.arguments)):
            redacted += 1
            continue
        decision = engine.decide(one.request)
        kind = SAME if decision.allow == one.allow else ("allow>deny" if one.allow else "deny>allow")
        if kind == SAME and one.allow and one.obligations is not None:
            owed = decision.obligations.encode()
            kind = SAME if _comparable(owed) == _comparable(one.obligations) else "obligations"
        if kind == SAME:
            same += 1
        else:
            flips.append(Flip(one, decision, kind))
    return Replay(same, tuple(flips), redacted)


def _comparable(owed: Mapping[str, Any]) -> Any:
    """JSON as it is after a way through a file, without the names of rules."""
    made = json.loads(json.dumps(owed))
    for limit in made.get("limits") or ():
        limit.pop("policy", None)
    return made


def _is_redacted(value: Any) -> bool:
    if isinstance(value, str):
        return MARK in value
    if isinstance(value, Mapping):
        return any(_is_redacted(one) for one in value.values())
    return isinstance(value, list) and any(_is_redacted(one) for one in value)
