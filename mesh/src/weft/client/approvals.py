"""Approvals as operators see them: what waits for a person, what was decided, and deciding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from weft.client.coordinator import TIMEOUT, _Told, call
from weft.core.broker import Broker

STATES: Final = ("pending", "approved", "denied", "expired", "withdrawn", "used")


@dataclass(frozen=True, slots=True)
class ApprovalInfo(_Told):
    """A request for an approval, and what became of it. Times are unix milliseconds, 0 for never."""

    id: str
    state: str
    """One of `STATES`."""
    kind: str
    """`task`: a handler asks; `tool`: a call of a tool waits for it."""
    agent: str
    title: str
    task: str = ""
    key: str = ""
    server: str = ""
    tool: str = ""
    digest: str = ""
    """SHA-256 of the arguments, or of the question."""
    definition: str = ""
    """Digest of the tool's definition."""
    policy: str = ""
    """Version of the policy that requires it."""
    details: Mapping[str, Any] = field(default_factory=dict)
    risk: str = ""
    needs: Sequence[tuple[str, int]] = ()
    """Roles and how many persons of each; an empty role is any approver."""
    open: Sequence[tuple[str, int]] = ()
    """What of that is still needed."""
    requester: str = ""
    """Who began the chain of delegations."""
    chain: Sequence[str] = ()
    """`agent/task`, the root first."""
    asked: int = 0
    expires: int = 0
    settled: int = 0
    used: int = 0
    decisions: Sequence[Mapping[str, Any]] = ()
    """Who, role, allow, reason, at."""
    why: str = ""
    """Why it is denied, expired or withdrawn."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some approvals."""

    approvals: tuple[ApprovalInfo, ...]
    """The one asked last first."""
    total: int
    """How many fit."""
    pending: int
    """How many wait for somebody, of all."""


async def approvals(
    broker: Broker,
    *,
    states: Sequence[str] = ("pending",),
    agent: str = "",
    role: str = "",
    limit: int = 100,
    timeout: float = TIMEOUT,
) -> Page:
    """Approvals in some states (none: in any), at most `limit` (up to 1000). An agent sees its own.

    Raises Unavailable while no coordinator leads.
    """
    body = {"states": list(states), "agent": agent, "role": role, "limit": limit}
    told = await call(broker, "approvals", body, timeout=timeout)
    return Page(tuple(ApprovalInfo.of(one) for one in told["approvals"]), told["total"], told["pending"])


async def approval(broker: Broker, id: str, *, timeout: float = TIMEOUT) -> ApprovalInfo:
    """One approval, by its id or the beginning of it. InvalidParams if there is none, or more than one."""
    return ApprovalInfo.of(await call(broker, "approval", {"id": id}, timeout=timeout))


async def decide(
    broker: Broker,
    id: str,
    *,
    who: str,
    allow: bool,
    reason: str = "",
    role: str = "",
    timeout: float = TIMEOUT,
) -> ApprovalInfo:
    """Record what a person, whom the operator vouches for, says; how the approval stands then. Operator only.

    Args:
        broker: a connection of the operator.
        id: of the approval, or the beginning of it.
        who: the person.
        allow: whether it may be done.
        reason: why; required to deny.
        role: as which of their roles; the first one that is needed if empty.
        timeout: seconds the answer may take.

    Raises:
        InvalidParams: there is no such approval.
        PermissionDenied: the person may not decide, or asked for it, directly or not.
        Conflict: it is settled, or the person has decided otherwise before.
    """
    body = {"id": id, "as": who, "allow": allow, "reason": reason, "role": role}
    return ApprovalInfo.of(await call(broker, "approval-decide", body, timeout=timeout))
