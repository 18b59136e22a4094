"""Locks as a service: requests are decided at once, answered and told when they are stored, and end with their lease.

Who holds what is in the log. When a replica was heard of last is not: a new leader gives everybody a whole lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from weft.core.supervise import Tasks
from weft_coordinator.decide.index import Entry
from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.locks import Ask, Request, changes
from weft_coordinator.decide.registry import Fields
from weft_coordinator.service.deadlocks import Detector
from weft_coordinator.service.deciding import Key, Shared
from weft_coordinator.service.part import Answer, Body, Handler, LeanHandler, Part, operator_only
from weft_protocols.errors import Fenced, InvalidParams, PermissionDenied, Unavailable, WeftError
from weft_protocols.subjects import OPERATOR

log = logging.getLogger("weft.coordinator")

LEASE: Final = 30.0
"""Seconds of a lease where the request names none, and of a session that only waits."""
SHORTEST: Final = 1.0
LONGEST: Final = 3600.0
LATE: Final = 1.0
"""Seconds a timer may be late before it is taken for this process's own fault: nobody loses a lease by that."""
RESYNC_AFTER: Final = 0.1
"""Seconds after the begin of a reign at which replicas are asked to tell what they hold."""
CHECKERS: Final = ("sidecar", OPERATOR)
"""Who may ask whether a lock is held."""
MAX_OF_TASK: Final = 1_000
"""Requests of one task."""
MAX_LISTED: Final = 10_000
"""Requests a session may name."""
MAX_SHOWN: Final = 3_000
"""Locks, holders and waiters in one answer, together."""
MAX_WAITERS: Final = 100
"""Waiters of one lock in an answer, the first ones."""


@dataclass(slots=True)
class _Session:
    heard: float
    """When the replica was heard of (monotonic)."""
    timer: asyncio.Handle | None = None
    due: float = 0.0
    """When the timer is due (loop time)."""


class LockPart(Part):
    """Operations `lock`, `unlock`, `session`; `lock-check` of sidecars; `locks` and `lock-release` of the operator."""

    def __init__(self, shared: Shared, detector: Detector) -> None:
        self._leader = shared.leader
        self._locks = shared.locks
        self._detector = detector
        self._find = shared.find
        self._ancestors = shared.ancestors
        self._tail = shared.tail
        self._speaker = shared.speaker
        self._clock = shared.clock
        self._sessions: dict[Key, _Session] = {}
        self._new = True
        """Whether this coordinator just began to lead."""
        self._looking: dict[Key, Ask] = {}
        """Requests whose task is not in the index yet, by (agent, request)."""
        self._tasks = Tasks("requests for locks", on_error=lambda _: None)
        detector.bind(self.decide, lambda key: self._heard(key, LEASE))

    @property
    def lean_operations(self) -> Mapping[str, LeanHandler]:
        """What is asked often."""
        return {"lock": self._lock, "unlock": self._unlock, "session": self._session, "lock-check": self._checked}

    @property
    def leader_operations(self) -> Mapping[str, Handler]:
        """What the operator asks."""
        return {"locks": self._show, "lock-release": self._release}

    # Reigning ----------------------------------------------------------------------------------

    async def lead(self) -> None:
        """Give every session a whole lease, and have it tell what it holds."""
        self._forget()
        self._new = True
        now = self._clock()
        keys = self._locks.sessions()
        for key in keys:
            self._sessions[key] = _Session(now)
            self._watch(key, min(map(_lease, self._locks.session(*key))))
        asyncio.get_running_loop().call_later(RESYNC_AFTER, self._resync, keys)

    def _resync(self, keys: Iterable[Key]) -> None:
        for key in keys if self._leader.leading else ():
            self._speaker.tell(key, "resync", {})

    def deposed(self) -> None:
        """Nobody's lease is this coordinator's business any more."""
        self._forget()

    def _forget(self) -> None:
        for session in self._sessions.values():
            if session.timer is not None:
                session.timer.cancel()
        self._sessions.clear()
        self._looking.clear()

    async def aclose(self) -> None:
        """End what is under way."""
        self._forget()
        await self._tasks.aclose()

    async def tick(self, now: int) -> None:
        """Once: free what is held by tasks whose end was read before this coordinator led."""
        if not self._new:
            return
        self._new = False
        held = {(r.agent, r.task) for key in self._locks.sessions() for r in self._locks.session(*key)}
        ended = [task for agent, task in held if (entry := self._find(agent, task)) is not None and entry.ended]
        if ended:
            self.decide(lambda: self._locks.ended(*ended))

    def changed(self, entries: Sequence[Entry]) -> None:
        """Tasks that ended hold nothing more, whatever their replicas still say or did not."""
        ended = [entry for entry in entries if entry.ended and entry.created] if self._leader.leading else ()
        held: list[str] = []
        for entry in ended:
            self._detector.ended(entry.task)
            if self._locks.victims(entry.task) or any(r.agent == entry.agent for r in self._locks.of_task(entry.task)):
                held.append(entry.task)
        if held:
            with contextlib.suppress(Unavailable):
                self.decide(lambda: self._locks.ended(*held))

    # Deciding ----------------------------------------------------------------------------------

    def decide(
        self,
        act: Callable[[], list[Event]],
        *,
        answer: Answer | None = None,
        told: Callable[[list[Event]], dict[str, Any]] | None = None,
        asked: Sequence[str] = (),
    ) -> list[Event]:
        """Decide at once; whom it concerns is told, and the answer given, once it is stored.

        Args:
            act: Gives the events of one decision.
            answer: Gets what `told` says of the events, or why they were not stored.
            asked: Requests whose replica knows of it by the answer, and is not told besides.

        Raises Unavailable, and what `act` raises.
        """
        events: list[Event] = []
        found: list[tuple[str, str, Request]] = []

        def decided(_: int) -> list[Event]:
            events.extend(act())
            for agent, request, what, why, reason in changes(events):
                known = self._locks.find(agent, request)  # those that go are gone once it is folded
                if known is not None:
                    found.append((why if what == "lost" else what, reason, known))
            return events

        stored = self._leader.submit(decided)
        pushes = [push for what, reason, request in found if (push := self._push(what, reason, request, asked))]
        shown = told(events) if told is not None else {}

        def settled(done: asyncio.Future[list[int]]) -> None:
            error = done.exception()
            if error is None:
                for key, data in pushes:
                    self._speaker.tell(key, "lock", data)
            if answer is not None:
                failed = error if isinstance(error, WeftError) else Unavailable("not decided")
                answer(shown if error is None else failed)

        if stored.done():
            settled(stored)
        else:
            stored.add_done_callback(settled)
        return events

    def _push(
        self, what: str, reason: str, request: Request, asked: Sequence[str]
    ) -> tuple[Key, dict[str, Any]] | None:
        """What the replica of a request is told of a change."""
        if what not in ("waiting", "promised", "recalled", "moved"):
            self._detector.settled(request)
        key = (request.agent, request.replica)
        data = {"request": request.request, "task": request.task, "claim": request.claim}
        if what == "granted" and request.request not in asked:
            return key, {**data, "state": "granted", "token": request.token, "lease": _lease(request)}
        if what == "promised" and request.request not in asked:
            return key, {**data, "state": "promised", **_promise(request)}
        if what == "recalled":
            return key, {**data, "state": "recalled"}
        if what in ("expired", "forced"):
            why = f"the operator released it: {reason}" if what == "forced" else "its lease ended"
            return key, {**data, "state": "lost", "reason": why}
        return None  # the replica knows, or is told of the deadlock

    # Requests ----------------------------------------------------------------------------------

    def _lock(self, body: Body, caller: str, answer: Answer) -> None:
        ask, once = _asked(body, caller), body.get("wait") == 0
        entry = self._find(caller, ask.task)
        if entry is not None:
            self._request(ask, entry, answer, once=once)
            return
        self._looking[caller, ask.request] = ask
        self._tasks.start(self._look(ask, answer, once=once), name=f"lock for {ask.task}")

    async def _look(self, ask: Ask, answer: Answer, *, once: bool) -> None:
        """Ask for a task that the index did not know."""
        try:
            await self._tail.sync()
            if self._looking.get((ask.agent, ask.request)) is not ask:
                raise Unavailable(f"request {ask.request} was taken back or repeated")
            del self._looking[ask.agent, ask.request]
            entry = self._find(ask.agent, ask.task)
            if entry is None:
                raise InvalidParams(f"{ask.agent} has no task {ask.task}")
            self._request(ask, entry, answer, once=once)
        except WeftError as error:
            answer(error)

    def _request(self, ask: Ask, entry: Entry, answer: Answer, *, once: bool) -> None:
        if entry.ended:
            raise Fenced(f"task {ask.task} has ended: no lock is held for it")
        if len(self._locks.of_task(ask.task)) > MAX_OF_TASK:
            raise InvalidParams(f"task {ask.task} holds or waits for {MAX_OF_TASK} locks already: give some back")
        key, lease = (ask.agent, ask.replica), ask.lease or LEASE
        ancestors = self._ancestors(entry) if ask.reentrant else ()
        waiting: list[Request] = []

        def told(_: list[Event]) -> dict[str, Any]:
            request = self._locks.find(ask.agent, ask.request)
            if request is not None and request.held:
                return {"state": "granted", "token": request.token, "lease": lease}
            if request is not None:
                waiting.append(request)
                return {"state": "waiting", "ahead": self._locks.ahead(request), **_promise(request)}
            return {"state": "waiting", "ahead": 0}

        self.decide(
            lambda: self._locks.request(ask, ancestors=ancestors), answer=answer, told=told, asked=[ask.request]
        )
        self._heard(key, lease)
        for request in waiting:
            if once:
                self.decide(lambda: self._locks.release(ask.agent, ask.request, claim=ask.claim))
            else:
                self._detector.queued(request)

    def _unlock(self, body: Body, caller: str, answer: Answer) -> None:
        """Give a request back; `to` are those to which its replica handed on what they were promised."""
        fields = Fields(body)
        request, claim, token = fields.text("request"), fields.number("claim"), fields.number("token", default=0)
        fields.check("unlock")
        to = _texts(body, "to")
        looked = self._looking.pop((caller, request), None) is not None
        known = self._locks.find(caller, request)
        if known is not None and claim >= known.claim:
            self._heard((caller, known.replica), _lease(known))
            if token and known.promised == token:  # what was to say that those before let go got lost
                self.decide(lambda: self._locks.handed(caller, request, token))

        def told(events: list[Event]) -> dict[str, Any]:
            released = {"released": bool(events) or looked}
            refused = [one for one in to if (r := self._locks.find(caller, one)) is None or not r.held]
            return {**released, "refused": refused} if refused else released

        self.decide(lambda: self._locks.release(caller, request, claim=claim), answer=answer, told=told, asked=to)

    def _session(self, body: Body, caller: str, answer: Answer) -> None:
        """What of a replica's belief is true. What it does not name any more, it has given back."""
        fields = Fields(body)
        replica, waits = fields.token("replica"), fields.number("waits", default=0)
        fields.check(f"session of {caller}")
        held, waiting = _texts(body, "held"), _texts(body, "waiting")
        key = (caller, replica)
        known = {r.request: r for r in self._locks.session(*key)}
        named = {*held, *waiting}
        for request in [r for r in known.values() if r.request not in named]:
            self.decide(lambda r=request: self._locks.release(caller, r.request, claim=r.claim))  # type: ignore[misc]
        if known or waits:
            self._heard(key, min((_lease(r) for r in known.values()), default=LEASE))
        resync = self._detector.told_by(key) != waits
        if resync:
            self._detector.forget(key)
        own = [known[name] for name in named if name in known]
        told = {
            "held": {r.request: {"token": r.token, "lease": _lease(r)} for r in own if r.held},
            "waiting": {r.request: _promise(r) for r in own if not r.held},
            "lost": [name for name in named if name not in known and (caller, name) not in self._looking],
            "resync": resync,
            "lease": LEASE,
        }
        self.decide(list, answer=answer, told=lambda _: told)

    def _checked(self, body: Body, caller: str, answer: Answer) -> None:
        """Whether a task holds a lock with a token: `{name, token, agent, task}` to `{held}`, once that is certain."""
        if caller not in CHECKERS:
            raise PermissionDenied(f"lock-check is for sidecars, not for {caller}")
        fields = Fields(body)
        name, agent, task = fields.text("name"), fields.text("agent"), fields.text("task")
        token = fields.number("token")
        fields.check("lock-check")
        for r in [r for r in self._locks.of_task(task) if r.agent == agent and r.names == (name,)]:
            self.decide(lambda r=r: self._locks.handed(agent, r.request, token))  # type: ignore[misc]

        def told(_: list[Event]) -> dict[str, Any]:
            holders, _waiters = self._locks.view(name)
            return {"held": any((r.agent, r.task, r.token) == (agent, task, token) for r in holders)}

        self.decide(list, answer=answer, told=told)

    # Leases ------------------------------------------------------------------------------------

    def _heard(self, key: Key, lease: float) -> None:
        """A replica gave a sign of life."""
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = _Session(0.0)
        session.heard = self._clock()
        if session.timer is None or session.due > asyncio.get_running_loop().time() + lease:
            self._watch(key, lease)

    def _watch(self, key: Key, after: float) -> None:
        """Look at a session's leases after some seconds."""
        session = self._sessions[key]
        if session.timer is not None:
            session.timer.cancel()
        loop = asyncio.get_running_loop()
        due = loop.time() + after
        session.due = due
        session.timer = loop.call_at(due, self._due, key, due)

    def _due(self, key: Key, due: float) -> None:
        session = self._sessions.get(key)
        if session is None or not self._leader.leading:
            return
        session.timer = None
        late = asyncio.get_running_loop().time() - due
        if late > LATE:  # what was sent meanwhile is not read yet
            for one in self._sessions.values():
                one.heard += late
        silent = self._clock() - session.heard
        requests = self._locks.session(*key)
        over = [r for r in requests if silent >= _lease(r)]
        if over:
            self._expire(key, over, whole=len(over) == len(requests))
        left = [_lease(r) - silent for r in self._locks.session(*key)]
        if not left and silent >= LEASE:
            self._detector.forget(key)
        if left or self._detector.told_by(key):
            self._watch(key, max(0.001, min(left, default=LEASE - silent)))
        else:
            del self._sessions[key]

    def _expire(self, key: Key, over: list[Request], *, whole: bool) -> None:
        log.warning(
            "replica %s of %s says nothing: it loses %s",
            key[1],
            key[0],
            ", ".join(f"{'+'.join(r.names)} ({'held' if r.held else 'waited for'} by task {r.task})" for r in over),
        )
        try:
            if whole:
                self.decide(lambda: self._locks.expire(key))
            else:
                for request in over:
                    self.decide(lambda r=request: self._locks.release(r.agent, r.request, claim=r.claim))  # type: ignore[misc]
        except Unavailable:
            log.debug("leads no more: the next leader looks after session %s", key)

    # The operator ------------------------------------------------------------------------------

    async def _show(self, body: Body, caller: str) -> dict[str, Any]:
        """Every lock that is held or waited for, by name."""
        operator_only(caller, "locks")
        fields = Fields(body)
        limit = fields.number("limit", default=MAX_SHOWN)
        fields.check("locks")
        names = sorted(self._locks.names())
        shown: list[dict[str, Any]] = []
        left = min(limit, MAX_SHOWN)
        for name in names:
            shown.append(self._shown(name))
            left -= 1 + len(shown[-1]["holders"]) + len(shown[-1]["waiters"])
            if left <= 0:
                break
        return {"locks": shown, "total": len(names)}

    def _shown(self, name: str) -> dict[str, Any]:
        holders, waiters = self._locks.view(name)
        return {
            "name": name,
            "mode": (holders or waiters)[0].mode,
            "holders": [{**_one(r), "token": r.token, "since": r.since} for r in holders],
            "waiters": [{**_one(r), "mode": r.mode, "since": r.asked} for r in waiters[:MAX_WAITERS]],
            "waiting": len(waiters),
        }

    async def _release(self, body: Body, caller: str) -> dict[str, Any]:
        """Take a lock from its holders, or from one of them; they learn of it at their next use."""
        operator_only(caller, "lock-release")
        fields = Fields(body)
        name, task = fields.text("name"), fields.text("task", default="") or None
        reason = fields.text("reason", limit=1000)
        fields.check("lock-release")
        done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        def answer(told: dict[str, Any] | WeftError) -> None:
            if not done.done():
                done.set_exception(told) if isinstance(told, WeftError) else done.set_result(told)

        taken = [r for r in self._locks.view(name)[0] if task in (None, r.task)]
        shown = {"name": name, "released": [{**_one(r), "token": r.token} for r in taken], "reason": reason}
        self.decide(lambda: self._locks.force(name, task, reason=reason), answer=answer, told=lambda _: shown)
        log.warning("the operator takes lock %r from %s: %s", name, ", ".join(r.task for r in taken), reason)
        return await done


def _asked(body: Body, caller: str) -> Ask:
    """A request for locks; InvalidParams says what is wrong with it."""
    lease = body.get("lease")
    fields = Fields(body)
    ask = Ask(
        agent=caller,
        replica=fields.token("replica"),
        task=fields.text("task"),
        request=fields.text("request"),
        claim=fields.number("claim"),
        names=tuple(_texts(body, "names")),
        mode=fields.text("mode", default="exclusive"),
        reentrant=body.get("reentrant") is True,
        lease=min(LONGEST, max(SHORTEST, float(lease))) if isinstance(lease, int | float) else LEASE,
        priority=value if isinstance(value := body.get("priority", 0), int) else 0,
        work=fields.number("work", default=0),
        created=fields.number("created", default=0),
    )
    fields.check(f"lock of {caller}")
    return ask


def _texts(body: Body, name: str) -> list[str]:
    """A list of texts."""
    found = body.get(name, [])
    if not isinstance(found, list) or len(found) > MAX_LISTED or not all(isinstance(one, str) for one in found):
        raise InvalidParams(f"{name} must be a list of at most {MAX_LISTED} texts")
    return found


def _lease(request: Request) -> float:
    """Seconds of a request's lease."""
    return request.lease or LEASE


def _promise(request: Request) -> dict[str, Any]:
    """What its replica is told of a request that is promised its lock."""
    return {"promised": request.promised, "after": request.after} if request.promised else {}


def _one(request: Request) -> dict[str, Any]:
    return {"agent": request.agent, "task": request.task, "replica": request.replica}
