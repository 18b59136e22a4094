"""GetTask and ListTasks over every transport."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from a2a.client.client import Client
from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import InvalidParamsError, TaskNotFoundError

if TYPE_CHECKING:
    from tests.contract.conftest import Everywhere, Stage

pytestmark = pytest.mark.anyio


async def pages(client: Client, **asked: object) -> list[pb.ListTasksResponse]:
    """Every page of a list."""
    found: list[pb.ListTasksResponse] = []
    token = ""
    while True:
        page = await client.list_tasks(pb.ListTasksRequest(page_token=token, **asked))  # type: ignore[arg-type]
        found.append(page)
        assert len(found) < 20
        if not (token := page.next_page_token):
            return found


async def test_a_task_that_is_not_there_is_not_found(client: Client) -> None:
    for task_id in (uuid.uuid4().hex, "no-such-task", "ü", "a.b", "x" * 300):
        with pytest.raises(TaskNotFoundError):
            await client.get_task(pb.GetTaskRequest(id=task_id))


async def test_a_task_without_an_id_is_not_asked_for(client: Client, transport: str) -> None:
    if transport == "rest":
        return  # its address would be that of the list
    with pytest.raises(InvalidParamsError):
        await client.get_task(pb.GetTaskRequest(id=""))


async def test_the_task_of_another_caller_is_not_found(stage: Stage, blocking: Client, stranger: Client) -> None:
    task = await stage.task(blocking, "ask")
    calls: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: stranger.get_task(pb.GetTaskRequest(id=task.id)),
        lambda: stranger.cancel_task(pb.CancelTaskRequest(id=task.id)),
        lambda: stage.task(stranger, "red", task_id=task.id),
    )
    for call in calls:
        with pytest.raises(TaskNotFoundError) as caught:
            await call()
        assert "local" not in str(caught.value)
    assert task.id not in [one.id for page in await pages(stranger) for one in page.tasks]
    assert (await blocking.get_task(pb.GetTaskRequest(id=task.id))).status.state == pb.TASK_STATE_INPUT_REQUIRED


async def test_the_same_message_of_another_caller_is_another_task(
    stage: Stage, blocking: Client, stranger: Client
) -> None:
    message_id = uuid.uuid4().hex
    own = await stage.task(blocking, "echo mine", message_id=message_id)
    other = await stage.task(stranger, "echo yours", message_id=message_id)
    assert own.id != other.id
    assert other.artifacts[0].parts[0].text == "yours"


async def test_the_task_of_another_agent_is_not_found(stage: Stage, blocking: Client, transport: str) -> None:
    context = f"agents-{uuid.uuid4()}"
    async with stage.dial(transport, "limited") as limited:
        other = await stage.task(limited, "hello", context_id=context)
    own = await stage.task(blocking, "echo hello", context_id=context)
    with pytest.raises(TaskNotFoundError):
        await blocking.get_task(pb.GetTaskRequest(id=other.id))
    page = await blocking.list_tasks(pb.ListTasksRequest(context_id=context))
    assert [task.id for task in page.tasks] == [own.id]


@pytest.mark.parametrize("transport", ["jsonrpc", "rest", "grpc"])
async def test_the_task_of_another_tenant_is_not_found(stage: Stage, blocking: Client, transport: str) -> None:
    """Over NATS a mesh is one tenant (test_native.py)."""

    def of(tenant: str) -> Callable[[pb.AgentCard], None]:
        def change(card: pb.AgentCard) -> None:
            for interface in card.supported_interfaces:
                interface.tenant = f"{interface.tenant}/{tenant}".strip("/")

        return change

    async with (
        stage.dial(transport, card=of("acme"), streaming=False) as acme,
        stage.dial(transport, card=of("umbrella"), streaming=False) as umbrella,
    ):
        task = await stage.task(acme, "ask")
        done = await stage.task(acme, "red", task_id=task.id)
        assert done.status.message.parts[0].text == "how many?"
        assert [one.id for page in await pages(acme) for one in page.tasks].count(task.id) == 1
        for other in (umbrella, blocking):
            with pytest.raises(TaskNotFoundError):
                await other.get_task(pb.GetTaskRequest(id=task.id))
            with pytest.raises(TaskNotFoundError):
                await stage.task(other, "two", task_id=task.id)
            assert task.id not in [one.id for one in (await other.list_tasks(pb.ListTasksRequest())).tasks]


@pytest.mark.parametrize("length", [None, 0, 1, 3, 100])
async def test_no_more_history_than_asked_for(stage: Stage, blocking: Client, length: int | None) -> None:
    configured: dict[str, Any] = {} if length is None else {"history_length": length}
    first = await stage.task(blocking, "ask", **configured)
    sent = await stage.task(blocking, "red", task_id=first.id, **configured)
    request = pb.GetTaskRequest(id=first.id)
    if length is not None:
        request.history_length = length
    read = await blocking.get_task(request)
    whole = await blocking.get_task(pb.GetTaskRequest(id=first.id))
    expected = list(whole.history) if length is None else list(whole.history)[len(whole.history) - length :][:length]
    if length is not None and length > len(whole.history):
        expected = list(whole.history)
    assert list(read.history) == expected
    assert list(sent.history) == expected
    assert len(first.history) <= (100 if length is None else length)


async def test_a_negative_history_length_is_refused(stage: Stage, client: Client, blocking: Client) -> None:
    task = await stage.task(blocking, "echo x")
    with pytest.raises(InvalidParamsError):
        await client.get_task(pb.GetTaskRequest(id=task.id, history_length=-1))
    with pytest.raises(InvalidParamsError):
        await stage.task(blocking, "echo x", history_length=-1)


async def test_a_list_is_read_page_by_page_newest_status_first(stage: Stage, blocking: Client) -> None:
    context = f"list-{uuid.uuid4()}"
    made = [(await stage.task(blocking, f"echo {n}", context_id=context)).id for n in range(7)]
    found = await pages(blocking, context_id=context, page_size=3)
    assert [len(page.tasks) for page in found] == [3, 3, 1]
    assert {page.total_size for page in found} == {7}
    assert {page.page_size for page in found} == {3}
    assert found[-1].next_page_token == ""
    tasks = [task for page in found for task in page.tasks]
    assert [task.id for task in tasks] == made[::-1]
    times = [task.status.timestamp.ToNanoseconds() for task in tasks]
    assert times == sorted(times, reverse=True)


async def test_pages_stay_as_they_are_while_tasks_are_added(stage: Stage, blocking: Client) -> None:
    context = f"stable-{uuid.uuid4()}"
    made = [(await stage.task(blocking, f"echo {n}", context_id=context)).id for n in range(4)]
    asked = pb.ListTasksRequest(context_id=context, page_size=2)
    first = await blocking.list_tasks(asked)
    late = await stage.task(blocking, "echo late", context_id=context)
    asked.page_token = first.next_page_token
    second = await blocking.list_tasks(asked)
    assert [task.id for task in (*first.tasks, *second.tasks)] == made[::-1]
    assert late.id not in [task.id for task in second.tasks]


async def test_a_list_shows_artifacts_and_history_only_where_asked_for(stage: Stage, blocking: Client) -> None:
    context = f"shown-{uuid.uuid4()}"
    await stage.task(blocking, "parts", context_id=context)
    (bare,) = (await blocking.list_tasks(pb.ListTasksRequest(context_id=context))).tasks
    assert not bare.artifacts
    full = await blocking.list_tasks(pb.ListTasksRequest(context_id=context, include_artifacts=True, history_length=1))
    assert len(full.tasks[0].artifacts) == 5
    assert len(full.tasks[0].history) <= 1


async def test_a_list_is_of_the_state_and_the_time_asked_for(stage: Stage, blocking: Client) -> None:
    context = f"filter-{uuid.uuid4()}"
    done = await stage.task(blocking, "echo x", context_id=context)
    waiting = await stage.task(blocking, "ask", context_id=context)
    asked = pb.ListTasksRequest(context_id=context, status=pb.TASK_STATE_INPUT_REQUIRED)
    assert [task.id for task in (await blocking.list_tasks(asked)).tasks] == [waiting.id]
    later = pb.ListTasksRequest(context_id=context, status_timestamp_after=waiting.status.timestamp)
    assert done.id not in [task.id for task in (await blocking.list_tasks(later)).tasks]
    nothing = await blocking.list_tasks(pb.ListTasksRequest(context_id=f"none-{uuid.uuid4()}"))
    assert (len(nothing.tasks), nothing.total_size, nothing.next_page_token, nothing.page_size) == (0, 0, "", 50)


@pytest.mark.parametrize("wrong", [{"page_size": 101}, {"page_size": -1}, {"page_token": "made up"}, {"status": 99}])
async def test_a_list_that_cannot_be_is_refused(client: Client, wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidParamsError):
        await client.list_tasks(pb.ListTasksRequest(**wrong))  # type: ignore[arg-type]


async def test_lists_are_the_same_everywhere(stage: Stage, everywhere: Everywhere) -> None:
    context = f"everywhere-{uuid.uuid4()}"
    for text in ("echo a", "parts", "ask", "reject this"):
        await stage.task(everywhere.blocking["nats"], text, context_id=context)

    async def listed(client: Client) -> list[pb.ListTasksResponse]:
        short = await pages(client, context_id=context, page_size=3)
        for page in short:
            page.next_page_token = "more" if page.next_page_token else ""
        return [*short, *await pages(client, context_id=context, include_artifacts=True, history_length=2)]

    await everywhere.same(listed)
