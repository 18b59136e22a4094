"""Limits hold for several sidecars together, whatever the demand, with few hops."""

import random
from dataclasses import dataclass

import pytest

from weft.policy.model import Limit
from weft.policy.rate import KEPT, Gcra, Leases, chunk, taken

LIMIT = Limit("r", calls=100, seconds=1.0, burst=20)


def test_a_burst_passes_and_then_the_rate_holds() -> None:
    bucket = Gcra(rate=10.0, burst=5)
    assert [bucket.take(1000.0) for _ in range(6)] == [1, 1, 1, 1, 1, 0]
    assert bucket.wait(1000.0) == pytest.approx(0.1)
    assert bucket.take(1000.0 + bucket.wait(1000.0)) == 1
    assert bucket.take(1000.3, most=9) == 2
    assert bucket.take(2000.0, most=9) == 5


def test_of_unix_seconds_no_token_is_lost_to_rounding() -> None:
    bucket, now, passed = Gcra(rate=1 / 3, burst=1), 1_767_603_600.123, 0
    for _ in range(1000):
        passed += bucket.take(now)
        now += 3.0
    assert passed == 1000


def test_a_chunk_is_a_second_of_the_rate_shared_and_never_the_whole_burst() -> None:
    assert chunk(LIMIT) == 10
    assert chunk(LIMIT, sidecars=50) == 2
    assert chunk(Limit("r", 2, 3600.0, 2)) == 1


def test_tokens_that_were_taken_are_spent_or_lost() -> None:
    leases = Leases()
    assert not leases.spend("k", 0.0)
    leases.add("k", 2, 0.0)
    assert [leases.spend("k", 1.0) for _ in range(3)] == [True, True, False]
    leases.add("k", 1, 1.0)
    assert not leases.spend("k", 1.0 + KEPT)
    leases.refused("k", 2.0, 10.0)
    assert (leases.wait("k", 11.0), leases.wait("k", 13.0)) == (1.0, 0.0)


@dataclass
class Outcome:
    admitted: list[float]
    hops: int

    def worst(self, window: float) -> int:
        """Most calls within any window of so many seconds."""
        worst = first = 0
        for last, at in enumerate(self.admitted):
            while self.admitted[first] <= at - window:
                first += 1
            worst = max(worst, last - first + 1)
        return worst


def simulated(limit: Limit, *, sidecars: int, offered: float, seconds: float, seed: int = 1) -> Outcome:
    """Calls of skewed, changing demand at several sidecars that share one state."""
    rng, tat, at, outcome = random.Random(seed), 0.0, 0.0, Outcome([], 0)
    leases = [Leases() for _ in range(sidecars)]
    weights = [1.0] * sidecars
    while at < seconds:
        before = at
        at += rng.expovariate(offered)
        if at // 20 != before // 20:
            weights = [rng.random() ** 3 for _ in range(sidecars)]
        mine = leases[rng.choices(range(sidecars), weights)[0]]
        if not mine.spend("k", at):
            if mine.wait("k", at):
                continue
            outcome.hops += 1
            count, tat, wait = taken(limit, tat, at, chunk(limit, sidecars))
            if not count:
                mine.refused("k", wait, at)
                continue
            mine.add("k", count, at)
            mine.spend("k", at)
        outcome.admitted.append(at)
    return outcome


@pytest.mark.parametrize(("sidecars", "offered"), [(1, 150.0), (4, 150.0), (8, 150.0), (8, 1000.0)])
def test_several_sidecars_together_allow_what_one_would(sidecars: int, offered: float) -> None:
    outcome = simulated(LIMIT, sidecars=sidecars, offered=offered, seconds=120.0)
    allowed = len(outcome.admitted) / 120.0
    assert 97.0 < allowed < 101.0
    # At most the burst, and what the chunks of the others hold, come on top of one second's rate.
    assert outcome.worst(1.0) <= LIMIT.calls + LIMIT.burst + sidecars * chunk(LIMIT, sidecars)


def test_demand_below_the_limit_is_not_refused() -> None:
    outcome = simulated(LIMIT, sidecars=8, offered=50.0, seconds=120.0)
    assert len(outcome.admitted) > 0.98 * 50 * 120


def test_one_hop_serves_many_calls() -> None:
    alone = simulated(Limit("r", 1000, 1.0, 1000), sidecars=1, offered=800.0, seconds=20.0)
    assert alone.hops < len(alone.admitted) / 100


def test_a_rare_call_is_counted_exactly() -> None:
    outcome = simulated(Limit("r", 2, 60.0, 2), sidecars=8, offered=5.0, seconds=600.0)
    assert len(outcome.admitted) <= 22
    assert outcome.worst(60.0) <= 4
