"""Weft: a real agent process in its own account, and the real client."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from bench.processes import ROOT, Child, Children

import weft
from weft.core.serverproc import free_port

ECHO = ROOT / "bench" / "echo_agent.py"


@asynccontextmanager
async def client(home: str) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """A caller of agent `echo` in the mesh at `home`."""
    async with weft.connect("local", home=home) as mesh:

        async def one(text: str) -> str:
            return (await mesh.send("echo", text)).text

        yield one


async def replica(children: Children, home: Path, *, target: Path = ECHO, agent: str = "echo") -> Child:
    """Start a replica of an agent; returns when it pulls work."""
    child = await children.python(
        f"agent {agent}",
        "weft.host",
        f"{target}:agent",
        env={
            "WEFT_HOME": str(home),
            "WEFT_IDENTITY": agent,
            "WEFT_LOG": "ERROR",
            "WEFT_GRACE": "0",
            "BENCH_AGENT": agent,
        },
        stdout=False,
        stderr=subprocess.PIPE,
    )
    await children.said(child, b"ready:")
    return child


async def gateway(children: Children, home: Path, *, agent: str) -> tuple[str, Child]:
    """Start a coordinator, which has the cards, and a gateway: (JSON-RPC address of the agent, the gateway)."""
    settings = {"WEFT_HOME": str(home), "WEFT_LOG": "ERROR"}
    coordinator = await children.python(
        "coordinator",
        "weft_coordinator.service",
        env={**settings, "WEFT_IDENTITY": "coordinator"},
        stdout=False,
        stderr=subprocess.PIPE,
    )
    await children.said(coordinator, b"ready")
    port = free_port()
    child = await children.python(
        "gateway",
        "weft.gateway",
        env={
            **settings,
            "WEFT_IDENTITY": "gateway",
            "WEFT_GATEWAY_PORT": str(port),
            "WEFT_GATEWAY_GRPC_PORT": "0",
        },
        stdout=False,
        stderr=subprocess.PIPE,
    )
    await children.said(child, b"ready")
    return f"http://127.0.0.1:{port}/agents/{agent}", child
