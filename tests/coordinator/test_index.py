"""The task index as a fold: laws that hold whatever is stored and however its reading interleaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pytest
from a2a.types import a2a_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from weft_coordinator.decide.index import MARK_EVERY, TaskIndex, Watermark, nanoseconds
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.events import group
from weft_protocols.states import BY_LABEL, State

AGENT = "worker"


@dataclass(frozen=True)
class Message:
    """A message as the stream has it."""

    kind: str
    subject: str
    seq: int
    data: bytes
    headers: bytes | None = None

    @property
    def time(self) -> str:
        return f"2026-01-01T00:{self.seq // 60 % 60:02d}:{self.seq % 60:02d}.5Z"


def task_id(name: str, caller: str = "local", agent: str = AGENT) -> str:
    return ids.task_id(caller, agent, name)


def created(seq: int, name: str, *, caller: str = "local", as_task: str = "", context: str = "ctx") -> Message:
    body = pb.SendMessageRequest(message=pb.Message(message_id=name, context_id=context))
    subject = subjects.task(AGENT, "07", caller, as_task or task_id(name, caller))
    return Message("task", subject, seq, body.SerializeToString())


def event(
    seq: int,
    name: str,
    n: int,
    label: str = "",
    *,
    caller: str = "local",
    origin: str = "o1",
    at: int = 0,
    extra: dict[str, str] | None = None,
) -> Message:
    body = pb.StreamResponse()
    if label:
        body.status_update.context_id = "from-event"
        body.status_update.status.state = int(BY_LABEL.get(label, State.COMPLETED))  # type: ignore[assignment]
        if at:
            body.status_update.status.timestamp.FromNanoseconds(at)
    else:
        body.artifact_update.context_id = "from-event"
    lines = {h.EVENT: str(n), **({h.STATE: label} if label else {}), **(extra or {})}
    subject = subjects.event(AGENT, task_id(name), caller, origin)
    return Message("event", subject, seq, body.SerializeToString(), h.block(h.fields(lines)))


def feed(index: TaskIndex, messages: Iterable[Message]) -> TaskIndex:
    for one in messages:
        take = index.created if one.kind == "task" else index.happened
        take(one.subject, one.seq, time=one.time, headers=one.headers, data=one.data)
    return index


def found(index: TaskIndex, name: str, caller: str = "local") -> tuple[State, int, int]:
    entry = index.find(AGENT, task_id(name), caller=caller)
    assert entry is not None
    return State(entry.state), entry.seq, entry.time


def test_a_task_is_submitted_when_it_is_stored_and_follows_its_events() -> None:
    index = feed(TaskIndex(), [created(1, "a")])
    assert found(index, "a") == (State.SUBMITTED, 1, nanoseconds("2026-01-01T00:00:01.5Z"))
    feed(index, [event(2, "a", 1, "working", at=5), event(3, "a", 2), event(4, "a", 3, "input-required", at=9)])
    assert found(index, "a") == (State.INPUT_REQUIRED, 4, 9)
    entry = index.find(AGENT, task_id("a"), caller="local")
    assert entry is not None
    assert (entry.events, entry.last, entry.context, entry.slice) == (3, 4, "ctx", "07")


def test_nothing_counts_after_the_end() -> None:
    index = feed(TaskIndex(), [created(1, "a"), event(2, "a", 1, "completed", at=5), event(3, "a", 2, "failed", at=6)])
    assert found(index, "a") == (State.COMPLETED, 2, 5)
    assert index.watermark == Watermark(1, 3)


def test_a_repeated_number_does_not_bring_an_old_state_back() -> None:
    log = [
        created(1, "a"),
        event(2, "a", 1, "working"),
        event(3, "a", 2, "input-required"),
        event(4, "a", 1, "working"),
    ]
    assert found(feed(TaskIndex(), log), "a")[0] == State.INPUT_REQUIRED


def test_a_refused_follow_up_leaves_the_state_and_its_time() -> None:
    told = {h.IN_REPLY_TO: "m", h.ERROR: "INVALID_REQUEST"}
    log = [created(1, "a"), event(2, "a", 1, "input-required", at=5), event(3, "a", 2, "working", at=9, extra=told)]
    assert found(feed(TaskIndex(), log), "a") == (State.INPUT_REQUIRED, 2, 5)


def test_a_status_without_a_time_of_its_own_has_the_brokers() -> None:
    log = [created(1, "a"), event(7, "a", 1, "message")]
    assert found(feed(TaskIndex(), log), "a") == (State.COMPLETED, 7, nanoseconds("2026-01-01T00:00:07.5Z"))


def test_a_dead_letter_is_told_once_and_kept() -> None:
    index = TaskIndex()
    feed(index, [created(1, "a"), event(2, "a", 1, "working", extra={h.ATTEMPT: "3", h.REPLICA: "r9"})])
    last = event(3, "a", 2, "failed", extra={h.DEAD_LETTER: "1"})
    told = index.happened(last.subject, last.seq, time=last.time, headers=last.headers, data=last.data)
    again = index.happened(last.subject, 4, time=last.time, headers=last.headers, data=last.data)
    assert told is not None
    assert told.dead
    assert again is None
    assert list(index.dead) == [told]
    assert told.detail is not None
    assert (told.detail.attempts, told.detail.replica) == (3, "r9")


def test_only_the_caller_and_the_operator_find_a_task() -> None:
    index = feed(TaskIndex(), [created(1, "a")])
    assert index.find(AGENT, task_id("a"), caller="mallory") is None
    assert index.find("_", task_id("a"), caller="mallory") is None
    assert index.find("other", task_id("a"), caller="local") is None
    for caller in ("local", "operator"):
        assert index.find(AGENT, task_id("a"), caller=caller) is index.find("_", task_id("a"), caller=caller)
        assert len(index.visible(caller)) == 1
    assert len(index.visible("mallory")) == 0


def test_a_creating_message_counts_only_under_the_id_that_belongs_to_it() -> None:
    index = feed(TaskIndex(), [created(1, "a", caller="mallory", as_task=task_id("b")), created(2, "b")])
    assert index.find(AGENT, task_id("b"), caller="mallory") is None
    assert found(index, "b")[0] == State.SUBMITTED
    assert index.skipped == 1


def test_events_for_another_caller_or_origin_are_no_word_on_the_task() -> None:
    index = feed(TaskIndex(), [event(1, "a", 1, "canceled", caller="mallory"), created(2, "a")])
    assert found(index, "a")[0] == State.SUBMITTED
    feed(index, [event(3, "a", 1, "failed", caller="mallory"), event(4, "a", 1, "working")])
    assert found(index, "a")[0] == State.WORKING
    feed(index, [event(5, "a", 2, "failed", origin="another")])
    assert found(index, "a")[0] == State.WORKING
    for agent in (AGENT, "_"):
        entry = index.find(agent, task_id("a"), caller="operator")
        assert entry is not None
        assert entry.caller == "local"


def test_a_task_known_by_its_events_alone_takes_its_context_from_them() -> None:
    index = feed(TaskIndex(), [event(1, "a", 1), event(2, "a", 2, "canceled")])
    entry = index.find(AGENT, task_id("a"), caller="local")
    assert entry is not None
    assert (entry.context, entry.state, entry.created) == ("from-event", State.CANCELED, 0)


def test_a_task_sent_without_a_context_is_its_own() -> None:
    entry = feed(TaskIndex(), [created(1, "a", context="")]).find(AGENT, task_id("a"), caller="local")
    assert entry is not None
    assert entry.context == task_id("a")


@pytest.mark.parametrize(
    "headers",
    [None, b"", b"NATS/1.0\r\n\r\n", b"NATS/1.0\r\nWeft-Event: -1\r\n\r\n", b"NATS/1.0\r\nWeft-Event: \xb2\r\n\r\n"],
)
def test_an_event_without_a_number_is_none(headers: bytes | None) -> None:
    index = feed(TaskIndex(), [created(1, "a")])
    subject = subjects.event(AGENT, task_id("a"), "local", "o1")
    assert index.happened(subject, 2, time="2026-01-01T00:00:00Z", headers=headers, data=b"") is None
    assert found(index, "a")[0] == State.SUBMITTED
    assert (index.skipped, index.watermark.events) == (1, 2)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_no_bytes_can_stop_the_fold(data: bytes, tail: bytes) -> None:
    index = TaskIndex()
    headers = b"NATS/1.0\r\nWeft-Event: 1\r\nWeft-State: working\r\n" + tail + b"\r\n\r\n"
    for seq, content_type in ((1, b""), (2, b"Content-Type: application/json\r\n")):
        block = headers.replace(b"\r\nWeft-State", b"\r\n" + content_type + b"Weft-State", 1)
        subject = subjects.event(AGENT, task_id(f"{seq}"), "local", "o")
        index.happened(subject, seq, time="2026-01-01T00:00:00Z", headers=block, data=data)
        subject = subjects.task(AGENT, "00", "local", task_id(f"{seq}"))
        index.created(subject, seq, time="2026-01-01T00:00:00Z", headers=block, data=data)
    assert index.watermark == Watermark(2, 2)


def test_finished_tasks_beyond_the_setting_leave_memory_once_they_are_stored() -> None:
    index = TaskIndex(keep=2)
    for i in range(5):
        feed(index, [created(10 * i + 1, f"{i}"), event(10 * i + 2, f"{i}", 1, "completed", at=i + 1)])
    feed(index, [created(100, "open"), event(101, "open", 1, "working")])

    def known() -> list[bool]:
        return [index.find(AGENT, task_id(f"{i}"), caller="local") is not None for i in range(5)]

    index.evict(12)
    assert (known(), index.partial) == ([False, False, True, True, True], True)
    index.evict(101)
    assert known() == [False, False, False, True, True]
    assert index.find(AGENT, task_id("open"), caller="local") is not None
    assert (len(index), index.states[State.COMPLETED]) == (6, 5)


def test_a_task_that_left_memory_comes_back_and_has_ended_still() -> None:
    index = feed(TaskIndex(keep=0), [created(1, "a"), event(2, "a", 1, "completed", at=5)])
    entry = index.find(AGENT, task_id("a"), caller="local")
    assert entry is not None
    index.evict(2)
    assert not index.knows("local", AGENT, task_id("a"))
    index.adopt([entry])
    feed(index, [event(3, "a", 2, "working")])
    assert found(index, "a") == (State.COMPLETED, 2, 5)
    assert len(index) == 1


def chained(seq: int, name: str, parent: str, *, caller: str = "boss", says: str = "boss") -> Message:
    """A creating message sent on behalf of a task of an agent."""
    message = created(seq, name, caller=caller)
    chain = f"someone/{task_id('x')},{says}/{task_id(parent, agent='boss')}"
    return Message("task", message.subject, seq, message.data, h.block(h.fields({h.CHAIN: chain})))


def boss(seq: int, name: str) -> Message:
    body = pb.SendMessageRequest(message=pb.Message(message_id=name, context_id="ctx"))
    subject = subjects.task("boss", "07", "local", task_id(name, agent="boss"))
    return Message("task", subject, seq, body.SerializeToString())


def test_a_parent_is_known_by_the_chains_last_item_if_that_agent_sent_the_message() -> None:
    index = feed(TaskIndex(), [boss(1, "top"), chained(2, "a", "top"), chained(3, "b", "top", says="other")])
    top = index.find("boss", task_id("top", agent="boss"), caller="local")
    child = index.find(AGENT, task_id("a", "boss"), caller="boss")
    other = index.find(AGENT, task_id("b", "boss"), caller="boss")
    assert top is not None
    assert child is not None
    assert other is not None
    assert (child.parent, other.parent) == (top.key, None)
    assert list(index.children(*top.key)) == [child]
    assert (index.root(child), index.root(other), index.parent(child)) == (top, other, top)


def test_finished_children_stay_in_memory_while_their_parent_is_at_work() -> None:
    index = feed(TaskIndex(keep=0), [boss(1, "top"), chained(2, "a", "top")])
    end = event(3, "a", 1, "completed")
    subject = subjects.event(AGENT, task_id("a", "boss"), "boss", "o1")
    feed(index, [Message("event", subject, 3, end.data, end.headers)])
    index.evict(3)
    top = task_id("top", agent="boss")
    assert len(index.children("boss", top)) == 1
    done = event(4, "top", 1, "completed")
    feed(index, [Message("event", subjects.event("boss", top, "local", "o1"), 4, done.data, done.headers)])
    index.evict(4)
    assert len(index.children("boss", top)) == 0
    assert len(index.visible("operator")) == 0


def test_what_changed_is_told_once() -> None:
    index = feed(TaskIndex(), [created(1, "a"), event(2, "a", 1, "working"), event(3, "a", 2)])
    changes = index.take_changes()
    assert [entry.task for entry in changes.moved] == [entry.task for entry in changes.entries] == [task_id("a")]
    assert changes.counts == (("local", AGENT, State.WORKING, 1),)
    feed(index, [event(4, "a", 3)])
    changes = index.take_changes()
    assert ([entry.task for entry in changes.entries], changes.moved, changes.counts) == ([task_id("a")], (), ())
    assert index.take_changes().entries == ()


def test_positions_of_a_long_log_are_remembered_now_and_then() -> None:
    index = feed(TaskIndex(), [created(1, "a"), *(event(n + 1, "a", n) for n in range(1, 3 * MARK_EVERY + 5))])
    entry = index.find(AGENT, task_id("a"), caller="local")
    assert entry is not None
    assert entry.detail is not None
    assert entry.detail.marks == [(n, n + 1) for n in (MARK_EVERY, 2 * MARK_EVERY, 3 * MARK_EVERY)]


LABELS = st.sampled_from(["", "working", "input-required", "completed", "failed", "message"])
STORED = st.lists(
    st.one_of(
        st.builds(
            lambda name, caller: ("task", name, caller, "", 0), st.sampled_from("abc"), st.sampled_from(["local", "x"])
        ),
        st.builds(
            lambda name, caller, label, n: ("event", name, caller, label, n),
            st.sampled_from("abc"),
            st.sampled_from(["local", "local", "x"]),
            LABELS,
            st.integers(1, 6),
        ),
    ),
    max_size=25,
)


def stream(plan: list[tuple[str, str, str, str, int]]) -> list[Message]:
    made = []
    for seq, (kind, name, caller, label, n) in enumerate(plan, 1):
        if kind == "task":
            made.append(created(seq, name, caller=caller, as_task=task_id(name)))
        else:
            made.append(event(seq, name, n, label, caller=caller, at=seq * 7))
    return made


@settings(max_examples=200, deadline=None)
@given(STORED, st.data())
def test_how_reading_the_two_kinds_interleaves_does_not_matter(
    plan: list[tuple[str, str, str, str, int]], data: st.DataObject
) -> None:
    messages = stream(plan)
    left = {kind: [m for m in messages if m.kind == kind] for kind in ("task", "event")}
    mixed = []
    while any(left.values()):
        kind = data.draw(st.sampled_from([kind for kind, rest in left.items() if rest]))
        mixed.append(left[kind].pop(0))
    one, other = feed(TaskIndex(), messages), feed(TaskIndex(), mixed)
    assert [facts(one, caller) for caller in ("local", "x")] == [facts(other, caller) for caller in ("local", "x")]
    for index in (one, other):
        assert +index.states == Counter(entry.state for entry in index.visible("operator"))


def facts(index: TaskIndex, caller: str) -> dict[str, dict[str, object]]:
    """Everything the index says of a caller's tasks."""
    return {entry.task: asdict(entry) for entry in index.visible(caller)}


@settings(max_examples=200, deadline=None)
@given(STORED)
def test_in_stream_order_a_task_ends_once_and_stays_ended(plan: list[tuple[str, str, str, str, int]]) -> None:
    index = TaskIndex()
    ended: dict[str, tuple[int, int]] = {}
    for message in stream(plan):
        feed(index, [message])
        for name in "abc":
            entry = index.find(AGENT, task_id(name), caller="local")
            if entry is None or not entry.created:
                continue
            if name in ended:
                assert (entry.state, entry.seq) == ended[name]
            elif entry.ended:
                ended[name] = entry.state, entry.seq


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:01Z", 1_000_000_000),
        ("1970-01-01T00:00:01.000000001Z", 1_000_000_001),
        ("1970-01-02T00:00:00.5Z", 86_400_500_000_000),
    ],
)
def test_times_are_read_to_the_nanosecond(text: str, expected: int) -> None:
    assert nanoseconds(text) == expected


def test_a_group_counts_as_each_of_its_events() -> None:
    dead = {"Weft-Dead-Letter": "1"}
    each = [
        event(0, "a", 1, "working", at=5, extra={"Weft-Replica": "r7", "Weft-Attempt": "3"}),
        event(0, "a", 2),
        event(0, "a", 3, "failed", at=9, extra=dead),
    ]
    lines = [one.headers.removeprefix(b"NATS/1.0\r\n").removesuffix(b"\r\n") for one in each if one.headers]
    head, body = group([(line, one.data) for line, one in zip(lines, each, strict=True)])
    index = feed(TaskIndex(), [created(1, "a")])
    letter = index.happened(each[0].subject, 4, time=each[0].time, headers=h.block(head), data=body)
    assert found(index, "a") == (State.FAILED, 4, 9)
    entry = index.find(AGENT, task_id("a"), caller="local")
    assert entry is not None
    assert entry.detail is not None
    assert (entry.events, entry.last, entry.dead, letter) == (3, 4, True, entry)
    assert (entry.detail.replica, entry.detail.attempts) == ("r7", 3)
