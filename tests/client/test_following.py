"""Following tasks: what was missed is found, whoever sent the task and whatever happened on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest
from a2a.types import a2a_pb2 as pb

import weft
from weft.client import mesh as mesh_module
from weft.client import reads as reads_module
from weft.testing.agents import client, eventually
from weft.testing.broker import BrokerMesh
from weft_protocols import subjects
from weft_protocols.errors import TaskNotCancelable, TaskNotFound, Unavailable, UnsupportedOperation
from weft_protocols.states import State

if TYPE_CHECKING:
    from tests.client.conftest import Host, ReadSide

pytestmark = pytest.mark.anyio

Unique = Callable[[str], str]


async def deaf(caller: weft.Mesh) -> None:
    """Live events reach this client no more."""
    assert caller._live is not None
    await caller._live.close()


def hang_up(caller: weft.Mesh) -> None:
    """The connection breaks; the client will reconnect."""
    caller.broker._wire._abort()


# Lost, late and repeated events --------------------------------------------------------------------


async def test_events_out_of_order_and_repeated_come_out_in_order_and_once(
    caller: weft.Mesh, host: Host, quick: None
) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        work = await host.claim(handle.id)
        await work.artifact(pb.Part(text="two"), name="a", n=2)
        await work.artifact(pb.Part(text="two again"), name="a", n=2)
        await work.status("working", "one", n=1)
        await work.status("working", "one again", n=1)
        await work.status("completed", n=3)
        view = await handle.result(10)
        assert [(event.n, event.text) async for event in handle.events()] == [(1, "one"), (2, "two"), (3, "")]
    assert view.text == "two"


async def test_a_last_event_that_was_lost_is_found_without_a_read_side(
    caller: weft.Mesh, host: Host, quick: None
) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        work = await host.claim(handle.id)
        await work.status("working")
        await eventually(lambda: handle._watched.watch.seen == 1)
        await deaf(caller)
        await work.status("completed", "found")
        assert (await handle.result(5)).text == "found"


async def test_several_lost_events_are_read(caller: weft.Mesh, host: Host, reads: ReadSide, quick: None) -> None:
    reads.page = 2
    async with await caller.submit(host.agent, "x") as handle:
        await deaf(caller)
        work = await host.claim(handle.id)
        for i in range(6):
            await work.artifact(pb.Part(text=str(i)), append=True)
        await work.status("completed")
        assert (await handle.result(5)).text == "012345"
        assert [event.n async for event in handle.events()] == [1, 2, 3, 4, 5, 6, 7]


async def test_a_gap_is_held_back_until_the_read_side_is_there(
    caller: weft.Mesh, host: Host, reads: ReadSide, quick: None
) -> None:
    await reads.leave()
    async with await caller.submit(host.agent, "x") as handle:
        work = await host.claim(handle.id)
        live, caller._live = caller._live, None
        assert live is not None
        await live.close()
        await work.status("working", "missed")
        caller._live = await caller.broker.subscribe_raw(subjects.live(caller.caller, caller.origin), caller._on_live)
        await caller.broker.flush()
        await work.artifact(pb.Part(text="heard"))
        await work.status("completed")
        await eventually(lambda: handle._watched.watch.has_gap)
        events = handle.events(timeout=10)
        first = asyncio.create_task(anext(events))
        await eventually(lambda: not handle._watched.checking)
        assert not first.done()
        await reads.come()
        assert (await first).text == "missed"
        assert [event.n async for event in events] == [2, 3]


async def test_a_number_that_was_never_stored_is_passed_over(
    caller: weft.Mesh, host: Host, reads: ReadSide, quick: None
) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        work = await host.claim(handle.id)
        await work.status("working", n=1)
        await work.artifact(pb.Part(text="three"), n=3)
        await work.artifact(pb.Part(text="six"), name="b", n=6)
        await work.status("completed", n=8)
        assert (await handle.result(5)).text == "three\nsix"
        assert [event.n async for event in handle.events()] == [1, 3, 6, 8]


async def test_holes_between_and_behind_pages_are_passed_over(
    caller: weft.Mesh, host: Host, reads: ReadSide, quick: None
) -> None:
    reads.page = 2
    async with await caller.submit(host.agent, "x") as handle:
        await deaf(caller)
        work = await host.claim(handle.id)
        for n in (2, 4, 5, 9):
            await work.artifact(pb.Part(text=str(n)), name=str(n), n=n)
        await work.status("completed", n=11)
        begun = time.monotonic()
        assert (await handle.result(5)).text == "2\n4\n5\n9"
        assert time.monotonic() - begun < 2
        assert [event.n async for event in handle.events()] == [2, 4, 5, 9, 11]


async def test_what_happened_while_the_connection_was_broken_is_found(
    caller: weft.Mesh, host: Host, reads: ReadSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh_module, "RESYNC", (30.0, 30.0))  # by the reconnect, and not by the silence
    async with await caller.submit(host.agent, "x") as handle:
        work = await host.claim(handle.id)
        await work.status("working")
        await eventually(lambda: handle._watched.watch.seen == 1)
        lost = asyncio.Event()
        caller.broker.on_lost(lost.set)
        hang_up(caller)
        await lost.wait()
        await work.artifact(pb.Part(text="while away"))
        await work.status("completed")
        assert (await handle.result(10)).text == "while away"


async def test_a_stream_goes_on_over_a_restart_of_the_server(fresh_mesh: BrokerMesh, unique: Unique) -> None:
    from tests.client.conftest import Host, ReadSide

    await fresh_mesh.add_agent("hosted")
    host = await Host(await fresh_mesh.connect("hosted"), "hosted").start()
    reads = await ReadSide(await fresh_mesh.connect("coordinator")).come()
    try:
        async with client(fresh_mesh) as caller, await caller.submit("hosted", "x") as handle:
            work = await host.claim(handle.id)
            events = handle.events(timeout=15)
            for round_ in range(2):
                await work.status("working", f"before {round_}")
                assert (await anext(events)).text == f"before {round_}"
                os.kill(fresh_mesh.server.pid, signal.SIGKILL)
                await fresh_mesh.server.wait()
                after = asyncio.create_task(work.status("working", f"after {round_}"))
                await fresh_mesh.server.start()
                assert (await anext(events)).text == f"after {round_}"
                await after
            await work.complete("all of it")
            assert [event.n async for event in events] == [5, 6, 7]
            assert (await handle.result(5)).text == "all of it"
    finally:
        await host.aclose()
        await reads.aclose()


async def test_many_tasks_are_followed_at_once(caller: weft.Mesh, host: Host) -> None:
    handles = [await caller.submit(host.agent, n) for n in range(40)]
    assert caller.following == 40

    async def work(handle: weft.Handle) -> None:
        await (await host.claim(handle.id)).complete(handle.id)

    async with asyncio.TaskGroup() as group:
        for handle in reversed(handles):
            group.create_task(work(handle))
    for handle in handles:
        async with handle:
            assert (await handle.result(10)).text == handle.id
    assert caller.following == 0


# By another process --------------------------------------------------------------------------------


async def test_a_message_sent_again_by_another_process_is_the_same_task_and_brings_its_result(
    caller: weft.Mesh, other_process: weft.Mesh, host: Host, reads: ReadSide
) -> None:
    async with await caller.submit(host.agent, "x", message_id="m-again") as first:
        work = await host.claim(first.id)
        await work.status("working")
        async with await other_process.submit(host.agent, "x", message_id="m-again") as second:
            assert second.id == first.id
            events = second.events(timeout=10)
            assert (await anext(events)).n == 1
            await work.artifact(pb.Part(text="for both"))
            await work.status("completed")
            assert [event.n async for event in events] == [2, 3]
            assert (await second.result(10)).text == (await first.result(10)).text == "for both"
    assert host._work[first.id].empty()
    assert other_process.following == 0
    again = await other_process.send(host.agent, "x", message_id="m-again", timeout=10)
    assert (again.id, again.text) == (first.id, "for both")


async def test_a_message_sent_again_before_anybody_took_it_brings_its_result(
    caller: weft.Mesh, other_process: weft.Mesh, host: Host, reads: ReadSide, quick: None
) -> None:
    first = await caller.submit(host.agent, "x", message_id="m-early")
    await first.aclose()  # the first process ends
    async with await other_process.submit(host.agent, "x", message_id="m-early") as second:
        await eventually(lambda: second._watched.elsewhere)
        await (await host.claim(second.id)).complete("late")
        assert (await second.result(5)).text == "late"


async def test_a_message_sent_again_is_followed_once_the_read_side_is_there(
    caller: weft.Mesh, other_process: weft.Mesh, host: Host, reads: ReadSide, quick: None
) -> None:
    await reads.leave()
    async with await caller.submit(host.agent, "x", message_id="m-later") as first:
        await (await host.claim(first.id)).complete("later")
        await first.result(10)
    async with await other_process.submit(host.agent, "x", message_id="m-later") as second:
        await eventually(lambda: second._watched.silent_checks >= 1)
        await reads.come()
        assert (await second.result(5)).text == "later"


async def test_a_task_can_be_followed_from_any_event_on(
    caller: weft.Mesh, other_process: weft.Mesh, host: Host, reads: ReadSide
) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        work = await host.claim(handle.id)
        for i in range(5):
            await work.artifact(pb.Part(text=str(i)), name=str(i))
        for after in (0, 1, 5):
            stream = other_process.subscribe(host.agent, handle.id, after=after, timeout=10)
            async with aclosing(stream):
                for n in range(after + 1, 6):
                    assert (await anext(stream)).n == n
        ahead = other_process.subscribe(host.agent, handle.id, after=5, timeout=10)
        own = caller.subscribe(host.agent, handle.id, after=3, timeout=10)
        waiting = asyncio.create_task(anext(ahead))
        assert [(await anext(own)).n, (await anext(own)).n] == [4, 5]
        await eventually(lambda: other_process.following == 1)
        await work.status("completed")
        assert (await waiting).n == 6
        assert [event.n async for event in own] == [6]
        assert [event.n async for event in ahead] == []
    assert (caller.following, other_process.following) == (0, 0)


async def test_following_a_task_that_has_ended_ends(
    other_process: weft.Mesh, caller: weft.Mesh, host: Host, reads: ReadSide
) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        await (await host.claim(handle.id)).complete("over")
        await handle.result(10)
    for after, rest in ((0, [1, 2, 3]), (2, [3]), (3, []), (9, [])):
        stream = other_process.subscribe(host.agent, handle.id, after=after, timeout=10)
        assert [event.n async for event in stream] == rest
    assert (await other_process.result(host.agent, handle.id, timeout=10)).text == "over"
    assert (await other_process.get(host.agent, handle.id)).events == 3


async def test_another_process_can_answer_and_cancel(
    caller: weft.Mesh, other_process: weft.Mesh, host: Host, reads: ReadSide
) -> None:
    async with await caller.submit(host.agent, "x", context_id="talk") as handle:
        work = await host.claim(handle.id)
        await work.status("input-required", "which one?")
        view = await other_process.result(host.agent, handle.id, timeout=10)
        assert (view.state, view.text, view.context_id) == (State.INPUT_REQUIRED, "which one?", "talk")
        answering = asyncio.create_task(other_process.send(host.agent, "red", task_id=handle.id, timeout=10))
        delivery = await host.input(handle.id)
        assert delivery.subject.split(".")[3] == work.delivery.subject.split(".")[3], "the slice of the task"
        await work.status("working")
        await work.status("input-required", "sure?")
        assert (await answering).text == "sure?"
        cancelling = asyncio.create_task(other_process.cancel(host.agent, handle.id, timeout=10))
        await host.input(handle.id)
        await work.status("canceled")
        assert (await cancelling).state is State.CANCELED
        await handle._watched.watch.over()
        assert (await handle.result(10)).state is State.CANCELED
    for late, error in (
        (other_process.send(host.agent, "x", task_id=handle.id), UnsupportedOperation),
        (other_process.cancel(host.agent, handle.id), TaskNotCancelable),
    ):
        with pytest.raises(error):
            await late


async def test_a_task_that_nobody_has_begun_can_be_answered_and_cancelled_by_another_process(
    caller: weft.Mesh, other_process: weft.Mesh, host: Host, reads: ReadSide
) -> None:
    async with await caller.submit(host.agent, "x", context_id="talk") as handle:
        cancelling = asyncio.create_task(other_process.cancel(host.agent, handle.id, timeout=10))
        delivery = await host.input(handle.id)
        work = await host.claim(handle.id)
        assert delivery.subject.split(".")[3] == work.delivery.subject.split(".")[3]
        await work.status("canceled")
        assert (await cancelling).state is State.CANCELED


async def test_several_that_open_one_task_at_once_listen_once(
    caller: weft.Mesh, other_process: weft.Mesh, host: Host, reads: ReadSide
) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        work = await host.claim(handle.id)
        await work.status("working")
        before = len(other_process.broker._wire._subs)
        handles = await asyncio.gather(*(other_process.handle(host.agent, handle.id) for _ in range(5)))
        assert len(other_process.broker._wire._subs) == before + 1
        await work.status("completed", "for all")
        assert [(await one.result(10)).text for one in handles] == ["for all"] * 5
        for one in handles:
            await one.aclose()
        assert len(other_process.broker._wire._subs) == before


# Whose task it is ----------------------------------------------------------------------------------


@pytest.fixture
async def stranger(mesh: BrokerMesh, unique: Unique) -> AsyncIterator[weft.Mesh]:
    """A client of another identity."""
    name = unique("stranger")
    await mesh.add_caller(name)
    async with client(mesh, name) as made:
        yield made


async def test_a_task_of_another_caller_is_not_found(
    caller: weft.Mesh, stranger: weft.Mesh, host: Host, reads: ReadSide
) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        work = await host.claim(handle.id)
        await work.status("input-required")
        for call in (
            stranger.get(host.agent, handle.id),
            stranger.handle(host.agent, handle.id),
            stranger.result(host.agent, handle.id),
            stranger.cancel(host.agent, handle.id),
            stranger.send(host.agent, "x", task_id=handle.id),
            anext(stranger.subscribe(host.agent, handle.id)),
            anext(stranger.subscribe(host.agent, handle.id, after=1)),
        ):
            with pytest.raises(TaskNotFound):
                await call
        assert (stranger.following, host.inputs(handle.id)) == (0, 0)
        await work.status("completed")


async def test_the_same_message_of_another_caller_is_another_task(
    caller: weft.Mesh, stranger: weft.Mesh, host: Host
) -> None:
    mine = await caller.submit(host.agent, "x", message_id="m-shared")
    theirs = await stranger.submit(host.agent, "x", message_id="m-shared")
    async with mine, theirs:
        assert mine.id != theirs.id
        await (await host.claim(mine.id)).complete("mine")
        await (await host.claim(theirs.id)).complete("theirs")
        assert ((await mine.result(10)).text, (await theirs.result(10)).text) == ("mine", "theirs")


# Without a read side -------------------------------------------------------------------------------


async def test_reads_without_a_read_side_say_who_is_missing_at_once(caller: weft.Mesh, host: Host) -> None:
    task = "0" * 32
    begun = time.monotonic()
    for call in (
        caller.get(host.agent, task),
        caller.list(),
        caller.list(host.agent),
        caller.handle(host.agent, task),
        caller.cancel(host.agent, task),
        caller.send(host.agent, "x", task_id=task),
        anext(caller.subscribe(host.agent, task)),
    ):
        with pytest.raises(Unavailable, match="coordinator is not running"):
            await call
    assert time.monotonic() - begun < 5
    assert caller.following == 0


async def test_a_read_side_that_does_not_answer_is_unavailable_by_the_deadline(
    caller: weft.Mesh, host: Host, reads: ReadSide
) -> None:
    reads.silent = True
    with pytest.raises(Unavailable):
        await reads_module.call(
            caller.broker,
            "GetTask",
            agent=host.agent,
            caller="local",
            request=pb.GetTaskRequest(id="0" * 32),
            timeout=0.2,
        )
