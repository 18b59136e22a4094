"""What secrets and personal data look like, each kind with a probe: a short literal that it cannot be without."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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


_KEY_BEGIN: Final = r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
_KEY_END: Final = r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
_NAMES: Final = (
    r"(?:password|passwd|pwd|secret|api[_-]?key|access[_-]?key|secret[_-]?key|auth[_-]?token|access[_-]?token"
    r"|refresh[_-]?token|client[_-]?secret|token)"
)
_VALUE: Final = r"(?P<value>\"[^\"\n]{4,512}\"|'[^'\n]{4,512}'|[^\s\"',;&<>{}()\[\]]{6,512})"
_MODEL: Final = (
    r"(?<![A-Za-z0-9])(?:sk-(?:ant-|proj-|or-|svcacct-)?[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}"
    r"|gsk_[A-Za-z0-9]{40,}|xai-[A-Za-z0-9]{40,})"
)
_PACKAGE: Final = r"(?:npm_[A-Za-z0-9]{36}|pypi-AgEIcHlwaS[A-Za-z0-9_-]{40,}|dckr_pat_[A-Za-z0-9_-]{20,})"
_EMAIL: Final = r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"
_IBAN: Final = r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"
_PHONE: Final = r"(?<![\w+])\+[1-9]\d{0,2}[ .(-]{0,2}\d(?:[ .()/-]{0,2}\d){6,12}(?!\w)"


def _secret(kind: str, probes: str, regex: str, check: Callable[[str], bool] | None = None) -> Pattern:
    return Pattern(kind, tuple(probes.split()), re.compile(regex), check)


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
    _secret("url-password", "://", r"[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s/:@\"']{0,64}:(?P<value>[^\s/@\"']{1,256})@"),
    _secret(
        "password",
        "password passwd secret api_key apikey api-key access_key access-key token pwd",
        rf"(?i){_NAMES}[\"']?\s{{0,3}}(?:=>|=|:)\s{{0,3}}{_VALUE}",
        _assigned,
    ),
)
"""Credentials."""
PERSONAL: Final = (
    _secret("email", "@", _EMAIL),
    _secret("iban", "", _IBAN, _iban),
    _secret("card", "", r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])", luhn),
    _secret("ssn", "", r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])", _ssn),
    _secret("phone", "+", _PHONE, _phone),
)
"""Data about people."""
CLASSES: Final[Mapping[str, tuple[Pattern, ...]]] = {"secrets": SECRETS, "pii": PERSONAL}
"""What `@redact` names."""
