"""Where a coordinator keeps its file: one for each process, held by a lock."""

from __future__ import annotations

import fcntl
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from weft.core.home import make_private_directory
from weft_protocols.errors import InvalidConfig, Unavailable

log = logging.getLogger("weft.coordinator")

MOST: Final = 64
"""Coordinators that may have a file in one directory."""
_BESIDE: Final = ("", "-wal", "-shm")
"""What SQLite has of one database."""
_HEADER: Final = b"SQLite format 3\x00"


@dataclass(slots=True)
class StateFile:
    """A database file that is this process' alone."""

    path: Path
    _lock: IO[bytes]
    _temporary: Path | None = None

    @staticmethod
    def take(directory: Path | None) -> StateFile:
        """The first file of a directory that no other process holds; without one, a file that goes with the process.

        Raises:
            InvalidConfig: the directory cannot be made or written.
            Unavailable: all its files are held.
        """
        temporary = Path(tempfile.mkdtemp(prefix="weft-coordinator-")) if directory is None else None
        folder = directory or temporary or Path()
        try:
            make_private_directory(folder)
            for number in range(1, MOST + 1):
                lock = (folder / f"{number}.lock").open("ab")
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    lock.close()
                    continue
                return StateFile(folder / f"{number}.db", lock, temporary)
        except OSError as error:
            raise InvalidConfig(f"the coordinator cannot keep its state in {folder}: {error}") from None
        raise Unavailable(f"{MOST} coordinators keep their state in {folder} already")

    def release(self) -> None:
        """Let another process have it."""
        self._lock.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def bytes(self) -> int:
        """Size of everything the database has on disk."""
        return sum(one.stat().st_size for end in _BESIDE if (one := self._beside(end)).exists())

    def problem(self) -> str:
        """Why the file cannot be opened as it is; empty if nothing speaks against it."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            begin = file.read(100)
        if not begin:
            return ""
        if len(begin) < 100 or not begin.startswith(_HEADER):
            return "it is no SQLite database"
        page = int.from_bytes(begin[16:18], "big")
        told = int.from_bytes(begin[28:32], "big") * (65536 if page == 1 else page)
        wal = self._beside("-wal")
        if self.path.stat().st_size < told and not (wal.exists() and wal.stat().st_size):
            return f"it has {self.path.stat().st_size} bytes and should have {told}"
        return ""

    def set_aside(self, why: str) -> None:
        """Rename what is there, so that somebody can look at it, and tell so; the one before it goes."""
        for old in self.path.parent.glob(f"{self.path.stem}.aside-*"):
            old.unlink(missing_ok=True)
        aside = self.path.with_name(f"{self.path.stem}.aside-{time.time_ns() // 1_000_000}.db")
        for end in _BESIDE:
            if (one := self._beside(end)).exists():
                one.rename(f"{aside}{end}")
        log.warning("%s is not used (%s); it is %s now, and its content is read anew", self.path, why, aside.name)

    def spare(self) -> StateFile:
        """An empty file beside this one, to become it by `replace`."""
        path = self.path.with_name(f"{self.path.stem}.new.db")
        made = StateFile(path, self._lock)
        made.remove()
        return made

    def remove(self) -> None:
        """Remove the database."""
        for end in _BESIDE:
            self._beside(end).unlink(missing_ok=True)

    def replace(self, other: Path) -> None:
        """Put another database, closed and without a log of its own, in place of this one."""
        for end in _BESIDE[1:]:
            self._beside(end).unlink(missing_ok=True)
        other.replace(self.path)

    def _beside(self, end: str) -> Path:
        return self.path.with_name(self.path.name + end)
