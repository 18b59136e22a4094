"""Which coordinators there are: every one answers for itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from weft_coordinator.service.part import Body, Handler, Part
from weft_protocols import subjects
from weft_protocols.errors import PermissionDenied


class Standing(Part):
    """Operation `coordinators`, which every coordinator hears and answers.

    Args:
        facts: What a coordinator tells of itself.
        projection: What it tells of its read model; nothing where it has none.
    """

    def __init__(
        self,
        facts: Callable[[], dict[str, Any]],
        *,
        projection: Callable[[], Awaitable[dict[str, Any]]] | None = None,
    ) -> None:
        self._facts = facts
        self._projection = projection

    @property
    def operations(self) -> Mapping[str, Handler]:
        """By name."""
        return {"coordinators": self._answer}

    async def _answer(self, body: Body, caller: str) -> dict[str, Any]:
        if caller != subjects.OPERATOR:
            raise PermissionDenied(
                f"coordinators is for the operator of the mesh; connect with identity {subjects.OPERATOR}"
            )
        told = self._facts()
        return {**told, "projection": await self._projection()} if self._projection is not None else told
