"""Tool servers in `mesh.yaml`, as they are stored, and kept in step with the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.core.config import parse_mesh_config
from weft.core.toolsconf import SidecarConfig, ToolServer
from weft.core.toolstore import ToolStore
from weft.testing.broker import BrokerMesh
from weft_protocols.errors import InvalidConfig
from weft_protocols.resources import TOOL_SERVERS, TOOLS

PATH = Path("/project/mesh.yaml")


def tools(text: str) -> dict[str, ToolServer]:
    return dict(parse_mesh_config(f"tools:\n{text}", path=PATH).tools)


def test_a_server_is_a_command_or_an_address() -> None:
    found = tools(
        """
  time: {command: [uvx, mcp-server-time], args: [--utc], env: [TZ], cwd: tools}
  crm:
    url: https://crm.example.com/mcp
    headers_env: {Authorization: CRM_TOKEN}
    era: modern
    enabled: false
    trust: approve
    settings: {timeout: 5, sandbox: {network: [a, b]}}
"""
    )
    assert found["time"].command == ("uvx", "mcp-server-time", "--utc")
    assert (found["time"].env, found["time"].cwd) == ({"TZ": "TZ"}, "/project/tools")
    crm = found["crm"]
    assert (crm.transport, crm.era, crm.enabled, crm.trust, crm.cwd) == ("http", "modern", False, "approve", "")
    assert crm.settings == {"timeout": 5, "sandbox": {"network": ["a", "b"]}}
    assert ToolServer.decode(crm.encode()) == crm


def test_a_builtin_has_neither() -> None:
    [found] = tools("  code: {builtin: code, code: {seconds: 2, calls: 3}, settings: {timeout: 9}}").values()
    assert (found.transport, found.where, found.cwd) == ("builtin", "builtin code", "")
    assert found.settings == {"timeout": 9, "code": {"seconds": 2, "calls": 3}}
    assert ToolServer.decode(found.encode()) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  a: {}", "either a command or a url"),
        ("  a: {command: x, url: 'http://x/'}", "either a command or a url"),
        ("  a: {command: x, builtin: code}", "either a command or a url, or is a builtin"),
        ("  a: {builtin: shell}", "there is no builtin 'shell'; there are: code"),
        ("  a: {builtin: code, env: [HOME]}", "a builtin has no env"),
        ("  a: {builtin: code, egress: {allow: [x]}}", "a builtin has no egress"),
        ("  a: {builtin: code, sandbox: {write: [/tmp]}}", "a builtin's sandbox has no write: it reaches neither"),
        ("  a: {command: x, code: {calls: 3}}", "settings.code is for the builtin code"),
        ("  a__b: {command: x}", "is not a name"),
        ("  a: {url: 'http://user:pass@x/'}", "credentials never stand in it"),
        ("  a: {command: x, env: {KEY: 'sk-123 secret'}}", "KEY must name an environment variable"),
        ("  a: {command: x, era: old}", "era 'old' is unknown"),
        ("  a: {command: x, comand: y}", "did you mean 'command'"),
        ("  a: {command: x, settings: [1]}", "must be a mapping"),
        ("  a: {command: x, settings: {at: 2026-01-01}}", "must be values of JSON"),
    ],
)
def test_mistakes_are_told_with_their_line_and_without_secrets(text: str, said: str) -> None:
    with pytest.raises(InvalidConfig, match=r"mesh\.yaml:2") as wrong:
        tools(text)
    assert said in str(wrong.value)
    assert "sk-123" not in str(wrong.value)


def test_the_sidecar_has_a_port_and_perhaps_a_caller_without_a_token() -> None:
    assert parse_mesh_config("name: x", path=PATH).sidecar == SidecarConfig()
    found = parse_mesh_config("sidecar: {port: 8765, anonymous: local}", path=PATH).sidecar
    assert found == SidecarConfig(8765, "local")
    found = parse_mesh_config("sidecar: {presidio: conf/analyzer.yaml}", path=PATH).sidecar
    assert found.presidio == str(PATH.parent / "conf" / "analyzer.yaml")
    with pytest.raises(InvalidConfig, match="reserved"):
        parse_mesh_config("sidecar: {anonymous: operator}", path=PATH)


@pytest.mark.anyio
async def test_what_is_declared_is_registered_and_what_was_added_otherwise_stays(fresh_mesh: BrokerMesh) -> None:
    broker = await fresh_mesh.connect("operator")
    try:
        store = ToolStore(broker)
        added = ToolServer("added", command=("x",))
        await store.register(added)
        declared = ToolServer("declared", command=("y",), source="mesh.yaml")
        other = ToolServer("other", url="http://x/", source="mesh.yaml")
        assert await store.declare([declared, other]) == ["declared", "other"]
        assert await store.declare([declared, other]) == []
        assert await store.declare([declared]) == ["other"]
        assert await store.registered() == {"added": added, "declared": declared}
        await broker.publish(f"{TOOL_SERVERS}.damaged", b"{}")
        assert set(await store.registered()) == {"added", "declared"}
        for n in range(20):
            await store.register(ToolServer("added", command=(str(n),)))
        info = await broker.api(f"STREAM.INFO.{TOOLS}", {"subjects_filter": f"{TOOL_SERVERS}.added"})
        assert info["state"]["subjects"] == {f"{TOOL_SERVERS}.added": 8}
    finally:
        await broker.close()
