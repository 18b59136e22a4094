"""When a process is started again, when it is given up."""

import pytest

from weft.cli.supervisor.policy import Ended, History, RestartPolicy, describe

CRASH = Ended(code=1, ran=0.2, ready=None)
POLICY = RestartPolicy(jitter=0.0)


def pauses(history: History, ends: list[Ended], every: float = 1.0) -> list[float | None]:
    return [history.next_pause(end, now=i * every, chance=0.5) for i, end in enumerate(ends)]


def test_pauses_double_up_to_the_longest() -> None:
    ran = Ended(code=1, ran=20, ready=19)
    assert pauses(History(POLICY), [ran] * 9, every=30) == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_the_fifth_crash_within_a_minute_is_a_crash_loop() -> None:
    assert pauses(History(POLICY), [CRASH] * 5) == [0.5, 1, 2, 4, None]


def test_crashes_that_are_far_apart_are_no_crash_loop() -> None:
    assert None not in pauses(History(POLICY), [CRASH] * 20, every=16)


def test_an_exit_right_after_becoming_ready_counts_as_a_crash() -> None:
    assert pauses(History(POLICY), [Ended(0, ran=1.0, ready=0.5)] * 5)[-1] is None


def test_a_process_that_served_is_never_given_up() -> None:
    assert None not in pauses(History(POLICY), [Ended(-9, ran=20, ready=19)] * 50)


def test_after_a_healthy_minute_the_first_pause_is_back() -> None:
    history = History(POLICY)
    pauses(history, [Ended(1, ran=20, ready=19)] * 4)
    assert history.next_pause(Ended(1, ran=61, ready=60), now=100, chance=0.5) == 0.5


def test_an_operator_s_restart_forgets_the_past() -> None:
    history = History(POLICY)
    pauses(history, [CRASH] * 4)
    history.forget()
    assert history.next_pause(CRASH, now=5, chance=0.5) == 0.5


@pytest.mark.parametrize(("chance", "pause"), [(0.0, 0.4), (0.5, 0.5), (1.0, 0.6)])
def test_chance_keeps_replicas_from_starting_in_step(chance: float, pause: float) -> None:
    assert History(RestartPolicy()).next_pause(CRASH, now=0, chance=chance) == pytest.approx(pause)


@pytest.mark.parametrize("code", [2, 4])
def test_what_another_start_cannot_mend_is_given_up_at_once(code: int) -> None:
    assert History().next_pause(Ended(code, ran=100, ready=99), now=0, chance=0.5) is None


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "exit 0"), (4, "exit 4 (the broker does not accept its identity)"), (-9, "killed by SIGKILL")],
)
def test_ends_are_told_in_words(code: int, text: str) -> None:
    assert describe(Ended(code, 1, None)) == text
