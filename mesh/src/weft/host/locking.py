"""Locks of a task: fenced leases that the coordinator grants."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import ExitStack
from hashlib import sha256
from types import TracebackType
from typing import Any, Final, Self

from weft.host import held
from weft.host.run import Run
from weft_protocols.errors import InvalidParams, LockLost, UsageError

EXCLUSIVE: Final = "exclusive"
SHARED: Final = "shared"
LEASE: Final = 30.0
"""Seconds a lock outlives its holder's last sign of life."""
MARGIN: Final = 0.05
"""Part of a lease that the holder does not count on: clocks may run at different speeds."""
MAX_NAMES: Final = 32
MAX_NAME: Final = 200
"""Characters of a lock's name."""
LOCK_KEY: Final = "_lock"


class Lock:
    """One lock, or several taken together; used with `async with`, once.

    Attributes:
        names: What is locked, sorted.
        mode: `exclusive` or `shared`.
    """

    def __init__(
        self,
        run: Run,
        names: tuple[str, ...],
        *,
        mode: str,
        wait: float | None,
        lease: float,
        reentrant: bool,
        priority: int,
    ) -> None:
        self.names = names
        self.mode = mode
        self.wait = wait
        self.lease = lease
        self.reentrant = reentrant
        self.priority = priority
        self.run = run
        self.request = _request(run, names, mode)
        self.claim = 0
        """Claim under which it was asked for."""
        self.granted = 0
        """The fencing token, 0 while it is not held."""
        self.promised = 0
        """The token it will have once `after`, a request of this replica, is given back; 0 where that is not known."""
        self.after = ""
        self.confirmed = 0.0
        """When the request was sent by whose answer the lease is known to run (monotonic)."""
        self.outcome: asyncio.Future[bool] | None = None
        """What becomes of a wait the coordinator knows of: granted, to be asked for again (False), or an error."""
        self.gone = ""
        """Why it was taken away."""
        self._session = run.session
        self._used = False
        self._inside = False
        self._kept = ExitStack()
        """Keeps the task in memory."""

    @property
    def token(self) -> int:
        """The fencing token: of two grants of a name, the later one's is the greater.

        Raises:
            LockLost: it is not held any more.
        """
        self.check()
        return self.granted

    @property
    def lost(self) -> bool:
        """Whether it is not held any more, or was never."""
        return bool(self._why_lost())

    def check(self) -> None:
        """Return if the lock is held. Raises LockLost: its lease ended, or it was taken away."""
        why = self._why_lost()
        if why:
            raise LockLost(f"lock {self} of task {self.run.task_id} is lost: {why}")

    def _why_lost(self) -> str:
        if self.gone:
            return self.gone
        if not self.granted:
            return "it is not held"
        if time.monotonic() > self.confirmed + self.lease * (1 - MARGIN):
            return f"its lease of {self.lease:g} s ended without a word from the coordinator"
        return ""

    def grant(self, token: int, lease: float, confirmed: float) -> None:
        """The coordinator granted it."""
        self.granted, self.lease, self.confirmed = token, lease, max(self.confirmed, confirmed)
        if self.outcome is not None and not self.outcome.done():
            self.outcome.set_result(True)

    def take_away(self, reason: str) -> None:
        """The coordinator took it away; the holder learns of it at its next use."""
        self.gone = reason or "the coordinator took it away"

    async def __aenter__(self) -> Self:
        if self._used:
            raise UsageError(f"lock {self} was used before: call task.lock(...) for every block")
        self._used = True
        await self._session.acquire(self)
        self.run.locks.append(self)
        self._kept.enter_context(self.run.waits.kept())
        self._inside = True
        held.enter(self)
        try:
            self.check()
        except LockLost:
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        why = self._why_lost()
        self._leave()
        if why and kind is None:
            raise LockLost(f"lock {self} of task {self.run.task_id} was lost inside its block: {why}")

    def _leave(self) -> None:
        held.leave(self)
        self.end()
        self._session.release(self)

    def end(self) -> None:
        """The block is left, or its task has ended."""
        if self._inside:
            self._inside = False
            self.run.locks.remove(self)
            self._kept.close()

    def __str__(self) -> str:
        return " + ".join(map(repr, self.names))


class Locking:
    """The part of `Task` that locks."""

    _run: Run

    def lock(
        self,
        *names: str | Iterable[str],
        mode: str = EXCLUSIVE,
        wait: float | None = 10.0,
        lease: float = LEASE,
        reentrant: bool = False,
        priority: int = 0,
    ) -> Lock:
        """Hold locks inside an `async with` block: all of the names, or none.

        Whoever asks first is served first. The lock is held as long as this replica gives signs of life, and is
        free at the end of the block, of the attempt, or `lease` seconds after the replica's last sign. Then
        entering or leaving the block, `lock.token`, `lock.check()` and every operation of the task inside the block
        raise LockLost. Give `lock.token` to what the lock protects, so that it can refuse a holder that is too late.
        A wait holds no slot. A task that holds a lock stays in memory, also while it asks a question.

        Args:
            names: What to lock, any text of up to 200 characters; agents agree on names.
            mode: `exclusive`, or `shared` among all who ask for `shared`.
            wait: Seconds to wait; None until the task's deadline, 0 to try once.
            lease: Seconds, at least 1.
            reentrant: Be let in where a task that delegated this one, directly or not, holds the lock.
            priority: The higher, the later it gives way in a deadlock where the mesh chooses by priority.

        Raises:
            LockTimeout: it was not granted within `wait`; nothing is held.
            DeadlockError: tasks wait for each other in a circle and this one was chosen to give way.
            LockLost: see above.
            InvalidParams: a name, the mode or a time is none.
        """
        wanted = _names(names)
        if mode not in (EXCLUSIVE, SHARED):
            raise InvalidParams(f"mode {mode!r} of lock {wanted} is unknown; use {EXCLUSIVE!r} or {SHARED!r}")
        if wait is not None and not wait >= 0:
            raise InvalidParams(f"wait of lock {wanted} is {wait}; use seconds, or None for no limit")
        if not 1.0 <= lease <= 3600.0:
            raise InvalidParams(f"lease of lock {wanted} is {lease}; use 1 to 3600 seconds")
        return Lock(
            self._run, wanted, mode=mode, wait=wait, lease=float(lease), reentrant=reentrant, priority=int(priority)
        )


def _names(given: tuple[str | Iterable[str], ...]) -> tuple[str, ...]:
    flat: list[Any] = [name for one in given for name in ((one,) if isinstance(one, str) else one)]
    for name in flat:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise InvalidParams(f"{name!r} is no name of a lock: use 1 to {MAX_NAME} printable characters")
    names = tuple(sorted(set(flat)))
    if not 0 < len(names) <= MAX_NAMES:
        raise InvalidParams(f"{len(names)} names of locks; one block takes 1 to {MAX_NAMES}")
    return names


def _request(run: Run, names: tuple[str, ...], mode: str) -> str:
    """Id of the request: the same on every attempt, so that the next one takes over what this one held."""
    key = run.journal.own_key(f"{LOCK_KEY} {mode} {' + '.join(names)}")
    return f"{run.task_id}-{sha256(key.encode()).hexdigest()[:16]}"
