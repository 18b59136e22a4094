"""Approvals as a service: agents and sidecars ask, persons decide, whoever waits is told, each is used once.

Whoever asks repeats its request until it is settled: that finds a decision that it was not told of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from weft.core.supervise import Tasks
from weft.core.yamlfields import did_you_mean
from weft_coordinator.decide import asking
from weft_coordinator.decide.approvals import PENDING, TOOL, Approval, Approvals
from weft_coordinator.decide.index import Entry, TaskIndex
from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.registry import Fields
from weft_coordinator.decide.watchdog import ApprovalSeen
from weft_coordinator.service.deciding import Decider, Speaker, Synced
from weft_coordinator.service.part import Body, Handler, Part, operator_only
from weft_coordinator.shell.mesh import LocalMesh
from weft_protocols import subjects
from weft_protocols.errors import (
    CycleEdge,
    Fenced,
    InvalidConfig,
    InvalidParams,
    PermissionDenied,
    Unavailable,
    WeftError,
)

log = logging.getLogger("weft.coordinator")

SIDECAR: Final = "sidecar"
"""Caller of who asks on behalf of agents. Only processes in account MESH can be it, and no agent has the name."""
KIND: Final = "approval"
MOST: Final = 1_000
"""Approvals of one answer."""
TOLD: Final = 10_000
"""Replicas that are remembered as waiting."""
ANCESTORS: Final = 64
FORGET_AFTER: Final = 86_400_000
"""Milliseconds after which approvals of a task that is not known any more are history."""
TIDY_EVERY: Final = 60_000
"""Milliseconds between two looks for those."""


class ApprovalPart(Part):
    """Operations `approval-request`, `-withdraw`, `-use`, `-return`, `-decide`, `approval` and `approvals`.

    Args:
        index: The tasks, to see whose a request is, and when it has ended.
        tail: Brings the index up to date.
        local: Says who may decide.
        told: Replicas of an agent, and how a task that is parked is looked at again.
    """

    def __init__(
        self,
        ledger: Approvals,
        *,
        index: TaskIndex,
        tail: Synced,
        leader: Decider,
        local: LocalMesh,
        speaker: Speaker,
        clock: Callable[[], int],
        told: tuple[Callable[[str], Collection[str]], Callable[[str, str], None]],
    ) -> None:
        self._ledger = ledger
        self._index = index
        self._tail = tail
        self._leader = leader
        self._local = local
        self._speaker = speaker
        self._clock = clock
        self._replicas, self._wake = told
        self._waiting: dict[str, tuple[str, str]] = {}
        """Who asked for an approval last: the identity and its replica, which is told."""
        self._approvers: tuple[int, Mapping[str, Sequence[str]] | None] = (-1, None)
        self._tasks = Tasks("approvals", on_error=lambda _: None)
        self._new = True
        """Whether nothing was looked at since this coordinator began to lead."""
        self._tidied = 0

    @property
    def leader_operations(self) -> Mapping[str, Handler]:
        """By name."""
        return {
            "approval-request": self._request,
            "approval-withdraw": self._withdraw,
            "approval-use": self._use,
            "approval-return": self._return,
            "approval-decide": self._decide,
            "approval": self._show,
            "approvals": self._list,
        }

    async def lead(self) -> None:
        """What ended before is looked at in the first `tick`."""
        self._new = True
        self._waiting.clear()

    async def aclose(self) -> None:
        """End what is under way."""
        await self._tasks.aclose()

    async def tick(self, now: int) -> None:
        """Record what has expired, and which tasks have ended while nobody looked."""
        if self._new:
            await self._tail.sync()
            self._new = False
            self._tidy(now)
        elif now - self._tidied >= TIDY_EVERY:
            self._tidy(now)
        late = self._ledger.late(now)
        if late:
            await self._leader.submit(lambda now: self._ledger.late(now))
            for _, id_, *_ in late:
                self._tell(id_)

    def _tidy(self, now: int) -> None:
        self._tidied = now
        for agent, task in list(self._ledger.tasks()):
            entry = self._index.find(agent, task, caller=subjects.OPERATOR) if task else None
            if entry is not None:
                over = entry.ended
            else:  # not known any more, or a call of no task
                over = bool(task) and all(one.expires < now - FORGET_AFTER for one in self._of(agent, task))
            if over:
                self._tasks.start(self._close(agent, task))

    def _of(self, agent: str, task: str) -> list[Approval]:
        return self._ledger.of_task(agent, task)

    def changed(self, entries: Sequence[Entry]) -> None:
        """Tasks came into another state: what is open of those that have ended is withdrawn."""
        for entry in entries if self._leader.leading and len(self._ledger) else ():
            if entry.ended and self._of(entry.agent, entry.task):
                self._tasks.start(self._close(entry.agent, entry.task))

    async def _close(self, agent: str, task: str) -> None:
        try:
            await self._leader.submit(lambda _: self._ledger.close(agent, task, "its task has ended"))
        except WeftError as error:
            log.debug("approvals of task %s stay open: %s", task, error)
            self._tidied = 0

    # Asking ------------------------------------------------------------------------------------

    async def _request(self, body: Body, caller: str) -> dict[str, Any]:
        """What an agent or a sidecar wants approved; repeated, how it stands."""
        wanted = asking.request(body, caller, sidecar=caller == SIDECAR, now=self._clock())
        fields = Fields(body)
        replica = fields.text("replica", limit=64, default="")
        fields.check(f"approval-request of {caller}")
        wanted = await self._placed(wanted)
        found: list[str] = []

        def act(now: int) -> Sequence[Event]:
            id_, events = self._ledger.ask(wanted, now=now)
            found.append(id_)
            return events

        stored = self._leader.submit(act)
        approval = self._known(found[0])  # before waiting: what is decided meanwhile may not be stored yet
        await stored
        if replica and subjects.TOKEN.match(replica):
            self._waiting.pop(approval.id, None)
            if approval.state(self._clock()) == PENDING:
                self._waiting[approval.id] = (caller, replica)
                while len(self._waiting) > TOLD:
                    del self._waiting[next(iter(self._waiting))]
        return approval.show(self._clock())

    async def _placed(self, wanted: Approval) -> Approval:
        """The request with who is behind it, as the broker vouches for that; its task is at work."""
        agent, task = wanted.task_key
        if not task:
            return replace(wanted, requester=agent, barred=(agent,))
        entry = self._entry(agent, task)
        if entry is None:
            await self._tail.sync()
            entry = self._entry(agent, task)
        if entry is None:
            raise InvalidParams(f"approval-request: {agent} has no task {task}")
        if entry.ended:
            raise Fenced(f"task {task} of {agent} has ended; nothing is asked on its behalf any more")
        line = self._line(entry)
        barred = dict.fromkeys(name for one in line for name in (one.agent, one.caller))
        chain = tuple(f"{one.agent}/{one.task}" for one in reversed(line))
        return replace(wanted, requester=line[-1].caller, chain=chain, barred=tuple(barred))

    def _entry(self, agent: str, task: str) -> Entry | None:
        entry = self._index.find(agent, task, caller=subjects.OPERATOR)
        return entry if entry is not None and entry.created else None

    def _line(self, entry: Entry) -> list[Entry]:
        """A task and those that delegated it, the nearest first."""
        line = [entry]
        while len(line) < ANCESTORS and (above := self._index.parent(line[-1])) is not None and above not in line:
            line.append(above)
        return line

    async def _withdraw(self, body: Body, caller: str) -> dict[str, Any]:
        """Whoever asked does not want it any more."""
        fields = Fields(body)
        id_, why = fields.text("id"), fields.text("reason", default="")
        fields.check("approval-withdraw")
        approval = self._own(id_, caller)
        why = why.encode(errors="replace").decode() or f"{approval.bound.agent} does not want it any more"
        gone = await self._leader.submit(lambda now: self._ledger.withdraw(approval.id, why, now=now))
        return {"withdrawn": bool(gone)}

    # Using -------------------------------------------------------------------------------------

    async def _use(self, body: Body, caller: str) -> dict[str, Any]:
        """A sidecar is about to make exactly the call that was approved: yes once."""
        if caller != SIDECAR:
            raise PermissionDenied("approval-use is for sidecars: an approval is used by who makes the call")
        fields = Fields(body)
        id_, by = fields.text("id"), fields.token("by")
        bound = asking.tool_call(fields)
        fields.check("approval-use")
        entry = self._entry(bound.agent, bound.task) if bound.task else None
        refused: list[str] = []

        def act(now: int) -> Sequence[Event]:
            if entry is not None and entry.ended:
                refused.append("its task has ended")
                return []
            why, events = self._ledger.use(id_, bound, by=by, now=now)
            refused.append(why)
            return events

        stored = self._leader.submit(act)
        known = self._ledger.get(id_)
        await stored
        state = known.state(self._clock()) if known is not None else ""
        return {"id": id_, "used": not refused[0], "state": state, "why": refused[0]}

    async def _return(self, body: Body, caller: str) -> dict[str, Any]:
        """A sidecar did not make the call for which it used an approval: whoever makes it again may use it."""
        if caller != SIDECAR:
            raise PermissionDenied("approval-return is for sidecars: an approval is given back by who used it")
        fields = Fields(body)
        id_, by = fields.text("id"), fields.token("by")
        fields.check("approval-return")
        return {"returned": bool(await self._leader.submit(lambda _: self._ledger.give_back(id_, by=by)))}

    # Deciding ----------------------------------------------------------------------------------

    async def _decide(self, body: Body, caller: str) -> dict[str, Any]:
        """A person, whom the operator vouches for, says yes or no."""
        operator_only(caller, "approval-decide")
        said = asking.verdict(body)
        approval = self._known(said.id)
        roles = self._roles(said.who, approval)
        if said.role and said.role not in roles:
            held = ", ".join(role for role in roles if role) or "no roles"
            raise PermissionDenied(f"{said.who} does not have role {said.role!r}; mesh.yaml gives {held}")
        stored = self._leader.submit(
            lambda now: self._ledger.decide(
                approval.id,
                who=said.who,
                roles=roles,
                role=said.role,
                allow=said.allow,
                reason=said.reason,
                now=now,
            )
        )
        settled = self._known(approval.id)
        await stored
        if settled.state(self._clock()) != PENDING:
            self._tell(approval.id)
        return settled.show(self._clock())

    def _roles(self, who: str, approval: Approval) -> Collection[str]:
        """What a person may decide as; `""` is what needs no role."""
        approvers = self._configured()
        if approvers is None:
            named = ", ".join(sorted({need.role for need in approval.needs if need.role}))
            if named:
                raise PermissionDenied(
                    f"{approval.id} needs {named}, and nobody has a role: name them in mesh.yaml, "
                    f"e.g. approvers: {{{who}: [{named}]}}"
                )
            return ("",)
        name = next((one for one in approvers if one.casefold() == who.casefold()), None)
        if name is None:
            known = ", ".join(approvers)
            raise PermissionDenied(f"{who} is no approver of this mesh{did_you_mean(who, approvers)}; it has {known}")
        return ("", *approvers[name])

    def _configured(self) -> Mapping[str, Sequence[str]] | None:
        """Who may decide, as `mesh.yaml` says now. While it cannot be read, nobody may."""
        mark = self._local.config_mark()
        if mark != self._approvers[0]:
            try:
                self._approvers = (mark, self._local.approvers())
            except InvalidConfig as error:
                raise Unavailable(f"who may decide is not known while mesh.yaml has a mistake: {error}") from None
        return self._approvers[1]

    def _tell(self, id_: str) -> None:
        """It is settled: tell who waits, in memory or not."""
        approval = self._ledger.get(id_)
        if approval is None:
            return
        asked = self._waiting.pop(id_, None)
        # An earlier leader may have been asked: then whichever replica waits hears it.
        waiting = [asked] if asked is not None else [(_who(approval), one) for one in self._replicas(_who(approval))]
        for replica in waiting:
            self._speaker.tell(replica, KIND, {"id": id_, "task": approval.bound.task})
        if approval.bound.task:
            self._wake(*approval.task_key)

    def settled(self, id_: str) -> str:
        """Why a task that waits for an approval may go on; empty while it may not."""
        approval = self._ledger.get(id_)
        state = approval.state(self._clock()) if approval is not None else "not known any more"
        return f"approval {id_} is {state}" if state != PENDING else ""

    # Views -------------------------------------------------------------------------------------

    async def _show(self, body: Body, caller: str) -> dict[str, Any]:
        fields = Fields(body)
        id_ = asking.prefix(fields)
        fields.check("approval")
        stored = self._leader.submit(lambda _: [])
        approval = self._own(id_, caller)
        await stored
        return approval.show(self._clock())

    async def _list(self, body: Body, caller: str) -> dict[str, Any]:
        """The one asked last first; an agent sees its own."""
        wanted, limit = asking.listing(body)
        if caller not in (subjects.OPERATOR, SIDECAR):
            wanted = replace(wanted, asked_by=caller)
        stored = self._leader.submit(lambda _: [])
        now = self._clock()
        found = [one for one in self._ledger.all() if wanted.fits(one, now)]
        shown = [one.show(now) for one in found[: min(limit, MOST)]]
        pending = sum(one.state(now) == PENDING for one in self._ledger.live() if wanted.asked_by in ("", _who(one)))
        await stored
        return {"approvals": shown, "total": len(found), "pending": pending}

    def _own(self, id_: str, caller: str) -> Approval:
        """An approval that a caller may know of."""
        approval = self._known(id_)
        if caller not in (subjects.OPERATOR, SIDECAR, _who(approval)):
            raise _unknown(id_)
        if caller == SIDECAR and approval.bound.kind != TOOL:
            raise _unknown(id_)
        return approval

    def _known(self, id_: str) -> Approval:
        """The approval of an id, or the only one whose id begins so."""
        exact = self._ledger.get(id_)
        if exact is not None:
            return exact
        found = [one for one in self._ledger.all() if one.id.startswith(id_)]
        if len(found) > 1:
            raise InvalidParams(f"{len(found)} approvals have an id that begins with {id_}; give more of it")
        if not found:
            raise _unknown(id_)
        return found[0]

    def edges(self) -> Iterator[tuple[str, CycleEdge]]:
        """What waits for persons, for the graph of who waits for whom. It never blocks anybody for good."""
        now = self._clock()
        for one in self._ledger.live():
            if one.bound.task and one.state(now) == PENDING:
                yield one.id, CycleEdge(one.bound.agent, one.bound.task, KIND, one.id, one.id)

    def seen(self) -> dict[str, tuple[ApprovalSeen, ...]]:
        """What is pending by agent, for the watchdog."""
        now = self._clock()
        found: dict[str, tuple[ApprovalSeen, ...]] = {}
        for one in self._ledger.live():
            if one.state(now) == PENDING:
                told = ApprovalSeen(one.id, one.bound.task, one.asked)
                found[_who(one)] = (*found.get(_who(one), ()), told)
        return found


def _who(approval: Approval) -> str:
    return approval.bound.agent


def _unknown(id_: str) -> InvalidParams:
    return InvalidParams(f"there is no approval {id_}, or it is forgotten")
