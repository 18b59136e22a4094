"""Weft: run AI agents as independent services over a durable broker.

Names are imported when first used, so that `import weft` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft._lazy import lazy

if TYPE_CHECKING:
    from weft.client.mesh import Handle, Mesh, connect
    from weft.client.reads import Page
    from weft.client.watch import Event
    from weft.host.agent import Agent
    from weft.host.approving import Approval
    from weft.host.breaker import BreakerPolicy
    from weft.host.locking import Lock
    from weft.host.retry import RetryPolicy, StepOptions
    from weft.host.steps import current_idempotency_key
    from weft.host.task import Task
    from weft.host.tools import ToolResult
    from weft_protocols.errors import (
        A2AError,
        AgentNotFound,
        Backpressure,
        CircuitOpen,
        DeadlineExceeded,
        DeadlockError,
        DelegationLoop,
        Fail,
        LockLost,
        LockTimeout,
        Reject,
        TaskCanceled,
        TaskEnded,
        TaskFailed,
        TaskInterrupted,
        TaskNotFound,
        TaskRejected,
        ToolError,
        Unavailable,
        Unreachable,
        WeftError,
    )
    from weft_protocols.parts import Artifact, Data, File, Message, TaskView, Text
    from weft_protocols.states import State

__version__ = "0.1.0"

_HOME = {
    "weft.client.mesh": ("Handle", "Mesh", "connect"),
    "weft.client.reads": ("Page",),
    "weft.client.watch": ("Event",),
    "weft.host.agent": ("Agent",),
    "weft.host.approving": ("Approval",),
    "weft.host.breaker": ("BreakerPolicy",),
    "weft.host.locking": ("Lock",),
    "weft.host.retry": ("RetryPolicy", "StepOptions"),
    "weft.host.steps": ("current_idempotency_key",),
    "weft.host.task": ("Task",),
    "weft.host.tools": ("ToolResult",),
    "weft_protocols.errors": (
        "A2AError",
        "AgentNotFound",
        "Backpressure",
        "CircuitOpen",
        "DeadlineExceeded",
        "DeadlockError",
        "DelegationLoop",
        "Fail",
        "LockLost",
        "LockTimeout",
        "Reject",
        "TaskCanceled",
        "TaskEnded",
        "TaskFailed",
        "TaskInterrupted",
        "TaskNotFound",
        "TaskRejected",
        "ToolError",
        "Unavailable",
        "Unreachable",
        "WeftError",
    ),
    "weft_protocols.parts": ("Artifact", "Data", "File", "Message", "TaskView", "Text"),
    "weft_protocols.states": ("State",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "A2AError",
    "Agent",
    "AgentNotFound",
    "Approval",
    "Artifact",
    "Backpressure",
    "BreakerPolicy",
    "CircuitOpen",
    "Data",
    "DeadlineExceeded",
    "DeadlockError",
    "DelegationLoop",
    "Event",
    "Fail",
    "File",
    "Handle",
    "Lock",
    "LockLost",
    "LockTimeout",
    "Mesh",
    "Message",
    "Page",
    "Reject",
    "RetryPolicy",
    "State",
    "StepOptions",
    "Task",
    "TaskCanceled",
    "TaskEnded",
    "TaskFailed",
    "TaskInterrupted",
    "TaskNotFound",
    "TaskRejected",
    "TaskView",
    "Text",
    "ToolError",
    "ToolResult",
    "Unavailable",
    "Unreachable",
    "WeftError",
    "connect",
    "current_idempotency_key",
]


__getattr__, __dir__ = lazy(globals(), _WHERE)
