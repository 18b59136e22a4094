"""What annotations of rules oblige to: read when a policy is loaded, combined when several rules allow a call. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from weft.policy.model import SANDBOXES, SCOPES, UNITS, Approval, Limit, Obligations, Request
from weft.policy.patterns import CLASSES
from weft.policy.problems import suggestion

_SECONDS: Final = dict(UNITS)
LONGEST: Final = 30 * 86_400.0
"""Seconds that a limit counts over at most."""
_LIMIT: Final = re.compile(r"(\d{1,9})/(\d{1,6})?([smhd])(?: burst (\d{1,9}))?(?: per (\w+))?")
_COST: Final = re.compile(r"([a-z][a-z0-9_-]{0,31}):(\d{1,12}(?:\.\d{1,9})?)")
_ROLE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LOCK: Final = re.compile(r"(?:[A-Za-z0-9_./:@-]|\{[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*\})+")
_FIELD: Final = re.compile(r"\{([^{}]+)\}")
FREE: Final = ("id", "reason", "description", "shadow")
"""Annotations of permits and forbids alike; those that begin with `x_` are anybody's own."""
NOTHING: Final = Obligations()


@dataclass(frozen=True, slots=True)
class Notes:
    """The annotations of one rule, read."""

    obligations: Obligations = field(default_factory=Obligations)
    shadow: bool = False
    reason: str = ""


def read(policy: str, effect: str, annotations: Mapping[str, str | None]) -> tuple[Notes, list[tuple[str, str]]]:
    """The annotations of a rule, and what is wrong with them: (annotation, what)."""
    wrong: list[tuple[str, str]] = []
    made = NOTHING
    for name, raw in annotations.items():
        if name in FREE or name.startswith("x_"):
            continue
        if name not in READERS:
            known = (*READERS, *FREE)
            wrong.append((name, f"@{name} is no annotation{suggestion(name, known)} (own ones begin with x_)"))
            continue
        if effect == "forbid":
            wrong.append((name, f"@{name} says what a permitted call obliges to; a forbid permits none"))
            continue
        try:
            made = READERS[name](made, policy, (raw or "").strip())
        except ValueError as error:
            wrong.append((name, f"@{name}: {error}"))
    if "approval_count" in annotations and "approval" not in annotations:
        wrong.append(("approval_count", "@approval_count without @approval: of which role?"))
    made = _with_count(made, annotations.get("approval_count"))
    return Notes(made, "shadow" in annotations, (annotations.get("reason") or "").strip()), wrong


def combine(several: Iterable[Obligations]) -> Obligations:
    """The strictest of all.

    Every role with its highest count, every limit, the highest cost of each unit, all that is to be redacted, the
    strongest sandbox, every lock, and side effects if any says so.
    """
    found = [one for one in several if one is not NOTHING]
    if not found:
        return NOTHING
    if len(found) == 1:
        return found[0]
    roles: dict[str, int] = {}
    cost: dict[str, float] = {}
    for one in found:
        for approval in one.approvals:
            roles[approval.role] = max(roles.get(approval.role, 0), approval.count)
        for unit, amount in one.cost.items():
            cost[unit] = max(cost.get(unit, 0.0), amount)
    levels = [SANDBOXES.index(one.sandbox) for one in found if one.sandbox]
    return Obligations(
        approvals=tuple(Approval(role, count) for role, count in sorted(roles.items())),
        limits=tuple(dict.fromkeys(limit for one in found for limit in one.limits)),
        cost=cost,
        redact=tuple(sorted({name for one in found for name in one.redact})),
        sandbox=SANDBOXES[max(levels)] if levels else "",
        locks=tuple(dict.fromkeys(lock for one in found for lock in one.locks)),
        side_effects=any(one.side_effects for one in found),
    )


def fill(obligations: Obligations, request: Request) -> Obligations:
    """With arguments in the names of locks. Raises ValueError for one that is missing or is neither text nor number."""
    if not obligations.locks:
        return obligations
    return replace(obligations, locks=tuple(_filled(lock, request.arguments) for lock in obligations.locks))


def fields(lock: str) -> list[str]:
    """The arguments that a lock's name takes, dotted paths."""
    return _FIELD.findall(lock)


def _filled(template: str, arguments: Mapping[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        found: Any = arguments
        for step in match[1].split("."):
            found = found.get(step) if isinstance(found, Mapping) else None
        if isinstance(found, bool) or not isinstance(found, str | int) or found == "":
            raise ValueError(f"lock {template!r} needs argument {match[1]!r} as a text or a whole number")
        return str(found)

    return _FIELD.sub(value, template)


# Readers of one annotation: what is known so far, the rule, the text ------------------------------------------------


def _approval(made: Obligations, _: str, text: str) -> Obligations:
    roles = _words(text, "the role that has to agree", "ops")
    for role in roles:
        if not _ROLE.fullmatch(role):
            raise ValueError(f"{role!r} is no role; letters, digits, _ . and - make one")
    return replace(made, approvals=tuple(Approval(role) for role in sorted(set(roles))))


def _approval_count(made: Obligations, _: str, text: str) -> Obligations:
    if not re.fullmatch(r"[1-9]\d?", text):
        raise ValueError(f"{text!r} must be how many have to agree, 1 to 99")
    return made


def _with_count(made: Obligations, text: str | None) -> Obligations:
    if text is None or not re.fullmatch(r"[1-9]\d?", text.strip()):
        return made
    return replace(made, approvals=tuple(replace(one, count=int(text)) for one in made.approvals))


def _limit(made: Obligations, policy: str, text: str) -> Obligations:
    limits = []
    for part in text.split(","):
        match = _LIMIT.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part.strip()!r} must be like 10/m, 100/h burst 20 or 5/10s per agent")
        calls, seconds = int(match[1]), int(match[2] or 1) * _SECONDS[match[3]]
        burst, per = int(match[4] or calls), match[5] or "pair"
        if per not in SCOPES:
            raise ValueError(f"{per!r} is none of {', '.join(SCOPES)}{suggestion(per, SCOPES)}")
        if seconds > LONGEST:
            raise ValueError(f"{part.strip()!r} counts over more than {LONGEST / _SECONDS['d']:.0f} days")
        if not calls or not burst or not seconds:
            raise ValueError(f"{part.strip()!r} would allow nothing; a forbid says that")
        limits.append(Limit(policy, calls, seconds, burst, per))
    return replace(made, limits=tuple(limits))


def _cost(made: Obligations, _: str, text: str) -> Obligations:
    cost: dict[str, float] = {}
    for part in _words(text, "what a call costs", "usd:0.02"):
        match = _COST.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} must be a unit and an amount, e.g. usd:0.02")
        cost[match[1]] = float(match[2])
    if any(not math.isfinite(amount) for amount in cost.values()):
        raise ValueError("an amount is too large")
    return replace(made, cost=cost)


def _redact(made: Obligations, _: str, text: str) -> Obligations:
    classes = _words(text, "what is taken out of results", "pii")
    for one in classes:
        if one not in CLASSES:
            raise ValueError(f"{one!r} is none of {', '.join(CLASSES)}{suggestion(one, CLASSES)}")
    return replace(made, redact=tuple(sorted(set(classes))))


def _sandbox(made: Obligations, _: str, text: str) -> Obligations:
    if text not in SANDBOXES:
        raise ValueError(f"{text!r} is none of {', '.join(SANDBOXES)}{suggestion(text, SANDBOXES)}")
    return replace(made, sandbox=text)


def _lock(made: Obligations, _: str, text: str) -> Obligations:
    locks = _words(text, "the name of a lock", "crm/{id}")
    for one in locks:
        if not _LOCK.fullmatch(one):
            raise ValueError(f"{one!r} is no name of a lock; write e.g. crm/{{id}}, where id is an argument")
    return replace(made, locks=tuple(dict.fromkeys(locks)))


def _side_effects(made: Obligations, _: str, text: str) -> Obligations:
    if text not in ("", "true"):
        raise ValueError("it takes nothing in parentheses")
    return replace(made, side_effects=True)


def _words(text: str, what: str, example: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError(f'it must say {what}, e.g. ("{example}")')
    return words


READERS: Final[dict[str, Callable[[Obligations, str, str], Obligations]]] = {
    "approval": _approval,
    "approval_count": _approval_count,
    "limit": _limit,
    "cost": _cost,
    "redact": _redact,
    "sandbox": _sandbox,
    "lock": _lock,
    "side_effects": _side_effects,
}
"""Every annotation that obliges to something."""
