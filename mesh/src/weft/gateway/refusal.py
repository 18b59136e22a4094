"""Answers that the gateway gives before a request reaches an agent, in the form of A2A's HTTP binding."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from weft.gateway.errors import ERROR_INFO, rest_error
from weft_protocols.errors import A2AError

if TYPE_CHECKING:
    from starlette.types import Send

DOMAIN: Final = "weft"
"""`ErrorInfo.domain` of reasons that A2A does not have."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not taken, for every protocol."""

    http: int
    status: str
    """Name of the gRPC status, and of `google.rpc.Status`."""
    reason: str
    """`ErrorInfo.reason`."""
    message: str
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of the HTTP response, or trailing metadata in gRPC, by lower-case name."""

    def body(self) -> dict[str, Any]:
        """The JSON body (`google.rpc.Status` as A2A v1.0.1, section 11.6 has it)."""
        info = {"@type": ERROR_INFO, "reason": self.reason, "domain": DOMAIN, "metadata": {}}
        return {"error": {"code": self.http, "status": self.status, "message": self.message, "details": [info]}}


async def refuse(send: Send, refusal: Refusal | A2AError, *, headers: dict[str, str] | None = None) -> None:
    """Answer with a refusal, or an error of A2A, and the connection's end where the request was not read whole."""
    if isinstance(refusal, Refusal):
        status, document, more = refusal.http, refusal.body(), refusal.headers
    else:
        document, more = rest_error(refusal), {}
        status = document["error"]["code"]
    body = json.dumps(document, separators=(",", ":")).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "cache-control": "no-store",
        **more,
        **(headers or {}),
    }
    raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
