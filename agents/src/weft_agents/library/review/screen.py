"""Where the demo is shown: a block that is redrawn on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import TextIO

from weft_agents.library.review.progress import Look


class Screen:
    """Writes lines, and below them a block that `draw` replaces.

    Args:
        out: a terminal gets the block; anything else only the lines.
        environment: `NO_COLOR` and `TERM` are heeded.
    """

    def __init__(self, out: TextIO, *, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._out = out
        self._drawn = 0
        self.is_terminal = out.isatty() and environment.get("TERM", "") not in ("", "dumb")
        self._color = self.is_terminal and not environment.get("NO_COLOR")
        self._encoding = getattr(out, "encoding", None) or "utf-8"
        self._unicode = self._can_show("█░…")

    @property
    def look(self) -> Look:
        """What fits on this screen now."""
        width = shutil.get_terminal_size().columns - 1 if self.is_terminal else 110
        if self._unicode:
            return Look(max(20, width), color=self._color)
        return Look(max(20, width), "#", ".", "...", color=self._color)

    def line(self, text: str = "") -> None:
        """Write a line that stays."""
        block = self._erased()
        self._write(f"{block}{text}\n")

    def draw(self, lines: Sequence[str]) -> None:
        """Replace the block below the lines. Does nothing where there is no terminal."""
        if self.is_terminal:
            block = self._erased()
            self._write(block + "".join(f"{line}\n" for line in lines))
            self._drawn = len(lines)

    def clear(self) -> None:
        """Take the block away."""
        if self._drawn:
            self._write(self._erased())

    def prompt(self, text: str) -> None:
        """Write a question and stay on its line."""
        self._write(f"{self._erased()}{text} ")

    def _erased(self) -> str:
        up, self._drawn = self._drawn, 0
        return f"\x1b[{up}A\x1b[J" if up else ""

    def _write(self, text: str) -> None:
        if not self._unicode:
            text = text.encode(self._encoding, "replace").decode(self._encoding)
        self._out.write(text)
        self._out.flush()

    def _can_show(self, text: str) -> bool:
        try:
            text.encode(self._encoding)
        except (UnicodeEncodeError, LookupError):
            return False
        return True
