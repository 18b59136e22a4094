"""The A2A SDK over HTTP: its server on uvicorn, its own client on httpx, everything at its defaults.

The server keeps tasks in memory: nothing survives it, and a task runs once per server that hears of it.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import uvicorn
import uvloop
from a2a.client import ClientConfig, ClientFactory
from a2a.helpers import new_task_from_user_message
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes
from a2a.server.tasks import InMemoryTaskStore, TaskUpdater
from a2a.types import (
    AgentCapabilities,
    AgentCard,
    AgentInterface,
    AgentSkill,
    Message,
    Part,
    Role,
    SendMessageRequest,
)
from a2a.utils.errors import UnsupportedOperationError
from bench.processes import Child, Children
from starlette.applications import Starlette

from weft.core.serverproc import free_port


def card(url: str) -> AgentCard:
    """The echo agent's card."""
    return AgentCard(
        name="echo",
        description="Returns what it was sent",
        version="1.0.0",
        capabilities=AgentCapabilities(streaming=True),
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
        skills=[AgentSkill(id="echo", name="echo", description="Returns the text", tags=["bench"])],
        supported_interfaces=[AgentInterface(url=url, protocol_binding="JSONRPC", protocol_version="1.0")],
    )


class Echo(AgentExecutor):
    """Working, one artifact, completed."""

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.message is not None
        task = context.current_task or new_task_from_user_message(context.message)
        await event_queue.enqueue_event(task)
        updater = TaskUpdater(event_queue, task.id, task.context_id)
        await updater.start_work()
        await updater.add_artifact([Part(text=context.get_user_input())])
        await updater.complete()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        raise UnsupportedOperationError(message="the benchmark cancels nothing")


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """A caller."""
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
    async with httpx.AsyncClient(limits=limits, timeout=60) as connections:
        caller = ClientFactory(ClientConfig(streaming=False, httpx_client=connections)).create(card(url))

        async def one(text: str) -> str:
            message = Message(message_id=uuid.uuid4().hex, role=Role.ROLE_USER, parts=[Part(text=text)])
            reply = ""
            async for answer in caller.send_message(SendMessageRequest(message=message)):
                reply = "".join(part.text for artifact in answer.task.artifacts for part in artifact.parts)
            return reply

        yield one


async def serve(port: int) -> None:
    """The agent's side."""
    description = card(f"http://127.0.0.1:{port}/")
    handler = DefaultRequestHandler(agent_executor=Echo(), task_store=InMemoryTaskStore(), agent_card=description)
    app = Starlette(routes=[*create_agent_card_routes(description), *create_jsonrpc_routes(handler, "/")])
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", access_log=False, timeout_keep_alive=75)
    )
    await server.serve()


@asynccontextmanager
async def processes(children: Children) -> AsyncIterator[tuple[str, Child]]:
    """The server: (url, process)."""
    port = free_port()
    child = await children.python("A2A server", "bench.side_a2a", str(port), stdout=False)
    url = f"http://127.0.0.1:{port}/"
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=20)) as probe:
        await probe.get(f"{url}.well-known/agent-card.json", timeout=20)
    yield url, child


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    uvloop.run(serve(int(sys.argv[1])))
