"""What secrets and personal data look like, each kind with a probe: a short literal that it cannot be without."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Pattern:
    """One kind of data."""

    kind: str
    """What stands in the replacement: `[redacted:kind]`."""
    probes: tuple[str, ...]
    """One of these has to be in a text in lower case; none for "at least some digits"."""
    regex: re.Pattern[str]
    """Its group `value`, if it has one, is what is replaced."""
    check: Callable[[str], bool] | None = None
    """Whether what matched is one indeed."""
    starts: Callable[[str, str], Iterable[int]] | None = None
    """Of a text and the same in lower case, where alone one can begin, in order: cheaper than to search for it."""
    shortest: int = 16
    """Characters it has at least."""


def luhn(text: str) -> bool:
    """Whether digits are a card's number."""
    digits = [int(c) for c in text if c.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [d if i % 2 else (d * 2 - 9 if d > 4 else d * 2) for i, d in enumerate(reversed(digits), 1)]
    return sum(doubled) % 10 == 0


def _iban(text: str) -> bool:
    plain = text.replace(" ", "")
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def _ssn(text: str) -> bool:
    area, group, serial = text.split("-")
    return area not in ("000", "666") and not area.startswith("9") and group != "00" and serial != "0000"


def _phone(text: str) -> bool:
    return 9 <= sum(c.isdigit() for c in text) <= 15


def _assigned(text: str) -> bool:
    """Whether `password: x` says one: a word alone after a colon is prose."""
    value = re.split(r"=>|[=:]", text, maxsplit=1)[-1].strip()
    return "=" in text or value[:1] in "\"'" or not value.rstrip(".,;!?").isalpha()


def _at_names(_: str, lower: str) -> list[int]:
    return sorted({at for name in _NAME_PROBES for at in _occurrences(lower, name)})


def _at_emails(text: str, _: str) -> Iterator[int]:
    for at in _occurrences(text, "@"):
        begin = at
        while begin > max(0, at - 64) and (text[begin - 1].isalnum() or text[begin - 1] in "_.+-"):
            begin -= 1
        if begin < at:
            yield begin


def _occurrences(text: str, probe: str) -> Iterator[int]:
    at = text.find(probe)
    while at >= 0:
        yield at
        at = text.find(probe, at + 1)


_KEY_BEGIN: Final = r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
_KEY_END: Final = r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
_NAMES: Final = (
    r"(?:password|passwd|pwd|secret|api[_-]?key|access[_-]?key|secret[_-]?key|auth[_-]?token|access[_-]?token"
    r"|refresh[_-]?token|client[_-]?secret|token)"
)
_NAME_PROBES: Final = (
    "password", "passwd", "secret", "api_key", "apikey", "api-key", "access_key", "access-key", "accesskey", "token",
    "pwd",
)  # fmt: skip
_VALUE: Final = r"(?P<value>\"[^\"\n]{4,512}\"|'[^'\n]{4,512}'|[^\s\"',;&<>{}()\[\]]{6,512})"
_MODEL: Final = (
    r"(?<![A-Za-z0-9])(?:sk-(?:ant-|proj-|or-|svcacct-)?[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}"
    r"|gsk_[A-Za-z0-9]{40,}|xai-[A-Za-z0-9]{40,})"
)
_PACKAGE: Final = r"(?:npm_[A-Za-z0-9]{36}|pypi-AgEIcHlwaS[A-Za-z0-9_-]{40,}|dckr_pat_[A-Za-z0-9_-]{20,})"
_EMAIL: Final = r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"
_IBAN: Final = r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"
_PHONE: Final = r"\+(?<![\w+].)[1-9]\d{0,2}[ .(-]{0,2}\d(?:[ .()/-]{0,2}\d){6,12}(?!\w)"


def _secret(
    kind: str, probes: str, regex: str, check: Callable[[str], bool] | None = None, shortest: int = 16
) -> Pattern:
    return Pattern(kind, tuple(probes.split()), re.compile(regex), check, shortest=shortest)


SECRETS: Final = (
    _secret("private-key", "-----begin", rf"(?s){_KEY_BEGIN}.*?(?:{_KEY_END}|\Z)"),
    _secret("aws-key", "akia asia abia acca", r"(?<![A-Za-z0-9])(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}(?![A-Za-z0-9])"),
    _secret("github-token", "ghp_ gho_ ghu_ ghs_ ghr_", r"gh[pousr]_[A-Za-z0-9]{36,255}"),
    _secret("github-token", "github_pat_", r"github_pat_[A-Za-z0-9_]{22,255}"),
    _secret("gitlab-token", "glpat-", r"glpat-[A-Za-z0-9_-]{20,}"),
    _secret("slack-token", "xox xapp-", r"(?:xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,})"),
    _secret("slack-webhook", "hooks.slack.com", r"https://hooks\.slack\.com/[A-Za-z0-9/_-]{20,}"),
    _secret("google-key", "aiza ya29.", r"(?:AIza[0-9A-Za-z_-]{35}|ya29\.[0-9A-Za-z_-]{20,})"),
    _secret("model-key", "sk- hf_ gsk_ xai-", _MODEL),
    _secret("payment-key", "_live_ _test_ whsec_", r"(?:(?:sk|rk|pk)_(?:live|test)_\w{16,}|whsec_[0-9A-Za-z]{24,})"),
    _secret("package-token", "npm_ pypi- dckr_pat_", _PACKAGE),
    _secret("mail-key", "sg. key-", r"(?:SG\.[\w-]{16,}\.[\w-]{16,}|(?<![A-Za-z0-9])key-[0-9a-f]{32})"),
    _secret("nats-seed", "su sa sn so sc", r"(?<![A-Z0-9])S[UANOC][A-Z2-7]{56}(?![A-Z0-9])"),
    _secret("jwt", "eyj", r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
    _secret("bearer", "bearer basic", r"(?i)\b(?:bearer|basic)\s+(?P<value>(?=\S*\d)[A-Za-z0-9._~+/-]{12,}=*)"),
    _secret(
        "url-password",
        "://",
        r"[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s/:@\"']{0,64}:(?P<value>[^\s/@\"']{1,256})@",
        shortest=7,
    ),
    Pattern(
        "password",
        _NAME_PROBES,
        re.compile(rf"(?i){_NAMES}[\"']?\s{{0,3}}(?:=>|=|:)\s{{0,3}}{_VALUE}"),
        _assigned,
        _at_names,
        shortest=8,
    ),
)
"""Credentials."""
PERSONAL: Final = (
    Pattern("email", ("@",), re.compile(_EMAIL), None, _at_emails, shortest=6),
    _secret("iban", "", _IBAN, _iban, 15),
    _secret("card", "", r"\d(?<![\w.-].)(?:[ -]?\d){12,18}(?![\w-])", luhn, 13),
    _secret("ssn", "", r"\d(?<![\w-].)\d\d-\d{2}-\d{4}(?![\w-])", _ssn, 11),
    _secret("phone", "+", _PHONE, _phone, 10),
)
"""Data about people."""
PRESIDIO: Final = "presidio"
"""The class of what Presidio recognizes, which has no patterns here: `Redactor` is told where something is."""
CLASSES: Final[Mapping[str, tuple[Pattern, ...]]] = {"secrets": SECRETS, "pii": PERSONAL, PRESIDIO: ()}
"""What `@redact` names."""
