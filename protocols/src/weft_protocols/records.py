"""What replicas write for each other: claims, step records, control messages. msgpack maps, short keys as written here.

Unknown keys are ignored and absent ones take their default, so that versions can differ during a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

import msgpack

from weft_protocols.errors import ParseError

HELD: Final = "held"
SUSPENDED: Final = "suspended"
HANDED_BACK: Final = "handed-back"

CHILDREN_KEY: Final = "_children"
DEAD_LETTER_KEY: Final = "_dead"
ANSWER_KEY: Final = "_ask"
ASKING_KEY: Final = "_asking"
ROUTE_KEY: Final = "_route"
GATHER_KEY: Final = "_gather"
ROLLBACK_KEY: Final = "_rollback"
UNDO_KEY: Final = "_undo"
SNAPSHOT_KEY: Final = "_task"
TIMER_KEY: Final = "_sleep"
APPROVAL_KEY: Final = "_approve"
APPROVING_KEY: Final = "_approving"
MESSAGE_KEY: Final = "_message"


class _Record:
    """msgpack form of a frozen dataclass."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def encode(self) -> bytes:
        """The record's bytes."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return bytes(msgpack.packb(values))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The record in `data`; ParseError if it is not one."""
        try:
            values: Any = msgpack.unpackb(data)
            return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})
        except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as error:
            raise ParseError(f"not a {cls.__name__} record: {error}") from error


@dataclass(frozen=True, slots=True)
class Claim(_Record):
    """A replica owns a task. The stream sequence of this record is the fencing token."""

    replica: str
    version: str
    attempt: int
    """1 for the first; hand-backs and resumes do not count."""
    caller: str
    origin: str
    context: str
    slice: str
    message: int
    """Stream sequence of the message that created the task, 0 if a cancel came before it."""
    delivery: str = ""
    """Acknowledgement subject of the delivery this claim works on: how to hand the work back."""
    state: str = HELD
    waiting: str = ""
    """Key of what a suspended task waits on: of a question, if there is one."""
    at: int = 0
    """Unix milliseconds, for people; nothing is decided on it."""
    gave_way: int = 0
    """Attempts that ended because the task was chosen to break a deadlock. They are handed back and do not count."""


@dataclass(frozen=True, slots=True)
class StepRecord(_Record):
    """A finished step. `value` is the encoded result, or `error` says why it failed for good."""

    key: str
    input: str
    """Digest of the step's input, so that a changed input on replay is noticed."""
    value: bytes = b""
    error: str = ""
    attempts: int = 1
    ms: int = 0
    """Duration of the body in milliseconds."""


@dataclass(frozen=True, slots=True)
class StoredMessage(_Record):
    """The creating message of a suspended task, so that any replica can run it again from the top."""

    data: bytes
    headers: bytes
    sequence: int
    context: str
    origin: str


@dataclass(frozen=True, slots=True)
class DeadLetter(_Record):
    """Why a task was given up after its attempts."""

    agent: str
    task: str
    caller: str
    reason: str
    error: str
    attempts: int
    replica: str
    version: str
    message: int
    """Stream sequence of the creating message, so that it can be redriven."""
    at: int


@dataclass(frozen=True, slots=True)
class PushJob(_Record):
    """A push notification config as it is stored, which is the job of delivering to it."""

    config: bytes
    """`lf.a2a.v1.TaskPushNotificationConfig`, with its id and its task's id."""
    series: str
    """Names the deliveries of one config from its creation to its deletion, through every change of it."""
    after: int = 0
    """Number of the event after which delivery begins."""


@dataclass(frozen=True, slots=True)
class PushCursor(_Record):
    """How far the delivery to a push notification config has come."""

    series: str
    """Of the job; a cursor of another series is left over from a config that was deleted."""
    n: int = 0
    """Number of the last event that was delivered."""
    at: int = 0
    """Stream sequence of the message that holds it; 0 for none."""
    ended: bool = False
    """Whether it was the task's last."""
    job: int = 0
    """Stream sequence of the job that `failures` and `since` are about."""
    failures: int = 0
    """Attempts at the next event that failed."""
    since: int = 0
    """Unix milliseconds of the first of these."""
    reason: str = ""
    """What the last of them failed with."""
    given_up: bool = False
    """Whether no further attempt is made."""


@dataclass(frozen=True, slots=True)
class Control(_Record):
    """A message on `mesh.ctl`: `input` hands a delivery over, `cancel` asks to stop, `drain` to finish and leave.

    `ping` asks nothing: its sender is told by the broker when nobody listens.
    `turn` says that a task of a context has ended for which another one may be waiting. `lock`, `deadlock`, `waiting?`
    and `resync` are a coordinator's, about locks and waits; their content is in `data`.
    """

    op: str
    subject: str = ""
    seq: int = 0
    delivery: str = ""
    headers: bytes = b""
    data: bytes = b""
    reason: str = ""
