"""Tools under a policy as processes: a folder that mesh.yaml names, an approval, and what is killed meanwhile."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="needs the extra `sidecar`")

RUNNER = Path(__file__).parents[1] / "sidecar" / "runner.py"
CONFIG = """name: policed
policy: {policy}
approvers: {{ann: [ops]}}
agents:
  writer: {{run: agents/writer.py:agent, replicas: 1}}
tools:
  crm: {{command: [{python}, -S, {runner}, {state}], cwd: {state}}}
"""
AGENT = '''
"""Writes to the crm."""

from weft import Agent, Task

agent = Agent("writer", suspend_after=1.0)


@agent.skill("write")
async def write(task: Task) -> str:
    result = await task.tools.call("crm.effect", id="acme")
    return f"{(result.refusal or {}).get('kind', 'made')}: {result.text}"
'''
RULES = """
@id("local") permit (principal == Agent::"local", action, resource);

@id("writes") @approval("ops") @side_effects
permit (principal == Agent::"writer", action == Action::"call", resource == Tool::"crm.effect");
"""


def write(project: Any, tmp_path: Path, policy: str = "policies") -> Path:
    state = tmp_path / "state"
    state.mkdir(exist_ok=True)
    project.write(CONFIG.format(policy=policy, python=sys.executable, runner=RUNNER, state=state), writer=AGENT)
    return state


def notes(state: Path) -> list[str]:
    file = state / "notes"
    return file.read_text().splitlines() if file.exists() else []


def pending(project: Any) -> str:
    rows = project.mesh("approvals", "-o", "json").json
    return str(rows[0]["id"]) if rows else ""


def test_an_approved_call_is_made_once_whoever_is_killed_meanwhile(
    project: Any, tmp_path: Path, until: Callable[..., Any]
) -> None:
    state = write(project, tmp_path)
    project.permit(RULES)
    assert "policy version 1 decides, 2 rules of policies" in project.mesh("up", "--detach", timeout=60).err
    task = project.mesh("send", "writer", "go", "--detach", "-o", "json").json["id"]
    id_ = until(lambda: pending(project))
    before = {name: row["pid"] for name, row in project.rows().items() if name in ("writer.1", "sidecar")}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)

    def back() -> bool:
        rows = project.rows()
        return all(rows[name]["state"] == "ready" and rows[name]["pid"] != pid for name, pid in before.items())

    until(back, 40.0)
    assert notes(state) == []
    assert pending(project) == id_  # the same question waits
    shown = project.mesh("approvals", "show", id_, "-o", "json").json
    assert (shown["tool"], shown["server"], shown["details"]["arguments"]) == ("effect", "crm", {"id": "acme"})
    project.mesh("approvals", "approve", id_, "--as", "ann")

    def over() -> dict[str, Any] | None:
        told: dict[str, Any] = project.mesh("tasks", "get", task, "-o", "json").json
        return told if told["state"] in ("completed", "failed") else None

    told = until(over, 60.0)
    assert told["state"] == "completed"
    assert "made: 1" in project.mesh("tasks", "get", task).out
    assert notes(state) == ["called"]
    assert project.mesh("approvals", "show", id_, "-o", "json").json["state"] == "used"
    health = {check["component"]: check for check in project.mesh("health", "-o", "json", code=None).json["checks"]}
    assert (health["policy"]["status"], "version 1 decides" in health["policy"]["detail"]) == ("ok", True)


def test_a_folder_that_is_wrong_is_refused_with_its_line_and_what_decides_goes_on(
    project: Any, tmp_path: Path, until: Callable[..., Any]
) -> None:
    write(project, tmp_path)
    project.permit('permit (principal == Agent::"local", action, resource);\n')
    project.mesh("up", "--detach", timeout=60)
    assert project.mesh("tools", "call", "crm.run", "id=a").out
    call = 'permit (principal == Agent::"local", action == Action::"call", resource == Tool::"crm.run")\n'
    project.permit(call + 'when { context.args.idd == "a" };\n')
    told = project.mesh("restart", "sidecar", timeout=60).err
    assert "IS REFUSED; version 1 goes on to decide" in told
    assert "rules.cedar:2" in told
    assert 'did you mean "id"' in told
    assert project.mesh("tools", "call", "crm.run", "id=a").out
    assert "policies is something else" in project.mesh("health", code=3).out
    project.permit(call + 'when { context.args has id && context.args.id == "a" };\n')
    project.permit('forbid (principal, action == Action::"read", resource);', file="policies/more.cedar")
    assert "policy version 2 decides" in project.mesh("restart", "sidecar", timeout=60).err
    assert project.mesh("tools", "call", "crm.run", "id=a").out
    assert "no rule permits it (policy version 2)" in project.mesh("tools", "call", "crm.run", "id=b", code=1).out
    replay = ("policy", "replay", "--against", "wider")
    project.permit('permit (principal == Agent::"local", action == Action::"call", resource);', file="wider/a.cedar")
    flips = project.mesh(*replay, "-o", "json")
    assert [(one["change"], one["agent"], one["resource"]) for one in flips.json] == [
        ("deny>allow", "local", "crm.run")
    ]
    assert "1 of 4 decisions would change" in flips.err
    assert "1 of 1 decisions would change" in project.mesh(*replay, "--limit", "1", "--strict", code=3).err
    assert "0 of 0 decisions would change" in project.mesh(*replay, "--since", "2100-01-01").err
    project.mesh("policy", "rollback", "1")
    assert "rolled it back" in project.mesh("restart", "sidecar", timeout=60).err
    assert project.mesh("tools", "call", "crm.run", "id=b").out


def test_mode_shadow_denies_nothing_and_is_loud(project: Any, tmp_path: Path, until: Callable[..., Any]) -> None:
    write(project, tmp_path, "{folder: policies, mode: shadow}")
    project.permit('permit (principal == Agent::"nobody", action, resource);')
    assert "THE POLICY ONLY WATCHES" in project.mesh("up", "--detach", timeout=60).err
    assert project.mesh("tools", "call", "crm.run", "id=a").out
    health = project.mesh("health", code=3).out
    assert "NOTHING IS DENIED" in health
    assert "mode shadow: nothing is denied" in project.mesh("policy", "list").err
    write(project, tmp_path)
    assert "what the policy does not permit is denied" in project.mesh("restart", "sidecar", timeout=60).err
    assert "no rule permits it" in project.mesh("tools", "call", "crm.run", "id=a", code=1).out
