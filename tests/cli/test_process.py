"""One supervised child: readiness, restarts, draining, and that nothing of it is left."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from weft.cli.supervisor.guard import Guard
from weft.cli.supervisor.logfile import LogFile
from weft.cli.supervisor.policy import RestartPolicy
from weft.cli.supervisor.process import Process, ProcessSpec, Surroundings
from weft.cli.supervisor.unit import State, Unit
from weft.core.home import process_started
from weft.testing import eventually

pytestmark = pytest.mark.anyio

QUICK = RestartPolicy(first=0.01, longest=0.05, early=0.0)
LIMIT = 10.0
READY = "import sys, time; print('ready: here', file=sys.stderr, flush=True); "
SERVE = READY + "time.sleep(60)"


@dataclass
class Bench:
    """Starts processes and remembers what they said and did."""

    folder: Path
    group: asyncio.TaskGroup
    guard: Guard
    lines: list[str] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    logs: dict[str, LogFile] = field(default_factory=dict)

    def start(
        self,
        code: str,
        *,
        policy: RestartPolicy = QUICK,
        ready_within: float = LIMIT,
        grace: float = LIMIT,
        command: tuple[str, ...] | None = None,
    ) -> Process:
        spec = ProcessSpec(
            "child",
            "agent",
            command or (sys.executable, "-S", "-c", code),
            {**os.environ, "PYTHONUNBUFFERED": "1"},
            self.folder,
            ready_within=ready_within,
            grace=grace,
        )
        around = Surroundings(
            self.guard,
            policy,
            on_line=lambda name, line: self.lines.append(line),
            on_change=lambda unit: self.note(unit),
            log=self.log,
        )
        process = Process(spec, around)
        self.group.create_task(process.run())
        return process

    def log(self, name: str) -> LogFile:
        return self.logs.setdefault(name, LogFile(self.folder / f"{name}.log", now=lambda: "NOW"))

    def note(self, unit: Unit) -> None:
        self.states.append(unit.state)


@asynccontextmanager
async def bench(folder: Path) -> AsyncIterator[Bench]:
    guard = Guard()
    guard.start()
    started: list[Process] = []
    try:
        async with asyncio.TaskGroup() as group:
            made = Bench(folder, group, guard)
            begin = made.start

            def start(*args: object, **kwargs: object) -> Process:
                started.append(begin(*args, **kwargs))  # type: ignore[arg-type]
                return started[-1]

            made.start = start  # type: ignore[method-assign]
            try:
                yield made
            finally:
                for process in started:
                    process.stop(0.1)
        for log in made.logs.values():
            log.close()
    finally:
        guard.close()


async def test_a_process_is_ready_when_it_says_so(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        process = b.start(SERVE)
        assert await process.reaches(State.READY, timeout=LIMIT)
        assert b.states == [State.STARTING, State.READY]
        row = process.row()
        assert (row["name"], row["state"], row["restarts"], row["reason"]) == ("child", "ready", 0, "")
        assert process_started(row["pid"]) is not None


async def test_ready_on_standard_output_is_data_and_not_readiness(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        process = b.start("import time; print('ready'); time.sleep(60)")
        await eventually(lambda: "ready" in b.lines)
        assert process.state is State.STARTING


async def test_a_killed_process_comes_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        process = b.start(SERVE)
        await process.reaches(State.READY, timeout=LIMIT)
        before = process.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        assert await process.reaches(State.BACKOFF, timeout=LIMIT)
        assert process.reason == "killed by SIGKILL"
        assert await process.reaches(State.READY, timeout=LIMIT)
        assert process.pid != before
        assert process.restarts == 1


async def test_a_crash_loop_ends_as_failed_with_the_last_words(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        process = b.start("raise SystemExit('no such luck')", policy=QUICK)
        assert await process.reaches(State.FAILED, timeout=LIMIT)
        assert b.states.count(State.STARTING) == QUICK.crashes
        assert process.reason == "exit 1: no such luck"
        assert process.pid is None


async def test_a_failed_process_can_be_revived(tmp_path: Path) -> None:
    flag = tmp_path / "mended"
    code = f"import os, sys; os.path.exists({str(flag)!r}) or sys.exit(2); " + SERVE
    async with bench(tmp_path) as b:
        process = b.start(code)
        assert await process.reaches(State.FAILED, timeout=LIMIT)
        flag.touch()
        process.revive()
        assert await process.reaches(State.READY, timeout=LIMIT)


async def test_a_command_that_cannot_be_started_fails_with_the_reason(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    async with bench(tmp_path) as b:
        process = b.start("", command=(missing,))
        assert await process.reaches(State.FAILED, timeout=LIMIT)
        assert "No such file" in process.reason


async def test_a_process_that_is_not_ready_in_time_is_killed(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        process = b.start("import time; time.sleep(60)", ready_within=0.3)
        assert await process.reaches(State.BACKOFF, timeout=LIMIT)
        assert process.reason == "killed by SIGKILL: not ready within 0.3 s"


async def test_stop_lets_a_process_finish(tmp_path: Path) -> None:
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (print('drained'), sys.exit(0))); " + SERVE
    async with bench(tmp_path) as b:
        process = b.start(code)
        await process.reaches(State.READY, timeout=LIMIT)
        process.stop()
        assert await process.reaches(State.STOPPED, timeout=LIMIT)
        assert "drained" in b.lines
        assert b.states[-2:] == [State.DRAINING, State.STOPPED]


async def test_a_process_that_will_not_stop_is_killed_after_its_grace(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SERVE
    async with bench(tmp_path) as b:
        process = b.start(code, grace=0.2)
        await process.reaches(State.READY, timeout=LIMIT)
        process.stop()
        assert await process.reaches(State.STOPPED, timeout=LIMIT)


async def test_stop_ends_the_wait_for_the_next_start(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        process = b.start("raise SystemExit(1)", policy=RestartPolicy(first=60))
        assert await process.reaches(State.BACKOFF, timeout=LIMIT)
        process.stop()
        assert await process.reaches(State.STOPPED, timeout=LIMIT)
        assert process.restarts == 0


async def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); "
        "print(p.pid); " + SERVE
    )
    async with bench(tmp_path) as b:
        process = b.start(code)
        await process.reaches(State.READY, timeout=LIMIT)
        grandchild = int(await eventually(lambda: next((line for line in b.lines if line.isdigit()), None)) or 0)
        assert process_started(grandchild) is not None
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        # It holds the pipe of its parent open: the end of the parent must be seen all the same.
        assert await process.reaches(State.BACKOFF, State.WAITING, State.STARTING, timeout=LIMIT)
        await eventually(lambda: process_started(grandchild) is None)


async def test_everything_a_process_writes_is_in_its_log(tmp_path: Path) -> None:
    code = "import sys; print('out'); sys.stderr.write('no line end')"
    async with bench(tmp_path) as b:
        process = b.start(code, policy=RestartPolicy(first=60))
        assert await process.reaches(State.BACKOFF, timeout=LIMIT)
    assert sorted((tmp_path / "child.log").read_text().splitlines()) == ["NOW no line end", "NOW out"]


async def test_what_is_no_text_and_has_no_end_does_not_stop_the_log(tmp_path: Path) -> None:
    code = "import sys; sys.stdout.buffer.write(b'\\xff' * 200_000 + b'\\nlast\\n')"
    async with bench(tmp_path) as b:
        process = b.start(code, policy=RestartPolicy(first=60))
        assert await process.reaches(State.BACKOFF, timeout=LIMIT)
        assert b.lines[-1] == "last"
        assert max(map(len, b.lines)) <= 64 * 1024


async def test_nothing_starts_before_what_it_needs(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def may_start() -> None:
        await gate.wait()

    async with bench(tmp_path) as b:
        process = b.start(SERVE)
        process.stop(0)
        await process.reaches(State.STOPPED, timeout=LIMIT)
        waiting = Process(process.spec, process._around, may_start=may_start)
        b.group.create_task(waiting.run())
        assert not await waiting.reaches(State.STARTING, timeout=0.2)
        gate.set()
        assert await waiting.reaches(State.READY, timeout=LIMIT)
        waiting.stop(0.1)


async def test_stop_ends_the_wait_for_what_is_needed(tmp_path: Path) -> None:
    never: Callable[[], asyncio.Future[None]] = asyncio.get_running_loop().create_future
    async with bench(tmp_path) as b:
        process = b.start(SERVE)
        process.stop(0)
        waiting = Process(process.spec, process._around, may_start=lambda: never())
        b.group.create_task(waiting.run())
        await asyncio.sleep(0)
        waiting.stop()
        assert await waiting.reaches(State.STOPPED, timeout=LIMIT)
