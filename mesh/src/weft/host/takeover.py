"""Claiming a task: first deliveries and the redelivery algorithm.

Reads may be stale, so nothing is decided on one alone: a claim is written expecting the claim that was read, and
the first event of a later attempt expecting the event that was read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from weft.core.broker import Broker, Stored, sequence_of
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.errors import Conflict, TimedOut, Unreachable
from weft_protocols.records import HELD, Claim
from weft_protocols.resources import STREAM
from weft_protocols.states import BY_LABEL, END_LABELS, State

log = logging.getLogger("weft.host")

_FIRST = h.block(h.fields({h.EXPECTED_SEQUENCE: "0"}))
_FENCE = f"{h.EXPECTED_SEQUENCE}: %d\r\n{h.EXPECTED_SUBJECT}: %b\r\n".encode()


def fence(agent: str, task_id: str, token: int) -> bytes:
    """Header lines of every write under a claim."""
    return _FENCE % (token, subjects.claim(agent, task_id).encode())


async def write_claim(broker: Broker, agent: str, *, task_id: str, claim: Claim, expected: int) -> int:
    """Store a claim expecting the one with sequence `expected` (0: none) to be the last; its sequence.

    Raises:
        Conflict: another claim is the last, and it is not this one stored by an attempt whose answer was lost.
    """
    headers = _FIRST if expected == 0 else h.block(h.fields({h.EXPECTED_SEQUENCE: str(expected)}))
    data = claim.encode()
    try:
        return await broker.publish(subjects.claim(agent, task_id), data, headers=headers)
    except Conflict:
        stored = await broker.last(STREAM, subjects.claim(agent, task_id))
        if stored is not None and stored.data == data:
            return stored.seq
        raise


async def first_claim(broker: Broker, agent: str, *, task_id: str, claim: Claim) -> int:
    """Store a claim on a task that nobody has claimed; its sequence. Conflict as in `write_claim`."""
    try:
        ack, _ = await broker.publish_once(subjects.claim(agent, task_id), claim.encode(), headers=_FIRST)
        return sequence_of(ack)
    except (Unreachable, TimedOut):
        return await write_claim(broker, agent, task_id=task_id, claim=claim, expected=0)


async def last_claim(broker: Broker, agent: str, task_id: str) -> tuple[int, Claim] | None:
    """The last claim of a task and its sequence, or None."""
    stored = await broker.last(STREAM, subjects.claim(agent, task_id))
    return None if stored is None else (stored.seq, Claim.decode(stored.data))


async def last_event(broker: Broker, agent: str, task_id: str, *, caller: str, origin: str) -> Stored | None:
    """The last event of a task, or None."""
    return await broker.last(STREAM, subjects.event(agent, task_id, caller, origin))


def ended(event: Stored | None) -> bool:
    """Whether a last event is terminal."""
    state = h.get(event.headers, b"Weft-State") if event is not None else None
    return state is not None and state.decode() in END_LABELS


def state(event: Stored | None) -> State:
    """State a last event left its task in; UNSPECIFIED where it does not say."""
    label = h.get(event.headers, b"Weft-State") if event is not None else None
    return BY_LABEL.get(label.decode(), State.UNSPECIFIED) if label is not None else State.UNSPECIFIED


def event_number(event: Stored | None) -> int:
    """Number of an event, 0 for none."""
    return int(h.get(event.headers, b"Weft-Event") or 0) if event is not None else 0


def begun_by(event: Stored | None, replica: str, attempt: int) -> bool:
    """Whether the last event is a replica's own word that this attempt begins (its acknowledgement was lost)."""
    if event is None or state(event) is not State.WORKING:
        return False
    wrote, number = h.get(event.headers, b"Weft-Replica"), h.get(event.headers, b"Weft-Attempt")
    return wrote == replica.encode() and number == b"%d" % attempt


async def take_over(broker: Broker, agent: str, *, task_id: str, wanted: Claim) -> tuple[int, Claim, Claim | None]:
    """Claim a task that may have had owners before, again until it is won.

    `wanted` describes the new owner; attempt, origin and context come from the claim before, unless that one was
    made for another caller (a cancel of a task that is not its sender's): such a claim counts as none.

    Returns:
        (token, the claim written, the claim before or None).
    """
    while True:
        found = await last_claim(broker, agent, task_id)
        before = found[1] if found is not None else None
        claim = wanted
        if before is not None and before.caller == wanted.caller:
            # Only work that was begun and not finished counts: hand-backs and suspensions are nobody's failure.
            attempt = before.attempt + 1 if before.state == HELD else before.attempt
            message = before.message or wanted.message
            claim = replace(wanted, origin=before.origin, attempt=attempt, message=message, gave_way=before.gave_way)
        claim = replace(claim, state=HELD, at=time.time_ns() // 1_000_000)
        try:
            token = await write_claim(
                broker, agent, task_id=task_id, claim=claim, expected=found[0] if found is not None else 0
            )
        except Conflict:
            await asyncio.sleep(0)
            continue
        return token, claim, before if before is not None and before.caller == wanted.caller else None
