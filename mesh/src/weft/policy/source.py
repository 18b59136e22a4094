"""Cedar text as single rules, each with its place: what a message needs to name the line. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_TOKEN: Final = re.compile(
    r'"(?:[^"\\]|\\.)*"'  # text
    r"|//[^\n]*"  # a comment
    r"|;"
    r'|[^";/]+|/|"',
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The text of one rule."""

    file: str
    line: int
    """Where it begins, from 1."""
    text: str

    def line_of(self, *words: str) -> int:
        """Line of the first of `words` that stands in it as a whole word or as a text; its own line if none does."""
        for word in words:
            pattern = rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])"
            for number, line in enumerate(self.text.splitlines()):
                if re.search(pattern, line.partition("//")[0] if '"' not in line else line):
                    return self.line + number
        return self.line


def chunks(file: str, text: str) -> Iterator[Chunk]:
    """The rules of a file, in order. What comes after the last semicolon is one too, unless it says nothing."""
    begin, line = 0, 1
    said = False
    start_line = 1
    for match in _TOKEN.finditer(text):
        token = match[0]
        blank = token.isspace() or token.startswith("//")
        if not blank and not said:
            said = True
            lead = len(token) - len(token.lstrip()) if not token.startswith('"') else 0
            begin = match.start() + lead
            start_line = line + token[:lead].count("\n")
        if token == ";":
            yield Chunk(file, start_line, text[begin : match.end()])
            said = False
        line += token.count("\n")
    if said:
        yield Chunk(file, start_line, text[begin:])
