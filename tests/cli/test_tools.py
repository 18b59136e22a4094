"""Tools as part of a mesh: declared or added, served by a sidecar that `mesh up` starts, shown, called and approved."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="needs the extra `sidecar`")

BAD = Path(__file__).parents[1] / "sidecar" / "badserver.py"
CONFIG = "name: tooled\npolicy: policies\nagents:\n  worker: {{run: agents/worker.py:agent, replicas: 0}}\n{tools}"
DECLARED = "tools:\n  told: {{command: [{python}, -S, {bad}, {state}], settings: {{timeout: 20}}}}\n"


@pytest.fixture
def tooled(project: Any, agent_source: str, tmp_path: Path) -> Any:
    """A project with one declared server, running."""
    (tmp_path / "told").mkdir()
    tools = DECLARED.format(python=sys.executable, bad=BAD, state=tmp_path / "told")
    project.write(CONFIG.format(tools=tools), worker=agent_source.format(name="worker"))
    project.permit('permit (principal == Agent::"local", action, resource);')
    told = project.mesh("up", "--detach", timeout=50)
    assert "policy version 1 decides, 1 rules of policies" in told.err
    return project


def test_declared_tools_are_served_shown_called_and_approved(tooled: Any, tmp_path: Path, until: Any) -> None:
    assert tooled.rows()["sidecar"]["state"] == "ready"
    assert "sidecar" in {check["component"] for check in tooled.mesh("health", "-o", "json", code=None).json["checks"]}
    assert tooled.mesh("tools", "call", "told.do", "what=nothing", "n:=2").out.startswith("pid")
    [row] = tooled.mesh("tools", "list", "-o", "json").json
    assert (row["name"], row["state"], row["version"], row["source"]) == ("told", "ready", "2026-07-28", "mesh.yaml")
    wrong = tooled.mesh("tools", "call", "told.do", "n=1", code=1)
    assert "'what' is a required property" in wrong.out

    changed = {"name": "do", "description": "Does more\u202e", "inputSchema": {"type": "object"}}
    (tmp_path / "told" / "offer.json").write_text(json.dumps({"tools": [changed]}))
    shown = tooled.mesh("tools", "show", "told")
    assert "tool:do: changed" in shown.err
    assert '+  "description": "Does more\\u{202e}"' in shown.err
    assert tooled.mesh("tools", "test", "told", code=3)
    assert "is in quarantine (changed)" in tooled.mesh("tools", "call", "told.do", "what=nothing", code=1).err
    assert "nothing is approved" in tooled.mesh("tools", "approve", "told", said="n\n", code=1).err
    assert "approved: tool:do" in tooled.mesh("tools", "approve", "told", "--yes").out
    tooled.mesh("tools", "call", "told.do", "what=nothing")
    tooled.mesh("tools", "quarantine", "told", "do")
    tooled.mesh("tools", "call", "told.do", "what=nothing", code=1)
    assert "stands in mesh.yaml" in tooled.mesh("tools", "remove", "told", code=2).err

    tooled.write(CONFIG.format(tools=""))
    assert "the sidecar does not run any more" in tooled.mesh("restart", "sidecar", timeout=60).err
    assert tooled.mesh("tools", "list", "-o", "json").json == []
    tooled.mesh("down")
    assert tooled.processes() == []


def test_the_first_server_that_is_added_starts_a_sidecar(project: Any, agent_source: str, tmp_path: Path) -> None:
    (tmp_path / "added").mkdir()
    config = CONFIG.replace("policy: policies\n", "")
    project.write(config.format(tools=""), worker=agent_source.format(name="worker"))
    project.mesh("up", "--detach", timeout=50)
    assert "sidecar" not in project.rows()
    command = [sys.executable, "-S", str(BAD), str(tmp_path / "added")]
    added = project.mesh("tools", "add", "added", "--setting", "timeout=9", "--", *command, timeout=60)
    assert "tool:do" in added.out
    assert "no policy is loaded" in added.err
    assert "no policy is loaded" in project.mesh("tools", "call", "added.do", '{"what": "nothing"}', code=1).out
    assert "mesh policy init" in project.mesh("health", code=3).err
    project.mesh("policy", "init", "--load")
    assert project.rows()["sidecar"]["state"] == "ready"
    assert project.mesh("tools", "call", "added.do", '{"what": "nothing"}').out.startswith("pid")

    lines: list[dict[str, Any]] = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
            "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "desktop", "version": "1"}}},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/list"},
        {"jsonrpc": "2.0", "id": 3, "method": "tools/call",
         "params": {"name": "added__do", "arguments": {"what": "nothing"}}},
    ]  # fmt: skip
    with subprocess.Popen(
        project.command("mcp"), cwd=project.folder, env=project.environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as desktop:  # fmt: skip
        assert desktop.stdin is not None
        assert desktop.stdout is not None
        answers = []
        for line in lines:
            desktop.stdin.write(json.dumps(line) + "\n")
            desktop.stdin.flush()
            if "id" in line:
                answers.append(json.loads(desktop.stdout.readline())["result"])
        desktop.stdin.close()
        assert desktop.wait(15) == 0
    assert answers[0]["capabilities"]["tools"] == {"listChanged": True}
    assert [tool["name"] for tool in answers[1]["tools"]] == ["added__do"]
    assert answers[2]["content"][0]["text"].startswith("pid")

    project.mesh("tools", "remove", "added")
    assert "no tool server 'added'" in project.mesh("tools", "remove", "added", code=2).err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "x"), "say how to reach it"),
        (("add", "x", "--url", "ftp://x"), "no http or https address"),
        (("add", "x__y", "--url", "http://x/mcp"), "is not a name"),
        (("add", "x", "--url", "http://x/mcp", "--header", "Authorization=Bearer abc"), "the value never stands here"),
        (("add", "x", "--url", "http://x/mcp", "--setting", "timout=3"), "did you mean 'timeout'"),
        (("call", "do"), "write server.tool"),
        (("call", "a.do", "what"), "is no argument"),
        (("call", "a.do", "n:=x"), "is not JSON"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(project: Any, arguments: tuple[str, ...], said: str) -> None:
    error = project.mesh("tools", *arguments, code=2).err
    assert said in error
    assert "Bearer abc" not in error


SERVER_JSON: dict[str, Any] = {
    "name": "io.example/weather-tools",
    "packages": [
        {
            "registryType": "pypi",
            "identifier": "weather-mcp",
            "version": "1.2.0",
            "transport": {"type": "stdio"},
            "packageArguments": [{"type": "positional", "value": "serve"}, {"type": "named", "name": "--units"}],
            "environmentVariables": [{"name": "WEATHER_KEY", "isSecret": True}],
        }
    ],
}


def test_a_server_json_of_the_registry_is_a_registration(tmp_path: Path, until: Callable[..., Any]) -> None:
    from weft.core.serverjson import read_server_json

    file = tmp_path / "server.json"
    file.write_text(json.dumps(SERVER_JSON))
    server = read_server_json(file)
    assert server.name == "weather-tools"
    assert server.command == ("uvx", "weather-mcp==1.2.0", "serve", "--units")
    assert server.env == {"WEATHER_KEY": "WEATHER_KEY"}
    remote = {"type": "streamable-http", "url": "https://x.example/mcp", "headers": [{"name": "X-Api-Key"}]}
    file.write_text(json.dumps({"name": "a/b", "remotes": [remote]}))
    assert read_server_json(file, "own").headers_env == {"X-Api-Key": "X_API_KEY"}


def test_code_of_agents_is_run_by_a_server_that_is_part_of_the_sidecar(project: Any, agent_source: str) -> None:
    pytest.importorskip("pydantic_monty", reason="needs the extra `code`")
    project.write(CONFIG.format(tools=""), worker=agent_source.format(name="worker"))
    project.mesh("up", "--detach", timeout=50)
    project.permit('permit (principal == Agent::"local", action, resource);')
    added = project.mesh("tools", "add", "code", "--builtin", "code", "--setting", 'code={"calls": 3}', timeout=60)
    assert "tool:run" in added.out
    assert project.mesh("tools", "call", "code.run", "code=print(1)\n6 * 7").out.splitlines() == ["1", "", "42"]
    project.mesh("restart", "sidecar", timeout=60)
    assert project.mesh("tools", "call", "code.run", "code=6 * 7").out.strip() == "42"
    [row] = project.mesh("tools", "list", "-o", "json").json
    assert (row["transport"], row["where"], row["state"], row["quarantined"]) == (
        "builtin",
        "builtin code",
        "ready",
        [],
    )
    wrong = project.mesh("tools", "add", "code", "--builtin", "code", "--setting", 'code={"call": 3}', code=2)
    assert "did you mean 'calls'" in wrong.err
    assert "--builtin code" in project.mesh("tools", "add", "code", code=2).err


def test_without_monty_it_is_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.cli.tools import command
    from weft_protocols.errors import Unavailable

    monkeypatch.setattr("weft.core.toolsconf.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"needs pydantic_monty, .*: pip install 'weft\[code\]'"):
        command.main(["add", "code", "--builtin", "code"], standalone_mode=False)


def test_what_presidio_cannot_look_through_is_not_called_and_said_everywhere(
    project: Any, agent_source: str, tmp_path: Path
) -> None:
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "answer.json").write_text(
        json.dumps({"content": [{"type": "text", "text": "call (212) 555-0182"}]})
    )
    tools = DECLARED.format(python=sys.executable, bad=BAD, state=tmp_path / "told")
    tools = tools.replace("settings:", "redact: [secrets, presidio], settings:")
    wrong = CONFIG.format(tools=tools + "sidecar: {presidio: none.yaml}\n")
    project.write(wrong, worker=agent_source.format(name="worker"))
    project.permit('permit (principal == Agent::"local", action, resource);')
    project.mesh("up", "--detach", timeout=50)

    refused = project.mesh("tools", "call", "told.do", "what=answer", code=1)
    assert "Presidio is to look through its answers, and cannot." in refused.out
    assert "none.yaml" in refused.out
    assert "none.yaml" in project.mesh("tools", "test", "told", code=3).out
    assert "calls are refused" in project.mesh("tools", "show", "told").err
    [row] = project.mesh("tools", "list", "-o", "json").json
    assert row["state"] == "failed"
    assert "none.yaml" in row["failure"]
    checks = {one["component"]: one for one in project.mesh("health", "-o", "json", code=3).json["checks"]}
    assert checks["redaction of told"]["status"] == "degraded"

    project.write(CONFIG.format(tools=tools))
    project.mesh("restart", "sidecar", timeout=60)
    assert project.mesh("tools", "call", "told.do", "what=answer").out.strip() == "call [redacted:phone-number]"
    assert project.mesh("tools", "test", "told", "-o", "json").json["ok"] is True
    project.mesh("down")
