"""What may not be seen is taken out of whatever a server says: results, errors, and what it tells meanwhile.

Classes of data are named by the server's `redact` (`secrets`, unless it says otherwise) and by the policy. What takes
a server's definitions is not looked at: they are approved as they are.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from weft.policy.patterns import PRESIDIO
from weft.policy.redaction import DEEPEST, MARK, Redacted, Redactor, redactor
from weft.sidecar import owed
from weft.sidecar.arguments import Schemas
from weft.sidecar.link import Heard
from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft.sidecar.presidio.recognizer import START, WITHIN, Recognizer, Unrecognized
from weft.sidecar.weight import aside, heavy
from weft_protocols.errors import ToolError
from weft_protocols.mcp import META_REDACTED, UNREDACTED

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
UNSEEN: Final = (
    "The call was made, and what came back is left out: nobody could look through it for personal data. {why}"
)
TOLD: Final = 5.0
"""Seconds in which notifications that came before an answer have to be looked through."""
T = TypeVar("T")
_CHARSET: Final = re.compile(r";\s*charset=\"?([A-Za-z0-9-]+)")
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]*={0,2}\Z")
_SPACE: Final = re.compile(r"\s+")
_NOTES: Final = "notes"
"""Fact: what looks through notifications, and what it took out."""


class Redacts(Passing):
    """Takes data out of what comes back, and says in `_meta` of a result how much of what it was."""

    def __init__(self, recognizer: Recognizer | None = None) -> None:
        self._schemas = Schemas()
        self._recognizer = recognizer or Recognizer()

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Have notifications looked through. What nobody could look through is not asked for."""
        classes = owed.redactions(call)
        if not classes or call.method in DEFINITIONS:
            return call
        if PRESIDIO in classes and (fault := await self._recognizer.ready(_left(call, START))):
            told = f"{call.name or call.method} of {call.server} is not called: Presidio is to look through its answers"
            return Refusal(UNREDACTED, f"{told}, and cannot. {fault}", in_band=True)
        return call.with_fact(_NOTES, Notes(self._recognizer, classes))

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        """Take it out of the result, or the error."""
        notes: Notes | None = call.facts.get(_NOTES)
        if notes is None:
            return outcome
        found = Redacted()
        try:
            if outcome.cancelled or outcome.refused is not None:
                pass  # the sidecar's own words
            elif outcome.result is not None:
                outcome = await self._result(call, outcome, outcome.result, found)
            elif outcome.error is not None:
                error = await self._looked(call, _error, outcome.error, found)
                outcome = replace(outcome, error=error)
        except Unrecognized as why:
            log.warning("an answer of %s to %s is left out: %s", call.server, call.caller, why)
            outcome = _unseen(call, outcome, UNSEEN.format(why=why))
        await notes.end(0.0 if outcome.cancelled else TOLD)
        counts = found.counts + notes.found.counts
        return replace(outcome, call=(outcome.call or call).with_fact(owed.REDACTED, counts)) if counts else outcome

    async def _result(self, call: Call, outcome: Outcome, result: Mapping[str, Any], found: Redacted) -> Outcome:
        made = await self._looked(call, Looking.result, result, found)
        if not found:
            return outcome
        counts = dict(found.counts)
        if await self._broke(call, result.get("structuredContent"), made.get("structuredContent")):
            made = _without_structure(made, counts)
        meta = made.get("_meta")
        told = {**(meta if isinstance(meta, Mapping) else {}), META_REDACTED: counts}
        return replace(outcome, result={**made, "_meta": told})

    async def _looked(self, call: Call, read: Callable[[Looking, T], T], value: T, found: Redacted) -> T:
        classes = owed.redactions(call)
        return await _looked(self._recognizer, classes, read, value, found, within=_left(call, WITHIN))

    async def _broke(self, call: Call, before: Any, after: Any) -> bool:
        """Whether structured content was of the declared form, and is not any more."""
        schema = call.definition.get("outputSchema") if call.definition is not None else None
        if after is before or not isinstance(schema, Mapping):
            return False
        fits = partial(self._schemas.fits, call.definition_digest, schema)
        return await fits(before) is True and await fits(after) is False


class Looking:
    """Looks through what one call brings back, and counts what it took out."""

    def __init__(self, redactor: Redactor, found: Redacted | None = None) -> None:
        self.redactor = redactor
        self.found = found if found is not None else Redacted()

    def value(self, value: Any) -> Any:
        """Any JSON value; the very same object if there is nothing to take out."""
        return self.redactor.value(value, self.found)

    def text(self, text: str) -> str:
        """A text."""
        return self.redactor.text(text, self.found)

    def result(self, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """The result of any method."""
        readers: Mapping[str, Callable[[Any], Any]] = {
            "content": self._blocks,
            "contents": lambda found: _each(found, self._resource),
            "messages": lambda found: _each(found, self._message),
            "inputRequests": self._texts,
        }
        rest = {key: value for key, value in result.items() if key not in readers}
        return {**self.value(rest), **{key: read(result[key]) for key, read in readers.items() if key in result}}

    def note(self, params: dict[str, Any]) -> dict[str, Any]:
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
            return {self.redactor.key(key, self.found): self._texts(one, level + 1) for key, one in value.items()}
        return [self._texts(one, level + 1) for one in value] if isinstance(value, list) else value


class Notes:
    """Looks through notifications of one call, or of none, and hands them on in their order."""

    def __init__(self, recognizer: Recognizer, classes: frozenset[str]) -> None:
        self.found = Redacted()
        self._recognizer = recognizer
        self._classes = classes
        self._line = recognizer.line("notifications") if PRESIDIO in classes else None

    def tell(self, heard: Heard, method: str, params: dict[str, Any], *, token: str | int | None = None) -> None:
        """Have `heard` hear it, without what may not be seen, but with its progress token."""
        if heavy(params, nodes=LARGEST_NOTE, characters=LARGEST_NOTE):
            log.warning("a notification %s of more than %d characters is left out", method[:80], LARGEST_NOTE)
        elif self._line is None:
            heard(method, _marked(Looking(redactor(self._classes), self.found).note(params), token))
        elif not self._line.put(partial(self._later, heard, method, params, token)):
            log.warning("notifications %s come faster than they are looked through; one is left out", method[:80])

    async def end(self, within: float) -> None:
        """Return when all were handed on; what was not within so many seconds is left out."""
        if self._line is None:
            return
        try:
            async with asyncio.timeout(within):
                await self._line.idle()
        except TimeoutError:
            log.warning("notifications of a call that ended are left out: looking through them took too long")
            self._line.drop()

    async def _later(self, heard: Heard, method: str, params: dict[str, Any], token: str | int | None) -> None:
        try:
            made = await _looked(self._recognizer, self._classes, Looking.note, params, self.found)
        except Unrecognized as error:
            log.warning("a notification %s is left out: %s", method[:80], error)
            return
        heard(method, _marked(made, token))


def hearing(call: Call, heard: Heard) -> Heard:
    """Whoever hears of a call's notifications, without what may not be seen."""
    notes = call.facts.get(_NOTES)
    if not isinstance(notes, Notes):
        return heard
    own = call.meta.get("progressToken")  # by that its caller knows what it is about
    return partial(notes.tell, heard, token=own)


def _marked(params: dict[str, Any], token: str | int | None) -> dict[str, Any]:
    return {**params, "progressToken": token} if token is not None and "progressToken" in params else params


async def _looked(
    recognizer: Recognizer,
    classes: frozenset[str],
    read: Callable[[Looking, T], T],
    value: T,
    found: Redacted,
    *,
    within: float = WITHIN,
) -> T:
    """What `read` makes of a value; what takes long is done in a thread. Raises Unrecognized."""
    large = heavy([str(value), value.data] if isinstance(value, ToolError) else value)
    knowing = await recognizer.redactor(classes, lambda one: read(Looking(one), value), large=large, within=within)
    return await aside(read, Looking(knowing, found), value, large=large)


def _left(call: Call, most: float) -> float:
    """Seconds until nobody waits for the call any more, at most `most`."""
    return most if call.deadline is None else max(0.0, min(most, call.deadline - time.time()))


def _unseen(call: Call, outcome: Outcome, why: str) -> Outcome:
    """The outcome of a call, without anything its server said."""
    if outcome.result is None or call.method != "tools/call":
        code = outcome.error.code if outcome.error is not None else UNREDACTED
        return replace(outcome, result=None, error=ToolError(why, code=code))
    result: dict[str, Any] = {"content": [{"type": "text", "text": why}], "isError": True}
    return replace(outcome, result={"resultType": "complete", **result} if call.modern else result)


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


def _each(found: Any, read: Callable[[Any], Any]) -> Any:
    return [read(one) for one in found] if isinstance(found, list) else read(found)


def _charsets(kind: str) -> tuple[str, ...]:
    """How a text of a type may be encoded."""
    named = _CHARSET.search(kind)
    charset = named[1].lower() if named is not None else ""
    return (charset, "utf-8") if charset in CHARSETS else ("utf-8",)


__all__ = ["Looking", "Notes", "Redacts", "hearing"]
