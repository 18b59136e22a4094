"""Two coordinators as processes: the other one leads when the leader is killed, stopped in order, or stands still."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from weft.client import coordinator
from weft.core.broker import Broker
from weft.core.history import StreamReader
from weft.testing.agents import Process, coordinator_process, eventually
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft_coordinator.decide import laws
from weft_coordinator.shell.decided import Commit
from weft_protocols.errors import WeftError
from weft_protocols.resources import COORD, DECIDED

pytestmark = pytest.mark.anyio

LEADS = "leads in epoch"
WITHIN = 25.0
"""Seconds a takeover may take after a kill."""


class Pair:
    """Two coordinators, the first of which leads."""

    def __init__(self, mesh: BrokerMesh, operator: Broker, first: Process, second: Process) -> None:
        self.mesh, self.operator, self.first, self.second = mesh, operator, first, second

    async def leader(self) -> int:
        """Pid of the coordinator that leads and says so; 0 while none does."""
        try:
            told = await coordinator.call(self.operator, "status", {}, timeout=1.0)
        except WeftError:
            return 0
        return int(told["leader"].split("-")[-2]) if told["leader"] else 0

    async def log(self) -> list[Commit]:
        broker = await self.mesh.connect("coordinator")
        reader = await StreamReader(broker).open()
        found = [Commit.decode(one.data) for one in await reader.all(COORD, DECIDED)]
        await reader.close()
        await broker.close()
        return found


@pytest.fixture
async def pair(anyio_backend: str) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(await start_test_mesh([]))
        env = {"WEFT_COORDINATOR_LEASE": "2"}
        first = await stack.enter_async_context(coordinator_process(mesh, env=env))
        await first.said(LEADS)
        second = await stack.enter_async_context(coordinator_process(mesh, env=env))
        operator = await mesh.connect("operator")
        stack.push_async_callback(operator.close)
        made = Pair(mesh, operator, first, second)
        yield made
        log = await made.log()
        assert laws.violations(log) == []
        assert [commit.epoch for commit in log] == sorted(commit.epoch for commit in log)


async def test_when_the_leader_is_killed_the_standby_leads_within_25_seconds(pair: Pair) -> None:
    began = time.monotonic()
    pair.first.kill()
    await pair.second.said(LEADS, timeout=WITHIN)
    assert time.monotonic() - began < WITHIN
    await eventually(lambda: _is(pair, pair.second.pid))


async def test_when_the_leader_is_stopped_in_order_the_standby_leads_at_once(pair: Pair) -> None:
    pair.first.terminate()
    assert await pair.first.exited() == 0
    began = time.monotonic()
    await pair.second.said(LEADS)
    assert time.monotonic() - began < 5.0, "the lease would have run out after 20 s"


async def test_a_leader_that_stood_still_longer_than_its_lease_writes_nothing_more_and_stands_by(pair: Pair) -> None:
    pair.first.pause()
    await pair.second.said(LEADS, timeout=WITHIN)
    new = len(await pair.log())
    pair.first.proceed()
    await pair.first.said("leads no more")
    await eventually(lambda: _is(pair, pair.second.pid))
    log = await pair.log()
    assert {commit.epoch for commit in log[new:]} <= {2}
    # It stands by: when the new leader goes, it leads again.
    pair.second.terminate()
    await eventually(lambda: sum(LEADS in line for line in pair.first.output) == 2)


async def _is(pair: Pair, pid: int) -> bool:
    return await pair.leader() == pid
