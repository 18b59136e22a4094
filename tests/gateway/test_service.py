"""The gateway as a process: its start, its end by either signal, its streams elsewhere, and the broker's restart."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import weft
from weft.client import coordinator
from weft.core.gatewayconf import GatewayConfig
from weft.core.home import GatewayRecord, Home
from weft.gateway.service import GatewayService, serving
from weft.testing.agents import LocalReplica, Process, coordinator_process, eventually, running
from weft.testing.broker import BrokerMesh
from weft_protocols.errors import Unavailable, UsageError

pytestmark = pytest.mark.anyio

V1 = {"A2A-Version": "1.0"}
FREE = {"WEFT_GATEWAY_PORT": "0", "WEFT_GATEWAY_GRPC_PORT": "0"}


def gateway_process(mesh: BrokerMesh, env: Mapping[str, str] | None = None) -> Process:
    settings = {"WEFT_HOME": str(mesh.home), "WEFT_IDENTITY": "gateway", **FREE}
    return Process(("-m", "weft.gateway"), ready="ready", env={**settings, **(env or {})})


def url_of(process: Process) -> str:
    return process.ready_line.partition("gateway at ")[2].partition("/agents")[0]


@pytest.fixture
async def gateways(stage: BrokerMesh) -> AsyncIterator[Callable[..., Any]]:
    """Starts gateways as processes."""
    async with AsyncExitStack() as stack:

        async def start(**env: str) -> Process:
            return await stack.enter_async_context(gateway_process(stage, env))

        yield start


class Counter:
    """An agent that counts, one number at a time, as fast as it is let."""

    def __init__(self, name: str) -> None:
        self.turns = asyncio.Semaphore(0)
        self.agent = weft.Agent(name, description="Counts")

        @self.agent.skill("count")
        async def count(task: weft.Task) -> str:
            for number in range(int(task.text)):
                await self.turns.acquire()
                await task.update(str(number))
            return "counted"

    async def register(self, replica: LocalReplica) -> None:
        body = {**self.agent.describe(), "replica": replica.id, "pid": os.getpid(), "slots": 8}
        await coordinator.register(replica.replica.broker, body)


@pytest.fixture
async def counter(stage: BrokerMesh, unique: Callable[[str], str]) -> AsyncIterator[Counter]:
    made = Counter(unique("counter"))
    async with running(stage, made.agent) as (replica,):
        await made.register(replica)
        yield made
        for _ in range(100):
            made.turns.release()


@dataclass(slots=True)
class Sse:
    """One event of a stream."""

    id: int
    data: dict[str, Any]

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = self.data["result"]
        return found

    @property
    def said(self) -> str | None:
        """The number the agent said."""
        parts = self.result.get("statusUpdate", {}).get("status", {}).get("message", {}).get("parts", [])
        return parts[0]["text"] if parts else None


def body(method: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


def sending(text: str) -> dict[str, Any]:
    message = {"messageId": uuid.uuid4().hex, "role": "ROLE_USER", "parts": [{"text": text}]}
    return body("SendStreamingMessage", {"message": message})


async def events(response: httpx.Response) -> AsyncIterator[Sse]:
    number = -1
    async for line in response.aiter_lines():
        if line.startswith("id:"):
            number = int(line[3:])
        elif line.startswith("data:"):
            yield Sse(number, json.loads(line[5:]))


async def follow(stream: AsyncIterator[Sse], seen: list[Sse], *, until: int | None = None) -> None:
    """Read events to the end of the stream, or until so many numbers were said."""
    async for event in stream:
        seen.append(event)
        if until is not None and sum(one.said is not None for one in seen) >= until:
            return


def numbers(seen: list[Sse]) -> list[str]:
    return [one.said for one in seen if one.said is not None]


async def test_it_says_where_it_is_and_ends_with_0(gateways: Callable[..., Any], stage: BrokerMesh) -> None:
    (home := Home(stage.home)).gateway_file.unlink(missing_ok=True)
    process = await gateways()
    record = GatewayRecord.read(home)
    assert record is not None
    assert (record.pid, record.alive) == (process.pid, True)
    assert process.ready_line == (
        f"ready: gateway at {record.http}/agents, gRPC at {record.grpc}; "
        "callers without credentials are 'local', from this machine only"
    )
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{record.http}/readyz")).json() == {"status": "ready"}
    other = await gateways()
    assert GatewayRecord.read(home) == record, "a second gateway leaves the record to the first"
    process.terminate()
    assert await process.exited() == 0
    assert not record.alive
    assert other.exit_code is None


async def test_a_gateway_comes_back_on_its_ports(stage: BrokerMesh) -> None:
    home, config = Home(stage.home), GatewayConfig()
    home.gateway_file.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    GatewayRecord(f"http://127.0.0.1:{port}", "", 2**22 + 1, "0").write(home)
    async with serving(stage.settings("gateway"), config) as first:
        assert first.http == f"http://127.0.0.1:{port}"
        async with serving(stage.settings("gateway"), config) as second:
            assert first.http != second.http
            assert first.grpc != second.grpc
    record = GatewayRecord.read(home)
    assert record is not None
    GatewayRecord(record.http, record.grpc, 2**22 + 1, "0").write(home)
    async with serving(stage.settings("gateway"), config) as again:
        assert (again.http, again.grpc) == (record.http, record.grpc)


async def test_a_port_that_is_taken_is_named(stage: BrokerMesh, gateways: Callable[..., Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"cannot listen for gRPC on 127.0.0.1:{port} .*set gateway.grpc_port"):
            async with serving(stage.settings("gateway"), GatewayConfig(port=0, grpc_port=port)):
                pass
        with pytest.raises(
            Unavailable, match=rf"ended with 2: gateway: .* HTTP on 127.0.0.1:{port} .*set gateway.port"
        ):
            await gateways(WEFT_GATEWAY_PORT=str(port))


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({"WEFT_GATEWAY_HOST": "0.0.0.0"}, "ended with 2: gateway: .*nobody could call this gateway"),
        ({"WEFT_GATEWAY_PORT": "x"}, "ended with 2: gateway: WEFT_GATEWAY_PORT: 'x' must be a whole number"),
        ({"WEFT_CONFIG": "/no/such/mesh.yaml"}, "ended with 2: gateway: there is no /no/such/mesh.yaml"),
        ({"WEFT_IDENTITY": "nobody"}, "ended with 4: gateway: .*knows no identity 'nobody'"),
    ],
)
async def test_what_is_wrong_ends_it_with_a_sentence(
    gateways: Callable[..., Any], env: dict[str, str], wanted: str
) -> None:
    with pytest.raises(Unavailable, match=wanted):
        await gateways(**env)


async def test_it_reads_the_mesh_yaml_it_is_given(
    gateways: Callable[..., Any], tmp_path: Path, counter: Counter
) -> None:
    config = tmp_path / "mesh.yaml"
    config.write_text(
        f"gateway:\n  default_agent: {counter.agent.name}\n  auth: {{tokens: [{{name: ci, token_env: CI_TOKEN}}]}}\n"
    )
    process = await gateways(WEFT_CONFIG=str(config), CI_TOKEN="t" * 32)
    assert "without credentials" not in process.ready_line
    counter.turns.release()
    async with httpx.AsyncClient(base_url=url_of(process), headers=V1, timeout=20) as client:
        message = sending("1") | {"method": "SendMessage"}
        assert (await client.post("/", json=message)).status_code == 401
        answer = await client.post("/", json=message, headers={"Authorization": "Bearer " + "t" * 32})
        assert answer.json()["result"]["task"]["status"]["state"] == "TASK_STATE_COMPLETED"


@pytest.mark.parametrize("how", ["kill -9", "kill -TERM"])
async def test_a_stream_goes_on_at_another_gateway_and_misses_nothing(
    gateways: Callable[..., Any], counter: Counter, how: str
) -> None:
    first, second = await gateways(WEFT_GRACE="0.3"), await gateways()
    path = f"/agents/{counter.agent.name}"
    seen: list[Sse] = []
    async with httpx.AsyncClient(headers=V1, timeout=20) as client:
        async with client.stream("POST", url_of(first) + path, json=sending("10")) as response:
            stream = events(response)
            for _ in range(4):
                counter.turns.release()
            await follow(stream, seen, until=4)
            if how == "kill -9":
                first.kill()
                with pytest.raises(httpx.TransportError):
                    await follow(stream, seen)
            else:
                first.terminate()
                await follow(stream, seen)  # a clean end of the response
                assert await first.exited() == 0
        for _ in range(3):
            counter.turns.release()  # said while nobody listens
        task = seen[0].result["task"]["id"]
        resume = {"Last-Event-ID": str(seen[-1].id)}
        again = body("SubscribeToTask", {"id": task})
        async with client.stream("POST", url_of(second) + path, json=again, headers=resume) as response:
            stream = events(response)
            for _ in range(3):
                counter.turns.release()
            await follow(stream, seen)
    assert numbers(seen) == [str(number) for number in range(10)]
    assert seen[-1].result["statusUpdate"]["status"]["state"] == "TASK_STATE_COMPLETED"
    ids = [one.id for one in seen]
    assert ids == sorted(set(ids))


async def test_what_is_under_way_ends_before_the_gateway(gateways: Callable[..., Any], counter: Counter) -> None:
    process = await gateways(WEFT_GRACE="15")
    seen: list[Sse] = []
    async with httpx.AsyncClient(base_url=url_of(process), headers=V1, timeout=20) as client:
        async with client.stream("POST", f"/agents/{counter.agent.name}", json=sending("3")) as response:
            stream = events(response)
            counter.turns.release()
            await follow(stream, seen, until=1)
            process.terminate()

            async def refuses() -> bool:
                try:
                    async with httpx.AsyncClient() as new:
                        await new.get(f"{url_of(process)}/healthz")
                except httpx.TransportError:
                    return True
                return False

            await eventually(refuses)
            for _ in range(2):
                counter.turns.release()
            await follow(stream, seen)
    assert numbers(seen) == ["0", "1", "2"]
    assert seen[-1].result["statusUpdate"]["status"]["state"] == "TASK_STATE_COMPLETED"
    assert await process.exited() == 0


async def test_a_waiting_call_is_told_that_the_gateway_leaves(gateways: Callable[..., Any], counter: Counter) -> None:
    process = await gateways(WEFT_GRACE="0.3")
    async with httpx.AsyncClient(base_url=url_of(process), headers=V1, timeout=20) as client:
        async with asyncio.TaskGroup() as group:
            message = sending("5") | {"method": "SendMessage"}
            call = group.create_task(client.post(f"/agents/{counter.agent.name}", json=message))
            counter.turns.release()
            await eventually(lambda: counter.turns.locked())
            process.terminate()
        (detail,) = call.result().json()["error"]["data"]
        assert detail["metadata"] == {"retryable": "true", "status": "UNAVAILABLE"}
    assert await process.exited(timeout=4) == 0


async def test_it_ends_when_its_parent_does(stage: BrokerMesh) -> None:
    async with gateway_process(stage) as process:
        process.orphan()
        assert await process.exited() == 0


async def test_a_stream_survives_the_brokers_restart(fresh_mesh: BrokerMesh, unique: Callable[[str], str]) -> None:
    counter = Counter(unique("counter"))
    async with coordinator_process(fresh_mesh), running(fresh_mesh, counter.agent) as (replica,):
        await counter.register(replica)
        async with gateway_process(fresh_mesh) as process:
            seen: list[Sse] = []
            path = f"{url_of(process)}/agents/{counter.agent.name}"
            async with httpx.AsyncClient(headers=V1, timeout=30) as client:
                async with client.stream("POST", path, json=sending("4")) as response:
                    stream = events(response)
                    for _ in range(2):
                        counter.turns.release()
                    await follow(stream, seen, until=2)
                    os.kill(fresh_mesh.server.pid or 0, signal.SIGKILL)
                    await fresh_mesh.server.wait()

                    async def unready() -> bool:
                        return (await client.get(f"{url_of(process)}/readyz")).status_code == 503

                    await eventually(unready)
                    await fresh_mesh.server.start()
                    for _ in range(2):
                        counter.turns.release()
                    await follow(stream, seen)
            assert numbers(seen) == ["0", "1", "2", "3"]
            process.terminate()
            assert await process.exited() == 0


async def test_a_service_that_was_closed_left_nothing(stage: BrokerMesh) -> None:
    before = {task for task in asyncio.all_tasks() if "gateway" in task.get_name()}
    async with serving(stage.settings("gateway"), GatewayConfig(port=0, grpc_port=0)) as service:
        assert isinstance(service, GatewayService)
        port = httpx.URL(service.http).port
    assert {task for task in asyncio.all_tasks() if "gateway" in task.get_name()} <= before
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port or 0))
