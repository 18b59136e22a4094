"""What a task may spend, as it travels in `Weft-Budget`: `tokens=1000,usd=0.5`. It is handed down, never raised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Final

from weft_protocols.errors import InvalidRequest, UsageError

MAX_FIELDS: Final = 16
_FIELD: Final = re.compile(r"([a-z][a-z0-9_.-]{0,31})=(\d{1,15}(?:\.\d{1,9})?)\Z", re.ASCII)


def parse(value: str) -> dict[str, Decimal]:
    """The limits in a header, by name. InvalidRequest if it is not one."""
    found: dict[str, Decimal] = {}
    for item in value.split(",") if value.strip() else ():
        match = _FIELD.match(item.strip())
        if match is None or match[1] in found or len(found) == MAX_FIELDS:
            raise InvalidRequest(
                f"the budget {value[:200]!r} is not readable at {item.strip()[:60]!r}: it must be like "
                f"tokens=1000,usd=0.5, each name once, at most {MAX_FIELDS} of them"
            )
        found[match[1]] = Decimal(match[2])
    return found


def lowered(value: str, wanted: Mapping[str, float | int | Decimal]) -> str:
    """The header of a child: of each name the lower of the inherited and the wanted limit.

    Raises:
        UsageError: a name or number cannot be told in a header.
        InvalidRequest: the inherited header cannot be read.
    """
    limits = parse(value)
    for name, number in wanted.items():
        text = format(Decimal(str(number)), "f")
        if _FIELD.match(f"{name}={text}") is None:
            raise UsageError(
                f"the budget {name}={number} is not possible: names are of a-z 0-9 _ . -, numbers from 0 with at most "
                "15 digits before and 9 after the point"
            )
        limit = Decimal(text)
        limits[name] = min(limit, limits.get(name, limit))
    if len(limits) > MAX_FIELDS:
        raise UsageError(f"a budget has at most {MAX_FIELDS} names, not {len(limits)}")
    return ",".join(f"{name}={limit:f}" for name, limit in limits.items())
