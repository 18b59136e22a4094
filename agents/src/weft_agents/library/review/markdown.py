"""Markdown as text: tables, bar charts and spans. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

BAR: Final = 30
"""Characters of the longest bar."""


def number(value: int) -> str:
    """A number with thousands separated."""
    return f"{value:,}"


def count(value: int, thing: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number(value)} {thing}{'' if value == 1 else 's'}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. A head that ends with `:` is aligned to the right."""
    rules = ["---:" if name.endswith(":") else "---" for name in head]
    lines = ["| " + " | ".join(name.removesuffix(":") for name in head) + " |", "|" + "|".join(rules) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def bars(values: Mapping[str, int]) -> str:
    """A bar chart in a code block, scaled to the largest value."""
    largest = max(values.values(), default=0)
    width = max((len(name) for name in values), default=0)
    lines = [f"{name:<{width}}  {bar(value, largest)} {number(value)}".rstrip() for name, value in values.items()]
    return "\n".join(["```text", *lines, "```"])


def code(text: str) -> str:
    """Text as a code span, also when it has backticks."""
    fence = "`" * (max((len(run) for run in _backtick_runs(text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def plain(text: str) -> str:
    """Text from a reviewed file, so that it cannot become markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#" else c for c in text)


def _backtick_runs(text: str) -> Iterator[str]:
    run = ""
    for c in f"{text} ":
        if c == "`":
            run += c
        elif run:
            yield run
            run = ""


def bar(value: int, largest: int, width: int = BAR) -> str:
    """A bar of up to `width` characters."""
    if value <= 0 or largest <= 0:
        return ""
    # A value above zero is always visible.
    return "█" * max(1, round(width * value / largest))
