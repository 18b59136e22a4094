"""Cards, the index, keys, and what is checked of a card by the SDK's own means."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import jwt
import pytest
from a2a.client.card_resolver import parse_agent_card
from a2a.utils.signing import InvalidSignaturesError, create_signature_verifier

from weft.core.gatewayconf import AuthConfig, GatewayConfig, OidcConfig, TokenConfig

if TYPE_CHECKING:
    from tests.gateway.conftest import Serve, Served, Worker

pytestmark = pytest.mark.anyio

CARD = "/.well-known/agent-card.json"


async def test_a_card_names_this_gateways_addresses(served: Served, http: httpx.AsyncClient, worker: Worker) -> None:
    response = await http.get(f"/agents/{worker.name}{CARD}")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    card = response.json()
    assert card["name"] == worker.name
    assert [(one["protocolBinding"], one["protocolVersion"], one["url"]) for one in card["supportedInterfaces"]] == [
        ("JSONRPC", "1.0", served.of(worker.name)),
        ("HTTP+JSON", "1.0", served.of(worker.name)),
        ("JSONRPC", "0.3", served.of(worker.name)),
        ("HTTP+JSON", "0.3", served.of(worker.name)),
    ]
    assert [skill["id"] for skill in card["skills"]] == ["work"]


async def test_a_card_has_the_fields_of_version_0_3_unless_1_0_is_asked_for(served: Served, worker: Worker) -> None:
    async with httpx.AsyncClient(base_url=served.url) as client:
        old = await client.get(f"/agents/{worker.name}{CARD}")
        new = await client.get(f"/agents/{worker.name}{CARD}", headers={"A2A-Version": "1.0"})
    assert old.json()["url"] == served.of(worker.name)
    assert old.json()["protocolVersion"] == "0.3"
    assert "url" not in new.json()
    assert old.headers["vary"] == new.headers["vary"] == "A2A-Version"
    assert old.headers["etag"] != new.headers["etag"]


async def test_an_unchanged_card_is_not_sent_again(http: httpx.AsyncClient, worker: Worker) -> None:
    url = f"/agents/{worker.name}{CARD}"
    first = await http.get(url)
    assert "max-age" in first.headers["cache-control"]
    tag, modified = first.headers["etag"], first.headers["last-modified"]
    for headers, status in (
        ({"If-None-Match": tag}, 304),
        ({"If-None-Match": f'"other", W/{tag}'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"other"'}, 200),
        ({"If-Modified-Since": modified}, 304),
        ({"If-None-Match": '"other"', "If-Modified-Since": modified}, 200),
    ):
        again = await http.get(url, headers=headers)
        assert again.status_code == status, headers
        assert again.headers["etag"] == tag
        assert (again.content == b"") == (status == 304)


@pytest.mark.parametrize("version", ["1.0", ""])
async def test_a_card_is_signed_by_the_mesh(http: httpx.AsyncClient, worker: Worker, version: str) -> None:
    keys = jwt.PyJWKSet.from_dict((await http.get("/.well-known/jwks.json")).json())
    asked: list[tuple[str | None, str | None]] = []

    def key(kid: str | None, jku: str | None) -> jwt.PyJWK:
        asked.append((kid, jku))
        assert kid is not None
        return keys[kid]

    verify = create_signature_verifier(key, ["EdDSA"])
    response = await http.get(f"/agents/{worker.name}{CARD}", headers={"A2A-Version": version})
    card = parse_agent_card(response.json())
    verify(card)
    assert [jku for _, jku in asked] == [None]

    card.description += " and more"
    with pytest.raises(InvalidSignaturesError):
        verify(card)


async def test_a_card_is_not_signed_for_an_address_that_a_client_made_up(serve: Serve, worker: Worker) -> None:
    served = await serve(GatewayConfig(public_url="https://agents.example.com"))
    async with httpx.AsyncClient(base_url=served.url) as client:
        headers = {"Host": "evil.example.com"}
        card = (await client.get(f"/agents/{worker.name}{CARD}", headers=headers)).json()
    assert card["supportedInterfaces"][0]["url"] == f"https://agents.example.com/agents/{worker.name}"
    assert "evil" not in str(card)


async def test_the_index_lists_every_agent_and_filters(
    served: Served, http: httpx.AsyncClient, worker: Worker, start_worker: Callable[..., Any]
) -> None:
    async with start_worker(served) as other:
        found = (await http.get("/agents")).json()["agents"]
        (mine,) = [agent for agent in found if agent["name"] == worker.name]
        assert mine["url"] == served.of(worker.name)
        assert mine["card"] == served.of(worker.name) + CARD
        assert mine["description"] == "Does what it is told"
        assert mine["skills"][0]["id"] == "work"
        assert mine["version"]
        assert other.name in [agent["name"] for agent in found]

        for query, expected in (
            ({"name": worker.name}, {worker.name}),
            ({"name": other.name[:-2] + "*"}, {other.name}),
            ({"name": worker.name, "skill": "work", "tag": "gate"}, {worker.name}),
            ({"name": worker.name, "skill": "nothing"}, set()),
            ({"tag": "no such tag"}, set()),
        ):
            names = {agent["name"] for agent in (await http.get("/agents", params=query)).json()["agents"]}
            assert names == expected, query


async def test_the_default_agent_is_at_the_root(serve: Serve, worker: Worker) -> None:
    served = await serve(GatewayConfig(default_agent=worker.name))
    async with httpx.AsyncClient(base_url=served.url, headers={"A2A-Version": "1.0"}) as client:
        assert (await client.get(CARD)).json()["name"] == worker.name
        sent = {"message": {"messageId": "m-1", "role": "ROLE_USER", "parts": [{"text": "hello"}]}}
        over_rest = await client.post("/message:send", json=sent)
        body = {"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": sent}
        over_rpc = await client.post("/", json=body)
    assert over_rest.json()["task"]["id"] == over_rpc.json()["result"]["task"]["id"]


async def test_without_a_default_agent_the_root_is_nobodys(http: httpx.AsyncClient) -> None:
    for response in (await http.get(CARD), await http.post("/", json={}), await http.post("/message:send", json={})):
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"


async def test_a_card_says_how_to_authenticate(serve: Serve, worker: Worker) -> None:
    token = TokenConfig("ci", sha256=hashlib.sha256(b"secret-token-of-ci").hexdigest())
    oidc = OidcConfig("https://login.example.com", "mesh")
    served = await serve(GatewayConfig(auth=AuthConfig(anonymous=None, tokens=(token,), oidc=(oidc,))))
    async with httpx.AsyncClient(base_url=served.url, headers={"A2A-Version": "1.0"}) as client:
        card = (await client.get(f"/agents/{worker.name}{CARD}")).json()
        assert card["securitySchemes"]["gateway-token"]["httpAuthSecurityScheme"]["scheme"] == "Bearer"
        discovery = card["securitySchemes"]["gateway-oidc-1"]["openIdConnectSecurityScheme"]["openIdConnectUrl"]
        assert discovery == "https://login.example.com/.well-known/openid-configuration"
        assert [list(one["schemes"]) for one in card["securityRequirements"]] == [["gateway-token"], ["gateway-oidc-1"]]

        sent = {"message": {"messageId": "m-1", "role": "ROLE_USER", "parts": [{"text": "hello"}]}}
        assert (await client.post(f"/agents/{worker.name}/message:send", json=sent)).status_code == 401
        headers = {"Authorization": "Bearer secret-token-of-ci"}
        answer = await client.post(f"/agents/{worker.name}/message:send", json=sent, headers=headers)
        assert answer.status_code == 200


async def test_an_extension_that_is_asked_for_and_known_is_echoed(
    served: Served, http: httpx.AsyncClient, start_worker: Callable[..., Any]
) -> None:
    known, unknown = "https://example.com/ext/known", "https://example.com/ext/unknown"
    card = {"capabilities": {"streaming": True, "extensions": [{"uri": known}]}}
    async with start_worker(served, card=card) as worker:
        sent = {"message": {"messageId": "m-1", "role": "ROLE_USER", "parts": [{"text": "hello"}]}}
        headers = {"A2A-Extensions": f"{unknown}, {known}"}
        for url in (f"/agents/{worker.name}/message:send", f"/agents/{worker.name}/message:stream"):
            response = await http.post(url, json=sent, headers=headers)
            assert response.status_code == 200
            assert response.headers["A2A-Extensions"] == known
        body = {"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": sent}
        response = await http.post(f"/agents/{worker.name}", json=body, headers=headers)
        assert response.headers["A2A-Extensions"] == known
        assert "A2A-Extensions" not in (await http.post(f"/agents/{worker.name}", json=body)).headers
