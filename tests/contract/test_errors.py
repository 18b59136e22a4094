"""Every error of A2A that a client can provoke, over every transport, as the SDK's own type.

Beside these, errors of each operation are with the operation; `PUSH_NOTIFICATION_NOT_SUPPORTED` and the like are
provoked with agents `strict` and `limited`.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from a2a.client.client import Client
from a2a.client.errors import A2AClientError, A2AClientTimeoutError
from a2a.types import a2a_pb2 as pb
from a2a.utils import errors as sdk

if TYPE_CHECKING:
    from tests.contract.conftest import Everywhere, Stage

pytestmark = pytest.mark.anyio
REQUIRED = "https://example.com/extensions/receipt/v1"
"""What agent `strict` requires."""


def _text(text: str = "echo x") -> pb.Part:
    return pb.Part(text=text)


WRONG_MESSAGES: dict[str, tuple[Callable[[pb.SendMessageRequest], object], str]] = {
    "no message id": (lambda r: r.message.ClearField("message_id"), "message_id"),
    "no role": (lambda r: r.message.ClearField("role"), "role"),
    "no parts": (lambda r: r.message.ClearField("parts"), "parts"),
    "an empty part": (lambda r: r.message.parts.add(), "parts[1]"),
    "no message": (lambda r: r.ClearField("message"), "message"),
    "a line break in its id": (lambda r: setattr(r.message, "message_id", "a\r\nb"), "message_id"),
    "a negative history length": (lambda r: setattr(r.configuration, "history_length", -5), "history_length"),
}


@pytest.mark.parametrize("wrong", WRONG_MESSAGES)
async def test_a_message_with_a_wrong_field_is_refused_by_the_fields_name(
    stage: Stage, blocking: Client, client: Client, wrong: str
) -> None:
    change, field = WRONG_MESSAGES[wrong]
    request = stage.message("echo x")
    change(request)
    for one in (blocking, client):
        with pytest.raises(sdk.InvalidParamsError) as caught:
            await stage.stream(one, request)
        words = f"{caught.value.message} {caught.value.data}".replace("_", "").lower()
        assert field.replace("_", "").lower() in words


async def test_an_unknown_skill_is_refused_as_the_binding_says(stage: Stage, blocking: Client) -> None:
    with pytest.raises(sdk.InvalidParamsError, match="no-such-skill"):
        await stage.task(blocking, "x", metadata={"weft.skill": "no-such-skill"})


async def test_a_media_type_the_agent_does_not_take_is_refused(stage: Stage, strict: Client) -> None:
    context = stage.context({"A2A-Extensions": REQUIRED})
    part = pb.Part(raw=b"GIF89a", media_type="image/gif")
    with pytest.raises(sdk.ContentTypeNotSupportedError):
        await stage.stream(strict, stage.message(parts=[_text(), part]), context=context)
    taken = pb.Part(text="hello", media_type="text/plain; charset=utf-8")
    (item,) = await stage.stream(strict, stage.message(parts=[taken]), context=context)
    assert item.task.status.state == pb.TASK_STATE_COMPLETED


async def test_a_required_extension_must_be_asked_for(stage: Stage, strict: Client) -> None:
    for context in (None, stage.context({"A2A-Extensions": "https://example.com/another"})):
        with pytest.raises(sdk.ExtensionSupportRequiredError) as caught:
            await stage.task(strict, "hello", context=context)
        assert REQUIRED in f"{caught.value.message}"
    named = stage.context({"a2a-extensions": f"https://example.com/another,{REQUIRED}"})
    assert (await stage.task(strict, "hello", context=named)).status.state == pb.TASK_STATE_COMPLETED


async def test_an_extended_card_that_is_declared_and_missing_is_not_configured(stage: Stage, strict: Client) -> None:
    context = stage.context({"A2A-Extensions": REQUIRED})
    with pytest.raises(sdk.ExtendedAgentCardNotConfiguredError):
        await strict.get_extended_agent_card(pb.GetExtendedAgentCardRequest(), context=context)


async def test_an_extended_card_that_is_not_declared_is_unsupported(stage: Stage, transport: str) -> None:
    def claim(card: pb.AgentCard) -> None:
        card.capabilities.extended_agent_card = True

    async with stage.dial(transport, "limited", card=claim, streaming=False) as limited:
        with pytest.raises(sdk.UnsupportedOperationError):
            await limited.get_extended_agent_card(pb.GetExtendedAgentCardRequest())


async def test_an_agent_that_does_not_stream_says_so(stage: Stage, transport: str) -> None:
    def claim(card: pb.AgentCard) -> None:
        card.capabilities.streaming = True

    async with stage.dial(transport, "limited", card=claim) as limited:
        with pytest.raises(sdk.UnsupportedOperationError):
            await stage.stream(limited, stage.message("hello"))
        with pytest.raises(sdk.UnsupportedOperationError):
            async for _ in limited.subscribe(pb.SubscribeToTaskRequest(id=uuid.uuid4().hex)):
                pass
    async with stage.dial(transport, "limited") as plain:
        (item,) = await stage.stream(plain, stage.message("hello"))
        assert item.task.status.state == pb.TASK_STATE_COMPLETED


async def test_an_agent_that_does_not_push_says_so(stage: Stage, transport: str) -> None:
    async with stage.dial(transport, "limited") as limited:
        task = await stage.task(limited, "hello")
        config = pb.TaskPushNotificationConfig(id="c", task_id=task.id, url="https://example.com/hook")
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: limited.create_task_push_notification_config(config),
            lambda: limited.get_task_push_notification_config(
                pb.GetTaskPushNotificationConfigRequest(task_id=task.id, id="c")
            ),
            lambda: limited.list_task_push_notification_configs(
                pb.ListTaskPushNotificationConfigsRequest(task_id=task.id)
            ),
            lambda: limited.delete_task_push_notification_config(
                pb.DeleteTaskPushNotificationConfigRequest(task_id=task.id, id="c")
            ),
            lambda: stage.task(limited, "hello", task_push_notification_config=config),
        ]
        for call in calls:
            with pytest.raises(sdk.PushNotificationNotSupportedError):
                await call()


@pytest.mark.parametrize("version", ["9.9", "2.0", "1.1", "0.2", "x"])
async def test_another_version_is_refused(stage: Stage, client: Client, blocking: Client, version: str) -> None:
    context = stage.context({"A2A-Version": version})
    request = pb.GetTaskRequest(id=uuid.uuid4().hex)
    with pytest.raises(sdk.VersionNotSupportedError):
        await client.get_task(request, context=context)
    with pytest.raises(sdk.VersionNotSupportedError):
        await client.list_tasks(pb.ListTasksRequest(), context=context)
    for one in (client, blocking):
        with pytest.raises(sdk.VersionNotSupportedError):
            await stage.stream(one, stage.message("echo x"), context=context)


@pytest.mark.parametrize("version", ["1.0", "1.0.1", "1.0.99"])
async def test_a_patch_of_the_version_does_not_count(stage: Stage, blocking: Client, version: str) -> None:
    task = await stage.task(blocking, "echo x", context=stage.context({"A2A-Version": version}))
    assert task.status.state == pb.TASK_STATE_COMPLETED


async def test_a_call_that_takes_too_long_is_a_timeout_and_the_task_goes_on(stage: Stage, blocking: Client) -> None:
    gate = uuid.uuid4().hex
    request = stage.message(f"hold {gate}")
    with pytest.raises(A2AClientTimeoutError):
        await stage.stream(blocking, request, context=stage.context(timeout=0.3))
    stage.contract.gates[gate].set()
    item = await stage.send(blocking, request)
    assert item.task.status.state == pb.TASK_STATE_COMPLETED


async def test_a_stream_that_is_silent_for_too_long_is_a_timeout(stage: Stage, client: Client) -> None:
    gate = uuid.uuid4().hex
    with pytest.raises(A2AClientTimeoutError):
        await stage.stream(client, stage.message(f"hold {gate}"), context=stage.context(timeout=0.3))
    stage.contract.gates[gate].set()


async def test_an_agent_that_is_not_there_is_an_error_of_the_client(stage: Stage, transport: str) -> None:
    def elsewhere(card: pb.AgentCard) -> None:
        for interface in card.supported_interfaces:
            interface.url = interface.url.replace("/contract", "/nobody")
            interface.tenant = interface.tenant.replace("contract", "nobody")

    async with stage.dial(transport, card=elsewhere, streaming=False) as nobody:
        with pytest.raises(sdk.A2AError) as caught:
            await stage.task(nobody, "echo x")
    assert isinstance(caught.value, A2AClientError | sdk.InvalidRequestError | sdk.MethodNotFoundError)


async def test_errors_are_the_same_everywhere(stage: Stage, everywhere: Everywhere) -> None:
    done = await stage.task(everywhere.blocking["nats"], "echo done")
    nobody = uuid.uuid4().hex

    async def refused(client: Client) -> list[tuple[str, str]]:
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: client.get_task(pb.GetTaskRequest(id=nobody)),
            lambda: client.get_task(pb.GetTaskRequest(id=done.id, history_length=-1)),
            lambda: client.cancel_task(pb.CancelTaskRequest(id=nobody)),
            lambda: client.cancel_task(pb.CancelTaskRequest(id=done.id)),
            lambda: client.list_tasks(pb.ListTasksRequest(page_size=101)),
            lambda: client.list_tasks(pb.ListTasksRequest(page_token="x")),
            lambda: stage.task(client, "more", task_id=done.id),
            lambda: stage.task(client, "more", task_id=nobody),
            lambda: stage.task(client, "x", parts=[]),
            lambda: stage.task(client, "x", metadata={"weft.skill": "nothing"}),
            lambda: client.get_task(pb.GetTaskRequest(id=done.id), context=stage.context({"A2A-Version": "7.0"})),
            lambda: client.get_task_push_notification_config(
                pb.GetTaskPushNotificationConfigRequest(task_id=done.id, id="none")
            ),
            lambda: client.list_task_push_notification_configs(
                pb.ListTaskPushNotificationConfigsRequest(task_id=nobody)
            ),
            lambda: client.delete_task_push_notification_config(
                pb.DeleteTaskPushNotificationConfigRequest(task_id=nobody, id="none")
            ),
        ]
        found = []
        for call in calls:
            with pytest.raises(sdk.A2AError) as caught:
                await call()
            known = type(caught.value) is sdk.VersionNotSupportedError  # the SDK's dispatchers have words of their own
            found.append((type(caught.value).__name__, "" if known else caught.value.message))
        return found

    await everywhere.same(refused)
