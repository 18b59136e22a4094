"""Undoing what a task did, when it fails for good, is rejected by its handler, or is cancelled.

A compensation is stored before the effect it undoes. It is named by its module, so that any replica can run it: the
one that ran the handler may be gone. How the task ends is stored before the first compensation runs, so whoever takes
over in the middle goes on undoing, and never runs the handler again. Each compensation is a recorded step.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any, Final

import msgpack

from weft.host.retry import RetryPolicy
from weft.host.rollback import End, Rollback, Undo
from weft.host.run import Run
from weft.host.steps import try_step
from weft_protocols import a2a, records
from weft_protocols.errors import BrokerError, Fenced, StepChanged, UsageError
from weft_protocols.records import StepRecord
from weft_protocols.states import State

log = logging.getLogger("weft.host")

POLICY: Final = RetryPolicy(attempts=5, initial=0.5, factor=2.0)
"""How often a compensation is tried, within the agent's `rollback_timeout`."""
TRIES: Final = 5
"""Replicas that may be lost in the middle of one rollback, beyond the agent's attempts."""
METADATA: Final = "weft.rollback"
"""Metadata of the terminal event: `undone`, a list of keys, and `failed`, why by key."""


async def load(run: Run) -> Rollback:
    """What is registered for a task, by this attempt or an earlier one."""
    if run.rollback is None:
        run.rollback = Rollback(loaded=run.journal.fresh)
    rollback = run.rollback
    if not rollback.loaded:
        async with rollback.writing:
            stored = await run.journal.read(records.ROLLBACK_KEY)
            if stored is not None and not rollback.undos:
                rollback.fill(stored.data)
            rollback.loaded = True
    return rollback


async def register(
    run: Run, key: str, fn: Callable[..., Any], *, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Store a compensation; once, however often it is registered.

    Raises:
        UsageError: another replica could not run it, or its arguments cannot be stored.
        StepChanged: the key is registered for something else.
    """
    function = _reference(fn, key)
    try:
        arguments = bytes(msgpack.packb([args, kwargs], datetime=True))
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"on_rollback {key!r}: its arguments must be plain values, as JSON has them: {error}"
        ) from None
    rollback = await load(run)
    async with rollback.writing:
        wanted = Undo(key, function, arguments)
        for known in rollback.undos:
            if known.key == key and known != wanted:
                raise StepChanged(f"on_rollback {key!r} of task {run.task_id} is registered with another input already")
            if known.key == key:
                return
        rollback.undos.append(wanted)
        await rollback.store(run.journal)


async def decide(run: Run, end: End) -> End:
    """Store how a task ends that has compensations, or children at work; the end that was stored before, if one was.

    Whoever takes over would otherwise find the children cancelled, and not know why.
    """
    rollback = await load(run)
    await run.recall_children()
    lasting = rollback.undos or any(not child.done for child in run.children.values())
    if lasting and rollback.end is None:
        async with rollback.writing:
            rollback.end = end
            await rollback.store(run.journal)
    return rollback.end or end


async def undo(run: Run) -> tuple[str, dict[str, Any] | None]:
    """Undo everything in reverse order; what to add to the task's last words, and metadata."""
    rollback = await load(run)
    if not rollback.undos:
        return "", None
    undone: list[str] = []
    failed: dict[str, str] = {}
    left = rollback.undos[::-1]
    if run.tries > run.agent.attempts + TRIES:
        failed = dict.fromkeys((one.key for one in left), "the replicas that tried ended")
        left = []
    else:
        await run.status(State.WORKING, a2a.parts_of(f"rolling back {len(left)} effects"))
    try:
        async with asyncio.timeout(run.agent.rollback_timeout):
            while left:
                await _one(run, left[0], undone=undone, failed=failed)
                left.pop(0)
    except TimeoutError:
        for one in left:
            failed.setdefault(one.key, f"no time was left of {run.agent.rollback_timeout:g} s")
    metadata: dict[str, Any] = {METADATA: {"undone": undone, "failed": failed}}
    if not failed:
        return "", metadata
    log.error("task %s: not rolled back: %s", run.task_id, failed)
    return "; not rolled back: " + ", ".join(f"{key} ({why})" for key, why in failed.items()), metadata


async def _one(run: Run, one: Undo, *, undone: list[str], failed: dict[str, str]) -> None:
    key = f"{records.UNDO_KEY}-{one.key}"
    try:
        if await run.journal.read(key) is None:
            args, kwargs = msgpack.unpackb(one.arguments, timestamp=3, strict_map_key=False)
            _, tries = await try_step(
                key, _function(one.function), args=tuple(args), kwargs=kwargs, policy=POLICY, run=run
            )
            await run.journal.write(key, StepRecord(key, "", attempts=tries).encode())
        undone.append(one.key)
    except (Fenced, BrokerError):
        raise
    except Exception as error:
        log.warning("task %s: rollback %s failed", run.task_id, one.key, exc_info=error)
        failed[one.key] = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _reference(fn: Callable[..., Any], key: str) -> str:
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    reference = f"{module}:{name}"
    try:
        found = _function(reference)
    except (AttributeError, ImportError, ValueError):
        found = None
    if found is not fn:
        raise UsageError(
            f"on_rollback {key!r}: {name or fn!r} cannot be found again by another replica; give a function at the top "
            "level of a module, and what it needs as arguments"
        )
    return reference


def _function(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


class Undoing:
    """The part of `Task` that registers compensations."""

    _run: Run

    async def on_rollback(self, key: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Have `fn` called if the task fails for good, is rejected by its handler, or is cancelled.

        Await it before the effect that `fn` undoes: from then on it is stored, whatever happens. Compensations run
        in reverse order, once each as far as the record goes, before the task ends; each is tried up to five times,
        all together for at most the agent's `rollback_timeout`. An attempt that will be tried again undoes nothing.
        `fn` must be a function at the top level of a module and its arguments plain values, since another replica
        may have to call it; a parameter named `idempotency_key` gets a key for outside systems. It must not mind
        that the effect never happened. What could not be undone is said in the task's last status.

        Raises:
            UsageError: another replica could not call `fn`.
            StepChanged: the key is registered with something else already.
        """
        await register(self._run, self._run.journal.key(key, explicit=True), fn, args=args, kwargs=kwargs)
