"""The checker finds what it says it finds: a sound log passes, and each law fails on a log that breaks it."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from weft.core.history import COUNT
from weft.testing.broker import BrokerMesh
from weft.testing.invariants import Effect, Entry, check, read_log
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.records import HANDED_BACK, HELD, Claim

TASK = ids.task_id("local", "a", "m1")
OTHER = ids.task_id("local", "a", "m2")

Log = list[Entry]


def message(seq: int, task: str = TASK) -> Entry:
    return Entry(seq, subjects.task("a", "07", "local", task), {})


def claim(
    seq: int, *, expects: int = 0, replica: str = "r1", attempt: int = 1, state: str = HELD, task: str = TASK
) -> Entry:
    delivery = f"$JS.ACK.{attempt}"
    record = Claim(
        replica, "1", attempt, caller="local", origin="o", context="c", slice="07", message=1, delivery=delivery,
        state=state,
    )  # fmt: skip
    headers = {"nats-expected-last-subject-sequence": str(expects)}
    return Entry(seq, subjects.claim("a", task), headers, record.encode())


def fenced(token: int, task: str = TASK) -> dict[str, str]:
    return {
        h.EXPECTED_SEQUENCE.lower(): str(token),
        h.EXPECTED_SUBJECT.lower(): subjects.claim("a", task),
    }


def event(seq: int, n: int, state: str | None = None, *, token: int = 2, task: str = TASK) -> Entry:
    headers = {**fenced(token, task), "weft-event": str(n)}
    if state is not None:
        headers["weft-state"] = state
    return Entry(seq, subjects.event("a", task, "local", "o"), headers, f"event {n}".encode())


def step(seq: int, key: str, *, token: int = 2, task: str = TASK) -> Entry:
    return Entry(seq, subjects.step("a", task, key), fenced(token, task))


def begins(seq: int, n: int, *, replica: str, attempt: int, expects: int = 5) -> Entry:
    """The event that begins a later attempt: fenced by the event before it."""
    headers = {
        h.EXPECTED_SEQUENCE.lower(): str(expects),
        "weft-event": str(n),
        "weft-state": "working",
        "weft-replica": replica,
        "weft-attempt": str(attempt),
    }
    return Entry(seq, subjects.event("a", TASK, "local", "o"), headers)


def again(seq: int, n: int, state: str | None = None, *, expects: int) -> Entry:
    """An event sent again because its outcome was unknown: fenced by the event before it."""
    headers = {h.EXPECTED_SEQUENCE.lower(): str(expects), "weft-event": str(n)}
    if state is not None:
        headers["weft-state"] = state
    return Entry(seq, subjects.event("a", TASK, "local", "o"), headers, f"event {n}".encode())


def sound() -> Log:
    """A task that was taken over once, and one that was not."""
    return [
        message(1),
        claim(2),
        event(3, 1, "working"),
        step(4, "fetch"),
        event(5, 2),
        claim(6, expects=2, replica="r2", attempt=2),
        begins(7, 3, replica="r2", attempt=2),
        step(8, "store", token=6),
        event(9, 4, "completed", token=6),
        message(10, OTHER),
        claim(11, task=OTHER),
        event(12, 1, "working", token=11, task=OTHER),
        event(13, 2, "completed", token=11, task=OTHER),
    ]


EFFECTS = (
    Effect(TASK, "fetch", "key of fetch", 1),
    Effect(TASK, "store", "key of store", 1),
    Effect(TASK, "store", "key of store", 2),
)


def without(seq: int) -> Callable[[Log], Log]:
    return lambda log: [entry for entry in log if entry.seq != seq]


def put(*entries: Entry) -> Callable[[Log], Log]:
    """Replace entries of the same sequence, or add them at their place."""
    new = {entry.seq: entry for entry in entries}

    def change(log: Log) -> Log:
        kept = [entry for entry in log if entry.seq not in new]
        return sorted([*kept, *entries], key=lambda entry: entry.seq)

    return change


def with_header(seq: int, name: str, value: str) -> Callable[[Log], Log]:
    return lambda log: [
        replace(entry, headers={**entry.headers, name: value}) if entry.seq == seq else entry for entry in log
    ]


BROKEN: list[tuple[int, str, Callable[[Log], Log]]] = [
    (1, "no creating message", without(1)),
    (1, "two creating messages", put(message(14))),
    (1, "a foreign message", put(Entry(14, "mesh.other.a.b", {}))),
    (2, "no terminal event", without(9)),
    (2, "two terminal events", put(event(14, 5, "failed", token=6))),
    (3, "an event after the terminal one", put(event(14, 5, token=6))),
    (3, "a step after the terminal event", put(step(14, "late", token=6))),
    (4, "numbers begin at 2", put(event(12, 2, "working", token=11, task=OTHER), event(13, 3, "completed", token=11, task=OTHER))),  # noqa: E501
    (4, "a hole without a takeover", put(event(13, 3, "completed", token=11, task=OTHER))),
    (4, "a number stored twice", put(event(5, 1, "working"))),
    (4, "a number used again by the next owner", put(event(9, 2, "completed", token=6))),
    (4, "no number", with_header(5, "weft-event", "")),
    (5, "a step recorded twice", put(step(8, "fetch", token=6))),
    (6, "an event before any claim", without(11)),
    (6, "an event of the old owner after the takeover", put(event(8, 4, token=2), event(9, 5, "completed", token=6))),
    (6, "a step of the old owner after the takeover", put(step(8, "store", token=2))),
    (6, "a beginning of a replica that never claimed", put(begins(7, 3, replica="r3", attempt=2))),
    (6, "a beginning of another attempt than claimed", put(begins(7, 3, replica="r2", attempt=3))),
    (6, "a beginning that missed an event", put(begins(7, 3, replica="r2", attempt=2, expects=3))),
    (6, "an event sent again without renewing the claim", put(again(9, 4, "completed", expects=7))),
    (7, "a claim that did not expect the one before", put(claim(6, expects=0, replica="r2", attempt=2))),
    (7, "an attempt that does not grow", put(claim(6, expects=2, replica="r2", attempt=1))),
    (7, "an attempt that jumps", put(claim(6, expects=2, replica="r2", attempt=3))),
    (7, "a renewal that counts as an attempt", put(claim(6, expects=2, replica="r1", attempt=3))),
    (7, "a hand-back that counts as an attempt", put(claim(6, expects=2, attempt=2, state=HANDED_BACK))),
    (8, "input-required after the end", put(event(14, 5, "input-required", token=6))),
    (8, "a state nobody knows", with_header(7, "weft-state", "asleep")),
    (9, "events on two subjects", lambda log: [
        replace(entry, subject=subjects.event("a", OTHER, "local", "p")) if entry.seq == 13 else entry for entry in log
    ]),
]  # fmt: skip


def laws(log: Log, **given: object) -> set[int]:
    options: dict[str, object] = {"accepted": [TASK, OTHER], "results": {TASK: "completed"}, "effects": EFFECTS}
    return {violation.law for violation in check(log, **{**options, **given}).violations}  # type: ignore[arg-type]


def test_a_sound_log_breaks_no_law_and_is_counted() -> None:
    found = check(sound(), accepted=[TASK, OTHER], results={TASK: "completed", OTHER: "completed"}, effects=EFFECTS)
    assert found.violations == []
    assert (found.tasks, found.events, found.steps, found.claims) == (2, 6, 2, 3)
    assert (found.takeovers, found.renewals) == (1, 0)
    assert found.repeated_effects == 1


@pytest.mark.parametrize(
    ("law", "change"), [(law, change) for law, _, change in BROKEN], ids=[name for _, name, _ in BROKEN]
)
def test_a_broken_log_breaks_its_law(law: int, change: Callable[[Log], Log]) -> None:
    assert law in laws(change(sound()))


def test_an_accepted_task_that_is_not_in_the_log_breaks_law_1() -> None:
    assert 1 in laws(sound(), accepted=[TASK, ids.task_id("local", "a", "lost")])


@pytest.mark.parametrize("told", [{TASK: "failed"}, {ids.task_id("local", "a", "lost"): "completed"}])
def test_a_caller_that_was_told_something_else_breaks_law_10(told: dict[str, str]) -> None:
    assert 10 in laws(sound(), results=told)


@pytest.mark.parametrize(
    "effect", [Effect(TASK, "store", "another key"), Effect(TASK, "again", "key of store")], ids=["two keys", "shared"]
)
def test_an_idempotency_key_that_is_not_the_steps_own_breaks_law_11(effect: Effect) -> None:
    assert 11 in laws(sound(), effects=[*EFFECTS, effect])


def test_a_recorded_step_that_never_ran_breaks_law_12() -> None:
    assert 12 in laws(sound(), effects=EFFECTS[1:])


def test_events_sent_again_after_the_owner_renewed_its_claim_break_no_law() -> None:
    log = [
        message(1),
        claim(2),
        event(3, 1, "working"),
        claim(4, expects=2),
        again(5, 2, expects=3),
        again(6, 3, "completed", expects=5),
    ]
    found = check(log)
    assert found.violations == []
    assert (found.renewals, found.takeovers) == (1, 0)


def test_a_hole_where_a_takeover_lost_the_old_owners_last_events_breaks_no_law() -> None:
    assert laws(put(begins(7, 5, replica="r2", attempt=2), event(9, 6, "completed", token=6))(sound())) == set()


def test_every_law_of_the_docstring_is_broken_by_some_test() -> None:
    import re

    import weft.testing.invariants as module

    numbered = {int(n) for n in re.findall(r"^(\d+)\. ", module.__doc__ or "", re.MULTILINE)}
    assert numbered == {law for law, _, _ in BROKEN} | {10, 11, 12}


@pytest.mark.anyio
async def test_the_log_is_read_whole_in_order_and_with_headers(fresh_mesh: BrokerMesh) -> None:
    await fresh_mesh.add_agent("a")
    caller, operator = await fresh_mesh.connect("local"), await fresh_mesh.connect("coordinator")
    try:
        tasks = [ids.task_id("local", "a", f"m{i}") for i in range(COUNT + 3)]
        for task in tasks:
            headers = h.block(h.fields({h.EXPECTED_SEQUENCE: "0", h.ORIGIN: "o"}))
            await caller.publish(subjects.task("a", "07", "local", task), b"body", headers=headers)
        log = await read_log(operator)
        assert [entry.seq for entry in log] == list(range(1, len(tasks) + 1))
        assert [subjects.parse(entry.subject)["task"] for entry in log] == tasks
        assert log[0].data == b"body"
        assert log[0].headers["weft-origin"] == "o"
        assert log[0].headers["nats-expected-last-subject-sequence"] == "0"
    finally:
        await caller.close()
        await operator.close()


@pytest.mark.anyio
async def test_an_empty_log_is_read_as_such(fresh_mesh: BrokerMesh) -> None:
    operator = await fresh_mesh.connect("coordinator")
    try:
        assert await read_log(operator) == []
    finally:
        await operator.close()
