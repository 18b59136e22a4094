"""How large values are: what would make everybody else wait is done in a thread, and what nests too deep is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")
NODES: Final = 2000
"""Values, keys and items that are worked on at once."""
CHARACTERS: Final = 64 * 1024


def heavy(value: Any, *, nodes: int = NODES, characters: int = CHARACTERS) -> bool:
    """Whether a JSON value has more than so many parts, or characters. Itself quick for any value."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            characters -= len(one)
        elif isinstance(one, dict):
            nodes -= len(one)
            if nodes >= 0:
                characters -= sum(map(len, one))
                left += one.values()
        elif isinstance(one, list):
            nodes -= len(one)
            if nodes >= 0:
                left += one
        if nodes < 0 or characters < 0:
            return True
    return False


def measured(value: Any, deepest: int) -> int | None:
    """Bytes of a JSON value as JSON; None if it has more than `deepest` levels of lists and objects."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(deepest):
        items = (one.values() if isinstance(one, dict) else one for one in level)
        level = [inner for inside in items for inner in inside if isinstance(inner, dict | list)]
        if not level:
            return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="backslashreplace"))
    return None


async def aside(work: Callable[..., T], *args: Any, large: bool) -> T:
    """What `work` returns; done in a thread where its subject is `large`, so that the loop goes on meanwhile."""
    return await asyncio.to_thread(work, *args) if large else work(*args)
