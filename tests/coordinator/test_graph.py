"""The wait-for graph against definitions that look at everybody until nothing changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from weft_coordinator.decide.graph import Core, Facts, WaitGraph, victim
from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.locks import Ask, Locks, Request, changes
from weft_protocols.errors import CycleEdge, InvalidParams

Waits = dict[str, dict[str, tuple[int, tuple[str, ...]]]]
"""Task, wait, how many of which tasks."""


def stuck_in(waits: Waits) -> set[str]:
    """The definition: what is left when everybody who can go on has gone."""
    stuck = {task for task, its in waits.items() if its}
    while True:
        on = {
            task
            for task in stuck
            if any(sum(target not in stuck for target in targets) >= need for need, targets in waits[task].values())
        }
        if not on:
            return stuck
        stuck -= on


def on_a_circle(task: str, waits: Waits, within: set[str]) -> bool:
    seen: set[str] = set()
    todo = [task]
    while todo:
        for _, targets in waits[todo.pop()].values():
            for target in targets:
                if target == task:
                    return True
                if target in within and target not in seen:
                    seen.add(target)
                    todo.append(target)
    return False


def assert_circle(core: Core, waits: Waits) -> None:
    """Every edge is a wait of its task, and each leads to the next."""
    assert len(core.cycle) == len(core.waits) == len({edge.task for edge in core.cycle})
    for edge, wait in zip(core.cycle, core.waits, strict=True):
        assert edge.holder in waits[edge.task][wait][1]
    assert all(edge.holder == after.task for edge, after in pairwise((*core.cycle, core.cycle[0])))


TASKS = tuple(f"t{i}" for i in range(6))
ADD = st.tuples(
    st.just("add"),
    st.sampled_from(TASKS),
    st.sampled_from(("w1", "w1", "w2")),
    st.lists(st.sampled_from((*TASKS, "done")), min_size=1, max_size=3, unique=True),
    st.integers(1, 3),
)
DROP = st.tuples(
    st.sampled_from(("remove", "end")),
    st.sampled_from(TASKS),
    st.sampled_from(("w1", "w2")),
    st.lists(st.sampled_from(TASKS), max_size=0),
    st.just(0),
)
STEPS = st.lists(ADD | ADD | ADD | DROP, min_size=4, max_size=30)


@settings(max_examples=250, deadline=None)
@given(STEPS)
def test_every_deadlock_is_found_and_none_is_invented(steps: list[tuple[str, str, str, list[str], int]]) -> None:
    graph, waits = WaitGraph(Locks()), Waits()
    for step, task, wait, targets, need in steps:
        before = stuck_in(waits)
        if step == "add":
            need = min(need, len(targets))
            waits.setdefault(task, {})[wait] = (need, tuple(targets))
            core = graph.add(task, wait, agent="a", need=need, targets=[("child", target) for target in targets])
        else:
            if step == "end":
                waits.pop(task, None)
                graph.ended(task)
            else:
                waits.get(task, {}).pop(wait, None)
                graph.remove(task, wait)
            core = graph.check(task)
        stuck = stuck_in(waits)
        assert (core is not None) == (task in stuck and on_a_circle(task, waits, stuck))
        if core is None:
            assert before or not stuck, "only behind a deadlock that was told before is one stuck without a circle"
        else:
            assert_circle(core, waits)
            assert {edge.task for edge in core.cycle} <= core.stuck <= stuck
        found = graph.sweep()
        assert bool(found) == bool(stuck)
        for other in found:
            assert_circle(other, waits)
            assert other.stuck == stuck
        on_circles = [edge.task for other in found for edge in other.cycle]
        assert len(on_circles) == len(set(on_circles))


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_giving_way_and_checking_again_leaves_nobody_stuck(steps: list[tuple[str, str, str, list[str], int]]) -> None:
    graph, waits = WaitGraph(Locks()), Waits()
    for step, task, wait, targets, need in steps:
        todo = [task]
        if step == "add":
            waits.setdefault(task, {})[wait] = (min(need, len(targets)), tuple(targets))
            graph.put(task, wait, agent="a", need=need, targets=[("child", target) for target in targets])
        else:
            waits.get(task, {}).pop(wait, None)
            graph.remove(task, wait)
        while todo:
            core = graph.check(todo.pop())
            if core is not None:
                gone = victim(core, {})
                edge = [edge.task for edge in core.cycle].index(gone)
                graph.remove(gone, core.waits[edge])
                del waits[gone][core.waits[edge]]
                todo = sorted(core.stuck)
        assert not stuck_in(waits)


# With locks ----------------------------------------------------------------------------------------


class Mesh:
    """Locks and the graph over them, as the leader keeps them."""

    def __init__(self) -> None:
        self.locks = Locks()
        self.graph = WaitGraph(self.locks)
        self.number = 0
        self.asked = 0

    def fold(self, events: Iterable[Event]) -> list[str]:
        """Fold, drop the waits that are over; tasks that gave one up and have others."""
        left: list[str] = []
        for event in events:
            self.number += 1
            self.locks.apply(event, number=self.number, at=self.number)
            for _, request, what, _, _ in changes([event]):
                task = request.partition("/")[0]
                if what in ("waiting", "promised", "recalled", "moved") or request not in self.graph.waits(task):
                    continue
                self.graph.remove(task, request)
                if what == "granted" and self.graph.waits(task):
                    self.graph.put(task, "runs", agent="a", need=1, targets=[("outside", "")])
                elif self.graph.waits(task):
                    left.append(task)
        return left

    def ask(self, task: str, *names: str, mode: str = "exclusive") -> tuple[Request, Core | None]:
        self.asked += 1
        request = f"{task}/{self.asked}"
        self.fold(self.locks.request(Ask("a", "r", task, request, 1, names, mode)))
        found = self.locks.find("a", request)
        assert found is not None
        return found, self.graph.lock(found)


def test_two_tasks_that_take_two_locks_in_opposite_order_are_found_and_the_circle_is_told() -> None:
    mesh = Mesh()
    mesh.ask("t1", "x")
    mesh.ask("t2", "y")
    first, core = mesh.ask("t1", "y")
    assert core is None
    second, core = mesh.ask("t2", "x")
    assert core is not None
    assert core.cycle == (CycleEdge("a", "t2", "lock", "x", "t1"), CycleEdge("a", "t1", "lock", "y", "t2"))
    assert core.waits == (second.request, first.request)
    assert core.overtake == ()


def test_a_child_that_wants_what_its_parent_holds_is_found() -> None:
    mesh = Mesh()
    mesh.ask("parent", "x")
    assert mesh.graph.add("parent", "w", agent="p", need=1, targets=[("child", "kid")]) is None
    _, core = mesh.ask("kid", "x")
    assert core is not None
    assert [str(edge) for edge in core.cycle] == [
        "a/kid waits for lock 'x', held by parent",
        "p/parent waits for its child kid",
    ]


def test_who_is_before_in_a_queue_is_waited_for_and_may_be_overtaken() -> None:
    mesh = Mesh()
    mesh.ask("t1", "x")
    mesh.ask("t2", "x", "y")
    last, core = mesh.ask("t1", "y")
    assert core is not None
    assert core.cycle == (CycleEdge("a", "t1", "lock", "y", "t2"), CycleEdge("a", "t2", "lock", "x", "t1"))
    assert core.overtake == (("a", last.request),)
    mesh.fold(mesh.locks.overtake("a", last.request))
    assert last.held
    assert mesh.graph.sweep() == []


def test_a_circle_through_somebody_elses_place_in_a_queue_is_found_though_he_himself_can_go_on() -> None:
    mesh = Mesh()
    mesh.ask("t1", "x")
    between, _ = mesh.ask("t2", "x", "y")
    mesh.graph.put("t2", "runs", agent="a", need=1, targets=[("outside", "")])
    mesh.ask("t3", "z")
    mesh.graph.put("t1", "w", agent="a", need=1, targets=[("child", "t3")])
    last, core = mesh.ask("t3", "y")
    assert core is not None
    assert [edge.task for edge in core.cycle] == ["t3", "t2", "t1"]
    assert core.waits[:2] == (last.request, between.request)
    assert core.stuck == {"t3", "t1"}


def test_the_graph_of_a_long_queue_stays_small() -> None:
    mesh = Mesh()
    mesh.ask("t0", "x")
    for i in range(1, 65):
        _, core = mesh.ask(f"t{i}", "x")
        assert core is None
    assert sum(len(mesh.locks.before(request)) for request in mesh.locks.waiting()) < 4 * 64
    assert mesh.graph.add("t0", "w", agent="a", need=1, targets=[("child", "t64")]) is not None


class DeadlockMachine(RuleBasedStateMachine):
    """Tasks lock, delegate and run branches at random; whoever is chosen gives way, and then nobody is ever stuck."""

    def __init__(self) -> None:
        super().__init__()
        self.mesh = Mesh()
        self.children: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {}
        self.ended: set[str] = set()

    def stuck(self) -> set[str]:
        """The definition, with everybody who is before in a queue, not the nearest only."""
        locks, graph = self.mesh.locks, self.mesh.graph
        waiting = list(locks.waiting())
        stuck = {task for task in TASKS if graph.waits(task)}
        blocked = set(waiting)
        while True:
            requests = {r for r in blocked if not self.before(r, blocked, stuck)}
            tasks = {task for task in stuck if self.goes_on(task, blocked, stuck)}
            if not requests and not tasks:
                return stuck
            blocked -= requests
            stuck -= tasks

    def before(self, request: Request, blocked: set[Request], stuck: set[str]) -> bool:
        for name in request.names:
            holders, queue = self.mesh.locks.view(name)
            for r in holders:
                if (r.exclusive or request.exclusive) and r.task in stuck:
                    return True
            for r in queue:
                excludes = r.number < request.number and (r.exclusive or request.exclusive)
                if excludes and (r in blocked or r.task in stuck):
                    return True
        return False

    def goes_on(self, task: str, blocked: set[Request], stuck: set[str]) -> bool:
        for wait in self.mesh.graph.waits(task):
            request = self.mesh.locks.find("a", wait)
            if wait == "runs":
                return True
            if request is not None:
                if request not in blocked:
                    return True
            else:
                need, targets = self.children[task][wait]
                if sum(target not in stuck for target in targets) >= need:
                    return True
        return False

    def resolve(self, core: Core | None, left: Sequence[str] = ()) -> None:
        todo = list(left)
        while core is not None or todo:
            if core is None:
                core = self.mesh.graph.check(todo.pop())
                continue
            self.really(core)
            todo += sorted(core.stuck)
            if core.overtake:
                events = self.mesh.locks.overtake(*core.overtake[0])
                assert events
                todo += self.mesh.fold(events)
            else:
                gone = victim(core, {})
                wait = core.waits[[edge.task for edge in core.cycle].index(gone)]
                if self.mesh.locks.find("a", wait) is not None:
                    todo += self.mesh.fold(self.mesh.locks.deny("a", wait, "deadlock"))
                else:
                    self.mesh.graph.remove(gone, wait)
                    todo.append(gone)
            core = None

    def really(self, core: Core) -> None:
        """None is invented: it is stuck, and every edge is there."""
        stuck = self.stuck()
        assert core.stuck
        assert core.stuck <= stuck
        assert all(edge.holder == after.task for edge, after in pairwise((*core.cycle, core.cycle[0])))
        for edge, wait in zip(core.cycle, core.waits, strict=True):
            assert wait in self.mesh.graph.waits(edge.task)
            if edge.kind == "lock":
                holders, queue = self.mesh.locks.view(edge.target)
                assert edge.holder in {r.task for r in holders} | {r.task for r in queue}
            else:
                assert edge.holder in self.children[edge.task][wait][1]

    @rule(
        task=st.sampled_from(TASKS),
        names=st.lists(st.sampled_from("xyz"), min_size=1, max_size=2, unique=True),
        mode=st.sampled_from(("exclusive", "shared")),
    )
    def ask(self, task: str, names: list[str], mode: str) -> None:
        """A running task asks, or a branch of one that waits."""
        waits = self.mesh.graph.waits(task)
        try:
            request, core = self.mesh.ask(task, *names, mode=mode)
        except InvalidParams:
            return
        if request.held and waits:
            self.mesh.graph.put(task, "runs", agent="a", need=1, targets=[("outside", "")])
        self.resolve(core)

    @rule(
        task=st.sampled_from(TASKS),
        children=st.lists(st.sampled_from(TASKS), min_size=1, max_size=3, unique=True),
        need=st.integers(1, 3),
    )
    def delegate(self, task: str, children: list[str], need: int) -> None:
        targets = [target for target in children if target != task]
        if not targets:
            return
        wait = f"c{len(self.children.get(task, ()))}"
        self.children.setdefault(task, {})[wait] = (min(need, len(targets)), tuple(targets))
        told = [("child", target) for target in targets]
        self.resolve(self.mesh.graph.add(task, wait, agent="a", need=need, targets=told))

    @rule(task=st.sampled_from(TASKS))
    def branch_stops(self, task: str) -> None:
        if "runs" in self.mesh.graph.waits(task):
            self.mesh.graph.remove(task, "runs")
            self.resolve(self.mesh.graph.check(task))

    @rule(task=st.sampled_from(TASKS))
    def ends(self, task: str) -> None:
        """Its name is used again for another task."""
        if self.mesh.graph.waits(task) and "runs" not in self.mesh.graph.waits(task):
            return
        events = self.mesh.locks.ended(task)
        self.mesh.graph.ended(task)
        self.mesh.fold(events)
        for parent, waits in self.children.items():
            for wait, (_, targets) in waits.items():
                if task in targets and wait in self.mesh.graph.waits(parent):
                    self.mesh.graph.remove(parent, wait)
                    if self.mesh.graph.waits(parent):
                        self.mesh.graph.put(parent, "runs", agent="a", need=1, targets=[("outside", "")])

    @invariant()
    def nobody_is_stuck(self) -> None:
        assert self.stuck() == set()
        assert self.mesh.graph.sweep() == []


DeadlockMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestNobodyStaysStuck = DeadlockMachine.TestCase


# Single waits --------------------------------------------------------------------------------------


@pytest.fixture
def graph() -> WaitGraph:
    return WaitGraph(Locks())


def add(graph: WaitGraph, task: str, *targets: str, need: int | None = None, kind: str = "child") -> Core | None:
    told = [(kind, target) for target in targets]
    return graph.add(task, "w", agent=f"agent-of-{task}", need=len(told) if need is None else need, targets=told)


def test_one_of_several_children_is_enough_to_go_on(graph: WaitGraph) -> None:
    assert add(graph, "p", "a", "b", need=1) is None
    assert add(graph, "a", "p", kind="order") is None
    core = add(graph, "b", "p", kind="order")
    assert core is not None
    assert core.stuck == {"p", "a", "b"}
    assert core.cycle[0] == CycleEdge("agent-of-b", "b", "order", "p", "p")


def test_an_answer_from_outside_never_blocks(graph: WaitGraph) -> None:
    assert add(graph, "p", "a") is None
    assert graph.add("a", "w", agent="a", need=1, targets=[("outside", ""), ("child", "p")]) is None
    assert graph.add("a", "w", agent="a", need=1, targets=[("outside", "p")]) is None
    assert graph.add("a", "w", agent="a", need=2, targets=[("outside", ""), ("child", "p")]) is not None


def test_a_task_that_ended_blocks_nobody(graph: WaitGraph) -> None:
    add(graph, "p", "a")
    add(graph, "a", "p")
    graph.ended("a")
    assert graph.sweep() == []
    assert len(graph) == 1


def test_a_task_is_stuck_only_when_all_its_branches_are(graph: WaitGraph) -> None:
    graph.put("p", "one", agent="p", need=1, targets=[("child", "a")])
    graph.put("p", "two", agent="p", need=1, targets=[("child", "runs")])
    assert add(graph, "a", "p") is None
    graph.remove("p", "two")
    core = graph.check("p")
    assert core is not None
    assert core.waits == ("one", "w")


def test_a_task_that_only_waits_for_stuck_ones_is_no_deadlock_of_its_own(graph: WaitGraph) -> None:
    add(graph, "p", "a")
    assert add(graph, "a", "p") is not None
    assert add(graph, "late", "p") is None
    assert graph.sweep()[0].stuck == {"p", "a", "late"}


def test_the_shortest_circle_is_told(graph: WaitGraph) -> None:
    for i in range(10):
        add(graph, f"t{i}", f"t{i + 1}")
    add(graph, "short", "t10")
    core = add(graph, "t10", "t0", "short")
    assert core is not None
    assert [edge.task for edge in core.cycle] == ["t10", "short"]


def test_a_need_of_more_than_there_are_means_all_and_a_target_counts_once(graph: WaitGraph) -> None:
    assert add(graph, "p", "a", "a", "b", need=3) is None
    assert add(graph, "a", "p") is not None
    graph.ended("a")
    assert graph.sweep() == []


def test_what_a_check_leaves_at_its_cap_is_found_by_the_sweep() -> None:
    graph = WaitGraph(Locks(), cap=10)
    for i in range(30):
        add(graph, f"t{i}", f"t{i + 1}")
    assert add(graph, "t30", "t0") is None
    assert graph.unchecked == {"t30"}
    (core,) = graph.sweep()
    assert len(core.cycle) == 31
    assert graph.unchecked == set()


def test_the_edges_are_told_to_people(graph: WaitGraph) -> None:
    add(graph, "p", "a", "b")
    told = [(wait, edge.task, edge.kind, edge.target) for wait, edge in graph.edges()]
    assert told == [("w", "p", "child", "a"), ("w", "p", "child", "b")]
    assert list(graph.edges(["nobody"])) == []


# Who gives way -------------------------------------------------------------------------------------

OLD, YOUNG = Facts(created=1, work=9, priority=5), Facts(created=2, work=90, priority=7)
CIRCLE = Core(
    (CycleEdge("a", "old", "child", "young", "young"), CycleEdge("a", "young", "child", "old", "old")),
    ("w", "w"),
    frozenset(("old", "young")),
)


@pytest.mark.parametrize(("policy", "gone"), [("youngest", "young"), ("least-work", "old"), ("priority", "old")])
def test_the_policy_chooses_who_gives_way(policy: Any, gone: str) -> None:
    assert victim(CIRCLE, {"old": OLD, "young": YOUNG}, policy) == gone


@pytest.mark.parametrize(
    ("facts", "gone"),
    [
        ({"old": OLD, "young": Facts(created=2, victims=2)}, "young"),
        ({"old": OLD, "young": Facts(created=2, victims=3)}, "old"),
        ({"old": Facts(created=1, victims=5), "young": Facts(created=2, victims=4)}, "young"),
        ({"old": OLD, "young": Facts(created=2, irreversible=True)}, "old"),
        ({"old": Facts(created=1, victims=3), "young": Facts(created=2, irreversible=True)}, "young"),
        ({}, "young"),
    ],
)
def test_who_gave_way_often_is_spared_then_who_did_what_cannot_be_undone(facts: Mapping[str, Facts], gone: str) -> None:
    assert victim(CIRCLE, facts) == gone
