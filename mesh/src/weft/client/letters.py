"""Dead letters: tasks that were given up, and what to do about them. For the operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from weft.client.coordinator import CHANGE_TIMEOUT, TIMEOUT, DeadLetterInfo, _Told, call
from weft.core.broker import Broker

STATES: Final = ("open", "redriven", "discarded")
"""Of a dead letter; `open`: nobody has decided about it."""
RATE: Final = 10.0
"""Letters a second of a bulk redrive."""


@dataclass(frozen=True, slots=True)
class Which:
    """Which letters are meant. What is empty does not matter."""

    agent: str = ""
    reason: str = ""
    """Part of the reason or the error they were given up with."""
    since: int = 0
    """Unix milliseconds; only letters from then on."""

    @property
    def body(self) -> dict[str, Any]:
        """As a request has it."""
        return {"agent": self.agent, "reason": self.reason, "since": self.since}


@dataclass(frozen=True, slots=True)
class Redriven(_Told):
    """A letter whose message was sent anew."""

    task: str
    redriven_as: str
    """The new task."""
    n: int = 1
    """How often it was redriven."""
    repeated: bool = False
    """Whether that was done before this request."""


@dataclass(frozen=True, slots=True)
class Redrive(_Told):
    """A bulk redrive. Times are unix milliseconds."""

    job: int
    state: str = "running"
    """`running`, `done`, `stopped` or `failed`."""
    agent: str = ""
    reason: str = ""
    since: int = 0
    limit: int = 0
    rate: float = RATE
    started: int = 0
    ended: int = 0
    redriven: int = 0
    """Letters it has sent so far."""
    failed: int = 0
    failures: Sequence[Mapping[str, str]] = ()
    """Some of those it could not send: agent, task, why."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some dead letters."""

    letters: tuple[DeadLetterInfo, ...]
    total: int
    """How many fit."""
    next: int
    """What `after` of the next page is; 0 on the last."""


async def letters(
    broker: Broker,
    which: Which | None = None,
    *,
    state: str = "",
    limit: int = 100,
    after: int = 0,
    timeout: float = CHANGE_TIMEOUT,
) -> Page:
    """Dead letters, the newest first, at most `limit` (up to 1000); `state` is one of `STATES`.

    Raises:
        PermissionDenied: not as the operator.
        Unavailable: no coordinator leads.
    """
    body = {**(which or Which()).body, "state": state, "limit": limit, "after": after}
    answer = await call(broker, "dead-letters", body, timeout=timeout)
    return Page(tuple(DeadLetterInfo.of(one) for one in answer["dead_letters"]), answer["total"], answer["next"])


async def letter(broker: Broker, task: str, *, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Everything about one letter: its message's parts, metadata, chain, last events. TaskNotFound if it has none."""
    told: dict[str, Any] = (await call(broker, "dead-letter", {"task": task}, timeout=timeout))["letter"]
    return told


async def redrive(
    broker: Broker, tasks: Sequence[str], *, again: bool = False, rate: float = RATE, timeout: float = CHANGE_TIMEOUT
) -> tuple[Redriven, ...] | Redrive:
    """Send the messages of these letters anew, as their callers. More than 20 are a job, which goes on by itself.

    Repeating the call sends nothing twice; `again` sends letters that were redriven or discarded before once more.

    Raises:
        TaskNotFound: one of the tasks has no letter, or its message is not stored any more.
        Conflict: it was discarded, or the task of the last redrive has not ended.
    """
    answer = await call(broker, "redrive", {"tasks": list(tasks), "again": again, "rate": rate}, timeout=timeout)
    if "job" in answer:
        return Redrive.of(answer)
    return tuple(Redriven.of(one) for one in answer["redriven"])


async def redrive_all(
    broker: Broker, which: Which, *, limit: int = 100_000, rate: float = RATE, timeout: float = CHANGE_TIMEOUT
) -> Redrive:
    """Begin to redrive every open letter that fits, at most `limit`, `rate` a second; not those that come later."""
    body = {**which.body, "limit": limit, "rate": rate, "all": which == Which()}
    return Redrive.of(await call(broker, "redrive", body, timeout=timeout))


async def redrives(broker: Broker, *, timeout: float = TIMEOUT) -> tuple[Redrive, ...]:
    """The bulk redrives that run and the last ones that ended, the last one first."""
    return tuple(Redrive.of(one) for one in (await call(broker, "redrives", timeout=timeout))["redrives"])


async def stop(broker: Broker, job: int, *, timeout: float = TIMEOUT) -> Redrive:
    """End a bulk redrive; what it sent stays sent."""
    return Redrive.of(await call(broker, "redrive-stop", {"job": job}, timeout=timeout))


async def discard(
    broker: Broker,
    tasks: Iterable[str] = (),
    *,
    which: Which | None = None,
    reason: str,
    timeout: float = CHANGE_TIMEOUT,
) -> int:
    """Decide, for a reason, that nothing is done about these letters, or every open one that fits; how many."""
    body: dict[str, Any] = {"tasks": list(tasks), "reason": reason}
    if which is not None:
        body |= {**which.body, "matching": which.reason, "reason": reason, "all": which == Which()}
    return int((await call(broker, "discard", body, timeout=timeout))["discarded"])
