"""The one module that calls Cedar, by cedarpy: parsing, validation and evaluation.

Its errors are ours: what cannot be parsed is a ValueError with Cedar's words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from weft_protocols.errors import InvalidConfig

if TYPE_CHECKING:
    from cedarpy import Entities, PolicySet

INSTALL: Final = "pip install 'weft[policy]'"
Json = dict[str, Any]
"""A rule in Cedar's JSON form."""


def _cedarpy() -> Any:
    try:
        import cedarpy
    except ImportError:
        raise InvalidConfig(f"policies need Cedar, which is not installed: {INSTALL}") from None
    return cedarpy


def require() -> None:
    """Raises InvalidConfig where Cedar is not installed."""
    _cedarpy()


def parse(text: str) -> Json:
    """One rule. Raises ValueError for what is none, and for a template, which nothing here would link."""
    raw = json.loads(_cedarpy().policies_to_json_str(text))
    if raw["templates"]:
        raise ValueError("a template (?principal, ?resource) is no rule; name who and what")
    found: list[Json] = list(raw["staticPolicies"].values())
    if len(found) != 1:
        raise ValueError("there is no rule")
    return {"annotations": {}, **found[0]}


def policy_set(rules: Mapping[str, Json]) -> PolicySet:
    """Rules by id, ready to be evaluated."""
    # Annotations would be looked up at every decision.
    plain = {name: {**rule, "annotations": {}} for name, rule in rules.items()}
    made: PolicySet = _cedarpy().PolicySet.from_json_str(_set(plain))
    return made


def entity_set(several: Sequence[Json]) -> Entities:
    """Entities, ready to be evaluated."""
    made: Entities = _cedarpy().Entities.from_json_str(json.dumps(several))
    return made


def _set(rules: Mapping[str, Json]) -> str:
    return json.dumps({"templates": {}, "staticPolicies": dict(rules), "templateLinks": []})


def validate(rules: Sequence[Json], schema: str) -> list[tuple[int, str]]:
    """What a schema says against rules: (index of the rule, Cedar's words)."""
    cedarpy = _cedarpy()
    numbered = {f"r{i:06}": {**rule, "annotations": {"id": str(i)}} for i, rule in enumerate(rules)}
    if not numbered:
        return []
    text = cedarpy.policies_from_json_str(_set(numbered))
    result = cedarpy.validate_policies(text, schema)
    by_id = result.id_annotations_by_policy_id
    found = []
    for error in result.errors:
        if not error.policy_id:
            raise InvalidConfig(f"the schema of the tools is not accepted: {error.error}")
        # Cedar's own names of the rules say nothing here.
        found.append((int(by_id[error.policy_id]), error.error.removeprefix(f"for policy `{error.policy_id}`, ")))
    return found


@dataclass(frozen=True, slots=True)
class Answer:
    """How an evaluation came out."""

    allow: bool
    reasons: tuple[str, ...]
    errors: tuple[str, ...]


def evaluate(request: Json, rules: PolicySet, entities: Entities) -> Answer:
    """One request: `principal`, `action` and `resource` as mappings, `context` as JSON text."""
    result = _cedarpy().is_authorized(request, rules, entities)
    said = result.diagnostics
    errors = tuple(said.errors)
    if not errors and result.decision.value == "NoDecision":
        errors = ("Cedar came to no decision",)
    return Answer(result.allowed and not errors, tuple(sorted(said.reasons)), errors)
