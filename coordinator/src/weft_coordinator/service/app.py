"""The coordinator put together: it connects its parts, serves, and follows the broker through restarts."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import cached_property, partial
from typing import Any, Final

from weft.core.broker import Broker, Delivered, Subscription
from weft.core.cardkeys import card_key
from weft.core.history import StreamReader
from weft.core.retentionconf import Retention
from weft.core.supervise import Tasks
from weft.core.topology import Drift, Report, reconcile
from weft_coordinator.decide.index import Entry, TaskIndex
from weft_coordinator.decide.ledger import Ledgers
from weft_coordinator.service import micro
from weft_coordinator.service.archive import Archive
from weft_coordinator.service.cards import CardService
from weft_coordinator.service.compose import Ground, States, make_parts
from weft_coordinator.service.gate import Gate
from weft_coordinator.service.handback import HandBack
from weft_coordinator.service.operations import Operations, parsed
from weft_coordinator.service.part import Answer, Body, Handler, LeanHandler, Part
from weft_coordinator.service.reads import Reads, Request
from weft_coordinator.service.settings import Settings
from weft_coordinator.service.standing import Standing
from weft_coordinator.shell.copies import Copies
from weft_coordinator.shell.decided import DecidedLog
from weft_coordinator.shell.files import StateFile
from weft_coordinator.shell.leader import Leader
from weft_coordinator.shell.mesh import LocalMesh
from weft_coordinator.shell.projection import Projection
from weft_coordinator.shell.registry import RegistryStore
from weft_coordinator.shell.sources import Sources
from weft_coordinator.shell.store import Store
from weft_coordinator.shell.tail import Tail
from weft_coordinator.shell.tasks import TaskReader
from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.accounts import CONNECTED, DISCONNECTED
from weft_protocols.connections import COORDINATOR
from weft_protocols.errors import (
    A2AError,
    BrokerError,
    InternalError,
    InvalidConfig,
    InvalidParams,
    Unavailable,
    WeftError,
)
from weft_protocols.resources import topology
from weft_protocols.subjects import GRAMMAR, ctl

log = logging.getLogger("weft.coordinator")

QUEUE: Final = "reads"
"""Queue group in which each read is answered by one replica."""
OPERATIONS_QUEUE: Final = "coord"
"""Queue group of the coordinator's operations, but for signs of life: presence is every replica's own."""
SEVERAL: Final = "several"
"""The operation that is several in one message."""
MOST_ASKS: Final = 1_000
EVERYWHERE: Final = ("heartbeat", "coordinators")
"""Operations every replica hears."""


class Coordinator:
    """One replica of the coordinator on one connection, which stays its owner's."""

    def __init__(
        self, broker: Broker, *, settings: Settings | None = None, local: LocalMesh | None = None, id: str | None = None
    ) -> None:
        self.id = id or new_id()
        self.settings = settings or Settings()
        self.local = local or LocalMesh.of(broker.settings)
        self.drift: tuple[Drift, ...] = ()
        """Where the broker's streams and consumers are not as specified."""
        self.ready_after = 0.0
        """Seconds from `start` until everything stored had been read."""
        self._broker = broker
        self._index = TaskIndex(self.settings.finished_tasks)
        self._reader = StreamReader(broker)
        self._file = StateFile.take(self.settings.state or self.local.state)
        self.projection = Projection(self._index, Store(self._file), keep=self.settings.finished_tasks)
        self.copies = Copies(broker, self.projection.store)
        self.tail = Tail(
            broker,
            self._reader,
            self.projection,
            self.copies,
            dead_letter=self._on_dead_letter,
            idle=self.settings.poll,
        )
        self._store = RegistryStore(broker, self._reader)
        cards = CardService(self._store, card_key(broker.settings))
        tasks = TaskReader(Sources(self._reader, self.projection.store))
        self._reads = Reads(broker, self.projection, self.tail, tasks, cards=cards)
        self._operations = Operations(
            index=self._index,
            tail=self.tail,
            cards=cards,
            local=self.local,
            ensure=self._ensure,
            facts=self._facts,
            clock=_now,
        )
        self.archive = Archive(
            broker,
            self.projection,
            self.tail,
            self.copies,
            retention=self._retention,
            leading=lambda: self.leader.leading,
            grace=self.settings.grace,
            every=self.settings.archive_every,
        )
        self._operations.projection = self.archive.facts
        self.states = States()
        self._decided = DecidedLog(broker, self._reader, Ledgers(self.states.ledgers))
        self.leader = Leader(
            broker,
            self._decided,
            id=self.id,
            clock=_now,
            lease=self.settings.lease,
            lead=self._on_lead,
            deposed=self._on_deposed,
        )
        self.handback = HandBack(
            broker, index=self._index, tail=self.tail, reader=self._reader, leader=lambda: self.leader, clock=_now
        )
        self._parts = self._make_parts(tasks)
        self._leading: list[Subscription] = []
        self._micro = micro.MicroService(broker, self._store, self._operations.presence, clock=_now)
        self._gate = Gate(self.settings)
        self._requests = Tasks(f"requests of coordinator {self.id}")
        self._subscriptions: list[Subscription] = []
        self._again = asyncio.Event()
        self._doubtful = False
        self._max_bytes: int | None = None
        self._started = _now()
        self._answered = 0

    def _make_parts(self, tasks: TaskReader) -> tuple[Part, ...]:
        ground = Ground(
            broker=self._broker,
            settings=self.settings,
            local=self.local,
            reader=self._reader,
            index=self._index,
            projection=self.projection,
            tail=self.tail,
            tasks=tasks,
            operations=self._operations,
            store=self._store,
            leader=self.leader,
            clock=_now,
        )
        standing = Standing(self._facts, projection=lambda: self._operations.projection())
        return (*make_parts(ground, self.states), self.archive, self.handback, standing)

    async def start(self) -> None:
        """Make the topology exist, read everything stored, and begin to serve.

        Raises:
            BrokerError: the broker does not answer, or not to this identity.
            InvalidConfig: the durability or mesh.yaml is wrong.
        """
        begun = time.monotonic()
        await self._reader.open()
        self._broker.on_reconnect(self._on_reconnect)
        await self._settle()
        await self.projection.open()
        await self.copies.open()
        await self.tail.sync()
        self.ready_after = time.monotonic() - begun
        log.info("read %d tasks in %.2f s", len(self._index), self.ready_after)
        if self._index.dead:
            log.warning("%d dead letters; see the operation dead-letters", len(self._index.dead))
        coord = GRAMMAR["coord"]
        await self._subscribe(GRAMMAR["rpc"].wildcard, self._on_read, QUEUE)
        # Each by its name: a wildcard would have what only the leader answers delivered twice.
        for operation in self._operations_of_all:
            queue = "" if operation in EVERYWHERE else OPERATIONS_QUEUE
            await self._subscribe(coord.pattern(operation=operation), self._on_operation, queue)
        for subject in micro.SUBJECTS:
            await self._subscribe(subject, self._on_micro, micro.QUEUE)
        await self._subscribe(CONNECTED, self.handback.on_connected, "")
        await self._subscribe(DISCONNECTED, self.handback.on_disconnected, "")
        await self._subscribe(ctl(COORDINATOR, self.id), lambda _: None, "")
        await self.leader.start()
        await self._broker.flush()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises why the connection ended, if it ended for good."""
        async with asyncio.TaskGroup() as group:
            following = [group.create_task(self._follow()), group.create_task(self._keep())]
            waits = [group.create_task(stop.wait()), group.create_task(self._broker.closed.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in (*following, *waits):
                task.cancel()
        if self._broker.closed.is_set() and not stop.is_set():
            raise self._broker.failure or Unavailable("the connection to the broker was closed")

    async def aclose(self) -> None:
        """Take no more requests and finish those under way, within the settings' `drain` seconds; lead no more."""
        await self.leader.stop()
        for part in self._parts:
            await part.aclose()
        for subscription in self._subscriptions:
            await subscription.close()
        try:
            async with asyncio.timeout(self.settings.drain):
                await self._requests.idle()
        except TimeoutError:
            log.warning("%d requests were under way and stay unanswered", len(self._requests))
        await self._requests.aclose()
        await self.copies.close()
        await self._reader.close()
        await self.projection.store.close()
        self._file.release()

    @cached_property
    def _leader_operations(self) -> dict[str, Handler]:
        return {name: handler for part in self._parts for name, handler in part.leader_operations.items()}

    @cached_property
    def _lean_operations(self) -> dict[str, LeanHandler]:
        found = {name: handler for part in self._parts for name, handler in part.lean_operations.items()}
        return {**found, SEVERAL: self._several}

    @cached_property
    def _operations_of_all(self) -> dict[str, Handler]:
        """What any coordinator answers."""
        return {name: handler for part in self._parts for name, handler in part.operations.items()}

    @cached_property
    def _handlers(self) -> dict[str, Handler]:
        """What is answered in a task of its own, by whomever."""
        return {**self._operations_of_all, **self._leader_operations}

    # Following ---------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Read the task stream on, at the tail's pace; what fails is tried again."""
        while True:
            await asyncio.sleep(self.tail.pause)
            if not self._broker.connected:
                continue
            try:
                await self.tail.sync()
            except WeftError as error:
                log.warning("could not read on: %s; trying again", error)

    async def _keep(self) -> None:
        """Everything else that is done every `beat` seconds and after every reconnect; what fails is tried again."""
        while True:
            try:
                async with asyncio.timeout(self.settings.beat):
                    await self._again.wait()
            except TimeoutError:
                pass
            self._again.clear()
            if not self._broker.connected:
                continue
            try:
                if self._doubtful:
                    await self._settle()
                    self._doubtful = False
                await self._store.sync()
                if not self.leader.leading:
                    await self._decided.sync()
                for part in self._parts:
                    part.beat()
            except WeftError as error:
                log.warning("could not read on: %s; trying again", error)
            await self._tick()

    async def _tick(self) -> None:
        """Let every part do what the leader does from time to time. One that fails does not keep the others from it."""
        for part in self._parts if self.leader.leading else ():
            try:
                await part.tick(_now())
            except WeftError as error:
                log.warning("%s: %s; trying again", type(part).__name__, error)
            except Exception:
                log.exception("%s failed; trying again", type(part).__name__)

    async def _on_lead(self) -> None:
        """This coordinator begins to lead: it alone answers what only the leader may."""
        for part in self._parts:
            await part.lead()
        coord = GRAMMAR["coord"]
        for operation in (*self._leader_operations, *self._lean_operations):
            subject = coord.pattern(operation=operation)
            self._leading.append(await self._broker.subscribe(subject, self._on_leader_operation))

    def _on_deposed(self) -> None:
        """Another coordinator leads, or will."""
        subscriptions, self._leading = self._leading, []
        for subscription in subscriptions:
            self._requests.start(subscription.close())
        for part in self._parts:
            part.deposed()

    async def _settle(self) -> None:
        """Streams and consumers exist, and the registry is read; it names the agents of a mesh elsewhere."""
        report = await self._ensure(self.local.agents())
        await self._store.sync()
        if self.local.home is None and self._store.records:
            report = await self._ensure(tuple(self._store.records))
        self.drift = report.drifted

    def _on_reconnect(self) -> None:
        """The server may have lost its last writes, or its streams."""
        self.tail.doubt()
        self._store.doubt()
        if not self.leader.leading:
            self._decided.doubt()
        self._doubtful = True
        self._again.set()

    async def _ensure(self, agents: tuple[str, ...]) -> Report:
        """Create what is missing of the streams and the agents' consumers; what differs is told, never changed."""
        report = await reconcile(self._broker, topology(agents, self.local.durability(), max_bytes=self._limit()))
        if report.created:
            log.info("created %s", ", ".join(report.created))
        for one in report.drifted:
            if one not in self.drift:
                log.warning("drift: %s", one)
        return report

    def _retention(self) -> Retention:
        return self.settings.retention or self.local.retention()

    def _limit(self) -> int:
        """The task stream's limit in mesh.yaml; the last one read while somebody is making a mistake in it."""
        try:
            self._max_bytes = self.local.max_bytes()
        except InvalidConfig as error:
            if self._max_bytes is None:
                raise
            log.warning("mesh.yaml is not read: %s", error)
        return self._max_bytes

    def _on_dead_letter(self, entry: Entry) -> None:
        log.warning("dead letter: task %s of %s (caller %s)", entry.task, entry.agent, entry.caller)

    def _facts(self) -> dict[str, Any]:
        return {
            "coordinator": self.id,
            "pid": os.getpid(),
            "started": self._started,
            "ready_after": round(self.ready_after, 3),
            "answered": self._answered,
            "busy": self._gate.busy,
            "drift": [str(one) for one in self.drift],
            "role": "leader" if self.leader.leading else "standby",
            "leader": self.leader.term.leader,
            "since": self.leader.term.since,
            "epoch": self.leader.epoch,
            "decided": self._decided.number,
            "parked": len(self.states.parked),
            "handed_back": self.handback.handed_back,
            "host": socket.gethostname(),
        }

    # Serving -----------------------------------------------------------------------------------

    async def _subscribe(self, subject: str, handler: Callable[[Delivered], None], queue: str) -> None:
        self._subscriptions.append(await self._broker.subscribe(subject, handler, queue=queue))

    def _on_read(self, message: Delivered) -> None:
        if message.reply:
            self._requests.start(self._read(message), name=message.subject)

    def _on_micro(self, message: Delivered) -> None:
        self._requests.start(self._micro.answer(message), name=message.subject)

    def _on_operation(self, message: Delivered) -> None:
        self._requests.start(self._operate(message), name=message.subject)

    def _on_leader_operation(self, message: Delivered) -> None:
        _, _, operation, caller = message.subject.split(".")
        if operation not in self._lean_operations:
            self._on_operation(message)
            return

        def answer(told: dict[str, Any] | WeftError) -> None:
            shown = _json_error(told) if isinstance(told, WeftError) else (json.dumps(told).encode(), {})
            self._reply(message, *shown)

        try:
            self._lean(operation, parsed(message.data), caller, answer)
        except WeftError as error:
            answer(error)

    def _lean(self, operation: str, body: Body, caller: str, answer: Answer) -> None:
        try:
            self._lean_operations[operation](body, caller, answer)
        except WeftError as error:
            answer(error)

    def _several(self, body: Body, caller: str, answer: Answer) -> None:
        """`{asks: [[operation, body], …]}` to `{answers: [answer or {error}, …]}`, in order, once all are answered."""
        asks = body.get("asks")
        if not isinstance(asks, list) or not 0 < len(asks) <= MOST_ASKS:
            raise InvalidParams(f"asks must be a list of 1 to {MOST_ASKS} [operation, body]")
        answers: list[dict[str, Any]] = [{}] * len(asks)
        open_ = len(asks)

        def answered(at: int, told: dict[str, Any] | WeftError) -> None:
            nonlocal open_
            answers[at] = _error_body(told) if isinstance(told, WeftError) else told
            open_ -= 1
            if not open_:
                answer({"answers": answers})

        for at, ask in enumerate(asks):
            match ask:
                case [str(operation), dict(one)] if operation in self._lean_operations and operation != SEVERAL:
                    self._lean(operation, one, caller, partial(answered, at))
                case _:
                    answered(at, InvalidParams(f"ask {at} is no [operation, body] of an operation that is asked so"))

    async def _read(self, message: Delivered) -> None:
        _, _, agent, method, caller = message.subject.split(".")
        request = Request(agent, method, caller, h.parse(message.headers), message.data)

        async def work() -> tuple[bytes, dict[str, str]]:
            answer = await self._reads.answer(request)
            return answer.data, answer.headers

        data, headers = await self._outcome(caller, work, _a2a_error, deadline=self.settings.deadline)
        self._reply(message, data, headers)

    async def _operate(self, message: Delivered) -> None:
        _, _, operation, caller = message.subject.split(".")

        async def work() -> tuple[bytes, dict[str, str]]:
            return json.dumps(await self._handlers[operation](parsed(message.data), caller)).encode(), {}

        data, headers = await self._outcome(caller, work, _json_error, deadline=self.settings.change_deadline)
        self._reply(message, data, headers)

    async def _outcome(
        self,
        caller: str,
        work: Callable[[], Awaitable[tuple[bytes, dict[str, str]]]],
        show: Callable[[WeftError], tuple[bytes, dict[str, str]]],
        *,
        deadline: float,
    ) -> tuple[bytes, dict[str, str]]:
        """What to answer: the work's result or its error. Nothing one request does ends the others."""
        try:
            return await self._gate.run(caller, work, deadline=deadline)
        except WeftError as error:
            return show(error)
        except Exception:
            log.exception("a request of %s failed", caller)
            return show(InternalError("the coordinator failed; its log says how"))

    def _reply(self, message: Delivered, data: bytes, headers: dict[str, str]) -> None:
        if not message.reply:
            return
        self._answered += 1
        block = h.block(h.fields(headers)) if headers else None
        if len(data) + len(block or b"") > self._broker.max_payload:
            error = InternalError(f"the answer has {len(data)} bytes and the broker takes {self._broker.max_payload}")
            data, headers = _a2a_error(error)
            block = h.block(h.fields(headers))
        try:
            self._broker.send(message.reply, data, headers=block)
        except BrokerError as error:
            log.debug("%s stays unanswered: %s", message.subject, error)


def _a2a_error(error: WeftError) -> tuple[bytes, dict[str, str]]:
    """An error in the A2A binding; broker trouble is an internal error whose details callers may know."""
    shown = error
    if not isinstance(shown, A2AError):
        shown = InternalError(str(error), metadata={"weft.error": type(error).__name__})
    return a2a.error_body(shown), {h.ERROR: shown.reason}


def _json_error(error: WeftError) -> tuple[bytes, dict[str, str]]:
    return json.dumps(_error_body(error)).encode(), {h.ERROR: error.reason} if isinstance(error, A2AError) else {}


def _error_body(error: WeftError) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": str(error)}}


def new_id() -> str:
    """An id for a coordinator in this process."""
    host = re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def _now() -> int:
    return time.time_ns() // 1_000_000
