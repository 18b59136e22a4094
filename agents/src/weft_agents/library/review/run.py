"""The demo: a mesh of its own on this machine, a review of a folder, and one analyst killed on the way."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Self, TextIO

import weft_agents
from weft.client.mesh import Handle, connect
from weft.client.watch import event_of
from weft.core.broker import Broker, Delivered
from weft.core.server import EmbeddedServer
from weft.core.supervise import Tasks
from weft.core.topology import reconcile
from weft_agents.library.review.agents import REPORT, nothing_to_review
from weft_agents.library.review.processes import Process, Processes
from weft_agents.library.review.progress import Progress, Seen, panel
from weft_agents.library.review.question import Answerer
from weft_agents.library.review.screen import Screen
from weft_agents.library.review.summary import summary
from weft_agents.library.review.survey import survey
from weft_protocols import subjects
from weft_protocols.errors import Unavailable, UsageError, WeftError
from weft_protocols.events import RawEvent, read_stored
from weft_protocols.parts import TaskView
from weft_protocols.records import Claim
from weft_protocols.resources import DURABILITY as DURABILITIES
from weft_protocols.resources import topology
from weft_protocols.states import State

AGENTS: Final = {"surveyor": 1, "analyst": 3, "editor": 1}
"""The agents and their replicas."""
MODULE: Final = "weft_agents.library.review.agents"
DURABILITY: Final = "laptop"
START_TIMEOUT: Final = 45.0
"""Seconds until every process must serve; on a busy machine Python's imports alone take some."""
PATIENCE: Final = 60.0
"""Seconds without any event after which the demo gives up."""
GRACE: Final = 3.0
"""Seconds the processes have to leave."""
DRAIN: Final = 0.3
"""Seconds of these for their tasks: nobody will ask for what is not done when the demo ends."""
FEWEST_TASKS: Final = 12
"""Analyst tasks below which nobody is killed: the work would be over before it could be taken over."""
_FRAME: Final = 0.1


async def run_demo(path: Path, *, yes: bool, out: TextIO, report: Path | None = None) -> int:
    """Review `path` with a mesh that exists only for this, and write the report.

    Args:
        path: a folder of Python files, or one file.
        yes: answer the question of the review without asking.
        out: where the progress and the summary go.
        report: file of the report; `weft-review.md` in the current folder by default.

    Returns:
        0; 1 if the review failed; 128 and its number after a signal other than Ctrl-C's.

    Raises:
        UsageError: there is nothing to review at `path`, or the report cannot be written.
        Unavailable: the mesh did not start, or stopped working.
    """
    target = await asyncio.to_thread(_reviewable, path)
    report_file = await asyncio.to_thread(_writable, report if report is not None else Path(REPORT))
    with _Ending() as ending:
        try:
            return await _Demo(target, report_file, yes=yes, out=out).run()
        except asyncio.CancelledError:
            if ending.signal is None:
                raise
            return 128 + ending.signal


def default_path() -> Path:
    """What is reviewed when nobody names a path: Weft's own checkout, or the installed package."""
    package = Path(weft_agents.__file__).resolve().parent
    checkout = package.parents[2]
    return checkout if checkout / "agents" / "src" / package.name == package else package.parent / "weft"


class _Demo:
    """One run. Everything it starts ends with it."""

    def __init__(self, target: Path, report: Path, *, yes: bool, out: TextIO) -> None:
        self.target = target
        self.report = report
        self.screen = Screen(out)
        self.answerer = Answerer(self.screen, yes=yes, terminal=self.screen.is_terminal)
        self.progress = Progress()
        self.processes = Processes(self._ended)
        self.begun = time.monotonic()
        self.started = self.begun
        """When the mesh was ready."""
        self.waited = 0.0
        """Seconds the review waited for a person."""
        self.victim = ""
        """Label of the analyst that was killed."""
        self.broken: Unavailable | None = None
        self.broker_pid = 0
        self._patience: asyncio.Timeout | None = None
        self._milestone = 0
        self._serving = False
        """Whether every process got ready; until then a process that ends is a failed start."""

    async def run(self) -> int:
        """The demo from the first to the last line."""
        self.screen.line(f"Reviewing {self.target}")
        async with self._home() as home, self._mesh(home) as server:
            try:
                view = await self._review(server)
            finally:
                self.screen.clear()
            finished = time.monotonic()
        texts = {artifact.name: artifact.text for artifact in view.artifacts}
        text = texts.get(REPORT, "")
        if view.state is not State.COMPLETED or not text:
            said = view.message.text if view.message is not None else "it gave no reason"
            self.screen.line(f"The review ended as {view.state.label}: {said}")
            return 1
        try:
            await asyncio.to_thread(self.report.write_text, text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"the report could not be written to {self.report}: {error.strerror}") from error
        for line in summary(
            self.progress,
            headline=texts.get("result", ""),
            report=self.report,
            processes={"broker": self.broker_pid, "coordinator": self.processes.all["coordinator"].pid},
            victim=self.victim,
            times=(self.started - self.begun, finished - self.started - self.waited),
        ):
            self.screen.line(line)
        return 0

    # The mesh ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def _home(self) -> AsyncIterator[Path]:
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="weft-demo-"))
        try:
            yield folder / ".weft"
        finally:
            # Nothing may wait here: this also runs after a second Ctrl-C.
            shutil.rmtree(folder, ignore_errors=True)

    @asynccontextmanager
    async def _mesh(self, home: Path) -> AsyncIterator[EmbeddedServer]:
        """A broker, a coordinator and the agents, each a process with an account of its own."""
        server = EmbeddedServer(home, durability=DURABILITY, agents=AGENTS, orphan_protection=_in_main_thread())
        try:
            await server.start()
            self.broker_pid = server.pid
            await _lay_out(server)
            env = {"WEFT_HOME": str(home), "WEFT_DURABILITY": DURABILITY, "WEFT_GRACE": str(DRAIN)}
            own = {**env, "WEFT_IDENTITY": "coordinator"}
            await self.processes.start("coordinator", ("-m", "weft_coordinator.service"), own)
            for agent, replicas in AGENTS.items():
                for number in range(1, replicas + 1):
                    label = agent if replicas == 1 else f"{agent}-{number}"
                    own = {**env, "WEFT_IDENTITY": agent}
                    process = await self.processes.start(label, ("-m", "weft.host", f"{MODULE}:{agent}"), own)
                    self.progress.add(label, agent, process.pid)
            await self.processes.all_ready(START_TIMEOUT)
            self.started, self._serving = time.monotonic(), True
            names = ", ".join(f"{n} × {agent}" if n > 1 else agent for agent, n in AGENTS.items())
            self.screen.line(f"Started broker, coordinator, {names} in {self.started - self.begun:.1f} s")
            yield server
        finally:
            await self.processes.stop(grace=GRACE)
            await server.stop()

    def _ended(self, process: Process) -> None:
        """A process ended that was not asked to."""
        if not self._serving or process.label == self.victim:
            return
        others = [worker.label for worker in self.progress.analysts if worker.label != process.label]
        if process.label.startswith("analyst") and any(
            not self.processes.all[label].ended.is_set() for label in others
        ):
            self.progress.killed(process.label, time.monotonic())
            self.screen.line(f"{process.label} ended unexpectedly; the others go on")
            return
        self._give_up(Unavailable(f"the demo cannot go on: {process.last_words()}"))

    def _give_up(self, error: Unavailable) -> None:
        self.broken = self.broken or error
        if self._patience is not None:
            self._patience.reschedule(asyncio.get_running_loop().time())

    # The review --------------------------------------------------------------------------------

    async def _review(self, server: EmbeddedServer) -> TaskView:
        """Send the task, show how it goes, answer its question; the task as it ended."""
        watcher = await Broker.connect(server.settings("operator"), name="demo display")
        ticker = Tasks("display of the demo")
        try:
            # What happens in all accounts, as only a member of the mesh sees it.
            await watcher.subscribe("mesh.live.>", lambda message: self._see(*_events_seen(message)))
            await watcher.subscribe("mesh.claim.>", lambda message: self._see(*_claim_seen(message)))
            await watcher.flush()
            ticker.start(self._draw())
            async with connect("local", home=server.home.root) as mesh:
                handle = await mesh.submit("editor", str(self.target), skill="review")
                async with handle:
                    return await self._to_the_end(handle)
        finally:
            await ticker.aclose()
            await watcher.close()

    async def _to_the_end(self, handle: Handle) -> TaskView:
        view = await self._patiently(handle.result(None))
        while view.state.interrupted:
            question = view.message.text if view.message is not None else ""
            asked = time.monotonic()
            self.answerer.busy = True
            answer = await self.answerer.answer(question)
            self.answerer.busy = False
            self.waited += time.monotonic() - asked
            view = await self._patiently(handle.send(answer, timeout=PATIENCE))
        return view

    async def _patiently(self, work: Awaitable[TaskView]) -> TaskView:
        """Wait as long as something happens."""
        try:
            async with asyncio.timeout(PATIENCE) as self._patience:
                if self.broken is not None:
                    raise self.broken
                return await work
        except TimeoutError:
            raise self.broken or Unavailable(
                f"nothing has happened for {PATIENCE:.0f} s; the processes said last:\n"
                + "\n".join(process.last_words() for process in self.processes.all.values())
            ) from None
        finally:
            self._patience = None

    def _see(self, *happened: Seen) -> None:
        now = asyncio.get_running_loop().time()
        if happened and self._patience is not None and self.broken is None:
            self._patience.reschedule(now + PATIENCE)
        for seen in happened:
            if seen.tasks and not self.progress.total:
                self.screen.line(f"The surveyor found {seen.text}")
            for notice in self.progress.observe(seen, time.monotonic()):
                self.screen.line(self.screen.look.paint(notice, "32"))
            self._tell_milestones()
            if not self.victim and seen.agent == "analyst" and seen.replica:
                self._kill_one(seen)

    def _kill_one(self, seen: Seen) -> None:
        """Kill the replica that has just begun a task, once a third of the work is done."""
        progress = self.progress
        worker = progress.worker_of(seen.replica, "analyst")
        if worker is None or progress.total < FEWEST_TASKS or progress.done * 3 < progress.total:
            return
        if len(worker.working) < 2:
            return
        self.victim = worker.label
        self.processes.kill(worker.label)
        progress.killed(worker.label, time.monotonic())
        said = f"Killed {worker.label} (pid {worker.pid}) with SIGKILL while it worked on {worker.held} tasks"
        self.screen.line(self.screen.look.paint(said, "31"))
        silence = DURABILITIES[DURABILITY].ack_wait
        self.screen.line(f"The broker gives them to the others after {silence:g} s without a sign of life")

    def _tell_milestones(self) -> None:
        """Progress in lines, where no moving display can show it."""
        progress = self.progress
        if not self.screen.is_terminal and progress.total:
            quarter = 4 * progress.done // progress.total
            if quarter > self._milestone:
                self._milestone = quarter
                self.screen.line(f"{progress.done} of {progress.total} tasks done")

    async def _draw(self) -> None:
        while self.screen.is_terminal:
            if not self.answerer.busy:
                seconds = time.monotonic() - self.begun
                self.screen.draw(panel(self.progress, look=self.screen.look, seconds=seconds))
            await asyncio.sleep(_FRAME)


class _Ending:
    """Inside, SIGTERM and SIGHUP cancel the current task, so that it can clean up as after Ctrl-C."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()

    def __enter__(self) -> Self:
        for number in self._numbers():
            self._loop.add_signal_handler(number, self._arrived, number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._numbers():
            self._loop.remove_signal_handler(number)

    def _numbers(self) -> tuple[int, ...]:
        return (signal.SIGTERM, signal.SIGHUP) if _in_main_thread() else ()

    def _arrived(self, number: int) -> None:
        if self.signal is None and self._task is not None:
            self.signal = number
            self._task.cancel()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


async def _lay_out(server: EmbeddedServer) -> None:
    """Create the streams, and the consumers of the agents."""
    broker = await Broker.connect(server.settings("coordinator"), name="demo")
    try:
        await reconcile(broker, topology(tuple(AGENTS), DURABILITY))
    finally:
        await broker.close()


def _claim_seen(message: Delivered) -> list[Seen]:
    """Who claims which task; nothing for what is no claim."""
    try:
        tokens, claim = subjects.parse(message.subject), Claim.decode(message.data)
    except WeftError:
        return []
    return [Seen(tokens["agent"], tokens["task"], replica=claim.replica, attempt=claim.attempt, is_claim=True)]


def _events_seen(message: Delivered) -> list[Seen]:
    """What the events of a message of the live feed say; nothing for one that is no task's."""
    try:
        tokens = subjects.parse(message.subject)
    except WeftError:
        return []
    agent, task = tokens["agent"], tokens["task"]
    return [_event_seen(raw, agent, task) for raw in read_stored(message.data, message.headers)]


def _event_seen(raw: RawEvent, agent: str, task: str) -> Seen:
    event = event_of(raw, raw.decode(), task_id=task, agent=agent)
    metadata = event.metadata or {}
    return Seen(
        agent,
        task,
        state=raw.state,
        replica=event.replica or str(metadata.get("replica", "")),
        attempt=event.attempt or int(metadata.get("attempt", 0)),
        text=event.message.text if event.message is not None else "",
        files=int(metadata.get("files", 0)),
        tasks=int(metadata.get("tasks", 0)),
    )


def _reviewable(path: Path) -> Path:
    """The absolute path of what is reviewed; UsageError if there is nothing."""
    found = survey(path)
    if not found.files:
        raise UsageError(f"{nothing_to_review(found)}; name another path: mesh demo PATH")
    return path.expanduser().resolve()


def _writable(report: Path) -> Path:
    """The report's absolute path; UsageError if it cannot be written there."""
    report = report.expanduser().absolute()
    if report.is_dir():
        raise UsageError(f"{report} is a folder; name a file for the report")
    if not report.parent.is_dir():
        raise UsageError(f"there is no folder {report.parent} for the report; create it or name another file")
    if not os.access(report if report.exists() else report.parent, os.W_OK):
        raise UsageError(f"{report} cannot be written; name another file for the report")
    return report
