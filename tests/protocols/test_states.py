"""Laws of the task state machine."""

import pytest
from a2a.types import a2a_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from weft_protocols import states
from weft_protocols.states import BY_LABEL, END_LABELS, INTERRUPTED, TERMINAL, State

STATES = st.sampled_from(State)


def test_states_are_the_protocols_own() -> None:
    assert {f"TASK_STATE_{s.name}": int(s) for s in State} == dict(pb.TaskState.items())


@given(STATES, STATES)
def test_nothing_follows_a_terminal_state(before: State, after: State) -> None:
    if before.terminal:
        assert not states.may_follow(before, after)


@given(STATES)
def test_every_live_state_can_end_in_each_way_and_go_on_working(state: State) -> None:
    if not state.terminal:
        assert states.TRANSITIONS[state] >= TERMINAL
        assert states.may_follow(state, State.WORKING)


@given(STATES)
def test_nothing_goes_back_to_before_the_beginning(state: State) -> None:
    assert not states.may_follow(state, State.UNSPECIFIED)
    assert not states.may_follow(state, State.SUBMITTED) or state is State.UNSPECIFIED


@given(st.lists(STATES, max_size=12))
def test_along_any_path_at_most_one_state_is_terminal_and_it_is_the_last(wanted: list[State]) -> None:
    path = [State.UNSPECIFIED]
    for state in wanted:
        if states.may_follow(path[-1], state):
            path.append(state)
    ends = [i for i, state in enumerate(path) if state.terminal]
    assert ends in ([], [len(path) - 1])


@given(STATES)
def test_a_state_takes_messages_exactly_while_something_can_follow(state: State) -> None:
    assert states.accepts_messages(state) == bool(states.TRANSITIONS[state])


def test_terminal_and_interrupted_states_are_apart() -> None:
    assert not TERMINAL & INTERRUPTED
    assert {s for s in State if s.terminal} == TERMINAL
    assert {s for s in State if s.interrupted} == INTERRUPTED


@given(STATES)
def test_a_label_names_one_state(state: State) -> None:
    assert BY_LABEL[state.label] is state
    assert (state.label in END_LABELS) == state.terminal
    assert states.MESSAGE in END_LABELS
    assert states.MESSAGE not in BY_LABEL


@pytest.mark.parametrize("number", [-1, 9, 99, 2**31 - 1])
def test_a_state_of_a_newer_protocol_is_unspecified(number: int) -> None:
    assert State(number) is State.UNSPECIFIED


def test_a_state_is_not_made_from_anything_else() -> None:
    with pytest.raises(ValueError, match="working"):
        State("working")  # type: ignore[arg-type]
