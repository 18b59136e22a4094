"""Names that are imported when first used, so that importing a package costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(names: dict[str, Any], where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        names: the package's `globals()`; what was imported is kept there.
        where: the module of each name.
    """

    def get(name: str) -> Any:
        module = where.get(name)
        if module is None:
            raise AttributeError(f"module {names['__name__']!r} has no attribute {name!r}")
        value = getattr(import_module(module), name)
        names[name] = value
        return value

    def listed() -> list[str]:
        return sorted({*names, *where})

    return get, listed
