"""The locks around a branch of a task: those in whose blocks it runs, here or in whoever began it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol


class Holding(Protocol):
    """A lock that is held."""

    def check(self) -> None:
        """Raise LockLost where it is not held any more."""
        ...


class Granting(Protocol):
    """Where locks are asked for and given back (`weft.host.session`)."""

    async def acquire(self, lock: Any) -> None:
        """Return when a `weft.host.locking.Lock` is granted."""
        ...

    def release(self, lock: Any) -> None:
        """Give it back."""
        ...


_AROUND: ContextVar[tuple[Holding, ...]] = ContextVar("weft_locks_around", default=())


def around() -> tuple[Holding, ...]:
    """The locks around this branch, the outermost first."""
    return _AROUND.get()


def enter(lock: Holding) -> None:
    """This branch, and those it begins, are in a lock's block from now on."""
    _AROUND.set((*_AROUND.get(), lock))


def leave(lock: Holding) -> None:
    """This branch is not in the lock's block any more."""
    _AROUND.set(tuple(one for one in _AROUND.get() if one is not lock))


def check() -> None:
    """Raise LockLost where a lock around this branch is lost. Costs next to nothing where there is none."""
    for lock in _AROUND.get():
        lock.check()
