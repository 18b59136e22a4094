"""Sidecars as processes: they share the work, drain when told to leave, and leave nothing behind when killed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from weft.client.tools import ToolClient, ToolRequest
from weft.core.home import process_started
from weft.core.toolsconf import ToolServer
from weft.core.toolstore import ToolStore
from weft.testing.agents import eventually, sidecar_process
from weft.testing.broker import BrokerMesh
from weft.testing.policies import permit
from weft_protocols.errors import ToolError, Unavailable

pytestmark = pytest.mark.anyio

BAD = Path(__file__).with_name("badserver.py")


class World:
    def __init__(self, mesh: BrokerMesh, client: ToolClient, state: Path, store: ToolStore) -> None:
        self.mesh, self.client, self.state, self.store = mesh, client, state, store

    async def register(self, *flags: str) -> None:
        command = (sys.executable, "-S", str(BAD), str(self.state), *flags)
        await self.store.register(ToolServer("bad", command=command))

    async def do(self, what: str, n: int = 1, *, heard: Any = None) -> str:
        params = {"name": "do", "arguments": {"what": what, "n": n}, "_meta": {"progressToken": 1}}
        result = await self.client.request(ToolRequest("bad", "tools/call", params), heard=heard, patience=5.0)
        return str(result["content"][0]["text"])

    def servers(self) -> list[int]:
        file = self.state / "started"
        return [int(line) for line in file.read_text().split()] if file.exists() else []


@pytest.fixture
async def world(fresh_mesh: BrokerMesh, tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        operator, local = await fresh_mesh.connect("operator"), await fresh_mesh.connect("local")
        for broker in (operator, local):
            stack.push_async_callback(broker.close)
        client = await ToolClient(local).start()
        stack.push_async_callback(client.aclose)
        await permit(operator)
        world = World(fresh_mesh, client, tmp_path, ToolStore(operator))
        await world.register()
        yield world


def gone(pid: int) -> bool:
    return process_started(pid) is None


async def test_a_sidecar_that_is_told_to_leave_lets_calls_end_and_takes_its_servers_along(world: World) -> None:
    async with sidecar_process(world.mesh, env={"WEFT_GRACE": "5"}) as process:
        await world.do("nothing")
        call = asyncio.create_task(world.do("wait", 1))
        await eventually(lambda: (world.state / "waiting").exists())
        process.terminate()
        (world.state / "go").touch()
        assert (await call).startswith("pid")
        assert await process.exited() == 0
    assert all(gone(pid) for pid in world.servers())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a server has to notice that its input ended")
async def test_what_a_killed_sidecar_ran_ends_with_it_even_if_it_ignores_everything(world: World) -> None:
    await world.register("--stubborn")
    async with sidecar_process(world.mesh) as process:
        await world.do("nothing")
        process.kill()
        await process.exited()
    [server] = world.servers()
    await eventually(lambda: gone(server))
    with pytest.raises(Unavailable):
        await world.client.request(ToolRequest("bad", "tools/list"))


async def test_two_sidecars_share_the_calls_and_one_goes_on_when_the_other_dies(world: World) -> None:
    async with sidecar_process(world.mesh) as first, sidecar_process(world.mesh):
        answers = {await world.do("nothing") for _ in range(40)}
        assert len(answers) == 2
        first.kill()
        await first.exited()
        lost = 0
        for _ in range(10):
            try:
                assert await world.do("nothing") in answers
            except ToolError:  # one that was under way at the one that died
                lost += 1
        assert lost == 0


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_thousand_calls_leak_no_process_descriptor_or_megabyte(world: World) -> None:
    async with sidecar_process(world.mesh) as process:
        proc = Path(f"/proc/{process.pid}")

        def taken() -> tuple[int, int, int]:
            resident = int((proc / "statm").read_text().split()[1]) * 4096
            return len(list((proc / "fd").iterdir())), len(world.servers()), resident

        for _ in range(200):
            await world.do("progress", 2)
        before = taken()
        for _ in range(1000):
            await world.do("progress", 2)
        after = taken()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 1024 * 1024
