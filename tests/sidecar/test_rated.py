"""Rate limits: what the policy and a server's settings allow, for all sidecars together."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from weft.client.limits import SharedLimits
from weft.client.tools import ToolRequest
from weft.core.broker import Broker
from weft.core.config import load_mesh_config
from weft.core.latest import Latest
from weft.core.toolsconf import SidecarConfig
from weft.policy.model import Decision, Limit, Obligations
from weft.sidecar import owed
from weft.sidecar.guards import Guards, guards_of
from weft.sidecar.pipeline import Call, Outcome, Passing, Pipeline, Refusal
from weft.sidecar.rated import Rated
from weft.sidecar.repeats import Repeats
from weft.sidecar.siblings import Siblings
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh, unique_name
from weft_protocols import mcp
from weft_protocols.errors import Conflict, InvalidConfig, ToolError
from weft_protocols.resources import RATE_PREFIX, RATES

pytestmark = pytest.mark.anyio


def limit(calls: int, seconds: float = 3600.0, *, burst: int = 0, per: str = "pair", policy: str = "") -> Limit:
    return Limit(policy or unique_name("rule"), calls, seconds, burst or calls, per)


def owing(*limits: Limit, **more: Any) -> Call:
    """A call that the policy allowed, so many at a time."""
    params = {"name": "update", "arguments": {}}
    call = Call(caller="billing", server="crm", method="tools/call", name="update", params=params)
    decision = Decision(allow=True, reasons=("r",), obligations=Obligations(limits=limits))
    return replace(call, facts={owed.DECISION: decision}, **more)


class Server:
    """Counts what reaches it."""

    def __init__(self) -> None:
        self.called = 0

    async def __call__(self, _: Call) -> dict[str, Any]:
        self.called += 1
        return {"content": []}


@pytest.fixture
async def broker(mesh: BrokerMesh) -> AsyncIterator[Broker]:
    made = await mesh.connect("sidecar")
    yield made
    await made.close()


def rated(broker: Broker) -> Pipeline:
    return Pipeline([Rated(SharedLimits(broker))])


def refusal(result: dict[str, Any]) -> Any:
    return (result.get("_meta") or {}).get(mcp.META_REFUSAL)


async def test_a_call_over_a_limit_is_told_which_and_how_long_to_wait(broker: Broker) -> None:
    pipeline, server, small = rated(broker), Server(), limit(2, policy="small-amounts" + unique_name(""))
    call = owing(limit(1000), small)
    results = [await pipeline.run(call, server) for _ in range(3)]
    assert [refusal(one) is None for one in results] == [True, True, False]
    told = refusal(results[2])
    assert (told["code"], told["kind"]) == (mcp.RATE_LIMITED, "rate_limited")
    assert (told["rule"], told["limit"]) == (small.policy, "2/h per pair")
    assert 1700 < told["retryAfter"] <= 1800.1
    assert "try again in" in results[2]["content"][0]["text"]
    assert server.called == 2


@pytest.mark.parametrize(
    ("per", "free"),
    [("pair", {"agent", "tool", "server"}), ("agent", {"agent"}), ("tool", {"tool", "server"}), ("server", {"server"}),
     ("rule", set[str]())],
)  # fmt: skip
async def test_a_limit_counts_together_what_it_says(broker: Broker, per: str, free: set[str]) -> None:
    pipeline, call = rated(broker), owing(limit(1, per=per))
    await pipeline.run(call, Server())
    others = {
        "agent": replace(call, caller="payer"),
        "tool": replace(call, name="delete"),
        "server": replace(call, server="erp"),
    }
    passed = {name for name, one in others.items() if refusal(await pipeline.run(one, Server())) is None}
    assert passed == free


async def test_what_is_no_tool_call_gets_an_error_with_the_same_data(broker: Broker) -> None:
    pipeline = rated(broker)
    for method in ("prompts/get", "resources/read"):
        call = owing(limit(1), method=method)
        await pipeline.run(call, Server())
        with pytest.raises(ToolError, match="too often") as refused:
            await pipeline.run(call, Server())
        assert refused.value.code == mcp.RATE_LIMITED
        assert {"retryAfter", "limit", "rule"} <= dict(refused.value.data).keys()


async def test_lists_are_not_counted(broker: Broker) -> None:
    pipeline, server = rated(broker), Server()
    for method in ("tools/list", "resources/list", "subscriptions/listen"):
        call = owing(limit(1), method=method)
        for _ in range(3):
            await pipeline.run(call, server)
    assert server.called == 9


class Then(Passing):
    """Refuses after the limits, as often as it is told."""

    def __init__(self, times: int, code: int) -> None:
        self.times, self.code = times, code

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        self.times -= 1
        return call if self.times < 0 else Refusal(self.code, "not now", in_band=True)


@pytest.mark.parametrize("code", [mcp.PENDING, mcp.BUSY, mcp.CIRCUIT_OPEN, mcp.UNRECORDED])
@pytest.mark.parametrize("calls", [1, 100])
async def test_a_call_that_is_refused_later_is_not_counted(broker: Broker, code: int, calls: int) -> None:
    allowed = limit(calls, 86_400.0 if calls == 1 else 10.0)
    pipeline = Pipeline([Rated(SharedLimits(broker)), Then(calls, code)])
    results = [await pipeline.run(owing(allowed), Server()) for _ in range(calls + 1)]
    assert [refusal(one)["code"] for one in results[:-1]] == [code] * calls
    assert refusal(results[-1]) is None


async def test_what_is_given_back_is_there_for_the_next_call(broker: Broker) -> None:
    class Held(Then):
        async def before(self, call: Call) -> Call | Refusal | Outcome:
            begun.set()
            await go.wait()
            return await super().before(call)

    begun, go, one = asyncio.Event(), asyncio.Event(), limit(1)
    pipeline = Pipeline([Rated(SharedLimits(broker)), Held(1, mcp.PENDING)])
    first = asyncio.create_task(pipeline.run(owing(one), Server()))
    await begun.wait()
    assert refusal(await pipeline.run(owing(one), Server()))["kind"] == "rate_limited"
    go.set()
    assert refusal(await first)["kind"] == "pending"
    assert refusal(await pipeline.run(owing(one), Server())) is None


async def test_what_one_limit_refuses_is_not_counted_by_the_others(broker: Broker) -> None:
    pipeline, server = rated(broker), Server()
    wide, narrow = limit(3, per="agent"), limit(1)
    for _ in range(5):
        await pipeline.run(owing(wide, narrow), server)
    assert server.called == 1
    for _ in range(3):
        await pipeline.run(owing(wide), server)
    assert server.called == 3


async def test_a_call_that_was_made_counts_whatever_came_of_it(broker: Broker) -> None:
    async def late(_: Call) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def failing(_: Call) -> dict[str, Any]:
        raise ToolError("it ended", code=mcp.UPSTREAM_FAILED)

    pipeline, one = rated(broker), limit(1)
    result = await pipeline.run(owing(one, deadline=time.time() + 0.05), late)
    assert refusal(result)["kind"] == "late"
    assert refusal(await pipeline.run(owing(one, deadline=time.time() + 0.5), late))["kind"] == "rate_limited"
    other = limit(1)
    with pytest.raises(ToolError, match="it ended"):
        await pipeline.run(owing(other), failing)
    assert refusal(await pipeline.run(owing(other), failing))["kind"] == "rate_limited"


async def test_a_recorded_result_costs_nothing(broker: Broker) -> None:
    server, task = Server(), unique_name("task")
    call = owing(limit(1), task=task, guards=Guards(effects=frozenset({"update"})))
    pipeline = Pipeline([Repeats(broker), Rated(SharedLimits(broker))])
    results = [await pipeline.run(call, server) for _ in range(4)]
    assert [refusal(one) for one in results] == [None] * 4
    assert server.called == 1


async def test_through_a_sidecar_a_recorded_result_costs_nothing(stage: Any) -> None:
    server = await stage.runner(rate="1/h", side_effects=["effect"])
    params = {"name": "effect", "arguments": {}, "_meta": {mcp.META_STEP: "s1"}}
    request = ToolRequest(server, "tools/call", params, chain=f"local/{unique_name('task')}")
    results = [await stage.caller.request(request) for _ in range(3)]
    assert [refusal(one) for one in results] == [None] * 3
    other = ToolRequest(server, "tools/call", {**params, "_meta": {mcp.META_STEP: "s2"}}, chain=request.chain)
    assert refusal(await stage.caller.request(other))["kind"] == "rate_limited"


# Several sidecars ----------------------------------------------------------------------------------


@pytest.fixture
async def second(stage: Any, mesh: BrokerMesh) -> AsyncIterator[Any]:
    """Another sidecar beside the stage's."""
    from weft.sidecar.service import SidecarService

    async with AsyncExitStack() as stack:
        broker = await mesh.connect("sidecar")
        stack.push_async_callback(broker.close)
        service = SidecarService(broker, SidecarConfig())
        stack.push_async_callback(service.aclose)
        yield await service.start()


async def test_sidecars_know_how_many_they_are(fresh_mesh: BrokerMesh) -> None:
    brokers = [await fresh_mesh.connect("sidecar") for _ in range(3)]
    siblings = [Siblings(one) for one in brokers]
    first = siblings[0].count
    for one in siblings:
        await one.start()
    await eventually(lambda: [one.count for one in siblings] == [3, 3, 3])
    await siblings[0].aclose()
    # It says so, and nobody has to miss it for as long as silence would take.
    await eventually(lambda: siblings[1].count == siblings[2].count == 2, timeout=4.0)
    assert first == 1
    for each, broker in zip(siblings[1:], brokers[1:], strict=True):
        await each.aclose()
        await broker.close()
    await brokers[0].close()


@pytest.mark.parametrize(("rate", "allowed"), [("20/h", 20), ("400/h burst 40 per server", 40), ("30/h per agent", 30)])
async def test_a_servers_rate_holds_for_two_sidecars_together(stage: Any, second: Any, rate: str, allowed: int) -> None:
    server = await stage.bad(rate=rate, concurrency=100)
    await eventually(lambda: server in second.plane.servers)
    asked: Counter[tuple[str, int]] = Counter()
    planes = [stage.service.plane, second.plane]
    for number, plane in enumerate(planes):
        await plane.served(server).known()
        for method in ("one", "_forward"):  # what comes in, and what is made
            original = getattr(plane, method)

            async def counted(*args: Any, original: Any = original, key: Any = (method, number)) -> Any:
                asked[key] += 1
                return await original(*args)

            setattr(plane, method, counted)
    try:
        results = await asyncio.gather(*(stage.do(server, "nothing") for _ in range(80)))
    finally:
        for plane in planes:
            del plane.one, plane._forward
    made = [one for one in results if refusal(one) is None]
    refused = [refusal(one) for one in results if refusal(one) is not None]
    assert len(made) == allowed, Counter((one["kind"], one.get("retryAfter")) for one in refused)
    assert asked["_forward", 0] + asked["_forward", 1] == allowed
    assert min(asked["one", 0], asked["one", 1]) > 10  # both had a part in it
    assert {one["rule"] for one in refused} == {f"settings of {server}"}
    assert all(one["code"] == mcp.RATE_LIMITED and one["retryAfter"] > 0 for one in refused)


async def test_what_a_sidecar_takes_at_once_is_its_share(stage: Any, second: Any, broker: Broker) -> None:
    server = await stage.bad(rate="20/s burst 100")
    await eventually(lambda: stage.service.plane.sidecars == second.plane.sidecars == 2)
    stored = Latest(broker, RATES, RATE_PREFIX)
    for plane in (stage.service.plane, second.plane):
        await plane.served(server).known()
    before, called = await stored.all(), time.time()
    await stage.do(server, "nothing")
    answered, after = time.time(), await stored.all()
    (new,) = (after[name] for name in after.keys() - before.keys())
    # Each token moves it by a twentieth of a second from when it was taken.
    until = float(new.data.split()[0])
    assert until - answered <= 10 / 20 <= until - called + 0.001


async def test_chunks_of_many_calls_hold_for_two_sidecars_together(mesh: BrokerMesh) -> None:
    """A limit whose tokens are taken many at a time: no more pass than it says, and none that were taken get lost."""
    brokers = [await mesh.connect("sidecar") for _ in range(2)]
    pipelines = [Pipeline([Rated(SharedLimits(one, sidecars=lambda: 2))]) for one in brokers]
    server, often = Server(), limit(200, 10.0)
    begun = time.time()
    await asyncio.gather(*(one.run(owing(often), server) for one in pipelines for _ in range(400)))
    most = 200 + 20 * (time.time() - begun)
    assert 200 - 2 * 10 <= server.called <= most + 1
    for one in brokers:
        await one.close()


async def test_without_the_broker_calls_wait_and_nothing_is_allowed_twice(fresh_mesh: BrokerMesh) -> None:
    brokers = [await fresh_mesh.connect("sidecar") for _ in range(2)]
    cut, other = [rated(one) for one in brokers]
    server, often = Server(), limit(1000, 10.0, burst=200)
    await cut.run(owing(often), server)  # takes a chunk of 100
    await brokers[0].close()
    results = await asyncio.gather(*(cut.run(owing(often), server) for _ in range(300)))
    told = [refusal(one) for one in results if refusal(one) is not None]
    assert len(told) == 201
    assert all(0 < one["retryAfter"] <= 1.0 for one in told)
    begun = time.time()
    await asyncio.gather(*(other.run(owing(often), server) for _ in range(300)))
    assert server.called <= 200 + 100 * (time.time() - begun + 1) + 1
    await brokers[1].close()


async def test_a_write_that_was_stored_though_its_answer_was_lost_is_known_again(broker: Broker) -> None:
    class Losing:
        """Stores what it is given, and the attempt after the lost answer finds it stored."""

        last = staticmethod(broker.last)

        async def publish(self, *args: Any, **more: Any) -> int:
            await broker.publish(*args, **more)
            raise Conflict("wrong last sequence")

    limits: Any = SharedLimits(Losing())  # type: ignore[arg-type]
    pipeline, server, three = Pipeline([Rated(limits)]), Server(), limit(3)
    for _ in range(4):
        await pipeline.run(owing(three), server)
    assert server.called == 3


async def test_a_broker_that_dies_and_comes_back_allows_nothing_twice(fresh_mesh: BrokerMesh) -> None:
    brokers = [await fresh_mesh.connect("sidecar") for _ in range(2)]
    pipelines = [rated(one) for one in brokers]
    server, rare = Server(), limit(1000, 86_400.0)
    kinds: Counter[str] = Counter()

    async def calling(pipeline: Pipeline) -> None:
        while not kinds["over"]:
            told = refusal(await pipeline.run(owing(rare), server))
            if told is not None and told["retryAfter"] > 1.0:
                kinds["over"] += 1
            elif told is not None:  # nobody knows: it comes again
                kinds["unknown"] += 1
                await asyncio.sleep(0.1)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for pipeline in pipelines:
            for _ in range(3):
                group.create_task(calling(pipeline))
        await eventually(lambda: server.called >= 5)
        os.kill(fresh_mesh.server.pid or 0, signal.SIGKILL)
        await fresh_mesh.server.wait()
        before = server.called
        await eventually(lambda: kinds["unknown"])
        assert server.called <= before + 2  # what was answered already
        await fresh_mesh.server.start()
    assert before < server.called <= 1001  # one comes back every 86 s
    for one in brokers:
        await one.close()


# Settings ------------------------------------------------------------------------------------------


def test_a_servers_rates_are_read_like_those_of_rules() -> None:
    guards = guards_of({"rate": {"update": "5/m", "*": "100/m burst 20 per agent, 1000/h per server"}})
    assert [one.words for one in guards.rates_of("update")] == [
        "5/m per pair", "100/m burst 20 per agent", "1000/h per server",
    ]  # fmt: skip
    assert [one.words for one in guards.rates_of("other")] == ["100/m burst 20 per agent", "1000/h per server"]
    assert [one.words for one in guards_of({"rate": "3/10s"}).rates_of("")] == ["3/10s per pair"]
    assert guards_of({}).rates_of("update") == ()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (5, "settings.rate must be a mapping"),
        ("often", "settings.rate: 'often' must be like 10/m"),
        ("5/m per crowd", "'crowd' is none of pair, agent, tool, server, rule"),
        ({"update": 5}, "settings.rate.update must be a limit such as 100/m per agent, not 5"),
        ({"update": "0/m"}, "settings.rate.update: '0/m' would allow nothing"),
    ],
)
def test_a_rate_that_is_none_is_refused_and_says_where(wrong: Any, told: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        guards_of({"rate": wrong})
    assert told in str(refused.value)


async def test_a_server_with_a_rate_that_is_none_is_not_called_and_says_why(stage: Any) -> None:
    server = await stage.bad(rate="100/m per crowd")
    with pytest.raises(ToolError, match=rf"settings of {server}.rate: 'crowd' is none of") as refused:
        await stage.do(server, "nothing")
    assert refused.value.code == mcp.UPSTREAM_FAILED
    assert not stage.started(server)


def test_rate_and_redact_stand_beside_the_other_guards_in_the_meshs_file(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text(
        "tools:\n  crm:\n    command: [crm]\n    rate: {send: 5/m, '*': 100/m per agent}\n    redact: [secrets, pii]\n"
    )
    server = load_mesh_config(file).tools["crm"]
    guards = guards_of(server.settings)
    assert [one.words for one in guards.rates_of("send")] == ["5/m per pair", "100/m per agent"]
    assert guards.redact == ("secrets", "pii")


async def test_limits_of_one_tool_are_no_limits_of_another(broker: Broker) -> None:
    guards = guards_of({"rate": {"update": "1/h per rule", "delete": "1/h per rule"}})
    pipeline, server = rated(broker), unique_name("crm")
    call = replace(owing(), server=server, guards=guards)
    results = [await pipeline.run(replace(call, name=name), Server()) for name in ("update", "delete", "update", "x")]
    assert [refusal(one) is None for one in results] == [True, True, False, True]
    assert refusal(results[2])["rule"] == f"settings of {server}.update"
