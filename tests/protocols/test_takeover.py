"""The takeover rule (a2a-over-nats.md, section 17.3), checked in every interleaving of three replicas.

A model, not the broker: the log and the claims are tuples, a write is an atomic conditional append, a read may
be as stale as a replicated stream's, and any replica may stall for ever between any two steps. The first
replica has the first delivery, the others the same work delivered again, as if each before it were dead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Order = Literal["read, claim, write", "claim, read, write"]
MAX_LOOPS = 2
"""How often one replica goes back to reading before the model stops following it."""


@dataclass(frozen=True)
class Event:
    n: int
    writer: int
    terminal: bool = False


@dataclass(frozen=True)
class Replica:
    step: str
    claim: int = 0
    """Its own claim: position in the claims, from 1."""
    read: int = 0
    """Position of the last event it read."""
    next_n: int = 1
    loops: int = 0


@dataclass(frozen=True)
class World:
    log: tuple[Event, ...]
    claims: tuple[int, ...]
    """Owners, in the order of the claims."""
    replicas: tuple[Replica, ...]


def start() -> World:
    return World((), (), (Replica("first claim"), Replica("begin"), Replica("begin")))


def moves(world: World, order: Order) -> Iterator[World]:
    """Every world one step later."""
    for who, me in enumerate(world.replicas):
        for log, claims, then in _steps(world, who, me=me, order=order):
            replicas = tuple(then if i == who else other for i, other in enumerate(world.replicas))
            yield World(log, claims, replicas)


Step = tuple[tuple[Event, ...], tuple[int, ...], Replica]


def _steps(world: World, who: int, *, me: Replica, order: Order) -> Iterator[Step]:
    log, claims = world.log, world.claims
    match me.step:
        case "first claim":
            won = not claims
            yield log, (who,) if won else claims, replace(me, step="work" if won else "begin", claim=1 if won else 0)
        case "begin":
            yield log, claims, replace(me, step="read" if order == "read, claim, write" else "claim")
        case "read":
            after = "claim" if order == "read, claim, write" else "resume"
            for seen in range(len(log) + 1):  # a stale read sees any earlier end of the log
                done = seen > 0 and log[seen - 1].terminal
                yield log, claims, replace(me, step="done" if done else after, read=seen)
        case "claim":
            yield from _claim(world, who, me=me, order=order)
        case "resume":
            if me.read == len(log):
                n = (log[-1].n if log else 0) + 1
                yield (*log, Event(n, who)), claims, replace(me, step="work", next_n=n + 1)
            elif me.loops < MAX_LOOPS:
                yield log, claims, replace(me, step="read", loops=me.loops + 1)
        case "work" | "end":
            if me.claim != len(claims):
                yield log, claims, replace(me, step="fenced")
            else:
                event = Event(me.next_n, who, terminal=me.step == "end")
                then = replace(me, step="done" if event.terminal else "end", next_n=me.next_n + 1)
                yield (*log, event), claims, then


def _claim(world: World, who: int, *, me: Replica, order: Order) -> Iterator[Step]:
    after = "resume" if order == "read, claim, write" else "read"
    if me.claim and me.claim != len(world.claims):
        yield world.log, world.claims, replace(me, step="fenced")  # expected its own claim: a newer one is stored
        return
    # Without a claim of its own it reads the last one again until its write is accepted.
    claims = (*world.claims, who)
    yield world.log, claims, replace(me, step=after, claim=len(claims))


def broken(log: tuple[Event, ...]) -> str:
    """What is wrong with a log; empty if nothing is."""
    if [event.n for event in log] != list(range(1, len(log) + 1)):
        return "numbers are not 1, 2, 3, …"
    if any(event.terminal for event in log[:-1]):
        return "something follows the terminal event"
    return ""


def explore(order: Order) -> tuple[int, dict[str, World]]:
    """How many worlds there are, and one for each way in which a log is broken."""
    seen = {start()}
    waiting = [start()]
    found: dict[str, World] = {}
    while waiting:
        world = waiting.pop()
        if wrong := broken(world.log):
            found.setdefault(wrong, world)
            continue
        for after in moves(world, order):
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return len(seen), found


def test_whoever_reads_before_claiming_keeps_the_log_whole() -> None:
    worlds, found = explore("read, claim, write")
    assert found == {}
    assert worlds > 1_000


def test_whoever_reads_after_claiming_can_break_it() -> None:
    # A replica that stalls after its claim and is superseded would still find its conditional write accepted.
    _, found = explore("claim, read, write")
    assert "numbers are not 1, 2, 3, …" in found


def test_some_run_ends_after_every_replica_but_the_last_stalled() -> None:
    ended = False
    seen, waiting = {start()}, [start()]
    while waiting and not ended:
        world = waiting.pop()
        ended = bool(world.log) and world.log[-1] == Event(world.log[-1].n, 2, terminal=True)
        for after in moves(world, "read, claim, write"):
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    assert ended
