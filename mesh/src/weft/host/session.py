"""A replica's session with the coordinator: the locks its tasks hold or wait for, and what else they wait for.

Locks are asked for and given back by requests of their own. What a message told and got lost is repaired by the
session, a request that is repeated as long as anything is held or waited for; it also keeps the leases.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, Final

import msgpack

from weft.client.asks import Asks
from weft.core.broker import Delivered
from weft.host.locking import EXCLUSIVE, Lock
from weft.host.owner import Owner
from weft.host.run import Run
from weft.host.turn import Queue
from weft.host.waits import Wait, Waits
from weft_protocols import subjects
from weft_protocols.errors import (
    BrokerError,
    CycleEdge,
    DeadlockError,
    InvalidParams,
    LockLost,
    LockTimeout,
    Unavailable,
    WeftError,
)
from weft_protocols.records import Control

log = logging.getLogger("weft.host")

OPS: Final = ("lock", "deadlock", "waiting?", "resync")
"""Operations of control messages that are the session's."""
ASK: Final = 3.0
"""Seconds the coordinator has to answer."""
PAUSES: Final = (0.1, 0.25, 0.5, 1.0, 2.0)
"""Seconds before asking again while no coordinator answers."""
LONGEST: Final = 5.0
"""Seconds between two session requests at most."""
SOON: Final = 1.0
"""Seconds until the next session request after one without an answer."""
TELL_AFTER: Final = 0.02
"""Seconds a wait lasts before it is told, where its task holds no lock: most children answer sooner."""
FRESH: Final = 1.0
"""Seconds since the coordinator was heard of in which what it promised is acted on: less than any replica is given
up in, so that nobody else was granted the lock meanwhile."""
LOCK: Final = "lock"
TOLD: Final = frozenset(("child", "order", LOCK))
"""Kinds of waits that can be part of a deadlock. What waits for an answer or a time is not stuck."""
_Key = tuple[str, str]


class Session:
    """The locks and waits of one replica."""

    def __init__(self, owner: Owner, queue: Queue) -> None:
        self._owner = owner
        self._queue = queue
        self._asks = Asks(owner.broker, owner.agent.name)
        self._asked: dict[str, Lock] = {}
        """Locks that are waited for, by request."""
        self._held: dict[str, Lock] = {}
        self._giving: dict[str, dict[str, Any]] = {}
        """Requests that were given back and not confirmed yet, with the question that says so."""
        self._next: dict[_Key, Lock] = {}
        """Who is promised a lock once it is given back here, by (request, name)."""
        self._users: dict[str, set[str]] = {}
        """Requests here that hold or await a name."""
        self._confirmed = 0.0
        """When that was sent to which the coordinator answered last (monotonic)."""
        self._waits: dict[_Key, tuple[Waits, Wait]] = {}
        """Waits the coordinator was told of, by task and wait."""
        self._changed: dict[_Key, tuple[Waits, Wait] | None] = {}
        """What it is to be told: a wait, or None for one that is over."""
        self._tick: asyncio.TimerHandle | None = None
        self._telling: asyncio.Handle | None = None
        self._due = 0.0
        """When that is (loop time)."""
        self._alone = False
        """Whether it was said already that no coordinator answers."""

    # Locks -------------------------------------------------------------------------------------

    async def acquire(self, lock: Lock) -> None:
        """Return when the lock is granted. Whatever else happens, it is not held and not waited for any more.

        Raises:
            LockTimeout, DeadlockError, LockLost: as `Task.lock` says.
        """
        run = lock.run
        lock.claim = run.claimed
        run.enters |= lock.reentrant
        self._asked[lock.request] = lock
        for name in lock.names:
            self._users.setdefault(name, set()).add(lock.request)
        try:
            with run.waits.open("lock", lock.names, key=lock.request):
                await self._wait(lock)
            if not self._known(lock):
                raise LockLost(f"lock {lock} of task {run.task_id} was not granted: its attempt has ended")
        except BaseException:
            self.release(lock)
            raise
        finally:
            self._asked.pop(lock.request, None)
        self._held[lock.request] = lock
        self._schedule()

    async def _wait(self, lock: Lock) -> None:
        loop = asyncio.get_running_loop()
        until = None if lock.wait is None else loop.time() + lock.wait
        if await self._ask(lock, ASK if not lock.wait else min(ASK, lock.wait)):
            return
        if lock.wait == 0:
            why = "is not free" if lock.outcome is not None else "could not be asked for: no coordinator answers"
            raise LockTimeout(f"lock {lock} {why}, and task {lock.run.task_id} does not wait for it")
        async with lock.run.slot.waiting():
            try:
                async with asyncio.timeout_at(until):
                    await self._granted(lock)
            except TimeoutError:
                raise LockTimeout(
                    f"lock {lock} was not granted to task {lock.run.task_id} within {lock.wait:g} s; nothing is held"
                ) from None

    async def _granted(self, lock: Lock) -> None:
        """Return once the lock is granted; ask (again) where the coordinator does not know of the wait."""
        attempt = 0
        while True:
            if lock.outcome is None:
                await asyncio.sleep(PAUSES[min(attempt, len(PAUSES) - 1)])
                attempt += 1
            elif await lock.outcome:
                return
            else:
                attempt = 0
            if await self._ask(lock, ASK):
                return

    async def _ask(self, lock: Lock, timeout: float) -> bool:
        """Ask for a lock once. Whether it was granted; where it is not, `outcome` is there if it is waited for."""
        unheard = self._unheard(lock.run.task_id)
        body = self._body(lock)
        lock.outcome = asyncio.get_running_loop().create_future()
        sent = time.monotonic()
        try:
            answer = await self._asks.call("lock", body, timeout=timeout, patient=self._queues(lock))
        except InvalidParams:
            lock.outcome = None
            for request, given in self._unheard(lock.run.task_id):
                self._send_back(request, given)
            if not unheard:
                raise
            return False  # it had not heard yet that the task gave back what is in its own way
        except (Unavailable, BrokerError) as error:
            lock.outcome = None
            if not self._alone:
                self._alone = True
                log.warning("task %s waits for lock %s: %s; it is tried on", lock.run.task_id, lock, error)
            return False
        self._alone = False
        self._confirmed = max(self._confirmed, sent)
        if answer.get("state") == "granted":
            lock.grant(int(answer["token"]), float(answer.get("lease") or lock.lease), sent)
            return True
        lock.confirmed = max(lock.confirmed, sent)
        self._promise(lock, answer)
        self._schedule()
        return lock.granted > 0

    def _queues(self, lock: Lock) -> bool:
        """Whether a lock cannot be granted before this replica gives it back, so that the question can wait."""
        if lock.mode != EXCLUSIVE or lock.reentrant or lock.wait == 0:
            return False
        return any(len(self._users.get(name, ())) > 1 for name in lock.names)

    def _body(self, lock: Lock) -> dict[str, Any]:
        run = lock.run
        return {
            "task": run.task_id,
            "replica": self._owner.id,
            "request": lock.request,
            "claim": lock.claim,
            "names": lock.names,
            "mode": lock.mode,
            "wait": lock.wait,
            "lease": lock.lease,
            "reentrant": lock.reentrant,
            "priority": lock.priority,
            "work": run.journal.used,
            "created": run.claim.at,
        }

    def _known(self, lock: Lock) -> bool:
        return self._owner.live.get(lock.run.task_id) is lock.run and not lock.run.ended

    def release(self, lock: Lock) -> None:
        """Give a lock back, or take back a request for it. It is repeated until the coordinator has heard it."""
        for name in lock.names:
            users = self._users.get(name, set())
            users.discard(lock.request)
            if not users:
                self._users.pop(name, None)
        self._asked.pop(lock.request, None)
        to = self._hand_on(lock) if self._held.pop(lock.request, None) is lock else []
        self._unpromise(lock)
        lock.gone = lock.gone or "it was given back"
        body = {"task": lock.run.task_id, "request": lock.request, "claim": lock.claim, "token": lock.granted, "to": to}
        self._give(lock.request, body, patient=len(to) == len(lock.names))  # else others may wait for it

    def _give(self, request: str, body: dict[str, Any], *, patient: bool = False) -> None:
        self._giving[request] = body
        self._send_back(request, body, patient=patient)

    # What was promised -------------------------------------------------------------------------

    def _promise(self, lock: Lock, told: Mapping[str, Any]) -> None:
        """What the coordinator says a request that waits is promised, if anything."""
        token, after = int(told.get("promised", 0)), str(told.get("after", ""))
        if lock.granted or lock.gone or (token, after) == (lock.promised, lock.after):
            return
        self._unpromise(lock)
        if token and (after in self._held or after in self._asked):
            lock.promised, lock.after = token, after
            self._next[after, lock.names[0]] = lock

    def _unpromise(self, lock: Lock) -> None:
        if lock.promised:
            key = (lock.after, lock.names[0])
            if self._next.get(key) is lock:
                del self._next[key]
            lock.promised, lock.after = 0, ""

    def _hand_on(self, lock: Lock) -> list[str]:
        """Give a lock to those here to whom the coordinator promised it; their requests.

        Not where the coordinator may have let somebody else in: a task that this one delegated, or, since it was
        heard of last, another replica.
        """
        run = lock.run
        line = [found for name in lock.names if (found := self._next.pop((lock.request, name), None)) is not None]
        if not line or lock.lost or lock.mode != EXCLUSIVE or run.enters or run.children or run.claim.attempt > 1:
            return []
        if time.monotonic() - self._confirmed > FRESH:
            return []
        to: list[str] = []
        for one in line:
            if one.request in self._asked and one.outcome is not None and not one.outcome.done() and self._known(one):
                one.grant(one.promised, one.lease, self._confirmed)
                to.append(one.request)
        return to

    def _unheard(self, task_id: str) -> list[tuple[str, dict[str, Any]]]:
        """What a task gave back and nobody confirmed."""
        return [(request, body) for request, body in self._giving.items() if request.startswith(f"{task_id}-")]

    def _send_back(self, request: str, body: dict[str, Any], *, patient: bool = False) -> None:
        sent = time.monotonic()

        def then(answer: Mapping[str, Any] | WeftError) -> None:
            if isinstance(answer, WeftError):
                self._schedule()
                return
            if answer.get("released") is True:
                self._confirmed = max(self._confirmed, sent)
            for refused in answer.get("refused", ()):
                if (lock := self._held.get(refused) or self._asked.get(refused)) is not None and lock.granted:
                    lock.take_away("the coordinator did not grant what it had promised")
            if self._giving.get(request) is body:
                del self._giving[request]

        self._asks.ask("unlock", body, then, patient=patient)

    def end(self, run: Run) -> None:
        """A task is not worked on here any more: nothing is held or waited for in its name."""
        if not run.locks and not run.waits.all:
            return
        for lock in [lock for lock in (*self._held.values(), *self._asked.values()) if lock.run is run]:
            self.release(lock)
            if lock.outcome is not None and not lock.outcome.done():
                lock.outcome.set_exception(LockLost(f"the attempt of task {run.task_id} has ended"))
                lock.outcome.exception()
        for wait in run.waits.all:
            self(run.waits, wait, False)

    # What the coordinator says -----------------------------------------------------------------

    def on_control(self, control: Control, _: Delivered) -> None:
        """A control message of this session's."""
        try:
            told = msgpack.unpackb(control.data) if control.data else {}
            if control.op == "lock":
                self._on_lock(told)
            elif control.op == "deadlock":
                self._on_deadlock(told["task"], told["wait"], _cycle(told["cycle"]))
            elif control.op == "waiting?":
                self._on_question(told)
            elif control.op == "resync":
                self._tell_all()
                self._beat()
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            log.warning("control message %s of the coordinator is not understood: %r", control.op, error)

    def _on_lock(self, told: Mapping[str, Any]) -> None:
        request, state = str(told["request"]), told["state"]
        lock = self._asked.get(request) or self._held.get(request)
        if lock is None:
            if state == "granted" and request not in self._giving:
                self._give(request, {"task": str(told["task"]), "request": request, "claim": int(told["claim"])})
            return
        waits = request in self._asked and lock.outcome is not None and not lock.outcome.done()
        if state == "granted":
            # The lease runs at least from the last request the coordinator answered; when it granted is not known.
            lock.grant(int(told["token"]), float(told["lease"]), lock.confirmed)
        elif state == "deadlock" and waits and lock.outcome is not None:
            error = DeadlockError(cycle=_cycle(told["cycle"]), lasting=told.get("lasting") is True)
            lock.outcome.set_exception(error)
            lock.outcome.exception()
        elif state == "promised":
            self._promise(lock, told)
        elif state == "recalled":
            self._recalled(lock)
        elif state == "lost":
            self._lost(lock, str(told.get("reason", "")))

    def _recalled(self, lock: Lock) -> None:
        """What the coordinator promised does not hold any more; nor does what was made of it."""
        if lock.granted:
            lock.take_away("it was granted to a later attempt of the task before")
        self._unpromise(lock)

    def _lost(self, lock: Lock, reason: str) -> None:
        """The coordinator does not have a lock (any more): a wait is begun anew, a holder told at its next use."""
        if lock.request in self._held or lock.granted:
            lock.take_away(reason)
        elif lock.outcome is not None and not lock.outcome.done():
            lock.outcome.set_result(False)

    def _on_question(self, told: Mapping[str, Any]) -> None:
        """Whether a wait goes on and nothing else of its task does: asked before anybody gives way."""
        found = self._wait_of(told["task"], told["wait"])
        self._post("confirm", {"question": told["question"], "waits": found is not None and self._stuck(found[0])})

    def _on_deadlock(self, task_id: str, wait_id: str, cycle: tuple[CycleEdge, ...]) -> None:
        """A wait gives way: its branch is told, or the task is refused where it has not begun."""
        found = self._wait_of(task_id, wait_id)
        if found is not None and not self._queue.refuse(task_id, f"DeadlockError: {DeadlockError(cycle=cycle)}"):
            found[1].give_way(cycle)

    def _wait_of(self, task_id: str, wait_id: str) -> tuple[Waits, Wait] | None:
        """A wait that goes on, as the coordinator calls it."""
        lock, run = self._asked.get(wait_id), self._owner.live.get(task_id)
        if lock is None or run is None or lock.run is not run:
            return self._waits.get((task_id, wait_id))
        return next(((run.waits, wait) for wait in run.waits.all if _id(wait) == wait_id), None)

    def _stuck(self, waits: Waits) -> bool:
        """Whether nothing of a task goes on before others do, as far as its replica can see.

        A branch in the block of a lock counts as going on where no wait is inside that block.
        """
        run = self._owner.live.get(waits.task_id)
        if not waits.idle or any(wait.kind not in TOLD for wait in waits.all):
            return False
        if run is None or run.waits is not waits:
            return waits.task_id in self._queue  # it has not begun
        waited_in = {id(lock) for wait in waits.all for lock in wait.around}
        return run.stop is None and not run.ended and all(id(lock) in waited_in for lock in run.locks)

    # The session -------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if self._owner.broker.closed.is_set():
            return
        if self._tick is None and (self._held or self._asked or self._giving or self._waits):
            self._tick = asyncio.get_running_loop().call_later(self._interval(), self._beat)

    def _interval(self) -> float:
        if self._giving:
            return SOON
        leases = [lock.lease for locks in (self._held, self._asked) for lock in locks.values()]
        return min(LONGEST, *(lease / 4 for lease in leases)) if leases else LONGEST

    def _beat(self) -> None:
        """Tell what is held and waited for, and hear what is true of it."""
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        for request, body in list(self._giving.items()):
            self._send_back(request, body)
        if not (self._held or self._asked or self._waits):
            return
        held, asked = dict(self._held), {key: lock for key, lock in self._asked.items() if lock.outcome is not None}
        session = {
            "replica": self._owner.id,
            "held": list(held),
            "waiting": list(self._asked),
            "waits": len(self._waits),
        }
        sent = time.monotonic()

        def then(told: Mapping[str, Any] | WeftError) -> None:
            if not isinstance(told, WeftError) and "lost" in told:
                self._on_session(told, held=held, asked=asked, sent=sent)
                self._schedule()
            elif self._tick is None and not self._owner.broker.closed.is_set():
                self._tick = asyncio.get_running_loop().call_later(min(SOON, self._interval()), self._beat)

        self._asks.ask("session", session, then)

    def _on_session(
        self, told: Mapping[str, Any], *, held: Mapping[str, Lock], asked: Mapping[str, Lock], sent: float
    ) -> None:
        self._confirmed = max(self._confirmed, sent)
        for request, one in told["held"].items():
            lock = held.get(request) or asked.get(request)
            if lock is None or lock.gone:
                continue
            if lock.granted in (0, int(one["token"])):
                lock.grant(int(one["token"]), float(one.get("lease") or lock.lease), sent)
            else:
                lock.take_away("it was granted to a later attempt")
        for request, one in told["waiting"].items():
            if request in asked:
                asked[request].confirmed = sent
                self._promise(asked[request], one)
            elif request in held and one.get("promised") != held[request].granted:
                self._recalled(held[request])
        for request in told["lost"]:
            lock = held.get(request)
            if lock is not None and not lock.gone:
                lock.take_away("the coordinator does not know of it any more")
            elif request in asked and not asked[request].granted:
                self._lost(asked[request], "")
        if told.get("resync"):
            self._tell_all()

    # Waits -------------------------------------------------------------------------------------

    def __call__(self, waits: Waits, wait: Wait, opened: bool) -> None:
        """A wait began, ended, or is among the only things left of its task: told with what else changes meanwhile."""
        if wait.kind not in TOLD or (wait.kind == LOCK and not (opened and wait.told)):
            return  # of a wait for a lock the coordinator knows: what it may not know is that nothing else goes on
        run = self._owner.live.get(waits.task_id)
        key = (waits.task_id, _id(wait))
        if opened:
            self._changed[key] = (waits, wait)
        elif key in self._waits:
            self._changed[key] = None
        else:
            self._changed.pop(key, None)
            return
        self._tell_in(0.0 if opened and run is not None and (run.locks or wait.told) else TELL_AFTER)

    def _tell_in(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        if self._telling is not None:
            if self._due <= due:
                return
            self._telling.cancel()
        self._due = due
        self._telling = loop.call_at(due, self._tell)

    def _tell(self) -> None:
        self._telling = None
        changed, self._changed = self._changed, {}
        begun: list[list[Any]] = []
        over: list[_Key] = []
        again: set[str] = set()
        for key, one in changed.items():
            if one is None:
                self._waits.pop(key, None)
                over.append(key)
                continue
            waits, wait = one
            if not self._stuck(waits):
                continue  # told when what else goes on is over
            if wait.kind == LOCK or key in self._waits:
                again.add(waits.task_id)
            else:
                self._waits[key] = one
                begun.append([*key, wait.need or len(wait.targets), [[wait.kind, target] for target in wait.targets]])
        if begun or over or again:
            self._post("waits", {"replica": self._owner.id, "set": begun, "clear": over, "check": sorted(again)})
            self._schedule()

    def _tell_all(self) -> None:
        """Tell every wait again."""
        self._changed = {**self._waits, **self._changed}
        self._waits = {}
        self._tell_in(0.0)

    def _post(self, operation: str, body: Mapping[str, Any]) -> None:
        self._asks.flush()  # what was asked before arrives before
        try:
            self._owner.broker.send(subjects.coord(operation, self._owner.agent.name), json.dumps(body).encode())
        except BrokerError as error:
            log.debug("%s stays untold: %s", operation, error)


def _cycle(told: Any) -> tuple[CycleEdge, ...]:
    return tuple(CycleEdge(*map(str, edge)) for edge in told)


def _id(wait: Wait) -> str:
    """How the coordinator calls a wait: the request for a lock by its id."""
    return wait.key if wait.kind == LOCK else str(wait.id)
