"""Arguments that a tool's definition wants as headers of its HTTP requests (`x-mcp-header`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from weft.sidecar.pipeline import Call
from weft_protocols.mcp import encode_value

KEY: Final = "x-mcp-header"
PREFIX: Final = "Mcp-Param-"
_DEEPEST: Final = 20


def param_headers(call: Call) -> dict[str, str]:
    """The headers that mirror a call's arguments, as the definition says; values no header can hold are left out."""
    schema = call.definition.get("inputSchema") if call.definition is not None else None
    if call.method != "tools/call" or not isinstance(schema, Mapping):
        return {}
    made: dict[str, str] = {}
    for header, value in _annotated(schema, call.arguments, _DEEPEST):
        if isinstance(value, bool):
            made[PREFIX + header] = "true" if value else "false"
        elif isinstance(value, str | int | float):
            made[PREFIX + header] = encode_value(str(value)) if value != "" else ""
    return made


def _annotated(schema: Mapping[str, Any], arguments: Any, deepest: int) -> Iterator[tuple[str, Any]]:
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or not isinstance(arguments, Mapping) or not deepest:
        return
    for name, inner in properties.items():
        if name not in arguments or not isinstance(inner, Mapping):
            continue
        header = inner.get(KEY)
        if isinstance(header, str) and header.isascii() and header.replace("-", "").replace("_", "").isalnum():
            yield header, arguments[name]
        yield from _annotated(inner, arguments[name], deepest - 1)
