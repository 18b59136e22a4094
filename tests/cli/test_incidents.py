"""`mesh incidents` and `mesh dlq` on a mesh whose agent gives its tasks up until it is repaired."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from weft.cli.assess import DEGRADED, OK, assess
from weft.cli.main import cli
from weft.cli.observe import Facts
from weft.core.watchconf import WatchConfig
from weft_coordinator.decide.watchdog import AgentSeen, ApprovalSeen, Observed, ReplicaSeen, Stall, StreamSeen, findings

BROKEN = """
from pathlib import Path

from weft import Agent

agent = Agent("printer", attempts=1)


@agent.skill("print")
async def print_(text: str) -> str:
    if not Path("repaired").exists():
        raise RuntimeError("out of paper")
    return f"printed {text}"
"""
CONFIG = """
name: letters
agents:
  printer: {run: "agents/printer.py:agent"}
watchdog: {clear_after: 1}
"""


@pytest.fixture(scope="module")
def printer(tmp_path_factory: pytest.TempPathFactory, project_class: Any) -> Iterator[Any]:
    made = project_class(tmp_path_factory.mktemp("letters"))
    made.write(CONFIG, printer=BROKEN)
    made.mesh("up", "--detach", timeout=50)
    yield made
    made.clean()


@pytest.fixture(scope="module")
def lost(printer: Any) -> list[str]:
    """Tasks that were given up."""
    return [printer.mesh("send", "printer", f"page {n}", "-o", "json", code=1).json["id"] for n in range(4)]


def test_dead_letters_are_an_incident_that_names_what_to_run(
    printer: Any, lost: list[str], until: Callable[..., Any]
) -> None:
    (incident,) = until(lambda: printer.mesh("incidents", "-o", "json").json)
    until(lambda: printer.mesh("incidents", "-o", "json").json[0]["count"] == 4)
    assert (incident["severity"], incident["state"], incident["key"]) == ("warning", "open", "dead-letters:printer")
    assert incident["command"] == "mesh dlq list --agent printer"
    assert printer.mesh(*incident["command"].split()[1:]).out.count("printer") >= 4
    shown = printer.mesh("incidents", "show", str(incident["id"])).out
    assert "out of paper" in shown
    assert "next: mesh dlq list --agent printer" in shown
    table = printer.mesh("incidents", "--check").out.splitlines()
    assert table[0].split() == ["ID", "SEVERITY", "STATE", "AGE", "TITLE", "NEXT"]
    health = printer.mesh("health", code=None)
    assert f"incident {incident['id']}" in health.out
    assert printer.mesh("incidents", "show", "99999", code=5).err.startswith("mesh: there is no incident 99999")


def test_letters_are_listed_and_shown(printer: Any, lost: list[str]) -> None:
    rows = printer.mesh("dlq", "-o", "json").json
    assert [row["task"] for row in rows] == lost[::-1]
    assert {row["state"] for row in rows} == {"open"}
    assert "failed after 1 of 1 attempts: RuntimeError: out of paper" in {row["reason"] for row in rows}
    assert printer.mesh("dlq", "--matching", "ink").err == "no dead letters\n"
    assert printer.mesh("dlq", "list", "--limit", "1").err == "3 more; see --limit\n"
    shown = printer.mesh("dlq", "show", lost[0]).out
    assert "message:\n  page 0" in shown
    assert f"next: mesh dlq redrive {lost[0]}" in shown
    assert printer.mesh("dlq", "show", "f" * 32, code=5).err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("redrive",), "say which letters"),
        (("redrive", "--all"), "Redrive 4 dead letters? Say so with --yes."),
        (("redrive", "x", "--all"), "not both"),
        (("redrive", "--all", "--again"), "name their tasks"),
        (("discard", "--all", "--reason", "x"), "Discard 4 dead letters? Say so with --yes."),
        (("discard", "--all"), "Missing option '--reason'"),
        (("list", "--since", "yesterday"), "is no time"),
    ],
)
def test_nothing_is_done_to_many_letters_by_accident(
    printer: Any, lost: list[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in printer.mesh("dlq", *arguments, code=2).err
    assert len(printer.mesh("dlq", "-o", "json").json) == 4


def test_letters_are_redriven_and_discarded_and_the_incident_clears(
    printer: Any, lost: list[str], until: Callable[..., Any]
) -> None:
    (printer.folder / "repaired").touch()
    (sent,) = printer.mesh("dlq", "redrive", lost[0], "-o", "json").json
    assert (sent["task"], sent["n"], sent["repeated"]) == (lost[0], 1, False)
    until(lambda: printer.mesh("tasks", "get", sent["redriven_as"], "-o", "json").json["state"] == "completed")
    (again,) = printer.mesh("dlq", "redrive", lost[0], "-o", "json").json
    assert (again["redriven_as"], again["repeated"]) == (sent["redriven_as"], True)
    assert printer.mesh("dlq", "discard", lost[1], "--reason", "not needed").out == "1 discarded\n"
    told = printer.mesh("dlq", "redrive", lost[1], code=1).err
    assert "was discarded: not needed" in told
    job = printer.mesh(
        "dlq", "redrive", "--agent", "printer", "--since", "1h", "--rate", "50", "--yes", "-o", "json"
    ).json
    assert (job["state"], job["redriven"], job["failed"]) == ("done", 2, 0)
    assert [one["job"] for one in printer.mesh("dlq", "jobs", "-o", "json").json] == [job["job"]]
    assert printer.mesh("dlq", "stop", str(job["job"])).out.startswith(f"redrive {job['job']} done: 2 sent")
    assert printer.mesh("dlq").err == "no dead letters\n"
    states = {row["task"]: row["state"] for row in printer.mesh("dlq", "--state", "all", "-o", "json").json}
    assert states == {lost[0]: "redriven", lost[1]: "discarded", lost[2]: "redriven", lost[3]: "redriven"}
    assert printer.mesh("dlq", "redrive", "--all").err == "no dead letters fit\n"
    until(lambda: printer.mesh("incidents", "-o", "json").json == [])
    assert [row["state"] for row in printer.mesh("incidents", "--all", "-o", "json").json] == ["cleared"]


# Without a mesh -------------------------------------------------------------------------------------


def suggested() -> list[str]:
    """Every command that a finding suggests."""
    task = "0" * 32
    stalled = ReplicaSeen("r", "ready", 0, (Stall(task, 0, "its handler"),))
    lost = ReplicaSeen("r", "gone", 10**9, (), (task,))
    looks = ((0, 100), (10**6, 200), (2 * 10**6, 300))
    seen = (
        AgentSeen((stalled,), looks, 1000, ("a", "b", "c"), (task,), "x"),
        AgentSeen((lost,), looks, 1000, ("a", "b", "c"), (task,), "x", (ApprovalSeen("a1b2", task, -(10**9)),)),
    )
    agents = {f"a{n}": one for n, one in enumerate(seen)}
    found = findings(Observed(agents, (StreamSeen("MESH", 99, 100),), "no"), WatchConfig(), 2 * 10**6)
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([a-z-]+)` \| .* \| .* \|$", page.partition("| incident |")[2], re.MULTILINE)
    assert {one.kind for one in found} == set(documented)
    return sorted({one.command for one in found})


def test_every_command_that_an_incident_suggests_exists() -> None:
    for line in suggested():
        name, *arguments = shlex.split(line)
        assert name == "mesh"
        command: click.Command = cli
        while isinstance(command, click.Group):
            _, found, arguments = command.resolve_command(click.Context(command), arguments or ["list"])
            assert found is not None, line
            command = found
        command.make_context(command.name, arguments)


def test_only_critical_incidents_make_a_mesh_unwell() -> None:
    facts = Facts(
        "nats://x", 0.001, None, {}, {}, {}, "", None, None,
        ({"id": 3, "severity": "warning", "title": "a"}, {"id": 4, "severity": "critical", "title": "b"}),
    )  # fmt: skip
    checks = {check.component: check for check in assess(facts) if check.component.startswith("incident")}
    assert (checks["incident 3"].status, checks["incident 4"].status) == (OK, DEGRADED)
    assert checks["incident 4"].next == "mesh incidents show 4"
    assert checks["incident 3"].detail == "warning: a"


def test_doctor_says_what_alerts_need(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write("alerts: [{url_env: NOBODYS_HOOK}]\n")
    findings = {one["check"]: one for one in project.mesh("doctor", "-o", "json", code=None).json}
    assert findings["alerts"]["status"] == "warning"
    assert "NOBODYS_HOOK is empty" in findings["alerts"]["detail"]
    monkeypatch.setattr("weft.core.watchconf.find_spec", lambda name: None)
    findings = {one["check"]: one for one in project.mesh("doctor", "-o", "json", code=None).json}
    assert (findings["alerts"]["status"], findings["alerts"]["fix"]) == ("failed", "pip install 'weft[alerts]'")
