"""The operation `route`: which agent a task that names only a skill goes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weft_coordinator.decide import routing
from weft_coordinator.decide.presence import Presence
from weft_coordinator.decide.registry import Fields
from weft_coordinator.service.part import Body, Handler, Part
from weft_coordinator.shell.registry import RegistryStore


class Routes(Part):
    """Chooses agents by skill, out of the registry and of what this coordinator heard.

    Args:
        clock: Unix milliseconds.
        random: A number from 0 up to 1.
    """

    def __init__(
        self,
        store: RegistryStore,
        presence: Presence,
        *,
        clock: Callable[[], int],
        random: Callable[[], float],
    ) -> None:
        self._store = store
        self._presence = presence
        self._clock = clock
        self._random = random

    @property
    def operations(self) -> Mapping[str, Handler]:
        """Any coordinator answers."""
        return {"route": self._route}

    async def _route(self, body: Body, caller: str) -> dict[str, Any]:
        """`{skill, exclude}` -> `{agent, candidates}`."""
        fields = Fields(body)
        skill, exclude = fields.text("skill"), fields.texts("exclude")
        fields.check(f"route for {caller}")
        await self._store.sync()
        found = routing.candidates(self._store.records, self._presence, skill=skill, exclude=exclude, now=self._clock())
        return {"agent": routing.choose(found, random=self._random()), "candidates": len(found)}
