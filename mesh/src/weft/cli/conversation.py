"""One conversation of `mesh send`: the message, what arrives meanwhile, questions and answers, the result."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weft.cli import taskview
from weft.cli.errors import NotFound
from weft.cli.output import Printer, safe
from weft_protocols.errors import DeadlineExceeded
from weft_protocols.parts import Artifact, File, Part, TaskView, Text
from weft_protocols.states import State

if TYPE_CHECKING:
    from weft.client.mesh import Handle, Mesh
    from weft.client.watch import Event

UNANSWERED: Final = 5.0
"""Seconds without any event after which a person is told where to look."""
GRACE: Final = 5.0
"""Seconds beyond the deadline for the host's own word on it."""
TIMED_OUT: Final = DeadlineExceeded.exit_code


@dataclass(frozen=True, slots=True)
class Request:
    """What `mesh send` was asked to do; the options of the command by their names."""

    agent: str
    parts: list[Part]
    skill: str | None = None
    context: str | None = None
    task_id: str | None = None
    message_id: str | None = None
    deadline: float | None = None
    follow: bool = False
    detach: bool = False
    no_input: bool = False
    output_dir: Path | None = None


class Conversation:
    """Runs one request to its result."""

    def __init__(self, request: Request, *, output: str, may_ask: bool) -> None:
        self._request = request
        self._may_ask = may_ask
        self._printer = Printer("jsonl" if request.follow and output == "json" else output)
        self._streamed = False
        self._open_line = False
        self._begun = time.monotonic()

    async def run(self) -> int:
        """Send, wait, answer, print; the exit code."""
        from weft.client.mesh import connect

        request = self._request
        async with connect() as mesh:
            check_agent(mesh, request.agent)
            if request.task_id is not None:
                handle = await mesh.handle(request.agent, request.task_id)
                events = mesh.stream(
                    request.agent,
                    request.parts,
                    task_id=request.task_id,
                    **self._options(context_id=request.context, message_id=request.message_id),
                )
            else:
                handle = await mesh.submit(
                    request.agent,
                    request.parts,
                    **self._options(context_id=request.context, message_id=request.message_id),
                )
                events = handle.events()
            async with handle:
                if request.detach:
                    return self._accepted(handle)
                with self._leaving(handle):
                    return await self._converse(mesh, handle, events)

    async def _converse(self, mesh: Mesh, handle: Handle, events: AsyncIterator[Event]) -> int:
        limit = None if self._request.deadline is None else self._request.deadline + GRACE
        try:
            async with asyncio.timeout(limit) as timer:
                while True:
                    view = await self._until_stop(handle, events)
                    if not (view.state.interrupted and self._may_ask):
                        return self._finish(view)
                    timer.reschedule(None)
                    answer = await self._ask(view)
                    if not answer:
                        return self._finish(view)
                    timer.reschedule(None if limit is None else asyncio.get_running_loop().time() + limit)
                    events = mesh.stream(
                        handle.agent, answer, task_id=handle.id, **self._options(context_id=view.context_id)
                    )
        except TimeoutError:
            error = DeadlineExceeded(f"task {handle.id} of {handle.agent} has not ended by its deadline")
            error.add_note(f"`mesh tasks get {handle.id}` shows it, `mesh tasks cancel {handle.id}` ends it")
            raise error from None

    async def _until_stop(self, handle: Handle, events: AsyncIterator[Event]) -> TaskView:
        """Show events until the task ends or waits."""
        loop = asyncio.get_running_loop()
        unanswered = loop.call_later(UNANSWERED, self._tell_unanswered, handle)
        try:
            async for event in events:
                unanswered.cancel()
                self._show(event)
        finally:
            unanswered.cancel()
        return await handle.result(timeout=None)

    def _show(self, event: Event) -> None:
        """One event, as it arrives."""
        if not self._request.follow:
            if event.state is State.WORKING and event.text:
                self._printer.progress(f"{event.agent}: {event.text}")
            return
        if self._printer.machine:
            self._printer.item(event_record(event), text="")
        elif event.artifact is not None:
            self._stream(event.artifact, append=event.append)
        elif event.state is not None and not event.state.terminal:
            self._end_line()
            self._printer.talk(f"{event.agent}: {event.state.label}" + (f": {event.text}" if event.text else ""))

    def _stream(self, artifact: Artifact, *, append: bool) -> None:
        """An artifact's chunk, on stdout at once."""
        if not append:
            self._end_line()
        for part in artifact.parts:
            if isinstance(part, File) and part.content is not None:
                continue
            text = self._clean(taskview.part_text(part))
            self._printer.out.write(text)
            self._open_line = not text.endswith("\n")
        self._printer.out.flush()
        self._streamed = True

    def _finish(self, view: TaskView) -> int:
        """Print the result, or what went wrong."""
        self._end_line()
        written = save_files(view, self._request.output_dir)
        for path in written:
            self._printer.talk(f"wrote {path}")
        if self._request.output_dir is None and not self._printer.machine:
            for file in taskview.files_of(view):
                self._printer.talk(f"file {taskview.file_label(file)}: --output-dir FOLDER keeps it")
        if self._printer.machine:
            if not self._request.follow:
                self._printer.record(taskview.record(view, contents=self._request.output_dir is None))
        elif view.state is State.COMPLETED:
            text = self._clean(taskview.result_text(view))
            if text and not self._streamed:
                self._printer.record({}, text=text)
        return self._verdict(view)

    def _verdict(self, view: TaskView) -> int:
        """The exit code, and why it is not 0."""
        if view.state is State.COMPLETED:
            return 0
        why = taskview.explanation(view)
        said = f": {why}" if why else ""
        if view.state.interrupted:
            self._printer.talk(f"mesh: task {view.id} is {view.state.label}{said}")
            self._printer.talk(f"  answer with: mesh send {view.agent} --task {view.id} TEXT")
            return 1
        self._printer.talk(f"mesh: task {view.id} of {view.agent} {_ended(view.state)}{said}")
        deadline = self._request.deadline
        late = deadline is not None and time.monotonic() - self._begun >= deadline
        return TIMED_OUT if late and view.state is State.FAILED else 1

    async def _ask(self, view: TaskView) -> str:
        """The person's answer to the task's question; empty after Ctrl-D."""
        question = view.message.text if view.message is not None else ""
        self._end_line()
        self._printer.talk(f"{view.agent} asks: {question or view.state.label}")
        while True:
            self._printer.talk_to.write("> ")
            self._printer.talk_to.flush()
            line = await _read_line()
            if not line or line.strip():
                return line.strip()

    def _accepted(self, handle: Handle) -> int:
        self._printer.record(
            {
                "id": handle.id,
                "agent": handle.agent,
                "context_id": handle.context_id,
                "state": State.SUBMITTED.label,
            },
            text=handle.id,
        )
        return 0

    @contextlib.contextmanager
    def _leaving(self, handle: Handle) -> Iterator[None]:
        """Say how to find the task again when the person stops waiting."""
        try:
            yield
        except asyncio.CancelledError:
            self._end_line()
            self._printer.talk(f"task {handle.id} goes on; `mesh tasks watch {handle.id}` follows it again")
            raise

    def _tell_unanswered(self, handle: Handle) -> None:
        self._printer.talk(
            f"accepted as {handle.id}, but no replica of {handle.agent} has picked it up yet; see `mesh health`"
        )

    def _options(self, **more: Any) -> dict[str, Any]:
        options = {"skill": self._request.skill, "deadline": self._request.deadline, **more}
        return {name: value for name, value in options.items() if value is not None}

    def _clean(self, text: str) -> str:
        return safe(text) if self._printer.out.isatty() else text

    def _end_line(self) -> None:
        if self._open_line:
            self._printer.out.write("\n")
            self._printer.out.flush()
            self._open_line = False


def event_record(event: Event) -> dict[str, Any]:
    """An event as JSON values."""
    made: dict[str, Any] = {"n": event.n, "task": event.task_id, "agent": event.agent}
    if event.state is not None:
        made["state"] = event.state.label
    if event.message is not None:
        made["message"] = taskview.message_record(event.message)
    if event.artifact is not None:
        made["artifact"] = taskview.artifact_record(event.artifact)
        made["append"] = event.append
        made["last_chunk"] = event.last_chunk
    if event.metadata:
        made["metadata"] = event.metadata
    return made


def save_files(view: TaskView, folder: Path | None) -> list[Path]:
    """Write the files among a task's results, and artifacts that are named like one; the paths.

    Names come from the agent: only their last component counts, and nothing that exists is overwritten.
    """
    if folder is None:
        return []
    written: list[Path] = []
    for artifact in view.artifacts:
        written += [
            _write(folder, part.name or artifact.name or artifact.id, part.content)
            for part in artifact.parts
            if isinstance(part, File) and part.content is not None
        ]
        if Path(artifact.name).suffix and all(isinstance(part, Text) for part in artifact.parts):
            written.append(_write(folder, artifact.name, artifact.text.encode()))
    return written


def check_agent(mesh: Mesh, name: str) -> None:
    """NotFound if the mesh on this machine has no such agent; elsewhere only the broker knows."""
    from weft.core.config import did_you_mean
    from weft.core.home import Accounts, Home
    from weft_protocols.subjects import check_name

    check_name(name)
    home = mesh.broker.settings.home
    if home is None or os.environ.get("WEFT_URL"):
        return
    known = Accounts.read(Home(home)).agents
    if known and name not in known:
        raise NotFound(f"this mesh has no agent {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}")


def _write(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    base = Path(name.replace("\\", "/")).name.lstrip(".") or "file"
    path = folder / base
    for n in range(1, 10_000):
        try:
            with path.open("xb") as file:
                file.write(content)
            return path
        except FileExistsError:
            path = folder / f"{Path(base).stem}-{n}{Path(base).suffix}"
    raise FileExistsError(f"{folder} holds too many files called {base}")


def _ended(state: State) -> str:
    return "failed" if state is State.FAILED else f"was {state.label}"


async def _read_line() -> str:
    """A line from the terminal, without a thread that Ctrl-C would leave behind."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    handle = sys.stdin.fileno()
    loop.add_reader(handle, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(handle)
    return sys.stdin.readline()
