"""Arguments of tools in the types that rules compare: from JSON Schema to Cedar, and values after it. Pure.

| JSON Schema | in rules |
|---|---|
| string; enum of strings | `String` |
| boolean | `Bool` |
| integer | `Long`, 64 bits |
| number | `decimal`, rounded to four places |
| array of one of these, or of objects | `Set` of it |
| object with properties, up to four levels | a record; properties that are not declared are not seen |
| null beside one of these | the same, and absent where it is null |
| anything else: no type, several types, an object without properties | `String`: a text as it is, else canonical JSON |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any, Final

from weft_protocols.canonical import canonical_json

DEEPEST: Final = 4
"""Levels of records that rules can look into."""
_REFERENCES: Final = 8
"""References followed one after another."""
_PLACES: Final = Decimal("0.0001")
_LARGEST: Final = Decimal("922337203685477.5807")
_LONG: Final = 2**63
_RESERVED: Final = frozenset({"__entity", "__extn", "__expr"})


class NotComparable(ValueError):
    """A value that rules cannot see as what its definition says it is."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The type of an argument in rules."""

    name: str
    """`String`, `Bool`, `Long`, `decimal`, `Set`, `Record`, or `Text`: a String that may hold JSON."""
    item: Kind | None = None
    """Of a set's members."""
    fields: Mapping[str, tuple[Kind, bool]] = field(default_factory=dict)
    """Of a record: each with whether it is always there."""

    @property
    def cedar(self) -> str:
        """As a schema has it."""
        if self.name == "Set":
            return f"Set<{(self.item or TEXT).cedar}>"
        if self.name == "Record":
            inner = (
                f"{quoted(name)}{'' if always else '?'}: {kind.cedar}" for name, (kind, always) in self.fields.items()
            )
            return f"{{{', '.join(inner)}}}"
        return "String" if self.name == "Text" else self.name

    def value(self, value: Any, where: str) -> Any:
        """A JSON value as Cedar's JSON. Raises NotComparable, naming `where`."""
        return _VALUES[self.name](self, value, where)


TEXT: Final = Kind("Text")
_SCALARS: Final = {
    "string": Kind("String"),
    "boolean": Kind("Bool"),
    "integer": Kind("Long"),
    "number": Kind("decimal"),
}


def quoted(text: str) -> str:
    """A text literal of Cedar."""
    return '"' + "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\u{{{ord(c):x}}}" for c in text) + '"'


def of_schema(schema: Any) -> Kind:
    """The record that a tool's `inputSchema` makes."""
    kind, _ = _Reader(schema).kind(schema, 0)
    return kind if kind.name == "Record" else Kind("Record")


def of_prompt(arguments: Any) -> Kind:
    """The record that a prompt's `arguments` make: texts, all of them."""
    found = arguments if isinstance(arguments, list) else []
    named = [one for one in found if isinstance(one, dict) and isinstance(one.get("name"), str)]
    text = _SCALARS["string"]
    return Kind("Record", fields={one["name"]: (text, one.get("required") is True) for one in named})


class _Reader:
    def __init__(self, root: Any) -> None:
        self._root = root

    def kind(self, schema: Any, level: int) -> tuple[Kind, bool]:
        """The kind, and whether null is allowed as well."""
        schema = self._resolved(schema)
        if not isinstance(schema, dict):
            return TEXT, True
        for word in ("anyOf", "oneOf"):
            if isinstance(schema.get(word), list):
                return self._one_of(schema[word], level)
        several = schema.get("allOf")
        if isinstance(several, list):
            return self.kind(several[0], level) if len(several) == 1 and "properties" not in schema else (TEXT, True)
        named = schema.get("type")
        if isinstance(named, list):
            return self._one_of([{**schema, "type": one} for one in named], level)
        return self._of_type(schema, named or _implied(schema), level)

    def _of_type(self, schema: dict[str, Any], named: Any, level: int) -> tuple[Kind, bool]:
        if named in _SCALARS:
            return _SCALARS[named], False
        if named == "null":
            return TEXT, True
        if named == "array":
            item, null = self.kind(schema.get("items"), level + 1)
            return Kind("Set", item=TEXT if null else item), False
        if named == "object" and isinstance(schema.get("properties"), dict) and level < DEEPEST:
            return self._record(schema, level), False
        return TEXT, named is None

    def _record(self, schema: dict[str, Any], level: int) -> Kind:
        required = schema.get("required")
        always = set(required) if isinstance(required, list) and all(isinstance(x, str) for x in required) else set()
        fields: dict[str, tuple[Kind, bool]] = {}
        for name, one in schema["properties"].items():
            if name not in _RESERVED:
                kind, null = self.kind(one, level + 1)
                fields[name] = (kind, name in always and not null)
        return Kind("Record", fields=fields)

    def _one_of(self, several: Sequence[Any], level: int) -> tuple[Kind, bool]:
        read = [(self._resolved(one), self.kind(one, level)) for one in several]
        kinds = [kind for one, (kind, _) in read if not _is_null(one)]
        null = any(_is_null(one) or nullable for one, (_, nullable) in read)
        if kinds and all(kind == kinds[0] for kind in kinds):
            return kinds[0], null
        if kinds and all(kind.name in ("Long", "decimal") for kind in kinds):
            return _SCALARS["number"], null
        return TEXT, null

    def _resolved(self, schema: Any) -> Any:
        for _ in range(_REFERENCES):
            reference = schema.get("$ref") if isinstance(schema, dict) else None
            if reference is None:
                return schema
            if not isinstance(reference, str) or not reference.startswith("#"):
                return None
            found = self._root
            for step in reference[1:].split("/")[1:]:
                key = step.replace("~1", "/").replace("~0", "~")
                found = found.get(key) if isinstance(found, dict) else None
            schema = found
        return None


def _is_null(schema: Any) -> bool:
    return isinstance(schema, dict) and (
        schema.get("type") == "null" or ("const" in schema and schema["const"] is None)
    )


def _implied(schema: dict[str, Any]) -> str | None:
    """The type that a schema without one means."""
    if "properties" in schema:
        return "object"
    if "items" in schema:
        return "array"
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values:
        for word, kind in (("boolean", bool), ("string", str), ("integer", int)):
            if all(isinstance(one, kind) for one in values):
                return word
    return None


# Values: the kind, a JSON value, where it stands -------------------------------------------------------------------


def _string(_: Kind, value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise NotComparable(f"{where} is no text")
    return _checked(value, where)


def _checked(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotComparable(f"{where} is not Unicode") from None
    return text


def _bool(_: Kind, value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise NotComparable(f"{where} is neither true nor false")
    return value


def _long(_: Kind, value: Any, where: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -_LONG <= value < _LONG:
        raise NotComparable(f"{where} is no whole number of 64 bits")
    return value


def _decimal(_: Kind, value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise NotComparable(f"{where} is no number")
    exact = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if abs(exact) > _LARGEST:
        raise NotComparable(f"{where} is larger than rules can compare ({_LARGEST})")
    return {"__extn": {"fn": "decimal", "arg": f"{exact.quantize(_PLACES, ROUND_HALF_EVEN):f}"}}


def _set(kind: Kind, value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise NotComparable(f"{where} is no list")
    item = kind.item or TEXT
    return [item.value(one, f"{where}[{i}]") for i, one in enumerate(value)]


def _record(kind: Kind, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise NotComparable(f"{where} is no object")
    return {
        name: one.value(value[name], f"{where}.{name}")
        for name, (one, _) in kind.fields.items()
        if value.get(name) is not None
    }


def _text(_: Kind, value: Any, where: str) -> str:
    if isinstance(value, str):
        return _checked(value, where)
    try:
        return canonical_json(value).decode()
    except ValueError as error:
        raise NotComparable(f"{where}: {error}") from None


_VALUES: Final = {
    "String": _string,
    "Bool": _bool,
    "Long": _long,
    "decimal": _decimal,
    "Set": _set,
    "Record": _record,
    "Text": _text,
}
