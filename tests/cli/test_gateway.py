"""The gateway as part of a mesh: started by `mesh up`, known to every command, and run alone by `mesh gateway`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft.core.home import GatewayRecord, Home, process_started

AGENTS = "name: web\nagents:\n  worker: {run: agents/worker.py:agent}\n"
CONFIG = AGENTS + "gateway: {default_agent: worker}\n"
WITHOUT = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in ("grpc", "uvicorn") else real(name, *more)
"""
"""A `sitecustomize.py` of an environment without the extra."""


@pytest.fixture
def web(project: Any, agent_source: str) -> Any:
    """A project with a gateway, not started."""
    project.write(CONFIG, worker=agent_source.format(name="worker"))
    return project


def record_of(project: Any) -> GatewayRecord:
    found = GatewayRecord.read(Home(project.home))
    assert found is not None
    return found


def ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


def test_up_starts_a_gateway_that_every_command_knows(web: Any, until: Callable[..., Any]) -> None:
    up = web.mesh("up", "--detach", timeout=50)
    record = record_of(web)
    assert f"agents are at {record.http}/agents, by gRPC at {record.grpc}" in up.err
    row = web.rows()["gateway"]
    assert (row["kind"], row["state"], row["pid"]) == ("gateway", "ready", record.pid)
    until(lambda: [one["name"] for one in ask(f"{record.http}/agents")["agents"]] == ["worker"])
    assert ask(f"{record.http}/.well-known/agent-card.json")["name"] == "worker"
    assert "ready: gateway at" in web.mesh("logs", "gateway").out

    health = {check["component"]: check for check in web.mesh("health", "-o", "json").json["checks"]}
    assert health["gateway"]["status"] == "ok"
    assert record.http in health["gateway"]["detail"]
    doctor = {finding["check"]: finding for finding in web.mesh("doctor", "-o", "json", code=None).json}
    assert doctor["gateway"]["status"] == "ok"

    os.kill(record.pid, signal.SIGSTOP)
    try:
        down = web.mesh("health", code=3)
        assert "gateway is degraded; next: mesh logs gateway" in down.err
        assert "no answer within 2 s" in down.out
    finally:
        os.kill(record.pid, signal.SIGCONT)

    assert "restarted: gateway" in web.mesh("restart", "gateway").err
    after = record_of(web)
    assert (after.http, after.grpc) == (record.http, record.grpc)
    assert after.pid != record.pid
    os.kill(after.pid, signal.SIGKILL)
    until(lambda: web.rows()["gateway"]["state"] == "ready" and web.rows()["gateway"]["pid"] != after.pid, timeout=30)
    until(lambda: record_of(web).alive)
    assert ask(f"{record.http}/readyz") == {"status": "ready"}
    assert record_of(web).http == record.http

    web.mesh("down")
    assert web.processes() == []
    assert not record_of(web).alive


def test_restart_follows_mesh_yaml(web: Any) -> None:
    web.write(AGENTS + "gateway: false\n")
    up = web.mesh("up", "--detach", timeout=50)
    assert "agents are at" not in up.err
    assert list(web.rows()) == ["broker", "coordinator", "worker.1"]
    assert "this mesh has no 'gateway'" in web.mesh("restart", "gateway", code=5).err
    web.write(CONFIG)
    assert "gateway is ready" in web.mesh("restart", "gateway").err
    assert list(web.rows()) == ["broker", "coordinator", "gateway", "worker.1"]
    pid = record_of(web).pid
    web.write(AGENTS + "gateway: {host: 0.0.0.0}\n")
    assert "nobody could call this gateway" in web.mesh("restart", "gateway", code=2).err
    assert web.rows()["gateway"]["pid"] == pid
    web.write(AGENTS + "gateway: false\n")
    assert "the gateway does not run any more" in web.mesh("restart", "gateway").err
    assert process_started(pid) is None
    assert list(web.rows()) == ["broker", "coordinator", "worker.1"]


def test_a_gateway_in_the_foreground_serves_beside_the_other(web: Any) -> None:
    web.write(AGENTS + "gateway: false\n")
    web.mesh("up", "--detach", timeout=50)
    command = web.command("gateway", "--port", "0", "--grpc-port", "0", "--default-agent", "worker")
    with subprocess.Popen(command, cwd=web.folder, env=web.environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("ready"))
        url = line.partition("gateway at ")[2].partition("/agents")[0]
        assert ask(f"{url}/.well-known/agent-card.json")["name"] == "worker"
        health = {check["component"]: check for check in web.mesh("health", "-o", "json").json["checks"]}
        assert health["gateway"]["status"] == "ok"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert "Traceback" not in process.stderr.read()


def test_without_the_extra_the_mesh_runs_and_says_how_to_install_it(web: Any, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WITHOUT)
    web.env["PYTHONPATH"] = str(site)
    up = web.mesh("up", "--detach", timeout=50)
    hint = "no gateway: grpc, uvicorn not installed; pip install 'weft[gateway]' adds HTTP and gRPC"
    assert up.err.count(hint) == 1
    assert "gateway" not in web.rows()
    alone = web.mesh("gateway", code=7)
    assert "a gateway needs grpc, uvicorn, which is not installed: pip install 'weft[gateway]'" in alone.err
