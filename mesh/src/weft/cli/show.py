"""How a supervisor shows what happens: on a screen, or to the command that started it detached."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable
from typing import IO, Final

import click

from weft.cli.output import COLOURS, colourful, rfc3339, safe
from weft.cli.supervisor.unit import State, Unit
from weft_protocols.errors import WeftError

NAME_COLOURS: Final = (
    "cyan",
    "magenta",
    "blue",
    "green",
    "yellow",
    "bright_cyan",
    "bright_magenta",
    "bright_blue",
)


class Screen:
    """Lines of all processes and changes of their states, for a person."""

    def __init__(self, name: str, out: IO[str]) -> None:
        self._name = name
        self._out = out
        self._colour = colourful(out)
        self._width = len("coordinator")

    def line(self, name: str, text: str) -> None:
        """A process wrote a line."""
        self._show(f"{self._label(name)} | {safe(text)}")

    def changed(self, unit: Unit) -> None:
        """A process changed its state."""
        if unit.state is State.WAITING:
            return
        state = unit.state.value
        colour = COLOURS.get(state)
        shown = click.style(state, fg=colour) if self._colour and colour else state
        self._show(f"{self._label(unit.name)} * {shown}{_details(unit)}")

    def say(self, text: str) -> None:
        """A line of the supervisor's own."""
        self._show(f"{'mesh':<{self._width}} * {safe(text)}")

    def up(self, url: str, units: list[Unit]) -> None:
        """Everything is ready or failed."""
        self.say(f"{self._name} is up at {url}{_failures(units)}; Ctrl-C drains the agents and stops it")

    def _show(self, text: str) -> None:
        _print(text, self._out)

    def _label(self, name: str) -> str:
        self._width = max(self._width, len(name))
        padded = f"{name:<{self._width}}"
        if not self._colour:
            return padded
        return click.style(padded, fg=NAME_COLOURS[zlib.crc32(name.encode()) % len(NAME_COLOURS)])


class Notifier:
    """Changes of state, as JSON lines to whoever waits for the start and as text to the supervisor's log."""

    def __init__(self, handle: int, log: IO[str]) -> None:
        self._handle = handle
        self._log = log

    def line(self, name: str, text: str) -> None:
        """Nothing: every process has its own log."""

    def changed(self, unit: Unit) -> None:
        """A process changed its state."""
        text = f"{unit.name} {unit.state.value}{_details(unit)}"
        self._write(text)
        if unit.state not in (State.WAITING, State.STARTING):
            self._notify({"progress": text})

    def say(self, text: str) -> None:
        """A line of the supervisor's own."""
        self._write(text)
        self._notify({"progress": text})

    def up(self, url: str, units: list[Unit]) -> None:
        """Everything is ready or failed: the command that started this may go."""
        failed = {unit.name: unit.reason for unit in units if unit.state is State.FAILED}
        self._notify({"up": {"url": url, "processes": len(units), "failed": failed}})
        self._hang_up()

    def failed(self, error: BaseException) -> None:
        """The mesh could not be started."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        code = error.exit_code if isinstance(error, WeftError) else 1
        self._notify({"failed": {"message": str(error), "exit_code": code}})
        self._hang_up()

    def _write(self, text: str) -> None:
        _print(f"{rfc3339(time.time())} {text}", self._log)

    def _notify(self, message: object) -> None:
        if self._handle < 0:
            return
        try:
            os.write(self._handle, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _print(text: str, out: IO[str]) -> None:
    try:
        print(text, file=out, flush=True)
    except OSError:
        # A terminal that is gone or a full disk must not end the mesh.
        pass


def _details(unit: Unit) -> str:
    if unit.state in (State.BACKOFF, State.FAILED):
        return f": {safe(unit.reason)}"
    return f" (pid {unit.pid})" if unit.pid is not None and unit.state is State.READY else ""


def _failures(units: Iterable[Unit]) -> str:
    failed = [unit.name for unit in units if unit.state is State.FAILED]
    return f", without {', '.join(failed)}, which failed" if failed else ""
