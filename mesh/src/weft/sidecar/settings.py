"""What one tool server may take: read from the `settings` of its registration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from weft.core.yamlfields import did_you_mean
from weft_protocols.errors import InvalidConfig

MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one server, each a key of its `settings`. Times are in seconds."""

    timeout: float = 60.0
    """One call, unless its caller has less time."""
    start_timeout: float = 30.0
    """From the start of a process, or a connection, until the server has said who it is."""
    idle: float = 300.0
    """After which a process that nobody uses is ended."""
    processes: int = 1
    """Processes of a stdio server at a time; the second starts when every other is busy."""
    concurrency: int = 16
    """Calls under way at a time; further ones wait `queue_timeout`, then are refused."""
    concurrency_per_agent: int = 0
    """Calls of one agent under way at a time; 0 for three quarters of all."""
    queue_timeout: float = 5.0
    response_bytes: int = 4 * MIB
    """Of one result."""
    failures: int = 5
    """Failures in a row after which no call is made for `reset` seconds."""
    reset: float = 30.0
    refresh: float = 60.0
    """Age at which the definitions are read again before they are shown."""

    @property
    def share(self) -> int:
        """Places that one agent may have: some are left to others, where there are four or more."""
        return min(self.concurrency, self.concurrency_per_agent or self.concurrency - self.concurrency // 4)


KNOWN: Final = tuple(Limits.__dataclass_fields__)
LATER: Final = (
    "sandbox", "secrets", "lock", "side_effects", "records", "egress", "rate", "redact", "code",
)  # fmt: skip
"""Keys that `weft.sidecar.guards` and other stages read."""


def limits_of(settings: Mapping[str, Any], where: str = "settings") -> Limits:
    """The bounds that `settings` names, and the defaults. Raises InvalidConfig for what it cannot be."""
    given: dict[str, Any] = {}
    for name, value in settings.items():
        if name in LATER:
            continue
        if name not in KNOWN:
            raise InvalidConfig(f"{where} has no {name!r}{did_you_mean(name, (*KNOWN, *LATER))}")
        wanted = type(getattr(Limits(), name))
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise InvalidConfig(f"{where}.{name} must be a number above 0, not {value!r}")
        given[name] = wanted(value)
    return Limits(**given)
