"""`mesh policy`, in a folder alone and on a mesh."""

import asyncio
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from weft.core.broker import Broker
from weft.core.config import load_settings
from weft_protocols.resources import TOOL_PINS

pytest.importorskip("cedarpy", reason="needs the extra `policy`")
UPDATE = {
    "name": "update",
    "inputSchema": {
        "type": "object",
        "required": ["id", "amount"],
        "properties": {"id": {"type": "string"}, "amount": {"type": "number"}},
    },
}
TOOLS = {"crm": [UPDATE, {"name": "get", "inputSchema": {"type": "object"}}]}
RULES = """@id("small") @limit("10/m") @approval("ops")
permit(principal == Agent::"billing", action == Action::"call", resource == Tool::"crm.update")
when { context.args.amount.lessThan(decimal("100.0")) };

@id("quiet") @reason("the crm rests on Sundays")
forbid(principal, action, resource in Server::"crm") when { context.weekday == 7 };
"""
TESTS = """
- name: small amounts
  request: {agent: billing, tool: crm.update, arguments: {id: a, amount: 5}, time: 2026-01-05T10:00:00Z}
  expect: allow
  obligations: {approval: ops, limit: 10/m}
"""
ON_MONDAY = ("--time", "2026-01-05T10:00:00Z")


@pytest.fixture
def folder(project: Any) -> Path:
    """A policy that is right, with its tests and the tools beside it."""
    made: Path = project.folder / "policies"
    made.mkdir()
    (made / "crm.cedar").write_text(RULES)
    (made / "crm.test.yaml").write_text(TESTS)
    (made / "tools.json").write_text(json.dumps(TOOLS))
    return made


@pytest.fixture(scope="module")
def home(stub: Any) -> Path:
    """A mesh on which the tools are registered and approved."""
    root: Path = stub[1] / ".weft"

    async def register() -> None:
        items = {f"tool:{one['name']}": one for one in TOOLS["crm"]}
        pin = zlib.compress(json.dumps({"items": items, "by": "t", "at": 0.0}).encode())
        broker = await Broker.connect(load_settings("operator", home=root))
        await broker.publish(f"{TOOL_PINS}.crm", pin)
        await broker.close()

    asyncio.run(register())
    return root


@pytest.fixture
def mesh(project: Any, folder: Path, home: Path) -> Any:
    """The command in a project with that policy, beside the mesh."""
    project.env["WEFT_HOME"] = str(home)
    return project


def test_a_right_policy_passes_its_check_and_its_tests(project: Any, folder: Path) -> None:
    assert "2 rules are right" in project.mesh("policy", "check").err
    assert project.mesh("policy", "check", "-o", "json").json == []
    assert "1 of 1 tests pass" in project.mesh("policy", "test").err
    assert [row["result"] for row in project.mesh("policy", "test", "policies", "-o", "json").json] == ["ok"]


def test_a_check_names_file_and_line_and_what_was_meant(project: Any, folder: Path) -> None:
    (folder / "more.cedar").write_text(RULES.replace("args.amount", "args.amout").replace('"small"', '"s"'))
    (folder / "crm.test.yaml").write_text("- request: {agent: a, tol: crm.update}\n  expect: deny\n")
    result = project.mesh("policy", "check", "-o", "json", code=3)
    assert [(row["place"], row["kind"], row["message"]) for row in result.json] == [
        ("more.cedar:3", "error", 'there is no argument "amout" of crm.update; did you mean "amount"?'),
        ("more.cedar:5", "error", 'there is a rule "quiet" already, at crm.cedar:5'),
        ("crm.test.yaml:1", "error", "request: there is no field 'tol'; did you mean \"tool\"?"),
    ]
    assert "more.cedar:3" in project.mesh("policy", "check", code=3).out


def test_a_test_that_fails_says_what_was_decided(project: Any, folder: Path) -> None:
    (folder / "crm.test.yaml").write_text(TESTS.replace("amount: 5", "amount: 500"))
    result = project.mesh("policy", "test", code=3)
    assert "expected allow, but nothing permits it" in result.out
    assert "0 of 1 tests pass" in result.err


def test_without_tools_a_check_says_what_it_did_not_check(project: Any, folder: Path) -> None:
    (folder / "tools.json").unlink()
    assert "names of tools and arguments are not checked" in project.mesh("policy", "check").err
    project.mesh("policy", "test", code=2)
    (project.folder / "other.yaml").write_text("crm: 3")
    assert "cannot be read as definitions" in project.mesh("policy", "check", "--tools", "other.yaml", code=2).err


def test_a_folder_without_rules_is_no_policy(project: Any) -> None:
    assert "is no folder" in project.mesh("policy", "check", code=2).err
    (project.folder / "policies").mkdir()
    assert "has no .cedar file" in project.mesh("policy", "check", code=2).err


def test_a_decision_is_explained_by_its_rules(project: Any, folder: Path) -> None:
    asked = ("policy", "explain", "--dir", "policies", "--agent", "billing", "--tool", "crm.update")
    result = project.mesh(*asked, "--arg", "id=7", "--arg", "amount=5", *ON_MONDAY)
    assert result.out.startswith("allow: billing call crm.update\nbecause permitted by small\n  approvals: 1 of ops\n")
    assert "decided by: small (crm.cedar:1)" in result.out
    assert "also about it, and not the reason: quiet (crm.cedar:5)" in result.out
    told = project.mesh(*asked, "--arg", "id=7", "--arg", "amount=5", *ON_MONDAY, "-o", "json").json
    assert told["request"]["arguments"] == {"id": "7", "amount": 5}  # text stays text
    assert [(rule["id"], rule["decided"]) for rule in told["rules"]] == [("small", True), ("quiet", False)]
    sunday = project.mesh(*asked, "--arg", "id=7", "--arg", "amount=5", "--time", "2026-01-04T10:00:00Z").out
    assert sunday.startswith("deny: billing call crm.update\nbecause the crm rests on Sundays")
    project.mesh("policy", "explain", "--dir", "policies", "--agent", "billing", code=2)


def test_can_i_answers_with_its_exit_code(project: Any, folder: Path) -> None:
    asked = ("policy", "can-i", "billing", "crm.update", "--dir", "policies", *ON_MONDAY)
    assert "yes: it depends on amount" in project.mesh(*asked).out
    assert "yes: permitted by small\n  approvals: 1 of ops" in project.mesh(*asked, "--arg", "amount=5").out
    assert "no: nothing permits it" in project.mesh(*asked, "--arg", "amount=500", code=6).out
    assert (
        project.mesh("policy", "can-i", "eve", "crm.update", "--dir", "policies", "-o", "json", code=6).json["allow"]
        is False
    )


def test_recorded_decisions_show_what_would_change(project: Any, folder: Path) -> None:
    records = [
        {"request": {"agent": "billing", "action": "call", "server": "crm", "name": "update", "task": "t1",
                     "arguments": {"id": "a", "amount": amount}, "time": 1_767_603_600.0},
         "decision": "allow", "reasons": ["old"]}
        for amount in (5, 500)
    ]  # fmt: skip
    text = "\n".join([*(json.dumps(one) for one in records), "nonsense"])
    (project.folder / "records.jsonl").write_text(text)
    result = project.mesh("policy", "replay", "--against", "policies", "records.jsonl", "-o", "json")
    assert [(row["change"], row["before"], row["why"]) for row in result.json] == [
        ("allow>deny", ["old"], "nothing permits it")
    ]
    assert "1 of 2 decisions would change; 1 lines hold no decision" in result.err
    project.mesh("policy", "replay", "--against", "policies", "--strict", "-", code=3, said=text)
    missing = project.mesh("policy", "replay", "--against", "policies", "none.jsonl", code=2)
    assert "none.jsonl cannot be read as records" in missing.err


def test_two_folders_are_compared_by_rule(project: Any, folder: Path) -> None:
    other = project.folder / "other"
    other.mkdir()
    (other / "x.cedar").write_text(RULES.replace("100.0", "50.0").partition('@id("quiet")')[0])
    out = project.mesh("policy", "diff", "policies", "other").out
    assert "removed quiet" in out
    assert '+when { context.args.amount.lessThan(decimal("50.0")) };' in out
    assert "the rules are the same" in project.mesh("policy", "diff", "policies", "policies").err


def test_versions_are_loaded_listed_and_rolled_back(mesh: Any, folder: Path) -> None:
    first = mesh.mesh("policy", "load", "policies", "--note", "start", "-o", "json").json["version"]
    assert mesh.mesh("policy", "load", "policies", "-o", "json").json["version"] == first
    (folder / "crm.cedar").write_text(RULES.replace("100.0", "50.0"))
    second = mesh.mesh("policy", "load", "policies", "-o", "json").json["version"]
    rows = {row["version"]: row for row in mesh.mesh("policy", "-o", "json").json}
    assert (rows[first]["state"], rows[first]["note"], rows[second]["state"]) == ("", "start", "active")
    assert "changed small" in mesh.mesh("policy", "diff", str(first), "active").out
    asked = ("policy", "can-i", "billing", "crm.update", "--arg", "amount=70", *ON_MONDAY)
    mesh.mesh(*asked, code=6)
    assert f"version {first} decides, instead of {second}" in mesh.mesh("policy", "rollback", str(first)).out
    mesh.mesh(*asked)
    assert "mesh policy list" in mesh.mesh("policy", "rollback", "99", code=5).err
    history = mesh.mesh("policy", "list", "--history", "-o", "json").json
    assert [(row["version"], row["how"]) for row in history[-3:]] == [
        (first, "load"),
        (second, "load"),
        (first, "rollback"),
    ]


def test_what_is_wrong_is_not_loaded(mesh: Any, folder: Path) -> None:
    before = mesh.mesh("policy", "-o", "json").json
    (folder / "crm.cedar").write_text(RULES.replace("crm.update", "crm.updat"))
    assert 'there is no tool "crm.updat"; did you mean' in mesh.mesh("policy", "load", "policies", code=3).err
    (folder / "crm.cedar").write_text(RULES.replace("100.0", "1.0"))
    assert (
        "small amounts: expected allow, but nothing permits it" in mesh.mesh("policy", "load", "policies", code=3).err
    )
    assert mesh.mesh("policy", "-o", "json").json == before


def test_an_agent_the_mesh_does_not_have_is_a_warning(mesh: Any, folder: Path) -> None:
    (folder / "tools.json").unlink()
    result = mesh.mesh("policy", "check", "-o", "json")
    assert [(row["kind"], row["message"]) for row in result.json] == [
        ("warning", 'there is no agent "billing"; there are: local, operator')
    ]
    assert "checked against the mesh" in result.err
    assert 'warning: there is no agent "billing"' in mesh.mesh("policy", "load", "policies").err


def test_a_candidate_is_watched_until_it_is_stopped(mesh: Any, folder: Path) -> None:
    (folder / "crm.cedar").write_text(RULES.replace("100.0", "75.0"))
    told = mesh.mesh("policy", "shadow", "policies", "-o", "json").json
    assert (told["version"] > 0, told["seen"]) == (True, [])
    assert [row["state"] for row in mesh.mesh("policy", "-o", "json").json if row["version"] == told["version"]] == [
        "shadow"
    ]
    assert f"version {told['version']} watches" in mesh.mesh("policy", "shadow").err
    mesh.mesh("policy", "shadow", "--stop")
    assert "no policy watches" in mesh.mesh("policy", "shadow").err
    mesh.mesh("policy", "shadow", "policies", "--stop", code=2)
