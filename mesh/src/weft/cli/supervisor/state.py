"""What a running supervisor keeps in the home directory: a lock of its own, and where to reach it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from weft.cli.errors import AlreadyRunning
from weft.core.home import process_started, write_private
from weft_protocols.errors import Unavailable

LOCK: Final = "supervisor.lock"
RECORD: Final = "supervisor.json"
SOCKET: Final = "supervisor.sock"
LOOK_EVERY: Final = 0.02
LONGEST_SOCKET: Final = 100
"""Bytes of a socket's path that every system takes (sun_path is 104 or 108)."""


@dataclass(frozen=True, slots=True)
class Record:
    """`supervisor.json`."""

    pid: int
    started: str
    """The process's start time in the system's own terms, so that a reused pid is not taken for it."""
    socket: str
    """Path of the control socket: in the home directory unless that path would be too long."""
    config: str
    """Digest of `mesh.yaml` as it was read."""

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return process_started(self.pid) == self.started

    def ends(self, timeout: float) -> bool:
        """Whether it ended within `timeout` seconds. It is no child of ours, so it is looked at again and again."""
        deadline = time.monotonic() + timeout
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_EVERY)
        return True

    def write(self, home: Path) -> None:
        """Write the file, mode 0600."""
        write_private(home / RECORD, json.dumps(asdict(self), indent=2).encode() + b"\n")

    @classmethod
    def read(cls, home: Path) -> Self | None:
        """The record, or None if there is none or an unreadable one."""
        try:
            raw = json.loads((home / RECORD).read_bytes())
            return cls(int(raw["pid"]), str(raw["started"]), str(raw["socket"]), str(raw["config"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def running(home: Path) -> Record:
    """The record of the supervisor that runs; Unavailable if none does."""
    record = Record.read(home)
    if record is None or not record.alive:
        raise Unavailable(f"the mesh in {home.parent} is not running; start it with `mesh up`")
    return record


def config_digest(path: Path) -> str:
    """Digest of a configuration file; empty if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


class Lock:
    """Held while a supervisor runs; the system releases it however the process ends."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._handle = -1

    def acquire(self) -> None:
        """Take the lock, or raise AlreadyRunning with the holder's pid."""
        import fcntl

        handle = os.open(self._home / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            record = Record.read(self._home)
            pid = f" (pid {record.pid})" if record is not None else ""
            raise AlreadyRunning(f"the mesh in {self._home.parent} is already running{pid}") from None
        self._handle = handle

    def release(self) -> None:
        """Let go. Safe to call twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def socket_path(home: Path) -> Path:
    """Where the control socket goes; creates a private directory for it if the home's path is too long."""
    path = home.absolute() / SOCKET
    if len(os.fsencode(path)) <= LONGEST_SOCKET:
        return path
    return Path(tempfile.mkdtemp(prefix="weft-")) / SOCKET


def forget(home: Path) -> None:
    """Remove record and socket of a supervisor that ended."""
    record = Record.read(home)
    if record is not None:
        socket = Path(record.socket)
        if socket.is_socket():
            socket.unlink(missing_ok=True)
        if socket.parent != home.absolute() and socket.parent.name.startswith("weft-"):
            try:
                socket.parent.rmdir()
            except OSError:
                pass
    (home / RECORD).unlink(missing_ok=True)


def clear_stale(home: Path) -> None:
    """Remove what a killed supervisor left, unless another one is just starting."""
    lock = Lock(home)
    try:
        lock.acquire()
    except AlreadyRunning:
        return
    try:
        forget(home)
    finally:
        lock.release()
