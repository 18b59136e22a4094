"""How long the skills of an agent take, to see when a deadline cannot be met. Pure; time comes in as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SAMPLES: Final = 20
"""Runs of a skill below which nothing is known of it."""
SHARE: Final = 0.1
"""How much a new run counts against all before it."""
TRY: Final = 10
"""Every so many tasks that would be given up one is run all the same: how would it be noticed otherwise that they
take less time now?"""


@dataclass(slots=True)
class _Pace:
    mean: float = 0.0
    deviation: float = 0.0
    """Mean of how far runs are from the mean."""
    samples: int = 0
    refused: int = 0


class Paces:
    """Moving averages of what successful runs took, by skill."""

    def __init__(self) -> None:
        self._paces: dict[str, _Pace] = {}

    def took(self, skill: str, seconds: float) -> None:
        """A run succeeded in one go."""
        pace = self._paces.setdefault(skill, _Pace())
        pace.samples += 1
        share = max(SHARE, 1.0 / pace.samples)
        off = seconds - pace.mean
        pace.mean += share * off
        pace.deviation += share * (abs(off) - pace.deviation) if pace.samples > 1 else 0.0

    def hopeless(self, skill: str, left: float) -> float:
        """What a run typically takes, in seconds, where even a quick one is not done within `left`; else 0."""
        pace = self._paces.get(skill)
        if pace is None or pace.samples < SAMPLES or left >= pace.mean - 2.0 * pace.deviation:
            return 0.0
        pace.refused += 1
        return 0.0 if pace.refused % TRY == 0 else pace.mean
