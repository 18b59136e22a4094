"""Reading one task from the stream: its events, its caller's messages, its snapshot, its dead letter."""

from __future__ import annotations

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
from weft_coordinator.shell.sources import Source, Sources
from weft_protocols import a2a, ids, records, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2AError
from weft_protocols.events import RawEvent, read_stored
from weft_protocols.records import DeadLetter

log = logging.getLogger("weft.coordinator")

PAGE: Final = 500_000
"""Bytes of events after which a page of a log ends."""


@dataclass(frozen=True, slots=True)
class Folded:
    """A task as it is now, and the number of its last event."""

    task: pb.Task
    events: int


class TaskReader:
    """Reads tasks that the index or the projection's file knows."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    async def task(self, entry: Entry, *, history: bool = True) -> Folded:
        """The task folded from what is stored now; without `history` the caller's messages are not read."""
        source, subject = self._sources.of(entry), _subject(entry)
        creation, followed = await _messages(source, entry) if history else (None, [])
        at = entry.detail.snapshot
        snapshot = await _snapshot(source, entry, at) if at else None
        events = await _events(source, subject, start=at if snapshot is not None else 1)
        # What is stored may be ahead of the index, which then knows an older snapshot or none.
        newer = max((event.seq for event in events if _names_snapshot(event)), default=0)
        if newer > at and (found := await _snapshot(source, entry, newer)) is not None:
            snapshot, events = found, [event for event in events if event.seq >= newer]
        folded = tasks.assemble(entry, events, creation=creation, followed=followed, snapshot=snapshot)
        if folded is None:
            events = await _events(source, subject)
            folded = tasks.assemble(entry, events, creation=creation, followed=followed)
        if folded is None:
            raise AssertionError("a fold without a snapshot always gives a task")
        return Folded(folded, max((event.n for event in events), default=0))

    async def listed(self, one: Listed, *, history: bool, artifacts: bool) -> pb.Task:
        """The task in the state by which it was listed."""
        events: list[RawEvent] = []
        source = self._sources.of(one.entry, seq=max(one.seq, one.entry.last))
        creation, followed = await _messages(source, one.entry) if history else (None, [])
        if one.status and not history and not artifacts:
            stored = await source.message(one.seq)
            events = _raws([stored]) if stored is not None else []
        elif one.status:
            events = [event for event in await _events(source, _subject(one.entry)) if event.seq <= one.seq]
        folded = tasks.assemble(one.entry, events, creation=creation, followed=followed)
        if folded is None:
            raise AssertionError("a fold without a snapshot always gives a task")
        return folded

    async def after(self, entry: Entry, n: int) -> list[RawEvent]:
        """One page of the events with numbers above `n`, each once and in order; empty if there are none."""
        source, subject = self._sources.of(entry), _subject(entry)
        start = await source.start_after(entry, subject, n) if subject else 0
        if not start:
            return []
        page: dict[int, RawEvent] = {}
        size = 0
        while True:
            batch = await source.batch(subject, start=start)
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
        subject = subjects.task(entry.agent, entry.slice, entry.caller, entry.task)
        return await self._sources.of(entry).last(subject)

    async def dead_letter(self, entry: Entry) -> DeadLetter | None:
        """Why a task was given up; None if the record is gone."""
        key = subjects.step_token(records.DEAD_LETTER_KEY)
        stored = await self._sources.of(entry).last(subjects.step(entry.agent, entry.task, key))
        if stored is None:
            return None
        try:
            return DeadLetter.decode(stored.data)
        except A2AError as error:
            log.warning("dead letter of task %s: %s", entry.task, error)
            return None


def _subject(entry: Entry) -> str:
    """Subject of a task's events; empty if it has none yet."""
    return subjects.event(entry.agent, entry.task, entry.caller, entry.detail.origin) if entry.last else ""


async def _events(source: Source, subject: str, *, start: int = 1) -> list[RawEvent]:
    return _raws(await source.all(subject, start=start)) if subject else []


async def _messages(source: Source, entry: Entry) -> tuple[Said | None, list[Said]]:
    """The creating message and the follow-ups."""
    creation: Said | None = None
    if entry.created:
        subject = subjects.task(entry.agent, entry.slice, entry.caller, entry.task)
        found = await source.batch(subject, count=1)
        creation = _said(found.messages[0]) if found.messages else None
    subject = subjects.input(entry.agent, ids.slice_of(entry.context), entry.caller, entry.task)
    stored = await source.all(subject)
    return creation, [said for one in stored if (said := _said(one)) is not None]


async def _snapshot(source: Source, entry: Entry, seq: int) -> Snapshot | None:
    """The snapshot that the event with sequence `seq` names."""
    event = await source.message(seq)
    key = h.get(event.headers, b"Weft-Snapshot") if event is not None else None
    if key is None or not subjects.TOKEN.match(key.decode("utf-8", "replace")):
        return None
    subject = subjects.step(entry.agent, entry.task, key.decode())
    # A key may be written again later: the version that was named is the last one before the event.
    versions = await source.all(subject)
    named = [version for version in versions if version.seq < seq]
    if not named:
        return None
    try:
        return Snapshot(seq, pb.Task.FromString(named[-1].data))
    except DecodeError as error:
        log.warning("snapshot %s of task %s cannot be read: %s", key.decode(), entry.task, error)
        return None


def _names_snapshot(event: RawEvent) -> bool:
    found = h.get(event.headers, b"Weft-Snapshot"), h.get(event.headers, b"Weft-In-Reply-To")
    return bool(event.state) and found[0] is not None and found[1] is None


def _raws(stored: Iterable[Stored]) -> list[RawEvent]:
    """Stored events; those without a number are none."""
    found = (event for one in stored for event in read_stored(one.data, one.headers, seq=one.seq))
    return [event for event in found if event.n > 0]


def _said(stored: Stored) -> Said | None:
    """A message of the caller's; None for a cancel, a wake and what cannot be read."""
    values = h.parse(stored.headers)
    if values.get("a2a-method") in ("CancelTask", h.WAKE):
        return None
    try:
        request = a2a.decode(pb.SendMessageRequest, stored.data, values.get("content-type", h.PROTOBUF))
    except A2AError:
        return None
    return Said(stored.seq, request.message)
