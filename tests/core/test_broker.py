"""The connection: what is promised of requests, writes and subscriptions, and of its end."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from nats.errors import ProtocolError

from weft.core.broker import Delivered, raise_api_error, sequence_of
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh
from weft.testing.outages import Connect, event_subject, kill, others, stalled, within, works
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.errors import (
    JETSTREAM_CODES,
    ApiError,
    Backpressure,
    BrokerError,
    Conflict,
    InvalidName,
    InvalidRequest,
    TimedOut,
    TooLarge,
    Unreachable,
)
from weft_protocols.resources import STREAM

pytestmark = pytest.mark.anyio

ONCE = h.block(h.fields({h.EXPECTED_SEQUENCE: "0"}))


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

    async def send() -> None:
        other = await mesh.connect("coordinator")
        for _ in range(200):
            other.send(subject, bytes(20_000))
        await other.flush()
        await other.close()

    meanwhile = threading.Thread(target=asyncio.run, args=(send(),))
    meanwhile.start()
    meanwhile.join(10)  # nothing is read here meanwhile
    assert not heard
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
