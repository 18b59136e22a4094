"""Cards at the coordinator on a real broker: published signed, pinned, searched, extended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from a2a.types import a2a_pb2 as pb
from a2a.utils.proto_utils import validate_proto_required_fields

from weft import Agent
from weft.client import cards as client_cards
from weft.client import coordinator
from weft.core import cardkeys
from weft_protocols import a2a, cards
from weft_protocols.errors import (
    AgentNotFound,
    Conflict,
    ExtendedAgentCardNotConfigured,
    InvalidParams,
    PermissionDenied,
    UnsupportedOperation,
)

if TYPE_CHECKING:
    from tests.coordinator.conftest import Stage

pytestmark = pytest.mark.anyio


def made(name: str, version: str = "1.0", description: str = "an echo", **options: Any) -> Agent:
    """An agent with two skills."""
    agent = Agent(name, version=version, description=description, **options)

    @agent.skill("say", tags=["talk", "short"])
    async def say(text: str) -> str:
        """Says it."""
        return text

    @agent.skill("add", tags=["sums"])
    async def add(one: int, other: int = 1) -> int:
        return one + other

    return agent


async def register(stage: Stage, agent: Agent, replica: str = "r1") -> dict[str, Any]:
    body = {**agent.describe(), "replica": replica, "pid": 1, "slots": 4, "code_digest": agent.version}
    answer = await coordinator.call(await stage.broker(agent.name), "register", body, timeout=20.0)
    told: dict[str, Any] = answer["card"]
    return told


async def leave(stage: Stage, agent: Agent, replica: str = "r1") -> None:
    await coordinator.leave(await stage.broker(agent.name), agent.name, replica)


async def card(stage: Stage, agent: str, caller: str = "local") -> dict[str, Any]:
    return await coordinator.call(await stage.broker(caller), "card", {"agent": agent})


async def found(stage: Stage, **wanted: str) -> list[str]:
    told = await coordinator.call(await stage.broker("local"), "agents", wanted)
    return [one["name"] for one in told["agents"]]


# Publishing ----------------------------------------------------------------------------------------


async def test_every_caller_gets_the_signed_card_of_a_registered_agent(stage: Stage) -> None:
    agent = made(stage.agent())
    assert (await register(stage, agent))["current"]
    told = await card(stage, agent.name)
    assert (told["agent"], told["version"], told["digest"]) == (agent.name, "1.0", agent.describe()["card_digest"])
    assert "history" not in told
    published = cards.parse_card(told["card"])
    validate_proto_required_fields(published)
    assert [one.url for one in published.supported_interfaces] == [f"nats://mesh/{agent.name}"]
    assert cards.digest(published) == told["digest"]
    keys = cardkeys.trusted_keys(stage.mesh.settings("local"))
    assert keys is not None
    assert cardkeys.verify(published, keys)


async def test_the_card_says_what_the_agent_declares(stage: Stage) -> None:
    agent = made(stage.agent(), card={"provider": {"organization": "Example", "url": "https://example.com"}})
    await register(stage, agent)
    published = cards.parse_card((await card(stage, agent.name))["card"])
    assert published.provider.organization == "Example"
    assert {skill.id: list(skill.tags) for skill in published.skills} == {"say": ["talk", "short"], "add": ["sums"]}
    (extension,) = published.capabilities.extensions
    assert a2a.struct_to_dict(extension.params)["add"]["required"] == ["one"]


async def test_an_agent_nobody_registered_has_no_card(stage: Stage) -> None:
    with pytest.raises(AgentNotFound, match="ever registered"):
        await card(stage, "nobody-at-all")


async def test_another_coordinator_publishes_the_same_card(stage: Stage) -> None:
    agent = made(stage.agent())
    await register(stage, agent)
    first = await card(stage, agent.name)
    running = await stage.coordinator()
    try:
        answers = [await card(stage, agent.name) for _ in range(6)]
    finally:
        await stage.stop(running)
    assert all(answer == first for answer in answers)


# Pinning -------------------------------------------------------------------------------------------


async def test_an_old_card_does_not_return_until_the_operator_pins_it(stage: Stage) -> None:
    name = stage.agent()
    first, second = made(name), made(name, "2.0", "a better echo")
    await register(stage, first)
    await register(stage, second, "r2")
    assert await register(stage, first, "r3") == {"current": False, "version": "2.0"}
    assert (await card(stage, name))["version"] == "2.0"

    operator = await stage.broker("operator")
    told = await client_cards.pin(operator, name, "1.0")
    assert told == {"agent": name, "version": "1.0", "digest": first.describe()["card_digest"]}
    again = await card(stage, name)
    assert (again["version"], again["digest"]) == ("1.0", told["digest"])
    assert cards.parse_card(again["card"]).description == "an echo"
    assert not (await register(stage, second, "r4"))["current"]

    history = (await card(stage, name, "operator"))["history"]
    assert [(one["version"], one["current"]) for one in history] == [("2.0", False), ("1.0", True)]


async def test_two_cards_of_one_version_do_not_run_at_once(stage: Stage) -> None:
    name = stage.agent()
    await register(stage, made(name))
    with pytest.raises(Conflict, match="another card"):
        await register(stage, made(name, description="something else"), "r2")
    await leave(stage, made(name))
    assert (await register(stage, made(name, description="something else"), "r2"))["current"]


async def test_only_the_operator_pins(stage: Stage) -> None:
    name = stage.agent()
    await register(stage, made(name))
    for identity in ("local", name):
        with pytest.raises(PermissionDenied):
            await client_cards.pin(await stage.broker(identity), name, "1.0")
    operator = await stage.broker("operator")
    with pytest.raises(InvalidParams, match="never had"):
        await client_cards.pin(operator, name, "7.0")
    with pytest.raises(AgentNotFound):
        await client_cards.pin(operator, "nobody-at-all", "1.0")


async def test_what_was_pinned_survives_the_coordinator(stage: Stage) -> None:
    name = stage.agent()
    await register(stage, made(name))
    await register(stage, made(name, "2.0"), "r2")
    await client_cards.pin(await stage.broker("operator"), name, "1.0")
    running = await stage.coordinator()
    try:
        answers = [await card(stage, name) for _ in range(6)]
    finally:
        await stage.stop(running)
    assert {answer["version"] for answer in answers} == {"1.0"}


# Searching -----------------------------------------------------------------------------------------


async def test_agents_are_found_by_name_skill_and_tag(stage: Stage) -> None:
    one, other = made(stage.agent()), Agent(stage.agent(), version="1.0")

    @other.skill("whisper", tags=["talk"])
    async def whisper(text: str) -> str:
        return text

    await register(stage, one)
    await register(stage, other)
    names = {one.name, other.name}
    assert await found(stage, name=one.name) == [one.name]
    assert names <= set(await found(stage, name="agent-*"))
    assert names & set(await found(stage, skill="add")) == {one.name}
    assert names & set(await found(stage, tag="talk")) == names
    assert names & set(await found(stage, tag="talk", skill="whi*")) == {other.name}
    assert names & set(await found(stage, tag="sums", skill="say")) == set()
    with pytest.raises(InvalidParams):
        await coordinator.call(await stage.broker("local"), "agents", {"tag": 5})


# The extended card ---------------------------------------------------------------------------------


async def extended(stage: Stage, agent: str) -> pb.AgentCard:
    reply = await stage.rpc("local", "GetExtendedAgentCard", pb.GetExtendedAgentCardRequest(), agent=agent)
    return pb.AgentCard.FromString(reply.data)


async def test_the_extended_card_is_answered_out_of_the_registry_and_signed(stage: Stage) -> None:
    agent = made(stage.agent(), extended_card={"skills": [{"id": "secret", "tags": ["hidden"]}]})
    await register(stage, agent)
    answer = await extended(stage, agent.name)
    assert {skill.id for skill in answer.skills} == {"say", "add", "secret"}
    keys = cardkeys.trusted_keys(stage.mesh.settings("local"))
    assert keys is not None
    assert cardkeys.verify(answer, keys)
    public = cards.parse_card((await card(stage, agent.name))["card"])
    assert public.capabilities.extended_agent_card
    assert "secret" not in {skill.id for skill in public.skills}


async def test_an_agent_without_an_extended_card_says_so(stage: Stage) -> None:
    plain = made(stage.agent())
    declared = made(stage.agent(), card={"capabilities": {"extended_agent_card": True}})
    await register(stage, plain)
    await register(stage, declared)
    with pytest.raises(UnsupportedOperation):
        await extended(stage, plain.name)
    with pytest.raises(ExtendedAgentCardNotConfigured):
        await extended(stage, declared.name)
    with pytest.raises(UnsupportedOperation, match="ever registered"):
        await extended(stage, "nobody-at-all")
