"""Which card of an agent counts: decisions without a broker."""

from __future__ import annotations

from typing import Any

import pytest

from weft_coordinator.decide import pinning, registry
from weft_coordinator.decide.pinning import Cards, Shown
from weft_coordinator.decide.presence import STALE_AFTER, Presence
from weft_coordinator.decide.registry import AgentRecord
from weft_protocols import cards
from weft_protocols.errors import AgentNotFound, Conflict, InvalidParams

START = 1_000_000


def body(version: str = "1.0", description: str = "an echo", replica: str = "r1", **changes: Any) -> dict[str, Any]:
    skills = [{"id": "say", "schema": {"type": "string"}}]
    core = cards.core_card("echo", version=version, description=description, skills=skills)
    return {
        "agent": "echo",
        "version": version,
        "replica": replica,
        "pid": 7,
        "slots": 4,
        "code_digest": version,
        "skills": skills,
        "card": cards.card_json(core),
        "card_digest": cards.digest(core),
        **changes,
    }


def admit(record: AgentRecord | None, told: dict[str, Any], *, now: int = START) -> AgentRecord:
    wanted = registry.registration(told, caller="echo", now=now)
    return registry.admit(record, wanted, presence=Presence(START), ended=frozenset(), now=now)


def gone(record: AgentRecord) -> AgentRecord:
    """The record when no replica lives any more."""
    for replica in list(record.replicas):
        record = registry.leave(record, replica)
    return record


def current(record: AgentRecord) -> tuple[str, str]:
    return record.version, str(record.cards.shown.card["description"])


# What a registration brings ------------------------------------------------------------------------


def test_a_registration_brings_its_card() -> None:
    told = body()
    record = admit(None, told)
    assert record.cards.shown.digest == told["card_digest"] == record.replicas["r1"].card_digest
    assert record.cards.shown.card == told["card"]
    assert record.skills[0]["tags"] == ["say"]
    assert record.skills[0]["schema"] == {"type": "string"}
    assert AgentRecord.decode(record.encode()) == record


def test_a_registration_without_a_card_gets_one_made_of_what_it_says() -> None:
    told = {**body(), "description": "an echo"}
    del told["card"], told["card_digest"]
    assert admit(None, told).cards.shown.digest == body()["card_digest"]


def test_a_card_with_interfaces_and_signatures_is_kept_without_them() -> None:
    told = body()
    told["card"] = {
        **told["card"],
        "supportedInterfaces": [{"url": "http://evil", "protocolBinding": "JSONRPC", "protocolVersion": "1.0"}],
        "signatures": [{"protected": "x", "signature": "y"}],
    }
    assert admit(None, told).cards.shown.card == body()["card"]


def test_only_the_skills_of_the_card_are_shown() -> None:
    told = body()
    told["skills"] = [{"id": "say", "schema": {"type": "string"}}, {"id": "internal"}]
    assert [skill["id"] for skill in admit(None, told).skills] == ["say"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"card": "card.json"}, "must be an object"),
        ({"card": {"name": "echo"}}, "lacks"),
        ({"card": {"skills": 5}}, "not an A2A agent card"),
        ({"card": body("2.0")["card"]}, "version '2.0'"),
        ({"card_digest": "f" * 64}, "card_digest"),
        ({"card": {"name": "x" * registry.MAX_BODY}}, "bytes"),
        ({"extended_card": {"name": "echo"}}, "lacks"),
    ],
    ids=["no object", "incomplete", "no card", "another version", "another digest", "too big", "half extended"],
)
def test_a_card_that_cannot_be_used_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParams, match="card") as caught:
        registry.registration({**body(), **changes}, caller="echo", now=START)
    assert message in str(caught.value)


def test_a_card_that_is_too_big_with_all_that_goes_with_it_is_refused() -> None:
    big = "x" * (registry.MAX_BODY * 9 // 20)  # twice in each card: its skill has no words of its own
    with pytest.raises(InvalidParams, match="with its extended card and skills"):
        admit(None, body(description=big, extended_card=body(description=big)["card"]))


def test_a_record_from_before_there_were_cards_can_be_read() -> None:
    old = b'{"agent": "echo", "version": "1.0", "description": "d", "skills": [], "replicas": [], "revoked": false}'
    record = AgentRecord.decode(old)
    assert (record.version, record.description, record.cards.shown.digest) == ("1.0", "d", "")
    assert current(admit(record, body("0.9"))) == ("0.9", "an echo")


# Pinning -------------------------------------------------------------------------------------------


def test_a_newer_version_becomes_the_current_card_beside_the_old_one() -> None:
    record = admit(admit(None, body("1.0")), body("1.1", "better", "r2"))
    assert current(record) == ("1.1", "better")
    assert set(record.replicas) == {"r1", "r2"}


def test_an_older_version_may_run_and_changes_nothing() -> None:
    record = admit(admit(None, body("1.10")), body("1.9", "old", "r2"))
    assert current(record) == ("1.10", "an echo")
    assert record.replicas["r2"].version == "1.9"


def test_another_card_of_the_same_version_is_refused_while_the_first_lives() -> None:
    record = admit(None, body())
    with pytest.raises(Conflict, match="another card") as caught:
        admit(record, body(description="changed", replica="r2"), now=START + 1)
    assert body()["card_digest"][:12] in str(caught.value)
    assert current(admit(gone(record), body(description="changed", replica="r2"))) == ("1.0", "changed")
    later = START + STALE_AFTER + 1
    assert current(admit(record, body(description="changed", replica="r2"), now=later)) == ("1.0", "changed")


def test_a_replica_alone_may_change_its_card_under_the_same_version() -> None:
    assert current(admit(admit(None, body()), body(description="changed"))) == ("1.0", "changed")


def test_a_card_that_was_replaced_does_not_come_back() -> None:
    record = admit(admit(None, body("1.0")), body("1.0", "second"))
    record = admit(gone(record), body("1.0", replica="r2"))
    assert current(record) == ("1.0", "second")
    assert set(record.replicas) == {"r2"}

    record = admit(gone(record), body("2.0", "third"))
    for version, description in (("1.0", "an echo"), ("1.0", "second"), ("1.5", "never seen")):
        assert current(admit(gone(record), body(version, description))) == ("2.0", "third")


def test_an_operator_brings_an_old_card_back_by_version_or_digest() -> None:
    record = admit(admit(None, body("1.0")), body("2.0", "second"))
    for what in ("1.0", body("1.0")["card_digest"], body("1.0")["card_digest"][:8].upper()):
        pinned = AgentRecord(record.agent, pinning.pin(record.cards, what, agent="echo"), record.replicas)
        assert current(pinned) == ("1.0", "an echo")
        assert pinned.skills[0]["id"] == "say"


def test_what_was_pinned_stays_until_there_is_a_card_never_seen() -> None:
    record = admit(admit(None, body("1.0")), body("2.0", "second"))
    pinned = AgentRecord("echo", pinning.pin(record.cards, "1.0", agent="echo"))
    again = admit(pinned, body("2.0", "second", "r2"))
    assert current(again) == ("1.0", "an echo")
    assert current(admit(again, body("2.1", "third", "r3"))) == ("2.1", "third")


def test_pinning_goes_back_and_forth() -> None:
    shown = admit(admit(None, body("1.0")), body("2.0", "second")).cards
    back = pinning.pin(shown, "1.0", agent="echo")
    assert pinning.pin(back, "2.0", agent="echo").shown == shown.shown
    assert pinning.pin(back, "1.0", agent="echo") == back
    assert [(one["version"], one["current"], one["kept"]) for one in back.history()] == [
        ("2.0", False, True),
        ("1.0", True, True),
    ]


def test_a_card_that_cannot_be_pinned_is_told_with_those_that_can() -> None:
    record = admit(admit(None, body("1.0")), body("1.0", "second"))
    with pytest.raises(InvalidParams, match=r"never had a card 3\.0") as caught:
        pinning.pin(record.cards, "3.0", agent="echo")
    assert body("1.0", "second")["card_digest"][:12] in str(caught.value)
    with pytest.raises(InvalidParams, match=r"several cards 1\.0"):
        pinning.pin(record.cards, "1.0", agent="echo")
    with pytest.raises(InvalidParams, match="never had"):
        pinning.pin(record.cards, body()["card_digest"][: pinning.SHORTEST - 1], agent="echo")


def test_content_is_kept_of_the_last_cards_only_and_the_old_ones_still_cannot_return() -> None:
    record: AgentRecord | None = None
    for n in range(pinning.KEPT + 3):
        record = admit(record, body(f"1.{n}"))
    assert record is not None
    assert len(record.cards.kept) == pinning.KEPT
    assert len(record.cards.seen) == pinning.KEPT + 3
    with pytest.raises(InvalidParams, match="not kept any more"):
        pinning.pin(record.cards, "1.0", agent="echo")
    assert not pinning.comes_after(record.cards, Shown(version="9.9", digest=body("1.0")["card_digest"]))


def test_big_cards_are_kept_as_far_as_there_is_room() -> None:
    known = Cards()
    for n in range(5):
        wanted = Shown(str(n), f"{n}" * 64, "x" * (pinning.KEPT_BYTES // 3), card={"version": str(n)})
        known = pinning.offer(known, wanted, agent="echo", live=(), now=n)
    assert [one.version for one in known.kept] == ["3", "2"]


def test_the_extended_card_changes_with_the_last_replica_that_has_it() -> None:
    first = body(extended_card=body(description="more")["card"])
    other = body(extended_card=body(description="even more")["card"])
    record = admit(None, first)
    beside = admit(record, {**other, "replica": "r2"})
    assert beside.cards.shown.extended == first["extended_card"]
    assert admit(gone(record), other).cards.shown.extended == other["extended_card"]


# Finding -------------------------------------------------------------------------------------------


def test_an_unknown_agent_is_told_with_the_nearest_name() -> None:
    records = {"echo": admit(None, body())}
    assert registry.known(records, "echo") is records["echo"]
    with pytest.raises(AgentNotFound, match="did you mean 'echo'"):
        registry.known(records, "ecko")
    with pytest.raises(AgentNotFound):
        registry.known({"bare": AgentRecord("bare")}, "bare")
