"""Dead letters: what they say, and what is done about them. For the operator; answered by the leader."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, Final

from weft.core.broker import Broker
from weft.core.supervise import Tasks
from weft_coordinator.decide import letters as decided
from weft_coordinator.decide.index import Entry, TaskIndex
from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.letters import Filter, Job, Letters
from weft_coordinator.decide.registry import Fields
from weft_coordinator.service.part import Body, Decide, Handler, Part, operator_only
from weft_coordinator.shell.letters import AT_ONCE, Letter, LetterReader, request_of, send_again
from weft_coordinator.shell.tail import Tail
from weft_coordinator.shell.tasks import TaskReader
from weft_protocols import a2a, subjects
from weft_protocols import headers as h
from weft_protocols.errors import (
    Backpressure,
    BrokerError,
    Conflict,
    InvalidParams,
    ParseError,
    TaskNotFound,
    TimedOut,
    Unavailable,
    Unreachable,
    WeftError,
)
from weft_protocols.parts import Message

log = logging.getLogger("weft.coordinator")

PAGE: Final = 1000
"""Letters of one answer."""
INLINE: Final = 20
"""Letters that are redriven before the request is answered; more are a job."""
MOST: Final = 100_000
"""Letters of one job or discard."""
MAX_RATE: Final = 1000
NAMED: Final = 1000
"""Tasks that one request may name."""
TAIL: Final = 20
"""Last events that a letter is shown with."""
AGAIN: Final = 2.0
"""Seconds before a job goes on after the broker took nothing."""


class DeadLetters(Part):
    """Lists, shows, redrives and discards dead letters.

    Args:
        decide: Stores events, while this coordinator leads.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        index: TaskIndex,
        tail: Tail,
        tasks: TaskReader,
        reader: LetterReader,
        ledger: Letters,
        decide: Decide,
    ) -> None:
        self._broker = broker
        self._index = index
        self._tail = tail
        self._tasks = tasks
        self._reader = reader
        self._ledger = ledger
        self._decide = decide
        self._busy: set[decided.Key] = set()
        self._running: dict[int, asyncio.Task[Any]] = {}
        self._jobs = Tasks("redrives")

    @property
    def leader_operations(self) -> Mapping[str, Handler]:
        """By name."""
        return {
            "dead-letters": self._list,
            "dead-letter": self._show,
            "redrive": self._redrive,
            "redrives": self._list_jobs,
            "redrive-stop": self._stop,
            "discard": self._discard,
        }

    def deposed(self) -> None:
        """Whoever leads next goes on with the jobs."""
        for task in self._running.values():
            task.cancel()
        self._running.clear()

    async def tick(self, now: int) -> None:
        """Run the jobs that are not over."""
        for job in self._ledger.jobs:
            if not job.ended and job.id not in self._running:
                self._running[job.id] = self._jobs.start(self._run(job.id), name=f"redrive job {job.id}")
        for id_ in [id_ for id_, task in self._running.items() if task.done()]:
            del self._running[id_]

    async def aclose(self) -> None:
        """Stop where it is."""
        await self._jobs.aclose()

    def undecided(self, since: int) -> dict[str, list[Entry]]:
        """Letters nobody has decided about from `since` (unix milliseconds) on, by agent, the newest first."""
        found: dict[str, list[Entry]] = {}
        for entry in self._dead():
            if entry.time // 1_000_000 >= since and self._ledger.state(entry) == "open":
                found.setdefault(entry.agent, []).append(entry)
        return found

    def _dead(self) -> list[Entry]:
        """The task of every letter, the last one first."""
        dead: dict[decided.Key, Entry] = {}
        for entry in self._index.dead:
            dead.setdefault((entry.agent, entry.task), entry)
        return sorted(dead.values(), key=lambda entry: -entry.seq)

    # Views -------------------------------------------------------------------------------------

    async def _list(self, body: Body, caller: str) -> dict[str, Any]:
        """The newest first; `next` is where the next page begins, 0 for none."""
        operator_only(caller, "dead-letters")
        fields = Fields(body)
        wanted = _filter(fields)
        limit, after = fields.number("limit", default=100), fields.number("after", default=0)
        fields.check("dead-letters")
        await self._tail.sync()
        found = await self._matching(wanted)
        begin = next((at for at, one in enumerate(found) if not after or one.entry.seq < after), len(found))
        page = found[begin : begin + min(limit, PAGE)]
        more = begin + len(page) < len(found)
        return {
            "dead_letters": [self._shown(one) for one in await self._reader.read(one.entry for one in page)],
            "total": len(found),
            "next": page[-1].entry.seq if page and more else 0,
        }

    async def _matching(self, wanted: Filter) -> list[Letter]:
        """The letters that fit, the newest first. Records are read where they are needed to tell."""
        fit = [entry for entry in self._dead() if wanted.fits(entry, self._ledger.state(entry))]
        if not wanted.reason:
            return [Letter(entry, None) for entry in fit]
        return [letter for letter in await self._reader.read(fit) if wanted.says(letter.record)]

    def _shown(self, letter: Letter) -> dict[str, Any]:
        entry, record = letter.entry, letter.record
        told = asdict(record) if record is not None else {"reason": "", "error": "", "attempts": 0, "at": 0}
        decision = self._ledger.decision(entry.agent, entry.task)
        return {
            **told,
            "agent": entry.agent,
            "task": entry.task,
            "caller": entry.caller,
            "context": entry.context,
            "time": entry.time // 1_000_000,
            "state": self._ledger.state(entry),
            "redriven_as": decision.task if decision is not None else "",
            "redrives": decision.n if decision is not None else 0,
            "discarded_because": decision.reason if decision is not None else "",
        }

    async def _show(self, body: Body, caller: str) -> dict[str, Any]:
        """One letter with everything there is to know of it."""
        operator_only(caller, "dead-letter")
        fields = Fields(body)
        task = fields.text("task")
        fields.check("dead-letter")
        (entry,) = await self._named([task])
        (letter,) = await self._reader.read([entry])
        told = self._shown(letter)
        try:
            stored = await self._reader.message(entry)
            said = a2a.message_from_proto(request_of(stored).message)
        except (TaskNotFound, ParseError) as error:
            told |= {"message": 0, "parts": [], "unreadable": str(error), "chain": []}
        else:
            chain = h.parse(stored.headers).get(h.CHAIN.lower(), "")
            told |= {"message": stored.seq, "parts": _parts(said), "metadata": said.metadata}
            told["chain"] = [one.strip() for one in chain.split(",") if one.strip()]
        page = await self._tasks.after(entry, max(0, entry.events - TAIL))
        told["events"] = [{"n": event.n, "state": event.state or "", "text": _text(event.decode())} for event in page]
        return {"letter": told}

    # Redriving ---------------------------------------------------------------------------------

    async def _redrive(self, body: Body, caller: str) -> dict[str, Any]:
        """A few letters at once, or a job."""
        operator_only(caller, "redrive")
        fields = Fields(body)
        wanted, names, again = _filter(fields), _names(fields, body), body.get("again") is True
        limit, rate = fields.number("limit", default=MOST), _rate(fields, body)
        fields.check("redrive")
        if not names and not _meant(wanted, body):
            raise InvalidParams("redrive: name tasks, or a filter such as agent or reason, or say all: true")
        if names:
            entries = await self._named(names)
            if len(entries) <= INLINE:
                return {"redriven": [await self._one(entry, again=again) for entry in entries]}
        await self._tail.sync()
        mark = self._index.watermark.events
        chosen = Filter(wanted.agent, wanted.reason, wanted.since, before=mark)
        event = (decided.STARTED, decided.started(chosen, limit=min(limit, MOST), rate=rate, tasks=names))
        (number,) = await self._decide(lambda _: [event])
        return self._job(number).show()

    async def _one(self, entry: Entry, *, again: bool = False, job: int = 0) -> dict[str, Any]:
        """Redrive a letter, unless it was. Never twice at a time."""
        key = (entry.agent, entry.task)
        if key in self._busy:
            raise Conflict(f"the dead letter of task {entry.task} is being redriven right now")
        self._busy.add(key)
        try:
            n = self._ledger.next(*key, again=again)
            before = self._ledger.decision(*key)
            if not n and before is not None:
                return {"task": entry.task, "redriven_as": before.task, "n": before.n, "repeated": True}
            if before is not None and before.task:
                self._check_over(entry, before.task)
            new = await send_again(self._broker, entry, await self._reader.message(entry), n)
            await self._decide(lambda _: [(decided.REDRIVEN, *key, n, new, job)])
        finally:
            self._busy.discard(key)
        return {"task": entry.task, "redriven_as": new, "n": n, "repeated": False}

    def _check_over(self, entry: Entry, task: str) -> None:
        """Conflict while the task of an earlier redrive has not ended."""
        running = self._index.find(entry.agent, task, caller=entry.caller)
        if running is not None and not running.ended:
            raise Conflict(f"task {entry.task} was redriven as {task}, which has not ended; wait for it or cancel it")

    async def _run(self, id_: int) -> None:
        """Redrive a job's letters one after the other, at its rate, until there are none or it is stopped."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        try:
            await self._tail.sync()
            async with aclosing(self._chosen(self._job(id_))) as chosen:
                async for entry in chosen:
                    due = max(due + 1 / self._job(id_).rate, loop.time() - 1)
                    await asyncio.sleep(max(0.0, due - loop.time()))
                    if not await self._finally(id_, entry):
                        break
            if (job := self._ledger.job(id_)) is not None and not job.ended:
                await self._decide(lambda _: [(decided.ENDED, id_, "done")])
        except Unavailable as error:
            log.info("redrive job %d: %s; the next leader goes on", id_, error)
        except BrokerError as error:
            log.warning("redrive job %d: %s; it goes on soon", id_, error)

    async def _finally(self, id_: int, entry: Entry) -> bool:
        """Try a letter until that came to something; False where the job is over."""
        while (job := self._ledger.job(id_)) is not None and not job.ended and job.left > 0:
            if await self._attempt(entry, job):
                return True
        return False

    async def _chosen(self, job: Job) -> AsyncGenerator[Entry, None]:
        """The letters of a job that are still undecided when it is their turn."""
        entries = list(self._ledger.chosen(self._dead()[::-1], job))
        for at in range(0, len(entries), AT_ONCE):
            some = entries[at : at + AT_ONCE]
            letters = await self._reader.read(some) if job.filter.reason else [Letter(entry, None) for entry in some]
            for letter in letters:
                if job.filter.says(letter.record) and self._ledger.state(letter.entry) == "open":
                    yield letter.entry

    async def _attempt(self, entry: Entry, job: Job) -> bool:
        """Try a letter of a job; False if it has to be tried again."""
        try:
            if (entry.agent, entry.task) in self._busy:
                raise Backpressure(f"the dead letter of task {entry.task} is being redriven by hand")
            await self._one(entry, job=job.id)
        except Unavailable:
            raise
        except (Unreachable, TimedOut, Backpressure) as error:
            log.warning("redrive job %d waits: %s", job.id, error)
            await asyncio.sleep(AGAIN)
            return False
        except WeftError as error:
            events: list[Event] = [(decided.FAILED, job.id, entry.agent, entry.task, str(error))]
            if len(job.failures) >= decided.FAILURES:
                events.append((decided.ENDED, job.id, "failed"))
            await self._decide(lambda _: events)
        return True

    async def _list_jobs(self, body: Body, caller: str) -> dict[str, Any]:
        """Bulk redrives, the last one first."""
        operator_only(caller, "redrives")
        return {"redrives": [job.show() for job in reversed(list(self._ledger.jobs))]}

    async def _stop(self, body: Body, caller: str) -> dict[str, Any]:
        """End a job; what it sent stays sent."""
        operator_only(caller, "redrive-stop")
        fields = Fields(body)
        id_ = fields.number("job")
        fields.check("redrive-stop")
        if not self._job(id_).ended:
            await self._decide(lambda _: [(decided.ENDED, id_, "stopped")])
        return self._job(id_).show()

    def _job(self, id_: int) -> Job:
        job = self._ledger.job(id_)
        if job is None:
            raise InvalidParams(f"there is no redrive job {id_}; `redrives` lists them")
        return job

    # Discarding --------------------------------------------------------------------------------

    async def _discard(self, body: Body, caller: str) -> dict[str, Any]:
        """Decide that nothing is done about some letters. Their tasks stay as they are."""
        operator_only(caller, "discard")
        fields = Fields(body)
        # `reason` is why they are discarded; the part of a letter's reason to look for is `matching`.
        reason = fields.text("reason", limit=1000)
        names = _names(fields, body)
        fields.check("discard")
        matching = Fields({**body, "reason": body.get("matching", "")})
        wanted = _filter(matching)
        matching.check("discard")
        if names:
            entries = await self._named(names)
        elif _meant(wanted, body):
            await self._tail.sync()
            chosen = Filter(wanted.agent, wanted.reason, wanted.since, "open")
            entries = [letter.entry for letter in await self._matching(chosen)][:MOST]
        else:
            raise InvalidParams("discard: name tasks, or a filter such as agent or matching, or say all: true")
        for at in range(0, len(entries), PAGE):
            events = [(decided.DISCARDED, one.agent, one.task, reason) for one in entries[at : at + PAGE]]
            await self._decide(lambda _, events=events: events)  # type: ignore[misc]
        return {"discarded": len(entries)}

    async def _named(self, names: Iterable[str]) -> list[Entry]:
        """The letters of tasks. TaskNotFound names one that has none."""
        await self._tail.sync()
        dead: dict[str, Entry] = {}
        for entry in self._index.dead:
            # An agent can say of any id that it was given up: a task that was really sent goes first.
            if entry.created or entry.task not in dead:
                dead[entry.task] = entry
        found = []
        for name in dict.fromkeys(names):
            if name not in dead:
                raise TaskNotFound(f"task {name[:64]} has no dead letter; `dead-letters` lists those there are")
            found.append(dead[name])
        return found


def _filter(fields: Fields) -> Filter:
    state = fields.text("state", default="")
    if state not in ("", *decided.STATES):
        fields.mistake("state", f"must be one of {', '.join(decided.STATES)}")
    agent = fields.text("agent", default="")
    if agent and not subjects.TOKEN.match(agent):
        fields.mistake("agent", "must be the name of an agent")
    return Filter(agent, fields.text("reason", limit=1000, default=""), fields.number("since", default=0), state)


def _meant(wanted: Filter, body: Body) -> bool:
    """Whether it was said which letters are meant: all of them have to be named as such."""
    return bool(wanted.agent or wanted.reason or wanted.since) or body.get("all") is True


def _names(fields: Fields, body: Body) -> list[str]:
    names = body.get("tasks", [])
    if not isinstance(names, list) or len(names) > NAMED or not all(isinstance(name, str) for name in names):
        fields.mistake("tasks", f"must be a list of at most {NAMED} task ids")
        return []
    return names


def _rate(fields: Fields, body: Body) -> float:
    rate = body.get("rate", 10)
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate <= MAX_RATE:
        fields.mistake("rate", f"must be a number of letters a second, more than 0 and at most {MAX_RATE}")
        return 1.0
    return float(rate)


def _parts(message: Message) -> list[dict[str, Any]]:
    """A message's parts for reading; the bytes of files are counted, not shown."""
    shown = []
    for part in message.parts:
        told = asdict(part)
        if isinstance(told.get("content"), bytes):
            told["content"] = f"{len(told['content'])} bytes"
        shown.append(told)
    return shown


def _text(event: Any) -> str:
    """The words of an event."""
    message = event.status_update.status.message if event.HasField("status_update") else event.message
    return " ".join(part.text for part in message.parts if part.HasField("text"))[:500]
