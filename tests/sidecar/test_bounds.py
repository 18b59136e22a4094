"""What bounds every call, through a whole sidecar: each of its stages is in its place."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from weft.testing.agents import eventually
from weft_protocols import mcp
from weft_protocols.errors import ToolError

pytestmark = pytest.mark.anyio


def kind(result: dict[str, Any]) -> Any:
    return (result.get("_meta") or {}).get(mcp.META_REFUSAL, {}).get("kind")


async def test_a_tool_that_is_not_offered_is_not_asked_for(stage: Any) -> None:
    server = await stage.bad()
    with pytest.raises(ToolError, match=f"Unknown tool: {server} offers no 'undo'") as refused:
        await stage.ask(server, "tools/call", name="undo", arguments={})
    assert refused.value.code == mcp.INVALID_PARAMS


async def test_wrong_arguments_do_not_reach_the_server(stage: Any) -> None:
    server = await stage.bad()
    refused = await stage.do(server, "wait", "one")
    assert kind(refused) == mcp.CODES.get(mcp.INVALID_PARAMS, ("refused",))[0]
    assert "n: 'one' is not of type 'integer'" in refused["content"][0]["text"]
    assert not (stage.state(server) / "waiting").exists()


async def test_a_call_that_takes_longer_than_its_server_may_is_late(stage: Any) -> None:
    server = await stage.bad(timeout=0.5)
    async with asyncio.timeout(15):
        assert kind(await stage.do(server, "silence")) == "late"


async def test_a_server_that_fails_again_and_again_is_left_alone(stage: Any) -> None:
    server = await stage.bad(failures=2, reset=60)
    for _ in range(2):
        with pytest.raises(ToolError):
            await stage.do(server, "exit", 3)
    started = len(stage.started(server))
    refused = await stage.do(server, "nothing")
    assert kind(refused) == "circuit_open"
    assert 50 < refused["_meta"][mcp.META_REFUSAL]["retryAfter"] <= 60
    assert len(stage.started(server)) == started


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"concurrency": 1}, "1 calls"), ({"concurrency": 4, "concurrency_per_agent": 1}, "1 calls of local")],
)
async def test_a_server_has_so_many_places_and_an_agent_its_share(
    stage: Any, settings: dict[str, Any], told: str
) -> None:
    server = await stage.bad(queue_timeout=0.2, processes=4, **settings)
    await stage.do(server, "nothing")
    async with asyncio.TaskGroup() as group:
        first = group.create_task(stage.do(server, "wait"))
        await eventually(lambda: (stage.state(server) / "waiting").exists())
        second = await stage.do(server, "nothing")
        (stage.state(server) / "go").touch()
    assert kind(first.result()) is None
    assert kind(second) == "busy"
    assert f"{told} under way" in second["content"][0]["text"]
    assert kind(await stage.do(server, "nothing")) is None
