"""Records of what was done through tools: who, what, why, when, and how it ended. Pure.

A call has an *intent*, stored before it is made, and an *outcome* with the same id; one that is refused has a *denial*.
A record is canonical JSON (RFC 8785), so that its digest is that of its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from weft_protocols.canonical import DEEPEST, canonical_json
from weft_protocols.errors import InvalidParams
from weft_protocols.resources import AUDIT_RECORDS

Kind = Literal["intent", "outcome", "denial"]
KINDS: Final[tuple[Kind, ...]] = ("intent", "outcome", "denial")
VERSION: Final = 1
"""Of the shape. Later ones may have more fields; readers ignore what they do not know."""
PARTS: Final = ("who", "what", "why", "how", "outcome")


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One record. The parts are JSON objects; what is empty is left out.

    - `who`: `agent`, `version`, `skill`, `task`, `sender` (who sent the task), `chain` (list of `agent/task`), `front`,
      `request`
    - `what`: `server`, `method`, `name`, `definition` (digest), `arguments` (digest), `shown` (arguments, redacted)
    - `why`: `policy` (version), `decision`, `rules` (ids), `errors`, `obligations`, `shadow` (what
      what only watches would have decided), `approvals` (list of `{id, by, asked}`), `fence` (list of `{name, token}`)
    - `how`: `sandbox` (level), `deadline` (unix ms), `within` (id of the call whose code made it)
    - `outcome`: `status` (`ok`, `failed`, `error`, `refused`, `cancelled`, `replayed`), `code`, `kind`, `message`,
      `ms`, `bytes`, `redactions` (how many of each kind), `result` (digest)
    """

    kind: Kind
    id: str
    """Of the call: intent and outcome share it."""
    at: int
    """Unix milliseconds."""
    by: str
    """Who wrote it, such as `sidecar/3f2a`."""
    who: Mapping[str, Any] = field(default_factory=dict)
    what: Mapping[str, Any] = field(default_factory=dict)
    why: Mapping[str, Any] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)
    outcome: Mapping[str, Any] = field(default_factory=dict)
    _written: dict[str, tuple[Mapping[str, Any], str]] = field(default_factory=dict, repr=False, compare=False)
    """Parts as they were written: a record that is made of this one has most of them too."""

    @property
    def subject(self) -> str:
        """Where it is stored: `mesh.audit.{kind}.{agent}.{server}`."""
        return f"{AUDIT_RECORDS}.{self.kind}.{self.who.get('agent') or '_'}.{self.what.get('server') or '_'}"

    def encode(self) -> bytes:
        """As it is stored. Raises ValueError if a part has no canonical form."""
        texts = {name: canonical_json(getattr(self, name)).decode() for name in ("at", "by", "id", "kind")}
        texts |= {part: text for part in PARTS if (text := self._text(part))} | {"v": str(VERSION)}
        return ("{" + ",".join(f'"{name}":{text}' for name, text in sorted(texts.items())) + "}").encode()

    def _text(self, part: str) -> str:
        """A part as it is written; empty if it is."""
        value: Mapping[str, Any] = getattr(self, part)
        known = self._written.get(part)
        if known is not None and known[0] is value:
            return known[1]
        kept = {key: one for key, one in value.items() if one not in ("", None, [], {}, ())}
        text = canonical_json(kept, deepest=DEEPEST - 1).decode() if kept else ""
        self._written[part] = (value, text)
        return text

    @classmethod
    def decode(cls, data: bytes) -> AuditRecord:
        """As it was stored. Raises InvalidParams if it is none."""
        try:
            raw = json.loads(data)
            kind = raw["kind"]
            if kind not in KINDS or not isinstance(raw["v"], int):
                raise InvalidParams(f"an audit record has kind {kind!r}")
            parts = {part: dict(raw.get(part, {})) for part in PARTS}
            return cls(kind, str(raw["id"]), int(raw["at"]), str(raw["by"]), **parts)
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidParams(f"an audit record cannot be read: {error}") from None


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, in hex; of its plain form where it has no canonical one."""
    return hashlib.sha256(plain_form(value)).hexdigest()


def plain_form(value: Any) -> bytes:
    """A JSON value in canonical form; where it has none, as JSON with sorted keys. RecursionError if it is too deep."""
    try:
        return canonical_json(value)
    except (ValueError, RecursionError):
        return json.dumps(value, sort_keys=True, default=str).encode()
