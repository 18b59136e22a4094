"""Takes secrets and personal data out of texts and JSON values. Pure, and fast enough for every result.

Most texts are only searched for the probes of `weft.policy.patterns`, short literals. A value
is also redacted for the name of its key, and a text that is base64 for what it hides.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, TypeAlias

from weft.policy.patterns import CLASSES, SECRETS, Pattern, luhn

Span: TypeAlias = tuple[int, int, str]
"""Where something is in a text: its first character, the one behind its last, and of what kind it is."""
Recognize: TypeAlias = Callable[[str], Iterable[Span]]
"""What is to be taken out of a text besides, in order and nowhere twice."""
MARK: Final = "[redacted:"
"""What every replacement begins with."""
DEEPEST: Final = 64
"""Levels of lists and objects; what nests deeper is replaced as a whole."""
KEYS: Final = 4096
"""Keys of objects that are remembered."""
_COUNTS: Final = re.compile(r"(?i)token|pass|seed")
"""Keys whose number counts something: `token: 12`."""
_ENCODED: Final = re.compile(r"[A-Za-z0-9+/_-]{24,16384}={0,2}")
_MARKED: Final = re.compile(r"\[redacted:([a-z0-9-]+)\]")
_DIGITS: Final = re.compile(r"\d")
_WORD: Final = re.compile(r"[a-z]{1,32}(?:/[a-z0-9.+-]{1,64})?\Z")
"""One word or a media type, of which protocols and forms are full: nobody recognizes anything in it."""
_IDENTIFIER: Final = re.compile(r"[A-Za-z_$][A-Za-z0-9_$.:/-]{0,128}\Z")
"""A key that could be a name in a program, or of a protocol: likewise."""

_PASSWORD_KEYS: Final = ("password", "passwd", "passphrase", "secret", "apikey", "privatekey", "accesskey", "secretkey")
_TOKEN_KEYS: Final = ("accesstoken", "refreshtoken", "authtoken", "idtoken", "bearertoken", "sessiontoken", "apitoken")
_SECRET_ENDS: Final = (*_PASSWORD_KEYS, *_TOKEN_KEYS, "clientsecret", "credentials")
_SECRET_KEYS: Final = frozenset(
    {
        "pwd", "pass", "token", "authorization", "proxyauthorization", "cookie", "setcookie", "xapikey", "sessionid",
        "csrf", "csrftoken", "connectionstring", "dsn", "seed", "mnemonic", "pin", "otp",
    }
)  # fmt: skip
_PERSONAL_KEYS: Final = frozenset(
    {
        "email", "emailaddress", "phone", "phonenumber", "mobile", "ssn", "socialsecuritynumber", "taxid",
        "passportnumber", "dateofbirth", "dob", "birthdate", "iban", "creditcard", "cardnumber", "cvv", "cvc",
    }
)  # fmt: skip
_PLAIN: Final = re.compile(r"[^a-z0-9]")


@dataclass(slots=True)
class Redacted:
    """What was taken out."""

    counts: Counter[str] = field(default_factory=Counter)
    """How many of each kind."""

    def __bool__(self) -> bool:
        return bool(self.counts)


class Redactor:
    """Takes some classes of data out of texts and values.

    Args:
        classes: names of `CLASSES`.
        known: secrets by their very value, e.g. those that were injected; at least six characters each count.
        recognize: asked about every text but single words and keys that are identifiers, without what was taken out
            before.
    """

    def __init__(
        self,
        classes: Iterable[str] = ("secrets",),
        *,
        known: Iterable[str] = (),
        recognize: Recognize | None = None,
    ) -> None:
        self.classes = tuple(dict.fromkeys(classes))
        patterns = [pattern for name in self.classes for pattern in CLASSES[name]]
        self._patterns = tuple((pattern, pattern.shortest, pattern.probes) for pattern in patterns)
        self._known = tuple(sorted({one for one in known if len(one) >= 6}, key=len, reverse=True))
        self._recognize = recognize
        self._secret_keys = "secrets" in self.classes
        self._personal_keys = "pii" in self.classes
        self._clean: dict[Any, tuple[Any, str]] = {}

    def text(self, text: str, found: Redacted | None = None) -> str:
        """`text` without it. The very same object if there is nothing to take out."""
        return self._text(text, found if found is not None else Redacted(), _WORD)

    def key(self, key: str, found: Redacted | None = None) -> str:
        """The same of a key of an object."""
        return self._text(key, found if found is not None else Redacted(), _IDENTIFIER)

    def _text(self, text: str, found: Redacted, plain: re.Pattern[str]) -> str:
        """`plain` is what nobody is asked about."""
        given = text
        for secret in self._known:
            if secret in text:
                found.counts["secret"] += text.count(secret)
                text = text.replace(secret, f"{MARK}secret]")
        if len(text) >= 6:
            text = self._matched(text, found)
        if self._recognize is not None and text and not plain.match(text):
            text = _without(text, self._recognize(text), found)
        return given if text == given else text

    def _matched(self, text: str, found: Redacted) -> str:
        """Without what has the form of one of the classes."""
        lower = text.lower()
        digits = _DIGITS.search(text) is not None
        size = len(lower)
        for pattern, shortest, probes in self._patterns:
            if size < shortest:
                continue
            # Of most texts that is all there is to do.
            for probe in probes:
                if probe in lower:
                    break
            else:
                if probes or not digits:
                    continue
            changed = _replaced(pattern, text, lower, found)
            if changed is not text:
                text, lower = changed, changed.lower()
        if self._secret_keys and len(text) >= 24:
            text = self._decoded(text, found)
        return text

    def value(self, value: Any, found: Redacted | None = None) -> Any:
        """A JSON value without it, keys included. The very same object if there is nothing to take out."""
        return self._value(value, found if found is not None else Redacted(), "", 0)

    def _value(self, value: Any, found: Redacted, kind: str, level: int) -> Any:
        """`kind` is not empty within what is redacted for the name of its key."""
        if isinstance(value, str):
            if kind and value:
                return _gone(kind, found)
            return self.text(value, found)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int | float):
            return _gone(kind, found) if kind else self._number(value, found)
        if level >= DEEPEST:
            return _gone("too-deep", found)
        if isinstance(value, Mapping):
            return self._mapping(value, found, kind, level)
        if isinstance(value, list | tuple):
            made = [self._value(one, found, kind, level + 1) for one in value]
            return value if all(a is b for a, b in zip(made, value, strict=True)) else made
        return value

    def _mapping(self, value: Mapping[Any, Any], found: Redacted, kind: str, level: int) -> Any:
        made: dict[Any, Any] = {}
        same = True
        for key, one in value.items():
            name, own = self._clean.get(key) or self._key(key, found)
            if own == "secret" and isinstance(one, int | float) and _COUNTS.fullmatch(key):
                own = ""
            made[name] = self._value(one, found, kind or own, level + 1)
            same = same and name is key and made[name] is one
        return value if same else made

    def _key(self, key: Any, found: Redacted) -> tuple[Any, str]:
        """A key without what is redacted, and why its value is; empty if it is not."""
        if not isinstance(key, str):
            return key, ""
        name, own = self.key(key, found), ""
        plain = _PLAIN.sub("", key.lower()) if len(key) <= 64 else ""
        if self._secret_keys and (plain in _SECRET_KEYS or plain.endswith(_SECRET_ENDS)):
            own = "secret"
        elif self._personal_keys and plain in _PERSONAL_KEYS:
            own = "personal"
        if name is key and len(self._clean) < KEYS:
            self._clean[key] = (name, own)
        return name, own

    def _number(self, value: float, found: Redacted) -> Any:
        """A card's number may come as a number."""
        if self._personal_keys and isinstance(value, int) and 10**12 <= value < 10**19 and luhn(str(value)):
            return _gone("card", found)
        return value

    def _decoded(self, text: str, found: Redacted) -> str:
        """Without base64 of a secret."""

        def replace(match: re.Match[str]) -> str:
            token = match[0]
            try:
                raw = base64.b64decode(token.replace("-", "+").replace("_", "/").rstrip("=") + "==", validate=False)
                plain = raw.decode("ascii")
            except (binascii.Error, ValueError):
                return token
            if not plain.isprintable() and not plain.replace("\n", "").isprintable():
                return token
            inner = plain.lower()
            for pattern in SECRETS:
                if any(probe in inner for probe in pattern.probes) and pattern.regex.search(plain):
                    return _gone(pattern.kind, found)
            return _gone("secret", found) if any(secret in plain for secret in self._known) else token

        return _ENCODED.sub(replace, text)


def _replaced(pattern: Pattern, text: str, lower: str, found: Redacted) -> str:
    def replacement(match: re.Match[str]) -> str:
        value = match.groupdict().get("value")
        if (pattern.check is not None and not pattern.check(match[0])) or MARK in (value or match[0]):
            return match[0]
        if value is None:
            return _gone(pattern.kind, found)
        begin, end = match.start("value") - match.start(), match.end("value") - match.start()
        return match[0][:begin] + _gone(pattern.kind, found) + match[0][end:]

    # In lower case some letters are two: then positions are not the same.
    if pattern.starts is None or len(lower) != len(text):
        return pattern.regex.sub(replacement, text)
    parts, done = [], 0
    for start in pattern.starts(text, lower):
        if start >= done and (match := pattern.regex.match(text, start)) is not None:
            parts += [text[done:start], replacement(match)]
            done = match.end()
    return "".join([*parts, text[done:]]) if parts else text


def _without(text: str, spans: Iterable[Span], found: Redacted) -> str:
    """Without what is in the spans. Marks of what was taken out stay as they are, and are not counted again."""
    marks = [match.span() for match in _MARKED.finditer(text)] if MARK in text else []
    parts, done = [], 0
    for begin, end, kind in spans:
        for first, last in _outside(max(begin, done), end, marks):
            parts += [text[done:first], _gone(kind, found)]
            done = last
    return "".join([*parts, text[done:]]) if parts else text


def _outside(begin: int, end: int, marks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The pieces from `begin` to `end` that are in none of the marks, which are in order."""
    for first, last in marks:
        if last <= begin:
            continue
        if first >= end:
            break
        if begin < first:
            yield begin, first
        begin = last
    if begin < end:
        yield begin, end


def _gone(kind: str, found: Redacted) -> str:
    found.counts[kind] += 1
    return f"{MARK}{kind}]"


def kinds(text: str) -> Counter[str]:
    """How many marks of each kind a text has."""
    return Counter(_MARKED.findall(text))


@lru_cache(maxsize=8)
def redactor(classes: frozenset[str]) -> Redactor:
    """The redactor of some classes, made once."""
    return Redactor(sorted(classes))
