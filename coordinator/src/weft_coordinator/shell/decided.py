"""The coordinator's log on the broker: read by all coordinators, written by the one that leads.

One message is one commit. It expects the message before it (`Nats-Expected-Last-Subject-Sequence`), so the broker takes
the next one from whoever knows the end of the log. A leader begins with a commit of its own, which carries a new epoch:
from then on what an earlier leader still sends expects a message that is not the last one any more, and is refused.

Snapshots bound the log: `mesh.snap.head` names the chunks of one and the event it includes. It expects the end of the
log as well, so that only the leader can write one.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from weft.core.broker import Broker, Stored, sequence_of
from weft.core.history import StreamReader
from weft_coordinator.decide.ledger import Event, Ledgers
from weft_coordinator.shell.tail import Rounds
from weft_protocols import headers as h
from weft_protocols.errors import Conflict, ParseError, TimedOut, Unreachable
from weft_protocols.resources import COORD, DECIDED, SNAPSHOTS

log = logging.getLogger("weft.coordinator")

HEAD: Final = f"{SNAPSHOTS}.head"
CHUNK: Final = 512 * 1024
"""Bytes of one message of a snapshot, and of events after which a commit is split."""
PATIENCE: Final = 15.0
"""Seconds a commit is tried: longer than the broker takes to elect a leader of its own."""
SNAPSHOT_EVERY: Final = 20_000
"""Events after which a snapshot is made at the earliest; later where the state is large."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One message of the log."""

    epoch: int
    at: int
    """When it was decided, unix milliseconds."""
    first: int
    """Number of its first event."""
    events: Sequence[Event]

    def encode(self) -> bytes:
        """The message's bytes."""
        values = {"epoch": self.epoch, "at": self.at, "first": self.first, "events": self.events}
        return bytes(msgpack.packb(values))

    @staticmethod
    def decode(data: bytes) -> Commit:
        """The commit in a message; ParseError if it is none."""
        try:
            told = msgpack.unpackb(data)
            events = [tuple(event) for event in told["events"]]
            return Commit(int(told["epoch"]), int(told["at"]), int(told["first"]), events)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise ParseError(f"not a commit of the coordinator's log: {error}") from error


class DecidedLog(Rounds):
    """The log and what it folds into, as far as it was read or written here."""

    def __init__(self, broker: Broker, reader: StreamReader, ledgers: Ledgers) -> None:
        super().__init__()
        self.ledgers = ledgers
        self.epoch = 0
        """Epoch of the last commit read or written."""
        self.number = 0
        """Number of the last event."""
        self.sequence = 0
        """Stream sequence of the last commit; what the next one expects."""
        self.since_snapshot = 0
        """Events after the last snapshot."""
        self.snapshot_after = SNAPSHOT_EVERY
        """Events after which another one is worth it."""
        self.led = False
        """Whether the leader is here: what is folded is then ahead of what is stored, and nothing is read."""
        self._broker = broker
        self._reader = reader
        self._doubtful = True
        self._readings = 0
        """How often everything was read anew."""

    def doubt(self) -> None:
        """What is folded here may not be what is stored: read everything anew at the next `sync`."""
        self._doubtful = True

    # Reading -----------------------------------------------------------------------------------

    async def _round(self) -> None:
        if self.led:
            return None
        if self._doubtful:
            await self._begin()
            self._doubtful = False
        while True:
            batch = await self._reader.batch(COORD, DECIDED, start=self.sequence + 1)
            for one in batch.messages:
                if not self._take(one):
                    # Its leader made a snapshot and let go of commits that were not read here yet.
                    self._doubtful = True
                    return await self._round()
            if not batch.more:
                return None

    def _take(self, one: Stored) -> bool:
        try:
            commit = Commit.decode(one.data)
        except ParseError as error:
            log.error("commit %d is left out: %s", one.seq, error)
            self.sequence = one.seq
            return True
        if commit.first > self.number + 1:
            return False
        for number, event in enumerate(commit.events, start=commit.first):
            if number > self.number:
                self._fold(event, number=number, at=commit.at)
        self.epoch, self.sequence = commit.epoch, one.seq
        return True

    def _fold(self, event: Event, *, number: int, at: int) -> None:
        self.number = number
        self.since_snapshot += 1
        if not self.ledgers.apply(event, number=number, at=at):
            log.debug("event %d of kind %s is of another version", number, event[0])

    async def _begin(self) -> None:
        """Be what the last snapshot says, or empty."""
        self._readings += 1
        self.epoch = self.number = self.sequence = self.since_snapshot = 0
        head = await self._reader.last(COORD, HEAD)
        told: dict[str, Any] = msgpack.unpackb(head.data) if head is not None else {}
        if not told:
            self.ledgers.load(None)
            return
        chunks = await self._reader.all(COORD, f"{SNAPSHOTS}.{told['id']}.*")
        if len(chunks) != told["chunks"]:
            raise TimedOut("a snapshot was replaced while it was read; reading the new one")
        self.ledgers.load(msgpack.unpackb(b"".join(chunk.data for chunk in chunks), strict_map_key=False))
        # The commit with the snapshot's last event is the last one that may be gone from the log.
        self.epoch, self.number, self.sequence = told["epoch"], told["number"], told["sequence"] - 1

    # Writing -----------------------------------------------------------------------------------

    def take(self, event: Event, *, at: int) -> int:
        """Fold an event that is about to be written; its number."""
        self._fold(event, number=self.number + 1, at=at)
        return self.number

    async def append(self, commit: Commit) -> None:
        """Store a commit whose events are folded already, behind the last one read or written here.

        Raises:
            Conflict: another coordinator has written to the log, or it was read anew meanwhile, as it is once its
                leader was deposed: this one does not lead any more.
            Unreachable, TimedOut: not stored within `PATIENCE` seconds, or stored without an answer.
        """
        readings = self._readings
        sequence = await self._write(DECIDED, commit.encode(), after=self.sequence, commit=commit)
        if readings != self._readings:  # what is folded may be of before this commit: it is read like anybody's
            raise Conflict("the log was read anew while a commit was on its way")
        self.sequence, self.epoch = sequence, commit.epoch

    async def snapshot(self) -> None:
        """Store everything folded so far, and let go of the commits it includes. Between two commits only.

        Raises what `append` raises.
        """
        name = uuid.uuid4().hex
        included, epoch, sequence = self.number, self.epoch, self.sequence  # it may be read anew meanwhile
        data = bytes(msgpack.packb(self.ledgers.dump()))
        chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
        before = await self._reader.last(COORD, HEAD)
        for n, chunk in enumerate(chunks):
            await self._write(f"{SNAPSHOTS}.{name}.{n:05d}", chunk, after=sequence)
        head = {"id": name, "chunks": len(chunks), "epoch": epoch, "number": included, "sequence": sequence}
        await self._write(HEAD, bytes(msgpack.packb(head)), after=sequence)
        self.since_snapshot = self.number - included
        self.snapshot_after = max(SNAPSHOT_EVERY, len(data) // 64)
        # The last commit stays: the next one expects it.
        await self._purge(DECIDED, keep_from=sequence)
        await self._purge(HEAD, keep_last=True)
        if before is not None:
            await self._purge(f"{SNAPSHOTS}.{msgpack.unpackb(before.data)['id']}.*")

    async def _purge(self, subject: str, *, keep_from: int = 0, keep_last: bool = False) -> None:
        request: dict[str, Any] = {"filter": subject}
        if keep_from:
            request["seq"] = keep_from
        elif keep_last:
            request["keep"] = 1
        await self._broker.api(f"STREAM.PURGE.{COORD}", request)

    async def _write(self, subject: str, data: bytes, *, after: int, commit: Commit | None = None) -> int:
        """Write under the condition that the log ends with the commit `after`; the stream sequence."""
        lines = {h.EXPECTED_SEQUENCE: str(after), h.EXPECTED_SUBJECT: DECIDED}
        headers = h.block(h.fields(lines))
        deadline = asyncio.get_running_loop().time() + PATIENCE
        attempt = 0
        while True:
            try:
                ack, _ = await self._broker.publish_once(subject, data, headers=headers)
                return sequence_of(ack)
            except Conflict:
                # It may be this very commit, whose acknowledgement was lost.
                if commit is None or attempt == 0 or (stored := await self._reader.last(COORD, DECIDED)) is None:
                    raise
                if stored.data != data:
                    raise
                return stored.seq
            except (Unreachable, TimedOut) as error:
                await self._broker.before_retry(attempt, deadline, error)
                attempt += 1
