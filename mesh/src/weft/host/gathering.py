"""Doing several things together: until all are done, or enough of them.

Which ones were enough is recorded before the rest is cancelled, so that a later attempt decides the same.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Awaitable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal

import msgpack

from weft.host.child import candidates
from weft.host.run import Run
from weft_protocols import ids
from weft_protocols.errors import BrokerError, Fenced, UsageError

Wait = Literal["all", "first"] | int
"""Until when: `all` are done, the `first` is, or that many are."""
LOST: Final = "others were done first"
"""Why the rest is cancelled."""


def needed(wait: str | int, count: int) -> int:
    """How many of `count` have to be done; UsageError for a number that is not possible."""
    if wait == "all":
        return count
    number = 1 if wait == "first" else wait
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= count:
        raise UsageError(
            f"wait is {wait!r}; it must be 'all', 'first' or a number from 1 to {count}, what is waited for"
        )
    return number


async def together(run: Run, work: Sequence[Awaitable[Any]]) -> list[Any]:
    """The results of all, in order. The first error cancels the rest."""
    try:
        with _waiting(run, work, need=len(work)):
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_awaited(item)) for item in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    finally:
        close(run, work)
    return [task.result() for task in tasks]


async def enough(run: Run, key: str, work: Sequence[Awaitable[Any]], *, need: int) -> list[Any]:
    """The results of the first `need` that succeed, in their order in `work`; the rest is cancelled.

    When too many failed, the first error is raised, with all of them in its cause.
    """
    stored = await run.journal.read(key)
    if stored is not None:
        chosen = sorted(msgpack.unpackb(stored.data))
        for n, item in enumerate(work):
            if n not in chosen:
                await _drop(run, item)
        return await together(run, [work[n] for n in chosen])
    ended: asyncio.Queue[tuple[int, Exception | None]] = asyncio.Queue()
    winners: list[int] = []
    errors: list[Exception] = []
    try:
        async with asyncio.TaskGroup() as group:
            with _waiting(run, work, need=need):
                tasks = [group.create_task(_reported(n, item, ended)) for n, item in enumerate(work)]
            while len(winners) < need <= len(work) - len(errors):
                n, error = await ended.get()
                if error is None:
                    winners.append(n)
                else:
                    errors.append(error)
            if len(winners) == need:
                await run.journal.write(key, bytes(msgpack.packb(sorted(winners))))
            for task in tasks:
                task.cancel(LOST)
    except BaseExceptionGroup as broken:
        raise broken.exceptions[0] from broken
    finally:
        close(run, work)
    if len(winners) < need:
        raise errors[0] from ExceptionGroup(f"{len(errors)} of {len(work)} failed, {need} had to succeed", errors)
    return [tasks[n].result() for n in sorted(winners)]


def _waiting(run: Run, work: Sequence[Awaitable[Any]], *, need: int) -> AbstractContextManager[None]:
    """For what is begun inside: whether all of it are delegations, which only wait."""
    named = run.named
    if named is not None and all(inspect.iscoroutine(item) and isinstance(named.get(item), str) for item in work):
        return run.waits.together(len(work), need)
    return nullcontext()


def close(run: Run, work: Sequence[Awaitable[Any]]) -> None:
    """End what was not begun, which would complain otherwise."""
    for item in work:
        inner = run.named.get(item) if run.named is not None and inspect.iscoroutine(item) else None
        if inspect.iscoroutine(item) and inspect.getcoroutinestate(item) == inspect.CORO_CREATED:
            item.close()
            close(run, inner if isinstance(inner, tuple) else ())


async def _awaited(item: Awaitable[Any]) -> Any:
    return await item


async def _reported(n: int, item: Awaitable[Any], ended: asyncio.Queue[tuple[int, Exception | None]]) -> Any:
    """The result, and word of how it ended. What ends the whole run is raised."""
    try:
        result = await item
    except (Fenced, BrokerError):
        raise
    except Exception as error:  # noqa: BLE001 - one of several failed: whether that matters is decided above
        ended.put_nowait((n, error))
        return None
    ended.put_nowait((n, None))
    return result


async def _drop(run: Run, item: Awaitable[Any]) -> None:
    """End something that an earlier attempt cancelled, as far as it came to that."""
    known = run.named.get(item) if run.named is not None and inspect.iscoroutine(item) else None
    if isinstance(known, tuple):
        for inner in known:
            await _drop(run, inner)
    elif known is not None:
        first = ids.child_message_id(run.task_id, known)
        for agent in {child.agent for child in run.children.values() if child.message_id == first}:
            for _, task_id in itertools.takewhile(lambda one: one[1] in run.children, candidates(run, agent, known)):
                await run.cancel_child(task_id, LOST)
    close(run, (item,))
