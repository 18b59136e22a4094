"""The coordinator's own operations, answered on `mesh.coord.{operation}.{caller}`: JSON in and out."""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Final

from weft.core.home import process_started
from weft_coordinator.decide import pinning, registry
from weft_coordinator.decide.index import TaskIndex
from weft_coordinator.decide.presence import Heartbeat, Presence
from weft_coordinator.decide.registry import AgentRecord, Fields
from weft_coordinator.decide.watchdog import Stall
from weft_coordinator.service.cards import CardService
from weft_coordinator.service.part import Body, Handler, Part, operator_only
from weft_coordinator.shell.mesh import LocalMesh
from weft_coordinator.shell.tail import Tail
from weft_protocols import cards, subjects
from weft_protocols.errors import InvalidParams, ParseError, PermissionDenied
from weft_protocols.states import State

MAX_STALLED: Final = 100
"""Tasks without progress of one replica's report."""


class Operations(Part):
    """Registry, presence, accounts, status.

    Args:
        cards: Publishes agents' cards out of the registry.
        local: The mesh's home directory, if it is here.
        ensure: Makes the streams, and the consumers of the agents named, exist.
        facts: What `status` tells of the process itself.
        clock: Unix milliseconds.
    """

    def __init__(
        self,
        *,
        index: TaskIndex,
        tail: Tail,
        cards: CardService,
        local: LocalMesh,
        ensure: Callable[[tuple[str, ...]], Awaitable[object]],
        facts: Callable[[], dict[str, Any]],
        clock: Callable[[], int],
    ) -> None:
        self._index = index
        self._tail = tail
        self._store = cards.store
        self._cards = cards
        self._local = local
        self._ensure = ensure
        self._facts = facts
        self._clock = clock
        self.presence = Presence(clock())
        self.projection: Callable[[], Awaitable[dict[str, Any]]] = _nothing
        """What `status` tells of the projection."""
        self._operations: dict[str, Handler] = {
            "register": self._register,
            "heartbeat": self._heartbeat,
            "leave": self._leave,
            "agents": self._agents,
            "card": self._card,
            "pin": self._pin,
            "status": self._status,
            "agent-add": self._agent_add,
            "agent-revoke": self._agent_revoke,
        }

    @property
    def operations(self) -> Mapping[str, Handler]:
        """By name."""
        return self._operations

    # Replicas ----------------------------------------------------------------------------------

    async def _register(self, body: Body, caller: str) -> dict[str, Any]:
        wanted = registry.registration(body, caller=caller, now=self._clock())
        declared = self._local.agents()
        if declared and wanted.agent not in declared:
            raise PermissionDenied(f"{wanted.agent} is not an agent of this mesh but a caller")
        if len(data := json.dumps(wanted.shown.skills)) > registry.MAX_BODY:
            raise InvalidParams(f"the skills of {wanted.agent} have {len(data)} bytes; {registry.MAX_BODY} fit")

        def decide(record: AgentRecord | None) -> AgentRecord:
            return registry.admit(record, wanted, presence=self.presence, ended=_ended(record), now=self._clock())

        record = await self._store.change(wanted.agent, decide)
        self.presence.forget(wanted.agent, wanted.replica.replica)
        await self._ensure((wanted.agent,))
        current = record.cards.shown if record is not None else wanted.shown
        return {
            "agent": wanted.agent,
            "replica": wanted.replica.replica,
            "progress_within": self._local.watch()[0].budget(wanted.agent),
            "card": {"current": current.digest == wanted.shown.digest, "version": current.version},
        }

    async def _heartbeat(self, body: Body, caller: str) -> dict[str, Any]:
        """A sign of life; `known` is false for a replica that must register (again)."""
        fields = Fields(body)
        replica = fields.token("replica")
        heartbeat = Heartbeat(
            fields.choice("state", ("ready", "draining")),
            fields.number("active", default=0),
            fields.number("waiting", default=0),
            fields.number("slots", default=0),
            fields.number("done", default=0),
            fields.number("failed", default=0),
            fields.number("last_progress", default=0),
            self._clock(),
            _stalled(body.get("stalled")),
        )
        fields.check(f"heartbeat of {caller}")
        if not self._knows(caller, replica):
            await self._store.sync()
        known = self._knows(caller, replica)
        if known:
            self.presence.heard(caller, replica, heartbeat)
        return {"known": known}

    def _knows(self, agent: str, replica: str) -> bool:
        record = self._store.get(agent)
        return record is not None and replica in record.replicas

    async def _leave(self, body: Body, caller: str) -> dict[str, Any]:
        fields = Fields(body)
        replica = fields.token("replica")
        fields.check(f"leave of {caller}")

        def decide(record: AgentRecord | None) -> AgentRecord | None:
            return None if record is None else registry.leave(record, replica)

        await self._store.change(caller, decide)
        self.presence.forget(caller, replica)
        return {"replica": replica}

    # Views -------------------------------------------------------------------------------------

    async def _agents(self, body: Body, caller: str) -> dict[str, Any]:
        """All agents, or those that match the patterns `name`, `skill` and `tag`."""
        fields = Fields(body)
        name, skill, tag = (fields.text(one, default="") for one in ("name", "skill", "tag"))
        fields.check("agents")
        await self._store.sync()
        replicas, now = caller == subjects.OPERATOR, self._clock()
        records = sorted(self._store.records.values(), key=lambda record: record.agent)
        return {
            "agents": [
                registry.show(one, self.presence, now=now, replicas=replicas)
                for one in records
                if cards.matches(one.agent, one.skills, name=name, skill=skill, tag=tag)
            ]
        }

    async def _card(self, body: Body, caller: str) -> dict[str, Any]:
        """The current card of an agent; for the operator with the cards it had before."""
        fields = Fields(body)
        agent = fields.text("agent")
        fields.check("card")
        told = await self._cards.current(agent)
        if caller == subjects.OPERATOR:
            told["history"] = self._store.records[agent].cards.history()
        return told

    async def _pin(self, body: Body, caller: str) -> dict[str, Any]:
        """Make an earlier card of an agent the current one."""
        operator_only(caller, "pin")
        fields = Fields(body)
        agent, what = fields.text("agent"), fields.text("card")
        fields.check("pin")

        def decide(record: AgentRecord | None) -> AgentRecord | None:
            if record is None:
                return None
            return replace(record, cards=pinning.pin(record.cards, what, agent=agent))

        await self._store.sync()
        registry.known(self._store.records, agent)
        await self._store.change(agent, decide)
        shown = registry.known(self._store.records, agent).cards.shown
        return {"agent": agent, "version": shown.version, "digest": shown.digest}

    async def _status(self, body: Body, caller: str) -> dict[str, Any]:
        operator_only(caller, "status")
        await self._tail.sync()
        await self._store.sync()
        states = {State(state).label: count for state, count in sorted(self._index.states.items()) if count}
        return {
            **self._facts(),
            "projection": await self.projection(),
            "tasks": {"total": len(self._index), "states": states, "skipped": self._index.skipped},
            "read": asdict(self._index.watermark),
            "dead_letters": len(self._index.dead),
            "agents": (await self._agents({}, caller))["agents"],
        }

    # Accounts ----------------------------------------------------------------------------------

    async def _agent_add(self, body: Body, caller: str) -> dict[str, Any]:
        operator_only(caller, "agent-add")
        fields = Fields(body)
        name, kind = fields.token("name"), fields.text("kind", default="agent")
        fields.check("agent-add")
        await self._local.add(subjects.check_name(name, f"{kind} name"), kind)
        if kind == "agent":
            await self._ensure((name,))
        return {"name": name, "kind": kind}

    async def _agent_revoke(self, body: Body, caller: str) -> dict[str, Any]:
        """Its tasks stay, and can be read by those who sent them."""
        operator_only(caller, "agent-revoke")
        fields = Fields(body)
        name = fields.token("name")
        fields.check("agent-revoke")
        kind = await self._local.revoke(name)
        if self._store.get(name) is not None:
            await self._store.change(name, lambda record: None if record is None else registry.revoke(name))
        self.presence.forget(name)
        return {"name": name, "kind": kind}


def parsed(data: bytes) -> Body:
    """The request's JSON object; nothing at all counts as an empty one."""
    try:
        body = json.loads(data) if data else {}
    except ValueError as error:
        raise ParseError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ParseError("the body is not a JSON object")
    return body


def _stalled(told: Any) -> tuple[Stall, ...]:
    """The tasks without progress that a replica reports; what is none is left out."""
    found = []
    for one in told[:MAX_STALLED] if isinstance(told, list) else ():
        match one:
            case [str(task), int(since), str(what)] if subjects.TASK_ID.match(task):
                found.append(Stall(task, since, what[:160]))
    return tuple(found)


async def _nothing() -> dict[str, Any]:
    return {}


def _ended(record: AgentRecord | None) -> frozenset[str]:
    """Replicas on this machine whose process is gone, so that their name need not wait to become stale."""
    here = socket.gethostname()
    local = [one for one in (record.replicas.values() if record is not None else ()) if one.host == here and one.pid]
    return frozenset(one.replica for one in local if process_started(one.pid) is None)
