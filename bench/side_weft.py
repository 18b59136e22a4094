"""Weft: a real agent process in its own account, and the real client."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from bench.processes import ROOT, Child, Children

import weft

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
