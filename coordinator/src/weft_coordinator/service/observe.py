"""What the watchdog looks at: registry, presence, the task index, dead letters, the broker's own figures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Final

from weft.core.watchconf import WatchConfig
from weft_coordinator.decide.index import Entry, TaskIndex
from weft_coordinator.decide.presence import Presence
from weft_coordinator.decide.registry import AgentRecord, Replica
from weft_coordinator.decide.watchdog import SILENT, AgentSeen, ApprovalSeen, History, Observed, ReplicaSeen
from weft_coordinator.service.letters import DeadLetters
from weft_coordinator.shell.letters import LetterReader
from weft_coordinator.shell.registry import RegistryStore
from weft_coordinator.shell.watch import BrokerLook, begun_by
from weft_protocols import subjects
from weft_protocols.states import State

TURN: Final = 5000
"""Tasks looked at in one turn of the loop."""
REASON: Final = 200
"""Characters of a dead letter's reason in a finding."""


class Observer:
    """Puts a look at the mesh together.

    Args:
        letters: What was decided about dead letters, and their records.
        approvals: What waits for persons, by agent.
    """

    def __init__(
        self,
        broker: BrokerLook,
        *,
        index: TaskIndex,
        store: RegistryStore,
        presence: Presence,
        letters: tuple[DeadLetters, LetterReader],
        approvals: Callable[[], Mapping[str, tuple[ApprovalSeen, ...]]],
    ) -> None:
        self._broker = broker
        self._index = index
        self._store = store
        self._presence = presence
        self._letters, self._records = letters
        self._approvals = approvals
        self.begin(WatchConfig())

    def begin(self, limits: WatchConfig) -> None:
        """Forget what was seen before, and look under these limits."""
        self._limits = limits
        self._history = History(limits)

    async def look(self, now: int, *, alerts: str, already: Collection[str]) -> Observed:
        """The mesh at `now`, unix milliseconds.

        Args:
            now: When it is.
            alerts: Why people cannot be told.
            already: Keys of open incidents.

        Raises:
            Unreachable, TimedOut: the broker does not say.
        """
        limits, history = self._limits, self._history
        queues = await self._broker.queues()
        records = self._store.records
        history.retried(self._index.retries, now)
        letters = self._letters.undecided(now - int(limits.dead_letters_window * 1000))
        silent = await self._silent(now)
        approvals = self._approvals()
        seen: dict[str, AgentSeen] = {}
        for agent in {*queues, *records, *letters, *silent, *approvals}:
            replicas = self._replicas(agent, records.get(agent), now)
            alive = [name for name, one in replicas.items() if one.state not in SILENT]
            pending, given = queues.get(agent, (0, 0))
            # What a replica handed back, or held when it died, waits as well, and nobody is there to take it.
            history.queue(agent, pending if alive else pending + given, now)
            known = records[agent].replicas if agent in records else {}
            history.registered(agent, {name: one.registered for name, one in known.items()}, alive, now)
            replicas |= silent.get(agent, {})
            dead = letters.get(agent, [])
            seen[agent] = AgentSeen(
                tuple(replicas.values()),
                history.pending(agent),
                history.retries(agent, now),
                history.crashed(agent),
                tuple(entry.task for entry in dead),
                await self._reason(dead),
                approvals.get(agent, ()),
            )
        return Observed(seen, await self._broker.streams(), alerts, already)

    def _replicas(self, agent: str, record: AgentRecord | None, now: int) -> dict[str, ReplicaSeen]:
        """The registered replicas."""
        presence = self._presence
        found: dict[str, ReplicaSeen] = {}
        for name, one in record.replicas.items() if record is not None else ():
            state = presence.state(agent, name, registered=one.registered, now=now)
            stalled = presence.stalled(agent, name) if state not in SILENT else ()
            found[name] = ReplicaSeen(name, state, self._quiet(agent, one, now), stalled)
        return found

    def _quiet(self, agent: str, replica: Replica, now: int) -> int:
        return self._presence.silent(agent, replica.replica, registered=replica.registered, now=now)

    async def _silent(self, now: int) -> dict[str, dict[str, ReplicaSeen]]:
        """Replicas that are silent or registered no more, and still own tasks."""
        records: Mapping[str, AgentRecord] = self._store.records
        owned: dict[tuple[str, str], list[tuple[Entry, int]]] = {}
        for entry, heard in await self._broker.held(await self._suspects(records, now)):
            owned.setdefault((entry.agent, begun_by(entry)), []).append((entry, heard))
        found: dict[str, dict[str, ReplicaSeen]] = {}
        for (agent, name), tasks in owned.items():
            known = records[agent].replicas.get(name) if agent in records else None
            # Of one that is registered no more, its tasks' last events are the last that was heard.
            silent = self._quiet(agent, known, now) if known is not None else now - max(heard for _, heard in tasks)
            if known is not None or silent >= self._limits.lost_after * 1000:
                owns = tuple(entry.task for entry, _ in tasks)
                found.setdefault(agent, {})[name] = ReplicaSeen(name, "gone", silent, (), owns)
        return found

    async def _suspects(self, records: Mapping[str, AgentRecord], now: int) -> list[Entry]:
        """Tasks in work whose replica does not report."""
        reporting: dict[tuple[str, str], bool] = {}
        found = []
        for at, entry in enumerate(self._index.visible(subjects.OPERATOR), start=1):
            if at % TURN == 0:
                await asyncio.sleep(0)
            if entry.state != State.WORKING or not (name := begun_by(entry)):
                continue
            key = (entry.agent, name)
            if key not in reporting:
                known = records[entry.agent].replicas.get(name) if entry.agent in records else None
                reporting[key] = known is not None and (
                    self._presence.state(entry.agent, name, registered=known.registered, now=now) not in SILENT
                )
            if not reporting[key]:
                found.append(entry)
        return found

    async def _reason(self, dead: list[Entry]) -> str:
        """Why the newest of these was given up."""
        if not dead:
            return ""
        (letter,) = await self._records.read(dead[:1])
        return letter.record.reason[:REASON] if letter.record is not None else ""
