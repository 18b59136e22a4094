"""Trying a step's body: how often, how long, with which key for outside systems."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any

from weft.host.journal import scope
from weft.host.run import Run
from weft_protocols import ids
from weft_protocols.errors import DeadlineExceeded, WeftError

_KEY: ContextVar[str] = ContextVar("weft_idempotency_key", default="")


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step is tried."""

    retries: int = 0
    """Further tries of the body after it raised, within one attempt of the task."""
    timeout: float | None = None
    """Seconds one try may take."""
    backoff: float = 0.5
    """Seconds before the second try; doubled for each further one, with jitter."""
    max_backoff: float = 30.0
    """Seconds, the longest pause between tries."""
    final: tuple[type[BaseException], ...] = ()
    """Errors that another try cannot help."""


def current_idempotency_key() -> str:
    """Inside a step's body: the key to give to outside systems, the same on every attempt; else empty."""
    return _KEY.get()


async def try_step(
    key: str,
    fn: Callable[..., Any],
    *,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: StepOptions,
    run: Run,
) -> tuple[Any, int]:
    """The result of a step's body and how many tries it took."""
    idempotency_key = ids.idempotency_key(run.task_id, key)
    if "idempotency_key" not in kwargs and _takes_key(fn):
        kwargs = {**kwargs, "idempotency_key": idempotency_key}
    token = _KEY.set(idempotency_key)
    try:
        with scope(key):
            for attempt in range(options.retries + 1):
                limit = asyncio.timeout(options.timeout)
                try:
                    async with limit:
                        return await call(fn, args, kwargs, threads=run.threads), attempt + 1
                except Exception as error:
                    late = isinstance(error, TimeoutError) and limit.expired()
                    if late and attempt == options.retries:
                        raise DeadlineExceeded(f"step {key!r} took longer than {options.timeout:g} s") from error
                    if not late and (attempt == options.retries or _is_final(error, options)):
                        raise
                run.journal.rewind(key)
                pause = min(options.max_backoff, options.backoff * 2**attempt)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
    finally:
        _KEY.reset(token)
    raise AssertionError("unreachable: the last try returns or raises")


def _takes_key(fn: Callable[..., Any]) -> bool:
    try:
        return "idempotency_key" in inspect.signature(fn).parameters
    except (ValueError, TypeError):
        return False  # a builtin without a signature


def _is_final(error: Exception, options: StepOptions) -> bool:
    """Whether another try cannot help."""
    if isinstance(error, WeftError) and not error.retryable and not isinstance(error, DeadlineExceeded):
        return True
    return isinstance(error, options.final)


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
