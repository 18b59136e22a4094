"""What a coordinator can be told, read once from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast, get_args

from weft.core.retentionconf import Retention
from weft_coordinator.decide.graph import Policy
from weft_protocols.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and times of one coordinator."""

    finished_tasks: int = 10_000
    """Finished tasks that stay in memory; older ones are read from the coordinator's file.
    `WEFT_COORDINATOR_FINISHED`."""
    lease: int = 20
    """Seconds after which a leader that says nothing is replaced. `WEFT_COORDINATOR_LEASE`."""
    state: Path | None = None
    """Directory of the coordinator's file. Default: `coordinator` in the mesh's home directory; for a mesh elsewhere a
    temporary one, so that every start reads the whole stream. `WEFT_COORDINATOR_STATE`."""
    poll: float = 0.25
    """Seconds between looks at the stream when nothing happens; while there is traffic it is looked at more often."""
    beat: float = 1.0
    """Seconds between looks at everything else, and between the parts' ticks."""
    retention: Retention | None = None
    """How long finished tasks stay in the stream. Default: as `mesh.yaml` and `WEFT_RETENTION_…` say."""
    grace: float = 10.0
    """Seconds from its end in which a task stays in the stream in any case."""
    archive_every: float = 10.0
    """Seconds between looks for finished tasks that may leave the stream."""
    look: float = 2.0
    """Seconds between two looks of the watchdog, while this coordinator leads."""
    concurrency: int = 64
    """Requests answered at a time."""
    backlog: int = 2048
    """Requests that may wait for their turn; more are refused at once."""
    backlog_per_caller: int = 1024
    """Of these, the ones of one caller, so that one cannot shut out the others."""
    deadline: float = 4.0
    """Seconds until a read is answered, if only with an error; callers wait 5."""
    change_deadline: float = 20.0
    """Seconds until one of the coordinator's own operations is answered; a change of accounts reloads the broker."""
    drain: float = 5.0
    """Seconds requests under way have when the process is told to stop."""
    victim: Policy = "youngest"
    """Which task of a deadlock gives way: `youngest`, `least-work` or `priority`. `WEFT_COORDINATOR_VICTIM`."""

    @staticmethod
    def load(environment: Mapping[str, str] = os.environ) -> Settings:
        """The defaults, changed by the environment. Raises InvalidConfig for a value that is out of its range."""
        told: dict[str, Any] = {
            name: value
            for name, variable, most, what in _VARIABLES
            if (value := _number(environment, variable, most=most, what=what)) is not None
        }
        if told.get("lease") == 0:
            raise InvalidConfig("WEFT_COORDINATOR_LEASE is 0; it must be at least 1 second")
        named = environment.get("WEFT_COORDINATOR_VICTIM", "")
        if named and named not in get_args(Policy):
            raise InvalidConfig(f"WEFT_COORDINATOR_VICTIM is {named!r}; use one of {', '.join(get_args(Policy))}")
        if named:
            told["victim"] = cast(Policy, named)
        if state := environment.get("WEFT_COORDINATOR_STATE"):
            told["state"] = Path(state).expanduser().absolute()
        return replace(Settings(), **told)


_VARIABLES: Final = (
    ("finished_tasks", "WEFT_COORDINATOR_FINISHED", 10**9, "number of tasks"),
    ("lease", "WEFT_COORDINATOR_LEASE", 3600, "number of seconds"),
)


def _number(environment: Mapping[str, str], variable: str, *, most: int, what: str) -> int | None:
    text = environment.get(variable, "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) > most:
        raise InvalidConfig(f"{variable} is {text!r}; it must be a {what}, at most {most}")
    return int(text)
