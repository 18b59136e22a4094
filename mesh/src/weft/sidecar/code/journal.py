"""What came of the calls of a piece of code until one had to wait for an approval: the repeat does not make them again.

Written once, when the code has to be ended because of an approval, and read before it runs again: for the same task,
call of that task, code and inputs. Calls with side effects are besides kept each by itself, by `weft.sidecar.repeats`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class Journal:
    """Of one call."""

    at: float
    """Unix seconds at which the code ran first: what its clock shows."""
    seed: str
    """What its random numbers begin with."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """In their order: `tool`, `arguments` (digest), and `result`, or `error` as in JSON-RPC."""

    @classmethod
    def decode(cls, data: bytes) -> Journal | None:
        """As it was stored; None if it is none."""
        try:
            raw = json.loads(data)
            calls = [dict(one) for one in raw["calls"]]
            return cls(float(raw["at"]), str(raw["seed"]), calls)
        except (ValueError, TypeError, KeyError):
            return None

    def encode(self) -> bytes:
        """As it is stored."""
        made = {"at": self.at, "seed": self.seed, "calls": self.calls}
        return json.dumps(made, separators=(",", ":")).encode()


class Journals:
    """Those of all calls."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def read(self, call: Call) -> Journal | None:
        """What an earlier attempt left. Raises WeftError if that cannot be told."""
        if not call.task:
            return None
        found = await self._broker.last(EFFECTS, _subject(call))
        if found is None or not found.data:
            return None
        data = found.data
        if data.startswith(b"blob:"):
            data = await blobs.get(self._broker, blobs.BlobRef.parse(data[5:].decode()))
        return Journal.decode(data)

    async def write(self, call: Call, journal: Journal) -> None:
        """Keep it for the repeat. Raises WeftError if it is not known to be stored."""
        data = journal.encode()
        if len(data) + HEADROOM > self._broker.max_payload:
            data = b"blob:" + (await blobs.put(self._broker, data)).url.encode()
        await self._broker.publish(_subject(call), data)

    async def drop(self, call: Call) -> None:
        """It was read and the code has ended: where a call says which of its task's calls it is not, start anew."""
        if call.meta.get(META_STEP):
            return
        try:
            await self._broker.publish(_subject(call), b"")
        except WeftError as error:
            log.warning("what was kept for code of task %s is not removed: %s", call.task, error)


def key(call: Call) -> str:
    """Which call of its task it is."""
    step = call.meta.get(META_STEP)
    return digest([call.server, "code", step if isinstance(step, str) else "", digest(dict(call.arguments))])


def entry(tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a call from others of the same code."""
    return {"tool": tool, "arguments": digest(dict(arguments))}


def _subject(call: Call) -> str:
    return f"{EFFECT_RECORDS}.{call.caller}.{call.task}.{key(call)}"
