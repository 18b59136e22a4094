"""Starts a supervisor that outlives the command, and waits until its mesh is up."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.cli.errors import Failed
from weft.cli.output import Printer
from weft.core.home import Home, make_private_directory
from weft_protocols.errors import DeadlineExceeded


def start_detached(config: Path, home: Path, *, overrides: list[str], timeout: float) -> int:
    """Start `mesh up` in a session of its own and return 0 when all is ready, 1 when a process failed.

    Raises:
        Failed: it could not start.
        DeadlineExceeded: it has not settled within `timeout` seconds; it goes on.
    """
    printer = Printer()
    paths = Home(home)
    make_private_directory(home)
    make_private_directory(paths.logs)
    log = paths.logs / "supervisor.log"
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "weft.cli.main", "up", "--notify-fd", str(write_end), *overrides]
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            cwd=config.parent,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=(write_end,),
            start_new_session=True,
        )
    os.close(write_end)
    try:
        for message in _messages(read_end, time.monotonic() + timeout):
            if "up" in message:
                return _told(message["up"], printer)
            if "failed" in message:
                raise Failed(message["failed"]["message"], exit_code=message["failed"]["exit_code"])
            printer.talk(str(message.get("progress", "")))
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        os.close(read_end)
    if process.poll() is None:
        error = DeadlineExceeded(f"the mesh is not ready after {timeout:g} s and goes on starting")
        error.add_note("`mesh ps` shows what is missing, `mesh logs` why, `mesh down` stops it")
        raise error
    raise Failed(f"the supervisor ended with exit code {process.returncode}; see {log}")


def _messages(handle: int, deadline: float) -> Iterator[dict[str, Any]]:
    """JSON lines until the writer hangs up or time is over."""
    rest = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([handle], [], [], left)[0]:
            return
        data = os.read(handle, 65_536)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from (json.loads(line) for line in lines)


def _told(up: dict[str, Any], printer: Printer) -> int:
    if not up["failed"]:
        printer.talk(f"up at {up['url']}; `mesh ps` shows the processes, `mesh down` stops them")
        return 0
    for name, reason in up["failed"].items():
        printer.talk(f"mesh: {name} failed: {reason}; see `mesh logs {name}`, then `mesh restart {name}`")
    return 1
