"""Tools that rules are about."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest

from weft.policy.bundle import Bundle, compile_bundle
from weft.policy.catalog import Catalog
from weft.policy.engine import CedarEngine

# Without the extra `policy` only what needs no Cedar is tested.
collect_ignore_glob = (
    []
    if find_spec("cedarpy") is not None
    else [f"test_{name}.py" for name in ("load", "decide", "bundle", "definitions", "docs", "store")]
)
UPDATE: dict[str, Any] = {
    "name": "update",
    "inputSchema": {
        "type": "object",
        "required": ["id", "amount"],
        "properties": {
            "id": {"type": "string"},
            "amount": {"type": "number"},
            "count": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "who": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            "note": {"type": ["string", "null"]},
            "extra": {},
        },
    },
}
GET: dict[str, Any] = {
    "name": "get",
    "inputSchema": {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}}},
    "annotations": {"readOnlyHint": True},
}
SEND: dict[str, Any] = {
    "name": "send",
    "inputSchema": {"type": "object", "required": ["to"], "properties": {"to": {"type": "string"}}},
}
BRIEF: dict[str, Any] = {"name": "brief", "arguments": [{"name": "topic", "required": True}]}


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    return Catalog.read({"crm": {"tools": [UPDATE, GET], "prompts": [BRIEF]}, "mail": [SEND]})


@pytest.fixture
def engine(catalog: Catalog) -> Callable[..., CedarEngine]:
    """Makes an engine of the text of rules, which have to be right."""

    def make(text: str, *, groups: str = "", against: Catalog | None = None) -> CedarEngine:
        known = against or catalog
        compiled = compile_bundle(Bundle.of({"rules.cedar": text, "groups.yaml": groups}), known)
        assert not compiled.errors, compiled.errors
        return compiled.engine(known, version=7)

    return make


@pytest.fixture
def mistakes(catalog: Catalog) -> Callable[..., Sequence[str]]:
    """What is said about rules, each as `line: message`."""

    def find(text: str, **more: Any) -> list[str]:
        compiled = compile_bundle(Bundle.of({"rules.cedar": text}), catalog, **more)
        return [f"{one.line}: {'warning: ' if one.warning else ''}{one.message}" for one in compiled.problems]

    return find
