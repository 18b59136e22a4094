"""Rules against what is registered: names that do not exist, arguments that are misspelt or of another type."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

from weft.policy import cedar, obligations, schema
from weft.policy.catalog import Catalog, Offer
from weft.policy.expressions import ARGS, accesses, applies, entities
from weft.policy.model import ACTIONS, ENTITY
from weft.policy.problems import Problem, suggestion
from weft.policy.rules import Rule

_MISSING: Final = re.compile(r'attribute `(?:context\.)?args\.([^`]+)` in context for Action::"(.+)" not found')
_UNKNOWN: Final = re.compile(r'attribute `([^`]+)` in context for Action::"(.+)" not found')
_OPTIONAL: Final = re.compile(
    r"unable to guarantee safety of access to optional attribute `(?:context\.)?args\.([^`]+)` "
    r'in context for Action::"(.+)"'
)
_CHECK_ACTION: Final = re.compile(r'Action::"(?:call|get) ([^"]+)"')
_NO_ACTION: Final = "unable to find an applicable action"


@dataclass(frozen=True, slots=True)
class Known:
    """What rules may name."""

    catalog: Catalog
    groups: frozenset[str] = frozenset()
    agents: frozenset[str] | None = None
    """Agents of the mesh; None if it is not known which there are."""
    lenient: bool = False
    """Whether a tool that is not registered is only a warning."""


def validate(rules: Sequence[Rule], known: Known) -> list[Problem]:
    """Everything that is wrong with rules, in the order of the files."""
    found: list[Problem] = []
    checkable: list[tuple[Rule, list[tuple[str, Offer | None]]]] = []
    for rule in rules:
        check = _Check(rule, known)
        check.names()
        applicable = check.applicable()
        check.arguments(applicable)
        found += check.problems
        if applicable and not any(not one.warning for one in check.problems):
            checkable.append((rule, applicable))
    found += _by_schema(checkable, known.catalog)
    return sorted(found)


@dataclass(slots=True)
class _Check:
    """One rule."""

    rule: Rule
    known: Known
    problems: list[Problem] = field(default_factory=list)

    def names(self) -> None:
        """Entities that do not exist."""
        catalog = self.known.catalog
        known: dict[str, tuple[str, frozenset[str] | None]] = {
            "Tool": ("tool", frozenset(catalog.tools)),
            "Prompt": ("prompt", frozenset(catalog.prompts)),
            "Server": ("server", catalog.servers),
            "Group": ("group", self.known.groups),
            "Agent": ("agent", self.known.agents),
            "Action": ("action", frozenset(ACTIONS)),
            "Resource": ("resource", None),
        }
        for kind, name in dict.fromkeys(entities(self.rule.json)):
            if kind not in known:
                self._add(f"{kind}:: is no type of entity{suggestion(kind, known)}", kind)
                continue
            word, names = known[kind]
            if names is not None and name not in names:
                loose = kind == "Agent" or (self.known.lenient and kind in ("Tool", "Prompt", "Server"))
                self._add(f'there is no {word} "{name}"{suggestion(name, names)}', name, warning=loose)

    def applicable(self) -> list[tuple[str, Offer | None]]:
        """The tools and prompts whose calls the rule's head does not rule out, and the other actions."""
        head, catalog = self.rule.json, self.known.catalog
        made: list[tuple[str, Offer | None]] = []
        for action, offers in (("call", catalog.tools), ("get", catalog.prompts)):
            if applies(head["action"], ("Action", action)):
                made += [(action, one) for one in offers.values() if self._about(action, one)]
        for action in ("read", "list"):
            if applies(head["action"], ("Action", action)) and _may_be(head["resource"], ENTITY[action]):
                made.append((action, None))
        return made

    def _about(self, action: str, offer: Offer) -> bool:
        return applies(self.rule.json["resource"], (ENTITY[action], offer.id), frozenset({("Server", offer.server)}))

    def arguments(self, applicable: Sequence[tuple[str, Offer | None]]) -> None:
        """Arguments that are asked for by `has` or named by a lock, and that none of the tools has."""
        offers = [offer for _, offer in applicable if offer is not None]
        names = {name for offer in offers for name in offer.arguments.fields}
        if not offers:
            return
        for access in accesses(self.rule.json):
            if access.asked and access.path[:2] == ARGS and len(access.path) > 2 and access.path[2] not in names:
                self._add(_no_argument(access.path[2], offers, names), access.path[2])
        for lock in self.rule.notes.obligations.locks:
            for path in obligations.fields(lock):
                name = path.partition(".")[0]
                without = [one for one in offers if name not in one.arguments.fields]
                if without:
                    own = {one for offer in without for one in offer.arguments.fields}
                    self._add(f'@lock("{lock}"): {_no_argument(name, without, own)}', "@lock")

    def _add(self, message: str, *words: str, warning: bool = False) -> None:
        chunk = self.rule.chunk
        self.problems.append(Problem(chunk.file, chunk.line_of(*words), message, self.rule.id, warning))


def _may_be(scope: Mapping[str, Any], kind: str) -> bool:
    """Whether a resource of that type may fit the head at all."""
    if scope["op"] == "==":
        return bool(scope["entity"]["type"] == kind)
    if scope["op"] == "is":
        return bool(scope["entity_type"] == kind)
    return True


def _no_argument(name: str, offers: Sequence[Offer], names: set[str]) -> str:
    whose = offers[0].id if len(offers) == 1 else f"{offers[0].id} and {len(offers) - 1} more"
    return f'there is no argument "{name}" of {whose}{suggestion(name, names)}'


def _by_schema(checkable: Sequence[tuple[Rule, list[tuple[str, Offer | None]]]], catalog: Catalog) -> list[Problem]:
    """What Cedar's validator says, in our words, once a rule and kind of mistake."""
    rewritten = []
    for rule, applicable in checkable:
        actions = [{"type": "Action", "id": schema.check_action(action, offer)} for action, offer in applicable]
        rewritten.append({**rule.json, "action": {"op": "in", "entities": actions}})
    told: dict[tuple[str, str], Problem] = {}
    for index, said in sorted(cedar.validate(rewritten, schema.generate(catalog))):
        rule = checkable[index][0]
        if _NO_ACTION in said and any(policy == rule.id for policy, _ in told):
            continue
        message, words = _words(said, catalog)
        key = (rule.id, words[0] if words else message)
        told.setdefault(key, Problem(rule.chunk.file, rule.chunk.line_of(*words), message, rule.id))
    return list(told.values())


def _words(said: str, catalog: Catalog) -> tuple[str, list[str]]:
    """Cedar's words in ours, and what to look for in the rule's text."""
    for pattern, tell in _TELLERS:
        if (match := pattern.search(said)) is not None:
            return tell(match, catalog)
    plain = _CHECK_ACTION.sub(lambda match: f'Tool::"{unquote(match[1])}"', said)
    return plain, [part for i, part in enumerate(plain.split("`")) if i % 2]


def _missing(match: re.Match[str], catalog: Catalog) -> tuple[str, list[str]]:
    path, action = match[1], match[2]
    offer = schema.checked_offer(action, catalog)
    if offer is None:
        return f'args.{path}: `{action}` has no arguments; let the rule be about `action == Action::"call"`', [path]
    fields, name = offer.arguments.fields, path
    for step in path.split("."):
        if step not in fields:
            name = step
            break
        fields = fields[step][0].fields
    where = f"{offer.id}" + (f" (in {path.rpartition('.')[0]})" if "." in path else "")
    hint = suggestion(name, fields)
    return (
        f'there is no argument "{name}" of {where}{hint}'
        + ("" if hint.startswith("; did") else "; a rule about several tools asks first: `context.args has …`")
    ), [name]


def _optional(match: re.Match[str], catalog: Catalog) -> tuple[str, list[str]]:
    path, offer = match[1], schema.checked_offer(match[2], catalog)
    parent, _, name = f"args.{path}".rpartition(".")
    whose = offer.id if offer is not None else match[2]
    return f'argument "{path}" of {whose} may be missing; write `context.{parent} has {name} && …` first', [name]


def _unknown(match: re.Match[str], _: Catalog) -> tuple[str, list[str]]:
    name = match[1].removeprefix("context.")
    return f"there is no context.{name}{suggestion(name, (*schema.CONTEXT, 'args'))}", [name]


_Teller = Callable[[re.Match[str], Catalog], tuple[str, list[str]]]
_TELLERS: Final[tuple[tuple[re.Pattern[str], _Teller], ...]] = (
    (_MISSING, _missing),
    (_OPTIONAL, _optional),
    (_UNKNOWN, _unknown),
)
