"""What requests are refused for before they reach the mesh, and what depends on an agent's card."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from a2a.types import a2a_pb2 as pb

from weft.client.operations import Call, Operations
from weft.client.requests import check_send
from weft_protocols.errors import (
    A2AError,
    ContentTypeNotSupported,
    ExtensionSupportRequired,
    InvalidParams,
    PushNotificationNotSupported,
    UnsupportedOperation,
    VersionNotSupported,
)

if TYPE_CHECKING:
    from tests.client.conftest import Office, Shelf

    Saying = Callable[..., pb.SendMessageRequest]

pytestmark = pytest.mark.anyio

TASK = "0" * 32
REQUIRED = "https://example.com/extensions/must/v1"
EVERY_OPERATION: dict[str, Callable[[Operations, pb.SendMessageRequest, Call], Any]] = {
    "send": lambda on, message, call: on.send_message("clerk", message, call),
    "stream": lambda on, message, call: anext(on.send_streaming_message("clerk", message, call)),
    "get": lambda on, _, call: on.get_task("clerk", pb.GetTaskRequest(id=TASK), call),
    "list": lambda on, _, call: on.list_tasks("clerk", pb.ListTasksRequest(), call),
    "cancel": lambda on, _, call: on.cancel_task("clerk", pb.CancelTaskRequest(id=TASK), call),
    "subscribe": lambda on, _, call: anext(on.subscribe_to_task("clerk", pb.SubscribeToTaskRequest(id=TASK), call)),
    "create push": lambda on, _, call: on.create_push_config(
        "clerk", pb.TaskPushNotificationConfig(task_id=TASK, url="https://x"), call
    ),
    "get push": lambda on, _, call: on.get_push_config(
        "clerk", pb.GetTaskPushNotificationConfigRequest(task_id=TASK, id="c"), call
    ),
    "list push": lambda on, _, call: on.list_push_configs(
        "clerk", pb.ListTaskPushNotificationConfigsRequest(task_id=TASK), call
    ),
    "delete push": lambda on, _, call: on.delete_push_config(
        "clerk", pb.DeleteTaskPushNotificationConfigRequest(task_id=TASK, id="c"), call
    ),
    "card": lambda on, _, call: on.get_extended_card("clerk", pb.GetExtendedAgentCardRequest(), call),
}
PUSH = ("create push", "get push", "list push", "delete push")


@pytest.fixture
async def frank(office: Office, shelf: Shelf) -> Operations:
    """A caller who sees those cards."""
    shelf.put("clerk")
    return await office.operations("frank", shelf)


@pytest.mark.parametrize("operation", EVERY_OPERATION)
@pytest.mark.parametrize("version", ["", "0.3", "0.3.0", "1.1", "2.0", "1", "one"])
async def test_other_versions_are_refused_by_every_operation(
    frank: Operations, saying: Saying, operation: str, version: str
) -> None:
    with pytest.raises(VersionNotSupported) as caught:
        await EVERY_OPERATION[operation](frank, saying("hello"), Call(version=version))
    assert caught.value.metadata == {"supported": "1.0"}


@pytest.mark.parametrize("version", ["1.0", "1.0.1"])
async def test_the_patch_of_a_version_does_not_count(frank: Operations, saying: Saying, version: str) -> None:
    assert (await frank.send_message("clerk", saying("hello"), Call(version=version))).task.artifacts


@pytest.mark.parametrize("operation", EVERY_OPERATION)
async def test_a_required_extension_must_be_named(
    frank: Operations, shelf: Shelf, saying: Saying, operation: str
) -> None:
    shelf.put("clerk", capabilities={"streaming": True, "extensions": [{"uri": REQUIRED, "required": True}]})
    for extensions in (frozenset[str](), frozenset({"https://example.com/extensions/other"})):
        with pytest.raises(ExtensionSupportRequired, match=REQUIRED) as caught:
            await EVERY_OPERATION[operation](frank, saying("hello"), Call(extensions=extensions))
        assert caught.value.metadata == {"extensions": REQUIRED}


async def test_named_and_optional_extensions_do_not_stand_in_the_way(
    frank: Operations, shelf: Shelf, saying: Saying
) -> None:
    both = [{"uri": REQUIRED, "required": True}, {"uri": "https://example.com/extensions/may/v1"}]
    shelf.put("clerk", capabilities={"streaming": True, "extensions": both})
    call = Call(extensions=frozenset({REQUIRED, "https://example.com/unknown"}))
    assert (await frank.send_message("clerk", saying("hello"), call)).task.artifacts
    shelf.put("clerk")
    assert (await frank.send_message("clerk", saying("hello"))).task.artifacts, "a new card counts at once"


async def test_an_agent_that_does_not_stream_is_not_streamed(frank: Operations, shelf: Shelf, saying: Saying) -> None:
    shelf.put("clerk", capabilities=pb.AgentCapabilities(push_notifications=True))
    for operation in ("stream", "subscribe"):
        with pytest.raises(UnsupportedOperation, match="does not stream"):
            await EVERY_OPERATION[operation](frank, saying("hello"), Call())
    assert (await frank.send_message("clerk", saying("hello"))).task.artifacts


@pytest.mark.parametrize("operation", PUSH)
async def test_an_agent_that_does_not_push_has_no_push_configs(
    frank: Operations, saying: Saying, operation: str
) -> None:
    with pytest.raises(PushNotificationNotSupported):
        await EVERY_OPERATION[operation](frank, saying("hello"), Call())


async def test_a_webhook_for_an_agent_that_does_not_push_refuses_the_message(
    office: Office, frank: Operations, saying: Saying
) -> None:
    request = saying("never run", configuration={"task_push_notification_config": {"url": "https://x"}})
    for send in (frank.send_message, lambda *args: anext(frank.send_streaming_message(*args))):
        with pytest.raises(PushNotificationNotSupported):
            await send("clerk", request)
    assert "never run" not in office.clerk.runs


async def test_an_extended_card_is_only_there_where_it_is_declared(frank: Operations, shelf: Shelf) -> None:
    request = pb.GetExtendedAgentCardRequest()
    with pytest.raises(UnsupportedOperation, match="its public card is all there is"):
        await frank.get_extended_card("clerk", request)
    shelf.put("clerk", capabilities={"streaming": True, "extended_agent_card": True})
    with pytest.raises(A2AError, match="clerk") as caught:
        await frank.get_extended_card("clerk", request)
    assert "its public card is all there is" not in str(caught.value), "the mesh was asked"


# Input modes ----------------------------------------------------------------------------------


def of_types(saying: Saying, *media_types: str) -> pb.SendMessageRequest:
    request = saying("typed")
    del request.message.parts[:]
    request.message.parts.extend(pb.Part(text="typed", media_type=media_type) for media_type in media_types)
    return request


@pytest.mark.parametrize(
    ("modes", "media_type", "taken"),
    [
        ([], "image/png", True),
        (["text/plain"], "", True),
        (["text/plain"], "text/plain", True),
        (["text/plain"], "TEXT/PLAIN; charset=utf-8", True),
        (["text/plain"], "image/png", False),
        (["image/*"], "image/png", True),
        (["image/*"], "text/plain", False),
        (["text/plain", "*/*"], "image/png", True),
    ],
)
async def test_parts_of_a_type_that_the_card_does_not_name_are_refused(
    frank: Operations, shelf: Shelf, saying: Saying, modes: list[str], media_type: str, taken: bool
) -> None:
    shelf.put("clerk", default_input_modes=modes)
    if taken:
        assert (await frank.send_message("clerk", of_types(saying, media_type))).task.artifacts
        return
    with pytest.raises(ContentTypeNotSupported, match=r"message\.parts\[1\] is .*; agent clerk takes"):
        await frank.send_message("clerk", of_types(saying, "", media_type))


async def test_the_types_of_any_skill_are_taken(frank: Operations, shelf: Shelf, saying: Saying) -> None:
    shelf.put("clerk", default_input_modes=["text/plain"], skills=[pb.AgentSkill(id="x", input_modes=["image/png"])])
    assert (await frank.send_message("clerk", of_types(saying, "image/png", "text/plain"))).task.artifacts
    with pytest.raises(ContentTypeNotSupported):
        await anext(frank.send_streaming_message("clerk", of_types(saying, "audio/wav")))


# Fields ---------------------------------------------------------------------------------------


def message(**fields: Any) -> pb.SendMessageRequest:
    return pb.SendMessageRequest(
        message=pb.Message(**{"message_id": "m", "role": pb.ROLE_USER, "parts": [pb.Part(text="x")], **fields})
    )


def deep(levels: int) -> Any:
    value: Any = "leaf"
    for level in range(levels):
        value = [value] if level % 2 else {"k": value}
    return value


def data(value: Any) -> pb.Part:
    part = pb.Part()
    part.data.list_value.extend([value])
    return part


def configured(**fields: Any) -> pb.SendMessageRequest:
    request = message()
    request.configuration.CopyFrom(pb.SendMessageConfiguration(**fields))
    return request


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (pb.SendMessageRequest(), ["message"]),
        (pb.SendMessageRequest(message=pb.Message()), ["message.message_id", "message.role", "message.parts"]),
        (message(message_id=""), ["message.message_id"]),
        (message(message_id="x" * 513), ["message.message_id"]),
        (message(message_id="a\r\nA2A-Error: X"), ["message.message_id"]),
        (message(message_id=" m"), ["message.message_id"]),
        (message(context_id="x" * 513), ["message.context_id"]),
        (message(role=pb.ROLE_UNSPECIFIED), ["message.role"]),
        (message(role=9), ["message.role"]),
        (message(parts=[]), ["message.parts"]),
        (message(parts=[pb.Part(text=""), pb.Part()]), ["message.parts[1]"]),
        (message(parts=[pb.Part(filename="f", media_type="text/plain")]), ["message.parts[0]"]),
        (message(parts=[data(math.nan)]), ["message.parts[0].data"]),
        (message(parts=[data(-math.inf)]), ["message.parts[0].data"]),
        (message(parts=[data(deep(30))]), ["message.parts[0].data"]),
        (message(metadata={"k": deep(30)}), ["message.metadata"]),
        (message(parts=[pb.Part(text="x", metadata={"k": math.inf})]), ["message.parts[0].metadata"]),
        (configured(history_length=-1), ["configuration.history_length"]),
        (
            configured(task_push_notification_config={"authentication": {"credentials": "c"}}),
            [
                "configuration.task_push_notification_config.url",
                "configuration.task_push_notification_config.authentication.scheme",
            ],
        ),
    ],
    ids=[
        "nothing",
        "empty",
        "no id",
        "long id",
        "line break",
        "white space",
        "long context",
        "no role",
        "unknown role",
        "no parts",
        "part of nothing",
        "part without content",
        "nan",
        "infinity",
        "deep data",
        "deep metadata",
        "infinity in metadata",
        "history",
        "webhook",
    ],
)
async def test_a_bad_message_is_refused_with_every_wrong_field(
    office: Office, frank: Operations, shelf: Shelf, request_: pb.SendMessageRequest, fields: list[str]
) -> None:
    shelf.put("clerk", capabilities={"streaming": True, "push_notifications": True})
    before = len(office.clerk.runs)
    for send in (frank.send_message, lambda *args: anext(frank.send_streaming_message(*args))):
        with pytest.raises(InvalidParams) as caught:
            await send("clerk", request_)
        assert [violation.field for violation in caught.value.violations] == fields
        assert all(violation.description for violation in caught.value.violations)
        assert all(field in str(caught.value) for field in fields)
    assert (len(office.clerk.runs), frank.mesh.following) == (before, 0)


@pytest.mark.parametrize(
    "request_",
    [
        message(parts=[pb.Part(text="")]),
        message(role=pb.ROLE_AGENT),
        message(message_id="ü" * 512),
        message(parts=[data(deep(29))]),
        message(metadata={"k": deep(29)}),
        message(parts=[data(1.5), data(2.0**60), data("ð" * 500)]),
        configured(history_length=0),
    ],
    ids=["empty text", "agent", "long id", "deep data", "deep metadata", "numbers", "history"],
)
def test_what_is_allowed_is_not_refused(request_: pb.SendMessageRequest) -> None:
    check_send(request_)


LIST = pb.ListTasksRequest.FromString(
    b"\x18\x4d" + pb.ListTasksRequest(page_size=101, history_length=-5).SerializeToString()
)


@pytest.mark.parametrize(
    ("ask", "fields"),
    [
        (lambda on: on.get_task("clerk", pb.GetTaskRequest()), ["id"]),
        (lambda on: on.get_task("clerk", pb.GetTaskRequest(id=TASK, history_length=-1)), ["history_length"]),
        (lambda on: on.cancel_task("clerk", pb.CancelTaskRequest()), ["id"]),
        (lambda on: anext(on.subscribe_to_task("clerk", pb.SubscribeToTaskRequest())), ["id"]),
        (lambda on: on.list_tasks("clerk", pb.ListTasksRequest(page_size=0)), ["page_size"]),
        (
            lambda on: on.list_tasks("clerk", LIST),
            ["page_size", "history_length", "status"],
        ),
        (lambda on: on.list_tasks("clerk", pb.ListTasksRequest(page_token="?")), ["page_token"]),
        (lambda on: on.create_push_config("clerk", pb.TaskPushNotificationConfig()), ["url", "task_id"]),
        (
            lambda on: on.create_push_config(
                "clerk", pb.TaskPushNotificationConfig(url="https://x", task_id=TASK, authentication={})
            ),
            ["authentication.scheme"],
        ),
        (
            lambda on: on.get_push_config("clerk", pb.GetTaskPushNotificationConfigRequest()),
            ["task_id", "id"],
        ),
        (
            lambda on: on.list_push_configs("clerk", pb.ListTaskPushNotificationConfigsRequest()),
            ["task_id"],
        ),
        (
            lambda on: on.list_push_configs(
                "clerk", pb.ListTaskPushNotificationConfigsRequest(task_id=TASK, page_size=-1)
            ),
            ["page_size"],
        ),
        (
            lambda on: on.delete_push_config("clerk", pb.DeleteTaskPushNotificationConfigRequest(task_id=TASK)),
            ["id"],
        ),
    ],
)
async def test_other_bad_requests_are_refused_with_every_wrong_field(
    frank: Operations, shelf: Shelf, ask: Callable[[Operations], Any], fields: list[str]
) -> None:
    shelf.put("clerk", capabilities={"streaming": True, "push_notifications": True})
    with pytest.raises(InvalidParams) as caught:
        await ask(frank)
    assert [violation.field for violation in caught.value.violations] == fields
