"""`mesh health`, `mesh agents` and `mesh doctor` on a running mesh."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that stands still for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture
def well(running: Any, until: Callable[..., Any]) -> Any:
    """The shared mesh, once everybody has reported."""
    until(lambda: running.mesh("health", code=None).code == 0)
    return running


def test_a_mesh_that_is_well_ends_with_0(well: Any) -> None:
    result = well.mesh("health")
    assert {line.split()[-1] for line in result.out.splitlines()} != set()
    assert "agent worker" in result.out
    assert "2/2 replicas ready" in result.out
    assert result.err == ""
    record = well.mesh("health", "-o", "json").json
    assert record["status"] == "ok"
    assert record["coordinator"]["up"] is True
    assert {stream["name"] for stream in record["streams"]} >= {"MESH", "MESH_BLOBS"}
    assert [agent["name"] for agent in record["agents"]] == ["worker"]
    assert len(record["agents"][0]["replicas"]) >= 2


def test_agents_shows_versions_skills_replicas_and_queues(well: Any) -> None:
    lines = well.mesh("agents").out.splitlines()
    assert lines[0].split() == ["AGENT", "VERSION", "SKILLS", "REPLICAS", "ACTIVE", "QUEUE", "LAST", "SEEN"]
    assert lines[1].split()[:5] == ["worker", "1.2.3", "do,", "shout", "2"]
    agent = well.mesh("agents", "-o", "json").json[0]
    assert agent["skills"] == ["do", "shout"]
    assert agent["description"] == "Does as it is told"
    assert agent["ready"] == 2
    assert agent["queue"] == 0
    assert 0 <= agent["last_seen"] < 7


def test_a_coordinator_that_does_not_answer_is_degraded_and_named(well: Any) -> None:
    with stopped(well.rows()["coordinator"]["pid"]):
        result = well.mesh("health", code=3)
        assert "coordinator is down; next: mesh restart coordinator" in result.err
        assert "stream MESH" in result.out
        assert "2/2 replicas ready" in result.out
        agents = well.mesh("agents", code=3)
        assert "worker" in agents.out
        assert "the coordinator is down (no answer within 2 s)" in agents.err
        record = well.mesh("health", "-o", "json", code=3).json
        assert record["status"] == "down"
        assert record["coordinator"] == {"up": False, "reason": "no answer within 2 s"}


@pytest.mark.timeout(90)
def test_a_replica_that_stands_still_is_degraded_and_named(well: Any, until: Callable[..., Any]) -> None:
    with stopped(well.rows()["worker.1"]["pid"]):
        until(lambda: well.mesh("health", code=None).code == 3, timeout=25)
        result = well.mesh("health", code=3)
        assert "replica worker.1 is degraded; next: mesh restart worker.1" in result.err
        assert "1 of 2 not ready" in result.out
    until(lambda: well.mesh("health", code=None).code == 0)


def test_watch_checks_again_and_again(well: Any) -> None:
    with subprocess.Popen(
        well.command("health", "--watch", "--interval", "0.2", "-o", "json"),
        cwd=well.folder,
        env=well.environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        try:
            records = [json.loads(watching.stdout.readline()) for _ in range(3)]
        finally:
            os.kill(watching.pid, signal.SIGINT)
        assert watching.wait(10) == 130
    assert records[0]["time"] < records[1]["time"] < records[2]["time"]


def test_doctor_finds_nothing_wrong_with_a_mesh_that_is_well(well: Any) -> None:
    findings = {finding["check"]: finding for finding in well.mesh("doctor", "-o", "json").json}
    assert {name for name, finding in findings.items() if finding["status"] == "failed"} == set()
    assert findings["topology"]["status"] == "ok"
    assert findings["clock"]["status"] == "ok"
    assert findings["permissions"]["status"] == "ok"
    assert "broker binary" in well.mesh("doctor").out


def test_doctor_before_the_first_start_says_so(project: Any) -> None:
    project.write("name: new\n")
    findings = project.mesh("doctor", "-o", "json").json
    assert findings[-1] == {
        "check": "mesh",
        "status": "skipped",
        "detail": "no mesh was started here yet",
        "fix": "mesh up",
    }


def test_doctor_finds_what_is_wrong_in_a_project(project: Any) -> None:
    project.write("agents:\n  gone: {run: agents/gone.py:agent}\n")
    keys = project.home / "keys"
    keys.mkdir(parents=True)
    (keys / "local.nk").write_text("secret")
    (keys / "local.nk").chmod(0o644)
    (project.home / "supervisor.json").write_text(
        json.dumps({"pid": 2**22 + 5, "started": "1", "socket": "", "config": ""})
    )
    result = project.mesh("doctor", "-o", "json", code=3)
    findings = {finding["check"]: finding for finding in result.json}
    assert findings["mesh.yaml"]["status"] == "failed"
    assert "gone: agents/gone.py" in findings["mesh.yaml"]["detail"]
    assert findings["permissions"]["status"] == "failed"
    assert findings["permissions"]["fix"] == f"chmod -R go= {project.home}"
    assert findings["state"]["status"] == "warning"
    assert "which is gone" in findings["state"]["detail"]
    (keys / "local.nk").chmod(0o600)
    keys.chmod(0o700)
    project.home.chmod(0o700)


@pytest.mark.parametrize(
    ("binary", "words"),
    [
        ("#!/bin/sh\necho 'nats-server: v2.9.0'\n", "too old"),
        ("#!/bin/sh\necho hello\n", "is not a nats-server"),
        (None, "is not an executable file"),
    ],
)
def test_doctor_checks_the_broker_s_binary(binary: str | None, words: str, project: Any) -> None:
    path = project.folder / "server"
    if binary is not None:
        path.write_text(binary)
        path.chmod(0o755)
    project.env["WEFT_NATS_SERVER"] = str(path)
    findings = {finding["check"]: finding for finding in project.mesh("doctor", "-o", "json", code=3).json}
    assert findings["broker binary"]["status"] == "failed"
    assert words in findings["broker binary"]["detail"]


def test_doctor_reports_a_taken_port(project: Any, running: Any) -> None:
    from weft.core.home import BrokerRecord, Home

    record = BrokerRecord.read(Home(running.home))
    assert record is not None
    project.write(f"broker: {{port: {record.port}}}\n")
    project.home.mkdir(mode=0o700)
    findings = {finding["check"]: finding for finding in project.mesh("doctor", "-o", "json", code=3).json}
    assert findings["port"]["status"] == "failed"
