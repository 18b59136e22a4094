"""Named locks: who holds them, who waits in which order, and with which fencing token.

In short::

    locks = Locks()                                     # a Ledger
    events = locks.request(Ask(...), ancestors=...)     # taken, asked (queued), moved (takeover) or nothing (a repeat)
    events = locks.release(agent, request, claim=)      # also ends a waiting
    events = locks.expire((agent, replica), ...)        # sessions whose lease ended
    events = locks.ended(task, ...)                     # tasks that ended
    events = locks.force(name, task=None, reason=)      # an operator takes it away
    events = locks.deny(agent, request, reason)         # a waiting one gives way in a deadlock
    events = locks.overtake(agent, request)             # grant it before its turn, if its holders allow it
    events = locks.handed(agent, request, token)        # what it was promised it has
    events = locks.chosen(task); locks.victims(task)    # how often a task gave way
    locks.find(agent, request) -> Request | None        # .held, .token, .since, ...
    locks.ahead(request); locks.session(agent, replica); locks.of_task(task); locks.waiting()
    locks.names(); locks.view(name); locks.sessions()
    names_of(value)                                     # checks the names of a request as they came over the wire
    changes(events) -> [(agent, request, "waiting"|"granted"|"promised"|…, why, reason)]

Decisions return events and change nothing; `apply` folds them. **One decision at a time**: fold a decision's events
before asking for the next. A release, and every grant it makes possible, is one decision.

The rules:

- A request is granted when, on every one of its names, nobody holds it in a mode that excludes it and nobody who came
  before waits for it in such a mode. So no request is overtaken by one that would keep it waiting, and none starves;
  shared requests pass shared ones. A waiting request holds nothing.
- The place in the queues is the number of the event by which it was asked. Whoever waits for an earlier waiter waits
  for a lower number: queues alone make no deadlock.
- The token is the number of the event of the grant; a higher claim of the same task takes its request over with a new
  one.
- A re-entrant request does not wait for holders among its task and its task's ancestors, nor for the queue behind
  them, if what they hold covers its mode. It acts under their token when that is one for all its names, so that the
  holder is not fenced out by what it asked for; otherwise it has its own.
- Where the holder of one name and those first in its queue are of one replica, what comes next is promised: each of
  them has its token already and is granted the name once the one before lets go, which its replica need not wait to be
  told. Nothing else is granted in between; where it has to be, or a newer claim takes one of them over, what was
  promised is recalled in the same decision.
- A task holds or awaits a name once, other than by re-entry. What an older claim of the task left behind gives way.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import attrgetter
from typing import Any, Final

from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.requests import (
    ASKED,
    CHOSEN,
    CLOSED,
    FREED,
    GONE,
    GRANTED,
    HELD,
    LOST,
    MOVED,
    NEW,
    PROMISED,
    RECALLED,
    TAKEN,
    WAITING,
    Ask,
    Request,
    changes,
    check,
    names_of,
)
from weft_protocols.errors import Fenced, InvalidParams

__all__ = ["Ask", "Locks", "Request", "changes", "names_of"]

PROMISES: Final = 64
"""How many of one queue are promised the name at a time."""


class _Name:
    """One lock. The queues may contain requests that do not wait any more, but not as their first."""

    __slots__ = ("chained", "exclusive", "holders", "promised", "shared", "waiting", "writers")

    def __init__(self) -> None:
        self.holders: dict[Request, None] = {}
        self.writers = 0
        """Exclusive ones among the holders."""
        self.exclusive: deque[Request] | None = None
        """Exclusive requests that wait, by number."""
        self.shared: deque[Request] | None = None
        self.waiting = 0
        self.chained = 0
        """Re-entrant ones among those that wait."""
        self.promised = 0
        """Those that wait and are promised the name: the first ones of the exclusive queue."""


def _first(queue: deque[Request] | None) -> Request | None:
    if queue:
        for request in queue:
            if request.state == WAITING:
                return request
    return None


class Locks:
    """The ledger of all locks."""

    kinds: Final = frozenset({ASKED, TAKEN, GRANTED, PROMISED, RECALLED, MOVED, FREED, LOST, CHOSEN, CLOSED})

    def __init__(self) -> None:
        self.load(None)

    # Looking up --------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Requests that hold or wait."""
        return sum(len(requests) for requests in self._requests.values())

    def find(self, agent: str, request: str) -> Request | None:
        """The request, while it holds or waits."""
        requests = self._requests.get(agent)
        return requests.get(request) if requests is not None else None

    def of_task(self, task: str) -> list[Request]:
        """What a task holds and waits for."""
        return list(self._tasks.get(task, ()))

    def session(self, agent: str, replica: str) -> list[Request]:
        """What a replica of an agent holds and waits for."""
        return list(self._sessions.get((agent, replica), ()))

    def sessions(self) -> list[tuple[str, str]]:
        """(agent, replica) of all that hold or wait."""
        return list(self._sessions)

    def waiting(self) -> Iterator[Request]:
        """Every request that waits, the first one first."""
        return (r for requests in self._requests.values() for r in requests.values() if r.state == WAITING)

    def names(self) -> Iterator[str]:
        """Every lock that is held or waited for."""
        return iter(self._names)

    def view(self, name: str) -> tuple[list[Request], list[Request]]:
        """Holders of a lock, and who waits for it, the first one first."""
        lock = self._names.get(name)
        return (list(lock.holders), _queue(lock)) if lock is not None else ([], [])

    def ahead(self, request: Request) -> int:
        """How many requests wait before this one, where most do."""
        before = 0
        for name in request.names:
            lock = self._names.get(name)
            if lock is not None and request.state == WAITING and not _later(lock, request.number):
                before = max(before, lock.waiting - 1)
            elif lock is not None:
                before = max(before, sum(r.number < request.number for r in _queue(lock)))
        return before

    def victims(self, task: str) -> int:
        """How often a task gave way in a deadlock."""
        return self._victims.get(task, 0)

    def before(self, request: Request) -> list[str | Request]:
        """What a waiting request waits for: all of it must end or let go.

        A task holds the name in the way of the request, or is before it in the queue; a request is before it, and has
        to be granted first. Only the nearest ones of a queue are told: those before them are theirs.
        """
        found: list[str | Request] = []
        for name in request.names:
            found += self._before(request, self._names[name])
        return found

    def named(self, request: Request) -> list[tuple[str, str | Request]]:
        """The same, each with the name of the lock."""
        return [(name, node) for name in request.names for node in self._before(request, self._names[name])]

    def behind(self, task: str) -> Iterable[str]:
        """Tasks that wait for what a task holds, or behind it in a queue: at least all for which `before` tells it."""
        requests = self._tasks.get(task)
        return self._behind(requests) if requests is not None else ()

    def _behind(self, requests: list[Request]) -> Iterator[str]:
        for request in requests:
            for name in request.names:
                lock = self._names[name]
                if not lock.waiting:
                    continue
                number = -1 if request.state == HELD else request.number
                for queue in (lock.exclusive, lock.shared if request.exclusive else None):
                    if queue and queue[-1].number > number:
                        for r in islice(queue, bisect_right(queue, number, key=_number), None):
                            if r.state == WAITING:
                                yield r.task

    def _before(self, request: Request, lock: _Name) -> list[str | Request]:
        if request.chain:
            found: list[str | Request] = [r.task for r in lock.holders if _in_the_way(r, request, lock)]
            if _covered(request, lock):
                return found
        elif request.exclusive or lock.writers:
            found = [r.task for r in lock.holders]
        else:
            found = []
        if lock.waiting > 1:
            for r in _nearest(lock, request):
                found += (r, r.task)
        return found

    # Deciding ----------------------------------------------------------------------------------

    def request(self, ask: Ask, *, ancestors: Iterable[str] = ()) -> list[Event]:
        """Ask for locks.

        Args:
            ask: What is asked.
            ancestors: Tasks that delegated to the asking one, verified; used if it is re-entrant.

        Raises:
            InvalidParams: a field is wrong, the task holds or awaits one of the names, or it would be an upgrade.
            Fenced: a newer claim of the task made this request already.
        """
        check(ask)
        stale: list[Request] = []
        known = self.find(ask.agent, ask.request)
        if known is not None:
            repeated = self._repeat(known, ask)
            if repeated is not None:
                return repeated
            stale.append(known)
        chain = tuple(dict.fromkeys((ask.task, *ancestors))) if ask.reentrant else ()
        stale += self._others(ask, chain, known)
        new = Request(
            (ask.agent, ask.replica, ask.task, ask.request, ask.claim, ask.names, ask.mode == "exclusive", chain,
             ask.lease, ask.priority, ask.work, ask.created)
        )  # fmt: skip
        return self._free([(r, (FREED, r.agent, r.request, "superseded")) for r in stale], new=new)

    def release(self, agent: str, request: str, *, claim: int) -> list[Event]:
        """Let go, or stop waiting. Nothing if it is not known or a newer claim has it."""
        found = self.find(agent, request)
        if found is None or claim < found.claim:
            return []
        return self._free([(found, (FREED, agent, request, "released"))])

    def expire(self, *sessions: tuple[str, str]) -> list[Event]:
        """The leases of replicas ended: they lose what they hold and what they wait for."""
        return self._free(
            [
                (r, (LOST, r.agent, r.request, "expired", ""))
                for session in dict.fromkeys(sessions)
                for r in self._sessions.get(session, ())
            ]
        )

    def ended(self, *tasks: str) -> list[Event]:
        """Tasks ended: what they hold is released."""
        tasks = tuple(dict.fromkeys(tasks))
        freed = [(r, (FREED, r.agent, r.request, "ended")) for task in tasks for r in self._tasks.get(task, ())]
        return [*self._free(freed), *((CLOSED, task) for task in tasks if task in self._victims)]

    def force(self, name: str, task: str | None = None, *, reason: str) -> list[Event]:
        """Take a lock away from its holders, or from one of them. They lose all names of that request.

        Raises:
            InvalidParams: no reason, or it is not held so.
        """
        if not reason.strip():
            raise InvalidParams("reason is empty: say why the lock is taken from its holder")
        lock = self._names.get(name)
        holders = [r for r in (lock.holders if lock is not None else ()) if task in (None, r.task)]
        if not holders:
            by = "" if task is None else f" by task {task}"
            raise InvalidParams(f"lock {name!r} is not held{by}")
        return self._free([(r, (LOST, r.agent, r.request, "forced", reason)) for r in holders])

    def deny(self, agent: str, request: str, reason: str) -> list[Event]:
        """A waiting request gives way in a deadlock; nothing if it does not wait any more."""
        found = self.find(agent, request)
        if found is None or found.state != WAITING:
            return []
        return self._free([(found, (LOST, agent, request, "deadlock", reason))])

    def overtake(self, agent: str, request: str) -> list[Event]:
        """Grant a waiting request before its turn if no holder is in its way; nothing otherwise.

        Meant for a deadlock whose tasks before it in the queue cannot go on without it.
        """
        found = self.find(agent, request)
        if found is None or not self.may_overtake(found):
            return []
        return self._free([], first=found)

    def handed(self, agent: str, request: str, token: int) -> list[Event]:
        """It is known to act under the token it was promised: whoever was before it has let go. Else nothing."""
        found = self.find(agent, request)
        if found is None or not token or found.promised != token:
            return []
        lock = self._names[found.names[0]]
        before = [*lock.holders, *(r for r in _promised(lock) if r.promised < token)]
        return self._free([(r, (FREED, r.agent, r.request, "released")) for r in before])

    def may_overtake(self, request: Request) -> bool:
        """Whether a request waits for its turn only: no holder is in its way."""
        locks = [self._names[name] for name in request.names] if request.waits else []
        return bool(locks) and not any(_in_the_way(r, request, lock) for lock in locks for r in lock.holders)

    def chosen(self, task: str) -> list[Event]:
        """A task gave way in a deadlock."""
        return [(CHOSEN, task)]

    def _repeat(self, known: Request, ask: Ask) -> list[Event] | None:
        """The answer to a request that is known; None if the new one replaces it."""
        if ask.task != known.task:
            raise InvalidParams(f"request {ask.request!r} is one of task {known.task}, not of {ask.task}")
        if ask.claim < known.claim:
            raise Fenced(f"claim {known.claim} of task {ask.task} made this request: claim {ask.claim} is over")
        if ask.names != known.names or (ask.mode == "exclusive") != known.exclusive:
            if ask.claim > known.claim:
                return None
            raise InvalidParams(
                f"request {ask.request!r} asked for {list(known.names)} {known.mode}: ask for others in another request"
            )
        if ask.claim == known.claim and ask.replica == known.replica:
            return []
        void = known.names if known.held or known.promised else ()
        return [(MOVED, ask.agent, ask.request, ask.replica, ask.claim), *self._recalls(void)]

    def _others(self, ask: Ask, chain: tuple[str, ...], known: Request | None) -> list[Request]:
        """Requests of older claims of the task that the new one replaces; refuses what would wait for itself."""
        stale: list[Request] = []
        exclusive = ask.mode == "exclusive"
        for r in self._tasks.get(ask.task, ()):
            if r is known:
                continue
            name = next((name for name in r.names if name in ask.names), None)
            if name is None:
                continue
            if r.claim < ask.claim:
                stale.append(r)
            elif exclusive and not r.exclusive:
                raise InvalidParams(_upgrade(ask.task, name))
            elif not chain:
                raise InvalidParams(
                    f"task {ask.task} {'holds' if r.held else 'waits for'} lock {name!r} already, and would wait for "
                    "itself: use the lock it has, or ask with reentrant=True"
                )
        if exclusive:
            for name in ask.names if len(chain) > 1 else ():
                lock = self._names.get(name)
                chained = [r for r in (lock.holders if lock is not None else ()) if r.task in chain and r not in stale]
                if chained and not any(r.exclusive for r in chained):
                    raise InvalidParams(_upgrade(chained[0].task, name))
        return stale

    def _free(
        self,
        freed: list[tuple[Request, Event]],
        *,
        new: Request | None = None,
        first: Request | None = None,
    ) -> list[Event]:
        """Decide that requests let go, then what can be granted: `first` before its turn, `new` after all others.

        It is tried out on the ledger and taken back.
        """
        events: list[Event] = [event for _, event in freed]
        touched: list[str] = []
        taken: list[Request] = []
        states = [r.state for r, _ in freed]
        try:
            for r, _ in freed:
                self._leave(r)
                touched += r.names
            if first is not None:
                self._take(first, taken)
            done = len(taken)
            for name in touched:
                if self._names[name].waiting:
                    self._promote(self._names[name], taken)
            if len(taken) - done > 1:
                taken[done:] = sorted(taken[done:], key=_number)
            self._reenter([*touched, *(name for r in taken for name in r.names)], taken)
            events += [(GRANTED, r.agent, r.request) for r in taken]
            between = [name for r in taken if not r.promised for name in r.names]
            queued = None
            if new is not None:
                clear = self._clear(new)
                events.append((TAKEN if clear else ASKED, *new.fields()))
                if clear:
                    between += new.names
                else:
                    queued = new
            recalled = self._recalls(between)
            if not recalled:
                touched += [name for r in taken for name in r.names]
                recalled = self._promises(dict.fromkeys((*touched, *(queued.names if queued else ()))), queued)
            return events + recalled
        finally:
            for r in reversed(taken):
                self._leave(r)
                r.state = WAITING
            for (r, _), state in zip(reversed(freed), reversed(states), strict=True):
                if state == HELD:
                    self._hold(r)
                r.state = state

    def _recalls(self, names: Iterable[str]) -> list[Event]:
        """What is promised of these names does not hold any more."""
        locks = [self._names[name] for name in dict.fromkeys(names) if name in self._names]
        return [(RECALLED, r.agent, r.request) for lock in locks if lock.promised for r in _promised(lock)]

    def _promises(self, names: Iterable[str], new: Request | None) -> list[Event]:
        """Promise these names to those who are next and of their holder's replica; `new` is the last one that waits."""
        events: list[Event] = []
        for name in names:
            lock = self._names.get(name)
            last = next(iter(lock.holders), None) if lock is not None else None
            if lock is None or last is None or len(lock.holders) > 1 or not last.exclusive or last.chain:
                continue
            reader = _first(lock.shared)
            line = list(islice((r for r in lock.exclusive or () if r.state == WAITING), PROMISES))
            if reader is not None:
                line = [r for r in line if r.number < reader.number]
            elif new is not None and name in new.names and len(line) < PROMISES:
                line.append(new)
            session = (last.agent, last.replica)
            for r in line:
                if not r.promised:
                    if not r.exclusive or r.chain or len(r.names) > 1 or (r.agent, r.replica) != session:
                        break
                    events.append((PROMISED, r.agent, r.request, last.request))
                last = r
        return events

    def _promote(self, lock: _Name, taken: list[Request]) -> None:
        """Grant what is first in the queue of a lock and can be granted everywhere, but for re-entrant requests."""
        writer = _first(lock.exclusive)
        if lock.shared and not lock.writers:
            limit = writer.number if writer is not None else NEW
            for r in lock.shared:
                if r.number > limit:
                    break
                if r.state == WAITING and not r.chain and self._clear(r):
                    self._take(r, taken)
        if writer is not None and not lock.holders and not writer.chain and self._clear(writer):
            self._take(writer, taken)

    def _reenter(self, names: list[str], taken: list[Request]) -> None:
        """Grant re-entrant requests, one by one: what one is granted lets others in or keeps them out."""
        while True:
            locks = [self._names[name] for name in dict.fromkeys(names) if self._names[name].chained]
            waiting = sorted({r for lock in locks for r in _queue(lock) if r.chain}, key=_number)
            request = next((r for r in waiting if self._clear(r)), None)
            if request is None:
                return
            self._take(request, taken)
            names += request.names

    def _clear(self, request: Request) -> bool:
        """Whether it can be granted: by the holders and by who came before, on each of its names."""
        for name in request.names:
            lock = self._names.get(name)
            if lock is None:
                continue
            if request.chain and _covered(request, lock):
                if any(_in_the_way(r, request, lock) for r in lock.holders):
                    return False
                continue
            if lock.holders if request.exclusive else lock.writers:
                return False
            if lock.waiting:
                r = _first(lock.exclusive)
                if r is not None and r.number < request.number:
                    return False
                if request.exclusive:
                    r = _first(lock.shared)
                    if r is not None and r.number < request.number:
                        return False
        return True

    def _take(self, request: Request, taken: list[Request]) -> None:
        self._hold(request)
        taken.append(request)

    # Folding -----------------------------------------------------------------------------------

    def apply(self, event: Event, *, number: int, at: int) -> None:
        """Fold an event of its kinds."""
        kind = event[0]
        if kind in (ASKED, TAKEN):
            request = Request(event[1:13], number=number, at=at)
            self._insert(request)
            if kind == TAKEN:
                self._grant(request, number=number, at=at)
            else:
                self._enqueue(request)
        elif kind == CHOSEN:
            self._victims[event[1]] += 1
        elif kind == CLOSED:
            self._victims.pop(event[1], None)
        else:
            found = self.find(event[1], event[2])
            if found is not None:
                self._change(found, event, number=number, at=at)

    def _change(self, request: Request, event: Event, *, number: int, at: int) -> None:
        if event[0] == PROMISED:
            request.promised, request.after = number, event[3]
            self._names[request.names[0]].promised += 1
            return
        if event[0] == RECALLED:
            self._unpromise(request)
            return
        if event[0] == MOVED:
            self._forget(self._sessions, (request.agent, request.replica), request)
            request.replica, request.claim = event[3], event[4]
            self._sessions.setdefault((request.agent, request.replica), {})[request] = None
            if request.state == HELD:
                request.token = self._token(request, number)
            return
        waited = request.state == WAITING
        if event[0] == GRANTED:
            self._grant(request, number=number, at=at)
        else:
            self._leave(request)
            self._remove(request)
        if waited:
            self._unpromise(request)
            self._dequeue(request)
        if request.state == GONE:
            for name in request.names:
                lock = self._names[name]
                if not lock.holders and not lock.waiting:
                    del self._names[name]

    def _grant(self, request: Request, *, number: int, at: int) -> None:
        for name in request.names:
            if name not in self._names:
                self._names[name] = _Name()
        request.token = self._token(request, number)
        request.since = at
        self._hold(request)

    def _token(self, request: Request, number: int) -> int:
        """What it was promised; of what it re-enters, if that is one for all names; else `number`."""
        if not request.chain:
            return request.promised or number
        tokens: set[int] = set()
        for name in request.names:
            lock = self._names[name]
            outer = [r for r in lock.holders if r is not request and _covers(r, request)]
            tokens.update([r.token for r in outer] or [number])
        return tokens.pop() if len(tokens) == 1 else number

    def _unpromise(self, request: Request) -> None:
        if request.promised:
            request.promised, request.after = 0, ""
            self._names[request.names[0]].promised -= 1

    def _hold(self, request: Request) -> None:
        request.state = HELD
        for name in request.names:
            lock = self._names[name]
            lock.holders[request] = None
            if request.exclusive:
                lock.writers += 1

    def _leave(self, request: Request) -> None:
        if request.state == HELD:
            for name in request.names:
                lock = self._names[name]
                del lock.holders[request]
                if request.exclusive:
                    lock.writers -= 1
        request.state = GONE

    def _enqueue(self, request: Request) -> None:
        for name in request.names:
            lock = self._names.get(name)
            if lock is None:
                lock = self._names[name] = _Name()
            if request.exclusive:
                queue = lock.exclusive
                if queue is None:
                    queue = lock.exclusive = deque()
            else:
                queue = lock.shared
                if queue is None:
                    queue = lock.shared = deque()
            queue.append(request)
            lock.waiting += 1
            if request.chain:
                lock.chained += 1

    def _dequeue(self, request: Request) -> None:
        for name in request.names:
            lock = self._names[name]
            lock.waiting -= 1
            if request.chain:
                lock.chained -= 1
            if not lock.waiting:
                lock.exclusive = lock.shared = None
                continue
            queue = lock.exclusive if request.exclusive else lock.shared
            while queue and queue[0].state != WAITING:
                queue.popleft()
            if queue and len(queue) > 2 * lock.waiting + 16:
                kept = deque(r for r in queue if r.state == WAITING)
                if request.exclusive:
                    lock.exclusive = kept
                else:
                    lock.shared = kept

    def _insert(self, request: Request) -> None:
        requests = self._requests.get(request.agent)
        if requests is None:
            requests = self._requests[request.agent] = {}
        requests[request.request] = request
        tasks = self._tasks.get(request.task)
        if tasks is None:
            self._tasks[request.task] = [request]
        else:
            tasks.append(request)
        self._sessions.setdefault((request.agent, request.replica), {})[request] = None

    def _remove(self, request: Request) -> None:
        requests = self._requests[request.agent]
        del requests[request.request]
        if not requests:
            del self._requests[request.agent]
        tasks = self._tasks[request.task]
        tasks.remove(request)
        if not tasks:
            del self._tasks[request.task]
        self._forget(self._sessions, (request.agent, request.replica), request)

    @staticmethod
    def _forget(index: dict[tuple[str, str], dict[Request, None]], key: tuple[str, str], request: Request) -> None:
        found = index[key]
        del found[request]
        if not found:
            del index[key]

    # Snapshots ---------------------------------------------------------------------------------

    def dump(self) -> Any:
        """Everything, as msgpack values."""
        rows = [
            [*r.fields(), r.number, r.asked, r.since, r.token, r.promised, r.after]
            for requests in self._requests.values()
            for r in requests.values()
        ]
        rows.sort(key=_row)
        return {"requests": rows, "victims": dict(self._victims)}

    def load(self, dumped: Any) -> None:
        """Be what `dump` gave; None empties it."""
        self._requests: dict[str, dict[str, Request]] = {}
        self._names: dict[str, _Name] = {}
        self._tasks: dict[str, list[Request]] = {}
        self._sessions: dict[tuple[str, str], dict[Request, None]] = {}
        self._victims: Counter[str] = Counter((dumped or {}).get("victims", {}))
        for row in (dumped or {}).get("requests", ()):
            number, asked, since, token, *promise = row[12:]
            request = Request(row[:12], number=number, at=asked)
            self._insert(request)
            if not token:
                self._enqueue(request)
                request.promised, request.after = promise or (0, "")  # version 0.1 promised nothing
                self._names[request.names[0]].promised += request.promised > 0
                continue
            request.token, request.since = token, since
            for name in request.names:
                if name not in self._names:
                    self._names[name] = _Name()
            self._hold(request)


_number = attrgetter("number")


def _row(row: list[Any]) -> int:
    number: int = row[12]
    return number


def _covers(holder: Request, request: Request) -> bool:
    """Whether the request may re-enter what the holder holds."""
    return holder.task in request.chain and (holder.exclusive or not request.exclusive)


def _covered(request: Request, lock: _Name) -> bool:
    return any(_covers(r, request) for r in lock.holders)


def _in_the_way(holder: Request, request: Request, lock: _Name) -> bool:
    """Whether a holder excludes the request."""
    if not (holder.exclusive or request.exclusive):
        return False
    return not (request.chain and holder.task in request.chain and _covered(request, lock))


def _queue(lock: _Name) -> list[Request]:
    """Who waits, the first one first."""
    waiting = [r for queue in (lock.exclusive, lock.shared) for r in queue or () if r.state == WAITING]
    waiting.sort(key=_number)
    return waiting


def _promised(lock: _Name) -> Iterator[Request]:
    """Who is promised the lock, the next one first."""
    for r in lock.exclusive or ():
        if r.state == WAITING:
            if not r.promised:
                return
            yield r


def _later(lock: _Name, number: int) -> bool:
    """Whether somebody may wait who came later."""
    return any(queue[-1].number > number for queue in (lock.exclusive, lock.shared) if queue)


def _nearest(lock: _Name, request: Request) -> list[Request]:
    """Requests before this one in the queue that exclude it, back to the nearest exclusive one."""
    found: list[Request] = []
    since = -1
    queue = lock.exclusive
    if queue and queue[0].number < request.number:
        for i in range(bisect_left(queue, request.number, key=_number) - 1, -1, -1):
            if queue[i].state == WAITING:
                found.append(queue[i])
                since = queue[i].number
                break
    queue = lock.shared if request.exclusive else None
    if queue and queue[0].number < request.number:
        for i in range(bisect_left(queue, request.number, key=_number) - 1, -1, -1):
            if queue[i].number < since:
                break
            if queue[i].state == WAITING:
                found.append(queue[i])
    return found


def _upgrade(task: str, name: str) -> str:
    return (
        f"task {task} holds lock {name!r} shared, and a shared lock does not become exclusive: "
        "release it first, or ask for it exclusive from the start"
    )
