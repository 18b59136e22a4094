"""Named locks against a model that looks at everybody every time.

The laws, checked after every decision:

1. Whoever holds a name exclusively holds it alone, but for those who re-entered it along a chain of delegation.
2. A request holds all of its names or none.
3. Requests that exclude each other on a name are granted in the order in which they were asked.
4. The tokens of a name only grow; whoever re-enters has the token of whom he re-entered, or one of his own.
5. Nobody waits who could be granted, and nobody is granted who should wait.
6. A decision changes nothing until it is folded.
7. The fold of the events, and what was dumped and loaded, are the live ledger.
8. Nothing is left of what is over.
9. Who is promised a name is of its holder's replica and gets it next, with that token, or it is recalled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.locks import Ask, Locks, Request, changes, names_of
from weft_protocols.errors import Fenced, InvalidParams

TASKS = ("t1", "t2", "t3", "t4", "t5")
AGENT = {"t1": "x", "t2": "y", "t3": "x", "t4": "y", "t5": "x"}
NAMES = ("a", "b", "c")


@pytest.fixture
def mesh(lock_log: Any) -> Any:
    return lock_log()


# The order of grants -------------------------------------------------------------------------------


def test_a_lock_goes_to_those_who_wait_in_the_order_they_asked(mesh: Any) -> None:
    first = mesh.ask("t1", "a")
    second, third = mesh.ask("t2", "a"), mesh.ask("t3", "a")
    assert first.held
    assert (mesh.locks.ahead(second), mesh.locks.ahead(third)) == (0, 1)
    assert mesh.release(first) == ["t2"]
    assert mesh.release(second) == ["t3"]
    assert first.token < second.token < third.token


def test_a_shared_request_waits_behind_an_exclusive_one_that_waits(mesh: Any) -> None:
    reader = mesh.ask("t1", "a", mode="shared")
    writer = mesh.ask("t2", "a")
    late = mesh.ask("t3", "a", mode="shared")
    assert reader.held
    assert not writer.held
    assert not late.held
    assert mesh.release(reader) == ["t2"]
    assert mesh.release(writer) == ["t3"]


def test_all_shared_requests_before_the_next_exclusive_one_are_granted_in_one_decision(mesh: Any) -> None:
    writer = mesh.ask("t1", "a")
    mesh.ask("t2", "a", mode="shared")
    mesh.ask("t3", "a", mode="shared")
    mesh.ask("t4", "a")
    mesh.ask("t5", "a", mode="shared")
    assert mesh.release(writer) == ["t2", "t3"]


def test_a_request_for_several_names_holds_nothing_while_it_waits_and_is_not_starved(mesh: Any) -> None:
    a = mesh.ask("t1", "a")
    both = mesh.ask("t2", "a", "b")
    late = mesh.ask("t3", "b")
    assert mesh.locks.view("b") == ([], [both, late])
    assert mesh.release(a) == ["t2"]
    assert mesh.release(both) == ["t3"]


def test_shared_requests_pass_a_shared_one_that_waits_for_another_name(mesh: Any) -> None:
    mesh.ask("t1", "b")
    mesh.ask("t2", "a", "b", mode="shared")
    assert mesh.ask("t3", "a", mode="shared").held


def test_who_gives_up_waiting_lets_the_next_ones_on(mesh: Any) -> None:
    mesh.ask("t1", "a", mode="shared")
    writer = mesh.ask("t2", "a")
    mesh.ask("t3", "a", mode="shared")
    assert mesh.release(writer) == ["t3"]


def test_a_long_queue_is_served_to_its_end_when_its_middle_gave_up(mesh: Any) -> None:
    holder = mesh.ask("t0", "a")
    waiting = [mesh.ask(f"w{i}", "a", request=f"w{i}/", mode="shared" if i % 3 else "exclusive") for i in range(200)]
    for request in waiting[20:180]:
        mesh.release(request)
    left = waiting[:20] + waiting[180:]
    assert mesh.locks.view("a")[1] == left
    served = mesh.release(holder)
    while len(served) < len(left):
        served += mesh.release(mesh.locks.view("a")[0][0])
    assert served == [request.task for request in left]


def test_the_order_of_a_queue_outlives_a_snapshot(mesh: Any) -> None:
    holder = mesh.ask("t1", "a", agent="x")
    mesh.ask("t2", "a", agent="y")
    mesh.ask("t3", "a", agent="x")
    mesh.locks, old = Locks(), mesh.locks
    mesh.locks.load(msgpack.unpackb(msgpack.packb(old.dump())))
    assert mesh.release(holder) == ["t2"]


# Whose it is ---------------------------------------------------------------------------------------


def test_repeating_a_request_changes_nothing(mesh: Any) -> None:
    request = mesh.ask("t1", "a", request="q")
    token, events = request.token, len(mesh.log)
    assert mesh.ask("t1", "a", request="q") is request
    assert (request.token, len(mesh.log)) == (token, events)


def test_a_newer_claim_takes_the_request_over_with_a_new_token(mesh: Any) -> None:
    request = mesh.ask("t1", "a", request="q")
    old = request.token
    mesh.ask("t1", "a", request="q", claim=2, replica="r2")
    assert request.held
    assert request.token == len(mesh.log) > old
    assert mesh.locks.session("x", "r1") == []
    assert mesh.locks.session("x", "r2") == [request]
    assert mesh.locks.release("x", "q", claim=1) == []
    with pytest.raises(Fenced, match="claim 2"):
        mesh.ask("t1", "a", request="q", claim=1)


def test_a_newer_claim_takes_over_a_place_in_the_queue(mesh: Any) -> None:
    first = mesh.ask("t1", "a")
    second = mesh.ask("t2", "a", request="q")
    third = mesh.ask("t3", "a")
    mesh.ask("t2", "a", request="q", claim=5, replica="r2")
    assert mesh.locks.view("a") == ([first], [second, third])
    assert mesh.release(first) == ["q"]


def test_what_an_older_claim_left_behind_gives_way_to_the_new_attempt(mesh: Any) -> None:
    mesh.ask("t1", "a", request="old")
    new = mesh.ask("t1", "a", request="new", claim=2)
    assert new.held
    assert mesh.locks.find("x", "old") is None
    changed = mesh.ask("t1", "b", request="new", claim=3)
    assert changed.held
    assert list(mesh.locks.names()) == ["b"]
    mesh.ask("t2", "c", mode="shared")
    assert mesh.ask("t2", "c", claim=2, reentrant=True).held


def test_a_lease_that_ended_frees_what_was_held_and_drops_what_was_waited_for(mesh: Any) -> None:
    mesh.ask("t1", "a", request="held", replica="gone")
    mesh.ask("t2", "b")
    mesh.ask("t1", "b", request="waiting", replica="gone")
    mesh.ask("t3", "a", request="next")
    events = mesh.fold(mesh.locks.expire(("x", "gone")))
    assert changes(events) == [
        ("x", "held", "lost", "expired", ""),
        ("x", "waiting", "lost", "expired", ""),
        ("x", "next", "granted", "", ""),
    ]
    assert mesh.locks.expire(("x", "gone")) == []


def test_a_task_that_ended_holds_nothing(mesh: Any) -> None:
    mesh.ask("t1", "a", "b")
    mesh.ask("t1", "c")
    mesh.ask("t2", "c", request="next")
    mesh.fold(mesh.locks.chosen("t1"))
    assert mesh.locks.victims("t1") == 1
    assert changes(mesh.fold(mesh.locks.ended("t1")))[-1] == ("x", "next", "granted", "", "")
    assert (mesh.locks.of_task("t1"), mesh.locks.victims("t1")) == ([], 0)


def test_an_operator_takes_a_lock_away_with_a_reason(mesh: Any) -> None:
    mesh.ask("t1", "a", "b", request="q")
    mesh.ask("t2", "a", request="next")
    with pytest.raises(InvalidParams, match="reason is empty"):
        mesh.locks.force("a", reason=" ")
    with pytest.raises(InvalidParams, match="'a' is not held by task t2"):
        mesh.locks.force("a", "t2", reason="stuck")
    events = mesh.fold(mesh.locks.force("a", reason="stuck"))
    assert changes(events) == [("x", "q", "lost", "forced", "stuck"), ("x", "next", "granted", "", "")]
    assert list(mesh.locks.names()) == ["a"]


def test_overtaking_needs_only_the_holders_consent(mesh: Any) -> None:
    mesh.ask("t1", "a")
    mesh.ask("t2", "a", "b")
    last = mesh.ask("t1", "b", request="last")
    assert mesh.locks.overtake("x", mesh.locks.view("a")[1][0].request) == []
    assert changes(mesh.fold(mesh.locks.overtake("x", "last"))) == [("x", "last", "granted", "", "")]
    assert last.held
    assert mesh.locks.overtake("x", "last") == []


# Re-entry ------------------------------------------------------------------------------------------


def test_a_child_re_enters_what_its_ancestor_holds_before_all_who_wait_and_with_its_token(mesh: Any) -> None:
    parent = mesh.ask("t1", "a")
    other = mesh.ask("t4", "a")
    child = mesh.ask("t3", "a", reentrant=True)
    assert child.held
    assert child.token == parent.token
    assert mesh.release(parent) == []
    assert mesh.release(child) == ["t4"]
    assert other.token > parent.token


def test_only_verified_ancestors_are_re_entered(mesh: Any) -> None:
    mesh.ask("t4", "a")
    assert not mesh.ask("t3", "a", reentrant=True).held
    mesh.ask("t1", "b")
    assert not mesh.ask("t2", "b").held


def test_two_children_of_one_holder_exclude_each_other(mesh: Any) -> None:
    mesh.ask("t1", "a")
    asked = mesh.ask("t2", "a", reentrant=True)
    sibling = Ask("x", "r1", "s", "s/1", 1, ("a",), reentrant=True)
    mesh.fold(mesh.locks.request(sibling, ancestors=("t1",)))
    assert asked.held
    assert mesh.release(asked) == ["s"]


def test_who_waits_to_re_enter_goes_on_once_the_ancestor_holds(mesh: Any) -> None:
    holder = mesh.ask("t4", "a")
    mesh.ask("t1", "a")
    mesh.ask("t2", "a", reentrant=True)
    assert mesh.release(holder) == ["t1", "t2"]


def test_who_waits_to_re_enter_goes_on_where_the_ancestor_waited_for_another_name(mesh: Any) -> None:
    holder = mesh.ask("t4", "a")
    mesh.ask("t1", "a", "b")
    child = mesh.ask("t2", "b", reentrant=True)
    assert not child.held
    assert mesh.release(holder) == ["t1", "t2"]


def test_among_those_who_re_enter_the_first_one_goes_first(mesh: Any) -> None:
    holder = mesh.ask("t2", "a")
    mesh.ask("t1", "a", "b")
    mesh.ask("t3", "b", reentrant=True)
    again = mesh.ask("t1", "a", "b", reentrant=True)
    assert mesh.release(holder) == ["t1", "t3"]
    assert not again.held


def test_who_re_enters_in_the_decision_that_grants_the_ancestor_has_its_token(mesh: Any) -> None:
    holder = mesh.ask("t4", "a", "b")
    child = mesh.ask("t2", "a", mode="shared", reentrant=True)
    parent = mesh.ask("t1", "a", "b", mode="shared")
    assert mesh.release(holder) == ["t1", "t2"]
    assert child.token == parent.token


def test_an_exclusive_request_does_not_re_enter_a_shared_hold(mesh: Any) -> None:
    holder = mesh.ask("t4", "a")
    mesh.ask("t1", "a", mode="shared")
    mesh.ask("t2", "a", reentrant=True)
    assert mesh.release(holder) == ["t1"]


def test_a_request_that_re_enters_one_name_and_takes_another_has_a_token_of_its_own(mesh: Any) -> None:
    parent = mesh.ask("t1", "a")
    assert mesh.ask("t2", "a", "b", reentrant=True).token > parent.token


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["x", None])
def test_a_task_cannot_wait_for_itself(mesh: Any, held: str | None) -> None:
    if held is None:
        mesh.ask("t2", "a")
    mesh.ask("t1", "a")
    with pytest.raises(InvalidParams, match=r"task t1 (holds|waits for) lock 'a' already.*reentrant=True"):
        mesh.ask("t1", "b", "a")
    assert (mesh.ask("t1", "a", reentrant=True).held) is (held is not None)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_shared_lock_does_not_become_exclusive(mesh: Any, reentrant: bool) -> None:
    mesh.ask("t1", "a", mode="shared")
    with pytest.raises(InvalidParams, match=r"t1 holds lock 'a' shared, and .* release it first"):
        mesh.ask("t1", "a", reentrant=reentrant)
    if reentrant:
        with pytest.raises(InvalidParams, match="t1 holds lock 'a' shared"):
            mesh.ask("t2", "a", reentrant=True)


def test_a_request_keeps_its_names_its_mode_and_its_task(mesh: Any) -> None:
    mesh.ask("t1", "a", request="q")
    with pytest.raises(InvalidParams, match="ask for others in another request"):
        mesh.ask("t1", "b", request="q")
    with pytest.raises(InvalidParams, match="'q' is one of task t1"):
        mesh.ask("t2", "a", request="q")
    assert mesh.ask("t2", "b", request="q", agent="y").held


@pytest.mark.parametrize(
    ("names", "field", "why"),
    [
        (None, "names", "missing or no list"),
        ([], "names", "1 to 64 names"),
        ([f"n{i}" for i in range(65)], "names", "are 65"),
        (["a", ""], "names[1]", "has 0 characters"),
        (["x" * 257], "names[0]", "has 257 characters"),
        ([7], "names[0]", "is 7"),
        (["a\nb"], "names[0]", r"U\+000A"),
        (["a\ud800"], "names[0]", r"U\+D800"),
        (["a", "b", "a"], "names[2]", "'a' is in the request already"),
    ],
)
def test_a_wrong_name_is_told(names: Any, field: str, why: str) -> None:
    with pytest.raises(InvalidParams, match=why) as caught:
        names_of(names)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_a_name_is_any_printable_text() -> None:
    assert names_of(["repo:weft/main", "Straße 7, 東京", "x" * 256]) == ("repo:weft/main", "Straße 7, 東京", "x" * 256)


@pytest.mark.parametrize(("field", "value"), [("mode", "both"), ("task", ""), ("request", "")])
def test_a_wrong_field_is_told(mesh: Any, field: str, value: str) -> None:
    ask = dataclasses.replace(Ask("x", "r", "t1", "q", 1, ("a",)), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidParams, match=field):
        mesh.locks.request(ask)


# Against the model ---------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Entry:
    """What the model knows of a request."""

    ask: Ask
    chain: tuple[str, ...]
    number: int
    held: bool = False
    token: int = 0

    def excludes(self, other: Entry, name: str) -> bool:
        return name in other.ask.names and "exclusive" in (self.ask.mode, other.ask.mode)


class Model:
    """The rules, word for word and slow."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Entry] = {}

    def holders(self, name: str) -> list[Entry]:
        return [e for e in self.entries.values() if e.held and name in e.ask.names]

    def covered(self, entry: Entry, name: str) -> bool:
        return any(
            h.ask.task in entry.chain and (h.ask.mode == "exclusive" or entry.ask.mode == "shared")
            for h in self.holders(name)
        )

    def may(self, entry: Entry) -> bool:
        for name in entry.ask.names:
            covered = self.covered(entry, name)
            for h in self.holders(name):
                if h.excludes(entry, name) and not (covered and h.ask.task in entry.chain):
                    return False
            earlier = [e for e in self.entries.values() if not e.held and e.number < entry.number]
            if not covered and any(e.excludes(entry, name) and name in e.ask.names for e in earlier):
                return False
        return True

    def settle(self) -> set[tuple[str, str]]:
        granted: set[tuple[str, str]] = set()
        while True:
            waiting = sorted((e.number, key) for key, e in self.entries.items() if not e.held)
            key = next((key for _, key in waiting if self.may(self.entries[key])), None)
            if key is None:
                return granted
            self.entries[key].held = True
            granted.add(key)


ASKED = st.tuples(
    st.sampled_from(TASKS),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True),
    st.sampled_from(("exclusive", "exclusive", "shared")),
    st.booleans(),
    st.sampled_from(("r1", "r2")),
)
"""Task, names, mode, re-entrant, replica."""


class LockMachine(RuleBasedStateMachine):
    """Random decisions; the model makes the same."""

    log: Any = None
    """What makes a ledger."""

    def __init__(self) -> None:
        super().__init__()
        self.mesh = type(self).log()
        self.twin = Locks()
        self.model = Model()
        self.highest: dict[str, int] = {}
        self.claims = dict.fromkeys(TASKS, 1)
        self.promised: dict[tuple[str, str], int] = {}
        self.asked = 0

    def decide(self, act: Callable[[], Sequence[Event]]) -> list[Event]:
        before = self.mesh.locks.dump()
        events = list(act())
        assert self.mesh.locks.dump() == before, "law 6"
        for event in events:
            self.mesh.fold([event])
            self.twin.apply(event, number=len(self.mesh.log), at=1000 + len(self.mesh.log))
            self.follow(event)
        return events

    def follow(self, event: Event) -> None:
        """Law 4, and law 3 by the numbers of those who still wait."""
        told = changes([event])
        if told and told[0][2] == "promised":
            self.promised[told[0][:2]] = len(self.mesh.log)
        elif told and told[0][2] in ("recalled", "freed", "lost"):
            self.promised.pop(told[0][:2], None)
        if not told or told[0][2] not in ("granted", "moved"):
            return
        request = self.mesh.locks.find(told[0][0], told[0][1])
        assert request is not None
        if not request.held:
            return
        number = self.promised.pop((request.agent, request.request), len(self.mesh.log))
        for name in request.names:
            outer = {h.token for h in self.mesh.locks.view(name)[0] if h is not request and h.task in request.chain}
            assert request.token == number or request.token in outer, "law 4"
            assert request.token >= self.highest.get(name, 0) or request.token in outer, "law 4"
            self.highest[name] = max(self.highest.get(name, 0), request.token)

    def after(self, events: Sequence[Event], *, freed: set[tuple[str, str]], direct: set[tuple[str, str]]) -> None:
        for key in freed:
            del self.model.entries[key]
        expected = self.model.settle() | direct
        granted = {(c[0], c[1]) for c in changes(events) if c[2] == "granted"}
        assert granted == expected, "law 5"
        gone = {(c[0], c[1]) for c in changes(events) if c[2] in ("freed", "lost")}
        assert gone == freed

    @rule(asked=ASKED)
    def ask(self, asked: tuple[str, list[str], str, bool, str]) -> None:
        self._ask(*asked)

    @rule(asked=ASKED)
    def ask_more(self, asked: tuple[str, list[str], str, bool, str]) -> None:
        """A second rule, so that asking comes more often."""
        self._ask(*asked)

    def _ask(self, task: str, names: list[str], mode: str, reentrant: bool, replica: str) -> None:
        self.asked += 1
        ask = Ask(AGENT[task], replica, task, f"q{self.asked}", self.claims[task], tuple(names), mode, reentrant)
        chain = (task, *self.mesh.ancestors(task)) if reentrant else ()
        mine = [e for e in self.model.entries.values() if e.ask.task == task and set(names) & set(e.ask.names)]
        stale = {(e.ask.agent, e.ask.request) for e in mine if e.ask.claim < ask.claim}
        try:
            events = self.decide(lambda: self.mesh.locks.request(ask, ancestors=self.mesh.ancestors(task)))
        except InvalidParams as error:
            live = [e for e in mine if e.ask.claim == ask.claim]
            if "does not become exclusive" in str(error):
                assert mode == "exclusive"
                assert any(e.ask.mode == "shared" for e in self.model.entries.values() if e.ask.task in (task, *chain))
            else:
                assert live
                assert not reentrant
            return
        assert reentrant or not any(e.ask.claim == ask.claim for e in mine)
        for key in stale:
            del self.model.entries[key]
        first = self.model.settle()
        self.model.entries[(ask.agent, ask.request)] = Entry(ask, chain, len(self.mesh.log) + 1)
        expected = first | self.model.settle()
        assert {(c[0], c[1]) for c in changes(events) if c[2] == "granted"} == expected, "law 5"
        assert {(c[0], c[1]) for c in changes(events) if c[2] == "freed"} == stale

    @precondition(lambda self: self.model.entries)
    @rule(
        data=st.data(), how=st.sampled_from(("release", "release", "release", "deny", "repeat", "takeover", "overtake"))
    )
    def one(self, data: st.DataObject, how: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.entries)))
        entry = self.model.entries[key]
        locks = self.mesh.locks
        if how == "release":
            self.after(self.decide(lambda: locks.release(*key, claim=entry.ask.claim)), freed={key}, direct=set())
        elif how == "deny":
            self.after(
                self.decide(lambda: locks.deny(*key, "cycle")), freed=set() if entry.held else {key}, direct=set()
            )
        elif how == "overtake":
            events = self.decide(lambda: locks.overtake(*key))
            if events:
                assert not entry.held
                entry.held = True
            else:
                assert entry.held or any(
                    h.excludes(entry, name) and not (self.model.covered(entry, name) and h.ask.task in entry.chain)
                    for name in entry.ask.names
                    for h in self.model.holders(name)
                )
            self.after(events, freed=set(), direct={key} if events else set())
        else:
            if how == "takeover":
                self.claims[entry.ask.task] += 1
                entry.ask = dataclasses.replace(entry.ask, claim=self.claims[entry.ask.task], replica="r3")
            events = self.decide(lambda: locks.request(entry.ask, ancestors=self.mesh.ancestors(entry.ask.task)))
            moved = [event[0] for event in events if event[0] != "lock.recalled"]
            assert moved == (["lock.moved"] if how == "takeover" else [])

    @precondition(lambda self: self.promised)
    @rule(data=st.data())
    def hand_on(self, data: st.DataObject) -> None:
        """A replica acts on what it was promised before anybody heard that the one before let go."""
        key = data.draw(st.sampled_from(sorted(self.promised)))
        token, name = self.promised[key], self.model.entries[key].ask.names[0]
        assert self.decide(lambda: self.mesh.locks.handed(*key, token + 1)) == []
        before = {(r.agent, r.request) for r in self.mesh.locks.view(name)[0]}
        before |= {other for other in self.promised if self.promised[other] < token and self.named(other) == name}
        self.after(self.decide(lambda: self.mesh.locks.handed(*key, token)), freed=before, direct=set())
        found = self.mesh.locks.find(*key)
        assert found is not None
        assert (found.held, found.token) == (True, token), "law 9"

    def named(self, key: tuple[str, str]) -> str:
        return self.model.entries[key].ask.names[0]

    @rule(
        who=st.sampled_from(
            [("expire", "x", "r1"), ("expire", "y", "r2"), ("expire", "x", "r3")]
            + [("end", task, "") for task in TASKS]
            + [("force", name, "") for name in NAMES]
        )
    )
    def lose(self, who: tuple[str, str, str]) -> None:
        how, what, replica = who
        entries, locks = self.model.entries.items(), self.mesh.locks
        if how == "expire":
            freed = {key for key, e in entries if (e.ask.agent, e.ask.replica) == (what, replica)}
            self.after(self.decide(lambda: locks.expire((what, replica))), freed=freed, direct=set())
        elif how == "end":
            freed = {key for key, e in entries if e.ask.task == what}
            self.after(self.decide(lambda: locks.ended(what)), freed=freed, direct=set())
        else:
            freed = {key for key, e in entries if e.held and what in e.ask.names}
            if freed:
                self.after(self.decide(lambda: locks.force(what, reason="test")), freed=freed, direct=set())

    @rule()
    def takeover_of_the_leader(self) -> None:
        self.twin, old = Locks(), self.mesh.locks
        self.twin.load(msgpack.unpackb(msgpack.packb(old.dump())))
        self.mesh.locks, self.twin = self.twin, old

    @invariant()
    def holders_are_alone_or_share(self) -> None:
        locks = self.mesh.locks
        for name in locks.names():
            holders, _ = locks.view(name)
            for h in holders:
                assert all(h in locks.view(n)[0] for n in h.names), "law 2"
                for other in holders:
                    if h is not other and (h.exclusive or other.exclusive):
                        first, later = sorted((h, other), key=lambda r: r.since)
                        assert first.task in later.chain, "law 1"

    @invariant()
    def the_model_agrees(self) -> None:
        live = {(r.agent, r.request): r.held for r in self.live()}
        assert live == {key: e.held for key, e in self.model.entries.items()}, "law 5"
        for name in NAMES:
            holders, waiting = self.mesh.locks.view(name)
            assert {r.request for r in holders} == {e.ask.request for e in self.model.holders(name)}, "law 2"
            assert [r.number for r in waiting] == sorted(r.number for r in waiting), "law 3"

    @invariant()
    def what_is_promised_comes_next(self) -> None:
        known = {(r.agent, r.request): r.promised for r in self.live() if r.promised}
        assert known == self.promised, "law 9"
        for name in NAMES:
            holders, waiting = self.mesh.locks.view(name)
            line = [r for r in waiting if r.promised]
            assert waiting[: len(line)] == line, "law 9"
            assert [r.promised for r in line] == sorted(r.promised for r in line), "law 9"
            for r in line:
                (holder,) = holders
                assert (r.agent, r.replica, r.names, r.exclusive) == (holder.agent, holder.replica, (name,), True)
                assert holder.token < r.promised, "law 9"

    @invariant()
    def the_folds_agree(self) -> None:
        assert self.twin.dump() == self.mesh.locks.dump(), "law 7"
        for name in NAMES:
            mine, other = self.mesh.locks.view(name), self.twin.view(name)
            assert [{r.request for r in rs} for rs in mine] == [{r.request for r in rs} for rs in other], "law 7"
            assert [r.number for r in mine[1]] == [r.number for r in other[1]], "law 7"

    @invariant()
    def nothing_is_left_behind(self) -> None:
        live = self.live()
        assert set(self.mesh.locks.names()) == {name for r in live for name in r.names}, "law 8"
        assert set(self.mesh.locks.sessions()) == {(r.agent, r.replica) for r in live}, "law 8"
        assert len(self.mesh.locks) == len(live)

    def live(self) -> list[Request]:
        return [request for task in TASKS for request in self.mesh.locks.of_task(task)]

    def teardown(self) -> None:
        again = Locks()
        for number, event in enumerate(self.mesh.log, 1):
            again.apply(tuple(event), number=number, at=1000 + number)
        assert again.dump() == self.mesh.locks.dump(), "law 7"


def test_locks_keep_their_laws(lock_log: Any) -> None:
    class Machine(LockMachine):
        log = lock_log

    run_state_machine_as_test(Machine, settings=settings(max_examples=80, stateful_step_count=40, deadline=None))
