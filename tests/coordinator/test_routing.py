"""Routing by skill: who may be chosen, and how often each is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from weft_coordinator.decide import registry
from weft_coordinator.decide.presence import Heartbeat, Presence
from weft_coordinator.decide.registry import AgentRecord
from weft_coordinator.decide.routing import Candidate, candidates, choose
from weft_protocols.errors import AgentNotFound, InvalidParams, Unavailable

NOW = 1_700_000_000_000


def record(agent: str, *skills: str, **more: Any) -> AgentRecord:
    body = {
        "agent": agent,
        "version": "1.0",
        "replica": f"{agent}-1",
        "pid": 7,
        "slots": 4,
        "skills": [{"id": skill} for skill in skills],
        **more,
    }
    wanted = registry.registration(body, caller=agent, now=NOW)
    return registry.admit(None, wanted, presence=Presence(NOW), ended=frozenset(), now=NOW)


def shares(*those: Candidate, tries: int = 1000) -> dict[str, float]:
    """How often each agent is chosen, in percent, over evenly spread chances."""
    counted = Counter(choose(those, random=(n + 0.5) / tries) for n in range(tries))
    return {agent: round(100 * count / tries) for agent, count in counted.items()}


def test_what_is_equal_gets_equal_shares() -> None:
    assert shares(Candidate("a", 4, 0), Candidate("b", 4, 0)) == {"a": 50, "b": 50}


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Candidate("b", 4, 3), {"a": 80, "b": 20}),
        (Candidate("b", 4, 0, weight=3.0), {"a": 25, "b": 75}),
        (Candidate("b", 4, 0, cost=3.0), {"a": 80, "b": 20}),
        (Candidate("b", 4, 0, done=0, failed=15), {"a": 80, "b": 20}),
        (Candidate("b", 4, 4), {"a": 99, "b": 1}),
        (Candidate("b", 4, 0, weight=0.0), {"a": 100}),
    ],
    ids=["load", "weight", "cost", "health", "full", "without weight"],
)
def test_load_weight_cost_and_health_shift_the_shares(other: Candidate, expected: dict[str, float]) -> None:
    assert shares(Candidate("a", 4, 0), other) == expected


def test_two_replicas_get_twice_as_much_as_one() -> None:
    assert shares(Candidate("a", 4, 0), Candidate("b", 4, 0), Candidate("b", 4, 0)) == {"a": 33, "b": 67}


def test_where_all_are_full_or_without_weight_one_is_chosen_all_the_same() -> None:
    assert shares(Candidate("a", 4, 4), Candidate("b", 0, 0)) == {"a": 50, "b": 50}
    assert shares(Candidate("a", 4, 0, weight=0.0)) == {"a": 100}


def test_the_same_chance_chooses_the_same_in_whatever_order_they_come() -> None:
    those = [Candidate("a", 4, 1), Candidate("b", 4, 0), Candidate("c", 8, 5)]
    for n in range(100):
        assert choose(those, random=n / 100) == choose(those[::-1], random=n / 100)


def test_only_ready_replicas_of_agents_with_the_skill_are_candidates() -> None:
    records = {
        one.agent: one
        for one in (
            record("both", "translate", "sum", weight=2.0, cost=0.5),
            record("stale", "translate"),
            record("draining", "translate"),
            record("other", "sum"),
            record("caller", "translate"),
        )
    }
    presence = Presence(NOW)
    for agent in records:
        at, state = (NOW + 60_000, "draining" if agent == "draining" else "ready")
        if agent != "stale":
            presence.heard(agent, f"{agent}-1", Heartbeat(state, 3, 1, 4, 9, 1, at, at))
    found = candidates(records, presence, skill="translate", exclude=("caller",), now=NOW + 61_000)
    assert found == [Candidate("both", 4, 2, done=9, failed=1, weight=2.0, cost=0.5)]


def test_nobody_has_the_skill_names_the_nearest() -> None:
    records = {"a": record("a", "translate", "sum")}
    with pytest.raises(AgentNotFound, match="has the skill 'transalte'; did you mean 'translate'"):
        candidates(records, Presence(NOW), skill="transalte", exclude=(), now=NOW)


def test_nobody_ready_is_retryable_and_only_those_excluded_is_not() -> None:
    records = {"a": record("a", "translate")}
    with pytest.raises(Unavailable, match="a has no ready replica"):
        candidates(records, Presence(NOW), skill="translate", exclude=(), now=NOW + 30_000)
    with pytest.raises(AgentNotFound, match="only a has the skill 'translate', and takes part"):
        candidates(records, Presence(NOW), skill="translate", exclude=("a",), now=NOW)


@pytest.mark.parametrize("wrong", [{"weight": -1}, {"weight": "much"}, {"cost": True}])
def test_a_wrong_weight_or_cost_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams, match=next(iter(wrong))):
        record("a", "translate", **wrong)
