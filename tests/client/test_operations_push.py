"""Push configs: made with a message or on their own, of one caller, and never told to the agent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from a2a.types import a2a_pb2 as pb

from weft.client.operations import Operations
from weft_protocols import ids
from weft_protocols.errors import InvalidParams, TaskNotFound

if TYPE_CHECKING:
    from tests.client.conftest import Office, Shelf

    Saying = Callable[..., pb.SendMessageRequest]

pytestmark = pytest.mark.anyio

HOOK = pb.TaskPushNotificationConfig(
    url="https://hooks.example.com/a", token="t-1", authentication={"scheme": "Bearer", "credentials": "secret"}
)


@pytest.fixture
async def gina(office: Office, shelf: Shelf) -> Operations:
    """A caller of an agent that pushes."""
    shelf.put("clerk", capabilities={"streaming": True, "push_notifications": True})
    return await office.operations("gina", shelf)


async def configs(operations: Operations, task_id: str) -> list[pb.TaskPushNotificationConfig]:
    request = pb.ListTaskPushNotificationConfigsRequest(task_id=task_id)
    return list((await operations.list_push_configs("clerk", request)).configs)


@pytest.mark.parametrize("way", ["blocking", "at once", "streaming"])
async def test_a_message_brings_its_webhook(office: Office, gina: Operations, saying: Saying, way: str) -> None:
    request = saying(f"hook {way}", configuration=pb.SendMessageConfiguration(task_push_notification_config=HOOK))
    request.configuration.return_immediately = way == "at once"
    for _ in range(2):  # the message sent again makes no second webhook
        if way == "streaming":
            assert [event async for event in gina.send_streaming_message("clerk", request)]
        else:
            await gina.send_message("clerk", request)
    task_id = ids.task_id("gina", "clerk", request.message.message_id)
    (made,) = await configs(gina, task_id)
    assert (made.task_id, made.id, made.url, made.token) == (task_id, task_id, HOOK.url, "t-1")
    stored = next(task for task in office.clerk.requests if task.text == f"hook {way}")._run.work.request
    assert not stored.configuration.HasField("task_push_notification_config")


async def test_configs_are_made_read_and_removed(gina: Operations, bob: Operations, saying: Saying) -> None:
    task_id = (await gina.send_message("clerk", saying("ask colour?"))).task.id
    wanted = pb.TaskPushNotificationConfig(task_id=task_id, id="mine", url="https://hooks.example.com/b")
    assert await gina.create_push_config("clerk", wanted) == wanted
    key = pb.GetTaskPushNotificationConfigRequest(task_id=task_id, id="mine")
    assert await gina.get_push_config("clerk", key) == wanted
    assert await configs(gina, task_id) == [wanted]
    stranger = Operations(bob.mesh, gina.cards)
    with pytest.raises(TaskNotFound):
        await stranger.get_push_config("clerk", key)
    with pytest.raises(TaskNotFound):
        await stranger.create_push_config("clerk", wanted)
    removal = pb.DeleteTaskPushNotificationConfigRequest(task_id=task_id, id="mine")
    await gina.delete_push_config("clerk", removal)
    await gina.delete_push_config("clerk", removal)
    assert await configs(gina, task_id) == []
    with pytest.raises(TaskNotFound):
        await gina.get_push_config("clerk", key)


async def test_a_webhook_without_a_url_refuses_the_message(office: Office, gina: Operations, saying: Saying) -> None:
    hook = pb.TaskPushNotificationConfig(url="not a url")
    request = saying("no url", configuration=pb.SendMessageConfiguration(task_push_notification_config=hook))
    with pytest.raises(InvalidParams, match="it must begin with https"):
        await gina.send_message("clerk", request)
    assert "no url" not in office.clerk.runs


async def test_a_webhook_that_is_refused_later_fails_the_call_and_not_the_task(
    gina: Operations, saying: Saying
) -> None:
    hook = pb.TaskPushNotificationConfig(url="https://hooks.example.com/a", token="not\na token")
    request = saying("hello", configuration=pb.SendMessageConfiguration(task_push_notification_config=hook))
    with pytest.raises(InvalidParams):
        await gina.send_message("clerk", request)
    assert gina.mesh.following == 0
    request.ClearField("configuration")
    assert (await gina.send_message("clerk", request)).task.status.state == pb.TASK_STATE_COMPLETED
