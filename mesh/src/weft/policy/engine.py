"""Decides by Cedar: rules are parsed once, and of each request only those are evaluated whose heads fit it.

A rule whose head does not fit can neither allow nor forbid, nor fail. So the rules of one agent and one tool are a set
of their own, made at the first request and kept.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from weft.policy import cedar, expressions, obligations, schema
from weft.policy.arguments import NotComparable
from weft.policy.catalog import HINTS, Catalog, Offer
from weft.policy.expressions import Reads, Uid
from weft.policy.model import ENTITY, Decision, Obligations, Request, Would
from weft.policy.rules import Rule
from weft_protocols.errors import InvalidConfig

if TYPE_CHECKING:
    from cedarpy import Entities, PolicySet

SLICES: Final = 4096
"""Pairs of agent and tool whose rules are kept ready."""
ANSWERS: Final = 8
"""Contexts of one such pair whose answer is kept."""
SHORT: Final = 256
"""Characters of a context that is."""
NOTHING: Final = Decision(allow=False)
_Key = tuple[str, str, str, str, str, str]


class CannotEvaluate(ValueError):
    """A request that the rules cannot be evaluated for."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """Rules that are evaluated together."""

    rules: Mapping[str, Rule]
    policies: PolicySet
    reads: Reads
    owed: dict[tuple[str, ...], Obligations] = field(default_factory=dict)
    """What the permits that decide together oblige to, once it was asked."""


@dataclass(slots=True)
class _Slice:
    """What is the same in every request of one agent about one thing."""

    head: Mapping[str, Any]
    """Principal, action and resource as Cedar takes them."""
    entities: Entities
    offer: Offer | None
    enforced: _Ready | None
    """None where no rule is about it."""
    with_shadow: _Ready | None
    """The same and the rules in shadow mode; None where there are none of those."""
    visible: bool | None = None
    """Found out when it is first asked."""
    answers: dict[tuple[bool, str], cedar.Answer] = field(default_factory=dict)
    """Of some contexts, those of the rules in shadow mode apart: rules that read little are asked the same again."""

    def answer(self, ready: _Ready, context: str) -> cedar.Answer:
        """What some of the rules say in a context."""
        key = (ready is self.enforced, context)
        found = self.answers.get(key)
        if found is None:
            found = cedar.evaluate({**self.head, "context": context}, ready.policies, self.entities)
            if len(context) <= SHORT:
                if len(self.answers) >= ANSWERS:
                    self.answers.clear()
                self.answers[key] = found
        return found


class CedarEngine:
    """Decides about requests by rules. See `PolicyEngine`.

    Args:
        rules: all of them, those in shadow mode as well.
        catalog: the types of arguments.
        groups: groups of agents, by name.
        version: said in decisions.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        catalog: Catalog,
        *,
        groups: Mapping[str, Sequence[str]] | None = None,
        version: int = 0,
    ) -> None:
        self.rules = tuple(rules)
        self.catalog = catalog
        self.version = version
        self._groups: dict[str, frozenset[Uid]] = {}
        for group, agents in (groups or {}).items():
            for agent in agents:
                self._groups[agent] = self._groups.get(agent, frozenset()) | {("Group", group)}
        self._slices: OrderedDict[_Key, _Slice] = OrderedDict()
        self._ready: dict[tuple[str, ...], _Ready | None] = {}

    def decide(self, request: Request) -> Decision:
        """What the rules say. What cannot be evaluated is denied, and said in `errors`."""
        try:
            found = self._slice(request)
            made = self._evaluate(request, found, found.enforced)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, InvalidConfig) as error:
            return Decision(False, errors=(_said(error),), version=self.version)
        if found.with_shadow is not None:
            made = replace(made, shadow=self._would(request, found, made))
        return made

    def visible(self, request: Request) -> bool:
        """Whether it is not certain that this is denied whatever the arguments, the task and the time are."""
        try:
            found = self._slice(request)
            ready = found.enforced
            if ready is None:
                return request.action == "list"
            if request.action == "list":
                return self._evaluate(request, found, ready).allow
            if found.visible is None:
                found.visible = _at_best(found, ready)
            return found.visible
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, InvalidConfig):
            return False

    def matching(self, request: Request) -> tuple[Rule, ...]:
        """The rules whose heads fit, those in shadow mode as well."""
        found = self._slice(request)
        ready = found.with_shadow or found.enforced
        return tuple(ready.rules.values()) if ready is not None else ()

    def needs(self, request: Request) -> Reads:
        """What the rules about this read of it."""
        found = self._slice(request)
        ready = found.with_shadow or found.enforced
        return ready.reads if ready is not None else Reads()

    def _would(self, request: Request, found: _Slice, made: Decision) -> Would | None:
        """What the rules in shadow mode change; None if nothing."""
        try:
            other = self._evaluate(request, found, found.with_shadow)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            return Would(False, errors=(_said(error),))
        if (other.allow, other.obligations, other.errors) == (made.allow, made.obligations, made.errors):
            return None
        return Would(other.allow, other.reasons, other.obligations, other.errors)

    def _evaluate(self, request: Request, found: _Slice, ready: _Ready | None) -> Decision:
        if request.action == "list" and (ready is None or not any(r.effect == "forbid" for r in ready.rules.values())):
            return Decision(True, version=self.version)
        if ready is None:
            return replace(NOTHING, version=self.version)
        answer = found.answer(ready, json.dumps(_context(request, ready.reads, found.offer)))
        if answer.errors:
            return Decision(False, answer.reasons, errors=answer.errors, version=self.version)
        rules = [ready.rules[name] for name in answer.reasons]
        allow = answer.allow
        if request.action == "list":
            # What is listed is what may be called; only a forbid hides a server as a whole.
            allow = not any(rule.effect == "forbid" for rule in rules)
        owed = obligations.NOTHING
        if allow:
            if answer.reasons not in ready.owed:
                ready.owed[answer.reasons] = obligations.combine(rule.notes.obligations for rule in rules)
            owed = obligations.fill(ready.owed[answer.reasons], request)
        messages = tuple(rule.notes.reason for rule in rules if rule.notes.reason) if not allow else ()
        return Decision(allow, answer.reasons, owed, messages=messages, version=self.version)

    def _slice(self, request: Request) -> _Slice:
        key = (request.agent, request.version, request.skill, request.action, request.server, request.name)
        found = self._slices.get(key)
        if found is None:
            found = self._slices[key] = self._made(request)
            while len(self._slices) > SLICES:
                self._slices.popitem(last=False)
        else:
            self._slices.move_to_end(key)
        return found

    def _made(self, request: Request) -> _Slice:
        principal: Uid = ("Agent", request.agent)
        resource: Uid = (ENTITY[request.action], request.resource)
        groups = self._groups.get(request.agent, frozenset())
        above: frozenset[Uid] = frozenset() if request.action == "list" else frozenset({("Server", request.server)})
        ancestors = {"principal": groups, "resource": above}
        action: Uid = ("Action", request.action)
        fitting = [rule for rule in self.rules if rule.applies(principal, action, resource, ancestors)]
        offer = self.catalog.offer(request.action, request.resource)
        entities = cedar.entity_set(
            [
                schema.entity(principal, {"version": request.version, "skill": request.skill}, groups),
                schema.entity(resource, _attributes(request, offer), above),
            ]
        )
        shadowed = any(rule.notes.shadow for rule in fitting)
        return _Slice(
            head={
                name: {"type": kind, "id": text}
                for name, (kind, text) in (("principal", principal), ("action", action), ("resource", resource))
            },
            entities=entities,
            offer=offer,
            enforced=self._together([rule for rule in fitting if not rule.notes.shadow]),
            with_shadow=self._together(fitting) if shadowed else None,
        )

    def _together(self, rules: Sequence[Rule]) -> _Ready | None:
        names = tuple(rule.id for rule in rules)
        if names not in self._ready:
            if len(self._ready) >= SLICES:
                self._ready.clear()
            made = None
            if rules:
                reads = Reads()
                for rule in rules:
                    reads |= rule.reads
                made = _Ready(
                    {rule.id: rule for rule in rules},
                    cedar.policy_set({rule.id: dict(rule.json) for rule in rules}),
                    reads,
                )
            self._ready[names] = made
        return self._ready[names]


def _at_best(found: _Slice, ready: _Ready) -> bool:
    """Whether the rules allow it with the best of all contexts."""
    best = {name: made for name, rule in ready.rules.items() if (made := expressions.at_best(rule.json)) is not None}
    if not best:
        return False
    return cedar.evaluate({**found.head, "context": "{}"}, cedar.policy_set(best), found.entities).allow


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _attributes(request: Request, offer: Offer | None) -> dict[str, Any]:
    if request.action == "list":
        return {}
    if request.action == "read":
        return {"server": request.server, "uri": request.name}
    made: dict[str, Any] = {"server": request.server, "name": request.name}
    if request.action == "call":
        made |= offer.hints if offer is not None else {name: default for name, (_, default) in HINTS.items()}
    return made


def _context(request: Request, reads: Reads, offer: Offer | None) -> dict[str, Any]:
    """What rules read, in Cedar's JSON. Raises CannotEvaluate."""
    wanted = _CONTEXT if "*" in reads.attributes else {n: _CONTEXT[n] for n in reads.attributes if n in _CONTEXT}
    made = {name: value(request) for name, value in wanted.items()}
    if "args" in reads.attributes or "*" in reads.attributes:
        made["args"] = _arguments(request, reads, offer)
    return made


def _arguments(request: Request, reads: Reads, offer: Offer | None) -> dict[str, Any]:
    if request.action in ("read", "list"):
        return {}
    if offer is None:
        raise CannotEvaluate(f"rules read arguments of {request.resource}, whose definition is not known")
    made = {}
    for name, (kind, _) in offer.arguments.fields.items():
        if (reads.everything or name in reads.arguments) and request.arguments.get(name) is not None:
            try:
                made[name] = kind.value(request.arguments[name], name)
            except NotComparable as error:
                raise CannotEvaluate(f"argument {error}") from None
    return made


def _clock(request: Request) -> datetime:
    return datetime.fromtimestamp(request.time, UTC)


def _instant(request: Request) -> dict[str, Any]:
    text = _clock(request).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"__extn": {"fn": "datetime", "arg": text}}


_CONTEXT: Final[dict[str, Callable[[Request], Any]]] = {
    "task": lambda request: request.task,
    "caller": lambda request: request.caller,
    "root": lambda request: request.agents[0] if request.chain else request.agent,
    "chain": lambda request: list(dict.fromkeys(request.agents)),
    "depth": lambda request: len(request.chain),
    "time": _instant,
    "hour": lambda request: _clock(request).hour,
    "weekday": lambda request: _clock(request).isoweekday(),
    "front": lambda request: request.front,
}
"""How each attribute of the context is made; see `schema.CONTEXT`."""
