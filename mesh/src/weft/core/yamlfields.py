"""Reading a YAML file field by field, so that every mistake is reported with its line, all at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

    import yaml

_T = TypeVar("_T")
_BOOLEANS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


class YamlReader:
    """Walks the YAML nodes, which know their lines, and collects all mistakes.

    Args:
        path: named in mistakes.
    """

    def __init__(self, path: Path) -> None:
        self.mistakes: list[str] = []
        self.path = path

    def value(self, fields: Mapping[str, yaml.Node], where: str, default: _T, read: Callable[[str], _T]) -> _T:
        """The field that `where` ends with, made by `read`, whose ValueError is a mistake; else `default`."""
        node = fields.get(where.rpartition(".")[2])
        if node is None:
            return default
        text = self.text(node, where)
        if text is None:
            return default
        try:
            return read(text)
        except ValueError as error:
            self.mistake(node, where, str(error))
            return default

    def text(self, node: yaml.Node, where: str) -> str | None:
        """A scalar as it is written; anything else is a mistake."""
        import yaml

        if isinstance(node, yaml.ScalarNode) and not is_null(node):
            return str(node.value)
        self.mistake(node, where, "has no value" if is_null(node) else "must be one value, not a list or a mapping")
        return None

    def mapping(self, node: yaml.Node, where: str, known: tuple[str, ...] | None) -> dict[str, yaml.Node]:
        """Entries of a mapping; unknown (unless `known` is None) and repeated keys are mistakes."""
        import yaml

        if is_null(node):
            return {}
        if not isinstance(node, yaml.MappingNode):
            self.mistake(node, where, "must be a mapping of `name: value` lines")
            return {}
        entries: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
            if known is not None and name not in known:
                hint = did_you_mean(name, known) or f"; it takes {', '.join(known)}"
                self.mistake(key, where, f"has no field {name!r}{hint}")
            elif name in entries:
                self.mistake(key, where, f"names {name!r} twice; keep one")
            else:
                entries[name] = value
        return entries

    def sequence(self, node: yaml.Node | None, where: str, example: str) -> list[yaml.Node]:
        """Entries of a list; anything else is a mistake that shows an example."""
        import yaml

        if node is None or is_null(node):
            return []
        if isinstance(node, yaml.SequenceNode):
            return list(node.value)
        self.mistake(node, where, f"must be a list, e.g. {example}")
        return []

    def mistake(self, node: yaml.Node, where: str, what: str) -> None:
        """Remember what is wrong at a node; `where` is its field."""
        place = f"{self.path}:{node.start_mark.line + 1}"
        self.mistakes.append(f"{place}: {where}: {what}" if where else f"{place}: {what}")


# Readers of one value: text in, ValueError with what to do ------------------------------------------


def integer(low: int, high: int) -> Callable[[str], int]:
    """Reads a whole number within bounds."""

    def read(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"{text!r} must be a whole number from {low} to {high}")
        return int(text)

    return read


def seconds(text: str) -> float:
    """Reads a number of seconds."""
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", text):
        raise ValueError(f"{text!r} must be a number of seconds, e.g. 30")
    return float(text)


def size(text: str) -> int:
    """Reads a number of bytes such as `512MB`; units are powers of 1024."""
    match = re.fullmatch(r"(\d{1,15}) ?([KMGT]?)i?B?", text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{text!r} must be a size such as 512MB or 10GB")
    return int(match[1]) * int(1024 ** " KMGT".index(match[2] or " "))


def boolean(text: str) -> bool:
    """Reads `true` or `false`."""
    if text.lower() not in _BOOLEANS:
        raise ValueError(f"{text!r} must be true or false")
    return _BOOLEANS[text.lower()]


def is_null(node: yaml.Node) -> bool:
    """Whether nothing is written there."""
    return bool(node.tag == "tag:yaml.org,2002:null")
