"""One child process, kept running: its ready line, its restarts, its draining and its end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from weft.cli.supervisor.logfile import LogFile
from weft.cli.supervisor.pipe import LinePipe
from weft.cli.supervisor.policy import Ended, History, RestartPolicy, describe
from weft.cli.supervisor.unit import State, Unit
from weft.core.process import dying_with_us

READY_LINE: Final = "ready"
"""What a line on stderr begins with when a process serves."""
LONGEST_REASON: Final = 300
"""Characters of a child's last words that are kept."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run."""

    name: str
    kind: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    """The whole environment."""
    folder: Path
    """Working directory."""
    agent: str = ""
    ready_within: float = 60.0
    """Seconds until the ready line; a process that takes longer is killed and started again."""
    grace: float = 30.0
    """Seconds between SIGTERM and SIGKILL."""


class Groups(Protocol):
    """Whoever ends process groups if the supervisor cannot."""

    def add(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """From now on this group gets the signal if the supervisor dies."""

    def remove(self, pid: int) -> None:
        """The group is gone."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a process needs from its supervisor."""

    groups: Groups
    policy: RestartPolicy
    on_line: Callable[[str, str], None]
    """Called with the process's name and every line it writes."""
    on_change: Callable[[Unit], None]
    log: Callable[[str], LogFile]
    """The log of a process by name."""


async def _at_once() -> None:
    """Nothing to wait for."""


class Process(Unit):
    """One child. `run` is its whole life; everything else steers or describes it.

    Args:
        spec: what to run.
        around: the supervisor's part.
        may_start: awaited before every start; returns when what the process depends on is there.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        around: Surroundings,
        *,
        may_start: Callable[[], Awaitable[None]] = _at_once,
    ) -> None:
        super().__init__(spec.name, spec.kind, around.on_change, spec.agent)
        self.spec = spec
        self._around = around
        self._may_start = may_start
        self._history = History(around.policy)
        self._child: asyncio.subprocess.Process | None = None
        self._stop = asyncio.Event()
        self._wake = asyncio.Event()
        self._ready_at: float | None = None
        self._last_words = ""
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Start, watch and restart until `stop`."""
        while not self._stop.is_set():
            self.become(State.WAITING)
            await self._until_stopped_or(self._may_start)
            if self._stop.is_set():
                break
            ended = await self._once()
            if not self._stop.is_set():
                await self._after(ended)
        self.become(State.STOPPED)

    def stop(self, grace: float | None = None) -> None:
        """Ask the child to end, SIGKILL after `grace` seconds (default: the spec's). Then `run` returns."""
        self._stop.set()
        self._wake.set()
        if self._child is not None and self._child.returncode is None:
            self.become(State.DRAINING)
            self._signal(signal.SIGTERM)
            self._after_seconds(self.spec.grace if grace is None else grace, self.kill)

    def kill(self) -> None:
        """SIGKILL to the child and everything in its group."""
        self._signal(signal.SIGKILL, group=True)

    def revive(self) -> None:
        """Start a failed or pausing process now, with a clean record."""
        self._history.forget()
        self._wake.set()

    async def _once(self) -> Ended:
        """One run of the child, from its start to its end."""
        begun = time.monotonic()
        self._ready_at, self._last_words, self.started = None, "", time.time()
        log = self._around.log(self.name)
        try:
            with ExitStack() as cleanup:
                out = LinePipe(lambda line: self._line(line, log, talk=False))
                cleanup.callback(out.close)
                err = LinePipe(lambda line: self._line(line, log, talk=True))
                cleanup.callback(err.close)
                cleanup.callback(self._clear_away)
                child = self._child = await self._spawn(out.child_end, err.child_end)
                self.pid = child.pid
                out.started()
                err.started()
                self._around.groups.add(child.pid)
                self.become(State.STARTING)
                self._after_seconds(self.spec.ready_within, self._not_ready)
                if self._stop.is_set():
                    self.stop()
                code = await child.wait()
        except OSError as error:
            self._last_words = f"cannot start {self.spec.command[0]}: {error}"
            return Ended(127, 0.0, None)
        return self._ended(code, begun)

    def _ended(self, code: int, begun: float) -> Ended:
        now = time.monotonic()
        return Ended(code, now - begun, None if self._ready_at is None else now - self._ready_at)

    async def _spawn(self, out: int, err: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *dying_with_us(self.spec.command),
            cwd=self.spec.folder,
            env=dict(self.spec.env),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )

    def _clear_away(self) -> None:
        """End what the child started itself: it would run on without an owner."""
        self._cancel_timer()
        if self._child is not None:
            self._signal(signal.SIGKILL, group=True)
            self._around.groups.remove(self._child.pid)
        self._child = self.pid = None

    async def _after(self, ended: Ended) -> None:
        """Pause before the next start, or give up and wait to be revived."""
        how = describe(ended)
        self.reason = f"{how}: {self._last_words}" if self._last_words else how
        pause = self._history.next_pause(ended, now=time.monotonic(), chance=random.random())
        self._wake.clear()
        self.become(State.FAILED if pause is None else State.BACKOFF)
        try:
            async with asyncio.timeout(pause):
                await self._wake.wait()
        except TimeoutError:
            pass
        if not self._stop.is_set():
            self.restarts += 1

    def _line(self, line: str, log: LogFile, *, talk: bool) -> None:
        log.write(line)
        self._around.on_line(self.name, line)
        if not talk or not line.strip():
            return
        if self._child is not None and self.state is State.STARTING and line.startswith(READY_LINE):
            self._cancel_timer()
            self._ready_at = time.monotonic()
            self.reason = ""
            self.become(State.READY)
        else:
            self._last_words = line.strip()[:LONGEST_REASON]

    def _not_ready(self) -> None:
        self._last_words = f"not ready within {self.spec.ready_within:g} s"
        self.kill()

    async def _until_stopped_or(self, condition: Callable[[], Awaitable[None]]) -> None:
        async def met() -> None:
            await condition()

        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(met()), group.create_task(self._stopped())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()

    async def _stopped(self) -> None:
        await self._stop.wait()

    def _signal(self, number: signal.Signals, *, group: bool = False) -> None:
        child = self._child
        if child is None:
            return
        try:
            if group:
                os.killpg(child.pid, number)
            else:
                child.send_signal(number)
        except (ProcessLookupError, PermissionError):
            # Gone already; macOS says "not permitted" about a group of zombies.
            pass

    def _after_seconds(self, delay: float, call: Callable[[], None]) -> None:
        self._cancel_timer()
        self._timer = asyncio.get_running_loop().call_later(delay, call)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
