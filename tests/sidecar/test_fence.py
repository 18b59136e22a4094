"""Fences: a tool that needs a lock is used by the task that holds it, with its current token, and by nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from weft import Agent, Task
from weft.client import coordinator as coord
from weft.core.broker import Broker
from weft.sidecar.fence import Fenced
from weft.sidecar.guards import Guards, guards_of
from weft.sidecar.pipeline import Call, Refusal
from weft.testing.agents import Process, client, coordinator_process, running
from weft.testing.broker import BrokerMesh
from weft_protocols.errors import InvalidConfig, PermissionDenied, Unavailable
from weft_protocols.mcp import FENCED, INVALID_PARAMS, META_FENCE

pytestmark = pytest.mark.anyio

CALL = Call(
    caller="clerk",
    server="crm",
    method="tools/call",
    name="update",
    params={"name": "update", "arguments": {"id": "acme"}},
    task="t1",
    guards=Guards(locks={"update": "crm/{id}"}),
)


class Locks:
    """Stands in for the coordinator: who holds what, with which token."""

    def __init__(self, **held: tuple[int, str, str]) -> None:
        self.held = {name.replace("_", "/"): holder for name, holder in held.items()}
        self.gone = False
        self.asked = 0

    async def check(self, name: str, token: int, agent: str, task: str) -> bool:
        self.asked += 1
        if self.gone:
            raise Unavailable("nobody leads")
        return self.held.get(name) == (token, agent, task)


def with_fence(call: Call, *fences: Any) -> Call:
    given: Any = list(fences) if len(fences) > 1 else fences[0]
    return replace(call, params={**call.params, "_meta": {META_FENCE: given}})


def token(number: Any, name: str = "crm/acme") -> dict[str, Any]:
    return {"name": name, "token": number}


async def reason(stage: Fenced, call: Call) -> str:
    """Why it is refused; empty if it is not."""
    decided = await stage.before(call)
    if not isinstance(decided, Refusal):
        return ""
    assert (decided.code, decided.in_band) == (FENCED, True)
    return str(decided.data["reason"])


async def test_only_the_current_token_of_the_right_lock_and_task_will_do() -> None:
    locks = Locks(crm_acme=(7, "clerk", "t1"))
    stage = Fenced(locks.check)
    passed = await stage.before(with_fence(CALL, token(7)))
    assert isinstance(passed, Call)
    assert passed.facts["fence"] == [token(7)]
    assert await reason(stage, CALL) == "missing"
    assert await reason(stage, with_fence(CALL, token(7, "crm/other"))) == "missing"
    assert await reason(stage, with_fence(CALL, token(8))) == "stale"
    assert await reason(stage, replace(with_fence(CALL, token(7)), task="t2")) == "stale"
    assert await reason(stage, replace(with_fence(CALL, token(7)), caller="mallory")) == "stale"
    assert await reason(stage, replace(with_fence(CALL, token(7)), task="")) == "missing"
    for wrong in ("7", True, 0, -1, None, 7.0):
        assert await reason(stage, with_fence(CALL, token(wrong))) == "missing"
    assert await reason(stage, with_fence(CALL, "crm/acme")) == "missing"


async def test_no_token_goes_back_even_when_nobody_can_be_asked() -> None:
    locks = Locks(crm_acme=(7, "clerk", "t1"))
    stage = Fenced(locks.check)
    assert await reason(stage, with_fence(CALL, token(7))) == ""
    locks.held["crm/acme"] = (9, "clerk", "t1")
    assert await reason(stage, with_fence(CALL, token(9))) == ""
    locks.gone, asked = True, locks.asked
    assert await reason(stage, with_fence(CALL, token(7))) == "stale"
    assert locks.asked == asked
    assert await reason(stage, with_fence(CALL, token(9))) == "unverified"
    assert await reason(stage, with_fence(CALL, token(10))) == "unverified"


async def test_a_token_that_grew_old_while_it_was_checked_is_refused() -> None:
    go = asyncio.Event()

    async def check(name: str, number: int, agent: str, task: str) -> bool:
        if number == 7:
            await go.wait()
        return True

    stage = Fenced(check)
    slow = asyncio.create_task(reason(stage, with_fence(CALL, token(7))))
    await asyncio.sleep(0)
    assert await reason(stage, with_fence(CALL, token(8))) == ""
    go.set()
    assert await slow == "stale"


async def test_a_tool_may_need_several_locks_and_others_none() -> None:
    locks = Locks(crm_acme=(7, "clerk", "t1"), all_crm=(3, "clerk", "t1"))
    stage = Fenced(locks.check)
    call = replace(CALL, guards=guards_of({"lock": {"update": "crm/{id}", "*": "all/crm"}}))
    assert await reason(stage, with_fence(call, token(7))) == "missing"
    assert await reason(stage, with_fence(call, token(7), token(3, "all/crm"))) == ""
    other = replace(CALL, name="read")
    assert await stage.before(other) is other


async def test_an_argument_that_cannot_be_part_of_a_name_is_refused() -> None:
    stage = Fenced(Locks().check)
    for arguments in ({}, {"id": ""}, {"id": True}, {"id": ["acme"]}):
        decided = await stage.before(CALL.with_arguments(arguments))
        assert isinstance(decided, Refusal)
        assert decided.code == INVALID_PARAMS


def test_locks_that_are_none_are_refused() -> None:
    for wrong in ("crm/{", "", "a b", {"update": 3}, ["crm"]):
        with pytest.raises(InvalidConfig, match="lock"):
            guards_of({"lock": wrong})


# With a coordinator --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def coordinator(mesh: BrokerMesh) -> AsyncIterator[Process]:
    async with coordinator_process(mesh) as process:
        yield process


async def test_a_task_calls_with_its_lock_and_is_refused_once_it_is_lost(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str], coordinator: Process
) -> None:
    server = await stage.runner(lock={"locked": "crm/{id}"})
    operator: Broker = await mesh.connect("operator")
    found: dict[str, Any] = {}
    checks: list[bool] = []
    agent = Agent(unique("clerk"), attempts=1)

    @agent.skill("work")
    async def work(task: Task) -> str:
        name = f"crm/{task.id}"

        async def call(**more: Any) -> Any:
            return await task.tools.call(f"{server}.locked", id=task.id, **more)

        found["without"] = await call()
        async with task.lock(name) as lock:
            found["held"] = await call(fence=lock)
            body = {"name": name, "token": lock.token, "agent": agent.name, "task": task.id}
            others: tuple[dict[str, Any], ...] = (
                {},
                {"token": lock.token + 1},
                {"task": "other"},
                {"agent": "other"},
                {"name": "other"},
            )
            checks.extend([(await coord.call(operator, "lock-check", body | one))["held"] for one in others])
            async with task.lock(f"other/{task.id}") as other:
                found["other"] = await call(fence=other)
            old = lock.token
        async with task.lock(name) as lock:
            found["again"] = await call(fence=lock)

            class Stale:
                names, token = lock.names, old

            found["stale"] = await call(fence=Stale())
            await coord.call(operator, "lock-release", {"name": name, "reason": "for the test"})
            try:

                class Taken:
                    names, token = lock.names, lock.granted

                found["taken"] = await asyncio.create_task(call(fence=Taken()))
            finally:
                lock.gone = lock.gone or "taken"
        return "not reached: the block ends with LockLost"

    async with running(mesh, agent), client(mesh) as caller:
        await caller.send(agent.name, "go")
    await operator.close()
    assert checks == [True, False, False, False, False]
    refusals = {name: (result.refusal or {}).get("reason") for name, result in found.items()}
    assert refusals["without"] == refusals["other"] == "missing"
    assert refusals["held"] is None
    assert refusals["again"] is None
    assert refusals["stale"] == "stale"
    assert refusals.get("taken", "stale") == "stale"
    assert (stage.state(server) / "notes").read_text().splitlines() == ["called", "called"]


async def test_agents_may_not_ask_who_holds_what(mesh: BrokerMesh, coordinator: Process) -> None:
    body = {"name": "n", "token": 1, "agent": "a", "task": "t"}
    local, sidecar = await mesh.connect("local"), await mesh.connect("sidecar")
    with pytest.raises((PermissionDenied, Unavailable)):
        await coord.call(local, "lock-check", body, timeout=2.0)
    assert await coord.call(sidecar, "lock-check", body) == {"held": False}
    for broker in (local, sidecar):
        await broker.close()
