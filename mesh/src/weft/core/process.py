"""What the processes of a mesh have in common: their log, their loop, and when they leave."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

from weft_protocols.errors import InvalidConfig, WeftError

PARENT: Final = "WEFT_PARENT_FD"
"""Environment variable with a pipe's reading end, whose other end the process that started this one holds."""

_LAUNCH: Final = str(Path(__file__).with_name("launch.py"))


def log_to_stderr() -> None:
    """Log in the form that `mesh logs` reads, from the level that `WEFT_LOG` names."""
    logging.basicConfig(
        level=os.environ.get("WEFT_LOG", "INFO").upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def leave_when_told(leave: Callable[[], None]) -> None:
    """Call `leave` on SIGTERM and SIGINT, and when the process that started this one is gone."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave)
    text = os.environ.get(PARENT, "")
    if text.isdigit():
        fd = int(text)

        def gone() -> None:
            loop.remove_reader(fd)
            leave()

        loop.add_reader(fd, gone)


def dying_with_us(command: Sequence[str], *, number: signal.Signals = signal.SIGKILL) -> tuple[str, ...]:
    """A command that does not outlive this process, however that ends; where the system cannot do that, as it is.

    The system sends it the signal `number`. To be started by the main thread: it is ended with the thread that forked.
    Nothing of this runs between fork and exec, where handlers of other libraries' threads could abort it.
    """
    if sys.platform != "linux":
        return tuple(command)
    return (sys.executable, "-I", "-S", _LAUNCH, str(os.getpid()), str(int(number)), *command)


def say(text: str) -> None:
    """A line on standard error, at once: whoever started this process waits for it."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def grace() -> float:
    """Seconds that requests under way have when the process is told to leave, as `WEFT_GRACE` says.

    Raises InvalidConfig.
    """
    text = os.environ.get("WEFT_GRACE", "10")
    try:
        return max(0.0, float(text))
    except ValueError:
        raise InvalidConfig(f"WEFT_GRACE is {text!r}; it must be a number of seconds") from None


def run(name: str, serve: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Do what a process is for, to its end; its exit code. An error of ours is said, and has its own code."""
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve())
    except WeftError as error:
        say(f"{name}: {error}")
        return error.exit_code
    return 0


def collect_seldom() -> None:
    """Look for cycles among new objects less often, and never among those that are here now.

    What is loaded stays, and what a request leaves in cycles is little: looking after every 700 objects is dear.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
