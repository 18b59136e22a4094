"""Deliveries: each push notification config is a job in the stream `MESH_PUSH`, and whoever pulled it holds its lease.

The holder reads the task's log after the cursor, posts each event, moves the cursor after each confirmation, and
acknowledges the job after the task's last event. What has to wait for long, a failed attempt or a task that stands
still while others want its place, goes back to the broker with a delay: nothing of it stays in this process. A gateway
that dies, or is cut off, loses its leases; whoever gets them goes on at the cursor.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Self

from a2a.types import a2a_pb2 as pb

from weft.core.broker import Broker, Stored, stored
from weft.core.gatewayconf import PushConfig
from weft.core.pull import Delivery, PullLoop
from weft.core.supervise import Tasks
from weft.gateway.push.event import MEDIA_TYPE, blob_bytes, body_of, decoded
from weft.gateway.push.limits import Backoff, Limits, Slots
from weft.gateway.push.progress import Ended, Later, Lost, Progress, last
from weft.gateway.push.sign import Signer, signed_headers
from weft.gateway.push.target import Answer, Poster
from weft.policy.egress import Refused
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.accounts import DIRECT_GET
from weft_protocols.errors import BrokerError, InvalidName, ParseError, WeftError
from weft_protocols.events import RawEvent, read_stored
from weft_protocols.records import PushCursor, PushJob
from weft_protocols.resources import PUSH, PUSH_ACK_WAIT, PUSH_CONSUMER, STREAM
from weft_protocols.states import END_LABELS

log = logging.getLogger("weft.push")

LARGE_AT_ONCE: Final = 2
"""Notifications with blobs that are made and sent at a time: each may take several times `LARGEST` of memory."""
POLL: Final = 5.0
"""Seconds after which the log, and whether the config is still there, are looked at though nothing was heard."""
TROUBLE: Final = 2.0
"""Seconds until a job is tried again that could not be worked on for want of the broker."""


@dataclass(slots=True, eq=False)
class _Held:
    """One job this process has the lease of."""

    delivery: Delivery
    caller: str
    agent: str
    task: str
    config: str
    renewed: float
    """Loop time of the last sign of life."""
    quiet_since: float
    """Loop time since which nothing was to be done."""
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    patience: asyncio.Timeout | None = None
    """Open while it waits for something and can be made to step back."""
    evicted: bool = False
    lost: bool = False
    log: str = ""
    """Exact subject of the task's events, once there is one."""

    @property
    def name(self) -> str:
        return f"config {self.config} of task {self.task} ({self.agent}, caller {self.caller})"

    def evict(self, now: float) -> None:
        """Have it step back, if it waits."""
        self.evicted = True
        if self.patience is not None and not self.patience.expired():
            self.patience.reschedule(now)
        self.patience = None

    @property
    def stored(self) -> float:
        """Unix seconds at which the config was stored."""
        return int(self.delivery.ack.split(".")[7]) / 1e9


class Deliverer:
    """Delivers push notifications; any number of them share the work of a mesh.

    Args:
        broker: A connection as a member of account MESH, which stays its owner's.
        settings: Where notifications may go, and for how long they are tried.
        signer: Signs them; None sends them unsigned.
        poster: The HTTP client; one made from the settings if None.
        ack_wait: Seconds after which the broker gives a silent holder's lease to another.
        clock: Unix seconds.
    """

    def __init__(
        self,
        broker: Broker,
        settings: PushConfig,
        *,
        signer: Signer | None = None,
        poster: Poster | None = None,
        limits: Limits | None = None,
        backoff: Backoff | None = None,
        ack_wait: float = PUSH_ACK_WAIT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._signer = signer
        self._poster = poster or Poster(allow_private=settings.allow_private, timeout=settings.timeout)
        self._limits = limits or Limits()
        self._backoff = backoff or Backoff()
        self._ack_wait = ack_wait
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._tasks = Tasks("push deliveries")
        self._pull = PullLoop(
            broker, stream=PUSH, consumer=PUSH_CONSUMER, handler=self._on_job, steady=False, expires=30.0
        )
        self._signing: asyncio.TimerHandle | None = None
        self._stopped = False
        self._posts = asyncio.Semaphore(self._limits.posts)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._crowd = 0.0
        """Seconds that a config has to step back at least, so that not too many come back in a second."""
        self._hosts = Slots(self._limits.posts_per_host)
        self._callers = Slots(self._limits.posts_per_caller)
        self.delivered = 0
        """Notifications that were confirmed."""
        self.failed = 0
        """Attempts that failed."""

    @property
    def following(self) -> int:
        """Configs it follows the task of now."""
        return len(self._held)

    async def start(self) -> Self:
        """Begin to take jobs. Also before the stream exists: they come once it does."""
        await self._pull.start()
        self._sign_in_progress()
        self._want()
        return self

    async def aclose(self, grace: float | None = None) -> None:
        """Take no further job, finish the notifications being sent, and hand all jobs to the other gateways.

        What is not answered within `grace` seconds, by default what a receiver has for its answer, is sent again by
        another. Safe to call twice.
        """
        self._stopped = True
        now = asyncio.get_running_loop().time()
        for held in self._held.values():
            held.evict(now)
        await self._pull.stop()
        try:
            async with asyncio.timeout(self._settings.timeout + 1.0 if grace is None else grace):
                await self._tasks.idle()
        except TimeoutError:
            log.warning("%d notifications were being sent and are sent again", len(self._tasks))
        if self._signing is not None:
            self._signing.cancel()
        await self._tasks.aclose()
        await self._poster.aclose()

    # Leases ------------------------------------------------------------------------------------

    def _on_job(self, delivery: Delivery) -> None:
        """A job arrived: its lease is ours."""
        now = asyncio.get_running_loop().time()
        try:
            at = subjects.parse(delivery.subject)
        except InvalidName as error:
            log.warning("no job: %s", error)
            self._settle(delivery, b"+TERM")
            self._want()
            return
        before = self._held.get(delivery.subject)
        if self._stopped:
            self._settle(delivery, b"-NAK")
            return
        if before is not None:
            # It was changed, or its lease ran out meanwhile: whoever works on it here has to stop first.
            before.lost = True
            before.evict(now)
            self._settle(delivery, _nak(0.2))
            self._want()
            return
        held = _Held(delivery, at["caller"], at["agent"], at["task"], at["config"], now, now)
        self._held[delivery.subject] = held
        self._make_room(now)
        self._tasks.start(self._hold(held), name=f"push {held.name}")

    def _make_room(self, now: float) -> None:
        """Where no place is left for another job, have the one step back that has waited the longest."""
        if len(self._held) < self._limits.follow or any(one.evicted and not one.lost for one in self._held.values()):
            return
        waiting = [one for one in self._held.values() if one.patience is not None]
        if waiting:
            min(waiting, key=lambda one: one.quiet_since).evict(now)

    def _want(self) -> None:
        if not self._stopped:
            self._pull.want(max(0, self._limits.follow - len(self._held)))

    def _settle(self, delivery: Delivery, how: bytes) -> None:
        try:
            self._broker.send(delivery.ack, how)
        except BrokerError as error:
            log.debug("%s stays unsettled, and comes again: %s", delivery.subject, error)

    def _sign_in_progress(self) -> None:
        """Renew every lease, unless it may be another's by now: this process may have stood still."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for held in self._held.values():
            if now - held.renewed > self._ack_wait * 0.75:
                held.lost = True
                held.evict(now)
            elif not held.lost:
                try:
                    self._broker.send(held.delivery.ack, b"+WPI")
                    held.renewed = now
                except BrokerError as error:
                    log.debug("could not renew the lease of %s: %s", held.name, error)
        if len(self._held) >= self._limits.follow and not self._stopped:
            self._tasks.start(self._count(), name="push count")
        self._signing = loop.call_later(self._ack_wait / 4, self._sign_in_progress)

    async def _count(self) -> None:
        """See how many deliveries wait in the whole mesh."""
        try:
            info = await self._broker.api(f"CONSUMER.INFO.{PUSH}.{PUSH_CONSUMER}")
        except WeftError as error:
            log.debug("could not count the deliveries: %s", error)
            return
        self._crowd = (int(info["num_ack_pending"]) - len(self._held)) / self._limits.returns

    def _step_back(self, seconds: float) -> Later:
        """What has a job make room for others."""
        pause = max(self._crowd, min(self._limits.step_back, max(1.0, seconds)))
        return Later(pause * random.uniform(0.8, 1.2))

    async def _hold(self, held: _Held) -> None:
        """Work on a job until it is done, or has to come again."""
        how = b"-NAK"
        try:
            await self._work(held)
        except Ended:
            how = b"+ACK"
        except Lost:
            # Whoever has it now settles it; for a config that is gone this settles nothing.
            how = b""
        except Later as later:
            how = _nak(later.delay)
        except WeftError as error:
            log.log(logging.INFO if error.retryable else logging.WARNING, "%s: %s; trying again", held.name, error)
            how = _nak(TROUBLE)
        except Exception:
            log.exception("%s could not be delivered to; trying again", held.name)
            how = _nak(self._limits.step_back)
        finally:
            if self._held.get(held.delivery.subject) is held:
                del self._held[held.delivery.subject]
            if how and not held.lost:
                self._settle(held.delivery, how)
            self._want()

    # Following ---------------------------------------------------------------------------------

    async def _work(self, held: _Held) -> None:
        """Deliver the log after the cursor, event by event, then what comes. Ends by raising."""
        try:
            job = PushJob.decode(held.delivery.data)
            config = pb.TaskPushNotificationConfig.FromString(job.config)
        except (ParseError, ValueError) as error:
            log.warning("%s is none: %s", held.name, error)
            raise Ended from error
        delivery = Progress(
            self._broker,
            subjects.pushed(held.caller, held.agent, held.task, held.config),
            job,
            since=held.stored,
        )
        await delivery.read()
        cursor = delivery.cursor
        if cursor.ended or (cursor.given_up and cursor.job == held.delivery.sequence):
            raise Ended
        live = subjects.live_task(held.caller, held.agent, held.task)
        subscription = await self._broker.subscribe_raw(live, lambda *_: held.heard.set())
        try:
            await self._broker.flush()
            while True:
                held.heard.clear()
                message = await self._next(held, delivery.cursor)
                if message is None:
                    await self._wait(held, delivery.age)
                    await self._check(held)
                    continue
                delivery.told = message.time
                events = read_stored(message.data, message.headers, seq=message.seq)
                for event in events:
                    if event.n > delivery.cursor.n:
                        await self._push(held, config, event, delivery)
                if events[-1].state in END_LABELS:
                    raise Ended
                delivery.cursor = replace(delivery.cursor, at=max(delivery.cursor.at, message.seq + 1))
        finally:
            await subscription.close()

    async def _next(self, held: _Held, cursor: PushCursor) -> Stored | None:
        """The next message of the task's log, from the cursor's on; None if there is none yet."""
        if not held.log:
            pattern = subjects.GRAMMAR["event"].pattern(agent=held.agent, task=held.task, caller=held.caller)
            found = await self._get({"last_by_subj": pattern})
            if found is None:
                return None
            held.log = found.subject
        return await self._get({"seq": max(1, cursor.at), "next_by_subj": held.log})

    async def _get(self, which: dict[str, str | int]) -> Stored | None:
        return stored(await self._broker.request(f"{DIRECT_GET}.{STREAM}", json.dumps(which).encode()))

    async def _wait(self, held: _Held, age: float) -> None:
        """Wait for the task to say something, or step back for others."""
        try:
            async with self._patient(held, max(POLL, min(self._limits.step_back, age / 4))):
                await held.heard.wait()
        except TimeoutError:
            if held.evicted:
                # The longer a task has stood still, the longer it is likely to.
                raise self._step_back(age / 4) from None

    @asynccontextmanager
    async def _patient(self, held: _Held, limit: float | None) -> AsyncIterator[None]:
        """While inside, the job can be made to step back, which ends the block with TimeoutError."""
        if held.lost:
            raise Lost
        try:
            async with asyncio.timeout(0 if held.evicted or self._stopped else limit) as patience:
                held.evicted = held.evicted or self._stopped
                held.patience = patience
                self._make_room(asyncio.get_running_loop().time())
                yield
        except TimeoutError:
            if held.lost:
                raise Lost from None
            if self._stopped:
                raise Later(0.0) from None
            raise
        finally:
            held.patience = None

    async def _check(self, held: _Held) -> None:
        """Lost unless the lease is this process's and the config is what it was."""
        now = asyncio.get_running_loop().time()
        if held.lost or now - held.renewed > self._ack_wait * 0.75:
            held.lost = True
            raise Lost
        found = await last(self._broker, held.delivery.subject)
        if found is None or found[0] != held.delivery.sequence:
            raise Lost

    # Delivering --------------------------------------------------------------------------------

    async def _push(
        self, held: _Held, config: pb.TaskPushNotificationConfig, event: RawEvent, delivery: Progress
    ) -> None:
        """Deliver one event and move the cursor. Later if it failed, Ended after the last one."""
        if self._stopped:
            raise Later(0.0)
        ends = event.state in END_LABELS
        proto = decoded(event, held.name)
        if proto is not None:
            answer = await self._attempt(held, config, event, proto)
            if not answer.ok:
                self.failed += 1
                await self._failed(held, answer, delivery)
            self.delivered += 1
        held.quiet_since = asyncio.get_running_loop().time()
        await delivery.store(
            PushCursor(delivery.cursor.series, event.n, event.seq, ended=ends, job=held.delivery.sequence)
        )
        if ends:
            raise Ended

    async def _attempt(
        self, held: _Held, config: pb.TaskPushNotificationConfig, event: RawEvent, proto: pb.StreamResponse
    ) -> Answer:
        """Send one notification when it is its turn."""
        try:
            host = self._poster.host(config.url)
        except Refused as error:
            return Answer(False, str(error), final=error.final)
        large = blob_bytes(proto)
        async with AsyncExitStack() as places:
            try:
                async with self._patient(held, None):
                    await places.enter_async_context(self._hosts.one(host))
                    await places.enter_async_context(self._callers.one(held.caller))
                    await places.enter_async_context(self._posts)
                    if large:
                        await places.enter_async_context(self._large)
            except TimeoutError:
                raise self._step_back(5.0) from None
            body = await body_of(self._broker, proto, large=large)
            await self._check(held)
            headers = self._headers(held, config, event, body)
            return await self._poster.post(config.url, body, headers)

    def _headers(
        self, held: _Held, config: pb.TaskPushNotificationConfig, event: RawEvent, body: bytes
    ) -> dict[str, str]:
        headers = {"Content-Type": MEDIA_TYPE, "User-Agent": "weft", h.VERSION: h.A2A_VERSION, h.EVENT: str(event.n)}
        headers |= signed_headers(
            self._signer,
            message_id=f"{held.task}_{held.config}_{event.n}",
            timestamp=int(self._clock()),
            body=body,
        )
        if config.token:
            headers["X-A2A-Notification-Token"] = config.token
        if config.authentication.scheme and config.authentication.credentials:
            headers["Authorization"] = f"{config.authentication.scheme} {config.authentication.credentials}"
        return headers

    async def _failed(self, held: _Held, answer: Answer, delivery: Progress) -> None:
        """Note a failed attempt, and give the job back until the next, or for good. Raises Later or Ended."""
        now, sequence, was = int(self._clock() * 1000), held.delivery.sequence, delivery.cursor
        first = not was.failures or was.job != sequence
        since = now if first else was.since
        failures = 1 if first else was.failures + 1
        given_up = answer.final or (now - since) / 1000 >= self._settings.attempts_for
        await delivery.store(
            replace(was, job=sequence, failures=failures, since=since, reason=answer.reason[:300], given_up=given_up)
        )
        if given_up:
            log.warning("%s is given up after %d attempts: %s", held.name, failures, answer.reason)
            raise Ended
        pause = max(self._backoff.pause(failures), answer.wait)
        log.info("%s: attempt %d failed, the next in %.1f s: %s", held.name, failures, pause, answer.reason)
        raise Later(pause)


def _nak(delay: float) -> bytes:
    return b"-NAK" if delay <= 0 else b'-NAK {"delay": %d}' % int(delay * 1e9)
