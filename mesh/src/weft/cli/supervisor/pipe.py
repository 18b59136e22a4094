"""What a child writes, line by line.

The pipe is ours and not asyncio's: a child's end must be seen although a grandchild holds the pipe open.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Final

CHUNK: Final = 64 * 1024
LONGEST_LINE: Final = 64 * 1024
"""Bytes; a longer line comes in pieces."""
LEFTOVER: Final = 64
"""Chunks read after the child's end; whatever still writes then is not the child."""


class LinePipe:
    """Hands every line written to `child_end` to a function, in the event loop."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._lines = Lines()
        self._read_end, self.child_end = os.pipe()
        os.set_blocking(self._read_end, False)
        asyncio.get_running_loop().add_reader(self._read_end, self._readable)

    def started(self) -> None:
        """Close our copy of the child's end, once the child has its own."""
        if self.child_end >= 0:
            os.close(self.child_end)
            self.child_end = -1

    def close(self) -> None:
        """Hand over what is left and close. Safe to call twice."""
        self.started()
        for _ in range(LEFTOVER):
            if self._read_end < 0 or not self._readable():
                break
        self._end()

    def _readable(self) -> bool:
        """Read once; whether there may be more."""
        try:
            data = os.read(self._read_end, CHUNK)
        except BlockingIOError:
            return False
        for line in self._lines.feed(data):
            self._on_line(line)
        if not data:
            self._end()
        return bool(data)

    def _end(self) -> None:
        if self._read_end >= 0:
            for line in self._lines.end():
                self._on_line(line)
            asyncio.get_running_loop().remove_reader(self._read_end)
            os.close(self._read_end)
            self._read_end = -1


class Lines:
    """Cuts a stream of bytes into lines of text."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that are complete now. Overlong ones come in pieces."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield _text(line)
        while len(self._rest) >= LONGEST_LINE:
            piece, self._rest = self._rest[:LONGEST_LINE], self._rest[LONGEST_LINE:]
            yield _text(piece)

    def end(self) -> Iterator[str]:
        """What is left at the end of the stream, if anything."""
        rest, self._rest = self._rest, b""
        if rest:
            yield _text(rest)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r")
