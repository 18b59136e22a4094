"""What handlers return, say and publish, as their callers see it."""

import math
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pydantic
import pytest

import weft
from weft.testing.agents import running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft_protocols.errors import InvalidAgentResponse

Unique = Callable[[str], str]
MEGABYTE = 1024 * 1024


class Answer(pydantic.BaseModel):
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Plain:
    text: str
    score: float


RESULTS: dict[str, Any] = {
    "text": "words",
    "empty text": "",
    "object": {"a": [1, 2.5, None, True], "b": {}},
    "list": [1, "two"],
    "empty list": [],
    "number": 42,
    "bytes": b"\x00\xff",
    "text part": weft.Text("part", "text/markdown"),
    "data part": weft.Data({"k": 1}),
    "file part": weft.File("a.bin", b"123", media_type="image/png"),
    "parts": [weft.Text("one"), weft.Data({"two": 2})],
    "model": Answer(text="t", score=0.5),
    "dataclass": Plain("t", 0.5),
    "models": [Answer(text="t", score=0.5), Plain("u", 1.5)],
    "nothing": None,
    "message": weft.Message("m", "agent", (weft.Text("said"),)),
}
SEEN: dict[str, tuple[weft.Text | weft.Data | weft.File, ...]] = {
    "text": (weft.Text("words"),),
    "empty text": (weft.Text(""),),
    "object": (weft.Data({"a": [1, 2.5, None, True], "b": {}}),),
    "list": (weft.Data([1, "two"]),),
    "empty list": (weft.Data([]),),
    "number": (weft.Data(42),),
    "bytes": (weft.File(content=b"\x00\xff", media_type="application/octet-stream"),),
    "text part": (weft.Text("part", "text/markdown"),),
    "data part": (weft.Data({"k": 1}),),
    "file part": (weft.File("a.bin", b"123", media_type="image/png"),),
    "parts": (weft.Text("one"), weft.Data({"two": 2})),
    "model": (weft.Data({"text": "t", "score": 0.5}),),
    "dataclass": (weft.Data({"text": "t", "score": 0.5}),),
    "models": (weft.Data([{"text": "t", "score": 0.5}, {"text": "u", "score": 1.5}]),),
    "message": (weft.Text("said"),),
}


@pytest.mark.parametrize("answer", ["task", "message"])
async def test_a_handler_returns_any_plain_value_part_or_model(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, answer: Any
) -> None:
    agent = weft.Agent(unique("returns"))

    @agent.skill(answer=answer)
    async def give(which: str) -> Any:
        return RESULTS[which]

    async with running(mesh, agent):
        for which in RESULTS:
            view = await caller.send(agent.name, which)
            parts = [part for artifact in view.artifacts for part in artifact.parts]
            if answer == "message":
                assert view.artifacts == ()
                assert view.message is not None
                parts = list(view.message.parts)
            assert view.state is weft.State.COMPLETED, which
            assert tuple(parts) == SEEN.get(which, ()), which


@pytest.mark.parametrize(
    "value",
    [object(), {"at": object()}, math.nan, {1, object()}, lambda: 1],
    ids=["object", "object inside", "nan", "set", "function"],
)
async def test_a_result_that_cannot_be_carried_fails_the_task_at_once_and_says_why(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, value: Any
) -> None:
    """Fails if the task hangs, is tried again, or its error does not name the type of what was returned."""
    agent = weft.Agent(unique("unserialisable"))

    @agent.skill()
    async def give() -> Any:
        return value

    async with running(mesh, agent), await caller.submit(agent.name, "") as handle:
        with pytest.raises(InvalidAgentResponse, match=f"returned {type(value).__name__}, which is no result: .+"):
            await handle.result()
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    assert stored.states == ["working", "failed"]


async def test_the_result_of_a_child_can_be_returned_as_it_is(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child, parent = weft.Agent(unique("child")), weft.Agent(unique("parent"))

    @child.skill(answer="message")
    async def speak() -> str:
        return "spoken"

    @child.skill()
    async def make() -> list[Any]:
        return [weft.Text("made"), weft.File("f", b"x")]

    @parent.skill()
    async def forward(task: weft.Task, which: str) -> weft.TaskView:
        return await task.delegate(child.name, "go", skill=which)

    async with running(mesh, child, parent):
        assert (await caller.send(parent.name, "speak")).text == "spoken"
        made = await caller.send(parent.name, "make")
    assert made.artifacts[0].parts == (weft.Text("made"), weft.File("f", b"x"))


async def test_a_message_skill_answers_with_one_event_and_no_task(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("speaks"))

    @agent.skill(answer="message")
    async def speak(words: str) -> str:
        return f"you said {words}"

    async with running(mesh, agent):
        events = [event async for event in caller.stream(agent.name, "hi")]
    assert [(event.n, event.text, event.state) for event in events] == [(1, "you said hi", weft.State.COMPLETED)]


async def test_updates_arrive_in_order_with_message_and_metadata(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("updates"))

    @agent.skill()
    async def work(task: weft.Task) -> str:
        await task.update("reading", page=1, of=3)
        await task.update({"page": 2})
        await task.update(done=0.5)
        return "read"

    async with running(mesh, agent) as (replica,):
        events = [event async for event in caller.stream(agent.name, "go")]
    assert [event.n for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.state for event in events] == [weft.State.WORKING] * 4 + [None, weft.State.COMPLETED]
    assert (events[0].replica, events[0].attempt) == (replica.id, 1)
    assert (events[1].text, events[1].metadata) == ("reading", {"page": 1, "of": 3})
    assert events[2].message is not None
    assert events[2].message.data == {"page": 2}
    assert (events[3].message, events[3].metadata) == (None, {"done": 0.5})
    assert events[4].artifact is not None
    assert events[4].artifact.text == "read"


async def test_an_artifact_published_again_under_its_name_replaces_the_first(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("artifacts"))

    @agent.skill()
    async def work(task: weft.Task) -> None:
        first = await task.artifact("report.md", "draft", media_type="text/markdown")
        await task.artifact("figures", {"sum": 1}, description="what it comes to")
        again = await task.artifact("report.md", "final", media_type="text/markdown")
        other = await task.artifact("report.md", "its own", artifact_id="another")
        assert first == again != other == "another"

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go")
    assert [(a.name, a.text, a.data) for a in view.artifacts] == [
        ("report.md", "final", None),
        ("figures", "", {"sum": 1}),
        ("report.md", "its own", None),
    ]
    assert view.artifacts[0].parts == (weft.Text("final", "text/markdown"),)
    assert view.artifacts[1].description == "what it comes to"


@pytest.mark.parametrize("chunks", [["one ", "two ", "three"], ["alone"], []], ids=len)
async def test_a_stream_leaves_chunk_by_chunk_and_only_the_last_one_says_so(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, chunks: list[str]
) -> None:
    agent = weft.Agent(unique("streams"))

    @agent.skill()
    async def work(task: weft.Task) -> None:
        async def pieces() -> AsyncIterator[str]:
            for chunk in chunks:
                yield chunk

        await task.artifact("story", pieces())

    async with running(mesh, agent):
        events = [event async for event in caller.stream(agent.name, "go") if event.artifact is not None]
        view = await caller.send(agent.name, "go")
    count = max(1, len(chunks))
    assert [event.text for event in events] == (chunks or [""])
    assert [event.append for event in events] == [False] + [True] * (count - 1)
    assert [event.last_chunk for event in events] == [False] * (count - 1) + [True]
    assert view.artifacts[0].text == "".join(chunks)


async def test_a_chunk_leaves_before_the_stream_has_ended(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    """Fails if chunks are collected: the handler waits until its second chunk was seen, one is held as the last."""
    agent = weft.Agent(unique("live"))
    seen = threading.Event()

    @agent.skill()
    async def work(task: weft.Task) -> None:
        async def pieces() -> AsyncIterator[str]:
            yield "a"
            yield "b"
            yield "c"
            await task.step("wait", seen.wait, 10)
            yield "d"

        await task.artifact("story", pieces())

    async with running(mesh, agent):
        async for event in caller.stream(agent.name, "go"):
            if event.text == "b":
                seen.set()
    assert seen.is_set()


async def test_large_parts_travel_as_blobs_both_ways(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("large"))

    @agent.skill()
    async def double(task: weft.Task) -> weft.File:
        (given,) = task.files
        assert given.content is not None
        await task.artifact("text", "x" * (2 * MEGABYTE))
        await task.artifact("data", {"rows": ["y" * 1000] * 1000})
        return weft.File("twice.bin", given.content * 2, media_type="application/x-test")

    sent = bytes(range(256)) * (5 * MEGABYTE // 256)
    async with running(mesh, agent), await caller.submit(agent.name, weft.File("once.bin", sent)) as handle:
        view = await handle.result()
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    assert view.artifacts[0].text == "x" * (2 * MEGABYTE)
    assert view.artifacts[1].data == {"rows": ["y" * 1000] * 1000}
    assert view.artifacts[2].parts == (weft.File("twice.bin", sent * 2, media_type="application/x-test"),)
    assert max(len(event.data) for event in stored.events) < 10_000


async def test_files_and_data_come_in_with_their_names_and_types(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("files"))
    got: list[weft.Task] = []

    @agent.skill()
    async def look(task: weft.Task) -> None:
        got.append(task)

    message = [
        weft.Text("see these"),
        weft.Data({"n": 1}),
        weft.File("a.txt", b"A", media_type="text/plain"),
        weft.File("b", url="https://example.org/b"),
    ]
    async with running(mesh, agent):
        await caller.send(agent.name, message, metadata={"priority": "high"}, context_id="talk")
    task = got[0]
    assert (task.text, task.data, task.context_id, task.caller) == ("see these", {"n": 1}, "talk", "local")
    assert task.files == (message[2], message[3])
    assert task.metadata == {"priority": "high"}
    assert [m.text for m in task.history] == ["see these"]


async def test_fail_and_reject_end_the_task_with_their_reason_and_no_other_attempt(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("ends"))
    runs: list[str] = []

    @agent.skill()
    async def fail(task: weft.Task) -> None:
        runs.append("fail")
        raise weft.Fail("the page is gone")

    @agent.skill()
    async def reject(task: weft.Task) -> None:
        runs.append("reject")
        raise weft.Reject("not my business")

    async with running(mesh, agent):
        failed = await caller.send(agent.name, "", skill="fail")
        rejected = await caller.send(agent.name, "", skill="reject")
    assert (failed.state, failed.text) == (weft.State.FAILED, "the page is gone")
    assert (rejected.state, rejected.text) == (weft.State.REJECTED, "not my business")
    assert runs == ["fail", "reject"]


@pytest.mark.parametrize("where", ["status", "result", "question"])
async def test_what_is_too_large_for_one_event_fails_the_task_at_once_with_its_size(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, where: str
) -> None:
    """Fails if the handler runs again for what cannot succeed, or the message does not say what was too large."""
    agent = weft.Agent(unique("too-large"))
    runs: list[int] = []

    @agent.skill()
    async def work(task: weft.Task) -> Any:
        runs.append(task.attempt)
        if where == "status":
            await task.update("x" * 2 * MEGABYTE)
        if where == "question":
            await task.ask("x" * 2 * MEGABYTE)
        return [weft.Text("x" * 200_000)] * 8

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go")
    assert view.state is weft.State.FAILED
    assert "bytes" in view.text
    assert runs == [1]
