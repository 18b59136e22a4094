"""What a coordinator can be told, read once from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from weft_protocols.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and times of one coordinator."""

    finished_tasks: int = 10_000
    """Finished tasks of which the index remembers where they are; of older ones it keeps what listing needs.
    `WEFT_COORDINATOR_FINISHED`."""
    poll: float = 1.0
    """Seconds between looks at the stream when nobody asks."""
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

    @staticmethod
    def load(environment: Mapping[str, str] = os.environ) -> Settings:
        """The defaults, changed by the environment. Raises InvalidConfig for a value that is no number."""
        text = environment.get("WEFT_COORDINATOR_FINISHED", "")
        if not text:
            return Settings()
        if not text.isdigit() or int(text) > 10**9:
            raise InvalidConfig(f"WEFT_COORDINATOR_FINISHED is {text!r}; it must be a number of tasks")
        return Settings(finished_tasks=int(text))
