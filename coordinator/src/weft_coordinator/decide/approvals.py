"""Approvals: what agents want to do, bound to exactly that, and what persons say to it.

A request is known by what it is for (`Bound`): repeating it attaches to the one that is there and has its outcome; with
anything else about it changed it is another request, and persons are asked anew. One approval can be used once, until
it expires, for exactly what it was given; whoever used it for a call that was not made after all gives it back.

Events: `[approval-asked, facts]`, `[approval-decided, id, who, role, allow, reason]`, `[approval-used, id, by]`,
`[approval-returned, id]`, `[approval-ended, id, how, why]` (expired, or withdrawn), `[approval-closed, agent, task,
why]`: the task has ended.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import asdict, astuple, dataclass, field, replace
from hashlib import sha256
from typing import Any, Final

import msgpack

from weft_coordinator.decide.ledger import Event
from weft_protocols.errors import Conflict, InvalidParams, PermissionDenied

ASKED: Final = "approval-asked"
DECIDED: Final = "approval-decided"
USED: Final = "approval-used"
RETURNED: Final = "approval-returned"
ENDED: Final = "approval-ended"
CLOSED: Final = "approval-closed"

PENDING: Final = "pending"
APPROVED: Final = "approved"
DENIED: Final = "denied"
EXPIRED: Final = "expired"
WITHDRAWN: Final = "withdrawn"
SPENT: Final = "used"
STATES: Final = (PENDING, APPROVED, DENIED, EXPIRED, WITHDRAWN, SPENT)
TASK: Final = "task"
TOOL: Final = "tool"
KEPT: Final = 5_000
"""Approvals that are remembered after they and their tasks have ended."""
REPLAYED: Final = 600_000
"""Milliseconds for which a settled request of no task answers the same request: with a task it does until that ends."""
MAX_OF_TASK: Final = 1_000
"""Approvals of one task, settled ones included; without a task, of one caller."""
MAX_OPEN: Final = 5_000
"""Approvals of one agent that wait for a decision or a use: nobody could look at more."""

_TaskKey = tuple[str, str]
"""Agent and task."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What an approval is for, and nothing else."""

    kind: str
    """`task`: what a handler asks; `tool`: a call of a tool."""
    agent: str
    """Who wants to do it."""
    task: str
    """On behalf of which task; empty for a tool call of none."""
    key: str
    """Journal key of the question, or of the step that makes the call; empty where it has none."""
    server: str
    tool: str
    digest: str
    """Digest of the arguments, or of everything that is asked."""
    definition: str
    """Digest of the tool's definition."""
    policy: str
    """Version of the policy that requires it."""

    def changed(self, other: Bound) -> str:
        """What is different in `other`, in words; empty where nothing is."""
        words = {
            "kind": "kind", "agent": "agent", "task": "task", "key": "step", "server": "server", "tool": "tool",
            "digest": "arguments" if self.kind == TOOL else "question",
            "definition": "definition", "policy": "policy",
        }  # fmt: skip
        return ", ".join(word for name, word in words.items() if getattr(self, name) != getattr(other, name))


@dataclass(frozen=True, slots=True)
class Need:
    """So many persons of a role have to approve."""

    role: str
    """Empty for anybody who may approve at all."""
    count: int = 1


@dataclass(frozen=True, slots=True)
class Decision:
    """What one person said."""

    who: str
    role: str
    """For which need it counts."""
    allow: bool
    reason: str
    at: int
    """Unix milliseconds."""


@dataclass(frozen=True, slots=True)
class Approval:
    """A request and what became of it. Times are unix milliseconds."""

    id: str
    bound: Bound
    title: str
    details: str
    """A JSON object for people, as text: its numbers may be larger than an event can carry."""
    risk: str
    needs: tuple[Need, ...]
    requester: str
    """Who began the chain of delegations that wants it."""
    chain: tuple[str, ...]
    """`agent/task` of the task and those that delegated it, the root first."""
    barred: tuple[str, ...]
    """Who must not decide: everybody in the chain."""
    expires: int
    asked: int = 0
    decisions: tuple[Decision, ...] = ()
    used: int = 0
    """When it was used; 0 if it was not."""
    by: str = ""
    """By which use: whoever repeats that has the same answer."""
    ended: str = ""
    """`expired` or `withdrawn`, where that was recorded; `approved` where that is the end, as nothing has to use it."""
    why: str = ""
    settled: int = 0
    """When a decision, a use, a withdrawal or its time settled it; 0 while it is pending or approved."""

    def state(self, now: int) -> str:
        """One of `STATES`."""
        if self.used:
            return SPENT
        if self.ended:
            return self.ended
        if any(not one.allow for one in self.decisions):
            return DENIED
        if now >= self.expires:
            return EXPIRED
        return PENDING if self.open() else APPROVED

    def open(self) -> tuple[Need, ...]:
        """What is still needed."""
        given = [one.role for one in self.decisions if one.allow]
        left = (Need(need.role, need.count - given.count(need.role)) for need in self.needs)
        return tuple(need for need in left if need.count > 0)

    def answers(self, now: int) -> bool:
        """Whether a request for the same attaches to it: not to one that is used up or withdrawn."""
        if self.used or self.ended == WITHDRAWN:
            return False
        return bool(self.bound.task) or now < (self.settled or self.expires) + REPLAYED

    @property
    def task_key(self) -> _TaskKey:
        """Agent and task."""
        return self.bound.agent, self.bound.task

    def show(self, now: int) -> dict[str, Any]:
        """As the coordinator answers."""
        state = self.state(now)
        bound = self.bound
        return {
            "id": self.id, "state": state, **asdict(bound), "title": self.title, "details": json.loads(self.details),
            "risk": self.risk, "needs": [[need.role, need.count] for need in self.needs],
            "open": [[need.role, need.count] for need in self.open()] if state == PENDING else [],
            "requester": self.requester, "chain": list(self.chain), "asked": self.asked, "expires": self.expires,
            "decisions": [asdict(one) for one in self.decisions], "used": self.used, "why": self.why,
            "settled": self.settled or (self.expires if state == EXPIRED else 0),
        }  # fmt: skip


class Approvals:
    """The ledger of approvals."""

    kinds: frozenset[str] = frozenset({ASKED, DECIDED, USED, RETURNED, ENDED, CLOSED})

    def __init__(self) -> None:
        self.load(None)

    def __len__(self) -> int:
        return len(self._all)

    # Looking up --------------------------------------------------------------------------------

    def get(self, id_: str) -> Approval | None:
        """The approval of an id."""
        return self._all.get(id_)

    def all(self) -> Iterator[Approval]:
        """Every approval that is remembered, the one asked last first."""
        return reversed(self._all.values())

    def live(self) -> list[Approval]:
        """What is pending or approved as far as events say; some may have expired meanwhile."""
        return [self._all[id_] for id_ in self._live]

    def tasks(self) -> Collection[_TaskKey]:
        """Agent and task of everything whose task is not known to have ended."""
        return self._of_task.keys()

    def of_task(self, agent: str, task: str) -> list[Approval]:
        """The approvals of a task that has not ended."""
        return [self._all[id_] for id_ in self._of_task.get((agent, task), ())]

    def find(self, bound: Bound, now: int) -> tuple[str, Approval | None]:
        """The id that a request for this has now, and its approval if it was asked for already."""
        number = 0
        while (known := self._all.get(id_ := identify(bound, number))) is not None:
            if known.answers(now):
                return id_, known
            number += 1
        return id_, None

    # Deciding ----------------------------------------------------------------------------------

    def ask(self, wanted: Approval, *, now: int) -> tuple[str, list[Event]]:
        """A request, whose own id does not count: the id it has, and what to decide.

        Attaches to the request that is there for exactly this. What was asked for the same call or question with
        something changed is withdrawn.

        Raises:
            InvalidParams: too many of one task, or open ones of one agent.
        """
        id_, known = self.find(wanted.bound, now)
        if known is not None:
            return id_, self._late(known, now)
        if len(self._of_task.get(wanted.task_key, ())) >= MAX_OF_TASK:
            raise InvalidParams(f"task {wanted.bound.task} has asked for {MAX_OF_TASK} approvals; no more are taken")
        if self._open_of[wanted.bound.agent] >= MAX_OPEN:
            raise InvalidParams(
                f"{MAX_OPEN} approvals of {wanted.bound.agent} wait for a decision or a use; no more are taken"
            )
        events: list[Event] = []
        for other in self.of_task(*wanted.task_key):
            if other.state(now) in (PENDING, APPROVED) and _same_call(other.bound, wanted.bound):
                why = f"asked anew with another {other.bound.changed(wanted.bound)}"
                events.append((ENDED, other.id, WITHDRAWN, why))
        return id_, [*events, (ASKED, _facts(replace(wanted, id=id_, asked=now)))]

    def decide(
        self, id_: str, *, who: str, roles: Collection[str], role: str, allow: bool, reason: str, now: int
    ) -> list[Event]:
        """A person's decision. Nothing to decide where it is the one they made.

        Args:
            id_: Of the approval.
            who: The person.
            roles: What the person may decide as; `""` for what needs no role.
            role: As which of these; empty for the first one that is needed.
            allow: Whether it may be done. One person who denies is enough to end it.
            reason: Why.
            now: Unix milliseconds.

        Raises:
            InvalidParams: there is no such approval.
            PermissionDenied: the person asked for it, directly or not, or has no role that is needed.
            Conflict: it is settled, or the person has decided otherwise.
        """
        known = self._known(id_)
        name = who.casefold()
        mine = next((one for one in known.decisions if one.who.casefold() == name), None)
        if name in (one.casefold() for one in known.barred):
            raise PermissionDenied(f"{who} is part of what asks for {id_}: somebody else has to decide")
        if mine is not None:
            if mine.allow == allow:
                return []
            said = "approved" if mine.allow else "denied"
            raise Conflict(f"{who} has {said} {id_}; a decision is not taken back")
        state = known.state(now)
        if state != PENDING:
            raise Conflict(f"{id_} is {state}{f': {known.why}' if known.why else ''}; nothing is left to decide")
        needed = known.open() if allow else known.needs
        fits = [need.role for need in needed if need.role in roles and role in ("", need.role)]
        if not fits:
            asked = ", ".join(need.role or "anybody" for need in needed)
            held = f"as {role} " if role else ""
            raise PermissionDenied(f"{who} cannot decide {held}about {id_}: it needs {asked}")
        return [(DECIDED, id_, who, fits[0], allow, reason)]

    def use(self, id_: str, bound: Bound, *, by: str, now: int) -> tuple[str, list[Event]]:
        """Use an approval for what `bound` says: why it cannot be, empty if it can, and what to decide.

        Repeating a use, with the same `by`, has the answer it had.
        """
        known = self._all.get(id_)
        if known is None:
            return "there is no such approval", []
        if changed := known.bound.changed(bound):
            return f"it was given for another {changed}", []
        if known.used and by and known.by == by:
            return "", []
        state = known.state(now)
        if state == APPROVED:
            return "", [(USED, id_, by)]
        return f"it is {state}" if state != SPENT else "it was used before", self._late(known, now)

    def give_back(self, id_: str, *, by: str) -> list[Event]:
        """The call for which `by` used it was not made; nothing where it was used by another one, or not at all."""
        known = self._all.get(id_)
        return [(RETURNED, id_)] if known is not None and known.used and by and known.by == by else []

    def withdraw(self, id_: str, why: str, *, now: int) -> list[Event]:
        """Nobody wants it any more."""
        known = self._all.get(id_)
        if known is None or known.state(now) not in (PENDING, APPROVED):
            return []
        return [(ENDED, id_, WITHDRAWN, why)]

    def close(self, agent: str, task: str, why: str) -> list[Event]:
        """A task has ended: what is open is withdrawn, what it had is history."""
        return [(CLOSED, agent, task, why)] if (agent, task) in self._of_task else []

    def late(self, now: int) -> list[Event]:
        """What has expired."""
        return [event for approval in self.live() for event in self._late(approval, now)]

    @staticmethod
    def _late(known: Approval, now: int) -> list[Event]:
        if known.ended or known.state(now) != EXPIRED:
            return []
        given = len([one for one in known.decisions if one.allow])
        why = "nobody decided in time" if not given else f"its time was over; {given} had approved"
        return [(ENDED, known.id, EXPIRED, why)]

    def _known(self, id_: str) -> Approval:
        known = self._all.get(id_)
        if known is None:
            raise InvalidParams(f"there is no approval {id_}, or it is forgotten")
        return known

    # Folding -----------------------------------------------------------------------------------

    def apply(self, event: Event, *, number: int, at: int) -> None:
        """Take an event."""
        kind, *values = event
        if kind == ASKED:
            self._add(_approval(values[0]))
        elif kind == CLOSED:
            agent, task, why = values
            for id_ in list(self._of_task.get((agent, task), ())):
                if id_ in self._live:
                    self._put(replace(self._all[id_], ended=WITHDRAWN, why=why, settled=at))
                self._over(self._all[id_])
        elif (known := self._all.get(values[0])) is not None:
            self._happened(known, kind, values[1:], at)

    def _happened(self, known: Approval, kind: str, values: list[Any], at: int) -> None:
        if kind == DECIDED:
            who, role, allow, reason = values
            known = replace(known, decisions=(*known.decisions, Decision(who, role, allow, reason, at)))
            if not allow:
                known = replace(known, settled=at, why=f"{who} denied it: {reason}")
            elif known.bound.kind == TASK and not known.open():
                known = replace(known, settled=at, ended=APPROVED)
            self._put(known)
        elif kind == USED:
            self._put(replace(known, used=at, by=values[0], settled=at))
        elif kind == RETURNED:
            self._add(replace(known, used=0, by="", settled=0))
        else:
            how, why = values
            self._put(replace(known, ended=how, why=why, settled=at))

    def dump(self) -> Any:
        """Every approval, and which are of tasks that have ended."""
        return [[_facts(one) for one in self._all.values()], list(self._history)]

    def load(self, dumped: Any) -> None:
        """Be what `dump` gave."""
        self._all: dict[str, Approval] = {}
        self._live: dict[str, None] = {}
        """Pending or approved."""
        self._open_of: Counter[str] = Counter()
        """How many of them each agent has."""
        self._of_task: dict[_TaskKey, dict[str, None]] = {}
        self._history: OrderedDict[str, None] = OrderedDict()
        told, history = dumped or ((), ())
        for facts in told:
            self._add(_approval(facts))
        for id_ in history:
            self._over(self._all[id_])

    def _add(self, approval: Approval) -> None:
        self._of_task.setdefault(approval.task_key, {})[approval.id] = None
        self._all.pop(approval.id, None)
        self._history.pop(approval.id, None)
        self._put(approval)

    def _put(self, approval: Approval) -> None:
        self._all[approval.id] = approval
        agent = approval.bound.agent
        if not approval.settled:
            self._open_of[agent] += approval.id not in self._live
            self._live[approval.id] = None
            return
        if approval.id in self._live:
            del self._live[approval.id]
            self._open_of[agent] -= 1
            if not self._open_of[agent]:
                del self._open_of[agent]
        if not approval.bound.task and approval.id not in self._history:
            self._over(approval)  # there is no task whose end could be waited for

    def _over(self, approval: Approval) -> None:
        """Its task has ended: it is kept for a while, to be read."""
        own = self._of_task.get(approval.task_key, {})
        own.pop(approval.id, None)
        if not own:
            self._of_task.pop(approval.task_key, None)
        self._history[approval.id] = None
        while len(self._history) > KEPT:
            gone, _ = self._history.popitem(last=False)
            del self._all[gone]


def identify(bound: Bound, number: int) -> str:
    """The id of a request; `number` counts the ones before it for exactly the same that were used or withdrawn."""
    return sha256(bytes(msgpack.packb([*astuple(bound), number]))).hexdigest()[:20]


def _same_call(one: Bound, other: Bound) -> bool:
    """Whether two requests are for one call or question, with something changed in between."""
    same = (one.kind, one.server, one.tool, one.key) == (other.kind, other.server, other.tool, other.key)
    return same and one != other and (bool(one.key) or one.digest == other.digest)


_PLAIN: Final = ("id", "title", "details", "risk", "requester", "expires", "asked", "used", "by", "ended", "why")


def _facts(approval: Approval) -> dict[str, Any]:
    return {
        **{name: getattr(approval, name) for name in _PLAIN},
        "settled": approval.settled,
        "bound": list(astuple(approval.bound)),
        "needs": [[need.role, need.count] for need in approval.needs],
        "chain": list(approval.chain),
        "barred": list(approval.barred),
        "decisions": [list(astuple(one)) for one in approval.decisions],
    }


def _approval(facts: Any) -> Approval:
    return Approval(
        **{name: facts[name] for name in (*_PLAIN, "settled")},
        bound=Bound(*facts["bound"]),
        needs=tuple(Need(*need) for need in facts["needs"]),
        chain=tuple(facts["chain"]),
        barred=tuple(facts["barred"]),
        decisions=tuple(Decision(*one) for one in facts["decisions"]),
    )


@dataclass(frozen=True, slots=True)
class Filter:
    """Which approvals are listed. What is empty does not matter."""

    states: tuple[str, ...] = ()
    agent: str = ""
    role: str = ""
    """One that is still needed, or was."""
    task: str = ""
    asked_by: str = field(default="")
    """Only those of this agent, whoever asks for another's."""

    def fits(self, approval: Approval, now: int) -> bool:
        """Whether it is meant."""
        return (
            self.agent in ("", approval.bound.agent)
            and self.asked_by in ("", approval.bound.agent)
            and self.task in ("", approval.bound.task)
            and (not self.role or any(need.role == self.role for need in approval.needs))
            and (not self.states or approval.state(now) in self.states)
        )
