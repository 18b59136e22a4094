"""Wrong input: every command says what is wrong and ends with the right code."""

from pathlib import Path
from typing import Any

import pytest

from weft.cli.supervisor.state import Record
from weft.core.home import process_started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("up", "--port", "99999"), "99999 is not in the range"),
        (("up", "--durability", "eternal"), "'eternal' is not one of 'laptop', 'strict'"),
        (("up", "-d", "--timeout", "0"), "0.0 is not in the range"),
        (("scale", "hello"), "Missing argument 'REPLICAS'"),
        (("scale", "hello", "many"), "'many' is not a valid integer"),
        (("scale", "hello", "-1"), "No such option"),
        (("logs", "-n", "few"), "'few' is not a valid integer"),
        (("logs", "-o", "yaml"), "'yaml' is not one of"),
        (("ps", "-o", "xml"), "'xml' is not one of 'table', 'json', 'jsonl', 'yaml'"),
        (("send",), "Missing argument 'AGENT'"),
        (("send", "hello"), "there is nothing to send: give TEXT, - for stdin, --data or --file"),
        (("send", "hello", "--data", "{"), "--data is not JSON"),
        (("send", "hello", "--data", "@missing.json"), "missing.json cannot be read"),
        (("send", "hello", "--file", "missing.txt"), "File 'missing.txt' does not exist"),
        (("send", "hello", "x", "--deadline", "0"), "0.0 is not in the range"),
        (("send", "hello", "x", "--deadline", "soon"), "'soon' is not a valid float"),
        (("send", "hello", "x", "--detach", "--follow"), "--detach does not wait, --follow does"),
        (("send", "hello", "x", "--detach", "--task", "a" * 32), "--detach starts a task, --task continues one"),
        (("tasks", "list", "--state", "happy"), "'happy' is not one of 'submitted'"),
        (("tasks", "list", "--limit", "0"), "0 is not in the range"),
        (("tasks", "get"), "Missing argument 'TASK'"),
        (("tasks", "watch", "x", "--after", "-1"), "-1 is not in the range"),
        (("tasks", "burn"), "No such command 'burn'"),
        (("health", "--interval", "0"), "0.0 is not in the range"),
        (("run",), "Missing argument 'FILE[:NAME]'"),
        (("run", "missing.py:agent"), "missing.py: there is no such file"),
        (("demo", "missing-folder"), "'missing-folder' does not exist"),
        (("init", "mesh.yaml"), "is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_input_is_a_usage_error(arguments: tuple[str, ...], message: str, shared: Any) -> None:
    result = shared.mesh(*arguments, code=2)
    assert message in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("ps",),
        ("send", "hello", "x"),
        ("tasks", "list"),
        ("agents",),
        ("health",),
        ("restart", "hello"),
        ("scale", "hello", "1"),
        ("coordinator",),
        ("gateway",),
        ("run", "agents/hello.py:agent"),
    ],
    ids=" ".join,
)
def test_without_a_running_mesh_a_command_says_how_to_start_it(arguments: tuple[str, ...], shared: Any) -> None:
    result = shared.mesh(*arguments, code=7)
    assert "`mesh up`" in result.err


@pytest.mark.parametrize("arguments", [("ps",), ("health",), ("agents",), ("tasks", "list")], ids=" ".join)
def test_that_is_json_for_programs(arguments: tuple[str, ...], shared: Any) -> None:
    error = shared.mesh(*arguments, "-o", "json", code=7).error
    assert error["code"] == "unavailable"
    assert "mesh up" in error["message"]


def test_up_without_mesh_yaml_points_to_init(project: Any) -> None:
    result = project.mesh("up", code=2)
    assert f"there is no mesh.yaml in {project.folder} or above it; `mesh init` makes one" in result.err


def test_every_mistake_in_mesh_yaml_is_named_with_its_line(project: Any) -> None:
    project.write("agents:\n  hello: {rum: x.py:agent}\nbroker: {port: many}\n")
    for options in ((), ("--detach",)):
        result = project.mesh("up", *options, code=2)
        assert "mesh.yaml:2" in result.err
        assert "did you mean 'run'" in result.err
        assert "mesh.yaml:3" in result.err


def test_a_port_that_is_taken_stops_the_start(project: Any, running: Any) -> None:
    port = running.mesh("ps", "-o", "json") and _port(running)
    project.write("name: second\n")
    for options in ((), ("--detach",)):
        result = project.mesh("up", "--port", str(port), *options, code=2)
        assert f"port {port} on 127.0.0.1 is taken" in result.err


def test_down_without_a_mesh_is_no_error(shared: Any) -> None:
    assert "is not running" in shared.mesh("down").err


def test_what_a_killed_supervisor_left_is_cleared_away(project: Any) -> None:
    project.write("name: left\n")
    project.home.mkdir(mode=0o700)
    Record(2**22 + 5, "1", str(project.home / "supervisor.sock"), "").write(project.home)
    assert "is not running" in project.mesh("ps", code=7).err
    project.mesh("down")
    assert Record.read(project.home) is None


def test_a_reused_pid_is_not_taken_for_the_supervisor(project: Any) -> None:
    import os

    project.write("name: left\n")
    project.home.mkdir(mode=0o700)
    assert process_started(os.getpid()) is not None
    Record(os.getpid(), "another time", str(project.home / "supervisor.sock"), "").write(project.home)
    assert "is not running" in project.mesh("ps", code=7).err


def _port(running: Any) -> int:
    from weft.core.home import BrokerRecord, Home

    record = BrokerRecord.read(Home(running.home))
    assert record is not None
    return record.port


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, running: Any) -> Any:
    """A project with a mesh.yaml and an agent, never started."""
    folder: Path = tmp_path_factory.mktemp("usage")
    made = type(running)(folder)
    made.write(
        "name: usage\nagents:\n  hello: {run: agents/hello.py:agent}\n",
        hello="from weft import Agent\nagent = Agent('hello')\n",
    )
    made.home.mkdir(mode=0o700)
    return made
