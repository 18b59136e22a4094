"""Tasks that start by the clock: the leader gives the broker what `mesh.yaml` says, and starts what is due.

The broker keeps the time. A task's message has an id made of its schedule and the time it was due, so it is the same
task whoever starts it, however often. What is due stays with the broker until its task is accepted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from a2a.types import a2a_pb2 as pb

from weft.core import cron
from weft.core.broker import Broker
from weft.core.pull import Delivery
from weft.core.scheduleconf import ScheduleConfig
from weft_coordinator.decide.schedules import UNSCHEDULED, Scheduled, Schedules
from weft_coordinator.service.due import KEPT, SCHEDULE, TARGET, ZONE
from weft_coordinator.service.part import Body, Handler, Part, operator_only
from weft_coordinator.shell.leader import Leader
from weft_coordinator.shell.mesh import LocalMesh
from weft_protocols import a2a, ids, subjects
from weft_protocols import headers as h
from weft_protocols.errors import ApiError, Conflict, InvalidConfig
from weft_protocols.parts import Text
from weft_protocols.resources import COORD, DUE, SCHEDULES

log = logging.getLogger("weft.coordinator")

CRON: Final = "c-"
"""Beginning of the names of schedules."""
KEEP: Final = "168h"
"""How long the broker keeps what is due: the longest time without a coordinator after which it is still started."""
ORIGIN: Final = "schedule"


class Scheduling(Part):
    """Reconciles, starts, lists.

    Args:
        local: Where `mesh.yaml` is; schedules are left alone where it is not on this machine.
        ledger: Of schedules.
    """

    def __init__(self, broker: Broker, *, local: LocalMesh, ledger: Schedules, leader: Leader) -> None:
        self._broker = broker
        self._local = local
        self._ledger = ledger
        self._leader = leader
        self._changed = 0
        """When the file was changed that was read last; 0 for none."""

    @property
    def operations(self) -> Mapping[str, Handler]:
        """`schedules`."""
        return {"schedules": self._list}

    # What there is -----------------------------------------------------------------------------

    async def lead(self) -> None:
        """The broker's schedules are compared in the first `tick`."""
        self._changed = 0

    async def tick(self, now: int) -> None:
        """Give the broker what `mesh.yaml` says, when it was changed."""
        changed = self._local.config_mark()
        if not changed or changed == self._changed:
            return
        try:
            wanted = {name: one.told() for name, one in self._local.config().schedules.items()}
        except InvalidConfig as error:
            self._changed = changed
            log.warning("the schedules stay as they are, mesh.yaml is not read: %s", error)
            return
        events, gone = self._ledger.change(wanted)
        await self._leader.decide(lambda _: events)
        for name, told in wanted.items():
            await self._give(name, told)
        for name in gone:
            await self._broker.api(f"STREAM.PURGE.{COORD}", {"filter": f"{SCHEDULES}.{CRON}{name}"})
            await self._leader.decide(lambda _, name=name: [(UNSCHEDULED, name)])  # type: ignore[misc]
            log.info("schedule %s is gone", name)
        self._changed = changed

    async def _give(self, name: str, told: Mapping[str, Any]) -> None:
        """Have the broker keep a schedule; one that it has stays as it is, so that an interval goes on."""
        subject, body = f"{SCHEDULES}.{CRON}{name}", json.dumps(told, sort_keys=True).encode()
        stored = await self._broker.last(COORD, subject)
        if stored is not None and stored.data == body:
            return
        values = {
            SCHEDULE: str(told["cron"]),
            TARGET: f"{DUE}.{CRON}{name}",
            KEPT: KEEP,
            **({ZONE: str(told["timezone"])} if told.get("timezone") else {}),
        }
        try:
            await self._broker.publish(subject, body, headers=h.block(h.fields(values)))
        except ApiError as error:
            log.error("the broker does not take schedule %s (%s): %s", name, told["cron"], error)
        else:
            log.info("schedule %s: %s", name, told["cron"])

    # What is due -------------------------------------------------------------------------------

    async def due(self, name: str, delivery: Delivery) -> None:
        """Start the task of a time. Raises WeftError where it was not accepted; it comes again then."""
        known = self._ledger.all.get(name)
        if known is None:
            return
        try:
            told = ScheduleConfig.of(json.loads(delivery.data))
        except (ValueError, TypeError, AttributeError) as error:
            log.error("schedule %s: what is due cannot be read: %s", name, error)
            return
        at = _stored_at(delivery)
        if told.missed == "last" and await self._overtaken(delivery):
            log.info("schedule %s: the time %s is left out, a later one is due", name, _iso(at))
            return
        task = await self._start(told, at)
        await self._leader.decide(lambda _: self._ledger.started(name, at, task))

    async def _overtaken(self, delivery: Delivery) -> bool:
        last = await self._broker.last(COORD, delivery.subject)
        return last is not None and last.seq > delivery.sequence

    async def _start(self, told: ScheduleConfig, at: int) -> str:
        """Send the message; its task, which is the same one if it was sent before."""
        message_id = f"{told.name}-{at}"
        task = ids.task_id(told.caller, told.agent, message_id)
        message = pb.Message(message_id=message_id, context_id=told.context or task, role=pb.ROLE_USER)
        message.parts.append(a2a.part_to_proto(Text(told.message)))
        message.metadata.update({"weft.schedule": told.name, "weft.due": _iso(at)})
        if told.skill:
            message.metadata.update({a2a.SKILL: told.skill})
        values = {h.EXPECTED_SEQUENCE: "0", h.VERSION: h.A2A_VERSION, h.ORIGIN: ORIGIN}
        subject = subjects.task(told.agent, ids.slice_of(message.context_id), told.caller, task)
        body = pb.SendMessageRequest(message=message).SerializeToString()
        try:
            await self._broker.publish(subject, body, headers=h.block(h.fields(values)))
        except Conflict:
            log.debug("schedule %s: the task of %s was accepted before", told.name, _iso(at))
        return task

    # What is told ------------------------------------------------------------------------------

    async def _list(self, body: Body, caller: str) -> dict[str, Any]:
        """Every schedule with the times, unix milliseconds, it was last and will next be due."""
        operator_only(caller, "schedules")
        return {"schedules": [_shown(name, one) for name, one in sorted(self._ledger.all.items())]}


def _shown(name: str, one: Scheduled) -> dict[str, Any]:
    told = ScheduleConfig.of(one.told)
    return {
        **told.told(),
        "name": name,
        "since": one.since,
        "last": one.last,
        "task": one.task,
        "next": _next(told, one),
    }


def _next(told: ScheduleConfig, one: Scheduled) -> int:
    """When it is due next, unix milliseconds; 0 where that is not known."""
    try:
        times = cron.parse(told.cron, told.timezone)
    except ValueError:
        return 0  # another version wrote it
    now = datetime.now(UTC)
    if isinstance(times, cron.Cron):
        found = times.after(now)
        return int(found.timestamp() * 1000) if found is not None else 0
    begun, period = one.last or one.since, times.seconds * 1000
    passed = max(0, int(now.timestamp() * 1000) - begun)
    return begun + (passed // period + 1) * period


def _stored_at(delivery: Delivery) -> int:
    """When the broker stored what is due, unix milliseconds: the same whenever it is delivered."""
    return int(delivery.ack.split(".")[7]) // 1_000_000


def _iso(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
