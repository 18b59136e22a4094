"""Keeps Presidio in a process of its own and asks it: it is large, slow to start and would hold up every other call."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from weft.core.process import dying_with_us
from weft.core.supervise import Tasks
from weft.policy.patterns import PRESIDIO
from weft.policy.redaction import Redactor, Span, redactor
from weft.sidecar.inorder import InOrder
from weft.sidecar.weight import aside

log = logging.getLogger("weft.sidecar")

START: Final = 60.0
"""Seconds the process has to load what it needs."""
ANSWER: Final = 20.0
"""Seconds it has for one question; then it hangs, and is replaced."""
WITHIN: Final = 30.0
"""Seconds in which everything one result holds has to be looked through, other results' turns included."""
AGAIN: Final = 10.0
"""Seconds after a start that failed in which it is not tried again."""
LEAVE: Final = 2.0
"""Seconds between the end of its input and SIGKILL."""
LARGEST: Final = 256 * 1024
"""Characters that are looked through at once; more would take it longer than anybody waits."""
QUESTION: Final = 8 * 1024
"""Characters of one question: whoever asks for little waits for no more than one of them."""
OVERLAP: Final = 256
"""Characters that pieces of a long text have in common: what is shorter is whole in one of them."""
LINE: Final = 8 * 1024 * 1024
"""Bytes of one answer."""
_WORKER: Final = "weft.sidecar.presidio.worker"


class Unrecognized(Exception):
    """Nobody looked: the process does not run, hangs, or there is too much for it. The text says why."""


@dataclass(frozen=True, slots=True)
class _Worker:
    process: asyncio.subprocess.Process
    questions: asyncio.StreamWriter
    answers: asyncio.StreamReader

    async def said(self) -> Mapping[str, Any]:
        """What it says next. Raises ValueError if that is nothing that can be read."""
        line = await self.answers.readline()
        if not line:
            raise ValueError("it said nothing more")
        told = json.loads(line)
        if not isinstance(told, dict):
            raise ValueError("it said something else")
        return told

    async def aclose(self) -> None:
        """End it: by the end of its input, else by force."""
        self.questions.close()
        try:
            async with asyncio.timeout(LEAVE):
                await self.process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


class Recognizer:
    """Asks Presidio what is to be taken out of texts. Its process starts when it is first needed.

    Args:
        config: Presidio's own analyzer configuration, a YAML file; empty for its patterns alone, without a model.
    """

    def __init__(self, config: str = "") -> None:
        self.fault = ""
        """Why it could not be started last; empty if it could, or nobody tried."""
        self._command = (sys.executable, "-m", _WORKER, *filter(None, [config]))
        self._worker: _Worker | None = None
        self._starting: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._count = 0
        self._retry_at = 0.0
        self._closed = False
        self._tasks = Tasks("Presidio")

    @property
    def pid(self) -> int | None:
        """Of its process; None if none runs."""
        process = self._worker.process if self._worker is not None else None
        return process.pid if process is not None and process.returncode is None else None

    def begin(self) -> None:
        """Have it started without waiting for that."""
        if self.pid is None and not self._closed:
            self._tasks.start(self._begun(), name="start of Presidio")

    async def ready(self, within: float = START) -> str:
        """Start it, if it does not run. Why it cannot be asked; empty if it can."""
        if self.pid is not None:
            return ""
        try:
            async with asyncio.timeout(within), self._turn:
                await self._running()
        except Unrecognized as error:
            return str(error)
        except TimeoutError:
            return f"Presidio was not ready within {within:.0f} s"
        return ""

    async def redactor(
        self, classes: frozenset[str], walk: Callable[[Redactor], object], *, large: bool, within: float = WITHIN
    ) -> Redactor:
        """The redactor of some classes. Of `presidio`, it knows what there is in all texts that `walk` shows it.

        `large` says whether to walk in a thread. Raises Unrecognized if nobody could look within so many seconds.
        """
        if PRESIDIO not in classes:
            return redactor(classes)
        texts: set[str] = set()

        def seen(text: str) -> tuple[Span, ...]:
            texts.add(text)
            return ()

        await aside(walk, Redactor(sorted(classes), recognize=seen), large=large)
        found = await self.spans(texts, within)
        return Redactor(sorted(classes), recognize=found.__getitem__)

    def line(self, name: str) -> InOrder:
        """A line for work that asks, which ends with this."""
        return InOrder(self._tasks, name)

    async def spans(self, texts: Iterable[str], within: float = WITHIN) -> dict[str, list[Span]]:
        """What is to be taken out of each text. Raises Unrecognized if that is not known within so many seconds."""
        wanted = set(texts)
        size = sum(map(len, wanted))
        if size > LARGEST:
            raise Unrecognized(f"{size:,} characters are more than Presidio looks through ({LARGEST:,})")
        found: dict[str, list[Span]] = {text: [] for text in wanted}
        try:
            async with asyncio.timeout(within):
                for question in _questions(wanted):
                    answer = await self._ask([piece for _, _, piece in question])
                    for (text, offset, _), spans in zip(question, answer, strict=True):
                        found[text] += [(offset + begin, offset + end, kind) for begin, end, kind in spans]
        except TimeoutError:
            raise Unrecognized(f"Presidio did not look through it within {within:.0f} s") from None
        return {text: list(_merged(spans)) for text, spans in found.items()}

    async def aclose(self) -> None:
        """End it."""
        self._closed = True
        await self._tasks.aclose()
        async with self._turn:
            await self._end()

    async def _begun(self) -> None:
        if fault := await self.ready():
            log.error("%s; what needs it is refused", fault)

    async def _ask(self, texts: Sequence[str]) -> list[list[Span]]:
        """One question, in its turn: of several who ask for much, each asks one after the other."""
        async with self._turn:
            worker = await self._running()
            self._count += 1
            line = json.dumps({"id": self._count, "texts": list(texts)}) + "\n"
            answer = await self._answered(worker, line.encode(), self._count)
            if "fault" in answer:
                raise Unrecognized(f"Presidio failed: {answer['fault']}")
            made = [[(int(a), int(b), str(kind)) for a, b, kind in one] for one in answer.get("spans", ())]
            if len(made) != len(texts):
                await self._end()
                raise Unrecognized("Presidio did not answer what it was asked")
            return made

    async def _answered(self, worker: _Worker, line: bytes, ident: int) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(ANSWER):
                worker.questions.write(line)
                await worker.questions.drain()
                while (answer := await worker.said()).get("id") != ident:
                    pass  # of somebody who did not wait for it
                return answer
        except TimeoutError:
            log.error("Presidio did not answer within %.0f s and is ended", ANSWER)
            await self._end()
            raise Unrecognized(f"Presidio did not answer within {ANSWER:.0f} s") from None
        except (OSError, ValueError) as error:
            await self._end()
            raise Unrecognized(f"Presidio's process ended: {error}") from None

    async def _running(self) -> _Worker:
        """Its process, started if it has to be. Only in turn."""
        if self._closed:
            raise Unrecognized("the sidecar ends")
        if self.pid is None:
            now = asyncio.get_running_loop().time()
            if self.fault and now < self._retry_at:
                raise Unrecognized(self.fault)
            await self._end()
            if self._starting is None or self._starting.done():
                self._starting = self._tasks.start(self._start(), name="start of Presidio")
            await asyncio.shield(self._starting)  # it goes on without whoever does not wait any more
        if self._worker is None:
            raise Unrecognized(self.fault)
        return self._worker

    async def _start(self) -> None:
        worker, self.fault = None, ""
        try:
            worker = await self._spawned()
            async with asyncio.timeout(START):
                told = await worker.said()
            self.fault = str(told.get("fault", ""))
        except TimeoutError:
            self.fault = f"Presidio did not start within {START:.0f} s"
        except (OSError, ValueError) as error:
            self.fault = f"Presidio cannot be started: {error}"
        except asyncio.CancelledError:
            if worker is not None:
                await worker.aclose()
            raise
        if not self.fault and worker is not None:
            log.info("Presidio runs in process %d", worker.process.pid)
            self._worker = worker
            return
        self._retry_at = asyncio.get_running_loop().time() + AGAIN
        if worker is not None:
            await worker.aclose()

    async def _spawned(self) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            *dying_with_us(self._command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=LINE,
        )
        if process.stdin is None or process.stdout is None:
            raise OSError("it has no input or output")
        return _Worker(process, process.stdin, process.stdout)

    async def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.aclose()


def _questions(texts: Iterable[str]) -> Iterator[list[tuple[str, int, str]]]:
    """Pieces of texts, as many at once as one question may hold: the text, where in it the piece begins, the piece."""
    question: list[tuple[str, int, str]] = []
    room = QUESTION
    for text in texts:
        for offset in range(0, max(1, len(text) - OVERLAP), QUESTION - OVERLAP):
            piece = text[offset : offset + QUESTION]
            if question and len(piece) > room:
                yield question
                question, room = [], QUESTION
            question.append((text, offset, piece))
            room -= len(piece)
    if question:
        yield question


def _merged(spans: Iterable[Span]) -> Iterator[Span]:
    """In order and nowhere twice: what two pieces have in common was found in both."""
    last: Span | None = None
    for span in sorted(spans):
        if last is not None and span[0] < last[1]:
            last = (last[0], max(last[1], span[1]), last[2] if last[1] - last[0] >= span[1] - span[0] else span[2])
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last
