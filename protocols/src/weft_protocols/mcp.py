"""MCP 2026-07-28 over NATS: subjects, headers, frames, error codes, and the check that all of them agree.

`protocols/spec/mcp-over-nats.md` is the binding this implements. Bodies are JSON-RPC messages as MCP defines them;
nothing here changes or drops a field of one.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from weft_protocols import headers as h
from weft_protocols.errors import InvalidName, ToolError
from weft_protocols.subjects import TOKEN, step_token

VERSION: Final = "2026-07-28"
"""The revision of MCP on the wire; other ones are bridged at the edges."""
TENANT: Final = "default"
EVERY: Final = "_"
"""Server token of a request to all servers together, whose tools are named `{server}__{tool}`."""
REQUESTS: Final = "mcp.v1.req"
CONTROLS: Final = "mcp.v1.ctl"
REQUEST_EXPORT: Final = f"{REQUESTS}.*.*.>"
CONTROL_EXPORT: Final = f"{CONTROLS}.*.*.*"
CALLER_POSITION: Final = 5
"""1-based token of both subjects that the broker fixes to the sender's account."""
KEEP_ALIVE: Final = 15.0
"""Seconds after which whoever serves a request says that it is still at it."""
SILENCE: Final = 50.0
"""Seconds without a frame after which whoever asked takes the stream for broken."""
LEASE: Final = 100.0
"""Seconds a `subscriptions/listen` is served after its listener last said that it is there."""

METHOD_HEADER: Final = "Mcp-Method"
NAME_HEADER: Final = "Mcp-Name"
VERSION_HEADER: Final = "MCP-Protocol-Version"
REQUEST_HEADER: Final = "Mcp-Request"
FRAME_HEADER: Final = "Mcp-Frame"
CLAIM_HEADER: Final = "Mcp-Claim"
ACCEPT_CLAIM_HEADER: Final = "Mcp-Accept-Claim"
CONTROL_HEADER: Final = "Mcp-Control"
AGENT_VERSION_HEADER: Final = "Weft-Agent-Version"
SKILL_HEADER: Final = "Weft-Skill"
SENDER_HEADER: Final = "Weft-Task-Caller"
FRAMES: Final = ("msg", "end", "err", "ka")
"""A notification; the response, which is the last frame; a failure of the transport, the last one too; keep-alive."""
CONTROLS_KNOWN: Final = ("cancel", "alive", "revoke")

META_VERSION: Final = "io.modelcontextprotocol/protocolVersion"
META_CAPABILITIES: Final = "io.modelcontextprotocol/clientCapabilities"
META_CLIENT: Final = "io.modelcontextprotocol/clientInfo"
META_SUBSCRIPTION: Final = "io.modelcontextprotocol/subscriptionId"
META_RESERVED: Final = "io.modelcontextprotocol/"
META_REFUSAL: Final = "dev.weft/refusal"
"""In a tool result: that it is no result of the tool but a refusal, with its code, so that programs can tell."""
META_REDACTED: Final = "dev.weft/redacted"
"""In a result: what was taken out of it, and how many of each kind."""
META_FENCE: Final = "dev.weft/fence"
"""In a tool call: the lock its task holds, `{name, token}`, or a list of these."""
META_STEP: Final = "dev.weft/step"
"""In a tool call: which call of its task it is, the same when the task runs again."""
NAMED: Final[dict[str, str]] = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
"""Methods that are about one named thing, and the parameter that names it."""
ISSUE_TOKEN: Final = "weft/token"
"""Method by which a task gets a bearer token for the HTTP front: `{task}` to `{url, token, expires}`."""

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
MISMATCH: Final = -32020
UNSUPPORTED_VERSION: Final = -32022
DENIED: Final = -32000
QUARANTINED: Final = -32001
PENDING: Final = -32002
BUSY: Final = -32003
CIRCUIT_OPEN: Final = -32004
LATE: Final = -32005
UPSTREAM_FAILED: Final = -32006
FENCED: Final = -32007
UNKNOWN_OUTCOME: Final = -32008
UNRECORDED: Final = -32009
BROKEN_STREAM: Final = -32010
NO_SERVER: Final = -32011
TOO_LARGE: Final = -32012
RATE_LIMITED: Final = -32013
UNREDACTED: Final = -32014
CODES: Final[dict[int, tuple[str, str]]] = {
    DENIED: ("denied", "the policy does not allow it"),
    QUARANTINED: ("quarantined", "the definition is new or changed and was not approved"),
    PENDING: ("pending", "it needs an approval that was not given yet"),
    BUSY: ("busy", "as many calls as allowed are under way; `data.retryAfter` has seconds"),
    CIRCUIT_OPEN: ("circuit_open", "the server failed too often; `data.retryAfter` has seconds"),
    LATE: ("late", "the deadline passed"),
    UPSTREAM_FAILED: ("upstream_failed", "the server did not start, ended, or does not speak MCP"),
    FENCED: ("fenced", "the call needs a lock that its task does not hold"),
    UNKNOWN_OUTCOME: ("unknown_outcome", "an earlier attempt of this call may have had its effect; it is not repeated"),
    UNRECORDED: ("unrecorded", "the call could not be recorded before it was made"),
    BROKEN_STREAM: ("broken_stream", "no frame came for too long; the outcome is unknown"),
    NO_SERVER: ("no_server", "no server of that name is registered"),
    TOO_LARGE: ("too_large", "a message is over the limit"),
    RATE_LIMITED: (
        "rate_limited",
        "called too often; `data` has `retryAfter` (seconds), `limit` and the `rule` that sets it",
    ),
    UNREDACTED: ("unredacted", "nobody could look through what comes back for what may not be seen"),
    MISMATCH: ("mismatch", "subject, headers and body do not say the same"),
}
"""Codes of this binding: their names, and what they mean."""

_SERVER: Final = re.compile(r"[A-Za-z0-9](?:_?[A-Za-z0-9-]){0,31}\Z")
_METHOD: Final = re.compile(r"[A-Za-z0-9_-]{1,64}(?:/[A-Za-z0-9_-]{1,64}){0,3}\Z")
_PLAIN: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\Z")
_ENCODED: Final = re.compile(r"=\?base64\?(.*)\?=\Z")
SEPARATOR: Final = "__"
"""Between server and tool in a name of the aggregate."""
URI_SEPARATOR: Final = "+"
"""Between server and URI in a resource of the aggregate."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a request's subject says."""

    tenant: str
    caller: str
    server: str
    """`_` for all together."""
    method: str
    name: str
    """The last token: the name itself where it is a token, a digest of it, or `_` where there is none."""


@dataclass(frozen=True, slots=True)
class Inbound:
    """A request whose subject, headers and body agree."""

    target: Target
    id: str | int
    method: str
    name: str
    """Tool, prompt or URI; empty for other methods."""
    params: Mapping[str, Any]


def check_server(value: str) -> str:
    """`value` if it may name a tool server; InvalidName if not."""
    if not _SERVER.match(value):
        raise InvalidName(
            f"tool server {value!r} is not a name: use 1 to 32 of A-Z a-z 0-9 - and single _, beginning with a "
            "letter or a digit"
        )
    return value


def name_of(method: str, params: Mapping[str, Any]) -> str:
    """What a request is about; empty if it is about nothing that has a name, or names nothing."""
    key = NAMED.get(method)
    value = params.get(key) if key is not None else None
    return value if isinstance(value, str) else ""


def name_token(name: str) -> str:
    """Subject token of a name: itself where it is a token, else a digest; `_` where there is none."""
    return step_token(name) if name and name != EVERY else EVERY


def request_subject(caller: str, server: str, *, method: str, name: str = "", tenant: str = TENANT) -> str:
    """Subject of a request. Raises InvalidName if the method cannot be one."""
    if not _METHOD.match(method):
        raise InvalidName(f"{method!r} is not a method of MCP")
    return f"{REQUESTS}.{tenant}.{caller}.{server}.{method.replace('/', '.')}.{name_token(name)}"


def control_subject(caller: str, request: str, *, tenant: str = TENANT) -> str:
    """Subject on which a caller says something about one of its own requests."""
    return f"{CONTROLS}.{tenant}.{caller}.{request}"


def parse_request(subject: str) -> Target:
    """What a request's subject says; InvalidName if it breaks the grammar."""
    tokens = subject.split(".")
    if len(tokens) < 8 or tokens[:3] != ["mcp", "v1", "req"] or not all(TOKEN.match(token) for token in tokens[3:]):
        raise InvalidName(f"subject {subject!r} is no request: mcp.v1.req.tenant.caller.server.method….name")
    return Target(tokens[3], tokens[4], tokens[5], "/".join(tokens[6:-1]), tokens[-1])


def parse_control(subject: str) -> tuple[str, str]:
    """Caller and request of a control subject; InvalidName if it breaks the grammar."""
    tokens = subject.split(".")
    if len(tokens) != 6 or tokens[:3] != ["mcp", "v1", "ctl"] or not all(TOKEN.match(token) for token in tokens[3:]):
        raise InvalidName(f"subject {subject!r} is no control: mcp.v1.ctl.tenant.caller.request")
    return tokens[4], tokens[5]


def encode_value(value: str) -> str:
    """A name as a header's value: itself where that is printable ASCII, else MCP's `=?base64?…?=`."""
    if _PLAIN.match(value) and not _ENCODED.match(value):
        return value
    return f"=?base64?{base64.b64encode(value.encode()).decode()}?="


def decode_value(value: str) -> str | None:
    """The name in a header's value; None if its encoding is broken."""
    match = _ENCODED.match(value)
    if match is None:
        return value
    try:
        raw = base64.b64decode(match[1], validate=True)
        text = raw.decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
    return text if base64.b64encode(raw).decode() == match[1] else None


def request_headers(method: str, name: str, request: str) -> dict[str, str]:
    """Headers every request has."""
    made = {VERSION_HEADER: VERSION, METHOD_HEADER: method, REQUEST_HEADER: request}
    if method in NAMED:
        made[NAME_HEADER] = encode_value(name)
    return made


def inspect(subject: str, headers: Mapping[str, str], body: Any) -> Inbound:
    """The request in a message, if its subject, headers (lower-case names) and body say the same.

    Raises:
        ToolError: -32020 where they do not; -32600 where the body is no request; -32602 or -32022 where what
            every request says about its sender is missing or of another revision.
    """
    try:
        target = parse_request(subject)
    except InvalidName as error:
        raise ToolError(str(error), code=INVALID_REQUEST) from None
    if not isinstance(body, dict) or body.get("jsonrpc") != "2.0" or not isinstance(body.get("method"), str):
        raise ToolError("the body is not one JSON-RPC request", code=INVALID_REQUEST)
    ident, params = body.get("id"), body.get("params", {})
    if isinstance(ident, bool) or not isinstance(ident, str | int) or not isinstance(params, dict):
        raise ToolError("a request has an id, and an object as its params", code=INVALID_REQUEST)
    method = body["method"]
    name = name_of(method, params)
    if not name.isprintable() and any("\ud800" <= c <= "\udfff" for c in name):
        raise ToolError("the name is not Unicode", code=INVALID_REQUEST)
    _agree("method", method, subject=target.method, header=headers.get(METHOD_HEADER.lower()))
    if name_token(name) != target.name:
        raise _mismatch("name", f"the subject has {target.name!r}, the body {name[:80]!r}")
    if method in NAMED and decode_value(headers.get(NAME_HEADER.lower(), "")) != name:
        raise _mismatch("name", f"the header {NAME_HEADER} and the body name different things")
    _check_meta(params.get("_meta"), headers.get(VERSION_HEADER.lower()))
    return Inbound(target, ident, method, name, params)


def _agree(what: str, body: str, *, subject: str, header: str | None) -> None:
    if body != subject or body != header:
        raise _mismatch(what, f"the body has {body[:80]!r}, the subject {subject[:80]!r}, the header {header!r}")


def _check_meta(meta: Any, header: str | None) -> None:
    missing = [key for key in (META_VERSION, META_CAPABILITIES) if not isinstance(meta, dict) or key not in meta]
    if missing:
        raise ToolError(f"params._meta must have {' and '.join(missing)}", code=INVALID_PARAMS)
    if meta[META_VERSION] != header:
        raise _mismatch("protocol version", f"the body has {meta[META_VERSION]!r}, the header {header!r}")
    if meta[META_VERSION] != VERSION:
        raise ToolError(
            f"this binding carries MCP {VERSION}",
            code=UNSUPPORTED_VERSION,
            data={"supported": [VERSION], "requested": meta[META_VERSION]},
        )
    if not isinstance(meta[META_CAPABILITIES], dict):
        raise ToolError(f"{META_CAPABILITIES} must be an object", code=INVALID_PARAMS)


def _mismatch(what: str, how: str) -> ToolError:
    return ToolError(f"subject, headers and body must name the same {what}: {how}", code=MISMATCH)


def error_object(error: ToolError) -> dict[str, Any]:
    """The JSON-RPC error of an error."""
    made: dict[str, Any] = {"code": error.code, "message": str(error)}
    if error.data is not None:
        made["data"] = error.data
    return made


def error_from(found: Any) -> ToolError:
    """The error of a JSON-RPC error object, however malformed."""
    if not isinstance(found, dict):
        return ToolError("the server answered with an error that is none", code=INTERNAL_ERROR)
    code = found.get("code")
    code = code if isinstance(code, int) and not isinstance(code, bool) else INTERNAL_ERROR
    return ToolError(str(found.get("message", "")) or f"error {code}", code=code, data=found.get("data"))


def frame(kind: str, *more: tuple[str, str]) -> bytes:
    """Header block of a frame."""
    return h.block(h.fields([(FRAME_HEADER, kind), *more]))


def joined(server: str, name: str) -> str:
    """Name of a server's tool or prompt in the aggregate."""
    return f"{server}{SEPARATOR}{name}"


def split(name: str) -> tuple[str, str]:
    """Server and own name of a name in the aggregate. Raises ToolError if there is no server in it."""
    server, separator, own = name.partition(SEPARATOR)
    if not separator or not own or not _SERVER.match(server):
        raise ToolError(f"{name[:80]!r} names no server: write server{SEPARATOR}name", code=INVALID_PARAMS)
    return server, own


def joined_uri(server: str, uri: str) -> str:
    """URI of a server's resource in the aggregate."""
    return f"{server}{URI_SEPARATOR}{uri}"


def split_uri(uri: str) -> tuple[str, str]:
    """Server and own URI of a resource in the aggregate. Raises ToolError if there is no server in it."""
    server, separator, own = uri.partition(URI_SEPARATOR)
    if not separator or not own or not _SERVER.match(server):
        raise ToolError(f"{uri[:80]!r} names no server: write server{URI_SEPARATOR}uri", code=INVALID_PARAMS)
    return server, own
