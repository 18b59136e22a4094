"""What a rule is about and what it reads, out of Cedar's JSON form of it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

Uid = tuple[str, str]
"""Type and id of an entity."""
CONTEXT: Final = ("context",)
ARGS: Final = ("context", "args")


@dataclass(frozen=True, slots=True)
class Access:
    """An attribute that is read, or asked for with `has`."""

    path: tuple[str, ...]
    """From the variable on: `("context", "args", "amount")`."""
    asked: bool = False
    """Whether it is only asked whether it is there."""


@dataclass(frozen=True, slots=True)
class Reads:
    """What the conditions of rules need of a request."""

    attributes: frozenset[str] = frozenset()
    """Of the context."""
    arguments: frozenset[str] = frozenset()
    everything: bool = False
    """Whether all arguments are needed, e.g. because they are compared as a whole."""

    def __or__(self, other: Reads) -> Reads:
        return Reads(
            self.attributes | other.attributes,
            self.arguments | other.arguments,
            self.everything or other.everything,
        )


def accesses(rule: Mapping[str, Any]) -> Iterator[Access]:
    """Every attribute that a rule's conditions look at, each with its whole path."""
    for condition in rule["conditions"]:
        for found in _visit(condition["body"]):
            if isinstance(found, Access):
                yield found


def entities(rule: Mapping[str, Any]) -> Iterator[Uid]:
    """Every entity that a rule names, in its head and its conditions."""
    for part in ("principal", "action", "resource"):
        yield from _named(rule[part])
    for condition in rule["conditions"]:
        for found in _visit(condition["body"]):
            if not isinstance(found, Access):
                yield found


def reads(rule: Mapping[str, Any]) -> Reads:
    """What a rule needs to know."""
    attributes: set[str] = set()
    arguments: set[str] = set()
    everything = False
    for access in accesses(rule):
        if access.path == CONTEXT:
            attributes.add("*")
            everything = True
        elif access.path[:1] == CONTEXT:
            attributes.add(access.path[1])
            if access.path[:2] == ARGS:
                everything = everything or len(access.path) == 2
                arguments.update(access.path[2:3])
    return Reads(frozenset(attributes), frozenset(arguments), everything)


def applies(scope: Mapping[str, Any], uid: Uid, ancestors: Collection[Uid] = ()) -> bool:
    """Whether an entity fits one part of a rule's head."""
    match scope["op"]:
        case "All":
            return True
        case "==":
            return _uid(scope["entity"]) == uid
        case "in":
            return any(one == uid or one in ancestors for one in _named(scope))
        case "is":
            inner = scope.get("in")
            fits: bool = scope["entity_type"] == uid[0]
            return fits and (inner is None or any(one == uid or one in ancestors for one in _named(inner)))
    return True  # a form this does not know: left to Cedar


def at_best(rule: Mapping[str, Any]) -> dict[str, Any] | None:
    """A rule as it stands if the context is as good as can be; None if it then does not apply.

    What a permit asks of the context is met, and a forbid that asks anything of it is not.
    """
    if rule["effect"] == "forbid":
        return None if any(_of_context(one["body"]) for one in rule["conditions"]) else dict(rule)
    kept = []
    for condition in rule["conditions"]:
        bodies = _conjuncts(condition["body"]) if condition["kind"] == "when" else [condition["body"]]
        kept += [{"kind": condition["kind"], "body": body} for body in bodies if not _of_context(body)]
    return {**rule, "conditions": kept}


def _conjuncts(body: Any) -> list[Any]:
    if isinstance(body, dict) and "&&" in body:
        return [*_conjuncts(body["&&"]["left"]), *_conjuncts(body["&&"]["right"])]
    return [body]


def _of_context(body: Any) -> bool:
    return any(isinstance(one, Access) and one.path[:1] == CONTEXT for one in _visit(body))


def _named(scope: Mapping[str, Any]) -> list[Uid]:
    found = [_uid(one) for one in scope.get("entities", ())]
    if "entity" in scope:
        found.append(_uid(scope["entity"]))
    if isinstance(scope.get("in"), Mapping):
        found += _named(scope["in"])
    return found


def _uid(raw: Mapping[str, Any]) -> Uid:
    raw = raw.get("__entity", raw)
    return raw["type"], raw["id"]


def _path(node: Any) -> tuple[str, ...] | None:
    if isinstance(node, dict):
        if "Var" in node:
            return (node["Var"],)
        if "." in node and (left := _path(node["."]["left"])) is not None:
            return (*left, node["."]["attr"])
    return None


def _visit(node: Any) -> Iterator[Access | Uid]:
    if isinstance(node, list):
        for one in node:
            yield from _visit(one)
    if not isinstance(node, dict):
        return
    if (path := _path(node)) is not None:
        yield Access(path)
        return
    for name, inner in node.items():
        if name == "has" and (left := _path(inner["left"])) is not None:
            yield Access((*left, inner["attr"]), asked=True)
        elif name == "Value":
            yield from _values(inner)
        elif name == "Record":
            for one in inner.values():
                yield from _visit(one)
        elif name != "pattern":
            yield from _visit(inner)


def _values(value: Any) -> Iterator[Uid]:
    if isinstance(value, list):
        for one in value:
            yield from _values(one)
    elif isinstance(value, dict):
        if "__entity" in value:
            yield _uid(value)
        else:
            for one in value.values():
                yield from _values(one)
