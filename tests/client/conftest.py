"""A stage for tests of the caller: a host that writes what the test tells it, and a read side that can be away."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb

import weft
from weft.client import mesh as mesh_module
from weft.client.operations import Operations
from weft.core.broker import Broker, Delivered, Stored, Subscription, stored
from weft.core.pull import Delivery, PullLoop
from weft.core.supervise import Tasks
from weft.testing.agents import Process, client, coordinator_process, eventually, running
from weft.testing.broker import BrokerMesh, start_test_mesh, unique_name
from weft_protocols import a2a, events, ids, records, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2AError, AgentNotFound, TaskNotFound
from weft_protocols.events import RawEvent
from weft_protocols.resources import STREAM
from weft_protocols.states import BY_LABEL, State

PATIENCE = 10.0
"""Seconds until what must happen has happened."""


@dataclass
class Hosted:
    """One task at the host, claimed: writes its events by the binding's rules, or not quite."""

    broker: Broker
    agent: str
    task: str
    caller: str
    origin: str
    message: pb.Message
    headers: dict[str, str]
    token: int
    delivery: Delivery
    n: int = 0

    @property
    def subject(self) -> str:
        return subjects.event(self.agent, self.task, self.caller, self.origin)

    async def status(
        self,
        label: str,
        text: str = "",
        *,
        n: int | None = None,
        parts: list[pb.Part] | None = None,
        metadata: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> int:
        """A status event; its sequence."""
        event = pb.StreamResponse()
        update = event.status_update
        update.task_id, update.context_id = self.task, self.message.context_id
        update.status.state = a2a.state_to_proto(BY_LABEL[label])
        update.status.timestamp.FromNanoseconds(time.time_ns())
        if text or parts:
            update.status.message.message_id = f"{self.task}-{self.n + 1}"
            update.status.message.role = pb.ROLE_AGENT
            update.status.message.parts.extend(parts or [pb.Part(text=text)])
        if metadata:
            update.metadata.update(metadata)
        return await self.event(event, state=label, n=n, headers=headers)

    async def artifact(self, *parts: pb.Part, name: str = "result", append: bool = False, n: int | None = None) -> int:
        """An artifact, or a chunk of one; its sequence."""
        event = pb.StreamResponse()
        update = event.artifact_update
        update.task_id, update.context_id, update.append = self.task, self.message.context_id, append
        update.artifact.artifact_id = update.artifact.name = name
        update.artifact.parts.extend(parts)
        return await self.event(event, n=n)

    async def answer(self, *parts: pb.Part) -> int:
        """The whole result as one message."""
        event = pb.StreamResponse()
        event.message.task_id, event.message.context_id = self.task, self.message.context_id
        event.message.message_id, event.message.role = f"{self.task}-answer", pb.ROLE_AGENT
        event.message.parts.extend(parts)
        return await self.event(event, state="message")

    async def refuse(self, error: A2AError, *, message_id: str, state: str) -> int:
        """Tell the sender of a follow-up that it is refused."""
        return await self.status(state, str(error), headers={h.ERROR: error.reason, h.IN_REPLY_TO: message_id})

    async def complete(self, text: str = "done") -> int:
        """What a simple skill writes; the sequence of the end."""
        await self.status("working")
        await self.artifact(pb.Part(text=text))
        return await self.status("completed")

    async def event(
        self,
        event: pb.StreamResponse,
        *,
        state: str = "",
        n: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> int:
        """Any event, numbered on unless `n` is given; its sequence."""
        self.n = self.n + 1 if n is None else n
        lines = {
            h.EXPECTED_SEQUENCE: str(self.token),
            h.EXPECTED_SUBJECT: subjects.claim(self.agent, self.task),
            h.EVENT: str(self.n),
            **({h.STATE: state} if state else {}),
            **(headers or {}),
        }
        return await self.broker.publish(self.subject, event.SerializeToString(), headers=h.block(h.fields(lines)))


class Host:
    """An agent whose tasks are in the hands of the test."""

    def __init__(self, broker: Broker, agent: str) -> None:
        self.broker = broker
        self.agent = agent
        self._work: dict[str, asyncio.Queue[Delivery]] = defaultdict(asyncio.Queue)
        self._input: dict[str, asyncio.Queue[Delivery]] = defaultdict(asyncio.Queue)
        self._loops: list[PullLoop] = []

    async def start(self) -> Host:
        for lane, queues in (("work", self._work), ("input", self._input)):

            def take(delivery: Delivery, queues: dict[str, asyncio.Queue[Delivery]] = queues) -> None:
                self.broker.send(delivery.ack, b"+ACK")
                queues[delivery.subject.rpartition(".")[2]].put_nowait(delivery)

            consumer = subjects.consumer(self.agent, lane)
            loop = PullLoop(self.broker, stream=STREAM, consumer=consumer, handler=take, steady=True)
            self._loops.append(await loop.start())
            loop.want(64)
        return self

    async def aclose(self) -> None:
        for loop in self._loops:
            await loop.stop()
        await self.broker.close()

    async def message(self, task: str) -> Delivery:
        """The message that creates a task, once it was delivered."""
        async with asyncio.timeout(PATIENCE):
            return await self._work[task].get()

    async def input(self, task: str) -> Delivery:
        """The next follow-up or cancel of a task."""
        async with asyncio.timeout(PATIENCE):
            return await self._input[task].get()

    def inputs(self, task: str) -> int:
        """How many follow-ups and cancels wait."""
        return self._input[task].qsize()

    async def claim(self, task: str) -> Hosted:
        """Own a task as a replica would."""
        delivery = await self.message(task)
        _, _, agent, slice_, caller, _ = delivery.subject.split(".")
        values = h.parse(delivery.headers)
        message = a2a.decode(pb.SendMessageRequest, delivery.data, values.get("content-type", h.PROTOBUF)).message
        claim = records.Claim(
            replica="r1",
            version="1.0",
            attempt=1,
            caller=caller,
            origin=values["weft-origin"],
            context=message.context_id,
            slice=slice_,
            message=delivery.sequence,
        )
        token = await self.broker.publish(
            subjects.claim(agent, task), claim.encode(), headers=h.block(h.fields({h.EXPECTED_SEQUENCE: "0"}))
        )
        return Hosted(self.broker, agent, task, caller, values["weft-origin"], message, values, token, delivery)


@dataclass
class ReadSide:
    """Answers what the coordinator answers, straight from the stream, and only while it is told to."""

    broker: Broker
    page: int = 1000
    """Events of one page at most."""
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, task and `Weft-Event` of every request."""
    silent: bool = False
    subscription: Subscription | None = None
    tasks: Tasks = field(default_factory=lambda: Tasks("read side of a test"))

    async def come(self) -> ReadSide:
        self.subscription = await self.broker.subscribe("mesh.rpc.*.*.*", self._on_request)
        await self.broker.flush()
        return self

    async def leave(self) -> None:
        assert self.subscription is not None
        await self.subscription.drain()

    async def aclose(self) -> None:
        await self.tasks.aclose()
        await self.broker.close()

    def _on_request(self, message: Delivered) -> None:
        if not self.silent:
            self.tasks.start(self._answer(message))

    async def _answer(self, message: Delivered) -> None:
        _, _, agent, method, caller = message.subject.split(".")
        task = pb.GetTaskRequest.FromString(message.data).id  # the first field of both requests
        after = int(h.get(message.headers, b"Weft-Event") or 0)
        self.asked.append((method, task, after))
        try:
            data, block = await self._read(agent, method, caller, task=task, after=after)
        except A2AError as error:
            data, block = a2a.error_body(error), h.block(h.fields({h.ERROR: error.reason}))
        self.broker.send(message.reply, data, headers=block)

    async def _read(self, agent: str, method: str, caller: str, *, task: str, after: int) -> tuple[bytes, bytes | None]:
        created = await self._all(f"mesh.task.{agent}.*.{caller}.{task}")
        if not created:
            raise TaskNotFound(f"task {task} of {agent} is not known")
        log = [
            RawEvent.of(one.data, one.headers, seq=one.seq)
            for one in await self._all(subjects.event(agent, task, caller, "*"))
        ]
        if method == "SubscribeToTask":
            return events.pack([one for one in log if one.n > after][: self.page]), None
        message = pb.SendMessageRequest.FromString(created[0].data).message
        found = a2a.fold((one.decode() for one in log), pb.Task(id=task, context_id=message.context_id))
        last = str(max((one.n for one in log), default=0))
        return found.SerializeToString(), h.block(h.fields({h.EVENT: last, "Weft-Agent": agent}))

    async def _all(self, pattern: str) -> list[Stored]:
        found: list[Stored] = []
        while True:
            body = b'{"seq": %d, "next_by_subj": "%b"}' % (found[-1].seq + 1 if found else 1, pattern.encode())
            one = stored(await self.broker.request(f"$JS.API.DIRECT.GET.{STREAM}", body))
            if one is None:
                return found
            found.append(one)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was missed is looked for after a tenth of a second instead of half a second and more."""
    monkeypatch.setattr(mesh_module, "RESYNC", (0.1, 0.2))
    monkeypatch.setattr(mesh_module, "TICK", 0.05)


@pytest.fixture(scope="module")
async def host(mesh: BrokerMesh, anyio_backend: str) -> AsyncIterator[Host]:
    """An agent of this module's own."""
    agent = unique_name("hosted")
    await mesh.add_agent(agent)
    made = await Host(await mesh.connect(agent), agent).start()
    yield made
    await made.aclose()


@pytest.fixture
async def caller(mesh: BrokerMesh) -> AsyncIterator[weft.Mesh]:
    """A client as `local`."""
    async with client(mesh) as made:
        yield made


@pytest.fixture
async def other_process(mesh: BrokerMesh) -> AsyncIterator[weft.Mesh]:
    """A second client of the same identity, with an origin of its own."""
    async with client(mesh) as made:
        yield made


@pytest.fixture
async def reads(mesh: BrokerMesh) -> AsyncIterator[ReadSide]:
    """A read side at work."""
    made = await ReadSide(await mesh.connect("coordinator")).come()
    yield made
    await made.aclose()


def state(label: str) -> State:
    """The state of a label."""
    return BY_LABEL[label]


def task_of(agent: str, message_id: str, *, caller: str = "local") -> str:
    """Id of the task a message creates."""
    return ids.task_id(caller, agent, message_id)


Unique = Callable[[str], str]


# A2A's operations, with real replicas and a real coordinator ------------------------------------------


class Clerk:
    """An agent that does what the message's text says, and whose doors the test opens."""

    def __init__(self, name: str) -> None:
        self.doors: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        """`door x` waits for `doors["x"]`."""
        self.runs: list[str] = []
        """Texts of the tasks begun."""
        self.heard: list[str] = []
        """Answers it got."""
        self.requests: list[weft.Task] = []
        self.agent = weft.Agent(name, concurrency=32)
        self.agent.skill()(self.work)
        self.agent.skill(answer="message")(self.say)

    async def work(self, task: weft.Task) -> str | None:
        self.runs.append(task.text)
        self.requests.append(task)
        verb, _, rest = task.text.partition(" ")
        if verb == "door":
            await task.update(f"at door {rest}")
            await self.doors[rest].wait()
            return f"through door {rest}"
        if verb == "ask":
            for question in rest.split(",") or ["?"]:
                self.heard.append((await task.ask(question)).text)
            await task.update(f"thanks for {self.heard[-1]}")
            return " ".join(self.heard[-len(rest.split(",")) :])
        if verb == "chunks":
            for n in range(int(rest)):
                await task.artifact(f"chunk {n}", str(n))
            return None
        if verb == "tell":
            for n in range(int(rest)):
                await task.update(f"word {n}")
            return None
        if verb == "reject":
            raise weft.Reject(rest)
        return task.text.upper()

    async def say(self, task: weft.Task) -> str:
        self.runs.append(task.text)
        verb, _, rest = task.text.partition(" ")
        if verb == "door":
            await self.doors[rest].wait()
        return f"said {task.text}"


class Shelf:
    """Agent cards, and what was asked for."""

    def __init__(self) -> None:
        self.cards: dict[str, pb.AgentCard] = {}

    def put(self, agent: str, **fields: Any) -> pb.AgentCard:
        """A card that declares streaming and nothing else, unless fields say otherwise."""
        card = pb.AgentCard(name=agent, version="1.0.0", **fields)
        if not card.HasField("capabilities"):
            card.capabilities.streaming = True
        self.cards[agent] = card
        return card

    async def card(self, agent: str) -> pb.AgentCard:
        if agent not in self.cards:
            raise AgentNotFound(f"there is no agent {agent}")
        return self.cards[agent]


@dataclass
class Office:
    """A mesh with one clerk, a coordinator, and a connection in account MESH that speaks for any caller."""

    mesh: BrokerMesh
    clerk: Clerk
    broker: Broker
    coordinator: Process
    shelf: Shelf
    callers: dict[str, Operations] = field(default_factory=dict)

    @property
    def agent(self) -> str:
        return self.clerk.agent.name

    async def operations(self, caller: str = "alice", cards: Shelf | None = None) -> Operations:
        """The operations of a caller, always the same for the same name."""
        made = self.callers.get(caller)
        if made is None or cards is not None:
            mesh = made.mesh if made is not None else await weft.Mesh(self.broker, caller=caller).start()
            made = Operations(mesh, cards or self.shelf)
            self.callers.setdefault(caller, made)
        return made

    async def another_process(self, caller: str = "alice") -> Operations:
        """The same caller in another process: another origin, nothing known of what was sent."""
        mesh = await weft.Mesh(self.broker, caller=caller).start()
        self.callers[mesh.origin] = Operations(mesh, self.shelf)
        return self.callers[mesh.origin]

    async def aclose(self) -> None:
        for made in self.callers.values():
            await made.mesh.aclose()
        await self.broker.close()


@pytest.fixture(scope="module")
async def office(anyio_backend: str) -> AsyncIterator[Office]:
    """A mesh of this module's own with everything that A2A's operations need."""
    clerk = Clerk("clerk")
    async with (
        await start_test_mesh(["clerk"]) as mesh,
        coordinator_process(mesh) as process,
        running(mesh, clerk.agent, replicas=2),
    ):
        shelf = Shelf()
        shelf.put("clerk")
        made = Office(mesh, clerk, await mesh.connect("gateway"), process, shelf)
        yield made
        for door in clerk.doors.values():
            door.set()
        await made.aclose()


@pytest.fixture
def shelf() -> Shelf:
    """Cards of this test's own."""
    return Shelf()


@pytest.fixture
async def alice(office: Office) -> AsyncIterator[Operations]:
    """A caller's operations, who follows nothing any more when the test ends."""
    made = await office.operations("alice")
    yield made
    await eventually(lambda: made.mesh.following == 0)


@pytest.fixture
async def bob(office: Office) -> Operations:
    """Another caller's."""
    return await office.operations("bob")


def saying(text: str, **fields: Any) -> pb.SendMessageRequest:
    """A request to send a text; keywords are fields of the message, or `configuration`."""
    configuration = fields.pop("configuration", None)
    message = pb.Message(message_id=fields.pop("message_id", unique_name("m")), role=pb.ROLE_USER, **fields)
    message.parts.add(text=text)
    return pb.SendMessageRequest(message=message, configuration=configuration)


@pytest.fixture(name="saying")
def _saying() -> Callable[..., pb.SendMessageRequest]:
    return saying
