"""Calls that persons have to approve: asked for once, bound to exactly the call, used once, whoever makes it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from weft import Agent, Task
from weft.client import approvals as api
from weft.client.approvals import ApprovalInfo, ToolCall
from weft.core.broker import Broker
from weft.policy.model import Approval, Decision, Obligations
from weft.sidecar import owed
from weft.sidecar.approved import Approved, bound
from weft.sidecar.pipeline import Call, Outcome, Refusal
from weft.testing.agents import Process, client, coordinator_process, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.policies import EVERYTHING, permit
from weft_protocols import mcp
from weft_protocols.errors import Fenced, TimedOut, ToolError, Unavailable
from weft_protocols.resources import AUDIT

pytestmark = pytest.mark.anyio

APPROVERS = "name: m\napprovers: {ann: [ops]}\n"
OPS = '@id("by-ops") @approval("ops") permit (principal, action == Action::"call", resource);'
ASKED = ApprovalInfo(
    "a1", "pending", "tool", "clerk", "t", needs=[("ops", 1)], open=[("ops", 1)], expires=2_000_000_000_000
)
CALL = Call(
    caller="clerk",
    server="crm",
    method="tools/call",
    name="update",
    params={"name": "update", "arguments": {"id": "acme", "password": "hunter2hunter2"}},
    task="f" * 32,
    definition={"name": "update", "annotations": {"destructiveHint": True}},
    definition_digest="d" * 64,
    facts={owed.DECISION: Decision(True, ("by-ops",), Obligations(approvals=(Approval("ops", 2),)), version=3)},
)


class Persons:
    """Stands in for the coordinator: how a request stands each time it is asked, and what a use is told."""

    def __init__(self, *states: str | Exception, uses: Sequence[str | Exception] = ("",)) -> None:
        self.states, self.uses = list(states), list(uses)
        self.asked: list[tuple[ToolCall, dict[str, Any]]] = []
        self.used: list[tuple[str, str]] = []
        self.returned: list[tuple[str, str]] = []

    async def ask(self, wanted: ToolCall, **more: Any) -> ApprovalInfo:
        self.asked.append((wanted, more))
        state = self.states.pop(0)
        if isinstance(state, Exception):
            raise state
        said = [{"who": "ann", "role": "ops", "allow": True, "at": 5, "reason": ""}] if state == "approved" else []
        why = "ann denied it: no" if state == "denied" else ""
        return replace(ASKED, id=f"a{len(self.asked)}", state=state, decisions=said, why=why)

    async def use(self, id_: str, wanted: ToolCall, *, by: str) -> str:
        self.used.append((id_, by))
        told = self.uses.pop(0)
        if isinstance(told, Exception):
            raise told
        return told

    async def give_back(self, id_: str, *, by: str) -> bool:
        self.returned.append((id_, by))
        if self.uses:
            raise Unavailable("nobody leads")
        return True


async def refused(persons: Persons, call: Call = CALL) -> Refusal:
    decided = await Approved(persons).before(call)
    assert isinstance(decided, Refusal)
    assert decided.in_band
    return decided


async def test_what_owes_no_approval_asks_nobody() -> None:
    persons = Persons()
    free = CALL.with_fact(owed.DECISION, Decision(True, version=3))
    assert await Approved(persons).before(free) is free
    assert await Approved(persons).before(replace(free, facts={})) is not None
    assert persons.asked == []


async def test_what_waits_is_refused_with_its_id_and_what_to_do() -> None:
    persons = Persons("pending")
    refusal = await refused(persons)
    assert (refusal.code, refusal.data["approval"]) == (mcp.PENDING, "a1")
    for words in ("crm.update waits for an approval by 1 of ops: a1", "mesh approvals approve a1", "the same call"):
        assert words in refusal.message
    wanted, shown = persons.asked[0]
    assert wanted == bound(CALL)
    assert (wanted.policy, wanted.definition, wanted.task) == ("3", "d" * 64, "f" * 32)
    assert (shown["needs"], shown["risk"], shown["title"]) == ([("ops", 2)], "high", "clerk: crm.update")
    assert shown["details"]["arguments"]["id"] == "acme"
    assert "hunter2" not in json.dumps(shown["details"])
    assert persons.used == []


async def test_the_answers_of_a_later_round_are_approved_and_shown_like_arguments() -> None:
    persons = Persons("pending")
    later = replace(CALL, params={**CALL.params, "inputResponses": {"sure": {"action": "accept"}}, "requestState": "s"})
    assert (
        len(
            {
                bound(one).arguments
                for one in (CALL, later, replace(later, params={**later.params, "requestState": "t"}))
            }
        )
        == 3
    )
    await refused(persons, later)
    assert persons.asked[0][1]["details"]["answers"]["inputResponses"] == {"sure": {"action": "accept"}}


async def test_what_was_approved_is_used_and_left_to_the_record() -> None:
    persons = Persons("approved")
    passed = await Approved(persons).before(CALL)
    assert isinstance(passed, Call)
    assert passed.facts[owed.APPROVALS] == [{"id": "a1", "by": [{"who": "ann", "role": "ops", "at": 5}], "asked": 0}]
    assert [id_ for id_, _ in persons.used] == ["a1"]


async def test_a_use_whose_answer_is_lost_is_repeated_as_the_same_use() -> None:
    persons = Persons("approved", uses=(TimedOut("lost"), ""))
    assert isinstance(await Approved(persons).before(CALL), Call)
    assert len({by for _, by in persons.used}) == 1
    lost = Persons("approved", uses=[TimedOut("lost")] * 3)
    assert (await refused(lost)).code == mcp.PENDING


@pytest.mark.parametrize(
    ("code", "back"), [(mcp.PENDING, True), (mcp.CIRCUIT_OPEN, True), (mcp.LATE, False), (mcp.TOO_LARGE, False)]
)
async def test_what_was_used_for_a_call_that_was_not_made_is_given_back(code: int, back: bool) -> None:
    persons = Persons("approved")
    stage = Approved(persons)
    passed = await stage.before(CALL)
    assert isinstance(passed, Call)
    outcome = Outcome(error=ToolError("no"), refused=Refusal(code, "no"))
    assert await stage.after(passed, outcome) is outcome
    assert persons.returned == (persons.used if back else [])


async def test_what_cannot_be_given_back_changes_no_outcome() -> None:
    persons = Persons("approved", uses=("", "left"))
    stage = Approved(persons)
    passed = await stage.before(CALL)
    assert isinstance(passed, Call)
    outcome = Outcome(error=ToolError("no"), refused=Refusal(mcp.BUSY, "no"))
    assert await stage.after(passed, outcome) is outcome
    assert persons.returned == persons.used
    for ended in (Outcome(result={}), Outcome(error=ToolError("broken"))):
        assert await Approved(kept := Persons()).after(passed, ended) is ended
        assert kept.returned == []


async def test_what_another_call_used_is_asked_for_anew() -> None:
    persons = Persons("approved", "pending", uses=("it was used before",))
    assert (await refused(persons)).data["approval"] == "a2"


async def test_what_was_denied_or_cannot_be_asked_is_said() -> None:
    denied = await refused(Persons("denied"))
    assert (denied.code, denied.data["state"]) == (mcp.DENIED, "denied")
    assert "ann denied it: no" in denied.message
    assert "was not approved in time" in (await refused(Persons("expired"))).message
    ended = await refused(Persons(Fenced("its task has ended")))
    assert ended.code == mcp.DENIED
    away = await refused(Persons(Unavailable("nobody leads")))
    assert (away.code, "approval" in away.data, away.data["retryAfter"] > 0) == (mcp.PENDING, False, True)


async def test_persons_are_told_what_they_do_not_see() -> None:
    persons = Persons("pending")
    large = replace(CALL, params={"name": "update", "arguments": {"text": "x" * 50_000}})
    await refused(persons, large)
    details = persons.asked[0][1]["details"]
    assert len(json.dumps(details)) < 16_384
    assert "characters are not shown" in details["cut"]


# With a coordinator ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def coordinator(mesh: BrokerMesh) -> AsyncIterator[Process]:
    config = mesh.home.parent / "mesh.yaml"
    config.write_text(APPROVERS)
    async with coordinator_process(mesh) as process:
        yield process
    config.unlink()


@pytest.fixture
async def rules(stage: Any, operator: Broker, coordinator: Process) -> AsyncIterator[Callable[[str], Awaitable[int]]]:
    async def use(text: str) -> int:
        version = await permit(operator, text)
        await eventually(lambda: stage.service.plane.policy.version == version)
        return version

    await use(OPS)
    yield use
    await use(EVERYTHING)


async def waiting(operator: Broker, agent: str) -> ApprovalInfo | None:
    found = (await api.approvals(operator, agent=agent)).approvals
    return found[0] if found else None


async def approve(operator: Broker, agent: str, *, allow: bool = True) -> ApprovalInfo:
    """Decide about what an agent waits for, once it does."""
    pending = await eventually(partial(waiting, operator, agent))
    assert pending is not None
    return await api.decide(operator, pending.id, who="ann", allow=allow, reason="because")


def notes(stage: Any, server: str) -> int:
    file = stage.state(server) / "notes"
    return len(file.read_text().splitlines()) if file.exists() else 0


def writer(name: str, server: str, *, times: int = 1, **more: Any) -> Agent:
    """Calls a tool so many times with the same arguments."""
    agent = Agent(name, suspend_after=0.5, **more)

    @agent.skill("write")
    async def write(task: Task) -> str:
        results = [await task.tools.call(f"{server}.run", id="acme") for _ in range(times)]
        return " ".join(str((one.refusal or {}).get("kind", "ok")) for one in results)

    return agent


async def test_an_agents_call_waits_for_persons_and_is_made_once(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str], rules: Any, operator: Broker
) -> None:
    server, name = await stage.runner(), unique("writer")
    async with running(mesh, writer(name, server, times=2)) as (replica,), client(mesh) as caller:
        async with await caller.submit(name, "go") as handle:
            first = await eventually(partial(waiting, operator, name))
            assert first is not None
            assert (first.kind, first.server, first.tool, first.details["arguments"]) == (
                "tool",
                server,
                "run",
                {"id": "acme"},
            )
            await eventually(lambda: not replica.owned)
            assert notes(stage, server) == 0
            await approve(operator, name)
            await eventually(lambda: notes(stage, server) == 1)
            second = await eventually(partial(waiting, operator, name))
            assert second is not None
            assert second.id != first.id  # the same call once more asks anew
            await approve(operator, name, allow=False)
            assert (await handle.result()).text == "ok denied"
    assert notes(stage, server) == 1
    assert (await api.approval(operator, first.id)).state == "used"
    stored = await eventually(lambda: operator.last(AUDIT, f"mesh.audit.intent.{name}.{server}"))
    assert stored is not None
    why = json.loads(stored.data)["why"]
    assert [one["id"] for one in why["approvals"]] == [first.id]
    assert [one["who"] for one in why["approvals"][0]["by"]] == ["ann"]
    assert why["rules"] == ["by-ops"]


async def test_code_that_was_approved_asks_once_whatever_it_waits_for_inside(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str], rules: Any, operator: Broker
) -> None:
    pytest.importorskip("pydantic_monty", reason="needs the extra `code`")
    server, code, name = await stage.runner(), await stage.code(), unique("coder")
    agent = Agent(name, suspend_after=0.5)
    source = f"[call('{server}.run', id=str(n)) for n in range(2)]"

    @agent.skill("code")
    async def run(task: Task) -> str:
        result = await task.tools.call(f"{code}.run", code=source)
        return str((result.refusal or {}).get("kind", "ok"))

    async with running(mesh, agent), client(mesh) as caller, await caller.submit(name, "go") as handle:
        asked = [await approve(operator, name) for _ in range(3)]
        assert (await handle.result()).text == "ok"
    assert [one.tool for one in asked] == ["run"] * 3
    assert [one.server for one in asked] == [code, server, server]
    assert len((await api.approvals(operator, agent=name, states=())).approvals) == 3
    assert {(await api.approval(operator, one.id)).state for one in asked} == {"used"}
    assert notes(stage, server) == 2


async def test_a_framework_is_told_the_id_and_its_same_call_goes_through_once(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str], rules: Any, operator: Broker
) -> None:
    server, name = await stage.runner(), unique("framework")
    agent = Agent(name)
    said: list[dict[str, Any]] = []

    @agent.skill("work")
    async def work(task: Task) -> str:
        address = await task.tools.address()

        async def call(id_: str) -> dict[str, Any]:
            return await post(address.url, address.headers, name=f"{server}__run", arguments={"id": id_})

        said.extend([await call("acme"), await call("acme"), await call("other")])
        await api.decide(operator, ident(said[0]), who="ann", allow=True)
        said.extend([await call("other"), await call("acme"), await call("acme")])
        return "done"

    async with running(mesh, agent), client(mesh) as caller:
        assert (await caller.send(name, "go")).text == "done"
    first, again, other, still, made, anew = said
    assert ident(first) == ident(again) != ident(other)
    assert ident(first) in first["content"][0]["text"]
    assert ident(still) == ident(other)
    assert not made.get("isError")
    assert ident(anew) not in (ident(first), ident(other))
    assert notes(stage, server) == 1


def ident(result: Mapping[str, Any]) -> str:
    refusal = result["_meta"][mcp.META_REFUSAL]
    assert refusal["code"] == mcp.PENDING
    return str(refusal["approval"])


async def post(url: str, headers: Any, **params: Any) -> dict[str, Any]:
    meta = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {}}
    sent = {
        **headers,
        "accept": "application/json, text/event-stream",
        "mcp-protocol-version": mcp.VERSION,
        "mcp-method": "tools/call",
        "mcp-name": str(params["name"]),
    }
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"_meta": meta, **params}}
    async with httpx2.AsyncClient(trust_env=False) as web:
        return dict((await web.post(url, json=body, headers=sent, timeout=30)).json()["result"])


@pytest.mark.parametrize("what", ["policy", "definition"])
async def test_what_changed_after_it_was_approved_is_asked_anew(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str], rules: Any, operator: Broker, what: str
) -> None:
    server, name = await stage.bad(), unique("writer")
    go, agent = asyncio.Event(), Agent(name)

    @agent.skill("write")
    async def write(task: Task) -> str:
        address = await task.tools.address()

        async def call() -> dict[str, Any]:
            return await post(address.url, address.headers, name=f"{server}__do", arguments={"what": "nothing"})

        first = ident(await call())
        await go.wait()
        return f"{first} {ident(await call())}"

    async with running(mesh, agent), client(mesh) as caller, await caller.submit(name, "go") as handle:
        await approve(operator, name)
        if what == "policy":
            await rules(f"{OPS} // another version")
        else:
            schema = {"type": "object", "properties": {"what": {"type": "string"}}}
            changed = {"tools": [{"name": "do", "description": "Does more", "inputSchema": schema}]}
            (stage.state(server) / "offer.json").write_text(json.dumps(changed))
            shown = await stage.operate("weft/inspect", server=server)
            await stage.operate("weft/approve", server=server, digest=shown["digest"])
        go.set()
        before, after = (await handle.result()).text.split()
    assert before != after
    assert (await api.approval(operator, before)).state == "withdrawn"
    assert "asked anew with another" in (await api.approval(operator, before)).why


async def test_without_a_coordinator_a_call_waits_until_there_is_one(
    fresh_mesh: BrokerMesh, unique: Callable[[str], str], tmp_path: Path
) -> None:
    from weft.core.toolsconf import SidecarConfig, ToolServer
    from weft.core.toolstore import ToolStore
    from weft.sidecar.service import SidecarService

    name = unique("writer")
    (fresh_mesh.home.parent / "mesh.yaml").write_text(APPROVERS)
    operator, own = await fresh_mesh.connect("operator"), await fresh_mesh.connect("sidecar")
    await permit(operator, OPS)
    await ToolStore(operator).register(ToolServer("run", command=runner(tmp_path), cwd=str(tmp_path)))
    service = await SidecarService(own, SidecarConfig()).start()
    try:
        async with running(fresh_mesh, writer(name, "run")), client(fresh_mesh) as caller:
            async with await caller.submit(name, "go") as handle:
                kept = await eventually(lambda: operator.last(AUDIT, f"mesh.audit.denial.{name}.run"), timeout=30.0)
                assert kept is not None
                assert json.loads(kept.data)["outcome"]["kind"] == "pending"
                async with coordinator_process(fresh_mesh):
                    await approve(operator, name)
                    assert (await handle.result()).text == "ok"
    finally:
        await service.aclose()
        for broker in (operator, own):
            await broker.close()
    assert len((tmp_path / "notes").read_text().splitlines()) == 1


def runner(state: Path) -> tuple[str, ...]:
    import sys

    return (sys.executable, "-S", str(Path(__file__).with_name("runner.py")), str(state))
