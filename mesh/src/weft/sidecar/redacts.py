"""What may not be seen is taken out of whatever a server says: results, errors, and what it tells meanwhile.

Classes of data are named by the server's `redact` (`secrets`, unless it says otherwise) and by the policy. What takes
a server's definitions is not looked at: they are approved as they are.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

from weft.policy.redaction import DEEPEST, MARK, Redacted, Redactor, redactor
from weft.sidecar import owed
from weft.sidecar.arguments import Schemas
from weft.sidecar.link import Heard
from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft.sidecar.weight import aside, heavy
from weft_protocols.errors import ToolError
from weft_protocols.mcp import META_REDACTED

log = logging.getLogger("weft.sidecar")

DEFINITIONS: Final = ("tools/list", "prompts/list", "resources/templates/list")
"""Methods whose results are definitions."""
LARGEST_NOTE: Final = 256 * 1024
"""Characters of a notification; a larger one is left out."""
SHORT: Final = 4096
"""Characters of base64 that are looked at as a text as well: in longer ones anything can be found by chance."""
CHARSETS: Final = frozenset(
    {"utf-8", "us-ascii", "utf-16", "utf-16le", "utf-16be", "utf-32", "iso-8859-1", "windows-1252"}
)
"""Encodings of texts that are blobs, as their types name them; without a name it is UTF-8."""
LEFT_OUT: Final = (
    "The call was made, and its structured content is left out: it holds {kinds}, which may not be shown, and without "
    "that it has not the form that the tool declares."
)
_CHARSET: Final = re.compile(r";\s*charset=\"?([A-Za-z0-9-]+)")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]*={0,2}\Z")
_SPACE: Final = re.compile(r"\s+")
_NOTES: Final = "notes"
"""Fact: what looks through notifications, and what it took out."""


class Redacts(Passing):
    """Takes data out of what comes back, and says in `_meta` of a result how much of what it was."""

    def __init__(self) -> None:
        self._schemas = Schemas()

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Have notifications looked through."""
        classes = owed.redactions(call)
        if not classes or call.method in DEFINITIONS:
            return call
        return call.with_fact(_NOTES, Looking(redactor(classes)))

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Take it out of the result, or the error."""
        notes: Looking | None = call.facts.get(_NOTES)
        if notes is None:
            return outcome
        looking = Looking(notes.redactor)
        if outcome.cancelled or outcome.refused is not None:
            pass  # the sidecar's own words
        elif outcome.result is not None:
            outcome = await self._result(call, outcome, outcome.result, looking)
        elif outcome.error is not None:
            outcome = replace(outcome, error=await _apart(lambda one: _error(looking, one), outcome.error))
        counts = looking.found.counts + notes.found.counts
        return replace(outcome, call=(outcome.call or call).with_fact(owed.REDACTED, counts)) if counts else outcome

    async def _result(self, call: Call, outcome: Outcome, result: Mapping[str, Any], looking: Looking) -> Outcome:
        made = await _apart(looking.result, result)
        if not looking.found:
            return outcome
        counts = dict(looking.found.counts)
        if await self._broke(call, result.get("structuredContent"), made.get("structuredContent")):
            made = _without_structure(made, counts)
        meta = made.get("_meta")
        told = {**(meta if isinstance(meta, Mapping) else {}), META_REDACTED: counts}
        return replace(outcome, result={**made, "_meta": told})

    async def _broke(self, call: Call, before: Any, after: Any) -> bool:
        """Whether structured content was of the declared form, and is not any more."""
        schema = call.definition.get("outputSchema") if call.definition is not None else None
        if after is before or not isinstance(schema, Mapping):
            return False
        fits = partial(self._schemas.fits, call.definition_digest, schema)
        return await fits(before) is True and await fits(after) is False


class Looking:
    """Looks through what one call brings back, and counts what it took out."""

    def __init__(self, redactor: Redactor) -> None:
        self.redactor = redactor
        self.found = Redacted()

    def value(self, value: Any) -> Any:
        """Any JSON value; the very same object if there is nothing to take out."""
        return self.redactor.value(value, self.found)

    def text(self, text: str) -> str:
        """A text."""
        return self.redactor.text(text, self.found)

    def result(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """The result of any method."""
        readers: Mapping[str, Callable[[Any], Any]] = {
            "content": self._blocks,
            "contents": lambda found: _each(found, self._resource),
            "messages": lambda found: _each(found, self._message),
            "inputRequests": self._texts,
        }
        rest = {key: value for key, value in result.items() if key not in readers}
        return {**self.value(rest), **{key: read(result[key]) for key, read in readers.items() if key in result}}

    def note(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Params of a notification."""
        return dict(self.value(params))

    def _blocks(self, content: Any) -> Any:
        return _each(content, self._block) if isinstance(content, list) else self._block(content)

    def _message(self, message: Any) -> Any:
        """A message of a prompt."""
        if not isinstance(message, dict) or "content" not in message:
            return self.value(message)
        rest = {key: value for key, value in message.items() if key != "content"}
        return {**self.value(rest), "content": self._blocks(message["content"])}

    def _block(self, block: Any) -> Any:
        """A content block: text, a resource or a link to one, an image or a sound."""
        if not isinstance(block, dict):
            return self.value(block)
        if isinstance(block.get("resource"), dict):
            rest = {key: value for key, value in block.items() if key != "resource"}
            return {**self.value(rest), "resource": self._resource(block["resource"])}
        return self._with_blob(block, "data")

    def _resource(self, resource: Any) -> Any:
        """A resource's text or blob."""
        return self._with_blob(resource, "blob") if isinstance(resource, dict) else self.value(resource)

    def _with_blob(self, item: dict[str, Any], key: str) -> Any:
        if not isinstance(item.get(key), str):
            return self.value(item)
        rest = {name: value for name, value in item.items() if name != key}
        return {**self.value(rest), key: self._blob(item[key], str(item.get("mimeType", "")))}

    def _blob(self, data: str, kind: str) -> str:
        """Base64 of a text is looked at as that text; what is not of a text is left alone."""
        plain = _SPACE.sub("", data).replace("-", "+").replace("_", "/").rstrip("=")
        raw = None
        if _BASE64.match(plain):
            try:
                raw = base64.b64decode(plain + "=" * (-len(plain) % 4))
            except binascii.Error:
                raw = None
        for charset in _charsets(kind) if raw is not None else ():
            try:
                text = (raw or b"").decode(charset)
            except UnicodeDecodeError:
                continue
            made = self.text(text)
            return data if made is text else base64.b64encode(made.encode(charset, "replace")).decode()
        return self.text(data) if raw is None or len(data) <= SHORT else data

    def _texts(self, value: Any, level: int = 0) -> Any:
        """A value whose keys say nothing about it, such as the form that a server wants to be filled in."""
        if isinstance(value, str):
            return self.text(value)
        if level >= DEEPEST:
            return f"{MARK}too-deep]"
        if isinstance(value, dict):
            return {self.text(key): self._texts(one, level + 1) for key, one in value.items()}
        return [self._texts(one, level + 1) for one in value] if isinstance(value, list) else value


def hearing(call: Call, heard: Heard) -> Heard:
    """Whoever hears of a call's notifications, without what may not be seen."""
    looking = call.facts.get(_NOTES)
    if not isinstance(looking, Looking):
        return heard
    own = call.meta.get("progressToken")

    def told(method: str, params: dict[str, Any]) -> None:
        if (made := _note(looking, method, params)) is not None:
            # By that token its caller knows what it is about.
            heard(method, {**made, "progressToken": own} if own is not None and "progressToken" in made else made)

    return told


def said(classes: frozenset[str], method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    """Params of a notification that belongs to no call, without some classes of data; None if it is left out."""
    return _note(Looking(redactor(classes)), method, params) if classes else params


def _note(looking: Looking, method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    if heavy(params, nodes=LARGEST_NOTE, characters=LARGEST_NOTE):
        log.warning("a notification %s of more than %d characters is left out", method[:80], LARGEST_NOTE)
        return None
    return looking.note(params)


def _error(looking: Looking, error: ToolError) -> ToolError:
    message, data = looking.text(str(error)), looking.value(error.data)
    if message == str(error) and data is error.data:
        return error
    return ToolError(message, code=error.code, data=data)


def _without_structure(result: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    """A result that says why it has no structured content: its form is declared, and a made-up value would be a lie."""
    told = LEFT_OUT.format(kinds=", ".join(sorted(counts)))
    content = result.get("content")
    kept = {key: value for key, value in result.items() if key != "structuredContent"}
    blocks = [{"type": "text", "text": told}, *(content if isinstance(content, list) else ())]
    return {**kept, "content": blocks, "isError": True}


async def _apart(act: Callable[[Any], Any], value: Any) -> Any:
    """`act` of a value, in a thread if it takes long."""
    weighed = [str(value), value.data] if isinstance(value, ToolError) else value
    return await aside(act, value, large=heavy(weighed))


def _each(found: Any, read: Callable[[Any], Any]) -> Any:
    return [read(one) for one in found] if isinstance(found, list) else read(found)


def _charsets(kind: str) -> tuple[str, ...]:
    """How a text of a type may be encoded."""
    named = _CHARSET.search(kind)
    charset = named[1].lower() if named is not None else ""
    return (charset, "utf-8") if charset in CHARSETS else ("utf-8",)


__all__ = ["Looking", "Redacts", "hearing", "said"]
