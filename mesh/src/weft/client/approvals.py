"""Approvals as operators see them: what waits for a person, what was decided, and deciding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from weft.client.coordinator import TIMEOUT, _Told, call
from weft.core.broker import Broker

SIDECAR: Final = "sidecar"
"""Caller of a sidecar's requests."""
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
class ToolCall:
    """A call of a tool, as far as an approval is bound to it. With any of it changed, persons are asked anew."""

    agent: str
    """Who calls."""
    server: str
    tool: str
    arguments: str
    """SHA-256 of the arguments in canonical JSON, hex."""
    definition: str
    """Digest of the tool's definition."""
    policy: str = ""
    """Version of the policy."""
    task: str = ""
    """Of the caller; empty for none. Its end withdraws the approval."""
    key: str = ""
    """Of the step that makes the call: with one, other arguments in the same step void what was approved."""


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


# For sidecars --------------------------------------------------------------------------------------


async def ask(
    broker: Broker,
    wanted: ToolCall,
    *,
    title: str,
    needs: Sequence[tuple[str, int]],
    risk: str = "",
    details: Mapping[str, Any] | None = None,
    expires: float = 86_400.0,
    timeout: float = TIMEOUT,
) -> ApprovalInfo:
    """Ask for the approval of a call on behalf of its agent, or see how it stands: repeating it asks nobody anew.

    Args:
        broker: a sidecar's connection, in account MESH.
        wanted: the call.
        title: what it does, for people.
        needs: roles, and how many persons of each; an empty role is any approver.
        risk: `low`, `medium`, `high` or `critical`.
        details: what people are shown of it, such as the arguments without secrets; JSON values up to 16 KB.
        expires: seconds after which it counts as refused, and after which it cannot be used.
        timeout: seconds the answer may take.

    Raises:
        InvalidParams: a field is wrong, or the agent has no such task.
        Fenced: the task has ended.
        Unavailable: no coordinator leads; nothing was asked.
    """
    body = {**asdict(wanted), "title": title, "needs": [list(one) for one in needs], "risk": risk, "expires": expires}
    body["details"] = dict(details or {})
    return ApprovalInfo.of(await call(broker, "approval-request", body, caller=SIDECAR, timeout=timeout))


async def use(broker: Broker, id: str, wanted: ToolCall, *, by: str, timeout: float = TIMEOUT) -> str:
    """Use an approval for exactly this call, once: empty if the call may be made now, else why it must not be.

    `by` is a token that no other call has; repeating a use with it, when its answer was lost, has the same answer.

    Raises Unavailable while no coordinator leads: then the call must not be made either.
    """
    told = await call(broker, "approval-use", {**asdict(wanted), "id": id, "by": by}, caller=SIDECAR, timeout=timeout)
    return "" if told["used"] is True else str(told["why"]) or "it was refused"


async def give_back(broker: Broker, id: str, *, by: str, timeout: float = TIMEOUT) -> bool:
    """The call for which `by` used an approval was not made: it can be used again. Whether `by` had used it.

    Raises Unavailable while no coordinator leads.
    """
    told = await call(broker, "approval-return", {"id": id, "by": by}, caller=SIDECAR, timeout=timeout)
    return told["returned"] is True
