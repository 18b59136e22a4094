"""The schema that rules are checked against, generated from what is registered. Pure.

Rules are written with four actions. For the check each tool and prompt has an action of its own, whose context has its
arguments: what a rule's head does not rule out, its conditions must be right for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote, unquote

from weft.policy.arguments import Kind, quoted
from weft.policy.catalog import HINTS, Catalog, Offer
from weft.policy.expressions import Uid
from weft.policy.model import ENTITY

CONTEXT: Final = {
    "task": "String",
    "caller": "String",
    "root": "String",
    "chain": "Set<String>",
    "depth": "Long",
    "time": "datetime",
    "hour": "Long",
    "weekday": "Long",
    "front": "String",
}
"""What every rule can read of a request besides its arguments, `context.args`."""
ENTITIES: Final = {
    "Agent": {"version": "String", "skill": "String"},
    "Tool": {"server": "String", "name": "String", **dict.fromkeys(HINTS, "Bool")},
    "Prompt": {"server": "String", "name": "String"},
    "Resource": {"server": "String", "uri": "String"},
    "Server": {},
    "Group": {},
}
"""Attributes of each type of entity."""
_PARENTS: Final = {"Agent": "Group", "Tool": "Server", "Prompt": "Server", "Resource": "Server"}
_EMPTY: Final = Kind("Record")


def check_action(action: str, offer: Offer | None = None) -> str:
    """Id of the action that stands for one tool or prompt in the check; without what Cedar's messages would escape."""
    return f"{action} {quote(offer.id, safe='')}" if offer is not None else action


def checked_offer(action: str, catalog: Catalog) -> Offer | None:
    """The tool or prompt that such an action stands for."""
    kind, _, name = action.partition(" ")
    return catalog.offer(kind, unquote(name))


def generate(catalog: Catalog) -> str:
    """The schema, in Cedar's syntax."""
    lines = []
    for name, attributes in ENTITIES.items():
        inside = ", ".join(f"{key}: {kind}" for key, kind in attributes.items())
        parent = f" in [{_PARENTS[name]}]" if name in _PARENTS else ""
        lines.append(f"entity {name}{parent} {{ {inside} }};" if inside else f"entity {name}{parent};")
    for action, offers in (("call", catalog.tools), ("get", catalog.prompts)):
        lines += [_action(check_action(action, one), action, one.arguments) for one in offers.values()]
    lines += [_action(action, action, _EMPTY) for action in ("read", "list")]
    return "\n".join(lines)


def _action(name: str, action: str, arguments: Kind) -> str:
    inside = ", ".join(f"{key}: {kind}" for key, kind in CONTEXT.items())
    return (
        f"action {quoted(name)} appliesTo {{ principal: Agent, resource: {ENTITY[action]}, "
        f"context: {{ {inside}, args: {arguments.cedar} }} }};"
    )


def entity(uid: Uid, attributes: Mapping[str, Any], parents: frozenset[Uid] = frozenset()) -> dict[str, Any]:
    """An entity as Cedar's JSON."""
    above = [{"type": kind, "id": name} for kind, name in sorted(parents)]
    return {"uid": {"type": uid[0], "id": uid[1]}, "attrs": dict(attributes), "parents": above}
