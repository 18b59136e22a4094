"""A tool server as a process of ours: JSON-RPC in lines over its standard input and output.

It gets an environment of its own, runs in a process group of its own, and ends with its link, whatever it does.
What it writes to standard error is read, kept at the end and never a reason to wait.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from weft.core.process import dying_with_us
from weft.core.supervise import Tasks
from weft.sidecar.link import (
    ASKED_AT_ONCE,
    CANCELLED,
    MESSAGE_LIMIT,
    PROGRESS,
    Heard,
    LinkEnded,
    answer_to,
    message_of,
    restored,
    unmarked,
    with_token,
)
from weft.sidecar.pins import escaped
from weft.sidecar.secrets import Scrubber
from weft_protocols.mcp import META_SUBSCRIPTION, error_from

log = logging.getLogger("weft.sidecar")

INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "USER", "SHELL", "TERM", "LOGNAME")
"""Variables every process gets; whatever else it needs is named in its registration."""
LAST_WORDS: Final = 16 * 1024
"""Bytes of standard error that are kept."""
TOLD: Final = 300
"""Characters of them that are part of an error."""
CHUNK: Final = 64 * 1024
GARBAGE: Final = 20
"""Lines that are no messages and are logged; later ones are only counted."""
LEAVE: Final = 2.0
"""Seconds between the end of its input and SIGTERM, and from there to SIGKILL."""
SWEEP: Final = 10.0
"""Seconds that a jail has between SIGTERM and SIGKILL: if it is killed before it has swept, processes escape it."""


@dataclass(frozen=True, slots=True)
class ProcessCommand:
    """What to run."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Besides `INHERITED`."""
    cwd: str | None = None
    more: int = 0
    """Bytes by which its messages may be larger than `MESSAGE_LIMIT`."""
    jailed: bool = False
    """Whether `argv` begins with `weft.sidecar.jail`, which ends what the command leaves behind when it is told to."""


@dataclass(slots=True)
class _Pending:
    done: asyncio.Future[dict[str, Any]]
    heard: Heard | None
    token: str | int | None
    """The caller's progress token."""
    endless: bool = False
    """Whether it is a subscription."""


class StdioLink:
    """A running process. `start` makes one."""

    def __init__(self, command: ProcessCommand, on_event: Heard, *, scrub: Scrubber | None = None) -> None:
        self.ended = asyncio.Event()
        self.reason = ""
        self.garbage = 0
        """Lines on its standard output that were no messages."""
        self._command = command
        self._on_event = on_event
        self._scrub = scrub or Scrubber()
        self._process: asyncio.subprocess.Process | None = None
        self._pending: dict[int, _Pending] = {}
        self._count = 0
        self._last_words = bytearray()
        self._writing = asyncio.Lock()
        self._tasks = Tasks(f"tool server {command.name}")

    @classmethod
    async def start(cls, command: ProcessCommand, on_event: Heard, *, scrub: Scrubber | None = None) -> StdioLink:
        """Start the process. Raises LinkEnded if it cannot be. Secrets that `scrub` knows are in nothing it says."""
        made = cls(command, on_event, scrub=scrub)
        argv = command.argv if command.jailed else dying_with_us(command.argv)
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        try:
            made._process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**inherited, **command.env},
                cwd=command.cwd or None,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise LinkEnded(f"tool server {command.name} cannot be started: {error}") from None
        made._tasks.start(made._read(made._process), name=f"output of {command.name}")
        made._tasks.start(made._drain(made._process), name=f"errors of {command.name}")
        return made

    @property
    def pid(self) -> int:
        """Of the process, which leads its group."""
        return self._process.pid if self._process is not None else 0

    @property
    def last_words(self) -> str:
        """The end of what it wrote to standard error, with what nobody would see written out."""
        return escaped(self._scrub.text(self._last_words.decode(errors="replace").strip()))

    async def request(
        self, method: str, params: Mapping[str, Any], *, heard: Heard | None = None, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        """See `Link`."""
        if self.ended.is_set():
            raise LinkEnded(self.reason)
        self._count += 1
        ident = self._count
        out, token = with_token(params, ident)
        endless = method == "subscriptions/listen"
        pending = _Pending(asyncio.get_running_loop().create_future(), heard, token, endless)
        self._pending[ident] = pending
        try:
            await self._write({"jsonrpc": "2.0", "id": ident, "method": method, "params": out})
            return await pending.done
        except asyncio.CancelledError:
            if method != "initialize" and not self.ended.is_set():
                self._tasks.start(self.notify(CANCELLED, {"requestId": ident, "reason": "the caller left"}))
            raise
        finally:
            del self._pending[ident]

    async def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """See `Link`."""
        try:
            async with asyncio.timeout(LEAVE):
                await self._write({"jsonrpc": "2.0", "method": method, "params": dict(params)})
        except (LinkEnded, TimeoutError):
            log.debug("a notification to %s is lost", self._command.name)

    async def handshaken(self) -> None:
        """Nothing to do: there is one stream for everything."""

    async def aclose(self) -> None:
        """See `Link`."""
        process = self._process
        self._end("it was stopped")
        if process is None:
            await self._tasks.aclose()
            return
        try:
            if process.returncode is None:
                if process.stdin is not None:
                    process.stdin.close()
                await self._gone(process, (None, signal.SIGTERM))
        finally:
            self._kill()  # what it left behind in its group
            await self._tasks.aclose()
            _close_pipes(process)  # one that is no longer read from stays open else

    # Reading -----------------------------------------------------------------------------------

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101 - it was asked for
        rest = bytearray()
        while chunk := await process.stdout.read(CHUNK):
            rest += chunk
            if b"\n" in chunk:
                *lines, last = bytes(rest).split(b"\n")
                rest = bytearray(last)
                for line in lines:
                    if line.strip():
                        self._take_safely(line)
            most = MESSAGE_LIMIT + self._command.more
            if len(rest) > most:
                self._end(f"it wrote a line of more than {most} bytes")
                break
        # Its output can end before the process does, and a child of it can hold the output open after.
        await self._gone(process, (signal.SIGTERM,) if self.ended.is_set() else (None, signal.SIGTERM))
        code = process.returncode
        words = f": {_end_of(self.last_words)}" if self.last_words else ""
        self._end(f"tool server {self._command.name} ended with {code}{words}")
        self._kill()

    def _take_safely(self, line: bytes) -> None:
        """Take a line; one that nests so deep that it cannot be worked on is none."""
        try:
            self._take(line)
        except RecursionError:
            self.garbage += 1
            log.warning("%s wrote a message that nests too deep", self._command.name)

    def _take(self, line: bytes) -> None:
        message = message_of(line)
        if message is None:
            self.garbage += 1
            if self.garbage <= GARBAGE:
                shown = self._scrub.text(line.decode(errors="replace"))[:200]
                log.warning("%s wrote what is no message: %r", self._command.name, shown)
            return
        message = self._scrub.value(message)
        if "method" in message:
            if "id" in message:
                if len(self._tasks) < ASKED_AT_ONCE:
                    self._tasks.start(self._answer(message))
            else:
                self._hear(str(message["method"]), message.get("params"))
            return
        pending = self._pending.get(message["id"]) if type(message.get("id")) is int else None
        if pending is None or pending.done.done():
            return
        if isinstance(message.get("result"), dict):
            pending.done.set_result(unmarked(message["result"]))
        else:
            pending.done.set_exception(error_from(message.get("error")))

    def _hear(self, method: str, params: Any) -> None:
        """Hand a notification to the request it belongs to, as far as that can be known."""
        made = params if isinstance(params, dict) else {}
        pending: _Pending | None = None
        if method == PROGRESS:
            token = made.get("progressToken")
            pending = self._pending.get(token) if isinstance(token, int) else None
            if pending is None:
                return
        elif isinstance(made.get("_meta"), dict) and META_SUBSCRIPTION in made["_meta"]:
            ident = made["_meta"][META_SUBSCRIPTION]
            pending = self._pending.get(ident) if isinstance(ident, int) else None
        elif method == "notifications/message":
            calls = [one for one in self._pending.values() if not one.endless]
            pending = calls[0] if len(calls) == 1 else None
            if pending is None:
                return
        if pending is None:
            self._on_event(method, made)
        elif pending.heard is not None:
            pending.heard(method, unmarked(restored(made, pending.token)))

    async def _answer(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(LEAVE):
                await self._write(answer_to(message))
        except (LinkEnded, TimeoutError):
            log.debug("an answer to %s is lost", self._command.name)

    async def _drain(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None  # noqa: S101 - it was asked for
        while chunk := await process.stderr.read(CHUNK):
            self._last_words += chunk[-LAST_WORDS:]
            del self._last_words[:-LAST_WORDS]

    # Writing and ending ------------------------------------------------------------------------

    async def _write(self, message: Mapping[str, Any]) -> None:
        if self.ended.is_set() or self._process is None or self._process.stdin is None:
            raise LinkEnded(self.reason or "it was not started")
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        try:
            self._process.stdin.write(data)
            if self._process.stdin.transport.get_write_buffer_size():
                async with self._writing:
                    await self._process.stdin.drain()
        except (ConnectionError, RuntimeError) as error:
            raise LinkEnded(f"tool server {self._command.name} does not read any more: {error}") from None

    def _end(self, reason: str) -> None:
        if self.ended.is_set():
            return
        self.reason = reason
        self.ended.set()
        for pending in self._pending.values():
            if not pending.done.done():
                pending.done.set_exception(LinkEnded(reason))
                pending.done.exception()

    async def _gone(self, process: asyncio.subprocess.Process, told: Sequence[signal.Signals | None]) -> None:
        """Return when the process is gone, which it is told more and more clearly."""
        for number in (*told, signal.SIGKILL):
            if number is not None:
                self._kill(number)
            sweeps = number is signal.SIGTERM and self._command.jailed
            try:
                async with asyncio.timeout(SWEEP if sweeps else LEAVE):
                    await process.wait()
                return
            except TimeoutError:
                continue
        await process.wait()

    def _kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal to the whole group, as far as there is one left."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, number)
            except (ProcessLookupError, PermissionError):
                return


def _end_of(said: str) -> str:
    """The last lines of it, as many as can be told; the beginning of the last one, where that is longer."""
    *lines, last = said.splitlines()
    told = last if len(last) <= TOLD else f"{last[: TOLD - 1]}…"
    while lines and len(lines[-1]) + 1 + len(told) <= TOLD:
        told = f"{lines.pop()}\n{told}"
    return told


def _close_pipes(process: asyncio.subprocess.Process) -> None:
    """Give back the descriptors now, not when the garbage is collected."""
    transport: Any = getattr(process, "_transport", None)
    if transport is not None:
        transport.close()
