"""Bearer tokens of the HTTP front: each names an agent and one of its tasks, is short-lived, and can be revoked.

An agent gets one by a request over the broker, which proves who it is. Every sidecar of a mesh accepts the tokens of
all, because their key is derived from the seed that they share; nothing about a token is stored.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from weft.core.config import ConnectionSettings
from weft.core.keys import read_seed

PREFIX: Final = "wt1"
LIFETIME: Final = 900.0
"""Seconds a token holds."""
_PURPOSE: Final = b"weft mcp bearer token v1"
_LONGEST: Final = 8192


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose token it is."""

    caller: str
    task: str
    agent_version: str
    chain: tuple[str, ...]
    """The delegation chain, `agent/task` items, the holder's own task last."""
    skill: str
    sender: str
    id: str
    expires: float
    """Unix seconds."""


def token_key(settings: ConnectionSettings) -> bytes:
    """The key that all sidecars of a mesh have; one of this process where they share no seed."""
    if settings.seed_file is None:
        return os.urandom(32)
    return hmac.digest(read_seed(settings.seed_file).encode(), _PURPOSE, hashlib.sha256)


class Tokens:
    """Issues, checks and revokes."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._revoked: dict[tuple[str, str], float] = {}

    def issue(
        self,
        caller: str,
        task: str,
        *,
        agent_version: str = "",
        chain: Sequence[str] = (),
        skill: str = "",
        sender: str = "",
    ) -> tuple[str, Holder]:
        """A token for a task of an agent, from now on for `LIFETIME` seconds. What is asked with it is asked so."""
        own = tuple(chain) or ((f"{caller}/{task}",) if task else ())
        holder = Holder(caller, task, agent_version, own, skill, sender, uuid.uuid4().hex, time.time() + LIFETIME)
        told = [caller, task, agent_version, own, skill, sender, holder.id, holder.expires]
        body = _b64(json.dumps(told).encode())
        signed = f"{PREFIX}.{body}"
        return f"{signed}.{self._mac(signed)}", holder

    def check(self, token: str) -> Holder | None:
        """Whose token it is; None if it is none, too old or revoked."""
        signed, _, mac = token.rpartition(".")
        if len(token) > _LONGEST or not token.isascii() or not hmac.compare_digest(mac, self._mac(signed)):
            return None
        try:
            prefix, _, body = signed.partition(".")
            told = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            caller, task, version, chain, skill, sender, ident, expires = told
        except (ValueError, binascii.Error):
            return None
        if prefix != PREFIX or expires <= time.time() or (caller, ident) in self._revoked:
            return None
        return Holder(caller, task, version, tuple(chain), skill, sender, ident, expires)

    def revoke(self, caller: str, ident: str) -> None:
        """End a token of a caller's before its time."""
        now = time.time()
        self._revoked = {key: until for key, until in self._revoked.items() if until > now}
        self._revoked[caller, ident] = now + LIFETIME

    def _mac(self, signed: str) -> str:
        return _b64(hmac.digest(self._key, signed.encode(), hashlib.sha256))


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
