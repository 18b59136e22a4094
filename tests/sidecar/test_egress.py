"""Egress: an address is checked when the connection is made, and only those that are allowed are called."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from weft.core.toolsconf import ToolServer
from weft.policy.egress import Egress
from weft.sidecar.egress import Clients
from weft.sidecar.guards import guards_of
from weft.sidecar.http import HttpLink
from weft_protocols.errors import InvalidConfig, ToolError

pytestmark = pytest.mark.anyio


@pytest.fixture
async def served() -> AsyncIterator[tuple[int, list[str]]]:
    """A web server that redirects to itself; its port, and the hosts it was asked as."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(next(line for line in head.splitlines() if line.lower().startswith("host:")))
        writer.write(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked


class Names:
    """A resolver whose answers change."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


async def get(clients: Clients, egress: Egress, url: str) -> int:
    async with clients.of(egress).get(url, allow_redirects=False) as answer:
        return answer.status


async def test_a_name_that_leads_to_a_private_address_is_not_called(served: tuple[int, list[str]]) -> None:
    port, asked = served
    clients = Clients(Names(["127.0.0.1"]))
    with pytest.raises(
        aiohttp.ClientConnectorError, match=r"inside\.example resolves to 127.0.0.1, which is not a public"
    ):
        await get(clients, Egress(), f"http://inside.example:{port}/")
    assert not asked
    await clients.aclose()


async def test_one_private_address_among_public_ones_is_enough(served: tuple[int, list[str]]) -> None:
    clients = Clients(Names(["93.184.216.34", "127.0.0.1"]))
    with pytest.raises(aiohttp.ClientConnectorError, match="not a public"):
        await get(clients, Egress(), f"http://mixed.example:{served[0]}/")
    await clients.aclose()


async def test_a_second_answer_of_the_name_server_leads_nowhere(served: tuple[int, list[str]]) -> None:
    """DNS rebinding: the address that is checked is the one that is connected to, by one look-up."""
    port, asked = served
    names = Names(["127.0.0.1"], ["10.0.0.1"])
    clients = Clients(names)
    assert await get(clients, Egress.of({"allow": ["127.0.0.0/8"]}), f"http://moving.example:{port}/") == 302
    assert names.asked == 1
    assert asked == [f"Host: moving.example:{port}"] or asked == [f"host: moving.example:{port}"]
    await clients.aclose()


async def test_no_redirect_is_followed(served: tuple[int, list[str]]) -> None:
    port, asked = served
    clients = Clients(Names(["127.0.0.1"]))
    client = clients.of(Egress.of({"allow_private": True}))
    link = HttpLink(client, f"http://redirects.example:{port}/", headers={}, on_event=lambda *_: None)
    with pytest.raises(ToolError, match="answered HTTP 302"):
        await link.request("tools/list", {}, headers={})
    assert len(asked) == 1
    await link.aclose()
    await clients.aclose()


async def test_no_connection_of_one_servers_rules_is_used_by_another(served: tuple[int, list[str]]) -> None:
    port, _ = served
    clients = Clients(Names(["127.0.0.1"]))
    url = f"http://shared.example:{port}/"
    assert await get(clients, Egress.of({"allow": ["shared.example"]}), url) == 302
    with pytest.raises(aiohttp.ClientConnectorError):
        await get(clients, Egress(), url)
    assert clients.of(Egress()) is clients.of(Egress())
    await clients.aclose()


async def test_a_registered_server_at_a_private_address_is_refused_with_what_to_do(stage: Any) -> None:
    await stage.register(ToolServer("inside-1", url="http://127.0.0.1:9/mcp"))
    with pytest.raises(ToolError, match=r"127\.0\.0\.1 is not a public address \(egress\.allow\)"):
        await stage.ask("inside-1", "tools/list")
    settings = {"egress": {"allow_private": True}}
    await stage.register(ToolServer("inside-2", url="http://169.254.169.254/", settings=settings))
    with pytest.raises(ToolError, match="not a public"):
        await stage.ask("inside-2", "tools/list")


async def test_a_process_whose_egress_cannot_be_kept_is_not_started(stage: Any) -> None:
    server = await stage.bad(egress={"allow": ["crm.internal"]})
    with pytest.raises(ToolError, match="is for servers at an address"):
        await stage.do(server, "nothing")
    assert stage.started(server) == []


def test_rules_that_are_none_are_refused() -> None:
    wrong: Any
    for wrong in ("all", {"allow": "x"}, {"alow": []}, {"allow": ["10.0.0.1/8"]}):
        with pytest.raises(InvalidConfig, match="egress"):
            guards_of({"egress": wrong})
    assert json.dumps(sorted(guards_of({"egress": {"allow": ["db.internal"]}}).egress.hosts)) == '["db.internal"]'
