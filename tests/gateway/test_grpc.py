"""A2A over gRPC: every operation of every agent on one port, errors with their details, and nothing left behind."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from a2a.client import A2ACardResolver, ClientConfig, ClientFactory
from a2a.compat.v0_3 import a2a_v0_3_pb2 as old
from a2a.compat.v0_3 import a2a_v0_3_pb2_grpc
from a2a.types import a2a_pb2 as pb
from a2a.types import a2a_pb2_grpc
from a2a.utils.errors import TaskNotCancelableError
from a2a.utils.grpc_status import status_from_call
from google.protobuf import empty_pb2
from google.rpc import error_details_pb2

from weft.client.operations import Operations
from weft.core.gatewayconf import AuthConfig, GatewayConfig, LimitsConfig, TokenConfig
from weft.gateway.service import GatewayService, serving
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh

pytestmark = pytest.mark.anyio

ANY_PORT = GatewayConfig(port=0, grpc_port=0)
V1 = (("a2a-version", "1.0"),)


@dataclass(slots=True)
class Here:
    """A gateway in this process and a channel to it."""

    service: GatewayService
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        make: Any = a2a_pb2_grpc.A2AServiceStub
        return make(self.channel)

    async def knows(self, agent: str) -> None:
        """Return when the agent's card is there."""

        async def known() -> bool:
            self.service.directory.forget()
            return any(one.name == agent for one in await self.service.directory.list())

        await eventually(known)
        self.service.directory.forget()

    async def idle(self) -> None:
        """Return when nothing is followed, counted or under way any more."""
        await eventually(
            lambda: (
                self.service.callers.following == 0
                and self.service.limiter.streams == 0
                and self.service.limiter.requests == 0
            )
        )


@pytest.fixture
async def start(stage: BrokerMesh) -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:

        async def one(config: GatewayConfig = ANY_PORT) -> Here:
            service = await stack.enter_async_context(serving(stage.settings("gateway"), config))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(service.grpc))
            return Here(service, channel)

        yield one


@pytest.fixture
async def served(start: Callable[..., Any]) -> Here:
    made: Here = await start()
    return made


def message(text: str, **more: Any) -> pb.Message:
    return pb.Message(**{"message_id": uuid.uuid4().hex, "role": pb.ROLE_USER, "parts": [pb.Part(text=text)], **more})


def send(agent: str, text: str, *, now: bool = False, **more: Any) -> pb.SendMessageRequest:
    request = pb.SendMessageRequest(tenant=agent, message=message(text, **more))
    request.configuration.return_immediately = now
    return request


@asynccontextmanager
async def refused(code: grpc.StatusCode, reason: str) -> AsyncIterator[list[Any]]:
    """Expect an error with this status and reason; the details are put into what is yielded."""
    found: list[Any] = []
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        yield found
    error: Any = raised.value
    assert error.code() is code, error
    status = status_from_call(error)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == reason, error.details()
    found += [error, info]
    if len(status.details) > 1:
        bad = error_details_pb2.BadRequest()
        assert status.details[1].Unpack(bad)
        found.append(bad)


# Operations ------------------------------------------------------------------------------------------


async def test_a_message_is_answered_with_its_task(served: Here, worker: Any) -> None:
    task = (await served.stub.SendMessage(send(worker.name, "hello"), metadata=V1)).task
    assert (task.status.state, task.artifacts[0].parts[0].text) == (pb.TASK_STATE_COMPLETED, "HELLO")
    found = await served.stub.GetTask(pb.GetTaskRequest(tenant=worker.name, id=task.id), metadata=V1)
    assert found == task
    page = await served.stub.ListTasks(pb.ListTasksRequest(tenant=worker.name), metadata=V1)
    assert [one.id for one in page.tasks] == [task.id]
    await served.idle()


async def test_the_agent_is_the_first_segment_of_the_tenant_or_metadata_or_the_default(
    start: Callable[..., Any], stage: BrokerMesh, served: Here, worker: Any
) -> None:
    other = await start(GatewayConfig(port=0, grpc_port=0, default_agent=worker.name))
    by_metadata = (*V1, ("weft-agent", worker.name))
    assert (await served.stub.SendMessage(send("", "x"), metadata=by_metadata)).task.artifacts
    assert (await served.stub.SendMessage(send(f"{worker.name}/acme", "x"), metadata=V1)).task.artifacts
    assert (await other.stub.SendMessage(send("", "x"), metadata=V1)).task.artifacts


async def test_a_tenant_does_not_see_the_tasks_of_another(served: Here, worker: Any) -> None:
    task = (await served.stub.SendMessage(send(f"{worker.name}/acme", "x"), metadata=V1)).task
    same = pb.GetTaskRequest(tenant=f"{worker.name}/acme", id=task.id)
    assert (await served.stub.GetTask(same, metadata=V1)).id == task.id
    for tenant in (f"{worker.name}/other", worker.name):
        async with refused(grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND"):
            await served.stub.GetTask(pb.GetTaskRequest(tenant=tenant, id=task.id), metadata=V1)


async def test_a_stock_client_goes_where_the_card_says(served: Here, worker: Any) -> None:
    async with httpx.AsyncClient() as http:
        card = await A2ACardResolver(http, f"{served.service.http}/agents/{worker.name}").get_agent_card()
    (interface,) = (one for one in card.supported_interfaces if one.protocol_binding == "GRPC")
    assert (interface.url, interface.tenant, interface.protocol_version) == (served.service.grpc, worker.name, "1.0")
    config = ClientConfig(
        grpc_channel_factory=grpc.aio.insecure_channel, supported_protocol_bindings=["GRPC"], streaming=True
    )
    async with ClientFactory(config).create(card) as client:
        request = pb.SendMessageRequest(message=message("chunks 2"))
        events = [event async for event in client.send_message(request)]
        task = events[0].task
        assert events[-1].status_update.status.state == pb.TASK_STATE_COMPLETED
        assert (await client.get_task(pb.GetTaskRequest(id=task.id))).status.state == pb.TASK_STATE_COMPLETED
        with pytest.raises(TaskNotCancelableError):
            await client.cancel_task(pb.CancelTaskRequest(id=task.id))


async def test_a_request_that_names_no_agent_is_told_how(served: Here) -> None:
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMS") as found:
        await served.stub.GetTask(pb.GetTaskRequest(id="1"), metadata=V1)
    assert "set `tenant` to the agent's name" in found[0].details()
    assert found[2].field_violations[0].field == "tenant"


async def test_an_agent_that_is_not_there_is_not_found(served: Here, worker: Any) -> None:
    for call in (served.stub.GetTask(pb.GetTaskRequest(tenant=worker.name[:-1], id="1"), metadata=V1),):
        async with refused(grpc.StatusCode.NOT_FOUND, "INVALID_REQUEST") as found:
            await call
        assert f"did you mean '{worker.name}'" in found[0].details()
    async with refused(grpc.StatusCode.NOT_FOUND, "INVALID_REQUEST"):
        async for _ in served.stub.SendStreamingMessage(send("nobody-here", "x"), metadata=V1):
            pass


@pytest.mark.parametrize("version", ["", "0.3", "1.1", "2.0", "one"])
async def test_a_version_that_is_not_1_0_is_refused(served: Here, worker: Any, version: str) -> None:
    metadata = (("a2a-version", version),) if version else ()
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, "VERSION_NOT_SUPPORTED"):
        await served.stub.SendMessage(send(worker.name, "x"), metadata=metadata)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, "VERSION_NOT_SUPPORTED"):
        async for _ in served.stub.SendStreamingMessage(send(worker.name, "x"), metadata=metadata):
            pass
    assert worker.started == []


async def test_errors_have_their_status_and_details(served: Here, worker: Any) -> None:
    stub = served.stub
    task = (await stub.SendMessage(send(worker.name, "x"), metadata=V1)).task
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, "TASK_NOT_CANCELABLE"):
        await stub.CancelTask(pb.CancelTaskRequest(tenant=worker.name, id=task.id), metadata=V1)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED_OPERATION"):
        await stub.SendMessage(send(worker.name, "x", task_id=task.id), metadata=V1)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED_OPERATION"):
        async for _ in stub.SubscribeToTask(pb.SubscribeToTaskRequest(tenant=worker.name, id=task.id), metadata=V1):
            pass
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMS") as found:
        await stub.SendMessage(send(worker.name, "x", message_id=""), metadata=V1)
    assert [wrong.field for wrong in found[2].field_violations] == ["message.message_id"]


async def test_bytes_that_are_no_request_are_a_parse_error(served: Here, worker: Any) -> None:
    raw: Any = served.channel.unary_unary("/lf.a2a.v1.A2AService/GetTask")
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "PARSE_ERROR"):
        await raw(b"\xff\xff\xff", metadata=V1)


async def test_an_unknown_method_is_unimplemented(served: Here) -> None:
    raw: Any = served.channel.unary_unary("/lf.a2a.v1.A2AService/GetEverything")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await raw(b"", metadata=V1)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_what_breaks_inside_stays_inside(
    served: Here, worker: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any) -> Any:
        raise RuntimeError("password 123")

    monkeypatch.setattr(Operations, "get_task", broken)
    async with refused(grpc.StatusCode.INTERNAL, "INTERNAL_ERROR") as found:
        await served.stub.GetTask(pb.GetTaskRequest(tenant=worker.name, id="1"), metadata=V1)
    assert "password" not in found[0].debug_error_string()
    incident = found[0].details().split()[2].strip(":")
    assert incident in caplog.text


# Streams ---------------------------------------------------------------------------------------------


async def test_a_stream_begins_with_the_task_and_ends_with_it(served: Here, worker: Any) -> None:
    call = served.stub.SendStreamingMessage(send(worker.name, "chunks 3"), metadata=V1)
    events = [event async for event in call]
    assert events[0].WhichOneof("payload") == "task"
    said = [e.status_update.status.message.parts[0].text for e in events if e.status_update.status.message.parts]
    assert said == ["chunk 0", "chunk 1", "chunk 2"]
    assert events[-1].status_update.status.state == pb.TASK_STATE_COMPLETED
    last = dict(await call.trailing_metadata())["last-event-id"]
    assert int(last) >= 5
    await served.idle()


async def test_a_stream_goes_on_after_the_event_the_client_has(served: Here, worker: Any) -> None:
    task = (await served.stub.SendMessage(send(worker.name, "gate", now=True), metadata=V1)).task
    request = pb.SubscribeToTaskRequest(tenant=worker.name, id=task.id)
    first = served.stub.SubscribeToTask(request, metadata=V1)
    seen = [await first.read()]
    while "at the gate" not in str(seen[-1]):
        seen.append(await first.read())
    assert seen[0].WhichOneof("payload") == "task"
    first.cancel()
    await served.idle()
    again = served.stub.SubscribeToTask(request, metadata=(*V1, ("last-event-id", "1")))
    worker.gate.set()
    rest = [event async for event in again]
    assert all(event.WhichOneof("payload") != "task" for event in rest)
    assert rest[-1].status_update.status.state == pb.TASK_STATE_COMPLETED
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMS"):
        await served.stub.SubscribeToTask(request, metadata=(*V1, ("last-event-id", "one"))).read()


async def test_a_client_that_goes_away_frees_everything(served: Here, worker: Any) -> None:
    streams = [served.stub.SendStreamingMessage(send(worker.name, "gate"), metadata=V1) for _ in range(5)]
    for stream in streams:
        assert (await stream.read()).WhichOneof("payload") == "task"
    waiting = served.stub.SendMessage(send(worker.name, "hold"), metadata=V1)
    await eventually(lambda: len(worker.started) == 6)
    assert served.service.callers.following == 6
    for call in (*streams, waiting):
        call.cancel()
    await served.idle()
    assert served.service.limiter.streams_of("local") == 0


async def test_a_channel_that_breaks_frees_everything(served: Here, worker: Any, start: Callable[..., Any]) -> None:
    channel = grpc.aio.insecure_channel(served.service.grpc)
    make: Any = a2a_pb2_grpc.A2AServiceStub
    stream = make(channel).SendStreamingMessage(send(worker.name, "gate"), metadata=V1)
    assert (await stream.read()).WhichOneof("payload") == "task"
    await channel.close()
    await served.idle()


async def test_a_client_that_reads_nothing_is_cut_off(start: Callable[..., Any], worker: Any) -> None:
    slow = await start(GatewayConfig(port=0, grpc_port=0, limits=LimitsConfig(slow_reader=0.3)))
    window = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(slow.service.grpc, options=window) as channel:
        make: Any = a2a_pb2_grpc.A2AServiceStub
        stream = make(channel).SendStreamingMessage(send(worker.name, "gate " + "x" * 1_000_000), metadata=V1)
        await eventually(lambda: worker.started)
        await eventually(lambda: slow.service.callers.following == 0)
        async with refused(grpc.StatusCode.UNAVAILABLE, "SLOW_READER"):
            while await stream.read() is not grpc.aio.EOF:
                pass
        await slow.idle()


# Who calls, and how much -----------------------------------------------------------------------------

TOKENS = GatewayConfig(
    port=0,
    grpc_port=0,
    auth=AuthConfig(anonymous=None, tokens=(TokenConfig("ci", token_env="CI"), TokenConfig("desk", token_env="DESK"))),
)


async def test_a_call_needs_the_token_of_a_caller(
    start: Callable[..., Any], served: Here, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "c" * 32)
    monkeypatch.setenv("DESK", "d" * 32)
    guarded = await start(TOKENS)
    request = send(worker.name, "x")
    async with refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED") as found:
        await guarded.stub.SendMessage(request, metadata=V1)
    assert dict(found[0].trailing_metadata())["www-authenticate"].startswith("Bearer ")
    async with refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"):
        async for _ in guarded.stub.SendStreamingMessage(request, metadata=(*V1, ("authorization", "Bearer nonsense"))):
            pass
    ci = (*V1, ("authorization", "Bearer " + "c" * 32))
    task = (await guarded.stub.SendMessage(request, metadata=ci)).task
    assert task.status.state == pb.TASK_STATE_COMPLETED
    async with refused(grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND"):
        desk = (*V1, ("authorization", "Bearer " + "d" * 32))
        await guarded.stub.GetTask(pb.GetTaskRequest(tenant=worker.name, id=task.id), metadata=desk)
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"):
        await guarded.stub.GetTask(pb.GetTaskRequest(), metadata=(*ci, ("authorization", "Bearer x")))


async def test_limits_hold_for_grpc(start: Callable[..., Any], worker: Any) -> None:
    limits = LimitsConfig(body=50_000, requests=1, streams_per_caller=1)
    small = await start(GatewayConfig(port=0, grpc_port=0, limits=limits))
    first = small.stub.SendStreamingMessage(send(worker.name, "gate"), metadata=V1)
    assert (await first.read()).WhichOneof("payload") == "task"
    async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS"):
        await small.stub.SendStreamingMessage(send(worker.name, "gate"), metadata=V1).read()
    waiting = small.stub.SendMessage(send(worker.name, "hold"), metadata=V1)
    await eventually(lambda: small.service.limiter.requests == 1)
    async with refused(grpc.StatusCode.UNAVAILABLE, "TOO_MANY_REQUESTS"):
        await small.stub.SendMessage(send(worker.name, "x"), metadata=V1)
    worker.gate.set()
    assert (await waiting).task.status.state == pb.TASK_STATE_COMPLETED
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await small.stub.SendMessage(send(worker.name, "x" * 60_000), metadata=V1)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# A2A 0.3 ---------------------------------------------------------------------------------------------


async def test_clients_of_0_3_are_served(start: Callable[..., Any], served: Here, worker: Any) -> None:
    make: Any = a2a_v0_3_pb2_grpc.A2AServiceStub
    stub = make(served.channel)
    to = (("weft-agent", worker.name),)

    def request(text: str) -> old.SendMessageRequest:
        part = old.Part(text=text)
        made = old.SendMessageRequest(
            request=old.Message(message_id=uuid.uuid4().hex, role=old.ROLE_USER, content=[part])
        )
        made.configuration.blocking = True
        return made

    task = (await stub.SendMessage(request("hello"), metadata=to)).task
    assert task.status.state == old.TASK_STATE_COMPLETED
    assert (await stub.GetTask(old.GetTaskRequest(name=f"tasks/{task.id}"), metadata=to)).id == task.id
    events = [event async for event in stub.SendStreamingMessage(request("chunks 2"), metadata=to)]
    assert events[-1].status_update.status.state == old.TASK_STATE_COMPLETED
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.GetTask(old.GetTaskRequest(name=f"tasks/{'0' * 32}"), metadata=to)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert str(error.value.details()).startswith("TaskNotFoundError: ")
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, "VERSION_NOT_SUPPORTED"):
        await stub.GetTask(old.GetTaskRequest(name=f"tasks/{task.id}"), metadata=(*to, ("a2a-version", "1.0")))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMS"):
        await stub.SendMessage(request("whom?"))


# Health and leaving ----------------------------------------------------------------------------------


async def health(here: Here, service: str = "") -> bytes:
    check: Any = here.channel.unary_unary("/grpc.health.v1.Health/Check")
    name = service.encode()
    answer: bytes = await check(b"\x0a" + bytes([len(name)]) + name if name else empty_pb2.Empty().SerializeToString())
    return answer


async def test_the_health_service_answers_without_credentials(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "c" * 32)
    monkeypatch.setenv("DESK", "d" * 32)
    guarded = await start(TOKENS)
    assert await health(guarded) == b"\x08\x01"
    assert await health(guarded, "lf.a2a.v1.A2AService") == b"\x08\x01"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await health(guarded, "other.Service")
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_gateway_that_leaves_ends_what_does_not_end_so_that_clients_go_elsewhere(
    start: Callable[..., Any], served: Here, worker: Any
) -> None:
    leaving = await start()
    watch: Any = leaving.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
    assert await watch.read() == b"\x08\x01"
    stream = leaving.stub.SendStreamingMessage(send(worker.name, "gate"), metadata=V1)
    task = (await stream.read()).task
    waiting = leaving.stub.SendMessage(send(worker.name, "hold"), metadata=V1)
    await eventually(lambda: len(worker.started) == 2)
    drained = asyncio.get_running_loop().create_task(leaving.service.drain(0.3))
    assert await watch.read() == b"\x08\x02"
    async with refused(grpc.StatusCode.UNAVAILABLE, "GATEWAY_LEAVES") as found:
        while await stream.read() is not grpc.aio.EOF:
            pass
    last = dict(found[0].trailing_metadata())["last-event-id"]
    async with refused(grpc.StatusCode.UNAVAILABLE, "GATEWAY_LEAVES"):
        await waiting
    await drained
    again = pb.SubscribeToTaskRequest(tenant=worker.name, id=task.id)
    rest = served.stub.SubscribeToTask(again, metadata=(*V1, ("last-event-id", last)))
    worker.gate.set()
    events = [event async for event in rest]
    assert events[-1].status_update.status.state == pb.TASK_STATE_COMPLETED


async def test_what_ends_in_time_is_let_end(start: Callable[..., Any], served: Here, worker: Any) -> None:
    leaving = await start()
    waiting = leaving.stub.SendMessage(send(worker.name, "hold"), metadata=V1)
    await eventually(lambda: len(worker.started) == 1)
    drained = asyncio.get_running_loop().create_task(leaving.service.drain(20))
    worker.gate.set()
    assert (await waiting).task.status.state == pb.TASK_STATE_COMPLETED
    async with asyncio.timeout(10):
        await drained
