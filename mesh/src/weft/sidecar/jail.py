"""Runs a tool server inside a sandbox, and ends everything it started: `jail.py PARENT_PID RULES_JSON COMMAND…`.

Run by path with `python -I` (and `-S`, where sandlock is not used), so it may import nothing of Weft. It stays between
the sidecar and the server: it dies with the sidecar, adopts what the server's processes leave behind, counts them and
their memory, and kills all of it when the server ends or uses too much. Linux only.

`RULES_JSON`: `level` (`sandlock`, `bubblewrap`, `rlimits`), `bwrap` (arguments, the command follows), `sandlock`
(arguments of `sandlock.Sandbox`), `memory`, `processes`, `cpu`, `files`; numbers are 0 for no limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
LOOK = 0.05
"""Seconds between looks at what it uses."""
OVER = 125
"""Exit code where a limit was passed."""
LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = resource.getpagesize()


class Stopped(Exception):
    """The sidecar wants it to end, or is gone."""


def main() -> int:
    """Run the command; the exit code."""
    parent, rules, *command = sys.argv[1:]
    signal.signal(signal.SIGTERM, stop)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != int(parent):
        return 1
    told = json.loads(rules)
    code = 1
    try:
        code = watched(told, command)
    except Stopped:
        code = 128 + signal.SIGTERM
    except OSError as error:
        say(f"it cannot be started: {error.strerror}: {error.filename or command[0]}")
        code = 127
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sweep()
    return code


def stop(*_: object) -> None:
    """SIGTERM."""
    raise Stopped


def say(text: str) -> None:
    """A line among the server's last words."""
    os.write(2, f"sandbox: {text}\n".encode())


def watched(rules: dict[str, Any], command: list[str]) -> int:
    """Start the command, and look after it until it ends; its exit code."""
    done = in_sandlock(rules, command) if rules["level"] == "sandlock" else forked(rules, command)
    while True:
        code = done()
        if code is not None:
            return code
        count, memory = used()
        if rules["processes"] and count > rules["processes"]:
            say(f"it had more than {rules['processes']} processes and was ended")
            return OVER
        if rules["memory"] and memory > rules["memory"]:
            say(f"it used more than {rules['memory'] // 1048576} MiB and was ended")
            return OVER


def forked(rules: dict[str, Any], command: list[str]) -> Callable[[], int | None]:
    """Start the command as a child: within bubblewrap, or with limits only."""
    failed, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(failed)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setpgid(0, 0)
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            limit(rules)
            if rules["level"] == "bubblewrap":
                command = [*rules["bwrap"], *command]
            else:
                LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            os.set_inheritable(report, False)
            os.execvp(command[0], command)  # noqa: S606 - the command is the operator's own
        except OSError as error:
            os.write(report, str(error.errno).encode())
        finally:
            os._exit(127)
    os.close(report)
    told = os.read(failed, 16)
    os.close(failed)
    if told:
        raise OSError(int(told), os.strerror(int(told)), command[0])

    def done() -> int | None:
        until = time.monotonic() + LOOK
        while True:
            try:
                ended, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return 1
            if ended == pid:
                return os.waitstatus_to_exitcode(status) % 256
            if not ended:
                if time.monotonic() > until:
                    return None
                time.sleep(LOOK / 4)

    return done


def in_sandlock(rules: dict[str, Any], command: list[str]) -> Callable[[], int | None]:
    """Start the command within sandlock."""
    import sandlock  # type: ignore[import-untyped,unused-ignore]

    limit({**rules, "memory": 0})
    box = sandlock.Sandbox(**rules["sandlock"])
    inherit = sandlock.StdioMode.INHERIT
    try:
        process = box.popen(command, stdin=inherit, stdout=inherit, stderr=inherit)
    except (sandlock.SandlockError, RuntimeError, ValueError) as error:
        raise OSError(1, f"sandlock refused ({error})", command[0]) from None

    ended: list[Any] = []

    def wait() -> None:
        ended.append(process.wait())

    waiting = threading.Thread(target=wait, daemon=True)  # to wait with a time limit would end it
    waiting.start()

    def done() -> int | None:
        waiting.join(LOOK)
        if waiting.is_alive():
            return None
        if not ended or ended[0].exit_code < 0:
            say(f"it was ended: {ended[0].reason.name.lower() if ended else 'sandlock failed'}")
            return OVER
        return int(ended[0].exit_code) % 256

    return done


def limit(rules: dict[str, Any]) -> None:
    """What the kernel keeps of a single process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for which, key in (
        (resource.RLIMIT_CPU, "cpu"),
        (resource.RLIMIT_NOFILE, "files"),
        (resource.RLIMIT_DATA, "memory"),
    ):
        if rules.get(key):
            most = resource.getrlimit(which)[1]
            value = rules[key]
            value = value if most == resource.RLIM_INFINITY else min(value, most)
            resource.setrlimit(which, (value, value))
    if rules["processes"] and rules["level"] != "sandlock" and os.geteuid():
        # Of all the user's processes; the superuser has no such limit, and is only looked after.
        value = processes_of(os.geteuid()) + rules["processes"]
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NPROC, (value, value))


def processes_of(user: int) -> int:
    """How many processes a user has."""
    count = 0
    for name in os.listdir("/proc"):  # noqa: PTH208 - as in `below`
        try:
            count += name.isdigit() and os.stat(f"/proc/{name}").st_uid == user  # noqa: PTH116
        except OSError:
            continue
    return count


def used() -> tuple[int, int]:
    """Processes that descend from this one, and the memory they have to themselves, in bytes."""
    pids = below()
    memory = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm", "rb") as file:  # noqa: PTH123 - many times a second
                _, resident, shared = file.read().split()[:3]
            memory += max(0, int(resident) - int(shared)) * PAGE
        except (OSError, ValueError):
            continue
    return len(pids), memory


def below() -> dict[int, int]:
    """Every process that descends from this one, with its group."""
    children: dict[int, list[tuple[int, int]]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - many times a second
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    state, parent, group = file.read().rpartition(b")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if state != b"Z":
                children.setdefault(int(parent), []).append((int(name), int(group)))
    found: dict[int, int] = {}
    left = [os.getpid()]
    while left:
        own = children.get(left.pop(), ())
        found.update(own)
        left += [pid for pid, _ in own]
    return found


def sweep() -> None:
    """End every process that descends from this one, however fast they multiply: a group is ended as a whole."""
    own = os.getpgid(0)
    for _ in range(2000):
        found = below()
        if not found:
            return
        for group in set(found.values()) - {own, 0}:
            end(os.killpg, group)
        for pid, group in found.items():
            if group in (own, 0):
                end(os.kill, pid)
        reap()


def end(kill: Callable[[int, int], None], which: int) -> None:
    """SIGKILL to what may be gone already."""
    try:
        kill(which, signal.SIGKILL)
    except OSError:
        return


def reap() -> None:
    """Take note of the children that ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


if __name__ == "__main__":
    sys.exit(main())
