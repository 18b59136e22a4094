"""Servers as processes: whatever they do, the sidecar goes on, and nothing of them is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft.client.tools import ToolRequest
from weft.core.home import process_started
from weft.core.toolsconf import ToolServer
from weft.testing.agents import eventually
from weft_protocols import mcp
from weft_protocols.errors import DeadlineExceeded, ToolError

pytestmark = pytest.mark.anyio


def gone(pid: int) -> bool:
    return process_started(pid) is None


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("flags", [(), ("--legacy",), ("--dies-of-discover",)], ids=["modern", "legacy", "dies"])
async def test_servers_of_both_eras_are_found_out_and_called(
    stage: Any, said: Callable[..., str], flags: tuple[str, ...]
) -> None:
    server = await stage.bad(*flags)
    result = await stage.do(server, "nothing")
    assert said(result) == f"pid {stage.started(server)[-1]}"
    assert result["resultType"] == "complete"
    assert stage.service.plane.served(server).upstream.state["version"] == ("2025-11-25" if flags else mcp.VERSION)
    listed = await stage.ask(server, "tools/list")
    assert [tool["name"] for tool in listed["tools"]] == ["do"]
    assert listed["cacheScope"] == "private"


async def test_a_server_that_starts_slowly_is_not_taken_for_one_of_the_earlier_era(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.sidecar.session.PROBE", 0.2)
    server = await stage.bad("--slow")
    await stage.do(server, "nothing")
    assert stage.service.plane.served(server).upstream.state["version"] == mcp.VERSION
    assert len(stage.started(server)) == 1


async def test_a_server_starts_although_its_caller_waits_for_less(stage: Any, said: Callable[..., str]) -> None:
    server = await stage.bad("--slow")
    params = {"name": "do", "arguments": {"what": "nothing"}}
    with pytest.raises(DeadlineExceeded):
        await stage.caller.request(ToolRequest(server, "tools/call", params, deadline=time.time() + 0.2))
    await eventually(lambda: stage.service.plane.served(server).upstream.sessions)
    assert said(await stage.do(server, "nothing")) == f"pid {stage.started(server)[0]}"
    assert len(stage.started(server)) == 1


async def test_a_server_that_is_removed_while_it_starts_is_ended(stage: Any) -> None:
    server = await stage.bad("--slow")
    asking = asyncio.create_task(stage.do(server, "nothing"))
    await eventually(lambda: stage.started(server))
    await stage.store.remove(server)
    with pytest.raises(ToolError, match="was removed"):
        await asking
    await eventually(lambda: gone(stage.started(server)[0]))


async def test_a_request_arrives_as_it_was_sent_and_its_result_as_it_came(stage: Any) -> None:
    server = await stage.bad()
    meta = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {"elicitation": {}, "x": [1]}, "own/key": {"a": 1}}
    result = await stage.do(server, "meta", _meta=meta, unknown={"b": [2]}, requestState="s", inputResponses={"q": {}})
    sent = result["structuredContent"]
    assert result["unknownField"] == {"kept": True}
    assert sent["unknown"] == {"b": [2]}
    assert (sent["requestState"], sent["inputResponses"]) == ("s", {"q": {}})
    assert {key: sent["_meta"][key] for key in meta} == meta


async def test_a_server_of_the_earlier_era_gets_nothing_of_the_later_one(stage: Any) -> None:
    server = await stage.bad("--legacy")
    result = await stage.do(server, "meta", _meta={"own/key": 1}, requestState="s", unknown=[1])
    sent = result["structuredContent"]
    assert sent["_meta"] == {"own/key": 1}
    assert sent["unknown"] == [1]
    assert "requestState" not in sent


async def test_progress_comes_with_the_callers_own_token_and_in_order(stage: Any) -> None:
    server = await stage.bad()
    heard: list[tuple[str, dict[str, Any]]] = []
    await stage.do(server, "progress", 3, heard=lambda *said: heard.append(said), _meta={"progressToken": "mine"})
    assert [(method, told["progressToken"], told["progress"]) for method, told in heard] == [
        ("notifications/progress", "mine", i) for i in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["Traceback:", "Wrong: no such module"], "ended with 4: Traceback:\nWrong: no such module"),
        (["Traceback " + "x" * 300, "Wrong: no such module"], "ended with 4: Wrong: no such module"),
        (["Wrong: no such module, " + "x" * 300], "ended with 4: Wrong: no such module, xxx"),
    ],
    ids=["short", "long before", "long"],
)
async def test_why_a_server_ended_is_told_from_the_beginning_of_a_line(
    stage: Any, unique: Callable[[str], str], lines: list[str], told: str
) -> None:
    script = f"import sys; print({chr(10).join(lines)!r}, file=sys.stderr); sys.exit(4)"
    name = unique("ends")
    await stage.register(ToolServer(name, command=(sys.executable, "-S", "-c", script)))
    with pytest.raises(ToolError) as ended:
        await stage.do(name, "nothing")
    assert told in str(ended.value)
    assert len(str(ended.value)) < 450


async def test_a_server_that_ends_fails_its_calls_and_is_started_again(stage: Any, said: Callable[..., str]) -> None:
    server = await stage.bad()
    await stage.do(server, "nothing")
    waiting = asyncio.create_task(stage.do(server, "silence"))
    with pytest.raises(ToolError) as ended:
        await stage.do(server, "exit", 7)
    assert ended.value.code == mcp.UPSTREAM_FAILED
    assert "ended with 7" in str(ended.value)
    with pytest.raises(ToolError):
        await waiting
    assert said(await stage.do(server, "nothing")) == f"pid {stage.started(server)[1]}"
    assert stage.service.plane.served(server).upstream.restarts == 1


async def test_a_killed_server_is_started_again(stage: Any, said: Callable[..., str]) -> None:
    server = await stage.bad()
    await stage.do(server, "nothing")
    os.kill(stage.started(server)[0], signal.SIGKILL)
    await eventually(lambda: not stage.service.plane.served(server).upstream.sessions)
    assert said(await stage.do(server, "nothing")) == f"pid {stage.started(server)[1]}"


async def test_a_server_that_hangs_is_given_up_and_started_again(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.sidecar.session.PROBE", 0.5)
    server = await stage.bad(timeout=0.7)
    late = await stage.do(server, "hang")
    assert late["isError"]
    assert late["_meta"][mcp.META_REFUSAL]["kind"] == "late"
    await eventually(lambda: gone(stage.started(server)[0]))
    await stage.do(server, "nothing")  # it may take longer to start than a call waits
    await eventually(lambda: len(stage.started(server)) == 2)


async def test_a_caller_that_leaves_cancels_at_the_server(stage: Any) -> None:
    server = await stage.bad()
    await stage.do(server, "nothing")
    task = asyncio.create_task(stage.do(server, "silence"))
    await eventually(lambda: stage.service.front.under_way)
    await eventually(lambda: stage.service.plane.served(server).upstream.state["busy"])
    task.cancel()
    await eventually(lambda: (stage.state(server) / "cancelled").exists())
    await eventually(lambda: not stage.service.front.under_way)
    assert stage.service.plane.served(server).upstream.sessions


async def test_garbage_on_its_output_and_floods_of_errors_do_no_harm(stage: Any, said: Callable[..., str]) -> None:
    server = await stage.bad()
    assert said(await stage.do(server, "garbage", 500)).startswith("pid")
    assert said(await stage.do(server, "flood", 5000)).startswith("pid")
    [session] = stage.service.plane.served(server).upstream.sessions
    assert session.link.garbage == 502
    await eventually(lambda: len(session.link.last_words) > 10_000)
    assert len(session.link.last_words) <= 16 * 1024
    assert len(stage.started(server)) == 1


async def test_an_endless_line_ends_the_server_not_the_sidecar(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.sidecar.stdio.MESSAGE_LIMIT", 2_000_000)
    server = await stage.bad()
    await stage.do(server, "nothing")
    before = descriptors()
    with pytest.raises(ToolError, match="2000000 bytes"):
        await stage.do(server, "endless line")
    await eventually(lambda: gone(stage.started(server)[0]))
    await eventually(lambda: descriptors() <= before - 3)  # of its three pipes none is left open


async def test_too_large_a_result_is_refused_and_a_large_one_travels_as_a_blob(
    stage: Any, said: Callable[..., str]
) -> None:
    server = await stage.bad(response_bytes=3_000_000)
    large = await stage.do(server, "large", 2_000_000)
    assert said(large) == "x" * 2_000_000
    refused = await stage.do(server, "large", 3_000_001)
    assert refused["_meta"][mcp.META_REFUSAL]["kind"] == "too_large"


async def test_a_large_request_travels_as_a_blob(stage: Any) -> None:
    server = await stage.bad()
    result = await stage.do(server, "meta", padding="y" * 1_500_000)
    assert result["structuredContent"]["padding"] == "y" * 1_500_000


async def test_a_server_is_asked_nothing_by_its_client_but_answered(stage: Any, said: Callable[..., str]) -> None:
    server = await stage.bad("--legacy")
    assert said(await stage.do(server, "ask me")).startswith("pid")


async def test_a_server_sees_nothing_of_the_sidecars_environment(
    stage: Any, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", "s3cret")
    server = await stage.bad()
    seen = json.loads(said(await stage.do(server, "environment")))
    assert "PATH" in seen
    assert [name for name in seen if "SECRET" in name or name.startswith("WEFT")] == []


async def test_a_server_that_cannot_start_is_left_alone_for_a_while(stage: Any) -> None:
    server = await stage.bad()
    (stage.state(server) / "offer.json").write_text("this is not JSON")
    for _ in range(2):
        with pytest.raises(ToolError) as failed:
            await stage.do(server, "nothing")
        assert failed.value.code == mcp.UPSTREAM_FAILED
        assert failed.value.data["retryAfter"] > 0
    assert len(stage.started(server)) == 1


async def test_an_unused_server_is_ended(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.sidecar.upstream.LOOK", 0.1)
    server = await stage.bad(idle=0.2)
    await stage.do(server, "nothing")
    await eventually(lambda: gone(stage.started(server)[0]))
    assert stage.service.plane.served(server).upstream.restarts == 0
    await stage.do(server, "nothing")
    assert len(stage.started(server)) == 2


async def test_a_second_process_serves_while_the_first_is_busy(stage: Any) -> None:
    server = await stage.bad(processes=2)
    await stage.do(server, "nothing")
    waiting = asyncio.create_task(stage.do(server, "silence"))
    await eventually(lambda: stage.service.plane.served(server).upstream.state["busy"])
    await stage.do(server, "nothing")
    await stage.do(server, "nothing")
    assert len(stage.started(server)) == 2
    waiting.cancel()
    await asyncio.wait((waiting,))


async def test_what_a_server_left_behind_ends_with_it_even_if_it_ignores_everything(
    stage: Any, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.sidecar.stdio.LEAVE", 0.3)
    server = await stage.bad("--stubborn")
    child = int(said(await stage.do(server, "spawn")))
    [parent] = stage.started(server)
    assert not gone(child)
    await stage.store.remove(server)
    await eventually(lambda: gone(parent) and gone(child))


async def test_a_sidecar_that_stops_waits_for_a_server_that_is_just_being_ended(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.sidecar.stdio.LEAVE", 0.3)
    monkeypatch.setattr("weft.sidecar.stdio.MESSAGE_LIMIT", 2_000_000)
    server = await stage.bad("--stubborn")
    await stage.do(server, "nothing")
    before = descriptors()
    with pytest.raises(ToolError, match="2000000 bytes"):
        await stage.do(server, "endless line")
    await stage.service.plane.served(server).upstream.aclose()
    assert gone(stage.started(server)[0])
    await eventually(lambda: descriptors() <= before - 3)


async def test_calls_and_restarts_leak_no_descriptor_and_no_process(stage: Any) -> None:
    server = await stage.bad()
    await stage.do(server, "nothing")
    before = descriptors()
    for _ in range(3):
        with pytest.raises(ToolError):
            await stage.do(server, "exit")
        for _ in range(20):
            await stage.do(server, "nothing")
    assert descriptors() <= before + 1
    *dead, _ = stage.started(server)
    assert len(dead) == 3
    assert all(gone(pid) for pid in dead)
