"""`mesh card` and `mesh agents`: what an agent says of itself, found, checked and pinned."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format

from weft.core import cardkeys
from weft.core.cardkeys import CardKey
from weft.core.home import Home

TWO = "name: cards\nagents:\n  worker: {run: agents/worker.py:agent}\n"


@pytest.fixture
def known(running: Any, until: Callable[..., Any]) -> Any:
    """The shared mesh, once its agent is registered."""
    until(lambda: running.mesh("card", "worker", code=None).code == 0)
    return running


def test_a_card_is_checked_and_printed(known: Any) -> None:
    shown = known.mesh("card", "worker").out
    assert "Does as it is told" in shown
    assert "nats://mesh/worker" in shown
    key = CardKey.load(cardkeys.key_file(Home(known.home)))
    assert f"good, key {key.kid}" in shown
    assert "do  [test]" in shown
    assert "shout  [shout]" in shown


def test_as_json_it_is_the_card_itself(known: Any) -> None:
    result = known.mesh("card", "worker", "-o", "json")
    card = json_format.ParseDict(result.json, pb.AgentCard())
    assert (card.name, card.version) == ("worker", "1.2.3")
    assert cardkeys.verify(card, cardkeys.read_jwks(cardkeys.jwks_file(Home(known.home))))
    assert "good, key" in result.err
    assert "protocolBinding" in known.mesh("card", "worker", "-o", "yaml").out


def test_a_card_that_is_not_signed_by_this_mesh_ends_with_4(known: Any) -> None:
    public = known.home / "others.json"
    public.write_text(json.dumps(CardKey.new().jwks()))
    known.env["WEFT_CARD_JWKS"] = str(public)
    try:
        result = known.mesh("card", "worker", "-o", "json", code=4)
    finally:
        del known.env["WEFT_CARD_JWKS"]
    assert result.error["code"] == "card_not_trusted"
    assert result.out == ""


def test_the_card_of_nobody_ends_with_5_and_the_nearest_name(known: Any) -> None:
    assert "did you mean 'worker'" in known.mesh("card", "wroker", code=5).err
    assert known.mesh("agents", "wroker", code=5).out == ""


def test_an_agent_without_an_extended_card_says_so(known: Any) -> None:
    assert "has no extended card" in known.mesh("card", "worker", "--extended", code=1).err


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("worker",), True),
        (("wor*",), True),
        (("nobody*",), False),
        (("--skill", "shout"), True),
        (("--skill", "sh*", "--tag", "shout"), True),
        (("--tag", "test"), True),
        (("--tag", "test", "--skill", "shout"), False),
        (("list", "worker", "--tag", "nothing"), False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_agents_are_searched(known: Any, arguments: tuple[str, ...], found: bool) -> None:
    rows = known.mesh("agents", *arguments, "-o", "json").json
    assert [row["name"] for row in rows] == (["worker"] if found else [])


def test_what_is_not_found_is_said(known: Any) -> None:
    result = known.mesh("agents", "--tag", "nothing")
    assert result.out == ""
    assert "no agent matches" in result.err


def test_the_help_names_both_commands(known: Any) -> None:
    shown = known.mesh("agents", "--help").out
    assert "list" in shown
    assert "pin" in shown


def test_an_old_card_returns_only_when_it_is_pinned(project: Any, agent_source: str, until: Callable[..., Any]) -> None:
    def version() -> str:
        return str(project.mesh("card", "worker", "-o", "json", code=None).json["version"])

    def put(number: str) -> None:
        source = agent_source.format(name="worker").replace("1.2.3", number)
        project.write(TWO, worker=source)

    put("1.2.3")
    project.mesh("up", "--detach", timeout=50)
    until(lambda: project.mesh("card", "worker", code=None).code == 0)
    put("2.0.0")
    project.mesh("restart", "worker")
    until(lambda: version() == "2.0.0")

    put("1.2.3")
    project.mesh("restart", "worker")
    until(lambda: "callers see the card of version 2.0.0" in project.mesh("logs", "worker", code=None).out)
    assert version() == "2.0.0"
    rows = project.mesh("agents", "pin", "worker", "-o", "json").json
    assert [(row["version"], row["current"]) for row in rows] == [("2.0.0", True), ("1.2.3", False)]

    assert "several" not in project.mesh("agents", "pin", "worker", "9.9", code=2).err
    assert project.mesh("agents", "pin", "worker", "1.2.3").out.startswith("worker has card 1.2.3")
    assert version() == "1.2.3"
    assert project.mesh("agents", "-o", "json").json[0]["version"] == "1.2.3"
