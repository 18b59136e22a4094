"""Streams over HTTP: numbers, resuming elsewhere, signs of life, clients that leave, gateways that leave."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from weft.gateway import shield, sse
from weft.testing.agents import eventually

if TYPE_CHECKING:
    from tests.gateway.conftest import Serve, Served, Worker

pytestmark = pytest.mark.anyio


@dataclass
class Sse:
    """One event as it came."""

    id: int | None
    kind: str
    data: Any

    @property
    def body(self) -> Any:
        """The StreamResponse, of either binding."""
        return self.data.get("result", self.data)

    @property
    def what(self) -> str:
        """Which payload it is, with the state where it has one."""
        (name, payload), *_ = self.body.items()
        status = payload.get("status")
        return f"{name} {status['state'].removeprefix('TASK_STATE_').lower()}" if status else name


def message(text: str, **more: Any) -> dict[str, Any]:
    return {"messageId": uuid.uuid4().hex, "role": "ROLE_USER", "parts": [{"text": text}], **more}


async def events(response: httpx.Response) -> AsyncIterator[Sse]:
    """The events of a response, comments left out."""
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            number = int(fields["id"]) if "id" in fields else None
            yield Sse(number, fields.get("event", ""), json.loads(fields["data"]))
            fields = {}


@asynccontextmanager
async def streaming(
    served: Served, agent: str, text: str, *, binding: str = "rest", **more: Any
) -> AsyncIterator[AsyncIterator[Sse]]:
    """SendStreamingMessage."""
    request = {"message": message(text, **more)}
    url, body = f"/agents/{agent}/message:stream", dict[str, Any](request)
    if binding == "jsonrpc":
        url = f"/agents/{agent}"
        body = {"jsonrpc": "2.0", "id": 7, "method": "SendStreamingMessage", "params": request}
    async with opened(served, "POST", url, json=body) as found:
        yield found


@asynccontextmanager
async def subscribed(
    served: Served, agent: str, task_id: str, *, binding: str = "rest", after: int | None = None
) -> AsyncIterator[AsyncIterator[Sse]]:
    """SubscribeToTask."""
    headers = {"Last-Event-ID": str(after)} if after is not None else {}
    if binding == "jsonrpc":
        body = {"jsonrpc": "2.0", "id": 7, "method": "SubscribeToTask", "params": {"id": task_id}}
        options: dict[str, Any] = {"url": f"/agents/{agent}", "method": "POST", "json": body}
    else:
        options = {"url": f"/agents/{agent}/tasks/{task_id}:subscribe", "method": "GET"}
    async with opened(served, headers=headers, **options) as found:
        yield found


@asynccontextmanager
async def opened(served: Served, method: str, url: str, **options: Any) -> AsyncIterator[AsyncIterator[Sse]]:
    headers = {"A2A-Version": "1.0", **options.pop("headers", {})}
    async with httpx.AsyncClient(base_url=served.url, timeout=20) as client:
        async with client.stream(method, url, headers=headers, **options) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["cache-control"] == "no-store"
            yield events(response)


async def nothing_followed(served: Served) -> None:
    await eventually(lambda: served.callers.following == 0 and len(served.gateway.streams) == 0)


BINDINGS = pytest.mark.parametrize("binding", ["jsonrpc", "rest"])


@BINDINGS
async def test_a_stream_begins_with_the_task_and_ends_with_it(served: Served, worker: Worker, binding: str) -> None:
    async with streaming(served, worker.name, "chunks 2", binding=binding) as stream:
        got = [event async for event in stream]

    assert [event.what for event in got] == [
        "task submitted",
        "statusUpdate working",
        "statusUpdate working",
        "statusUpdate working",
        "artifactUpdate",
        "statusUpdate completed",
    ]
    assert [event.id for event in got] == [0, 1, 2, 3, 4, 5]
    await nothing_followed(served)


@BINDINGS
async def test_a_stream_goes_on_at_another_gateway_from_where_it_broke(
    serve: Serve, served: Served, worker: Worker, binding: str
) -> None:
    async with streaming(served, worker.name, "gate", binding=binding) as stream:
        first = [await anext(stream) for _ in range(3)]
    assert first[-1].body["statusUpdate"]["status"]["message"]["parts"][0]["text"] == "at the gate"
    task_id = first[0].body["task"]["id"]
    other = await serve()

    async with subscribed(other, worker.name, task_id, binding=binding, after=first[-1].id) as stream:
        worker.gate.set()
        rest = [event async for event in stream]

    assert [event.id for event in rest] == [3, 4]
    assert rest[-1].what == "statusUpdate completed"
    await nothing_followed(other)


@BINDINGS
async def test_a_subscription_begins_with_the_task_as_it_is(served: Served, worker: Worker, binding: str) -> None:
    async with streaming(served, worker.name, "gate") as stream:
        first = [await anext(stream) for _ in range(3)]
    task_id = first[0].body["task"]["id"]

    async with subscribed(served, worker.name, task_id, binding=binding) as stream:
        snapshot = await anext(stream)
        worker.gate.set()
        rest = [event async for event in stream]

    assert snapshot.what == "task working"
    assert snapshot.id == 2
    assert [event.id for event in rest] == [3, 4]


async def test_all_streams_of_a_task_see_the_same_and_end_each_for_itself(served: Served, worker: Worker) -> None:
    async with streaming(served, worker.name, "gate") as stream:
        task_id = (await anext(stream)).body["task"]["id"]
        await eventually(lambda: worker.started)
        async with (
            subscribed(served, worker.name, task_id) as second,
            subscribed(served, worker.name, task_id) as third,
        ):
            await anext(second)
            await anext(third)
        async with subscribed(served, worker.name, task_id, binding="jsonrpc") as fourth:
            await anext(fourth)
            worker.gate.set()
            ends = [[event async for event in one][-2:] for one in (stream, fourth)]
    assert [(event.id, event.body) for event in ends[0]] == [(event.id, event.body) for event in ends[1]]


async def test_three_thousand_events_reach_a_reader_that_pauses(served: Served, worker: Worker) -> None:
    async with streaming(served, worker.name, "chunks 3000") as stream:
        task_id = (await anext(stream)).body["task"]["id"]

        async def over() -> bool:
            async with httpx.AsyncClient(base_url=served.url, headers={"A2A-Version": "1.0"}) as client:
                task = (await client.get(f"/agents/{worker.name}/tasks/{task_id}?historyLength=0")).json()
            return bool(task["status"]["state"] == "TASK_STATE_COMPLETED")

        await eventually(over, timeout=30)
        numbers = [event.id async for event in stream]
    assert numbers == list(range(1, 3004))


async def test_a_silent_stream_shows_signs_of_life(served: Served, worker: Worker) -> None:
    served.gateway.streams.keep_alive = 0.05
    async with httpx.AsyncClient(base_url=served.url, headers={"A2A-Version": "1.0"}, timeout=20) as client:
        body = {"message": message("gate")}
        async with client.stream("POST", f"/agents/{worker.name}/message:stream", json=body) as response:
            comments = 0
            async for line in response.aiter_lines():
                comments += line.startswith(": keep-alive")
                if comments == 3:
                    worker.gate.set()
        assert comments >= 3


@BINDINGS
async def test_a_client_that_leaves_costs_nothing_any_more(served: Served, worker: Worker, binding: str) -> None:
    async with streaming(served, worker.name, "gate", binding=binding) as stream:
        await anext(stream)
        assert served.callers.following == 1
        assert len(served.gateway.streams) == 1

    await nothing_followed(served)
    await eventually(lambda: len(served.gateway.streams.watchers) == 0)


async def test_a_client_that_leaves_while_it_waits_for_an_answer_costs_nothing_any_more(
    served: Served, worker: Worker
) -> None:
    async with httpx.AsyncClient(base_url=served.url, headers={"A2A-Version": "1.0"}) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(
                f"/agents/{worker.name}/message:send",
                json={"message": message("gate")},
                timeout=httpx.Timeout(5, read=0.5),
            )
    assert worker.started
    await nothing_followed(served)
    worker.gate.set()


async def test_a_gateway_that_leaves_ends_its_streams_cleanly(serve: Serve, served: Served, worker: Worker) -> None:
    async with streaming(served, worker.name, "gate") as stream:
        first = [await anext(stream) for _ in range(3)]
        await served.gateway.streams.drain(0.05)
        assert [event async for event in stream] == []  # no error: the response is complete
    other = await serve()
    async with subscribed(other, worker.name, first[0].body["task"]["id"], after=2) as stream:
        worker.gate.set()
        assert [event.id async for event in stream] == [3, 4]


async def test_a_gateway_that_leaves_lets_streams_end_by_themselves(served: Served, worker: Worker) -> None:
    async with streaming(served, worker.name, "gate") as stream:
        await anext(stream)
        async with asyncio.TaskGroup() as group:
            group.create_task(served.gateway.streams.drain(20))
            await eventually(lambda: served.gateway.streams.closing)
            worker.gate.set()
            got = [event.what async for event in stream]
    assert got[-1] == "statusUpdate completed"


@BINDINGS
async def test_a_question_ends_the_stream(served: Served, worker: Worker, binding: str) -> None:
    async with streaming(served, worker.name, "ask", binding=binding) as stream:
        got = [event async for event in stream]
    assert got[-1].what == "statusUpdate input_required"
    task_id = got[0].body["task"]["id"]
    async with streaming(served, worker.name, "blue", binding=binding, taskId=task_id) as stream:
        rest = [event async for event in stream]
    assert rest[0].what.startswith("task ")
    assert rest[-1].what == "statusUpdate completed"


async def test_a_head_request_opens_no_stream(served: Served, worker: Worker) -> None:
    async with streaming(served, worker.name, "gate") as stream:
        task_id = (await anext(stream)).body["task"]["id"]
        async with httpx.AsyncClient(base_url=served.url, headers={"A2A-Version": "1.0"}) as client:
            response = await client.head(f"/agents/{worker.name}/tasks/{task_id}:subscribe")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        await eventually(lambda: len(served.gateway.streams) == 1)


async def test_a_broken_number_is_no_number(served: Served, worker: Worker) -> None:
    async with streaming(served, worker.name, "gate") as stream:
        task_id = (await anext(stream)).body["task"]["id"]
        headers = {"Last-Event-ID": "abc"}
        url = f"/agents/{worker.name}/tasks/{task_id}:subscribe"
        async with opened(served, "GET", url, headers=headers) as other:
            assert (await anext(other)).what.startswith("task ")
        worker.gate.set()


async def test_a_client_that_leaves_before_its_stream_has_begun_costs_nothing_any_more(
    served: Served, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shield, "PROMPT", 60.0)
    monkeypatch.setattr(sse, "PATIENCE", 0.05)
    async with httpx.AsyncClient(base_url=served.url, headers={"A2A-Version": "1.0"}) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(
                f"/agents/{worker.name}/tasks/{await held(client, worker)}:subscribe",
                headers={"Last-Event-ID": "1"},
                timeout=httpx.Timeout(5, read=0.5),
            )
    await nothing_followed(served)
    await eventually(lambda: len(served.gateway.streams.watchers) == 0)


async def test_a_stream_that_has_not_begun_yet_ends_with_its_gateway(served: Served, worker: Worker) -> None:
    async with httpx.AsyncClient(base_url=served.url, headers={"A2A-Version": "1.0"}, timeout=20) as client:
        task_id = await held(client, worker)
        async with subscribed(served, worker.name, task_id, after=1) as stream:
            await served.gateway.streams.drain(0)
            assert [event async for event in stream] == []
    await nothing_followed(served)


async def held(client: httpx.AsyncClient, worker: Worker) -> str:
    """A task that works and says nothing."""
    request = {"message": message("hold"), "configuration": {"returnImmediately": True}}
    task_id: str = (await client.post(f"/agents/{worker.name}/message:send", json=request)).json()["task"]["id"]
    await eventually(lambda: worker.started)
    return task_id
