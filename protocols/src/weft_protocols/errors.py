"""Every error Weft raises on purpose, as one tree.

::

    WeftError
    ├── UsageError                  the caller's input is wrong (also a ValueError)
    │   ├── InvalidName             an agent, caller, task or key name breaks the grammar
    │   ├── InvalidConfig           mesh.yaml, a card or an option is wrong
    │   └── StepChanged             a replayed step was called with another input
    ├── A2AError                    an error of the A2A specification, `code` and `reason` as data
    │   ├── TaskNotFound … VersionNotSupported
    ├── BrokerError                 the broker refused or did not answer
    │   ├── Unreachable             no connection, no responders, no leader      (retryable)
    │   ├── TimedOut                no answer before the deadline; outcome unknown (retryable)
    │   ├── Backpressure            a window or a stream is full; slow down      (retryable)
    │   ├── Conflict                a conditional write lost (10071, 10164)
    │   ├── Denied                  this identity may not do that
    │   ├── TooLarge                over the broker's message limit
    │   └── ApiError                any other JetStream error, `err_code` as data
    ├── Fenced                      a newer claim owns the task: this worker must stop
    ├── TaskEnded                   outcome of a task other than completed
    │   ├── TaskFailed, TaskRejected, TaskCanceled
    │   └── TaskInterrupted         it waits for input or authorisation
    ├── DeadlineExceeded            the deadline of a task, step or call passed
    │   └── LockTimeout             a lock was not granted within its `wait`
    ├── DeadlockError               chosen to break a deadlock; `cycle` names it       (retryable)
    ├── LockLost                    a lock's lease ended, or an operator released it          (retryable)
    ├── DelegationLoop              a chain of delegations is too long, or comes back  `kind`, `chain`
    ├── CircuitOpen                 calls to an agent fail, so none is made for now    (retryable)
    ├── ToolError                   a tool server, or the sidecar before it, answered with an error; `code` as data
    ├── Fail, Reject                raised by a handler: end the task as failed or rejected
    ├── AgentNotFound               no agent of that name on this mesh
    ├── PolicyNotFound              no policy of that version
    └── Unavailable                 a part of the mesh needed for this is not running

Whether trying again can help is the type: `retryable`. `exit_code` is what `mesh` ends with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final


class WeftError(Exception):
    """Root of all errors raised on purpose."""

    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1


class UsageError(WeftError, ValueError):
    """The caller's input is wrong; the message says what, where and what to do."""

    exit_code = 2


class InvalidName(UsageError):
    """A name breaks the subject grammar."""


class InvalidConfig(UsageError):
    """A configuration value is wrong."""


class StepChanged(UsageError):
    """A step that is already recorded was called again with another input."""


class BrokerError(WeftError):
    """The broker refused or did not answer."""


class Unreachable(BrokerError):
    """No connection, nobody serves the subject, or the stream has no leader."""

    retryable = True
    exit_code = 7


class TimedOut(BrokerError):
    """No answer before the deadline. The operation may have happened."""

    retryable = True
    exit_code = 7


class Backpressure(BrokerError):
    """A window or a stream is full."""

    retryable = True


class Conflict(BrokerError):
    """A conditional write was refused: somebody else wrote first."""


class Denied(BrokerError):
    """This identity may not do that."""

    exit_code = 6


class NotAuthenticated(BrokerError):
    """The broker does not know this identity (any more)."""

    exit_code = 4


class TooLarge(BrokerError):
    """The message is over the broker's limit."""

    exit_code = 2


class ApiError(BrokerError):
    """A JetStream error without a name of its own."""

    def __init__(self, message: str, *, code: int = 0, err_code: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.err_code = err_code


class Fenced(WeftError):
    """A newer claim owns the task: nothing more can be written under the old one."""


class DeadlineExceeded(WeftError):
    """The deadline of a task, a step or a call passed."""

    exit_code = 7


class LockTimeout(DeadlineExceeded):
    """A lock was not granted within its `wait`. Nothing is held."""


@dataclass(frozen=True, slots=True)
class CycleEdge:
    """One wait of a deadlock: a task, and what it waits for until `holder` lets go."""

    agent: str
    task: str
    kind: str
    """`lock`, `child`, `order` (an earlier task of the same context) or `approval`."""
    target: str
    """Name of the lock, else the id of the task waited for."""
    holder: str = ""
    """Id of the task that holds the lock; the target where that is a task."""

    def __str__(self) -> str:
        waits = {
            "lock": f"waits for lock {self.target!r}",
            "child": f"waits for its child {self.target}",
            "order": f"waits for its turn in its context, after {self.target}",
        }.get(self.kind, f"waits for {self.kind} {self.target}")
        held = f", held by {self.holder}" if self.holder not in ("", self.target) else ""
        return f"{self.agent}/{self.task} {waits}{held}"


class DeadlockError(WeftError):
    """This task was chosen to give way in a deadlock. What it held is released when its attempt ends."""

    retryable = True

    def __init__(self, message: str = "", *, cycle: tuple[CycleEdge, ...] = (), lasting: bool = False) -> None:
        text = "deadlock: " + "; ".join(str(edge) for edge in cycle)
        if lasting:
            text += (
                ". Another try would end the same, since who holds the lock waits for this task: ask for it with "
                "reentrant=True, or release it before delegating"
            )
        super().__init__(message or text)
        self.cycle = cycle
        """The waits in order: each one's holder is the next one's task, and the last leads to the first."""
        self.lasting = lasting
        """Whether another try would end the same: the lock is held by a task that delegated this one."""


class LockLost(WeftError):
    """A lock is not held any more: its lease ended or an operator released it. Stop what it protected.

    Another attempt of the task can take it again; nothing inside its block can.
    """

    retryable = True


class DelegationLoop(WeftError):
    """A delegation was not made because its chain would be too long or come back to where it was."""

    def __init__(self, message: str = "", *, kind: str = "", chain: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        """`hops`, `re-entry` or `repetition`."""
        self.chain = chain
        """The `agent/task` items of the chain, the root first."""


class CircuitOpen(WeftError):
    """Calls to an agent failed too often; none is made before `retry_after` seconds have passed."""

    retryable = True

    def __init__(self, message: str = "", *, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ToolError(WeftError):
    """What a tool server, or the sidecar before it, answered instead of a result."""

    def __init__(self, message: str = "", *, code: int = -32603, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        """JSON-RPC error code; those of the mesh are in `weft_protocols.mcp.CODES`."""
        self.data = data
        """What the error says to programs, any JSON value."""


class AgentNotFound(WeftError):
    """No agent of that name is on this mesh. HTTP has 404 for it."""

    exit_code = 5


class PolicyNotFound(WeftError):
    """No policy of that version is stored."""

    exit_code = 5


class Unavailable(WeftError):
    """A part of the mesh that is needed for this is not running."""

    retryable = True
    exit_code = 7


class Fail(WeftError):
    """Raised by a handler: end the task as failed, without another attempt."""


class Reject(WeftError):
    """Raised by a handler: end the task as rejected, without another attempt."""


class TaskEnded(WeftError):
    """A task ended, or stopped, other than completed."""

    def __init__(self, message: str, *, task_id: str = "", agent: str = "") -> None:
        super().__init__(message)
        self.task_id = task_id
        self.agent = agent


class TaskFailed(TaskEnded):
    """The task ended as failed."""


class TaskRejected(TaskEnded):
    """The agent rejected the task."""


class TaskCanceled(TaskEnded):
    """The task was cancelled."""


class TaskInterrupted(TaskEnded):
    """The task waits for input or authorisation."""


A2A_DOMAIN: Final = "a2a-protocol.org"


@dataclass(frozen=True, slots=True)
class ErrorSpec:
    """One error of the A2A specification and its form in every binding (A2A v1.0.1, section 5.4)."""

    name: str
    code: int
    """JSON-RPC error code."""
    reason: str
    """`google.rpc.ErrorInfo.reason`, and the value of the `A2A-Error` header."""
    http: int
    grpc: str


A2A_ERRORS: Final[dict[str, ErrorSpec]] = {
    spec.reason: spec
    for spec in (
        ErrorSpec("TaskNotFound", -32001, "TASK_NOT_FOUND", 404, "NOT_FOUND"),
        ErrorSpec("TaskNotCancelable", -32002, "TASK_NOT_CANCELABLE", 400, "FAILED_PRECONDITION"),
        ErrorSpec(
            "PushNotificationNotSupported", -32003, "PUSH_NOTIFICATION_NOT_SUPPORTED", 400, "FAILED_PRECONDITION"
        ),
        ErrorSpec("UnsupportedOperation", -32004, "UNSUPPORTED_OPERATION", 400, "FAILED_PRECONDITION"),
        ErrorSpec("ContentTypeNotSupported", -32005, "CONTENT_TYPE_NOT_SUPPORTED", 400, "INVALID_ARGUMENT"),
        ErrorSpec("InvalidAgentResponse", -32006, "INVALID_AGENT_RESPONSE", 500, "INTERNAL"),
        ErrorSpec(
            "ExtendedAgentCardNotConfigured", -32007, "EXTENDED_AGENT_CARD_NOT_CONFIGURED", 400, "FAILED_PRECONDITION"
        ),
        ErrorSpec("ExtensionSupportRequired", -32008, "EXTENSION_SUPPORT_REQUIRED", 400, "FAILED_PRECONDITION"),
        ErrorSpec("VersionNotSupported", -32009, "VERSION_NOT_SUPPORTED", 400, "FAILED_PRECONDITION"),
        ErrorSpec("ParseError", -32700, "PARSE_ERROR", 400, "INVALID_ARGUMENT"),
        ErrorSpec("InvalidRequest", -32600, "INVALID_REQUEST", 400, "INVALID_ARGUMENT"),
        ErrorSpec("MethodNotFound", -32601, "METHOD_NOT_FOUND", 404, "UNIMPLEMENTED"),
        ErrorSpec("InvalidParams", -32602, "INVALID_PARAMS", 400, "INVALID_ARGUMENT"),
        ErrorSpec("InternalError", -32603, "INTERNAL_ERROR", 500, "INTERNAL"),
        ErrorSpec("Unauthenticated", -32600, "UNAUTHENTICATED", 401, "UNAUTHENTICATED"),
        ErrorSpec("PermissionDenied", -32600, "PERMISSION_DENIED", 403, "PERMISSION_DENIED"),
    )
}
"""Every A2A error by its reason."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request (`google.rpc.BadRequest.FieldViolation`)."""

    field: str
    description: str


class A2AError(WeftError):
    """An error of the A2A specification. Subclasses exist for each; `from_reason` picks one."""

    reason: ClassVar[str] = "INTERNAL_ERROR"
    _by_reason: ClassVar[dict[str, type[A2AError]]] = {}

    def __init__(
        self,
        message: str = "",
        *,
        metadata: dict[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
    ) -> None:
        super().__init__(message or self.reason.replace("_", " ").lower())
        self.message = str(self)
        self.metadata = metadata or {}
        """`ErrorInfo.metadata`: names and values a program can act on."""
        self.violations = violations

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        A2AError._by_reason[cls.reason] = cls

    @property
    def spec(self) -> ErrorSpec:
        """Codes of this error in every binding."""
        return A2A_ERRORS[self.reason]

    @staticmethod
    def from_reason(
        reason: str,
        message: str = "",
        *,
        metadata: dict[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
    ) -> A2AError:
        """The error for a reason read off the wire; unknown reasons become InternalError."""
        cls = A2AError._by_reason.get(reason, InternalError)
        return cls(message, metadata=metadata, violations=violations)


class TaskNotFound(A2AError):
    """No such task, or not the caller's: the two are not told apart."""

    reason = "TASK_NOT_FOUND"
    exit_code = 5


class TaskNotCancelable(A2AError):
    """The task has ended already."""

    reason = "TASK_NOT_CANCELABLE"


class PushNotificationNotSupported(A2AError):
    """The agent does not push."""

    reason = "PUSH_NOTIFICATION_NOT_SUPPORTED"


class UnsupportedOperation(A2AError):
    """The operation is not possible in this state or on this agent."""

    reason = "UNSUPPORTED_OPERATION"


class ContentTypeNotSupported(A2AError):
    """The agent does not take this media type or encoding."""

    reason = "CONTENT_TYPE_NOT_SUPPORTED"


class InvalidAgentResponse(A2AError):
    """The agent answered with something that is not A2A."""

    reason = "INVALID_AGENT_RESPONSE"


class ExtendedAgentCardNotConfigured(A2AError):
    """The agent declares an extended card and has none."""

    reason = "EXTENDED_AGENT_CARD_NOT_CONFIGURED"


class ExtensionSupportRequired(A2AError):
    """The agent requires an extension the caller did not name."""

    reason = "EXTENSION_SUPPORT_REQUIRED"


class VersionNotSupported(A2AError):
    """The caller speaks an A2A version this side does not."""

    reason = "VERSION_NOT_SUPPORTED"


class ParseError(A2AError):
    """The bytes are not the announced encoding."""

    reason = "PARSE_ERROR"


class InvalidRequest(A2AError):
    """The request lacks what the binding requires."""

    reason = "INVALID_REQUEST"


class MethodNotFound(A2AError):
    """No such operation."""

    reason = "METHOD_NOT_FOUND"


class InvalidParams(A2AError):
    """A field is missing or wrong; `violations` names it."""

    reason = "INVALID_PARAMS"
    exit_code = 2


class InternalError(A2AError):
    """Something broke on the other side; details stay there."""

    reason = "INTERNAL_ERROR"


class Unauthenticated(A2AError):
    """The caller must authenticate."""

    reason = "UNAUTHENTICATED"
    exit_code = 4


class PermissionDenied(A2AError):
    """The caller is known and may not do this."""

    reason = "PERMISSION_DENIED"
    exit_code = 6


@dataclass(frozen=True, slots=True)
class JetStreamCode:
    """How a JetStream `err_code` is raised."""

    error: type[BrokerError]
    meaning: str = field(default="")


JETSTREAM_CODES: Final[dict[int, JetStreamCode]] = {
    10071: JetStreamCode(Conflict, "wrong last sequence"),
    10164: JetStreamCode(Conflict, "wrong last sequence, concurrent write"),
    10070: JetStreamCode(Conflict, "wrong last message id"),
    10077: JetStreamCode(Backpressure, "the stream is full"),
    10047: JetStreamCode(Backpressure, "the account's storage is used up"),
    10167: JetStreamCode(Backpressure, "too many requests to the stream"),
    10054: JetStreamCode(TooLarge, "message over the stream's limit"),
    10008: JetStreamCode(Unreachable, "JetStream is not available"),
    10009: JetStreamCode(Unreachable, "no leader in the cluster"),
    10076: JetStreamCode(Unreachable, "JetStream is shutting down or short of resources"),
    10118: JetStreamCode(Unreachable, "the stream is offline"),
    10039: JetStreamCode(Denied, "JetStream is not enabled for this account"),
}
"""JetStream codes with a name of their own; the rest become ApiError."""
