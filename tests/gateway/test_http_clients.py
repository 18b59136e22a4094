"""The SDK's own clients, of A2A 1.0 and 0.3, over JSON-RPC and HTTP+JSON, on real sockets."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
from a2a.client import A2ACardResolver, Client, ClientConfig, ClientFactory
from a2a.types import a2a_pb2 as pb
from a2a.utils import errors as sdk

from weft.testing.agents import eventually

if TYPE_CHECKING:
    from tests.gateway.conftest import Served, Worker

pytestmark = pytest.mark.anyio

KINDS = [("JSONRPC", "1.0"), ("HTTP+JSON", "1.0"), ("JSONRPC", "0.3"), ("HTTP+JSON", "0.3")]


def request(text: str, *, task_id: str = "", at_once: bool = False) -> pb.SendMessageRequest:
    made = pb.SendMessageRequest()
    made.message.message_id = uuid.uuid4().hex
    made.message.role = pb.ROLE_USER
    made.message.task_id = task_id
    made.message.parts.add(text=text)
    made.configuration.return_immediately = at_once
    return made


@asynccontextmanager
async def client(
    served: Served, agent: str, kind: tuple[str, str], *, streaming: bool = False
) -> AsyncIterator[Client]:
    """A client of one binding and version, by the agent's card."""
    binding, version = kind
    async with httpx.AsyncClient(timeout=20) as http:
        card = await A2ACardResolver(http, served.of(agent)).get_agent_card()
        mine = [
            one
            for one in card.supported_interfaces
            if (one.protocol_binding, one.protocol_version) == (binding, version)
        ]
        del card.supported_interfaces[:]
        card.supported_interfaces.extend(mine)
        config = ClientConfig(streaming=streaming, httpx_client=http, supported_protocol_bindings=[binding])
        yield ClientFactory(config).create(card)


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


async def only(events: AsyncIterator[pb.StreamResponse]) -> pb.Task:
    (found,) = [event async for event in events]
    return found.task


async def test_a_message_is_answered(served: Served, worker: Worker, kind: tuple[str, str]) -> None:
    async with client(served, worker.name, kind) as caller:
        task = await only(caller.send_message(request("hello")))
    assert task.status.state == pb.TASK_STATE_COMPLETED
    assert task.artifacts[0].parts[0].text == "HELLO"


async def test_a_message_is_streamed(served: Served, worker: Worker, kind: tuple[str, str]) -> None:
    async with client(served, worker.name, kind, streaming=True) as caller:
        events = [event async for event in caller.send_message(request("chunks 2"))]
    assert [event.WhichOneof("payload") for event in events] == [
        "task",
        "status_update",
        "status_update",
        "status_update",
        "artifact_update",
        "status_update",
    ]
    assert events[-1].status_update.status.state == pb.TASK_STATE_COMPLETED


async def test_a_task_is_had_followed_and_canceled(served: Served, worker: Worker, kind: tuple[str, str]) -> None:
    async with (
        client(served, worker.name, kind) as plain,
        client(served, worker.name, kind, streaming=True) as caller,
    ):
        sent = await only(plain.send_message(request("gate", at_once=True)))
        await eventually(lambda: worker.started)

        async def working() -> pb.Task | None:
            found = await caller.get_task(pb.GetTaskRequest(id=sent.id))
            return found if found.status.state == pb.TASK_STATE_WORKING else None

        found = await eventually(working)
        assert found is not None
        assert found.id == sent.id
        following = caller.subscribe(pb.SubscribeToTaskRequest(id=sent.id))
        assert (await anext(following)).task.id == sent.id
        canceled = await caller.cancel_task(pb.CancelTaskRequest(id=sent.id))
        assert canceled.status.state == pb.TASK_STATE_CANCELED
        *_, last = [event async for event in following]
        assert last.status_update.status.state == pb.TASK_STATE_CANCELED


async def test_a_conversation_goes_on_with_the_tasks_id_alone(
    served: Served, worker: Worker, kind: tuple[str, str]
) -> None:
    async with client(served, worker.name, kind) as caller:
        asked = await only(caller.send_message(request("ask")))
        assert asked.status.state == pb.TASK_STATE_INPUT_REQUIRED
        answered = await only(caller.send_message(request("red", task_id=asked.id)))
    assert answered.id == asked.id
    assert answered.context_id == asked.context_id
    assert answered.artifacts[0].parts[0].text == "a red one"


async def test_errors_are_the_clients_own(served: Served, worker: Worker, kind: tuple[str, str]) -> None:
    async with client(served, worker.name, kind) as caller:
        with pytest.raises(sdk.TaskNotFoundError):
            await caller.get_task(pb.GetTaskRequest(id="0" * 32))
        ended = await only(caller.send_message(request("hello")))
        with pytest.raises(sdk.TaskNotCancelableError):
            await caller.cancel_task(pb.CancelTaskRequest(id=ended.id))
        with pytest.raises(sdk.UnsupportedOperationError):
            await only(caller.send_message(request("more", task_id=ended.id)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1] == "1.0"], ids="-".join)
async def test_tasks_are_listed(served: Served, worker: Worker, kind: tuple[str, str]) -> None:
    async with client(served, worker.name, kind) as caller:
        sent = [await only(caller.send_message(request(f"number {n}"))) for n in range(3)]
        first = await caller.list_tasks(pb.ListTasksRequest(page_size=2, include_artifacts=True))
        second = await caller.list_tasks(pb.ListTasksRequest(page_size=2, page_token=first.next_page_token))
    assert [task.id for task in (*first.tasks, *second.tasks)] == [task.id for task in reversed(sent)]
    assert first.tasks[0].artifacts[0].parts[0].text == "NUMBER 2"
    assert not second.tasks[0].artifacts
    assert (first.total_size, second.next_page_token) == (3, "")
