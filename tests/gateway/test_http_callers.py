"""Operations by caller: made once, kept while in use, given up afterwards; and agents that are not running."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from a2a.server.routes import create_jsonrpc_routes, create_rest_routes
from a2a.types import a2a_pb2 as pb
from starlette.routing import Mount, Route

from weft.client.cards import CardDirectory
from weft.core.broker import Broker
from weft.gateway.callers import Callers
from weft.gateway.handler import MeshRequestHandler
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh, unique_name
from weft_protocols.errors import Backpressure, Unavailable

if TYPE_CHECKING:
    from tests.gateway.conftest import Served, Worker

pytestmark = pytest.mark.anyio


@pytest.fixture
async def broker(stage: BrokerMesh) -> AsyncIterator[Broker]:
    made = await stage.connect("gateway")
    yield made
    await made.close()


def hello() -> pb.SendMessageRequest:
    made = pb.SendMessageRequest()
    made.message.message_id = uuid.uuid4().hex
    made.message.role = pb.ROLE_USER
    made.message.parts.add(text="gate")
    return made


async def test_a_caller_is_connected_once_however_many_ask_at_once(broker: Broker) -> None:
    callers = Callers(broker, CardDirectory(broker))

    async def one() -> Any:
        async with callers.use("alice") as operations:
            return operations

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one()) for _ in range(20)]
    assert len({id(task.result()) for task in tasks}) == 1
    assert len(callers) == 1
    await callers.aclose()


async def test_a_caller_without_use_is_given_up_and_one_in_use_is_not(broker: Broker) -> None:
    callers = await Callers(broker, CardDirectory(broker), idle=0.1).start()
    async with callers.use("busy"):
        async with callers.use("idle") as idle:
            assert idle.mesh.caller == "idle"
        await eventually(lambda: len(callers) == 1)
        async with callers.use("busy") as operations:
            assert operations.mesh.caller == "busy"
    await eventually(lambda: len(callers) == 0)
    await callers.aclose()


async def test_a_caller_who_follows_a_task_is_kept(broker: Broker, worker: Worker) -> None:
    callers = await Callers(broker, CardDirectory(broker), idle=0.1).start()
    async with callers.use("follower") as operations:
        stream = operations.numbered_send_streaming_message(worker.name, hello())
        await anext(stream)
    await eventually(lambda: worker.started)
    async with callers.use("other"):
        pass
    await eventually(lambda: len(callers) == 1)
    assert callers.following == 1
    await stream.aclose()
    await eventually(lambda: len(callers) == 0)
    await callers.aclose()


async def test_one_caller_too_many_takes_the_place_of_one_without_use_or_is_refused(broker: Broker) -> None:
    callers = Callers(broker, CardDirectory(broker), limit=2)
    async with callers.use("one"):
        async with callers.use("two"):
            with pytest.raises(Backpressure):
                async with callers.use("three"):
                    pass
        async with callers.use("three"):
            await eventually(lambda: len(callers) == 2)
    await callers.aclose()


async def test_closed_callers_take_nobody(broker: Broker) -> None:
    callers = Callers(broker, CardDirectory(broker))
    await callers.aclose()
    with pytest.raises(Unavailable):
        async with callers.use("late"):
            pass


async def test_an_agent_that_is_not_running_accepts_tasks_and_works_them_off_when_it_is_back(
    served: Served, http: httpx.AsyncClient, start_worker: Callable[..., Any]
) -> None:
    name = unique_name("sleeper")
    async with start_worker(served, name):
        pass
    message = {"messageId": "m-1", "role": "ROLE_USER", "parts": [{"text": "hello"}]}
    request = {"message": message, "configuration": {"returnImmediately": True}}
    sent = (await http.post(f"/agents/{name}/message:send", json=request)).json()["task"]
    url = f"/agents/{name}/tasks/{sent['id']}"
    assert (await http.get(url)).json()["status"]["state"] == "TASK_STATE_SUBMITTED"

    async with start_worker(served, name):

        async def done() -> bool:
            return bool((await http.get(url)).json()["status"]["state"] == "TASK_STATE_COMPLETED")

        await eventually(done)


async def test_a_stream_to_an_agent_that_is_not_running_begins_at_once(
    served: Served, start_worker: Callable[..., Any]
) -> None:
    name = unique_name("sleeper")
    async with start_worker(served, name):
        pass
    body = {"message": {"messageId": "m-1", "role": "ROLE_USER", "parts": [{"text": "hello"}]}}
    async with httpx.AsyncClient(base_url=served.url, headers={"A2A-Version": "1.0"}, timeout=3) as client:
        async with client.stream("POST", f"/agents/{name}/message:stream", json=body) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
    await eventually(lambda: served.callers.following == 0)


def test_the_sdk_makes_the_routes_that_are_wrapped(broker: Broker) -> None:
    handler = MeshRequestHandler("any", Callers(broker, CardDirectory(broker)))
    (rpc,) = create_jsonrpc_routes(handler, "/", enable_v0_3_compat=True)
    assert isinstance(rpc, Route)
    rest = create_rest_routes(handler, enable_v0_3_compat=True)
    assert all(isinstance(route, Route | Mount) for route in rest)
    (mount,) = [route for route in rest if isinstance(route, Mount)]
    assert mount.path == "/{tenant}"
    assert all(isinstance(route, Route) for route in mount.routes)
    streams = {
        route.path for route in rest if isinstance(route, Route) and route.path.endswith((":stream", ":subscribe"))
    }
    assert streams == {
        "/message:stream",
        "/tasks/{id}:subscribe",
        "/v1/message:stream",
        "/v1/tasks/{id}:subscribe",
    }
