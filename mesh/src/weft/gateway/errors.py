"""Errors of the mesh as clients of the gateway see them: the SDK's classes, and the bodies of both HTTP bindings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from a2a.utils import errors as sdk

from weft_protocols.errors import (
    A2A_DOMAIN,
    A2AError,
    AgentNotFound,
    Backpressure,
    DeadlineExceeded,
    InternalError,
    InvalidParams,
    InvalidRequest,
    TimedOut,
    TooLarge,
    Unavailable,
    Unreachable,
    UsageError,
    WeftError,
)

ERROR_INFO: Final = "type.googleapis.com/google.rpc.ErrorInfo"
BAD_REQUEST: Final = "type.googleapis.com/google.rpc.BadRequest"
RETRY_AFTER: Final = 1
"""Seconds after which a client may try again what was refused for the moment."""

_HTTP: Final = {"UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504}
_SDK: Final[dict[str, type[sdk.A2AError]]] = {**sdk.A2A_REASON_TO_ERROR, "PARSE_ERROR": sdk.JSONParseError}


@dataclass(frozen=True, slots=True)
class _Passing:
    """A refusal that has nothing to do with the request itself."""

    status: str
    """Name of the gRPC status."""
    message: str
    """What clients read; empty for the error's own words."""


_PASSING: Final[dict[type[WeftError], _Passing]] = {
    Backpressure: _Passing("UNAVAILABLE", "the mesh takes no more at the moment; send the same request again"),
    Unavailable: _Passing(
        "UNAVAILABLE", "a part of the mesh does not answer at the moment; send the same request again"
    ),
    Unreachable: _Passing("UNAVAILABLE", "the mesh cannot be reached at the moment; send the same request again"),
    TimedOut: _Passing("DEADLINE_EXCEEDED", "the mesh did not answer in time; send the same request again"),
    DeadlineExceeded: _Passing("DEADLINE_EXCEEDED", ""),
}


def for_clients(error: Exception) -> A2AError:
    """The error a client may see; for one that says nothing to clients an InternalError without details."""
    if isinstance(error, A2AError):
        return error
    for kind, passing in _PASSING.items():
        if isinstance(error, kind):
            metadata = {"retryable": "true", "status": passing.status}
            return InternalError(passing.message or str(error), metadata=metadata)
    if isinstance(error, AgentNotFound):
        return InvalidRequest(str(error))
    if isinstance(error, UsageError | TooLarge):
        return InvalidParams(str(error))
    return InternalError("internal error")


def to_sdk(error: A2AError) -> sdk.A2AError:
    """The SDK's error of the same kind."""
    kind = _SDK.get(error.reason, sdk.InternalError)
    data: dict[str, Any] = dict(error.metadata)
    if error.violations:
        data["errors"] = [{"field": wrong.field, "message": wrong.description} for wrong in error.violations]
    return kind(error.message, data or None)


def details(error: A2AError) -> list[dict[str, Any]]:
    """`google.rpc.ErrorInfo`, and `BadRequest` where fields are wrong (A2A v1.0.1, section 5.4)."""
    found: list[dict[str, Any]] = [
        {"@type": ERROR_INFO, "reason": error.reason, "domain": A2A_DOMAIN, "metadata": dict(error.metadata)}
    ]
    if error.violations:
        wrong = [{"field": violation.field, "description": violation.description} for violation in error.violations]
        found.append({"@type": BAD_REQUEST, "fieldViolations": wrong})
    return found


def jsonrpc_error(error: A2AError, request_id: Any) -> dict[str, Any]:
    """The JSON-RPC response for an error."""
    body = {"code": error.spec.code, "message": error.message, "data": details(error)}
    return {"jsonrpc": "2.0", "id": request_id, "error": body}


def rest_error(error: A2AError) -> dict[str, Any]:
    """The HTTP+JSON body for an error (`google.rpc.Status` in AIP-193's form)."""
    code, status = http_status(error)
    return {"error": {"code": code, "status": status, "message": error.message, "details": details(error)}}


def compatible_rest_error(error: A2AError) -> dict[str, Any]:
    """`rest_error` with what clients of A2A 0.3 look for: the SDK's name of the error."""
    return {**rest_error(error), "type": type(to_sdk(error)).__name__, "message": error.message}


def http_status(error: A2AError) -> tuple[int, str]:
    """HTTP status of an error, and the name of its gRPC status."""
    if is_passing(error):
        status = error.metadata["status"]
        return _HTTP[status], status
    return error.spec.http, error.spec.grpc


def is_passing(error: A2AError) -> bool:
    """Whether it is only at the moment that the request cannot be answered."""
    return isinstance(error, InternalError) and error.metadata.get("status") in _HTTP


def problem(status: int, title: str, detail: str, **more: Any) -> dict[str, Any]:
    """A problem document (RFC 9457) for what is no A2A request."""
    return {"type": "about:blank", "title": title, "status": status, "detail": detail, **more}
