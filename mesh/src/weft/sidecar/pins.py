"""Which definitions of a server were approved, and how what it says now differs from them. Pure.

The pin is of the whole set: a tool that is new, changed or renamed is not the one that was approved.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from weft_protocols.canonical import canonical_json
from weft_protocols.errors import InvalidConfig

INSTRUCTIONS: Final = "instructions"
TWICE: Final = "\n#"
"""In the key of what has a name that is taken: neither can be told from the other when it is called."""
_VISIBLE: Final = ("\n", "\t")
_HIDDEN: Final = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
_NAME: Final = re.compile(r"[A-Za-z0-9_./-]{1,128}\Z")
_ALIKE: Final = str.maketrans({"1": "l", "I": "l", "|": "l", "0": "o", "O": "o", "-": "_", ".": "_"})
_LARGEST: Final = 32 * 1024 * 1024
"""Bytes of a pin once it is unpacked."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything a server says about what it offers, as it said it."""

    tools: tuple[Mapping[str, Any], ...] = ()
    prompts: tuple[Mapping[str, Any], ...] = ()
    templates: tuple[Mapping[str, Any], ...] = ()
    instructions: str = ""

    @property
    def items(self) -> dict[str, Any]:
        """Definitions by key: `tool:name`, `prompt:name`, `template:uri`, `instructions`.

        Of two with one name the second has a key of its own, so that it is never taken for the first.
        """
        made: dict[str, Any] = {}
        for kind, name, found in (
            ("tool", "name", self.tools),
            ("prompt", "name", self.prompts),
            ("template", "uriTemplate", self.templates),
        ):
            for one in found:
                key = f"{kind}:{one.get(name, '')}"
                made[key if key not in made else f"{key}{TWICE}{len(made)}"] = one
        if self.instructions:
            made[INSTRUCTIONS] = self.instructions
        return made


def digest(definition: Any) -> str:
    """SHA-256 of a definition in canonical form, in hex."""
    try:
        data = canonical_json(definition)
    except (ValueError, RecursionError):
        data = json.dumps(definition, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def set_digest(items: Mapping[str, Any]) -> str:
    """Digest of a whole set of definitions."""
    return digest({key: digest(value) for key, value in items.items()})


@dataclass(frozen=True, slots=True)
class Pin:
    """What was approved of one server."""

    items: Mapping[str, Any] = field(default_factory=dict)
    """The definitions by key."""
    by: str = ""
    """Who approved: an identity, or `first-use`."""
    at: float = 0.0
    """Unix seconds."""
    blocked: tuple[str, ...] = ()
    """Keys an operator put in quarantine although they are approved."""

    def encode(self) -> bytes:
        """As it is stored."""
        raw = {"items": dict(self.items), "by": self.by, "at": self.at, "blocked": list(self.blocked)}
        return zlib.compress(json.dumps(raw).encode())

    @classmethod
    def decode(cls, data: bytes) -> Pin:
        """As it was stored. Raises InvalidConfig if it is none."""
        try:
            raw = json.loads(zlib.decompressobj().decompress(data, _LARGEST))
            return cls(dict(raw["items"]), str(raw["by"]), float(raw["at"]), tuple(raw.get("blocked", ())))
        except (zlib.error, ValueError, KeyError, TypeError) as error:
            raise InvalidConfig(f"a stored pin cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a listing stands to a pin. Keys as in `Listing.items`."""

    new: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    """(old key, new key) of what is the same but for its name; the new key is in `new` as well."""
    gone: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()
    """What has one name with something else."""

    @property
    def clean(self) -> bool:
        """Whether everything offered is approved."""
        return not (self.new or self.changed or self.blocked or self.twice)

    def why(self, key: str) -> str:
        """Why a key is in quarantine; empty if it is not."""
        for was, now in self.renamed:
            if key == now:
                return f"renamed from {was}"
        for reason, keys in (
            ("offered twice", self.twice),
            ("new", self.new),
            ("changed", self.changed),
            ("blocked by an operator", self.blocked),
        ):
            if key in keys:
                return reason
        return ""


def compare(pin: Pin | None, listing: Listing) -> Verdict:
    """How what a server says now differs from what was approved; without a pin everything is new."""
    items = listing.items
    approved = pin.items if pin is not None else {}
    new = tuple(key for key in items if key not in approved)
    changed = tuple(key for key in items if key in approved and digest(items[key]) != digest(approved[key]))
    gone = tuple(key for key in approved if key not in items)
    nameless = {_nameless(key, approved[key]): key for key in gone}
    renamed = tuple((nameless[same], key) for key in new if (same := _nameless(key, items[key])) in nameless)
    blocked = tuple(key for key in items if pin is not None and key in pin.blocked)
    second = [key for key in items if TWICE in key]
    twice = tuple(key for key in items if key in second or any(one.startswith(key + TWICE) for one in second))
    return Verdict(new, changed, renamed, gone, blocked, twice)


def _nameless(key: str, definition: Any) -> str:
    if isinstance(definition, Mapping):
        definition = {name: value for name, value in definition.items() if name not in ("name", "title")}
    return f"{key.partition(':')[0]}:{digest(definition)}"


# What people see -----------------------------------------------------------------------------------


def escaped(text: str) -> str:
    """`text` with every character that would not be seen, or would change what is seen, written out."""
    return "".join(f"\\u{{{ord(c):04x}}}" if _is_hidden(c) else c for c in text)


def hidden(definition: Any) -> list[str]:
    """Where in a definition are characters that nobody sees: its path, and the characters written out."""
    found = []
    for path, text in _texts(definition, ""):
        seen = sorted({f"\\u{{{ord(c):04x}}}" for c in text if _is_hidden(c)})
        if seen:
            found.append(f"{escaped(path) or 'text'}: {' '.join(seen)}")
    return found


def oneline(text: str) -> str:
    """`text` escaped, and in one line, as logs need it."""
    return escaped(text).replace("\n", "\\n")


def suspicious(items: Mapping[str, Any]) -> dict[str, str]:
    """What should be looked at before it is approved, by key, and why. Keys as in `Listing.items`.

    That is what has characters that nobody sees, a tool whose name MCP would not have, and names that look alike.
    """
    found: dict[str, str] = {}
    alike: dict[str, list[str]] = {}
    for key, one in items.items():
        kind, _, name = key.partition(":")
        if hidden(one):
            found[key] = "hidden characters"
        elif kind == "tool" and not _NAME.match(name):
            found[key] = "a name that is no name of MCP"
        if kind in ("tool", "prompt"):
            looks = unicodedata.normalize("NFKC", name).translate(_ALIKE).casefold()
            alike.setdefault(f"{kind}:{looks}", []).append(key)
    for keys in alike.values():
        if len(keys) > 1:
            found |= {key: found.get(key, "a name like another's") for key in keys}
    return found


def difference(before: Any, after: Any) -> list[str]:
    """Lines of a unified difference of two definitions, readable and escaped. None stands for nothing."""
    lines = difflib.unified_diff(_lines(before), _lines(after), "approved", "now", lineterm="", n=2)
    return [escaped(line) for line in lines]


def _lines(definition: Any) -> list[str]:
    if definition is None:
        return []
    if isinstance(definition, str):
        return definition.splitlines()
    shown: list[str] = []
    for line in json.dumps(definition, indent=2, ensure_ascii=False, sort_keys=True).splitlines():
        shown += line.replace("\\n", "\n").splitlines() or [""]
    return shown


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{path}.{key}" if path else str(key), str(key)
            yield from _texts(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _texts(item, f"{path}[{i}]")


def _is_hidden(character: str) -> bool:
    if character in _VISIBLE or " " <= character <= "~":
        return False
    code = ord(character)
    selector = 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF
    blank = code in (0x115F, 0x1160, 0x3164, 0xFFA0, 0x2800, 0x034F)
    return unicodedata.category(character) in _HIDDEN or selector or blank
