"""Records: an intent before and an outcome after every call, a record of every denial, and no call without one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from weft.core.broker import Broker
from weft.policy.model import Decision, Obligations
from weft.policy.redaction import Redactor
from weft.sidecar.guards import Guards
from weft.sidecar.pipeline import Call, Passing, Pipeline
from weft.sidecar.records import Intended, Recorded, Recorder
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh, unique_name
from weft_protocols.audit import AuditRecord, Kind, digest
from weft_protocols.errors import InvalidParams, TimedOut, ToolError, Unreachable
from weft_protocols.mcp import META_REFUSAL
from weft_protocols.resources import AUDIT

pytestmark = pytest.mark.anyio

CALL = Call(
    caller="crawler",
    server="web",
    method="tools/call",
    name="fetch",
    params={"name": "fetch", "arguments": {"url": "https://example.org", "password": "hunter2hunter2"}},
    task="t1",
    chain=("boss/t0", "crawler/t1"),
    agent_version="1.2.0",
    definition_digest="d" * 64,
    request="r1",
)


@pytest.fixture
async def broker(mesh: BrokerMesh) -> AsyncIterator[Broker]:
    made = await mesh.connect("sidecar")
    yield made
    await made.close()


async def records(broker: Broker, server: str, count: int) -> list[AuditRecord]:
    """The records of a server, once there are so many."""

    async def found() -> list[AuditRecord]:
        made = []
        for kind in ("intent", "outcome", "denial"):
            filter_ = f"mesh.audit.{kind}.*.{server}"
            info = await broker.api(f"STREAM.INFO.{AUDIT}", {"subjects_filter": filter_})
            for subject in info["state"].get("subjects") or {}:
                last = await broker.last(AUDIT, subject)
                assert last is not None
                made.append(AuditRecord.decode(last.data))
        return made if len(made) >= count else []

    return list(await eventually(found))


async def stored(broker: Broker, server: str) -> dict[str, int]:
    """How many records of each kind a server has."""
    info = await broker.api(f"STREAM.INFO.{AUDIT}", {"subjects_filter": f"mesh.audit.*.*.{server}"})
    return {subject.split(".")[2]: count for subject, count in (info["state"].get("subjects") or {}).items()}


async def test_a_call_has_an_intent_and_an_outcome_of_one_id(stage: Any, broker: Broker) -> None:
    server = await stage.runner()
    await stage.run(server, "result = 'password=hunter2hunter2'")
    intent, outcome = await records(broker, server, 2)
    assert (intent.kind, outcome.kind) == ("intent", "outcome")
    assert intent.id == outcome.id
    assert intent.at <= outcome.at
    assert intent.who == {"agent": "local", "front": "nats", "request": intent.who["request"]}
    arguments = {"code": "result = 'password=hunter2hunter2'"}
    assert intent.what["arguments"] == digest(arguments)
    assert (intent.what["server"], intent.what["name"], intent.what["method"]) == (server, "run", "tools/call")
    assert len(intent.what["definition"]) == 64
    assert "hunter2" not in json.dumps([intent.what, outcome.what, outcome.outcome])
    assert intent.how["sandbox"] in ("sandlock", "bubblewrap", "rlimits")
    assert intent.how["deadline"] > intent.at
    assert outcome.outcome["status"] == "ok"
    assert outcome.outcome["bytes"] > 20
    assert not intent.outcome


async def test_every_denial_is_recorded_and_has_no_intent(stage: Any, broker: Broker) -> None:
    server = await stage.runner(lock={"locked": "crm/{id}"})
    with pytest.raises(ToolError, match="Unknown tool"):
        await stage.run(server, "result = 1", tool="nothing")
    (unknown,) = await records(broker, server, 1)
    assert (unknown.kind, unknown.what["name"], unknown.outcome["status"]) == ("denial", "nothing", "refused")
    refused = await stage.run(server, "result = 1", tool="locked")
    assert refused["_meta"][META_REFUSAL]["kind"] in ("fenced", "invalid_params", "refused")

    async def denied() -> bool:
        last = await broker.last(AUDIT, f"mesh.audit.denial.local.{server}")
        return last is not None and AuditRecord.decode(last.data).what["name"] == "locked"

    await eventually(denied)
    assert await broker.last(AUDIT, f"mesh.audit.intent.local.{server}") is None
    assert not stage.state(server).joinpath("notes").exists()


async def test_failures_and_errors_are_told_apart(stage: Any, broker: Broker) -> None:
    server = await stage.runner()

    async def status() -> str:
        last = await broker.last(AUDIT, f"mesh.audit.outcome.local.{server}")
        return str(AuditRecord.decode(last.data).outcome["status"]) if last is not None else ""

    async def becomes(wanted: str) -> None:
        async def reached() -> bool:
            return await status() == wanted

        await eventually(reached)

    await stage.run(server, "raise ValueError('no')")
    await becomes("failed")
    with pytest.raises(ToolError):
        await stage.run(server, "error = {'code': 5, 'message': 'no'}")
    await becomes("error")


class Decided(Passing):
    """Stands in for the policy."""

    async def before(self, call: Call) -> Call:
        decision = Decision(True, ("allow-web",), Obligations(redact=("pii",)), version=7)
        return call.with_fact("decision", decision).with_fact("fence", [{"name": "crm/1", "token": 5}])


async def fine(_: Call) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": "[redacted:secret]"}]}


async def test_a_record_names_what_decided_and_shows_arguments_redacted(broker: Broker) -> None:
    recorder = Recorder(broker)
    server = unique_name("web")
    pipeline = Pipeline([Recorded(recorder), Decided(), Intended(recorder)])
    await pipeline.run(replace(CALL, server=server), fine)
    await recorder.aclose()
    intent, outcome = await records(broker, server, 2)
    assert intent.who == {
        "agent": "crawler", "version": "1.2.0", "task": "t1", "chain": ["boss/t0", "crawler/t1"], "front": "nats",
        "request": "r1",
    }  # fmt: skip
    assert (intent.why["policy"], intent.why["rules"], intent.why["decision"]) == (7, ["allow-web"], "allow")
    assert intent.why["fence"] == [{"name": "crm/1", "token": 5}]
    assert intent.what["shown"]["url"] == "https://example.org"
    assert "hunter2" not in json.dumps(intent.what)
    assert outcome.outcome["redactions"] == {"secret": 1}
    hidden = replace(CALL, server=unique_name("web"), guards=Guards(show_arguments=False))
    assert "shown" not in recorder.made("intent", hidden).what
    large = CALL.with_arguments({"text": "x" * 20_000})
    assert recorder.made("intent", large, arguments=Redactor()).what["shown"] is None
    assert recorder.made("intent", CALL, arguments=Redactor()).what["shown"]
    other = {"text": "é" * 7_000}  # as many bytes as it has in the record
    assert recorder.made("intent", CALL.with_arguments(other), arguments=Redactor()).what["shown"] == other
    grown = CALL.with_arguments({"text": "pwd=abcdef " * 1_000})
    assert recorder.made("intent", grown, arguments=Redactor()).what["shown"] is None


class Broken:
    """A broker that stores nothing."""

    async def publish(self, *_: Any, **__: Any) -> int:
        raise Unreachable("no broker")

    def publish_then(self, *_: Any, **__: Any) -> None:
        raise Unreachable("no broker")


@pytest.mark.parametrize("required", [True, False])
async def test_a_call_that_cannot_be_recorded_is_not_made_unless_that_is_wanted(required: bool) -> None:
    recorder = Recorder(Broken())  # type: ignore[arg-type]
    made: list[Call] = []

    async def execute(call: Call) -> dict[str, Any]:
        made.append(call)
        return {"content": []}

    call = replace(CALL, guards=Guards(required=required))
    result = await Pipeline([Recorded(recorder), Intended(recorder)]).run(call, execute)
    await recorder.aclose()
    assert bool(made) is not required
    assert (result.get("_meta") or {}).get(META_REFUSAL, {}).get("kind") == ("unrecorded" if required else None)
    assert recorder.lost == 1


class Unheard:
    """A broker that stores what is sent, but whose answer to an outcome is not heard the first time."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.publish = broker.publish

    def publish_then(self, subject: str, data: bytes, *, headers: bytes, then: Any) -> None:
        def stored(*_: Any) -> None:
            then(b"", None, TimedOut("not heard"))

        self._broker.publish_then(subject, data, headers=headers, then=stored)


class Refusing(Unheard):
    """One that refuses it the first time."""

    def publish_then(self, subject: str, data: bytes, *, headers: bytes, then: Any) -> None:
        then(b'{"error": {"code": 503, "err_code": 10077, "description": "stream is full"}}', None, None)


@pytest.mark.parametrize("kind", [Unheard, Refusing])
async def test_an_outcome_is_stored_once_whatever_became_of_the_first_attempt(kind: Any, broker: Broker) -> None:
    recorder = Recorder(kind(broker))
    server = unique_name("web")
    for _ in range(3):
        await Pipeline([Recorded(recorder), Intended(recorder)]).run(replace(CALL, server=server), fine)
    await recorder.aclose()
    assert await stored(broker, server) == {"intent": 3, "outcome": 3}
    assert recorder.lost == 0


async def test_outcomes_are_behind_their_answers_and_stored_when_the_sidecar_ends(broker: Broker) -> None:
    recorder = Recorder(broker)
    server = unique_name("web")
    pipeline = Pipeline([Recorded(recorder), Intended(recorder)])
    await asyncio.gather(*(pipeline.run(replace(CALL, server=server), fine) for _ in range(300)))
    await recorder.aclose()
    assert await stored(broker, server) == {"intent": 300, "outcome": 300}


async def test_an_outcome_that_cannot_be_made_is_said_and_holds_up_no_other(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(Recorder):
        def made(self, kind: Kind, call: Call, *more: Any, **named: Any) -> AuditRecord:
            if kind == "outcome" and call.name == "odd":
                raise KeyError("nobody thought of it")
            return super().made(kind, call, *more, **named)

    recorder = Odd(broker)
    server = unique_name("web")
    pipeline = Pipeline([Recorded(recorder), Intended(recorder)])
    await asyncio.gather(*(pipeline.run(replace(CALL, server=server, name=name), fine) for name in ("odd", "even")))
    await recorder.aclose()
    assert await stored(broker, server) == {"intent": 2, "outcome": 1}
    [outcome] = [one for one in await records(broker, server, 2) if one.kind == "outcome"]
    assert outcome.what["name"] == "even"
    assert "nobody thought of it" in caplog.text


async def test_nobody_deletes_a_record(stage: Any, broker: Broker) -> None:
    server = await stage.runner()
    await stage.run(server, "result = 1")
    await records(broker, server, 2)
    from weft_protocols.errors import BrokerError

    with pytest.raises(BrokerError):
        await broker.api(f"STREAM.MSG.DELETE.{AUDIT}", {"seq": 1})
    with pytest.raises(BrokerError):
        await broker.api(f"STREAM.PURGE.{AUDIT}", {})


def test_a_record_reads_back_and_what_is_none_is_refused() -> None:
    record = AuditRecord("intent", "i", 1, "sidecar/x", who={"agent": "a", "task": ""}, what={"server": "s"})
    again = AuditRecord.decode(record.encode())
    assert again == replace(record, who={"agent": "a"})
    assert record.subject == "mesh.audit.intent.a.s"
    for data in (b"", b"{}", b'{"v":1,"kind":"thought","id":"i","at":1,"by":"x"}'):
        with pytest.raises(InvalidParams):
            AuditRecord.decode(data)
