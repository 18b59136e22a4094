"""The coordinator's own operations, for hosts and operators: registration, presence, views, accounts.

None of it is on the way of a task: without a coordinator every call raises `Unavailable`, and tasks go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Self

from weft.core.broker import Broker
from weft_protocols import errors, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2AError, TimedOut, Unavailable, Unreachable, WeftError

TIMEOUT: Final = 5.0
"""Seconds an answer may take."""
CHANGE_TIMEOUT: Final = 25.0
"""Seconds a change of accounts or consumers may take."""


class _Told:
    """A dataclass made from JSON: unknown fields are ignored, absent ones take their default."""

    __slots__ = ()

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """The value in a JSON object."""
        known = {one.name for one in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in told.items() if name in known})


@dataclass(frozen=True, slots=True)
class Registration:
    """What a replica says of itself when it starts."""

    agent: str
    version: str
    replica: str
    pid: int
    slots: int
    """Tasks it works on at a time."""
    description: str = ""
    skills: Sequence[Mapping[str, Any]] = ()
    """Objects with id, name, description, tags, examples, schema, as `Agent.describe` gives them."""
    host: str = ""
    code_digest: str = ""
    """Digest of the agent's code: two live replicas of one version must agree on it."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A replica's sign of life, every 2 s. After 6 s without one it counts as stale, after 60 s as gone."""

    replica: str
    state: str = "ready"
    """`ready` or `draining`."""
    active: int = 0
    """Tasks it owns."""
    waiting: int = 0
    """Of these, the ones that hold no slot."""
    slots: int = 0
    done: int = 0
    failed: int = 0
    last_progress: int = 0
    """Unix milliseconds of the last event, step or result; 0 for none."""
    stalled: Sequence[tuple[str, int, str]] = ()
    """Tasks that made no progress in time: task id, unix milliseconds of the last, what it is at."""


@dataclass(frozen=True, slots=True)
class ReplicaInfo(_Told):
    """A replica as the coordinator sees it. Times are unix milliseconds."""

    replica: str
    version: str = ""
    code_digest: str = ""
    pid: int = 0
    host: str = ""
    state: str = ""
    """`ready`, `draining`, `stale`, or `unknown` until it is heard of after a restart of the coordinator."""
    slots: int = 0
    active: int = 0
    waiting: int = 0
    done: int = 0
    failed: int = 0
    last_progress: int = 0
    last_seen: int = 0
    registered: int = 0


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """An agent as the coordinator sees it."""

    name: str
    version: str
    description: str
    skills: tuple[Mapping[str, Any], ...]
    state: str
    """The best of its replicas' states; `offline` if there are none."""
    ready: int
    """Replicas that are ready."""
    replicas: tuple[ReplicaInfo, ...] = ()
    """For the operator only."""

    @staticmethod
    def of(told: Mapping[str, Any]) -> AgentInfo:
        """The agent in a JSON object."""
        return AgentInfo(
            told["name"],
            told["version"],
            told["description"],
            tuple(told["skills"]),
            told["state"],
            told["ready"],
            tuple(ReplicaInfo.of(one) for one in told.get("replicas", ())),
        )


@dataclass(frozen=True, slots=True)
class DeadLetterInfo(_Told):
    """A task that was given up. Times are unix milliseconds."""

    task: str
    agent: str
    caller: str
    context: str = ""
    reason: str = ""
    error: str = ""
    attempts: int = 0
    replica: str = ""
    version: str = ""
    message: int = 0
    """Stream sequence of the creating message."""
    at: int = 0
    state: str = "open"
    """`open`, `redriven` or `discarded`."""
    redriven_as: str = ""
    """The task of its last redrive."""
    redrives: int = 0
    discarded_because: str = ""
    time: int = 0
    """When it was given up."""


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the coordinator that answered, and of what it sees."""

    coordinator: str
    pid: int
    started: int
    """Unix milliseconds."""
    ready_after: float
    """Seconds it took to read everything stored."""
    tasks: int
    states: Mapping[str, int]
    """Number of tasks by state label."""
    dead_letters: int
    drift: tuple[str, ...]
    """Where streams and consumers are not as specified."""
    agents: tuple[AgentInfo, ...]
    raw: Mapping[str, Any] = field(repr=False, default_factory=dict)
    """Everything it told."""


async def call(
    broker: Broker,
    operation: str,
    body: Mapping[str, Any] | None = None,
    *,
    caller: str = "",
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """One operation of the coordinator, as `caller` (default: the connection's identity).

    Raises:
        Unavailable: no coordinator answers within `timeout` seconds.
        WeftError: the typed error it answered with.
    """
    subject = subjects.coord(operation, caller or broker.settings.identity)
    try:
        reply = await broker.request(subject, json.dumps(body or {}).encode(), timeout=timeout)
    except (Unreachable, TimedOut) as error:
        raise unanswered(operation, error) from error
    return answered(operation, reply.data, reply.headers)


def unanswered(operation: str, error: WeftError) -> Unavailable:
    """What it means that nobody answered."""
    return Unavailable(
        f"{operation} got no answer: no coordinator runs, leads or is new enough, or none is reachable ({error}); "
        "see: mesh ps"
    )


def answered(operation: str, data: bytes, headers: bytes | None) -> dict[str, Any]:
    """The answer in a reply. Raises the typed error it may be; Unavailable if it is none."""
    try:
        answer: dict[str, Any] = json.loads(data)
        error = error_in(answer, h.get(headers, b"A2A-Error"))
    except (ValueError, AttributeError):
        raise Unavailable(f"{operation}: the coordinator's answer is not understood: another version?") from None
    if error is not None:
        raise error
    return answer


def error_in(answer: Mapping[str, Any], reason: bytes | None = None) -> WeftError | None:
    """The error that an answer is, as its own type, if it is one; `reason` is what its header says."""
    told = answer.get("error")
    return _error(told, reason) if told is not None else None


async def register(
    broker: Broker, registration: Registration | Mapping[str, Any], *, timeout: float = CHANGE_TIMEOUT
) -> None:
    """Make a replica known; when this returns, its agent's consumers exist. A mapping has a Registration's fields.

    Raises:
        Conflict: another live replica of this version runs other code.
        PermissionDenied, InvalidParams: not this agent, or a field is wrong.
        Unavailable: no coordinator answers; the replica can work all the same.
    """
    body = asdict(registration) if isinstance(registration, Registration) else registration
    await call(broker, "register", body, timeout=timeout)


async def heartbeat(
    broker: Broker, agent: str, sign: Heartbeat | Mapping[str, Any], *, timeout: float = TIMEOUT
) -> bool:
    """Give a replica's sign of life. False: the coordinator does not know the replica; register (again).

    A mapping has a Heartbeat's fields.
    """
    body = asdict(sign) if isinstance(sign, Heartbeat) else sign
    return bool((await call(broker, "heartbeat", body, caller=agent, timeout=timeout))["known"])


async def leave(broker: Broker, agent: str, replica: str, *, timeout: float = TIMEOUT) -> None:
    """Tell that a replica of an agent ended."""
    await call(broker, "leave", {"replica": replica}, caller=agent, timeout=timeout)


async def agents(broker: Broker, *, timeout: float = TIMEOUT) -> tuple[AgentInfo, ...]:
    """All registered agents by name; with their replicas for the operator."""
    answer = await call(broker, "agents", timeout=timeout)
    return tuple(AgentInfo.of(one) for one in answer["agents"])


async def status(broker: Broker, *, timeout: float = TIMEOUT) -> Status:
    """What the coordinator knows. Operator only, else PermissionDenied."""
    answer = await call(broker, "status", timeout=timeout)
    return Status(
        answer["coordinator"],
        answer["pid"],
        answer["started"],
        answer["ready_after"],
        answer["tasks"]["total"],
        answer["tasks"]["states"],
        answer["dead_letters"],
        tuple(answer["drift"]),
        tuple(AgentInfo.of(one) for one in answer["agents"]),
        answer,
    )


async def dead_letters(
    broker: Broker, *, limit: int = 100, timeout: float = TIMEOUT
) -> tuple[tuple[DeadLetterInfo, ...], int]:
    """The newest dead letters, at most `limit` (up to 1000), and how many there are. Operator only."""
    answer = await call(broker, "dead-letters", {"limit": limit}, timeout=timeout)
    return tuple(DeadLetterInfo.of(one) for one in answer["dead_letters"]), int(answer["total"])


async def schedules(broker: Broker, *, timeout: float = TIMEOUT) -> tuple[dict[str, Any], ...]:
    """What starts by the clock, by name: the fields of `mesh.yaml` and its times, unix milliseconds. Operator only.

    `next` and `last` are 0 where that is not known; `task` is the one that was last started, `since` when the schedule
    was made or changed.
    """
    return tuple((await call(broker, "schedules", timeout=timeout))["schedules"])


async def add(broker: Broker, name: str, *, kind: str = "agent", timeout: float = CHANGE_TIMEOUT) -> None:
    """Let an agent (or with `kind="caller"` a caller) connect, now and after restarts. Operator only.

    Raises:
        UnsupportedOperation: the broker's accounts are not files of the coordinator's machine.
        InvalidName: the name breaks the grammar or is taken.
    """
    await call(broker, "agent-add", {"name": name, "kind": kind}, timeout=timeout)


async def revoke(broker: Broker, name: str, *, timeout: float = CHANGE_TIMEOUT) -> None:
    """Cut an agent or a caller off for good, with every connection it has. Its tasks stay. Operator only."""
    await call(broker, "agent-revoke", {"name": name}, timeout=timeout)


def _error(told: Mapping[str, Any], reason: bytes | None) -> WeftError:
    """The error the coordinator answered with, as its own type."""
    message = str(told.get("message", ""))
    if reason is not None:
        return A2AError.from_reason(reason.decode(), message)
    kind = getattr(errors, str(told.get("type", "")), None)
    if isinstance(kind, type) and issubclass(kind, WeftError):
        return kind(message)
    return WeftError(message)
