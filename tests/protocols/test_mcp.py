"""MCP over NATS, pure: whatever arrives is a request that says one thing, or a ToolError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft_protocols import mcp
from weft_protocols.errors import ToolError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
META = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {}}
METHODS = st.sampled_from([*mcp.NAMED, "tools/list", "server/discover", "resources/templates/list"])


def lower(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@given(METHODS, st.text(), JSON)
def test_what_is_built_is_what_is_read(method: str, name: str, more: Any) -> None:
    key = mcp.NAMED.get(method)
    params = {**({key: name} if key else {}), "more": more, "_meta": META}
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    subject = mcp.request_subject("me", "files", method=method, name=name if key else "")
    found = mcp.inspect(subject, lower(mcp.request_headers(method, name, "r")), body)
    assert (found.method, found.name, found.params) == (method, name if key else "", params)
    assert found.target == mcp.Target(mcp.TENANT, "me", "files", method, subject.rpartition(".")[2])


@given(METHODS, st.text(), METHODS, st.text())
def test_no_two_things_have_one_subject(method: str, name: str, other_method: str, other_name: str) -> None:
    def subject(method: str, name: str) -> str:
        return mcp.request_subject("me", "files", method=method, name=name if method in mcp.NAMED else "")

    def thing(method: str, name: str) -> tuple[str, str]:
        return method, name if method in mcp.NAMED and name != mcp.EVERY else ""

    same = thing(method, name) == thing(other_method, other_name)
    assert (subject(method, name) == subject(other_method, other_name)) == same


@given(st.text() | METHODS.map(lambda m: mcp.request_subject("me", "files", method=m)), JSON, st.text(), JSON)
def test_whatever_arrives_is_a_request_or_an_error_of_ours(subject: str, body: Any, header: str, meta: Any) -> None:
    bodies = [body, {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": body, "_meta": meta}}]
    headers = {mcp.METHOD_HEADER: "tools/call", mcp.NAME_HEADER: header, mcp.VERSION_HEADER: mcp.VERSION}
    for one in bodies:
        try:
            mcp.inspect(subject, lower(headers), one)
        except ToolError as error:
            json.dumps(mcp.error_object(error))


@given(JSON)
def test_whatever_a_server_calls_an_error_is_one(found: Any) -> None:
    assert isinstance(mcp.error_from(found).code, int)


@given(st.text())
def test_header_values_come_back_and_are_fit_for_a_header(value: str) -> None:
    encoded = mcp.encode_value(value)
    assert encoded.isascii()
    assert encoded == encoded.strip()
    assert mcp.decode_value(encoded) == value


def test_a_name_that_is_not_unicode_is_refused() -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "\ud800", "_meta": META}}
    subject = mcp.request_subject("me", "files", method="tools/call", name="x")
    with pytest.raises(ToolError, match="not Unicode"):
        mcp.inspect(subject, lower(mcp.request_headers("tools/call", "x", "r")), body)
