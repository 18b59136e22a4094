"""Signatures of notifications: Standard Webhooks with Ed25519 (`v1a`), by the key that signs agent cards."""

from __future__ import annotations

import base64
from typing import Final, Protocol

ID: Final = "webhook-id"
TIMESTAMP: Final = "webhook-timestamp"
SIGNATURE: Final = "webhook-signature"
SCHEME: Final = "v1a"
"""Version of the signature: asymmetric, Ed25519."""


class Signer(Protocol):
    """Whoever holds the key."""

    def sign(self, data: bytes) -> bytes:
        """The Ed25519 signature of `data`, 64 bytes."""
        ...


def signed_headers(signer: Signer | None, *, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers that name an attempt at a notification and, where there is a key, vouch for it.

    Args:
        signer: None leaves the signature out.
        message_id: The same for every attempt at one notification; without a dot.
        timestamp: Unix seconds of this attempt.
        body: The bytes that are sent.
    """
    headers = {ID: message_id, TIMESTAMP: str(timestamp)}
    if signer is not None:
        signature = signer.sign(f"{message_id}.{timestamp}.".encode() + body)
        headers[SIGNATURE] = f"{SCHEME},{base64.b64encode(signature).decode()}"
    return headers
