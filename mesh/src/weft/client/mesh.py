"""A caller's connection to the mesh (`weft.connect()`)."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from a2a.types import a2a_pb2 as pb

from weft.client import content, reads
from weft.client.watch import Event, TaskWatch, event_of
from weft.core.broker import Broker, Subscription
from weft.core.supervise import Tasks
from weft_protocols import a2a, ids, subjects
from weft_protocols import headers as h
from weft_protocols.errors import (
    BrokerError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    TaskNotCancelable,
    TaskNotFound,
    Unavailable,
    UnsupportedOperation,
    WeftError,
)
from weft_protocols.events import RawEvent
from weft_protocols.parts import TaskView
from weft_protocols.resources import STREAM
from weft_protocols.states import State

RESYNC: Final = (0.5, 1.0, 3.0, 10.0, 30.0)
"""Seconds of silence after which a waiting task's last event is read, again and again."""
TICK: Final = 0.25
"""Seconds between looks for silent tasks."""
GRACE: Final = 5.0
"""Seconds a caller waits beyond a task's deadline, for the host's own word on it."""


@dataclass(slots=True)
class _Watched:
    key: str
    watch: TaskWatch
    users: int = 0
    silent_checks: int = 0
    checking: bool = False
    elsewhere: Subscription | None = None
    """Subscription for a task whose events go to another origin."""


class Handle:
    """A task that was accepted. Await its result, read its events, answer it or cancel it."""

    def __init__(self, mesh: Mesh, agent: str, *, task_id: str, context_id: str, watched: _Watched, since: int) -> None:
        self._mesh = mesh
        self._watched = watched
        self._since = since
        self.sent = 0
        """Stream sequence of the follow-up this handle was made by, 0 for the creating message."""
        self.agent = agent
        self.id = task_id
        self.context_id = context_id

    async def result(self, timeout: float | None = 60.0) -> TaskView:
        """The task once it ended or waits for its caller.

        Raises:
            DeadlineExceeded: neither happened within `timeout` seconds; the task goes on.
            A2AError: the agent refused the message.
        """
        watch = self._watched.watch
        try:
            async with asyncio.timeout(timeout):
                await watch.stopped(after=self._since)
        except TimeoutError:
            raise DeadlineExceeded(
                f"task {self.id} of {self.agent} has not ended within {timeout:g} s (it is "
                f"{watch.state or 'waiting to be picked up'} and goes on); follow it with its id"
            ) from None
        self._check_order()
        last = watch.last_event()
        if last is not None and (error := last.error) is not None:
            raise error
        return a2a.view(await content.expand_task(self._mesh.broker, watch.task()), agent=self.agent, events=watch.seen)

    async def events(self) -> AsyncIterator[Event]:
        """Every event from the first, until the task ends or waits for its caller."""
        async for event in self._mesh._follow(self._watched, self.id, since=self._since):
            self._check_order()
            yield event

    def _check_order(self) -> None:
        """A follow-up stored after the terminal event came too late, whoever read it (binding, section "follow-ups")."""
        watch = self._watched.watch
        if watch.ended and 0 < watch.stop_seq < self.sent:
            raise UnsupportedOperation(
                f"task {self.id} of {self.agent} had ended as {watch.state} before the message came"
            )

    async def send(self, message: Any, **options: Any) -> TaskView:
        """Send a follow-up and wait for the next stop, as `Mesh.send` does."""
        return await self._mesh.send(self.agent, message, task_id=self.id, context_id=self.context_id, **options)

    async def cancel(self, *, reason: str = "", timeout: float = 30.0) -> TaskView:
        """Cancel the task and wait until it ended."""
        return await self._mesh.cancel(self.agent, self.id, reason=reason, timeout=timeout)

    async def aclose(self) -> None:
        """Stop following. The task goes on."""
        await self._mesh._unwatch(self._watched)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class Mesh:
    """A caller. Safe to share between tasks of one event loop.

    Sending is idempotent by `message_id`: the same message sent again, also by another process of the same
    identity, is the same task. Waiting ends with a deadline, never with a hang; a full window or stream is
    `Backpressure`.
    """

    def __init__(self, broker: Broker, *, chain: str = "") -> None:
        self.broker = broker
        self.caller = broker.settings.identity
        self.origin = uuid.uuid4().hex[:12]
        self._chain = chain
        self._watched: dict[str, _Watched] = {}
        self._readers = 0
        self._tasks = Tasks(f"mesh of {self.caller}")
        self._ticker: asyncio.TimerHandle | None = None
        self._static = h.fields({h.VERSION: h.A2A_VERSION, h.ORIGIN: self.origin})
        self._create = h.fields({h.EXPECTED_SEQUENCE: "0"})

    async def start(self) -> Self:
        """Subscribe to the live events of this origin."""
        await self.broker.subscribe_raw(subjects.live(self.caller, self.origin), self._on_live)
        await self.broker.flush()
        self.broker.on_reconnect(self._resync_all)
        return self

    async def aclose(self) -> None:
        """Stop following everything; the connection itself belongs to whoever opened it."""
        if self._ticker is not None:
            self._ticker.cancel()
        for watched in self._watched.values():
            watched.watch.fail(Unavailable("the mesh client was closed"))
        await self._tasks.aclose()

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
        subjects.check_name(agent)
        message_id = message_id or os.urandom(16).hex()
        task_id = ids.task_id(self.caller, agent, message_id)
        # Derived, so that the message sent again goes to the same subject, where it is refused (binding, "Context id").
        context_id = context_id or task_id
        meta = dict(metadata or {})
        if skill is not None:
            meta[a2a.SKILL] = skill
        proto = await content.to_message(
            self.broker, message, message_id=message_id, context_id=context_id, metadata=meta
        )
        body = content.check_size(pb.SendMessageRequest(message=proto).SerializeToString(), self.broker.max_payload)
        block = h.block(self._create, self._static, self._options(deadline, headers))
        watched = self._watch(agent, task_id)
        try:
            subject = subjects.task(agent, ids.slice_of(context_id), self.caller, task_id)
            await self.broker.publish(subject, body, headers=block)
        except Conflict:
            await self._listen_elsewhere(watched)
            self._tasks.start(self._resync(watched), name=f"resync {task_id}")
        except BaseException:
            await self._unwatch(watched)
            raise
        return Handle(self, agent, task_id=task_id, context_id=context_id, watched=watched, since=0)

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

    async def stream(self, agent: str, message: Any, **options: Any) -> AsyncIterator[Event]:
        """Send a message and yield its task's events until it ends or waits (SendStreamingMessage)."""
        task_id = options.pop("task_id", None)
        if task_id is None:
            handle = await self.submit(agent, message, **options)
        else:
            handle = await self._follow_up(agent, task_id, message=message, options=options)
        async with handle:
            async for event in handle.events():
                yield event

    async def subscribe(self, agent: str, task_id: str, *, after: int = 0) -> AsyncIterator[Event]:
        """Events of a task from after event `after` on, until it ends or waits; also after this caller restarted.

        Raises:
            TaskNotFound: no such task of this caller.
            Unavailable: nobody is there to read the log (the coordinator is not running).
        """
        watched = await self._open(agent, task_id, after=after)
        try:
            async for event in self._follow(watched, task_id, since=after):
                yield event
        finally:
            await self._unwatch(watched)

    async def handle(self, agent: str, task_id: str) -> Handle:
        """A handle on a task that was sent before, also by another process of this identity."""
        watched = await self._open(agent, task_id, after=0)
        return Handle(self, agent, task_id=task_id, context_id="", watched=watched, since=0)

    async def result(self, agent: str, task_id: str, *, timeout: float | None = 60.0) -> TaskView:
        """The result of a task that was sent before."""
        async with await self.handle(agent, task_id) as handle:
            return await handle.result(timeout)

    async def get(self, agent: str, task_id: str, *, history_length: int | None = None) -> TaskView:
        """A task as it is now (GetTask)."""
        return await reads.get(self.broker, agent, task_id, history_length=history_length)

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
        return await reads.page(self.broker, agent, request)

    async def cancel(self, agent: str, task_id: str, *, reason: str = "", timeout: float = 30.0) -> TaskView:
        """Cancel a task and wait until it ended (CancelTask).

        Raises:
            TaskNotCancelable: it had ended before the cancel was stored.
            TaskNotFound: no such task of this caller.
            DeadlineExceeded: it has not ended within `timeout` seconds; the cancel stays in force.
        """
        watched = await self._open(agent, task_id, after=0)
        try:
            sequence = await self.send_cancel(agent, task_id, context_id=await self._context(watched), reason=reason)
            try:
                async with asyncio.timeout(timeout):
                    while not watched.watch.ended:
                        await watched.watch.stopped(after=watched.watch.seen)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"task {task_id} of {agent} has not ended within {timeout:g} s of its cancel, which stays in force"
                ) from None
            if watched.watch.stop_seq and watched.watch.stop_seq < sequence:
                raise TaskNotCancelable(f"task {task_id} of {agent} had ended as {watched.watch.state} before")
            return a2a.view(watched.watch.task(), agent=agent, events=watched.watch.seen)
        finally:
            await self._unwatch(watched)

    async def send_cancel(
        self, agent: str, task_id: str, *, context_id: str, message_id: str = "", reason: str = ""
    ) -> int:
        """Store a cancel, without waiting for its effect; its stream sequence.

        With the creating message's id it stands even if it overtakes the task it cancels.
        """
        request = pb.CancelTaskRequest(id=task_id)
        if reason:
            request.metadata.update({"reason": reason})
        extra = {h.METHOD: "CancelTask", **({h.MESSAGE_ID: message_id} if message_id else {})}
        subject = subjects.input(agent, ids.slice_of(context_id), self.caller, task_id)
        block = h.block(self._static, h.fields(extra))
        return await self.broker.publish(subject, request.SerializeToString(), headers=block)

    async def _follow_up(self, agent: str, task_id: str, *, message: Any, options: dict[str, Any]) -> Handle:
        watched = await self._open(agent, task_id, after=0)
        try:
            watch = watched.watch
            if watch.ended:
                raise UnsupportedOperation(f"task {task_id} of {agent} has ended as {watch.state}; send a new message")
            context_id = await self._context(watched)
            wanted = options.pop("context_id", None)
            if wanted and wanted != context_id:
                raise InvalidRequest(f"task {task_id} belongs to context {context_id}, not {wanted}")
            since = watch.seen
            meta = dict(options.pop("metadata", None) or {})
            if (skill := options.pop("skill", None)) is not None:
                meta[a2a.SKILL] = skill
            proto = await content.to_message(
                self.broker,
                message,
                message_id=options.pop("message_id", None) or uuid.uuid4().hex,
                context_id=context_id,
                task_id=task_id,
                metadata=meta,
            )
            body = content.check_size(pb.SendMessageRequest(message=proto).SerializeToString(), self.broker.max_payload)
            deduplicate = h.fields({h.DEDUPLICATION_ID: f"{self.caller}:{task_id}:{proto.message_id}"})
            block = h.block(
                self._static,
                deduplicate,
                self._options(options.pop("deadline", None), options.pop("headers", None)),
            )
            subject = subjects.input(agent, ids.slice_of(context_id), self.caller, task_id)
            sequence = await self.broker.publish(subject, body, headers=block)
            handle = Handle(self, agent, task_id=task_id, context_id=context_id, watched=watched, since=since)
            handle.sent = sequence
            return handle
        except BaseException:
            await self._unwatch(watched)
            raise

    async def _context(self, watched: _Watched) -> str:
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

    def _watch(self, agent: str, task_id: str, *, after: int = 0) -> _Watched:
        watched = self._watched.get(task_id)
        if watched is None:
            watched = _Watched(task_id, TaskWatch(agent, task_id, after=after))
            watched.watch.last_heard = asyncio.get_running_loop().time()
            self._watched[task_id] = watched
            if self._ticker is None:
                self._ticker = asyncio.get_running_loop().call_later(TICK, self._tick)
        watched.users += 1
        return watched

    async def _open(self, agent: str, task_id: str, *, after: int) -> _Watched:
        """Follow a task that exists: listen first, then read what was before."""
        subjects.check_name(agent)
        subjects.check_task_id(task_id)
        known = self._watched.get(task_id)
        if known is not None and known.watch.seen and after == 0:
            known.users += 1
            return known
        if after:
            # A reader in the middle of the log has its own view of it.
            self._readers += 1
            watched = _Watched(f"{task_id}/{self._readers}", TaskWatch(agent, task_id, after=after), users=1)
            self._watched[watched.key] = watched
        else:
            watched = self._watch(agent, task_id)
        try:
            await self._listen_elsewhere(watched)
            await self._fill(watched)
        except BaseException:
            await self._unwatch(watched)
            raise
        return watched

    async def _listen_elsewhere(self, watched: _Watched) -> None:
        if watched.elsewhere is None:
            pattern = subjects.live_task(self.caller, watched.watch.agent, watched.watch.task_id)

            def feed(subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
                self._feed(watched, RawEvent.of(bytes(data), headers))

            watched.elsewhere = await self.broker.subscribe_raw(pattern, feed)
            await self.broker.flush()

    async def _unwatch(self, watched: _Watched) -> None:
        watched.users -= 1
        if watched.users > 0:
            return
        if self._watched.get(watched.key) is watched:
            del self._watched[watched.key]
        if watched.elsewhere is not None:
            await watched.elsewhere.close()

    async def _follow(self, watched: _Watched, task_id: str, *, since: int) -> AsyncIterator[Event]:
        watch = watched.watch
        queue = watch.reader()
        try:
            while True:
                raw: RawEvent = await queue.get()
                if raw.n <= since:
                    continue
                if (error := raw.error) is not None:
                    raise error
                proto = raw.decode()
                if proto.HasField("artifact_update"):
                    await content.expand_artifact(self.broker, proto.artifact_update.artifact)
                event = event_of(raw, proto, task_id=task_id, agent=watch.agent)
                yield event
                if event.state is not None and (event.state.terminal or event.state.interrupted):
                    return
        finally:
            watch.release(queue)

    def _on_live(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        watched = self._watched.get(subject[-32:].decode())
        if watched is not None:
            self._feed(watched, RawEvent.of(bytes(data), headers))

    def _feed(self, watched: _Watched, event: RawEvent) -> None:
        watched.watch.feed(event, now=asyncio.get_running_loop().time())
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
        if self._watched:
            self._ticker = asyncio.get_running_loop().call_later(TICK, self._tick)

    def _resync_all(self) -> None:
        for watched in list(self._watched.values()):
            if not watched.watch.ended:
                self._tasks.start(self._resync(watched), name=f"resync {watched.watch.task_id}")

    async def _resync(self, watched: _Watched) -> None:
        """Find out what was missed. Failing is no error: the next look comes."""
        if watched.checking:
            return
        watched.checking = True
        watch = watched.watch
        try:
            subject = subjects.event(watch.agent, watch.task_id, self.caller, self.origin)
            last = await self.broker.last(STREAM, subject)
            if last is not None:
                event = RawEvent.of(last.data, last.headers, seq=last.seq)
                if event.n <= watch.seen:
                    return
                watch.feed(event, now=asyncio.get_running_loop().time())
                if not watch.has_gap:
                    return
            elif watched.elsewhere is None:
                return
            await self._fill(watched)
        except (BrokerError, Unavailable, TaskNotFound) as error:
            reads.log.debug("resync of %s: %s", watch.task_id, error)
        finally:
            watched.checking = False

    async def _fill(self, watched: _Watched) -> None:
        """Read the log from after what is known."""
        watch = watched.watch
        while True:
            page = await reads.events_after(self.broker, watch.agent, watch.task_id, after=watch.seen)
            now = asyncio.get_running_loop().time()
            if not page:
                return
            if page[0].n > watch.seen + 1:
                watch.skip_to(page[0].n, now=now)
            for event in page:
                watch.feed(event, now=now)
            if page[-1].n > watch.seen:
                return

    @property
    def following(self) -> int:
        """Number of tasks this client follows."""
        return len(self._watched)


@asynccontextmanager
async def connect(
    identity: str | None = None, *, home: str | os.PathLike[str] | None = None, timeout: float = 5.0
) -> AsyncIterator[Mesh]:
    """A connection to the mesh as `identity`.

    Settings come from WEFT_URL, WEFT_SEED_FILE and WEFT_IDENTITY, or from the `.weft` folder of the project
    (`home`, or found from the current directory upward). The default identity is `local`.

    Raises:
        InvalidConfig: there is no mesh here, or it does not know this identity.
        Unreachable: its broker does not answer within `timeout` seconds.
        NotAuthenticated: the broker refused the identity.
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
