"""The features of one coordinator put together: their ledgers, then their parts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from weft.core.broker import Broker
from weft.core.history import StreamReader
from weft_coordinator.decide.approvals import Approvals
from weft_coordinator.decide.found import Deadlocks
from weft_coordinator.decide.graph import WaitGraph
from weft_coordinator.decide.incidents import Incidents
from weft_coordinator.decide.index import TaskIndex
from weft_coordinator.decide.ledger import Ledger
from weft_coordinator.decide.letters import Letters
from weft_coordinator.decide.locks import Locks
from weft_coordinator.decide.parked import ParkedTasks
from weft_coordinator.decide.schedules import Schedules
from weft_coordinator.service.approvals import ApprovalPart
from weft_coordinator.service.deadlocks import Detector
from weft_coordinator.service.deciding import Shared, Speaker
from weft_coordinator.service.due import DuePart
from weft_coordinator.service.letters import DeadLetters
from weft_coordinator.service.locks import LockPart
from weft_coordinator.service.observe import Observer
from weft_coordinator.service.operations import Operations
from weft_coordinator.service.part import Part
from weft_coordinator.service.routes import Routes
from weft_coordinator.service.schedules import CRON, Scheduling
from weft_coordinator.service.settings import Settings
from weft_coordinator.service.tree import Trees
from weft_coordinator.service.turns import Turning
from weft_coordinator.service.waking import TIMER, Waking
from weft_coordinator.service.watch import Watchdog
from weft_coordinator.shell.leader import Leader, Terms
from weft_coordinator.shell.letters import LetterReader
from weft_coordinator.shell.mesh import LocalMesh
from weft_coordinator.shell.projection import Projection
from weft_coordinator.shell.registry import RegistryStore
from weft_coordinator.shell.tail import Tail
from weft_coordinator.shell.tasks import TaskReader
from weft_coordinator.shell.watch import BrokerLook


@dataclass(frozen=True, slots=True)
class States:
    """What the log of decisions is folded into."""

    terms: Terms = field(default_factory=Terms)
    parked: ParkedTasks = field(default_factory=ParkedTasks)
    schedules: Schedules = field(default_factory=Schedules)
    locks: Locks = field(default_factory=Locks)
    deadlocks: Deadlocks = field(default_factory=Deadlocks)
    letters: Letters = field(default_factory=Letters)
    incidents: Incidents = field(default_factory=Incidents)
    approvals: Approvals = field(default_factory=Approvals)

    @property
    def ledgers(self) -> Sequence[Ledger]:
        """All of them."""
        return (
            self.terms,
            self.parked,
            self.schedules,
            self.locks,
            self.deadlocks,
            self.letters,
            self.incidents,
            self.approvals,
        )


@dataclass(frozen=True, slots=True)
class Ground:
    """What the parts stand on."""

    broker: Broker
    settings: Settings
    local: LocalMesh
    reader: StreamReader
    index: TaskIndex
    projection: Projection
    tail: Tail
    tasks: TaskReader
    operations: Operations
    store: RegistryStore
    leader: Leader
    clock: Callable[[], int]
    """Unix milliseconds."""


def make_parts(ground: Ground, states: States) -> tuple[Part, ...]:
    """Every part. The first one that has an operation answers it."""
    waking = _waking(ground, states)
    approvals = _approvals(ground, states, waking)
    return (
        ground.operations,
        Routes(ground.store, ground.operations.presence, clock=ground.clock, random=random.random),
        Trees(ground.projection, ground.tail),
        approvals,
        *_waits(ground, states, waking),
        *_locks(ground, states, approvals),
        *_watch(ground, states, approvals),
    )


def _approvals(ground: Ground, states: States, waking: Waking) -> ApprovalPart:
    def replicas(agent: str) -> Collection[str]:
        record = ground.store.get(agent)
        return record.replicas.keys() if record is not None else ()

    part = ApprovalPart(
        states.approvals,
        index=ground.index,
        tail=ground.tail,
        leader=ground.leader,
        local=ground.local,
        speaker=Speaker(ground.broker.send),
        clock=ground.clock,
        told=(replicas, waking.look),
    )
    waking.settled = part.settled
    ground.tail.on_change(part.changed)
    return part


def _waking(ground: Ground, states: States) -> Waking:
    return Waking(
        ground.broker,
        index=ground.index,
        tail=ground.tail,
        ledger=states.parked,
        leader=ground.leader,
        clock=ground.clock,
    )


def _waits(ground: Ground, states: States, waking: Waking) -> tuple[Part, ...]:
    scheduling = Scheduling(ground.broker, local=ground.local, ledger=states.schedules, leader=ground.leader)
    turning = Turning(ground.broker, index=ground.index, tail=ground.tail, clock=ground.clock)
    return waking, turning, scheduling, DuePart(ground.broker, {TIMER: waking.due, CRON: scheduling.due})


def _locks(ground: Ground, states: States, approvals: ApprovalPart) -> tuple[Part, ...]:
    shared = Shared(
        leader=ground.leader,
        locks=states.locks,
        index=ground.index,
        tail=ground.tail,
        speaker=Speaker(ground.broker.send),
        clock=time.monotonic,
    )
    detector = Detector(
        shared,
        WaitGraph(states.locks),
        found=states.deadlocks,
        parked=states.parked,
        policy=ground.settings.victim,
    )
    detector.outside = approvals.edges
    locks = LockPart(shared, detector)
    ground.tail.on_change(locks.changed)
    return detector, locks


def _watch(ground: Ground, states: States, approvals: ApprovalPart) -> tuple[Part, ...]:
    records = LetterReader(ground.tasks)
    dead = DeadLetters(
        ground.broker,
        index=ground.index,
        tail=ground.tail,
        tasks=ground.tasks,
        reader=records,
        ledger=states.letters,
        decide=ground.leader.decide,
    )
    observer = Observer(
        BrokerLook(ground.broker, ground.reader),
        index=ground.index,
        store=ground.store,
        presence=ground.operations.presence,
        letters=(dead, records),
        approvals=approvals.seen,
    )
    watchdog = Watchdog(
        observer,
        local=ground.local,
        ledger=states.incidents,
        decide=ground.leader.decide,
        look=ground.settings.look,
        clock=ground.clock,
    )
    return dead, watchdog
