"""The watchdog: looks at the mesh, keeps incidents, tells people of them. Only the leader does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from weft.core.watchconf import AlertTarget, WatchConfig, missing_alerts
from weft_coordinator.decide.incidents import CLEARED, OPENED, Incidents, Judge
from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.registry import Fields
from weft_coordinator.decide.watchdog import findings
from weft_coordinator.service.alerts import Alerts
from weft_coordinator.service.observe import Observer
from weft_coordinator.service.part import Body, Decide, Handler, Part, operator_only
from weft_coordinator.shell.mesh import LocalMesh
from weft_protocols.errors import BrokerError, InvalidParams

log = logging.getLogger("weft.coordinator")

MOST: Final = 1000
"""Incidents of one answer."""


class Watchdog(Part):
    """Finds what is wrong, and answers `incidents`.

    Args:
        look: Seconds between two looks.
        clock: Unix milliseconds.
    """

    def __init__(
        self,
        observer: Observer,
        *,
        local: LocalMesh,
        ledger: Incidents,
        decide: Decide,
        look: float,
        clock: Callable[[], int],
    ) -> None:
        self._observer = observer
        self._local = local
        self._ledger = ledger
        self._decide = decide
        self._every = int(look * 1000)
        self._clock = clock
        self._looked = 0
        self._mark = -1
        self._configured: tuple[WatchConfig, tuple[AlertTarget, ...]] = (WatchConfig(), ())
        self._begin(clock())

    def _begin(self, now: int) -> None:
        limits, targets = self._configured
        self._observer.begin(limits)
        self._judge = Judge(limits.clear_after, since=now)
        self._alerts = Alerts(
            targets, ledger=self._ledger, decide=self._decide, window=limits.alerts_window, clock=self._clock
        )

    @property
    def leader_operations(self) -> Mapping[str, Handler]:
        """By name."""
        return {"incidents": self._incidents}

    async def lead(self) -> None:
        """Look with fresh eyes: what was seen before is in the ledger."""
        self._configure()
        self._restart()

    def deposed(self) -> None:
        """The next leader tells people."""
        self._alerts.stop()

    async def aclose(self) -> None:
        """Tell nobody any more."""
        await self._alerts.aclose()

    def _restart(self) -> None:
        self._alerts.stop()
        self._begin(self._clock())
        if self._configured[1] and (problem := missing_alerts()):
            log.error("%s", problem)

    def _configure(self) -> bool:
        """Read mesh.yaml if it has changed; whether the limits or targets have."""
        mark = self._local.config_mark()
        if mark == self._mark:
            return False
        self._mark = mark
        before, self._configured = self._configured, self._local.watch()
        return before != self._configured

    async def tick(self, now: int) -> None:
        """Look, if it is time, and record what is new."""
        if self._configure():
            self._restart()
        limits = self._configured[0]
        if now - self._looked >= self._every and limits.enabled:
            self._looked = now
            try:
                seen = await self._observer.look(now, alerts=self._alerts.problem, already=self._ledger.open.keys())
            except BrokerError:
                # Nobody was heard of meanwhile: they get the time to say that they are there.
                self._looked = now + int(limits.silent_after * 1000)
                raise
            found = findings(seen, limits, now)
            await self._record(self._judge.look(found, self._ledger, now))
        self._alerts.look()

    async def _record(self, events: Sequence[Event]) -> None:
        if not events:
            return
        for kind, *rest in events:
            if kind == OPENED:
                log.warning("incident opened: %s: %s", rest[0]["title"], rest[0]["cause"])
            elif kind == CLEARED and (over := self._ledger.find(int(rest[0]))) is not None:
                log.info("incident %d cleared: %s", over.id, over.finding.title)
        await self._decide(lambda _: events)

    # Answering ---------------------------------------------------------------------------------

    async def _incidents(self, body: Body, caller: str) -> dict[str, Any]:
        """Incidents, the last one first. For the operator only: they name tasks of every caller."""
        operator_only(caller, "incidents")
        fields = Fields(body)
        state, limit = fields.text("state", default="open"), fields.number("limit", default=100)
        id_ = fields.number("id", default=0)
        if state not in ("open", "all"):
            fields.mistake("state", "must be open or all")
        fields.check("incidents")
        if id_:
            one = self._ledger.find(id_)
            if one is None:
                raise InvalidParams(f"there is no incident {id_}, or it is forgotten")
            chosen = [one]
        else:
            chosen = [*self._ledger.open.values(), *(self._ledger.cleared if state == "all" else ())]
        chosen.sort(key=lambda incident: -incident.id)
        return {
            "incidents": [one.show(self._judge.latest(one.key)) for one in chosen[: min(limit, MOST)]],
            "total": len(chosen),
            "open": len(self._ledger.open),
            "watching": self._configured[0].enabled,
            "alerts": self._alerts.show(),
        }
