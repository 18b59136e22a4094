"""Configuration of the coordinator: section `coordinator` of `mesh.yaml`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from weft.core.yamlfields import did_you_mean, integer

if TYPE_CHECKING:
    import yaml

_T = TypeVar("_T")
VICTIMS: Final = ("youngest", "least-work", "priority")
"""Which task of a deadlock can be told to give way."""
MOST_COORDINATORS: Final = 16


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """The coordinators that `mesh up` runs, and what they decide by."""

    replicas: int = 1
    """How many. One leads, the others answer reads and stand by."""
    victim: str = ""
    """Which task of a deadlock gives way, one of `VICTIMS`; empty for the coordinator's default, the youngest."""
    lease: int = 0
    """Seconds after which a leader that says nothing is replaced; 0 for the coordinator's default, 20."""

    @property
    def environment(self) -> dict[str, str]:
        """What its process is told of it."""
        told = {"WEFT_COORDINATOR_VICTIM": self.victim, "WEFT_COORDINATOR_LEASE": str(self.lease or "")}
        return {name: value for name, value in told.items() if value}


class Reader(Protocol):
    """What reading this section needs of the reader of `mesh.yaml`."""

    def value(self, fields: Mapping[str, yaml.Node], where: str, default: _T, read: Callable[[str], _T]) -> _T:
        """One field's value, else the default."""
        ...

    def mapping(self, node: yaml.Node, where: str, known: tuple[str, ...] | None) -> dict[str, yaml.Node]:
        """Entries of a mapping."""
        ...


def read_coordinator(reader: Reader, node: yaml.Node | None) -> CoordinatorConfig:
    """The section `coordinator`; mistakes are the reader's."""
    base = CoordinatorConfig()
    if node is None:
        return base
    fields = reader.mapping(node, "coordinator", ("replicas", "victim", "lease"))
    return CoordinatorConfig(
        replicas=reader.value(fields, "coordinator.replicas", base.replicas, integer(1, MOST_COORDINATORS)),
        victim=reader.value(fields, "coordinator.victim", base.victim, _victim),
        lease=reader.value(fields, "coordinator.lease", base.lease, integer(1, 3600)),
    )


def _victim(text: str) -> str:
    if text not in VICTIMS:
        raise ValueError(f"{text!r} is unknown{did_you_mean(text, VICTIMS)}; use one of {', '.join(VICTIMS)}")
    return text
