"""What running a task and taking its inputs need of the replica that owns it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from weft.core.broker import Broker, Delivered
from weft.host.agent import Agent
from weft.host.pace import Paces
from weft.host.run import Run, Work
from weft.host.slots import SlotHold, Slots
from weft.host.waits import Observer
from weft_protocols.records import Claim, Control


@dataclass(slots=True)
class Counters:
    """What a replica did since it started."""

    done: int = 0
    failed: int = 0
    handed_back: int = 0
    last_progress: float = 0.0
    """Unix seconds of the last event, step or result."""


class Owner(Protocol):
    """A replica, as the code that works for it sees it."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def agent(self) -> Agent:
        """The agent it runs."""
        ...

    @property
    def broker(self) -> Broker:
        """Its connection."""
        ...

    @property
    def slots(self) -> Slots:
        """Room for running handlers."""
        ...

    @property
    def live(self) -> dict[str, Run]:
        """Tasks it owns now, by id."""
        ...

    @property
    def observers(self) -> list[Observer]:
        """Who is told of what its tasks wait for."""
        ...

    @property
    def controls(self) -> dict[str, Callable[[Control, Delivered], None]]:
        """Who takes a control message, by its `op`. Must not block."""
        ...

    @property
    def counters(self) -> Counters:
        """What it did so far."""
        ...

    @property
    def paces(self) -> Paces:
        """How long its agent's skills take."""
        ...

    @property
    def leaving(self) -> bool:
        """Whether its time to finish what runs is over."""
        ...

    def stop(self) -> None:
        """Drain and end."""
        ...

    def hold(self, ack: str) -> None:
        """Sign a delivery in progress until it is settled."""
        ...

    def settle(self, ack: str, answer: bytes = b"+ACK") -> None:
        """Acknowledge a delivery, or give another answer; an empty one only stops signing."""
        ...

    def again(self, ack: str, delay: float) -> None:
        """Have a delivery come again after `delay` seconds."""
        ...

    def read(self, subject: str, data: bytes, *, headers: bytes | None, sequence: int) -> Work | None:
        """What a creating message says; None where it is none."""
        ...

    def own(self, work: Work, claim: Claim, *, token: int, slot: SlotHold, delivery: str, fresh: bool = True) -> Run:
        """Begin to own a task under a claim that was stored."""
        ...

    async def begin_again(self, run: Run, *, said: str = "") -> Run | None:
        """Say that this replica goes on with a task; None where the task has ended."""
        ...

    def disown(self, run: Run) -> None:
        """Stop owning a task; what was delivered for it and is not settled comes again."""
        ...

    async def execute(self, run: Run) -> None:
        """Run a task to where it stops."""
        ...

    def background(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run something in the background."""
        ...
