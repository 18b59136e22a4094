"""When an ended process is started again, and when it is given up. Pure: time and chance are arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

FINAL_EXITS: Final[dict[int, str]] = {
    2: "its input or configuration is wrong",
    4: "the broker does not accept its identity",
}
"""Exit codes after which another start cannot help, and what they say (the exit codes of `mesh`)."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often and how soon a process is started again. All times in seconds."""

    first: float = 0.5
    """Pause before the first restart; doubled for each one after it."""
    longest: float = 30.0
    """No pause is longer, jitter apart."""
    jitter: float = 0.2
    """Part of a pause by which chance may lengthen or shorten it, so that replicas do not start in step."""
    healthy_after: float = 60.0
    """Ready for this long, a process has recovered: the next pause is the first again."""
    early: float = 5.0
    """An end so soon after the start is a crash, ready or not."""
    crashes: int = 5
    """So many crashes within `within` seconds are a crash loop: the process is failed."""
    within: float = 60.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How one run of a process ended."""

    code: int
    """Exit code; negative for a signal."""
    ran: float
    """Seconds from start to end."""
    ready: float | None
    """Seconds it was ready; None if it never was."""


@dataclass(slots=True)
class History:
    """The ends of one process so far, and what follows from them."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    _pauses: int = 0
    _crashes: list[float] = field(default_factory=list)

    def next_pause(self, ended: Ended, *, now: float, chance: float) -> float | None:
        """Seconds until the next start; None to give up.

        Args:
            ended: how the process ended just now.
            now: seconds on a clock that never goes back.
            chance: a random number from 0 to 1.
        """
        if ended.code in FINAL_EXITS:
            return None
        policy = self.policy
        if ended.ready is not None and ended.ready >= policy.healthy_after:
            self._pauses = 0
        if ended.ready is None or ended.ran < policy.early:
            self._crashes = [at for at in self._crashes if now - at < policy.within]
            self._crashes.append(now)
            if len(self._crashes) >= policy.crashes:
                return None
        pause = min(policy.longest, policy.first * 2.0**self._pauses)
        self._pauses = min(self._pauses + 1, 30)
        return pause * (1 + policy.jitter * (2 * chance - 1))

    def forget(self) -> None:
        """Start afresh, as after an operator's restart."""
        self._pauses = 0
        self._crashes.clear()


def describe(ended: Ended) -> str:
    """How a process ended, for people: `exit 1`, `killed by SIGKILL`."""
    if ended.code >= 0:
        meaning = FINAL_EXITS.get(ended.code)
        return f"exit {ended.code}" + (f" ({meaning})" if meaning else "")
    from signal import Signals

    try:
        return f"killed by {Signals(-ended.code).name}"
    except ValueError:
        return f"killed by signal {-ended.code}"
