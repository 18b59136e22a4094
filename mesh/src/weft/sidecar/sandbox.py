"""In what a stdio server runs: the strongest of sandlock, bubblewrap and mere limits that this machine has.

Which one it is, is said: of everything below what isolates files and network, and of what was switched off, that it
is `degraded`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from weft.core.config import ConnectionSettings
from weft.policy.model import SANDBOXES
from weft.sidecar.guards import SandboxRules
from weft_protocols.errors import ToolError
from weft_protocols.mcp import UPSTREAM_FAILED

NONE, RLIMITS, BUBBLEWRAP, SANDLOCK = SANDBOXES
ISOLATING: Final = (BUBBLEWRAP, SANDLOCK)
FILES: Final = 4096
"""Files that one process may have open."""
JAIL: Final = str(Path(__file__).with_name("jail.py"))
SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt", "/nix", "/proc", "/sys/devices")
"""What every program needs to run; nothing of it is anybody's own."""
DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
CACHES: Final = (".cache", ".npm", ".local/share/uv", ".local/state")
"""Folders of the home that package runners such as npx and uvx write."""
PRIVATE: Final = (
    ".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".config/gcloud", ".config/gh", ".netrc", ".pgpass",
    ".git-credentials", ".npmrc", ".pypirc", ".mozilla", ".config/google-chrome", ".password-store", ".bash_history",
    ".zsh_history",
)  # fmt: skip
"""In the home, what no server needs that was not told so."""
PRIVATE_SYSTEM: Final = ("/etc/shadow", "/etc/gshadow", "/etc/ssl/private", "/etc/sudoers", "/root/.ssh")


@dataclass(frozen=True, slots=True)
class Level:
    """What a server runs in."""

    name: str
    """One of `weft.policy.model.SANDBOXES`."""
    why: str = ""
    """Why it is nothing stronger."""

    @property
    def degraded(self) -> bool:
        """Whether files and network are open to it."""
        return self.name not in ISOLATING


@dataclass(frozen=True, slots=True)
class Jailed:
    """A command as it is run."""

    argv: tuple[str, ...]
    level: Level


@cache
def sandlock_fault() -> str:
    """Why sandlock cannot be used here; empty if it can."""
    if find_spec("sandlock") is None:
        return "sandlock is not installed (pip install sandlock)"
    code = (
        "import sandlock as s, sys\n"
        "if s.landlock_abi_version() < s.min_landlock_abi(): sys.exit('this kernel has no Landlock that will do')\n"
        "r = s.Sandbox(fs_readable=['/'], net_allow=[]).run(['true'], timeout=5)\n"
        "sys.exit(0 if r.success else str(r.error or 'a first try failed'))\n"
    )
    return _fault((sys.executable, "-I", "-c", code), "sandlock")


@cache
def bubblewrap_fault() -> str:
    """Why bubblewrap cannot be used here; empty if it can."""
    found = shutil.which("bwrap")
    if found is None:
        return "bubblewrap is not installed (apt install bubblewrap)"
    probe = (found, "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--unshare-all", "--die-with-parent")
    return _fault((*probe, "true"), "bubblewrap")


def _fault(command: Sequence[str], what: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{what} cannot be used: {type(error).__name__}"
    said = run.stderr.strip().splitlines()
    return f"{what} cannot be used: {said[-1] if said else run.returncode}" if run.returncode else ""


def choose(rules: SandboxRules) -> Level:
    """The level that rules ask for, as far as this machine has it."""
    if rules.off:
        return Level(NONE, "it is switched off")
    if not sys.platform.startswith("linux"):
        return Level(NONE, f"there is none on {sys.platform}")
    fault = sandlock_fault()
    if not fault:
        return Level(SANDLOCK)
    second = bubblewrap_fault()
    return Level(RLIMITS, f"{fault}; {second}") if second else Level(BUBBLEWRAP, fault)


def jailed(
    command: Sequence[str],
    rules: SandboxRules,
    *,
    cwd: str | None,
    private: Sequence[str] = (),
    level: Level | None = None,
) -> Jailed:
    """A command in its sandbox.

    Args:
        command: program and arguments.
        rules: of the server.
        cwd: folder it runs in; that of the sidecar if None.
        private: what it may not read besides what nobody's server may, such as the mesh's own keys.
        level: what it runs in; found out if None.

    Raises:
        ToolError: this machine has nothing that is strong enough.
    """
    level = level or choose(rules)
    if SANDBOXES.index(level.name) < SANDBOXES.index(rules.level or NONE):
        raise ToolError(
            f"it must run in {rules.level} at least, and there is only {level.name}: {level.why}", code=UPSTREAM_FAILED
        )
    if level.name == NONE:
        return Jailed(tuple(command), level)
    folder = cwd or str(Path.cwd())
    reach = _reach(command, rules, folder, private)
    told: dict[str, Any] = {
        "level": level.name,
        "memory": rules.memory,
        "processes": rules.processes,
        "cpu": rules.cpu,
        "files": FILES,
    }
    if level.name == BUBBLEWRAP:
        told["bwrap"] = _bwrap(reach, folder)
    elif level.name == SANDLOCK:
        told["sandlock"] = _sandlock(reach, rules, folder)
    flags = ("-I",) if level.name == SANDLOCK else ("-I", "-S")
    return Jailed((sys.executable, *flags, JAIL, str(os.getpid()), json.dumps(told), *command), level)


@dataclass(frozen=True, slots=True)
class _Reach:
    """Files that can be reached, absolute and existing."""

    read: tuple[str, ...]
    write: tuple[str, ...]
    denied: tuple[str, ...]
    network: bool


def _reach(command: Sequence[str], rules: SandboxRules, folder: str, private: Sequence[str]) -> _Reach:
    home = Path.home()
    denied = [*PRIVATE_SYSTEM, *(str(home / one) for one in PRIVATE), *private]
    if rules.read is None:
        read = ["/"]
    else:
        program = shutil.which(command[0]) or command[0]
        bases = [Path(program).resolve().parent, sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib")]
        read = [*SYSTEM, *map(str, bases), *(_absolute(one, folder) for one in rules.read)]
        named = [_absolute(one, folder) for one in rules.read]
        denied = [one for one in denied if one not in named]
    if rules.write is None:
        write = [folder, tempfile.gettempdir(), *(str(home / one) for one in CACHES)]
    else:
        write = [_absolute(one, folder) for one in rules.write]
        denied = [one for one in denied if one not in write]
    return _Reach(_existing(read), _existing(write), _existing(denied), rules.network)


def _absolute(path: str, folder: str) -> str:
    return str(Path(folder) / Path(path).expanduser())


def _existing(paths: Sequence[str]) -> tuple[str, ...]:
    """Those that are there, by their real names too, each once."""
    found: dict[str, None] = {}
    for one in paths:
        path = Path(one)
        if path.exists():
            found[str(path.absolute())] = None
            found[str(path.resolve())] = None
    return tuple(found)


def _sandlock(reach: _Reach, rules: SandboxRules, folder: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "fs_readable": list(reach.read),
        "fs_writable": [*reach.write, *_existing(DEVICES)],
        "fs_denied": list(reach.denied),
        "net_allow": ["*:*", "udp://*:*"] if reach.network else [],
        "net_allow_bind": ["*"] if reach.network else [],
        "max_processes": rules.processes,
        "no_coredump": True,
        "cwd": folder,
    }
    if rules.memory:
        made["max_memory"] = rules.memory
    return made


def _bwrap(reach: _Reach, folder: str) -> list[str]:
    made = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--unshare-user-try", "--unshare-pid"]
    made += ["--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if not reach.network:
        made.append("--unshare-net")
    if "/" in reach.read:
        made += ["--ro-bind", "/", "/"]
    else:
        made += ["--tmpfs", "/tmp"]  # noqa: S108 - its own, and nobody else's files in it
        for one in reach.read:
            link = Path(one).is_symlink()
            made += ["--symlink", str(Path(one).readlink()), one] if link else ["--ro-bind-try", one, one]
    made += ["--proc", "/proc", "--dev", "/dev"]
    for one in reach.write:
        made += ["--bind", one, one]
    shown = [Path(one) for one in (*reach.read, *reach.write)]
    for one in reach.denied:
        if not any(Path(one).is_relative_to(base) for base in shown):
            continue
        made += ["--tmpfs", one] if Path(one).is_dir() else ["--ro-bind", "/dev/null", one]
    return [*made, "--chdir", folder, "--"]


def private_of(settings: ConnectionSettings) -> tuple[str, ...]:
    """What of a mesh no server may read: its folder, and the key of the sidecar."""
    return tuple(str(one) for one in (settings.home, settings.seed_file) if one is not None)
