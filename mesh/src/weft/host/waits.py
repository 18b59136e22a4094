"""What the branches of one task wait for, in one place.

A handler may do several things at once: each thing that waits says what for, each thing that works says so too. So it
is known when a task only waits, for what, and since when; whoever has to know is told of each wait as it begins
and ends.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from weft.host import held
from weft_protocols.errors import CycleEdge, DeadlockError

Kind = Literal["child", "timer", "answer", "approval", "lock", "order"]
PARKABLE: Final = frozenset(("child", "timer", "answer", "approval"))
"""What a task can wait for while it is not in memory."""
_NUMBERS = itertools.count(1)


@dataclass(frozen=True, slots=True, eq=False)
class Together:
    """Branches that do nothing but wait, so that the task need not go on before enough of them can."""

    size: int
    need: int


_TOGETHER: ContextVar[Together | None] = ContextVar("weft_waits_together", default=None)


@dataclass(slots=True, eq=False)
class Wait:
    """One thing a task waits for."""

    id: int
    """Number of the wait; no other of this process has it."""
    kind: Kind
    targets: tuple[str, ...]
    """Whom it waits for: ids of tasks for `child` and `order`, names for `lock`, the id for `approval`; else nobody."""
    need: int
    """How many of the targets must end; 0 for all."""
    key: str
    """Journal key of what is waited for; empty for what has none."""
    until: float | None
    """Unix seconds at which it ends by itself; None for never."""
    asked: int = 0
    """Of an `answer`: stream sequence of the question's record. What was sent before it is no answer."""
    together: Together | None = None
    """The branches it is one of."""
    seen: dict[str, int] = field(default_factory=dict)
    """Of a `child`: number of the last event of each target whose question is known here already."""
    around: tuple[held.Holding, ...] = field(default_factory=held.around)
    """Locks that are held as long as it lasts."""
    branch: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    """Who waits."""
    told: bool = False
    """Whether its observers were told of it before."""
    cycle: tuple[CycleEdge, ...] = ()
    """The deadlock in which it gives way; empty where it does not."""

    def give_way(self, cycle: tuple[CycleEdge, ...]) -> None:
        """End it with DeadlockError."""
        if not self.cycle and self.branch is not None:
            self.cycle = cycle
            self.branch.cancel("deadlock")


class Observer(Protocol):
    """Is told of every wait of every task of a replica. Must not block or raise."""

    def __call__(self, waits: Waits, wait: Wait, opened: bool) -> None:
        """`wait` began, or ended. Told again of one that goes on when nothing else of its task does."""
        ...


class Waits:
    """The waits of one task on one replica.

    Args:
        task_id: The task.
        observers: Told of each wait. The sequence is the replica's own: what is added to it later counts as well.
    """

    def __init__(self, task_id: str, *, observers: Sequence[Observer] = ()) -> None:
        self.task_id = task_id
        self.changes = 0
        """How often something began or ended."""
        self.since = 0.0
        """The loop's time of the last change."""
        self._observers = observers
        self._open: dict[int, Wait] = {}
        self._working = 0
        self._kept = 0

    @contextmanager
    def open(
        self,
        kind: Kind,
        targets: tuple[str, ...] = (),
        *,
        need: int = 0,
        key: str = "",
        until: float | None = None,
    ) -> Iterator[Wait]:
        """Inside, a branch of the task waits for `need` (0: all) of `targets`, at most until `until`.

        Raises:
            DeadlockError: the coordinator chose this wait to give way; what was inside was cancelled.
        """
        wait = Wait(next(_NUMBERS), kind, targets, need, key, until, together=_TOGETHER.get())
        before = wait.branch.cancelling() if wait.branch is not None else 0
        self._open[wait.id] = wait
        self._tell(wait, opened=True)
        try:
            yield wait
        except asyncio.CancelledError:
            if wait.cycle and wait.branch is not None and wait.branch.uncancel() <= before:
                raise DeadlockError(cycle=wait.cycle) from None
            raise
        finally:
            del self._open[wait.id]
            self._tell(wait, opened=False)

    @contextmanager
    def together(self, size: int, need: int) -> Iterator[None]:
        """Inside, `size` branches are begun that only wait for one child each; with `need` of them the task goes on."""
        token = _TOGETHER.set(Together(size, need))
        try:
            yield
        finally:
            _TOGETHER.reset(token)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, a branch of the task does something that would have to be done again."""
        self._working += 1
        self.touch()
        try:
            yield
        finally:
            self._working -= 1
            self._settled()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, the task stays in memory whatever it waits for, as whoever holds a lock does."""
        self._kept += 1
        self.touch()
        try:
            yield
        finally:
            self._kept -= 1
            self._settled()

    @property
    def idle(self) -> bool:
        """Whether the task does nothing but wait."""
        return bool(self._open) and not self._working

    @property
    def parkable(self) -> bool:
        """Whether it does nothing but wait, and every wait goes on when it is not in memory."""
        return self.idle and not self._kept and all(wait.kind in PARKABLE for wait in self._open.values())

    @property
    def all(self) -> tuple[Wait, ...]:
        """What it waits for now, the longest wait first."""
        return tuple(self._open.values())

    def touch(self) -> None:
        """Something changed: whoever decided on what was before decides again."""
        self.changes += 1
        self.since = asyncio.get_running_loop().time()

    def _settled(self) -> None:
        """Something other than a wait is over: what is left may be waits only."""
        self.touch()
        if self._open and not self._working:
            for wait in self.all:
                for observer in self._observers:
                    observer(self, wait, True)

    def _tell(self, wait: Wait, *, opened: bool) -> None:
        self.touch()
        for observer in self._observers:
            observer(self, wait, opened)
        wait.told = True
