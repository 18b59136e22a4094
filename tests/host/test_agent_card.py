"""The card an agent brings with its code."""

from __future__ import annotations

import pytest
from a2a.types import a2a_pb2 as pb

from weft import Agent
from weft_protocols import cards
from weft_protocols.errors import InvalidConfig


def sums(card: object = None, extended: object = None) -> Agent:
    agent = Agent("sums", version="1.2", description="Adds", card=card, extended_card=extended)  # type: ignore[arg-type]

    @agent.skill("add")
    async def add(one: int, other: int = 1) -> int:
        """The sum."""
        return one + other

    return agent


def test_an_agent_describes_itself_with_its_core_card_and_its_digest() -> None:
    told = sums().describe()
    card = cards.parse_card(told["card"])
    assert (card.name, card.version, card.description) == ("sums", "1.2", "Adds")
    assert [(skill.id, skill.description, list(skill.tags)) for skill in card.skills] == [("add", "The sum.", ["add"])]
    assert told["card_digest"] == cards.digest(card)
    assert "extended_card" not in told


@pytest.mark.parametrize("card", [{"name": "Sums"}, pb.AgentCard(name="Sums")], ids=["a mapping", "the SDK's"])
def test_a_card_may_be_given_in_part(card: object) -> None:
    told = sums(card).describe()
    assert told["card"]["name"] == "Sums"
    assert told["agent"] == "sums"


def test_an_extended_card_goes_with_it() -> None:
    told = sums(extended={"skills": [{"id": "multiply"}]}).describe()
    assert told["card"]["capabilities"]["extendedAgentCard"] is True
    assert {skill["id"] for skill in told["extended_card"]["skills"]} == {"add", "multiply"}


@pytest.mark.parametrize("wrong", [{"nmae": "Sums"}, {"version": "2.0"}, {"provider": {"url": "x"}}])
def test_a_mistake_in_a_card_is_named_when_the_agent_is_described(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidConfig, match="sums"):
        sums(wrong).describe()
    with pytest.raises(InvalidConfig, match="extended"):
        sums(extended={"skills": [{"name": "no id"}]}).describe()


def test_the_card_is_the_same_each_time_it_is_asked_for() -> None:
    assert len({sums().describe()["card_digest"] for _ in range(5)}) == 1
