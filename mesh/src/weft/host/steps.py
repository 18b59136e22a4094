"""Trying a step's body: how often, how long, with which key for outside systems."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextvars import ContextVar, copy_context
from typing import Any

from weft.host.journal import scope
from weft.host.retry import RetryPolicy, StepOptions
from weft.host.run import Run
from weft_protocols import ids
from weft_protocols.errors import DeadlineExceeded, LockLost

_KEY: ContextVar[str] = ContextVar("weft_idempotency_key", default="")


def current_idempotency_key() -> str:
    """Inside a step's body: the key to give to outside systems, the same on every attempt; else empty."""
    return _KEY.get()


async def try_step(
    key: str,
    fn: Callable[..., Any],
    *,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    policy: RetryPolicy,
    run: Run,
) -> tuple[Any, int]:
    """The result of a step's body and how many tries it took."""
    idempotency_key = ids.idempotency_key(run.task_id, key)
    if "idempotency_key" not in kwargs and _takes_key(fn):
        kwargs = {**kwargs, "idempotency_key": idempotency_key}
    token = _KEY.set(idempotency_key)
    try:
        with scope(key):
            for tries in range(1, policy.attempts + 1):
                limit = asyncio.timeout(policy.timeout)
                try:
                    async with limit:
                        return await call(fn, args, kwargs, threads=run.threads), tries
                except Exception as error:
                    late = isinstance(error, TimeoutError) and limit.expired()
                    if late and tries == policy.attempts:
                        raise DeadlineExceeded(f"step {key!r} took longer than {policy.timeout:g} s") from error
                    final = isinstance(error, LockLost) or policy.ends(error)  # a lost lock stays lost in its block
                    if not late and (tries == policy.attempts or final):
                        raise
                    pause = policy.pause(tries, error, random=random.random())
                run.journal.rewind(key)
                await asyncio.sleep(pause)
    finally:
        _KEY.reset(token)
    raise AssertionError("unreachable: the last try returns or raises")


def _takes_key(fn: Callable[..., Any]) -> bool:
    try:
        return "idempotency_key" in inspect.signature(fn).parameters
    except (ValueError, TypeError):
        return False  # a builtin without a signature


async def call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, threads: Executor) -> Any:
    """Call a function: await a coroutine function, run any other in a thread."""
    if inspect.iscoroutinefunction(fn):
        return await _contained(fn(*args, **kwargs))
    in_context = functools.partial(copy_context().run, fn, *args, **kwargs)
    result = await _contained(asyncio.get_running_loop().run_in_executor(threads, in_context))
    return await _contained(result) if inspect.isawaitable(result) else result


async def _contained(work: Awaitable[Any]) -> Any:
    """What `work` gives. `sys.exit` in somebody's code is its failure: it must not end the replica."""
    try:
        return await work
    except SystemExit as error:
        raise RuntimeError(f"the handler called sys.exit({error.code!r})") from error


__all__ = ["StepOptions", "call", "current_idempotency_key", "try_step"]
