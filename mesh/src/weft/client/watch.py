"""What a caller knows of one task: its events in order, without gaps or repeats.

Events arrive live and from reads, in any order and more than once; their number within the task puts them
right. A gap is held back until it is filled or known to be unfillable (a number that was never stored).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Any

from a2a.types import a2a_pb2 as pb

from weft.core import blobs
from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.events import RawEvent
from weft_protocols.parts import Artifact, Message, Text
from weft_protocols.states import BY_LABEL, END_LABELS, INTERRUPTED, State

_BLOB = blobs.SCHEME.encode()
STOPS = END_LABELS | {state.label for state in INTERRUPTED}


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a task, as plain values."""

    n: int
    """Number within the task, contiguous from 1: what to resume after."""
    task_id: str
    agent: str
    state: State | None
    """The state the task is in from here on; None where it does not change."""
    message: Message | None = None
    artifact: Artifact | None = None
    append: bool = False
    """Whether the artifact's parts extend the one of the same id."""
    last_chunk: bool = True
    metadata: dict[str, Any] | None = None
    replica: str = ""
    """The replica that began or resumed the work, on the event that says so."""
    attempt: int = 0
    """Number of that attempt, from 1."""

    @property
    def text(self) -> str:
        """Text of the message or of the artifact's chunk."""
        if self.message is not None:
            return self.message.text
        parts = self.artifact.parts if self.artifact is not None else ()
        return "".join(part.text for part in parts if isinstance(part, Text))


def event_of(raw: RawEvent, proto: pb.StreamResponse, *, task_id: str, agent: str) -> Event:
    """Plain form of a stored event, which was decoded to `proto`."""
    which = proto.WhichOneof("payload")
    state = BY_LABEL.get(raw.state) or a2a.state_of(proto)
    if which == "artifact_update":
        update = proto.artifact_update
        return Event(
            raw.n,
            task_id,
            agent,
            None,
            artifact=a2a.artifact_from_proto(update.artifact),
            append=update.append,
            last_chunk=update.last_chunk,
        )
    if which == "message":
        return Event(raw.n, task_id, agent, State.COMPLETED, message=a2a.message_from_proto(proto.message))
    update_ = proto.status_update
    message = a2a.message_from_proto(update_.status.message) if update_.status.HasField("message") else None
    metadata = a2a.struct_to_dict(update_.metadata) if update_.HasField("metadata") else None
    replica, attempt = h.get(raw.headers, b"Weft-Replica"), h.get(raw.headers, b"Weft-Attempt")
    return Event(
        raw.n,
        task_id,
        agent,
        state,
        message=message,
        metadata=metadata,
        replica=replica.decode("utf-8", "replace") if replica else "",
        attempt=int(attempt) if attempt and attempt.isdigit() else 0,
    )


def as_update(raw: RawEvent, proto: pb.StreamResponse) -> pb.StreamResponse:
    """An event of a task: a message, which ends it, as the status update it amounts to (binding, section 9)."""
    if not proto.HasField("message"):
        return proto
    made = pb.StreamResponse()
    update = made.status_update
    update.task_id, update.context_id = proto.message.task_id, proto.message.context_id
    update.status.state = pb.TASK_STATE_COMPLETED
    update.status.message.CopyFrom(proto.message)
    stored = h.stamped(raw.headers, b"Nats-Time-Stamp")
    if stored is not None:
        with contextlib.suppress(ValueError):
            update.status.timestamp.FromJsonString(stored.decode("ascii", "replace"))
    return made


def _expire(changed: asyncio.Future[None]) -> None:
    if not changed.done():
        changed.set_exception(TimeoutError())


def _set(waiting: list[asyncio.Future[None]]) -> None:
    for changed in waiting:
        if not changed.done():
            changed.set_result(None)


def refuses(event: RawEvent) -> str:
    """Id of the follow-up that an event refuses; empty where it refuses none."""
    return (h.get(event.headers, b"Weft-In-Reply-To") or b"").decode("utf-8", "replace")


class TaskWatch:
    """The ordered events of one task, from after event `after` on."""

    def __init__(self, agent: str, task_id: str, *, after: int = 0) -> None:
        self.agent = agent
        self.task_id = task_id
        self.seen = after
        """Number of the last event in order."""
        self.last_heard = 0.0
        self.state = ""
        """`Weft-State` of the last event that had one."""
        self.stop: RawEvent | None = None
        """The event that last stopped the task."""
        self._early: dict[int, RawEvent] = {}
        self._events: deque[RawEvent] = deque()
        self._refusals: dict[str, RawEvent] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._beginning: list[asyncio.Future[None]] = []
        self._readers: list[asyncio.Queue[RawEvent | None]] = []
        self.failed: Exception | None = None
        """Why nothing more will come."""

    @property
    def stop_seq(self) -> int:
        """Stream sequence of the event that last stopped the task; 0 where unknown."""
        return self.stop.seq if self.stop is not None else 0

    @property
    def has_gap(self) -> bool:
        """Whether a later event is here and an earlier one is not."""
        return bool(self._early)

    @property
    def has_blobs(self) -> bool:
        """Whether an event may refer to a blob."""
        return any(_BLOB in event.data for event in self._events)

    @property
    def ended(self) -> bool:
        """Whether the task has reached its end."""
        return self.state in END_LABELS

    def feed(self, event: RawEvent, *, now: float) -> None:
        """Take one event from wherever it came."""
        self.last_heard = now
        if event.n <= self.seen:
            return
        if event.n > self.seen + 1:
            self._early.setdefault(event.n, event)
            return
        self._take(event)
        while self._early and (follows := self._early.pop(self.seen + 1, None)) is not None:
            self._take(follows)

    def skip_to(self, n: int, *, now: float) -> None:
        """Accept that no event before `n` exists that is not here yet."""
        for early in sorted(k for k in self._early if k < n):
            self._take(self._early.pop(early))
        self.seen = max(self.seen, n - 1)
        follows = self._early.pop(self.seen + 1, None)
        if follows is not None:
            self.feed(follows, now=now)

    def fail(self, error: Exception) -> None:
        """Wake everybody who waits with an error."""
        self.failed = error
        self._wake()
        _set(self._beginning)
        for queue in self._readers:
            queue.put_nowait(None)

    def _take(self, event: RawEvent) -> None:
        self.seen = event.n
        self._events.append(event)
        if self._beginning:
            _set(self._beginning)
        if event.reason and (refused := refuses(event)):
            # It only repeats the state, and concerns nobody but the sender of that message.
            self._refusals[refused] = event
            self._wake()
        elif event.state:
            self.state = event.state
            if event.state in STOPS:
                self.stop = event
                self._wake()
        for queue in self._readers:
            queue.put_nowait(event)

    async def stopped(
        self, *, after: int = 0, sent: int = 0, message_id: str = "", timeout: float | None = None
    ) -> str:
        """Wait until the task ends, or is interrupted by an event later than number `after`; its state label.

        Where a follow-up was stored with sequence `sent`, by an event stored after it.

        Raises:
            A2AError: the message `message_id` was refused.
            TimeoutError: neither happened within `timeout` seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            if (refusal := self._refusals.get(message_id)) is not None and (error := refusal.error) is not None:
                raise error
            stop = self.stop
            if self.ended:
                return self.state
            if self.state in STOPS and stop is not None and (stop.seq > sent if sent and stop.seq else stop.n > after):
                return self.state
            if self.failed is not None:
                raise self.failed
            await self._change(deadline)

    async def over(self) -> None:
        """Wait until the task has ended."""
        while not self.ended:
            if self.failed is not None:
                raise self.failed
            await self._change(None)

    async def begun(self, timeout: float) -> bool:
        """Wait until an event is here; False if none is within `timeout` seconds."""
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            while not self._events:
                if self.failed is not None:
                    raise self.failed
                await self._change(deadline, self._beginning)
        except TimeoutError:
            return False
        return True

    async def _change(self, deadline: float | None, waiting: list[asyncio.Future[None]] | None = None) -> None:
        """Wait for the next change; TimeoutError at `deadline` (loop time)."""
        # A timer and a future: asyncio.timeout around an Event costs every caller of every task three times that.
        loop = asyncio.get_running_loop()
        changed: asyncio.Future[None] = loop.create_future()
        timer = None if deadline is None else loop.call_at(deadline, _expire, changed)
        waiting = self._waiting if waiting is None else waiting
        waiting.append(changed)
        try:
            await changed
        finally:
            waiting.remove(changed)
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        _set(self._waiting)

    def last_event(self) -> RawEvent | None:
        """The last event in order."""
        return self._events[-1] if self._events else None

    def reader(self) -> asyncio.Queue[RawEvent | None]:
        """A queue of all events so far and to come, None after which nothing comes; hand it back to `release`."""
        queue: asyncio.Queue[RawEvent | None] = asyncio.Queue()
        for event in self._events:
            queue.put_nowait(event)
        if self.failed is not None:
            queue.put_nowait(None)
        self._readers.append(queue)
        return queue

    def release(self, queue: asyncio.Queue[RawEvent | None]) -> None:
        """Stop filling a reader's queue."""
        self._readers.remove(queue)

    def log(self) -> list[pb.StreamResponse]:
        """The events so far, without those that only refuse a follow-up."""
        return [event.decode() for event in self.happened()]

    def happened(self, *, after: int = 0) -> list[RawEvent]:
        """The events later than number `after`, as they are stored, without those that only refuse a follow-up."""
        return [event for event in self._events if event.n > after and not (event.reason and refuses(event))]

    def task(self) -> pb.Task:
        """The A2A task as the events so far describe it."""
        task = a2a.fold(self.log())
        task.id = task.id or self.task_id
        return task
