"""A stage for tests of the coordinator: a broker of the module's own, callers, and agents that write as hosts do."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import msgpack
import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf.message import Message as ProtoMessage

from weft.core.broker import Broker, Reply
from weft.core.supervise import Tasks
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.locks import Ask, Locks, Request, changes
from weft_coordinator.service.app import Coordinator
from weft_coordinator.service.settings import Settings
from weft_protocols import a2a, ids, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2AError
from weft_protocols.records import Claim, DeadLetter
from weft_protocols.states import BY_LABEL, State

AGENTS = tuple(f"agent-{n}" for n in range(64))
CALLERS = ("local", "mallory", *(f"caller-{n}" for n in range(64)))


@dataclass(frozen=True)
class Sent:
    """A task that was accepted."""

    agent: str
    caller: str
    task: str
    context: str
    message_id: str
    seq: int
    origin: str = "o1"


@dataclass
class Worker:
    """One attempt at a task: writes under its claim what a host would."""

    broker: Broker
    sent: Sent
    token: int
    attempt: int = 1
    n: int = 0
    sequences: list[int] = field(default_factory=list)

    async def status(self, label: str, text: str = "", *, headers: dict[str, str] | None = None) -> int:
        """A status event; its number."""
        state = State.COMPLETED if label == "message" else BY_LABEL[label]
        event = pb.StreamResponse()
        update = event.status_update
        update.task_id, update.context_id = self.sent.task, self.sent.context
        update.status.state = int(state)  # type: ignore[assignment]
        update.status.timestamp.FromNanoseconds(time.time_ns())
        if text:
            update.status.message.message_id = f"{self.sent.task}-{self.n + 1}"
            update.status.message.role = pb.ROLE_AGENT
            update.status.message.parts.add(text=text)
        extra = {h.REPLICA: "r1", h.ATTEMPT: str(self.attempt)} if label == "working" else {}
        return await self.event(event, state=label, headers={**extra, **(headers or {})})

    async def artifact(self, id_: str, text: str, *, append: bool = False) -> int:
        """An artifact or a chunk of one; its number."""
        event = pb.StreamResponse()
        update = event.artifact_update
        update.task_id, update.context_id, update.append = self.sent.task, self.sent.context, append
        update.artifact.artifact_id = id_
        update.artifact.parts.add(text=text)
        return await self.event(event)

    async def answer(self, text: str) -> int:
        """The whole result as one message."""
        event = pb.StreamResponse()
        event.message.task_id, event.message.context_id = self.sent.task, self.sent.context
        event.message.message_id, event.message.role = f"{self.sent.task}-answer", pb.ROLE_AGENT
        event.message.parts.add(text=text)
        return await self.event(event, state="message")

    async def event(
        self,
        event: pb.StreamResponse | bytes,
        *,
        state: str = "",
        headers: dict[str, str] | None = None,
        n: int | None = None,
    ) -> int:
        """Any event, numbered on unless `n` is given."""
        self.n = self.n + 1 if n is None else n
        lines = {
            h.EXPECTED_SEQUENCE: str(self.token),
            h.EXPECTED_SUBJECT: subjects.claim(self.sent.agent, self.sent.task),
            h.EVENT: str(self.n),
            **({h.STATE: state} if state else {}),
            **(headers or {}),
        }
        data = event if isinstance(event, bytes) else event.SerializeToString()
        subject = subjects.event(self.sent.agent, self.sent.task, self.sent.caller, self.sent.origin)
        self.sequences.append(await self.broker.publish(subject, data, headers=h.block(h.fields(lines))))
        return self.n

    async def step(self, key: str, data: bytes) -> int:
        """A step record."""
        lines = {
            h.EXPECTED_SEQUENCE: str(self.token),
            h.EXPECTED_SUBJECT: subjects.claim(self.sent.agent, self.sent.task),
        }
        subject = subjects.step(self.sent.agent, self.sent.task, key)
        return await self.broker.publish(subject, data, headers=h.block(h.fields(lines)))

    async def ask(self, text: str, snapshot: pb.Task | None = None) -> None:
        """A question; with a snapshot that the event names."""
        headers: dict[str, str] = {}
        if snapshot is not None:
            await self.step(f"_task-{self.n + 1}", snapshot.SerializeToString())
            headers[h.SNAPSHOT] = f"_task-{self.n + 1}"
        await self.status("input-required", text, headers=headers)

    async def give_up(self, reason: str) -> None:
        """A dead letter and the event that says so."""
        sent = self.sent
        letter = DeadLetter(
            sent.agent, sent.task, sent.caller, reason, "Boom", self.attempt, "r1", "1.0", sent.seq, 1_700_000_000_000
        )
        await self.step("_dead", letter.encode())
        await self.status("failed", reason, headers={h.DEAD_LETTER: "1"})

    async def complete(self, text: str = "done") -> None:
        """What a simple skill writes."""
        await self.status("working")
        await self.artifact("result", text)
        await self.status("completed")


class Running:
    """A coordinator at work in this process."""

    def __init__(self, coordinator: Coordinator, broker: Broker) -> None:
        self.coordinator = coordinator
        self.broker = broker
        self.stopping = asyncio.Event()
        self.errors: list[BaseException] = []
        self._tasks = Tasks("test of a coordinator", on_error=self.errors.append)

    async def start(self) -> Running:
        await self.coordinator.start()
        self._tasks.start(self.coordinator.run(self.stopping))
        return self

    async def stop(self) -> None:
        self.stopping.set()
        await self._tasks.idle()
        await self.coordinator.aclose()
        await self.broker.close()


class Stage:
    """Connections by identity, names nobody else uses, and what callers and hosts do."""

    def __init__(self, mesh: BrokerMesh) -> None:
        self.mesh = mesh
        self._agents, self._callers = iter(AGENTS), iter(CALLERS[2:])
        self._brokers: dict[str, Broker] = {}
        self._running: list[Running] = []
        self._connecting = asyncio.Lock()

    def agent(self) -> str:
        """The name of an agent that may connect and that no other test uses."""
        return next(self._agents)

    def caller(self) -> str:
        """The name of a caller that no other test uses."""
        return next(self._callers)

    async def broker(self, identity: str) -> Broker:
        """The connection of an identity."""
        known = self._brokers.get(identity)
        if known is not None and not known.closed.is_set():
            return known
        async with self._connecting:
            known = self._brokers.get(identity)
            if known is None or known.closed.is_set():
                known = self._brokers[identity] = await self.mesh.connect(identity)
            return known

    async def coordinator(self, settings: Settings | None = None) -> Running:
        """One more coordinator, serving."""
        broker = await self.mesh.connect("coordinator")
        running = Running(Coordinator(broker, settings=settings), broker)
        self._running.append(running)
        return await running.start()

    async def stop(self, running: Running) -> None:
        """End one coordinator."""
        self._running.remove(running)
        await running.stop()

    async def aclose(self) -> None:
        """End everything."""
        for running in self._running:
            await running.stop()
        for broker in self._brokers.values():
            await broker.close()

    # Callers -----------------------------------------------------------------------------------

    async def send(
        self, agent: str, text: str = "hello", *, caller: str = "local", context: str = "", headers: Iterable[str] = ()
    ) -> Sent:
        """A task, accepted by the broker."""
        message_id = uuid.uuid4().hex
        context = context or uuid.uuid4().hex
        task = ids.task_id(caller, agent, message_id)
        message = pb.Message(message_id=message_id, context_id=context, role=pb.ROLE_USER, parts=[pb.Part(text=text)])
        block = h.block(h.fields({h.EXPECTED_SEQUENCE: "0", h.VERSION: h.A2A_VERSION, h.ORIGIN: "o1"}))
        subject = subjects.task(agent, ids.slice_of(context), caller, task)
        body = pb.SendMessageRequest(message=message).SerializeToString()
        seq = await (await self.broker(caller)).publish(subject, body, headers=block)
        return Sent(agent, caller, task, context, message_id, seq)

    async def follow_up(self, sent: Sent, text: str, *, message_id: str = "") -> str:
        """A further message for a task; its id."""
        message_id = message_id or uuid.uuid4().hex
        message = pb.Message(
            message_id=message_id,
            context_id=sent.context,
            task_id=sent.task,
            role=pb.ROLE_USER,
            parts=[pb.Part(text=text)],
        )
        subject = subjects.input(sent.agent, ids.slice_of(sent.context), sent.caller, sent.task)
        body = pb.SendMessageRequest(message=message).SerializeToString()
        await (await self.broker(sent.caller)).publish(subject, body, headers=h.block(h.fields({h.VERSION: "1.0"})))
        return message_id

    async def rpc(
        self,
        caller: str,
        method: str,
        request: ProtoMessage | bytes,
        *,
        agent: str = "_",
        headers: dict[str, str] | None = None,
        timeout: float = 10.0,
    ) -> Reply:
        """A raw A2A operation; raises the A2A error of the reply."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        block = h.block(h.fields({h.VERSION: h.A2A_VERSION} if headers is None else headers))
        broker = await self.broker(caller)
        reply = await broker.request(subjects.rpc(agent, method, caller), data, headers=block, timeout=timeout)
        reason = h.get(reply.headers, b"A2A-Error")
        if reason is not None:
            raise a2a.error_from_body(reason.decode(), reply.data)
        return reply

    async def refused(self, caller: str, method: str, request: ProtoMessage | bytes, **options: str) -> A2AError:
        """The error a request is answered with."""
        with pytest.raises(A2AError) as caught:
            await self.rpc(caller, method, request, agent=options.get("agent", "_"))
        return caught.value

    async def get(self, sent: Sent, *, caller: str = "", history: int | None = None) -> pb.Task:
        """GetTask."""
        request = pb.GetTaskRequest(id=sent.task)
        if history is not None:
            request.history_length = history
        return pb.Task.FromString((await self.rpc(caller or sent.caller, "GetTask", request, agent=sent.agent)).data)

    async def list(self, caller: str, *, agent: str = "_", **fields: object) -> pb.ListTasksResponse:
        """ListTasks."""
        request = pb.ListTasksRequest(**fields)  # type: ignore[arg-type]
        return pb.ListTasksResponse.FromString((await self.rpc(caller, "ListTasks", request, agent=agent)).data)

    # Hosts -------------------------------------------------------------------------------------

    async def claim(self, sent: Sent, *, attempt: int = 1, expected: int = 0, n: int = 0) -> Worker:
        """Own a task under a new claim."""
        broker = await self.broker(sent.agent)
        claim = Claim(
            "r1", "1.0", attempt, sent.caller, sent.origin, sent.context, ids.slice_of(sent.context), sent.seq
        )
        block = h.block(h.fields({h.EXPECTED_SEQUENCE: str(expected)}))
        token = await broker.publish(subjects.claim(sent.agent, sent.task), claim.encode(), headers=block)
        return Worker(broker, sent, token, attempt, n)

    async def done(self, agent: str, text: str = "hello", *, caller: str = "local", context: str = "") -> Sent:
        """A task from its beginning to its end."""
        sent = await self.send(agent, text, caller=caller, context=context)
        await (await self.claim(sent)).complete(f"done: {text}")
        return sent

    def from_elsewhere(self, sent: Sent, origin: str) -> Sent:
        """The same task as another process of its caller would name it."""
        return replace(sent, origin=origin)


@pytest.fixture(scope="module")
async def stage(anyio_backend: str) -> AsyncIterator[Stage]:
    """A broker of the module's own with a coordinator."""
    mesh = await start_test_mesh(AGENTS, CALLERS)
    made = Stage(mesh)
    try:
        await made.coordinator()
        yield made
    finally:
        await made.aclose()
        await mesh.aclose()


@pytest.fixture
async def fresh_stage(anyio_backend: str) -> AsyncIterator[Stage]:
    """A broker of the test's own, without a coordinator: for what stops, restarts or overloads it."""
    mesh = await start_test_mesh(AGENTS[:3], CALLERS[:4])
    made = Stage(mesh)
    try:
        yield made
    finally:
        await made.aclose()
        await mesh.aclose()


class LockLog:
    """A ledger of locks and the log it is folded from. Task t1 delegated to t2, that to t3, and t4 to t5."""

    PARENT: ClassVar = {"t2": "t1", "t3": "t2", "t5": "t4"}

    def __init__(self) -> None:
        self.locks = Locks()
        self.log: list[Event] = []

    def fold(self, events: Sequence[Event]) -> Sequence[Event]:
        for event in events:
            stored = msgpack.unpackb(msgpack.packb(event))
            self.log.append(stored)
            self.locks.apply(tuple(stored), number=len(self.log), at=1000 + len(self.log))
        return events

    def ask(self, task: str, *names: str, **fields: Any) -> Request:
        """Ask and fold; a new request each time if none is named."""
        made = Ask(
            **{
                "agent": "x",
                "replica": "r1",
                "task": task,
                "request": f"{task}/{len(self.log)}",
                "claim": 1,
                "names": names,
                **fields,
            }
        )
        self.fold(self.locks.request(made, ancestors=self.ancestors(task)))
        found = self.locks.find(made.agent, made.request)
        assert found is not None
        return found

    def release(self, request: Request) -> list[str]:
        """Release and fold; the tasks that were granted something."""
        events = self.fold(self.locks.release(request.agent, request.request, claim=request.claim))
        return [change[1].partition("/")[0] for change in changes(events) if change[2] == "granted"]

    def ancestors(self, task: str) -> tuple[str, ...]:
        parent = self.PARENT.get(task)
        return () if parent is None else (parent, *self.ancestors(parent))


@pytest.fixture(scope="session")
def lock_log() -> type[LockLog]:
    """The class: each call of it is a ledger of its own."""
    return LockLog
