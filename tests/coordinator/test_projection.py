"""The projection: a file that is the stream's copy at any moment, whatever happens to it or to who writes it."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from a2a.types import a2a_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.client import coordinator
from weft.testing.agents import Process, coordinator_process, eventually
from weft_coordinator.decide import listing
from weft_coordinator.decide.index import Entry, TaskIndex, Watermark
from weft_coordinator.service.settings import Settings
from weft_coordinator.shell.files import StateFile
from weft_coordinator.shell.projection import Projection
from weft_coordinator.shell.store import Store
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.errors import InvalidConfig, Unavailable
from weft_protocols.resources import STREAM
from weft_protocols.states import State

if TYPE_CHECKING:
    from tests.coordinator.conftest import Sent, Stage

pytestmark = pytest.mark.anyio


def quick(folder: Path | None = None, *, finished: int = 0) -> Settings:
    return Settings(poll=0.05, beat=0.05, state=folder, finished_tasks=finished)


async def everything(stage: Stage, *sent: Sent) -> list[object]:
    """What a caller can read of its tasks."""
    read: list[object] = [await stage.get(one) for one in sent]
    for fields in ({}, {"include_artifacts": True, "history_length": 9}, {"status": pb.TASK_STATE_COMPLETED}):
        page = await stage.list("local", page_size=3, **fields)
        while True:
            read.append((list(page.tasks), page.total_size))
            if not page.next_page_token:
                break
            page = await stage.list("local", page_size=3, page_token=page.next_page_token, **fields)
    requests = [pb.SubscribeToTaskRequest(id=one.task) for one in sent]
    return [*read, *[(await stage.rpc("local", "SubscribeToTask", request)).data for request in requests]]


async def some(stage: Stage) -> list[Sent]:
    """Tasks in several states."""
    done = [await stage.done("agent-0", f"{n}") for n in range(5)]
    asked = await stage.send("agent-1", "book")
    worker = await stage.claim(asked)
    await worker.ask("when?")
    await stage.follow_up(asked, "at eight")
    await worker.complete("booked")
    waiting = await stage.send("agent-0", "wait")
    await (await stage.claim(waiting)).status("working", "thinking")
    return [*done, asked, waiting, await stage.send("agent-2")]


@asynccontextmanager
async def opened(path: Path, *, keep: int = 10) -> AsyncIterator[Projection]:
    """A projection on a directory, without a stream."""
    file = StateFile.take(path)
    projection = Projection(TaskIndex(keep), Store(file), keep=keep)
    await projection.open()
    try:
        yield projection
    finally:
        await projection.store.close()
        file.release()


def consistent(path: Path) -> tuple[int, int]:
    """Check a file against itself; its position and its number of tasks."""
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        position = connection.execute("SELECT position FROM meta").fetchone()[0]
        assert connection.execute("SELECT count(*), max(seq) FROM messages").fetchone() == (position, position or None)
        told = dict(connection.execute("SELECT state, sum(n) FROM counts GROUP BY state HAVING sum(n) > 0").fetchall())
        assert told == dict(connection.execute("SELECT state, count(*) FROM tasks GROUP BY state").fetchall())
        return position, sum(told.values())
    finally:
        connection.close()


# Restarts ------------------------------------------------------------------------------------------


async def test_a_restart_goes_on_with_the_file_and_reads_the_same(fresh_stage: Stage, tmp_path: Path) -> None:
    stage = fresh_stage
    running = await stage.coordinator(quick(tmp_path))
    sent = await some(stage)
    before = await everything(stage, *sent)
    position = (await projected(stage))["position"]
    await stage.stop(running)
    assert consistent(tmp_path / "1.db") == (position, len(sent))
    again = await stage.coordinator(quick(tmp_path, finished=100))
    assert await everything(stage, *sent) == before
    told: list[Entry] = []
    again.coordinator.tail.on_change(told.extend)
    new = await stage.done("agent-0", "new")
    await eventually(lambda: State.COMPLETED in [entry.state for entry in told])
    assert {entry.task for entry in told} == {new.task}


async def projected(stage: Stage) -> dict[str, object]:
    """What `status` tells of the projection."""
    told = await coordinator.call(await stage.broker("operator"), "status")
    return dict(told["projection"])


async def test_a_coordinator_killed_while_it_projects_loses_and_repeats_nothing(
    fresh_stage: Stage, tmp_path: Path
) -> None:
    stage = fresh_stage
    env = {"WEFT_COORDINATOR_STATE": str(tmp_path)}
    sent: list[Sent] = []
    at = 0

    async def load(process: Process) -> None:
        while process.exit_code is None:
            sent.append(await stage.done("agent-0"))

    for _ in range(3):
        async with coordinator_process(stage.mesh, env=env) as process, asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(load(process))
            await eventually(partial(reached, tmp_path / "1.db", at + 100))
            process.kill()
            await process.exited()
        at, _ = consistent(tmp_path / "1.db")
    await stage.coordinator(quick(tmp_path))
    tasks: list[tuple[str, int]] = []
    token = ""
    while not tasks or token:
        page = await stage.list("local", page_size=100, page_token=token)
        tasks += [(one.id, one.status.state) for one in page.tasks]
        token = page.next_page_token
    assert Counter(tasks) == Counter((one.task, pb.TASK_STATE_COMPLETED) for one in sent)
    last = (await (await stage.broker("coordinator")).api(f"STREAM.INFO.{STREAM}"))["state"]["last_seq"]
    assert consistent(tmp_path / "1.db") == (last, len(sent))


def reached(path: Path, position: int) -> bool:
    if not path.exists():
        return False
    connection = sqlite3.connect(path)
    try:
        found = connection.execute("SELECT position FROM meta").fetchone()
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()
    return found is not None and found[0] >= position


@pytest.mark.parametrize("damage", ["truncated", "garbage", "another version", "a table is gone"])
async def test_a_file_that_cannot_be_used_is_moved_aside_and_made_anew(
    fresh_stage: Stage, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = fresh_stage
    running = await stage.coordinator(quick(tmp_path))
    sent = await some(stage)
    before = await everything(stage, *sent)
    await stage.stop(running)
    path = tmp_path / "1.db"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8192])
    elif damage == "garbage":
        path.write_bytes(b"SQLite format 3\x00" + bytes(range(256)) * 64)
    else:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 99" if damage == "another version" else "DROP TABLE counts")
        connection.commit()
        connection.close()
    with caplog.at_level(logging.WARNING, "weft.coordinator"):
        await stage.coordinator(quick(tmp_path))
    assert "is not used" in caplog.text
    assert await everything(stage, *sent) == before
    assert len(aside(tmp_path)) == 1


def aside(folder: Path) -> list[Path]:
    return list(folder.glob("1.aside-*.db"))


async def test_two_coordinators_have_a_file_each_and_read_alike(fresh_stage: Stage) -> None:
    stage = fresh_stage
    one, two = await stage.coordinator(quick()), await stage.coordinator(quick())
    sent = await some(stage)
    paths = {running.coordinator.projection.store.file.path for running in (one, two)}
    assert paths == {stage.mesh.home / "coordinator" / f"{n}.db" for n in (1, 2)}
    both = await everything(stage, *sent)
    await stage.stop(one)
    assert await everything(stage, *sent) == both
    third = await stage.coordinator(quick())
    assert third.coordinator.projection.store.file.path.name == "1.db"


async def test_a_file_ahead_of_its_stream_follows_the_stream(fresh_stage: Stage, tmp_path: Path) -> None:
    stage = fresh_stage
    running = await stage.coordinator(quick(tmp_path))
    sent = await some(stage)
    before = await everything(stage, *sent)
    await stage.stop(running)
    # As if the broker had lost its last writes in a power failure: the file has a message more than the stream.
    connection = sqlite3.connect(tmp_path / "1.db")
    (last,) = connection.execute("SELECT position FROM meta").fetchone()
    connection.execute(
        "INSERT INTO messages SELECT ?, owner, kind, number, subject, time, headers, data FROM messages WHERE seq = ?",
        (last + 1, last),
    )
    connection.execute("UPDATE meta SET position = position + 1")
    connection.commit()
    connection.close()
    await stage.coordinator(quick(tmp_path))
    assert await everything(stage, *sent) == before
    assert (await projected(stage))["position"] == last


async def test_what_could_not_be_stored_is_stored_later(
    fresh_stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = fresh_stage
    running = await stage.coordinator(quick(tmp_path))
    store, broken = running.coordinator.projection.store, True
    write = store.write

    async def failing(*args: object, **options: object) -> None:
        if broken:
            raise Unavailable("the disk is full")
        await write(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write", failing)
    sent = await stage.done("agent-0")
    await eventually(lambda: running.coordinator.projection.index.find("agent-0", sent.task, caller="local"))
    refused = await stage.refused("local", "ListTasks", pb.ListTasksRequest())
    assert "the disk is full" in refused.message
    broken = False
    assert (await stage.get(sent)).status.state == pb.TASK_STATE_COMPLETED
    assert [one.id for one in (await stage.list("local")).tasks] == [sent.task]
    await stage.stop(running)
    assert consistent(tmp_path / "1.db")[1] == 1


async def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="cannot keep its state in"):
        StateFile.take(tmp_path / "file" / "state")


# The tail ------------------------------------------------------------------------------------------


async def test_listeners_learn_of_an_end_within_a_quarter_of_a_second(fresh_stage: Stage) -> None:
    stage = fresh_stage
    running = await stage.coordinator(Settings())
    loop = asyncio.get_running_loop()
    heard: dict[str, float] = {}

    def listen(moved: Iterable[Entry]) -> None:
        heard.update({entry.task: loop.time() for entry in moved if entry.ended})

    def broken(moved: Iterable[Entry]) -> None:
        raise ValueError("a mistake of a listener's")

    running.coordinator.tail.on_change(broken)
    running.coordinator.tail.on_change(listen)
    delays = []
    for n in range(3):
        sent = await stage.done("agent-0", f"{n}")
        stored = loop.time()
        await eventually(partial(heard.get, sent.task))
        delays.append(heard[sent.task] - stored)
        await eventually(lambda: running.coordinator.tail.pause == 0.25)
    assert sorted(delays)[1] < 0.3


# Making it anew ------------------------------------------------------------------------------------


@pytest.fixture
def number_of() -> Iterator[Callable[[Path], int]]:
    """The inode of a file, which is given to no other one as long as the test runs."""
    with ExitStack() as stack:
        yield lambda path: os.fstat(stack.enter_context(path.open("rb")).fileno()).st_ino


async def test_the_file_is_made_anew_while_tasks_are_stored_and_read(
    fresh_stage: Stage, tmp_path: Path, number_of: Callable[[Path], int]
) -> None:
    stage = fresh_stage
    running = await stage.coordinator(quick(tmp_path))
    sent = await some(stage)
    before = await everything(stage, *sent[:-2])
    inode = number_of(tmp_path / "1.db")
    made: list[Sent] = []
    told: set[str] = set()
    running.coordinator.tail.on_change(lambda moved: told.update(one.task for one in moved if one.ended))
    stopping = False

    async def load() -> None:
        while not stopping:
            made.append(await stage.done("agent-2", caller="caller-0"))
            assert (await stage.get(made[-1])).status.state == pb.TASK_STATE_COMPLETED
            assert (await stage.list("caller-0")).total_size == len(made)

    async with asyncio.TaskGroup() as group:
        group.create_task(load())
        for _ in range(3):
            began = len(made)
            answer = await coordinator.call(await stage.broker("operator"), "rebuild")
            assert answer == {"started": True, "coordinators": 1}
            await eventually(lambda: rebuilt(stage))
            await eventually(partial(more_than, made, began + 2))
        stopping = True
    assert (tmp_path / "1.db").stat().st_ino != inode
    assert await everything(stage, *sent[:-2]) == before
    assert (await stage.list("caller-0")).total_size == len(made)
    assert told >= {one.task for one in made}
    assert running.errors == []
    await stage.stop(running)
    assert consistent(tmp_path / "1.db")[1] == len(sent) + len(made)


def more_than(made: list[Sent], count: int) -> bool:
    return len(made) > count


async def rebuilt(stage: Stage) -> bool:
    told = (await projected(stage))["rebuild"]
    assert isinstance(told, dict)
    assert told["error"] == ""
    return not told["running"]


async def test_only_the_operator_may_have_it_made_anew(fresh_stage: Stage) -> None:
    await fresh_stage.coordinator()
    with pytest.raises(Exception, match="rebuild is for the operator"):
        await coordinator.call(await fresh_stage.broker("local"), "rebuild")


# Pages ---------------------------------------------------------------------------------------------

NAMES = ("worker", "other")
CALLERS = ("local", "x")
LABELS = ("working", "input-required", "completed", "failed")
TASKS = st.lists(
    st.tuples(
        st.sampled_from(NAMES), st.sampled_from(CALLERS), st.integers(0, 1), st.sampled_from(["", *LABELS]),
        st.integers(1, 4),
    ),
    max_size=12,
)  # fmt: skip
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "context_id": st.sampled_from(["c0", "c1", "none"]),
        "status": st.sampled_from([pb.TASK_STATE_SUBMITTED, pb.TASK_STATE_COMPLETED, pb.TASK_STATE_FAILED]),
        "page_size": st.integers(1, 4),
    },
)


Plan = list[tuple[str, str, int, str, int]]


def feed(index: TaskIndex, plan: Plan, *, again: Plan | None = None) -> None:
    """New tasks, each perhaps with a first event; or a further event for those that `again` made."""
    for n, (agent, caller, context, label, clock) in enumerate(plan):
        seq = index.watermark.events + 1
        time = f"2026-01-01T00:00:{seq % 60:02d}Z"
        if again is None:
            name = f"m{seq}"
            body = pb.SendMessageRequest(message=pb.Message(message_id=name, context_id=f"c{context}"))
            task = ids.task_id(caller, agent, name)
            subject = subjects.task(agent, "00", caller, task)
            index.created(subject, seq, time=time, headers=None, data=body.SerializeToString())
        else:
            known = sorted(index.visible("operator"), key=lambda one: one.first)
            agent, caller, task = known[n % len(known)].agent, known[n % len(known)].caller, known[n % len(known)].task
        if label:
            event = pb.StreamResponse()
            event.status_update.status.timestamp.FromNanoseconds(clock * 1_000_000_000)
            block = h.block(h.fields({h.EVENT: "1" if again is None else "2", h.STATE: label}))
            subject = subjects.event(agent, task, caller, "o")
            index.happened(subject, seq + 1, time=time, headers=block, data=event.SerializeToString())
        index.watermark = Watermark(seq + 1, seq + 1)


@settings(max_examples=60, deadline=None)
@given(TASKS, TASKS, TASKS, ASKED, st.sampled_from([*CALLERS, "operator"]), st.sampled_from(["_", "worker"]))
def test_pages_out_of_the_file_are_those_of_the_model(
    first: Plan, change: Plan, then: Plan, asked: dict[str, object], caller: str, agent: str
) -> None:
    async def compare(folder: Path) -> None:
        async with opened(folder) as projection:
            index, token = projection.index, ""
            for number, plan in enumerate((first, change, then)):
                feed(index, plan if first else [], again=first if number == 1 else None)
                await projection.store.write((), index.take_changes(), position=index.watermark.events)
                request = pb.ListTasksRequest(page_token=token, **asked)  # type: ignore[arg-type]
                query = listing.query(request, agent=agent, caller=caller)
                found = await projection.store.page(query, now=index.watermark)
                model = listing.select(index.visible(caller), query, now=index.watermark)
                assert [one.key for one in found.tasks] == [one.key for one in model.tasks]
                assert (found.more, found.total, found.seen) == (model.more, model.total, model.seen)
                token = listing.token(query, found, last=found.tasks[-1]) if found.more else ""

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(compare(Path(folder)))


async def test_every_page_is_found_by_an_index_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as projection:
        feed(projection.index, [("worker", "local", 0, "completed", n) for n in range(50)])
        await projection.store.write((), projection.index.take_changes(), position=100)
    connection = sqlite3.connect(tmp_path / "1.db")
    steps: list[str] = []
    for caller in ("local", "operator"):
        for fields in ({}, {"context_id": "c0"}, {"status": pb.TASK_STATE_FAILED}, {"status": pb.TASK_STATE_COMPLETED}):
            for agent in ("_", "worker"):
                query = listing.query(pb.ListTasksRequest(page_size=2, **fields), agent=agent, caller=caller)
                steps += plan_of(connection, query)
    connection.close()
    assert steps
    assert [step for step in steps if " INDEX tasks_" not in step] == []


def plan_of(connection: sqlite3.Connection, query: listing.Query) -> list[str]:
    """How SQLite finds the tasks of a page, but for sorting those of one instant."""
    from weft_coordinator.shell import pages

    seen: list[str] = []
    connection.set_trace_callback(seen.append)
    pages.select(connection, query, now=Watermark(100, 100))
    connection.set_trace_callback(None)
    found = [
        row[3] for text in seen if " FROM tasks" in text for row in connection.execute(f"EXPLAIN QUERY PLAN {text}")
    ]
    assert not any(step == "USE TEMP B-TREE FOR ORDER BY" for step in found)
    return [step for step in found if "tasks" in step]


async def test_an_entry_comes_out_of_the_file_as_it_went_in(tmp_path: Path) -> None:
    entry = Entry(
        "worker", "local", "no-task", "ctx\x00é", "07", int(State.FAILED), 2**70, 3, 10**19, 5, 6, 7, True,
        ("boss", "f" * 32), 8, 9,
    )  # fmt: skip
    entry.detail.origin, entry.detail.attempts, entry.detail.replica, entry.detail.snapshot = "o", 10**30, "r", 4
    index = TaskIndex()
    async with opened(tmp_path) as projection:
        index.adopt([entry])
        changes = type(index.take_changes())(entries=(entry,))
        await projection.store.write((), changes, position=1)
        (found,) = await projection.store.lookup(["no-task"])
    # Numbers that writers choose may be larger than a column.
    entry.time, entry.status, entry.detail.attempts = 2**63 - 1, 2**63 - 1, 2**63 - 1
    assert found.row == entry.row == 1
    assert {name: getattr(found, name) for name in Entry.__slots__ if name != "detail"} == {
        name: getattr(entry, name) for name in Entry.__slots__ if name != "detail"
    }
    assert {name: getattr(found.detail, name) for name in ("origin", "attempts", "replica", "snapshot")} == {
        "origin": "o", "attempts": 2**63 - 1, "replica": "r", "snapshot": 4,
    }  # fmt: skip
