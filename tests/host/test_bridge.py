"""An A2A agent outside of the mesh as an agent of it, against the SDK's own server: both versions, every binding, and
what happens when either side, or what is between them, goes away."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import pytest
import uvicorn
from a2a.compat.v0_3 import a2a_v0_3_pb2_grpc
from a2a.compat.v0_3.grpc_handler import CompatGrpcHandler
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.request_handlers.grpc_handler import GrpcHandler
from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes, create_rest_routes
from a2a.server.tasks import InMemoryTaskStore
from a2a.types import a2a_pb2 as pb
from a2a.types import a2a_pb2_grpc
from starlette.applications import Starlette

import weft
from weft.core.supervise import Tasks
from weft.host import bridge as bridges
from weft.host.bridge import Bridge, headers_from
from weft.host.loading import load_bridge
from weft.testing.agents import Process, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, settled
from weft_protocols.errors import InvalidConfig

Unique = Callable[[str], str]
CARD = "/.well-known/agent-card.json"


class Script(AgentExecutor):
    """What the outside agent does, as the message says."""

    def __init__(self) -> None:
        self.calls: list[pb.Message] = []
        self.cancelled: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.message is not None
        self.calls.append(context.message)
        words = context.get_user_input().split()
        act = _Act(context, event_queue)
        if words[0] == "message":
            await event_queue.enqueue_event(act.message("just this"))
            return
        if context.current_task is None:
            await event_queue.enqueue_event(
                pb.Task(
                    id=context.task_id,
                    context_id=context.context_id,
                    status=pb.TaskStatus(state=pb.TASK_STATE_SUBMITTED),
                    history=[context.message],
                )
            )
        await act.status(pb.TASK_STATE_WORKING, "at it")
        await getattr(self, f"_{words[0]}")(act, words[1:])

    async def _echo(self, act: "_Act", words: list[str]) -> None:
        await act.chunk("result", " ".join(words), append=False, last=True)
        await act.status(pb.TASK_STATE_COMPLETED, "done")

    async def _chunks(self, act: "_Act", words: list[str]) -> None:
        for n in range(3):
            await act.chunk("long", f"a{n} ", append=n > 0)
        await self.gate(words[0]).wait()
        await act.status(pb.TASK_STATE_WORKING, "half way")
        for n in range(3):
            await act.chunk("long", f"b{n} ", append=True, last=n == 2)
        await act.status(pb.TASK_STATE_COMPLETED, "done")

    async def _ask(self, act: "_Act", words: list[str]) -> None:
        await act.status(pb.TASK_STATE_INPUT_REQUIRED, f"which {' '.join(words)}?")

    async def _auth(self, act: "_Act", words: list[str]) -> None:
        await act.status(pb.TASK_STATE_AUTH_REQUIRED, "sign in at https://login.example.com")

    async def _wait(self, act: "_Act", words: list[str]) -> None:
        await self.gate(words[0]).wait()
        await act.status(pb.TASK_STATE_COMPLETED, "done")

    async def _fail(self, act: "_Act", words: list[str]) -> None:
        await act.status(pb.TASK_STATE_FAILED, "no luck")

    async def _reject(self, act: "_Act", words: list[str]) -> None:
        await act.status(pb.TASK_STATE_REJECTED, "not for you")

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.task_id is not None
        self.cancelled.append(context.task_id)
        await _Act(context, event_queue).status(pb.TASK_STATE_CANCELED, "stopped over here")


@dataclass
class _Act:
    context: RequestContext
    queue: EventQueue

    def message(self, text: str) -> pb.Message:
        made = pb.Message(
            message_id=f"out-{text.replace(' ', '-')}-{self.context.task_id}",
            role=pb.ROLE_AGENT,
            parts=[pb.Part(text=text)],
            task_id=self.context.task_id,
            context_id=self.context.context_id,
        )
        made.metadata.update({"from": "outside"})
        return made

    async def status(self, state: pb.TaskState, text: str) -> None:
        status = pb.TaskStatus(state=state, message=self.message(text))
        status.timestamp.GetCurrentTime()
        await self.queue.enqueue_event(
            pb.TaskStatusUpdateEvent(task_id=self.context.task_id, context_id=self.context.context_id, status=status)
        )

    async def chunk(self, key: str, text: str, *, append: bool, last: bool = False) -> None:
        artifact = pb.Artifact(artifact_id=key, name=f"{key}.txt", parts=[pb.Part(text=text, media_type="text/plain")])
        artifact.metadata.update({"of": "outside"})
        await self.queue.enqueue_event(
            pb.TaskArtifactUpdateEvent(
                task_id=self.context.task_id,
                context_id=self.context.context_id,
                artifact=artifact,
                append=append,
                last_chunk=last,
            )
        )


class Server(uvicorn.Server):
    def capture_signals(self) -> Any:
        return nullcontext()


@dataclass
class Partner:
    """The outside agent: the SDK's handler and routes on a real port, which can be closed and opened again."""

    binding: str = "JSONRPC"
    version: str = "1.0"
    streaming: bool = True
    cut_after: int | None = None
    """Streams end silently after that many events."""
    refuse: int | None = None
    """Status of every answer."""
    script: Script = field(default_factory=Script)
    card: pb.AgentCard = field(default_factory=pb.AgentCard)
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    port: int = 0
    _tasks: Tasks = field(default_factory=lambda: Tasks("outside agent"))
    _server: Server | None = None
    _grpc: grpc.aio.Server | None = None

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return self.base + CARD

    def methods(self) -> list[str]:
        """JSON-RPC methods it was asked for."""
        bodies = [json.loads(body) for path, _, body in self.requests if body and path == "/"]
        return [body["method"] for body in bodies]

    async def open(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        if not self.card.name:
            await self._prepare()
        app = Starlette(
            routes=[
                *create_agent_card_routes(self.card),
                *create_jsonrpc_routes(self._handler, "/", enable_v0_3_compat=True),
                *create_rest_routes(self._handler, enable_v0_3_compat=True, path_prefix="/rest"),
            ]
        )
        config = uvicorn.Config(self._around(app), log_config=None, lifespan="off", ws="none", timeout_keep_alive=1)
        self._server = Server(config)
        self._tasks.start(self._server.serve(sockets=[listener]))

    async def _prepare(self) -> None:
        address = {"JSONRPC": f"{self.base}/", "HTTP+JSON": f"{self.base}/rest", "GRPC": ""}[self.binding]
        self.card.CopyFrom(
            pb.AgentCard(
                name="The Partner",
                description="Knows things",
                version="2.1.0",
                default_input_modes=["text/plain"],
                default_output_modes=["text/plain"],
                capabilities=pb.AgentCapabilities(streaming=self.streaming),
                skills=[pb.AgentSkill(id="know", name="know", description="knows", tags=["facts"])],
            )
        )
        handler = DefaultRequestHandler(
            agent_executor=self.script, task_store=InMemoryTaskStore(), agent_card=self.card
        )
        self._handler = handler
        if self.binding == "GRPC":
            self._grpc = grpc.aio.server()
            register: Any = a2a_pb2_grpc.add_A2AServiceServicer_to_server
            register(GrpcHandler(handler), self._grpc)
            register = a2a_v0_3_pb2_grpc.add_A2AServiceServicer_to_server
            register(CompatGrpcHandler(handler), self._grpc)
            address = f"127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
            await self._grpc.start()
        self.card.supported_interfaces.append(
            pb.AgentInterface(url=address, protocol_binding=self.binding, protocol_version=self.version)
        )

    def _around(self, app: Any) -> Any:
        async def around(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return
            body = b""
            while True:
                message = await receive()
                body += message.get("body", b"")
                if not message.get("more_body"):
                    break
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            self.requests.append((scope["path"], headers, body))
            if self.refuse is not None and scope["path"] != CARD:
                await send({"type": "http.response.start", "status": self.refuse, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
            given = [{"type": "http.request", "body": body, "more_body": False}]
            events, done = 0, False

            async def replay() -> Any:
                return given.pop() if given else await receive()

            async def cutting(message: Any) -> None:
                nonlocal events, done
                events += message.get("body", b"").count(b"data:")
                if done:
                    return
                if self.cut_after is not None and events > self.cut_after:
                    done, message = True, {"type": "http.response.body", "body": b"", "more_body": False}
                await send(message)

            await app(scope, replay, cutting)

        return around

    async def close(self) -> None:
        """Nobody listens any more and all connections are gone; what runs behind goes on."""
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True
            async with asyncio.timeout(10):
                await self._tasks.idle()
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
            self._server = None

    async def aclose(self) -> None:
        for gate in self.script.gates.values():
            gate.set()
        await self.close()
        if self._grpc is not None:
            await self._grpc.stop(0)
        await self._handler.aclose()


@asynccontextmanager
async def partner(**options: Any) -> AsyncIterator[Partner]:
    made = Partner(**options)
    await made.open()
    try:
        yield made
    finally:
        await made.aclose()


@asynccontextmanager
async def bridged(mesh: BrokerMesh, name: str, url: str, **headers: str) -> AsyncIterator[Bridge]:
    bridge = Bridge(name, url, headers=headers)
    bridge.agent.cancel_grace = 5.0
    try:
        await bridge.try_to_load()
        async with running(mesh, bridge.agent):
            yield bridge
    finally:
        await bridge.aclose()


async def task_of(caller: weft.Mesh, agent: str, text: str) -> tuple[pb.Task, list[pb.StreamResponse]]:
    async with await caller.submit(agent, text) as handle:
        async with asyncio.timeout(20):
            events = [event async for _, event in handle.raw_events()]
        return await handle.task(), events


def texts(artifact: pb.Artifact) -> str:
    return "".join(part.text for part in artifact.parts)


ALL = [
    ("JSONRPC", "1.0"), ("HTTP+JSON", "1.0"), ("GRPC", "1.0"),
    ("JSONRPC", "0.3.0"), ("HTTP+JSON", "0.3.0"), ("GRPC", "0.3.0"),
]  # fmt: skip


@pytest.mark.parametrize(("binding", "version"), ALL)
async def test_a_task_is_done_outside_and_comes_back_as_it_is(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, binding: str, version: str
) -> None:
    name = unique("partner")
    async with partner(binding=binding, version=version) as outside, bridged(mesh, name, outside.url):
        task, events = await task_of(caller, name, "echo hello there")
        (artifact,) = task.artifacts
        assert (artifact.artifact_id, artifact.name, texts(artifact)) == ("result", "result.txt", "hello there")
        assert artifact.metadata["of"] == "outside"
        assert task.status.state == pb.TASK_STATE_COMPLETED
        assert task.status.message.metadata["from"] == "outside"
        assert task.status.message.parts[0].text == "done"
        (sent,) = outside.script.calls
        assert sent.task_id not in (task.id, "")
        assert sent.context_id not in (task.context_id, "")
        for event in events:
            update = event.artifact_update if event.HasField("artifact_update") else event.status_update
            assert (update.task_id, update.context_id) == (task.id, task.context_id)
        answer, _ = await task_of(caller, name, "message please")
        assert answer.status.message.parts[0].text == "just this"
        await settled(mesh, name)
        (await StoredTask.read(mesh, name, task.id)).check()


@pytest.mark.parametrize(("binding", "version"), [("JSONRPC", "1.0"), ("HTTP+JSON", "0.3.0")])
async def test_an_agent_that_does_not_stream_is_asked_until_it_is_done(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, binding: str, version: str
) -> None:
    name = unique("partner")
    async with partner(binding=binding, version=version, streaming=False) as outside, bridged(mesh, name, outside.url):
        async with await caller.submit(name, "chunks gate") as handle:
            await heard(handle, "at it")
            outside.script.gate("gate").set()
            await handle.result(timeout=15)
            assert texts((await handle.task()).artifacts[0]) == "a0 a1 a2 b0 b1 b2 "
    assert len(outside.script.calls) == 1


@pytest.mark.parametrize(("binding", "version"), ALL)
async def test_questions_pass_through_and_answers_go_to_the_same_outside_task(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, binding: str, version: str
) -> None:
    name = unique("partner")
    async with partner(binding=binding, version=version) as outside, bridged(mesh, name, outside.url):
        async with await caller.submit(name, "ask colour") as handle:
            view = await handle.result()
            assert (view.state, view.text) == (weft.State.INPUT_REQUIRED, "which colour?")
            await settled(mesh, name)
            view = await caller.send(name, "auth", task_id=handle.id)
            assert view.state is weft.State.AUTH_REQUIRED
            await settled(mesh, name)
            view = await caller.send(name, "echo blue", task_id=handle.id)
            assert view.state is weft.State.COMPLETED
            assert [artifact.text for artifact in view.artifacts] == ["blue"]
    first, second, third = outside.script.calls
    assert first.task_id == second.task_id == third.task_id
    assert first.context_id == second.context_id == third.context_id


async def test_the_ends_of_a_task_outside_are_its_ends_here(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name = unique("partner")
    async with partner() as outside, bridged(mesh, name, outside.url):
        failed = await caller.send(name, "fail")
        assert (failed.state, failed.text) == (weft.State.FAILED, "no luck")
        rejected = await caller.send(name, "reject")
        assert (rejected.state, rejected.text) == (weft.State.REJECTED, "not for you")
    assert len(outside.script.calls) == 2


async def test_callers_that_name_their_conversations_alike_do_not_meet_outside(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name, other = unique("partner"), unique("partner")
    async with partner() as outside, bridged(mesh, name, outside.url), bridged(mesh, other, outside.url):
        for agent in (name, name, other):
            await caller.send(agent, "echo x", context_id="talk")
    first, second, third = (call.context_id for call in outside.script.calls)
    assert first == second != third
    assert "talk" not in (first, third)


# Cancelling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("binding", "version"), [("JSONRPC", "1.0"), ("GRPC", "1.0"), ("JSONRPC", "0.3.0")])
async def test_a_cancel_is_passed_on_and_so_is_what_comes_of_it(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, binding: str, version: str
) -> None:
    name = unique("partner")
    async with partner(binding=binding, version=version) as outside, bridged(mesh, name, outside.url):
        async with await caller.submit(name, "wait gate") as handle:
            await heard(handle, "at it")
            await handle.cancel()
            await heard(handle, weft.State.CANCELED)
            assert (await handle.task()).status.message.parts[0].text == "stopped over here"
    assert outside.script.cancelled == [outside.script.calls[0].task_id]


async def test_a_task_that_waits_for_its_caller_is_cancelled_outside_too(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name = unique("partner")
    async with partner() as outside, bridged(mesh, name, outside.url):
        async with await caller.submit(name, "ask colour") as handle:
            await handle.result()
            await settled(mesh, name)
            await handle.cancel()
            await heard(handle, weft.State.CANCELED)
        assert outside.script.cancelled == [outside.script.calls[0].task_id]


async def test_a_task_is_cancelled_here_though_nobody_answers_outside(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name = unique("partner")
    async with partner() as outside, bridged(mesh, name, outside.url) as bridge:
        bridge.agent.cancel_grace = 0.5
        async with await caller.submit(name, "wait gate") as handle:
            await heard(handle, "at it")
            await outside.close()
            await handle.cancel()
            await heard(handle, weft.State.CANCELED)


# What goes wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
async def test_a_stream_that_ends_without_a_word_loses_nothing(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, cut: int
) -> None:
    name = unique("partner")
    async with partner(cut_after=cut) as outside, bridged(mesh, name, outside.url):
        async with await caller.submit(name, "chunks gate") as handle:
            await eventually(lambda: outside.script.calls)
            await heard(handle, "at it")
            outside.script.gate("gate").set()
            async with asyncio.timeout(20):
                events = [event async for _, event in handle.raw_events()]
            task = await handle.task()
    assert task.status.state == pb.TASK_STATE_COMPLETED
    assert texts(task.artifacts[0]) == "a0 a1 a2 b0 b1 b2 "
    said = [event.status_update.status.message.parts[0].text for event in events if event.HasField("status_update")
            and event.status_update.status.HasField("message")]  # fmt: skip
    assert [text for text in said if text != "half way"] == ["at it", "done"]
    assert said.count("half way") <= 1
    assert len(outside.script.calls) == 1


async def test_an_agent_that_is_away_for_a_while_gets_its_task_once(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name = unique("partner")
    async with partner() as outside:
        await outside.close()
        async with bridged(mesh, name, outside.url), await caller.submit(name, "echo later") as handle:
            await eventually(lambda: handle.id)
            await outside.open()
            assert [artifact.text for artifact in (await handle.result(timeout=20)).artifacts] == ["later"]
    assert len(outside.script.calls) == 1


async def test_an_outage_in_the_middle_of_a_stream_loses_and_repeats_nothing(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name = unique("partner")
    async with partner() as outside, bridged(mesh, name, outside.url):
        async with await caller.submit(name, "chunks gate") as handle:
            await heard(handle, lambda event: event.artifact is not None and "a2" in event.artifact.text)
            await outside.close()
            outside.script.gate("gate").set()
            await outside.open()
            async with asyncio.timeout(20):
                events = [event async for _, event in handle.raw_events()]
            task = await handle.task()
    assert texts(task.artifacts[0]) == "a0 a1 a2 b0 b1 b2 "
    sent = [texts(event.artifact_update.artifact) for event in events if event.HasField("artifact_update")]
    assert "".join(sent) == "a0 a1 a2 b0 b1 b2 ", "what had passed is not sent again"
    assert [m.parts[0].text for m in task.history if m.role == pb.ROLE_AGENT].count("half way") == 1
    assert len(outside.script.calls) == 1


async def test_an_answer_that_is_lost_on_the_way_does_not_have_the_message_sent_again(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """The stream is cut before its first event: whether the message arrived is found out, not assumed."""
    name = unique("partner")
    async with partner(cut_after=0) as outside, bridged(mesh, name, outside.url):
        async with await caller.submit(name, "ask colour") as handle:
            assert (await handle.result()).text == "which colour?"
            await settled(mesh, name)
            view = await caller.send(name, "echo blue", task_id=handle.id)
            assert [artifact.text for artifact in view.artifacts] == ["blue"]
    assert [call.parts[0].text for call in outside.script.calls] == ["ask colour", "echo blue"]


@pytest.mark.parametrize(
    ("status", "says"), [(401, "headers_env"), (403, "headers_env"), (404, "404"), (400, "400"), (307, "307")]
)
async def test_an_agent_that_refuses_us_for_good_fails_the_task_at_once(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, status: int, says: str
) -> None:
    name = unique("partner")
    async with partner(refuse=status) as outside, bridged(mesh, name, outside.url):
        view = await caller.send(name, "echo x", deadline=20)
        assert view.state is weft.State.FAILED
        assert says in view.text
    assert len([path for path, _, _ in outside.requests if path != CARD]) == 1


async def test_an_agent_that_stays_away_costs_its_attempts_and_leaves_a_dead_letter(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridges, "PATIENCE", 0.1)
    name = unique("partner")
    async with partner(refuse=503) as outside, bridged(mesh, name, outside.url) as bridge:
        bridge.agent.attempts = 2
        async with await caller.submit(name, "echo x") as handle:
            view = await handle.result(timeout=30)
        assert view.state is weft.State.FAILED
        assert "does not answer" in view.text
        await settled(mesh, name)
        stored = await StoredTask.read(mesh, name, handle.id)
        assert max(stored.attempts) == 2


async def test_a_deadline_ends_the_waiting_for_an_agent_that_is_away(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name = unique("partner")
    async with partner(refuse=503) as outside, bridged(mesh, name, outside.url):
        async with await caller.submit(name, "echo x", deadline=1.0) as handle:
            view = await handle.result(timeout=20)
    assert view.state is weft.State.FAILED
    assert "deadline" in view.text


async def test_a_task_the_outside_agent_has_lost_fails_with_that(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name = unique("partner")
    async with partner() as outside, bridged(mesh, name, outside.url):
        async with await caller.submit(name, "wait gate") as handle:
            await heard(handle, "at it")
            await outside.close()
            outside.card.ClearField("name")
            await outside.open()
            view = await handle.result(timeout=20)
    assert view.state is weft.State.FAILED
    assert "any more" in view.text


# Takeover ------------------------------------------------------------------------------------------


def replica(mesh: BrokerMesh, name: str, outside: Partner) -> Process:
    """A bridge as `mesh up` runs it."""
    env = {
        "WEFT_HOME": str(mesh.home),
        "WEFT_IDENTITY": name,
        "WEFT_DURABILITY": mesh.durability,
        "PARTNER_TOKEN": "secret-of-ours",
    }
    arguments = ("-m", "weft.host", "--bridge", name, outside.url, "Authorization=PARTNER_TOKEN")
    return Process(arguments, ready="ready:", env=env)


async def test_when_our_replica_is_killed_the_next_one_goes_on_where_the_log_ends(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name = unique("partner")
    async with partner() as outside:
        async with replica(mesh, name, outside) as first, await caller.submit(name, "chunks gate") as handle:
            await heard(handle, lambda event: event.artifact is not None and "a2" in event.artifact.text)
            first.kill()
            await first.exited()
            outside.script.gate("gate").set()
            async with replica(mesh, name, outside):
                async with asyncio.timeout(45):
                    await handle.result(timeout=45)
                task = await handle.task()
                await settled(mesh, name)
        stored = await StoredTask.read(mesh, name, handle.id)
        stored.check()
    assert texts(task.artifacts[0]) == "a0 a1 a2 b0 b1 b2 "
    history = [m.parts[0].text for m in task.history if m.role == pb.ROLE_AGENT]
    assert [history.count(text) for text in ("at it", "half way", "done")] == [1, 1, 1]
    assert len(outside.script.calls) == 1, "it was not sent again"
    assert max(stored.attempts) == 2
    told = {headers.get("authorization") for path, headers, _ in outside.requests}
    assert told == {"Bearer secret-of-ours"}


async def test_when_our_replica_leaves_the_next_one_goes_on_at_once(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name = unique("partner")
    async with partner() as outside:
        async with await caller.submit(name, "chunks gate") as handle:
            bridge = Bridge(name, outside.url)
            await bridge.load()
            async with running(mesh, bridge.agent, grace=0.1):
                await heard(handle, lambda event: event.artifact is not None and "a2" in event.artifact.text)
            await bridge.aclose()
            outside.script.gate("gate").set()
            async with bridged(mesh, name, outside.url):
                await handle.result(timeout=20)
                task = await handle.task()
    assert texts(task.artifacts[0]) == "a0 a1 a2 b0 b1 b2 "
    assert len(outside.script.calls) == 1
    said = [message.parts[0].text for message in task.history]
    assert [said.count(text) for text in ("at it", "half way", "done")] == [1, 1, 1], "what had passed is not repeated"


@pytest.mark.parametrize("version", ["1.0", "0.3.0"])
async def test_a_follow_up_that_had_arrived_is_not_sent_again_by_the_next_replica(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, version: str
) -> None:
    name = unique("partner")
    async with partner(version=version) as outside, await caller.submit(name, "ask colour") as handle:
        bridge = Bridge(name, outside.url)
        await bridge.load()
        async with running(mesh, bridge.agent, grace=0.1):
            await handle.result(timeout=20)
            await settled(mesh, name)
            message = pb.Message(message_id="second", role=pb.ROLE_USER, parts=[pb.Part(text="chunks gate")])
            message.task_id = handle.id
            async with await caller.follow_up_request(name, pb.SendMessageRequest(message=message)):
                await heard(handle, lambda event: event.artifact is not None and "a2" in event.artifact.text)
        await bridge.aclose()
        outside.script.gate("gate").set()
        async with bridged(mesh, name, outside.url):
            await heard(handle, weft.State.COMPLETED)
            task = await handle.task()
    assert texts(task.artifacts[0]) == "a0 a1 a2 b0 b1 b2 "
    assert [call.parts[0].text for call in outside.script.calls] == ["ask colour", "chunks gate"]
    history = [message.parts[0].text for message in task.history]
    assert [history.count(text) for text in ("which colour?", "half way", "done")] == [1, 1, 1]


# Cards and configuration ---------------------------------------------------------------------------


async def test_the_outside_card_is_ours_under_our_name(unique: Unique) -> None:
    async with partner(version="0.3.0") as outside:
        bridge = Bridge("partner", outside.url)
        await bridge.load()
        told = bridge.agent.describe()
        assert (told["version"], told["description"]) == ("2.1.0", "Knows things")
        assert told["card"]["name"] == "partner"
        assert told["card"]["skills"][0]["id"] == "know"
        assert "supportedInterfaces" not in told["card"]
        before = bridge.agent.card
        await bridge.load()
        assert bridge.agent.card is before, "the same card is no news"
        outside.card.version = "2.2.0"
        outside.card.skills[0].name = "knows more"
        await outside.close()
        await outside.open()
        await bridge.load()
        assert bridge.agent.describe()["card"]["skills"][0]["name"] == "knows more"
        assert bridge.agent.version == "2.2.0"
        await bridge.aclose()


def test_a_bridge_starts_while_the_outside_agent_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("TOKEN", "x")
    agent = load_bridge("partner", f"http://127.0.0.1:{port}{CARD}", "Authorization=TOKEN")
    assert agent.version == bridges.UNKNOWN_VERSION
    agent.describe()


def test_headers_come_from_the_environment_only() -> None:
    environment = {"A": "token", "B": "Basic abc", "C": "plain", "D": "two\nlines", "E": " "}
    wanted = {"Authorization": "A", "authorization": "B", "X-Api-Key": "C"}
    assert headers_from(wanted, environment) == {
        "Authorization": "Bearer token", "authorization": "Basic abc", "X-Api-Key": "plain",
    }  # fmt: skip
    for variable in ("D", "E", "MISSING"):
        with pytest.raises(InvalidConfig, match=variable) as caught:
            headers_from({"X": variable}, environment)
        assert "two" not in str(caught.value)


async def test_credentials_do_not_follow_a_card_to_another_host(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name = unique("partner")
    async with partner() as outside:
        outside.card.supported_interfaces[0].url = f"http://localhost:{outside.port}/"
        await outside.close()
        await outside.open()
        async with bridged(mesh, name, outside.url, Authorization="Bearer ours"):
            await caller.send(name, "echo x")
    seen = {path: headers.get("authorization") for path, headers, _ in outside.requests}
    assert seen == {CARD: "Bearer ours", "/": None}
