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
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_system_itself_ends_a_child_whose_guardian_died_first(
    number: signal.Signals, until: Callable[..., Any], tmp_path: Path
) -> None:
    mark = tmp_path / "told"
    child = (
        "import signal, sys; "
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(mark)!r}, 'w').close(), sys.exit())); "
        "print(1, flush=True); signal.sigtimedwait([signal.SIGUSR1], 60)"
    )
    code = (
        "import signal, subprocess, sys\nfrom weft.core.process import dying_with_us\n"
        f"argv = dying_with_us([sys.executable, '-S', '-c', {child!r}], number=signal.Signals({int(number)}))\n"
        "p = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)\n"
        "p.stdout.readline(); print(p.pid, flush=True); p.wait(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert process_started(pid) is not None
        parent.kill()
        until(lambda: process_started(pid) is None)
    assert mark.exists() == (number is signal.SIGTERM)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_child_whose_parent_is_gone_already_does_not_begin(tmp_path: Path) -> None:
    mark = tmp_path / "began"
    code = (
        "import sys; from weft.core.process import dying_with_us; "
        f"print('\\n'.join(dying_with_us([sys.executable, '-c', \"open({str(mark)!r}, 'w')\"])))"
    )
    argv = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    run = subprocess.run(argv.splitlines(), capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "ended before it began" in run.stderr
    assert not mark.exists()
