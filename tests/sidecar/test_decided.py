"""The policy is asked about everything: what it does not permit is neither made nor shown, and it is said why."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from weft import Agent, Task
from weft.client.policies import SHADOW, PolicyFollower, PolicyStore
from weft.client.tools import ToolRequest
from weft.core.broker import Broker
from weft.core.toolsconf import SidecarConfig, ToolServer
from weft.core.toolstore import ToolStore
from weft.policy import compare
from weft.policy.active import ActivePolicy
from weft.policy.bundle import Bundle, compile_bundle
from weft.policy.catalog import Catalog
from weft.policy.compare import Recorded
from weft.policy.model import Request
from weft.testing.agents import Process, client, eventually, running
from weft.testing.broker import BrokerMesh, unique_name
from weft.testing.policies import EVERYTHING, permit
from weft_protocols import mcp
from weft_protocols.errors import ToolError
from weft_protocols.resources import AUDIT

pytestmark = pytest.mark.anyio

BAD = Path(__file__).with_name("badserver.py")
SERVER = Path(__file__).parents[1] / "mcp" / "everything.py"
Rules = Callable[[str], Awaitable[int]]
CALLS = 'permit (principal == Agent::"local", action == Action::"call", resource);'


@pytest.fixture(scope="module")
async def address() -> AsyncIterator[str]:
    async with Process((str(SERVER), "--port", "0"), ready="ready:", env={}) as process:
        yield process.ready_line.removeprefix("ready: ")


@pytest.fixture
async def rules(stage: Any, operator: Broker) -> AsyncIterator[Rules]:
    """Has rules decide, until the test is over."""

    async def use(text: str) -> int:
        version = await permit(operator, text)
        await eventually(lambda: stage.service.plane.policy.version == version)
        return version

    yield use
    store = PolicyStore(operator)
    await store.set_mode("enforce", by="test")
    await store.point(0, by="test", how="stop", what=SHADOW)
    await use(EVERYTHING)


@pytest.fixture
async def web(stage: Any, address: str) -> str:
    """A server with tools, prompts and resources; its name."""
    name = unique_name("web")
    await stage.register(ToolServer(name, settings={"egress": {"allow_private": True}}, url=address))
    return name


def failed(result: dict[str, Any]) -> bool:
    return bool(result.get("isError", False))


async def last(operator: Broker, kind: str, server: str) -> dict[str, Any]:
    """The last record of a kind, once there is one."""
    found = await eventually(lambda: operator.last(AUDIT, f"mesh.audit.{kind}.local.{server}"))
    assert found is not None
    return dict(json.loads(found.data))


async def denied(call: Awaitable[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """What a refused call is told, however."""
    try:
        async with asyncio.timeout(10):
            result = await call
    except ToolError as error:
        return str(error), {"code": error.code, **error.data}
    refusal = result["_meta"][mcp.META_REFUSAL]
    assert (result["isError"], refusal["code"], refusal["kind"]) == (True, mcp.DENIED, "denied")
    return str(result["content"][0]["text"]), refusal


async def test_what_no_rule_permits_is_denied_and_says_what_to_do(stage: Any, rules: Rules) -> None:
    server = await stage.bad()
    version = await rules('permit (principal == Agent::"somebody", action, resource);')
    text, data = await denied(stage.do(server, "nothing"))
    assert f"local may not call {server}.do: no rule permits it (policy version {version})" in text
    assert f"mesh policy explain --agent local --tool {server}.do" in text
    assert (data["policy"], data["rules"], data["reason"]) == (version, [], "unpermitted")
    assert not (stage.state(server) / "calls").exists()


async def test_a_forbid_gives_its_reason_and_its_name(stage: Any, rules: Rules) -> None:
    server = await stage.bad()
    version = await rules(
        f'{EVERYTHING} @id("quiet") @reason("it rests today") forbid (principal, action == Action::"call", resource) '
        'when { context.args has what && context.args.what == "nothing" };'
    )
    text, data = await denied(stage.do(server, "nothing"))
    assert f"it rests today (by quiet, policy version {version})" in text
    assert (data["policy"], data["rules"], data["reason"]) == (version, ["quiet"], "forbidden")
    assert not failed(await stage.do(server, "meta"))


async def test_what_cannot_be_evaluated_is_denied(stage: Any, rules: Rules) -> None:
    server = await stage.bad()
    await rules('permit (principal, action, resource) when { context.args.nothere == "x" };')
    text, data = await denied(stage.do(server, "nothing"))
    assert "the policy cannot be evaluated" in text
    assert data["reason"] == "error"


async def test_without_a_policy_nothing_is_allowed(stage: Any, rules: Rules, operator: Broker) -> None:
    server = await stage.bad()
    await PolicyStore(operator).point(0, by="test", how="stop")
    await eventually(lambda: stage.service.plane.policy.version == 0)
    text, data = await denied(stage.do(server, "nothing"))
    assert "no policy is loaded" in text
    assert "mesh policy init" in text
    assert data["reason"] == "no_policy"
    assert (await stage.ask(server, "tools/list"))["tools"] == []


async def test_prompts_resources_completions_and_subscriptions_are_decided_too(
    stage: Any, rules: Rules, web: str
) -> None:
    await rules(
        f'permit (principal, action == Action::"read", resource == Resource::"test://static-text");'
        f'permit (principal, action == Action::"get", resource == Prompt::"{web}.test_simple_prompt");'
    )
    assert (await stage.ask(web, "resources/read", uri="test://static-text"))["contents"]
    assert (await stage.ask(web, "prompts/get", name="test_simple_prompt"))["messages"]
    for method, params, named in (
        ("tools/call", {"name": "test_simple_text", "arguments": {}}, f"{web}.test_simple_text"),
        ("resources/read", {"uri": "test://static-binary"}, "test://static-binary"),
        ("prompts/get", {"name": "test_prompt_with_image"}, f"{web}.test_prompt_with_image"),
        (
            "completion/complete",
            {
                "ref": {"type": "ref/prompt", "name": "test_prompt_with_arguments"},
                "argument": {"name": "a", "value": ""},
            },
            f"{web}.test_prompt_with_arguments",
        ),
        (
            "subscriptions/listen",
            {"notifications": {"resourceSubscriptions": ["test://static-text", "test://watched-resource"]}},
            "test://watched-resource",
        ),
    ):
        assert named in (await denied(stage.ask(web, method, **params)))[0], method
    names = {
        "prompts/list": ("prompts", "name", ["test_simple_prompt"]),
        "resources/list": ("resources", "uri", ["test://static-text"]),
        "resources/templates/list": ("resourceTemplates", "name", []),
        "tools/list": ("tools", "name", []),
    }
    for method, (part, key, wanted) in names.items():
        told = await stage.ask(web, method)
        assert [one[key] for one in told[part]] == wanted, method
        assert told.get("cacheScope") != "public"
        merged = await stage.ask("_", method)
        assert [one for one in merged[part] if web in one[key]] == [
            {**one, key: f"{web}{'+' if key == 'uri' else '__'}{one[key]}"} for one in told[part]
        ]


async def test_a_hidden_server_is_as_good_as_not_there(stage: Any, rules: Rules, web: str, operator: Broker) -> None:
    bad = await stage.bad()
    await rules(f'{EVERYTHING} forbid (principal, action, resource == Server::"{web}");'
                f'forbid (principal, action, resource in Server::"{web}");')  # fmt: skip
    nowhere = unique_name("nowhere")
    tried: dict[str, dict[str, Any]] = {
        "tools/call": {"name": "test_simple_text", "arguments": {}},
        "prompts/get": {"name": "unheard-of"},
        "resources/read": {"uri": "test://static-text"},
        "tools/list": {},
        "server/discover": {},
        "ping": {},
        "subscriptions/listen": {"notifications": {"toolsListChanged": True}},
    }
    for method, params in tried.items():
        said = []
        for server in (web, nowhere):
            with pytest.raises(ToolError) as refused:
                await stage.ask(server, method, **params)
            said.append((refused.value.code, str(refused.value).replace(server, "X"), refused.value.data))
        assert said[0] == said[1], method
        assert web not in said[1][1]
        assert bad in said[1][1]
    listed = await stage.ask("_", "tools/list")
    assert {tool["name"].partition("__")[0] for tool in listed["tools"]} == {bad}
    assert (await last(operator, "denial", web))["outcome"]["kind"] == "no_server"


async def test_a_change_of_the_policy_is_told_to_whoever_listens(stage: Any, rules: Rules) -> None:
    server = await stage.bad()
    await rules(CALLS)
    heard: list[str] = []
    wanted = {"notifications": {"toolsListChanged": True}}
    asked = ToolRequest("_", "subscriptions/listen", wanted)
    listening = asyncio.create_task(stage.caller.request(asked, heard=lambda method, _: heard.append(method)))
    await eventually(lambda: heard)
    assert [one["name"] for one in (await stage.ask(server, "tools/list"))["tools"]] == ["do"]
    # What is told of the new server is over once its pin was read.
    await eventually(lambda: server in stage.service.plane._pins)
    before = len(heard)
    await rules('permit (principal == Agent::"somebody", action, resource);')
    await eventually(lambda: "notifications/tools/list_changed" in heard[before:])
    assert (await stage.ask(server, "tools/list"))["tools"] == []
    listening.cancel()


async def test_new_definitions_are_decided_about_as_they_are_now(
    stage: Any, rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call of a server is what pins it: rules that read its arguments know them at once."""
    await rules('permit (principal, action, resource) when { context.args.what == "nothing" };')
    server = await stage.bad()

    async def late() -> None:
        """What is stored is not read again before the call."""

    with monkeypatch.context() as patch:
        patch.setattr(stage.service.plane._follower, "_look", late)
        assert not failed(await stage.do(server, "nothing"))
    assert failed(await stage.do(server, "meta"))


async def test_rules_see_version_skill_sender_and_chain_of_whoever_asks(
    stage: Any, rules: Rules, mesh: BrokerMesh, unique: Callable[[str], str]
) -> None:
    server, name = await stage.bad(), unique("agent")
    await rules(
        f'permit (principal == Agent::"{name}", action == Action::"call", resource) when {{ '
        'principal.version == "2.0" && principal.skill == "work" && context.caller == "local" && '
        f'context.root == "{name}" && context.depth == 1 && context.task != "" && '
        '["nats", "http"].contains(context.front) };'
    )
    agent = Agent(name, version="2.0")

    @agent.skill("work")
    async def work(task: Task) -> str:
        first = await task.tools.call(f"{server}.do", what="nothing")
        address = await task.tools.address()
        params = {"name": f"{server}__do", "arguments": {"what": "nothing"}}
        over = await post(address.url, address.headers, "tools/call", **params)
        return f"{first.is_error} {failed(over)}"

    @agent.skill("other")
    async def other(task: Task) -> str:
        return (await task.tools.call(f"{server}.do", what="nothing")).text

    async with running(mesh, agent), client(mesh) as caller:
        assert (await caller.send(name, "go", skill="work")).text == "False False"
        assert "no rule permits it" in (await caller.send(name, "go", skill="other")).text


async def post(url: str, headers: Any, method: str, **params: Any) -> dict[str, Any]:
    meta = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {}}
    sent = {
        **headers,
        "accept": "application/json, text/event-stream",
        "mcp-protocol-version": mcp.VERSION,
        "mcp-method": method,
        "mcp-name": str(params.get("name", "")),
    }
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"_meta": meta, **params}}
    async with httpx2.AsyncClient(trust_env=False) as web:
        answer = (await web.post(url, json=body, headers=sent, timeout=30)).json()
    return dict(answer["result"])


async def test_in_mode_shadow_everything_passes_and_what_would_not_is_recorded(
    stage: Any, rules: Rules, operator: Broker
) -> None:
    server = await stage.bad()
    version = await rules('@id("one") @approval("ops") permit (principal, action, resource) '
                          'when { context.args.what == "meta" };')  # fmt: skip
    await PolicyStore(operator).set_mode("shadow", by="test")
    policy = stage.service.plane.policy
    await eventually(lambda: policy.mode == "shadow")
    before = policy.denied
    assert [one["name"] for one in (await stage.ask(server, "tools/list"))["tools"]] == ["do"]
    assert not failed(await stage.do(server, "nothing"))
    assert policy.denied == before + 1
    why = (await last(operator, "outcome", server))["why"]
    assert (why["decision"], why["policy"], why["shadow"]["decision"]) == ("allow", version, "deny")
    assert not failed(await stage.do(server, "meta"))
    again = await eventually(lambda: changed(operator, server, why))
    assert again["shadow"]["obligations"]["approvals"] == [{"role": "ops", "count": 1}]
    told = await eventually(lambda: told_of(operator, stage))
    assert told["mode"] == "shadow"


async def told_of(operator: Broker, stage: Any) -> dict[str, Any] | None:
    own = stage.service.plane.recorder.by.replace("/", "-")
    return next((one for one in await PolicyStore(operator).running() if one["replica"] == own), None)


async def changed(operator: Broker, server: str, before: dict[str, Any]) -> dict[str, Any] | None:
    now = dict((await last(operator, "outcome", server))["why"])
    return None if now == before else now


async def test_records_that_a_sidecar_wrote_can_be_decided_anew(stage: Any, rules: Rules, operator: Broker) -> None:
    server = await stage.bad()
    old = f'{CALLS} forbid (principal, action, resource) when {{ context.args.what == "text" }};'
    version = await rules(old)
    await stage.do(server, "nothing")
    await denied(stage.do(server, "text"))
    found = [await last(operator, kind, server) for kind in ("intent", "denial", "outcome")]
    assert [one["why"]["policy"] for one in found] == [version] * 3
    recorded = [Recorded.decode(one) for one in found[:2]]
    assert [(one.request.resource, one.request.arguments["what"], one.allow) for one in recorded] == [
        (f"{server}.do", "nothing", True),
        (f"{server}.do", "text", False),
    ]
    with pytest.raises(ValueError, match="how a call ended"):
        Recorded.decode(found[2])
    catalog = stage.service.plane._definitions()

    def replayed(text: str) -> list[str]:
        engine = compile_bundle(Bundle.of({"r.cedar": text}), None).engine(catalog)
        return [flip.kind for flip in compare.replay(engine, engine.needs, recorded).flips]

    assert replayed(old) == []
    assert replayed(CALLS) == ["deny>allow"]
    assert replayed('permit (principal == Agent::"x", action, resource);') == ["allow>deny"]


async def test_without_the_broker_a_sidecar_goes_on_with_the_policy_it_has(
    fresh_mesh: BrokerMesh, tmp_path: Path
) -> None:
    from weft.sidecar.service import SidecarService

    async with AsyncExitStack() as stack:
        operator, own = await fresh_mesh.connect("operator"), await fresh_mesh.connect("sidecar")
        for broker in (operator, own):
            stack.push_async_callback(broker.close)
        await permit(operator, f'{CALLS} forbid (principal, action, resource) when {{ context.args.what == "text" }};')
        command = (sys.executable, "-S", str(BAD), str(tmp_path))
        await ToolStore(operator).register(
            ToolServer("bad", command=command, settings={"records": {"required": False}})
        )
        service = SidecarService(own, SidecarConfig(anonymous="local"))
        stack.push_async_callback(service.aclose)
        await service.start()
        url = f"{service.web.url}/bad/mcp"

        async def do(what: str) -> bool:
            return not (await post(url, {}, "tools/call", name="do", arguments={"what": what})).get("isError", False)

        assert await do("nothing")
        await fresh_mesh.server.stop()
        assert [await do("nothing"), await do("text")] == [True, False]
        begun = time.monotonic()
        await service.aclose()
        assert time.monotonic() - begun < 10, "it cannot be stopped without a broker either"


async def test_a_sidecar_that_could_not_read_the_policy_allows_nothing(operator: Broker) -> None:
    policy = ActivePolicy()
    PolicyFollower(operator, policy, Catalog, replica="x")
    decision = policy.decide(Request("local", "call", "crm", "get"))
    assert (decision.allow, "could not be read" in decision.why) == (False, True)
