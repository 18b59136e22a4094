"""Running a handler, and turning each way it can stop into what the log and the broker are told."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from a2a.types import a2a_pb2 as pb

from weft.client import content
from weft.host import chain, ending, values
from weft.host.conversation import Conversation
from weft.host.owner import Owner
from weft.host.retry import DEADLOCK
from weft.host.rollback import End
from weft.host.run import Run, Stop, sequence_in
from weft.host.steps import call
from weft.host.task import Task
from weft_protocols import a2a, budgets, records
from weft_protocols.errors import (
    A2AError,
    BrokerError,
    Conflict,
    DeadlockError,
    Fail,
    Fenced,
    InvalidAgentResponse,
    InvalidParams,
    Reject,
    TooLarge,
    UsageError,
)
from weft_protocols.parts import Data, Message, Part, TaskView
from weft_protocols.records import HANDED_BACK, SUSPENDED
from weft_protocols.states import State

if TYPE_CHECKING:
    from weft.host.agent import Skill
    from weft.host.turns import Turns

log = logging.getLogger("weft.host")


async def execute(replica: Owner, run: Run) -> None:
    """Run a task to where it stops: its end, a question, a hand-back, or another replica's claim."""
    run.runner = asyncio.current_task()
    if replica.leaving and run.stop is None:
        run.stop = Stop.DRAIN
    try:
        if run.stop is not None:
            await _stopped(replica, run)
            return
        if run.agent.turns is None and (end := await ending.ended_before(run)) is not None:
            await ending.conclude(run, end)
            replica.counters.failed += end.state is not State.CANCELED
            _settle(replica, run)
            return
        if await _refused(run):
            _settle(replica, run)
            return
        await _attempt(replica, run)
    except Fenced as error:
        log.info("task %s: %s", run.task_id, error)
        _forget(replica, run)
    except TooLarge as error:
        await _end(replica, run, State.FAILED, str(error))
    except BrokerError as error:
        log.warning("task %s: %s; it will be delivered again", run.task_id, error)
        await _not_now(replica, run)
    except asyncio.CancelledError:
        if run.stop is None:
            _forget(replica, run)
            raise
        _uncancel()
        await _stopped(replica, run)
    finally:
        replica.counters.last_progress = run.last_progress
        replica.disown(run)


async def _refused(run: Run) -> bool:
    """End a task that must not start: a version, extension or encoding not spoken here, too late, too often."""
    work = run.work
    try:
        a2a.check_version(work.headers.get("a2a-version", ""))
        run.agent.check_extensions(work.headers.get("a2a-extensions", ""))
        _check_chain(run)
        parts = await content.expand(run.mesh.broker, work.request.message.parts)
        run.parts = tuple([a2a.part_from_proto(part) for part in parts])
    except A2AError as error:
        await ending.conclude(run, End(State.REJECTED, error.message, reason=error.reason), error=error)
        return True
    if run.barred:
        await run.finish(State.REJECTED, a2a.parts_of(run.barred))
        return True
    if work.deadline is not None and work.deadline < time.time():
        late = "the deadline has passed" if run.claim.waiting else "the deadline had passed before the task could start"
        await ending.conclude(run, End(State.FAILED, late))
        return True
    if run.tries > run.agent.attempts:
        await _give_up(run, f"given up after {run.agent.attempts} attempts", error="the replicas that ran it ended")
        return True
    return False


def _check_chain(run: Run) -> None:
    """InvalidRequest for a chain that goes in circles, or a budget that cannot be read."""
    headers = run.work.headers
    if "weft-chain" in headers:
        chain.received(
            headers,
            caller=run.work.caller,
            task=run.task_id,
            agent=run.agent.name,
            max_hops=run.agent.max_hops,
            reentrant=run.agent.reentrant,
        )
    if "weft-budget" in headers:
        budgets.parse(headers["weft-budget"])


async def _attempt(replica: Owner, run: Run) -> None:
    if run.agent.turns is not None:
        await _turns(replica, run, run.agent.turns)
        return
    try:
        skill, arguments = _chosen(run)
    except InvalidParams as error:
        await ending.conclude(run, End(State.REJECTED, error.message, reason=error.reason), error=error)
        _settle(replica, run)
        return
    if await _shed(replica, run, skill):
        return
    if skill.answer == "task" and run.log.last_state is not State.WORKING:
        await run.status(State.WORKING, extra=b"Weft-Replica: %b\r\nWeft-Attempt: %d\r\n" % (
            run.replica.encode(), run.claim.attempt,
        ))  # fmt: skip
    deadline, begun = run.work.deadline, time.monotonic()
    try:
        if deadline is None:
            result = await _handler(skill, run, arguments)
        else:
            async with asyncio.timeout(max(0.0, deadline - time.time())):
                result = await _handler(skill, run, arguments)
    except (Fenced, BrokerError):
        raise
    except Exception as error:  # noqa: BLE001 - the handler's own failure: an end, another attempt or a dead letter
        await _failed(replica, run, error)
    else:
        if run.journal.fresh and len(run.history) == 1:  # in one go, and without asking
            replica.paces.took(skill.id, time.monotonic() - begun)
        await _completed(replica, run, skill=skill, result=result)


async def _shed(replica: Owner, run: Run, skill: Skill) -> bool:
    """End a new task that cannot be done by its deadline, before it takes time from others."""
    if run.work.deadline is None or not run.agent.shed or not run.journal.fresh:
        return False
    left = run.work.deadline - time.time()
    typical = replica.paces.hopeless(skill.id, left)
    if not typical:
        return False
    text = f"not begun: {max(0.0, left):.3g} s are left to its deadline, and {skill.id} typically takes {typical:.3g} s"
    await _end(replica, run, State.FAILED, text)
    return True


async def _turns(replica: Owner, run: Run, turns: Turns) -> None:
    """Run an agent that answers message by message, until its task ends, waits or is stopped."""
    conversation = run.conversation = Conversation(run, turns)
    try:
        await conversation.go_on()
    except (Fenced, BrokerError):
        raise
    except Exception as error:  # noqa: BLE001 - the agent's own failure: an end, another attempt or a dead letter
        await _turn_failed(replica, run, turns, error=error)
        return
    if run.ended:
        replica.counters.done += 1
        _settle(replica, run)
    else:
        _uncancel()  # the handler may have swallowed it
        await _stopped(replica, run)


async def _turn_failed(replica: Owner, run: Run, turns: Turns, *, error: Exception) -> None:
    """A turn raised. An A2A error is the caller's answer; everything else as for a skill, but tried again if asked."""
    if run.ended:
        log.warning("task %s: the agent raised after its end", run.task_id, exc_info=error)
        _settle(replica, run)
    elif isinstance(error, A2AError) and run.stop is None:
        log.info("task %s: the agent raised %s: %s", run.task_id, error.reason, error)
        await ending.conclude(run, End(State.FAILED, error.message, reason=error.reason), error=error)
        replica.counters.failed += 1
        _settle(replica, run)
    elif turns.retry or run.stop is not None or isinstance(error, Reject | Fail | DeadlockError) or _late(run, error):
        await _failed(replica, run, error)
        if _late(run, error) and run.conversation is not None:
            await run.conversation.over(run.agent.cancel_grace)
    else:
        log.warning("task %s: the agent raised", run.task_id, exc_info=error)
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        await _give_up(run, text, error=text)
        replica.counters.failed += 1
        _settle(replica, run)


def _late(run: Run, error: Exception) -> bool:
    """Whether a handler was stopped because its task's deadline has passed."""
    deadline = run.work.deadline
    return isinstance(error, TimeoutError) and deadline is not None and deadline <= time.time() + 0.01


async def _failed(replica: Owner, run: Run, error: Exception) -> None:
    """The handler raised: what it says about the task, unless it was being stopped anyway."""
    if run.stop is not None:
        # Its clean-up failed, or it made another error of its cancellation.
        log.info("task %s: the handler raised %r while it was stopped (%s)", run.task_id, error, run.stop.value)
        _uncancel()
        await _stopped(replica, run)
    elif _late(run, error):
        await _end(replica, run, State.FAILED, "the deadline has passed")
    elif isinstance(error, Reject):
        await _end(replica, run, State.REJECTED, str(error))
    elif isinstance(error, Fail | UsageError):
        await _end(replica, run, State.FAILED, str(error) or type(error).__name__)
    else:
        await _raised(replica, run, error)


def _chosen(run: Run) -> tuple[Skill, dict[str, Any]]:
    """The skill a message asks for and its arguments; InvalidParams names what is wrong."""
    message = run.work.request.message
    wanted = message.metadata[a2a.SKILL] if message.HasField("metadata") and a2a.SKILL in message.metadata else None
    skill = run.agent.choose(None if wanted is None else str(wanted))
    run.skill = skill.id
    arguments = skill.signature.bind(run.parts)
    if skill.signature.task is not None:
        arguments[skill.signature.task] = Task(run)
    return skill, arguments


async def _handler(skill: Skill, run: Run, arguments: dict[str, Any]) -> Any:
    try:
        if skill.signature.is_async:
            return await skill.handler(**arguments)
        return await call(skill.handler, (), arguments, threads=run.threads)
    except SystemExit as error:
        raise RuntimeError(f"the handler called sys.exit({error.code!r})") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if run.stop is None and task is not None and not task.cancelling():
            raise RuntimeError("the handler awaited something that was cancelled, and nobody cancelled it") from error
        raise


async def _completed(replica: Owner, run: Run, *, skill: Skill, result: Any) -> None:
    try:
        parts = [_to_proto(part) for part in _parts(result)]
    except UsageError as error:
        wrong = InvalidAgentResponse(f"the handler returned {type(result).__name__}, which is no result: {error}")
        await ending.conclude(run, End(State.FAILED, wrong.message, reason=wrong.reason), error=wrong)
        _settle(replica, run)
        return
    if skill.answer == "message":
        await run.answer(parts)
    else:
        if parts:
            await run.artifact(pb.Artifact(artifact_id="result", name="result", parts=parts))
        await run.finish(State.COMPLETED)
    replica.counters.done += 1
    _settle(replica, run)


def _parts(result: Any) -> tuple[Part, ...]:
    if result is None:
        return ()
    if isinstance(result, Message):
        return result.parts
    if isinstance(result, TaskView):
        said = result.message.parts if result.message is not None and not result.artifacts else ()
        return said or tuple(part for artifact in result.artifacts for part in artifact.parts)
    return a2a.parts_of(result)


def _to_proto(part: Part) -> pb.Part:
    try:
        return a2a.part_to_proto(part)
    except UsageError:
        if not isinstance(part, Data):
            raise
        return a2a.part_to_proto(replace(part, data=values.plain(part.data)))


async def _end(replica: Owner, run: Run, state: State, text: str) -> None:
    await ending.conclude(run, End(state, text))
    replica.counters.failed += 1
    _settle(replica, run)


async def _raised(replica: Owner, run: Run, error: BaseException) -> None:
    """The handler raised: another attempt after a pause, or a dead letter when there are none left."""
    log.warning("task %s, attempt %d: the handler raised", run.task_id, run.claim.attempt, exc_info=error)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, DeadlockError) and not error.lasting and run.claim.gave_way < DEADLOCK.attempts:
        await _gave_way(replica, run, error)
        return
    policy = run.agent.retry
    if policy.ends(error) or run.tries >= policy.attempts:
        await _give_up(run, f"failed after {run.tries} of {run.agent.attempts} attempts: {text}", error=text)
        replica.counters.failed += 1
        _settle(replica, run)
        return
    pause = policy.pause(run.tries, error, random=random.random())
    await run.status(State.WORKING, a2a.parts_of(f"attempt {run.tries} failed ({text}); again in {pause:.3g} s"))
    await run.log.settle()
    for ack in run.deliveries:
        replica.again(ack, pause)


async def _gave_way(replica: Owner, run: Run, error: DeadlockError) -> None:
    """The task was chosen to break a deadlock: it comes again after a pause, and this attempt does not count."""
    times = run.claim.gave_way + 1
    pause = DEADLOCK.pause(times, error, random=random.random())
    await run.status(State.WORKING, a2a.parts_of(f"gave way in a deadlock ({error}); again in {pause:.3g} s"))
    await run.log.settle()
    run.log.closed = run.journal.closed = True
    claim = replace(run.claim, state=HANDED_BACK, gave_way=times, at=time.time_ns() // 1_000_000)
    await run.fence.write(claim)
    for ack in run.deliveries:
        replica.again(ack, pause)


async def _give_up(run: Run, text: str, *, error: str) -> None:
    """Fail a task for good and leave a dead letter."""
    await ending.conclude(run, End(State.FAILED, text, error=error))


async def _stopped(replica: Owner, run: Run) -> None:
    """The handler was stopped from outside."""
    try:
        if run.stop is Stop.CANCEL:
            await _cancelled(replica, run)
        elif run.stop is Stop.SUSPEND:
            await _suspended(replica, run)
        elif run.stop is Stop.DRAIN:
            await _handed_back(replica, run)
        elif run.stop is Stop.BROKEN:
            await _not_now(replica, run)
        else:
            log.info("task %s: %s", run.task_id, run.stop_reason)
            _forget(replica, run)
    except (Fenced, Conflict) as error:
        log.info("task %s: %s", run.task_id, error)
        _forget(replica, run)
    except BrokerError as error:
        log.warning("task %s: %s; it will be delivered again", run.task_id, error)
        for ack in run.deliveries:
            replica.again(ack, 1.0)


async def _cancelled(replica: Owner, run: Run) -> None:
    await ending.conclude(run, End(State.CANCELED, run.stop_reason))
    _settle(replica, run)


async def force_cancel(replica: Owner, run: Run) -> None:
    """End a task whose handler did not stop in time after its cancel. The handler can write nothing any more."""
    if run.ended or run.concluding is not None or replica.live.get(run.task_id) is not run:
        return
    log.warning("task %s: the handler did not stop within %g s of its cancel", run.task_id, run.agent.cancel_grace)
    try:
        reason = run.stop_reason or "cancelled; the handler did not stop in time"
        await ending.conclude(run, End(State.CANCELED, reason))
    except (Fenced, BrokerError) as error:
        log.warning("task %s could not be ended: %s", run.task_id, error)
        return
    _settle(replica, run)
    replica.disown(run)


async def _suspended(replica: Owner, run: Run) -> None:
    """The task only waits: it leaves memory, its claim says what for."""
    await run.log.settle()
    work = run.work
    if not run.claim.waiting:  # else it was suspended before, and has the record
        message = records.StoredMessage(
            work.raw, work.raw_headers, work.sequence, context=work.context_id, origin=run.claim.origin
        )
        await run.journal.write(records.MESSAGE_KEY, message.encode())
    await run.remember_said()
    run.log.closed = run.journal.closed = True
    claim = replace(run.claim, state=SUSPENDED, waiting=run.waiting, delivery="", at=time.time_ns() // 1_000_000)
    await run.fence.write(claim)
    # An answer that came while this was being written must wake the task; what came before the question is history.
    late = {given.sequence for given in run.inbox if given.sequence > run.asked}
    for i, ack in enumerate(run.deliveries):
        # Between two turns every message counts, also one that is being refused.
        if sequence_in(ack) in late or (i > 0 and run.conversation is not None):
            replica.again(ack, 0.05)
        else:
            replica.settle(ack)


async def give_up_waiting(replica: Owner, run: Run) -> None:
    """Hand back a task whose handler does not stop. The handler can write nothing any more."""
    if run.ended or run.stop is not Stop.DRAIN or replica.live.get(run.task_id) is not run:
        return
    log.warning("task %s: the handler did not stop when its replica was leaving", run.task_id)
    try:
        await _handed_back(replica, run)
    except (Fenced, BrokerError) as error:
        log.warning("task %s could not be handed back: %s", run.task_id, error)
    replica.disown(run)


async def _handed_back(replica: Owner, run: Run) -> None:
    """The replica leaves: the next one begins at once, and this attempt does not count."""
    await run.log.settle()
    run.log.closed = run.journal.closed = True
    # Which delivery is the work stays in the claim: a task that an answer resumed goes on by that answer.
    claim = replace(run.claim, state=HANDED_BACK, at=time.time_ns() // 1_000_000)
    await run.fence.write(claim)
    replica.counters.handed_back += 1
    for ack in run.deliveries:
        replica.settle(ack, b"-NAK")


async def _not_now(replica: Owner, run: Run) -> None:
    """The broker does not take the task's writes: it comes again, and where that can be said, nothing was tried."""
    run.log.closed = run.journal.closed = True
    try:
        await run.fence.write(replace(run.claim, state=HANDED_BACK, at=time.time_ns() // 1_000_000))
    except (Fenced, BrokerError) as error:
        log.debug("task %s: this attempt counts: %s", run.task_id, error)
    for ack in run.deliveries:
        replica.again(ack, 1.0)


def _settle(replica: Owner, run: Run) -> None:
    """The task has ended: everything delivered for it is done."""
    for ack in run.deliveries:
        replica.settle(ack)
    run.deliveries.clear()


def _forget(replica: Owner, run: Run) -> None:
    """Somebody else owns the task: only stop signing."""
    for ack in run.deliveries:
        replica.settle(ack, b"")
    run.deliveries.clear()


def _uncancel() -> None:
    task = asyncio.current_task()
    while task is not None and task.cancelling():
        task.uncancel()


__all__ = ["execute", "force_cancel", "give_up_waiting"]
