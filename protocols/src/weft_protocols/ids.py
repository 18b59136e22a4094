"""Identifiers: derived where two parties must agree, given as arguments where they are random."""

from __future__ import annotations

import hashlib
import zlib
from typing import Final

SLICES: Final = 100
"""Number of slices of an agent's conversations, so that one slice is one percent."""


def task_id(caller: str, agent: str, message_id: str) -> str:
    """Id of the task that `message_id` of `caller` creates at `agent`: 32 lower-case hex digits.

    The first 16 bytes of SHA-256 over the three names, each followed by a zero byte, so that the same
    message sent twice is the same task and whoever recomputes the id knows whose it is.
    """
    digest = hashlib.sha256(b"%b\0%b\0%b\0" % (caller.encode(), agent.encode(), message_id.encode()))
    return digest.hexdigest()[:32]


def child_message_id(parent_task: str, key: str) -> str:
    """messageId of the child that step `key` of a task sends: the same on every attempt."""
    return hashlib.sha256(b"child\0%b\0%b" % (parent_task.encode(), key.encode())).hexdigest()[:32]


def idempotency_key(task: str, key: str) -> str:
    """What a step's body hands to an outside system: the same on every attempt."""
    return hashlib.sha256(b"step\0%b\0%b" % (task.encode(), key.encode())).hexdigest()[:32]


def slice_of(context_id: str) -> str:
    """Slice of a conversation, two digits: `crc32(contextId) % 100`."""
    return f"{zlib.crc32(context_id.encode()) % SLICES:02d}"


def digest(data: bytes) -> str:
    """SHA-256 of `data` as 64 hex digits: the name of a blob."""
    return hashlib.sha256(data).hexdigest()
