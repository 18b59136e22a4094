"""One mesh, one set of agents and one gateway for the whole suite, and A2A SDK clients of each over four transports.

`client` is a stock client over the transport a test runs with; `everywhere` are clients over all of them, for tests
that compare. A transport that cannot be used here is a failure, not a skip: the extra `gateway` is needed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc.aio
import httpx
import pytest
from a2a.client.card_resolver import A2ACardResolver
from a2a.client.client import Client, ClientCallContext, ClientConfig
from a2a.client.client_factory import ClientFactory
from a2a.client.interceptors import AfterArgs, BeforeArgs, ClientCallInterceptor
from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format
from google.protobuf.message import Message as ProtoMessage

import weft
import weft.a2a
from weft.client import coordinator
from weft.core.cardkeys import ensure_card_key
from weft.core.gatewayconf import AuthConfig, GatewayConfig, PushConfig, TokenConfig
from weft.core.home import Home
from weft.gateway.service import GatewayService, serving
from weft.testing.agents import LocalReplica, eventually, running
from weft.testing.agents import client as mesh_client
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft_coordinator.service.app import Coordinator

if TYPE_CHECKING:
    from tests.contract.agent import Contract

TRANSPORTS: Final = ("nats", "jsonrpc", "rest", "grpc")
BINDINGS: Final = {"nats": weft.a2a.BINDING, "jsonrpc": "JSONRPC", "rest": "HTTP+JSON", "grpc": "GRPC"}
PATIENCE: Final = 15.0
"""Seconds until what must happen has happened."""
STRANGER: Final = "stranger"
TOKEN: Final = "a-token-of-the-contract-suite-that-nobody-guesses"


def _load(name: str) -> Any:
    """A module beside this file."""
    spec = importlib.util.spec_from_file_location(f"contract_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


agents = _load("agent")


class Bearer(ClientCallInterceptor):
    """Presents a token with every request, over whatever transport."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def before(self, args: BeforeArgs) -> None:
        context = args.context or ClientCallContext()
        given = {"Authorization": f"Bearer {self._token}", **(context.service_parameters or {})}
        args.context = context.model_copy(update={"service_parameters": given})

    async def after(self, args: AfterArgs) -> None:
        pass


def web_client() -> httpx.AsyncClient:
    """An HTTP client that loads no certificates, which takes longer than most tests."""
    return httpx.AsyncClient(timeout=PATIENCE, verify=False)


def _channel(url: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(url)


@dataclass
class Stage:
    """What the suite shares."""

    mesh: BrokerMesh
    contract: Contract
    replica: LocalReplica
    """The one that serves agent `contract`."""
    gateway: GatewayService
    callers: dict[str, weft.Mesh]
    """The native transport's connections, by caller."""
    cards: dict[tuple[str, bool], pb.AgentCard] = field(default_factory=dict)

    async def card(self, agent: str, transport: str) -> pb.AgentCard:
        """The agent's card, as a client of this transport gets it."""
        key = (agent, transport == "nats")
        if key not in self.cards:
            if transport == "nats":
                self.cards[key] = await weft.a2a.resolve(agent, self.callers["local"])
            else:
                async with web_client() as web:
                    resolver = A2ACardResolver(web, f"{self.gateway.http}/agents/{agent}")
                    self.cards[key] = await resolver.get_agent_card()
        found = pb.AgentCard()
        found.CopyFrom(self.cards[key])
        return found

    @asynccontextmanager
    async def dial(
        self, transport: str, agent: str = "contract", *, caller: str = "local", card: Any = None, **config: Any
    ) -> AsyncIterator[Client]:
        """A stock client of an agent.

        Args:
            transport: of `TRANSPORTS`.
            agent: its name.
            caller: `local` or `stranger`.
            card: called with the agent's card, to change it first.
            config: of `ClientConfig`.
        """
        found = await self.card(agent, transport)
        if card is not None:
            card(found)
        settings = ClientConfig(supported_protocol_bindings=[BINDINGS[transport]], **config)
        async with AsyncExitStack() as stack:
            if transport in ("jsonrpc", "rest"):
                web = await stack.enter_async_context(web_client())
                settings = replace(settings, httpx_client=web)
            elif transport == "grpc":
                settings = replace(settings, grpc_channel_factory=_channel)
            factory = ClientFactory(settings)
            if transport == "nats":
                weft.a2a.register(factory, self.callers[caller])
            interceptors: list[ClientCallInterceptor] = []
            if caller == STRANGER and transport != "nats":
                interceptors = [Bearer(TOKEN)]
            yield await stack.enter_async_context(factory.create(found, interceptors))

    @property
    def following(self) -> int:
        """Tasks followed for anybody, natively or by the gateway."""
        return self.gateway.callers.following + sum(mesh.following for mesh in self.callers.values())

    def message(
        self,
        text: str = "",
        *,
        message_id: str = "",
        task_id: str = "",
        context_id: str = "",
        metadata: dict[str, Any] | None = None,
        parts: list[pb.Part] | None = None,
        extensions: tuple[str, ...] = (),
        references: tuple[str, ...] = (),
        **configuration: Any,
    ) -> pb.SendMessageRequest:
        """A request with one text part, or the parts given."""
        message = pb.Message(
            message_id=message_id or uuid.uuid4().hex,
            task_id=task_id,
            context_id=context_id,
            role=pb.ROLE_USER,
            parts=parts if parts is not None else [pb.Part(text=text)],
            extensions=extensions,
            reference_task_ids=references,
        )
        if metadata:
            message.metadata.update(metadata)
        request = pb.SendMessageRequest(message=message)
        if configuration:
            request.configuration.CopyFrom(pb.SendMessageConfiguration(**configuration))
        return request

    def answer(self, text: str, **options: Any) -> pb.SendMessageRequest:
        """A request to the skill that answers with a message."""
        return self.message(text, metadata={"weft.skill": agents.ANSWER_SKILL}, **options)

    async def send(self, client: Client, request: pb.SendMessageRequest, **options: Any) -> pb.StreamResponse:
        """The one item of a call that does not stream."""
        items = await self.stream(client, request, **options)
        assert len(items) == 1
        return items[0]

    async def task(
        self, client: Client, text: str, *, context: ClientCallContext | None = None, **options: Any
    ) -> pb.Task:
        """The task of a message, at the end of a call that does not stream."""
        item = await self.send(client, self.message(text, **options), context=context)
        assert item.HasField("task"), item
        return item.task

    async def stream(self, client: Client, request: pb.SendMessageRequest, **options: Any) -> list[pb.StreamResponse]:
        """Everything a call yields."""
        async with aclosing(client.send_message(request, **options)) as items:  # type: ignore[type-var]
            return [item async for item in items]

    async def reached(self, client: Client, task_id: str, *states: int) -> pb.Task:
        """The task once it has ended, or is in one of the states."""
        wanted = states or (
            pb.TASK_STATE_COMPLETED,
            pb.TASK_STATE_FAILED,
            pb.TASK_STATE_CANCELED,
            pb.TASK_STATE_REJECTED,
        )

        async def look() -> pb.Task | None:
            found = await client.get_task(pb.GetTaskRequest(id=task_id))
            return found if found.status.state in wanted else None

        found = await eventually(look, timeout=PATIENCE)
        assert found is not None
        return found

    async def suspended(self, *tasks: str) -> None:
        """Return once the agent's replica has none of these tasks in memory."""
        await eventually(lambda: not set(tasks) & set(self.replica.owned), timeout=PATIENCE)

    def context(self, parameters: dict[str, str] | None = None, *, timeout: float | None = None) -> ClientCallContext:
        """What comes with a call besides its request: service parameters, a timeout in seconds."""
        return ClientCallContext(timeout=timeout, service_parameters=parameters)

    def plain(self, message: ProtoMessage) -> Any:
        """The message as JSON."""
        return json_format.MessageToDict(message)

    def normal(self, message: ProtoMessage) -> Any:
        """The message as JSON, with ids in place of ids and times in place of times: equal for equal results."""
        return _normal(json_format.MessageToDict(message), {}, "")


IDS: Final = {"id", "taskId", "contextId", "messageId", "artifactId", "referenceTaskIds"}


def _normal(value: Any, names: dict[str, str], key: str) -> Any:
    if isinstance(value, dict):
        return {inner: _normal(one, names, inner) for inner, one in value.items()}
    if isinstance(value, list):
        return [_normal(one, names, key) for one in value]
    if key in IDS and value:
        return names.setdefault(value, f"<id {len(names) + 1}>")
    if key == "timestamp":
        assert value.endswith("Z"), value
        return "<time>"
    return value


@pytest.fixture(scope="session")
async def stage(anyio_backend: str) -> AsyncIterator[Stage]:
    """The mesh of the suite."""
    contract = agents.Contract()
    served = [contract.agent, agents.strict(), agents.limited()]
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(
            await start_test_mesh([agent.name for agent in served], callers=["local", STRANGER])
        )
        ensure_card_key(Home(mesh.home))
        broker = await mesh.connect("coordinator")
        stack.push_async_callback(broker.close)
        at_work = Coordinator(broker)
        await at_work.start()
        stack.push_async_callback(at_work.aclose)
        replicas = await stack.enter_async_context(running(mesh, *served))
        for agent, replica in zip(served, replicas, strict=True):
            body = {"replica": replica.id, "pid": os.getpid(), "slots": 64, "host": "here", "code_digest": "0" * 64}
            await coordinator.register(replica.replica.broker, {**agents.registration(agent), **body})
        config = GatewayConfig(
            port=0,
            grpc_port=0,
            auth=AuthConfig(tokens=(TokenConfig(STRANGER, sha256=sha256(TOKEN.encode()).hexdigest()),)),
            push=PushConfig(allow_private=True),
        )
        gateway = await stack.enter_async_context(serving(mesh.settings("gateway"), config))
        callers = {name: await stack.enter_async_context(mesh_client(mesh, name)) for name in ("local", STRANGER)}
        yield Stage(mesh, contract, replicas[0], gateway, callers)


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """The transport of a test, in turn each of them."""
    return str(request.param)


@pytest.fixture
async def client(stage: Stage, transport: str) -> AsyncIterator[Client]:
    """A client that streams."""
    async with stage.dial(transport) as made:
        yield made


@pytest.fixture
async def blocking(stage: Stage, transport: str) -> AsyncIterator[Client]:
    """A client that does not stream: its `send_message` yields once."""
    async with stage.dial(transport, streaming=False) as made:
        yield made


@pytest.fixture
async def strict(stage: Stage, transport: str) -> AsyncIterator[Client]:
    """A client of the strict agent, that does not stream."""
    async with stage.dial(transport, "strict", streaming=False) as made:
        yield made


@pytest.fixture
async def stranger(stage: Stage, transport: str) -> AsyncIterator[Client]:
    """A client of another caller, that does not stream."""
    async with stage.dial(transport, caller=STRANGER, streaming=False) as made:
        yield made


@dataclass
class Everywhere:
    """Clients over every transport."""

    stage: Stage
    blocking: dict[str, Client]
    streaming: dict[str, Client]

    async def same(self, scenario: Callable[[Client], Awaitable[Any]], *, streaming: bool = False) -> Any:
        """What a scenario results in, which must be the same over every transport: messages, or JSON of them."""
        results = {}
        for name, client in (self.streaming if streaming else self.blocking).items():
            results[name] = self._plain(await scenario(client))
        expected = results["nats"]
        for name, result in results.items():
            assert result == expected, (
                f"{name}:\n{json.dumps(result, indent=1)}\nnats:\n{json.dumps(expected, indent=1)}"
            )
        return expected

    def _plain(self, result: Any) -> Any:
        if isinstance(result, ProtoMessage):
            return self.stage.normal(result)
        if isinstance(result, list | tuple):
            holder = {
                "items": [json_format.MessageToDict(one) if isinstance(one, ProtoMessage) else one for one in result]
            }
            return _normal(holder, {}, "")["items"]
        return result


@pytest.fixture
async def everywhere(stage: Stage) -> AsyncIterator[Everywhere]:
    """Clients over every transport."""
    async with AsyncExitStack() as stack:
        blocking, streaming = {}, {}
        for name in TRANSPORTS:
            blocking[name] = await stack.enter_async_context(stage.dial(name, streaming=False))
            streaming[name] = await stack.enter_async_context(stage.dial(name))
        yield Everywhere(stage, blocking, streaming)
