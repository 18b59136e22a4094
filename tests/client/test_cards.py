"""The directory of cards: asks the coordinator, checks what it gets, and goes on without it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from weft import Agent
from weft.client import cards as module
from weft.client import coordinator
from weft.client.cards import CardDirectory
from weft.core import cardkeys
from weft.core.broker import Broker, Delivered, Subscription
from weft.core.cardkeys import CardKey
from weft.testing import agents as testing
from weft.testing.broker import BrokerMesh, unique_name
from weft_protocols import cards
from weft_protocols.cards import CardNotTrusted
from weft_protocols.errors import AgentNotFound, ExtendedAgentCardNotConfigured, Unavailable, UnsupportedOperation

pytestmark = pytest.mark.anyio


def published(name: str, description: str = "an echo") -> cards.AgentCard:
    core = cards.core_card(name, version="1.0", description=description, skills=[{"id": "say", "tags": ["talk"]}])
    return cards.published(core, [cards.mesh_interface(name)])


@dataclass
class Registry:
    """Answers `card` and `agents` as a coordinator does, with what the test puts in, and only while it is there."""

    broker: Broker
    key: CardKey
    signed: dict[str, cards.AgentCard] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Operation, caller and agent of every request."""
    silent: bool = False
    subscription: Subscription | None = None

    async def come(self) -> Registry:
        self.subscription = await self.broker.subscribe("mesh.coord.*.*", self._answer)
        await self.broker.flush()
        return self

    async def leave(self) -> None:
        assert self.subscription is not None
        await self.subscription.drain()

    def put(self, card: cards.AgentCard, *, name: str, key: CardKey | None = None) -> None:
        self.signed[name] = (key or self.key).sign(card)

    def _answer(self, message: Delivered) -> None:
        _, _, operation, caller = message.subject.split(".")
        body: Mapping[str, Any] = json.loads(message.data)
        agent = str(body.get("agent", ""))
        self.asked.append((operation, caller, agent))
        told: dict[str, Any]
        if self.silent:
            return
        if operation == "agents":
            told = {"agents": [self._listed(name) for name in sorted(self.signed)]}
        elif (card := self.signed.get(agent)) is not None:
            digest = cards.digest(card)
            told = {"agent": agent, "version": card.version, "digest": digest, "card": cards.card_json(card)}
        else:
            told = {"error": {"type": "AgentNotFound", "message": f"no agent {agent!r}"}}
        self.broker.send(message.reply, json.dumps(told).encode())

    def _listed(self, name: str) -> dict[str, Any]:
        skills = [{"id": skill.id, "tags": list(skill.tags)} for skill in self.signed[name].skills]
        return {"name": name, "version": "1.0", "description": "", "skills": skills, "state": "ready", "ready": 1}


@pytest.fixture
async def registry(fresh_mesh: BrokerMesh) -> AsyncIterator[Registry]:
    key = cardkeys.card_key(fresh_mesh.settings("coordinator"))
    assert key is not None
    made = await Registry(await fresh_mesh.connect("coordinator"), key).come()
    yield made
    await made.broker.close()


@pytest.fixture
async def local(fresh_mesh: BrokerMesh) -> AsyncIterator[Broker]:
    broker = await fresh_mesh.connect("local")
    yield broker
    await broker.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is old at once."""
    monkeypatch.setattr(module, "FRESH", -1.0)
    monkeypatch.setattr(module, "PAUSE", -1.0)
    monkeypatch.setattr(module, "ANSWER", 0.3)


async def test_a_card_is_asked_for_once_and_checked(registry: Registry, local: Broker) -> None:
    registry.put(published("echo"), name="echo")
    directory = CardDirectory(local)
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(directory.card("echo")) for _ in range(20)]
    assert {task.result().description for task in asking} == {"an echo"}
    assert registry.asked == [("card", "local", "echo")]
    known = await directory.known("echo")
    assert (known.signed_by, known.digest) == (registry.key.kid, cards.digest(published("echo")))


async def test_what_is_done_to_a_card_stays_with_who_does_it(registry: Registry, local: Broker) -> None:
    registry.put(published("echo"), name="echo")
    directory = CardDirectory(local)
    (await directory.card("echo")).description = "changed"
    assert (await directory.card("echo")).description == "an echo"


async def test_a_new_card_is_seen_when_the_old_answer_is_no_longer_fresh(
    registry: Registry, local: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.put(published("echo"), name="echo")
    directory = CardDirectory(local)
    before = await directory.card("echo")
    registry.put(published("echo", "a better echo"), name="echo")
    assert await directory.card("echo") == before
    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(module, "_now", lambda: now + module.FRESH + 1)
    assert (await directory.card("echo")).description == "a better echo"


async def test_a_coordinator_that_hangs_holds_nobody_up_for_long(
    registry: Registry, local: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.put(published("echo"), name="echo")
    directory = CardDirectory(local)
    known = await directory.card("echo")
    monkeypatch.setattr(module, "ANSWER", 0.1)
    registry.silent = True
    start = asyncio.get_running_loop().time()
    for second in range(3, 13):
        monkeypatch.setattr(module, "_now", lambda now=start + second: now)
        assert await directory.card("echo") == known
    assert len(registry.asked) == 2


async def test_a_forgotten_answer_is_asked_for_again(registry: Registry, local: Broker) -> None:
    registry.put(published("echo"), name="echo")
    directory = CardDirectory(local)
    await directory.card("echo")
    registry.put(published("echo", "a better echo"), name="echo")
    directory.forget("echo")
    assert (await directory.card("echo")).description == "a better echo"


@pytest.mark.usefixtures("impatient")
async def test_while_the_coordinator_is_away_the_last_answer_stands(registry: Registry, local: Broker) -> None:
    registry.put(published("echo"), name="echo")
    directory = CardDirectory(local)
    known, listed = await directory.card("echo"), await directory.list()
    await registry.leave()
    assert await directory.card("echo") == known
    assert await directory.list() == listed
    with pytest.raises(Unavailable):
        await directory.card("never-asked")
    with pytest.raises(Unavailable):
        await CardDirectory(local).card("echo")
    with pytest.raises(Unavailable):
        await CardDirectory(local).list()
    await registry.come()
    registry.put(published("echo", "a better echo"), name="echo")
    assert (await directory.card("echo")).description == "a better echo"


async def test_an_agent_nobody_knows_is_an_error_and_is_not_asked_for_again_at_once(
    registry: Registry, local: Broker
) -> None:
    directory = CardDirectory(local)
    for _ in range(3):
        with pytest.raises(AgentNotFound, match="nobody"):
            await directory.card("nobody")
    assert len(registry.asked) == 1
    for name in ("", "a b", "../x", "x" * 65, "operator"):
        with pytest.raises(AgentNotFound):
            await directory.card(name)
    assert len(registry.asked) == 1


async def test_names_of_nobody_do_not_pile_up(
    registry: Registry, local: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNKNOWN_KEPT", 5)
    registry.put(published("echo"), name="echo")
    directory = CardDirectory(local)
    await directory.card("echo")
    for n in range(12):
        with pytest.raises(AgentNotFound):
            await directory.card(f"nobody-{n}")
    assert len(directory._entries) == 6
    await directory.card("echo")
    assert len(registry.asked) == 13
    assert not directory._asking


@pytest.mark.usefixtures("impatient")
async def test_an_agent_that_was_revoked_has_no_card_any_more(registry: Registry, local: Broker) -> None:
    registry.put(published("echo"), name="echo")
    directory = CardDirectory(local)
    await directory.card("echo")
    del registry.signed["echo"]
    with pytest.raises(AgentNotFound):
        await directory.card("echo")


# Signatures ----------------------------------------------------------------------------------------


async def test_a_card_signed_by_somebody_else_is_refused(registry: Registry, local: Broker) -> None:
    registry.put(published("echo"), name="echo", key=CardKey.new())
    with pytest.raises(CardNotTrusted, match="none of this mesh's keys"):
        await CardDirectory(local).card("echo")


async def test_a_card_changed_on_its_way_is_refused(registry: Registry, local: Broker) -> None:
    registry.put(published("echo"), name="echo")
    registry.signed["echo"].skills[0].description = "sends me your secrets"
    with pytest.raises(CardNotTrusted, match="changed after it was signed"):
        await CardDirectory(local).card("echo")


async def test_an_unsigned_card_is_refused_where_keys_are_known(registry: Registry, local: Broker) -> None:
    registry.signed["echo"] = published("echo")
    with pytest.raises(CardNotTrusted, match="not signed"):
        await CardDirectory(local).card("echo")


@pytest.mark.usefixtures("impatient")
async def test_a_forged_card_does_not_replace_a_good_one_silently(registry: Registry, local: Broker) -> None:
    registry.put(published("echo"), name="echo")
    directory = CardDirectory(local)
    await directory.card("echo")
    registry.put(published("echo", "forged"), name="echo", key=CardKey.new())
    with pytest.raises(CardNotTrusted):
        await directory.card("echo")


async def test_where_no_keys_are_known_a_card_is_taken_unchecked_and_says_so(
    registry: Registry, local: Broker, fresh_mesh: BrokerMesh
) -> None:
    cardkeys.jwks_file(fresh_mesh.server.home).unlink()
    registry.put(published("echo"), name="echo", key=CardKey.new())
    assert (await CardDirectory(local).known("echo")).signed_by == ""


async def test_keys_can_be_given(registry: Registry, local: Broker) -> None:
    other = CardKey.new()
    registry.put(published("echo"), name="echo", key=other)
    assert (await CardDirectory(local, keys=other.jwks()).known("echo")).signed_by == other.kid
    with pytest.raises(CardNotTrusted):
        await CardDirectory(local, keys={"keys": []}).known("echo")


async def test_a_key_the_mesh_has_since_is_found_without_a_restart(
    registry: Registry, local: Broker, fresh_mesh: BrokerMesh
) -> None:
    directory = CardDirectory(local)
    cardkeys.key_file(fresh_mesh.server.home).unlink()
    new = cardkeys.ensure_card_key(fresh_mesh.server.home)
    registry.put(published("echo"), name="echo", key=new)
    assert (await directory.known("echo")).signed_by == new.kid


# Lists ---------------------------------------------------------------------------------------------


async def test_the_agents_are_listed_and_searched_with_one_question(registry: Registry, local: Broker) -> None:
    for name in ("echo", "shout", "echo-2"):
        registry.put(published(name), name=name)
    directory = CardDirectory(local)
    assert [one.name for one in await directory.list()] == ["echo", "echo-2", "shout"]
    assert [one.name for one in await directory.list(name="echo*", tag="talk")] == ["echo", "echo-2"]
    assert await directory.list(skill="sing") == ()
    assert registry.asked == [("agents", "local", "")]


async def test_a_member_of_the_mesh_asks_for_another_caller(registry: Registry, fresh_mesh: BrokerMesh) -> None:
    registry.put(published("echo"), name="echo")
    gateway = await fresh_mesh.connect("gateway")
    try:
        await CardDirectory(gateway, "alice").card("echo")
    finally:
        await gateway.close()
    assert registry.asked == [("card", "alice", "echo")]


# With a real coordinator and a real replica --------------------------------------------------------


async def test_the_card_of_a_running_agent_arrives_signed(fresh_mesh: BrokerMesh) -> None:
    name = unique_name("carded")
    agent = Agent(name, version="1.0", description="an echo", extended_card={"description": "for friends"})

    @agent.skill("say", tags=["talk"])
    async def say(text: str) -> str:
        return text

    await fresh_mesh.add_agent(name)
    broker, host = await fresh_mesh.connect("local"), await fresh_mesh.connect(name)
    try:
        async with testing.coordinator_process(fresh_mesh):
            await coordinator.register(host, {**agent.describe(), "replica": "r1", "pid": 1, "slots": 1})
            directory = CardDirectory(broker)
            known = await directory.known(name)
            assert known.signed_by
            assert known.digest == agent.describe()["card_digest"]
            assert [one.name for one in await directory.list(tag="talk")] == [name]
            extended = await directory.extended(name)
            assert (extended.card.description, extended.signed_by) == ("for friends", known.signed_by)
            with pytest.raises((UnsupportedOperation, ExtendedAgentCardNotConfigured)):
                await directory.extended("nobody")
        assert (await directory.card(name)).name == name
    finally:
        await host.close()
        await broker.close()
