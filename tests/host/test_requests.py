"""What a message's headers ask for: content types, versions, deadlines."""

import asyncio
import json
import time
from collections.abc import Callable

import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format

import weft
from weft.testing.agents import eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.errors import A2AError, ContentTypeNotSupported, VersionNotSupported
from weft_protocols.events import RawEvent

Unique = Callable[[str], str]


def talking(name: str) -> weft.Agent:
    agent = weft.Agent(name)

    @agent.skill()
    async def talk(task: weft.Task) -> dict[str, str]:
        await task.update("thinking")
        return {"said": task.text}

    return agent


async def test_a_message_in_json_is_understood_and_answered_in_json_where_that_is_asked_for(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if any event of the task, a later attempt's first one included, is in another encoding than asked for."""
    agent = talking(unique("json"))
    async with running(mesh, agent):
        events = await exchange(
            mesh,
            caller,
            agent.name,
            body=json.dumps(
                {"message": {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hallo"}], "contextId": "c"}}
            ).encode(),
            headers={h.CONTENT_TYPE: h.JSON, h.ACCEPT: h.JSON},
        )
    assert [h.get(event.headers, h.CONTENT_TYPE.encode()) for event in events] == [b"application/json"] * 4
    plain = [json.loads(event.data) for event in events]
    assert plain[1]["statusUpdate"]["status"]["message"]["parts"][0]["text"] == "thinking"
    assert plain[2]["artifactUpdate"]["artifact"]["parts"][0]["data"] == {"said": "hallo"}
    assert plain[3]["statusUpdate"]["status"]["state"] == "TASK_STATE_COMPLETED"


async def test_a_task_that_is_taken_over_keeps_answering_in_json(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("json-again"))

    @agent.skill()
    async def work(task: weft.Task) -> str:
        if task.attempt == 1:
            raise ConnectionError
        return "done"

    async with running(mesh, agent):
        body = json_format.MessageToJson(request("m")).encode()
        events = await exchange(mesh, caller, agent.name, body=body, headers={h.CONTENT_TYPE: h.JSON, h.ACCEPT: h.JSON})
    assert len(events) == 5
    assert all(json.loads(event.data) for event in events)
    assert all(isinstance(event.decode(), pb.StreamResponse) for event in events)


async def test_protobuf_is_the_default_and_carries_no_content_type(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = talking(unique("protobuf"))
    async with running(mesh, agent):
        events = await exchange(mesh, caller, agent.name, body=request("m").SerializeToString(), headers={})
    assert [h.get(event.headers, h.CONTENT_TYPE.encode()) for event in events] == [None] * 4
    assert events[1].decode().status_update.status.message.parts[0].text == "thinking"


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ({h.VERSION: "0.3"}, VersionNotSupported),
        ({h.VERSION: ""}, VersionNotSupported),
        ({h.VERSION: "2.0"}, VersionNotSupported),
    ],
    ids=["0.3", "none", "2.0"],
)
async def test_another_version_of_a2a_is_rejected_by_name(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, headers: dict[str, str], error: type[A2AError]
) -> None:
    agent = talking(unique("version"))
    async with running(mesh, agent):
        body = request("m").SerializeToString()
        (event,) = await exchange(mesh, caller, agent.name, body=body, headers=headers)
    assert event.state == "rejected"
    assert isinstance(event.error, error)
    assert event.error.metadata == {"supported": "1.0"}


async def test_a_patch_version_of_a2a_is_accepted(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = talking(unique("patch"))
    async with running(mesh, agent):
        body = request("m").SerializeToString()
        events = await exchange(mesh, caller, agent.name, body=body, headers={h.VERSION: "1.0.1"})
    assert events[-1].state == "completed"


async def test_a_deadline_in_the_past_fails_the_task_before_its_handler_runs(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("late"))
    runs: list[str] = []

    @agent.skill()
    async def work(text: str) -> None:
        runs.append(text)

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go", deadline=-1.0, timeout=10)
    assert (view.state, view.text) == (weft.State.FAILED, "the deadline had passed before the task could start")
    assert runs == []


@pytest.mark.parametrize("kind", ["async", "thread", "waiting"])
async def test_a_deadline_that_passes_ends_the_task_whatever_it_is_doing(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, kind: str
) -> None:
    agent = weft.Agent(unique("deadline"))
    cleaned: list[str] = []

    @agent.skill("async")
    async def coroutine(task: weft.Task) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append("async")

    @agent.skill("thread")
    def thread() -> None:
        time.sleep(1.0)

    @agent.skill("waiting")
    async def waiting(task: weft.Task) -> None:
        await task.sleep(60)

    async with running(mesh, agent):
        began = time.monotonic()
        view = await caller.send(agent.name, "go", skill=kind, deadline=0.3)
        took = time.monotonic() - began
    assert (view.state, view.text) == (weft.State.FAILED, "the deadline has passed")
    assert took < 5
    assert cleaned == (["async"] if kind == "async" else [])


async def test_a_timeout_of_the_handler_itself_is_not_the_deadline(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("own-timeout"), attempts=1)

    @agent.skill()
    async def work(task: weft.Task) -> None:
        assert task.deadline is not None
        async with asyncio.timeout(0.01):
            await asyncio.sleep(60)

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go", deadline=30.0)
    assert view.text == "failed after 1 of 1 attempts: TimeoutError"


async def test_a_body_of_another_content_type_cannot_be_a_task(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = talking(unique("xml"))
    async with running(mesh, agent):
        task_id = await send(caller, agent.name, body=b"<xml/>", headers={h.CONTENT_TYPE: "text/xml"})
        assert (await caller.send(agent.name, "still there")).data == {"said": "still there"}
        stored = await StoredTask.read(mesh, agent.name, task_id)
    assert stored.events == ()
    assert issubclass(ContentTypeNotSupported, A2AError)


# On the wire ------------------------------------------------------------------------------------------


def request(message_id: str) -> pb.SendMessageRequest:
    message = pb.Message(message_id=message_id, context_id="c", role=pb.ROLE_USER, parts=[pb.Part(text="hallo")])
    return pb.SendMessageRequest(message=message)


async def send(caller: weft.Mesh, agent: str, *, body: bytes, headers: dict[str, str]) -> str:
    """Publish a creating message with id `m` in context `c`; its task id."""
    task_id = ids.task_id("local", agent, "m")
    fields = {h.EXPECTED_SEQUENCE: "0", h.VERSION: h.A2A_VERSION, h.ORIGIN: caller.origin, **headers}
    subject = subjects.task(agent, ids.slice_of("c"), "local", task_id)
    await caller.broker.publish(subject, body, headers=h.block(h.fields({k: v for k, v in fields.items() if v})))
    return task_id


async def exchange(
    mesh: BrokerMesh, caller: weft.Mesh, agent: str, *, body: bytes, headers: dict[str, str]
) -> tuple[RawEvent, ...]:
    """Publish a creating message and return its task's events once it has ended."""
    task_id = await send(caller, agent, body=body, headers=headers)

    async def ended() -> StoredTask | None:
        stored = await StoredTask.read(mesh, agent, task_id)
        return stored if stored.ends else None

    stored = await eventually(ended)
    assert stored is not None
    stored.check()
    return stored.events
