"""What a push notification config may say (A2A v1.0.1, section 4.3.1; binding, "Push notifications")."""

from __future__ import annotations

import hashlib
import re
from typing import Final
from urllib.parse import urlsplit

from a2a.types import a2a_pb2 as pb

from weft_protocols.errors import FieldViolation

PER_TASK: Final = 16
"""Configs a task may have."""
LONGEST: Final = 2048
"""Characters of a URL, a token or credentials."""
LONGEST_ID: Final = 256
"""Characters of a config's id."""
_HEADER_SAFE: Final = re.compile(r"[!-~](?:[ -~]*[!-~])?\Z")
_SCHEME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_HOST: Final = re.compile(r"[A-Za-z0-9._~-]+\Z|[0-9A-Fa-f:.]+\Z")
_URL: Final = re.compile(r"[!-~]+\Z")


def default_id(task_id: str, url: str) -> str:
    """Id of a config that came without one: the same for the same task and URL, so that repeating it adds nothing."""
    return hashlib.sha256(f"{task_id}\0{url}\0".encode()).hexdigest()[:32]


def violations(config: pb.TaskPushNotificationConfig) -> tuple[FieldViolation, ...]:
    """Every wrong field of a config, but for its task. Secrets stay out of the descriptions."""
    scheme, credentials = config.authentication.scheme, config.authentication.credentials
    good = not config.HasField("authentication") or (_SCHEME.match(scheme) and len(scheme) <= LONGEST_ID)
    found = (
        ("url", url_problem(config.url) if config.url else "missing"),
        ("id", "" if len(config.id) <= LONGEST_ID else f"it has more than {LONGEST_ID} characters"),
        ("token", _header_problem(config.token)),
        ("authentication.scheme", "" if good else "it must name an HTTP scheme, such as Bearer"),
        ("authentication.credentials", _header_problem(credentials)),
    )
    return tuple(FieldViolation(field, problem) for field, problem in found if problem)


def url_problem(url: str) -> str:
    """What is wrong with a webhook's URL; empty if it can be one."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        return f"it is no URL: {error}"
    if parts.scheme not in ("http", "https"):
        return "it must begin with https:// (or http:// where the mesh allows it)"
    if parts.username is not None or parts.password is not None:
        return "it has a user name in it; put credentials into authentication"
    if not host or not _HOST.match(host) or port == 0:
        return "it names no host that can be called; write international names in their ASCII form"
    if len(url) > LONGEST or not _URL.match(url):
        return f"it must be at most {LONGEST} printable ASCII characters, without spaces"
    return ""


def _header_problem(value: str) -> str:
    """What keeps a value out of an HTTP header."""
    if value and (len(value) > LONGEST or not _HEADER_SAFE.match(value)):
        return f"it must be at most {LONGEST} printable ASCII characters, without spaces around them"
    return ""
