"""How a test and the agents it runs in other processes see each other: lines they leave, gates they wait at."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

ENVIRONMENT: Final = "WEFT_TEST_SCRATCH"
_POLL: Final = 0.02


class Scratch:
    """A folder shared by a test and its agents. In an agent's process `Scratch.here()` is the test's.

    A trace is a line of words that somebody left. A gate is a name; what waits at it goes on once it is open.
    """

    def __init__(self, folder: Path) -> None:
        self._trace = folder / "trace"
        self._gates = folder / "gates"
        self._gates.mkdir(parents=True, exist_ok=True)
        self.env = {ENVIRONMENT: str(folder)}
        """Environment for the agents' processes."""

    @classmethod
    def here(cls) -> Scratch:
        """The one this process was started with."""
        return cls(Path(os.environ[ENVIRONMENT]))

    def leave(self, *words: object) -> None:
        """Leave a line, which is written whole though others write too."""
        line = " ".join(str(word) for word in words) + "\n"
        file = os.open(self._trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def found(self, first: str = "") -> list[list[str]]:
        """The lines so far, as words; only those that begin with a word if one is given."""
        text = self._trace.read_text() if self._trace.exists() else ""
        lines = [line.split(" ") for line in text.splitlines()]
        return [line for line in lines if not first or line[0] == first]

    async def left(self, first: str, count: int = 1, *, timeout: float = 15.0) -> list[list[str]]:
        """The lines that begin with a word, once there are at least `count`; TimeoutError after `timeout` seconds."""
        async with asyncio.timeout(timeout):
            while True:
                found = self.found(first)
                if len(found) >= count:
                    return found
                await asyncio.sleep(_POLL)

    def open(self, gate: str) -> None:
        """Let everybody through who waits, or comes to wait, at a gate."""
        (self._gates / gate).touch()

    def is_open(self, gate: str) -> bool:
        """Whether a gate was opened."""
        return (self._gates / gate).exists()

    async def passed(self, gate: str, *, timeout: float = 60.0) -> None:
        """Return once a gate is open; TimeoutError after `timeout` seconds."""
        async with asyncio.timeout(timeout):
            while True:
                if self.is_open(gate):
                    return
                await asyncio.sleep(_POLL)
