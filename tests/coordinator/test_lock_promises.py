"""What a replica is promised: who of it gets a lock next, with which token, before its holder lets go."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from weft_coordinator.decide.locks import PROMISES, Locks


@pytest.fixture
def mesh(lock_log: Any) -> Any:
    return lock_log()


def promises(mesh: Any) -> list[tuple[str, int, str]]:
    """Who of those that wait for `a` is promised it: task, token, and the task that has to let go."""
    waiting = mesh.locks.view("a")[1]
    return [(r.task, r.promised, r.after.partition("/")[0]) for r in waiting if r.promised]


def test_what_follows_on_one_replica_is_promised_as_it_is_asked(mesh: Any) -> None:
    first = mesh.ask("t1", "a")
    second, third = mesh.ask("t2", "a"), mesh.ask("t3", "a")
    assert promises(mesh) == [("t2", 3, "t1"), ("t3", 5, "t2")]
    mesh.release(first)
    assert (second.token, second.promised) == (3, 0)
    mesh.release(second)
    assert third.token == 5


def test_nothing_is_promised_beyond_another_replica_s_request(mesh: Any) -> None:
    first = mesh.ask("t1", "a")
    second = mesh.ask("t2", "a", replica="r2")
    mesh.ask("t3", "a")
    mesh.ask("t4", "a")
    assert promises(mesh) == []
    mesh.release(first)
    assert promises(mesh) == []
    mesh.release(second)
    assert [task for task, _, _ in promises(mesh)] == ["t4"]


@pytest.mark.parametrize(
    "other",
    [{"mode": "shared"}, {"names": ("a", "b")}, {"reentrant": True}, {"replica": "r2"}, {"agent": "y"}],
    ids=lambda other: next(iter(other)),
)
def test_only_exclusive_requests_for_one_name_are_promised_it(mesh: Any, other: dict[str, Any]) -> None:
    mesh.ask("t1", "a")
    mesh.ask("t6", "a", **other)
    mesh.ask("t7", "a")
    assert promises(mesh) == []


def test_a_shared_holder_promises_nothing(mesh: Any) -> None:
    mesh.ask("t1", "a", mode="shared")
    mesh.ask("t2", "a")
    assert promises(mesh) == []


def test_so_many_are_promised_a_name_and_more_as_they_get_it(mesh: Any) -> None:
    holder = mesh.ask("t0", "a")
    for i in range(PROMISES + 5):
        mesh.ask(f"w{i}", "a")
    assert [task for task, _, _ in promises(mesh)] == [f"w{i}" for i in range(PROMISES)]
    mesh.release(holder)
    assert [task for task, _, _ in promises(mesh)] == [f"w{i}" for i in range(1, PROMISES + 1)]


def test_who_gives_up_is_passed_over(mesh: Any) -> None:
    first = mesh.ask("t1", "a")
    second, third = mesh.ask("t2", "a"), mesh.ask("t3", "a")
    mesh.release(second)
    assert [task for task, _, _ in promises(mesh)] == ["t3"]
    assert mesh.release(first) == ["t3"]
    assert third.token == 5


def test_a_takeover_of_the_holder_recalls_what_was_promised(mesh: Any) -> None:
    mesh.ask("t1", "a", request="t1/q")
    second = mesh.ask("t2", "a")
    promised = second.promised
    moved = mesh.ask("t1", "a", request="t1/q", claim=2, replica="r2")
    assert moved.token > promised
    assert promises(mesh) == []
    assert mesh.log[-1][0] == "lock.recalled"
    mesh.release(moved)
    assert second.token > moved.token


def test_a_takeover_of_one_that_waits_recalls_it_and_what_follows(mesh: Any) -> None:
    first = mesh.ask("t1", "a")
    mesh.ask("t2", "a", request="t2/q")
    third = mesh.ask("t3", "a")
    late = third.promised
    second = mesh.ask("t2", "a", request="t2/q", claim=2, replica="r2")
    assert promises(mesh) == []
    mesh.release(first)
    assert second.token > late


def test_who_re_enters_recalls_what_was_promised_after_its_ancestor(mesh: Any) -> None:
    outer = mesh.ask("t1", "a")
    second = mesh.ask("t4", "a")
    promised = second.promised
    inner = mesh.ask("t2", "a", reentrant=True)
    assert inner.held
    assert promises(mesh) == []
    assert mesh.release(outer) == []
    assert mesh.release(inner) == ["t4"]
    assert second.token > promised


def test_nothing_is_promised_behind_two_that_are_inside_or_one_that_re_entered(mesh: Any) -> None:
    outer = mesh.ask("t1", "a")
    mesh.ask("t2", "a", reentrant=True)
    mesh.ask("t4", "a")
    assert promises(mesh) == []
    assert mesh.release(outer) == []
    assert promises(mesh) == []


def test_who_is_let_in_later_recalls_what_was_promised_before(mesh: Any) -> None:
    outer, other = mesh.ask("t1", "a"), mesh.ask("t9", "b")
    second = mesh.ask("t4", "a")
    promised = second.promised
    inner = mesh.ask("t2", "a", "b", reentrant=True)
    assert second.promised == promised > 0
    assert mesh.release(other) == ["t2"]
    assert second.promised == 0
    assert mesh.release(outer) == []
    assert mesh.release(inner) == ["t4"]
    assert second.token > inner.token


def test_nothing_is_promised_past_a_shared_request_that_came_before(mesh: Any) -> None:
    first = mesh.ask("t1", "a")
    for task, mode in (("t2", "exclusive"), ("t3", "shared"), ("t4", "exclusive")):
        mesh.ask(task, "a", mode=mode)
    assert [task for task, _, _ in promises(mesh)] == ["t2"]
    mesh.release(first)
    assert promises(mesh) == []


def test_a_promised_token_that_is_shown_proves_that_those_before_let_go(mesh: Any) -> None:
    first = mesh.ask("t1", "a")
    second, third = mesh.ask("t2", "a"), mesh.ask("t3", "a")
    token = third.promised
    assert mesh.locks.handed("x", third.request, token - 1) == []
    mesh.fold(mesh.locks.handed("x", third.request, token))
    assert (third.held, third.token) == (True, token)
    assert mesh.locks.handed("x", third.request, token) == []
    assert mesh.locks.find("x", first.request) is mesh.locks.find("x", second.request) is None


def test_promises_outlive_a_snapshot(mesh: Any) -> None:
    first = mesh.ask("t1", "a")
    mesh.ask("t2", "a")
    before = promises(mesh)
    mesh.locks, old = Locks(), mesh.locks
    mesh.locks.load(msgpack.unpackb(msgpack.packb(old.dump())))
    assert promises(mesh) == before != []
    mesh.release(first)
    assert mesh.locks.view("a")[0][0].token == before[0][1]


def test_a_snapshot_from_before_there_were_promises_is_read(mesh: Any) -> None:
    mesh.ask("t1", "a")
    mesh.ask("t2", "a")
    dumped = mesh.locks.dump()
    mesh.locks.load({**dumped, "requests": [row[:16] for row in dumped["requests"]]})
    assert [r.task for r in mesh.locks.view("a")[1]] == ["t2"]
    assert promises(mesh) == []
