"""A stage for tests of the gateway: a mesh with a coordinator, an agent with a gate, and gateways in this process.

`stage` is one mesh for the session; `worker` is an agent of the test's own on it, ready to be called; `serve` starts
as many gateways as a test wants, each under uvicorn on a random loopback port, with a broker connection of its own.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

import weft
from weft.client import coordinator
from weft.client.cards import CardDirectory
from weft.core.broker import Broker
from weft.core.cardkeys import CardKey, ensure_card_key
from weft.core.gatewayconf import GatewayConfig
from weft.core.home import Home
from weft.core.supervise import Tasks
from weft.gateway.app import Gateway, make_app
from weft.gateway.auth import Authenticator
from weft.gateway.callers import Callers
from weft.gateway.cards import Addresses
from weft.gateway.http1 import BoundedProtocol
from weft.testing.agents import coordinator_process, eventually, running
from weft.testing.broker import BrokerMesh, start_test_mesh, unique_name
from weft.testing.serving import QuietServer

SCHEMA = {"type": "object", "properties": {"upto": {"type": "integer"}}}


class Worker:
    """An agent whose message says what it does, and a gate to hold it at."""

    def __init__(self, name: str, **options: Any) -> None:
        self.gate = asyncio.Event()
        self.started: list[str] = []
        self.name = name
        self.agent = weft.Agent(name, description="Does what it is told", concurrency=32, **options)

        @self.agent.skill("work", tags=["test", "gate"], description="Does it")
        async def work(task: weft.Task) -> Any:
            self.started.append(task.id)
            verb, _, rest = task.text.partition(" ")
            match verb:
                case "gate":
                    await task.update("at the gate")
                    await self.gate.wait()
                    return "through the gate"
                case "hold":
                    await self.gate.wait()
                    return "held"
                case "chunks":
                    for number in range(int(rest)):
                        await task.update(f"chunk {number}")
                    return f"{rest} chunks"
                case "ask":
                    answer = await task.ask("which one?")
                    return f"a {answer.text} one"
                case "fail":
                    raise weft.Fail(rest)
                case "reject":
                    raise weft.Reject(rest)
                case "data":
                    return {"number": 1, "nested": {"list": [1, "two", None]}}
                case "file":
                    return weft.File("answer.bin", b"\x00\x01binary", media_type="application/octet-stream")
            return task.text.upper()


@dataclass(slots=True)
class Served:
    """A gateway under uvicorn."""

    url: str
    app: Starlette
    broker: Broker
    directory: CardDirectory
    key: CardKey
    server: uvicorn.Server

    @property
    def gateway(self) -> Gateway:
        """What its routes share."""
        gateway: Gateway = self.app.state.gateway
        return gateway

    @property
    def callers(self) -> Callers:
        """Operations of every caller."""
        return self.gateway.callers

    def of(self, agent: str) -> str:
        """Base URL of an agent."""
        return f"{self.url}/agents/{agent}"

    async def knows(self, agent: str) -> None:
        """Return when the agent's card is there."""

        async def known() -> bool:
            self.directory.forget()
            return any(one.name == agent for one in await self.directory.list())

        await eventually(known)
        self.directory.forget()


class Serve(Protocol):
    """Starts one more gateway, closed with the test."""

    def __call__(self, settings: GatewayConfig | None = ..., **environment: str) -> Awaitable[Served]: ...


@pytest.fixture(scope="module")
async def stage(anyio_backend: str) -> AsyncIterator[BrokerMesh]:
    """A mesh with a coordinator and a card key, for the module."""
    async with await start_test_mesh(callers=["local", "stranger"]) as mesh:
        ensure_card_key(Home(mesh.home))
        async with coordinator_process(mesh):
            yield mesh


@pytest.fixture
async def serve(stage: BrokerMesh) -> AsyncIterator[Serve]:
    """Starts gateways."""
    async with AsyncExitStack() as stack:

        async def start(settings: GatewayConfig | None = None, **environment: str) -> Served:
            made = serving(stage, settings or GatewayConfig(), environment=environment)
            return await stack.enter_async_context(made)

        yield start


@pytest.fixture
async def served(serve: Serve) -> Served:
    """One gateway with everything as it is by default."""
    return await serve()


@pytest.fixture
async def worker(stage: BrokerMesh, served: Served) -> AsyncIterator[Worker]:
    """One agent, whose card the gateway can have."""
    async with working(stage, served, Worker(unique_name("worker"))) as made:
        yield made


@pytest.fixture
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    """A client of A2A 1.0 for `served`."""
    async with httpx.AsyncClient(base_url=served.url, headers={"A2A-Version": "1.0"}, timeout=20) as client:
        yield client


@pytest.fixture
def start_worker(stage: BrokerMesh) -> Callable[..., Any]:
    """Runs one more agent: `async with start_worker(served, name=…, **agent_options) as worker`."""

    @asynccontextmanager
    async def start(served: Served, name: str = "", **options: Any) -> AsyncIterator[Worker]:
        async with working(stage, served, Worker(name or unique_name("worker"), **options)) as made:
            yield made

    return start


@asynccontextmanager
async def working(mesh: BrokerMesh, served: Served, worker: Worker) -> AsyncIterator[Worker]:
    """A replica of a worker, registered as its process would."""
    async with running(mesh, worker.agent) as (replica,):
        body = {**worker.agent.describe(), "replica": replica.id, "pid": os.getpid(), "slots": 32}
        await coordinator.register(replica.replica.broker, body)
        await served.knows(worker.name)
        yield worker
        worker.gate.set()


@asynccontextmanager
async def serving(mesh: BrokerMesh, settings: GatewayConfig, *, environment: dict[str, str]) -> AsyncIterator[Served]:
    """One gateway in this process."""
    key = ensure_card_key(Home(mesh.home))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    broker = await mesh.connect("gateway")
    tasks = Tasks("gateway of a test")
    try:
        directory = CardDirectory(broker)
        async with Authenticator(settings.auth, environment=environment) as authenticator:
            app = make_app(
                settings,
                broker=broker,
                cards=directory,
                authenticator=authenticator,
                signer=key,
                addresses=Addresses(settings.public_url or url),
            )
            config = uvicorn.Config(
                app, http=BoundedProtocol, lifespan="on", log_config=None, access_log=False, ws="none"
            )
            server = QuietServer(config)
            task = tasks.start(server.serve(sockets=[listener]), name="uvicorn")
            await eventually(lambda: server.started or task.done())
            yield Served(url, app, broker, directory, key, server)
            await app.state.gateway.streams.drain(0)
            server.should_exit = True
            async with asyncio.timeout(10):
                await task
    finally:
        await tasks.aclose()
        await broker.close()
        listener.close()
