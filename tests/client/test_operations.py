"""SendMessage by A2A's rules: waiting or not, tasks or messages, repeated, with and without history, per caller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from a2a.types import a2a_pb2 as pb

from weft.client.operations import Call, Operations
from weft.testing.agents import eventually
from weft_protocols import ids
from weft_protocols.errors import AgentNotFound, DeadlineExceeded, InvalidParams, TaskNotFound

if TYPE_CHECKING:
    from tests.client.conftest import Clerk, Office

    Saying = Callable[..., pb.SendMessageRequest]

pytestmark = pytest.mark.anyio

AT_ONCE = pb.SendMessageConfiguration(return_immediately=True)
MESSAGE_ONLY = {"metadata": {"weft.skill": "say"}}


def texts(task: pb.Task) -> list[str]:
    """What was said, in order."""
    return [message.parts[0].text for message in task.history]


async def read(operations: Operations, task: pb.Task) -> pb.Task:
    return await operations.get_task("clerk", pb.GetTaskRequest(id=task.id))


async def test_a_blocking_send_returns_the_task_as_get_task_does(alice: Operations, saying: Saying) -> None:
    request = saying("hello", context_id="talk")
    before = request.SerializeToString(deterministic=True)
    response = await alice.send_message("clerk", request)
    task = response.task
    assert task.status.state == pb.TASK_STATE_COMPLETED
    assert [part.text for artifact in task.artifacts for part in artifact.parts] == ["HELLO"]
    assert (task.context_id, texts(task)) == ("talk", ["hello"])
    assert task.id == ids.task_id("alice", "clerk", request.message.message_id)
    assert await read(alice, task) == task
    assert request.SerializeToString(deterministic=True) == before


async def test_what_the_agent_said_on_the_way_is_in_the_history(alice: Operations, saying: Saying) -> None:
    task = (await alice.send_message("clerk", saying("tell 2"))).task
    assert texts(task) == ["tell 2", "word 0", "word 1"]
    assert [message.role for message in task.history] == [pb.ROLE_USER, pb.ROLE_AGENT, pb.ROLE_AGENT]
    assert {(message.task_id, message.context_id) for message in task.history} == {(task.id, task.context_id)}
    assert await read(alice, task) == task


async def test_a_blocking_send_returns_where_the_task_waits_for_its_caller(alice: Operations, saying: Saying) -> None:
    task = (await alice.send_message("clerk", saying("ask colour?"))).task
    assert task.status.state == pb.TASK_STATE_INPUT_REQUIRED
    assert task.status.message.parts[0].text == "colour?"
    assert await read(alice, task) == task


async def test_an_agent_that_answers_with_a_message_is_returned_as_a_message(alice: Operations, saying: Saying) -> None:
    response = await alice.send_message("clerk", saying("hello", **MESSAGE_ONLY))
    assert response.WhichOneof("payload") == "message"
    assert (response.message.parts[0].text, response.message.role) == ("said hello", pb.ROLE_AGENT)
    assert response.message.context_id


async def test_sending_without_waiting_returns_the_submitted_task_at_once(
    alice: Operations, saying: Saying, office: Office
) -> None:
    request = saying("door closed", configuration=AT_ONCE)
    task = (await alice.send_message("clerk", request)).task
    assert task.status.state == pb.TASK_STATE_SUBMITTED
    assert task.status.HasField("timestamp")
    assert texts(task) == ["door closed"]
    assert alice.mesh.following == 0
    await eventually(lambda: "door closed" in office.clerk.runs)
    assert (await read(alice, task)).status.state == pb.TASK_STATE_WORKING
    office.clerk.doors["closed"].set()
    again = pb.SendMessageRequest(message=request.message)
    assert (await alice.send_message("clerk", again)).task.status.state == pb.TASK_STATE_COMPLETED


@pytest.mark.parametrize("again", ["same process", "another process"])
@pytest.mark.parametrize("way", ["task", "message"])
async def test_the_same_message_is_the_same_answer_and_runs_once(
    office: Office, saying: Saying, again: str, way: str
) -> None:
    first = await office.operations("carol")
    text = f"{way} {again}"
    request = saying(text, **(MESSAGE_ONLY if way == "message" else {}))
    one = await first.send_message("clerk", request)
    second = await office.another_process("carol") if again == "another process" else first
    two = await second.send_message("clerk", request)
    assert one == two
    assert one.WhichOneof("payload") == way
    three = await second.send_message("clerk", pb.SendMessageRequest(message=request.message, configuration=AT_ONCE))
    assert three.task.status.state == pb.TASK_STATE_COMPLETED
    assert office.clerk.runs.count(text) == 1


async def test_the_same_message_while_its_task_runs_waits_for_that_task(
    office: Office, alice: Operations, saying: Saying
) -> None:
    request = saying("door twice")
    one = asyncio.create_task(alice.send_message("clerk", request))
    await eventually(lambda: "door twice" in office.clerk.runs)
    elsewhere = await office.another_process()
    two = asyncio.create_task(elsewhere.send_message("clerk", request))
    three = asyncio.create_task(alice.send_message("clerk", request))
    await eventually(lambda: elsewhere.mesh.following == 1)
    office.clerk.doors["twice"].set()
    assert (await one) == (await two) == (await three)
    assert office.clerk.runs.count("door twice") == 1


@pytest.mark.parametrize(("length", "left"), [(0, []), (1, ["word 1"]), (2, ["word 0", "word 1"]), (9, None)])
async def test_history_length_counts_from_the_end(
    alice: Operations, saying: Saying, length: int, left: list[str] | None
) -> None:
    configuration = pb.SendMessageConfiguration(history_length=length)
    task = (await alice.send_message("clerk", saying("tell 2", configuration=configuration))).task
    wanted = left if left is not None else ["tell 2", "word 0", "word 1"]
    assert texts(task) == wanted
    got = await alice.get_task("clerk", pb.GetTaskRequest(id=task.id, history_length=length))
    assert got == task


async def test_history_length_counts_for_the_task_returned_at_once(alice: Operations, saying: Saying) -> None:
    none = pb.SendMessageConfiguration(return_immediately=True, history_length=0)
    assert not (await alice.send_message("clerk", saying("hello", configuration=none))).task.history


async def test_waiting_ends_and_the_task_goes_on(office: Office, alice: Operations, saying: Saying) -> None:
    request = saying("door slow")
    with pytest.raises(DeadlineExceeded, match=r"has not ended within 0\.2 s"):
        await alice.send_message("clerk", request, Call(wait=0.2))
    assert alice.mesh.following == 0
    office.clerk.doors["slow"].set()
    assert (await alice.send_message("clerk", request)).task.status.state == pb.TASK_STATE_COMPLETED


async def test_a_deadline_fails_the_task(alice: Operations, saying: Saying) -> None:
    task = (await alice.send_message("clerk", saying("door locked"), Call(deadline=0.3))).task
    assert task.status.state == pb.TASK_STATE_FAILED


async def test_headers_and_extensions_reach_the_agent(office: Office, alice: Operations, saying: Saying) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    call = Call(extensions=frozenset({"https://x/b", "https://x/a"}), headers={"traceparent": trace})
    await alice.send_message("clerk", saying("with headers"), call)
    seen = next(task for task in office.clerk.requests if task.text == "with headers")
    headers = seen._run.work.headers
    assert (headers["traceparent"], headers["a2a-extensions"]) == (trace, "https://x/a,https://x/b")


async def test_large_parts_arrive_and_are_given_back(alice: Operations, saying: Saying) -> None:
    large = "x" * 400_000
    task = (await alice.send_message("clerk", saying(large))).task
    assert task.artifacts[0].parts[0].text == large.upper()
    assert texts(task) == [large]
    assert await read(alice, task) == task


async def test_many_parts_arrive_that_are_only_together_too_large(alice: Operations, saying: Saying) -> None:
    parts = [pb.Part(text=str(n) * 100_000) for n in range(1, 10)] * 2
    request = saying("many")
    request.message.parts.extend(parts)
    task = (await alice.send_message("clerk", request)).task
    assert task.status.state == pb.TASK_STATE_COMPLETED
    assert list(task.history[0].parts)[1:] == parts
    assert list((await read(alice, task)).history[0].parts)[1:] == parts


async def test_a_webhook_is_not_told_to_the_agent(office: Office, alice: Operations, saying: Saying) -> None:
    request = saying("no hook")
    request.tenant = "acme"
    request.configuration.accepted_output_modes.append("text/plain")
    await alice.send_message("clerk", request)
    stored = next(task for task in office.clerk.requests if task.text == "no hook")._run.work.request
    assert list(stored.configuration.accepted_output_modes) == ["text/plain"]
    assert not stored.configuration.HasField("task_push_notification_config")
    assert not stored.tenant


async def test_callers_do_not_see_each_others_tasks(alice: Operations, bob: Operations, saying: Saying) -> None:
    request = saying("ask secret?", message_id="m-shared", context_id="shared")
    mine = (await alice.send_message("clerk", request)).task
    theirs = (await bob.send_message("clerk", request)).task
    assert mine.id != theirs.id
    with pytest.raises(TaskNotFound):
        await bob.get_task("clerk", pb.GetTaskRequest(id=mine.id))
    with pytest.raises(TaskNotFound):
        await bob.cancel_task("clerk", pb.CancelTaskRequest(id=mine.id))
    with pytest.raises(TaskNotFound):
        await bob.send_message("clerk", saying("red", task_id=mine.id))
    with pytest.raises(TaskNotFound):
        async for _ in bob.subscribe_to_task("clerk", pb.SubscribeToTaskRequest(id=mine.id)):
            pass
    with pytest.raises(TaskNotFound):
        async for _ in bob.subscribe_to_task("clerk", pb.SubscribeToTaskRequest(id=mine.id), after=1):
            pass
    listed = await bob.list_tasks("clerk", pb.ListTasksRequest(context_id="shared"))
    assert [task.id for task in listed.tasks] == [theirs.id]
    assert bob.mesh.following == 0
    assert (await read(alice, mine)).status.state == pb.TASK_STATE_INPUT_REQUIRED


@pytest.mark.parametrize("agent", ["nobody", "no.body", "*", "", "MESH"])
async def test_an_agent_that_does_not_exist_is_not_found(alice: Operations, saying: Saying, agent: str) -> None:
    with pytest.raises(AgentNotFound) as caught:
        await alice.send_message(agent, saying("hello"))
    assert caught.value.exit_code == 5
    with pytest.raises(AgentNotFound):
        await alice.list_tasks(agent, pb.ListTasksRequest())


async def test_what_the_agent_refuses_is_an_error_and_what_it_rejects_a_task(alice: Operations, saying: Saying) -> None:
    request = saying("hello", metadata={"weft.skill": "none"})
    for _ in range(2):
        with pytest.raises(InvalidParams, match="no skill 'none'"):
            await alice.send_message("clerk", request)
    with pytest.raises(InvalidParams, match="no skill 'none'"):
        await anext(alice.send_streaming_message("clerk", request))
    with pytest.raises(InvalidParams, match="no skill 'none'"):
        await anext(alice.send_streaming_message("clerk", saying("hello", metadata={"weft.skill": "none"})))
    request = saying("reject not today")
    task = (await alice.send_message("clerk", request)).task
    assert task.status.state == pb.TASK_STATE_REJECTED
    assert task.status.message.parts[0].text == "not today"
    assert (await alice.send_message("clerk", request)).task == task


async def test_a_closed_mesh_fails_what_waits(office: Office, saying: Saying, clerk: Clerk) -> None:
    from weft_protocols.errors import Unavailable

    leaving = await office.another_process("dora")
    waiting = asyncio.create_task(leaving.send_message("clerk", saying("door forever")))
    await eventually(lambda: "door forever" in clerk.runs)
    await leaving.mesh.aclose()
    with pytest.raises(Unavailable):
        await waiting


@pytest.fixture
def clerk(office: Office) -> Clerk:
    return office.clerk
