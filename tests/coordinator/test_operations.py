"""The coordinator's own operations on a real broker, through the client module that hosts use."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest

from weft.client import coordinator
from weft.client.coordinator import Heartbeat, Registration
from weft.core.broker import Broker
from weft.testing.agents import eventually
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.errors import (
    ApiError,
    Conflict,
    InvalidName,
    InvalidParams,
    NotAuthenticated,
    PermissionDenied,
    Unavailable,
    UnsupportedOperation,
    WeftError,
)
from weft_protocols.resources import STREAM
from weft_protocols.states import State

if TYPE_CHECKING:
    from tests.coordinator.conftest import Stage

pytestmark = pytest.mark.anyio

SKILLS: tuple[dict[str, Any], ...] = (
    {"id": "say", "description": "says it", "tags": ["x"], "schema": {"type": "string"}},
)


def registration(agent: str, replica: str = "r1", **changes: Any) -> Registration:
    values: dict[str, Any] = {"version": "1.0", "pid": os.getpid(), "slots": 4, "code_digest": "aaaa", "skills": SKILLS}
    return Registration(agent=agent, replica=replica, **{**values, **changes})


async def registered(stage: Stage, agent: str, replica: str = "r1", **changes: Any) -> Broker:
    broker = await stage.broker(agent)
    await coordinator.register(broker, registration(agent, replica, **changes))
    return broker


async def info(stage: Stage, agent: str, as_whom: str = "operator") -> coordinator.AgentInfo:
    found = await coordinator.agents(await stage.broker(as_whom))
    return next(one for one in found if one.name == agent)


# Registering ---------------------------------------------------------------------------------------


async def test_a_registered_agent_can_be_found_by_every_caller(stage: Stage) -> None:
    agent = stage.agent()
    await registered(stage, agent, description="an echo")
    seen = await info(stage, agent, "local")
    assert (seen.version, seen.description, seen.state, seen.ready) == ("1.0", "an echo", "ready", 1)
    assert [skill["id"] for skill in seen.skills] == ["say"]
    assert seen.replicas == ()


async def test_the_operator_sees_the_replicas_too(stage: Stage) -> None:
    agent = stage.agent()
    await registered(stage, agent, host="there")
    (replica,) = (await info(stage, agent)).replicas
    assert (replica.replica, replica.pid, replica.host, replica.slots) == ("r1", os.getpid(), "there", 4)
    assert replica.state == "ready"
    assert replica.last_seen > 1_700_000_000_000


async def test_registering_creates_the_agents_missing_consumers(stage: Stage) -> None:
    agent = stage.agent()
    operator = await stage.broker("coordinator")
    for lane in subjects.LANES:
        await operator.api(f"CONSUMER.DELETE.{STREAM}.{subjects.consumer(agent, lane)}")
    await registered(stage, agent)
    for lane in subjects.LANES:
        found = await operator.api(f"CONSUMER.INFO.{STREAM}.{subjects.consumer(agent, lane)}")
        assert found["config"]["ack_policy"] == "explicit"


async def test_other_code_under_the_same_name_and_version_is_refused(stage: Stage) -> None:
    agent = stage.agent()
    broker = await registered(stage, agent)
    with pytest.raises(Conflict, match="other code"):
        await coordinator.register(broker, registration(agent, "r2", code_digest="bbbb"))
    assert [one.replica for one in (await info(stage, agent)).replicas] == ["r1"]
    await coordinator.register(broker, registration(agent, "r2", code_digest="bbbb", version="1.1"))
    assert {one.replica for one in (await info(stage, agent)).replicas} == {"r1", "r2"}


async def test_changed_code_need_not_wait_for_a_process_here_that_has_ended(stage: Stage) -> None:
    agent = stage.agent()
    ended = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await ended.wait()
    broker = await registered(stage, agent, pid=ended.pid, host=socket.gethostname())
    await coordinator.register(broker, registration(agent, "r2", code_digest="bbbb"))
    assert [one.replica for one in (await info(stage, agent)).replicas] == ["r2"]


async def test_many_replicas_registering_at_once_are_all_kept(stage: Stage) -> None:
    agent = stage.agent()
    broker = await stage.broker(agent)
    async with asyncio.TaskGroup() as group:
        for n in range(12):
            group.create_task(coordinator.register(broker, registration(agent, f"r{n}")))
    assert (await info(stage, agent)).ready == 12


async def test_an_agent_cannot_register_another(stage: Stage) -> None:
    agent = stage.agent()
    with pytest.raises(PermissionDenied):
        await coordinator.register(await stage.broker(agent), registration("agent-0"))


async def test_a_caller_is_no_agent(stage: Stage) -> None:
    with pytest.raises(PermissionDenied, match="a caller"):
        await coordinator.register(await stage.broker("local"), registration("local"))


async def test_a_wrong_registration_names_its_fields(stage: Stage) -> None:
    agent = stage.agent()
    with pytest.raises(InvalidParams, match=r"pid must be .* slots must be"):
        await coordinator.register(await stage.broker(agent), registration(agent, pid=-1, slots=-1))


async def test_what_a_host_describes_can_be_registered_as_it_is(stage: Stage) -> None:
    import weft

    agent = weft.Agent(stage.agent(), version="2.0.0", description="adds")

    @agent.skill("add", tags=["math"])
    async def add(a: int, b: int) -> int:
        return a + b

    broker = await stage.broker(agent.name)
    await coordinator.register(broker, {**agent.describe(), "replica": "r1", "pid": 1, "slots": 2})
    seen = await info(stage, agent.name)
    assert (seen.version, seen.skills[0]["id"], seen.skills[0]["tags"]) == ("2.0.0", "add", ["math"])
    assert set(seen.skills[0]["schema"]["properties"]) == {"a", "b"}


# Presence ------------------------------------------------------------------------------------------


async def test_a_sign_of_life_tells_how_busy_a_replica_is(stage: Stage) -> None:
    agent = stage.agent()
    broker = await registered(stage, agent)
    sign = Heartbeat("r1", "draining", active=3, waiting=1, slots=8, done=5, failed=2, last_progress=123)
    assert await coordinator.heartbeat(broker, agent, sign)
    seen = await info(stage, agent)
    (replica,) = seen.replicas
    assert (replica.state, replica.active, replica.waiting, replica.slots) == ("draining", 3, 1, 8)
    assert (replica.done, replica.failed, replica.last_progress) == (5, 2, 123)
    assert (seen.state, seen.ready) == ("draining", 0)


async def test_a_replica_nobody_registered_is_told_so(stage: Stage) -> None:
    agent = stage.agent()
    broker = await stage.broker(agent)
    assert not await coordinator.heartbeat(broker, agent, Heartbeat("r1"))
    await coordinator.register(broker, registration(agent))
    assert await coordinator.heartbeat(broker, agent, Heartbeat("r1"))
    assert not await coordinator.heartbeat(broker, agent, Heartbeat("r2"))


async def test_a_replica_that_leaves_is_gone_at_once(stage: Stage) -> None:
    agent = stage.agent()
    broker = await registered(stage, agent)
    await coordinator.leave(broker, agent, "r1")
    seen = await info(stage, agent)
    assert (seen.state, seen.replicas) == ("offline", ())
    assert not await coordinator.heartbeat(broker, agent, Heartbeat("r1"))
    await coordinator.leave(broker, agent, "r1")


@pytest.mark.parametrize(
    "sign", [{}, {"replica": "r1", "state": "gone"}, {"replica": "r1", "state": "ready", "active": -1}]
)
async def test_a_wrong_sign_of_life_is_refused(stage: Stage, sign: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams):
        await coordinator.heartbeat(await stage.broker("agent-0"), "agent-0", sign)


# The operator's view -------------------------------------------------------------------------------


async def test_a_dead_letter_is_logged_listed_and_counted(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    operator = await stage.broker("operator")
    before = (await coordinator.status(operator)).dead_letters
    agent = stage.agent()
    sent = await stage.send(agent)
    with caplog.at_level(logging.WARNING, "weft.coordinator"):
        await (await stage.claim(sent, attempt=3)).give_up("failed after 3 of 3 attempts")
        await eventually(lambda: sent.task in caplog.text)
    letters, total = await coordinator.dead_letters(operator, limit=1)
    assert total == before + 1 == (await coordinator.status(operator)).dead_letters
    (letter,) = letters
    assert (letter.task, letter.agent, letter.caller, letter.context) == (sent.task, agent, "local", sent.context)
    assert (letter.reason, letter.error, letter.attempts) == ("failed after 3 of 3 attempts", "Boom", 3)
    assert letter.message == sent.seq
    assert sent.task in caplog.text


async def test_a_dead_letter_without_its_record_is_listed_all_the_same(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    await (await stage.claim(sent)).status("failed", "gone", headers={h.DEAD_LETTER: "1"})
    letters, _ = await coordinator.dead_letters(await stage.broker("operator"), limit=1)
    assert [(letter.task, letter.reason) for letter in letters] == [(sent.task, "")]


async def test_status_counts_the_tasks_by_state(stage: Stage) -> None:
    operator = await stage.broker("operator")
    before = await coordinator.status(operator)
    agent = stage.agent()
    await stage.done(agent)
    await stage.send(agent)
    after = await coordinator.status(operator)
    assert after.tasks == before.tasks + 2
    assert after.states["completed"] == before.states.get("completed", 0) + 1
    assert after.states["submitted"] == before.states.get("submitted", 0) + 1
    assert after.drift == ()
    assert (after.pid, after.raw["coordinator"]) == (os.getpid(), after.coordinator)


@pytest.mark.parametrize("operation", ["status", "dead-letters", "agent-add", "agent-revoke"])
async def test_what_is_the_operators_is_refused_to_others(stage: Stage, operation: str) -> None:
    for identity in ("local", "agent-0"):
        with pytest.raises(PermissionDenied, match="operator"):
            await coordinator.call(await stage.broker(identity), operation, {"name": "x"})


# Accounts ------------------------------------------------------------------------------------------


async def test_an_added_agent_can_connect_and_work_at_once(stage: Stage) -> None:
    operator = await stage.broker("operator")
    await coordinator.add(operator, "newcomer")
    await coordinator.add(operator, "newcomer")
    await registered(stage, "newcomer")
    sent = await stage.done("newcomer")
    assert (await stage.get(sent)).status.state == int(State.COMPLETED)
    await coordinator.add(operator, "visitor", kind="caller")
    assert (await stage.done("newcomer", caller="visitor")).caller == "visitor"


async def test_a_revoked_agent_is_cut_off_and_its_tasks_stay(stage: Stage) -> None:
    operator = await stage.broker("operator")
    await coordinator.add(operator, "culprit")
    broker = await registered(stage, "culprit")
    sent = await stage.done("culprit", "before")
    await coordinator.revoke(operator, "culprit")
    async with asyncio.timeout(10):
        await broker.closed.wait()
    assert isinstance(broker.failure, NotAuthenticated)
    with pytest.raises(NotAuthenticated):
        await stage.mesh.connect("culprit")
    assert "culprit" not in {one.name for one in await coordinator.agents(operator)}
    assert (await stage.get(sent)).status.state == int(State.COMPLETED)
    # It can be let in again, under a new key, and is no stranger's successor.
    await coordinator.add(operator, "culprit")
    assert not await coordinator.heartbeat(await stage.broker("culprit"), "culprit", Heartbeat("r1"))
    await registered(stage, "culprit", code_digest="other")
    assert (await info(stage, "culprit")).ready == 1


@pytest.mark.parametrize(
    ("operation", "body", "error"),
    [
        ("agent-add", {}, InvalidParams),
        ("agent-add", {"name": "a.b"}, InvalidParams),
        ("agent-add", {"name": "MESH"}, InvalidName),
        ("agent-add", {"name": "local"}, InvalidName),
        ("agent-add", {"name": "x", "kind": "god"}, InvalidParams),
        ("agent-revoke", {"name": "nobody"}, InvalidParams),
        ("agent-revoke", {"name": "coordinator"}, InvalidParams),
    ],
)
async def test_wrong_names_are_refused(
    stage: Stage, operation: str, body: dict[str, str], error: type[WeftError]
) -> None:
    with pytest.raises(error):
        await coordinator.call(await stage.broker("operator"), operation, body)


async def test_accounts_are_not_changed_for_a_broker_that_is_run_elsewhere(fresh_stage: Stage) -> None:
    (fresh_stage.mesh.home / "broker.json").unlink()
    running = await fresh_stage.coordinator()
    assert running.coordinator.local.home is None
    operator = await fresh_stage.broker("operator")
    with pytest.raises(UnsupportedOperation, match="not embedded"):
        await coordinator.add(operator, "newcomer")
    # Registering works all the same, and the registry tells which consumers there must be.
    await registered(fresh_stage, "agent-0")
    assert (await info(fresh_stage, "agent-0")).ready == 1


# The wire ------------------------------------------------------------------------------------------


async def test_errors_are_typed_in_body_and_header(stage: Stage) -> None:
    broker = await stage.broker("local")
    reply = await broker.request(subjects.coord("status", "local"), b"")
    assert json.loads(reply.data)["error"]["type"] == "PermissionDenied"
    assert h.get(reply.headers, b"A2A-Error") == b"PERMISSION_DENIED"
    operator = await stage.broker("operator")
    reply = await operator.request(subjects.coord("agent-add", "operator"), b'{"name": "MESH"}')
    assert json.loads(reply.data)["error"]["type"] == "InvalidName"
    assert h.get(reply.headers, b"A2A-Error") is None


@pytest.mark.parametrize("data", [b"{", b"[]", b"1", b"\xff"])
async def test_bytes_that_are_no_json_object_are_a_parse_error(stage: Stage, data: bytes) -> None:
    reply = await (await stage.broker("local")).request(subjects.coord("agents", "local"), data)
    assert h.get(reply.headers, b"A2A-Error") == b"PARSE_ERROR"


async def test_an_operation_nobody_knows_is_named(stage: Stage) -> None:
    with pytest.raises(Unavailable, match=r"make-coffee got no answer: .* is new enough"):
        await coordinator.call(await stage.broker("local"), "make-coffee")


async def test_without_a_coordinator_every_call_says_so(fresh_stage: Stage) -> None:
    with pytest.raises(Unavailable, match="mesh ps"):
        await coordinator.agents(await fresh_stage.broker("local"))


async def test_the_registry_is_out_of_every_accounts_reach(stage: Stage) -> None:
    broker = await stage.broker("agent-0")
    with pytest.raises(WeftError):
        await broker.publish("mesh.registry.agent-0", b"{}", timeout=0.5)
    with pytest.raises((WeftError, ApiError)):
        await broker.request("$JS.API.DIRECT.GET.MESH_REGISTRY.mesh.registry.agent-0", timeout=0.5)
