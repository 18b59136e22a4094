"""Two gateways and two replicas, each as a process: one of each is killed in the middle of a stream."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from weft.testing.agents import Process, ReplicaProcesses, eventually
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask

pytestmark = pytest.mark.anyio

STEADY = Path(__file__).with_name("steady.py")
V1 = {"A2A-Version": "1.0"}
NUMBERS = 12
Seen = tuple[int, dict[str, Any]]


def gateway(mesh: BrokerMesh) -> Process:
    env = {"WEFT_GATEWAY_PORT": "0", "WEFT_GATEWAY_GRPC_PORT": "0"}
    return Process(
        ("-m", "weft.gateway"),
        ready="ready",
        env={"WEFT_HOME": str(mesh.home), "WEFT_IDENTITY": "gateway", **env},
    )


def agent_at(process: Process, agent: str) -> str:
    return process.ready_line.partition("gateway at ")[2].partition("/agents")[0] + f"/agents/{agent}"


async def events(response: httpx.Response) -> AsyncIterator[Seen]:
    number = -1
    async for line in response.aiter_lines():
        if line.startswith("id:"):
            number = int(line[3:])
        elif line.startswith("data:"):
            yield number, json.loads(line[5:])


async def read_on(following: AsyncIterator[Seen], seen: list[Seen]) -> None:
    """Read to the end of a stream, whatever ends it."""
    async for event in following:
        seen.append(event)  # noqa: PERF401 - what was read before an error counts


def names(seen: list[Seen]) -> list[str]:
    return [event["artifactUpdate"]["artifact"]["name"] for _, event in seen if "artifactUpdate" in event]


@pytest.mark.parametrize("dies", ["replica", "both"])
async def test_a_client_that_goes_on_at_the_other_misses_nothing(
    stage: BrokerMesh, unique: Callable[[str], str], dies: str
) -> None:
    agent = unique("steady")
    await stage.add_agent(agent)
    async with gateway(stage) as first, gateway(stage) as second, httpx.AsyncClient(headers=V1, timeout=30) as client:
        async with ReplicaProcesses(stage, STEADY, identity=agent) as replicas:
            processes = {process.id: process for process in [await replicas.start(), await replicas.start()]}
            await eventually(lambda: _known(client, agent_at(first, agent)))
            message = {"messageId": uuid.uuid4().hex, "role": "ROLE_USER", "parts": [{"text": str(NUMBERS)}]}
            seen: list[Seen] = []
            url = agent_at(first, agent)
            async with client.stream("POST", f"{url}/message:stream", json={"message": message}) as response:
                following = events(response)
                while len(names(seen)) < 3:
                    seen.append(await anext(following))
                task = seen[0][1]["task"]["id"]
                stored = await StoredTask.read(stage, agent, task)
                processes[stored.claims[-1][1].replica].kill()
                if dies == "both":
                    first.kill()
                    with pytest.raises(httpx.TransportError):
                        await read_on(following, seen)
                else:
                    await read_on(following, seen)
            if dies == "both":
                again = f"{agent_at(second, agent)}/tasks/{task}:subscribe"
                resume = {"Last-Event-ID": str(seen[-1][0])}
                async with client.stream("POST", again, headers=resume) as response:
                    assert response.status_code == 200
                    await read_on(events(response), seen)
            stored = await StoredTask.read(stage, agent, task)
    stored.check()
    assert [number for number, _ in seen[1:]] == list(range(1, stored.events[-1].n + 1))
    assert seen[-1][1]["statusUpdate"]["status"]["state"] == "TASK_STATE_COMPLETED"
    assert set(names(seen)) == {*(f"{number}.txt" for number in range(NUMBERS)), "result"}
    assert max(stored.attempts) == 2


async def _known(client: httpx.AsyncClient, url: str) -> bool:
    return (await client.get(f"{url}/.well-known/agent-card.json")).status_code == 200
