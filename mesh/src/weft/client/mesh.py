"""A caller's connection to the mesh (`weft.connect()`)."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final, Self

from a2a.types import a2a_pb2 as pb

from weft.client import content, reads
from weft.client.handle import Handle, Watched
from weft.client.tools import ToolClient
from weft.client.watch import STOPS, Event, TaskWatch, event_of, refuses
from weft.core.broker import Broker, Subscription
from weft.core.supervise import Tasks
from weft_protocols import a2a, ids, subjects
from weft_protocols import headers as h
from weft_protocols.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    TaskNotCancelable,
    Unavailable,
    Unreachable,
    UnsupportedOperation,
    WeftError,
)
from weft_protocols.events import RawEvent, read_stored
from weft_protocols.parts import TaskView
from weft_protocols.resources import STREAM
from weft_protocols.states import END_LABELS, State

RESYNC: Final = (0.5, 1.0, 3.0, 10.0, 30.0)
"""Seconds of silence after which a waiting task's last event is read, again and again."""
TICK: Final = 0.25
"""Seconds between looks for silent tasks."""
GRACE: Final = 5.0
"""Seconds a caller waits beyond a task's deadline, for the host's own word on it."""


class Mesh:
    """A caller. Safe to share between tasks of one event loop.

    Sending is idempotent by `message_id`: the same message sent again, also by another process of the same
    identity, is the same task. Waiting ends with a deadline, never with a hang; a full window or stream is
    `Backpressure`.

    Args:
        caller: who it speaks as. Only a member of account MESH can speak as another than its own identity.
    """

    def __init__(self, broker: Broker, *, chain: str = "", caller: str | None = None) -> None:
        self.broker = broker
        self.caller = caller or broker.settings.identity
        self.origin = uuid.uuid4().hex[:12]
        self._chain = chain
        self._watched: dict[str, Watched] = {}
        self._readers = 0
        self._tasks = Tasks(f"mesh of {self.caller}")
        self._ticker: asyncio.TimerHandle | None = None
        self._live: Subscription | None = None
        self._undo: list[Callable[[], None]] = []
        self._failure: Exception | None = None
        self._tools: ToolClient | None = None
        self._secret = os.urandom(16)
        self._static = h.fields({h.VERSION: h.A2A_VERSION, h.ORIGIN: self.origin})
        self._create = h.fields({h.EXPECTED_SEQUENCE: "0"})

    async def start(self) -> Self:
        """Subscribe to the live events of this origin."""
        self._live = await self.broker.subscribe_raw(subjects.live(self.caller, self.origin), self._on_live)
        await self.broker.flush()
        self._undo = [self.broker.on_reconnect(self._resync_all), self.broker.on_lost(self._on_lost)]
        return self

    @property
    def tools(self) -> ToolClient:
        """The tools of the mesh, as this caller may use them."""
        if self._tools is None:
            self._tools = ToolClient(self.broker)
        return self._tools

    async def aclose(self) -> None:
        """Stop following everything; the connection itself belongs to whoever opened it."""
        self._fail(Unavailable("the mesh client was closed"))
        for undo in self._undo:
            undo()
        if self._ticker is not None:
            self._ticker.cancel()
        if self._tools is not None:
            await self._tools.aclose()
        await self._tasks.aclose()
        for subscription in (self._live, *(watched.elsewhere for watched in self._watched.values())):
            if subscription is not None:
                await subscription.close()

    def _fail(self, error: Exception) -> None:
        """Nothing more will be heard: wake everybody who waits."""
        if self._failure is None:
            self._failure = error
            for watched in self._watched.values():
                watched.watch.fail(error)

    def _on_lost(self) -> None:
        if self.broker.closed.is_set():
            self._fail(self.broker.failure or Unreachable("the connection to the broker is closed"))

    async def submit(
        self,
        agent: str,
        message: Any,
        *,
        message_id: str | None = None,
        context_id: str | None = None,
        skill: str | None = None,
        deadline: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Handle:
        """Create a task; returns when the broker has stored it, which is the acceptance.

        Args:
            agent: name of the agent.
            message: text, bytes, a part, several parts, or any JSON value.
            message_id: sent twice, it is one task; a new one if None.
            context_id: the conversation; one of its own, named as the task, if None.
            skill: the skill to run, where the agent has several.
            deadline: seconds from now after which the task is failed by its host.
            metadata: of the A2A message.
            headers: further headers, such as `traceparent`.

        Raises:
            InvalidName, InvalidParams, TooLarge: the input is wrong.
            Backpressure, Unreachable, TimedOut: not accepted for sure; sending again is safe.
        """
        message_id = message_id or os.urandom(16).hex()
        meta = dict(metadata or {})
        if skill is not None:
            meta[a2a.SKILL] = skill
        proto = content.to_message(message, message_id=message_id, context_id=context_id or "", metadata=meta)
        return await self.submit_request(
            agent, pb.SendMessageRequest(message=proto), deadline=deadline, headers=headers
        )

    async def submit_request(
        self,
        agent: str,
        request: pb.SendMessageRequest,
        *,
        deadline: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Handle:
        """`submit` for a request as A2A has it, which is changed: its context is set, large parts become blobs."""
        subjects.check_name(agent)
        message = request.message
        task_id = ids.task_id(self.caller, agent, message.message_id)
        # Derived, so that the message sent again goes to the same subject, where it is refused (binding, "Context id").
        context_id = message.context_id = message.context_id or task_id
        await content.shrink_message(self.broker, message)
        body = content.check_size(request.SerializeToString(), self.broker.max_payload)
        block = h.block(self._create, self._static, self._options(deadline, headers))
        watched = self._watch(agent, task_id)
        repeated = False
        try:
            subject = subjects.task(agent, ids.slice_of(context_id), self.caller, task_id)
            await self.broker.publish(subject, body, headers=block)
        except Conflict:
            # It was sent before, perhaps by another process, where its events go then.
            watched.anywhere = repeated = True
            self._tasks.start(self._resync(watched), name=f"resync {task_id}")
        except BaseException:
            await self._unwatch(watched)
            raise
        watched.context = context_id
        return Handle(self, watched, context_id=context_id, message_id=message.message_id, repeated=repeated)

    async def send(
        self,
        agent: str,
        message: Any,
        *,
        task_id: str | None = None,
        timeout: float | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> TaskView:
        """Send a message and wait until its task ended or waits for its caller (blocking SendMessage).

        With `task_id` it is a follow-up to that task, otherwise it creates one; see `submit` for the options.
        `timeout` bounds the waiting, in seconds; by default the deadline and a grace, or 60 s.

        Raises:
            UnsupportedOperation: follow-up to a task that has ended.
            TaskNotFound: no such task of this caller.
            and everything `submit` and `Handle.result` raise.
        """
        wait = timeout if timeout is not None else (deadline + GRACE if deadline is not None else 60.0)
        if task_id is None:
            handle = await self.submit(agent, message, deadline=deadline, **options)
        else:
            handle = await self._follow_up(agent, task_id, message=message, options={"deadline": deadline, **options})
        async with handle:
            return await handle.result(wait)

    async def stream(
        self,
        agent: str,
        message: Any,
        *,
        task_id: str | None = None,
        timeout: float | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> AsyncGenerator[Event, None]:
        """Send a message and yield its task's events until it ends or waits (SendStreamingMessage).

        Options and errors are those of `send`, but for `timeout`: by default the deadline and a grace, or none.
        """
        wait = deadline + GRACE if timeout is None and deadline is not None else timeout
        if task_id is None:
            handle = await self.submit(agent, message, deadline=deadline, **options)
        else:
            handle = await self._follow_up(agent, task_id, message=message, options={"deadline": deadline, **options})
        async with handle, aclosing(handle.events(timeout=wait)) as events:
            async for event in events:
                yield event

    async def subscribe(
        self, agent: str, task_id: str, *, after: int = 0, timeout: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Events of a task from after event `after` on, until it ends or waits; also after this caller restarted.

        Raises:
            TaskNotFound: no such task of this caller.
            Unavailable: nobody is there to read the log (the coordinator is not running).
            DeadlineExceeded: it neither ended nor waits after `timeout` seconds.
        """
        watched = await self._open(agent, task_id, after=after)
        try:
            async with aclosing(self._follow(watched, since=after, timeout=timeout)) as events:
                async for event in events:
                    yield event
        finally:
            await self._unwatch(watched)

    async def subscribe_raw(
        self, agent: str, task_id: str, *, after: int = 0, timeout: float | None = None
    ) -> AsyncGenerator[tuple[RawEvent, pb.StreamResponse], None]:
        """What `subscribe` yields, as it is stored and as A2A's message with its blobs put back."""
        watched = await self._open(agent, task_id, after=after)
        try:
            async with aclosing(self._follow_raw(watched, since=after, timeout=timeout)) as events:
                async for event in events:
                    yield event
        finally:
            await self._unwatch(watched)

    async def handle(self, agent: str, task_id: str) -> Handle:
        """A handle on a task that was sent before, also by another process of this identity."""
        watched = await self._open(agent, task_id, after=0)
        return Handle(self, watched, context_id=watched.context)

    async def join(self, agent: str, task_id: str) -> Handle:
        """Follow a task that exists from now on: `Handle.snapshot` is the task as it is, later events follow it.

        Raises:
            TaskNotFound: no such task of this caller.
            Unavailable: nobody is there to read it.
        """
        subjects.check_name(agent)
        subjects.check_task_id(task_id)
        watched = self._reader(agent, task_id, after=0)
        watched.anywhere = True
        watched.checking = True  # what comes before the snapshot's number is known is no gap
        try:
            await self._listen_elsewhere(watched)
            request = pb.GetTaskRequest(id=task_id)
            found = await reads.task(self.broker, agent, request, caller=self.caller)
        except BaseException:
            await self._unwatch(watched)
            raise
        watch = watched.watch
        watch.skip_to(found.events + 1, now=asyncio.get_running_loop().time())
        watched.checking = False
        watched.context = found.task.context_id
        state = State(found.task.status.state)
        if watch.seen == found.events and not watch.ended:
            watch.state = state.label
        return Handle(self, watched, context_id=watched.context, since=found.events, snapshot=found.task)

    async def result(self, agent: str, task_id: str, *, timeout: float | None = 60.0) -> TaskView:
        """The result of a task that was sent before."""
        async with await self.handle(agent, task_id) as handle:
            return await handle.result(timeout)

    async def get(self, agent: str, task_id: str, *, history_length: int | None = None) -> TaskView:
        """A task as it is now (GetTask)."""
        return await reads.get(self.broker, agent, task_id, caller=self.caller, history_length=history_length)

    async def list(
        self,
        agent: str | None = None,
        *,
        state: State | None = None,
        context_id: str | None = None,
        page_size: int = 50,
        page_token: str = "",
        include_artifacts: bool = False,
    ) -> reads.Page:
        """One page of this caller's tasks, the newest status first (ListTasks)."""
        request = pb.ListTasksRequest(
            context_id=context_id or "",
            page_size=page_size,
            page_token=page_token,
            include_artifacts=include_artifacts,
        )
        if state is not None:
            request.status = a2a.state_to_proto(state)
        return await reads.page(self.broker, agent, request, caller=self.caller)

    async def cancel(self, agent: str, task_id: str, *, reason: str = "", timeout: float = 30.0) -> TaskView:
        """Cancel a task and wait until it ended (CancelTask).

        Raises:
            TaskNotCancelable: it had ended before the cancel was stored, or ended otherwise before it had an effect.
            TaskNotFound: no such task of this caller.
            DeadlineExceeded: it has not ended within `timeout` seconds; the cancel stays in force.
        """
        watched = await self._open(agent, task_id, after=0)
        try:
            return await self._cancel(watched, reason=reason, timeout=timeout)
        finally:
            await self._unwatch(watched)

    async def _cancel(self, watched: Watched, *, message_id: str = "", reason: str, timeout: float) -> TaskView:
        request = pb.CancelTaskRequest(id=watched.watch.task_id)
        if reason:
            request.metadata.update({"reason": reason})
        await self._stop(watched, request, message_id=message_id, timeout=timeout)
        return await self._view(watched.watch)

    async def _stop(
        self, watched: Watched, request: pb.CancelTaskRequest, *, message_id: str = "", timeout: float
    ) -> None:
        """Cancel a task and wait until it ended; raises what `cancel` raises."""
        watch = watched.watch
        task = f"task {watch.task_id} of {watch.agent}"
        if watch.ended:
            raise TaskNotCancelable(f"{task} has ended as {watch.state}")
        context_id = await self._context(watched)
        sequence = await self._store_cancel(watch.agent, request, context_id=context_id, message_id=message_id)
        try:
            async with asyncio.timeout(timeout):
                await watch.over()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{task} has not ended within {timeout:g} s of its cancel, which stays in force"
            ) from None
        if watch.state != State.CANCELED.label or 0 < watch.stop_seq < sequence:
            raise TaskNotCancelable(f"{task} had ended as {watch.state} before")

    async def send_cancel(
        self, agent: str, task_id: str, *, context_id: str, message_id: str = "", reason: str = ""
    ) -> int:
        """Store a cancel, without waiting for its effect; its stream sequence.

        With the creating message's id it stands even if it overtakes the task it cancels.
        """
        request = pb.CancelTaskRequest(id=task_id)
        if reason:
            request.metadata.update({"reason": reason})
        return await self._store_cancel(agent, request, context_id=context_id, message_id=message_id)

    async def _store_cancel(
        self, agent: str, request: pb.CancelTaskRequest, *, context_id: str, message_id: str
    ) -> int:
        extra = {h.METHOD: "CancelTask", **({h.MESSAGE_ID: message_id} if message_id else {})}
        subject = subjects.input(agent, ids.slice_of(context_id), self.caller, request.id)
        block = h.block(self._static, h.fields(extra))
        return await self.broker.publish(subject, request.SerializeToString(), headers=block)

    async def _follow_up(self, agent: str, task_id: str, *, message: Any, options: dict[str, Any]) -> Handle:
        deadline, headers = options.pop("deadline", None), options.pop("headers", None)
        meta = dict(options.pop("metadata", None) or {})
        if (skill := options.pop("skill", None)) is not None:
            meta[a2a.SKILL] = skill
        proto = content.to_message(
            message,
            message_id=options.pop("message_id", None) or uuid.uuid4().hex,
            context_id=options.pop("context_id", None) or "",
            task_id=task_id,
            metadata=meta,
        )
        if options:
            raise TypeError(f"a follow-up takes no option {', '.join(options)}")
        request = pb.SendMessageRequest(message=proto)
        return await self.follow_up_request(agent, request, deadline=deadline, headers=headers)

    async def follow_up_request(
        self,
        agent: str,
        request: pb.SendMessageRequest,
        *,
        deadline: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Handle:
        """Send a follow-up as A2A has it, which is changed as by `submit_request`; returns when it is stored.

        Raises:
            UnsupportedOperation: its task has ended.
            InvalidRequest: the task belongs to another context.
            TaskNotFound: no such task of this caller.
            and what `submit` raises.
        """
        task_id = request.message.task_id
        watched = await self._open(agent, task_id, after=0)
        try:
            watch = watched.watch
            if watch.ended:
                raise UnsupportedOperation(f"task {task_id} of {agent} has ended as {watch.state}; send a new message")
            handle = Handle(self, watched, context_id=await self._context(watched), since=watch.seen)
            await handle.follow_up(request, deadline=deadline, headers=headers)
        except BaseException:
            await self._unwatch(watched)
            raise
        return handle

    async def _store_follow_up(
        self,
        handle: Handle,
        request: pb.SendMessageRequest,
        *,
        deadline: float | None,
        headers: Mapping[str, str] | None,
    ) -> int:
        message = request.message
        if message.context_id not in ("", handle.context_id):
            raise InvalidRequest(f"task {handle.id} belongs to context {handle.context_id}, not {message.context_id}")
        message.task_id, message.context_id = handle.id, handle.context_id
        await content.shrink_message(self.broker, message)
        body = content.check_size(request.SerializeToString(), self.broker.max_payload)
        deduplicate = h.fields({h.DEDUPLICATION_ID: self._own_id(handle.id, message.message_id)})
        block = h.block(self._static, deduplicate, self._options(deadline, headers))
        subject = subjects.input(handle.agent, ids.slice_of(handle.context_id), self.caller, handle.id)
        return await self.broker.publish(subject, body, headers=block)

    def _own_id(self, task_id: str, message_id: str) -> str:
        """An id nobody else can have used up: the broker compares it with those of everybody's messages."""
        return hashlib.sha256(self._secret + f"{task_id}:{message_id}".encode()).hexdigest()[:32]

    async def _view(self, watch: TaskWatch) -> TaskView:
        log = watch.log()
        if watch.has_blobs:
            for event in log:
                await content.expand_event(self.broker, event)
        return a2a.view_of(log, watch.task_id, agent=watch.agent, last=watch.seen)

    async def _context(self, watched: Watched) -> str:
        if not watched.context:
            watched.context = await self._read_context(watched)
        return watched.context

    async def _read_context(self, watched: Watched) -> str:
        last = watched.watch.last_event()
        if last is not None:
            event = last.decode()
            which = event.WhichOneof("payload")
            if which is not None:
                context_id = getattr(getattr(event, which), "context_id", "")
                if context_id:
                    return str(context_id)
        return (await self.get(watched.watch.agent, watched.watch.task_id, history_length=0)).context_id

    def _options(self, deadline: float | None, extra: Mapping[str, str] | None) -> bytes:
        values: dict[str, str] = {}
        if deadline is not None:
            values[h.DEADLINE] = str(int((time.time() + deadline) * 1000))
        if self._chain:
            values[h.CHAIN] = self._chain
        if extra:
            values.update(extra)
        return h.fields(values) if values else b""

    # Following tasks ---------------------------------------------------------------------------

    def _watch(self, agent: str, task_id: str) -> Watched:
        if self._failure is not None:
            raise self._failure
        key = f"{agent}.{task_id}"
        watched = self._watched.get(key)
        if watched is None:
            watched = Watched(key, TaskWatch(agent, task_id))
            watched.watch.last_heard = asyncio.get_running_loop().time()
            self._watched[key] = watched
            self._keep_ticking()
        watched.users += 1
        return watched

    def _reader(self, agent: str, task_id: str, *, after: int) -> Watched:
        """A view of the task of its own, for who begins in the middle of its log."""
        if self._failure is not None:
            raise self._failure
        self._readers += 1
        watched = Watched(f"{agent}.{task_id}/{self._readers}", TaskWatch(agent, task_id, after=after), users=1)
        watched.watch.last_heard = asyncio.get_running_loop().time()
        self._watched[watched.key] = watched
        self._keep_ticking()
        return watched

    async def _open(self, agent: str, task_id: str, *, after: int) -> Watched:
        """Follow a task that exists: listen first, then read what was before."""
        subjects.check_name(agent)
        subjects.check_task_id(task_id)
        if self._failure is not None:
            raise self._failure
        known = self._watched.get(f"{agent}.{task_id}")
        if known is not None and after == 0 and (known.watch.seen or not known.anywhere):
            known.users += 1
            return known
        watched = self._reader(agent, task_id, after=after) if after else self._watch(agent, task_id)
        watched.anywhere = True
        try:
            await self._listen_elsewhere(watched)
            await self._fill(watched)
            if after and watched.watch.seen == after:
                view = await self.get(agent, task_id, history_length=0)
                watched.watch.seen = min(after, view.events)  # or its end, which comes before, would be no news
                if view.state.terminal and view.events <= after:
                    watched.watch.state = view.state.label
        except BaseException:
            await self._unwatch(watched)
            raise
        return watched

    async def _listen_elsewhere(self, watched: Watched) -> None:
        if watched.elsewhere is not None:
            return
        pattern = subjects.live_task(self.caller, watched.watch.agent, watched.watch.task_id)

        def feed(subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
            self._feed(watched, data, headers)

        subscription = await self.broker.subscribe_raw(pattern, feed)
        if watched.keep(subscription):
            await self.broker.flush()
        else:
            await subscription.close()

    async def _unwatch(self, watched: Watched) -> None:
        watched.users -= 1
        if watched.users > 0:
            return
        if self._watched.get(watched.key) is watched:
            del self._watched[watched.key]
        if watched.elsewhere is not None:
            await watched.elsewhere.close()

    async def _follow(
        self, watched: Watched, *, since: int, sent: int = 0, message_id: str = "", timeout: float | None = None
    ) -> AsyncGenerator[Event, None]:
        watch = watched.watch
        following = self._follow_raw(watched, since=since, sent=sent, message_id=message_id, timeout=timeout)
        async with aclosing(following) as found:
            async for raw, proto in found:
                yield event_of(raw, proto, task_id=watch.task_id, agent=watch.agent)

    async def _follow_raw(
        self,
        watched: Watched,
        *,
        since: int,
        sent: int = 0,
        message_id: str = "",
        timeout: float | None = None,
        whole: bool = False,
    ) -> AsyncGenerator[tuple[RawEvent, pb.StreamResponse], None]:
        """Events after number `since`, or after sequence `sent`; `whole`: all after `since`, to a stop after `sent`."""
        watch = watched.watch
        queue = watch.reader()
        until = None if timeout is None else asyncio.get_running_loop().time() + timeout
        try:
            while not (watch.ended and queue.empty()):
                raw = await (queue.get() if until is None else _until(queue, until, watch))
                if raw is None:
                    raise watch.failed or Unavailable("nothing more will be heard of the task")
                early = (raw.seq <= sent) if sent and raw.seq else (raw.n <= since)
                if early and (raw.n <= since or not whole):
                    continue
                if raw.reason and (refused := refuses(raw)) and refused != message_id:
                    continue
                if (error := raw.error) is not None:
                    raise error
                proto = raw.decode()
                await content.expand_event(self.broker, proto)
                yield raw, proto
                if raw.state in (END_LABELS if early else STOPS):
                    return
        finally:
            watch.release(queue)

    def _on_live(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        # Any agent can write events for this origin under its own name: only the task's agent is listened to.
        watched = self._watched.get(subject[subject.rfind(b".", 0, -33) + 1 :].decode())
        if watched is not None:
            self._feed(watched, data, headers)

    def _feed(self, watched: Watched, data: bytes, headers: bytes | None) -> None:
        now = asyncio.get_running_loop().time()
        for event in read_stored(bytes(data), headers):
            watched.watch.feed(event, now=now)
        watched.silent_checks = 0
        if watched.watch.has_gap and not watched.checking:
            self._tasks.start(self._resync(watched), name=f"fill {watched.watch.task_id}")

    def _tick(self) -> None:
        self._ticker = None
        now = asyncio.get_running_loop().time()
        for watched in list(self._watched.values()):
            quiet_for = RESYNC[min(watched.silent_checks, len(RESYNC) - 1)]
            if not watched.watch.ended and not watched.checking and now - watched.watch.last_heard > quiet_for:
                watched.silent_checks += 1
                watched.watch.last_heard = now
                self._tasks.start(self._resync(watched), name=f"resync {watched.watch.task_id}")
        self._keep_ticking()

    def _keep_ticking(self) -> None:
        if self._ticker is None and self._watched and self._failure is None:
            self._ticker = asyncio.get_running_loop().call_later(TICK, self._tick)

    def _resync_all(self) -> None:
        for watched in list(self._watched.values()):
            if not watched.watch.ended:
                self._tasks.start(self._resync(watched), name=f"resync {watched.watch.task_id}")

    async def _resync(self, watched: Watched) -> None:
        """Find out what was missed. Failing is no error: the next look comes."""
        if watched.checking:
            return
        watched.checking = True
        watch = watched.watch
        try:
            if watched.anywhere:
                await self._listen_elsewhere(watched)
            subject = subjects.event(watch.agent, watch.task_id, self.caller, self.origin)
            last = await self.broker.last(STREAM, subject)
            if last is not None:
                newest = read_stored(last.data, last.headers, seq=last.seq)
                if newest[-1].n <= watch.seen:
                    return
                for event in newest:
                    watch.feed(event, now=asyncio.get_running_loop().time())
                if not watch.has_gap:
                    return
            elif not watched.anywhere:
                return
            await self._fill(watched)
        except WeftError as error:
            reads.log.debug("resync of %s: %s", watch.task_id, error)
        finally:
            watched.checking = False

    async def _fill(self, watched: Watched) -> None:
        """Read the log from after what is known."""
        watch = watched.watch
        while not watch.ended:
            after = watch.seen
            page = await reads.events_after(self.broker, watch.agent, watch.task_id, caller=self.caller, after=after)
            if not page or page[-1].n <= after:
                return
            now = asyncio.get_running_loop().time()
            for event in page:
                watch.skip_to(event.n, now=now)  # what a page leaves out was never stored
                watch.feed(event, now=now)

    @property
    def following(self) -> int:
        """Number of tasks this client follows."""
        return len(self._watched)


async def _until(queue: asyncio.Queue[RawEvent | None], until: float, watch: TaskWatch) -> RawEvent | None:
    try:
        async with asyncio.timeout_at(until):
            return await queue.get()
    except TimeoutError:
        raise DeadlineExceeded(
            f"task {watch.task_id} of {watch.agent} has not ended in time (it is "
            f"{watch.state or 'waiting to be picked up'} and goes on); follow it with its id"
        ) from None


@asynccontextmanager
async def connect(
    identity: str | None = None, *, home: str | os.PathLike[str] | None = None, timeout: float = 5.0
) -> AsyncIterator[Mesh]:
    """A connection to the mesh as `identity`.

    Settings come from WEFT_URL, WEFT_SEED_FILE and WEFT_IDENTITY, or from the `.weft` folder of the project
    (`home`, or found from the current directory upward). The default identity is `local`.

    Raises:
        Unavailable: there is no mesh here, or it is not running.
        InvalidConfig: the environment is contradictory, or a file is damaged.
        Unreachable: its broker does not answer within `timeout` seconds.
        NotAuthenticated: the mesh does not know this identity, or the broker refused it.
    """
    from weft.core.config import load_settings

    settings = load_settings(identity, home=None if home is None else Path(home))
    broker = await Broker.connect(settings, name=f"client {settings.identity}", timeout=timeout)
    try:
        mesh = await Mesh(broker).start()
        try:
            yield mesh
        finally:
            await mesh.aclose()
    finally:
        await broker.close()


__all__ = ["Event", "Handle", "Mesh", "WeftError", "connect"]
