"""Reading one task from the stream: its events, its caller's messages, its snapshot, its dead letter."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from a2a.types import a2a_pb2 as pb
from google.protobuf.message import DecodeError

from weft.core.broker import Stored
from weft_coordinator.decide import task as tasks
from weft_coordinator.decide.index import Entry
from weft_coordinator.decide.listing import Listed
from weft_coordinator.decide.task import Said, Snapshot
from weft_coordinator.shell.log import StreamReader
from weft_protocols import a2a, ids, records, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2AError
from weft_protocols.events import RawEvent, read_stored
from weft_protocols.records import DeadLetter
from weft_protocols.resources import STREAM

log = logging.getLogger("weft.coordinator")

PAGE: Final = 500_000
"""Bytes of events after which a page of a log ends."""


@dataclass(frozen=True, slots=True)
class Folded:
    """A task as it is now, and the number of its last event."""

    task: pb.Task
    events: int


class TaskReader:
    """Reads tasks that the index knows."""

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader

    async def task(self, entry: Entry, *, history: bool = True) -> Folded:
        """The task folded from what is stored now; without `history` the caller's messages are not read."""
        subject = await self._subject(entry)
        creation, followed = await self._said(entry) if history else (None, [])
        detail = entry.detail
        snapshot: Snapshot | None = None
        start = 1
        if detail is not None and detail.snapshot:
            snapshot = await self._snapshot(entry, detail.snapshot)
            start = detail.snapshot if snapshot is not None else 1
        events = await self._events(subject, start=start)
        folded = tasks.assemble(entry, events, creation=creation, followed=followed, snapshot=snapshot)
        if folded is None:
            events = await self._events(subject)
            folded = tasks.assemble(entry, events, creation=creation, followed=followed)
        if folded is None:
            raise AssertionError("a fold without a snapshot always gives a task")
        return Folded(folded, max((event.n for event in events), default=0))

    async def listed(self, one: Listed, *, history: bool, artifacts: bool) -> pb.Task:
        """The task in the state by which it was listed."""
        events: list[RawEvent] = []
        creation, followed = await self._said(one.entry) if history else (None, [])
        if one.status and not history and not artifacts:
            stored = await self._reader.message(STREAM, one.seq)
            events = _raws([stored]) if stored is not None else []
        elif one.status:
            subject = await self._subject(one.entry)
            events = [event for event in await self._events(subject) if event.seq <= one.seq]
        folded = tasks.assemble(one.entry, events, creation=creation, followed=followed)
        if folded is None:
            raise AssertionError("a fold without a snapshot always gives a task")
        return folded

    async def after(self, entry: Entry, n: int) -> list[RawEvent]:
        """One page of the events with numbers above `n`, each once and in order; empty if there are none."""
        subject = await self._subject(entry)
        if not subject:
            return []
        start = _start(entry, n)
        page: dict[int, RawEvent] = {}
        size = 0
        while True:
            batch = await self._reader.batch(STREAM, subject, start=start)
            for event in _raws(batch.messages):
                if event.n <= n or event.n in page:
                    continue
                if page and size + len(event.data) > PAGE:
                    return [page[number] for number in sorted(page)]
                page[event.n] = event
                size += len(event.data) + 200
            if not batch.more or not batch.messages:
                return [page[number] for number in sorted(page)]
            start = batch.messages[-1].seq + 1

    async def creating(self, entry: Entry) -> Stored | None:
        """The message that created a task; None if it is not known or gone."""
        if not entry.created:
            return None
        return await self._reader.last(STREAM, subjects.task(entry.agent, entry.slice, entry.caller, entry.task))

    async def dead_letter(self, entry: Entry) -> DeadLetter | None:
        """Why a task was given up; None if the record is gone."""
        key = subjects.step_token(records.DEAD_LETTER_KEY)
        stored = await self._reader.last(STREAM, subjects.step(entry.agent, entry.task, key))
        if stored is None:
            return None
        try:
            return DeadLetter.decode(stored.data)
        except A2AError as error:
            log.warning("dead letter of task %s: %s", entry.task, error)
            return None

    async def _subject(self, entry: Entry) -> str:
        """Subject of a task's events; empty if it has none yet."""
        if not entry.last:
            return ""
        if entry.detail is not None:
            return subjects.event(entry.agent, entry.task, entry.caller, entry.detail.origin)
        last = await self._reader.message(STREAM, entry.last)
        return last.subject if last is not None else ""

    async def _events(self, subject: str, *, start: int = 1) -> list[RawEvent]:
        if not subject:
            return []
        return _raws(await self._reader.all(STREAM, subject, start=start))

    async def _said(self, entry: Entry) -> tuple[Said | None, list[Said]]:
        """The creating message and the follow-ups."""
        creation: Said | None = None
        if entry.created:
            subject = subjects.task(entry.agent, entry.slice, entry.caller, entry.task)
            found = await self._reader.batch(STREAM, subject, count=1)
            creation = _said(found.messages[0]) if found.messages else None
        subject = subjects.input(entry.agent, ids.slice_of(entry.context), entry.caller, entry.task)
        stored = await self._reader.all(STREAM, subject)
        return creation, [said for one in stored if (said := _said(one)) is not None]

    async def _snapshot(self, entry: Entry, seq: int) -> Snapshot | None:
        """The snapshot that the event with sequence `seq` names."""
        event = await self._reader.message(STREAM, seq)
        key = h.get(event.headers, b"Weft-Snapshot") if event is not None else None
        if key is None or not subjects.TOKEN.match(key.decode("utf-8", "replace")):
            return None
        subject = subjects.step(entry.agent, entry.task, key.decode())
        # A key may be written again later: the version that was named is the last one before the event.
        versions = await self._reader.all(STREAM, subject)
        named = [version for version in versions if version.seq < seq]
        if not named:
            return None
        try:
            return Snapshot(seq, pb.Task.FromString(named[-1].data))
        except DecodeError as error:
            log.warning("snapshot %s of task %s cannot be read: %s", key.decode(), entry.task, error)
            return None


def _raws(stored: Iterable[Stored]) -> list[RawEvent]:
    """Stored events; those without a number are none."""
    found = (event for one in stored for event in read_stored(one.data, one.headers, seq=one.seq))
    return [event for event in found if event.n > 0]


def _said(stored: Stored) -> Said | None:
    """A message of the caller's; None for a cancel and for what cannot be read."""
    values = h.parse(stored.headers)
    if values.get("a2a-method") == "CancelTask":
        return None
    try:
        request = a2a.decode(pb.SendMessageRequest, stored.data, values.get("content-type", h.PROTOBUF))
    except A2AError:
        return None
    return Said(stored.seq, request.message)


def _start(entry: Entry, n: int) -> int:
    """A sequence from which all events above number `n` can be found."""
    marks = entry.detail.marks if entry.detail is not None else []
    at = bisect.bisect_right(marks, (n, 2**63)) - 1
    return marks[at][1] if at >= 0 else 1
