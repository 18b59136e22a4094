"""Ending a task other than well: what it did is undone, its children are cancelled, then its last event is written."""

from __future__ import annotations

import asyncio
import time

from weft.host import saga
from weft.host.rollback import End
from weft.host.run import Run
from weft_protocols import a2a, records
from weft_protocols.errors import A2AError
from weft_protocols.records import DeadLetter


async def conclude(
    run: Run, end: End, *, error: A2AError | None = None, metadata: dict[str, object] | None = None
) -> None:
    """End a task; returns when its last event is stored. Where an end was decided before, that one counts."""
    run.concluding = run.concluding or asyncio.Lock()
    async with run.concluding:
        if run.ended:
            return
        decided = await saga.decide(run, end)
        if decided is not end:
            error = A2AError.from_reason(decided.reason, decided.text) if decided.reason else None
        await run.cancel_children(decided.text or "the parent was cancelled")
        more, undone = await saga.undo(run)
        text = decided.text + more
        if decided.error:
            await run.journal.write(records.DEAD_LETTER_KEY, _letter(run, text, decided.error).encode())
        await run.finish(
            decided.state,
            a2a.parts_of(text) if text else (),
            error=error,
            dead=bool(decided.error),
            metadata=undone,
        )


async def ended_before(run: Run) -> End | None:
    """How an earlier attempt decided that the task ends; None where none did."""
    if run.journal.fresh:
        return None
    return (await saga.load(run)).end


def _letter(run: Run, text: str, error: str) -> DeadLetter:
    return DeadLetter(
        agent=run.work.agent,
        task=run.task_id,
        caller=run.work.caller,
        reason=text,
        error=error,
        attempts=min(run.tries, run.agent.attempts),
        replica=run.replica,
        version=run.agent.version,
        message=run.claim.message,
        at=time.time_ns() // 1_000_000,
    )
