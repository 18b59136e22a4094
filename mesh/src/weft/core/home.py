"""The home directory of a mesh on one machine, `.weft/`: where things are, and how its files are written."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from weft_protocols.errors import InvalidConfig

HOME_NAME: Final = ".weft"
MEMBERS: Final = ("coordinator", "gateway", "sidecar", "operator", "SYS")
"""Identities of the mesh itself: all in account MESH, but the system account's."""
_LINUX: Final = sys.platform.startswith("linux")


@dataclass(frozen=True, slots=True)
class Home:
    """Paths of one mesh's home directory. Nothing here touches the disk."""

    root: Path

    @property
    def broker_file(self) -> Path:
        """Where the running broker is: see `BrokerRecord`."""
        return self.root / "broker.json"

    @property
    def gateway_file(self) -> Path:
        """Where this machine's first gateway is: see `GatewayRecord`."""
        return self.root / "gateway.json"

    @property
    def sidecar_file(self) -> Path:
        """Where this machine's sidecar is: see `SidecarRecord`."""
        return self.root / "sidecar.json"

    @property
    def accounts_file(self) -> Path:
        """Who may connect: see `Accounts`."""
        return self.root / "accounts.json"

    @property
    def keys(self) -> Path:
        """Directory of the seeds."""
        return self.root / "keys"

    @property
    def broker(self) -> Path:
        """Directory of the embedded server."""
        return self.root / "broker"

    @property
    def logs(self) -> Path:
        """Directory of the processes' logs."""
        return self.root / "logs"

    def seed(self, identity: str) -> Path:
        """File of an identity's seed."""
        return self.keys / f"{identity}.nk"


@dataclass(frozen=True, slots=True)
class BrokerRecord:
    """`broker.json`: the server of this home as its starter left it."""

    url: str
    pid: int
    started: str
    """The process's start time as the system tells it, so that a reused pid is not taken for the server."""
    durability: str
    port: int
    """Kept for the next start, so that clients find the broker again."""
    max_file_store: int
    """Bytes JetStream may use on disk."""

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return self.pid > 0 and process_started(self.pid) == self.started

    def write(self, home: Home) -> None:
        """Write `broker.json` atomically."""
        write_private(home.broker_file, _json(asdict(self)))

    @classmethod
    def read(cls, home: Home) -> BrokerRecord | None:
        """The record, or None if there is none or an unreadable one."""
        try:
            raw = json.loads(home.broker_file.read_bytes())
            return cls(
                str(raw["url"]),
                int(raw["pid"]),
                str(raw["started"]),
                str(raw["durability"]),
                int(raw["port"]),
                int(raw["max_file_store"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class GatewayRecord:
    """`gateway.json`: a gateway of this machine as it serves, or as it served last, for the next one's ports."""

    http: str
    """Base address of HTTP without a slash at the end, such as `http://127.0.0.1:8080`."""
    grpc: str
    """`host:port` of gRPC."""
    pid: int
    started: str
    """The process's start time as the system tells it, so that a reused pid is not taken for it."""

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return self.pid > 0 and process_started(self.pid) == self.started

    def write(self, home: Home) -> None:
        """Write `gateway.json` atomically."""
        write_private(home.gateway_file, _json(asdict(self)))

    @classmethod
    def read(cls, home: Home) -> GatewayRecord | None:
        """The record, or None if there is none or an unreadable one."""
        try:
            raw = json.loads(home.gateway_file.read_bytes())
            return cls(str(raw["http"]), str(raw["grpc"]), int(raw["pid"]), str(raw["started"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class SidecarRecord:
    """`sidecar.json`: a sidecar of this machine as it serves, or as it served last, for the next one's port."""

    url: str
    """Base address of its HTTP front."""
    pid: int
    started: str
    """The process's start time as the system tells it, so that a reused pid is not taken for it."""

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return self.pid > 0 and process_started(self.pid) == self.started

    def write(self, home: Home) -> None:
        """Write `sidecar.json` atomically."""
        write_private(home.sidecar_file, _json(asdict(self)))

    @classmethod
    def read(cls, home: Home) -> SidecarRecord | None:
        """The record, or None if there is none or an unreadable one."""
        try:
            raw = json.loads(home.sidecar_file.read_bytes())
            return cls(str(raw["url"]), int(raw["pid"]), str(raw["started"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class Accounts:
    """`accounts.json`: the public key of everybody who may connect, by name."""

    agents: dict[str, str]
    callers: dict[str, str]
    members: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Every identity."""
        return (*self.members, *self.agents, *self.callers)

    def write(self, home: Home) -> None:
        """Write `accounts.json` atomically."""
        write_private(home.accounts_file, _json(asdict(self)))

    @classmethod
    def read(cls, home: Home) -> Accounts:
        """The accounts; empty if there is no file. Raises InvalidConfig if it cannot be read."""
        try:
            raw = json.loads(home.accounts_file.read_bytes())
        except FileNotFoundError:
            return cls({}, {}, {})
        except ValueError as error:
            raise _damaged(home.accounts_file, error) from None
        try:
            return cls(*({str(k): str(v) for k, v in raw[part].items()} for part in ("agents", "callers", "members")))
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(home.accounts_file, error) from None


def make_private_directory(path: Path) -> None:
    """Create a directory of mode 0700, or make an existing one that."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file atomically, mode 0600, and have it on disk on return."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise


def process_started(pid: int) -> str | None:
    """When a process was started, in the system's own terms; None if it is gone (or a zombie)."""
    if _LINUX:
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = shown.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _damaged(path: Path, error: Exception) -> InvalidConfig:
    return InvalidConfig(
        f"{path} is damaged ({error}); restore it, or delete it and run `mesh up`, which declares the "
        "agents of mesh.yaml again and keeps their keys"
    )
