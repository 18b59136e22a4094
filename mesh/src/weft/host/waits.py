"""What a task waits for, as the coordinator hears of it: it looks for waits that go in a circle.

A wait is told only while nothing else of the task runs, because a task with a branch that goes on is not stuck.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from weft_protocols.errors import CycleEdge, DeadlockError

if TYPE_CHECKING:
    from weft.host.run import Run

LOCK: Final = "lock"
CHILD: Final = "child"
ORDER: Final = "order"
OUTSIDE: Final = "outside"
"""Something that nobody in the mesh can hold up: an answer, a time. Whoever waits for it is not stuck."""


class Holding(Protocol):
    """A lock that a branch of a task holds."""

    def check(self) -> None:
        """Raise LockLost where it is not held any more."""
        ...


_AROUND: ContextVar[tuple[Holding, ...]] = ContextVar("weft_locks_around", default=())


def around() -> tuple[Holding, ...]:
    """The locks in whose blocks this branch of its task is, the outermost first."""
    return _AROUND.get()


def enter(lock: Holding) -> None:
    """This branch, and those it begins, are in a lock's block from now on."""
    _AROUND.set((*_AROUND.get(), lock))


def leave(lock: Holding) -> None:
    """This branch is not in the lock's block any more."""
    _AROUND.set(tuple(one for one in _AROUND.get() if one is not lock))


def check_locks() -> None:
    """Raise LockLost where a lock around this branch is lost. Costs nothing where there is none."""
    for lock in _AROUND.get():
        lock.check()


class Reporter(Protocol):
    """Where a replica's waits are told."""

    def wait_changed(self, run: Run, wait_id: str, *, urgent: bool) -> None:
        """A wait began, ended, or is the only thing left of its task."""
        ...


@dataclass(slots=True, eq=False)
class Wait:
    """One wait of one branch."""

    kind: str
    targets: tuple[str, ...]
    """Ids of tasks, or names of locks."""
    need: int
    """How many of them have to end."""
    around: tuple[Holding, ...]
    """Locks that are held as long as the wait lasts."""
    branch: asyncio.Task[object] | None
    cycle: tuple[CycleEdge, ...] = ()
    """Set when the coordinator chose this wait to give way."""


class Waits:
    """The waits of one task."""

    __slots__ = ("_count", "_reporter", "_run", "open", "still")

    def __init__(self, run: Run, reporter: Reporter) -> None:
        self.open: dict[str, Wait] = {}
        self.still = 0
        """Of what keeps the task busy: waits, and locks that are held."""
        self._run = run
        self._reporter = reporter
        self._count = 0

    @property
    def stuck(self) -> bool:
        """Whether nothing of the task goes on until one of its waits ends, as far as a replica can see.

        A branch in the block of a lock counts as going on where no wait is inside that block.
        """
        run = self._run
        if not self.open or run.busy > self.still or run.stop is not None or run.ended:
            return False
        waited_in = {id(lock) for wait in self.open.values() for lock in wait.around}
        return all(id(lock) in waited_in for lock in run.locks)

    def set(self, wait_id: str, kind: str, targets: Iterable[str], *, need: int = 1) -> Wait:
        """A branch begins to wait."""
        wait = Wait(kind, tuple(targets), need, around(), asyncio.current_task())
        self.open[wait_id] = wait
        if kind != LOCK:  # of those the coordinator knows
            self._reporter.wait_changed(self._run, wait_id, urgent=bool(self._run.locks))
        return wait

    def clear(self, wait_id: str) -> None:
        """It does not wait any more."""
        wait = self.open.pop(wait_id, None)
        if wait is not None and wait.kind != LOCK:
            self._reporter.wait_changed(self._run, wait_id, urgent=False)

    def settled(self) -> None:
        """Something else of the task is over: what is left may be waits only."""
        if self.open and self._run.busy <= self.still:
            for wait_id in self.open:
                self._reporter.wait_changed(self._run, wait_id, urgent=True)

    @contextmanager
    def waiting_for(self, kind: str, *targets: str, need: int = 1, wait_id: str = "") -> Iterator[Wait]:
        """Wait inside for at least `need` of the targets; the branch counts as busy already.

        Raises:
            DeadlockError: this wait is part of a deadlock and was chosen to give way; the body was cancelled.
        """
        task = asyncio.current_task()
        cancelled = task.cancelling() if task is not None else 0
        self._count += 1
        name = wait_id or f"{self._run.fence.token}-{self._count}"
        wait = self.set(name, kind, targets, need=need)
        self.still += 1
        try:
            yield wait
        except asyncio.CancelledError:
            if wait.cycle and task is not None and task.uncancel() <= cancelled:
                raise DeadlockError(cycle=wait.cycle) from None
            raise
        finally:
            self.still -= 1
            self.clear(name)

    def give_way(self, wait_id: str, cycle: tuple[CycleEdge, ...]) -> None:
        """Have a wait raise DeadlockError, if it goes on."""
        wait = self.open.get(wait_id)
        if wait is not None and not wait.cycle and wait.branch is not None:
            wait.cycle = cycle
            wait.branch.cancel("deadlock")
