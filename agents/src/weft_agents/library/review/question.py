"""The one question of a review, put to the person at the terminal, or answered where there is none."""

from __future__ import annotations

import asyncio
import sys
from typing import Final, TextIO

from weft_agents.library.review.report import FOCUS
from weft_agents.library.review.screen import Screen

WAIT: Final = 600.0
"""Seconds a person has for the answer; then the first choice is taken."""


class Answerer:
    """Answers the editor's question.

    Args:
        screen: where the question is shown.
        yes: do not ask.
        terminal: whether `screen` is one; without a terminal on both sides nobody is asked.
        source: where the answer is typed.
    """

    def __init__(self, screen: Screen, *, yes: bool, terminal: bool, source: TextIO | None = None) -> None:
        self._screen = screen
        self._source = sys.stdin if source is None else source
        self._why_not = "--yes" if yes else "" if terminal and _is_terminal(self._source) else "no terminal"
        self.busy = False
        """Whether a person is being asked: nothing else may be drawn."""

    async def answer(self, question: str) -> str:
        """An answer to the editor's question."""
        first = next(iter(FOCUS))
        if self._why_not:
            self._screen.line(f"The editor asks: {question}")
            self._screen.line(f"Answered {first!r} ({self._why_not})")
            return first
        # What follows the question mark lists the choices, which get lines of their own here.
        self._screen.line(f"The editor asks: {question.partition('?')[0]}?")
        for number, title in enumerate(FOCUS.values(), start=1):
            self._screen.line(f"  {number}  {title}")
        self._screen.prompt("Number or name [1]:")
        typed = await self._typed()
        return typed or first

    async def _typed(self) -> str:
        """A line from the terminal; empty at the end of input, or when nobody types."""
        loop = asyncio.get_running_loop()
        line: asyncio.Future[str] = loop.create_future()
        descriptor = self._source.fileno()

        def readable() -> None:
            # A terminal hands over whole lines, so this does not block.
            if not line.done():
                line.set_result(self._source.readline())

        loop.add_reader(descriptor, readable)
        try:
            async with asyncio.timeout(WAIT):
                typed = await line
                if not typed.endswith("\n"):
                    self._screen.line()
                return typed.strip()
        except TimeoutError:
            self._screen.line()
            self._screen.line(f"Nobody answered within {WAIT / 60:.0f} minutes")
            return ""
        finally:
            loop.remove_reader(descriptor)


def _is_terminal(source: TextIO | None) -> bool:
    try:
        return source is not None and source.isatty()
    except ValueError:
        # Closed.
        return False
