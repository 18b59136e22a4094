"""What the processes of a mesh have in common: their log, their loop, and when they leave."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Final

PARENT: Final = "WEFT_PARENT_FD"
"""Environment variable with a pipe's reading end, whose other end the process that started this one holds."""


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


def collect_seldom() -> None:
    """Look for cycles among new objects less often, and never among those that are here now.

    What is loaded stays, and what a request leaves in cycles is little: looking after every 700 objects is dear.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
