"""A whole mesh: up, changed while it runs, hurt, and down again. Real processes, real broker."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft.core.home import process_started

CONFIG = "name: life\nagents:\n  worker: {{run: agents/worker.py:agent, replicas: {replicas}}}\n"

QUICK_SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from weft.cli.show import Screen
from weft.cli.supervisor.policy import RestartPolicy
from weft.cli.supervisor.supervisor import Supervisor, watch_signals
from weft.core.config import load_mesh_config

async def run():
    folder = Path(sys.argv[1])
    config = load_mesh_config(folder / "mesh.yaml")
    policy = RestartPolicy(first=0.05, longest=0.1)
    supervisor = Supervisor(config, folder / ".weft", listener=Screen("quick", sys.stderr), policy=policy)
    watch_signals(supervisor.stop)
    await supervisor.run()

asyncio.run(run())
"""
"""`mesh up` with pauses that suit a test."""


@pytest.fixture
def started(project: Any, agent_source: str) -> Any:
    """A mesh of this test's own, with one replica."""
    project.write(CONFIG.format(replicas=1), worker=agent_source.format(name="worker"))
    up = project.mesh("up", "--detach", timeout=50)
    assert "up at nats://127.0.0.1:" in up.err
    return project


def test_up_ps_send_down(started: Any) -> None:
    rows = started.rows()
    assert list(rows) == ["broker", "coordinator", "worker.1"]
    assert {row["state"] for row in rows.values()} == {"ready"}
    assert rows["worker.1"]["uptime"] > 0
    assert all(process_started(row["pid"]) for row in rows.values())
    lines = started.mesh("ps").out.splitlines()
    assert lines[0].split() == ["NAME", "KIND", "STATE", "PID", "RESTARTS", "UPTIME", "SINCE", "REASON"]
    assert started.mesh("send", "worker", "hello").out == "echo hello\n"
    assert "ready: agent worker 1.2.3" in started.mesh("logs", "worker").out

    refused = started.mesh("up", code=1)
    assert f"is already running (pid {started.supervisor})" in refused.err
    assert "`mesh down` stops it" in refused.err
    (started.folder / "mesh.yaml").write_text(CONFIG.format(replicas=2))
    assert "`mesh restart` applies it" in started.mesh("up", "--detach", code=1).err

    supervisor = started.supervisor
    assert "is down" in started.mesh("down").err
    assert process_started(supervisor) is None
    assert started.processes() == []
    assert not (started.home / "supervisor.sock").exists()
    assert "is not running" in started.mesh("down").err


def test_what_was_accepted_survives_down_and_up(started: Any) -> None:
    pid = started.rows()["worker.1"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    task = started.mesh("send", "worker", "later", "--detach").out.strip()
    os.kill(pid, signal.SIGKILL)
    started.mesh("down")
    started.mesh("up", "--detach", timeout=50)
    assert started.mesh("tasks", "watch", task).out.splitlines()[-1].split()[1] == "completed"


def test_killed_processes_come_back(started: Any, until: Callable[..., Any]) -> None:
    before = started.rows()
    for name in ("worker.1", "broker", "coordinator"):
        os.kill(before[name]["pid"], signal.SIGKILL)

    def back() -> dict[str, Any] | None:
        rows: dict[str, Any] = started.rows()
        well = all(row["state"] == "ready" and row["pid"] != before[name]["pid"] for name, row in rows.items())
        return rows if well else None

    rows = until(back, timeout=30)
    assert rows["worker.1"]["restarts"] >= 1
    assert started.mesh("send", "worker", "again").out == "echo again\n"


def test_nothing_is_left_when_the_supervisor_is_killed(started: Any, until: Callable[..., Any]) -> None:
    pids = [row["pid"] for row in started.rows().values()]
    supervisor = started.supervisor
    assert set(pids) <= set(started.processes())
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: not any(process_started(pid) for pid in pids))
    until(lambda: started.processes() == [])
    assert "is not running" in started.mesh("ps", code=7).err
    started.mesh("up", "--detach", timeout=50)
    assert started.mesh("send", "worker", "hello").out == "echo hello\n"


def test_a_rolling_restart_keeps_the_agent_serving(started: Any) -> None:
    source = started.folder / "agents" / "worker.py"
    source.write_text(source.read_text().replace("1.2.3", "2.0.0"))
    before = started.rows()["worker.1"]["pid"]
    slow = started.mesh("send", "worker", "wait 2", "--detach").out.strip()
    result = started.mesh("restart", "worker")
    assert result.err.splitlines()[0].startswith("worker.1 is ready (pid ")
    assert result.err.splitlines()[1:] == ["worker.1: the old one is drained", "restarted: worker.1"]
    assert started.rows()["worker.1"]["pid"] != before
    assert process_started(before) is None
    assert "completed" in started.mesh("tasks", "watch", slow).out
    assert started.mesh("agents", "-o", "json").json[0]["version"] == "2.0.0"


def test_a_version_that_does_not_start_leaves_the_old_one_serving(started: Any) -> None:
    source = started.folder / "agents" / "worker.py"
    good = source.read_text()
    source.write_text("import no_such_module\n")
    before = started.rows()["worker.1"]["pid"]
    result = started.mesh("restart", "worker", code=1)
    assert "the new worker.1 did not become ready (exit 2" in result.err
    assert "No module named 'no_such_module'" in result.err
    assert f"the old one (pid {before}) goes on" in result.err
    assert started.rows()["worker.1"]["pid"] == before
    assert started.mesh("send", "worker", "still").out == "echo still\n"
    source.write_text(good)
    started.mesh("restart", "worker.1")
    assert started.rows()["worker.1"]["pid"] != before


def test_scale_starts_and_drains_replicas(started: Any) -> None:
    first = started.rows()["worker.1"]["pid"]
    assert "worker has 3 replicas" in started.mesh("scale", "worker", "3").err
    rows = started.rows()
    assert [name for name in rows if name.startswith("worker")] == ["worker.1", "worker.2", "worker.3"]
    assert "worker has 1 replica\n" in started.mesh("scale", "worker", "1").err
    assert started.rows()["worker.1"]["pid"] == first
    assert len(started.rows()) == 3
    unknown = started.mesh("scale", "workr", "1", code=5)
    assert "this mesh has no 'workr' (did you mean 'worker'?); it has worker" in unknown.err


def test_restart_applies_a_changed_mesh_yaml(started: Any, agent_source: str) -> None:
    second = "  second: {run: agents/second.py:agent, env: {COLOUR: red}}\n"
    started.write(
        "name: life\nagents:\n" + second,
        second=agent_source.format(name="second"),
    )
    result = started.mesh("restart")
    assert "worker is no longer in mesh.yaml: draining it" in result.err
    assert list(started.rows()) == ["broker", "coordinator", "second.1"]
    assert started.mesh("send", "second", "new here").out == "echo new here\n"
    environment = Path(f"/proc/{started.rows()['second.1']['pid']}/environ").read_bytes()
    assert b"\0COLOUR=red\0" in environment
    assert "`mesh down` stops it" in started.mesh("up", code=1).err
    started.write("agents: [")
    assert "mesh.yaml" in started.mesh("restart", code=2).err
    assert started.mesh("restart", "nobody", code=2).err


def test_restart_by_name_covers_broker_and_coordinator(started: Any) -> None:
    before = started.rows()
    started.mesh("restart", "coordinator")
    started.mesh("restart", "broker")
    after = started.rows()
    assert after["coordinator"]["pid"] != before["coordinator"]["pid"]
    assert after["broker"]["pid"] != before["broker"]["pid"]
    assert after["worker.1"]["pid"] == before["worker.1"]["pid"]
    assert started.mesh("send", "worker", "hello", timeout=40).out == "echo hello\n"
    assert "this mesh has no 'nobody'" in started.mesh("restart", "nobody", code=5).err


def test_a_crash_loop_is_failed_and_visible_and_the_rest_runs(
    project: Any, agent_source: str, until: Callable[..., Any]
) -> None:
    project.write(
        "agents:\n  worker: {run: agents/worker.py:agent}\n  broken: {run: agents/broken.py:agent}\n",
        worker=agent_source.format(name="worker"),
        broken="raise RuntimeError('broken by design')\n",
    )
    with subprocess.Popen([sys.executable, "-c", QUICK_SUPERVISOR, str(project.folder)], env=project.environment) as up:
        try:
            row = until(lambda: _row(project, "broken.1", "failed"), timeout=30)
            assert (row["restarts"], row["pid"]) == (4, None)
            assert row["reason"] == "exit 1: RuntimeError: broken by design"
            assert project.mesh("logs", "broken").out.count("RuntimeError: broken by design") == 5
            until(lambda: _row(project, "worker.1", "ready"))
            assert project.mesh("send", "worker", "fine").out == "echo fine\n"
            result = project.mesh("health", code=3)
            assert "replica broken.1 is down; next: mesh restart broken.1" in result.err
            (project.folder / "agents" / "broken.py").write_text(agent_source.format(name="broken"))
            project.mesh("restart", "broken.1")
            assert project.rows()["broken.1"]["state"] == "ready"
        finally:
            up.terminate()
        assert up.wait(20) == 0


def test_an_agent_whose_file_is_missing_is_failed_at_once(project: Any) -> None:
    project.write("agents:\n  gone: {run: agents/gone.py:agent}\n")
    up = project.mesh("up", "--detach", code=1, timeout=50)
    assert "agents/gone.py: there is no such file" in up.err
    assert project.rows()["gone.1"]["restarts"] == 0


def test_in_the_foreground_the_screen_shows_all_and_ctrl_c_stops_all(project: Any, agent_source: str) -> None:
    project.write(CONFIG.format(replicas=1), worker=agent_source.format(name="worker"))
    with subprocess.Popen(
        project.command("up"), cwd=project.folder, env=project.environment, stderr=subprocess.PIPE, text=True
    ) as up:
        assert up.stderr is not None
        shown = []
        for line in up.stderr:
            shown.append(line)
            if "life is up at nats://" in line:
                os.kill(up.pid, signal.SIGINT)
        assert up.wait(20) == 0
    text = "".join(shown)
    assert "worker.1    | ready: agent worker 1.2.3" in text
    order = [text.index(f"{name:<11} * stopped") for name in ("worker.1", "coordinator", "broker")]
    assert order == sorted(order)
    assert project.processes() == []


def test_a_second_interrupt_does_not_wait_for_the_agents(
    project: Any, agent_source: str, until: Callable[..., Any]
) -> None:
    project.write(CONFIG.format(replicas=1), worker=agent_source.format(name="worker"))
    with subprocess.Popen(
        project.command("up"), cwd=project.folder, env=project.environment, stderr=subprocess.PIPE, text=True
    ) as up:
        assert up.stderr is not None
        for line in up.stderr:
            if "life is up at nats://" in line:
                task = project.mesh("send", "worker", "wait 60", "--detach").out.strip()
                until(lambda task=task: "working" in project.mesh("tasks", "get", task).out)
                os.kill(up.pid, signal.SIGINT)
            if "worker.1    * draining" in line:
                os.kill(up.pid, signal.SIGINT)
        assert up.wait(10) == 0


def test_down_does_not_wait_for_a_restart_under_way(started: Any, until: Callable[..., Any]) -> None:
    (started.folder / "agents" / "worker.py").write_text("import time\ntime.sleep(60)\n")
    with subprocess.Popen(
        started.command("restart", "worker"),
        cwd=started.folder,
        env=started.environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as restart:
        until(lambda: len(started.mesh("ps", "-o", "jsonl").out.splitlines()) == 4)
        states = [row["state"] for row in started.mesh("ps", "-o", "json").json if row["agent"] == "worker"]
        assert sorted(states) == ["ready", "starting"], "the old replica serves while the new one starts"
        started.mesh("down", "--timeout", "15")
        _, said = restart.communicate(timeout=10)
    assert restart.returncode == 1
    assert "did not become ready" in said


def test_two_starts_at_once_leave_one_mesh(project: Any, until: Callable[..., Any]) -> None:
    project.write("name: race\n")
    starts = [
        subprocess.Popen(
            project.command("up", "--detach"),
            cwd=project.folder,
            env=project.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ends = [(start.communicate(timeout=40)[1], start.returncode) for start in starts]
    assert sorted(code for _, code in ends) == [0, 1]
    assert "is already running" in next(text for text, code in ends if code == 1)
    assert project.rows()["broker"]["state"] == "ready"


def test_run_serves_an_agent_that_mesh_yaml_does_not_name(started: Any, agent_source: str) -> None:
    (started.folder / "agents" / "guest.py").write_text(agent_source.format(name="guest"))
    with subprocess.Popen(
        started.command("run", "agents/guest.py"),
        cwd=started.folder,
        env=started.environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as guest:
        assert guest.stderr is not None
        said = []
        for line in guest.stderr:
            said.append(line)
            if line.startswith("ready"):
                break
        try:
            assert "agent guest is new to this mesh" in said[0]
            assert started.mesh("send", "guest", "hi").out == "echo hi\n"
        finally:
            os.kill(guest.pid, signal.SIGINT)
        assert guest.wait(20) == 0
    wrong = started.mesh("run", "agents/guest.py", "--identity", "worker", code=2)
    assert "the agent is called 'guest'" in wrong.err


def test_a_second_coordinator_in_the_foreground_stands_by(started: Any, until: Callable[..., Any]) -> None:
    with subprocess.Popen(
        started.command("coordinator"),
        cwd=started.folder,
        env=started.environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as second:
        assert second.stderr is not None
        try:
            assert any(line.startswith("ready") for line in iter(second.stderr.readline, ""))
            os.kill(started.rows()["coordinator"]["pid"], signal.SIGKILL)
            # What is asked in the moment of the kill may have gone to the one that was killed, and is lost with it.
            until(lambda: started.mesh("tasks", "list", code=None).err == "no tasks\n")
        finally:
            os.kill(second.pid, signal.SIGTERM)
        assert second.wait(20) == 0


def _row(project: Any, name: str, state: str) -> Any:
    """A row of `mesh ps` once it is in that state."""
    shown = project.mesh("ps", "-o", "json", code=None)
    rows = {row["name"]: row for row in shown.json} if shown.code == 0 else {}
    return rows[name] if name in rows and rows[name]["state"] == state else None


assert sys.platform == "linux" or pytest.skip("looks for processes in /proc", allow_module_level=True)
