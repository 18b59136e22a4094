"""The ledger of dead letters and bulk redrives, as a pure fold."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from weft_coordinator.decide.index import Entry
from weft_coordinator.decide.letters import Filter, Letters, started
from weft_protocols.errors import Conflict
from weft_protocols.records import DeadLetter


def fold(ledger: Letters, *events: Any, number: int = 1, at: int = 1000) -> None:
    for event in msgpack.unpackb(msgpack.packb(list(events))):
        ledger.apply(tuple(event), number=number, at=at)
        number += 1


def entry(task: str, agent: str = "echo", *, seq: int = 10, second: int = 5) -> Entry:
    made = Entry(agent, "local", task)
    made.seq, made.time, made.created = seq, second * 1_000_000_000, 1
    return made


def test_a_letter_is_open_until_somebody_decides() -> None:
    ledger = Letters()
    assert ledger.state(entry("a")) == "open"
    fold(ledger, ("letter-redriven", "echo", "a", 1, "new", 0), ("letter-discarded", "echo", "b", "no use"))
    assert (ledger.state(entry("a")), ledger.state(entry("b"))) == ("redriven", "discarded")
    assert ledger.state(entry("a", "other")) == "open"


def test_a_letter_is_redriven_again_only_when_that_is_said() -> None:
    ledger = Letters()
    assert ledger.next("echo", "a", again=False) == 1
    fold(ledger, ("letter-redriven", "echo", "a", 1, "new", 0))
    assert ledger.next("echo", "a", again=False) == 0
    assert ledger.next("echo", "a", again=True) == 2
    fold(ledger, ("letter-discarded", "echo", "a", "no use"))
    with pytest.raises(Conflict, match="no use"):
        ledger.next("echo", "a", again=False)
    assert ledger.next("echo", "a", again=True) == 2


def test_a_job_is_about_letters_that_were_there_when_it_began_and_are_undecided() -> None:
    ledger = Letters()
    job_facts = started(Filter("echo", since=5000, before=20), limit=10, rate=5.0)
    fold(ledger, ("redrive-started", job_facts), ("letter-redriven", "echo", "done", 1, "x", 1))
    job = ledger.job(1)
    assert job is not None
    fold(ledger, ("redrive-failed", 1, "echo", "bad", "too large"), number=3)
    job = ledger.job(1)
    assert job is not None
    dead = [
        entry("a"), entry("done"), entry("bad"), entry("old", second=4), entry("late", seq=21), entry("x", "other"),
        entry("b", seq=20),
    ]  # fmt: skip
    assert [one.task for one in ledger.chosen(dead, job)] == ["a", "b"]
    assert (job.done, job.left, dict(job.failures)) == (1, 8, {("echo", "bad"): "too large"})


def test_a_job_that_names_its_letters_leaves_the_others() -> None:
    ledger = Letters()
    fold(ledger, ("redrive-started", started(Filter(), limit=10, rate=5.0, tasks=["b"])))
    job = ledger.job(1)
    assert job is not None
    assert [one.task for one in ledger.chosen([entry("a"), entry("b")], job)] == ["b"]


def test_a_job_ends_once() -> None:
    ledger = Letters()
    fold(ledger, ("redrive-started", started(Filter("echo"), limit=1, rate=1.0)), at=1)
    fold(ledger, ("redrive-ended", 1, "stopped"), number=2, at=2)
    fold(ledger, ("redrive-ended", 1, "done"), number=3, at=3)
    job = ledger.job(1)
    assert job is not None
    assert (job.how, job.ended) == ("stopped", 2)


def test_a_snapshot_holds_decisions_and_jobs() -> None:
    ledger = Letters()
    fold(
        ledger,
        ("redrive-started", started(Filter("echo", "paper"), limit=9, rate=2.5, tasks=["a"])),
        ("letter-redriven", "echo", "a", 1, "new", 1),
        ("redrive-failed", 1, "echo", "c", "gone"),
        ("letter-discarded", "echo", "b", "no use"),
    )
    again = Letters()
    again.load(msgpack.unpackb(msgpack.packb(ledger.dump()), strict_map_key=False))
    assert again.dump() == ledger.dump()
    assert again.job(1) == ledger.job(1)
    assert again.decision("echo", "a") == ledger.decision("echo", "a")
    again.load(None)
    assert again.decision("echo", "a") is None


def test_a_filter_looks_for_part_of_the_reason_or_the_error() -> None:
    letter = DeadLetter("echo", "a", "local", "failed after 3 attempts", "OSError: disk full", 3, "r", "1", 1, 1)
    assert Filter(reason="disk").says(letter)
    assert Filter(reason="3 attempts").says(letter)
    assert not Filter(reason="network").says(letter)
    assert not Filter(reason="disk").says(None)
    assert Filter().says(None)
