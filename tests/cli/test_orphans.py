"""Nothing outlives a supervisor that was killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from weft.core.home import process_started

OWNER = """
import subprocess, sys, time
from weft.cli.supervisor.guard import Guard

guard = Guard()
guard.start()
code = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " \\
       "print(subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']).pid, flush=True); " \\
       "time.sleep(60)"
child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
gone = subprocess.Popen([sys.executable, "-S", "-c", ""], start_new_session=True)
gone.wait()
guard.add(child.pid)
guard.add(gone.pid)
guard.remove(gone.pid)
print(child.pid, child.stdout.readline().strip(), guard._process.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[str]]:
    """A process with a guard, a child, and a child of that child."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    with process:
        yield process
        process.kill()


def test_the_guardian_ends_children_and_their_children(owner: subprocess.Popen[str], until: Callable[..., Any]) -> None:
    assert owner.stdout is not None
    line = owner.stdout.readline()
    child, grandchild, guardian = map(int, line.split())
    assert all(process_started(pid) for pid in (child, grandchild, guardian))
    owner.kill()
    for pid in (child, grandchild, guardian):
        until(lambda pid=pid: process_started(pid) is None)


def test_the_guardian_survives_a_signal_to_everybody(owner: subprocess.Popen[str], until: Callable[..., Any]) -> None:
    assert owner.stdout is not None
    line = owner.stdout.readline()
    child, grandchild, guardian = map(int, line.split())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guardian, number)
    owner.kill()
    for pid in (child, grandchild):
        until(lambda pid=pid: process_started(pid) is None)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_the_system_itself_ends_a_child_whose_guardian_died_first(until: Callable[..., Any]) -> None:
    launch = Path(__file__).parents[2] / "mesh/src/weft/core/launch.py"
    code = (
        "import os, subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-I', '-S', {str(launch)!r}, str(os.getpid()), "
        "sys.executable, '-S', '-c', 'import time; print(1, flush=True); time.sleep(60)'], "
        "stdout=subprocess.PIPE, text=True); "
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert process_started(child) is not None
        parent.kill()
        until(lambda: process_started(child) is None)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_child_whose_parent_is_gone_already_does_not_begin(tmp_path: Path) -> None:
    launch = Path(__file__).parents[2] / "mesh/src/weft/core/launch.py"
    mark = tmp_path / "began"
    run = subprocess.run(
        [sys.executable, "-I", "-S", str(launch), "1", sys.executable, "-c", f"open({str(mark)!r}, 'w')"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "supervisor ended" in run.stderr
    assert not mark.exists()
