"""The watchdog's rules and the ledger of incidents, as pure functions of what was seen and when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.watchconf import WatchConfig
from weft_coordinator.decide.incidents import CHANGED, CLEARED, KEPT, OPENED, Incidents, Judge, notices
from weft_coordinator.decide.watchdog import (
    CRITICAL,
    SEVERITIES,
    WARNING,
    AgentSeen,
    Finding,
    History,
    Observed,
    ReplicaSeen,
    Stall,
    StreamSeen,
    findings,
)

LIMITS = WatchConfig()
NOW = 1_800_000_000_000
READY = ReplicaSeen("r1", "ready")
TASK = "0" * 32


def found(agent: AgentSeen | None = None, **observed: Any) -> dict[str, Finding]:
    agents = {"echo": agent} if agent is not None else {}
    return {one.key: one for one in findings(Observed(agents, **observed), LIMITS, NOW)}


def look(*pairs: tuple[float, int]) -> tuple[tuple[int, int], ...]:
    """Looks at a queue, `seconds` before now each."""
    return tuple((NOW - int(seconds * 1000), pending) for seconds, pending in pairs)


# Rules ---------------------------------------------------------------------------------------------


def test_a_mesh_that_is_well_has_no_findings() -> None:
    well = AgentSeen((READY, ReplicaSeen("r2", "draining")), look((40, 0), (20, 5), (0, 3)), retries=3)
    assert found(well, streams=(StreamSeen("MESH", 10, 100),)) == {}


def test_a_task_without_progress_is_found_and_what_it_is_at_is_named() -> None:
    stalls = (Stall("1" * 32, NOW - 700_000, "step 'fetch'"), Stall(TASK, NOW - 900_000, "its handler"))
    one = found(AgentSeen((replace(READY, stalled=stalls),)))["no-progress:echo"]
    assert (one.severity, one.count, one.tasks[0]) == (WARNING, 2, TASK)
    assert "its handler" in one.cause
    assert "15 min" in one.cause
    assert one.command == f"mesh tasks get {TASK} --all"


def test_a_silent_replica_is_an_incident_only_while_it_owns_tasks() -> None:
    silent = ReplicaSeen("r1", "stale", 20_000)
    assert found(AgentSeen((silent,))) == {}
    owner = replace(silent, owns=(TASK,))
    assert found(AgentSeen((owner, READY)))["silent-replica:echo"].severity == WARNING
    assert found(AgentSeen((replace(owner, silent=10_000),))) == {}


def test_tasks_that_nobody_took_over_are_critical_where_nobody_could() -> None:
    lost = ReplicaSeen("r1", "gone", 200_000, (), (TASK,))
    assert found(AgentSeen((lost,)))["silent-replica:echo"].severity == CRITICAL
    assert "nobody took its tasks over" in found(AgentSeen((lost, READY)))["silent-replica:echo"].cause


def test_an_open_incident_holds_down_to_half_of_its_threshold() -> None:
    for retries, expected in ((20, True), (19, False)):
        assert ("retries:echo" in found(AgentSeen((READY,), retries=retries))) is expected
    for retries, expected in ((10, True), (9, False)):
        assert ("retries:echo" in found(AgentSeen((READY,), retries=retries), open=["retries:echo"])) is expected


def test_replicas_that_end_soon_after_they_began_are_a_crash_loop() -> None:
    assert found(AgentSeen((READY,), crashed=("a", "b"))) == {}
    assert found(AgentSeen((READY,), crashed=("a", "b", "c")))["crash-loop:echo"].severity == WARNING
    assert found(AgentSeen((), crashed=("a", "b", "c")))["crash-loop:echo"].severity == CRITICAL


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        (look((40, 100), (30, 120), (10, 150), (0, 200)), True),
        (look((40, 100), (30, 120), (10, 90), (0, 200)), False),  # it was shorter in between
        (look((40, 200), (30, 200), (10, 200), (0, 200)), False),  # it does not grow
        (look((20, 100), (10, 150), (0, 200)), False),  # not known for long enough
        (look((40, 10), (30, 20), (10, 50), (0, 99)), False),  # short
    ],
)
def test_a_queue_is_an_incident_when_it_is_long_and_grows(looks: Any, expected: bool) -> None:
    assert ("backlog:echo" in found(AgentSeen((READY,), looks))) is expected


def test_waiting_tasks_without_a_ready_replica_are_critical_after_a_while() -> None:
    stale = (ReplicaSeen("r1", "stale", 9_000),)
    assert found(AgentSeen(stale, look((20, 1), (0, 1)))) == {}
    assert found(AgentSeen(stale, look((40, 0), (20, 1), (0, 1)))) == {}
    one = found(AgentSeen(stale, look((40, 1), (20, 1), (0, 2))))["backlog:echo"]
    assert (one.severity, one.command, one.count) == (CRITICAL, "mesh scale echo 1", 2)


def test_dead_letters_are_named_and_many_of_them_are_critical() -> None:
    one = found(AgentSeen((READY,), letters=(TASK,), letter="out of paper"))["dead-letters:echo"]
    assert (one.severity, one.tasks, one.command) == (WARNING, (TASK,), "mesh dlq list --agent echo")
    assert "out of paper" in one.cause
    many = tuple(f"{n:032x}" for n in range(100))
    worst = found(AgentSeen((READY,), letters=many))["dead-letters:echo"]
    assert (worst.severity, worst.count, len(worst.tasks)) == (CRITICAL, 100, 20)


def test_a_stream_near_its_limit_is_found_before_it_is_full() -> None:
    assert found(streams=(StreamSeen("MESH", 89, 100), StreamSeen("MESH_BLOBS", 10**12, -1))) == {}
    assert found(streams=(StreamSeen("MESH", 90, 100),))["stream-full:MESH"].severity == WARNING
    assert found(streams=(StreamSeen("MESH", 96, 100),))["stream-full:MESH"].severity == CRITICAL
    assert found(streams=(StreamSeen("MESH", 86, 100),), open=["stream-full:MESH"])


# What single looks cannot tell ----------------------------------------------------------------------


def test_only_attempts_within_the_window_count_and_a_count_that_begins_anew_is_none() -> None:
    history = History(LIMITS)
    history.retried({"echo": 50}, NOW)
    assert history.retries("echo", NOW) == 0
    history.retried({"echo": 57}, NOW + 1000)
    history.retried({"echo": 3}, NOW + 2000)
    history.retried({"echo": 5}, NOW + 3000)
    assert history.retries("echo", NOW + 3000) == 9
    assert history.retries("echo", NOW + 302_000) == 2


def test_a_replica_that_began_long_ago_or_comes_back_did_not_crash() -> None:
    history = History(LIMITS)
    started = {"old": NOW - 10**6, "new": NOW, "paused": NOW}
    history.registered("echo", started, ["old", "new", "paused"], NOW)
    history.registered("echo", {"paused": NOW}, [], NOW + 1000)
    assert set(history.crashed("echo")) == {"new", "paused"}
    history.registered("echo", {"paused": NOW}, ["paused"], NOW + 2000)
    assert history.crashed("echo") == ("new",)
    history.registered("echo", {"paused": NOW}, ["paused"], NOW + 130_000)
    assert history.crashed("echo") == ()


# Incidents ------------------------------------------------------------------------------------------


def fold(ledger: Incidents, events: Any, at: int, number: int) -> int:
    """Apply events as they come back from the log; the next number."""
    for event in msgpack.unpackb(msgpack.packb(list(events))):
        ledger.apply(tuple(event), number=number, at=at)
        number += 1
    return number


def finding(severity: str = WARNING, about: str = "echo", **changes: Any) -> Finding:
    values: dict[str, Any] = {"title": "t", "cause": "c", "command": "mesh health", "agents": ("echo",)}
    return Finding("retries", about, severity, **{**values, **changes})


def seen(severity: str) -> list[Finding]:
    """What a look finds."""
    return [finding(severity)] if severity else []


Run = list[tuple[int, str]]
"""(seconds since the look before, severity or nothing) of every look."""
runs: st.SearchStrategy[Run] = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from(["", "", "info", "warning", "critical"])), max_size=60
)


def episodes(run: Run, patience: int) -> list[tuple[int, int | None]]:
    """When each episode began and when it was over: once nothing was seen for `patience` seconds."""
    expected: list[tuple[int, int | None]] = []
    now, last = 0, -1
    for step, severity in run:
        now += step
        open_ = bool(expected) and expected[-1][1] is None
        if severity:
            last = now
            if not open_:
                expected.append((now, None))
        elif open_ and now - last >= patience:
            expected[-1] = (expected[-1][0], now)
    return expected


@settings(max_examples=120, deadline=None)
@given(runs)
def test_an_incident_opens_and_clears_once_per_episode(run: Run) -> None:
    ledger, judge = Incidents(), Judge(60, since=0)
    now, number = 0, 1
    happened: list[tuple[int, int | None]] = []
    for step, severity in run:
        now += step
        events = judge.look(seen(severity), ledger, now * 1000)
        for event in events:
            if event[0] == OPENED:
                happened.append((now, None))
            elif event[0] == CLEARED:
                happened[-1] = (happened[-1][0], now)
        number = fold(ledger, events, now * 1000, number)
        assert len(ledger.open) <= 1
    assert happened == episodes(run, 60)


@settings(max_examples=120, deadline=None)
@given(runs)
def test_an_incident_gets_worse_at_once_and_better_only_after_a_while(run: Run) -> None:
    ledger, judge = Incidents(), Judge(60, since=0)
    now, number = 0, 1
    since = 0
    """When it was last seen as bad as it is recorded."""
    for step, severity in run:
        now += step
        before = ledger.open.get("retries:echo")
        number = fold(ledger, judge.look(seen(severity), ledger, now * 1000), now * 1000, number)
        after = ledger.open.get("retries:echo")
        if after is None or not severity:
            continue
        shown, was = SEVERITIES.index(after.severity), SEVERITIES.index(severity)
        assert shown >= was
        if before is not None and shown < SEVERITIES.index(before.severity):
            assert now - since >= 60
        if shown == was:
            since = now


def test_a_new_leader_waits_as_long_before_it_clears_what_it_never_saw() -> None:
    ledger = Incidents()
    fold(ledger, Judge(60, since=0).look([finding()], ledger, 0), 0, 1)
    judge = Judge(60, since=100_000)
    assert judge.look([], ledger, 159_000) == []
    assert judge.look([], ledger, 160_000) == [(CLEARED, 1)]


def test_what_only_changes_its_words_is_recorded_once_a_minute() -> None:
    ledger, judge = Incidents(), Judge(60, since=0)
    number = fold(ledger, judge.look([finding(count=0)], ledger, 0), 0, 1)
    recorded = 0
    for second in range(1, 301):
        events = judge.look([finding(count=second)], ledger, second * 1000)
        recorded += len(events)
        assert all(event[0] == CHANGED for event in events)
        number = fold(ledger, events, second * 1000, number)
    assert recorded == 5
    assert ledger.open["retries:echo"].finding.count == 300


def test_the_ledger_survives_a_snapshot_and_forgets_the_oldest() -> None:
    ledger = Incidents()
    number = 1
    for n in range(KEPT + 5):
        fold(ledger, [(OPENED, {**_facts(finding(about=f"a{n}"))})], n, number)
        fold(ledger, [("incident-notified", number, "T", "opened", WARNING), (CLEARED, number)], n + 1, number + 1)
        number += 3
    fold(ledger, [(OPENED, _facts(finding()))], 7, number)
    again = Incidents()
    again.load(msgpack.unpackb(msgpack.packb(ledger.dump()), strict_map_key=False))
    assert len(again.cleared) == KEPT
    assert again.find(1) is None
    assert again.open == ledger.open
    assert list(again.cleared) == list(ledger.cleared)
    again.load(None)
    assert (len(again.open), len(again.cleared)) == (0, 0)


def _facts(one: Finding) -> dict[str, Any]:
    from weft_coordinator.decide.incidents import facts

    return facts(one)


@settings(max_examples=80, deadline=None)
@given(runs, st.lists(st.booleans(), min_size=60, max_size=60))
def test_everybody_is_told_once_of_each_change_also_across_leaders(run: Run, deliveries: list[bool]) -> None:
    ledger, judge = Incidents(), Judge(60, since=0)
    now, number = 0, 1
    told: dict[int, list[tuple[str, str]]] = {}
    for (step, severity), delivered in zip(run, deliveries, strict=False):
        now += step
        number = fold(ledger, judge.look(seen(severity), ledger, now * 1000), now * 1000, number)
        if delivered:
            due = notices(ledger, "T", WARNING, now * 1000)
            for notice in due:
                told.setdefault(notice.incident.id, []).append((notice.what, notice.incident.severity))
            number = fold(ledger, [notice.event("T") for notice in due], now * 1000, number)
            assert notices(ledger, "T", WARNING, now * 1000) == []
            copy = Incidents()
            copy.load(msgpack.unpackb(msgpack.packb(ledger.dump()), strict_map_key=False))
            ledger = copy
    for said in told.values():
        words = [what for what, _ in said]
        assert words.count("opened") <= 1
        assert words.count("cleared") <= 1
        assert "cleared" not in words[:-1]
        levels = [SEVERITIES.index(severity) for what, severity in said if what != "cleared"]
        assert all(level >= SEVERITIES.index(WARNING) for level in levels)
        assert levels == sorted(set(levels))


def test_a_target_hears_only_what_is_bad_enough_for_it() -> None:
    ledger = Incidents()
    fold(ledger, [(OPENED, _facts(finding(WARNING)))], 0, 1)
    assert notices(ledger, "T", CRITICAL, 1) == []
    fold(ledger, [(CHANGED, 1, _facts(finding(CRITICAL)))], 1, 2)
    assert [notice.what for notice in notices(ledger, "T", CRITICAL, 1)] == ["opened"]
