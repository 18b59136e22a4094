"""Values that leave the code: as JSON, no larger than allowed. Pure."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

DEPTH: Final = 100
"""Lists and mappings within each other."""
_LARGEST_INT: Final = 4000
"""Bits of a whole number that is written out; JSON has no larger ones that anybody reads."""


class TooMuch(ValueError):
    """A value has more bytes than allowed."""


def as_json(value: Any, most: int, what: str) -> Any:
    """A value as JSON: tuples and sets are lists, dates are texts in ISO 8601.

    Raises TooMuch if it has more than `most` bytes, ValueError for what JSON has not.
    """
    made = _Writer(most, what).plain(value, 0)
    size = len(json.dumps(made, separators=(",", ":"), ensure_ascii=False).encode(errors="replace"))
    if size > most:
        raise TooMuch(f"{what} has {size} bytes")
    return made


@dataclass(slots=True)
class _Writer:
    """Counts while it goes, so that what is too large is not gone through to its end."""

    left: int
    what: str

    def plain(self, value: Any, depth: int) -> Any:
        self.left -= 1
        if isinstance(value, str):
            self.left -= len(value)
        if self.left < 0:
            raise TooMuch(f"{self.what} is too large")
        if depth > DEPTH:
            raise ValueError(f"{self.what} nests deeper than {DEPTH}")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return value.encode(errors="replace").decode()
        if isinstance(value, int | float):
            return self._number(value)
        if isinstance(value, Mapping):
            return {self._key(key): self.plain(one, depth + 1) for key, one in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.plain(one, depth + 1) for one in value]
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        raise ValueError(f"{self.what} has a {_name(value)}, which JSON has not")

    def _number(self, value: int | float) -> int | float:
        if isinstance(value, int):
            if value.bit_length() > _LARGEST_INT:
                raise ValueError(f"{self.what} has a whole number of {value.bit_length()} bits; write it as text")
        elif not math.isfinite(value):
            raise ValueError(f"{self.what} has {value}, which JSON has not")
        return value

    def _key(self, key: Any) -> str:
        if isinstance(key, str):
            self.left -= len(key)
            return key.encode(errors="replace").decode()
        if isinstance(key, bool | int | float) or key is None:
            return str(self.plain(key, 0))
        raise ValueError(f"{self.what} has a {_name(key)} as a key; keys are texts")


def _name(value: Any) -> str:
    found = getattr(value, "name", None)
    return found if isinstance(found, str) else type(value).__name__
