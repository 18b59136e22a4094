"""The connection: what is promised of requests, writes and subscriptions while servers stall, die and come back."""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nats.errors import ProtocolError

from weft.core import broker as broker_module
from weft.core import wire as wire_module
from weft.core.broker import WINDOW, Broker, Delivered, raise_api_error, sequence_of
from weft.core.config import ConnectionSettings
from weft.core.keys import ensure_seed
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.errors import (
    JETSTREAM_CODES,
    ApiError,
    Backpressure,
    BrokerError,
    Conflict,
    InvalidName,
    InvalidRequest,
    NotAuthenticated,
    TimedOut,
    TooLarge,
    Unreachable,
    WeftError,
)
from weft_protocols.resources import STREAM

pytestmark = pytest.mark.anyio

Connect = Callable[[BrokerMesh, str], Awaitable[Broker]]
ONCE = h.block(h.fields({h.EXPECTED_SEQUENCE: "0"}))
SLACK = 2.0
"""Seconds a busy machine may add to a deadline."""


@pytest.fixture
async def connect(anyio_backend: str) -> AsyncIterator[Connect]:
    """Connections that are closed when the test is over."""
    opened: list[Broker] = []

    async def open_one(mesh: BrokerMesh, identity: str = "coordinator") -> Broker:
        opened.append(await mesh.connect(identity))
        return opened[-1]

    yield open_one
    for broker in opened:
        await broker.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stalled server is noticed in about a second instead of fifteen."""
    monkeypatch.setattr(broker_module, "PING_INTERVAL", 0.2)
    monkeypatch.setattr(broker_module, "CONNECT_ATTEMPT", 0.5)


def stop(pid: int) -> None:
    """Have the server stand still; it does when this returns."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)


@contextmanager
def stalled(mesh: BrokerMesh) -> Iterator[None]:
    """The server stands still, its connections open."""
    pid = mesh.server.pid
    stop(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def kill(mesh: BrokerMesh) -> None:
    os.kill(mesh.server.pid, signal.SIGKILL)
    await mesh.server.wait()


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    begun = time.monotonic()
    async with asyncio.timeout(seconds + SLACK):
        yield
    assert time.monotonic() - begun <= seconds + SLACK


def event_subject(unique: Callable[[str], str]) -> str:
    """A subject of the stream that nothing else uses."""
    return subjects.event(unique("agent"), ids.digest(unique("t").encode())[:32], "local", "o")


def others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def works(broker: Broker) -> None:
    assert (await broker.api("INFO"))["type"] == "io.nats.jetstream.api.v1.account_info_response"


# The reader ----------------------------------------------------------------------------------------


async def test_a_flush_that_timed_out_or_was_cancelled_does_not_deafen_the_connection(
    fresh_mesh: BrokerMesh, connect: Connect
) -> None:
    broker = await connect(fresh_mesh, "coordinator")
    with stalled(fresh_mesh):
        with pytest.raises(TimedOut):
            await broker.flush(timeout=0.05)
        cancelled = asyncio.create_task(broker.flush(timeout=30))
        waiting = asyncio.create_task(broker.flush(timeout=30))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
    await waiting
    await works(broker)
    assert broker.connected


async def test_an_exception_in_a_handler_is_reported_and_the_next_message_comes(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    broker = await connect(mesh, "coordinator")
    subject, heard = unique("raise"), asyncio.Queue[bytes]()

    def handler(message: Delivered) -> None:
        if message.data == b"bad":
            raise LookupError("this message is bad")
        heard.put_nowait(message.data)

    await broker.subscribe(subject, handler)
    broker.send(subject, b"bad")
    broker.send(subject, b"good")
    async with asyncio.timeout(5):
        assert await heard.get() == b"good"
    assert "this message is bad" in caplog.text


@pytest.mark.parametrize("error", [LookupError("not expected"), ProtocolError(), asyncio.CancelledError()])
async def test_a_reader_that_ends_for_any_reason_is_replaced(
    mesh: BrokerMesh, connect: Connect, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    broker = await connect(mesh, "coordinator")
    again = asyncio.Event()
    broker.on_reconnect(again.set)

    async def fail(data: bytes = b"") -> None:
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(broker._wire._ps, "parse", fail)
    async with within(0.0):
        with pytest.raises(Unreachable):
            await broker.request("$JS.API.INFO", timeout=30)
    async with asyncio.timeout(5):
        await again.wait()
    await works(broker)


async def test_an_error_of_the_server_that_is_no_refusal_does_not_end_the_connection(
    mesh: BrokerMesh, connect: Connect
) -> None:
    broker = await connect(mesh, "coordinator")
    again = asyncio.Event()
    broker.on_reconnect(again.set)
    transport = broker._wire._transport
    assert transport is not None
    transport.write(b"PUB x 99999999\r\n")  # over the server's limit: it says so and hangs up
    async with asyncio.timeout(5):
        await again.wait()
    assert not broker.closed.is_set()
    await works(broker)


async def test_answers_that_came_while_the_loop_was_blocked_count(mesh: BrokerMesh, connect: Connect) -> None:
    broker = await connect(mesh, "coordinator")
    answer = broker.publish_once("$JS.API.INFO", b"", timeout=0.3)
    await asyncio.sleep(0)  # the request leaves
    time.sleep(0.8)  # noqa: ASYNC251 - a handler that computes
    data, _ = await answer
    assert b"account_info_response" in data


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


# Errors --------------------------------------------------------------------------------------------


async def test_a_conditional_write_that_loses_is_a_conflict(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker = await connect(mesh, "coordinator")
    subject = event_subject(unique)
    await broker.publish(subject, b"first", headers=ONCE)
    with pytest.raises(Conflict, match="10071"):
        await broker.publish(subject, b"second", headers=ONCE)


async def test_a_full_stream_is_backpressure_at_once(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker = await connect(mesh, "coordinator")
    name = unique("full")
    await broker.api(
        f"STREAM.CREATE.{name}", {"name": name, "subjects": [f"{name}.>"], "max_msgs": 1, "discard": "new"}
    )
    try:
        await broker.publish(f"{name}.a", b"x")
        async with within(0.0):
            with pytest.raises(Backpressure):
                await broker.publish(f"{name}.b", b"x")
    finally:
        await broker.api(f"STREAM.DELETE.{name}")


@pytest.mark.parametrize(("code", "known"), JETSTREAM_CODES.items())
def test_every_known_code_has_its_type(code: int, known: Any) -> None:
    ack = json.dumps({"error": {"code": 400, "err_code": code, "description": known.meaning}, "stream": "S", "seq": 0})
    with pytest.raises(known.error, match=str(code)) as raised:
        sequence_of(ack.encode())
    assert type(raised.value) is known.error


def test_other_codes_are_api_errors_with_the_code_but_for_unavailability() -> None:
    with pytest.raises(ApiError) as raised:
        raise_api_error({"code": 404, "err_code": 10059, "description": "stream not found"})
    assert (raised.value.err_code, raised.value.code) == (10059, 404)
    with pytest.raises(Unreachable):
        raise_api_error({"code": 503, "err_code": 10999, "description": "something is not available"})


@pytest.mark.parametrize(
    ("ack", "sequence"),
    [
        (b'{"stream":"MESH","seq":7}', 7),
        (b'{"stream":"MESH", "domain":"d", "seq": 12345678901, "duplicate": true}', 12345678901),
    ],
)
def test_the_sequence_of_an_acknowledgement_is_read(ack: bytes, sequence: int) -> None:
    assert sequence_of(ack) == sequence


def test_an_answer_that_is_no_acknowledgement_is_an_error() -> None:
    with pytest.raises(ApiError, match="not an acknowledgement"):
        sequence_of(b"hello")


async def test_an_api_error_carries_its_code(mesh: BrokerMesh, connect: Connect) -> None:
    broker = await connect(mesh, "coordinator")
    with pytest.raises(ApiError) as raised:
        await broker.api("STREAM.INFO.NOPE")
    assert raised.value.err_code == 10059


async def test_a_subject_nobody_serves_is_unreachable_at_once(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    for identity in ("coordinator", "local"):
        broker = await connect(mesh, identity)
        async with within(0.0):
            with pytest.raises(Unreachable, match="nobody serves"):
                await broker.request(subjects.rpc(unique("agent"), "GetTask", "local"), timeout=30)


async def test_a_message_over_the_limit_is_refused_and_the_connection_lives(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker = await connect(mesh, "coordinator")
    lost = asyncio.Event()
    broker.on_lost(lost.set)
    size = broker.max_payload
    await broker.publish(event_subject(unique), bytes(size))
    await broker.publish(event_subject(unique), bytes(size - len(ONCE)), headers=ONCE)
    for body, block in ((bytes(size + 1), None), (bytes(size), ONCE)):
        with pytest.raises(TooLarge, match=str(size)):
            await broker.publish(event_subject(unique), body, headers=block)
        with pytest.raises(TooLarge):
            broker.send("t.large", body, headers=block)
    await works(broker)
    assert not lost.is_set()


async def test_no_header_and_no_subject_can_forge_another_command(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker, listener = await connect(mesh, "coordinator"), await connect(mesh, "coordinator")
    victim, heard = unique("victim"), list[bytes]()
    await listener.subscribe(f"{victim}.>", lambda message: heard.append(message.data))
    await listener.flush()
    forged = f"x 0\r\n\r\nPUB {victim}.forged 4\r\nevil\r\nPUB x"
    for value in (f"1\r\n\r\n\r\nPUB {victim}.header 4\r\nevil", "1\n2", "1\r2", "1\0"):
        with pytest.raises(InvalidRequest):
            h.fields({"Weft-Note": value})
        with pytest.raises(InvalidRequest):
            h.fields({f"A: {value}": "x"})
    for subject in (forged, "a b", "a\tb", "a\nb", "a\rb", ""):
        with pytest.raises(InvalidName):
            broker.send(subject, b"x")
        with pytest.raises(InvalidName):
            await broker.request(subject, timeout=1)
        with pytest.raises(InvalidName):
            await broker.publish(subject, b"x")
        with pytest.raises(InvalidName):
            await broker.subscribe(subject, lambda _: None)
    with pytest.raises(InvalidName):
        await broker.subscribe("fine", lambda _: None, queue="a b")
    await broker.flush()
    await listener.flush()
    assert heard == []


async def test_what_the_broker_appends_counts_and_not_what_a_writer_forged(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker = await connect(mesh, "coordinator")
    subject = event_subject(unique)
    forged = {h.SEQUENCE: "1", h.SUBJECT: "mesh.claim.a.b", h.TIMESTAMP: "1970-01-01T00:00:00Z", h.EVENT: "3"}
    sequence = await broker.publish(subject, b"x", headers=h.block(h.fields(forged)))
    stored = await broker.last(STREAM, subject)
    assert stored is not None
    assert (stored.seq, stored.subject) == (sequence, subject)
    assert stored.time.startswith("20")
    assert await broker.last(STREAM, event_subject(unique)) is None


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


# Requests and subscriptions ------------------------------------------------------------------------


async def test_a_request_that_was_given_up_disturbs_no_other(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker, server = await connect(mesh, "coordinator"), await connect(mesh, "coordinator")
    service, asked = unique("echo"), asyncio.Queue[Delivered]()
    await server.subscribe(service, asked.put_nowait)
    await server.flush()
    cancelled = asyncio.create_task(broker.request(service, b"cancelled", timeout=30))
    late = asyncio.create_task(broker.request(service, b"late", timeout=0.2))
    messages = [await asked.get(), await asked.get()]
    cancelled.cancel()
    async with within(0.3):
        with pytest.raises(TimedOut):
            await late
    answered = asyncio.create_task(broker.request(service, b"answered", timeout=30))
    messages.append(await asked.get())
    for message in messages:
        server.send(message.reply, b"to " + message.data)
    assert (await answered).data == b"to answered"
    assert cancelled.cancelled()


async def test_headers_and_data_arrive_as_they_were_sent(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker = await connect(mesh, "coordinator")
    subject, heard = unique("bytes"), asyncio.Queue[Delivered]()
    await broker.subscribe(subject, heard.put_nowait)
    block = h.block(h.fields({"A": "größe", "B": ""}))
    for data in (b"", b"\r\n", b"MSG x 1 1\r\n", bytes(range(256)) * 3000):
        broker.send(subject, data, headers=block, reply="to.me")
        broker.send(subject, data)
        first, second = await heard.get(), await heard.get()
        assert (first.data, first.headers, first.reply, first.subject) == (data, block, "to.me", subject)
        assert (second.data, second.headers, second.reply) == (data, None, "")


async def test_members_of_a_queue_share_the_messages(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    members = [await connect(mesh, "coordinator") for _ in range(2)]
    subject, heard = unique("queue"), list[tuple[int, bytes]]()
    for i, member in enumerate(members):
        await member.subscribe(subject, lambda message, i=i: heard.append((i, message.data)), queue="q")  # type: ignore[misc]
        await member.flush()
    for n in range(60):
        members[0].send(subject, b"%d" % n)
    await members[0].flush()
    await eventually(lambda: len(heard) == 60)
    assert sorted(int(data) for _, data in heard) == list(range(60))


async def test_a_subscription_that_is_drained_hands_over_what_was_sent_before(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker, sender = await connect(mesh, "coordinator"), await connect(mesh, "coordinator")
    subject, heard = unique("drain"), list[bytes]()
    subscription = await broker.subscribe(subject, lambda message: heard.append(message.data))
    await broker.flush()
    for _ in range(200):
        sender.send(subject, bytes(20_000))
    await sender.flush()
    assert len(heard) < 200, "nothing was under way"
    await subscription.drain()
    assert len(heard) == 200
    sender.send(subject, b"late")
    await sender.flush()
    await broker.flush()
    assert len(heard) == 200
    await subscription.drain()


async def test_a_subscription_is_heard_before_what_is_sent_after_it(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    broker = await connect(mesh, "coordinator")
    for _ in range(50):
        subject, heard = unique("order"), asyncio.Queue[bytes]()
        await broker.subscribe(subject, lambda message, heard=heard: heard.put_nowait(message.data))  # type: ignore[misc]
        broker.send(subject, b"x")
        async with asyncio.timeout(5):
            assert await heard.get() == b"x"


# The end -------------------------------------------------------------------------------------------


async def test_closing_fails_what_is_under_way_and_leaves_no_task(
    mesh: BrokerMesh, unique: Callable[[str], str]
) -> None:
    before = others()
    broker = await mesh.connect("coordinator")
    subject, asked = unique("silent"), asyncio.Event()
    lost: list[bool] = []
    broker.on_lost(lambda: lost.append(broker.closed.is_set()))
    await broker.subscribe(subject, lambda _: asked.set())
    request = asyncio.create_task(broker.request(subject, timeout=30))
    await asked.wait()
    broker.send(unique("last"), b"words")
    await broker.close()
    with pytest.raises(Unreachable):
        await request
    assert broker.closed.is_set()
    assert broker.failure is None
    assert lost == [True]
    await eventually(lambda: others() <= before, timeout=1.0)
    await broker.close()
    for call in (broker.request(subject), broker.publish(subject, b""), broker.flush(), broker.wait_connected(30.0)):
        async with within(0.0):
            with pytest.raises(Unreachable):
                await call
    with pytest.raises(Unreachable):
        broker.send(subject)


async def test_what_was_sent_before_closing_arrives(
    mesh: BrokerMesh, connect: Connect, unique: Callable[[str], str]
) -> None:
    listener = await connect(mesh, "coordinator")
    subject, heard = unique("last"), list[bytes]()
    await listener.subscribe(subject, lambda message: heard.append(message.data))
    await listener.flush()
    broker = await mesh.connect("coordinator")
    for n in range(500):
        broker.send(subject, bytes(1000) + b"%d" % n)
    await broker.close()
    await eventually(lambda: len(heard) == 500)


async def test_closing_does_not_wait_for_a_server_that_does_not_read(fresh_mesh: BrokerMesh) -> None:
    before = others()
    broker = await fresh_mesh.connect("coordinator")
    with stalled(fresh_mesh):
        for _ in range(200):
            broker.send("t.fill", bytes(64 * 1024))
        async with within(2.0):  # the flush of close
            await broker.close()
        await eventually(lambda: others() <= before, timeout=1.0)


async def test_closing_while_reconnecting_ends_the_attempts(fresh_mesh: BrokerMesh) -> None:
    before = others()
    broker = await fresh_mesh.connect("coordinator")
    await kill(fresh_mesh)
    await eventually(lambda: not broker.connected)
    write = asyncio.create_task(broker.publish("mesh.event.a.b.c.d", b"", timeout=30))
    await asyncio.sleep(0)
    async with within(0.5):
        await broker.close()
        with pytest.raises(BrokerError):
            await write
    await eventually(lambda: others() <= before, timeout=1.0)


async def test_the_log_says_nothing_loud_of_an_ordinary_life(
    fresh_mesh: BrokerMesh, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await connect(fresh_mesh, "coordinator")
    await works(broker)
    await kill(fresh_mesh)
    await fresh_mesh.server.start()
    await broker.wait_connected(5.0)
    await broker.close()
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
