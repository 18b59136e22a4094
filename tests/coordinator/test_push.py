"""Push notification configs: what a caller sets, reads, lists and deletes, and nobody else sees."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format

from weft_coordinator.service.push import MAX_SIZE
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.errors import InvalidParams, ParseError, TaskNotFound
from weft_protocols.push import PER_TASK, url_problem
from weft_protocols.records import PushJob
from weft_protocols.resources import PUSH

if TYPE_CHECKING:
    from tests.coordinator.conftest import Sent, Stage

pytestmark = pytest.mark.anyio

URL = "https://client.example.com/hook"
Config = pb.TaskPushNotificationConfig


async def create(stage: Stage, sent: Sent, config_id: str = "", *, url: str = URL, caller: str = "") -> Config:
    config = Config(task_id=sent.task, id=config_id, url=url)
    return await create_as(stage, caller or sent.caller, config)


async def create_as(stage: Stage, caller: str, config: Config, *, after: int | None = None) -> Config:
    headers = {h.VERSION: "1.0", **({} if after is None else {h.EVENT: str(after)})}
    reply = await stage.rpc(caller, "CreateTaskPushNotificationConfig", config, headers=headers)
    return Config.FromString(reply.data)


async def get(stage: Stage, sent: Sent, config_id: str, *, caller: str = "") -> Config:
    request = pb.GetTaskPushNotificationConfigRequest(task_id=sent.task, id=config_id)
    return Config.FromString((await stage.rpc(caller or sent.caller, "GetTaskPushNotificationConfig", request)).data)


async def page(
    stage: Stage, sent: Sent, *, size: int = 0, token: str = "", caller: str = ""
) -> pb.ListTaskPushNotificationConfigsResponse:
    request = pb.ListTaskPushNotificationConfigsRequest(task_id=sent.task, page_size=size, page_token=token)
    reply = await stage.rpc(caller or sent.caller, "ListTaskPushNotificationConfigs", request)
    return pb.ListTaskPushNotificationConfigsResponse.FromString(reply.data)


async def ids_of(stage: Stage, sent: Sent) -> list[str]:
    return [config.id for config in (await page(stage, sent)).configs]


async def delete(stage: Stage, sent: Sent, config_id: str, *, caller: str = "") -> bytes:
    request = pb.DeleteTaskPushNotificationConfigRequest(task_id=sent.task, id=config_id)
    return (await stage.rpc(caller or sent.caller, "DeleteTaskPushNotificationConfig", request)).data


async def stored(stage: Stage, sent: Sent, config_id: str) -> tuple[int, PushJob] | None:
    found = await (await stage.broker("coordinator")).last(
        PUSH, subjects.push(sent.caller, sent.agent, sent.task, subjects.step_token(config_id))
    )
    return None if found is None else (found.seq, PushJob.decode(found.data))


# Setting and reading ---------------------------------------------------------------------------------


async def test_a_config_is_answered_as_it_was_set_and_read_as_it_was_answered(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    asked = Config(
        task_id=sent.task,
        id="hook-1",
        url=URL,
        token="opaque",
        authentication=pb.AuthenticationInfo(scheme="Bearer", credentials="secret"),
    )
    assert await create_as(stage, "local", asked) == asked
    assert await get(stage, sent, "hook-1") == asked
    assert list((await page(stage, sent)).configs) == [asked]


async def test_a_config_without_an_id_gets_one_and_setting_it_again_adds_nothing(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    first = await create(stage, sent)
    assert first.id
    assert (await create(stage, sent)).id == first.id
    other = await create(stage, sent, url=f"{URL}/2")
    assert await ids_of(stage, sent) == sorted([first.id, other.id])


async def test_an_id_that_is_no_subject_token_is_kept(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    for config_id in ("tck.push/1 ü", "*", ">", "x" * 256):
        assert (await create(stage, sent, config_id)).id == config_id
        assert (await get(stage, sent, config_id)).id == config_id
    assert len(await ids_of(stage, sent)) == 4


async def test_a_config_of_the_same_id_replaces_the_other_and_goes_on_where_that_one_was(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    await create_as(stage, "local", Config(task_id=sent.task, id="one", url=URL), after=3)
    first = await stored(stage, sent, "one")
    await create(stage, sent, "one", url=f"{URL}/new")
    second = await stored(stage, sent, "one")
    assert first is not None
    assert second is not None
    assert second[0] > first[0]
    assert (second[1].series, second[1].after) == (first[1].series, 3)
    assert [config.url for config in (await page(stage, sent)).configs] == [f"{URL}/new"]


async def test_a_config_made_again_after_its_deletion_begins_from_the_start(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    await create(stage, sent, "one")
    first = await stored(stage, sent, "one")
    await delete(stage, sent, "one")
    await create(stage, sent, "one")
    second = await stored(stage, sent, "one")
    assert first is not None
    assert second is not None
    assert first[1].series != second[1].series


async def test_a_task_that_has_ended_takes_configs(stage: Stage) -> None:
    sent = await stage.done(stage.agent())
    await create(stage, sent, "late")
    assert (await get(stage, sent, "late")).url == URL


async def test_requests_and_answers_may_be_json(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    body = json_format.MessageToJson(Config(task_id=sent.task, id="j", url=URL)).encode()
    headers = {h.VERSION: "1.0", h.CONTENT_TYPE: "application/json"}
    reply = await stage.rpc("local", "CreateTaskPushNotificationConfig", body, headers=headers)
    assert json_format.Parse(reply.data, Config()).id == "j"
    request = json_format.MessageToJson(pb.DeleteTaskPushNotificationConfigRequest(task_id=sent.task, id="j"))
    reply = await stage.rpc("local", "DeleteTaskPushNotificationConfig", request.encode(), headers=headers)
    assert reply.data == b"{}"


async def test_two_who_set_one_config_at_once_both_succeed_and_one_config_is_left(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    async with asyncio.TaskGroup() as group:
        for n in range(6):
            group.create_task(create(stage, sent, "one", url=f"{URL}/{n}"))
    assert await ids_of(stage, sent) == ["one"]


async def test_a_task_has_a_bounded_number_of_configs_which_may_still_be_replaced(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    for n in range(PER_TASK):
        await create(stage, sent, f"hook-{n}")
    config = Config(task_id=sent.task, id="one-more", url=URL)
    error = await stage.refused("local", "CreateTaskPushNotificationConfig", config)
    assert isinstance(error, InvalidParams)
    assert "delete one" in error.message
    await create(stage, sent, "hook-3", url=f"{URL}/new")
    await delete(stage, sent, "hook-0")
    await create(stage, sent, "one-more")


# Deleting and listing --------------------------------------------------------------------------------


async def test_a_deleted_config_is_gone_and_deleting_it_again_is_no_error(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    await create(stage, sent, "one")
    await create(stage, sent, "two")
    for _ in range(2):
        assert await delete(stage, sent, "one") == b""
    with pytest.raises(TaskNotFound):
        await get(stage, sent, "one")
    assert await ids_of(stage, sent) == ["two"]
    assert await stored(stage, sent, "one") is None


async def test_deleting_takes_what_is_known_of_the_delivery_with_it(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    await create(stage, sent, "one")
    broker = await stage.broker("coordinator")
    cursor = subjects.pushed(sent.caller, sent.agent, sent.task, "one")
    await broker.publish(cursor, b"cursor")
    await delete(stage, sent, "one")
    assert await broker.last(PUSH, cursor) is None


async def test_pages_hold_every_config_once(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    wanted = sorted(f"hook-{n}" for n in range(7))
    for config_id in wanted:
        await create(stage, sent, config_id)
    found: list[str] = []
    token = ""
    for _ in range(3):
        answer = await page(stage, sent, size=3, token=token)
        found += [config.id for config in answer.configs]
        token = answer.next_page_token
    assert (found, token) == (wanted, "")


async def test_a_task_without_configs_has_an_empty_page(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    assert await page(stage, sent) == pb.ListTaskPushNotificationConfigsResponse()


# Who may ---------------------------------------------------------------------------------------------


async def test_another_caller_can_neither_see_nor_set_nor_delete_a_config(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    await create(stage, sent, "one")
    for attempt in (create, get, delete):
        with pytest.raises(TaskNotFound):
            await attempt(stage, sent, "one", caller="mallory")
    with pytest.raises(TaskNotFound):
        await page(stage, sent, caller="mallory")
    assert (await get(stage, sent, "one")).url == URL


async def test_the_operator_sees_the_configs_of_all(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    await create(stage, sent, "one")
    assert (await get(stage, sent, "one", caller="operator")).url == URL
    await delete(stage, sent, "one", caller="operator")
    assert await ids_of(stage, sent) == []


# Requests that cannot be answered ----------------------------------------------------------------------


async def test_what_is_not_there_is_not_found(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    nowhere = nowhere_like(sent)
    for attempt in (create, get, delete):
        with pytest.raises(TaskNotFound):
            await attempt(stage, nowhere, "one")
    with pytest.raises(TaskNotFound):
        await get(stage, sent, "never-set")


def nowhere_like(sent: Sent) -> Sent:
    return type(sent)(sent.agent, sent.caller, "0" * 32, sent.context, sent.message_id, sent.seq)


WRONG: dict[str, tuple[Config, str]] = {
    "no task": (Config(url=URL), "task_id"),
    "no url": (Config(task_id="t"), "url"),
    "no http": (Config(task_id="t", url="ftp://example.com/x"), "url"),
    "no host": (Config(task_id="t", url="https:///x"), "url"),
    "credentials in the url": (Config(task_id="t", url="https://a:b@example.com/x"), "url"),
    "a space in the url": (Config(task_id="t", url="https://example.com/a b"), "url"),
    "no port": (Config(task_id="t", url="https://example.com:99999/"), "url"),
    "a long url": (Config(task_id="t", url=f"https://example.com/{'x' * 2048}"), "url"),
    "a long id": (Config(task_id="t", url=URL, id="x" * 257), "id"),
    "a header in the token": (Config(task_id="t", url=URL, token="a\r\nX: y"), "token"),
    "no scheme": (
        Config(task_id="t", url=URL, authentication=pb.AuthenticationInfo(credentials="c")),
        "authentication.scheme",
    ),
    "a header in the credentials": (
        Config(task_id="t", url=URL, authentication=pb.AuthenticationInfo(scheme="Bearer", credentials="a\nb")),
        "authentication.credentials",
    ),
}


@pytest.mark.parametrize(("config", "field"), WRONG.values(), ids=WRONG)
async def test_a_wrong_field_is_named(stage: Stage, config: Config, field: str) -> None:
    error = await stage.refused("local", "CreateTaskPushNotificationConfig", config)
    assert isinstance(error, InvalidParams)
    assert [violation.field for violation in error.violations] == [field]


async def test_every_wrong_field_is_named_at_once_and_no_secret_repeated(stage: Stage) -> None:
    error = await stage.refused("local", "CreateTaskPushNotificationConfig", Config(token="se\rcret"))
    assert {violation.field for violation in error.violations} == {"task_id", "url", "token"}
    assert "cret" not in error.message.replace("secret", "")


@pytest.mark.parametrize("method", ["GetTaskPushNotificationConfig", "DeleteTaskPushNotificationConfig"])
async def test_a_config_is_named_by_its_task_and_its_id(stage: Stage, method: str) -> None:
    error = await stage.refused("local", method, b"")
    assert isinstance(error, InvalidParams)
    assert [violation.field for violation in error.violations] == ["task_id", "id"]


@pytest.mark.parametrize(
    ("size", "token", "field"), [(-1, "", "page_size"), (MAX_SIZE + 1, "", "page_size"), (1, "??", "page_token")]
)
async def test_a_wrong_page_is_named(stage: Stage, size: int, token: str, field: str) -> None:
    request = pb.ListTaskPushNotificationConfigsRequest(task_id="t", page_size=size, page_token=token)
    error = await stage.refused("local", "ListTaskPushNotificationConfigs", request)
    assert [violation.field for violation in error.violations] == [field]


async def test_the_event_to_begin_after_must_be_a_number(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    with pytest.raises(InvalidParams, match="Weft-Event"):
        await stage.rpc(
            "local",
            "CreateTaskPushNotificationConfig",
            Config(task_id=sent.task, url=URL),
            headers={h.VERSION: "1.0", h.EVENT: "-1"},
        )


@pytest.mark.parametrize("prefix", ["Create", "Get", "Delete"])
async def test_bytes_that_are_no_request_are_a_parse_error(stage: Stage, prefix: str) -> None:
    assert type(await stage.refused("local", f"{prefix}TaskPushNotificationConfig", b"\xff\xff")) is ParseError


@pytest.mark.parametrize(
    "url", [URL, "http://localhost:8000/a?b=c", "https://[2001:db8::1]:8443/x", "https://xn--bcher-kva.example/"]
)
def test_urls_of_webhooks(url: str) -> None:
    assert url_problem(url) == ""
