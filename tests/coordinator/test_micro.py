"""The NATS services protocol: plain requests in account MESH, answers by the schemas io.nats.micro.v1.*."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest

from weft.client import coordinator
from weft.client.coordinator import Heartbeat, Registration
from weft.core.broker import Broker, Delivered
from weft_coordinator.decide.micro import semver

if TYPE_CHECKING:
    from tests.coordinator.conftest import Stage

pytestmark = pytest.mark.anyio

NAME = re.compile(r"^[a-zA-Z0-9_-]+$")
SEMVER = re.compile(
    r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(?:-((?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)"
    r"(?:\.(?:0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?(?:\+([0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?$"
)
"""As the schemas have it."""


def check(answer: dict[str, Any], verb: str) -> dict[str, Any]:
    """An answer, once it has what the schema of its type demands."""
    assert answer["type"] == f"io.nats.micro.v1.{verb}_response"
    assert NAME.match(answer["name"])
    assert answer["id"]
    assert SEMVER.match(answer["version"])
    assert all(isinstance(value, str) for value in answer["metadata"].values())
    for endpoint in answer.get("endpoints", ()):
        assert NAME.match(endpoint["name"])
        assert endpoint["subject"]
        assert isinstance(endpoint["queue_group"], str)
    if verb == "info":
        assert isinstance(answer["description"], str)
        assert answer["endpoints"]
    if verb == "stats":
        assert datetime.fromisoformat(answer["started"]).utcoffset() is not None
        for endpoint in answer["endpoints"]:
            for number in ("num_requests", "num_errors", "processing_time", "average_processing_time"):
                assert type(endpoint[number]) is int
            assert isinstance(endpoint["last_error"], str)
            assert isinstance(endpoint["data"], dict)
    return answer


class Asker:
    """Asks as the `nats` command does: a request whose answers come one after the other."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    async def ask(self, subject: str, *, expected: int) -> list[dict[str, Any]]:
        """At least `expected` answers, and whatever else was sent before the end of a round trip after them."""
        answers: list[dict[str, Any]] = []
        came = asyncio.Event()

        def take(message: Delivered) -> None:
            answers.append(json.loads(message.data))
            if len(answers) >= expected:
                came.set()

        inbox = self.broker.new_inbox()
        subscription = await self.broker.subscribe(inbox, take)
        try:
            self.broker.send(subject, b"", reply=inbox)
            async with asyncio.timeout(10.0):
                await came.wait()
            await self.broker.flush()
        finally:
            await subscription.close()
        return answers


@pytest.fixture
async def operator(stage: Stage) -> Asker:
    return Asker(await stage.broker("operator"))


async def registered(stage: Stage, *replicas: str, version: str = "1.2.3", **changes: Any) -> str:
    agent = stage.agent()
    broker = await stage.broker(agent)
    skills = ({"id": "say", "tags": ["x"]}, {"id": "sing"})
    for replica in replicas:
        values = {"version": version, "replica": replica, "pid": 7, "slots": 4, "skills": skills, **changes}
        await coordinator.register(broker, Registration(agent, **values))
    return agent


async def test_every_ready_replica_answers_a_ping(stage: Stage, operator: Asker) -> None:
    agent = await registered(stage, "r1", "r2")
    found = [check(one, "ping") for one in await operator.ask("$SRV.PING", expected=2)]
    mine = [one for one in found if one["name"] == agent]
    assert {one["id"] for one in mine} == {"r1", "r2"}
    assert {one["version"] for one in mine} == {"1.2.3"}


async def test_one_agent_and_one_replica_can_be_asked(stage: Stage, operator: Asker) -> None:
    agent = await registered(stage, "r1", "r2")
    await registered(stage, "r1")
    assert {one["id"] for one in await operator.ask(f"$SRV.PING.{agent}", expected=2)} == {"r1", "r2"}
    (one,) = await operator.ask(f"$SRV.PING.{agent}.r2", expected=1)
    assert (one["name"], one["id"]) == (agent, "r2")


async def test_info_tells_what_the_agent_can_do(stage: Stage, operator: Asker) -> None:
    agent = await registered(stage, "r1", description="says things")
    (one,) = [check(one, "info") for one in await operator.ask(f"$SRV.INFO.{agent}", expected=1)]
    assert one["description"] == "says things"
    (endpoint,) = one["endpoints"]
    assert endpoint["subject"] == f"mesh.task.{agent}.*.*.*"
    assert endpoint["metadata"]["weft.skills"] == "say,sing"


async def test_stats_tell_what_the_replica_did(stage: Stage, operator: Asker) -> None:
    agent = await registered(stage, "r1")
    sign = Heartbeat("r1", active=2, waiting=1, slots=4, done=9, failed=3)
    assert await coordinator.heartbeat(await stage.broker(agent), agent, sign)
    (one,) = [check(one, "stats") for one in await operator.ask(f"$SRV.STATS.{agent}", expected=1)]
    (endpoint,) = one["endpoints"]
    assert (endpoint["num_requests"], endpoint["num_errors"]) == (12, 3)
    assert endpoint["data"] == {"active": 2, "waiting": 1, "slots": 4, "last_progress": 0}


async def test_a_replica_that_leaves_or_drains_answers_no_more(stage: Stage, operator: Asker) -> None:
    agent = await registered(stage, "r1", "r2", "r3")
    broker = await stage.broker(agent)
    await coordinator.leave(broker, agent, "r1")
    assert await coordinator.heartbeat(broker, agent, Heartbeat("r2", state="draining"))
    found = await operator.ask(f"$SRV.PING.{agent}", expected=1)
    assert [one["id"] for one in found] == ["r3"]


async def test_several_coordinators_answer_once(stage: Stage, operator: Asker) -> None:
    running = await stage.coordinator()
    try:
        agent = await registered(stage, "r1")

        for _ in range(8):
            assert len(await operator.ask(f"$SRV.PING.{agent}.r1", expected=1)) == 1
    finally:
        await stage.stop(running)


async def test_other_accounts_cannot_ask(stage: Stage) -> None:
    await registered(stage, "r1")
    for identity in ("local", stage.agent()):
        broker = await stage.broker(identity)
        with pytest.raises(Exception, match="nobody"):
            await broker.request("$SRV.PING", b"", timeout=2.0)


@pytest.mark.parametrize(
    ("version", "shown"),
    [
        ("1.2.3", "1.2.3"),
        ("1.2.3-rc.1+b5", "1.2.3-rc.1+b5"),
        ("1.0", "1.0.0"),
        ("v2", "2.0.0"),
        ("1.0rc1", "1.0.0"),
        ("1.2.3.4", "1.2.3"),
        ("01.2.3", "1.2.3"),
        ("main", "0.0.0"),
    ],
)
def test_a_version_is_shown_in_the_form_the_protocol_demands(version: str, shown: str) -> None:
    assert semver(version) == shown
    assert SEMVER.match(shown)
