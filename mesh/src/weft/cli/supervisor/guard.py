"""The supervisor's side of the guardian: one small process that outlives it for a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

_GUARDIAN: Final = str(Path(__file__).with_name("guardian.py"))


class Guard:
    """Tells a guardian process which groups must not outlive this process."""

    def __init__(self) -> None:
        self._pids: dict[int, signal.Signals] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the guardian; return when it is on duty."""
        process = self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _GUARDIAN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if process.stdout is not None:
            with process.stdout as told:
                told.read()
        for pid, number in self._pids.items():
            self._tell(pid, number)

    def add(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """From now on this group gets the signal if this process dies."""
        self._pids[pid] = number
        if self._process is not None and self._process.poll() is not None:
            self.close()
            self.start()
        else:
            self._tell(pid, number)

    def remove(self, pid: int) -> None:
        """The group is gone."""
        if self._pids.pop(pid, None) is not None:
            self._tell(pid, 0)

    def close(self) -> None:
        """End the guardian, which ends the groups still listed."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.wait()

    def _tell(self, pid: int, number: int) -> None:
        if self._process is None or self._process.stdin is None:
            return
        try:
            # Unbuffered and shorter than a pipe's atomic write.
            os.write(self._process.stdin.fileno(), b"%d %d\n" % (pid, number))
        except BrokenPipeError:
            # The guardian was killed; the next process that starts brings a new one.
            pass
