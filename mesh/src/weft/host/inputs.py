"""Follow-ups and cancels: to the live owner of the task, or to a suspended task, which they resume.

They arrive at any replica through a lane of their own. Whoever gets one looks who owns the task: this replica,
another one (it is handed the delivery), nobody because the task waits (it is resumed here), nobody because it
has ended (the sender sees that by the sequence of the terminal event).
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

import msgpack
from a2a.types import a2a_pb2 as pb

from weft.core.broker import Delivered
from weft.core.pull import Delivery
from weft.host import ending, execute, takeover
from weft.host.agent import Agent
from weft.host.conversation import Conversation, TurnRecord
from weft.host.owner import Owner
from weft.host.rollback import End
from weft.host.run import Awaited, Input, Run, Stop, Work, sequence_in, turn_key
from weft.host.slots import SlotHold
from weft_protocols import a2a, ids, records, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2AError, BrokerError, Fenced, InvalidRequest, TimedOut, Unreachable, WeftError
from weft_protocols.records import SUSPENDED, Claim, Control, StoredMessage
from weft_protocols.resources import STREAM
from weft_protocols.states import State

log = logging.getLogger("weft.host")

PATIENCE: Final = 120
"""Deliveries of a follow-up whose task is not there, about ten minutes, before it is dropped."""
STALE: Final = 150
"""Deliveries after which a wake for a later owner is not passed on any more: a caller can send one as well."""
IN_ORDER: Final = 100 * PATIENCE
"""The same where the task may be waiting for its turn, unclaimed: most of a day."""
HAND_OVER: Final = 1.0
"""Seconds the owner has to take a delivery; then it comes again, perhaps to find a new owner."""
LAST_WORD: Final = 1.0
"""Seconds for a turn that was stopped after its agent had the grace to cancel it."""
TAKEN: Final = b"taken"


class _Meant(enum.Enum):
    """What a message is to a suspended task."""

    ANSWER = "answer"
    MESSAGE = "message"
    NOTHING = "nothing"


class Inputs:
    """The input lane of one replica."""

    def __init__(self, replica: Owner) -> None:
        self._replica = replica

    async def take(self, delivery: Delivery) -> None:
        """A delivery from the input lane."""
        replica = self._replica
        _, _, agent, _, caller, task_id = delivery.subject.split(".")
        values = h.parse(delivery.headers)
        method = values.get("a2a-method", "")
        cancel, wake = method == "CancelTask", method == h.WAKE
        live = replica.live.get(task_id)
        if live is not None and live.work.caller == caller:
            self._give(live, delivery, values=values)
            return
        found = await takeover.last_claim(replica.broker, agent, task_id)
        if found is None or found[1].caller != caller:
            if wake:
                replica.settle(delivery.ack, b"+TERM nobody parked such a task")
                return
            await self._unclaimed(delivery, values=values, cancel=cancel, expected=found)
            return
        token, claim = found
        event = await takeover.last_event(replica.broker, agent, task_id, caller=caller, origin=claim.origin)
        # Nobody owns a suspended task, nor one whose owner worked on this very delivery and lost it.
        unowned = claim.state == SUSPENDED or sequence_in(claim.delivery) == delivery.sequence
        if takeover.ended(event) or (wake and replica.agent.turns is not None):
            replica.settle(delivery.ack)
        elif not unowned:
            await self._hand_over(delivery, claim)
        elif cancel:
            await self._cancel_unowned(delivery, claim=_next(claim), task_id=task_id, expected=token)
        else:
            await self._resume(delivery, claim=claim, values=values, expected=token)

    def on_control(self, message: Delivered) -> None:
        """A message to this replica: a delivery that another one hands over, or the coordinator's word."""
        try:
            control = Control.decode(message.data)
        except WeftError as error:
            log.warning("control message dropped: %s", error)
            return
        if control.op == "drain":
            self._replica.stop()
            return
        if control.op == "ping":
            return  # that it was heard at all is what the coordinator wanted to know
        if (take := self._replica.controls.get(control.op)) is not None:
            take(control, message)
            return
        if control.op != "input":
            log.warning("control message %r is unknown", control.op)
            return
        task_id = control.subject.rsplit(".", 1)[-1]
        live = self._replica.live.get(task_id)
        answer = b"gone"
        if live is not None and not live.ended and live.stop is None:
            delivery = Delivery(control.subject, control.data, control.headers, control.delivery)
            self._replica.hold(delivery.ack)
            self._give(live, delivery, values=h.parse(control.headers))
            answer = TAKEN
        if message.reply:
            self._replica.broker.send(message.reply, answer)

    def _give(self, run: Run, delivery: Delivery, *, values: dict[str, str]) -> None:
        """Hand a delivery to a task that runs here."""
        replica = self._replica
        for i, ack in enumerate(run.deliveries):
            if sequence_in(ack) == delivery.sequence:
                replica.settle(ack, b"")
                run.deliveries[i] = delivery.ack
                return
        if run.ended or run.stop not in (None, Stop.CANCEL):
            replica.again(delivery.ack, 0.2)
            return
        if values.get("a2a-method", "") == h.WAKE:
            claim = values.get("weft-claim", "")
            if claim.isdecimal() and int(claim) > run.fence.token and delivery.times <= STALE:
                # This replica stood still while another one took the task over and parked it: the wake is for that one.
                replica.again(delivery.ack, 0.2)
                return
            # It came before the task had left: whoever is about to let it go looks again.
            run.waits.touch()
            replica.settle(delivery.ack)
            return
        if values.get("a2a-method", "") == "CancelTask":
            run.deliveries.append(delivery.ack)
            self._cancel(run, _reason(delivery.data))
            return
        try:
            request = _request(run.agent, delivery, values, context=run.work.context_id)
        except A2AError as error:
            run.deliveries.append(delivery.ack)
            work = self._refuse(run, delivery, error, values=values)
            replica.background(work, name=f"refuse for {run.task_id}")
            return
        if run.knows(request.message.message_id):
            replica.settle(delivery.ack)
            return
        run.give(Input(delivery.sequence, request, delivery, values))

    def _cancel(self, run: Run, reason: str) -> None:
        replica = self._replica
        told = run.conversation if run.conversation is not None and run.conversation.cancellable else None
        if not run.interrupt(Stop.CANCEL, reason, at_once=told is None):
            return
        if told is not None:
            replica.background(told.cancelled(run.agent.cancel_grace), name=f"cancel of {run.task_id}")

        def force() -> None:
            replica.background(execute.force_cancel(replica, run), name=f"force cancel of {run.task_id}")

        grace = run.agent.cancel_grace + (LAST_WORD if told is not None else 0.0)
        run.force = asyncio.get_running_loop().call_later(grace, force)

    async def _refuse(self, run: Run, delivery: Delivery, error: A2AError, *, values: dict[str, str]) -> None:
        try:
            await run.refuse(error, _message_id(delivery, values))
            await run.log.settle()
        except (Fenced, BrokerError) as failure:
            log.info("task %s: a follow-up could not be refused: %s", run.task_id, failure)
            return
        if delivery.ack in run.deliveries:
            run.deliveries.remove(delivery.ack)
            self._replica.settle(delivery.ack)

    async def _unclaimed(
        self, delivery: Delivery, *, values: dict[str, str], cancel: bool, expected: tuple[int, Claim] | None
    ) -> None:
        """Nobody has claimed a task of this caller: it still waits for its turn, or never was."""
        replica = self._replica
        _, _, agent, slice_, caller, task_id = delivery.subject.split(".")
        # A claim on a message was checked against its id. One on a cancel was not: only the message's id overrules it.
        foreign = expected is not None and expected[1].message != 0
        proven = ids.task_id(caller, agent, values.get("weft-message-id", "")) == task_id
        patience = PATIENCE if replica.agent.ordering is None else IN_ORDER
        if foreign or delivery.times > patience:
            replica.settle(delivery.ack, b"+TERM no such task of this caller")
            return
        if not cancel or (expected is not None and not proven):
            replica.again(delivery.ack, min(5.0, 0.25 * delivery.times))
            return
        claim = Claim(
            replica=replica.id,
            version=replica.agent.version,
            attempt=1,
            caller=caller,
            origin=values.get("weft-origin", "none"),
            context="",
            slice=slice_,
            message=0,
        )
        await self._cancel_unowned(delivery, claim=claim, task_id=task_id, expected=expected[0] if expected else 0)

    async def _cancel_unowned(self, delivery: Delivery, *, claim: Claim, task_id: str, expected: int) -> None:
        """End a task that nobody runs. Its creating message, if it still waits, will find the end and go."""
        async with self._owned_briefly(delivery, claim=claim, task_id=task_id, expected=expected) as run:
            if run is not None:
                reason = _reason(delivery.data)
                if run.agent.turns is not None and claim.waiting:
                    await Conversation(run, run.agent.turns).parted(reason, grace=run.agent.cancel_grace)
                if not run.ended:
                    await ending.conclude(run, End(State.CANCELED, reason))
                for ack in run.deliveries:
                    self._replica.settle(ack)

    async def _refuse_unowned(
        self, delivery: Delivery, *, claim: Claim, values: dict[str, str], expected: int, error: A2AError
    ) -> None:
        """Tell the sender of a follow-up to a suspended task that it was refused; the task waits on."""
        task_id = delivery.subject.rsplit(".", 1)[-1]
        async with self._owned_briefly(delivery, claim=claim, task_id=task_id, expected=expected) as run:
            if run is not None:
                await run.refuse(error, _message_id(delivery, values))
                await run.log.settle()
                await run.fence.write(replace(run.claim, state=SUSPENDED, delivery=""))
                self._replica.settle(delivery.ack)

    @asynccontextmanager
    async def _owned_briefly(
        self, delivery: Delivery, *, claim: Claim, task_id: str, expected: int
    ) -> AsyncIterator[Run | None]:
        """Own a task that nobody runs to write an event of it, without its handler; None where it has ended."""
        replica = self._replica
        name = replica.agent.name
        claim = replace(claim, replica=replica.id, state=records.HELD, delivery=delivery.ack)
        token = await takeover.write_claim(replica.broker, name, task_id=task_id, claim=claim, expected=expected)
        request = pb.SendMessageRequest(message=pb.Message(context_id=claim.context))
        work = Work(name, task_id, claim.caller, claim.origin, claim.slice, request, {}, b"", b"", claim.message)
        if replica.agent.turns is not None and claim.waiting:
            work = await self._stored_work(claim, task_id) or work
        slot = SlotHold(replica.slots)
        slot.held = False
        run = replica.own(work, claim, token=token, slot=slot, delivery=delivery.ack, fresh=False)
        try:
            event = await takeover.last_event(replica.broker, name, task_id, caller=claim.caller, origin=claim.origin)
            run.log.last = takeover.event_number(event)
            run.log.last_state = takeover.state(event)
            if takeover.ended(event):
                replica.settle(delivery.ack)
                yield None
            else:
                yield run
        finally:
            replica.disown(run)

    async def _stored_work(self, claim: Claim, task_id: str) -> Work | None:
        """The message that created a suspended task."""
        replica = self._replica
        agent = replica.agent.name
        stored = await replica.broker.last(STREAM, _step(agent, task_id, records.MESSAGE_KEY))
        if stored is None:
            return None
        original = StoredMessage.decode(stored.data)
        subject = subjects.task(agent, claim.slice, claim.caller, task_id)
        return replica.read(subject, original.data, headers=original.headers, sequence=original.sequence)

    async def _resume(self, delivery: Delivery, *, claim: Claim, values: dict[str, str], expected: int) -> None:
        """Run a suspended task again from the top, with the message that came for it unless it is only woken."""
        replica = self._replica
        agent, task_id = replica.agent.name, delivery.subject.rsplit(".", 1)[-1]
        stored = await replica.broker.last(STREAM, _step(agent, task_id, records.MESSAGE_KEY))
        given, meant = None, _Meant.NOTHING
        if values.get("a2a-method", "") != h.WAKE:
            try:
                request = _request(replica.agent, delivery, values, context=claim.context)
            except A2AError as error:
                await self._refuse_unowned(delivery, claim=_next(claim), values=values, expected=expected, error=error)
                return
            given = Input(delivery.sequence, request, delivery, values)
            meant = await self._meant(given, claim=claim, task_id=task_id)
        if stored is None or (given is not None and meant is _Meant.NOTHING):
            replica.settle(delivery.ack)
            return
        await replica.slots.acquire()
        slot = SlotHold(replica.slots)
        try:
            original = StoredMessage.decode(stored.data)
            subject = subjects.task(agent, claim.slice, claim.caller, task_id)
            work = replica.read(subject, original.data, headers=original.headers, sequence=original.sequence)
            if work is None:
                replica.settle(delivery.ack, b"+TERM the stored message cannot be read")
                return
            if replica.leaving:
                replica.settle(delivery.ack, b"-NAK")
                return
            held = replace(
                _next(claim),
                replica=replica.id,
                version=replica.agent.version,
                delivery=delivery.ack,
                at=time.time_ns() // 1_000_000,
            )
            token = await takeover.write_claim(replica.broker, agent, task_id=task_id, claim=held, expected=expected)
            run = replica.own(work, held, token=token, slot=slot, delivery=delivery.ack, fresh=False)
            try:
                if replica.agent.turns is None:
                    await self._recall(run)
                    await run.recall_said()
                if given is not None and meant is _Meant.ANSWER:
                    run.resumed = given
                elif given is not None and not run.knows(given.proto.message_id):
                    run.inbox.append(given)
                    run.history.append(given.proto)
                how = "goes on with an answer" if run.resumed is not None else "goes on"
                said = f"{how}, on replica {replica.id}" if claim.state == SUSPENDED else ""
                if await replica.begin_again(run, said=said) is None:
                    return
            except BaseException:
                run.deliveries.remove(delivery.ack)
                replica.disown(run)
                raise
            await replica.execute(run)
        finally:
            slot.end()

    async def _meant(self, given: Input, *, claim: Claim, task_id: str) -> _Meant:
        """What a message is to a suspended task: its answer, unless it was answered before or sent before it asked."""
        broker, agent = self._replica.broker, self._replica.agent.name
        awaited = Awaited.parse(claim.waiting)
        if awaited is None:
            asked = await broker.last(STREAM, _step(agent, task_id, records.ASKING_KEY))
            if asked is None or msgpack.unpackb(asked.data)["key"] != claim.waiting:
                return _Meant.MESSAGE  # it waits for something else: the message comes in between
            return _Meant.ANSWER if given.sequence >= asked.seq else _Meant.NOTHING
        message_id = given.proto.message_id
        if ids.task_id(claim.caller, agent, message_id) == task_id:
            return _Meant.NOTHING  # the message that created it
        if awaited.turn == 2:
            return _Meant.ANSWER
        stored = await broker.last(STREAM, _step(agent, task_id, turn_key(awaited.turn - 1)))
        before = TurnRecord.decode(stored.data) if stored is not None else None
        known = (*before.known, before.request.message.message_id) if before is not None else ()
        return _Meant.NOTHING if message_id in known else _Meant.ANSWER

    async def _recall(self, run: Run) -> None:
        """The snapshot that the last interruption named."""
        event = await takeover.last_event(
            self._replica.broker, run.agent.name, run.task_id, caller=run.work.caller, origin=run.claim.origin
        )
        named = h.get(event.headers, b"Weft-Snapshot") if event is not None else None
        if named is not None:
            stored = await self._replica.broker.last(STREAM, _step(run.agent.name, run.task_id, named.decode()))
            run.base = pb.Task.FromString(stored.data) if stored is not None else None

    async def _hand_over(self, delivery: Delivery, claim: Claim) -> None:
        """Give a delivery to the replica that owns the task."""
        replica = self._replica
        control = Control(
            "input", delivery.subject, delivery.sequence, delivery.ack, delivery.headers or b"", delivery.data
        )
        try:
            reply = await replica.broker.request(
                subjects.ctl(replica.agent.name, claim.replica), control.encode(), timeout=HAND_OVER
            )
        except (Unreachable, TimedOut):
            replica.again(delivery.ack, 0.5)
            return
        except BrokerError:
            replica.again(delivery.ack, 1.0)
            return
        if reply.data == TAKEN:
            replica.settle(delivery.ack, b"")
        else:
            replica.again(delivery.ack, 0.1)


def _next(claim: Claim) -> Claim:
    """The claim of who goes on: another attempt where the owner before lost the task, the same after a wait."""
    attempt = claim.attempt + 1 if claim.state == records.HELD else claim.attempt
    return replace(claim, attempt=attempt, state=records.HELD)


def _request(agent: Agent, delivery: Delivery, values: dict[str, str], *, context: str) -> pb.SendMessageRequest:
    """A follow-up; A2AError where it is to be refused."""
    a2a.check_version(values.get("a2a-version", ""))
    agent.check_extensions(values.get("a2a-extensions", ""))
    request = a2a.decode(pb.SendMessageRequest, delivery.data, values.get("content-type", h.PROTOBUF))
    if request.message.context_id not in ("", context):
        raise InvalidRequest(f"the task belongs to context {context}, not {request.message.context_id}")
    return request


def _message_id(delivery: Delivery, values: dict[str, str]) -> str:
    try:
        content_type = values.get("content-type", h.PROTOBUF)
        return a2a.decode(pb.SendMessageRequest, delivery.data, content_type).message.message_id
    except A2AError:
        return ""


def _reason(data: bytes) -> str:
    """Reason in a cancel's metadata."""
    try:
        request = a2a.decode(pb.CancelTaskRequest, data)
    except A2AError:
        return ""
    return str(request.metadata["reason"]) if request.HasField("metadata") and "reason" in request.metadata else ""


def _step(agent: str, task_id: str, key: str) -> str:
    return subjects.step(agent, task_id, subjects.step_token(key))
