"""Which coordinator leads, and the decisions it stores.

The lease is a message with a time to live, which its holder replaces while it lives: the broker removes it when it does
not, and then the first to create it leads. The lease says who should write; that only one can is kept by the log
(`weft_coordinator.shell.decided`), so a leader that was paused and comes back does no harm.

A decision is folded at once and answered once it is stored. While one commit is being stored the next decisions gather:
the busier, the larger the commits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import msgpack

from weft.core.broker import Broker, Delivered, Subscription
from weft.core.home import process_started
from weft.core.supervise import Tasks
from weft_coordinator.decide.laws import LED
from weft_coordinator.decide.ledger import Event
from weft_coordinator.shell.decided import CHUNK, Commit, DecidedLog
from weft_protocols import headers as h
from weft_protocols.errors import BrokerError, Conflict, Unavailable, Unreachable, WeftError
from weft_protocols.resources import COORD, LEASE

log = logging.getLogger("weft.coordinator")

LEASE_SECONDS: Final = 20
"""Seconds a leader that says nothing leads: longer than the broker takes to elect a leader of its own."""
RENEWALS: Final = 4
"""Renewals in the time of a lease."""
LOOK: Final = 2.0
"""Seconds between a standby's looks at the lease; it is told of a clean end at once."""
TTL: Final = "Nats-TTL"


@dataclass(frozen=True, slots=True)
class Term:
    """Who leads, as the lease says it."""

    leader: str
    """Id of the coordinator; empty once it let go."""
    since: int
    """Unix milliseconds."""
    host: str = ""
    pid: int = 0
    started: str = ""
    """The process's start time as the system tells it."""

    @property
    def gone(self) -> bool:
        """Whether its process ran on this machine and does not any more. Nobody has to wait for its lease then."""
        return bool(self.pid) and self.host == socket.gethostname() and process_started(self.pid) != self.started

    def encode(self) -> bytes:
        """The message's bytes."""
        return bytes(msgpack.packb(asdict(self)))

    @staticmethod
    def decode(data: bytes) -> Term:
        """The term in a message; what is none counts as one that was let go of."""
        try:
            told = msgpack.unpackb(data)
            names = ("leader", "since", "host", "pid", "started")
            return Term(**{name: told[name] for name in names if name in told})
        except (ValueError, TypeError, KeyError, msgpack.UnpackException):
            return Term("", 0)


class Terms:
    """A ledger of the leaders so far: the last one and how many there were."""

    kinds = frozenset({LED})

    def __init__(self) -> None:
        self.leader = ""
        self.since = 0
        self.count = 0

    def apply(self, event: Event, *, number: int, at: int) -> None:
        """A coordinator began to lead."""
        self.leader, self.since, self.count = str(event[1]), at, self.count + 1

    def dump(self) -> Any:
        """The state."""
        return [self.leader, self.since, self.count]

    def load(self, dumped: Any) -> None:
        """Be what `dump` gave."""
        self.leader, self.since, self.count = dumped or ("", 0, 0)


@dataclass(slots=True)
class _Waiting:
    """Decisions that are folded and not stored yet."""

    events: list[Event] = field(default_factory=list)
    at: int = 0
    first: int = 0
    size: int = 0
    answers: list[tuple[asyncio.Future[list[int]], list[int]]] = field(default_factory=list)


class Leader:
    """Stands for election and, once elected, stores decisions.

    Args:
        id: This coordinator, as the lease names it.
        clock: Unix milliseconds; nothing depends on its being right.
        lease: Seconds a leader that says nothing leads.
        lead: Awaited when this coordinator begins to lead, before `leading` is true; may decide nothing yet.
        deposed: Called when it leads no more; the ledgers are read anew then.
    """

    def __init__(
        self,
        broker: Broker,
        decided: DecidedLog,
        *,
        id: str,
        clock: Callable[[], int],
        lease: int = LEASE_SECONDS,
        lead: Callable[[], Awaitable[None]],
        deposed: Callable[[], None],
    ) -> None:
        self.id = id
        self.leading = False
        self.term = Term("", 0)
        """Who leads, as far as it is known here."""
        self.commits = 0
        """Commits stored by this coordinator."""
        self._broker = broker
        self._decided = decided
        self._clock = clock
        self._lead = lead
        self._deposed = deposed
        self._seconds = lease
        self._gone: frozenset[str] = frozenset()
        """Coordinators known to be gone, whatever their lease says."""
        self._lease = 0
        """Stream sequence of this coordinator's lease."""
        self._renewed = 0.0
        self._epoch = 0
        self._waiting = _Waiting()
        self._work = asyncio.Event()
        self._look = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._stopping = False
        self._writing = asyncio.Lock()
        """Held while a commit or a snapshot is under way; a new reign begins when none of the last one is."""
        self._tasks = Tasks(f"leader {id}", on_error=lambda _: self._depose("its work failed"))
        self._subscription: Subscription | None = None

    @property
    def epoch(self) -> int:
        """Number of this coordinator's reign, or of the last one it read of."""
        return self._decided.epoch

    async def start(self) -> None:
        """Stand for election: at once, and whenever nobody leads."""
        self._subscription = await self._broker.subscribe(LEASE, self._on_lease)
        self._broker.on_reconnect(self._look.set)
        with contextlib.suppress(WeftError):
            await self._stand()
        self._tasks.start(self._campaign(), name=f"campaign of {self.id}")
        self._tasks.start(self._writer(), name=f"decisions of {self.id}")

    async def stop(self, *, within: float = 5.0) -> None:
        """Store what was decided and let go of the lease, so that a standby leads at once."""
        self._stopping = True
        if self._subscription is not None:
            await self._subscription.close()
        if self.leading:
            try:
                async with asyncio.timeout(within):
                    await self._quiet.wait()
                    # Longer than the lease before it, which would be the last one again once this one is removed.
                    await self._write_lease(Term("", self._clock()), seconds=LEASE_SECONDS + 1)
            except (TimeoutError, WeftError) as error:
                log.warning("the lease could not be let go of: %s", error)
            self._depose("it stops")
        await self._tasks.aclose()

    def are_gone(self, coordinators: Iterable[str]) -> None:
        """Do not wait for the lease of these. If one is not gone after all, it is deposed and loses nothing else."""
        self._gone = frozenset(coordinators)
        self._look.set()

    # Decisions ---------------------------------------------------------------------------------

    def submit(self, act: Callable[[int], Sequence[Event]]) -> asyncio.Future[list[int]]:
        """Decide now; the future has the numbers of the events once they, and all before them, are stored.

        `act` gets the time in unix milliseconds and returns the events; what it raises is raised here and nothing is
        decided. The ledgers show the events as soon as this returns. Without events the future waits for what was
        decided before, since the answer may depend on it.

        Raises:
            Unavailable: this coordinator does not lead. The future raises it when the decision was not stored.
        """
        if not self.leading:
            raise self._not_leading()
        now = self._clock()
        events = act(now)
        waiting = self._waiting
        done: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        if not events and self._quiet.is_set():
            done.set_result([])
            return done
        if not waiting.first:
            waiting.first, waiting.at = self._decided.number + 1, now
        try:
            numbers = [self._decided.take(event, at=waiting.at) for event in events]
        except Exception as error:
            # Some of it is folded and nothing will be stored: only reading anew helps.
            self._depose(f"an event cannot be folded: {error!r}")
            raise
        waiting.events += events
        waiting.answers.append((done, numbers))
        self._quiet.clear()
        self._work.set()
        return done

    async def decide(self, act: Callable[[int], Sequence[Event]]) -> list[int]:
        """`submit`, and wait until it is stored."""
        return await self.submit(act)

    async def _writer(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._waiting.answers and self.leading:
                waiting, self._waiting = self._waiting, _Waiting()
                try:
                    async with self._writing:
                        await self._store(waiting)
                except BrokerError as error:
                    self._fail(waiting)
                    self._depose(f"a decision could not be stored: {error}")
                    break
                except Exception as error:
                    log.exception("a decision cannot be written")
                    self._fail(waiting)
                    self._depose(f"a decision cannot be written: {error!r}")
                    break
                for done, numbers in waiting.answers:
                    if not done.done():
                        done.set_result(numbers)
            if (
                self.leading
                and self._decided.since_snapshot >= self._decided.snapshot_after
                and not self._waiting.answers
            ):
                async with self._writing:
                    await self._snapshot()
            if not self._waiting.answers:
                self._quiet.set()

    async def _store(self, waiting: _Waiting) -> None:
        """One commit, or several where the events are many: none of their decisions counts before all are stored."""
        first = waiting.first
        left = waiting.events
        while left:
            if not self.leading:
                raise Unreachable("it leads no more")
            count, size = 0, 0
            while count < len(left) and size < CHUNK:
                size += len(msgpack.packb(left[count]))
                count += 1
            await self._decided.append(Commit(self._epoch, waiting.at, first, left[:count]))
            self.commits += 1
            first, left = first + count, left[count:]

    async def _snapshot(self) -> None:
        try:
            await self._decided.snapshot()
        except Conflict as error:
            self._depose(f"its snapshot was refused: {error}")
        except WeftError as error:
            log.warning("no snapshot was made: %s; later again", error)
            self._decided.since_snapshot //= 2
        except Exception:
            log.exception("no snapshot can be made; later again")
            self._decided.since_snapshot //= 2

    def _fail(self, waiting: _Waiting) -> None:
        for done, _ in waiting.answers:
            if not done.done():
                done.set_exception(
                    Unavailable("the coordinator does not lead any more; what was asked was not decided")
                )
                done.exception()

    def _not_leading(self) -> Unavailable:
        who = f"; {self.term.leader} does" if self.term.leader not in ("", self.id) else ""
        return Unavailable(f"coordinator {self.id} does not lead{who}")

    # Election ----------------------------------------------------------------------------------

    async def _campaign(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._seconds / RENEWALS if self.leading else LOOK):
                    await self._look.wait()
            except TimeoutError:
                pass
            self._look.clear()
            if self._stopping:
                return
            try:
                if self.leading:
                    await self._renew()
                else:
                    await self._stand()
            except WeftError as error:
                log.warning("could not look after the lease: %s", error)
            except Exception:
                log.exception("cannot lead; perhaps another coordinator can")
                with contextlib.suppress(WeftError):
                    await self._write_lease(Term("", self._clock()), seconds=1)
                await asyncio.sleep(LOOK)

    def _on_lease(self, message: Delivered) -> None:
        # Only a hint: the broker may refuse what is heard here.
        if not self.leading and not Term.decode(message.data).leader:
            self._look.set()

    async def _renew(self) -> None:
        try:
            await self._write_lease(self.term, seconds=self._seconds)
        except Conflict:
            self._depose("another coordinator has the lease")
        except WeftError:
            if asyncio.get_running_loop().time() - self._renewed > self._seconds:
                self._depose("the lease could not be renewed")
            raise

    async def _stand(self) -> None:
        """Lead if nobody does."""
        stored = await self._broker.last(COORD, LEASE)
        self.term = Term.decode(stored.data) if stored is not None else Term("", 0)
        if self.term.leader == self.id and stored is not None:
            self._lease = stored.seq  # it wrote it, and did not hear so
        elif self.term.leader and not self.term.gone and self.term.leader not in self._gone:
            return
        else:
            self._lease = stored.seq if stored is not None else 0
        pid = os.getpid()
        wanted = Term(self.id, self._clock(), socket.gethostname(), pid, process_started(pid) or "")
        try:
            await self._write_lease(wanted, seconds=self._seconds)
        except Conflict:
            self._look.set()
            return
        self.term = wanted
        await self._begin()

    async def _begin(self) -> None:
        """Read what was decided and begin an epoch: from its first commit on nobody else can write."""
        async with self._writing:
            while not await self._new_epoch():
                pass  # an earlier leader wrote in between
        self._waiting = _Waiting()
        try:
            await self._lead()
        except BaseException:
            self._decided.led = False
            self._decided.doubt()
            self._deposed()
            raise
        self.leading = True
        log.info("leads in epoch %d: %d events were decided before", self._epoch, self._decided.number - 1)

    async def _new_epoch(self) -> bool:
        await self._decided.sync()
        async with self._decided.alone:
            commit = Commit(self._decided.epoch + 1, self._clock(), self._decided.number + 1, [(LED, self.id)])
            self._decided.take(commit.events[0], at=commit.at)
            try:
                await self._decided.append(commit)
            except Conflict:
                self._decided.doubt()
                return False
            except BaseException:
                self._decided.doubt()
                raise
            self._epoch = commit.epoch
            self._decided.led = True
            return True

    async def _write_lease(self, term: Term, *, seconds: int) -> None:
        lines = {h.EXPECTED_SEQUENCE: str(self._lease), TTL: f"{seconds}s"}
        asked = asyncio.get_running_loop().time()
        self._lease = await self._broker.publish(LEASE, term.encode(), headers=h.block(h.fields(lines)), timeout=4.0)
        self._renewed = asked

    def _depose(self, why: str) -> None:
        if not self.leading:
            return
        self.leading = False
        log.log(logging.INFO if self._stopping else logging.WARNING, "leads no more: %s", why)
        waiting, self._waiting = self._waiting, _Waiting()
        self._fail(waiting)
        self._decided.led = False
        self._decided.doubt()
        self._quiet.set()
        self.term = Term("", 0)
        self._deposed()
        self._look.set()
