"""`mesh approvals` on a mesh whose agent asks before it sends, and whose mesh.yaml says who may decide."""

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest

from weft.cli.main import cli

SENDER = """
from weft import Agent, Task

agent = Agent("mailer")


@agent.skill("send")
async def send(task: Task) -> str:
    what, _, role = task.text.partition(" for ")
    count = 2 if what == "two" else 1
    said = await task.approve(f"Send {what}?", risk="high", role=role, count=count, details={"to": "acme"})
    return f"{said.state}: {said.reason}"
"""
CONFIG = """
name: mails
agents:
  mailer: {run: "agents/mailer.py:agent"}
approvers: {ann: [ops], ben: [ops, finance], eve: []}
watchdog: {approval_within: 1, clear_after: 1}
"""


@pytest.fixture(scope="module")
def mails(tmp_path_factory: pytest.TempPathFactory, project_class: Any) -> Iterator[Any]:
    made = project_class(tmp_path_factory.mktemp("mails"), {"WEFT_APPROVER": "ann"})
    made.write(CONFIG, mailer=SENDER)
    made.mesh("up", "--detach", timeout=50)
    yield made
    made.clean()


@pytest.fixture
def asks(mails: Any, until: Callable[..., Any]) -> Callable[[str], tuple[str, str]]:
    """Sends a task; its id and that of the approval it waits for."""

    def ask(text: str) -> tuple[str, str]:
        task = mails.mesh("send", "mailer", text, "--detach", "-o", "json").json["id"]

        def find() -> str:
            rows = mails.mesh("approvals", "-o", "json").json
            return next((row["id"] for row in rows if row["task"] == task), "")

        return task, until(find)

    return ask


def result(mails: Any, until: Callable[..., Any], task: str) -> str:
    """The text of a task's result, once it has ended."""
    until(lambda: mails.mesh("tasks", "get", task, "-o", "json").json["state"] == "completed")
    return str(mails.mesh("tasks", "get", task).out)


def test_what_waits_is_listed_and_shown_and_a_person_approves_it(
    mails: Any, asks: Callable[[str], tuple[str, str]], until: Callable[..., Any]
) -> None:
    task, id_ = asks("mail for ops")
    lines = mails.mesh("approvals").out.splitlines()
    assert lines[0].split() == ["ID", "STATE", "RISK", "AGENT", "NEEDS", "AGE", "LEFT", "TITLE"]
    row = next(line for line in lines if line.startswith(id_))
    assert re.split(r"  +", row)[1:5] == ["pending", "high", "mailer", "1 ops"]
    shown = mails.mesh("approvals", "show", id_[:8]).out
    for words in ("wants:      Send mail?", f"task:       {task}", '"to": "acme"', "next: mesh approvals approve"):
        assert words in shown
    graph = mails.mesh("locks", "graph").out
    assert f"waits for approval {id_}" in graph
    assert id_[:8] in mails.mesh("locks", "graph", "--svg", "-").out
    said = mails.mesh("approvals", "approve", id_, "--reason", "fine")
    assert said.out == f"ann approved {id_}: Send mail?\n"
    assert "approved: fine" in result(mails, until, task)
    told = mails.mesh("approvals", "show", id_, "-o", "json").json
    assert (told["state"], told["decisions"][0]["who"], told["needs"]) == (
        "approved",
        "ann",
        [{"role": "ops", "count": 1}],
    )
    assert "ann approved as ops: fine" in mails.mesh("approvals", "show", id_).out


def test_one_who_denies_says_why_and_the_task_goes_on_with_it(
    mails: Any, asks: Callable[[str], tuple[str, str]], until: Callable[..., Any]
) -> None:
    task, id_ = asks("two for ops")
    first = mails.mesh("approvals", "approve", id_)
    assert "still needed: 1 ops" in first.out
    assert mails.mesh("approvals", "deny", id_, code=2).err
    assert "--reason is empty" in mails.mesh("approvals", "deny", id_, "--reason", " ", code=2).err
    assert "not taken back" in mails.mesh("approvals", "deny", id_, "--reason", "no", code=1).err
    mails.mesh("approvals", "deny", id_, "--reason", "no", "--as", "ben")
    assert "denied: no" in result(mails, until, task)
    assert "nothing is left to decide" in mails.mesh("approvals", "approve", id_, "--as", "eve", code=1).err
    states = {row["id"]: row["state"] for row in mails.mesh("approvals", "--state", "all", "-o", "json").json}
    assert states[id_] == "denied"


def test_who_may_not_decide_is_told_why(mails: Any, asks: Callable[[str], tuple[str, str]]) -> None:
    _, id_ = asks("money for finance")
    for who, words in (
        ("eve", "it needs finance"),
        ("ann", "it needs finance"),
        ("bem", "is no approver of this mesh (did you mean 'ben'?)"),
        ("mailer", "is no approver"),
    ):
        refused = mails.mesh("approvals", "approve", id_, "--as", who, "-o", "json", code=6)
        assert words in refused.error["message"]
    assert "does not have role" in mails.mesh("approvals", "approve", id_, "--role", "finance", code=6).err
    assert mails.mesh("approvals", "approve", id_, "--as", "ben", "-o", "json").json["state"] == "approved"


def test_an_id_that_is_none_names_the_nearest(mails: Any, asks: Callable[[str], tuple[str, str]]) -> None:
    _, id_ = asks("this")
    typo = f"{id_[:-1]}{'0' if id_[-1] != '0' else '1'}"
    for words in (("show", typo), ("approve", typo), ("deny", typo, "--reason", "x")):
        assert f"did you mean {id_!r}?" in mails.mesh("approvals", *words, code=5).err
    assert "there is no approval" in mails.mesh("approvals", "show", "*", code=5).err
    assert mails.mesh("approvals", "approve", id_, "--as", "eve").out
    assert "there is no command" in mails.mesh("aprovals", code=2).err


def test_what_is_asked_and_decided_can_be_watched(mails: Any, asks: Callable[[str], tuple[str, str]]) -> None:
    _, id_ = asks("then")
    watching = subprocess.Popen(
        mails.command("approvals", "--watch", "-o", "json"),
        cwd=mails.folder,
        env=mails.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    with watching:
        assert watching.stdout is not None
        states = []
        for line in watching.stdout:
            told = json.loads(line)
            if told["id"] == id_:
                states.append(told["state"])
                if told["state"] == "approved":
                    break
                mails.mesh("approvals", "approve", id_)
        watching.send_signal(signal.SIGINT)
    assert states == ["pending", "approved"]
    assert watching.returncode == 130


def test_what_nobody_decides_about_is_an_incident_that_says_what_to_run(
    mails: Any, asks: Callable[[str], tuple[str, str]], until: Callable[..., Any]
) -> None:
    _, id_ = asks("that")

    def find() -> Any:
        rows = mails.mesh("incidents", "-o", "json").json
        return next((row for row in rows if row["key"] == "approval-waits:mailer"), None)

    incident = until(find)
    assert incident["command"].startswith("mesh approvals show ")
    assert id_ in mails.mesh(*incident["command"].split()[1:]).out
    mails.mesh("approvals", "approve", id_)
    until(lambda: find() is None)


def test_every_option_and_command_has_help() -> None:
    group = cli.get_command(click.Context(cli), "approvals")
    assert isinstance(group, click.Group)
    assert sorted(group.commands) == ["approve", "deny", "list", "show"]
    for one in group.commands.values():
        assert one.help
        assert all(option.help for option in one.params if isinstance(option, click.Option))
