"""What counts as an incident and who is told: sections `watchdog` and `alerts` of `mesh.yaml`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from weft.core.yamlfields import boolean, integer, is_null, seconds
from weft_protocols.errors import InvalidConfig

if TYPE_CHECKING:
    import yaml

_T = TypeVar("_T")
SEVERITIES: Final = ("info", "warning", "critical")
"""From the least to the worst."""
INSTALL: Final = "pip install 'weft[alerts]'"
"""What installs what alerts need."""


@dataclass(frozen=True, slots=True)
class WatchConfig:
    """When the coordinator's watchdog opens an incident. Times are seconds."""

    enabled: bool = True
    """Whether it looks at all."""
    progress_within: float | None = None
    """Time in which a task in work must write an event or finish or begin a step; None leaves it to each agent's
    `Agent(progress_within=…)`, whose default is 600."""
    agents: Mapping[str, float] = field(default_factory=dict)
    """The same for single agents, by name. Replicas are told when they register."""
    clear_after: float = 60.0
    """Time for which the reason must be away before an incident is cleared, so that it does not come and go."""
    retries: int = 20
    """Attempts after the first, of one agent within `retries_window`, that are a storm of retries."""
    retries_window: float = 300.0
    crashes: int = 3
    """Replicas of one agent that began and ended within `crashes_window` that are a crash loop."""
    crashes_window: float = 120.0
    backlog: int = 100
    """Waiting tasks of an agent from which on a growing queue is an incident."""
    backlog_window: float = 30.0
    """Time through which the queue must have grown and never been shorter than at its beginning."""
    unserved_after: float = 30.0
    """Time for which tasks may wait while no replica is ready."""
    dead_letters_window: float = 3600.0
    """Age up to which an undecided dead letter keeps an incident open."""
    dead_letters: int = 100
    """New undecided dead letters of an agent from which on the incident is critical."""
    silent_after: float = 15.0
    """Time for which a replica that owns tasks may be silent."""
    lost_after: float = 120.0
    """Time after which its tasks should have been taken over; later the incident is critical."""
    approval_within: float = 3600.0
    """Time in which somebody should decide about an approval."""
    stream_percent: int = 90
    """Part of a stream's limit, in percent, from which on it is nearly full."""
    alerts_window: float = 10.0
    """Time in which incidents are gathered into one message."""

    def budget(self, agent: str) -> float | None:
        """Seconds in which a task of an agent must make progress, where this file says it."""
        return self.agents.get(agent, self.progress_within)


@dataclass(frozen=True, slots=True)
class AlertTarget:
    """Somebody who is told of incidents. The address often is a secret, so it stands in the environment or a file."""

    url_env: str = ""
    """Environment variable of the coordinator that holds an Apprise address."""
    url_file: Path | None = None
    """File that holds an Apprise address and nothing else."""
    min_severity: str = "warning"
    """The least severity that is told."""

    @property
    def name(self) -> str:
        """What it is called in logs and records: where its address is, never the address."""
        return self.url_env or str(self.url_file)

    def url(self, environment: Mapping[str, str] = os.environ) -> str:
        """The address. Raises InvalidConfig if it is not there."""
        if self.url_file is not None:
            try:
                found = self.url_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidConfig(f"alerts: url_file {self.url_file} cannot be read: {error}") from None
        else:
            found = environment.get(self.url_env, "").strip()
        if not found:
            raise InvalidConfig(
                f"alerts: {self.name} is empty; it must hold an Apprise address such as json://host/path"
            )
        return found


def missing_alerts() -> str:
    """What to do where alerts are configured and cannot be sent; empty if they can."""
    if find_spec("apprise") is not None:
        return ""
    return f"alerts are configured, and the package that sends them is not installed: {INSTALL}"


class Reader(Protocol):
    """What reading these sections needs of the reader of `mesh.yaml`."""

    path: Path

    def value(self, fields: Mapping[str, yaml.Node], where: str, default: _T, read: Callable[[str], _T]) -> _T:
        """One field's value, else the default."""
        ...

    def mapping(self, node: yaml.Node, where: str, known: tuple[str, ...] | None) -> dict[str, yaml.Node]:
        """Entries of a mapping."""
        ...

    def sequence(self, node: yaml.Node | None, where: str, example: str) -> list[yaml.Node]:
        """Entries of a list."""
        ...

    def mistake(self, node: yaml.Node, where: str, what: str) -> None:
        """Remember what is wrong."""
        ...


def _some(text: str) -> float:
    """Reads a positive number of seconds."""
    if (found := seconds(text)) <= 0:
        raise ValueError(f"{text!r} must be more than 0 seconds")
    return found


_COUNT: Final = integer(1, 1_000_000)
_READERS: Final[dict[str, Callable[[str], Any]]] = {
    "enabled": boolean,
    "progress_within": _some,
    "retries": _COUNT,
    "crashes": _COUNT,
    "backlog": _COUNT,
    "dead_letters": _COUNT,
    "stream_percent": integer(1, 100),
}
_EXAMPLE: Final = "[{url_env: SLACK_URL, min_severity: warning}]"


def read_watchdog(reader: Reader, node: yaml.Node | None) -> WatchConfig:
    """The section `watchdog`; mistakes are the reader's."""
    base = WatchConfig()
    if node is None:
        return base
    names = tuple(one.name for one in fields(WatchConfig))
    told = reader.mapping(node, "watchdog", names)
    values = {
        name: reader.value(told, f"watchdog.{name}", getattr(base, name), _READERS.get(name, _some))
        for name in names
        if name != "agents"
    }
    agents: dict[str, float] = {}
    for agent, entry in reader.mapping(told["agents"], "watchdog.agents", None).items() if "agents" in told else ():
        where = f"watchdog.agents.{agent}"
        of_agent = reader.mapping(entry, where, ("progress_within",))
        if within := reader.value(of_agent, f"{where}.progress_within", 0.0, _some):
            agents[agent] = within
    return WatchConfig(agents=agents, **values)


def read_alerts(reader: Reader, node: yaml.Node | None, *, folder: Path) -> tuple[AlertTarget, ...]:
    """The section `alerts`, a list of targets; mistakes are the reader's."""
    targets: list[AlertTarget] = []
    for at, entry in enumerate(reader.sequence(node, "alerts", _EXAMPLE)):
        where = f"alerts[{at}]"
        if is_null(entry):
            reader.mistake(entry, where, f"has no value; write e.g. alerts: {_EXAMPLE}")
            continue
        told = reader.mapping(entry, where, ("url_env", "url_file", "min_severity"))
        if ("url_env" in told) == ("url_file" in told):
            reader.mistake(entry, where, "needs either url_env or url_file: the address never stands in this file")
        file = reader.value(told, f"{where}.url_file", "", str)
        targets.append(
            AlertTarget(
                reader.value(told, f"{where}.url_env", "", _variable),
                folder / file if file else None,
                reader.value(told, f"{where}.min_severity", "warning", _severity),
            )
        )
    return tuple(targets)


def _variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        # Never the text: it may be the secret itself.
        raise ValueError("must name an environment variable; the address itself never stands here")
    return text


def _severity(text: str) -> str:
    if text not in SEVERITIES:
        raise ValueError(f"{text!r} is unknown; use one of {', '.join(SEVERITIES)}")
    return text
