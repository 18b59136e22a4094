"""One replica of an agent: pulls work, owns tasks while it runs them, gives them up properly.

Exactly as the binding's worker rules say: work is acknowledged only after its terminal event is stored, every
write names its claim, and a redelivered task is claimed again until it is won.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from a2a.types import a2a_pb2 as pb

from weft.client.mesh import Mesh
from weft.core.broker import Broker, Delivered
from weft.core.pull import Delivery, PullLoop
from weft.core.supervise import Tasks
from weft.host import approving, execute, takeover
from weft.host.agent import Agent
from weft.host.circuits import Circuits
from weft.host.fence import Fence
from weft.host.inputs import Inputs
from weft.host.journal import Journal
from weft.host.log import EventLog
from weft.host.owner import Counters
from weft.host.pace import Paces
from weft.host.parking import Parking
from weft.host.run import Run, Stop, Work, sequence_in
from weft.host.session import OPS, Session
from weft.host.slots import SlotHold, Slots
from weft.host.threads import Threads
from weft.host.turn import Queue
from weft.host.waits import Observer, Waits
from weft_protocols import a2a, ids, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2AError, BrokerError, Conflict, Fenced, WeftError
from weft_protocols.records import Claim, Control
from weft_protocols.resources import DURABILITY, STREAM, Durability
from weft_protocols.states import State

log = logging.getLogger("weft.host")

INPUT_ROOM: Final = 64
"""Follow-ups, cancels and wakes a replica asks for at a time; they need no slot."""
LAST_WORDS: Final = 5.0
"""Seconds for handing back, and for handlers to end once they are stopped."""
CLOSING: Final = 1.0
"""Seconds for handlers to end when there is nothing left to say."""


def new_replica_id() -> str:
    """An id for a replica in this process."""
    return f"{os.getpid()}-{uuid.uuid4().hex[:8]}"


class Replica:
    """Runs one agent on one connection until it is told to stop or its account is revoked."""

    def __init__(
        self,
        agent: Agent,
        broker: Broker,
        *,
        durability: Durability | None = None,
        replica_id: str | None = None,
    ) -> None:
        self.agent = agent
        self.broker = broker
        self.mesh = Mesh(broker)
        self.id = replica_id or new_replica_id()
        self.durability = durability or DURABILITY["laptop"]
        self.counters = Counters()
        self.progress_within = agent.progress_within
        """Seconds after which it reports a task in work that makes no progress."""
        self.live: dict[str, Run] = {}
        """Tasks this replica owns now."""
        self.draining = False
        """It takes no more work."""
        self.leaving = False
        """Its time to finish what runs is over: everything is handed back."""
        self.observers: list[Observer] = []
        """Told of what its tasks wait for."""
        self.slots = Slots(agent.concurrency, changed=self._want)
        self.inputs = Inputs(self)
        self.circuits = Circuits(agent.breaker)
        self.paces = Paces()
        self.parking = Parking(self)
        self.observers.append(self.parking)
        self.queue = Queue(self)
        self.session = Session(self, self.queue)
        self.observers.append(self.session)
        self.controls: dict[str, Callable[[Control, Delivered], None]] = {"turn": self.queue.told}
        """Who takes a control message, by its `op`."""
        self.controls.update(dict.fromkeys(OPS, self.session.on_control))
        self.controls[approving.OP] = approving.Decisions(self).on_control
        self.threads = Threads(f"weft {agent.name}")
        self._tasks = Tasks(f"replica {self.id}")
        self._jobs = Tasks(f"deliveries of replica {self.id}")
        self._work: PullLoop | None = None
        self._input: PullLoop | None = None
        self._signs: asyncio.TimerHandle | None = None
        self._held: set[str] = set()
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Listen and begin to pull."""
        await self.mesh.start()
        await self.broker.subscribe(subjects.ctl(self.agent.name, self.id), self.inputs.on_control)
        name = self.agent.name
        self._input = await PullLoop(
            self.broker, stream=STREAM, consumer=subjects.consumer(name, "input"), handler=self._on_input, steady=True
        ).start()
        self._work = await PullLoop(
            self.broker, stream=STREAM, consumer=subjects.consumer(name, "work"), handler=self._on_work
        ).start()
        self._input.want(INPUT_ROOM)
        self._want()
        self._sign()

    async def run(self, *, grace: float = 30.0, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop` or until the connection ends for good, then drain within `grace` seconds.

        `ready` is called once work is being pulled.

        Raises:
            NotAuthenticated: the account was revoked; nothing is drained, another replica takes over.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._close)
            await self.start()
            ready()
            waits = [self._tasks.start(self._stopping.wait()), self._tasks.start(self.broker.closed.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self.broker.closed.is_set():
                raise self.broker.failure or BrokerError("the connection to the broker is closed")
            await self.drain(grace)

    def stop(self) -> None:
        """Ask `run` to drain and return."""
        self._stopping.set()

    async def drain(self, grace: float) -> None:
        """Take no more work; finish what runs, or hand it back after `grace` seconds."""
        self.draining = True
        log.info("leaving: %d tasks are here, %g s to finish them", len(self.live), grace)
        for loop in (self._work, self._input):
            if loop is not None:
                await loop.stop()
        self.queue.leave()
        for run in list(self.live.values()):
            waits = run.log.last_state.interrupted or run.waits.parkable
            if waits and run.conversation is None:  # a turn that asked is about to return
                run.interrupt(Stop.DRAIN, "the replica is leaving")
        await self._jobs_done(within=grace)
        self.leaving = True
        for run in list(self.live.values()):
            run.interrupt(Stop.DRAIN, "the replica is leaving")
        await self._jobs_done(within=LAST_WORDS)
        for run in list(self.live.values()):
            await execute.give_up_waiting(self, run)
        with contextlib.suppress(BrokerError):
            await self.broker.flush(timeout=2.0)

    async def _jobs_done(self, *, within: float) -> None:
        """Wait until nothing that was delivered is in work any more, at most `within` seconds, or the connection."""
        waits = [self._tasks.start(self._jobs.idle()), self._tasks.start(self.broker.closed.wait())]
        await asyncio.wait(waits, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _close(self) -> None:
        if self._signs is not None:
            self._signs.cancel()
        for loop in (self._work, self._input):
            if loop is not None:
                await loop.stop()
        self.parking.close()
        self.queue.leave()
        for run in list(self.live.values()):
            run.interrupt(Stop.BROKEN, "the replica was closed")
        try:
            async with asyncio.timeout(CLOSING):
                await self._jobs.aclose()
        except TimeoutError:
            log.warning("%d handlers do not stop; they can write nothing any more", len(self._jobs))
        await self._tasks.aclose()
        await self.mesh.aclose()

    # Deliveries --------------------------------------------------------------------------------

    def _want(self) -> None:
        if self._work is not None and not self.draining:
            self._work.want(self.slots.free)

    def _on_work(self, delivery: Delivery) -> None:
        if self.draining or self.slots.used >= self.slots.total:
            # It was asked for when there was room; a task that came back from a wait has the slot now.
            self.settle(delivery.ack, b"-NAK")
            return
        self.slots.take()
        self.hold(delivery.ack)
        self._jobs.start(self._guarded(delivery, self._take(delivery)), name=delivery.subject)

    def _on_input(self, delivery: Delivery) -> None:
        if self.draining:
            self.settle(delivery.ack, b"-NAK")
            return
        self.hold(delivery.ack)
        self._jobs.start(self._guarded(delivery, self.inputs.take(delivery), shared=True), name=delivery.subject)

    async def _guarded(self, delivery: Delivery, work: Awaitable[None], *, shared: bool = False) -> None:
        """The work loop's boundary: whatever goes wrong with one delivery, it comes again and the rest goes on.

        A `shared` delivery is one of several for a task: where another one was faster, it looks again.
        """
        try:
            await work
        except (Fenced, Conflict) as error:
            log.info("%s: %s", delivery.subject, error)
            if shared:
                self.again(delivery.ack, 0.1)
            else:
                self.settle(delivery.ack, b"")
        except BrokerError as error:
            log.warning("%s: %s; it will be delivered again", delivery.subject, error)
            self.again(delivery.ack, 1.0)
        except Exception:
            log.exception("%s: the host failed; it will be delivered again", delivery.subject)
            self.again(delivery.ack, 5.0)

    def hold(self, ack: str) -> None:
        """Sign this delivery in progress until it is settled."""
        self._held.add(ack)

    def settle(self, ack: str, answer: bytes = b"+ACK") -> None:
        """Acknowledge a delivery, or give another answer; an empty one only stops signing."""
        self._held.discard(ack)
        if answer:
            with contextlib.suppress(BrokerError):
                self.broker.send(ack, answer)

    def again(self, ack: str, delay: float) -> None:
        """Have a delivery come again after `delay` seconds."""
        self.settle(ack, b'-NAK {"delay": %d}' % int(delay * 1e9))

    def _sign(self) -> None:
        with contextlib.suppress(BrokerError):
            for ack in self._held:
                self.broker.send(ack, b"+WPI")
        self._signs = asyncio.get_running_loop().call_later(self.durability.sign_interval, self._sign)

    # Tasks -------------------------------------------------------------------------------------

    async def _take(self, delivery: Delivery) -> None:
        """A creating message: claim its task and run it."""
        slot = SlotHold(self.slots)
        try:
            work = self.read(delivery.subject, delivery.data, headers=delivery.headers, sequence=delivery.sequence)
            if work is None:
                self.settle(delivery.ack, b"+TERM not a message of this binding")
                return
            if self.agent.ordering is not None and work.task_id not in self.live:
                run = await self._claim_in_turn(work, delivery, slot=slot)
            else:
                run = await self._claim(work, delivery, slot=slot)
            if run is not None:
                await self.execute(run)
        finally:
            slot.end()

    def read(self, subject: str, data: bytes, *, headers: bytes | None, sequence: int) -> Work | None:
        """What a creating message says; None where it cannot be a task's, so that nobody could be told."""
        _, _, agent, slice_, caller, task_id = subject.split(".")
        values = h.parse(headers)
        origin = values.get("weft-origin", "")
        try:
            subjects.check_token(origin, "origin")
            request = a2a.decode(pb.SendMessageRequest, data, values.get("content-type", h.PROTOBUF))
        except WeftError as error:
            log.warning("%s: dropped: %s", subject, error)
            return None
        if ids.task_id(caller, agent, request.message.message_id) != task_id:
            log.warning("%s: dropped: the task id does not belong to this caller and message", subject)
            return None
        return Work(agent, task_id, caller, origin, slice_, request, values, data, headers or b"", sequence)

    async def _claim_in_turn(self, work: Work, delivery: Delivery, *, slot: SlotHold) -> Run | None:
        """`_claim` once it is the task's turn in its context."""
        queued = await self.queue.turn(work, delivery, slot=slot)
        if queued is None:
            return None
        run = await self._claim(work, queued.delivery, slot=slot, waited=True)
        if run is not None:
            run.barred = queued.refusal
        return run

    async def _claim(self, work: Work, delivery: Delivery, *, slot: SlotHold, waited: bool = False) -> Run | None:
        """Own the task of a creating message; None where there is nothing (more) to do."""
        agent, task_id = self.agent.name, work.task_id
        wanted = self.new_claim(work, delivery.ack)
        if delivery.times == 1:
            try:
                token = await takeover.first_claim(self.broker, agent, task_id=task_id, claim=wanted)
                return self.own(work, wanted, token=token, slot=slot, delivery=delivery.ack)
            except Conflict:
                log.debug("task %s was claimed before its first delivery here", task_id)
                if waited:
                    # It was cancelled while it waited; or another replica was faster, with a later delivery.
                    event = await takeover.last_event(
                        self.broker, agent, task_id, caller=work.caller, origin=work.origin
                    )
                    self.settle(delivery.ack, b"+ACK" if takeover.ended(event) else b"")
                    return None
        live = self.live.get(task_id)
        if live is not None:
            self._adopt(live, delivery)
            return None
        found = await takeover.last_claim(self.broker, agent, task_id)
        known = found[1] if found is not None and found[1].caller == work.caller else None
        if known is not None and (known.waiting or known.message not in (0, work.sequence)):
            # It waits for an answer, or goes on by one; or this is the same message under another context.
            self.settle(delivery.ack)
            return None
        token, claim, before = await takeover.take_over(self.broker, agent, task_id=task_id, wanted=wanted)
        run = self.own(work, claim, token=token, slot=slot, delivery=delivery.ack, fresh=before is None)
        try:
            return await self.begin_again(run) if before is not None else run
        except BaseException:
            run.deliveries.remove(delivery.ack)
            self.disown(run)
            raise

    async def begin_again(self, run: Run, *, said: str = "") -> Run | None:
        """After a takeover: look what the task came to, and say that somebody goes on; None where it has ended."""
        work = run.work
        await run.recall_children()
        while True:
            event = await takeover.last_event(
                self.broker, self.agent.name, run.task_id, caller=work.caller, origin=run.claim.origin
            )
            if takeover.ended(event):
                for ack in run.deliveries:
                    self.settle(ack)
                self.disown(run)
                return None
            run.log.last = takeover.event_number(event)
            run.partial = event is not None and run.base is None
            if takeover.begun_by(event, self.id, run.claim.attempt):
                run.log.last_state = State.WORKING
                return run
            # Whoever stalled between its claim and this read could otherwise write among a later owner's events.
            await run.fence.renew()
            said = said or f"attempt {run.claim.attempt}, on replica {self.id}"
            # Where an agent speaks A2A itself, only its own words go into the history.
            status = run.status_event(State.WORKING, a2a.parts_of(said) if self.agent.turns is None else ())
            headers = h.block(
                h.fields(
                    {
                        h.EXPECTED_SEQUENCE: str(event.seq if event is not None else 0),
                        h.EVENT: str(run.log.last + 1),
                        h.STATE: State.WORKING.label,
                        h.REPLICA: self.id,
                        h.ATTEMPT: str(run.claim.attempt),
                        h.CONTENT_TYPE: work.accept,
                    }
                )
            )
            try:
                await self.broker.publish(run.log.subject, a2a.encode(status, work.accept), headers=headers)
            except Conflict:
                current = await takeover.last_claim(self.broker, self.agent.name, run.task_id)
                if current is not None and current[0] != run.fence.token:
                    raise Fenced(f"a newer claim owns task {run.task_id}") from None
                continue
            run.log.last += 1
            run.log.last_state = State.WORKING
            run.note(status)
            return run

    def new_claim(self, work: Work, ack: str, *, attempt: int = 1) -> Claim:
        """A claim of this replica."""
        return Claim(
            replica=self.id,
            version=self.agent.version,
            attempt=attempt,
            caller=work.caller,
            origin=work.origin,
            context=work.context_id,
            slice=work.slice,
            message=work.sequence,
            delivery=ack,
            at=time.time_ns() // 1_000_000,
        )

    def own(self, work: Work, claim: Claim, *, token: int, slot: SlotHold, delivery: str, fresh: bool = True) -> Run:
        """Begin to own a task under a claim that was stored."""
        fence = Fence(self.broker, self.agent.name, task_id=work.task_id, claim=claim, token=token)
        subject = subjects.event(self.agent.name, work.task_id, work.caller, claim.origin)
        # Both need the run they report to, which needs them.
        report: list[Callable[[BrokerError | Fenced], None]] = []
        event_log = EventLog(
            self.broker,
            subject=subject,
            fence=fence,
            ordered=self.durability.ordered,
            content_type=work.accept,
            on_failure=lambda error: report[0](error),
        )
        journal = Journal(self.broker, agent=self.agent.name, task_id=work.task_id, fence=fence, fresh=fresh)
        run = Run(
            work=work,
            agent=self.agent,
            mesh=self.mesh,
            fence=fence,
            replica=self.id,
            log=event_log,
            journal=journal,
            slot=slot,
            settle=self.settle,
            threads=self.threads,
            session=self.session,
            circuits=self.circuits,
            waits=Waits(work.task_id, observers=self.observers),
        )
        report.append(run.failed_write)
        run.deliveries.append(delivery)
        run.history.append(work.request.message)
        self.live[work.task_id] = run
        self.queue.began(run)
        return run

    def disown(self, run: Run) -> None:
        """Stop owning a task; what was delivered for it and is not settled comes again."""
        if self.live.get(run.task_id) is run:
            del self.live[run.task_id]
            self.parking.forget(run.task_id)
            self.queue.ended(run)
        self.session.end(run)
        for ack in run.deliveries:
            if ack in self._held:
                self.again(ack, 0.2)
        if run.force is not None:
            run.force.cancel()
        for token in run.tokens:
            run.mesh.tools.say(token, "revoke")

    def _adopt(self, run: Run, delivery: Delivery) -> None:
        for i, ack in enumerate(run.deliveries):
            if sequence_in(ack) == delivery.sequence:
                # Signs came too late for the broker: the task is still running here, under the newer delivery.
                self.settle(ack, b"")
                run.deliveries[i] = delivery.ack
                return
        self.settle(delivery.ack)  # the same message once more, or the first one of a task that an answer resumed

    async def execute(self, run: Run) -> None:
        """Run a task to where it stops, and settle what was delivered for it."""
        await execute.execute(self, run)

    def background(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Do something for a task that runs here, beside its handler."""
        self._jobs.start(work, name=name)


__all__ = ["A2AError", "Counters", "Replica"]
