"""The A2A v1 task state machine (A2A v1.0.1, section 4.1.3), as data.

States are the numbers of the protocol's `TaskState` enum, so that nothing is converted on the hot path.
"""

from __future__ import annotations

import enum
from typing import Final


class State(enum.IntEnum):
    """`lf.a2a.v1.TaskState`."""

    UNSPECIFIED = 0
    SUBMITTED = 1
    WORKING = 2
    COMPLETED = 3
    FAILED = 4
    CANCELED = 5
    INPUT_REQUIRED = 6
    REJECTED = 7
    AUTH_REQUIRED = 8

    @classmethod
    def _missing_(cls, value: object) -> State | None:
        # Protobuf enums are open: a newer peer's state must not break a reader.
        return cls.UNSPECIFIED if isinstance(value, int) else None

    @property
    def label(self) -> str:
        """Name as people and `Weft-State` write it: `input-required`."""
        return _LABELS[self]

    @property
    def terminal(self) -> bool:
        """Whether a task in this state has ended for good."""
        return self in TERMINAL

    @property
    def interrupted(self) -> bool:
        """Whether a task in this state waits for its caller."""
        return self in INTERRUPTED


TERMINAL: Final = frozenset({State.COMPLETED, State.FAILED, State.CANCELED, State.REJECTED})
INTERRUPTED: Final = frozenset({State.INPUT_REQUIRED, State.AUTH_REQUIRED})
_LABELS: Final = {state: state.name.lower().replace("_", "-") for state in State}
BY_LABEL: Final = {label: state for state, label in _LABELS.items()}
MESSAGE: Final = "message"
"""`Weft-State` of a task that was answered with a message alone, which ends it."""
END_LABELS: Final = frozenset({state.label for state in TERMINAL} | {MESSAGE})
"""`Weft-State` values after which no event follows."""

_ACTIVE: Final = frozenset({State.SUBMITTED, State.WORKING, *INTERRUPTED})
TRANSITIONS: Final[dict[State, frozenset[State]]] = {
    State.UNSPECIFIED: frozenset({State.SUBMITTED, State.WORKING, *INTERRUPTED, *TERMINAL}),
    State.SUBMITTED: frozenset({State.WORKING, *INTERRUPTED, *TERMINAL}),
    State.WORKING: frozenset({State.WORKING, *INTERRUPTED, *TERMINAL}),
    State.INPUT_REQUIRED: frozenset({State.WORKING, *INTERRUPTED, *TERMINAL}),
    State.AUTH_REQUIRED: frozenset({State.WORKING, *INTERRUPTED, *TERMINAL}),
    **{state: frozenset[State]() for state in TERMINAL},
}
"""Which state may follow which. Nothing follows a terminal state."""


def may_follow(before: State, after: State) -> bool:
    """Whether `after` is a legal successor of `before`."""
    return after in TRANSITIONS[before]


def accepts_messages(state: State) -> bool:
    """Whether a follow-up to a task in this state is legal; to a terminal task it is UnsupportedOperation."""
    return state in _ACTIVE or state is State.UNSPECIFIED
