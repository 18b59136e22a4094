"""Push notification configurations over every transport."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import pytest
from a2a.client.client import Client
from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import A2AError, InvalidParamsError, TaskNotFoundError

if TYPE_CHECKING:
    from tests.contract.conftest import Everywhere, Stage

pytestmark = pytest.mark.anyio
HOOK = "http://127.0.0.1:9/hook"
"""Nobody listens there."""


def config(task_id: str, name: str = "", **more: Any) -> pb.TaskPushNotificationConfig:
    return pb.TaskPushNotificationConfig(task_id=task_id, id=name, url=HOOK, **more)


async def names(client: Client, task_id: str) -> list[str]:
    asked = pb.ListTaskPushNotificationConfigsRequest(task_id=task_id)
    return sorted(one.id for one in (await client.list_task_push_notification_configs(asked)).configs)


async def delete(client: Client, task_id: str, name: str) -> None:
    await client.delete_task_push_notification_config(
        pb.DeleteTaskPushNotificationConfigRequest(task_id=task_id, id=name)
    )


async def test_a_configuration_is_made_read_listed_and_removed(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "ask")
    wanted = config(task.id, "mine", token="my-token")
    wanted.authentication.scheme, wanted.authentication.credentials = "Bearer", "secret"
    made = await blocking.create_task_push_notification_config(wanted)
    assert (made.id, made.task_id, made.url, made.token) == ("mine", task.id, HOOK, "my-token")
    asked = pb.GetTaskPushNotificationConfigRequest(task_id=task.id, id="mine")
    assert await blocking.get_task_push_notification_config(asked) == made
    other = await blocking.create_task_push_notification_config(config(task.id))
    assert other.id not in ("", "mine")
    assert await names(blocking, task.id) == sorted(["mine", other.id])
    for _ in range(2):
        await delete(blocking, task.id, "mine")
    assert await names(blocking, task.id) == [other.id]
    with pytest.raises(TaskNotFoundError):
        await blocking.get_task_push_notification_config(asked)


async def test_a_configuration_stays_while_its_task_goes_on(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "ask")
    await blocking.create_task_push_notification_config(config(task.id, "mine"))
    await stage.task(blocking, "red", task_id=task.id)
    assert await names(blocking, task.id) == ["mine"]


async def test_a_configuration_comes_with_the_message(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "ask", task_push_notification_config=config("", "inline"))
    assert await names(blocking, task.id) == ["inline"]


async def test_a_configuration_under_the_same_name_replaces_the_one_before(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "ask")
    await blocking.create_task_push_notification_config(config(task.id, "mine", token="old"))
    await blocking.create_task_push_notification_config(config(task.id, "mine", token="new"))
    asked = pb.GetTaskPushNotificationConfigRequest(task_id=task.id, id="mine")
    assert (await blocking.get_task_push_notification_config(asked)).token == "new"


async def test_configurations_of_a_task_that_is_not_there_are_refused(blocking: Client) -> None:
    nobody = uuid.uuid4().hex
    with pytest.raises(TaskNotFoundError):
        await blocking.create_task_push_notification_config(config(nobody, "c"))
    with pytest.raises(TaskNotFoundError):
        await names(blocking, nobody)
    with pytest.raises(TaskNotFoundError):
        await blocking.get_task_push_notification_config(
            pb.GetTaskPushNotificationConfigRequest(task_id=nobody, id="c")
        )


async def test_configurations_of_another_caller_are_not_seen(stage: Stage, blocking: Client, stranger: Client) -> None:
    task = await stage.task(blocking, "ask")
    await blocking.create_task_push_notification_config(config(task.id, "mine", token="my-token"))
    with pytest.raises(TaskNotFoundError):
        await names(stranger, task.id)
    with pytest.raises(TaskNotFoundError):
        await stranger.get_task_push_notification_config(
            pb.GetTaskPushNotificationConfigRequest(task_id=task.id, id="mine")
        )
    with pytest.raises(A2AError):
        await delete(stranger, task.id, "mine")
    assert await names(blocking, task.id) == ["mine"]


@pytest.mark.parametrize("url", ["", "not a url", "ftp://example.com/x"])
async def test_a_configuration_without_an_address_is_refused(stage: Stage, blocking: Client, url: str) -> None:
    task = await stage.task(blocking, "ask")
    with pytest.raises(InvalidParamsError):
        await blocking.create_task_push_notification_config(
            pb.TaskPushNotificationConfig(task_id=task.id, id="c", url=url)
        )


async def test_configurations_are_the_same_everywhere(stage: Stage, everywhere: Everywhere) -> None:
    async def kept(client: Client) -> list[object]:
        task = await stage.task(client, "ask")
        wanted = config(task.id, "mine", token="t")
        wanted.authentication.scheme = "Bearer"
        made = await client.create_task_push_notification_config(wanted)
        asked = pb.ListTaskPushNotificationConfigsRequest(task_id=task.id)
        listed = await client.list_task_push_notification_configs(asked)
        for one in (made, *listed.configs):
            one.tenant = ""  # names the agent over gRPC
        return [made, listed]

    await everywhere.same(kept)
