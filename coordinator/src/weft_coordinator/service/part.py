"""What one feature of the coordinator consists of: operations, and what it does while its coordinator leads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from weft_coordinator.decide.ledger import Event
from weft_protocols import subjects
from weft_protocols.errors import PermissionDenied, WeftError

Body: TypeAlias = Mapping[str, Any]
Handler: TypeAlias = Callable[[Body, str], Awaitable[dict[str, Any]]]
"""Answers a request: its body, and the caller as the broker stamped it. What it raises is the answer instead."""
Answer: TypeAlias = Callable[[dict[str, Any] | WeftError], None]
"""Sends the answer to a request. Once; a request without a reply subject is answered into the void."""
LeanHandler: TypeAlias = Callable[[Body, str, Answer], None]
"""Takes a request without a task of its own: for what is asked often and decided at once. Must not raise or block."""
Decide: TypeAlias = Callable[[Callable[[int], Sequence[Event]]], Awaitable[list[int]]]
"""Stores what a function of the time decides, as `Leader.decide` does."""


def operator_only(caller: str, operation: str) -> None:
    """PermissionDenied unless the caller is the operator."""
    if caller != subjects.OPERATOR:
        raise PermissionDenied(
            f"{operation} is for the operator of the mesh; connect with identity {subjects.OPERATOR}"
        )


class Part:
    """A feature with nothing in it. Subclasses fill in what they have."""

    @property
    def operations(self) -> Mapping[str, Handler]:
        """Operations that any coordinator answers, one for each request."""
        return {}

    @property
    def leader_operations(self) -> Mapping[str, Handler]:
        """Operations that only the leader answers."""
        return {}

    @property
    def lean_operations(self) -> Mapping[str, LeanHandler]:
        """Operations of the leader that are answered without a task of their own."""
        return {}

    async def lead(self) -> None:
        """This coordinator begins to lead: the ledgers are complete, nothing can be decided before this returns."""

    def deposed(self) -> None:
        """This coordinator leads no more. The ledgers are not to be trusted until `lead`."""

    def beat(self) -> None:
        """About once a second, whoever leads."""

    async def tick(self, now: int) -> None:
        """About once a second while this coordinator leads; `now` is unix milliseconds."""

    async def aclose(self) -> None:
        """The coordinator stops."""
