"""What came of the calls of a piece of code until one had to wait for an approval: the repeat does not make them again.

Written once, when the code has to be ended because of an approval, and read before it runs again: for the same task,
call of that task, code and inputs. Calls with side effects are besides kept each by itself, by `weft.sidecar.repeats`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from weft.core import blobs
from weft.core.broker import Broker
from weft.sidecar.pipeline import Call
from weft_protocols.audit import digest
from weft_protocols.errors import WeftError
from weft_protocols.mcp import META_STEP
from weft_protocols.resources import EFFECT_RECORDS, EFFECTS

log = logging.getLogger("weft.sidecar")

HEADROOM: Final = 4096
BLOB: Final = b"blob:"
"""Before the reference to what is too large for a message."""


class Journal:
    """Of one call.

    Args:
        at: unix seconds at which the code ran first: what its clock shows.
        seed: what its random numbers begin with.
        before: what came of the calls of the run before, in their order: `tool`, `arguments` (digest), `answered`, and
            `result`, or `error` as in JSON-RPC.
    """

    def __init__(self, at: float, seed: str, before: Sequence[Mapping[str, Any]] = ()) -> None:
        self.at = at
        self.seed = seed
        self.before = list(before)
        self.size = 0
        """Bytes of what this run had from its calls."""
        self._made: list[bytes] = []

    @property
    def calls(self) -> int:
        """How many this run has made, or had from the one before."""
        return len(self._made)

    def add(self, told: Mapping[str, Any]) -> None:
        """Note what came of a call."""
        line = json.dumps(told, separators=(",", ":")).encode()
        self.size += len(line)
        self._made.append(line)

    def encode(self) -> bytes:
        """As it is stored: one JSON value a line, so that reading a long one holds nobody up."""
        return b"\n".join([json.dumps({"at": self.at, "seed": self.seed}).encode(), *self._made])


class Journals:
    """Those of all calls."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def read(self, call: Call) -> Journal | None:
        """What an earlier attempt left. Raises WeftError if that cannot be told."""
        if not call.task:
            return None
        found = await self._broker.last(EFFECTS, _subject(call))
        data = found.data if found is not None else b""
        if data.startswith(BLOB):
            data = await blobs.get(self._broker, blobs.BlobRef.parse(data.removeprefix(BLOB).decode()))
        return await _decoded(data) if data else None

    async def write(self, call: Call, journal: Journal) -> None:
        """Keep it for the repeat. Raises WeftError if it is not known to be stored."""
        data = journal.encode()
        if len(data) + HEADROOM > self._broker.max_payload:
            data = BLOB + (await blobs.put(self._broker, data)).url.encode()
        await self._broker.publish(_subject(call), data)

    async def drop(self, call: Call) -> None:
        """It was read and the code has ended: where a call says which of its task's calls it is not, start anew."""
        if call.meta.get(META_STEP):
            return
        try:
            await self._broker.publish(_subject(call), b"")
        except WeftError as error:
            log.warning("what was kept for code of task %s is not removed: %s", call.task, error)


async def _decoded(data: bytes) -> Journal | None:
    """As it was stored; None if it is none."""
    first, *rest = data.split(b"\n")
    before = []
    try:
        head = json.loads(first)
        for line in rest:
            before.append(dict(json.loads(line)))
            await asyncio.sleep(0)
        return Journal(float(head["at"]), str(head["seed"]), before)
    except (ValueError, TypeError, KeyError) as error:
        log.warning("what was kept for code cannot be read, and it runs from its beginning: %s", error)
        return None


def key(call: Call) -> str:
    """Which call of its task it is."""
    step = call.meta.get(META_STEP)
    return digest([call.server, "code", step if isinstance(step, str) else "", digest(dict(call.arguments))])


def entry(tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a call from others of the same code."""
    return {"tool": tool, "arguments": digest(dict(arguments))}


def _subject(call: Call) -> str:
    return f"{EFFECT_RECORDS}.{call.caller}.{call.task}.{key(call)}"
