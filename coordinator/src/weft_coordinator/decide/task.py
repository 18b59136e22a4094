"""GetTask: one A2A task out of its events, its caller's messages and, where there is one, a snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from a2a.types import a2a_pb2 as pb

from weft_coordinator.decide.index import Entry, nanoseconds
from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.errors import A2AError
from weft_protocols.events import RawEvent
from weft_protocols.states import END_LABELS, MESSAGE, State


@dataclass(frozen=True, slots=True)
class Said:
    """A message of the caller's, as it is stored."""

    seq: int
    message: pb.Message


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The task as it was folded by its worker, up to and including the event that names it."""

    seq: int
    """Sequence of that event."""
    task: pb.Task


def assemble(
    entry: Entry,
    events: Sequence[RawEvent],
    *,
    creation: Said | None = None,
    followed: Sequence[Said] = (),
    snapshot: Snapshot | None = None,
) -> pb.Task | None:
    """The task, its history in the order in which things were said.

    Args:
        entry: What the index knows of it.
        events: In stream order; repeated numbers and holes are accepted, nothing counts after the end.
        creation: The message that created it.
        followed: The caller's further messages, in stream order.
        snapshot: What the events extend; those before it need not be given.

    Returns:
        None if the snapshot lacks a message that was said before it: only the whole log then gives the order.
    """
    task = pb.Task()
    known: set[str] = set()
    if snapshot is not None:
        task.CopyFrom(snapshot.task)
        known = {message.message_id for message in task.history}
        if any(one.seq < snapshot.seq and one.message.message_id not in known for one in followed):
            return None
        if creation is not None and creation.message.message_id not in known:
            task.history.insert(0, creation.message)
            known.add(creation.message.message_id)
    refused = {h.get(event.headers, b"Weft-In-Reply-To") for event in events}
    waiting = [*((creation,) if creation is not None else ()), *followed]
    waiting = [one for one in waiting if one.message.message_id.encode() not in refused]
    for event in _in_order(events):
        while waiting and waiting[0].seq < event.seq:
            _say(task, waiting.pop(0).message, known)
        if h.get(event.headers, b"Weft-In-Reply-To") is None:
            _apply(task, event, known)
        if event.state in END_LABELS:
            waiting.clear()
            break
    for one in waiting:
        _say(task, one.message, known)
    return _complete(task, entry)


def trim(task: pb.Task, *, history_length: int | None, artifacts: bool = True) -> pb.Task:
    """Leave out, in place, what was not asked for: all but the last messages, the artifacts (A2A v1.0.1, 3.2.4)."""
    if history_length is not None:
        del task.history[: max(0, len(task.history) - history_length)]
    if not artifacts:
        task.ClearField("artifacts")
    return task


def _in_order(events: Sequence[RawEvent]) -> list[RawEvent]:
    """By number, each once: what was not acknowledged was sent again later."""
    first: dict[int, RawEvent] = {}
    for event in events:
        first.setdefault(event.n, event)
    return [first[n] for n in sorted(first)]


def _say(task: pb.Task, message: pb.Message, known: set[str]) -> None:
    if message.message_id not in known:
        known.add(message.message_id)
        task.history.append(message)


def _apply(task: pb.Task, event: RawEvent, known: set[str]) -> None:
    before, state = len(task.history), State(task.status.state)
    with contextlib.suppress(A2AError):
        a2a.apply(task, event.decode())
    # The header is what lists and workers go by: a body that says something else does not change that.
    told = a2a.state_from_label(event.state)
    _put(task, told or state)
    if told and (event.state == MESSAGE or not task.status.HasField("timestamp")):
        _stamp(task, nanoseconds((h.stamped(event.headers, b"Nats-Time-Stamp") or b"1970-01-01T00:00:00Z").decode()))
    if len(task.history) > before and task.history[-1].message_id:
        if task.history[-1].message_id in known:
            del task.history[-1]
        else:
            known.add(task.history[-1].message_id)


def _complete(task: pb.Task, entry: Entry) -> pb.Task:
    """What every task has, whoever wrote its events."""
    task.id, task.context_id = entry.task, entry.context
    for message in task.history:
        message.task_id, message.context_id = entry.task, entry.context
    if not task.HasField("status") or task.status.state == pb.TASK_STATE_UNSPECIFIED:
        _put(task, State.SUBMITTED)
        _stamp(task, entry.created or entry.time)
    return task


def _put(task: pb.Task, state: State) -> None:
    task.status.state = int(state)  # type: ignore[assignment]  # the stubs know enum values by their type only


def _stamp(task: pb.Task, at: int) -> None:
    task.status.timestamp.seconds, task.status.timestamp.nanos = divmod(at, 1_000_000_000)
