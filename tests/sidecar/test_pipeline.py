"""The pipeline: stages in their order, refusals, what is given back, and each stage by itself."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from weft.sidecar.arguments import Arguments
from weft.sidecar.pipeline import Call, Outcome, Passing, Pipeline, Refusal
from weft.sidecar.settings import Limits, limits_of
from weft.sidecar.stages import Breaker, Concurrency, Deadline, Pinned, ResponseSize
from weft.testing.agents import eventually
from weft_protocols import mcp
from weft_protocols.errors import InvalidConfig, ToolError

pytestmark = pytest.mark.anyio

CALL = Call(caller="a", server="s", method="tools/call", name="t", params={"name": "t", "arguments": {"x": 1}})


async def fine(call: Call) -> dict[str, Any]:
    return {"content": [], "arguments": dict(call.arguments)}


async def broken(call: Call) -> dict[str, Any]:
    raise ToolError("broken", code=mcp.UPSTREAM_FAILED)


class Traced:
    """Leaves its name, and does what it is told."""

    def __init__(self, name: str, trace: list[str], decided: Any = None) -> None:
        self.name, self.trace, self.decided = name, trace, decided

    async def before(self, call: Call) -> Call | Refusal:
        self.trace.append(f"{self.name}>")
        return self.decided if self.decided is not None else call

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        self.trace.append(f"<{self.name}{' cancelled' if outcome.cancelled else ''}")
        return outcome


async def test_stages_see_a_call_in_their_order_and_its_outcome_in_reverse() -> None:
    trace: list[str] = []
    changed = CALL.with_arguments({"x": 2})
    pipeline = Pipeline([Traced("a", trace), Traced("b", trace, changed), Traced("c", trace)])
    assert (await pipeline.run(CALL, fine))["arguments"] == {"x": 2}
    assert trace == ["a>", "b>", "c>", "<c", "<b", "<a"]


async def test_only_stages_that_let_a_call_pass_see_that_it_was_refused() -> None:
    trace: list[str] = []
    refusal = Refusal(mcp.DENIED, "no")
    pipeline = Pipeline([Traced("a", trace), Traced("b", trace, refusal), Traced("c", trace)])
    with pytest.raises(ToolError, match="no") as refused:
        await pipeline.run(CALL, fine)
    assert refused.value.code == mcp.DENIED
    assert trace == ["a>", "b>", "<a"]


async def test_a_refusal_in_band_is_a_result_for_tools_and_an_error_for_others() -> None:
    refusal = Refusal(mcp.BUSY, "later", {"retryAfter": 3}, in_band=True)
    pipeline = Pipeline([Traced("a", [], refusal)])
    result = await pipeline.run(CALL, fine)
    assert result["isError"]
    assert result["_meta"][mcp.META_REFUSAL] == {"code": mcp.BUSY, "kind": "busy", "retryAfter": 3}
    with pytest.raises(ToolError, match="later"):
        await pipeline.run(replace(CALL, method="resources/read"), fine)


async def test_a_cancelled_call_gives_back_what_its_stages_took() -> None:
    trace: list[str] = []

    async def endless(_: Call) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    task = asyncio.create_task(Pipeline([Traced("a", trace), Traced("b", trace)]).run(CALL, endless))
    await eventually(lambda: len(trace) == 2)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert trace == ["a>", "b>", "<b cancelled", "<a cancelled"]


@pytest.mark.parametrize("where", ["before", "after", "execute"])
async def test_whatever_fails_is_an_error_and_everything_is_given_back(where: str) -> None:
    trace: list[str] = []
    outcomes: list[Outcome] = []

    class First(Passing):
        async def after(self, call: Call, outcome: Outcome) -> Outcome:
            outcomes.append(outcome)
            return outcome

    class Broken(Passing):
        async def before(self, call: Call) -> Call | Refusal | Outcome:
            return call if where != "before" else 1 / 0  # type: ignore[return-value]

        async def after(self, call: Call, outcome: Outcome) -> Outcome:
            return outcome if where != "after" else 1 / 0  # type: ignore[return-value]

    async def execute(call: Call) -> dict[str, Any]:
        return {} if where != "execute" else 1 / 0  # type: ignore[return-value]

    pipeline = Pipeline([First(), Traced("a", trace), Broken(), Traced("b", trace)])
    with pytest.raises(ToolError, match="its log says why") as failed:
        await pipeline.run(CALL, execute)
    assert failed.value.code == mcp.INTERNAL_ERROR
    assert trace == (["a>", "<a"] if where == "before" else ["a>", "b>", "<b", "<a"])
    assert outcomes[0].error is failed.value
    assert outcomes[0].result is None


async def test_a_call_has_as_long_as_its_server_may_take_and_its_caller_waits() -> None:
    async def slow(_: Call) -> dict[str, Any]:
        await asyncio.sleep(5)
        return {}

    pipeline = Pipeline([Deadline()])
    late = await pipeline.run(replace(CALL, limits=Limits(timeout=0.05)), slow)
    assert late["_meta"][mcp.META_REFUSAL]["kind"] == "late"
    late = await pipeline.run(replace(CALL, deadline=time.time() + 0.05), slow)
    assert late["isError"]
    over = await Deadline().before(replace(CALL, deadline=time.time() - 1))
    assert isinstance(over, Refusal)


async def test_what_is_in_quarantine_is_refused_with_what_to_do() -> None:
    refused = await Pinned().before(replace(CALL, quarantine="changed"))
    assert isinstance(refused, Refusal)
    assert "mesh tools approve s" in refused.message
    assert await Pinned().before(CALL) is CALL


async def test_the_size_of_a_result_counts_all_of_it() -> None:
    call = replace(CALL, limits=Limits(response_bytes=100))
    small, large = Outcome(result={"content": []}), Outcome(result={"structuredContent": {"x": "y" * 100}})
    assert (await ResponseSize().after(call, small)).result is not None
    assert (await ResponseSize().after(call, large)).result is None


async def test_a_server_that_fails_is_left_alone_and_tried_by_one_call() -> None:
    breaker = Breaker()
    pipeline = Pipeline([breaker])
    call = replace(CALL, limits=Limits(failures=2, reset=30.0))
    for _ in range(2):
        with pytest.raises(ToolError, match="broken"):
            await pipeline.run(call, broken)
    refused = await pipeline.run(call, fine)
    assert refused["_meta"][mcp.META_REFUSAL]["kind"] == "circuit_open"
    other = replace(call, server="other")
    assert "isError" not in await pipeline.run(other, fine)
    breaker._circuits["s"].opened -= call.limits.reset  # so much later
    first, second = await breaker.before(call), await breaker.before(call)
    assert isinstance(first, Call)
    assert isinstance(second, Refusal)
    await breaker.after(call, Outcome(result={}))
    assert isinstance(await breaker.before(call), Call)


async def test_a_tools_own_error_is_no_failure_of_its_server() -> None:
    pipeline = Pipeline([Breaker()])

    async def wrong(_: Call) -> dict[str, Any]:
        raise ToolError("no such tool", code=mcp.INVALID_PARAMS)

    for _ in range(10):
        with pytest.raises(ToolError, match="no such tool"):
            await pipeline.run(CALL, wrong)


async def test_so_many_calls_are_under_way_at_once_and_others_wait_their_turn() -> None:
    under_way = most = 0

    async def counted(_: Call) -> dict[str, Any]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return {}

    pipeline = Pipeline([Concurrency()])
    call = replace(CALL, limits=Limits(concurrency=3))
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(pipeline.run(call, counted))
    assert most == 3


async def test_who_waits_too_long_for_a_place_is_refused_and_leaves_none_taken() -> None:
    concurrency = Concurrency()
    call = replace(CALL, limits=Limits(concurrency=1, queue_timeout=0.05))
    assert isinstance(await concurrency.before(call), Call)
    refused = await concurrency.before(call)
    assert isinstance(refused, Refusal)
    assert refused.code == mcp.BUSY
    waiting = asyncio.create_task(concurrency.before(call))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    await concurrency.after(call, Outcome(result={}))
    assert isinstance(await concurrency.before(call), Call)


async def test_an_agent_with_many_calls_leaves_places_to_others() -> None:
    concurrency = Concurrency()
    call = replace(CALL, limits=Limits(concurrency=4, queue_timeout=0.05))
    many = await asyncio.gather(*(concurrency.before(call) for _ in range(20)))
    assert sum(isinstance(one, Call) for one in many) == 3
    refused = next(one for one in many if isinstance(one, Refusal))
    assert (refused.code, refused.data) == (mcp.BUSY, {"retryAfter": 0.05})
    assert "3 calls of a under way" in refused.message
    other = replace(call, caller="b")
    assert isinstance(await concurrency.before(other), Call)
    full = await concurrency.before(other)
    assert isinstance(full, Refusal)
    assert "s has 4 calls under way" in full.message


async def test_places_are_given_to_agents_by_turns_and_to_an_agents_calls_in_their_order() -> None:
    order: list[str] = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def noted(call: Call) -> dict[str, Any]:
        begun.set()
        await go.wait()
        order.append(call.name)
        return {}

    pipeline = Pipeline([Concurrency()])
    async with asyncio.TaskGroup() as group:
        for name in ("first", "a1", "a2", "a3", "b1", "c1", "b2"):
            call = replace(CALL, caller=name[0], name=name, limits=Limits(concurrency=1))
            group.create_task(pipeline.run(call, noted))
            await begun.wait()
        await asyncio.sleep(0)  # the last one waits by now
        go.set()
    assert order == ["first", "a1", "b1", "c1", "a2", "b2", "a3"]


async def test_who_leaves_the_queue_takes_nobodys_turn() -> None:
    concurrency = Concurrency()
    call = replace(CALL, limits=Limits(concurrency=1))
    assert isinstance(await concurrency.before(call), Call)
    tasks = [asyncio.create_task(concurrency.before(replace(call, caller=name))) for name in ("b", "b", "c")]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    await concurrency.after(call, Outcome(result={}))
    assert isinstance(await tasks[1], Call)
    assert not tasks[2].done()
    tasks[2].cancel()
    await asyncio.wait(tasks[2:])
    await concurrency.after(replace(call, caller="b"), Outcome(cancelled=True))
    assert isinstance(await concurrency.before(call), Call)


@pytest.mark.parametrize(
    ("places", "own", "share"), [(16, 0, 12), (4, 0, 3), (3, 0, 3), (1, 0, 1), (8, 2, 2), (4, 9, 4)]
)
def test_an_agent_has_three_quarters_of_the_places_unless_the_settings_say_otherwise(
    places: int, own: int, share: int
) -> None:
    assert Limits(concurrency=places, concurrency_per_agent=own).share == share
    given = {"concurrency": places, **({"concurrency_per_agent": own} if own else {})}
    assert limits_of(given).share == share


async def test_a_call_that_is_cancelled_on_its_way_back_is_still_seen_by_every_stage() -> None:
    trace: list[str] = []
    reached = asyncio.Event()

    class Slow(Traced):
        async def after(self, call: Call, outcome: Outcome) -> Outcome:
            reached.set()
            await asyncio.Event().wait()
            return outcome

    task = asyncio.create_task(Pipeline([Traced("a", trace), Slow("b", trace)]).run(CALL, fine))
    await reached.wait()
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert trace == ["a>", "b>", "<a cancelled"]


# Arguments -----------------------------------------------------------------------------------------


def with_schema(schema: dict[str, Any], **arguments: Any) -> Call:
    params = {"name": "t", "arguments": arguments}
    return replace(CALL, params=params, definition={"inputSchema": schema}, definition_digest=repr(schema))


async def mistakes(schema: dict[str, Any], **arguments: Any) -> str:
    decided = await Arguments().before(with_schema(schema, **arguments))
    return decided.message if isinstance(decided, Refusal) else ""


async def test_wrong_arguments_are_told_where_they_are_wrong() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["b"]}
    told = await mistakes(schema, a=[1, "2"])
    assert "a[1]: '2' is not of type 'integer'" in told
    assert "'b' is a required property" in told
    assert await mistakes(schema, a=[1], b=None) == ""


async def test_references_within_a_schema_hold_and_nothing_outside_is_fetched() -> None:
    inner = {"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}
    assert "not of type 'integer'" in await mistakes(inner, a="x")
    remote = {"properties": {"a": {"$ref": "http://127.0.0.1:1/evil.json"}}}
    assert "nothing is fetched" in await mistakes(remote, a="x")
    file = {"properties": {"a": {"$ref": "file:///etc/passwd"}}}
    assert "nothing is fetched" in await mistakes(file, a="x")


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|a)*$", "^a*a*a*a*a*a*$", r"^(a*)\1*$"])
async def test_a_pattern_is_matched_in_the_time_that_its_text_takes_or_left_to_the_server(pattern: str) -> None:
    begun = time.process_time()
    told = await mistakes({"properties": {"a": {"pattern": pattern}}}, a="a" * 4000 + "!")
    assert ("does not match" in told) == ("\\1" not in pattern)
    assert time.process_time() - begun < 1


async def test_an_honest_pattern_is_checked() -> None:
    assert "does not match" in await mistakes({"properties": {"a": {"pattern": "^[a-z]+$"}}}, a="A")


@pytest.mark.parametrize("schema", [{"type": 7}, {"properties": []}, {"pattern": "("}])
async def test_a_schema_that_is_none_lets_no_call_pass(schema: dict[str, Any]) -> None:
    assert "cannot be used" in await mistakes(schema, a="x")


async def test_endless_recursion_is_a_refusal() -> None:
    schema = {"properties": {"a": {"$ref": "#"}}}
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    assert "too deep" in await mistakes(schema, **deep)


# Settings ------------------------------------------------------------------------------------------


def test_settings_are_numbers_with_known_names() -> None:
    assert limits_of({"timeout": 3, "sandbox": {"network": False}}) == Limits(timeout=3.0)
    with pytest.raises(InvalidConfig, match="did you mean 'timeout'"):
        limits_of({"timout": 3})
    for wrong in (0, -1, True, "3"):
        with pytest.raises(InvalidConfig, match="above 0"):
            limits_of({"timeout": wrong})
