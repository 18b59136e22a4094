"""How often something is tried and when: the policy, an agent's attempts, and giving way in deadlocks."""

import time
from collections.abc import Callable

import pytest

import weft
from weft.host import execute
from weft.host.retry import RetryPolicy, StepOptions
from weft.testing.agents import running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft.testing.watching import seen, settled
from weft_protocols.errors import CycleEdge, InvalidConfig

Unique = Callable[[str], str]


def test_pauses_grow_up_to_the_longest_and_lose_at_most_their_random_share() -> None:
    policy = RetryPolicy(initial=1.0, factor=3.0, max_interval=20.0, jitter=0.5)
    assert [policy.pause(n, random=0.0) for n in (1, 2, 3, 4, 5000)] == [1.0, 3.0, 9.0, 20.0, 20.0]
    assert [policy.pause(n, random=1.0) for n in (1, 2, 5000)] == [0.5, 1.5, 10.0]


@pytest.mark.parametrize(("told", "expected"), [(7, 7.0), (0.5, 0.5), ("soon", 1.0), (-1, 1.0), (float("nan"), 1.0)])
def test_an_error_may_say_when_to_come_again(told: object, expected: float) -> None:
    error = ConnectionError()
    error.retry_after = told  # type: ignore[attr-defined]
    assert RetryPolicy(initial=1.0).pause(1, error, random=0.0) == expected


def test_what_another_try_cannot_help() -> None:
    policy = RetryPolicy(final=(LookupError,))
    final = [policy.ends(e) for e in (KeyError(), weft.Fail())]
    passing = (OSError(), weft.DeadlockError(), weft.DeadlineExceeded(), weft.CircuitOpen(), weft.LockLost())
    again = [policy.ends(e) for e in passing]
    assert (final, again) == ([True] * 2, [False] * 5)


def test_step_options_are_a_retry_policy() -> None:
    assert StepOptions(retries=2, timeout=5.0, backoff=0.1, max_backoff=9.0) == StepOptions(2, 5.0, 0.1, 9.0)
    options = StepOptions(retries=2, backoff=0.1)
    assert isinstance(options, RetryPolicy)
    assert (options.attempts, options.pause(2, random=0.0)) == (3, 0.2)


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"jitter": 1.5}, {"initial": -1.0}, {"factor": 0.5}])
def test_a_policy_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig):
        RetryPolicy(**wrong)  # type: ignore[arg-type]


def test_an_agent_has_one_number_of_attempts() -> None:
    assert weft.Agent("a").attempts == 3
    assert weft.Agent("a", retry=RetryPolicy(attempts=5)).attempts == 5
    with pytest.raises(InvalidConfig, match="give one of them"):
        weft.Agent("a", attempts=2, retry=RetryPolicy(attempts=5))
    with pytest.raises(InvalidConfig, match="that is for steps"):
        weft.Agent("a", retry=RetryPolicy(timeout=5))


async def test_an_agents_policy_paces_its_attempts_and_knows_what_is_final(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    policy = RetryPolicy(attempts=4, initial=0.01, final=(LookupError,))
    agent = weft.Agent(unique("paced"), retry=policy)
    at: list[float] = []

    @agent.skill()
    async def work(task: weft.Task) -> None:
        at.append(time.monotonic())
        if len(at) == 1:
            raise ConnectionError
        if len(at) == 2:
            error = ConnectionError("busy")
            error.retry_after = 0.6  # type: ignore[attr-defined]
            raise error
        raise LookupError("no such thing")

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go")
    assert len(at) == 3
    assert at[1] - at[0] < 0.55, "not the default's half second"
    assert at[2] - at[1] >= 0.6
    assert view.text == "failed after 3 of 4 attempts: LookupError: no such thing"


async def test_who_gives_way_in_a_deadlock_is_tried_again_and_that_is_no_attempt(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a deadlock uses up an attempt, or the number of them is forgotten between replicas."""
    agent = weft.Agent(unique("gives-way"), attempts=1)
    attempts: list[int] = []
    cycle = (CycleEdge("a", "1", "lock", "x", "2"), CycleEdge("b", "2", "lock", "y", "1"))

    @agent.skill()
    async def work(task: weft.Task) -> str:
        attempts.append(task.attempt)
        if len(attempts) < 4:
            raise weft.DeadlockError(cycle=cycle)
        return "through"

    async with running(mesh, agent, replicas=2), await caller.submit(agent.name, "go") as handle:
        assert (await handle.result()).text == "through"
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        texts = [event.text for event in seen(handle)]
        await settled(mesh, agent.name)
    stored.check()
    assert attempts == [1, 1, 1, 1]
    assert stored.claims[-1][1].gave_way == 3
    assert any("gave way in a deadlock (deadlock: a/1 waits for lock 'x', held by 2" in text for text in texts)


async def test_deadlocks_without_end_are_failed_attempts_in_the_end(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "DEADLOCK", RetryPolicy(attempts=2, initial=0.001))
    agent = weft.Agent(unique("always"), retry=RetryPolicy(attempts=2, initial=0.001))
    runs: list[int] = []

    @agent.skill()
    async def work(task: weft.Task) -> None:
        runs.append(task.attempt)
        raise weft.DeadlockError("again")

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go")
    assert runs == [1, 1, 1, 2]
    assert view.text == "failed after 2 of 2 attempts: DeadlockError: again"
