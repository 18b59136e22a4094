"""JSON in its canonical form (RFC 8785): the bytes that digests and signatures are made of."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any, Final

SAFE_INTEGER: Final = 2**53 - 1
"""The largest whole number that JSON holds for every reader."""
DEEPEST: Final = 128
"""Levels of lists and objects; the A2A SDK's limit."""
_PLAIN: Final = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))
_ESCAPED: Final = re.compile(r'[\x00-\x1f\\"]')
_SHORT: Final = {"\\": "\\\\", '"': '\\"', "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def canonical_json(value: Any, *, deepest: int = DEEPEST) -> bytes:
    """The canonical form of a JSON value.

    Raises:
        ValueError: it has none: NaN or an infinity, a whole number over 2^53, text that is not Unicode, a key that is
            no text, something that is not JSON, or more than `deepest` levels.
    """
    if _is_plain(value, deepest):
        return _PLAIN.encode(value).encode()
    out: list[str] = []
    _write(value, out, deepest)
    return "".join(out).encode()


def _is_plain(value: Any, deepest: int) -> bool:
    """Whether the standard library's form is the canonical one, as it is of most values, at a third of the cost."""
    kind: type[Any] = type(value)
    if kind is str or kind is bool or value is None:
        return True
    if kind is int:
        return bool(-SAFE_INTEGER <= value <= SAFE_INTEGER)
    if kind is dict:
        return deepest > 0 and all(
            type(key) is str and key.isascii() and _is_plain(item, deepest - 1) for key, item in value.items()
        )
    return kind is list and deepest > 0 and all(_is_plain(item, deepest - 1) for item in value)


def without_empty(value: Any, *, deepest: int = DEEPEST) -> Any:
    """`value` without empty texts, lists and objects, and without nulls, at any level; None if nothing is left.

    Raises ValueError for more than `deepest` levels.
    """
    if not isinstance(value, dict | list | tuple):
        return None if value == "" else value
    if not deepest:
        raise ValueError("it nests too deep")
    if isinstance(value, dict):
        kept = {key: without_empty(item, deepest=deepest - 1) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None} or None
    items = [without_empty(item, deepest=deepest - 1) for item in value]
    return [item for item in items if item is not None] or None


def _write(value: Any, out: list[str], deepest: int) -> None:
    if isinstance(value, dict | list | tuple):
        if not deepest:
            raise ValueError("it nests too deep")
        if isinstance(value, dict):
            _write_object(value, out, deepest - 1)
            return
        out.append("[")
        for i, item in enumerate(value):
            if i:
                out.append(",")
            _write(item, out, deepest - 1)
        out.append("]")
    else:
        out.append(_scalar(value))


def _write_object(value: dict[Any, Any], out: list[str], deepest: int) -> None:
    out.append("{")
    for i, key in enumerate(sorted(value, key=_utf16)):
        out += ("," if i else "", _quoted(key), ":")
        _write(value[key], out, deepest)
    out.append("}")


def _utf16(key: Any) -> bytes:
    if not isinstance(key, str):
        raise ValueError(f"the key {key!r} is not a text")
    return key.encode("utf-16-be")


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number(value)
    if not isinstance(value, int):
        raise ValueError(f"a {type(value).__name__} is not JSON")
    if abs(value) > SAFE_INTEGER:
        raise ValueError(f"{value} is a whole number that JSON cannot hold exactly")
    return str(value)


def _quoted(text: str) -> str:
    return '"' + _ESCAPED.sub(lambda m: _SHORT.get(m[0]) or f"\\u{ord(m[0]):04x}", text) + '"'


def _number(value: float) -> str:
    """A number as ECMAScript writes it (ECMA-262, Number::toString)."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number of JSON")
    if value == 0:
        return "0"
    negative, figures, exponent = Decimal(repr(value)).as_tuple()
    digits = "".join(map(str, figures)).rstrip("0")
    point = len(figures) + int(exponent)
    if len(digits) <= point <= 21:
        text = digits.ljust(point, "0")
    elif 0 < point <= 21:
        text = f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        text = f"0.{'0' * -point}{digits}"
    else:
        text = f"{digits[0]}{'.' if digits[1:] else ''}{digits[1:]}e{point - 1:+d}"
    return f"-{text}" if negative else text
