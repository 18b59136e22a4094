"""What the coordinator knows of the mesh it serves from its home directory, and how it changes who may connect."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weft.core.config import CONFIG_NAME, ConnectionSettings, MeshConfig, load_mesh_config
from weft.core.home import Accounts, BrokerRecord, Home
from weft.core.membership import Membership
from weft.core.retentionconf import Retention
from weft.core.watchconf import AlertTarget, WatchConfig
from weft_protocols.errors import InvalidConfig, InvalidParams, Unavailable, UnsupportedOperation

log = logging.getLogger("weft.coordinator")

KINDS: Final = ("agent", "caller")
DEFAULT_DURABILITY: Final = "strict"
"""Of a mesh whose broker is not embedded here and whose profile nobody named."""


@dataclass(frozen=True, slots=True)
class LocalMesh:
    """A mesh by its home directory; without one, a mesh elsewhere."""

    home: Home | None

    @staticmethod
    def of(connection: ConnectionSettings) -> LocalMesh:
        """The mesh a connection belongs to: the one of the settings' home directory if its broker is the one there."""
        home = Home(connection.home) if connection.home is not None else None
        record = BrokerRecord.read(home) if home is not None else None
        return LocalMesh(home if record is not None and record.url == connection.url else None)

    def agents(self) -> tuple[str, ...]:
        """Agents that may connect; none where the broker is elsewhere."""
        return tuple(Accounts.read(self.home).agents) if self.home is not None else ()

    @property
    def state(self) -> Path | None:
        """Where coordinators keep their files; None where the broker is elsewhere."""
        return self.home.root / "coordinator" if self.home is not None else None

    def durability(self) -> str:
        """Name of the durability profile: `WEFT_DURABILITY`, else the running broker's."""
        named = os.environ.get("WEFT_DURABILITY")
        record = BrokerRecord.read(self.home) if self.home is not None else None
        return named or (record.durability if record is not None else DEFAULT_DURABILITY)

    def max_bytes(self) -> int:
        """Limit of the task stream as `mesh.yaml` sets it; -1 for none."""
        if self.home is None or not (config := self.home.root.parent / CONFIG_NAME).is_file():
            return -1
        return load_mesh_config(config).broker.max_bytes

    def config_mark(self) -> int:
        """Changes when `mesh.yaml` does; 0 while there is none."""
        try:
            return self._config.stat().st_mtime_ns if self._config is not None else 0
        except OSError:
            return 0

    def config(self) -> MeshConfig:
        """What `mesh.yaml` says. Raises InvalidConfig where it is wrong or not here."""
        if self._config is None:
            raise InvalidConfig("there is no mesh.yaml here")
        return load_mesh_config(self._config)

    @property
    def _config(self) -> Path | None:
        return self.home.root.parent / CONFIG_NAME if self.home is not None else None

    def retention(self) -> Retention:
        """How long finished tasks stay in the stream: as `mesh.yaml` says, changed by the environment."""
        base = Retention()
        if self._config is not None and self._config.is_file():
            base = load_mesh_config(self._config).retention
        return Retention.load(os.environ, base)

    def watch(self) -> tuple[WatchConfig, tuple[AlertTarget, ...]]:
        """The watchdog's limits and who is told, as `mesh.yaml` sets them; the defaults while it has a mistake."""
        if self._config is None or not self._config.is_file():
            return WatchConfig(), ()
        try:
            read = load_mesh_config(self._config)
        except InvalidConfig as error:
            log.warning("mesh.yaml is not read: %s", error)
            return WatchConfig(), ()
        return read.watchdog, read.alerts

    def approvers(self) -> Mapping[str, tuple[str, ...]] | None:
        """Roles of each person who may decide about approvals; None where `mesh.yaml` names none or is not here.

        Raises InvalidConfig while it has a mistake.
        """
        if self._config is None or not self._config.is_file():
            return None
        return load_mesh_config(self._config).approvers or None

    async def add(self, name: str, kind: str) -> None:
        """Let an agent or a caller connect.

        Raises:
            UnsupportedOperation: the broker's accounts are not files of this machine.
            InvalidParams: `kind` is neither.
            InvalidName, Unavailable, Unreachable, TimedOut: as `Membership.declare`.
        """
        membership, running = self._membership(f"add {kind} {name}")
        if kind == "agent":
            await membership.declare(agents=(name,), running=running)
        elif kind == "caller":
            await membership.declare(callers=(name,), running=running)
        else:
            raise InvalidParams(f"kind {kind!r} is unknown; use one of {', '.join(KINDS)}")

    async def revoke(self, name: str) -> str:
        """Cut an agent or a caller off for good; which of the two it was.

        Raises:
            InvalidParams: there is no such identity.
            UnsupportedOperation: the broker's accounts are not files of this machine.
        """
        membership, running = self._membership(f"revoke {name}")
        accounts = membership.accounts
        kind = "agent" if name in accounts.agents else "caller" if name in accounts.callers else ""
        if not kind:
            known = ", ".join((*accounts.agents, *accounts.callers))
            raise InvalidParams(f"there is no agent or caller {name!r}; there are {known}")
        await membership.revoke(name, running=running)
        return kind

    def _membership(self, what: str) -> tuple[Membership, BrokerRecord]:
        """The accounts of this machine's broker, which runs."""
        record = BrokerRecord.read(self.home) if self.home is not None else None
        if self.home is None or record is None or not self.home.accounts_file.exists():
            raise UnsupportedOperation(
                f"cannot {what} here: the broker of this mesh is not embedded; change its accounts where it is run"
            )
        if not record.alive:
            raise Unavailable(f"cannot {what}: the broker in {self.home.root} is not running")
        return Membership(self.home), record
