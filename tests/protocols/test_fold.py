"""Laws of folding events into a task."""

from __future__ import annotations

import pytest
from a2a.types import a2a_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from weft_protocols import a2a
from weft_protocols.states import State

TASK, CONTEXT = "0" * 32, "c-1"
LIVE = st.sampled_from([pb.TASK_STATE_WORKING, pb.TASK_STATE_INPUT_REQUIRED, pb.TASK_STATE_AUTH_REQUIRED])
ARTIFACT_IDS = st.sampled_from(["a", "b", "c"])
TEXT = st.text("xyz", min_size=1, max_size=4)


def status(state: pb.TaskState, text: str = "") -> pb.StreamResponse:
    event = pb.StreamResponse()
    event.status_update.task_id, event.status_update.context_id = TASK, CONTEXT
    event.status_update.status.state = state
    if text:
        event.status_update.status.message.parts.add(text=text)
    return event


def artifact(id_: str, *texts: str, append: bool = False) -> pb.StreamResponse:
    event = pb.StreamResponse()
    event.artifact_update.task_id, event.artifact_update.context_id = TASK, CONTEXT
    event.artifact_update.artifact.artifact_id = id_
    for text in texts:
        event.artifact_update.artifact.parts.add(text=text)
    event.artifact_update.append = append
    return event


STATUS = st.builds(status, LIVE, TEXT | st.just(""))
ARTIFACT = st.builds(lambda i, t, a: artifact(i, *t, append=a), ARTIFACT_IDS, st.lists(TEXT, max_size=3), st.booleans())
EVENTS = st.lists(STATUS | ARTIFACT, max_size=10)


def texts(task: pb.Task, id_: str) -> list[str]:
    return [part.text for a in task.artifacts if a.artifact_id == id_ for part in a.parts]


def in_order(arrived: list[tuple[int, pb.StreamResponse]]) -> list[pb.StreamResponse]:
    """What a reader makes of arrivals: by number, the first of each."""
    seen: dict[int, pb.StreamResponse] = {}
    for n, event in arrived:
        seen.setdefault(n, event)
    return [seen[n] for n in sorted(seen)]


@given(EVENTS)
def test_a_view_made_from_events_is_that_of_the_folded_task(events: list[pb.StreamResponse]) -> None:
    task = a2a.fold(events)
    task.id = task.id or TASK
    assert a2a.view_of(events, TASK, agent="a", last=3) == a2a.view(task, agent="a", events=3)


@given(EVENTS, st.integers(0, 10))
def test_a_snapshot_anywhere_and_the_rest_make_the_same_task(events: list[pb.StreamResponse], cut: int) -> None:
    snapshot = a2a.fold(events[:cut])
    assert a2a.fold(events[cut:], snapshot) == a2a.fold(events)


@given(EVENTS)
def test_folding_changes_neither_the_snapshot_nor_the_events(events: list[pb.StreamResponse]) -> None:
    start = pb.Task(id=TASK)
    before = [event.SerializeToString(deterministic=True) for event in events]
    a2a.fold(events, start)
    assert start == pb.Task(id=TASK)
    assert [event.SerializeToString(deterministic=True) for event in events] == before


@given(EVENTS, st.randoms(use_true_random=False))
def test_arrivals_repeated_and_out_of_order_make_the_same_task(
    events: list[pb.StreamResponse], random: st.DataObject
) -> None:
    numbered = list(enumerate(events, start=1))
    arrived = numbered + numbered[::2]
    random.shuffle(arrived)  # type: ignore[attr-defined]
    assert a2a.fold(in_order(arrived)) == a2a.fold(events)


def test_without_the_numbers_a_repeated_chunk_would_count_twice() -> None:
    chunks = [artifact("a", "x"), artifact("a", "y", append=True)]
    assert texts(a2a.fold([*chunks, chunks[1]]), "a") == ["x", "y", "y"]
    assert texts(a2a.fold(in_order([(1, chunks[0]), (2, chunks[1]), (2, chunks[1])])), "a") == ["x", "y"]


@given(EVENTS)
def test_every_artifact_is_there_once_with_what_followed_its_last_replacement(
    events: list[pb.StreamResponse],
) -> None:
    task = a2a.fold(events)
    expected: dict[str, list[str]] = {}
    for event in events:
        if event.WhichOneof("payload") != "artifact_update":
            continue
        update = event.artifact_update
        chunk = [part.text for part in update.artifact.parts]
        id_ = update.artifact.artifact_id
        expected[id_] = [*expected.get(id_, []), *chunk] if update.append else chunk
    assert {a.artifact_id: texts(task, a.artifact_id) for a in task.artifacts} == expected
    assert len(task.artifacts) == len(expected)
    assert [a.artifact_id for a in task.artifacts] == list(expected)


@given(EVENTS)
def test_the_state_is_that_of_the_last_event_that_has_one(events: list[pb.StreamResponse]) -> None:
    named = [state for event in events if (state := a2a.state_of(event)) is not None]
    assert State(a2a.fold(events).status.state) == (named[-1] if named else State.UNSPECIFIED)


@given(EVENTS)
def test_no_message_of_a_status_is_lost(events: list[pb.StreamResponse]) -> None:
    said = [e.status_update.status.message for e in events if e.status_update.status.HasField("message")]
    assert list(a2a.fold(events).history) == said


def test_a_task_takes_its_ids_from_its_first_event() -> None:
    for event in (status(pb.TASK_STATE_WORKING), artifact("a", "x")):
        task = a2a.fold([status(pb.TASK_STATE_WORKING), event])
        assert (task.id, task.context_id) == (TASK, CONTEXT)


def test_a_message_alone_completes_its_task() -> None:
    event = pb.StreamResponse(message={"message_id": "m", "task_id": TASK, "parts": [pb.Part(text="pong")]})
    view = a2a.view(a2a.fold([event]), agent="a", events=1)
    assert (view.id, view.state, view.text, view.events) == (TASK, State.COMPLETED, "pong", 1)


def test_metadata_of_status_events_adds_up() -> None:
    first, second = status(pb.TASK_STATE_WORKING), status(pb.TASK_STATE_WORKING)
    first.status_update.metadata.update({"step": 1, "of": 3})
    second.status_update.metadata.update({"step": 2})
    assert a2a.view(a2a.fold([first, second]), agent="a").metadata == {"step": 2, "of": 3}


def test_a_task_as_an_event_replaces_what_was_known() -> None:
    event = pb.StreamResponse(task=pb.Task(id=TASK, status={"state": pb.TASK_STATE_WORKING}))
    assert a2a.fold([artifact("a", "x"), event]) == event.task


def test_an_event_without_content_changes_nothing() -> None:
    assert a2a.fold([artifact("a", "x"), pb.StreamResponse()]) == a2a.fold([artifact("a", "x")])
    assert a2a.state_of(pb.StreamResponse()) is None


@pytest.mark.parametrize("number", [9, 99])
def test_a_state_of_a_newer_protocol_does_not_break_a_reader(number: int) -> None:
    event = pb.StreamResponse.FromString(status(pb.TASK_STATE_WORKING).SerializeToString())
    event.status_update.status.state = number  # type: ignore[assignment]
    assert a2a.state_of(event) is State.UNSPECIFIED
    assert a2a.view(a2a.fold([event]), agent="a").state is State.UNSPECIFIED


def test_the_label_of_a_message_is_completed_and_of_nonsense_unspecified() -> None:
    assert a2a.state_from_label("message") is State.COMPLETED
    assert a2a.state_from_label("input-required") is State.INPUT_REQUIRED
    assert a2a.state_from_label("nonsense") is State.UNSPECIFIED


@given(st.integers(-62_135_596_800, 253_402_300_799), st.integers(0, 999_999_999))
def test_the_time_of_a_view_is_that_of_the_last_status(seconds: int, nanos: int) -> None:
    event = status(pb.TASK_STATE_WORKING)
    event.status_update.status.timestamp.seconds = seconds
    event.status_update.status.timestamp.nanos = nanos // 1_000_000 * 1_000_000
    view = a2a.view(a2a.fold([event]), agent="a")
    written = event.status_update.status.timestamp.ToJsonString()
    assert (view.updated if nanos >= 1_000_000 else view.updated.replace(".000Z", "Z")) == written


@pytest.mark.parametrize(("seconds", "nanos"), [(2**62, 0), (-(2**62), 0), (0, -1), (0, 2**31 - 1)])
def test_a_time_that_is_none_leaves_the_view_without_one(seconds: int, nanos: int) -> None:
    event = status(pb.TASK_STATE_WORKING)
    event.status_update.status.timestamp.seconds = seconds
    event.status_update.status.timestamp.nanos = nanos
    assert a2a.view(a2a.fold([event]), agent="a").updated == ""
