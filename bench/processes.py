"""Child processes of a benchmark: started with a death pact, measured by the kernel's counters, always ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from weft.core.process import dying_with_us
from weft.core.supervise import Tasks

ROOT: Final = Path(__file__).resolve().parent.parent
ENDING: Final = 5.0
"""Seconds a child has between SIGTERM and SIGKILL."""


def cpu_seconds(pid: int) -> float:
    """CPU time all threads of a process have used. Threads that ended meanwhile are not counted."""
    total = 0
    for schedstat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(schedstat.read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            pass
    return total / 1e9


def memory_mb(pid: int) -> float:
    """Resident memory of a process (`VmRSS`), in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Child:
    """One process that talks in lines: JSON in, JSON out."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    async def line(self, timeout: float = 30.0) -> str:
        """The next line it writes to stdout. Raises RuntimeError if it ended, or wrote none in time."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(timeout):
                line = await self.process.stdout.readline()
        except TimeoutError:
            raise RuntimeError(f"{self.name} wrote nothing for {timeout:g} s") from None
        if not line:
            raise RuntimeError(f"{self.name} ended with code {await self.process.wait()}")
        return line.decode().rstrip("\n")

    async def ask(self, request: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        await self.process.stdin.drain()
        answer: dict[str, Any] = json.loads(await self.line(timeout))
        return answer

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process is gone."""
        if self.process.returncode is None:
            try:
                self.process.send_signal(number)
            except ProcessLookupError:
                pass

    async def end(self) -> None:
        """SIGTERM, SIGKILL if that is not enough, and reap it."""
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        try:
            async with asyncio.timeout(ENDING):
                await self.process.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.process.wait()


class Children:
    """All processes of a run. Leaving the context ends them, the newest first."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._drains = Tasks("what children still say")

    async def start(
        self,
        name: str,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        stdout: bool = True,
        stderr: Any = None,
    ) -> Child:
        """Start a process. It dies with this one, even by SIGKILL (Linux)."""
        process = await asyncio.create_subprocess_exec(
            *dying_with_us([str(one) for one in arguments]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE if stdout else asyncio.subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, **(env or {})},
            cwd=ROOT,
            start_new_session=True,  # Ctrl-C is for this process, which ends the others in order
        )
        child = Child(name, process)
        self._children.append(child)
        return child

    async def python(self, name: str, module: str, *arguments: str | Path, **options: Any) -> Child:
        """Start `python -m module arguments`."""
        return await self.start(name, sys.executable, "-m", module, *arguments, **options)

    async def said(self, child: Child, begins: bytes, *, timeout: float = 30.0) -> None:
        """Wait for a line on stderr that begins so; what comes after it is read and dropped."""
        stream = child.process.stderr
        assert stream is not None
        seen: list[bytes] = []
        try:
            async with asyncio.timeout(timeout):
                while not seen or not seen[-1].startswith(begins):
                    seen.append(await stream.readline())
                    if not seen[-1]:
                        code = await child.process.wait()
                        raise RuntimeError(f"{child.name} ended with code {code}: {b''.join(seen).decode()}")
        except TimeoutError:
            raise RuntimeError(f"{child.name} did not say {begins.decode()!r} within {timeout:g} s") from None

        async def drain() -> None:
            while await stream.read(65536):
                pass

        self._drains.start(drain())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            child.signal(signal.SIGTERM)
        while self._children:
            await self._children.pop().end()
        await self._drains.aclose()
