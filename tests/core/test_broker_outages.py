"""The connection while servers stall, die and come back, and how it comes about."""

import asyncio
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from weft.core import broker as broker_module
from weft.core import wire as wire_module
from weft.core.broker import WINDOW, Broker, Delivered
from weft.core.config import ConnectionSettings
from weft.core.keys import ensure_seed
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft.testing.outages import Connect, event_subject, kill, others, stalled, stop, within, works
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.errors import (
    Backpressure,
    NotAuthenticated,
    TimedOut,
    Unreachable,
    WeftError,
)
from weft_protocols.resources import STREAM

pytestmark = pytest.mark.anyio

ONCE = h.block(h.fields({h.EXPECTED_SEQUENCE: "0"}))


# A server that stalls ------------------------------------------------------------------------------


async def test_calls_during_a_stall_end_by_their_deadlines_and_work_again_after_it(
    fresh_mesh: BrokerMesh, connect: Connect, impatient: None, unique: Callable[[str], str]
) -> None:
    broker = await connect(fresh_mesh, "coordinator")
    subject = event_subject(unique)
    with stalled(fresh_mesh):
        async with within(1.0):
            outcomes = await asyncio.gather(
                broker.request("$JS.API.INFO", timeout=0.3),
                broker.api("INFO", timeout=0.3),
                broker.publish(subject, b"x", headers=ONCE, timeout=0.6),
                broker.last(STREAM, subject, timeout=0.5),
                broker.flush(timeout=0.3),
                return_exceptions=True,
            )
        assert [type(one) for one in outcomes if not isinstance(one, TimedOut | Unreachable)] == []
        await eventually(lambda: not broker.connected)
        async with within(0.0):
            with pytest.raises(Unreachable):
                await broker.request("$JS.API.INFO", timeout=30)
            with pytest.raises(Unreachable):
                broker.send(subject, b"y")
        async with within(0.5):
            with pytest.raises(Unreachable):
                await broker.publish(subject, b"y", timeout=0.5)
    async with within(5.0):
        await broker.wait_connected(5.0)
        await works(broker)


async def test_a_full_buffer_is_backpressure_and_empties_when_the_server_reads_again(
    fresh_mesh: BrokerMesh, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_module, "MAX_BUFFER", 256 * 1024)
    broker = await connect(fresh_mesh, "coordinator")

    async def fill() -> None:
        for _ in range(1000):
            broker.send("t.fill", bytes(64 * 1024))
            await asyncio.sleep(0)

    with stalled(fresh_mesh), pytest.raises(Backpressure):
        await fill()

    def taken() -> bool:
        try:
            broker.send("t.fill", b"x")
        except Backpressure:
            return False
        return True

    await eventually(taken, timeout=5.0)
    await works(broker)


async def test_a_durable_write_ends_by_its_deadline_however_its_attempts_fit_into_it(
    fresh_mesh: BrokerMesh, connect: Connect, monkeypatch: pytest.MonkeyPatch, unique: Callable[[str], str]
) -> None:
    monkeypatch.setattr(broker_module, "ATTEMPT", 1.5)
    broker = await connect(fresh_mesh, "coordinator")
    with stalled(fresh_mesh):
        begun = time.monotonic()
        with pytest.raises(TimedOut):
            await broker.publish(event_subject(unique), b"x", timeout=1.6)
        assert time.monotonic() - begun < 2.6


async def test_a_subscription_goes_before_what_is_sent_after_it_also_when_the_server_was_slow(
    fresh_mesh: BrokerMesh, connect: Connect
) -> None:
    broker = await connect(fresh_mesh, "coordinator")
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    with stalled(fresh_mesh):
        for _ in range(200):
            broker.send("t.fill", bytes(64 * 1024))
        for subject in ("t.one", "t.two", "t.three"):
            await broker.subscribe(subject, lambda message: heard.put_nowait(message.data))
            broker.send(subject, subject.encode())
            for _ in range(5):
                await asyncio.sleep(0)
    async with asyncio.timeout(5):
        assert [await heard.get() for _ in range(3)] == [b"t.one", b"t.two", b"t.three"]


async def test_a_client_leaves_a_server_that_stands_still_with_data_unsent(tmp_path: Path, impatient: None) -> None:
    first = await start_test_mesh(home=tmp_path / "first")
    (tmp_path / "second").mkdir(mode=0o700)
    for one in ("keys", "accounts.json"):
        source, target = (tmp_path / folder / one for folder in ("first", "second"))
        await asyncio.to_thread(shutil.copytree if source.is_dir() else shutil.copy, source, target)
    second = await start_test_mesh(home=tmp_path / "second")
    known = first.settings("coordinator")
    broker = await Broker.connect(replace(known, url=f"{first.url},{second.url}"))
    try:
        connected = broker._wire.connected_url
        assert connected is not None
        used = first if connected.port == first.server.port else second
        again = asyncio.Event()
        broker.on_reconnect(again.set)
        with stalled(used):
            for _ in range(200):
                broker.send("t.fill", bytes(64 * 1024))
            async with asyncio.timeout(10):
                await again.wait()
            await works(broker)
    finally:
        await broker.close()
        await first.aclose()
        await second.aclose()


async def test_a_full_window_is_backpressure_at_the_deadline_and_the_writes_in_it_go_on(
    fresh_mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker = await connect(fresh_mesh, "coordinator")
    subject = event_subject(unique)
    with stalled(fresh_mesh):
        writes = [asyncio.create_task(broker.publish(subject, b"%d" % n)) for n in range(WINDOW)]
        await asyncio.sleep(0)
        async with within(0.2):
            with pytest.raises(Backpressure, match="in flight"):
                await broker.publish(subject, b"one too many", timeout=0.2)
    sequences = await asyncio.gather(*writes)
    assert len(set(sequences)) == WINDOW
    await broker.publish(subject, b"room again")


async def test_a_write_enters_the_window_when_a_request_leaves_it(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "WINDOW", 2)
    broker, server = await connect(mesh, "coordinator"), await connect(mesh, "coordinator")
    service, waiting = unique("slow"), asyncio.Queue[Delivered]()
    await server.subscribe(service, waiting.put_nowait)
    await server.flush()
    requests = [asyncio.create_task(broker.request(service, timeout=30)) for _ in range(2)]
    first, _ = await waiting.get(), await waiting.get()
    writes = [asyncio.create_task(broker.publish(event_subject(unique), b"x", timeout=10)) for _ in range(3)]
    cancelled = asyncio.create_task(broker.publish(event_subject(unique), b"x", timeout=10))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert not any(write.done() for write in writes)
    server.send(first.reply, b"done")
    async with within(1.0):
        assert all([await write > 0 for write in writes])
    for request in requests:
        request.cancel()
    await asyncio.wait(requests)


async def test_a_write_that_is_given_up_as_its_turn_comes_hands_the_turn_on(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "WINDOW", 1)
    broker, server = await connect(mesh, "coordinator"), await connect(mesh, "coordinator")
    service, signal_, waiting = unique("slow"), unique("signal"), asyncio.Queue[Delivered]()
    await server.subscribe(service, waiting.put_nowait)
    await server.flush()
    request = asyncio.create_task(broker.request(service, timeout=30))
    message = await waiting.get()
    given_up = asyncio.create_task(broker.publish(event_subject(unique), b"x", timeout=10))
    await asyncio.sleep(0)
    next_one = asyncio.create_task(broker.publish(event_subject(unique), b"x", timeout=10))

    def give_up(_: Delivered) -> None:
        given_up.cancel()

    await broker.subscribe(signal_, give_up)
    await broker.flush()
    server.send(message.reply, b"done")  # both arrive with one read
    server.send(signal_, b"")
    async with within(1.0):
        assert await next_one > 0
    await request
    await asyncio.wait([given_up])
    assert given_up.cancelled()


# A server that dies --------------------------------------------------------------------------------


async def test_after_a_restart_on_the_same_port_subscriptions_and_requests_work_again(
    fresh_mesh: BrokerMesh, connect: Connect
) -> None:
    broker, other = await connect(fresh_mesh, "coordinator"), await connect(fresh_mesh, "coordinator")
    heard, again = asyncio.Queue[bytes](), asyncio.Event()
    await broker.subscribe("t.sub", lambda message: heard.put_nowait(message.data))
    broker.on_reconnect(again.set)
    port = fresh_mesh.server.port
    await kill(fresh_mesh)
    await fresh_mesh.server.start()
    assert fresh_mesh.server.port == port
    async with asyncio.timeout(5):
        await again.wait()
        await other.wait_connected(5.0)
        other.send("t.sub", b"hello")
        assert await heard.get() == b"hello"
    await works(broker)


async def test_calls_in_flight_fail_at_once_when_the_server_dies(fresh_mesh: BrokerMesh, connect: Connect) -> None:
    broker = await connect(fresh_mesh, "coordinator")
    silent = asyncio.Event()
    await broker.subscribe("t.silent", lambda _: silent.set())
    lost: list[bool] = []
    broker.on_lost(lambda: lost.append(broker.closed.is_set()))

    def fail(data: bytes, headers: bytes | None, error: WeftError | None) -> None:
        raise LookupError("whoever asked first fails")

    broker.publish_then("t.silent", b"", headers=ONCE, then=fail)
    request = asyncio.create_task(broker.request("t.silent", timeout=30))
    await silent.wait()
    with stalled(fresh_mesh):
        flush = asyncio.create_task(broker.flush(timeout=30))
        await asyncio.sleep(0)
        async with within(0.5):
            os.kill(fresh_mesh.server.pid, signal.SIGKILL)
            for call in (request, flush):
                with pytest.raises(Unreachable):
                    await call
    assert lost == [False]
    await fresh_mesh.server.wait()
    await fresh_mesh.server.start()
    await broker.wait_connected(5.0)
    await works(broker)


async def test_nothing_written_before_a_connection_was_lost_is_sent_over_the_next_one(
    fresh_mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    sender, listener = await connect(fresh_mesh, "coordinator"), await connect(fresh_mesh, "coordinator")
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    await listener.subscribe("t.core", lambda message: heard.put_nowait(message.data))
    await listener.flush()
    sender.send("t.core", b"before")
    async with asyncio.timeout(5):
        assert await heard.get() == b"before"
    pid = fresh_mesh.server.pid
    stop(pid)
    sender.send("t.core", b"written and lost")
    await asyncio.sleep(0)
    sender.send("t.core", b"not even written")
    lost = asyncio.Event()
    sender.on_lost(lost.set)
    os.kill(pid, signal.SIGKILL)
    await fresh_mesh.server.wait()
    async with asyncio.timeout(5):
        await lost.wait()
    with pytest.raises(Unreachable):
        sender.send("t.core", b"while away")
    await fresh_mesh.server.start()
    async with asyncio.timeout(5):
        await asyncio.gather(sender.wait_connected(5.0), listener.wait_connected(5.0))
        await listener.flush()
        sender.send("t.core", b"after")
        assert await heard.get() == b"after"
    await sender.flush()
    await listener.flush()
    assert heard.empty()


async def test_what_waits_to_be_written_when_the_connection_is_lost_is_forgotten(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker, listener = await connect(mesh, "coordinator"), await connect(mesh, "coordinator")
    subject, heard, again = unique("core"), asyncio.Queue[bytes](), asyncio.Event()
    await listener.subscribe(subject, lambda message: heard.put_nowait(message.data))
    await listener.flush()
    broker.on_reconnect(again.set)
    broker.send(subject, b"waits for the end of this turn of the loop")
    await broker._wire._process_op_err(ConnectionError("lost in the same turn"))
    async with asyncio.timeout(5):
        await again.wait()
        broker.send(subject, b"after")
        assert await heard.get() == b"after"


async def test_a_durable_write_is_tried_until_the_server_is_back_and_stored_once(
    fresh_mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker = await connect(fresh_mesh, "coordinator")
    away, unknown = event_subject(unique), event_subject(unique)
    stop(fresh_mesh.server.pid)
    in_flight = asyncio.create_task(broker.publish(unknown, b"the outcome is unknown", headers=ONCE))
    await asyncio.sleep(0)
    await kill(fresh_mesh)
    while_away = asyncio.create_task(broker.publish(away, b"the server is away", headers=ONCE))
    await asyncio.sleep(0)
    await fresh_mesh.server.start()
    async with within(5.0):
        for write, subject, content in (
            (while_away, away, b"the server is away"),
            (in_flight, unknown, b"the outcome is unknown"),
        ):
            sequence = await write
            stored = await broker.last(STREAM, subject)
            assert stored is not None
            assert (stored.seq, stored.data, stored.subject) == (sequence, content, subject)
    info = await broker.api(f"STREAM.INFO.{STREAM}", {"subjects_filter": "mesh.event.>"})
    assert info["state"]["subjects"] == {away: 1, unknown: 1}


async def test_subscriptions_may_be_opened_and_closed_while_the_server_is_away(
    fresh_mesh: BrokerMesh, connect: Connect
) -> None:
    broker = await connect(fresh_mesh, "coordinator")
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    gone = await broker.subscribe("t.gone", lambda message: heard.put_nowait(b"gone"))
    await kill(fresh_mesh)
    await eventually(lambda: not broker.connected)
    await gone.close()
    await broker.subscribe("t.new", lambda message: heard.put_nowait(message.data))
    with pytest.raises(Unreachable):
        await broker.flush()
    await fresh_mesh.server.start()
    await broker.wait_connected(5.0)
    await broker.flush()
    broker.send("t.gone", b"x")
    broker.send("t.new", b"new")
    async with asyncio.timeout(5):
        assert await heard.get() == b"new"
    await gone.close()


async def test_one_callback_that_raises_keeps_no_other_from_hearing_of_the_reconnect(
    fresh_mesh: BrokerMesh, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await connect(fresh_mesh, "coordinator")
    told: asyncio.Queue[str] = asyncio.Queue()

    def fail() -> None:
        raise LookupError("a callback that fails")

    for register, name in ((broker.on_lost, "lost"), (broker.on_reconnect, "reconnect")):
        register(fail)
        register(lambda name=name: told.put_nowait(name))  # type: ignore[misc]
        register(lambda: told.put_nowait("undone"))()
    await kill(fresh_mesh)
    await fresh_mesh.server.start()
    async with asyncio.timeout(5):
        assert [await told.get(), await told.get()] == ["lost", "reconnect"]
    assert told.empty()
    assert "a callback that fails" in caplog.text


# Who connects --------------------------------------------------------------------------------------


async def test_an_unknown_identity_is_refused_at_once_and_leaves_nothing_behind(
    mesh: BrokerMesh, tmp_path: Path
) -> None:
    ensure_seed(tmp_path / "ghost.nk")
    before = others()
    async with within(0.0):
        with pytest.raises(NotAuthenticated, match="ghost"):
            await Broker.connect(ConnectionSettings(mesh.url, "ghost", tmp_path / "ghost.nk"), timeout=30)
    assert others() <= before


async def test_an_identity_that_is_revoked_while_connected_is_told_why(
    fresh_mesh: BrokerMesh, connect: Connect
) -> None:
    broker = await connect(fresh_mesh, "local")
    answer = asyncio.create_task(broker.request(subjects.live("local", "o").replace(">", "x"), timeout=30))
    service = await connect(fresh_mesh, "coordinator")
    asked = asyncio.Event()
    await service.subscribe("mesh.rpc.*.*.*", lambda _: asked.set())
    await service.flush()
    with pytest.raises(Unreachable):
        await answer
    answer = asyncio.create_task(broker.request(subjects.rpc("a", "GetTask", "local"), timeout=30))
    await asked.wait()
    await fresh_mesh.server.revoke("local")
    async with asyncio.timeout(5):
        await broker.closed.wait()
        with pytest.raises((NotAuthenticated, Unreachable)):
            await answer
    assert isinstance(broker.failure, NotAuthenticated)
    assert not broker.connected
    for call in (
        broker.request("mesh.rpc.a.GetTask.local"),
        broker.publish("mesh.task.a.00.local.x", b""),
        broker.last(STREAM, "mesh.event.a.b.local.o"),
        broker.flush(),
        broker.wait_connected(1.0),
        broker.subscribe("mesh.live.local.>", lambda _: None),
    ):
        async with within(0.0):
            with pytest.raises(NotAuthenticated):
                await call


async def test_an_identity_that_was_revoked_while_the_server_was_away_is_told_when_it_is_back(
    fresh_mesh: BrokerMesh, connect: Connect
) -> None:
    before = others()
    broker = await fresh_mesh.connect("local")
    write = asyncio.create_task(broker.request("mesh.rpc.a.GetTask.local", timeout=30))
    await asyncio.wait([write])
    assert isinstance(write.exception(), Unreachable)
    await kill(fresh_mesh)
    await fresh_mesh.server.revoke("local")
    write = asyncio.create_task(broker.publish("mesh.task.a.00.local.x", b"", timeout=30))  # type: ignore[arg-type]
    await fresh_mesh.server.start()
    async with asyncio.timeout(5):
        await broker.closed.wait()
        with pytest.raises(NotAuthenticated):
            await write
    assert isinstance(broker.failure, NotAuthenticated)
    await eventually(lambda: others() <= before)
    await broker.close()


async def test_a_dead_port_is_unreachable_by_the_deadline_and_says_why(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can
        url = f"nats://127.0.0.1:{taken.getsockname()[1]}"
        before = others()
        async with within(0.4):
            with pytest.raises(Unreachable, match=r"no broker at .*127.0.0.1") as raised:
                await Broker.connect(ConnectionSettings(url, "local"), timeout=0.4)
        assert re.search("Connect call failed|Connection refused", str(raised.value))
        assert others() <= before


async def test_a_server_that_says_nothing_is_unreachable_by_the_deadline(impatient: None) -> None:
    before = others()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"nats://127.0.0.1:{silent.getsockname()[1]}"
        async with within(1.2):
            with pytest.raises(Unreachable):
                await Broker.connect(ConnectionSettings(url, "local"), timeout=1.2)
    await eventually(lambda: others() <= before)


async def test_connecting_can_be_cancelled_and_leaves_nothing_behind() -> None:
    came, left = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        await reader.read()
        left.set()
        writer.close()

    before = others()
    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server, asyncio.timeout(5):
        url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        connecting = asyncio.create_task(Broker.connect(ConnectionSettings(url, "local"), timeout=30))
        await came.wait()
        connecting.cancel()
        await asyncio.wait([connecting])
        assert connecting.cancelled()
        await left.wait()
    await eventually(lambda: others() <= before)


async def test_of_several_servers_one_that_answers_is_enough(mesh: BrokerMesh) -> None:
    known = mesh.settings("local")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        urls = f"nats://127.0.0.1:{taken.getsockname()[1]}, {known.url}"
        broker = await Broker.connect(ConnectionSettings(urls, "local", known.seed_file))
    try:
        await broker.flush()
    finally:
        await broker.close()
