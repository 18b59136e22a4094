"""One connection to a tool server: requests go out as they are, and what comes back is handed on as it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from weft_protocols.errors import ToolError
from weft_protocols.mcp import META_SUBSCRIPTION, UPSTREAM_FAILED

Heard = Callable[[str, dict[str, Any]], None]
"""Gets method and params of a notification. Must not block."""
OWN: Final = "dev.weft/"
"""What the names of the mesh's own `_meta` begin with."""
PROGRESS: Final = "notifications/progress"
CANCELLED: Final = "notifications/cancelled"
MESSAGE_LIMIT: Final = 8 * 1024 * 1024
"""Bytes of one message of a server, twice what it may answer by default; one that sends more is cut off."""
ASKED_AT_ONCE: Final = 100
"""What a server may have asked of us and not been answered; further questions are left out."""


class LinkEnded(ToolError):
    """The connection ended; a new one may do."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code=UPSTREAM_FAILED)


class Link(Protocol):
    """A connection to one server."""

    ended: asyncio.Event
    """Set when it cannot be used any more."""
    reason: str
    """Why it ended."""

    async def request(
        self, method: str, params: Mapping[str, Any], *, heard: Heard | None = None, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        """Send a request and return its result as it came. Cancelling the wait cancels the request.

        Raises:
            LinkEnded: the connection did not survive it.
            ToolError: the server's own error.
        """
        ...

    async def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """Send a notification; what cannot be sent is lost."""
        ...

    async def handshaken(self) -> None:
        """The handshake of the earlier era is done: listen for what the server says by itself."""
        ...

    async def aclose(self) -> None:
        """Let go of it, process and all. Idempotent."""
        ...


def message_of(raw: bytes | bytearray) -> dict[str, Any] | None:
    """The message in some bytes; None if it is none. What JSON does not know, such as NaN, makes an answer an error."""
    strange: list[str] = []
    try:
        found = json.loads(raw, parse_constant=strange.append)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not strange:
        return found if isinstance(found, dict) else None
    if "method" in found:
        return None
    told = {"code": UPSTREAM_FAILED, "message": f"the server's answer is not JSON: it has {strange[0]} in it"}
    return {"jsonrpc": "2.0", "id": found.get("id"), "error": told}


def unmarked(value: dict[str, Any]) -> dict[str, Any]:
    """What a server said without what only the sidecar says: it must not pass for a refusal of ours."""
    meta = value.get("_meta")
    if not isinstance(meta, dict) or not any(str(key).startswith(OWN) for key in meta):
        return value
    return {**value, "_meta": {key: one for key, one in meta.items() if not str(key).startswith(OWN)}}


def with_token(params: Mapping[str, Any], token: str | int) -> tuple[dict[str, Any], str | int | None]:
    """`params` with a progress token of our own in place of the caller's, and the caller's; None if it had none."""
    meta = params.get("_meta")
    theirs = meta.get("progressToken") if isinstance(meta, Mapping) else None
    if not isinstance(theirs, str | int) or isinstance(theirs, bool) or not isinstance(meta, Mapping):
        return dict(params), None
    return {**params, "_meta": {**meta, "progressToken": token}}, theirs


def restored(params: Any, token: str | int | None) -> dict[str, Any]:
    """A notification's params with the caller's own progress token in them again; None if it had none."""
    made = dict(params) if isinstance(params, dict) else {}
    if token is not None and "progressToken" in made:
        made["progressToken"] = token
    return made


def known_as(message: Mapping[str, Any], ident: str | int) -> dict[str, Any]:
    """Params or a result of a subscription with the id by which the caller knows it."""
    meta = message.get("_meta")
    if not isinstance(meta, dict) or META_SUBSCRIPTION not in meta:
        return dict(message)
    return {**message, "_meta": {**meta, META_SUBSCRIPTION: ident}}


def answer_to(message: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to what a server asks of its client: signs of life only.

    Sampling, elicitation and roots of the earlier era would need the caller's own client at the other end.
    """
    made: dict[str, Any] = {"jsonrpc": "2.0", "id": message.get("id")}
    if message.get("method") == "ping":
        return {**made, "result": {}}
    return {**made, "error": {"code": -32601, "message": "this client is asked nothing"}}
