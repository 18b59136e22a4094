"""Streams and consumers are created once, compared in what the specification names, and never changed by surprise."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from weft.core.broker import Broker
from weft.core.topology import Drift, Report, reconcile
from weft.testing.broker import BrokerMesh, unique_name
from weft_protocols import subjects
from weft_protocols.accounts import NEXT
from weft_protocols.errors import ApiError, Denied
from weft_protocols.resources import DURABILITY, SECOND, ConsumerSpec, StreamSpec, Topology, consumers, topology

pytestmark = pytest.mark.anyio


@pytest.fixture
async def coordinator(mesh: BrokerMesh) -> AsyncIterator[Broker]:
    broker = await mesh.connect("coordinator")
    yield broker
    await broker.close()


@pytest.fixture
async def small(coordinator: Broker) -> AsyncIterator[Topology]:
    """One stream and one consumer that no other test touches."""
    made = _small(unique_name("S"))
    yield made
    if made.streams[0].name in (await coordinator.api("STREAM.NAMES"))["streams"]:
        await coordinator.api(f"STREAM.DELETE.{made.streams[0].name}")


def _small(name: str) -> Topology:
    stream = StreamSpec(name, (f"{name}.>",), max_age=3600.0, max_bytes=1024**2)
    consumer = ConsumerSpec(name, "analyst=work", f"{name}.work.*", 4.0, description="work")
    return Topology((stream,), (consumer,))


def _names(made: Topology) -> tuple[str, ...]:
    stream = made.streams[0].name
    return f"stream {stream}", f"consumer {stream}/analyst=work"


async def test_what_is_missing_is_created_as_specified(coordinator: Broker, small: Topology) -> None:
    assert await reconcile(coordinator, small) == Report(created=_names(small))
    stream, consumer = small.streams[0], small.consumers[0]
    found = (await coordinator.api(f"STREAM.INFO.{stream.name}"))["config"]
    assert {key: found.get(key, type(value)()) for key, value in stream.config().items()} == stream.config()
    found = (await coordinator.api(f"CONSUMER.INFO.{stream.name}.{consumer.name}"))["config"]
    assert {key: found.get(key, type(value)()) for key, value in consumer.config().items()} == consumer.config()


async def test_a_second_run_finds_nothing_to_do(coordinator: Broker, small: Topology) -> None:
    await reconcile(coordinator, small)
    report = await reconcile(coordinator, small)
    assert report == Report(unchanged=_names(small))
    assert report.agrees


async def test_several_at_once_create_everything_once(mesh: BrokerMesh, small: Topology) -> None:
    brokers = [await mesh.connect("coordinator") for _ in range(4)]
    async with asyncio.TaskGroup() as group:
        runs = [group.create_task(reconcile(broker, small)) for broker in brokers]
    reports = [run.result() for run in runs]
    assert all(report.agrees for report in reports)
    assert all({*report.created, *report.unchanged} == set(_names(small)) for report in reports)
    assert (await reconcile(brokers[0], small)).unchanged == _names(small)
    for broker in brokers:
        await broker.close()


async def test_a_drift_is_reported_and_left_alone(coordinator: Broker, small: Topology) -> None:
    await reconcile(coordinator, small)
    stream, consumer = small.streams[0], small.consumers[0]
    wanted = Topology((replace(stream, max_age=7200.0),), (replace(consumer, ack_wait=30.0, max_ack_pending=5),))
    report = await reconcile(coordinator, wanted)
    names = _names(small)
    assert report.drifted == (
        Drift(names[0], "max_age", 7200 * SECOND, 3600 * SECOND),
        Drift(names[1], "ack_wait", 30 * SECOND, 4 * SECOND),
        Drift(names[1], "max_ack_pending", 5, 10_000),
    )
    assert not report.agrees
    assert str(report.drifted[0]) == f"{names[0]}: max_age is {3600 * SECOND}, should be {7200 * SECOND}"
    assert (await reconcile(coordinator, small)).agrees, "looking must not change anything"


async def test_a_drift_is_corrected_when_asked(coordinator: Broker, small: Topology) -> None:
    await reconcile(coordinator, small)
    stream, consumer = small.streams[0], small.consumers[0]
    wanted = Topology((replace(stream, max_age=7200.0),), (replace(consumer, ack_wait=30.0),))
    assert await reconcile(coordinator, wanted, apply=True) == Report(updated=_names(small))
    assert await reconcile(coordinator, wanted) == Report(unchanged=_names(small))


async def test_what_the_broker_does_not_let_be_changed_is_reported_with_its_reason(
    coordinator: Broker, small: Topology
) -> None:
    stream = small.streams[0]
    await coordinator.api(f"STREAM.CREATE.{stream.name}", {**stream.config(), "storage": "memory"})
    await coordinator.publish(f"{stream.name}.x", b"kept")
    wanted = Topology((replace(stream, max_age=7200.0),), ())
    report = await reconcile(coordinator, wanted, apply=True)
    [drift] = report.drifted
    assert (drift.resource, drift.field, drift.wanted, drift.found) == (_names(small)[0], "storage", "file", "memory")
    assert "can not change storage type" in drift.reason
    info = await coordinator.api(f"STREAM.INFO.{stream.name}")
    assert info["config"]["max_age"] == 7200 * SECOND, "the rest is changed all the same"
    assert info["state"]["messages"] == 1


async def test_settings_the_specification_does_not_name_are_kept(coordinator: Broker, small: Topology) -> None:
    await reconcile(coordinator, small)
    stream = small.streams[0]
    config = (await coordinator.api(f"STREAM.INFO.{stream.name}"))["config"]
    await coordinator.api(f"STREAM.UPDATE.{stream.name}", {**config, "description": "by an operator"})
    assert (await reconcile(coordinator, small)).agrees
    await reconcile(coordinator, Topology((replace(stream, max_age=60.0, duplicate_window=60.0),), ()), apply=True)
    config = (await coordinator.api(f"STREAM.INFO.{stream.name}"))["config"]
    assert (config["description"], config["max_age"]) == ("by an operator", 60 * SECOND)


async def test_what_the_broker_refuses_to_create_is_an_error(coordinator: Broker, small: Topology) -> None:
    await reconcile(coordinator, small)
    overlapping = StreamSpec(unique_name("S"), (f"{small.streams[0].name}.>",))
    with pytest.raises(ApiError, match="overlap"):
        await reconcile(coordinator, Topology((overlapping,), ()))


async def test_whoever_is_outside_the_mesh_cannot_reconcile(mesh: BrokerMesh, small: Topology) -> None:
    broker = await mesh.connect("local")
    with pytest.raises(Denied):
        await reconcile(broker, small)
    await broker.close()


# The mesh's own topology ---------------------------------------------------------------------------


async def test_the_meshs_topology_is_in_force(
    mesh: BrokerMesh, coordinator: Broker, unique: Callable[[str], str]
) -> None:
    agents = (unique("a"), unique("b"))
    report = await reconcile(coordinator, topology(agents, "laptop"))
    assert report.drifted == ()
    assert {name for name in report.created if name.startswith("consumer")} == {
        f"consumer MESH/{agent}={lane}" for agent in agents for lane in subjects.LANES
    }
    assert (await reconcile(coordinator, topology(agents, "laptop"))).created == ()


@pytest.mark.parametrize("durability", DURABILITY)
async def test_each_durability_agrees_with_itself(
    coordinator: Broker, unique: Callable[[str], str], durability: str
) -> None:
    made = Topology((), consumers(unique("agent"), DURABILITY[durability]))
    await reconcile(coordinator, made)
    assert (await reconcile(coordinator, made)).agrees


async def test_the_task_stream_has_nothing_by_which_a_writer_could_erase_or_forge(coordinator: Broker) -> None:
    config: dict[str, Any] = (await coordinator.api("STREAM.INFO.MESH"))["config"]
    allowed = {key for key, value in config.items() if key.startswith("allow_") and value}
    assert allowed == {"allow_direct"}
    assert config["deny_delete"] is True
    assert config["max_age"] == 0


async def test_each_lane_delivers_its_own_kind(
    mesh: BrokerMesh, coordinator: Broker, unique: Callable[[str], str]
) -> None:
    agent = unique("agent")
    await mesh.add_agent(agent)
    task = "0" * 32
    for kind in ("task", "input"):
        await coordinator.publish(f"mesh.{kind}.{agent}.00.local.{task}", kind.encode())
    await coordinator.publish(f"mesh.task.{agent}x.00.local.{task}", b"another agent's")
    for lane, wanted in (("work", b"task"), ("input", b"input")):
        info = await coordinator.api(f"CONSUMER.INFO.MESH.{agent}={lane}")
        assert info["num_pending"] == 1
        got: asyncio.Queue[bytes] = asyncio.Queue()
        inbox = coordinator.new_inbox()
        listening = await coordinator.subscribe(inbox, lambda one, got=got: got.put_nowait(one.data))  # type: ignore[misc]
        await coordinator.flush()
        coordinator.send(f"{NEXT}.MESH.{agent}={lane}", b'{"batch": 1, "expires": 5000000000}', reply=inbox)
        async with asyncio.timeout(5):
            assert await got.get() == wanted
        await listening.close()
