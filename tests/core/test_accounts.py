"""What a hostile agent or caller can do to the others: nothing.

Every refusal has its counterpart in the attacker's own name, so that it cannot pass for want of a server,
a stream or a subscriber. `mallory` and `eve` attack, `victor` and `vera` have a task between them.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from weft.core import blobs
from weft.core.broker import Broker, Delivered
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh, unique_name
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.accounts import ACK, CONNECTED, DIRECT_GET, DISCONNECTED, NEXT
from weft_protocols.errors import ApiError, TimedOut, Unreachable
from weft_protocols.resources import BLOBS, STREAM

pytestmark = pytest.mark.anyio

DEADLINE = 5.0
SILENCE = 0.5
"""Seconds to wait for an answer where the server refuses without one."""
DIGEST = "d" * 64
NO_WAIT = b'{"batch": 1, "no_wait": true}'


@dataclass
class Cast:
    """Two agents, two callers, somebody of the mesh who sees everything, and a task of vera at victor."""

    mallory: Broker
    """A hostile agent."""
    eve: Broker
    """A hostile caller."""
    victor: Broker
    """An honest agent."""
    vera: Broker
    """An honest caller."""
    coordinator: Broker
    task: str
    seen: list[Delivered] = field(default_factory=list)
    """Everything on `mesh.>`, and every change of a stream, inside account MESH."""
    at_victor: list[Delivered] = field(default_factory=list)
    """Everything on `mesh.>` inside victor's account."""
    at_vera: list[Delivered] = field(default_factory=list)

    def name(self, who: str) -> str:
        return str(getattr(self, who).settings.identity)

    def fill(self, template: str) -> str:
        """`{mallory}`, `{task}`, `{own}` and so on replaced."""
        names = {who: self.name(who) for who in ("mallory", "eve", "victor", "vera")}
        return template.format(**names, task=self.task, digest=DIGEST)

    def broker(self, who: str) -> Broker:
        broker: Broker = getattr(self, who)
        return broker

    async def stream(self, name: str = STREAM) -> dict[str, Any]:
        """State of a stream."""
        return dict((await self.coordinator.api(f"STREAM.INFO.{name}"))["state"])

    async def settled(self) -> None:
        """Return when everything sent so far has been processed and delivered: a round of pings."""
        for _ in range(2):
            for who in ("mallory", "eve", "coordinator", "victor", "vera"):
                await self.broker(who).flush()

    def forget(self) -> None:
        for seen in (self.seen, self.at_victor, self.at_vera):
            seen.clear()


@pytest.fixture(scope="module")
async def cast(mesh: BrokerMesh) -> AsyncIterator[Cast]:
    names = {who: unique_name(who) for who in ("mallory", "eve", "victor", "vera")}
    await mesh.add_caller(names["eve"], names["vera"])
    await mesh.add_agent(names["mallory"], names["victor"])
    async with contextlib.AsyncExitStack() as stack:

        async def connect(name: str) -> Broker:
            broker = await mesh.connect(name)
            stack.push_async_callback(broker.close)
            return broker

        made = Cast(
            mallory=await connect(names["mallory"]),
            eve=await connect(names["eve"]),
            victor=await connect(names["victor"]),
            vera=await connect(names["vera"]),
            coordinator=await connect("coordinator"),
            task=ids.task_id(names["vera"], names["victor"], "1"),
        )
        await made.vera.publish(made.fill("mesh.task.{victor}.00.{vera}.{task}"), b"secret task")
        await made.vera.publish(made.fill("mesh.blob.{vera}.{digest}.0"), b"secret blob")
        await made.victor.publish(made.fill("mesh.claim.{victor}.{task}"), b"secret claim")
        await made.victor.publish(made.fill("mesh.step.{victor}.{task}.one"), b"secret step")
        await made.victor.publish(made.fill("mesh.event.{victor}.{task}.{vera}.o"), b"secret event")
        await made.coordinator.subscribe("mesh.>", made.seen.append)
        for write in ("CREATE", "DELETE", "PURGE", "UPDATE"):
            await made.coordinator.subscribe(f"$JS.API.STREAM.{write}.>", made.seen.append)
        await made.victor.subscribe("mesh.>", made.at_victor.append)
        await made.vera.subscribe("mesh.>", made.at_vera.append)
        await made.settled()
        yield made


@pytest.fixture(autouse=True)
async def _clean(cast: Cast) -> None:
    await cast.settled()
    cast.forget()


# Writing -------------------------------------------------------------------------------------------

OWN_WRITES = {
    "mallory": (
        "mesh.task.{victor}.00.{mallory}.{task}",
        "mesh.task.{mallory}.00.{mallory}.{task}",
        "mesh.input.{victor}.00.{mallory}.{task}",
        "mesh.claim.{mallory}.{task}",
        "mesh.event.{mallory}.{task}.{vera}.o",
        "mesh.step.{mallory}.{task}.one",
        "mesh.blob.{mallory}.{digest}.0",
    ),
    "eve": (
        "mesh.task.{victor}.00.{eve}.{task}",
        "mesh.input.{victor}.00.{eve}.{task}",
        "mesh.blob.{eve}.{digest}.0",
    ),
}
FOREIGN_WRITES = {
    "mallory": (
        "mesh.task.{victor}.00.{vera}.{task}",
        "mesh.task.{mallory}.00.{vera}.{task}",
        "mesh.task.{mallory}.00.{victor}.{task}",
        "mesh.input.{victor}.00.{vera}.{task}",
        "mesh.claim.{victor}.{task}",
        "mesh.event.{victor}.{task}.{vera}.o",
        "mesh.event.{victor}.{task}.{mallory}.o",
        "mesh.step.{victor}.{task}.one",
        "mesh.step.{victor}.{task}.two",
        "mesh.blob.{vera}.{digest}.0",
        "mesh.task.{victor}.00.operator.{task}",
        "mesh.push.{mallory}.{victor}.{task}.hook",
        "mesh.push.{vera}.{victor}.{task}.hook",
        "mesh.pushed.{vera}.{victor}.{task}.hook",
        "mesh.task.{victor}.00.coordinator.{task}",
    ),
    "eve": (
        "mesh.task.{victor}.00.{vera}.{task}",
        "mesh.input.{victor}.00.{vera}.{task}",
        "mesh.claim.{victor}.{task}",
        "mesh.claim.{eve}.{task}",
        "mesh.push.{eve}.{victor}.{task}.hook",
        "mesh.push.{vera}.{victor}.{task}.hook",
        "mesh.event.{victor}.{task}.{eve}.o",
        "mesh.event.{eve}.{task}.{eve}.o",
        "mesh.step.{victor}.{task}.one",
        "mesh.blob.{vera}.{digest}.0",
    ),
}


def _cases(table: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(who, subject) for who, all_subjects in table.items() for subject in all_subjects]


@pytest.mark.parametrize(("who", "subject"), _cases(OWN_WRITES))
async def test_everybody_writes_in_their_own_name(cast: Cast, who: str, subject: str) -> None:
    before = await cast.stream(BLOBS if "blob" in subject else STREAM)
    sequence = await cast.broker(who).publish(cast.fill(subject), b"own")
    assert sequence == before["last_seq"] + 1


@pytest.mark.parametrize(("who", "subject"), _cases(FOREIGN_WRITES))
async def test_nobody_writes_in_anothers_name(cast: Cast, who: str, subject: str) -> None:
    before = await cast.stream(), await cast.stream(BLOBS)
    with pytest.raises(Unreachable):
        await cast.broker(who).request(cast.fill(subject), b"forged", timeout=DEADLINE)
    cast.broker(who).send(cast.fill(subject), b"forged")
    await cast.settled()
    assert (await cast.stream(), await cast.stream(BLOBS)) == before
    assert cast.seen == []
    assert cast.at_victor == []


@pytest.mark.parametrize("subject", ["mesh.live.{vera}.o.{victor}.{task}", "mesh.ctl.{victor}.replica"])
@pytest.mark.parametrize("who", ["mallory", "eve"])
async def test_what_only_the_mesh_may_say_nobody_else_can(cast: Cast, who: str, subject: str) -> None:
    cast.broker(who).send(cast.fill(subject), b"forged")
    await cast.settled()
    assert (cast.seen, cast.at_victor, cast.at_vera) == ([], [], [])
    cast.coordinator.send(cast.fill(subject), b"genuine")
    await cast.settled()
    assert [one.data for one in (*cast.at_victor, *cast.at_vera)] == [b"genuine"]


@pytest.mark.parametrize(
    "subject",
    [
        "mesh.rpc.{victor}.GetTask.{who}",
        "mesh.coord.lock.{who}",
        "mcp.v1.req.default.{who}.files.tools.call.read",
        "mcp.v1.req.default.{who}._.tools.list._",
        "mcp.v1.ctl.default.{who}.r1",
    ],
)
@pytest.mark.parametrize("who", ["mallory", "eve"])
async def test_a_request_carries_the_name_of_whoever_sends_it(cast: Cast, who: str, subject: str) -> None:
    def answer(request: Delivered) -> None:
        cast.coordinator.send(request.reply, request.subject.encode())

    pattern = cast.fill(subject.replace("{who}", "*"))
    serving = await cast.coordinator.subscribe(pattern, answer)
    await cast.coordinator.flush()
    own = cast.fill(subject.replace("{who}", f"{{{who}}}"))
    assert (await cast.broker(who).request(own, timeout=DEADLINE)).data == own.encode()
    for other in ("{vera}", "{victor}", "operator", "*"):
        with pytest.raises(Unreachable):
            await cast.broker(who).request(cast.fill(subject.replace("{who}", other)), timeout=DEADLINE)
    await serving.close()


@pytest.mark.parametrize("pattern", ["mesh.rpc.>", "mesh.coord.>", "mcp.>", ">"])
@pytest.mark.parametrize("who", ["mallory", "eve"])
async def test_nobody_outside_the_mesh_gets_requests_to_answer(cast: Cast, who: str, pattern: str) -> None:
    overheard: list[Delivered] = []
    listening = await cast.broker(who).subscribe(pattern, overheard.append)
    await cast.broker(who).flush()
    tools = "mcp.v1.req.default.{vera}.files.tools.call.read"
    for subject in ("mesh.rpc.{victor}.GetTask.{vera}", "mesh.coord.lock.{vera}", tools):
        cast.vera.send(cast.fill(subject), b"secret", reply=cast.vera.new_inbox())
    await cast.settled()
    assert overheard == []
    assert [one.data for one in cast.seen] == [b"secret", b"secret"]
    await listening.close()


FORBIDDEN_HEADERS = {
    "Nats-Rollup": ({"Nats-Rollup": "all"}, 10111),
    "Nats-Rollup of a subject": ({"Nats-Rollup": "sub"}, 10111),
    "Nats-TTL": ({"Nats-TTL": "1"}, 10166),
    "Nats-Schedule": (
        {"Nats-Schedule": "@at 2030-01-01T00:00:00Z", "Nats-Schedule-Target": "mesh.claim.x.y"},
        10188,
    ),
    "Nats-Batch-Id": ({"Nats-Batch-Id": "b", "Nats-Batch-Sequence": "1", "Nats-Batch-Commit": "1"}, 10174),
    "Nats-Incr": ({"Nats-Incr": "+1"}, 10168),
}


@pytest.mark.parametrize(("headers", "code"), FORBIDDEN_HEADERS.values(), ids=FORBIDDEN_HEADERS)
async def test_headers_that_erase_or_forge_are_refused_even_on_own_subjects(
    cast: Cast, headers: dict[str, str], code: int
) -> None:
    before = await cast.stream()
    subject = cast.fill("mesh.event.{mallory}.{task}.{vera}.o")
    with pytest.raises(ApiError) as refused:
        await cast.mallory.publish(subject, b"x", headers=h.block(h.fields(headers)), timeout=DEADLINE)
    assert refused.value.err_code == code
    assert await cast.stream() == before


# Wildcards in a subject one publishes to: the server takes them as text -----------------------------


@pytest.mark.parametrize(
    "subject", ["mesh.task.*.00.{eve}.*", "mesh.task.>.*.{eve}.*", "mesh.input.*.*.{eve}.>", "mesh.task.*.00.{eve}.x"]
)
async def test_a_task_for_every_agent_reaches_none(cast: Cast, subject: str) -> None:
    await cast.eve.publish(cast.fill(subject), b"for all")
    for lane in subjects.LANES:
        for who in ("mallory", "victor"):
            info = await cast.coordinator.api(f"CONSUMER.INFO.{STREAM}.{cast.name(who)}={lane}")
            pulled = await _pull(cast.broker(who), f"{NEXT}.{STREAM}.{cast.name(who)}={lane}", info["num_pending"] + 1)
            assert b"for all" not in {one.data for one in pulled}


@pytest.mark.parametrize(
    "subject",
    [
        "mesh.task.{victor}.00.*.{task}",
        "mesh.task.{victor}.00.>",
        "mesh.claim.*.{task}",
        "mesh.claim.>",
        "mesh.event.*.{task}.{vera}.o",
        "mesh.step.*.*.*",
        "mesh.>",
        ">",
    ],
)
async def test_a_wildcard_in_place_of_the_writer_is_not_the_writer(cast: Cast, subject: str) -> None:
    before = await cast.stream()
    with pytest.raises(Unreachable):
        await cast.mallory.request(cast.fill(subject), b"forged", timeout=DEADLINE)
    assert await cast.stream() == before


@pytest.mark.parametrize("origin", ["*", ">"])
async def test_an_event_for_every_caller_reaches_none(cast: Cast, origin: str) -> None:
    await cast.mallory.publish(cast.fill("mesh.event.{mallory}.{task}.*.") + origin, b"for all")
    await cast.settled()
    assert cast.at_vera == []
    await cast.mallory.publish(cast.fill("mesh.event.{mallory}.{task}.{vera}.o"), b"for vera")
    await cast.settled()
    assert [one.data for one in cast.at_vera] == [b"for vera"]


# Reading -------------------------------------------------------------------------------------------

OWN_READS = {
    "victor": ("mesh.claim.{victor}.{task}", "mesh.step.{victor}.{task}.one", "mesh.event.{victor}.{task}.{vera}.o"),
    "vera": ("mesh.event.{victor}.{task}.{vera}.o",),
}
FOREIGN_READS = {
    "mallory": (
        "mesh.claim.{victor}.{task}",
        "mesh.claim.*.*",
        "mesh.claim.>",
        "mesh.step.{victor}.{task}.one",
        "mesh.step.*.*.*",
        "mesh.event.{victor}.{task}.{vera}.o",
        "mesh.event.*.*.*.*",
        "mesh.event.>",
        "mesh.task.{victor}.00.{vera}.{task}",
        "mesh.task.>",
        "mesh.>",
        ">",
    ),
    "eve": (
        "mesh.claim.{victor}.{task}",
        "mesh.step.{victor}.{task}.one",
        "mesh.event.{victor}.{task}.{vera}.o",
        "mesh.event.*.*.*.*",
        "mesh.task.{victor}.00.{vera}.{task}",
        "mesh.task.{victor}.00.*.{task}",
    ),
    "vera": (
        "mesh.claim.{victor}.{task}",
        "mesh.step.{victor}.{task}.one",
        "mesh.task.{victor}.00.{vera}.{task}",
    ),
}


@pytest.mark.parametrize(("who", "subject"), _cases(OWN_READS))
async def test_everybody_reads_what_is_their_own(cast: Cast, who: str, subject: str) -> None:
    found = await cast.broker(who).last(STREAM, cast.fill(subject))
    assert found is not None
    assert found.data.startswith(b"secret")


@pytest.mark.parametrize(("who", "subject"), _cases(FOREIGN_READS))
async def test_nobody_reads_what_belongs_to_others(cast: Cast, who: str, subject: str) -> None:
    with pytest.raises(Unreachable):
        await cast.broker(who).request(f"{DIRECT_GET}.{STREAM}.{cast.fill(subject)}", timeout=DEADLINE)


async def test_a_wildcard_reads_nothing_but_ones_own(cast: Cast) -> None:
    await cast.mallory.publish(cast.fill("mesh.event.{mallory}.{task}.{eve}.o"), b"for eve")
    await cast.victor.publish(cast.fill("mesh.event.{victor}.{task}.{vera}.o"), b"secret event")
    for who, pattern, wanted in (
        ("eve", "mesh.event.*.*.{eve}.*", b"for eve"),
        ("mallory", "mesh.event.{mallory}.*.*.*", b"for eve"),
        ("vera", "mesh.event.*.*.{vera}.*", b"secret event"),
    ):
        reply = await cast.broker(who).request(f"{DIRECT_GET}.{STREAM}.{cast.fill(pattern)}", timeout=DEADLINE)
        assert reply.data == wanted


@pytest.mark.parametrize(
    "body", [{"seq": 1}, {"last_by_subj": "mesh.>"}, {"next_by_subj": "mesh.>", "seq": 1}, {"multi_last": ["mesh.>"]}]
)
async def test_a_read_in_own_name_cannot_ask_for_something_else_in_its_body(cast: Cast, body: dict[str, Any]) -> None:
    subject = f"{DIRECT_GET}.{STREAM}.{cast.fill('mesh.claim.{mallory}.{task}')}"
    reply = await cast.mallory.request(subject, json.dumps(body).encode(), timeout=DEADLINE)
    assert (reply.data, h.status(reply.headers)[0]) == (b"", 408)


async def test_whoever_knows_the_digest_reads_the_blob(cast: Cast) -> None:
    for who in ("mallory", "eve", "victor", "vera"):
        found = await cast.broker(who).last(BLOBS, cast.fill("mesh.blob.{vera}.{digest}.0"))
        assert found is not None
        assert found.data == b"secret blob"


@pytest.mark.parametrize("subject", ["mesh.blob.*.*.*", "mesh.blob.{vera}.*.*", "mesh.blob.*.*.>"])
async def test_a_blob_is_not_read_without_its_digest(cast: Cast, subject: str) -> None:
    """The broker answers a pattern with the newest blob of anybody; what it answers must tell nothing."""
    ref = await blobs.put(cast.vera, b"secret blob " * 100)
    stored = await cast.mallory.last(BLOBS, cast.fill(subject).replace(".>", ".*"))
    assert stored is not None, "the attack itself no longer works: the seal can go"
    assert b"secret" not in stored.data
    assert ref.sha256 not in stored.subject
    assert await blobs.get(cast.mallory, ref) == b"secret blob " * 100


@pytest.mark.parametrize("name", [h.SUBJECT, h.SEQUENCE, h.SUBJECT.upper()])
async def test_where_a_message_is_stored_is_the_brokers_word_not_its_writers(cast: Cast, name: str) -> None:
    subject = cast.fill("mesh.event.{mallory}.{task}.{vera}.forged")
    forged = h.block(h.fields({name: "1" if name == h.SEQUENCE else cast.fill("mesh.event.{victor}.{task}.{vera}.o")}))
    sequence = await cast.mallory.publish(subject, b"x", headers=forged)
    found = await cast.vera.last(STREAM, subject)
    assert found is not None
    assert (found.subject, found.seq) == (subject, sequence)


# Listening -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "mesh.event.>",
        "mesh.live.>",
        "mesh.live.{vera}.>",
        "mesh.live.{vera}.o.{victor}.{task}",
        "mesh.ctl.>",
        "mesh.ctl.{victor}.*",
        "mesh.task.>",
        "mesh.claim.>",
        "_INBOX_{vera}.>",
        "$JS.>",
        "_R_.>",
        ">",
    ],
)
async def test_nobody_overhears_the_others(cast: Cast, pattern: str) -> None:
    overheard: list[Delivered] = []
    listening = [await cast.broker(who).subscribe(cast.fill(pattern), overheard.append) for who in ("mallory", "eve")]
    await cast.settled()
    cast.forget()
    await cast.vera.publish(cast.fill("mesh.input.{victor}.00.{vera}.{task}"), b"secret input")
    await cast.victor.publish(cast.fill("mesh.event.{victor}.{task}.{vera}.o"), b"secret event")
    await cast.victor.publish(cast.fill("mesh.claim.{victor}.{task}"), b"secret claim")
    cast.coordinator.send(cast.fill("mesh.ctl.{victor}.replica"), b"secret word")
    await cast.vera.last(STREAM, cast.fill("mesh.event.{victor}.{task}.{vera}.o"))
    await cast.settled()
    assert [one.data for one in overheard if b"secret" in one.data] == []
    assert b"secret event" in [one.data for one in cast.at_vera]
    assert b"secret word" in [one.data for one in cast.at_victor]
    for one in listening:
        await one.close()


async def test_everybody_hears_what_is_meant_for_them(cast: Cast) -> None:
    heard: dict[str, list[str]] = {"mallory": [], "eve": []}

    def hear(who: str) -> Callable[[Delivered], None]:
        return lambda one: heard[who].append(one.subject)

    for who in heard:
        await cast.broker(who).subscribe(cast.fill(f"mesh.live.{{{who}}}.>"), hear(who))
    await cast.mallory.subscribe(cast.fill("mesh.ctl.{mallory}.*"), hear("mallory"))
    await cast.settled()
    await cast.victor.publish(cast.fill("mesh.event.{victor}.{task}.{eve}.o"), b"x")
    await cast.victor.publish(cast.fill("mesh.event.{victor}.{task}.{mallory}.o"), b"x")
    cast.coordinator.send(cast.fill("mesh.ctl.{mallory}.replica"), b"x")
    await cast.settled()
    assert heard == {
        "eve": [cast.fill("mesh.live.{eve}.o.{victor}.{task}")],
        "mallory": [cast.fill("mesh.live.{mallory}.o.{victor}.{task}"), cast.fill("mesh.ctl.{mallory}.replica")],
    }


# Pulling and acknowledging -------------------------------------------------------------------------


async def test_an_agent_pulls_and_acknowledges_its_own_work(cast: Cast) -> None:
    consumer = f"{cast.name('mallory')}=work"
    await cast.eve.publish(cast.fill("mesh.task.{mallory}.00.{eve}.{task}"), b"work")
    [*_, work] = await _pull(cast.mallory, f"{NEXT}.{STREAM}.{consumer}", 100)
    assert work.data == b"work"
    before = await cast.coordinator.api(f"CONSUMER.INFO.{STREAM}.{consumer}")
    await cast.mallory.request(work.reply, b"+ACK", timeout=DEADLINE)
    after = await cast.coordinator.api(f"CONSUMER.INFO.{STREAM}.{consumer}")
    assert after["num_ack_pending"] == before["num_ack_pending"] - 1


@pytest.mark.parametrize("lane", subjects.LANES)
@pytest.mark.parametrize("who", ["mallory", "eve", "vera"])
async def test_nobody_pulls_anothers_work(cast: Cast, who: str, lane: str) -> None:
    consumer = f"{cast.name('victor')}={lane}"
    before = (await cast.coordinator.api(f"CONSUMER.INFO.{STREAM}.{consumer}"))["delivered"]
    with pytest.raises(Unreachable):
        await cast.broker(who).request(f"{NEXT}.{STREAM}.{consumer}", NO_WAIT, timeout=DEADLINE)
    assert (await cast.coordinator.api(f"CONSUMER.INFO.{STREAM}.{consumer}"))["delivered"] == before


@pytest.mark.parametrize("word", [b"+ACK", b"-NAK", b"+TERM", b"+WPI", b'+NXT {"batch": 5}'])
@pytest.mark.parametrize("who", ["mallory", "eve", "vera"])
async def test_nobody_settles_anothers_work(cast: Cast, who: str, word: bytes) -> None:
    consumer = f"{cast.name('victor')}=work"
    await cast.vera.publish(cast.fill("mesh.task.{victor}.00.{vera}.{task}"), b"work")
    [work, *_] = await _pull(cast.victor, f"{NEXT}.{STREAM}.{consumer}", 1)
    before = await cast.coordinator.api(f"CONSUMER.INFO.{STREAM}.{consumer}")
    with pytest.raises(Unreachable):
        await cast.broker(who).request(work.reply, word, timeout=DEADLINE)
    after = await cast.coordinator.api(f"CONSUMER.INFO.{STREAM}.{consumer}")
    for key in ("num_ack_pending", "num_redelivered", "num_pending", "delivered", "ack_floor"):
        assert _without_times(after[key]) == _without_times(before[key])
    await cast.victor.request(work.reply, b"+ACK", timeout=DEADLINE)
    settled = await cast.coordinator.api(f"CONSUMER.INFO.{STREAM}.{consumer}")
    assert settled["num_ack_pending"] == before["num_ack_pending"] - 1


# The API -------------------------------------------------------------------------------------------

API = (
    "INFO",
    "STREAM.NAMES",
    "STREAM.LIST",
    "STREAM.INFO.MESH",
    "STREAM.CREATE.PWN",
    "STREAM.UPDATE.MESH",
    "STREAM.DELETE.MESH",
    "STREAM.PURGE.MESH",
    "STREAM.SNAPSHOT.MESH",
    "STREAM.MSG.GET.MESH",
    "STREAM.MSG.DELETE.MESH",
    "DIRECT.GET.MESH",
    "DIRECT.GET.MESH_BLOBS",
    "DIRECT.GET.MESH_PUSH",
    "DIRECT.GET.MESH_PUSH.mesh.push.{vera}.{victor}.{task}.hook",
    "STREAM.INFO.MESH_PUSH",
    "STREAM.MSG.GET.MESH_PUSH",
    "STREAM.PURGE.MESH_PUSH",
    "CONSUMER.INFO.MESH_PUSH.push",
    "CONSUMER.MSG.NEXT.MESH_PUSH.push",
    "CONSUMER.NAMES.MESH",
    "CONSUMER.CREATE.MESH",
    "CONSUMER.CREATE.MESH.pwn",
    "CONSUMER.CREATE.MESH.pwn.mesh.>",
    "CONSUMER.CREATE.MESH.{mallory}=work.mesh.task.>",
    "CONSUMER.DURABLE.CREATE.MESH.pwn",
    "CONSUMER.INFO.MESH.{victor}=work",
    "CONSUMER.DELETE.MESH.{victor}=work",
    "CONSUMER.PAUSE.MESH.{victor}=work",
    "CONSUMER.RESET.MESH.{victor}=work",
)


@pytest.mark.parametrize("operation", API)
@pytest.mark.parametrize("who", ["mallory", "eve"])
async def test_the_jetstream_api_serves_nobody_outside_the_mesh(cast: Cast, who: str, operation: str) -> None:
    bodies = {
        "STREAM.CREATE.PWN": {"name": "PWN", "subjects": ["pwn.>"]},
        "STREAM.MSG.GET.MESH": {"seq": 1},
        "DIRECT.GET.MESH": {"seq": 1},
        "CONSUMER.CREATE.MESH.pwn.mesh.>": {
            "stream_name": STREAM,
            "config": {"name": "pwn", "filter_subject": "mesh.>", "ack_policy": "none"},
        },
    }
    before = await _inventory(cast)
    body = json.dumps(bodies[operation]).encode() if operation in bodies else b""
    try:
        reply = await cast.broker(who).request(f"$JS.API.{cast.fill(operation)}", body, timeout=SILENCE)
        assert json.loads(reply.data)["error"]["err_code"] == 10039, "JetStream not enabled for account"
    except (Unreachable, TimedOut):
        pass
    assert await _inventory(cast) == before


@pytest.mark.parametrize(
    "subject",
    [
        "$SYS.REQ.SERVER.PING.VARZ",
        "$SYS.REQ.SERVER.PING.JSZ",
        "$SYS.REQ.SERVER.PING.SUBSZ",
        "$SYS.REQ.ACCOUNT.MESH.CONNZ",
        "$SYS.REQ.ACCOUNT.{victor}.CONNZ",
        "$SYS.REQ.ACCOUNT.{victor}.SUBSZ",
        "$SYS.REQ.CLAIMS.UPDATE",
        "$SYS.REQ.SERVER.{server}.RELOAD",
        "$SYS.REQ.SERVER.{server}.KICK",
    ],
)
@pytest.mark.parametrize("who", ["mallory", "eve"])
async def test_the_system_account_serves_nobody_outside(cast: Cast, mesh: BrokerMesh, who: str, subject: str) -> None:
    system = await mesh.connect("SYS")
    server = json.loads((await system.request("$SYS.REQ.SERVER.PING.IDZ")).data)["id"]
    await system.close()
    with pytest.raises(Unreachable):
        await cast.broker(who).request(cast.fill(subject.replace("{server}", server)), b"{}", timeout=DEADLINE)


@pytest.mark.parametrize(
    "subject", ["$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.ACCOUNT.PING.CONNZ", "$SYS.REQ.ACCOUNT.PING.STATZ"]
)
@pytest.mark.parametrize("account", ["{mallory}", "{victor}", "MESH", ""])
async def test_the_system_account_tells_an_account_only_of_itself(cast: Cast, subject: str, account: str) -> None:
    body = {"auth": True, "subscriptions": True, "acc": cast.fill(account), "accounts": [cast.fill(account)]}
    answer = (await cast.mallory.request(subject, json.dumps(body).encode(), timeout=DEADLINE)).data.decode()
    data = json.loads(answer)["data"]
    listed = {one.get("account", one.get("acc")) for one in data.get("connections", data.get("account_statz"))}
    assert listed == {cast.name("mallory")}
    assert [who for who in ("victor", "vera", "eve") if cast.name(who) in answer] == []


# Deputies: have the server say it, by naming the victim's subject as the reply ------------------------

VICTIMS = (
    "mesh.event.{victor}.{task}.{vera}.o",
    "mesh.claim.{victor}.{task}",
    "mesh.task.{victor}.00.{vera}.{task}",
    "mesh.step.{victor}.{task}.forged",
    "mesh.blob.{vera}.{digest}.9",
    "mesh.live.{vera}.o.{victor}.{task}",
    "mesh.ctl.{victor}.replica",
    "mesh.coord.lock.{vera}",
    "$JS.API.STREAM.DELETE.MESH",
    "$JS.API.STREAM.PURGE.MESH",
    "$JS.API.STREAM.CREATE.PWN",
    "$JS.API.CONSUMER.DELETE.MESH.{victor}=work",
)
EVIL = b'{"name": "PWN", "subjects": ["pwn.>"]}'


async def _direct_get(cast: Cast, reply: str) -> None:
    own = cast.fill("mesh.step.{mallory}.{task}.evil")
    cast.mallory.send(f"{DIRECT_GET}.{STREAM}.{own}", reply=reply)


async def _pull_with_work(cast: Cast, reply: str) -> None:
    await cast.mallory.publish(cast.fill("mesh.task.{mallory}.00.{mallory}.{task}"), EVIL)
    cast.mallory.send(f"{NEXT}.{STREAM}.{cast.name('mallory')}=work", NO_WAIT, reply=reply)


async def _pull_without_work(cast: Cast, reply: str) -> None:
    cast.mallory.send(f"{NEXT}.{STREAM}.{cast.name('mallory')}=input", NO_WAIT, reply=reply)


async def _publish(cast: Cast, reply: str) -> None:
    cast.mallory.send(cast.fill("mesh.event.{mallory}.{task}.{mallory}.o"), EVIL, reply=reply)


async def _acknowledge(cast: Cast, reply: str, word: bytes = b"+ACK") -> None:
    await cast.mallory.publish(cast.fill("mesh.task.{mallory}.00.{mallory}.{task}"), EVIL)
    [work, *_] = await _pull(cast.mallory, f"{NEXT}.{STREAM}.{cast.name('mallory')}=work", 1)
    cast.mallory.send(work.reply, word, reply=reply)


async def _acknowledge_and_pull(cast: Cast, reply: str) -> None:
    await cast.mallory.publish(cast.fill("mesh.task.{mallory}.00.{mallory}.{task}"), EVIL)
    await _acknowledge(cast, reply, b'+NXT {"batch": 1}')


async def _trace(cast: Cast, reply: str) -> None:
    headers = h.block(h.fields({"Nats-Trace-Dest": reply}))
    cast.mallory.send(cast.fill("mesh.event.{mallory}.{task}.{mallory}.o"), EVIL, headers=headers)


async def _request(cast: Cast, reply: str) -> None:
    cast.mallory.send(cast.fill("mesh.rpc.{victor}.GetTask.{mallory}"), EVIL, reply=reply)


async def _statistics(cast: Cast, reply: str) -> None:
    cast.mallory.send("$SYS.REQ.ACCOUNT.PING.CONNZ", reply=reply)


DEPUTIES = (
    _statistics,
    _direct_get,
    _pull_with_work,
    _pull_without_work,
    _publish,
    _acknowledge,
    _acknowledge_and_pull,
    _trace,
    _request,
)


@pytest.mark.parametrize("deputy", DEPUTIES)
async def test_the_server_says_nothing_in_anothers_name(cast: Cast, deputy: Callable[[Cast, str], Any]) -> None:
    await cast.mallory.publish(cast.fill("mesh.step.{mallory}.{task}.evil"), EVIL)
    consumers = await _inventory(cast)
    for victim in VICTIMS:
        reply = cast.fill(victim)
        stored = await _written_by_others(cast)
        cast.forget()
        await deputy(cast, reply)
        await cast.settled()
        assert await _written_by_others(cast) == stored
        assert [one.subject for one in cast.seen if one.subject == reply or one.reply.startswith(ACK)] == []
        assert (cast.at_victor, cast.at_vera) == ([], [])
        assert await _inventory(cast) == consumers


@pytest.mark.parametrize("deputy", [one for one in DEPUTIES if one is not _request])
async def test_the_same_operations_answer_to_whoever_asked(cast: Cast, deputy: Callable[[Cast, str], Any]) -> None:
    await cast.mallory.publish(cast.fill("mesh.step.{mallory}.{task}.evil"), EVIL)
    answers: asyncio.Queue[Delivered] = asyncio.Queue()
    inbox = cast.mallory.new_inbox()
    listening = await cast.mallory.subscribe(inbox, answers.put_nowait)
    await cast.mallory.flush()
    await deputy(cast, inbox)
    async with asyncio.timeout(DEADLINE):
        await answers.get()
    await listening.close()


async def test_an_answer_redirected_to_an_own_subject_is_at_most_a_message_in_ones_own_name(cast: Cast) -> None:
    await cast.mallory.publish(cast.fill("mesh.step.{mallory}.{task}.evil"), EVIL)
    await _direct_get(cast, cast.fill("mesh.task.{victor}.00.{mallory}.{task}"))
    await cast.settled()
    assert {one.subject.split(".")[4] for one in cast.seen if one.subject.startswith("mesh.task.")} <= {
        cast.name("mallory")
    }


async def test_inboxes_are_out_of_others_reach(cast: Cast) -> None:
    inbox = cast.vera.new_inbox()
    got: list[Delivered] = []
    await cast.vera.subscribe(inbox, got.append)
    await cast.vera.flush()
    for who in ("mallory", "eve", "victor"):
        cast.broker(who).send(inbox, b"injected")
    await cast.settled()
    assert got == []
    cast.vera.send(inbox, b"own")
    await cast.settled()
    assert [one.data for one in got] == [b"own"]


async def _pull(broker: Broker, subject: str, batch: int) -> list[Delivered]:
    """Everything a pull without waiting gives."""
    inbox = broker.new_inbox()
    got: list[Delivered] = []
    ended = asyncio.Event()

    def take(one: Delivered) -> None:
        if one.reply.startswith(ACK):
            got.append(one)
        if not one.reply.startswith(ACK) or len(got) == batch:
            ended.set()

    listening = await broker.subscribe(inbox, take)
    await broker.flush()
    broker.send(subject, json.dumps({"batch": batch, "no_wait": True}).encode(), reply=inbox)
    async with asyncio.timeout(DEADLINE):
        await ended.wait()
    await listening.close()
    return got


async def _inventory(cast: Cast) -> Any:
    """All streams with their configuration, and all consumers with what they have delivered."""
    found: dict[str, Any] = {}
    for stream in (await cast.coordinator.api("STREAM.NAMES"))["streams"]:
        found[stream] = (await cast.coordinator.api(f"STREAM.INFO.{stream}"))["config"]
        for consumer in (await cast.coordinator.api(f"CONSUMER.LIST.{stream}"))["consumers"] or []:
            if cast.name("mallory") not in consumer["name"]:
                found[consumer["name"]] = consumer["config"], _without_times(consumer["delivered"])
    return found


async def _written_by_others(cast: Cast) -> dict[str, int]:
    """Messages in the streams that are not in mallory's name, by subject."""
    found: dict[str, int] = {}
    for stream in (STREAM, BLOBS):
        info = await cast.coordinator.api(f"STREAM.INFO.{stream}", {"subjects_filter": ">"})
        found |= info["state"].get("subjects") or {}
    return {subject: count for subject, count in found.items() if cast.name("mallory") not in subject}


def _without_times(value: Any) -> Any:
    return {key: one for key, one in value.items() if key != "last_active"} if isinstance(value, dict) else value


async def test_the_mesh_is_told_of_everybodys_connections_and_nobody_else_is(cast: Cast, mesh: BrokerMesh) -> None:
    told: list[Delivered] = []
    overheard: list[Delivered] = []
    heard = [await cast.coordinator.subscribe(subject, told.append) for subject in (CONNECTED, DISCONNECTED)]
    heard += [await cast.broker(who).subscribe("$SYS.>", overheard.append) for who in ("mallory", "eve")]
    victor = cast.name("victor")
    # Nor can anybody tell the mesh that another one's connection ended.
    for name in (victor, cast.name("mallory")):
        cast.mallory.send(DISCONNECTED.replace("*", name), b"{}")
    await cast.settled()
    await (await Broker.connect(mesh.settings(victor), name="agent x")).close()
    await eventually(lambda: len(told) >= 2)
    await cast.settled()
    assert [one.subject for one in told] == [one.replace("*", victor) for one in (CONNECTED, DISCONNECTED)]
    assert json.loads(told[1].data)["client"]["name"] == "agent x"
    assert {one.data for one in overheard} == {b"{}"}  # what mallory said, within its own account
    for one in heard:
        await one.close()
