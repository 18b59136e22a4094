"""Telling people of incidents: gathered for a moment, sent in the background, tried again until they are taken.

What was told is recorded once it was taken, so a leader that takes over tells nothing twice but what was on its way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from weft.core.supervise import Tasks
from weft.core.watchconf import SEVERITIES, AlertTarget
from weft_coordinator.decide.incidents import Incidents, Notice, notices
from weft_coordinator.service.part import Decide
from weft_coordinator.shell.alerts import Sender
from weft_protocols.errors import InvalidConfig, Unavailable

log = logging.getLogger("weft.coordinator")

BACKOFF: Final = (5.0, 15.0, 60.0, 300.0)
"""Seconds before a message that was not taken is sent again."""
LINES: Final = 20
"""Incidents that one message names."""


@dataclass(slots=True)
class _Target:
    sender: Sender
    work: asyncio.Task[Any] | None = None
    sent: int = 0
    """Messages it took."""
    failed: int = 0
    """Messages it did not take."""
    failures: int = 0
    """Of these, the ones since it took one."""
    problem: str = ""


class Alerts:
    """Tells each target what it has not been told yet.

    Args:
        window: Seconds in which incidents are gathered into one message.
    """

    def __init__(
        self,
        targets: Sequence[AlertTarget],
        *,
        ledger: Incidents,
        decide: Decide,
        window: float,
        clock: Callable[[], int],
    ) -> None:
        self._targets = [_Target(Sender(target)) for target in targets]
        self._ledger = ledger
        self._decide = decide
        self._window = window
        self._clock = clock
        self._tasks = Tasks("alerts")

    @property
    def problem(self) -> str:
        """Why a target cannot be told; empty where all can, as far as is known."""
        return "; ".join(one.problem for one in self._targets if one.failures > 2 or (one.problem and not one.sent))

    def show(self) -> list[dict[str, Any]]:
        """The targets, for the operator."""
        return [
            {
                "target": one.sender.target.name,
                "min_severity": one.sender.target.min_severity,
                "sent": one.sent,
                "failed": one.failed,
                "problem": one.problem,
            }
            for one in self._targets
        ]

    def look(self) -> None:
        """Begin to tell what has not been told."""
        for one in self._targets:
            if (one.work is None or one.work.done()) and self._due(one):
                one.work = self._tasks.start(self._tell(one), name=f"alerts to {one.sender.target.name}")

    def stop(self) -> None:
        """Tell nothing more."""
        for one in self._targets:
            if one.work is not None:
                one.work.cancel()
            one.sender.close()

    async def aclose(self) -> None:
        """Stop, and wait for what was being told."""
        self.stop()
        await self._tasks.aclose()

    def _due(self, one: _Target) -> list[Notice]:
        target = one.sender.target
        return notices(self._ledger, target.name, target.min_severity, self._clock())

    async def _tell(self, one: _Target) -> None:
        await asyncio.sleep(self._window)
        if not (due := self._due(one)):
            return
        title, body, kind = _message(due)
        target = one.sender.target.name
        try:
            await one.sender.send(title, body, kind=kind)
        except (InvalidConfig, Unavailable) as error:
            one.failed += 1
            one.failures += 1
            one.problem = str(error)
            log.error("%d incidents could not be told: %s", len(due), error)
            await asyncio.sleep(BACKOFF[min(one.failures, len(BACKOFF)) - 1])
            return
        one.sent += 1
        one.failures, one.problem = 0, ""
        try:
            await self._decide(lambda _: [notice.event(target) for notice in due])
        except Unavailable as error:
            log.info("%s was told, which is not recorded, so the next leader tells it again: %s", target, error)


def _message(due: Sequence[Notice]) -> tuple[str, str, str]:
    """Title, text and kind of one message about several notices; the worst come first."""
    due = sorted(due, key=lambda one: (one.what == "cleared", -SEVERITIES.index(one.incident.severity)))
    first = due[0]
    told = f"{first.incident.finding.title} ({'over' if first.what == 'cleared' else first.incident.severity})"
    title = f"mesh: {told}" if len(due) == 1 else f"mesh: {len(due)} incidents, the worst: {told}"
    lines = [_line(one) for one in due[:LINES]]
    if len(due) > LINES:
        lines.append(f"and {len(due) - LINES} more: mesh incidents --all")
    kind = "cleared" if first.what == "cleared" else first.incident.severity
    return title, "\n".join(lines), kind


def _line(notice: Notice) -> str:
    incident = notice.incident
    finding = incident.finding
    if notice.what == "cleared":
        return f"cleared: {finding.title} (incident {incident.id})"
    return f"{notice.what}, {finding.severity}: {finding.title}: {finding.cause}. Next: {finding.command} " + (
        f"(incident {incident.id})"
    )
