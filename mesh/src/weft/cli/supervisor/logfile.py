"""The log of one process: lines with a time, in a file that is rotated by size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

MAX_BYTES: Final = 10 * 1024 * 1024
"""Size at which a log file is rotated."""
KEPT: Final = 3
"""Older files kept beside the current one, as `name.log.1` to `name.log.3`."""


class LogFile:
    """Appends lines to `path`, each after the time `now()` gives; drops what does not fit on the disk."""

    def __init__(self, path: Path, *, now: Callable[[], str], max_bytes: int = MAX_BYTES, kept: int = KEPT) -> None:
        self.path = path
        self._now = now
        self._max_bytes = max_bytes
        self._kept = kept
        self._file: IO[bytes] | None = None

    def write(self, text: str) -> None:
        """Append one line."""
        line = f"{self._now()} {text}\n".encode("utf-8", "replace")
        try:
            file = self._open()
            if file.tell() and file.tell() + len(line) > self._max_bytes:
                file = self._rotate()
            file.write(line)
        except OSError:
            # A full disk must not take the mesh down with it.
            self.close()

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError:
                pass

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = self.path.open("ab", buffering=0)
        return self._file

    def _rotate(self) -> IO[bytes]:
        self.close()
        for n in range(self._kept, 0, -1):
            older = self.path if n == 1 else numbered(self.path, n - 1)
            if older.exists():
                older.replace(numbered(self.path, n))
        return self._open()


def numbered(path: Path, n: int) -> Path:
    """Name of the n-th rotated file."""
    return path.with_name(f"{path.name}.{n}")
