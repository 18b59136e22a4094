"""Who may register, who counts as alive, what callers are shown: decisions without a broker."""

from __future__ import annotations

from typing import Any

import pytest

from weft_coordinator.decide import registry
from weft_coordinator.decide.presence import GONE_AFTER, STALE_AFTER, Heartbeat, Presence
from weft_coordinator.decide.registry import AgentRecord, Registration
from weft_protocols.errors import Conflict, InvalidParams, ParseError, PermissionDenied

START = 1_000_000


def body(**changes: Any) -> dict[str, Any]:
    return {
        "agent": "echo",
        "version": "1.0",
        "replica": "r1",
        "pid": 7,
        "slots": 4,
        "code_digest": "aaaa",
        "host": "here",
        "skills": [{"id": "say", "schema": {"type": "string"}, "unknown": 1}],
        **changes,
    }


def wanted(*, now: int = START, **changes: Any) -> Registration:
    return registry.registration(body(**changes), caller="echo", now=now)


def admit(record: AgentRecord | None, made: Registration, presence: Presence, *, now: int) -> AgentRecord:
    return registry.admit(record, made, presence=presence, ended=frozenset(), now=now)


def beat(at: int, state: str = "ready") -> Heartbeat:
    return Heartbeat(state, 1, 0, 4, 2, 0, at, at)


def test_a_registration_becomes_the_agents_record() -> None:
    record = admit(None, wanted(description="says it again"), Presence(START), now=START)
    assert (record.version, record.description, list(record.replicas)) == ("1.0", "says it again", ["r1"])
    assert record.skills == (
        {
            "id": "say",
            "name": "",
            "description": "",
            "tags": [],
            "examples": [],
            "schema": {"type": "string"},
        },
    )
    assert AgentRecord.decode(record.encode()) == record


def test_other_code_under_the_same_version_is_refused_while_the_first_lives() -> None:
    presence = Presence(START)
    record = admit(None, wanted(), presence, now=START)
    with pytest.raises(Conflict, match="other code") as caught:
        admit(record, wanted(replica="r2", code_digest="bbbb"), presence, now=START + 100)
    assert "r1" in str(caught.value)
    assert "pid 7 on here" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"code_digest": "aaaa"}, {"version": "1.1", "code_digest": "bbbb"}],
    ids=["the same code", "another version"],
)
def test_replicas_of_one_code_and_of_other_versions_run_side_by_side(changes: dict[str, Any]) -> None:
    presence = Presence(START)
    record = admit(None, wanted(), presence, now=START)
    assert set(admit(record, wanted(replica="r2", **changes), presence, now=START).replicas) == {"r1", "r2"}


def test_other_code_may_replace_what_is_draining_stale_or_ended() -> None:
    other = wanted(replica="r2", code_digest="bbbb")
    record = admit(None, wanted(), Presence(START), now=START)

    draining = Presence(START)
    draining.heard("echo", "r1", beat(START + 1, "draining"))
    assert set(admit(record, other, draining, now=START + 2).replicas) == {"r1", "r2"}

    silent = Presence(START)
    assert "r2" in admit(record, other, silent, now=START + STALE_AFTER + 1).replicas

    ended = registry.admit(record, other, presence=Presence(START), ended=frozenset({"r1"}), now=START)
    assert set(ended.replicas) == {"r2"}


def test_the_same_replica_registers_again_with_whatever_it_runs() -> None:
    record = admit(None, wanted(), Presence(START), now=START)
    again = admit(record, wanted(code_digest="bbbb", version="2.0"), Presence(START), now=START)
    assert (again.version, again.replicas["r1"].code_digest) == ("2.0", "bbbb")


def test_replicas_that_are_gone_leave_the_record_at_the_next_registration() -> None:
    record = admit(None, wanted(), Presence(START), now=START)
    later = START + GONE_AFTER + 1
    assert set(admit(record, wanted(replica="r2", now=later), Presence(START), now=later).replicas) == {"r2"}


@pytest.mark.parametrize("agent", ["other", "operator"])
def test_an_agent_registers_itself_only(agent: str) -> None:
    with pytest.raises(PermissionDenied):
        registry.registration(body(agent=agent), caller="echo", now=START)


def test_the_mesh_itself_is_no_agent() -> None:
    with pytest.raises(PermissionDenied):
        registry.registration(body(agent="operator"), caller="operator", now=START)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("agent", None),
        ("version", ""),
        ("version", 1),
        ("replica", "a b"),
        ("replica", "x" * 65),
        ("pid", -1),
        ("pid", "7"),
        ("pid", True),
        ("slots", 1.5),
        ("description", "x" * 20_000),
        ("skills", "say"),
        ("skills", [{"name": "no id"}]),
        ("skills", [{"id": "x", "schema": []}]),
        ("skills", [{"id": "x", "tags": "x"}]),
    ],
)
def test_every_wrong_field_of_a_registration_is_named(field: str, value: object) -> None:
    with pytest.raises(InvalidParams) as caught:
        registry.registration(body(**{field: value}), caller="echo", now=START)
    assert [one.field for one in caught.value.violations] == [field]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'"x"',
        b'{"agent":"a","version":"1","description":"","skills":[],"replicas":[{"replica":"r"}]}',
    ],
)
def test_a_damaged_record_is_a_parse_error(data: bytes) -> None:
    with pytest.raises(ParseError):
        AgentRecord.decode(data)


def test_fields_of_a_later_version_are_ignored() -> None:
    record = admit(None, wanted(), Presence(START), now=START)
    later = record.encode().replace(b'"agent":', b'"colour":"red","agent":', 1).replace(b'"pid":', b'"gpu":1,"pid":', 1)
    assert AgentRecord.decode(later) == record


def test_a_replica_is_ready_then_stale_then_gone_when_it_falls_silent() -> None:
    presence = Presence(START)
    assert presence.state("echo", "r1", registered=START, now=START + STALE_AFTER) == "ready"
    presence.heard("echo", "r1", beat(START + 5_000))
    silent_since = START + 5_000
    for after, expected in ((STALE_AFTER, "ready"), (STALE_AFTER + 1, "stale"), (GONE_AFTER + 1, "gone")):
        assert presence.state("echo", "r1", registered=START, now=silent_since + after) == expected


def test_after_a_restart_of_the_coordinator_a_replica_is_unknown_until_it_is_heard() -> None:
    long_ago = START - 3_600_000
    presence = Presence(START)
    assert presence.state("echo", "r1", registered=long_ago, now=START + 100) == "unknown"
    assert presence.state("echo", "r1", registered=long_ago, now=START + STALE_AFTER + 1) == "stale"
    presence.heard("echo", "r1", beat(START + 200, "draining"))
    assert presence.state("echo", "r1", registered=long_ago, now=START + 300) == "draining"


def test_what_a_caller_is_shown_of_an_agent_names_no_process() -> None:
    presence = Presence(START)
    record = admit(None, wanted(), presence, now=START)
    presence.heard("echo", "r1", beat(START + 1))
    public = registry.show(record, presence, now=START + 2, replicas=False)
    assert set(public) == {"name", "version", "description", "skills", "card_digest", "state", "ready"}
    assert (public["state"], public["ready"]) == ("ready", 1)
    (replica,) = registry.show(record, presence, now=START + 2, replicas=True)["replicas"]
    assert (replica["pid"], replica["state"], replica["active"], replica["last_seen"]) == (7, "ready", 1, START + 1)


def test_an_agent_without_living_replicas_is_offline() -> None:
    presence = Presence(START)
    record = admit(None, wanted(), presence, now=START)
    shown = registry.show(record, presence, now=START + GONE_AFTER + 1, replicas=True)
    assert (shown["state"], shown["ready"], shown["replicas"]) == ("offline", 0, [])
    assert registry.show(registry.leave(record, "r1"), presence, now=START, replicas=False)["state"] == "offline"
