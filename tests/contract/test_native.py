"""What is the native transport's own: how clients are made, tenants, closing, its errors."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

import pytest
from a2a.client.client import Client, ClientCallContext, ClientConfig
from a2a.client.client_factory import ClientFactory
from a2a.client.errors import A2AClientError, A2AClientTimeoutError
from a2a.client.interceptors import AfterArgs, BeforeArgs, ClientCallInterceptor
from a2a.types import a2a_pb2 as pb
from a2a.utils import errors as sdk

import weft.a2a
from weft.client.transport import NatsTransport, agent_of, call_of, client_error
from weft.testing.agents import client as mesh_client
from weft.testing.agents import eventually
from weft_protocols import errors
from weft_protocols.errors import A2A_ERRORS, AgentNotFound, InvalidName

if TYPE_CHECKING:
    from tests.contract.conftest import Stage

pytestmark = pytest.mark.anyio
Items = AsyncGenerator[pb.StreamResponse, None]
SCRIPT = """
import asyncio, sys, weft, weft.a2a
from a2a.types import a2a_pb2 as pb

async def main():
    async with weft.connect("local", home=sys.argv[1]) as mesh:
        client = await weft.a2a.client("contract", mesh)
        message = pb.Message(message_id=sys.argv[2], role=pb.ROLE_USER, parts=[pb.Part(text="hold " + sys.argv[2])])
        async for item in client.send_message(pb.SendMessageRequest(message=message)):
            print(item.WhichOneof("payload"))
            break

asyncio.run(main())
"""


@pytest.fixture
async def native(stage: Stage) -> AsyncIterator[Client]:
    """A client by the agent's name."""
    async with await weft.a2a.client("contract", stage.callers["local"]) as made:
        yield made


async def test_a_stock_factory_makes_clients_once_the_transport_is_registered(stage: Stage) -> None:
    mesh = stage.callers["local"]
    card = await weft.a2a.resolve("contract", mesh)
    config = ClientConfig(supported_protocol_bindings=[weft.a2a.BINDING])
    with pytest.raises(ValueError, match="no client available"):
        ClientFactory(config).create(card)
    factory = ClientFactory(config)
    weft.a2a.register(factory, mesh)
    async with factory.create(card) as client:
        assert (await stage.stream(client, stage.message("echo x")))[-1].status_update.status.state == (
            pb.TASK_STATE_COMPLETED
        )


async def test_a_client_is_made_by_name_by_card_and_with_a_configuration(stage: Stage) -> None:
    mesh = stage.callers["local"]
    card = await weft.a2a.resolve("contract", mesh)
    config = ClientConfig(streaming=False, supported_protocol_bindings=["JSONRPC"])
    for made in (await weft.a2a.client("contract", mesh, config), await weft.a2a.client(card, mesh, config)):
        assert (await stage.send(made, stage.message("echo x"))).HasField("task")
        assert isinstance(made._transport, NatsTransport)  # type: ignore[attr-defined]
    assert config.supported_protocol_bindings == ["JSONRPC"]
    card.ClearField("supported_interfaces")
    with pytest.raises(ValueError, match="no compatible transports"):
        await weft.a2a.client(card, mesh)
    with pytest.raises(AgentNotFound):
        await weft.a2a.client("nobody", mesh)


async def test_interceptors_see_and_change_what_is_sent(stage: Stage) -> None:
    seen = []

    class Note(ClientCallInterceptor):
        async def before(self, args: BeforeArgs) -> None:
            seen.append(args.method)
            args.input.message.parts[0].text = "echo changed"

        async def after(self, args: AfterArgs) -> None:
            seen.append("after")

    config = ClientConfig(streaming=False)
    made = await weft.a2a.client("contract", stage.callers["local"], config, interceptors=[Note()])
    item = await stage.send(made, stage.message("echo x"))
    assert item.task.artifacts[0].parts[0].text == "changed"
    assert seen == ["send_message", "after"]


async def test_a_tenant_is_refused_since_a_mesh_is_one(stage: Stage, native: Client) -> None:
    with pytest.raises(sdk.InvalidParamsError, match="tenant"):
        await native.get_task(pb.GetTaskRequest(id=uuid.uuid4().hex, tenant="acme"))
    request = stage.message("echo x")
    request.tenant = "acme"
    with pytest.raises(sdk.InvalidParamsError, match="tenant"):
        await stage.stream(native, request)

    def tenant(card: pb.AgentCard) -> None:
        for interface in card.supported_interfaces:
            interface.tenant = "acme"

    async with stage.dial("nats", card=tenant) as decorated:
        with pytest.raises(sdk.InvalidParamsError, match="tenant"):
            await decorated.list_tasks(pb.ListTasksRequest())


async def test_the_request_stays_as_it_was(stage: Stage, native: Client) -> None:
    request = stage.message("echo x")
    before = pb.Message()
    before.CopyFrom(request.message)
    await stage.stream(native, request)
    assert request.message == before


async def test_a_closed_client_takes_no_more_calls_and_its_mesh_goes_on(stage: Stage) -> None:
    mesh = stage.callers["local"]
    made = await weft.a2a.client("contract", mesh)
    other = await weft.a2a.client("contract", mesh)
    await made.close()
    await made.close()
    with pytest.raises(A2AClientError, match="closed"):
        await made.list_tasks(pb.ListTasksRequest())
    with pytest.raises(A2AClientError, match="closed"):
        await stage.stream(made, stage.message("echo x"))
    assert (await stage.stream(other, stage.message("echo x")))[-1].HasField("status_update")


async def test_closing_a_client_ends_its_calls_and_its_streams(stage: Stage) -> None:
    gate = uuid.uuid4().hex
    await eventually(lambda: stage.callers["local"].following == 0)
    made = await weft.a2a.client("contract", stage.callers["local"])
    blocking = await weft.a2a.client("contract", stage.callers["local"], ClientConfig(streaming=False))
    message = stage.message(f"hold {gate}")
    waiting = asyncio.get_running_loop().create_task(stage.stream(blocking, message))
    idle = cast("Items", made.send_message(message))
    task_id = (await anext(idle)).task.id
    async with aclosing(cast("Items", made.subscribe(pb.SubscribeToTaskRequest(id=task_id)))) as watched:
        await anext(watched)
        reading = asyncio.get_running_loop().create_task(_drain(watched))
        await eventually(lambda: stage.callers["local"].following >= 1)
        await blocking.close()
        await made.close()
        await asyncio.wait([waiting, reading])
    for ended in (waiting, reading):
        assert isinstance(ended.exception(), A2AClientError)
    with pytest.raises(A2AClientError, match="closed"):
        await anext(idle)
    await eventually(lambda: stage.callers["local"].following == 0)
    stage.contract.gates[gate].set()


async def _drain(items: Items) -> None:
    async for _ in items:
        pass


async def test_a_stream_that_is_dropped_without_being_closed_is_given_up(stage: Stage, native: Client) -> None:
    gate = uuid.uuid4().hex
    await eventually(lambda: stage.callers["local"].following == 0)
    async for item in native.send_message(stage.message(f"hold {gate}")):
        assert item.HasField("task")
        assert stage.callers["local"].following == 1
        break
    del item
    gc.collect()
    await eventually(lambda: stage.callers["local"].following == 0)
    stage.contract.gates[gate].set()


async def test_a_stream_and_its_client_are_left_at_once_without_a_word(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    gate = uuid.uuid4().hex
    for turn in range(3):
        async with await weft.a2a.client("contract", stage.callers["local"]) as made:
            stream = cast("Items", made.send_message(stage.message(f"hold {gate}")))
            assert (await anext(stream)).HasField("task")
            left = [asyncio.get_running_loop().create_task(stream.aclose())] if turn else []
            del stream
        await asyncio.gather(*left)
    gc.collect()
    await eventually(lambda: stage.callers["local"].following == 0)
    stage.contract.gates[gate].set()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


async def test_a_program_that_ends_in_the_middle_of_a_stream_says_nothing(stage: Stage) -> None:
    gate = uuid.uuid4().hex
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", "-c", SCRIPT, str(stage.mesh.home), gate],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    stage.contract.gates[gate].set()
    assert (done.returncode, done.stdout, done.stderr) == (0, "task\n", "")


async def test_a_call_waits_as_long_as_it_is_told(stage: Stage) -> None:
    gate = uuid.uuid4().hex
    made = await weft.a2a.client("contract", stage.callers["local"])
    stream = cast("Items", made.send_message(stage.message(f"hold {gate}"), context=ClientCallContext(timeout=0.2)))
    async with aclosing(stream) as items:
        first = await anext(items)
        with pytest.raises(A2AClientTimeoutError):
            await _drain(items)
    stage.contract.gates[gate].set()
    assert (await stage.reached(made, first.task.id)).status.state == pb.TASK_STATE_COMPLETED


async def test_a_mesh_that_is_closed_is_an_error_of_the_client(stage: Stage) -> None:
    gate = uuid.uuid4().hex
    async with mesh_client(stage.mesh) as mesh:
        made = await weft.a2a.client("contract", mesh)
        stream = cast("Items", made.send_message(stage.message(f"hold {gate}")))
        await anext(stream)
    with pytest.raises(A2AClientError):
        await _drain(stream)
    with pytest.raises(A2AClientError):
        await made.list_tasks(pb.ListTasksRequest())
    stage.contract.gates[gate].set()


def test_the_agent_is_the_last_part_of_the_address() -> None:
    assert agent_of("nats://mesh/analyst") == "analyst"
    assert agent_of("tls://mesh.example.com:4222/analyst/") == "analyst"
    for wrong in ("nats://mesh", "nats://mesh/a/b", "nats://mesh/a.b", "nats://mesh/*"):
        with pytest.raises(InvalidName):
            agent_of(wrong)
    with pytest.raises(errors.InvalidConfig, match="nats://MESH/AGENT"):
        agent_of("http://mesh/analyst")


def test_service_parameters_are_read_without_case_and_credentials_stay_here() -> None:
    given = {
        "a2a-version": "1.0.3",
        "A2A-EXTENSIONS": "https://a.example, https://b.example",
        "Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "Authorization": "Bearer secret",
        "X-API-Key": "secret",
    }
    call = call_of(ClientCallContext(timeout=7.5, service_parameters=given))
    assert (call.version, call.wait) == ("1.0.3", 7.5)
    assert call.extensions == {"https://a.example", "https://b.example"}
    assert dict(call.headers) == {"traceparent": given["Traceparent"]}
    assert call_of(None) == call_of(ClientCallContext())
    assert call_of(ClientCallContext(service_parameters={"A2A-Version": ""})).version == ""


@pytest.mark.parametrize("reason", A2A_ERRORS)
def test_every_error_becomes_the_sdks_of_the_same_code(reason: str) -> None:
    error = errors.A2AError.from_reason(reason, "it is wrong", metadata={"what": "this"})
    made = client_error(error)
    assert made.message == "it is wrong"
    if reason in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        assert type(made) is A2AClientError
    else:
        assert sdk.JSON_RPC_ERROR_CODE_MAP[type(made)] == error.spec.code
        assert made.data == {"what": "this"}


def test_errors_that_are_none_of_a2as_are_errors_of_the_client() -> None:
    for timeout in (errors.DeadlineExceeded("late"), errors.TimedOut("late")):
        assert type(client_error(timeout)) is A2AClientTimeoutError
    for other in (errors.Unavailable("x"), errors.Unreachable("x"), errors.Backpressure("x"), errors.Denied("x")):
        assert type(client_error(other)) is A2AClientError
    for wrong in (errors.InvalidName("x"), errors.TooLarge("x")):
        assert type(client_error(wrong)) is sdk.InvalidParamsError
    assert type(client_error(errors.AgentNotFound("x"))) is sdk.InvalidRequestError
    violation = errors.FieldViolation("message.parts", "missing")
    made = client_error(errors.InvalidParams("x", violations=(violation,)))
    assert made.data == {"errors": [{"field": "message.parts", "message": "missing"}]}
