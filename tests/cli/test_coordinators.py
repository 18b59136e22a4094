"""Several coordinators of one mesh: as many as mesh.yaml says, one leads, and the command line tells which."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from weft.core.config import parse_mesh_config
from weft.core.coordconf import CoordinatorConfig
from weft_protocols.errors import InvalidConfig

COORDINATORS = ["coordinator", "coordinator.2"]


def test_mesh_yaml_says_how_many_and_what_they_decide_by(tmp_path: Any) -> None:
    def read(text: str) -> CoordinatorConfig:
        return parse_mesh_config(text, path=tmp_path / "mesh.yaml").coordinator

    assert read("") == CoordinatorConfig(1, "", 0)
    told = read("coordinator: {replicas: 2, victim: least-work, lease: 5}")
    assert told == CoordinatorConfig(2, "least-work", 5)
    assert told.environment == {"WEFT_COORDINATOR_VICTIM": "least-work", "WEFT_COORDINATOR_LEASE": "5"}
    assert CoordinatorConfig().environment == {}
    with pytest.raises(InvalidConfig) as caught:
        read("coordinator:\n  replicas: 0\n  victim: yungest\n  leese: 1\n")
    assert [line.partition("mesh.yaml")[2] for line in str(caught.value).splitlines()] == [
        ":4: coordinator: has no field 'leese' (did you mean 'lease'?)",
        ":2: coordinator.replicas: '0' must be a whole number from 1 to 16",
        ":3: coordinator.victim: 'yungest' is unknown (did you mean 'youngest'?); use one of youngest, least-work, "
        "priority",
    ]


def test_two_coordinators_are_run_and_told_apart_and_one_replaces_the_other(
    project: Any, until: Callable[..., Any]
) -> None:
    project.write("name: two\ncoordinator: {replicas: 2}\n")
    project.mesh("up", "--detach", timeout=50)
    assert list(project.rows()) == ["broker", *COORDINATORS]

    told = project.mesh("coordinator", "status", "-o", "json").json
    assert [one["role"] for one in told["coordinators"]] == ["leader", "standby"]
    pids = {row["pid"] for name, row in project.rows().items() if name in COORDINATORS}
    assert {one["pid"] for one in told["coordinators"]} == pids
    assert told["leader"] == told["coordinators"][0]["coordinator"]
    shown = project.mesh("coordinator", "status")
    assert shown.out.split()[:8] == ["COORDINATOR", "ROLE", "PID", "UP", "EPOCH", "DECIDED", "POSITION", "LAG"]
    assert f"{told['leader']} leads since {told['since']}, in epoch {told['epoch']}" in shown.err

    old = told["coordinators"][0]["pid"]
    os.kill(old, signal.SIGKILL)

    def other_leads() -> bool:
        now = project.mesh("coordinator", "status", "-o", "json", code=None)
        return bool(now.code == 0 and now.json["epoch"] > told["epoch"] and now.json["coordinators"][0]["pid"] != old)

    until(other_leads)
    assert project.mesh("tasks", "list").err == "no tasks\n"


@pytest.mark.soak
def test_coordinators_are_scaled_and_restarted_one_by_one(project: Any) -> None:
    project.write("name: two\ncoordinator: {replicas: 2}\n")
    project.mesh("up", "--detach", timeout=50)
    assert "coordinator has 1 replica" in project.mesh("scale", "coordinator", "1").err
    assert list(project.rows()) == ["broker", "coordinator"]
    assert "use 1 to 16" in project.mesh("scale", "coordinator", "0", code=2).err
    project.mesh("scale", "coordinator", "2")
    before = project.rows()
    project.mesh("restart", "coordinator.2")
    project.mesh("restart", "coordinator")
    after = project.rows()
    assert list(after) == ["broker", *COORDINATORS]
    assert all(before[name]["pid"] != after[name]["pid"] for name in COORDINATORS)
    assert project.mesh("coordinator", "status", "-o", "json").json["coordinators"][0]["role"] == "leader"
