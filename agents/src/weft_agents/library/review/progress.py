"""How a review goes, as a fold over what is seen of it. Pure: time comes in as an argument."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from weft_agents.library.review.markdown import count
from weft_protocols.states import END_LABELS


@dataclass(frozen=True, slots=True)
class Seen:
    """One stored event of one task."""

    agent: str
    task: str
    state: str = ""
    """`Weft-State`, empty where the event changes none."""
    replica: str = ""
    """Replica that wrote it, where the event says so."""
    attempt: int = 0
    """Attempt it belongs to; 0 where the event does not say."""
    text: str = ""
    files: int = 0
    """Files of the whole review, on the event that announces them."""
    tasks: int = 0
    """Analyst tasks of the whole review, likewise."""
    is_claim: bool = False
    """A claim on its way to the stream. It may still be refused, so it counts only where nobody is known."""


@dataclass(slots=True)
class Worker:
    """One process that runs an agent."""

    label: str
    agent: str
    pid: int
    done: int = 0
    later_attempts: int = 0
    """Tasks it finished that somebody else had begun."""
    working: dict[str, str] = field(default_factory=dict)
    """Tasks in work and what they are about."""
    killed_at: float | None = None
    held: int = 0
    """Tasks in work when it was killed."""


@dataclass(frozen=True, slots=True)
class Takeover:
    """A task that one worker lost and another went on with."""

    task: str
    before: str
    """Label of the worker that was killed."""
    after: str
    attempt: int
    seconds: float
    """From the kill to the first sign of the new owner."""


@dataclass(slots=True)
class Row:
    """One task."""

    agent: str
    text: str = ""
    owner: str = ""
    """Label of the worker that has it, or had it last."""
    attempt: int = 1
    ended: str = ""
    untold: Takeover | None = None
    """A takeover that was seen before it was known what the task is about."""


class Progress:
    """Everything the display and the summary show."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.rows: dict[str, Row] = {}
        self.takeovers: list[Takeover] = []
        self.files = 0
        self.total = 0
        """Analyst tasks of the review; 0 until the editor says so."""
        self.doubled = 0
        """Terminal events after a task's first: there must be none."""

    def add(self, label: str, agent: str, pid: int) -> None:
        """A worker process that was started."""
        self.workers[label] = Worker(label, agent, pid)

    @property
    def done(self) -> int:
        """Analyst tasks that have ended."""
        return sum(bool(row.ended) for row in self.rows.values() if row.agent == "analyst")

    @property
    def analysts(self) -> list[Worker]:
        """The analyst workers in the order they were added."""
        return [worker for worker in self.workers.values() if worker.agent == "analyst"]

    def worker_of(self, replica: str, agent: str) -> Worker | None:
        """The worker with this replica id, which begins with its process id."""
        pid = replica.partition("-")[0]
        known = (worker for worker in self.workers.values() if worker.agent == agent)
        return next((worker for worker in known if str(worker.pid) == pid), None)

    def observe(self, seen: Seen, now: float) -> Iterator[str]:
        """Take one event in; yields what is worth a line of its own."""
        row = self.rows.setdefault(seen.task, Row(seen.agent))
        if row.ended:
            self.doubled += seen.state in END_LABELS
            return
        row.attempt = max(row.attempt, seen.attempt)
        if seen.agent == "analyst" and seen.text and not seen.text.startswith("attempt "):
            row.text = seen.text
        if seen.replica and not (seen.is_claim and row.owner):
            self._owned(row, seen, now)
        if row.untold is not None and (row.text or seen.state in END_LABELS):
            yield _told(row.untold, row.text)
            row.untold = None
        if seen.agent == "editor":
            self.files, self.total = seen.files or self.files, seen.tasks or self.total
        if seen.state in END_LABELS:
            self._ended(row, seen)

    def killed(self, label: str, now: float) -> None:
        """A worker was killed."""
        worker = self.workers[label]
        worker.killed_at = now
        worker.held = len(worker.working)

    def held_by(self, label: str) -> list[str]:
        """Tasks that a worker began and did not end."""
        return [task for task, row in self.rows.items() if row.owner == label and not row.ended]

    def _owned(self, row: Row, seen: Seen, now: float) -> None:
        worker = self.worker_of(seen.replica, seen.agent)
        if worker is None:
            return
        before = self.workers.get(row.owner)
        row.owner = worker.label
        worker.working[seen.task] = row.text
        if before is None or before is worker:
            return
        before.working.pop(seen.task, None)
        since = now - before.killed_at if before.killed_at is not None else 0.0
        row.untold = Takeover(seen.task, before.label, worker.label, row.attempt, since)
        self.takeovers.append(row.untold)

    def _ended(self, row: Row, seen: Seen) -> None:
        row.ended = seen.state
        worker = self.workers.get(row.owner) or self._only_worker(seen.agent)
        if worker is not None:
            worker.working.pop(seen.task, None)
            worker.done += 1
            worker.later_attempts += row.attempt > 1

    def _only_worker(self, agent: str) -> Worker | None:
        # A task that never named its replica can still be attributed where there is only one.
        known = [worker for worker in self.workers.values() if worker.agent == agent]
        return known[0] if len(known) == 1 else None


def _told(takeover: Takeover, text: str) -> str:
    return (
        f"{takeover.after} takes over task {takeover.task[:8]} from {takeover.before} "
        f"after {takeover.seconds:.1f} s (attempt {takeover.attempt}): {text}"
    )


@dataclass(frozen=True, slots=True)
class Look:
    """What a terminal can show."""

    width: int = 80
    bar: str = "█"
    rest: str = "░"
    cut: str = "…"
    color: bool = False

    def paint(self, text: str, code: str) -> str:
        """Text in a colour, where there are colours."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.color else text

    def fit(self, text: str, width: int | None = None) -> str:
        """Text cut to a width; the end of a path says more than its beginning, so the middle goes."""
        width = self.width if width is None else width
        if len(text) <= width:
            return text
        if width < 8:
            return text[: max(0, width)]
        keep = width - len(self.cut)
        return text[: keep // 3] + self.cut + text[len(text) - (keep - keep // 3) :]

    def meter(self, part: int, whole: int, width: int = 30) -> str:
        """A bar, filled in proportion."""
        filled = min(width, width * part // whole) if whole else 0
        return self.bar * filled + self.rest * (width - filled)


def panel(progress: Progress, *, look: Look, seconds: float) -> list[str]:
    """The moving part of the display: the bar, and what every analyst does."""
    if not progress.total:
        return [look.fit(f"  the surveyor walks the folder  {seconds:.0f} s")]
    meter = look.meter(progress.done, progress.total, min(30, max(5, look.width - 45)))
    lines = [
        look.fit(
            f"  {meter} {progress.done}/{count(progress.total, 'task')}, {count(progress.files, 'file')}, "
            f"{seconds:.0f} s"
        )
    ]
    width = max((len(worker.label) for worker in progress.analysts), default=0)
    for worker in progress.analysts:
        begin = f"  {worker.label:<{width}}  pid {worker.pid}  {worker.done:>4} done  "
        if worker.killed_at is not None:
            left = len(progress.held_by(worker.label))
            what = f"killed; {count(left, 'task')} left to take over" if left else "killed; its work was taken over"
            lines.append(begin + look.paint(look.fit(what, look.width - len(begin)), "31"))
        else:
            newest = next(reversed(worker.working.values()), "")
            lines.append(begin + look.fit(newest, look.width - len(begin)))
    return lines
