"""Rules to begin with, made of what is registered: they are meant to be read and changed. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from weft.policy.bundle import Bundle
from weft.policy.catalog import Catalog, Offer

FILE: Final = "tools.cedar"
TESTS: Final = "tools.test.yaml"
LISTED: Final = 12
"""Tools that are named one by one for each server; of the others, how many there are."""
_HEAD: Final = """\
// Who may use which tools. What no rule permits is denied.
// `mesh policy check` finds mistakes, `mesh policy test` runs the tests beside this file,
// `mesh policy load` has the rules decide. docs/policy.md says what rules can say.

// Whoever uses the mesh from its command line (`mesh tools call`, `mesh mcp`) may do everything.
@id("operator")
permit (principal == Agent::{operator}, action, resource);
"""


def starter(catalog: Catalog, *, operator: str) -> Bundle:
    """A policy that permits what only reads, and has the rest beside it as comments.

    Args:
        catalog: what is registered.
        operator: the identity that may do everything.
    """
    parts = [_HEAD.format(operator=json.dumps(operator))]
    for server in sorted(catalog.servers):
        tools = sorted((one for one in catalog.tools.values() if one.server == server), key=lambda one: one.name)
        parts.append("\n".join(_server(server, tools)))
    return Bundle.of({FILE: "\n".join(parts) + "\n", TESTS: _tests(catalog, operator)})


def _server(server: str, tools: list[Offer]) -> Iterator[str]:
    reading = [one for one in tools if one.hints["read_only"]]
    others = [one for one in tools if not one.hints["read_only"]]
    yield f"\n// {server}"
    if reading:
        yield f"// Every agent may call what only reads, as the server says: {_names(reading)}."
        yield f"@id({json.dumps(f'{server}-reads')})"
        yield f'permit (principal, action == Action::"call", resource in Server::{json.dumps(server)})'
        yield "when { resource.read_only };"
    if others:
        yield f"// It does not say of these that they only read: {_names(others)}."
        yield "// Permit each to the agents that need it, and say what a call owes, e.g.:"
        yield "//"
        for line in _permit(others[0]):
            yield f"// {line}"
    if not tools:
        yield "// It offers no tools, or none of them is approved yet."


def _permit(tool: Offer) -> Iterator[str]:
    owed = []
    if tool.hints["destructive"]:
        owed.append('@approval("ops")')
    if not tool.hints["idempotent"]:
        owed.append("@side_effects")
    yield f"@id({json.dumps(f'{tool.server}-{tool.name}')}) {' '.join(owed)}".rstrip()
    yield f'permit (principal == Agent::"NAME", action == Action::"call", resource == Tool::{json.dumps(tool.id)});'


def _names(tools: list[Offer]) -> str:
    more = f" and {len(tools) - LISTED} more" if len(tools) > LISTED else ""
    return ", ".join(one.name for one in tools[:LISTED]) + more


def _tests(catalog: Catalog, operator: str) -> str:
    lines = ["# What has to be decided; `mesh policy load` loads nothing with which it is not."]
    offers = sorted(catalog.tools.values(), key=lambda one: one.id)
    reading = next((one for one in offers if one.hints["read_only"]), None)
    writing = next((one for one in offers if not one.hints["read_only"]), None)
    for name, agent, tool, expect in (
        ("the operator may do everything", operator, writing or reading, "allow"),
        ("every agent may read", "some-agent", reading, "allow"),
        ("nobody else may change anything", "some-agent", writing, "deny"),
    ):
        if tool is not None:
            lines += [
                f"- name: {name}",
                f"  request: {json.dumps({'agent': agent, 'tool': tool.id})}",
                f"  expect: {expect}",
            ]
    return "\n".join(lines) + "\n"
