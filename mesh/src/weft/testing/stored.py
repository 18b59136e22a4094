"""What the broker stored about one task: its events, claims and step records, in the order they were stored."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Self

from weft.core.broker import Broker, Stored
from weft.testing import invariants
from weft.testing.broker import BrokerMesh
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.errors import ApiError
from weft_protocols.events import RawEvent, read_stored
from weft_protocols.records import HELD, Claim
from weft_protocols.resources import STREAM
from weft_protocols.states import END_LABELS

_NO_MESSAGE = 10037


@dataclass(frozen=True, slots=True)
class StoredTask:
    """The records of one task, each list in the order of the stream."""

    messages: tuple[Stored, ...]
    """All of them, the caller's included."""
    events: tuple[RawEvent, ...]
    claims: tuple[tuple[int, Claim], ...]
    """(stream sequence, claim)."""
    steps: dict[str, tuple[Stored, ...]]
    """All records of each step key."""

    @classmethod
    async def read(cls, mesh: BrokerMesh, agent: str, task_id: str) -> Self:
        """Everything stored about a task until now, whoever it belongs to."""
        broker = await mesh.connect("coordinator")
        try:
            said = [
                *await _all(broker, f"mesh.task.{agent}.*.*.{task_id}"),
                *await _all(broker, f"mesh.input.{agent}.*.*.{task_id}"),
            ]
            stored = await _all(broker, f"mesh.event.{agent}.{task_id}.*.*")
            claims = await _all(broker, subjects.claim(agent, task_id))
            steps = await _all(broker, f"mesh.step.{agent}.{task_id}.*")
        finally:
            await broker.close()
        by_key: dict[str, tuple[Stored, ...]] = {}
        for one in steps:
            key = one.subject.rpartition(".")[2]
            by_key[key] = (*by_key.get(key, ()), one)
        return cls(
            tuple(sorted((*said, *stored, *claims, *steps), key=lambda one: one.seq)),
            tuple(event for one in stored for event in read_stored(one.data, one.headers, seq=one.seq)),
            tuple((one.seq, Claim.decode(one.data)) for one in claims),
            by_key,
        )

    @property
    def states(self) -> list[str]:
        """`Weft-State` of the events that have one."""
        return [event.state for event in self.events if event.state]

    @property
    def ends(self) -> list[RawEvent]:
        """The terminal events; a task that is over has exactly one."""
        return [event for event in self.events if event.state in END_LABELS]

    @property
    def attempts(self) -> list[int]:
        """Attempt of each owner in turn; a claim that its owner only renewed does not count."""
        held = [claim for _, claim in self.claims if claim.state == HELD]
        owners = [(claim.replica, claim.attempt, claim.delivery) for claim in held]
        return [owner[1] for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]

    def check(self) -> None:
        """Raise AssertionError where the log of a task that is over breaks a law (`weft.testing.invariants`)."""
        entries = [invariants.Entry(one.seq, one.subject, h.parse(one.headers), one.data) for one in self.messages]
        found = invariants.check(entries)
        if found.violations:
            raise AssertionError(str(found))


async def _all(broker: Broker, subject: str) -> list[Stored]:
    found: list[Stored] = []
    start = 1
    while True:
        try:
            answer = await broker.api(f"STREAM.MSG.GET.{STREAM}", {"seq": start, "next_by_subj": subject})
        except ApiError as error:
            if error.err_code == _NO_MESSAGE:
                return found
            raise
        message = answer["message"]
        headers = base64.b64decode(message["hdrs"]) if "hdrs" in message else None
        data = base64.b64decode(message.get("data", ""))
        found.append(Stored(message["subject"], message["seq"], headers, data, message["time"]))
        start = message["seq"] + 1
