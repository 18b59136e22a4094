"""`task.approve`: persons decide while the task holds nothing, whatever is restarted meanwhile."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import weft
from weft.client import approvals as api
from weft.core.broker import Broker
from weft.host import approving, parking
from weft.host.tools import Tools
from weft.testing.agents import ReplicaProcesses, client, coordinator_process, eventually, running
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft.testing.scratch import Scratch
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, seen, settled
from weft_protocols import mcp
from weft_protocols.errors import UsageError
from weft_protocols.records import SUSPENDED

Unique = Callable[[str], str]
SOON = 0.05
"""Seconds after which a waiting task leaves memory."""

pytestmark = pytest.mark.usefixtures("coordinator")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks leave memory for short waits as well."""
    monkeypatch.setattr(parking, "WORTH", 0.1)


async def asked(operator: Broker, agent: str, title: str = "") -> api.ApprovalInfo:
    """The approval of an agent that waits for somebody, once it does."""

    async def find() -> api.ApprovalInfo | None:
        found = await api.approvals(operator, agent=agent)
        return next((one for one in found.approvals if title in ("", one.title)), None)

    found = await eventually(find)
    assert found is not None
    return found


async def all_of(operator: Broker, agent: str) -> list[api.ApprovalInfo]:
    return list((await api.approvals(operator, states=(), agent=agent)).approvals)


async def test_a_task_waits_for_a_person_and_its_caller_sees_that_it_does(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, operator: Broker
) -> None:
    """Fails if the caller is asked, or the wait holds a slot."""
    agent = weft.Agent(unique("sender"), concurrency=1)

    @agent.skill()
    async def send(task: weft.Task) -> str:
        if task.text == "quick":
            return "quick"
        if not (said := await task.approve("Send the mail?", risk="high", details={"to": "acme"})):
            return f"not sent: {said.reason}"
        return f"sent, as {said.by[0]} approved: {said.reason}"

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        event = await heard(handle, "waits for an approval by 1 of the approvers: Send the mail?")
        pending = await asked(operator, agent.name)
        assert event.state is weft.State.WORKING
        assert event.metadata is not None
        assert event.metadata["weft.approval"]["id"] == pending.id
        assert (pending.risk, pending.details, pending.requester) == ("high", {"to": "acme"}, "local")
        assert (await caller.send(agent.name, "quick")).text == "quick"
        await api.decide(operator, pending.id, who="ann", allow=True, reason="go ahead")
        assert (await handle.result()).text == "sent, as ann approved: go ahead"
        await heard(handle, "approved by ann: go ahead")


@pytest.mark.parametrize("how", ["denied", "expired"])
async def test_what_is_refused_or_not_decided_in_time_counts_as_no(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, operator: Broker, how: str
) -> None:
    agent = weft.Agent(unique("sender"))

    @agent.skill()
    async def send(task: weft.Task) -> list[object]:
        said = await task.approve("Send?", expires=60 if how == "denied" else 0.4)
        return [bool(said), said.state, said.denied, said.expired, said.by, said.reason]

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        if how == "denied":
            pending = await asked(operator, agent.name)
            await api.decide(operator, pending.id, who="ben", allow=False, reason="not today")
            expected = [False, "denied", True, False, ["ben"], "not today"]
        else:
            expected = [False, "expired", False, True, [], "nobody decided in time"]
        assert (await handle.result()).data == expected


@pytest.mark.parametrize("when", ["in memory elsewhere", "nobody runs it"])
async def test_a_task_leaves_memory_and_goes_on_with_the_decision(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, operator: Broker, when: str
) -> None:
    agent = weft.Agent(unique("sender"), suspend_after=SOON)

    @agent.skill()
    async def send(task: weft.Task) -> str:
        return (await task.approve("Send?")).state

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        pending = await asked(operator, agent.name)
        await eventually(lambda: not replica.owned)
        if when == "nobody runs it":
            await replica.stop()
        await api.decide(operator, pending.id, who="ann", allow=True)
        if when == "nobody runs it":
            async with running(mesh, agent):
                assert (await handle.result()).text == "approved"
        else:
            assert (await handle.result()).text == "approved"
            await settled(mesh, agent.name)
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        assert len(await all_of(operator, agent.name)) == 1
        said = [event.text for event in seen(handle) if event.text.startswith("waits for")]
    stored.check()
    assert SUSPENDED in [claim.state for _, claim in stored.claims]
    assert set(stored.attempts) == {1}
    assert len(said) == 1


async def test_an_approval_that_expires_wakes_a_task_that_left_memory(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("sender"), suspend_after=SOON)

    @agent.skill()
    async def send(task: weft.Task) -> str:
        return (await task.approve("Send?", expires=1.0)).state

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, lambda event: event.text.startswith("waits for"))
        await eventually(lambda: not replica.owned)
        assert (await handle.result(10)).text == "expired"


async def test_a_killed_replica_loses_no_question_and_no_decision(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, operator: Broker, scratch: Scratch
) -> None:
    """Fails if a decision made while nobody ran is lost, or a recorded one is asked for again."""
    target = Path(__file__).with_name("approver.py")
    async with ReplicaProcesses(mesh, target, identity=unique("sender"), env=scratch.env) as processes:
        first = await processes.start()
        async with await caller.submit(processes.agent, "acme") as handle:
            pending = await asked(operator, processes.agent)
            first.kill()
            await first.exited()
            await api.decide(operator, pending.id, who="ann", allow=True)
            second = await processes.start()
            copy = await asked(operator, processes.agent, "Send the copy?")
            second.kill()
            await second.exited()
            await processes.start()
            await api.decide(operator, copy.id, who="ben", allow=True)
            assert (await handle.result(30)).text == "approved by ann, approved by ben"
        assert [one.state for one in await all_of(operator, processes.agent)] == ["approved", "approved"]


async def test_a_restarted_coordinator_knows_what_was_asked_and_a_recorded_decision_needs_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a decision needs the coordinator that was asked, or one that was recorded needs any."""
    monkeypatch.setattr(approving, "AGAIN", 0.5)
    agent = weft.Agent("sender")
    runs: list[int] = []

    @agent.skill()
    async def send(task: weft.Task) -> str:
        runs.append(1)
        said = await task.approve("Send?")
        if len(runs) == 1:
            await asyncio.Event().wait()
        return f"{said.state} by {said.by[0]}"

    env = {"WEFT_COORDINATOR_LEASE": "1"}
    async with (
        await start_test_mesh(["sender"]) as mesh,
        client(mesh) as caller,
        running(mesh, agent, grace=0.1) as (first,),
    ):
        operator = await mesh.connect("operator")
        async with await caller.submit("sender", "go") as handle:
            async with coordinator_process(mesh, env=env) as coordinator:
                pending = await asked(operator, "sender")
                coordinator.kill()
                await coordinator.exited()
            async with coordinator_process(mesh, env=env):
                assert await asked(operator, "sender") == pending
                await api.decide(operator, pending.id, who="ann", allow=True)
                await heard(handle, "approved by ann", timeout=40)
            async with running(mesh, agent):
                await first.stop()
                assert (await handle.result(40)).text == "approved by ann"
        await operator.close()


async def test_another_attempt_has_the_decision_and_asks_nobody_again(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, operator: Broker
) -> None:
    agent = weft.Agent(unique("sender"), retry=weft.RetryPolicy(attempts=3, initial=0.05))

    @agent.skill()
    async def send(task: weft.Task) -> str:
        said = await task.approve("Send?")
        if task.attempt < 3:
            raise RuntimeError("the mail server is down")
        return f"{said.state} {task.attempt}"

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        pending = await asked(operator, agent.name)
        await api.decide(operator, pending.id, who="ann", allow=True)
        assert (await handle.result()).text == "approved 3"
        assert [one.id for one in await all_of(operator, agent.name)] == [pending.id]


@pytest.mark.parametrize("when", ["before the decision", "after it"])
async def test_another_question_on_another_attempt_is_an_error_with_a_name(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, operator: Broker, when: str
) -> None:
    """Fails if a decision about one thing lets another one happen."""
    agent = weft.Agent(unique("sender"), retry=weft.RetryPolicy(attempts=3, initial=0.05))
    runs: list[int] = []

    @agent.skill()
    async def send(task: weft.Task) -> str:
        runs.append(1)
        await task.approve("Send?", details={"run": len(runs)})
        raise RuntimeError("again")

    async with running(mesh, agent) as (first,), await caller.submit(agent.name, "go") as handle:
        pending = await asked(operator, agent.name)
        if when == "after it":
            await api.decide(operator, pending.id, who="ann", allow=True)
            view = await handle.result()
        else:
            async with running(mesh, agent):
                await first.stop()
                view = await handle.result(20)
    assert view.state is weft.State.FAILED
    assert view.message is not None
    assert "was asked for with another question" in view.message.text


async def test_a_cancelled_task_withdraws_what_it_asked(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, operator: Broker
) -> None:
    agent = weft.Agent(unique("sender"), suspend_after=SOON)

    @agent.skill()
    async def send(task: weft.Task) -> str:
        return (await task.approve("Send?")).state

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        pending = await asked(operator, agent.name)
        await eventually(lambda: not replica.owned)
        await handle.cancel()
        assert (await handle.result()).state is weft.State.CANCELED

        async def withdrawn() -> bool:
            return (await api.approval(operator, pending.id)).state == "withdrawn"

        await eventually(withdrawn)


async def test_a_branch_that_is_given_up_withdraws_and_the_task_goes_on(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, operator: Broker
) -> None:
    agent = weft.Agent(unique("sender"))
    enough = asyncio.Event()

    @agent.skill()
    async def send(task: weft.Task) -> str:
        first = await task.first(task.approve("Send?"), task.step("enough", enough.wait))
        second = await task.approve("Really?")
        return f"{first} {second.state}"

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        given_up = await asked(operator, agent.name)
        enough.set()
        second = await asked(operator, agent.name, "Really?")
        assert (await api.approval(operator, given_up.id)).why == "the task goes on without it"
        await api.decide(operator, second.id, who="ann", allow=True)
        assert (await handle.result()).text == "True approved"


@pytest.mark.parametrize("allow", [True, False], ids=["approved", "denied"])
async def test_a_tool_call_waits_for_its_approval_and_is_made_once(
    mesh: BrokerMesh,
    caller: weft.Mesh,
    unique: Unique,
    operator: Broker,
    monkeypatch: pytest.MonkeyPatch,
    allow: bool,
) -> None:
    """Fails if a task that left memory for a tool's approval is not woken, or its call is made twice."""
    agent = weft.Agent(unique("writer"), suspend_after=SOON)
    made: list[str] = []

    async def sidecar(tools: Tools, server: str, method: str, params: dict[str, Any], **_: object) -> dict[str, Any]:
        """What a sidecar does with a call that needs an approval, in this order."""
        wanted = api.ToolCall(agent.name, server, params["name"], "a" * 64, "d1", "p1", tools._run.task_id)
        found = await api.ask(operator, wanted, title="crm update", needs=[("", 1)], details=params["arguments"])
        if found.state == "pending":
            return refusal(mcp.PENDING, approval=found.id)
        if found.state != "approved" or await api.use(operator, found.id, wanted, by=f"call-{len(made)}"):
            return refusal(mcp.DENIED, approval=found.id)
        made.append(found.id)
        return {"content": [{"type": "text", "text": "updated"}]}

    monkeypatch.setattr(Tools, "_ask", sidecar)

    @agent.skill()
    async def write(task: weft.Task) -> str:
        result = await task.tools.call("crm.update", id="acme")
        return result.text if not result.is_error else f"refused: {result.refusal and result.refusal['code']}"

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        pending = await asked(operator, agent.name)
        assert (pending.kind, pending.tool, pending.requester, pending.details) == (
            "tool",
            "update",
            "local",
            {"id": "acme"},
        )
        await heard(handle, "waits for an approval by 1 of the approvers: crm update")
        await eventually(lambda: not replica.owned)
        await api.decide(operator, pending.id, who="ann", allow=allow, reason="because")
        assert (await handle.result()).text == ("updated" if allow else f"refused: {mcp.DENIED}")
        assert (await api.approval(operator, pending.id)).state == ("used" if allow else "denied")
    assert made == ([pending.id] if allow else [])


def refusal(code: int, **data: object) -> dict[str, Any]:
    """A call that is not made, as its caller gets it."""
    return {"content": [], "isError": True, "_meta": {mcp.META_REFUSAL: {"code": code, **data}}}


@pytest.mark.parametrize("wrong", [{"title": " "}, {"title": "x" * 501}, {"details": {"x": object()}}])
async def test_a_question_that_cannot_be_asked_fails_at_once(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, wrong: dict[str, object]
) -> None:
    agent = weft.Agent(unique("sender"))

    @agent.skill()
    async def send(task: weft.Task) -> str:
        with pytest.raises(UsageError, match=r"title|details"):
            await task.approve(**{"title": "Send?", **wrong})  # type: ignore[arg-type]
        return "refused"

    async with running(mesh, agent):
        assert (await caller.send(agent.name, "go")).text == "refused"
