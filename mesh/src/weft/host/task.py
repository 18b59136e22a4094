"""What a handler sees of its task."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import time
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Executor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from typing import Any, Final

import msgpack
from a2a.types import a2a_pb2 as pb

from weft.core import blobs
from weft.host import values
from weft.host.journal import scope
from weft.host.run import Child, Input, Run, Stop
from weft_protocols import a2a, ids, records
from weft_protocols import headers as h
from weft_protocols.errors import (
    DeadlineExceeded,
    StepChanged,
    TaskCanceled,
    TaskEnded,
    TaskFailed,
    TaskInterrupted,
    TaskRejected,
    WeftError,
)
from weft_protocols.parts import File, Message, Part, TaskView
from weft_protocols.records import StepRecord
from weft_protocols.states import State

_KEY: ContextVar[str] = ContextVar("weft_idempotency_key", default="")
_ENDED: Final[dict[State, type[TaskEnded]]] = {
    State.FAILED: TaskFailed,
    State.REJECTED: TaskRejected,
    State.CANCELED: TaskCanceled,
    State.INPUT_REQUIRED: TaskInterrupted,
    State.AUTH_REQUIRED: TaskInterrupted,
}


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step is tried."""

    retries: int = 0
    """Further tries of the body after it raised, within one attempt of the task."""
    timeout: float | None = None
    """Seconds one try may take."""
    backoff: float = 0.5
    """Seconds before the second try; doubled for each further one, with jitter."""
    max_backoff: float = 30.0
    """Seconds, the longest pause between tries."""
    final: tuple[type[BaseException], ...] = ()
    """Errors that another try cannot help."""


def current_idempotency_key() -> str:
    """Inside a step's body: the key to give to outside systems, the same on every attempt; else empty."""
    return _KEY.get()


class Task:
    """A task, as its handler sees it.

    Steps, children, timers and answers are recorded. When a replica dies, another runs the handler again from
    the top and every recorded one returns what it returned before; what is not recorded is done again.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    # What was asked ----------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The task's id."""
        return self._run.task_id

    @property
    def context_id(self) -> str:
        """The conversation it belongs to."""
        return self._run.work.context_id

    @property
    def caller(self) -> str:
        """Who sent it, as the broker stamped it."""
        return self._run.work.caller

    @property
    def attempt(self) -> int:
        """Number of this attempt, from 1."""
        return self._run.claim.attempt

    @property
    def replica(self) -> str:
        """Id of the replica that runs it."""
        return self._run.replica

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts of the message that created it."""
        return self._run.parts

    @property
    def text(self) -> str:
        """Its text."""
        return Message("", "user", self.parts).text

    @property
    def data(self) -> Any:
        """Its first data part, or None."""
        return Message("", "user", self.parts).data

    @property
    def files(self) -> tuple[File, ...]:
        """Its file parts."""
        return tuple(part for part in self.parts if isinstance(part, File))

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the message that created it."""
        message = self._run.work.request.message
        return a2a.struct_to_dict(message.metadata) if message.HasField("metadata") else {}

    @property
    def history(self) -> tuple[Message, ...]:
        """The messages of the caller so far, the first one first."""
        return tuple(a2a.message_from_proto(message) for message in self._run.history)

    @property
    def deadline(self) -> float | None:
        """Unix seconds after which the task is failed, or None."""
        return self._run.work.deadline

    # What is said about it ---------------------------------------------------------------------

    async def update(self, message: Any = None, **metadata: Any) -> None:
        """Tell the caller how it goes: a `working` status with a message and metadata."""
        parts = a2a.parts_of(message) if message is not None else ()
        await self._run.status(State.WORKING, parts, metadata=metadata or None)

    async def artifact(
        self,
        name: str,
        content: Any,
        *,
        media_type: str = "",
        description: str = "",
        artifact_id: str | None = None,
    ) -> str:
        """Publish a result; its artifact id.

        `content` is text, bytes, a part, several parts, any JSON value, or an async iterable of text or bytes,
        which is streamed: each item leaves as a chunk of its own. The same name again replaces the artifact.
        """
        key = artifact_id or str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.id}/{name}"))
        if isinstance(content, AsyncIterable):
            await self._stream(key, name, chunks=content, media_type=media_type, description=description)
            return key
        parts = [_named(part, name, media_type) for part in a2a.parts_of(content)]
        await self._run.artifact(a2a.artifact_to_proto(key, name, parts, description=description))
        return key

    async def _stream(
        self, key: str, name: str, *, chunks: AsyncIterable[Any], media_type: str, description: str
    ) -> None:
        held: pb.Artifact | None = None
        append = False
        async for chunk in chunks:
            if held is not None:
                await self._run.artifact(held, append=append, last_chunk=False)
                append = True
            parts = [_named(part, name, media_type) for part in a2a.parts_of(chunk)]
            held = a2a.artifact_to_proto(key, name, parts, description=description)
        if held is None:
            held = a2a.artifact_to_proto(key, name, [_named(part, name, media_type) for part in a2a.parts_of("")])
        await self._run.artifact(held, append=append, last_chunk=True)

    # What is recorded --------------------------------------------------------------------------

    async def step(
        self,
        key: str,
        fn: Callable[..., Any],
        *args: Any,
        step_options: StepOptions | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run `fn` once, as far as the record goes, and return its result; after a crash the recorded one.

        The result must be JSON values, bytes, dataclasses or pydantic models; with a return annotation it comes
        back as that type. A parameter named `idempotency_key` gets the step's key for outside systems. Called
        twice with one key, the second is `key#1`, and so on; synchronous functions run in a thread.

        Raises:
            StepChanged: the step is recorded with another input.
            DeadlineExceeded: a try took longer than its timeout, and no tries are left.
        """
        return await self._step(self._run.journal.key(key), fn, args=args, kwargs=kwargs, options=step_options)

    async def _step(
        self,
        key: str,
        fn: Callable[..., Any],
        *,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: StepOptions | None,
    ) -> Any:
        run = self._run
        returns = values.returns(fn)
        digest = values.digest(args, kwargs)
        stored = await run.journal.read(key)
        if stored is not None:
            return await self._recorded(StepRecord.decode(stored.data), digest=digest, returns=returns)
        started = time.monotonic()
        run.busy += 1
        try:
            result, tries = await _try(key, fn, args=args, kwargs=kwargs, options=options or StepOptions(), run=run)
        finally:
            run.rest()
        value = values.encode(result, where=f"step {key!r}")
        if len(value) > blobs.LIMIT:
            value = values.encode({"weft.blob": (await blobs.put(run.mesh.broker, value)).url}, where=key)
        record = StepRecord(key, digest, value, attempts=tries, ms=int((time.monotonic() - started) * 1000))
        _, winner = await run.journal.write(key, record.encode())
        run.last_progress = time.time()
        return await self._recorded(StepRecord.decode(winner), digest=digest, returns=returns)

    async def _recorded(self, record: StepRecord, *, digest: str, returns: Any) -> Any:
        if record.input != digest:
            raise StepChanged(
                f"step {record.key!r} of task {self.id} is recorded with another input: give steps inside loops keys "
                "of their own, and keep what decides their input in steps as well"
            )
        value = record.value
        plain = values.decode(value)
        if isinstance(plain, dict) and plain.keys() == {"weft.blob"}:
            value = await blobs.get(self._run.mesh.broker, blobs.BlobRef.parse(plain["weft.blob"]))
        return values.decode(value, returns, where=f"the result of step {record.key!r}")

    def delegate(
        self,
        agent: str,
        message: Any,
        *,
        skill: str | None = None,
        key: str | None = None,
        deadline: float | None = None,
        context_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, TaskView]:
        """Have another agent do something, durably, and wait for its result without holding a slot.

        The child is the same on every attempt; its deadline is the earlier of the given one (seconds) and this
        task's; cancelling this task cancels it.

        Raises:
            TaskFailed, TaskRejected, TaskCanceled: the child ended so.
            TaskInterrupted: the child waits for input.
            DeadlineExceeded: it did not end in time.
        """
        journal_key = self._run.journal.key(key or f"delegate-{agent}", explicit=key is not None)
        options = {"skill": skill, "context_id": context_id or self.context_id, "metadata": metadata}
        return self._delegate(journal_key, agent, message=message, deadline=deadline, options=options)

    async def _delegate(
        self, key: str, agent: str, *, message: Any, deadline: float | None, options: dict[str, Any]
    ) -> TaskView:
        run = self._run
        digest = values.digest((agent, a2a.parts_of(message)), {})
        stored = await run.journal.read(key)
        if stored is not None:
            record = StepRecord.decode(stored.data)
            if record.input != digest:
                raise StepChanged(f"delegation {key!r} of task {self.id} is recorded with another input")
            return _outcome(a2a.view(pb.Task.FromString(record.value), agent=agent))
        message_id = ids.child_message_id(self.id, key)
        child_id = ids.task_id(run.mesh.caller, agent, message_id)
        child = run.children[child_id] = Child(agent, options["context_id"], message_id)
        await run.remember_children()
        left = self._time_left(deadline)
        run.busy += 1
        try:
            handle = await run.mesh.submit(
                agent,
                message,
                message_id=message_id,
                deadline=left,
                headers=self._passed_on(),
                **options,
            )
            async with handle, run.slot.waiting():
                view = await handle.result(None if left is None else left + 5.0)
                task = handle._watched.watch.task()
        except asyncio.CancelledError:
            if run.stop is None:
                await run.cancel_child(child_id, "its parent does not wait for it any more")
            raise
        finally:
            run.rest()
        if view.state.terminal:
            child.done = True
            if task.ByteSize() <= blobs.LIMIT * 2:
                await run.journal.write(key, StepRecord(key, digest, task.SerializeToString()).encode())
        run.last_progress = time.time()
        return _outcome(view)

    async def gather(self, *work: Awaitable[Any]) -> list[Any]:
        """Wait for several steps or delegations together; their results in order. The first error cancels the rest."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_awaited(item)) for item in work]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        finally:
            for item in work:
                if inspect.iscoroutine(item):
                    item.close()  # one that was cancelled before it began would complain
        return [task.result() for task in tasks]

    async def sleep(self, seconds: float) -> None:
        """Wait, without holding a slot; after a crash only for what is left."""
        run = self._run
        key = run.journal.own_key(records.TIMER_KEY)
        until = time.time() + seconds
        stored = await run.journal.read(key)
        if stored is not None:
            until = float(msgpack.unpackb(stored.data)["until"])
        else:
            await run.journal.write(key, bytes(msgpack.packb({"until": until})))
        run.busy += 1
        try:
            async with run.slot.waiting():
                await asyncio.sleep(max(0.0, until - time.time()))
        finally:
            run.rest()

    async def ask(self, question: Any, *, timeout: float | None = None, auth: bool = False, **metadata: Any) -> Message:
        """Ask the caller and wait for the answer (`input-required`, or `auth-required` with `auth`).

        Holds no slot. After the agent's `suspend_after` seconds the task leaves memory and goes on, on any
        replica, when the answer comes; with a `timeout` (seconds) it stays. A message sent before the question
        is not its answer.

        Raises:
            DeadlineExceeded: no answer within `timeout`.
        """
        run = self._run
        key = run.journal.own_key(records.ANSWER_KEY)
        stored = await run.journal.read(key)
        if stored is not None:
            answer = pb.Message.FromString(stored.data)
            run.recall(answer)
            return a2a.message_from_proto(answer)
        given = run.resumed if run.claim.waiting == key else None
        if given is not None and not run.knows(given.proto.message_id):
            run.resumed = None
            run.history.append(given.proto)
        else:
            before = await run.journal.read(f"{key}-asked")
            asked = before.seq if before is not None else (await run.journal.write(f"{key}-asked", b""))[0]
            state = State.AUTH_REQUIRED if auth else State.INPUT_REQUIRED
            event = run.status_event(state, a2a.parts_of(question), metadata=metadata or None)
            run.note(event)
            await run.log.post(event, state=state, extra=await run.save_snapshot())
            await run.log.settle()
            given = await self._answer(key, after=asked, timeout=timeout)
        _, winner = await run.journal.write(key, given.proto.SerializeToString())
        run.consumed(given)
        await run.status(State.WORKING)
        return a2a.message_from_proto(pb.Message.FromString(winner))

    async def _answer(self, key: str, *, after: int, timeout: float | None) -> Input:
        run = self._run
        now = asyncio.get_running_loop().time
        give_up = None if timeout is None else now() + timeout
        suspend_at = now() + run.agent.suspend_after
        async with run.slot.waiting():
            while True:
                if (given := run.take_input(after)) is not None:
                    return given
                run.arrived.clear()
                may_suspend = give_up is None and run.busy == 0
                try:
                    async with asyncio.timeout_at(suspend_at if may_suspend else give_up):
                        await run.arrived.wait()
                except TimeoutError:
                    if give_up is not None:
                        raise DeadlineExceeded(f"no answer within {timeout:g} s") from None
                    run.waiting, run.asked = key, after
                    run.interrupt(Stop.SUSPEND)
                    await asyncio.Event().wait()

    # Inner matters -----------------------------------------------------------------------------

    def _time_left(self, given: float | None) -> float | None:
        own = None if self.deadline is None else self.deadline - time.time()
        if own is not None and own <= 0:
            raise DeadlineExceeded(f"the deadline of task {self.id} has passed")
        return given if own is None else own if given is None else min(own, given)

    def _passed_on(self) -> dict[str, str]:
        """Headers of a child: the delegation chain with this task at its end, and the trace it belongs to."""
        own = self._run.work.headers
        before, this = own.get("weft-chain", ""), f"{self._run.work.agent}/{self.id}"
        passed = {h.CHAIN: f"{before},{this}" if before else this}
        for name in (h.TRACEPARENT, h.TRACESTATE):
            if own.get(name):
                passed[name] = own[name]
        return passed


async def _awaited(item: Awaitable[Any]) -> Any:
    return await item


async def _try(
    key: str,
    fn: Callable[..., Any],
    *,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: StepOptions,
    run: Run,
) -> tuple[Any, int]:
    """The result of a step's body and how many tries it took."""
    idempotency_key = ids.idempotency_key(run.task_id, key)
    if "idempotency_key" not in kwargs and _takes_key(fn):
        kwargs = {**kwargs, "idempotency_key": idempotency_key}
    token = _KEY.set(idempotency_key)
    try:
        with scope(key):
            for attempt in range(options.retries + 1):
                limit = asyncio.timeout(options.timeout)
                try:
                    async with limit:
                        return await call(fn, args, kwargs, threads=run.threads), attempt + 1
                except Exception as error:
                    late = isinstance(error, TimeoutError) and limit.expired()
                    if late and attempt == options.retries:
                        raise DeadlineExceeded(f"step {key!r} took longer than {options.timeout:g} s") from error
                    if not late and (attempt == options.retries or _is_final(error, options)):
                        raise
                run.journal.rewind(key)
                pause = min(options.max_backoff, options.backoff * 2**attempt)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
    finally:
        _KEY.reset(token)
    raise AssertionError("unreachable: the last try returns or raises")


def _takes_key(fn: Callable[..., Any]) -> bool:
    try:
        return "idempotency_key" in inspect.signature(fn).parameters
    except (ValueError, TypeError):
        return False  # a builtin without a signature


def _is_final(error: Exception, options: StepOptions) -> bool:
    """Whether another try cannot help."""
    if isinstance(error, WeftError) and not error.retryable and not isinstance(error, DeadlineExceeded):
        return True
    return isinstance(error, options.final)


async def call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, threads: Executor) -> Any:
    """Call a function: await a coroutine function, run any other in a thread."""
    if inspect.iscoroutinefunction(fn):
        return await _contained(fn(*args, **kwargs))
    in_context = functools.partial(copy_context().run, fn, *args, **kwargs)
    result = await _contained(asyncio.get_running_loop().run_in_executor(threads, in_context))
    return await _contained(result) if inspect.isawaitable(result) else result


async def _contained(work: Awaitable[Any]) -> Any:
    """What `work` gives. `sys.exit` in somebody's code is its failure: it must not end the replica."""
    try:
        return await work
    except SystemExit as error:
        raise RuntimeError(f"the handler called sys.exit({error.code!r})") from error


def _named(part: Part, name: str, media_type: str) -> Part:
    if isinstance(part, File):
        return replace(part, name=part.name or name, media_type=media_type or part.media_type)
    return replace(part, media_type=media_type or part.media_type)


def _outcome(view: TaskView) -> TaskView:
    error = _ENDED.get(view.state)
    if error is None:
        return view
    said = f": {view.message.text}" if view.message is not None and view.message.text else ""
    raise error(f"task {view.id} of {view.agent} {view.state.label}{said}", task_id=view.id, agent=view.agent)
