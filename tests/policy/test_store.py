"""Policies in the broker: versions, what decides, its history, and sidecars that follow."""

import asyncio
import json
import random
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest

from weft.client.limits import SharedLimits
from weft.client.policies import SHADOW, PolicyFollower, PolicyStore, registered
from weft.core.broker import Broker
from weft.policy.active import ActivePolicy
from weft.policy.bundle import Bundle
from weft.policy.catalog import Catalog
from weft.policy.model import Limit, Request
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh
from weft_protocols.errors import InvalidConfig, PolicyNotFound, TimedOut, TooLarge, Unreachable
from weft_protocols.resources import POLICY, POLICY_STATE, POLICY_VERSIONS, RATE_PREFIX, RATES, TOOL_PINS, TOOL_SERVERS

pytestmark = pytest.mark.anyio
SMALL = """@id("small")
permit(principal == Agent::"bob", action == Action::"call", resource == Tool::"crm.update")
when { context.args.amount.lessThan(decimal("100.0")) };
"""


def bundle(limit: float = 100.0) -> Bundle:
    return Bundle.of({"a.cedar": SMALL.replace("100.0", f"{limit:.1f}")})


def call(amount: float) -> Request:
    return Request("bob", "call", "crm", "update", {"id": "a", "amount": amount})


@pytest.fixture
async def operator(fresh_mesh: BrokerMesh) -> AsyncIterator[Broker]:
    broker = await fresh_mesh.connect("operator")
    yield broker
    await broker.close()


def all_at(sidecars: list[ActivePolicy], version: int) -> bool:
    return all(one.version == version for one in sidecars)


@asynccontextmanager
async def following(
    mesh: BrokerMesh, catalog: Catalog, replica: str
) -> AsyncIterator[tuple[ActivePolicy, PolicyFollower]]:
    """A sidecar's policy, kept up to date."""
    broker, policy, ready = await mesh.connect("coordinator"), ActivePolicy(), asyncio.Event()
    follower = PolicyFollower(broker, policy, lambda: catalog, replica=replica)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(follower.run(ready.set))
        await ready.wait()
        yield policy, follower
        running.cancel()
    await broker.close()


async def test_every_version_is_kept_and_the_same_policy_is_one_version(operator: Broker) -> None:
    store = PolicyStore(operator)
    assert (await store.versions(), (await store.pointer()).version) == ([], 0)
    first = await store.store(bundle(), author="ann", note="start", rules=1)
    second = await store.store(bundle(200), author="ben", rules=1)
    again = await store.store(bundle(), author="eve")
    assert (first.number, second.number, again) == (1, 2, first)
    assert [(one.number, one.author, one.note) for one in await store.versions()] == [
        (1, "ann", "start"),
        (2, "ben", ""),
    ]
    assert (await store.version(1)).bundle == bundle()
    for number in (0, 3):
        with pytest.raises(PolicyNotFound):
            await store.version(number)


async def test_several_at_once_get_numbers_of_their_own(operator: Broker) -> None:
    store = PolicyStore(operator)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(store.store(bundle(n), author="a")) for n in range(1, 6)]
    assert sorted(task.result().number for task in tasks) == [1, 2, 3, 4, 5]


async def test_what_decided_when_is_never_forgotten(operator: Broker) -> None:
    store = PolicyStore(operator)
    for n in (1, 2):
        await store.store(bundle(n), author="a")
    await store.point(1, by="ann", how="load")
    await store.point(2, by="ben", how="load", note="wider")
    await store.point(1, by="ann", how="rollback")
    await store.point(2, by="ann", how="shadow", what=SHADOW)
    assert [(one.version, one.by, one.how) for one in await store.history()] == [
        (1, "ann", "load"),
        (2, "ben", "load"),
        (1, "ann", "rollback"),
    ]
    assert ((await store.pointer()).version, (await store.pointer(SHADOW)).version) == (1, 2)
    with pytest.raises(PolicyNotFound):
        await store.point(9, by="ann", how="load")


async def test_a_policy_that_fits_no_message_is_refused(operator: Broker) -> None:
    noise = "".join(f"// {random.Random(n).getrandbits(256):x}\n" for n in range(40_000))
    with pytest.raises(TooLarge, match="fit"):
        await PolicyStore(operator).store(Bundle.of({"a.cedar": noise}), author="a")


async def test_every_sidecar_follows_what_decides(fresh_mesh: BrokerMesh, operator: Broker, catalog: Catalog) -> None:
    store = PolicyStore(operator)
    async with AsyncExitStack() as stack:
        sidecars = [(await stack.enter_async_context(following(fresh_mesh, catalog, f"s{n}")))[0] for n in range(2)]
        assert not any(one.decide(call(5)).allow for one in sidecars)
        for n, limit in ((1, 100), (2, 10)):
            await store.store(bundle(limit), author="a")
            await store.point(n, by="a", how="load")
            await eventually(partial(all_at, sidecars, n))
        assert [one.decide(call(50)).allow for one in sidecars] == [False, False]
        await store.point(1, by="a", how="rollback")
        await eventually(lambda: all(one.decide(call(50)).allow for one in sidecars))


async def test_one_that_starts_later_decides_by_what_is_stored(
    fresh_mesh: BrokerMesh, operator: Broker, catalog: Catalog
) -> None:
    store = PolicyStore(operator)
    await store.store(bundle(), author="a")
    await store.point(1, by="a", how="load")
    async with following(fresh_mesh, catalog, "late") as (policy, _):
        assert (policy.version, policy.decide(call(5)).allow) == (1, True)


async def test_what_a_candidate_would_decide_otherwise_is_told(
    fresh_mesh: BrokerMesh, operator: Broker, catalog: Catalog
) -> None:
    store = PolicyStore(operator)
    for n, limit in ((1, 100), (2, 10)):
        await store.store(bundle(limit), author="a")
        await store.point(n, by="a", how="load", what="active" if n == 1 else SHADOW)
    async with following(fresh_mesh, catalog, "s1") as (policy, _):
        assert policy.decide(call(50)).allow
        await store.point(1, by="a", how="load")  # a change makes it look, and tell

        async def told() -> list[dict[str, Any]]:
            return [one for one in await store.seen() if one["counts"]]

        seen = await eventually(told)
    assert [(one["replica"], one["version"], one["counts"]) for one in seen] == [("s1", 2, {"allow>deny": 1})]


async def test_a_stored_policy_that_cannot_be_read_allows_nothing(
    fresh_mesh: BrokerMesh, operator: Broker, catalog: Catalog
) -> None:
    store = PolicyStore(operator)
    await store.store(bundle(), author="a")
    await store.store(Bundle.of({"a.cedar": "permit(principal, actoin, resource);"}), author="a")
    async with following(fresh_mesh, catalog, "s1") as (policy, _):
        await store.point(1, by="a", how="load")
        await eventually(lambda: policy.decide(call(5)).allow)
        await store.point(2, by="a", how="load")
        await eventually(lambda: not policy.decide(call(5)).allow)
        assert "version 2 cannot be used" in policy.decide(call(5)).why


async def test_new_definitions_are_taken_over(fresh_mesh: BrokerMesh, operator: Broker, catalog: Catalog) -> None:
    await PolicyStore(operator).store(bundle(), author="a")
    await PolicyStore(operator).point(1, by="a", how="load")
    broker, policy, ready, known = await fresh_mesh.connect("coordinator"), ActivePolicy(), asyncio.Event(), [Catalog()]
    follower = PolicyFollower(broker, policy, lambda: known[0], replica="s")
    async with asyncio.TaskGroup() as group:
        running = group.create_task(follower.run(ready.set))
        await ready.wait()
        assert "definition is not known" in policy.decide(call(5)).why
        known[0] = catalog
        follower.outdate()
        follower.refresh()
        assert policy.decide(call(5)).allow
        running.cancel()
    await broker.close()


@pytest.mark.parametrize(
    "subject", [f"{POLICY_STATE}.active", f"{POLICY_VERSIONS}.1", f"{RATE_PREFIX}.x", f"$JS.API.STREAM.INFO.{POLICY}"]
)
async def test_agents_reach_neither_policies_nor_limits(fresh_mesh: BrokerMesh, operator: Broker, subject: str) -> None:
    await fresh_mesh.add_agent("eve")
    broker = await fresh_mesh.connect("eve")
    try:
        # The API answers every account; this one has no JetStream.
        answer = await broker.request(subject, b"{}", timeout=0.3)
        assert b'"err_code":10039' in answer.data
    except (Unreachable, TimedOut):
        pass
    await broker.close()
    assert (await operator.api(f"STREAM.INFO.{POLICY}"))["state"]["messages"] == 0
    assert (await operator.api(f"STREAM.INFO.{RATES}"))["state"]["messages"] == 0


async def test_definitions_come_from_what_is_approved(operator: Broker) -> None:
    assert (await registered(operator)).servers == frozenset()
    schema = {"type": "object", "properties": {"id": {"type": "string"}}}
    items = {"tool:get": {"name": "get", "inputSchema": schema}, "prompt:p": {"name": "p"}, "instructions": "hello"}
    pin = zlib.compress(json.dumps({"items": items, "by": "ann", "at": 0.0, "blocked": []}).encode())
    await operator.publish(f"{TOOL_PINS}.crm", pin)
    await operator.publish(f"{TOOL_PINS}.broken", b"x")
    await operator.publish(f"{TOOL_SERVERS}.unseen", b"{}")
    made = await registered(operator)
    assert (set(made.tools), set(made.prompts), made.servers) == ({"crm.get"}, {"crm.p"}, frozenset({"crm", "unseen"}))


async def test_a_limit_holds_for_several_sidecars(fresh_mesh: BrokerMesh) -> None:
    brokers = [await fresh_mesh.connect("coordinator") for _ in range(3)]
    sidecars = [SharedLimits(one, sidecars=lambda: 3) for one in brokers]
    limit = Limit("r", calls=20, seconds=3600.0, burst=20)
    waits = await asyncio.gather(*(one.take([limit], call(1)) for one in sidecars for _ in range(15)))
    assert sum(over is None for over in waits) == 20
    assert 100 < max(over.seconds for over in waits if over is not None) <= 180.0
    assert not await sidecars[0].take([limit], Request("eve", "call", "crm", "update"))
    for one in brokers:
        await one.close()


async def test_without_the_broker_a_limit_lets_nothing_new_through(fresh_mesh: BrokerMesh) -> None:
    broker = await fresh_mesh.connect("coordinator")
    limits = SharedLimits(broker)
    limit = Limit("r", calls=1000, seconds=10.0, burst=1000)
    assert not await limits.take([limit], call(1))
    await broker.close()
    left = [await limits.take([limit], call(1)) for _ in range(100)]
    assert left[:99] == [None] * 99
    assert left[99] is not None


async def test_the_stream_is_the_meshs_own(operator: Broker) -> None:
    info = await operator.api(f"STREAM.INFO.{POLICY}")
    assert info["config"]["deny_delete"] is True
    with pytest.raises(InvalidConfig):
        Bundle.decode(b"")
