"""A bridge in mesh.yaml, and its card in the registry."""

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from weft.client import coordinator as calls
from weft.core.config import parse_mesh_config
from weft.host.bridge import UNKNOWN_VERSION
from weft.testing.agents import Process, eventually
from weft.testing.broker import BrokerMesh
from weft_protocols.errors import InvalidConfig

Unique = Callable[[str], str]
URL = "https://partner.example.com/.well-known/agent-card.json"


def parsed(entry: str) -> str:
    """What is wrong with an agent's entry."""
    with pytest.raises(InvalidConfig) as caught:
        parse_mesh_config(f"agents:\n  partner: {entry}\n", path=Path("/x/mesh.yaml"))
    return str(caught.value)


def test_one_entry_makes_an_outside_agent_one_of_the_mesh() -> None:
    text = f"agents: {{partner: {{bridge: {URL}, headers_env: {{Authorization: PARTNER_TOKEN}}, replicas: 2}}}}"
    agent = parse_mesh_config(text, path=Path("/x/mesh.yaml")).agents["partner"]
    assert (agent.bridge, agent.headers_env, agent.replicas) == (URL, {"Authorization": "PARTNER_TOKEN"}, 2)
    assert agent.target == ("--bridge", "partner", URL, "Authorization=PARTNER_TOKEN")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (f"{{bridge: {URL}, run: 'a.py:agent'}}", "no `run`"),
        (f"{{bridge: {URL}, card: card.json}}", "no `card`"),
        ("{run: 'a.py:agent', headers_env: {A: B}}", "headers_env is for a bridge"),
        ("{bridge: partner.example.com}", "address of an agent card"),
        ("{bridge: 'https://user:pass@partner.example.com/'}", "address of an agent card"),
        ("{bridge: 'file:///etc/passwd'}", "address of an agent card"),
        (f"{{bridge: {URL}, headers_env: {{'A b': TOKEN}}}}", "name of a header"),
        (f"{{bridge: {URL}, headers_env: {{Authorization: 'Bearer abc'}}}}", "must name an environment variable"),
    ],
)
def test_a_mistake_in_it_is_named_with_its_line(entry: str, says: str) -> None:
    problem = parsed(entry)
    assert says in problem
    assert "mesh.yaml:2" in problem
    assert "Bearer abc" not in problem, "a secret that was written in the wrong place is not repeated"


OUTSIDE = {
    "name": "The Partner",
    "description": "Knows things",
    "version": "2.1.0",
    "supportedInterfaces": [{"url": "http://127.0.0.1:9/", "protocolBinding": "JSONRPC", "protocolVersion": "1.0"}],
    "capabilities": {},
    "defaultInputModes": ["text/plain"],
    "defaultOutputModes": ["text/plain"],
    "skills": [{"id": "know", "name": "know", "description": "knows", "tags": ["facts"]}],
}


async def test_a_bridge_is_registered_at_once_and_shows_the_outside_card_as_soon_as_there_is_one(
    mesh: BrokerMesh, coordinator: Process, unique: Unique
) -> None:
    name = unique("partner")
    body = json.dumps(OUTSIDE).encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    env = {"WEFT_HOME": str(mesh.home), "WEFT_IDENTITY": name, "WEFT_DURABILITY": mesh.durability}
    broker = await mesh.connect("operator")

    async def shown() -> calls.AgentInfo | None:
        return next((agent for agent in await calls.agents(broker) if agent.name == name), None)

    try:
        arguments = ("-m", "weft.host", "--bridge", name, f"http://127.0.0.1:{port}/card.json")
        async with Process(arguments, ready="ready:", env=env) as process:
            await process.said("cannot be fetched")
            before = await eventually(shown)
            assert before is not None
            assert before.version == UNKNOWN_VERSION
            server = await asyncio.start_server(answer, "127.0.0.1", port)

            async def loaded() -> bool:
                now = await shown()
                return now is not None and now.version == "2.1.0"

            await eventually(loaded, timeout=25)
            card = await calls.call(broker, "card", {"agent": name})
            assert card["card"]["name"] == name
            assert [skill["id"] for skill in card["card"]["skills"]] == ["know"]
            server.close()
            await server.wait_closed()
    finally:
        await broker.close()
