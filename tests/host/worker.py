"""The agent that tests run as processes, named by WEFT_IDENTITY. It leaves a line in the scratch for what it does."""

import asyncio
import os
import time
from typing import Any

import weft
from weft.testing.scratch import Scratch

scratch = Scratch.here()
agent = weft.Agent(
    os.environ["WEFT_IDENTITY"],
    concurrency=int(os.environ.get("CONCURRENCY", "8")),
    suspend_after=float(os.environ.get("SUSPEND_AFTER", "30")),
    cancel_grace=float(os.environ.get("CANCEL_GRACE", "10")),
)


@agent.skill()
async def echo(text: str) -> str:
    return text


@agent.skill()
async def work(task: weft.Task, steps: int = 2, at: str = "", updates: int = 0) -> list[Any]:
    """Steps, then a gate, then updates and a last step."""
    scratch.leave("start", task.id, task.attempt, os.getpid())
    done = [await task.step("before", body, f"before-{n}") for n in range(steps)]
    await task.update("at the gate")
    if at:
        await scratch.passed(at)
    for n in range(updates):
        await task.update(f"update {n}")
    done.append(await task.step("after", body, "after"))
    scratch.leave("end", task.id, task.attempt, os.getpid())
    return done


async def body(name: str, *, idempotency_key: str) -> str:
    scratch.leave("step", name, idempotency_key, os.getpid())
    return name


@agent.skill()
async def hammer(task: weft.Task) -> str:
    """Writes until it is stopped: what a stalled worker goes on with when it wakes up."""
    scratch.leave("start", task.id, task.attempt, os.getpid())
    while not scratch.is_open("enough"):
        await task.update(str(os.getpid()))
        await task.step("stroke", body, "stroke")
        await asyncio.sleep(0.05)
    return "enough"


@agent.skill()
async def questions(task: weft.Task, count: int = 1, at: str = "") -> list[str]:
    """Asks one question after the other, and waits at a gate after each answer if there is one."""
    scratch.leave("start", task.id, task.attempt, os.getpid())
    answers = []
    for n in range(count):
        answers.append((await task.ask(f"question {n}")).text)
        scratch.leave("answered", n, answers[-1], os.getpid())
        if at:
            await scratch.passed(at)
    return answers


@agent.skill()
async def parent(task: weft.Task, child: str, skill: str = "echo", message: Any = "hi") -> str:
    """Delegates."""
    scratch.leave("start", task.id, task.attempt, os.getpid())
    return (await task.delegate(child, message, skill=skill)).text


@agent.skill()
async def saga(task: weft.Task, effects: int, at: str) -> None:
    """Effects, each with what undoes it; then it fails. One of the compensations waits at a gate."""
    scratch.leave("start", task.id, task.attempt, os.getpid())
    for n in range(effects):
        await task.on_rollback(f"undo-{n}", undo, f"effect-{n}", at=at if n == 1 else "")
        await task.step(f"effect-{n}", body, f"effect-{n}")
    raise weft.Fail("no")


async def undo(name: str, at: str, *, idempotency_key: str) -> None:
    scratch.leave("undo", name, idempotency_key, os.getpid())
    if at:
        await scratch.passed(at)
    scratch.leave("undone", name, idempotency_key, os.getpid())


@agent.skill()
def blocking(task: weft.Task, seconds: float) -> str:
    """A thread, which nothing can stop."""
    scratch.leave("start", task.id, task.attempt, os.getpid())
    time.sleep(seconds)
    return "slept"


@agent.skill()
async def stubborn(task: weft.Task, at: str) -> str:
    """Does not stop when it is cancelled."""
    scratch.leave("start", task.id, task.attempt, os.getpid())
    while not scratch.is_open(at):
        try:
            await scratch.passed(at)
        except asyncio.CancelledError:
            scratch.leave("ignored", task.id)
    return "done anyway"


@agent.skill()
async def locked(task: weft.Task, name: str, at: str = "", lease: float = 30.0, wait: float | None = None) -> int:
    """Waits at a gate with a lock, and then finds out whether it has it still."""
    async with task.lock(name, wait=wait, lease=lease) as lock:
        token = lock.token
        scratch.leave("locked", task.id, task.attempt, token, os.getpid())
        if at:
            await scratch.passed(at)
        try:
            await task.update("still there")
        except weft.LockLost:
            scratch.leave("lost", task.id, task.attempt, token, os.getpid())
            raise
    scratch.leave("unlocked", task.id, task.attempt, token, os.getpid())
    return token
