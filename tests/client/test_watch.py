"""What a caller knows of one task: its events in order, once, whatever the order they came in."""

from __future__ import annotations

import asyncio

import pytest
from a2a.types import a2a_pb2 as pb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.client.watch import TaskWatch, event_of
from weft_protocols import a2a
from weft_protocols import headers as h
from weft_protocols.errors import InvalidParams, Unavailable
from weft_protocols.events import RawEvent
from weft_protocols.states import State

pytestmark = pytest.mark.anyio


def event(n: int, label: str = "", *, text: str = "", seq: int = 0, headers: dict[str, str] | None = None) -> RawEvent:
    body = pb.StreamResponse()
    if label:
        body.status_update.status.state = a2a.state_to_proto(a2a.state_from_label(label))
        if text:
            body.status_update.status.message.parts.add(text=text)
    else:
        body.artifact_update.artifact.artifact_id = f"a{n}"
        body.artifact_update.artifact.parts.add(text=text or str(n))
    lines = {h.EVENT: str(n), **({h.STATE: label} if label else {}), **(headers or {})}
    return RawEvent.of(body.SerializeToString(), h.block(h.fields(lines)), seq=seq)


def numbers(queue: asyncio.Queue[RawEvent | None]) -> list[int | None]:
    found = []
    while not queue.empty():
        one = queue.get_nowait()
        found.append(one.n if one is not None else None)
    return found


@given(order=st.permutations(range(1, 9)), repeats=st.lists(st.integers(1, 8), max_size=8), at=st.integers(0, 8))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_events_come_out_in_order_and_once_however_they_come_in(
    order: list[int], repeats: list[int], at: int
) -> None:
    watch = TaskWatch("a", "t")
    early = watch.reader()
    for n in order[:at]:
        watch.feed(event(n), now=0.0)
    late = watch.reader()
    for n in [*repeats, *order[at:], *repeats]:
        watch.feed(event(n), now=0.0)
    assert numbers(early) == numbers(late) == list(range(1, 9))
    assert (watch.seen, watch.has_gap) == (8, False)


async def test_a_later_event_is_held_back_until_the_gap_is_filled() -> None:
    watch = TaskWatch("a", "t")
    queue = watch.reader()
    watch.feed(event(2, "completed"), now=0.0)
    assert (watch.has_gap, watch.ended, numbers(queue)) == (True, False, [])
    watch.feed(event(1, "working"), now=0.0)
    assert (watch.has_gap, watch.ended, numbers(queue)) == (False, True, [1, 2])


async def test_of_two_events_with_one_number_the_first_counts() -> None:
    watch = TaskWatch("a", "t")
    watch.feed(event(1, text="first"), now=0.0)
    watch.feed(event(1, text="second"), now=0.0)
    assert a2a.view_of(watch.log(), watch.task_id, agent="a", last=watch.seen).text == "first"


async def test_skipping_gives_up_what_is_missing_and_nothing_that_is_here() -> None:
    watch = TaskWatch("a", "t")
    queue = watch.reader()
    for n in (3, 5, 7):
        watch.feed(event(n), now=0.0)
    watch.skip_to(6, now=0.0)
    assert numbers(queue) == [3, 5]
    assert watch.seen == 5
    watch.feed(event(4), now=0.0)
    watch.feed(event(6), now=0.0)
    assert numbers(queue) == [6, 7]
    watch.skip_to(2, now=0.0)
    assert watch.seen == 7


async def test_a_reader_from_the_middle_sees_what_is_later() -> None:
    watch = TaskWatch("a", "t", after=3)
    queue = watch.reader()
    for n in (1, 2, 3, 4, 5):
        watch.feed(event(n), now=0.0)
    assert numbers(queue) == [4, 5]


async def test_a_reader_that_was_released_gets_nothing_more() -> None:
    watch = TaskWatch("a", "t")
    queue = watch.reader()
    watch.release(queue)
    watch.feed(event(1), now=0.0)
    assert queue.empty()


@pytest.mark.parametrize("label", ["completed", "failed", "canceled", "rejected", "message", "input-required"])
async def test_waiting_ends_when_the_task_stops(label: str) -> None:
    watch = TaskWatch("a", "t")
    waiting = [asyncio.create_task(watch.stopped()) for _ in range(3)]
    watch.feed(event(1, "working"), now=0.0)
    await asyncio.sleep(0)
    assert not any(one.done() for one in waiting)
    watch.feed(event(2, label), now=0.0)
    async with asyncio.timeout(1):
        assert [await one for one in waiting] == [label] * 3
    assert watch.ended is (label != "input-required")


async def test_after_an_interruption_waiting_goes_on_to_the_next_stop() -> None:
    watch = TaskWatch("a", "t")
    watch.feed(event(1, "input-required"), now=0.0)
    waiting = asyncio.create_task(watch.stopped(after=1))
    await asyncio.sleep(0)
    assert not waiting.done()
    watch.feed(event(2, "working"), now=0.0)
    watch.feed(event(3, "input-required"), now=0.0)
    async with asyncio.timeout(1):
        assert await waiting == "input-required"


async def test_a_stop_stored_before_the_follow_up_is_not_its_answer() -> None:
    watch = TaskWatch("a", "t")
    waiting = asyncio.create_task(watch.stopped(after=0, sent=20))
    watch.feed(event(1, "input-required", seq=10), now=0.0)
    await asyncio.sleep(0)
    assert not waiting.done()
    watch.feed(event(2, "input-required", seq=30), now=0.0)
    async with asyncio.timeout(1):
        assert await waiting == "input-required"


async def test_a_stop_stored_after_a_follow_up_that_was_sent_before_is_its_answer_even_if_seen_already() -> None:
    watch = TaskWatch("a", "t")
    watch.feed(event(1, "working", seq=10), now=0.0)
    watch.feed(event(2, "input-required", seq=30), now=0.0)
    async with asyncio.timeout(1):
        assert await watch.stopped(after=2, sent=20) == "input-required"


async def test_a_refusal_concerns_its_message_and_changes_nothing_else() -> None:
    watch = TaskWatch("a", "t")
    watch.feed(event(1, "working", text="at work"), now=0.0)
    refused, other = (asyncio.create_task(watch.stopped(message_id=name)) for name in ("m-1", "m-2"))
    refusal = {h.ERROR: "INVALID_PARAMS", h.IN_REPLY_TO: "m-1"}
    watch.feed(event(2, "input-required", text="not that", headers=refusal), now=0.0)
    async with asyncio.timeout(1):
        with pytest.raises(InvalidParams, match="not that"):
            await refused
    assert not other.done()
    assert (watch.state, watch.seen) == ("working", 2)
    assert a2a.view_of(watch.log(), watch.task_id, agent="a", last=watch.seen).message == a2a.message_from_proto(
        event(1, "working", text="at work").decode().status_update.status.message
    )
    watch.feed(event(3, "completed"), now=0.0)
    async with asyncio.timeout(1):
        assert await other == "completed"


async def test_failing_wakes_everybody_who_waits_and_whoever_comes_later() -> None:
    watch = TaskWatch("a", "t")
    queue = watch.reader()
    waiting = [asyncio.create_task(watch.stopped()), asyncio.create_task(watch.over())]
    watch.feed(event(1, "working"), now=0.0)
    await asyncio.sleep(0)
    watch.fail(Unavailable("over"))
    for one in waiting:
        with pytest.raises(Unavailable, match="over"):
            await one
    assert numbers(queue) == numbers(watch.reader()) == [1, None]


async def test_what_has_ended_can_be_read_after_a_failure() -> None:
    watch = TaskWatch("a", "t")
    watch.feed(event(1, "completed"), now=0.0)
    watch.fail(Unavailable("over"))
    assert await watch.stopped() == "completed"


def test_an_event_is_shown_as_plain_values_whatever_its_headers_say() -> None:
    raw = event(1, "working", text="hello", headers={h.REPLICA: "r-1", h.ATTEMPT: "2"})
    shown = event_of(raw, raw.decode(), task_id="t", agent="a")
    assert (shown.n, shown.state, shown.text, shown.replica, shown.attempt) == (1, State.WORKING, "hello", "r-1", 2)
    for nonsense in ("-1", "x", "²", "1e9"):
        raw = event(1, "working", headers={h.ATTEMPT: nonsense})
        assert event_of(raw, raw.decode(), task_id="t", agent="a").attempt == 0
    artifact = event_of(event(2, text="chunk"), event(2, text="chunk").decode(), task_id="t", agent="a")
    assert (artifact.state, artifact.text, artifact.append) == (None, "chunk", False)
