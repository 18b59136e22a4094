"""Reading dead letters, and sending their messages anew."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from a2a.types import a2a_pb2 as pb

from weft.core.broker import Broker, Stored
from weft_coordinator.decide.index import Entry
from weft_coordinator.shell.tasks import TaskReader
from weft_protocols import a2a, ids, subjects
from weft_protocols import headers as h
from weft_protocols.errors import Conflict, TaskNotFound, TooLarge
from weft_protocols.records import DeadLetter

REDRIVE_OF: Final = "weft.redrive_of"
"""Message metadata of a redriven task: the task that was given up."""
ORIGIN: Final = "redrive"
"""Origin of redriven tasks: nobody follows their events live; their caller reads them, or subscribes."""
AT_ONCE: Final = 64
"""Records read at the same time."""
CACHED: Final = 20_000
_DROPPED: Final = frozenset(
    name.lower() for name in (h.ORIGIN, h.DEADLINE, h.CHAIN, h.TRACEPARENT, h.TRACESTATE, h.CONTENT_TYPE, h.VERSION)
)
"""Headers of the original that do not hold for a task of its own: its deadline has passed, its parent has ended."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter: its task, and its record if it is still there."""

    entry: Entry
    record: DeadLetter | None


class LetterReader:
    """Reads letters' records; each is read once."""

    def __init__(self, tasks: TaskReader) -> None:
        self._tasks = tasks
        self._records: dict[tuple[str, str], DeadLetter] = {}

    async def read(self, entries: Iterable[Entry]) -> list[Letter]:
        """Letters in the same order. Raises Unreachable, TimedOut if the broker does not say."""
        wanted = list(entries)
        unknown = [entry for entry in wanted if (entry.agent, entry.task) not in self._records]
        for at in range(0, len(unknown), AT_ONCE):
            try:
                async with asyncio.TaskGroup() as group:
                    reads = [group.create_task(self._tasks.dead_letter(one)) for one in unknown[at : at + AT_ONCE]]
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from failed
            for entry, read in zip(unknown[at:], reads, strict=False):
                if (record := read.result()) is not None:
                    self._records[entry.agent, entry.task] = record
        letters = [Letter(entry, self._records.get((entry.agent, entry.task))) for entry in wanted]
        while len(self._records) > CACHED:
            del self._records[next(iter(self._records))]
        return letters

    async def message(self, entry: Entry) -> Stored:
        """The message that created a task. TaskNotFound if nobody has it any more."""
        stored = await self._tasks.creating(entry)
        if stored is None:
            raise TaskNotFound(f"the message that created task {entry.task} is not stored any more")
        return stored


def request_of(stored: Stored) -> pb.SendMessageRequest:
    """The request in a creating message. Raises ParseError."""
    content_type = (h.get(stored.headers, b"Content-Type") or h.PROTOBUF.encode()).decode("utf-8", "replace")
    return a2a.decode(pb.SendMessageRequest, stored.data, content_type)


async def send_again(broker: Broker, entry: Entry, stored: Stored, n: int) -> str:
    """Send a task's message for the `n`th time as its caller; the new task's id. Repeated, it is the same task.

    Raises:
        ParseError, TooLarge: the message cannot be sent.
        Backpressure, Unreachable, TimedOut: not accepted for sure; sending again is safe.
    """
    request = request_of(stored)
    message = request.message
    message.message_id = f"redrive-of:{entry.task}:{n}"
    message.context_id = message.context_id or entry.context
    message.metadata.update({REDRIVE_OF: entry.task})
    task = ids.task_id(entry.caller, entry.agent, message.message_id)
    kept = {
        name: value
        for name, value in h.parse(stored.headers).items()
        if name not in _DROPPED and not name.startswith("nats-")
    }
    own = {**kept, h.VERSION: h.A2A_VERSION, h.ORIGIN: ORIGIN, h.EXPECTED_SEQUENCE: "0"}
    body = request.SerializeToString()
    if len(body) + h.MAX_BLOCK > broker.max_payload:
        raise TooLarge(f"the message of task {entry.task} has {len(body)} bytes; the broker takes {broker.max_payload}")
    subject = subjects.task(entry.agent, ids.slice_of(message.context_id), entry.caller, task)
    try:
        await broker.publish(subject, body, headers=h.block(h.fields(own)))
    except Conflict:
        pass  # it was sent before, by this coordinator or by the one that led before
    return task
