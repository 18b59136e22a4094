"""The laws of coordination find what they say they find: sound logs pass, and each law fails on logs that break it."""

import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb

import weft.testing.coordination as module
from weft.testing.coordination import Report, Use, check
from weft.testing.invariants import Entry
from weft.testing.locklog import Commit
from weft_coordinator.decide import laws
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.records import HELD, Claim

ROOT, CHILD, OTHER, LATER = (ids.task_id("local", "a", name) for name in ("root", "child", "other", "later"))
BEGIN = 1_796_000_000.0
"""Unix seconds at which the first message of both logs is stored."""
Event = tuple[Any, ...]


class Log:
    """The mesh's log: a message a second, so that an entry's time is its sequence."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, subject: str, headers: dict[str, str], data: bytes = b"", at: float | None = None) -> int:
        seq = len(self.entries) + 1
        stored = datetime.fromtimestamp(BEGIN + (seq if at is None else at), UTC).isoformat()
        self.entries.append(Entry(seq, subject, {**headers, "nats-time-stamp": stored}, data))
        return seq

    def accepted(
        self, task: str, *, agent: str = "a", parent: str = "", context: str = "c", at: float | None = None
    ) -> None:
        """A task's message, and its claim."""
        caller = agent if parent else "local"
        body = pb.SendMessageRequest(message=pb.Message(message_id=task, context_id=context)).SerializeToString()
        chain = {"weft-chain": f"{agent}/{parent}"} if parent else {}
        seq = self.add(subjects.task(agent, "07", caller, task), chain, body, at)
        claim = Claim("r1", "1", 1, caller=caller, origin="o", context=context, slice="07", message=seq)
        self.add(subjects.claim(agent, task), {"nats-expected-last-subject-sequence": "0"}, claim.encode(), at)

    def says(self, task: str, n: int, state: str, *, agent: str = "a", at: float | None = None) -> None:
        """An event of a task."""
        claim = next(one for one in self.entries if one.subject == subjects.claim(agent, task))
        fence = {h.EXPECTED_SEQUENCE.lower(): str(claim.seq), h.EXPECTED_SUBJECT.lower(): claim.subject}
        caller = Claim.decode(claim.data).caller
        assert Claim.decode(claim.data).state == HELD
        self.add(subjects.event(agent, task, caller, "o"), {**fence, "weft-event": str(n), "weft-state": state}, at=at)


def asked(request: str, task: str, *names: str, taken: bool = False, exclusive: bool = True) -> Event:
    """A request of a task, queued or granted at once."""
    return (
        "lock.taken" if taken else "lock.asked",
        "a",
        "r1",
        task,
        request,
        1,
        list(names),
        exclusive,
        [],
        30,
        0,
        0,
        0,
    )


def granted(request: str) -> Event:
    return ("lock.granted", "a", request)


def freed(request: str) -> Event:
    return ("lock.freed", "a", request, "released")


def lost(request: str, why: str = "deadlock") -> Event:
    return ("lock.lost", "a", request, why, "")


def parked(*children: str, until: float = 0.0, need: int = 1) -> Event:
    until = int((BEGIN + until) * 1000) if until else 0
    return ("parked", "a", ROOT, "local", "c", "07", 2, "k", until, [["a", child, 0] for child in children], need)


WOKEN: Event = ("woken", "a", ROOT, 2)
CIRCLE = [["a", ROOT, "lock", "y", OTHER], ["a", OTHER, "lock", "x", ROOT]]
CLOSED = [
    asked("1", ROOT, "x", taken=True),
    asked("2", OTHER, "y", taken=True),
    asked("3", ROOT, "y"),
    asked("4", OTHER, "x"),
]
"""Two tasks that wait for each other."""
BROKEN_UP = [lost("4"), freed("2"), granted("3"), freed("3"), freed("1")]


def commits(*events: Event, at: float = 100.0, epochs: list[int] | None = None) -> list[Commit]:
    """One commit for each event, a millisecond apart."""
    ms = int((BEGIN + at) * 1000)
    return [
        Commit(n, BEGIN + at, (epochs or [1] * len(events))[n - 1], ms, n, [event]) for n, event in enumerate(events, 1)
    ]


def mesh() -> Log:
    """A root with a child, and two tasks of another context after each other; all have ended by 20."""
    log = Log()
    log.accepted(ROOT)
    log.accepted(CHILD, parent=ROOT)
    log.accepted(OTHER, context="d")
    log.says(CHILD, 1, "completed")
    log.says(ROOT, 1, "completed")
    log.says(OTHER, 1, "completed")
    log.accepted(LATER, context="d")
    log.says(LATER, 1, "completed")
    return log


def found(log: Log, decided: list[Commit], **options: Any) -> Report:
    return check(log.entries, decided, **options)


def numbers(report: Report) -> set[int]:
    return {int(re.match(r"law (\d+)", one).group(1)) for one in report.violations}  # type: ignore[union-attr]


def early(*events: Event) -> list[Commit]:
    """Decided while all tasks of `mesh` were at work."""
    return commits(*events, at=5.0)


SOUND: list[tuple[str, list[Commit]]] = [
    ("a deadlock that is broken", early(*CLOSED, ("deadlock-found", CIRCLE, OTHER), *BROKEN_UP)),
    ("a wake when the child had ended", commits(parked(CHILD), WOKEN, at=8.0)),
    ("a wake when the time had come", early(parked(until=4.0), WOKEN)),
    ("a wake of who had ended", commits(parked(OTHER, LATER, need=2), WOKEN)),
    ("two leaders", commits(asked("1", ROOT, "x", taken=True), freed("1"), epochs=[1, 2])),
    (
        "a request that passes one which waits for its task",
        early(
            asked("1", ROOT, "x", taken=True),
            asked("2", OTHER, "y", taken=True),
            asked("3", OTHER, "x", "z"),
            asked("4", ROOT, "z"),
            granted("4"), freed("4"), freed("1"), granted("3"), freed("3"), freed("2"),
        ),
    ),
    (
        "a request that passes one which waits for it through another queue",
        early(
            asked("1", OTHER, "x", taken=True),
            asked("2", LATER, "x", "z"),
            asked("3", ROOT, "z"),
            asked("4", CHILD, "w", "z"),
            asked("5", OTHER, "w"),
            granted("3"), freed("3"), granted("5"), freed("5"), freed("1"),
            granted("2"), freed("2"), granted("4"), freed("4"),
        ),
    ),
    (
        "a deadlock through a child",
        early(
            asked("1", ROOT, "x", taken=True),
            asked("2", CHILD, "x"),
            ("deadlock-found", [["a", ROOT, "child", CHILD, CHILD], ["a", CHILD, "lock", "x", ROOT]], CHILD),
            lost("2"),
            freed("1"),
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("decided", [decided for _, decided in SOUND], ids=[name for name, _ in SOUND])
def test_a_sound_log_breaks_no_law(decided: list[Commit]) -> None:
    assert found(mesh(), decided, accepted=[ROOT]).violations == []


def edge(place: int, **change: str) -> list[list[str]]:
    """The circle with one wait changed."""
    fields = ("agent", "task", "kind", "target", "holder")
    circle = [list(one) for one in CIRCLE]
    for name, value in change.items():
        circle[place][fields.index(name)] = value
    return circle


BROKEN: list[tuple[int, str, list[Commit]]] = [
    (1, "two exclusive holders", early(CLOSED[0], asked("2", OTHER, "x", taken=True), freed("1"), freed("2"))),
    (1, "shared beside exclusive", early(CLOSED[0], asked("2", OTHER, "x", taken=True, exclusive=False), freed("1"), freed("2"))),  # noqa: E501
    (1, "a grant out of turn", early(CLOSED[0], asked("2", OTHER, "x"), asked("3", LATER, "x"), freed("1"), granted("3"), freed("3"), granted("2"), freed("2"))),  # noqa: E501
    (1, "a grant nobody asked for", early(granted("9"))),
    (2, "an older epoch after a newer one", commits(CLOSED[0], freed("1"), epochs=[2, 1])),
    (2, "a gap", [commits(CLOSED[0])[0], Commit(2, BEGIN, 1, 0, 3, [freed("1")])]),
    (2, "a beginning that is gone", [Commit(1, BEGIN, 1, 0, 7, [])]),
    (3, "a victim that is not in the circle", early(*CLOSED, ("deadlock-found", CIRCLE, LATER), *BROKEN_UP)),
    (3, "waits that do not lead to each other", early(*CLOSED, ("deadlock-found", edge(0, holder=LATER), OTHER), *BROKEN_UP)),  # noqa: E501
    (3, "a lock that is not waited for", early(*CLOSED[:3], ("deadlock-found", CIRCLE, ROOT), lost("3"), freed("1"), freed("2"))),  # noqa: E501
    (3, "a lock that is not held", early(*CLOSED[1:3], ("deadlock-found", CIRCLE, ROOT), lost("3"), freed("2"))),
    (3, "another lock", early(*CLOSED, ("deadlock-found", edge(0, target="z"), OTHER), *BROKEN_UP)),
    (3, "a child that is none", early(CLOSED[0], asked("4", OTHER, "x"), ("deadlock-found", [["a", ROOT, "child", OTHER, OTHER], CIRCLE[1]], OTHER), lost("4"), freed("1"))),  # noqa: E501
    (3, "a child that had ended", commits(CLOSED[0], asked("2", CHILD, "x"), ("deadlock-found", [["a", ROOT, "child", CHILD, CHILD], ["a", CHILD, "lock", "x", ROOT]], CHILD), lost("2"), freed("1"))),  # noqa: E501
    (3, "a turn behind a later task", early(("deadlock-found", [["a", OTHER, "order", LATER, LATER], ["a", LATER, "order", OTHER, OTHER]], OTHER))),  # noqa: E501
    (3, "a turn in another context", early(("deadlock-found", [["a", OTHER, "order", ROOT, ROOT], ["a", ROOT, "order", OTHER, OTHER]], OTHER))),  # noqa: E501
    (3, "a request lost to no deadlock", early(*CLOSED[:2], CLOSED[2], lost("3"), freed("1"), freed("2"))),
    (4, "a lock that is held in the end", early(CLOSED[0])),
    (4, "a wait that goes on in the end", early(CLOSED[0], asked("2", OTHER, "x"))),
    (4, "a task that is parked in the end", early(parked(CHILD))),
    (5, "a wake before the time", early(parked(until=50.0), WOKEN)),
    (5, "a wake before the child ended", early(parked(CHILD), WOKEN)),
    (5, "a wake when too few had ended", commits(parked(CHILD, OTHER, need=2), WOKEN, at=7.5)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("law", "decided"), [(law, decided) for law, _, decided in BROKEN], ids=[name for _, name, _ in BROKEN]
)
def test_a_broken_log_breaks_its_law(law: int, decided: list[Commit]) -> None:
    assert law in numbers(found(mesh(), decided))


def test_a_task_that_begins_before_the_one_before_it_ended_breaks_law_6() -> None:
    log = Log()
    log.accepted(OTHER)
    log.accepted(LATER)
    log.says(OTHER, 1, "completed")
    log.says(LATER, 1, "completed")
    assert numbers(found(log, [], ordered=["a"])) == {6}
    assert numbers(found(log, [])) == set()


def test_a_task_that_is_cancelled_in_the_queue_breaks_no_law_and_hides_none() -> None:
    log = Log()
    for task in (OTHER, CHILD, LATER):
        log.accepted(task)
    # The one in between was not begun: somebody claimed it for its cancel, without its message.
    cancels = Claim("r2", "1", 1, caller="local", origin="o", context="", slice="07", message=0)
    (claim,) = [n for n, entry in enumerate(log.entries) if entry.subject == subjects.claim("a", CHILD)]
    log.entries[claim] = replace(log.entries[claim], data=cancels.encode())
    log.says(CHILD, 1, "canceled")
    log.says(OTHER, 1, "completed")
    log.says(LATER, 1, "completed")
    (broken,) = found(log, [], ordered=["a"]).violations
    assert LATER in broken
    assert OTHER in broken


@pytest.mark.parametrize(("ended", "broken"), [(12.0, set()), (45.0, {7}), (None, {7, 9})])
def test_what_outlives_a_cancelled_root_breaks_law_7(ended: float | None, broken: set[int]) -> None:
    log = Log()
    log.accepted(ROOT)
    log.accepted(CHILD, parent=ROOT)
    log.accepted(OTHER, parent=CHILD)
    log.says(CHILD, 1, "canceled", at=10.0)
    log.says(ROOT, 1, "canceled", at=10.0)
    if ended is not None:
        log.says(OTHER, 1, "completed", at=ended)
    assert numbers(found(log, [], grace=30.0)) == broken


USED = [asked("1", ROOT, "x", taken=True), freed("1"), asked("2", OTHER, "x", taken=True), freed("2")]


@pytest.mark.parametrize(
    ("uses", "broken"),
    [
        ([Use("x", 1, ROOT), Use("x", 3, OTHER)], set()),
        ([Use("x", 1, CHILD)], set()),
        ([Use("x", 3, OTHER), Use("x", 1, ROOT, accepted=False)], set()),
        ([Use("x", 3, OTHER), Use("x", 1, ROOT)], {8}),
        ([Use("x", 3, ROOT)], {8}),
        ([Use("y", 1, ROOT)], {8}),
        ([Use("x", 2, ROOT)], {8}),
    ],
    ids=["in turn", "by a child", "refused", "too late", "of another task", "of another name", "no grant"],
)
def test_a_token_that_is_too_old_or_not_ones_own_breaks_law_8(uses: list[Use], broken: set[int]) -> None:
    report = found(mesh(), early(*USED), uses=uses)
    assert numbers(report) == broken
    assert report.refused == sum(not use.accepted for use in uses)


def test_a_task_that_was_accepted_and_lost_breaks_law_9() -> None:
    assert numbers(found(mesh(), [], accepted=[ids.task_id("local", "a", "lost")])) == {9}


def test_the_laws_of_the_coordinators_log_agree_about_epochs() -> None:
    assert laws.violations(commits(("led", "c"), freed("1"), epochs=[2, 1]))


def test_every_law_of_the_docstring_is_broken_by_some_test() -> None:
    numbered = {int(n) for n in re.findall(r"^(\d+)\. ", module.__doc__ or "", re.MULTILINE)}
    assert numbered == {law for law, _, _ in BROKEN} | {6, 7, 8, 9}
