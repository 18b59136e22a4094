"""The agents of the coordination storm, chosen by WEFT_IDENTITY: they lock in clashing orders, delegate, ask and wait.

What a lock protects is a file that takes no token older than the last one it saw, and keeps every try.
"""

import asyncio
import fcntl
import functools
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import ParamSpec

from weft import Agent, DeadlockError, LockLost, RetryPolicy, Task

P = ParamSpec("P")

NAME = os.environ["WEFT_IDENTITY"]
LEASE = 1.5
"""Seconds: shorter than a replica is frozen, so that its locks go to others meanwhile."""

# Whoever is killed at any moment is no reason to give a task up here: all of them have to end.
agent = Agent(
    NAME,
    concurrency=24,
    retry=RetryPolicy(attempts=1000, initial=0.2, factor=2.0, max_interval=1.0),
    suspend_after=0.3,
    ordering="context" if NAME == "clerk" else None,
    cancel_grace=3.0,
)


def use(name: str, token: int, task: Task) -> bool:
    """Use what a lock protects; False if it refused."""
    path = Path(os.environ["STORM_RESOURCES"]) / name
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        last = max((int(line.split()[0]) for line in file if line.endswith(b" 1\n")), default=0)
        accepted = token >= last
        os.write(file.fileno(), f"{token} {task.id} {accepted:d}\n".encode())
    return accepted


def insist(handler: Callable[P, Coroutine[None, None, str]]) -> Callable[P, Coroutine[None, None, str]]:
    """Do it again where a lock was lost, which a host takes for the end of a task."""

    @functools.wraps(handler)
    async def insisting(*args: P.args, **kwargs: P.kwargs) -> str:
        while True:
            try:
                return await handler(*args, **kwargs)
            except LockLost:
                await asyncio.sleep(0.05)

    return insisting


async def hold(task: Task, *names: str, seconds: float, reentrant: bool = False) -> None:
    """Lock, stay inside for a while, and then use what is locked without looking whether it still is."""
    async with task.lock(*names, wait=None, lease=LEASE, reentrant=reentrant) as lock:
        token = lock.token
        await asyncio.sleep(seconds)
        for name in names:
            use(name, token, task)


async def cross(task: Task, first: str, second: str, seconds: float) -> None:
    """Lock one after the other, inside each other."""
    async with task.lock(first, wait=None, lease=LEASE) as lock:
        token = lock.token
        await asyncio.sleep(seconds)
        await hold(task, second, seconds=seconds / 2)
        use(first, token, task)


if NAME == "teller":

    @agent.skill()
    @insist
    async def move(task: Task, first: str, second: str, seconds: float, insist: bool = False) -> str:
        """Two locks, one after the other: what gives way is tried again, by itself or by its host."""
        while True:
            try:
                await cross(task, first, second, seconds)
            except DeadlockError:
                if not insist:
                    raise
            else:
                return f"moved from {first} to {second}"

    @agent.skill()
    @insist
    async def both(task: Task, names: list[str], seconds: float, reentrant: bool = False) -> str:
        """Several at once."""
        await hold(task, *names, seconds=seconds, reentrant=reentrant)
        return "both"

    @agent.skill()
    async def dawdle(task: Task) -> str:
        """Ends only when it is cancelled."""
        await task.sleep(3600)
        return "nobody waits that long"

    @agent.skill()
    @insist
    async def look(task: Task, names: list[str], seconds: float) -> str:
        """Shared: it changes nothing."""
        async with task.lock(names, mode="shared", wait=None, lease=LEASE):
            await asyncio.sleep(seconds)
        return "looked"


if NAME == "boss":

    @agent.skill()
    @insist
    async def manage(task: Task, own: str, other: str, seconds: float) -> str:
        """A lock, and a child that needs another one, which may be what another boss holds."""
        async with task.lock(own, wait=None, lease=LEASE):
            await asyncio.sleep(seconds)
            return (await task.delegate("teller", {"names": [other], "seconds": seconds}, skill="both")).text

    @agent.skill()
    @insist
    async def lend(task: Task, own: str, seconds: float) -> str:
        """A lock that its child re-enters."""
        async with task.lock(own, wait=None, lease=LEASE):
            message = {"names": [own], "seconds": seconds, "reentrant": True}
            return (await task.delegate("teller", message, skill="both")).text

    @agent.skill()
    @insist
    async def fan(task: Task, names: list[str], seconds: float, need: int) -> str:
        """Children of which only the first ones count."""
        work = [
            task.delegate("teller", {"names": [name], "seconds": seconds * n}, skill="both")
            for n, name in enumerate(names, 1)
        ]
        return f"{len(await task.gather(*work, wait=need))} of {len(work)}"

    @agent.skill()
    async def strand(task: Task) -> str:
        """Children that end only when they are cancelled."""
        await task.gather(*(task.delegate("teller", "go", skill="dawdle") for _ in range(2)))
        return "nobody waits that long"

    @agent.skill()
    @insist
    async def consult(task: Task, own: str, seconds: float) -> str:
        """A question, long enough to leave memory, then a sleep, then a child in order."""
        answer = await task.ask("may I?")
        await task.sleep(1.2)
        await task.delegate("clerk", {"n": 0, "name": own, "seconds": seconds, "sleeps": False})
        return answer.text


if NAME == "clerk":

    @agent.skill()
    @insist
    async def file(task: Task, n: int, name: str, seconds: float, sleeps: bool) -> str:
        """Steps around a lock, in the order of the context."""
        await task.step("before", str, n)
        await hold(task, name, seconds=seconds)
        if sleeps:
            await task.sleep(1.4)
        await task.step("after", str, n)
        return f"filed {n}"
