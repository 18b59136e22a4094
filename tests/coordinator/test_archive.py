"""Finished tasks leave the stream and read as before; what lives stays, whatever interrupts their leaving."""

from __future__ import annotations

import base64
import logging
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from a2a.types import a2a_pb2 as pb

from weft.client import coordinator
from weft.core.config import parse_mesh_config
from weft.core.retentionconf import Retention
from weft.testing.agents import eventually
from weft_coordinator.decide.index import Entry
from weft_coordinator.decide.retention import Rule, prefix, single
from weft_coordinator.service.settings import Settings
from weft_coordinator.shell.copies import ALL
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.errors import InvalidConfig, TaskNotFound, Unavailable
from weft_protocols.resources import STREAM
from weft_protocols.states import State

if TYPE_CHECKING:
    from tests.coordinator.conftest import Running, Sent, Stage

pytestmark = pytest.mark.anyio

NEVER = Retention(None, None)
AT_ONCE = Retention(0.0, 0.0)
BASE = Settings(poll=0.05, beat=0.05, archive_every=0.0, grace=0.0, finished_tasks=0, retention=NEVER)


def policy(running: Running, retention: Retention) -> None:
    running.coordinator.settings = replace(running.coordinator.settings, retention=retention)


async def stored(stage: Stage, kind: str = "*") -> dict[str, int]:
    """Messages in the stream by subject."""
    body = {"subjects_filter": f"mesh.{kind}.>"}
    info = await (await stage.broker("coordinator")).api(f"STREAM.INFO.{STREAM}", body)
    return dict(info["state"].get("subjects") or {})


async def left(stage: Stage, *sent: Sent) -> bool:
    """Whether nothing of these tasks is in the stream."""
    names = {one.task for one in sent}
    return not any(names & set(subject.split(".")) for subject in await stored(stage))


async def everything(stage: Stage, *sent: Sent) -> list[object]:
    """What a caller can read of its tasks."""
    read: list[object] = [await stage.get(one) for one in sent]
    for fields in ({}, {"include_artifacts": True, "history_length": 9}, {"status": pb.TASK_STATE_COMPLETED}):
        token = None
        while token != "":
            page = await stage.list("local", page_size=2, page_token=token or "", **fields)
            read.append((list(page.tasks), page.total_size, page.page_size))
            token = page.next_page_token
    requests = [pb.SubscribeToTaskRequest(id=one.task) for one in sent]
    pages = [(await stage.rpc("local", "SubscribeToTask", request)).data for request in requests]
    trees = [await coordinator.call(await stage.broker("operator"), "tree", {"task": one.task}) for one in sent]
    return [*read, *pages, *trees, *[await messages(stage, one) for one in sent]]


async def messages(stage: Stage, sent: Sent) -> list[tuple[str, bytes, bytes]]:
    """Everything stored about a task, as the operator is told: what tracing and replaying need."""
    found: list[tuple[str, bytes, bytes]] = []
    body: dict[str, Any] = {"task": sent.task}
    while True:
        told = await coordinator.call(await stage.broker("operator"), "messages", body)
        found += [
            (one["subject"], base64.b64decode(one["headers"]), base64.b64decode(one["data"] or ""))
            for one in told["messages"]
        ]
        if not told["more"]:
            return found
        body["after"] = told["messages"][-1]["seq"]


async def finished(stage: Stage) -> list[Sent]:
    """Finished tasks of several shapes."""
    plain = await stage.done("agent-0", "plain")
    asked = await stage.send("agent-1", "book a table")
    worker = await stage.claim(asked)
    snapshot = pb.Task(id=asked.task, context_id=asked.context)
    snapshot.history.add(message_id=f"{asked.task}-1", role=pb.ROLE_AGENT).parts.add(text="when?")
    snapshot.artifacts.add(artifact_id="a").parts.add(text="from the snapshot")
    await worker.step("_note", b"a step")
    await worker.ask("when?", snapshot)
    await stage.follow_up(asked, "at eight")
    await worker.complete("booked")
    answered = await stage.send("agent-0", "hi")
    await (await stage.claim(answered)).answer("hello")
    dead = await stage.send("agent-2", "impossible")
    await (await stage.claim(dead)).give_up("no use")
    canceled = await stage.send("agent-2", "never run")
    await (await stage.claim(canceled)).status("canceled", "not needed")
    return [plain, asked, answered, dead, canceled]


async def letters(stage: Stage) -> Any:
    return await coordinator.call(await stage.broker("operator"), "dead-letters")


async def projected(stage: Stage) -> dict[str, Any]:
    told = await coordinator.call(await stage.broker("operator"), "status")
    return dict(told["projection"])


async def test_a_task_reads_the_same_after_it_has_left_the_stream(fresh_stage: Stage) -> None:
    stage = fresh_stage
    running = await stage.coordinator(BASE)
    sent = await finished(stage)
    before, dead = await everything(stage, *sent), await letters(stage)
    kinds = [subject.split(".")[1] for subject, _, _ in await messages(stage, sent[1])]
    assert kinds == ["task", "claim", "step", "step", "event", "input", "event", "event", "event"]
    policy(running, AT_ONCE)
    await eventually(lambda: left(stage, *sent))
    assert await stored(stage) == {}
    assert await everything(stage, *sent) == before
    assert await letters(stage) == dead
    told = await projected(stage)
    assert (told["archived"], told["missing"], told["stream"]["messages"]) == (5, 0, 0)
    # A restart and a file made anew change nothing.
    await stage.stop(running)
    await stage.coordinator(BASE)
    assert await everything(stage, *sent) == before
    assert (await coordinator.call(await stage.broker("operator"), "rebuild"))["started"]
    await eventually(lambda: rebuilt(stage))
    assert await everything(stage, *sent) == before
    assert await letters(stage) == dead


async def rebuilt(stage: Stage) -> bool:
    told = (await projected(stage))["rebuild"]
    assert told["error"] == ""
    return not told["running"]


async def test_what_lives_stays_and_what_ended_behind_it_leaves(fresh_stage: Stage) -> None:
    stage = fresh_stage
    running = await stage.coordinator(BASE)
    early = await stage.done("agent-0", "early")
    live = await stage.send("agent-1", "a long one")
    worker = await stage.claim(live)
    await worker.status("working")
    await worker.step("first", b"done once")
    waiting = await stage.send("agent-2", "nobody took it yet")
    behind = [await stage.done("agent-0", f"{n}") for n in range(3)]
    kept = {subject for subject in await stored(stage) if {live.task, waiting.task} & set(subject.split("."))}
    before = await everything(stage, early, *behind)
    policy(running, AT_ONCE)
    await eventually(lambda: left(stage, early, *behind))
    assert set(await stored(stage)) == kept
    assert await everything(stage, early, *behind) == before
    await worker.complete("at last")
    assert (await stage.get(live)).artifacts[0].parts[0].text == "at last"
    await eventually(lambda: left(stage, live))
    assert (await stage.get(live)).artifacts[0].parts[0].text == "at last"
    assert set(await stored(stage)) == {subject for subject in kept if waiting.task in subject}


async def test_a_child_stays_while_its_parent_is_at_work(fresh_stage: Stage) -> None:
    stage = fresh_stage
    running = await stage.coordinator(BASE)
    parent = await stage.send("agent-0")
    worker = await stage.claim(parent)
    message_id = uuid.uuid4().hex
    task = ids.task_id("agent-0", "agent-1", message_id)
    message = pb.Message(message_id=message_id, context_id=task, role=pb.ROLE_USER, parts=[pb.Part(text="part of it")])
    block = h.block(h.fields({h.EXPECTED_SEQUENCE: "0", h.VERSION: "1.0", h.CHAIN: f"agent-0/{parent.task}"}))
    subject = subjects.task("agent-1", ids.slice_of(task), "agent-0", task)
    body = pb.SendMessageRequest(message=message).SerializeToString()
    seq = await (await stage.broker("agent-0")).publish(subject, body, headers=block)
    child = type(parent)("agent-1", "agent-0", task, task, message_id, seq)
    await (await stage.claim(child)).complete()
    other = await stage.done("agent-2")
    policy(running, AT_ONCE)
    await eventually(lambda: left(stage, other))
    assert any(child.task in subject for subject in await stored(stage))
    await worker.complete()
    await eventually(lambda: left(stage, parent, child))


async def test_steps_leave_before_their_task(fresh_stage: Stage) -> None:
    stage = fresh_stage
    running = await stage.coordinator(BASE)
    sent = await finished(stage)
    before = await everything(stage, *sent)
    kept = {subject for subject in await stored(stage) if not subject.startswith("mesh.step.")}
    assert len(kept) < len(await stored(stage))
    policy(running, Retention(None, 0.0))
    await eventually(lambda: no_steps(stage))
    assert set(await stored(stage)) == kept
    assert await everything(stage, *sent) == before


async def no_steps(stage: Stage) -> bool:
    return not await stored(stage, "step")


async def test_a_stream_that_is_too_large_loses_the_oldest_first(fresh_stage: Stage) -> None:
    stage = fresh_stage
    running = await stage.coordinator(BASE)
    sent = []
    for n in range(6):
        one = await stage.send("agent-0", f"{n}")
        worker = await stage.claim(one)
        await worker.artifact("a", "x" * 50_000)
        await worker.status("completed")
        sent.append(one)
    size = (await projected(stage))["stream"]["bytes"]
    policy(running, Retention(None, None, max_bytes=size + 1))
    await running.coordinator.tail.sync()
    assert (await projected(stage))["stream"]["bytes"] == size
    policy(running, Retention(None, None, max_bytes=size - 1))
    await eventually(lambda: left(stage, sent[0]))
    assert [task.artifacts[0].parts[0].text[:1] for task in [await stage.get(one) for one in sent]] == ["x"] * 6


async def test_what_was_interrupted_is_gone_on_with_by_the_next_leader(
    fresh_stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = fresh_stage
    first = await stage.coordinator(replace(BASE, state=tmp_path / "first"))
    second = await stage.coordinator(replace(BASE, state=tmp_path / "second"))
    assert first.coordinator.leader.leading
    live = await stage.send("agent-1", "holds what follows")
    sent = await finished(stage)
    before = await everything(stage, *sent)
    api, asked = first.broker.api, 0

    async def failing(subject: str, *args: Any, **options: Any) -> dict[str, Any]:
        nonlocal asked
        if subject == f"STREAM.PURGE.{STREAM}":
            asked += 1
            if asked > 6:
                raise Unavailable("killed in the middle")
        return await api(subject, *args, **options)

    monkeypatch.setattr(first.broker, "api", failing)
    policy(first, AT_ONCE)
    await eventually(lambda: asked > 6)
    assert not await left(stage, *sent)
    assert await everything(stage, *sent) == before
    await stage.stop(first)
    await eventually(lambda: second.coordinator.leader.leading)
    policy(second, AT_ONCE)
    await eventually(lambda: left(stage, *sent))
    assert await everything(stage, *sent) == before
    assert (await stage.get(live)).status.state == pb.TASK_STATE_SUBMITTED


async def test_nothing_leaves_that_a_living_coordinator_has_not_read(fresh_stage: Stage) -> None:
    stage = fresh_stage
    running = await stage.coordinator(BASE)
    sent = await stage.done("agent-0")
    other = await stage.broker("operator")

    def say(position: int) -> None:
        other.send(ALL, msgpack.packb({"op": "at", "token": "slow", "position": position, "whole": True}))

    say(sent.seq)
    await eventually(lambda: "slow" in running.coordinator.copies.peers)
    policy(running, AT_ONCE)
    await running.coordinator.archive.run(2**44)
    assert any(sent.task in subject for subject in await stored(stage))
    say(10**6)
    await eventually(lambda: left(stage, sent))


async def test_who_comes_later_gets_what_has_left_from_another(fresh_stage: Stage, tmp_path: Path) -> None:
    stage = fresh_stage
    running = await stage.coordinator(replace(BASE, state=tmp_path / "first"))
    sent = await finished(stage)
    large = await stage.send("agent-0", "much")
    worker = await stage.claim(large)
    await worker.artifact("a", "y" * 700_000)
    await worker.status("completed")
    sent.append(large)
    before = await everything(stage, *sent)
    policy(running, AT_ONCE)
    await eventually(lambda: left(stage, *sent))
    policy(running, NEVER)
    live = await stage.send("agent-1")
    second = await stage.coordinator(replace(BASE, state=tmp_path / "second"))
    assert second.coordinator.projection.store.whole
    await stage.stop(running)
    assert [await stage.get(one) for one in sent] == before[: len(sent)]
    assert (await stage.list("local", page_size=1)).total_size == len(sent) + 1
    assert (await stage.get(live)).status.state == pb.TASK_STATE_SUBMITTED


async def test_what_nobody_has_any_more_is_said_to_be_missing(
    fresh_stage: Stage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = fresh_stage
    second = await stage.coordinator(replace(BASE, state=tmp_path / "second"))
    old = await stage.done("agent-0", "known to both")
    open_ = await stage.send("agent-0", "live when the second one stops")
    assert (await stage.list("local")).total_size == 2
    await stage.stop(second)
    first = await stage.coordinator(replace(BASE, state=tmp_path / "first", retention=AT_ONCE))
    await (await stage.claim(open_)).complete()
    await eventually(lambda: left(stage, old, open_))
    await stage.stop(first)
    kept = await stage.send("agent-1", "after that")
    with caplog.at_level(logging.WARNING, "weft.coordinator"):
        await stage.coordinator(replace(BASE, state=tmp_path / "second"))
    assert "no other coordinator has them" in caplog.text
    assert {one.id for one in (await stage.list("local")).tasks} == {old.task, kept.task}
    assert (await stage.list("local")).total_size == 2
    assert isinstance(await stage.refused("local", "GetTask", pb.GetTaskRequest(id=open_.task)), TaskNotFound)
    assert (await projected(stage))["missing"] > 0


async def test_a_message_that_is_sent_again_after_its_task_has_left_changes_nothing_that_is_told(
    fresh_stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage = fresh_stage
    running = await stage.coordinator(BASE)
    sent = await stage.done("agent-0", "once")
    before = await stage.get(sent)
    policy(running, AT_ONCE)
    await eventually(lambda: left(stage, sent))
    policy(running, NEVER)
    message = pb.Message(message_id=sent.message_id, context_id=sent.context, role=pb.ROLE_USER)
    message.parts.add(text="once")
    block = h.block(h.fields({h.EXPECTED_SEQUENCE: "0", h.VERSION: h.A2A_VERSION, h.ORIGIN: "o1"}))
    subject = subjects.task("agent-0", ids.slice_of(sent.context), "local", sent.task)
    body = pb.SendMessageRequest(message=message).SerializeToString()
    with caplog.at_level(logging.WARNING, "weft.coordinator"):
        again = replace(sent, seq=await (await stage.broker("local")).publish(subject, body, headers=block))
        await (await stage.claim(again)).complete("another outcome")
        assert await stage.get(sent) == before
        assert (await stage.list("local")).total_size == 1
    assert f"task {sent.task} of agent-0 (caller local) was sent again after it had left" in caplog.text


# Rules ---------------------------------------------------------------------------------------------


def entry(row: int, first: int, last: int, *, ended: bool = True, at: int = 0) -> Entry:
    state = int(State.COMPLETED if ended else State.WORKING)
    return Entry("a", "c", f"{row:032x}", state=state, first=first, last=last, last_time=at, row=row)


def test_a_stream_can_lose_its_begin_up_to_the_first_message_that_stays() -> None:
    rule = Rule(before=10, stored=100, held=lambda _: False)
    gone, live = [entry(1, 1, 9), entry(2, 2, 30)], entry(3, 5, 6, ended=False)
    assert prefix([*gone, live], rule, all=True).until == 5
    assert prefix(gone, rule, all=True).until == 31
    assert prefix(gone, rule, all=False).until == 3
    assert prefix([live, *gone], rule, all=True).row == 0
    assert prefix([*gone, entry(3, 40, 200)], rule, all=True).until == 40
    assert prefix([*gone, entry(3, 40, 50, at=11)], rule, all=True).until == 40
    assert prefix([], rule, all=True).until == 0
    assert prefix([*gone, live], rule, all=True).cut == tuple(gone)
    assert prefix(gone, rule, all=True).cut == ()
    assert single([live, *gone], rule) == gone
    assert single(gone, replace(rule, held=lambda one: one.row == 1)) == gone[1:]


def test_retention_is_read_from_the_mesh_file_and_the_environment() -> None:
    def parse(text: str) -> Retention:
        return parse_mesh_config(text, path=Path("/p/mesh.yaml")).retention

    assert parse("name: m") == Retention(86_400.0, 3_600.0, -1)
    assert parse("retention: {keep: 7d, steps: 90s, max_bytes: 10GB}") == Retention(604_800.0, 90.0, 10 * 1024**3)
    assert parse("retention: {keep: forever, steps: forever}") == NEVER
    for wrong, said in (
        ("keep: soon", "24h or 7d, or forever"),
        ("steps: 2d\n  keep: 1d", "at most `keep`"),
        ("bytes: 3", "no field 'bytes'"),
    ):
        with pytest.raises(InvalidConfig, match=said):
            parse(f"retention:\n  {wrong}")
    base = Retention()
    assert Retention.load({}, base) == base
    assert Retention.load({"WEFT_RETENTION_KEEP": "forever", "WEFT_RETENTION_STEPS": "5m"}, base) == Retention(
        None, 300.0
    )
    with pytest.raises(InvalidConfig, match="WEFT_RETENTION_KEEP: 'x' must be a time"):
        Retention.load({"WEFT_RETENTION_KEEP": "x"}, base)
