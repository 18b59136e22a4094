"""Approvals: the rules, as a ledger and as laws of whole histories, and the operations as everybody calls them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.client import coordinator
from weft.core.broker import Delivered
from weft.core.config import parse_mesh_config
from weft.core.watchconf import WatchConfig
from weft.testing.agents import eventually
from weft_coordinator.decide import approvals as ledger_module
from weft_coordinator.decide.approvals import (
    APPROVED,
    ASKED,
    DECIDED,
    DENIED,
    EXPIRED,
    KEPT,
    PENDING,
    RETURNED,
    SPENT,
    TOOL,
    USED,
    WITHDRAWN,
    Approval,
    Approvals,
    Bound,
    Need,
)
from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.watchdog import AgentSeen, ApprovalSeen, Observed, findings
from weft_protocols import subjects
from weft_protocols.errors import Conflict, Fenced, InvalidConfig, InvalidParams, PermissionDenied, WeftError
from weft_protocols.records import Control

if TYPE_CHECKING:
    from tests.coordinator.conftest import Sent, Stage

TASK = "0" * 32
PEOPLE = {"ann": ("", "ops"), "ben": ("", "ops"), "cyd": ("", "ops", "finance"), "eve": ("",), "root": ("", "ops")}
"""Persons and what they may decide as; `root` began the chain."""
CALL = Bound(TOOL, "writer", TASK, "", "crm", "update", "a" * 64, "d1", "p1")
END = 10_000


def wanted(bound: Bound = CALL, *needs: Need, expires: int = END) -> Approval:
    chain = ("root/1", f"writer/{TASK}")
    return Approval(
        "", bound, "Send?", "{}", "high", needs or (Need("ops"),), "root", chain, ("writer", "Root"), expires
    )


class Desk:
    """A ledger, what was decided with it, and a clock."""

    def __init__(self) -> None:
        self.ledger = Approvals()
        self.events: list[tuple[int, Event]] = []
        self.now = 1

    def take(self, events: Sequence[Event]) -> Sequence[Event]:
        for event in events:
            self.events.append((self.now, event))
            carried = msgpack.unpackb(msgpack.packb(event), use_list=True)
            self.ledger.apply(tuple(carried), number=len(self.events), at=self.now)
        return events

    def ask(self, asked: Approval) -> str:
        id_, events = self.ledger.ask(asked, now=self.now)
        self.take(events)
        return id_

    def decide(self, id_: str, who: str, *, allow: bool = True, role: str = "") -> bool:
        """Whether something was decided."""
        return bool(
            self.take(
                self.ledger.decide(
                    id_, who=who, roles=PEOPLE[who], role=role, allow=allow, reason="because", now=self.now
                )
            )
        )

    def use(self, id_: str, bound: Bound = CALL, *, by: str = "u1") -> str:
        why, events = self.ledger.use(id_, bound, by=by, now=self.now)
        self.take(events)
        return why

    def state(self, id_: str) -> str:
        found = self.ledger.get(id_)
        assert found is not None
        return found.state(self.now)


@pytest.fixture
def desk() -> Desk:
    return Desk()


# The rules -----------------------------------------------------------------------------------------


def test_what_is_asked_again_attaches_and_asks_nobody_anew(desk: Desk) -> None:
    id_ = desk.ask(wanted())
    assert desk.ask(wanted(expires=END * 2)) == id_
    assert desk.decide(id_, "ann")
    assert desk.ask(wanted()) == id_
    assert desk.state(id_) == APPROVED
    assert len([event for _, event in desk.events if event[0] == ASKED]) == 1


@pytest.mark.parametrize("field", ["agent", "task", "key", "server", "tool", "digest", "definition", "policy"])
def test_an_approval_is_for_nothing_else(desk: Desk, field: str) -> None:
    other = replace(CALL, **{field: "f" * 32})
    id_ = desk.ask(wanted())
    desk.decide(id_, "ann")
    assert "given for another" in desk.use(id_, other)
    assert desk.ask(wanted(other)) != id_
    assert desk.state(desk.ask(wanted(other))) == PENDING


@pytest.mark.parametrize("changed", [{"definition": "d2"}, {"policy": "p2"}])
def test_a_call_whose_tool_or_policy_changed_is_asked_anew_and_the_old_one_is_void(
    desk: Desk, changed: dict[str, str]
) -> None:
    old = desk.ask(wanted())
    desk.decide(old, "ann")
    new = desk.ask(wanted(replace(CALL, **changed)))
    assert (desk.state(old), desk.state(new)) == (WITHDRAWN, PENDING)
    assert desk.use(old) == "it is withdrawn"
    back = desk.ask(wanted())
    assert desk.state(back) == PENDING
    assert back not in (old, new)


def test_other_arguments_of_the_same_step_void_the_approval_and_other_calls_stand(desk: Desk) -> None:
    step, other_step = replace(CALL, key="pay"), replace(CALL, key="refund")
    old, beside = desk.ask(wanted(step)), desk.ask(wanted(other_step))
    desk.decide(old, "ann")
    new = desk.ask(wanted(replace(step, digest="b" * 64)))
    assert [desk.state(one) for one in (old, beside, new)] == [WITHDRAWN, PENDING, PENDING]


def test_who_denied_or_let_it_expire_is_not_asked_again_by_a_retry(desk: Desk) -> None:
    denied = desk.ask(wanted())
    desk.decide(denied, "ann", allow=False)
    assert desk.ask(wanted()) == denied
    assert desk.use(denied) == "it is denied"
    late = desk.ask(wanted(replace(CALL, key="late")))
    desk.now = END
    assert desk.ask(wanted(replace(CALL, key="late"), expires=END * 2)) == late
    assert desk.state(late) == EXPIRED
    with pytest.raises(Conflict, match="expired"):
        desk.decide(late, "ann")


def test_a_use_is_once_and_may_be_repeated_by_who_made_it(desk: Desk) -> None:
    id_ = desk.ask(wanted())
    assert desk.use(id_) == "it is pending"
    desk.decide(id_, "ann")
    assert desk.use(id_, by="u1") == ""
    assert desk.use(id_, by="u1") == ""
    assert desk.use(id_, by="u2") == "it was used before"
    again = desk.ask(wanted())
    assert again != id_
    assert desk.state(again) == PENDING


def test_what_was_used_for_nothing_is_given_back_by_who_used_it(desk: Desk) -> None:
    id_ = desk.ask(wanted(CALL))
    desk.decide(id_, "ann")
    assert desk.ledger.give_back(id_, by="u1") == []
    assert desk.use(id_, by="u1") == ""
    assert desk.ledger.give_back(id_, by="u2") == desk.ledger.give_back(id_, by="") == []
    desk.take(desk.ledger.give_back(id_, by="u1"))
    assert desk.state(id_) == APPROVED
    assert desk.ask(wanted(CALL)) == id_
    assert desk.ledger.give_back(id_, by="u1") == []
    assert desk.use(id_, by="u2") == ""
    assert desk.use(id_, by="u3") != ""
    desk.take(desk.ledger.give_back(id_, by="u2"))
    desk.now = END
    assert desk.state(id_) == EXPIRED


def test_what_a_call_of_no_task_gave_back_is_there_for_the_next_one(desk: Desk) -> None:
    bound = replace(CALL, task="")
    id_ = desk.ask(wanted(bound))
    desk.decide(id_, "ann")
    desk.use(id_, bound, by="u1")
    desk.take(desk.ledger.give_back(id_, by="u1"))
    again = Approvals()
    again.load(msgpack.unpackb(msgpack.packb(desk.ledger.dump())))
    assert [one.id for one in again.live()] == [one.id for one in desk.ledger.live()] == [id_]
    assert desk.use(id_, bound, by="u2") == ""


def test_an_agent_has_only_so_many_open_ones(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_OPEN", 2)
    asked = [desk.ask(wanted(replace(CALL, task=f"{n}" * 32))) for n in (1, 2)]
    with pytest.raises(InvalidParams, match=r"2 approvals of .* wait for a decision"):
        desk.ask(wanted(replace(CALL, task="3" * 32)))
    desk.ask(wanted(replace(CALL, agent="another")))
    desk.decide(asked[0], "ann", allow=False)
    desk.ask(wanted(replace(CALL, task="3" * 32)))


def test_nobody_of_the_chain_decides_whatever_the_case_of_their_name(desk: Desk) -> None:
    id_ = desk.ask(wanted())
    with pytest.raises(PermissionDenied, match="somebody else"):
        desk.decide(id_, "root")


def test_so_many_persons_of_each_role_each_of_them_once(desk: Desk) -> None:
    id_ = desk.ask(wanted(CALL, Need("ops", 2), Need("finance")))
    assert desk.decide(id_, "cyd", role="finance")
    assert not desk.decide(id_, "cyd")
    with pytest.raises(PermissionDenied, match="needs ops"):
        desk.decide(id_, "eve")
    assert desk.decide(id_, "ann")
    assert not desk.decide(id_, "ann")
    assert desk.state(id_) == PENDING
    with pytest.raises(Conflict, match="not taken back"):
        desk.decide(id_, "ann", allow=False)
    assert desk.decide(id_, "ben")
    assert desk.state(id_) == APPROVED
    with pytest.raises(Conflict, match="nothing is left"):
        desk.decide(id_, "eve")


def test_one_who_denies_is_enough(desk: Desk) -> None:
    id_ = desk.ask(wanted(CALL, Need("ops", 3)))
    desk.decide(id_, "ann")
    desk.decide(id_, "ben", allow=False)
    assert desk.state(id_) == DENIED
    found = desk.ledger.get(id_)
    assert found is not None
    assert found.why == "ben denied it: because"


def test_the_end_of_a_task_withdraws_what_is_open_and_leaves_what_was_settled(desk: Desk) -> None:
    bounds = [replace(CALL, key=key) for key in ("pending", "approved", "denied", "used")]
    ids = [desk.ask(wanted(bound)) for bound in bounds]
    for id_, allow in zip(ids[1:], (True, False, True), strict=True):
        desk.decide(id_, "ann", allow=allow)
    desk.use(ids[3], bounds[3])
    desk.take(desk.ledger.close("writer", TASK, "its task has ended"))
    assert [desk.state(one) for one in ids] == [WITHDRAWN, WITHDRAWN, DENIED, SPENT]
    assert desk.use(ids[1], bounds[1]) == "it is withdrawn"
    assert not desk.ledger.close("writer", TASK, "again")


def test_what_a_task_was_told_stays_true_when_its_time_is_over_or_its_task_has_ended(desk: Desk) -> None:
    question = replace(CALL, kind="task", server="", tool="", key="_approve")
    id_ = desk.ask(wanted(question))
    desk.decide(id_, "ann")
    desk.now = END * 2
    assert desk.ask(wanted(question)) == id_
    desk.take([*desk.ledger.late(desk.now), *desk.ledger.close("writer", TASK, "its task has ended")])
    assert desk.state(id_) == APPROVED


def test_a_settled_request_of_no_task_answers_for_a_while_only(desk: Desk) -> None:
    free = replace(CALL, task="")
    denied = desk.ask(wanted(free))
    desk.decide(denied, "ann", allow=False)
    assert desk.ask(wanted(free)) == denied
    desk.now = 3_600_000
    assert desk.ask(wanted(free, expires=desk.now + END)) != denied


def test_what_is_remembered_is_bounded(desk: Desk) -> None:
    for n in range(KEPT + 10):
        id_ = desk.ask(wanted(replace(CALL, task="", key=str(n))))
        desk.decide(id_, "ann", allow=False)
    assert len(desk.ledger) == KEPT


# Laws of every history -----------------------------------------------------------------------------

BOUNDS = [CALL, replace(CALL, digest="b" * 64), replace(CALL, key="k"), replace(CALL, definition="d2")]
NEEDS = [(Need("ops"),), (Need("ops", 2),), (Need("finance"), Need("ops")), (Need(""),)]
steps = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(BOUNDS), st.sampled_from(NEEDS)),
    st.tuples(st.just("decide"), st.integers(0, 5), st.sampled_from(sorted(PEOPLE)), st.booleans()),
    st.tuples(st.just("use"), st.integers(0, 5), st.sampled_from(BOUNDS), st.sampled_from(["u1", "u2"])),
    st.tuples(st.just("return"), st.integers(0, 5), st.sampled_from(["u1", "u2"])),
    st.tuples(st.just("wait"), st.sampled_from([1, END // 2, END])),
    st.tuples(st.just("late")),
    st.tuples(st.just("close")),
    st.tuples(st.just("restart")),
)


@given(st.lists(steps, max_size=40))
def test_whatever_happens_nothing_is_used_that_was_not_approved_for_exactly_that(history: list[Any]) -> None:
    """Looks at the events alone: an approval is used at most once, in time, and after enough others said yes."""
    desk = Desk()
    granted: dict[str, Bound] = {}
    for step in history:
        before = desk.ledger.dump()
        try:
            happen(desk, step, granted)
        except WeftError:
            assert desk.ledger.dump() == before
    check(desk.events, granted)


def happen(desk: Desk, step: Any, granted: dict[str, Bound]) -> None:
    kind, *rest = step
    ids = [event[1]["id"] for _, event in desk.events if event[0] == ASKED]
    if kind == "ask":
        bound, needs = rest
        desk.ask(wanted(bound, *needs, expires=desk.now + END))
    elif kind == "wait":
        desk.now += rest[0]
    elif kind == "late":
        desk.take(desk.ledger.late(desk.now))
    elif kind == "close":
        desk.take(desk.ledger.close("writer", TASK, "ended"))
    elif kind == "restart":
        told = msgpack.unpackb(msgpack.packb(desk.ledger.dump()))
        desk.ledger = Approvals()
        desk.ledger.load(told)
        assert desk.ledger.dump() == told
    elif ids:
        id_ = ids[rest[0] % len(ids)]
        if kind == "decide":
            desk.decide(id_, rest[1], allow=rest[2])
        elif kind == "return":
            desk.take(desk.ledger.give_back(id_, by=rest[1]))
        else:
            uses = sum(event[0] == USED for _, event in desk.events)
            if not desk.use(id_, rest[1], by=rest[2]) and sum(e[0] == USED for _, e in desk.events) > uses:
                granted[id_] = rest[1]


def check(events: list[tuple[int, Event]], granted: dict[str, Bound]) -> None:
    asked: dict[str, Any] = {}
    said: dict[str, dict[str, tuple[str, bool]]] = {}
    used: dict[str, str] = {}
    over: set[str] = set()
    for now, (kind, *rest) in events:
        if kind == ASKED:
            asked[rest[0]["id"]] = rest[0]
        elif kind == DECIDED:
            id_, who, role, allow, _ = rest
            assert who != "root"
            assert role in PEOPLE[who]
            assert who not in said.get(id_, {})
            assert now < asked[id_]["expires"]
            said.setdefault(id_, {})[who] = (role, allow)
        elif kind == USED:
            id_ = rest[0]
            assert id_ not in {*used, *over}
            used[id_] = rest[1]
            assert now < asked[id_]["expires"]
            assert list(asked[id_]["bound"]) == [getattr(granted[id_], name) for name in Bound.__slots__]
            votes = list(said[id_].values())
            assert all(allow for _, allow in votes)
            for role, count in asked[id_]["needs"]:
                assert sum(one == role for one, _ in votes) >= count
        elif kind == RETURNED:
            assert used.pop(rest[0])
        elif kind == "approval-ended":
            over.add(rest[0])
        else:
            over |= asked.keys()


# As a service --------------------------------------------------------------------------------------


def need(*needs: tuple[str, int]) -> dict[str, Any]:
    return {"needs": [list(one) for one in needs or (("", 1),)]}


async def request(stage: Stage, sent: Sent, *, key: str = "_approve", **body: Any) -> dict[str, Any]:
    told = {"task": sent.task, "key": key, "title": "Send the mail?", **need(), **body}
    return await coordinator.call(await stage.broker(sent.agent), "approval-request", told)


async def operator(stage: Stage, operation: str, **body: Any) -> dict[str, Any]:
    return await coordinator.call(await stage.broker("operator"), operation, body)


async def decide(stage: Stage, id_: str, who: str = "ann", *, allow: bool = True, **body: Any) -> dict[str, Any]:
    told = {"id": id_, "as": who, "allow": allow, "reason": "" if allow else "no", **body}
    return await operator(stage, "approval-decide", **told)


def tool(sent: Sent, **fields: Any) -> dict[str, Any]:
    told = {"agent": sent.agent, "task": sent.task, "server": "crm", "tool": "update", "arguments": "a" * 64}
    return {**told, "definition": "d1", "policy": "p1", **fields}


async def sidecar(stage: Stage, operation: str, **body: Any) -> dict[str, Any]:
    """As a sidecar calls: a process of account MESH."""
    return await coordinator.call(await stage.broker("coordinator"), operation, body, caller="sidecar")


async def test_an_agent_asks_and_whoever_waits_is_told_of_the_decision(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), caller=stage.caller())
    told: list[dict[str, Any]] = []

    def on_control(message: Delivered) -> None:
        control = Control.decode(message.data)
        told.append({"op": control.op, **msgpack.unpackb(control.data)})

    broker = await stage.broker(sent.agent)
    await broker.subscribe(subjects.ctl(sent.agent, "r1"), on_control)
    await broker.flush()
    asked = await request(stage, sent, replica="r1", details={"to": "acme", "huge": 2**80}, risk="high")
    assert (asked["state"], asked["requester"], asked["open"]) == (PENDING, sent.caller, [["", 1]])
    listed = await operator(stage, "approvals", agent=sent.agent)
    assert [one["id"] for one in listed["approvals"]] == [asked["id"]]
    edges = (await operator(stage, "graph"))["edges"]
    assert [(one["kind"], one["target"]) for one in edges if one["task"] == sent.task] == [("approval", asked["id"])]
    decided = await decide(stage, asked["id"][:8])
    assert (decided["state"], decided["decisions"][0]["who"]) == (APPROVED, "ann")
    await eventually(lambda: told == [{"op": "approval", "id": asked["id"], "task": sent.task}])
    assert (await request(stage, sent, details={"to": "acme", "huge": 2**80}, risk="high"))["state"] == APPROVED


async def test_a_changed_question_is_another_one(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    first = await request(stage, sent)
    await decide(stage, first["id"])
    second = await request(stage, sent, details={"amount": 1000})
    assert second["state"] == PENDING
    shown = await operator(stage, "approval", id=first["id"])
    assert (shown["state"], shown["why"]) == (WITHDRAWN, "asked anew with another question")


async def test_an_agent_speaks_and_looks_for_itself_alone(stage: Stage) -> None:
    sent, other = await stage.send(stage.agent()), await stage.send(stage.agent())
    asked = await request(stage, sent)
    broker = await stage.broker(other.agent)
    with pytest.raises(InvalidParams, match="has no task"):
        await coordinator.call(broker, "approval-request", {"task": sent.task, "key": "k", "title": "?", **need()})
    with pytest.raises(InvalidParams, match="no approval"):
        await coordinator.call(broker, "approval", {"id": asked["id"]})
    with pytest.raises(InvalidParams, match="no approval"):
        await coordinator.call(broker, "approval-withdraw", {"id": asked["id"]})
    assert (await coordinator.call(broker, "approvals"))["approvals"] == []
    verdict = {"id": asked["id"], "as": "ann", "allow": True}
    for operation, body in (("approval-decide", verdict), ("approval-use", {**tool(sent), "id": "x", "by": "u"})):
        with pytest.raises(PermissionDenied):
            await coordinator.call(await stage.broker(sent.agent), operation, body)
    assert await coordinator.call(await stage.broker(sent.agent), "approval-withdraw", {"id": asked["id"]})
    assert (await operator(stage, "approval", id=asked["id"]))["state"] == WITHDRAWN


async def test_whoever_is_in_the_chain_does_not_decide(stage: Stage) -> None:
    root = await stage.send(stage.agent(), caller=stage.caller())
    agent = stage.agent()
    child = await stage.send(agent, caller=root.agent)
    asked = await request(stage, child)
    for who in (agent, root.agent, root.agent.upper()):
        with pytest.raises(PermissionDenied, match="somebody else"):
            await decide(stage, asked["id"], who)
    assert (await decide(stage, asked["id"], "ann"))["state"] == APPROVED


async def test_the_end_of_its_task_withdraws_an_approval_and_nothing_more_is_asked(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    asked = await request(stage, sent)
    await (await stage.claim(sent)).complete()

    async def withdrawn() -> bool:
        await operator(stage, "status")
        return bool((await operator(stage, "approval", id=asked["id"]))["state"] == WITHDRAWN)

    await eventually(withdrawn)
    with pytest.raises(Conflict, match="its task has ended"):
        await decide(stage, asked["id"])
    with pytest.raises(Fenced, match="has ended"):
        await request(stage, sent, key="another")


async def test_a_sidecar_asks_for_a_call_and_uses_the_approval_once_for_exactly_that(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    call = {**tool(sent), "title": "crm update", **need()}
    asked = await sidecar(stage, "approval-request", **call)
    assert (asked["kind"], asked["agent"], asked["tool"]) == (TOOL, sent.agent, "update")
    with pytest.raises(InvalidParams, match="has no task"):
        await sidecar(stage, "approval-request", **{**call, "agent": stage.agent()})
    use = {"id": asked["id"], "by": "sidecar-1-7"}
    early = await sidecar(stage, "approval-use", **tool(sent), **use)
    assert (early["used"], early["why"]) == (False, "it is pending")
    await decide(stage, asked["id"])
    assert (await sidecar(stage, "approval-request", **call))["state"] == APPROVED
    changed = await sidecar(stage, "approval-use", **tool(sent, arguments="b" * 64), **use)
    assert (changed["used"], changed["why"]) == (False, "it was given for another arguments")
    uses = [sidecar(stage, "approval-use", **tool(sent), **{**use, "by": f"s{n}"}) for n in range(8)]
    assert sorted(one["used"] for one in await asyncio.gather(*uses)) == [False] * 7 + [True]
    again = await sidecar(stage, "approval-request", **call)
    assert (again["state"], again["id"] == asked["id"]) == (PENDING, False)


async def test_a_sidecar_gives_back_what_it_used_for_nothing(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    call = {**tool(sent), "title": "crm update", **need()}
    id_ = (await sidecar(stage, "approval-request", **call))["id"]
    await decide(stage, id_)
    use = {**tool(sent), "id": id_}
    assert (await sidecar(stage, "approval-use", **use, by="u1"))["used"]
    assert not (await sidecar(stage, "approval-return", id=id_, by="u2"))["returned"]
    assert (await sidecar(stage, "approval-return", id=id_, by="u1"))["returned"]
    with pytest.raises(PermissionDenied, match="for sidecars"):
        await coordinator.call(await stage.broker(sent.agent), "approval-return", {"id": id_, "by": "u1"})
    assert (await sidecar(stage, "approval-request", **call))["id"] == id_
    assert (await sidecar(stage, "approval-use", **use, by="u2"))["used"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"title": ""}, "title must be"),
        ({"title": "half \ud800"}, "half a character"),
        ({"needs": [["ops", 0]]}, "needs must be"),
        ({"needs": [["ops", 1], ["ops", 2]]}, "a role twice"),
        ({"needs": []}, "needs must be"),
        ({"risk": "scary"}, "risk must be"),
        ({"expires": 0}, "expires must be"),
        ({"details": [1]}, "details must be"),
        ({"details": {"x": "y" * 20_000}}, "details has"),
        ({"task": "nobody's"}, "32 lower-case"),
    ],
)
async def test_a_request_that_cannot_be_is_refused_with_its_field(
    stage: Stage, body: dict[str, Any], words: str
) -> None:
    sent = await stage.send("agent-0")
    with pytest.raises(InvalidParams, match=words):
        await request(stage, sent, **body)
    assert (await operator(stage, "status"))["role"] == "leader"


async def test_a_decision_that_cannot_be_is_refused(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    asked = await request(stage, sent, **need(("finance", 1)))
    with pytest.raises(PermissionDenied, match=r"nobody has a role.*approvers: \{ann: \[finance\]\}"):
        await decide(stage, asked["id"])
    with pytest.raises(InvalidParams, match="no approval"):
        await decide(stage, "abcdef")
    with pytest.raises(InvalidParams, match="who denies says why"):
        await decide(stage, asked["id"], allow=False, reason=" ")
    with pytest.raises(InvalidParams, match="hex digits"):
        await decide(stage, "*")


async def test_a_new_leader_knows_what_was_asked_decided_and_used(fresh_stage: Stage) -> None:
    stage = fresh_stage
    first = await stage.coordinator()
    sent = await stage.send("agent-0")
    waiting, approved = await request(stage, sent), await request(stage, sent, key="_approve#1")
    call = {**tool(sent), "title": "crm update", **need()}
    spent = await sidecar(stage, "approval-request", **call)
    for one in (approved, spent):
        await decide(stage, one["id"])
    assert (await sidecar(stage, "approval-use", **tool(sent), id=spent["id"], by="u1"))["used"]
    late = await request(stage, sent, key="late", expires=0.05)
    await stage.stop(first)
    await stage.coordinator()
    states = {}

    async def told() -> bool:
        nonlocal states
        listed = await operator(stage, "approvals")
        states = {one["id"]: one["state"] for one in listed["approvals"]}
        return bool(states[late["id"]] == EXPIRED)

    await eventually(told)
    assert states == {waiting["id"]: PENDING, approved["id"]: APPROVED, spent["id"]: SPENT, late["id"]: EXPIRED}
    assert not (await sidecar(stage, "approval-use", **tool(sent), id=spent["id"], by="u2"))["used"]
    assert (await request(stage, sent))["id"] == waiting["id"]
    assert (await decide(stage, waiting["id"]))["state"] == APPROVED


# Who may decide, and what is late ------------------------------------------------------------------


def approvers(text: str) -> dict[str, tuple[str, ...]]:
    return dict(parse_mesh_config(f"approvers: {text}\n", path=Path("/project/mesh.yaml")).approvers)


def test_mesh_yaml_says_who_may_decide_as_what() -> None:
    assert approvers("{alice: [finance, ops], bob: []}") == {"alice": ("finance", "ops"), "bob": ()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{alice: ops}", "approvers.alice: must be a list, e.g. [finance, ops]"),
        ("{alice: [fin ance]}", "approvers.alice: 'fin ance' is no role"),
        ("{alice: [], Alice: [ops]}", "is the same person as 'alice'"),
        ("{al ice: []}", "approvers.al ice: name 'al ice'"),
        ("[alice]", "approvers: must be a mapping"),
    ],
)
def test_a_mistake_in_it_is_told_with_its_line(text: str, words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        approvers(text)
    assert words in str(caught.value)
    assert "mesh.yaml:1" in str(caught.value)


def test_what_waits_for_too_long_is_an_incident() -> None:
    seen = AgentSeen(approvals=(ApprovalSeen("abc1", TASK, 0), ApprovalSeen("abc2", "", 3_500_000)))
    limits = WatchConfig()
    assert not findings(Observed({"writer": seen}), limits, 3_599_999)
    (found,) = findings(Observed({"writer": seen}), limits, 3_600_000)
    assert (found.key, found.count, found.command) == ("approval-waits:writer", 1, "mesh approvals show abc1")
