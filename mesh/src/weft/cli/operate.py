"""What the operator's commands have in common: a connection, a group with a default, how times and tasks are shown."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from weft.core.broker import Broker

T = TypeVar("T")
SHORT: Final = 8
"""Characters of a task's id that tell it from the others for people."""


class ListingGroup(click.Group):
    """A group that lists where no command is named: its command `list`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Like click's, with `list` in front where no command is named."""
        if not args or (args[0] not in self.commands and args[0].startswith("-") and not self._asks(ctx, args[0])):
            args = ["list", *args]
        return super().parse_args(ctx, args)

    @staticmethod
    def _asks(ctx: click.Context, argument: str) -> bool:
        return argument in ctx.help_option_names


def as_operator(work: Callable[[Broker], Awaitable[T]], *, name: str) -> T:
    """Run `work` with a connection of the operator, called `name` in the broker's lists."""
    from weft.core.broker import Broker
    from weft.core.config import load_settings
    from weft_protocols.subjects import OPERATOR

    async def connected() -> T:
        broker = await Broker.connect(load_settings(OPERATOR), name=name)
        try:
            return await work(broker)
        finally:
            await broker.close()

    return asyncio.run(connected())


def age(milliseconds: int, now: float | None = None) -> float | None:
    """Seconds since a time in unix milliseconds; None for 0."""
    if not milliseconds:
        return None
    return round(max(0.0, (time.time() if now is None else now) - milliseconds / 1000), 3)


def short(task: str) -> str:
    """A task's id for people."""
    return task[:SHORT]


class Since(click.ParamType):  # type: ignore[type-arg]
    """A time: so long ago (`90s`, `15m`, `2h`, `7d`) or RFC 3339. Unix milliseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Unix milliseconds; click's error for what is no time."""
        if isinstance(value, int):
            return value
        from datetime import UTC, datetime

        if (match := re.fullmatch(r"(\d{1,9})([smhd])", value)) is not None:
            ago = int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]
            return max(0, int((time.time() - ago) * 1000))
        try:
            found = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            self.fail(f"{value!r} is no time; write e.g. 15m, 2h, 7d or 2026-01-31T12:00:00Z", param, ctx)
        return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1000)


def sure(question: str, *, yes: bool) -> None:
    """Ask before something that touches many; where nobody can answer, `--yes` has to be given.

    Raises:
        UsageError: nobody can be asked.
        Abort: the answer was no.
    """
    import sys

    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError(f"{question} Say so with --yes.")
    click.confirm(question, abort=True, err=True)


__all__ = ["SHORT", "ListingGroup", "Since", "age", "as_operator", "short", "sure"]
