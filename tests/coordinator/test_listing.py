"""Pages of a list along random histories: no task twice, none lost that stayed as it was."""

from __future__ import annotations

import pytest
from a2a.types import a2a_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from weft_coordinator.decide import listing
from weft_coordinator.decide.index import Entry, TaskIndex, Watermark
from weft_coordinator.decide.listing import Query, Selection
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.errors import InvalidParams

AGENT = "worker"


class World:
    """A stream of one agent and one caller, and an index that may lag behind it, each kind for itself."""

    def __init__(self) -> None:
        self.index = TaskIndex()
        self.names: list[str] = []
        self.numbers: dict[str, int] = {}
        self.waiting: dict[str, list[tuple[str, int, bytes, bytes | None]]] = {"task": [], "event": []}
        self.seq = 0

    def create(self) -> None:
        name = f"m{len(self.names)}"
        self.names.append(name)
        self.numbers[name] = 0
        body = pb.SendMessageRequest(message=pb.Message(message_id=name, context_id=f"c{len(self.names) % 2}"))
        subject = subjects.task(AGENT, "00", "local", ids.task_id("local", AGENT, name))
        self._store("task", subject, body.SerializeToString(), None)

    def change(self, which: int, label: str, clock: int) -> None:
        if not self.names:
            return
        name = self.names[which % len(self.names)]
        self.numbers[name] += 1
        event = pb.StreamResponse()
        event.status_update.status.timestamp.FromNanoseconds(clock * 1_000_000_000)
        subject = subjects.event(AGENT, ids.task_id("local", AGENT, name), "local", "o")
        block = h.block(h.fields({h.EVENT: str(self.numbers[name]), h.STATE: label}))
        self._store("event", subject, event.SerializeToString(), block)

    def _store(self, kind: str, subject: str, data: bytes, headers: bytes | None) -> None:
        self.seq += 1
        self.waiting[kind].append((subject, self.seq, data, headers))

    def read(self, kind: str, count: int | None = None) -> None:
        take = self.index.created if kind == "task" else self.index.happened
        ready = self.waiting[kind] if count is None else self.waiting[kind][:count]
        self.waiting[kind] = self.waiting[kind][len(ready) :]
        for subject, seq, data, headers in ready:
            take(subject, seq, time=f"2026-01-01T00:00:{seq % 60:02d}Z", headers=headers, data=data)

    def page(self, **fields: object) -> tuple[Query, Selection]:
        query = listing.query(pb.ListTasksRequest(**fields), agent="_", caller="local")  # type: ignore[arg-type]
        return query, listing.select(self.index.visible("local"), query, now=self.index.watermark)

    def positions(self, **fields: object) -> dict[str, tuple[int, int]]:
        """Where every task that passes the filters stands now."""
        passing = listing.query(pb.ListTasksRequest(page_size=100, **fields), agent="_", caller="local")  # type: ignore[arg-type]
        chosen = listing.select(self.index.visible("local"), passing, now=self.index.watermark)
        return {one.entry.task: (one.time, one.seq) for one in chosen.tasks}


STEPS = st.lists(
    st.one_of(
        st.just(("create", 0, "", 0)),
        st.builds(
            lambda which, label, clock: ("change", which, label, clock),
            st.integers(0, 30),
            st.sampled_from(["working", "input-required", "completed", "failed"]),
            st.integers(1_767_225_000, 1_767_226_000),
        ),
        st.builds(lambda kind, count: ("read", count, kind, 0), st.sampled_from(["task", "event"]), st.integers(1, 9)),
    ),
    max_size=30,
)
FILTERS = st.sampled_from([{}, {"context_id": "c1"}, {"status": pb.TASK_STATE_WORKING}])


def take(world: World, steps: list[tuple[str, int, str, int]]) -> None:
    for kind, number, label, clock in steps:
        if kind == "create":
            world.create()
        elif kind == "change":
            world.change(number, label, clock)
        else:
            world.read(label, number)


@settings(max_examples=300, deadline=None)
@given(STEPS, st.lists(STEPS, min_size=1, max_size=6), st.integers(1, 4), FILTERS)
def test_no_page_repeats_a_task_or_loses_one_that_did_not_change(
    before: list[tuple[str, int, str, int]],
    between: list[list[tuple[str, int, str, int]]],
    size: int,
    filters: dict[str, object],
) -> None:
    world = World()
    take(world, before)
    start = world.positions(**filters)
    seen: list[str] = []
    token = ""
    for round_ in range(60):
        query, chosen = world.page(page_size=size, page_token=token, **filters)
        seen += [one.entry.task for one in chosen.tasks]
        if not chosen.more:
            break
        token = listing.token(query, chosen, last=chosen.tasks[-1])
        take(world, between[round_] if round_ < len(between) else [])
    world_end = world.positions(**filters)
    assert len(seen) == len(set(seen))
    unchanged = {task for task, position in start.items() if world_end.get(task) == position}
    assert unchanged <= set(seen)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_a_page_is_sorted_and_knows_the_total(steps: list[tuple[str, int, str, int]]) -> None:
    world = World()
    take(world, steps)
    world.read("task")
    world.read("event")
    _, chosen = world.page(page_size=3)
    assert [one.key for one in chosen.tasks] == sorted((one.key for one in chosen.tasks), reverse=True)
    assert chosen.total == len(world.names)
    assert chosen.more == (len(world.names) > 3)


def test_a_task_whose_worker_has_a_slow_clock_is_not_shown_twice() -> None:
    entries = [Entry(AGENT, "local", f"{n}" * 32, time=n, seq=n, status=1) for n in (3, 2, 1)]
    query = listing.query(pb.ListTasksRequest(page_size=1), agent="_", caller="local")
    first = listing.select(entries, query, now=Watermark(0, 3))
    token = listing.token(query, first, last=first.tasks[-1])
    # Its next status is older than the last one: it moves behind the token.
    entries[0].time, entries[0].seq = 0, 4
    query = listing.query(pb.ListTasksRequest(page_size=5, page_token=token), agent="_", caller="local")
    rest = listing.select(entries, query, now=Watermark(0, 4))
    assert [one.entry.task[0] for one in rest.tasks] == ["2", "1"]


@given(st.text(max_size=40))
def test_whatever_is_sent_as_a_token_is_opened_or_refused(token: str) -> None:
    if token:
        with pytest.raises(InvalidParams):
            listing.query(pb.ListTasksRequest(page_token=token), agent="_", caller="local")


def test_the_page_size_is_fifty_unless_told_otherwise() -> None:
    assert listing.query(pb.ListTasksRequest(), agent="_", caller="local").size == 50
    for size in (1, 100):
        assert listing.query(pb.ListTasksRequest(page_size=size), agent="_", caller="local").size == size


def test_all_wrong_fields_are_named_at_once() -> None:
    request = pb.ListTasksRequest(page_size=0, history_length=-2, page_token="?")
    with pytest.raises(InvalidParams) as caught:
        listing.query(request, agent="_", caller="local")
    assert [one.field for one in caught.value.violations] == ["page_size", "history_length", "page_token"]
