"""The processes of a demo: started together, seen to be ready, ended together, also if this process dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from weft.core.process import dying_with_us
from weft.core.supervise import Tasks
from weft_protocols.errors import Unavailable

READY: Final = "ready"
"""What a line on stderr begins with when a process serves."""
_TAIL: Final = 12


class Process:
    """One child process."""

    def __init__(self, label: str, inner: asyncio.subprocess.Process) -> None:
        self.label = label
        self.inner = inner
        self.said: deque[str] = deque(maxlen=_TAIL)
        """Its last lines on stderr."""
        self.ready = asyncio.Event()
        """Set when it serves, or has ended."""
        self.ended = asyncio.Event()
        self.is_ready = False

    @property
    def pid(self) -> int:
        """Process id, also of its group."""
        return self.inner.pid

    def signal(self, number: signal.Signals) -> None:
        """Signal it and everything it started."""
        if self.inner.returncode is None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                pass

    def last_words(self) -> str:
        """How it ended and what it said last."""
        code = self.inner.returncode
        how = "runs" if code is None else f"ended with {f'signal {-code}' if code < 0 else f'code {code}'}"
        said = "\n".join(f"    {line}" for line in self.said)
        return f"{self.label} {how}" + (f"; it said:\n{said}" if said else " without a word")

    async def follow(self) -> None:
        """Read what it says until it ends."""
        assert self.inner.stderr is not None  # noqa: S101 - it was started with a pipe
        rest = b""
        while chunk := await self.inner.stderr.read(65_536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self.said.append(line.decode("utf-8", "replace")[:300])
                if line.startswith(READY.encode()):
                    self.is_ready = True
                    self.ready.set()
        await self.inner.wait()
        self.ended.set()
        self.ready.set()


class Processes:
    """Children of one owner.

    Args:
        on_end: called when a process ends that nobody asked to.
    """

    def __init__(self, on_end: Callable[[Process], None]) -> None:
        self.all: dict[str, Process] = {}
        self._on_end = on_end
        self._stopping = False
        self._tasks = Tasks("processes of the demo")
        # Children that know WEFT_PARENT_FD leave when this pipe's other end is closed, however that happens.
        self._read_end, self._write_end = os.pipe()

    async def start(self, label: str, arguments: Sequence[str], env: Mapping[str, str]) -> Process:
        """Start `python ARGUMENTS…`; returns before it is ready."""
        command: tuple[str, ...] = (sys.executable, *arguments)
        if threading.current_thread() is threading.main_thread():
            command = dying_with_us(command)
        inner = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={**_inherited(), **env, "WEFT_PARENT_FD": str(self._read_end)},
            pass_fds=(self._read_end,),
            # Ctrl-C is for this process, which then ends the others in order.
            start_new_session=True,
        )
        process = self.all[label] = Process(label, inner)
        self._tasks.start(self._watch(process), name=label)
        return process

    async def all_ready(self, timeout: float) -> None:
        """Return when every process serves.

        Raises:
            Unavailable: one ended, or did not get ready within `timeout` seconds; with its last words.
        """
        try:
            async with asyncio.timeout(timeout):
                for process in self.all.values():
                    await process.ready.wait()
                    if not process.is_ready:
                        raise Unavailable(f"a process of the demo did not start: {process.last_words()}")
        except TimeoutError:
            late = next(process for process in self.all.values() if not process.ready.is_set())
            raise Unavailable(f"not ready within {timeout:g} s: {late.last_words()}") from None

    def kill(self, label: str) -> None:
        """SIGKILL, now."""
        self.all[label].signal(signal.SIGKILL)

    async def stop(self, *, grace: float) -> None:
        """SIGTERM to all, SIGKILL after `grace` seconds to those still there, and reap them. Idempotent."""
        self._stopping = True
        for process in self.all.values():
            process.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                for process in self.all.values():
                    await process.ended.wait()
        except TimeoutError:
            pass
        finally:
            for process in self.all.values():
                process.signal(signal.SIGKILL)
            for process in self.all.values():
                await process.inner.wait()
            await self._tasks.aclose()
            self._close_pipe()

    async def _watch(self, process: Process) -> None:
        await process.follow()
        if not self._stopping:
            self._on_end(process)

    def _close_pipe(self) -> None:
        for end in (self._read_end, self._write_end):
            if end >= 0:
                os.close(end)
        self._read_end = self._write_end = -1


def _inherited() -> dict[str, str]:
    """This process's environment, without what would lead a child to another mesh."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WEFT_")}
