"""What commands print: data on stdout as a table, JSON, JSON lines or YAML; talk and progress on stderr.

No colour alone carries meaning, and none is used where stdout is no terminal or NO_COLOR is set. Text that
came from agents is shown without control characters, so that it cannot drive the terminal.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final, ParamSpec, TypeVar

import click

FORMS: Final = ("table", "json", "jsonl", "yaml")
GAP: Final = "  "
NARROWEST: Final = 12
"""Columns a flexible column keeps on a narrow terminal."""
COLOURS: Final[dict[str, str]] = {
    **dict.fromkeys(("ready", "ok", "completed", "active", "up"), "green"),
    **dict.fromkeys(
        ("starting", "backoff", "draining", "waiting", "degraded", "warning", "submitted", "working"),
        "yellow",
    ),
    **dict.fromkeys(("input-required", "auth-required"), "cyan"),
    **dict.fromkeys(("failed", "down", "rejected", "canceled", "missing", "error"), "red"),
}
"""Colour of a state word in a `state` column."""

P = ParamSpec("P")
R = TypeVar("R")


def output_option(function: Callable[P, R]) -> Callable[P, R]:
    """The `-o` option of a command; the command gets it as `output`."""
    decorate = click.option(
        "-o",
        "--output",
        type=click.Choice(FORMS),
        default="table",
        show_default=True,
        help="Form of the output.",
    )
    return decorate(function)


def plain(value: Any) -> str:
    """A cell's text: lists joined by commas, nothing as `-`."""
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    key: str
    """Key of the row it shows."""
    header: str = ""
    """Heading; the key in capitals if empty."""
    show: Callable[[Any], str] = plain
    """Text of a value."""
    right: bool = False
    """Aligned to the right, for numbers."""
    flexible: bool = False
    """May be cut to fit the terminal."""
    state: bool = False
    """Coloured by its word."""

    @property
    def title(self) -> str:
        """The heading."""
        return self.header or self.key.upper().replace("_", " ")


@dataclass(slots=True)
class Printer:
    """Prints in one of `FORMS`."""

    form: str = "table"
    out: IO[str] = field(default_factory=lambda: sys.stdout)
    talk_to: IO[str] = field(default_factory=lambda: sys.stderr)

    @property
    def machine(self) -> bool:
        """Whether a program reads the output."""
        return self.form != "table"

    def rows(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], *, empty: str = "") -> None:
        """A list. `empty` is said on stderr where a table would have no line."""
        if self.form == "table":
            if rows:
                self._write(table(rows, columns, width=_width(self.out), colour=colourful(self.out)))
            elif empty:
                self.talk(empty)
        elif self.form == "jsonl":
            for row in rows:
                self._write(_json(row))
        else:
            self._write(self._dump(list(rows)))

    def record(self, record: Mapping[str, Any], *, text: str | None = None) -> None:
        """One thing. `text` is what people see instead of its keys and values."""
        if self.form == "table":
            self._write(text if text is not None else pairs(record))
        elif self.form == "jsonl":
            self._write(_json(record))
        else:
            self._write(self._dump(record))

    def item(self, record: Mapping[str, Any], *, text: str) -> None:
        """One of a stream of things: a line of text, or of JSON in every other form."""
        if self.form == "yaml":
            self._write("---\n" + self._dump(record))
        else:
            self._write(text if self.form == "table" else _json(record))
        self.out.flush()

    def talk(self, text: str) -> None:
        """A line for people, on stderr."""
        print(safe(text), file=self.talk_to, flush=True)

    def progress(self, text: str) -> None:
        """A line about work under way: only where a person watches."""
        if self.talk_to.isatty():
            print(safe(text), file=self.talk_to, flush=True)

    def _dump(self, value: Any) -> str:
        if self.form == "yaml":
            import yaml

            dumped: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=False)
            return dumped.rstrip("\n")
        return _json(value, indent=2)

    def _write(self, text: str) -> None:
        print(text, file=self.out)


def safe(text: str) -> str:
    """`text` without control characters other than tab and line break."""
    if text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    width: int | None = None,
    colour: bool = False,
) -> str:
    """Rows under headings. Flexible columns are cut so that lines fit `width` columns; None never cuts."""
    cells = [
        [safe(column.show(row.get(column.key))).replace("\n", " ").replace("\t", " ") for column in columns]
        for row in rows
    ]
    widths = [
        max([columns_of(column.title), *(columns_of(line[i]) for line in cells)]) for i, column in enumerate(columns)
    ]
    _shrink(widths, columns, width)
    lines = [_line([column.title for column in columns], widths, columns)]
    for line in cells:
        painted = [
            COLOURS.get(text) if colour and column.state else None for text, column in zip(line, columns, strict=True)
        ]
        lines.append(_line(line, widths, columns, painted))
    return "\n".join(lines)


def pairs(record: Mapping[str, Any]) -> str:
    """Keys and values, one a line."""
    width = max((columns_of(key) for key in record), default=0)
    return "\n".join(f"{key + ':':<{width + 1}} {safe(plain(value))}" for key, value in record.items())


def columns_of(text: str) -> int:
    """Terminal columns of a text: two for East Asian wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(_columns_of_character(c) for c in text)


def cut(text: str, width: int) -> str:
    """`text` in at most `width` columns, with an ellipsis where something was left out."""
    if columns_of(text) <= width:
        return text
    kept, used = [], 0
    for character in text:
        used += _columns_of_character(character)
        if used > width - 1:
            break
        kept.append(character)
    return "".join(kept) + "…"


def _columns_of_character(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _shrink(widths: list[int], columns: Sequence[Column], width: int | None) -> None:
    if width is None:
        return
    over = sum(widths) + len(GAP) * (len(widths) - 1) - width
    for i in sorted(range(len(widths)), key=lambda i: -widths[i]):
        if over > 0 and columns[i].flexible:
            less = min(over, max(0, widths[i] - NARROWEST))
            widths[i] -= less
            over -= less


def _line(
    cells: Sequence[str], widths: Sequence[int], columns: Sequence[Column], painted: Sequence[str | None] = ()
) -> str:
    parts = []
    for i, (cell, width, column) in enumerate(zip(cells, widths, columns, strict=True)):
        text = cut(cell, width)
        blank = " " * (width - columns_of(text))
        if painted and painted[i] is not None:
            text = click.style(text, fg=painted[i])
        parts.append(blank + text if column.right else text + blank)
    return GAP.join(parts).rstrip()


def _json(value: Any, *, indent: int | None = None) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent, default=str)


def _width(out: IO[str]) -> int | None:
    return shutil.get_terminal_size().columns if out.isatty() else None


def colourful(out: IO[str]) -> bool:
    """Whether colours are wanted there."""
    if os.environ.get("NO_COLOR"):
        return False
    return out.isatty() and os.environ.get("TERM") != "dumb"


def ago(seconds: float | None) -> str:
    """A duration for people: `0.4s`, `12s`, `3m20s`, `5h03m`, `2d4h`."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{max(0.0, seconds):.1f}s".replace(".0s", "s")
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600}h"


def rfc3339(unix: float) -> str:
    """A time of the system clock as UTC, to the millisecond."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
