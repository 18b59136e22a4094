"""What a handler sees of its task."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterable, Callable, Coroutine
from dataclasses import replace
from typing import Any

from a2a.types import a2a_pb2 as pb

from weft.core import blobs
from weft.host import held, progress, values
from weft.host.approving import Approving
from weft.host.delegation import Delegating
from weft.host.locking import Locking
from weft.host.retry import ONCE, RetryPolicy
from weft.host.run import Run
from weft.host.saga import Undoing
from weft.host.steps import try_step
from weft.host.tools import Tools
from weft.host.waiting import Waiting
from weft_protocols import a2a
from weft_protocols.errors import StepChanged
from weft_protocols.parts import File, Message, Part
from weft_protocols.records import StepRecord
from weft_protocols.states import State


class Task(Approving, Delegating, Locking, Undoing, Waiting):
    """A task, as its handler sees it.

    Steps, children, timers, answers and approvals are recorded. When a replica dies, another runs the handler again
    from the top and every recorded one returns what it returned before; what is not recorded is done again.
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

    @property
    def tools(self) -> Tools:
        """The tools it may use."""
        return Tools(self._run)

    # What is said about it ---------------------------------------------------------------------

    async def update(self, message: Any = None, **metadata: Any) -> None:
        """Tell the caller how it goes: a `working` status with a message and metadata."""
        held.check()
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
        held.check()
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

    def step(
        self,
        key: str,
        fn: Callable[..., Any],
        *args: Any,
        step_options: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> Coroutine[Any, Any, Any]:
        """Run `fn` once, as far as the record goes, and return its result; after a crash the recorded one.

        The result must be JSON values, bytes, dataclasses or pydantic models; with a return annotation it comes
        back as that type. A parameter named `idempotency_key` gets the step's key for outside systems. Called
        twice with one key, the second is `key#1`, and so on; synchronous functions run in a thread. `step_options`
        says how often the body is tried, by default once.

        Raises:
            StepChanged: the step is recorded with another input.
            DeadlineExceeded: a try took longer than its timeout, and no tries are left.
        """
        # The key is taken now, not when it is awaited: it must not depend on what runs first, or at all.
        return self._step(self._run.journal.key(key), fn, args=args, kwargs=kwargs, policy=step_options or ONCE)

    async def _step(
        self,
        key: str,
        fn: Callable[..., Any],
        *,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        policy: RetryPolicy,
    ) -> Any:
        run = self._run
        returns = values.returns(fn)
        digest = values.digest(args, kwargs)
        stored = await run.journal.read(key)
        if stored is not None:
            return await self._recorded(StepRecord.decode(stored.data), digest=digest, returns=returns)
        started = time.monotonic()
        with run.waits.working(), progress.step(run, key):
            result, tries = await try_step(key, fn, args=args, kwargs=kwargs, policy=policy, run=run)
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


def _named(part: Part, name: str, media_type: str) -> Part:
    if isinstance(part, File):
        return replace(part, name=part.name or name, media_type=media_type or part.media_type)
    return replace(part, media_type=media_type or part.media_type)
