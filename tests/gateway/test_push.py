"""Push notifications reach a real receiver: every event, in order, at least once, through whatever fails."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import uvicorn
from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format

import weft
from weft.client import reads
from weft.client.mesh import Handle, Mesh
from weft.client.operations import Operations
from weft.core.broker import Broker
from weft.core.cardkeys import CardKey
from weft.core.gatewayconf import PushConfig
from weft.core.supervise import Tasks
from weft.gateway.push import Backoff, Deliverer, Limits, Poster
from weft.testing.agents import Process, client, coordinator_process, eventually, running
from weft.testing.broker import BrokerMesh, start_test_mesh, unique_name
from weft.testing.serving import QuietServer
from weft.testing.stored import StoredTask
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.records import PushCursor
from weft_protocols.resources import PUSH, PUSH_CONSUMER, SECOND
from weft_protocols.states import State

pytestmark = pytest.mark.anyio

ACK_WAIT: Final = 2.0
"""Seconds after which the broker of these tests gives a silent holder's lease to another."""
DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "push.md"
KEY: Final = CardKey.new()


class _Signer:
    def sign(self, data: bytes) -> bytes:
        return KEY.sign_bytes(data)


class _Cards:
    async def card(self, agent: str) -> pb.AgentCard:
        capabilities = pb.AgentCapabilities(streaming=True, push_notifications=True)
        return pb.AgentCard(name=agent, capabilities=capabilities)


@dataclass(frozen=True)
class Got:
    """One request at a receiver."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def n(self) -> int:
        return int(self.headers["weft-event"])

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def task(self) -> str:
        return self.id.split("_")[0]

    @property
    def event(self) -> pb.StreamResponse:
        return json_format.Parse(self.body, pb.StreamResponse())


Reply = int | tuple[int, dict[str, str]]


class Receiver:
    """A webhook on loopback. `answer` decides on each request; its status is what was confirmed."""

    def __init__(self, answer: Callable[[Got], Reply | Awaitable[Reply]] | None = None) -> None:
        self.got: list[Got] = []
        """Every request that came."""
        self.confirmed: list[Got] = []
        """Those answered with 2xx."""
        self.answer = answer or (lambda _: 204)
        self._tasks = Tasks("receiver of a test")
        self._server: uvicorn.Server | None = None
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])

    def url(self, path: str = "/hook", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def start(self) -> Receiver:
        config = uvicorn.Config(
            self._app, log_config=None, access_log=False, lifespan="off", ws="none", interface="asgi3"
        )
        self._server = QuietServer(config)
        task = self._tasks.start(self._server.serve(sockets=[self._socket]), name="receiver")
        server = self._server
        await eventually(lambda: server.started or task.done())
        return self

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True
            async with asyncio.timeout(10):
                await self._tasks.idle()
        self._socket.close()

    def numbers(self, handle: Handle, path: str = "") -> list[int]:
        """Numbers of the events of a task that were confirmed, in the order in which they came."""
        return [one.n for one in self.confirmed if one.task == handle.id and (not path or one.path == path)]

    async def reached(self, count: int, *, timeout: float = 15.0) -> None:
        """Return when so many requests have come."""
        await eventually(lambda: len(self.got) >= count, timeout=timeout)

    async def all_of(self, handle: Handle, mesh: BrokerMesh, path: str = "", *, timeout: float = 20.0) -> list[int]:
        """The numbers of all events of a task that has ended, once they were confirmed, each at least once."""
        stored = await StoredTask.read(mesh, handle.agent, handle.id)
        wanted = {event.n for event in stored.events}
        assert stored.ends
        await eventually(lambda: set(self.numbers(handle, path)) >= wanted, timeout=timeout)
        return sorted(wanted)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        got = Got(scope["path"], headers, body, time.monotonic())
        self.got.append(got)
        answer = self.answer(got)
        reply = await answer if isinstance(answer, Awaitable) else answer
        status, extra = reply if isinstance(reply, tuple) else (reply, {})
        if 200 <= status < 300:
            self.confirmed.append(got)
        lines = [(name.encode(), value.encode()) for name, value in extra.items()]
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": b""})


@dataclass
class Stage:
    """A mesh with an agent, a caller, and whatever delivers."""

    mesh: BrokerMesh
    caller: Mesh
    agent: str
    gates: dict[str, asyncio.Event]
    operator: Broker
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def receiver(self, answer: Callable[[Got], Reply | Awaitable[Reply]] | None = None) -> Receiver:
        made = await Receiver(answer).start()
        self.stack.push_async_callback(made.aclose)
        return made

    async def deliverer(self, **options: Any) -> Deliverer:
        """One more that delivers, on a connection of its own."""
        broker = await self.mesh.connect("coordinator")
        self.stack.push_async_callback(broker.close)
        timeout = options.pop("timeout", 5.0)
        settings = PushConfig(
            allow_private=options.pop("allow_private", True), timeout=timeout, attempts_for=options.pop("tried", 600.0)
        )
        options.setdefault("backoff", Backoff(first=0.1, longest=0.5))
        made = await Deliverer(broker, settings, ack_wait=ACK_WAIT, signer=_Signer(), **options).start()
        self.stack.push_async_callback(made.aclose)
        return made

    async def process(self) -> Process:
        """One more that delivers, as a process."""
        env = {"WEFT_HOME": str(self.mesh.home), "WEFT_IDENTITY": "coordinator", "ACK_WAIT": str(ACK_WAIT)}
        made = Process((str(Path(__file__).with_name("push_process.py")),), ready="ready", env=env)
        return await self.stack.enter_async_context(made)

    async def submit(self, text: str) -> Handle:
        handle = await self.caller.submit(self.agent, text)
        self.stack.push_async_callback(handle.aclose)
        return handle

    def gate(self, name: str) -> asyncio.Event:
        return self.gates[name]

    async def hook(self, handle: Handle, url: str, config_id: str = "one", *, after: int = 0, **more: Any) -> None:
        """Set a config of a task."""
        config = pb.TaskPushNotificationConfig(task_id=handle.id, id=config_id, url=url, **more)
        await self._call(handle, "CreateTaskPushNotificationConfig", config, h.fields({h.EVENT: str(after)}))

    async def unhook(self, handle: Handle, config_id: str = "one") -> None:
        """Delete a config of a task."""
        request = pb.DeleteTaskPushNotificationConfigRequest(task_id=handle.id, id=config_id)
        await self._call(handle, "DeleteTaskPushNotificationConfig", request)

    async def _call(self, handle: Handle, method: str, request: Any, extra: bytes = b"") -> None:
        await reads.call(self.caller.broker, method, agent=handle.agent, caller="local", request=request, extra=extra)

    async def cursor(self, handle: Handle, config_id: str = "one") -> PushCursor | None:
        """How far a delivery has come."""
        found = await self.operator.last(PUSH, subjects.pushed("local", handle.agent, handle.id, config_id))
        return None if found is None else PushCursor.decode(found.data)

    async def pending(self) -> int:
        """Deliveries that are under way or wait."""
        info = await self.operator.api(f"CONSUMER.INFO.{PUSH}.{PUSH_CONSUMER}")
        return int(info["num_ack_pending"]) + int(info["num_pending"])

    async def pending_none(self) -> bool:
        """Whether nothing is left to deliver."""
        return await self.pending() == 0


@pytest.fixture(scope="module")
async def shared(anyio_backend: str) -> AsyncIterator[tuple[BrokerMesh, Mesh, str, dict[str, asyncio.Event]]]:
    gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
    name = unique_name("pushed")
    agent = weft.Agent(name, concurrency=64, suspend_after=0.2)

    @agent.skill("work")
    async def work(task: weft.Task) -> Any:
        verb, _, rest = task.text.partition(" ")
        if verb == "count":
            for n in range(int(rest)):
                await task.update(f"update {n}")
        if verb == "gate":
            await task.update("at the gate")
            await gates[rest].wait()
            for n in range(3):
                await task.update(f"after {n}")
        if verb == "ask":
            return f"got {(await task.ask('which?')).text}"
        if verb == "reject":
            raise weft.Reject("not me")
        if verb == "large":
            return "x" * int(rest)
        return "done"

    async with await start_test_mesh() as mesh, coordinator_process(mesh), running(mesh, agent), client(mesh) as caller:
        operator = await mesh.connect("coordinator")
        found = (await operator.api(f"CONSUMER.INFO.{PUSH}.{PUSH_CONSUMER}"))["config"]
        config = {**found, "ack_wait": int(ACK_WAIT * SECOND)}
        create = f"CONSUMER.CREATE.{PUSH}.{PUSH_CONSUMER}.{found['filter_subject']}"
        await operator.api(create, {"stream_name": PUSH, "config": config, "action": "update"})
        await operator.close()
        yield mesh, caller, name, gates
        for gate in gates.values():
            gate.set()


@pytest.fixture
async def stage(shared: tuple[BrokerMesh, Mesh, str, dict[str, asyncio.Event]]) -> AsyncIterator[Stage]:
    """What a test of its own needs; nothing of another test is left to deliver."""
    mesh, caller, agent, gates = shared
    made = Stage(mesh, caller, agent, gates, await mesh.connect("coordinator"))
    await made.operator.api(f"STREAM.PURGE.{PUSH}")
    async with made.stack:
        yield made
    await made.operator.close()


# What is delivered -------------------------------------------------------------------------------------


async def test_every_event_is_pushed_once_and_in_order_as_it_is_stored(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    handle = await stage.submit("count 5")
    await stage.hook(handle, receiver.url())
    await handle.result(20)
    wanted = await receiver.all_of(handle, stage.mesh)
    assert receiver.numbers(handle) == wanted
    stored = await StoredTask.read(stage.mesh, handle.agent, handle.id)
    assert [one.event for one in receiver.got] == [event.decode() for event in stored.events]
    assert receiver.got[-1].event.status_update.status.state == pb.TASK_STATE_COMPLETED
    await eventually(stage.pending_none)


async def test_a_notification_says_what_it_is_and_carries_the_credentials_of_its_config(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    handle = await stage.submit("count 1")
    authentication = pb.AuthenticationInfo(scheme="Bearer", credentials="s3cret")
    await stage.hook(handle, receiver.url("/hook?a=b"), token="t0ken", authentication=authentication)
    await handle.result(20)
    await receiver.all_of(handle, stage.mesh)
    for one in receiver.got:
        assert one.headers["content-type"] == "application/a2a+json"
        assert one.headers["authorization"] == "Bearer s3cret"
        assert one.headers["x-a2a-notification-token"] == "t0ken"
        assert one.headers["a2a-version"] == "1.0"
        assert one.headers["host"] == f"127.0.0.1:{receiver.port}"
        assert one.id == f"{handle.id}_one_{one.n}"
    assert len({one.id for one in receiver.got}) == len(receiver.got)


async def test_the_code_in_the_documentation_verifies_the_signature(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    handle = await stage.submit("count 1")
    await stage.hook(handle, receiver.url())
    await handle.result(20)
    await receiver.all_of(handle, stage.mesh)
    code = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    namespace: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), namespace)
    verify = namespace["verify"]
    for one in receiver.got:
        assert json.loads(verify(one.headers, one.body, KEY.jwks()))
        with pytest.raises(ValueError, match="signature"):
            verify(one.headers, one.body + b" ", KEY.jwks())
        with pytest.raises(ValueError, match="signature"):
            verify({**one.headers, "webhook-id": "another"}, one.body, KEY.jwks())
        with pytest.raises(ValueError, match="signature"):
            verify(one.headers, one.body, CardKey.new().jwks())
        with pytest.raises(ValueError, match="old"):
            verify({**one.headers, "webhook-timestamp": "1700000000"}, one.body, KEY.jwks())


async def test_a_refusal_is_pushed_as_the_end_it_is(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    handle = await stage.submit("reject")
    await stage.hook(handle, receiver.url())
    assert (await handle.result(20)).state is State.REJECTED
    await receiver.all_of(handle, stage.mesh)
    assert receiver.got[-1].event.status_update.status.state == pb.TASK_STATE_REJECTED


async def test_a_large_artifact_is_pushed_with_its_content(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    handle = await stage.submit("large 600000")
    await stage.hook(handle, receiver.url())
    await handle.result(20)
    await receiver.all_of(handle, stage.mesh)
    assert any(b"x" * 600_000 in one.body for one in receiver.got)
    assert not any(b"weft-blob" in one.body for one in receiver.got)


async def test_a_config_comes_with_a_message_and_the_message_sent_again_adds_none(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    operations = Operations(stage.caller, _Cards())
    message = pb.Message(message_id="m-inline", role=pb.ROLE_USER, parts=[pb.Part(text="count 3")])
    config = pb.TaskPushNotificationConfig(url=receiver.url())
    ids = set()
    for wait in (False, True):
        request = pb.SendMessageRequest(message=message)
        request.configuration.task_push_notification_config.CopyFrom(config)
        request.configuration.return_immediately = not wait
        ids.add((await operations.send_message(stage.agent, request)).task.id)
    (task_id,) = ids
    listed = await operations.list_push_configs(stage.agent, pb.ListTaskPushNotificationConfigsRequest(task_id=task_id))
    assert [one.url for one in listed.configs] == [receiver.url()]
    async with await stage.caller.handle(stage.agent, task_id) as handle:
        wanted = await receiver.all_of(handle, stage.mesh)
        await eventually(stage.pending_none)
        assert sorted(set(receiver.numbers(handle))) == wanted


async def test_a_config_of_a_task_that_has_ended_gets_what_happened(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    handle = await stage.submit("count 2")
    await handle.result(20)
    await stage.hook(handle, receiver.url())
    wanted = await receiver.all_of(handle, stage.mesh)
    assert receiver.numbers(handle) == wanted


async def test_delivery_can_begin_after_an_event(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    handle = await stage.submit("count 5")
    await handle.result(20)
    stored = await StoredTask.read(stage.mesh, handle.agent, handle.id)
    last = stored.events[-1].n
    await stage.hook(handle, receiver.url("/late"), "late", after=last - 2)
    await stage.hook(handle, receiver.url("/too-late"), "too-late", after=last + 7)
    await eventually(stage.pending_none)
    assert receiver.numbers(handle) == [last - 1, last]
    assert {one.path for one in receiver.got} == {"/late"}


async def test_every_config_of_a_task_gets_every_event(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    handle = await stage.submit("gate several")
    for name in ("a", "b", "c.d"):
        await stage.hook(handle, receiver.url(f"/{name}"), name)
    stage.gate("several").set()
    await handle.result(20)
    for name in ("a", "b", "c.d"):
        wanted = await receiver.all_of(handle, stage.mesh, f"/{name}")
        assert receiver.numbers(handle, f"/{name}") == wanted
    assert len({one.id for one in receiver.got}) == len(receiver.got)


# What fails ----------------------------------------------------------------------------------------------


async def test_a_receiver_that_is_down_for_a_while_misses_nothing(stage: Stage) -> None:
    receiver = Receiver()
    stage.stack.push_async_callback(receiver.aclose)
    deliverer = await stage.deliverer()
    handle = await stage.submit("count 4")
    await stage.hook(handle, receiver.url())
    await handle.result(20)
    await eventually(lambda: deliverer.failed >= 2)
    await receiver.start()
    wanted = await receiver.all_of(handle, stage.mesh)
    assert receiver.numbers(handle) == wanted


async def test_a_receiver_that_answers_too_late_gets_the_same_notification_again(stage: Stage) -> None:
    hold = asyncio.Event()

    async def slow_once(got: Got) -> Reply:
        if got.n == 2 and sum(one.n == 2 for one in receiver.got) == 1:
            await hold.wait()
            return 503
        return 200

    receiver = await stage.receiver(slow_once)
    await stage.deliverer(timeout=0.4)
    handle = await stage.submit("count 3")
    await stage.hook(handle, receiver.url())
    await handle.result(20)
    wanted = await receiver.all_of(handle, stage.mesh)
    hold.set()
    assert receiver.numbers(handle) == wanted
    twice = [one for one in receiver.got if one.n == 2]
    assert len(twice) == 2
    assert twice[0].id == twice[1].id
    assert twice[0].body == twice[1].body


async def test_order_is_kept_across_failures(stage: Stage) -> None:
    failures = {1: 2, 3: 3, 4: 1}

    def flaky(got: Got) -> Reply:
        left = failures.get(got.n, 0)
        failures[got.n] = left - 1
        return 500 if left > 0 else 200

    receiver = await stage.receiver(flaky)
    await stage.deliverer(backoff=Backoff(first=0.02, longest=0.1))
    handle = await stage.submit("count 4")
    await stage.hook(handle, receiver.url())
    await handle.result(20)
    wanted = await receiver.all_of(handle, stage.mesh)
    came = [one.n for one in receiver.got]
    assert receiver.numbers(handle) == wanted
    assert came == sorted(came)
    assert [came.count(n) for n in (1, 2, 3, 4)] == [3, 1, 4, 2]


async def test_a_receiver_is_left_alone_for_as_long_as_it_asks(stage: Stage) -> None:
    def busy_once(got: Got) -> Reply:
        return (429, {"Retry-After": "1"}) if len(receiver.got) == 1 else 200

    receiver = await stage.receiver(busy_once)
    await stage.deliverer(backoff=Backoff(first=0.01, longest=0.02))
    handle = await stage.submit("count 1")
    await stage.hook(handle, receiver.url())
    await handle.result(20)
    await receiver.all_of(handle, stage.mesh)
    assert receiver.got[1].at - receiver.got[0].at >= 0.95
    assert receiver.got[0].id == receiver.got[1].id


async def test_a_redirect_is_a_failure_and_leads_nowhere(stage: Stage) -> None:
    def moved(got: Got) -> Reply:
        return (307, {"Location": receiver.url("/private")}) if len(receiver.got) < 3 else 200

    receiver = await stage.receiver(moved)
    await stage.deliverer()
    handle = await stage.submit("count 1")
    await stage.hook(handle, receiver.url("/public"))
    await handle.result(20)
    wanted = await receiver.all_of(handle, stage.mesh)
    assert {one.path for one in receiver.got} == {"/public"}
    assert len(receiver.got) == len(wanted) + 2


async def test_a_name_that_leads_to_loopback_is_not_called(stage: Stage) -> None:
    receiver = await stage.receiver()
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    poster = Poster(allow_private=False, timeout=5.0, resolve=resolve)
    deliverer = await stage.deliverer(allow_private=False, poster=poster)
    handle = await stage.submit("count 1")
    await stage.hook(handle, f"https://rebinding.example.com:{receiver.port}/hook")
    await handle.result(20)
    await eventually(lambda: deliverer.failed >= 2)
    cursor = await stage.cursor(handle)
    assert cursor is not None
    assert "not a public address" in cursor.reason
    assert (cursor.n, cursor.given_up) == (0, False)
    assert asked[0] == "rebinding.example.com"
    assert receiver.got == []


@pytest.mark.parametrize("url", ["http://93.184.216.34/", "https://127.0.0.1:{port}/", "https://[::1]:{port}/"])
async def test_a_url_that_is_not_to_be_called_is_given_up_at_once(stage: Stage, url: str) -> None:
    receiver = await stage.receiver()
    deliverer = await stage.deliverer(allow_private=False)
    handle = await stage.submit("count 1")
    await stage.hook(handle, url.format(port=receiver.port))
    await handle.result(20)
    await eventually(stage.pending_none)
    cursor = await stage.cursor(handle)
    assert cursor is not None
    assert cursor.given_up
    assert deliverer.failed == 1
    assert receiver.got == []


async def test_a_receiver_that_is_gone_for_good_is_not_called_again(stage: Stage) -> None:
    receiver = await stage.receiver(lambda got: 410 if got.n == 2 else 200)
    await stage.deliverer()
    handle = await stage.submit("count 3")
    await stage.hook(handle, receiver.url())
    await handle.result(20)
    await eventually(stage.pending_none)
    assert [one.n for one in receiver.got] == [1, 2]


async def test_a_delivery_is_given_up_after_its_time_and_a_new_config_goes_on_where_it_was(stage: Stage) -> None:
    receiver = await stage.receiver(lambda got: 500 if got.n == 2 and got.path == "/old" else 200)
    await stage.deliverer(tried=0.5)
    handle = await stage.submit("count 3")
    await stage.hook(handle, receiver.url("/old"))
    await handle.result(20)
    await eventually(stage.pending_none)
    cursor = await stage.cursor(handle)
    assert cursor is not None
    assert (cursor.n, cursor.given_up, cursor.reason) == (1, True, "the receiver answered 500")
    assert cursor.failures > 1
    await stage.hook(handle, receiver.url("/new"))
    wanted = await receiver.all_of(handle, stage.mesh)
    assert receiver.numbers(handle, "/new") == wanted[1:]


async def test_secrets_are_in_no_log(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    receiver = await stage.receiver(lambda got: 500 if len(receiver.got) < 3 else 200)
    await stage.deliverer()
    handle = await stage.submit("count 1")
    authentication = pb.AuthenticationInfo(scheme="Bearer", credentials="s3cret-credentials")
    await stage.hook(
        handle, receiver.url("/hook?key=s3cret-query"), token="s3cret-token", authentication=authentication
    )
    await handle.result(20)
    await receiver.all_of(handle, stage.mesh)
    said = [record.getMessage() for record in caplog.records if record.name != "asyncio"]
    assert any("failed" in line for line in said)
    assert not [line for line in said if "s3cret" in line]


# Changing and deleting -----------------------------------------------------------------------------------


async def test_a_config_that_is_replaced_goes_on_under_its_new_url(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    handle = await stage.submit("gate replaced")
    await stage.hook(handle, receiver.url("/old"))
    await receiver.reached(1)
    before = len(receiver.got)
    await stage.hook(handle, receiver.url("/new"))
    stage.gate("replaced").set()
    await handle.result(20)
    wanted = await receiver.all_of(handle, stage.mesh)
    assert sorted(set(receiver.numbers(handle))) == wanted
    assert {one.path for one in receiver.got[before:]} <= {"/old", "/new"}
    assert receiver.numbers(handle, "/new")[-1] == wanted[-1]
    assert wanted[-1] not in receiver.numbers(handle, "/old")


async def test_after_its_deletion_a_config_gets_nothing_more(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    handle = await stage.submit("gate deleted")
    await stage.hook(handle, receiver.url("/deleted"), "deleted")
    await stage.hook(handle, receiver.url("/kept"), "kept")
    # It is at the gate: nothing more comes before that is opened.
    await eventually(lambda: all(receiver.numbers(handle, path)[-1:] == [2] for path in ("/deleted", "/kept")))
    await stage.unhook(handle, "deleted")
    before = receiver.numbers(handle, "/deleted")
    stage.gate("deleted").set()
    await handle.result(20)
    await receiver.all_of(handle, stage.mesh, "/kept")
    await eventually(stage.pending_none)
    assert receiver.numbers(handle, "/deleted") == before


async def test_deletion_ends_attempts_that_fail(stage: Stage) -> None:
    receiver = await stage.receiver(lambda _: 500)
    await stage.deliverer(backoff=Backoff(first=0.05, longest=0.05))
    handle = await stage.submit("count 1")
    await stage.hook(handle, receiver.url())
    await receiver.reached(3)
    await stage.unhook(handle)
    await eventually(stage.pending_none)
    before = len(receiver.got)
    other = await stage.receiver()
    await stage.hook(handle, other.url(), "two")
    await handle.result(20)
    await other.all_of(handle, stage.mesh)
    assert len(receiver.got) == before


# Several that deliver ------------------------------------------------------------------------------------


async def test_what_a_killed_one_was_delivering_another_delivers(stage: Stage) -> None:
    """kill -9 in the middle of a POST: nothing is missed, and what comes twice has the same id."""
    reached, hold = asyncio.Event(), asyncio.Event()

    async def stuck(got: Got) -> Reply:
        if got.n == 3 and not reached.is_set():
            reached.set()
            await hold.wait()
            return 200
        return 200

    receiver = await stage.receiver(stuck)
    victim = await stage.process()
    handle = await stage.submit("count 6")
    await stage.hook(handle, receiver.url())
    await handle.result(20)
    async with asyncio.timeout(15):
        await reached.wait()
    await stage.deliverer()
    victim.kill()
    assert await victim.exited() == -9
    wanted = await receiver.all_of(handle, stage.mesh)
    hold.set()
    ids: dict[int, set[str]] = defaultdict(set)
    for one in receiver.got:
        ids[one.n].add(one.id)
    assert all(len(found) == 1 for found in ids.values())
    assert sorted(ids) == wanted
    assert sum(one.n == 3 for one in receiver.got) == 2
    await eventually(stage.pending_none)


async def test_two_that_deliver_share_the_work_and_repeat_nothing(stage: Stage) -> None:
    receiver = await stage.receiver()
    first = await stage.deliverer(limits=Limits(follow=4))
    second = await stage.deliverer(limits=Limits(follow=4))
    handles = [await stage.submit("gate shared") for _ in range(6)]
    for handle in handles:
        await stage.hook(handle, receiver.url())
    stage.gate("shared").set()
    for handle in handles:
        await handle.result(20)
        wanted = await receiver.all_of(handle, stage.mesh)
        assert receiver.numbers(handle) == wanted
    assert first.delivered + second.delivered == len(receiver.got)


async def test_one_that_stops_hands_its_deliveries_over_at_once(stage: Stage) -> None:
    receiver = await stage.receiver()
    first = await stage.deliverer()
    handle = await stage.submit("gate handover")
    await stage.hook(handle, receiver.url())
    await receiver.reached(1)
    await stage.deliverer()
    await first.aclose()
    begun = time.monotonic()
    stage.gate("handover").set()
    await handle.result(20)
    wanted = await receiver.all_of(handle, stage.mesh)
    assert receiver.numbers(handle) == wanted
    assert time.monotonic() - begun < ACK_WAIT


async def test_a_holder_that_stood_still_sends_nothing_more(stage: Stage) -> None:
    """SIGSTOP for longer than the lease: another goes on, and the first knows when it wakes up."""
    receiver = await stage.receiver()
    paused = await stage.process()
    handle = await stage.submit("gate paused")
    await stage.hook(handle, receiver.url())
    await receiver.reached(1)
    await eventually(lambda: _caught_up(stage, handle))
    paused.pause()
    await stage.deliverer()
    stage.gate("paused").set()
    await handle.result(20)
    wanted = await receiver.all_of(handle, stage.mesh)
    paused.proceed()
    other = await stage.submit("count 1")
    await stage.hook(other, receiver.url())
    await other.result(20)
    await receiver.all_of(other, stage.mesh)
    numbers = receiver.numbers(handle)
    assert numbers[: len(wanted)] == wanted
    # The holder that slept would go on with its second event; the other one may repeat the last, as promised.
    assert set(numbers[len(wanted) :]) <= {wanted[-1]}


# Many ------------------------------------------------------------------------------------------------------


async def test_tasks_that_stand_still_do_not_hold_up_the_delivery_of_others(stage: Stage) -> None:
    receiver = await stage.receiver()
    deliverer = await stage.deliverer(limits=Limits(follow=6, step_back=0.5))
    parked = [await stage.submit("ask") for _ in range(30)]
    for handle in parked:
        await stage.hook(handle, receiver.url())
    await eventually(lambda: len({one.task for one in receiver.got}) == 30)
    assert deliverer.following <= 6
    handle = await stage.submit("count 3")
    await stage.hook(handle, receiver.url())
    await handle.result(20)
    await receiver.all_of(handle, stage.mesh, timeout=5.0)
    for one in parked[::10]:
        await one.send("this")
        await receiver.all_of(one, stage.mesh)
    for one in parked:
        await stage.unhook(one)


async def test_a_slow_host_does_not_hold_up_the_others(stage: Stage) -> None:
    hold = asyncio.Event()

    async def stuck(got: Got) -> Reply:
        await hold.wait()
        return 200

    slow, quick = await stage.receiver(stuck), await stage.receiver()
    await stage.deliverer(limits=Limits(follow=8, posts=4, posts_per_host=2, step_back=0.5), timeout=20.0)
    handles = [await stage.submit("count 1") for _ in range(10)]
    for handle in handles:
        await stage.hook(handle, slow.url(host="localhost"))
    await slow.reached(2)
    handle = await stage.submit("count 2")
    await stage.hook(handle, quick.url())
    await handle.result(20)
    await quick.all_of(handle, stage.mesh, timeout=5.0)
    assert len(slow.got) == 2
    hold.set()
    for one in handles:
        await one.result(20)
        await slow.all_of(one, stage.mesh)


async def test_a_broker_that_restarts_loses_no_delivery(stage: Stage) -> None:
    receiver = await stage.receiver()
    await stage.deliverer()
    handle = await stage.submit("gate restart")
    await stage.hook(handle, receiver.url())
    await receiver.reached(1)
    await stage.mesh.server.stop()
    await stage.mesh.server.start()
    stage.gate("restart").set()
    await handle.result(30)
    wanted = await receiver.all_of(handle, stage.mesh, timeout=25.0)
    assert sorted(set(receiver.numbers(handle))) == wanted


async def _caught_up(stage: Stage, handle: Handle) -> bool:
    """Whether a task that stands at its gate has nothing left to deliver."""
    cursor, stored = await stage.cursor(handle), await StoredTask.read(stage.mesh, handle.agent, handle.id)
    return cursor is not None and cursor.n == len(stored.events) >= 2
