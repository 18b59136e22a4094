"""The demo's child processes: ready, killed, ended, and gone with their parent."""

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from weft.core.home import process_started
from weft.core.serverproc import exited
from weft_agents.library.review.processes import Process, Processes
from weft_protocols.errors import Unavailable

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform == "win32", reason="needs process groups"),
]

SERVES = "import sys, signal; print('ready: x', file=sys.stderr, flush=True); signal.pause()"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SERVES}"
LEAVES = "import sys; print('went wrong', file=sys.stderr); sys.exit(3)"
SILENT = "import signal; signal.pause()"


class Ends:
    """Which processes were reported as ended."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def __call__(self, process: Process) -> None:
        self.labels.append(process.label)


async def test_processes_get_ready_and_are_ended_in_order() -> None:
    ends = Ends()
    processes = Processes(ends)
    a = await processes.start("a", ("-c", SERVES), {})
    b = await processes.start("b", ("-c", SERVES), {})
    try:
        await processes.all_ready(10)
        assert not a.ended.is_set()
    finally:
        await processes.stop(grace=5)
    assert (a.inner.returncode, b.inner.returncode) == (-signal.SIGTERM, -signal.SIGTERM)
    assert ends.labels == []
    await processes.stop(grace=5)


async def test_a_stubborn_process_is_killed() -> None:
    processes = Processes(Ends())
    process = await processes.start("a", ("-c", STUBBORN), {})
    try:
        await processes.all_ready(10)
    finally:
        await processes.stop(grace=0.2)
    assert process.inner.returncode == -signal.SIGKILL


async def test_a_process_that_does_not_start_is_reported_with_its_words() -> None:
    processes = Processes(Ends())
    await processes.start("a", ("-c", LEAVES), {})
    try:
        with pytest.raises(Unavailable, match=r"did not start: a ended with code 3; it said:\n +went wrong"):
            await processes.all_ready(10)
    finally:
        await processes.stop(grace=1)


async def test_a_process_that_is_never_ready_is_reported() -> None:
    processes = Processes(Ends())
    await processes.start("slow", ("-c", SILENT), {})
    try:
        with pytest.raises(Unavailable, match=r"not ready within 0\.2 s: slow runs without a word"):
            await processes.all_ready(0.2)
    finally:
        await processes.stop(grace=1)


async def test_a_kill_is_seen_as_an_end() -> None:
    ends = Ends()
    processes = Processes(ends)
    process = await processes.start("a", ("-c", SERVES), {})
    try:
        await processes.all_ready(10)
        processes.kill("a")
        await process.ended.wait()
        assert process.last_words().startswith("a ended with signal 9")
    finally:
        await processes.stop(grace=1)
    assert ends.labels == ["a"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the death signal is Linux's")
async def test_children_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import asyncio\n"
        "from weft_agents.library.review.processes import Processes\n"
        "async def main():\n"
        "    processes = Processes(lambda process: None)\n"
        f"    child = await processes.start('a', ('-c', {STUBBORN!r}), {{}})\n"
        "    await processes.all_ready(10)\n"
        "    print(child.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n",
        encoding="utf-8",
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, program, stdout=asyncio.subprocess.PIPE)
    try:
        assert parent.stdout is not None
        child = int(await parent.stdout.readline())
        assert process_started(child) is not None
    finally:
        parent.kill()
        await parent.communicate()
    await exited(child)
    assert process_started(child) is None
