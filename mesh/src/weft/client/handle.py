"""A task as its caller holds it: await its result, read its events, answer it or cancel it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, Self

from a2a.types import a2a_pb2 as pb

from weft.client import content
from weft.client.watch import Event, TaskWatch, as_update
from weft.core.broker import Broker, Subscription
from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.errors import DeadlineExceeded, UnsupportedOperation
from weft_protocols.events import RawEvent
from weft_protocols.parts import TaskView
from weft_protocols.states import MESSAGE


@dataclass(slots=True)
class Watched:
    """A task that a client follows, for all who wait for it there."""

    key: str
    watch: TaskWatch
    users: int = 0
    silent_checks: int = 0
    checking: bool = False
    context: str = ""
    anywhere: bool = False
    """Whether its events may go to another origin."""
    elsewhere: Subscription | None = None
    """Subscription for those."""

    def keep(self, subscription: Subscription) -> bool:
        """Take a subscription for them, unless somebody was quicker or nobody follows the task any more."""
        if self.elsewhere is not None or self.users <= 0:
            return False
        self.elsewhere = subscription
        return True


class Owner(Protocol):
    """What a handle needs of the client it belongs to (`weft.client.mesh.Mesh`)."""

    broker: Broker
    caller: str

    async def send(self, agent: str, message: Any, *, task_id: str | None = None, **options: Any) -> TaskView:
        """Send a message and wait."""
        ...

    async def _view(self, watch: TaskWatch) -> TaskView: ...

    async def _fill(self, watched: Watched) -> None: ...

    def _follow(
        self, watched: Watched, *, since: int, sent: int = 0, message_id: str = "", timeout: float | None = None
    ) -> AsyncGenerator[Event, None]: ...

    def _follow_raw(
        self, watched: Watched, *, since: int, sent: int, message_id: str, timeout: float | None, whole: bool = False
    ) -> AsyncGenerator[tuple[RawEvent, pb.StreamResponse], None]: ...

    async def _store_follow_up(
        self,
        handle: Handle,
        request: pb.SendMessageRequest,
        *,
        deadline: float | None,
        headers: Mapping[str, str] | None,
    ) -> int: ...

    async def _stop(self, watched: Watched, request: pb.CancelTaskRequest, *, timeout: float) -> None: ...

    async def _cancel(self, watched: Watched, *, message_id: str, reason: str, timeout: float) -> TaskView: ...

    async def _unwatch(self, watched: Watched) -> None: ...


class Handle:
    """A task that was accepted. Await its result, read its events, answer it or cancel it."""

    def __init__(
        self,
        mesh: Owner,
        watched: Watched,
        *,
        context_id: str,
        message_id: str = "",
        since: int = 0,
        sent: int = 0,
        repeated: bool = False,
        snapshot: pb.Task | None = None,
    ) -> None:
        self._mesh = mesh
        self._watched = watched
        self._message_id = message_id
        self._since = since
        self.sent = sent
        """Stream sequence of the follow-up this handle was made by, 0 for the creating message."""
        self.repeated = repeated
        """Whether the message had been sent before: the task may be anywhere in its life."""
        self.snapshot = snapshot
        """The task as it was when it was joined (`Mesh.join`), with its whole history."""
        self.agent = watched.watch.agent
        self.id = watched.watch.task_id
        self.context_id = context_id

    @property
    def mesh(self) -> Owner:
        """The caller whose handle this is."""
        return self._mesh

    @property
    def since(self) -> int:
        """Number of the last event before this handle: that of the snapshot's last event where it has one."""
        return self._since

    async def result(self, timeout: float | None = 60.0) -> TaskView:
        """The task once it ended or waits for its caller.

        Raises:
            DeadlineExceeded: neither happened within `timeout` seconds; the task goes on.
            A2AError: the agent refused the message.
            Unavailable, BrokerError: this client was closed, or its connection ended for good.
        """
        await self.stopped(timeout)
        if self.snapshot is not None:
            return a2a.view(await self.folded(pb.Task()), agent=self.agent, events=self._watched.watch.seen)
        return await self._mesh._view(self._watched.watch)

    async def stopped(self, timeout: float | None = 60.0) -> RawEvent | None:
        """Wait as `result` does, with its errors; the event that stopped the task, without making the task of it."""
        watch = self._watched.watch
        try:
            await watch.stopped(after=self._since, sent=self.sent, message_id=self._message_id, timeout=timeout)
        except TimeoutError:
            raise DeadlineExceeded(
                f"task {self.id} of {self.agent} has not ended within {timeout:g} s (it is "
                f"{watch.state or 'waiting to be picked up'} and goes on); follow it with its id"
            ) from None
        self._check_order()
        if watch.stop is not None and (error := watch.stop.error) is not None:
            raise error
        return watch.stop

    async def catch_up(self) -> None:
        """Read what happened since it was last heard of; a follow-up that came too late is raised as `result` does."""
        await self._mesh._fill(self._watched)
        self._check_order()

    async def begun(self, timeout: float) -> bool:
        """Wait until there is an event later than this handle; False if there is none within `timeout` seconds."""
        return await self._watched.watch.begun(timeout)

    async def events(self, *, timeout: float | None = None) -> AsyncGenerator[Event, None]:
        """Every event from the first, or from the follow-up on, until the task ends or waits for its caller.

        Raises:
            DeadlineExceeded: neither happened within `timeout` seconds; the task goes on.
            and what `result` raises.
        """
        events = self._mesh._follow(
            self._watched, since=self._since, sent=self.sent, message_id=self._message_id, timeout=timeout
        )
        async with aclosing(events):
            async for event in events:
                self._check_order()
                yield event
        self._check_order()

    async def raw_events(
        self, *, timeout: float | None = None
    ) -> AsyncGenerator[tuple[RawEvent, pb.StreamResponse], None]:
        """What `events` yields, as it is stored and as A2A's message with its blobs put back.

        After `Mesh.join` every event later than the snapshot, also those stored before the follow-up.
        """
        events = self._mesh._follow_raw(
            self._watched,
            since=self._since,
            sent=self.sent,
            message_id=self._message_id,
            timeout=timeout,
            whole=self.snapshot is not None,
        )
        async with aclosing(events):
            async for event in events:
                self._check_order()
                yield event
        self._check_order()

    async def task(self, timeout: float | None = 60.0) -> pb.Task:
        """What `result` returns, as A2A's task; without the caller's own messages unless it was joined."""
        await self.stopped(timeout)
        return await self.folded(pb.Task())

    async def folded(self, task: pb.Task) -> pb.Task:
        """Put the task as the events so far describe it into `task`, which is empty; blobs are put back.

        A joined task begins with its snapshot.
        """
        watch = self._watched.watch
        if self.snapshot is not None:
            task.CopyFrom(self.snapshot)
        expand = watch.has_blobs
        for raw in watch.happened(after=self._since if self.snapshot is not None else 0):
            event = as_update(raw, raw.decode())
            if expand:
                await content.expand_event(self._mesh.broker, event)
            a2a.apply(task, event)
        task.id, task.context_id = task.id or self.id, task.context_id or self.context_id
        return task

    async def answer(self) -> pb.Message | None:
        """The message the agent answered with instead of a task; None where there is a task, or no answer yet."""
        stop = self._watched.watch.stop
        if stop is None or stop.state != MESSAGE or stop.n != 1:
            return None
        event = stop.decode()
        await content.expand_event(self._mesh.broker, event)
        return event.message

    def _check_order(self) -> None:
        """A follow-up stored after the terminal event came too late, whoever read it (binding, section 12)."""
        watch = self._watched.watch
        if self.sent and watch.ended and 0 < watch.stop_seq < self.sent:
            raise UnsupportedOperation(
                f"task {self.id} of {self.agent} had ended as {watch.state} before the message came"
            )

    async def send(self, message: Any, **options: Any) -> TaskView:
        """Send a follow-up and wait for the next stop, as `Mesh.send` does."""
        return await self._mesh.send(self.agent, message, task_id=self.id, context_id=self.context_id, **options)

    @property
    def question(self) -> str:
        """Name of the question the task stopped with: the same when it is asked again after a takeover."""
        stop = self._watched.watch.stop
        if stop is None:
            return ""
        named = h.get(stop.headers, b"Weft-Question")
        return named.decode("utf-8", "replace") if named else f"event-{stop.n}"

    @property
    def told(self) -> dict[str, Any]:
        """Metadata of the event the task stopped with."""
        stop = self._watched.watch.stop
        update = stop.decode().status_update if stop is not None else pb.TaskStatusUpdateEvent()
        return a2a.struct_to_dict(update.metadata) if update.HasField("metadata") else {}

    @property
    def dead_letter(self) -> bool:
        """Whether the task was given up and left a dead letter."""
        stop = self._watched.watch.stop
        return stop is not None and h.get(stop.headers, b"Weft-Dead-Letter") == b"1"

    def go_on(self) -> None:
        """Have `result` wait for what the task stops with after what it stopped with now."""
        if self._watched.watch.stop is not None:
            self._since = max(self._since, self._watched.watch.stop.n)

    async def reply(self, request: pb.SendMessageRequest) -> None:
        """Send a follow-up, which may have been sent before by another process; `result` counts from where it did.

        Nothing is sent to a task that has ended.
        """
        if not self._watched.watch.ended:
            self._message_id = request.message.message_id
            await self._mesh._store_follow_up(self, request, deadline=None, headers=None)

    async def follow_up(
        self,
        request: pb.SendMessageRequest,
        *,
        deadline: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Make this the handle of a follow-up, given as A2A has it, which is changed as by `Mesh.submit_request`.

        Returns when it is stored; `result` then is that of the follow-up. Raises what `Mesh.follow_up_request` does.
        """
        self._message_id = request.message.message_id
        self.sent = await self._mesh._store_follow_up(self, request, deadline=deadline, headers=headers)

    async def stop(self, request: pb.CancelTaskRequest, *, timeout: float = 30.0) -> None:
        """`cancel` for a request as A2A has it, without making the task's view of it."""
        await self._mesh._stop(self._watched, request, timeout=timeout)

    async def cancel(self, *, reason: str = "", timeout: float = 30.0) -> TaskView:
        """Cancel the task and wait until it ended; see `Mesh.cancel`."""
        created_by = "" if self.sent else self._message_id
        return await self._mesh._cancel(self._watched, message_id=created_by, reason=reason, timeout=timeout)

    async def aclose(self) -> None:
        """Stop following. The task goes on."""
        await self._mesh._unwatch(self._watched)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
