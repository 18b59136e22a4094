"""The three agents of a code review, to be run as services.

`editor` is the one to send to: a path as text. It has `surveyor` list the files, has `analyst` read them in
parallel, asks its caller what the report should begin with, and answers with a Markdown artifact. All three
read the folder themselves, so they run on the machine where it is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from weft import Agent, Task
from weft_agents.library.review import survey as surveying
from weft_agents.library.review.analysis import FileReview, analyse_file
from weft_agents.library.review.figures import figures
from weft_agents.library.review.markdown import count
from weft_agents.library.review.report import FOCUS, Contents, Work, headline, render
from weft_agents.library.review.survey import Survey, batches
from weft_protocols.errors import DeadlineExceeded, Reject, TaskEnded, TaskRejected, UsageError

VERSION: Final = "1.0.0"
REPORT: Final = "weft-review.md"
"""Name of the editor's artifact."""
QUESTION: Final = "What should the report begin with?"
AT_A_TIME: Final = 4
"""Files one analyst replica reads at a time; reading needs the processor, so more would only wait."""
TIME_FOR_A_TASK: Final = 600.0
"""Seconds until an analyst task is given up and its files are reported as not read."""

surveyor = Agent("surveyor", version=VERSION, description="Lists the Python files of a folder")
analyst = Agent(
    "analyst",
    version=VERSION,
    description="Reads Python files: sizes, complexity, risks",
    concurrency=AT_A_TIME,
)
editor = Agent("editor", version=VERSION, description="Reviews a folder of Python code and writes a report")


@surveyor.skill("survey", tags=["code"], description="The Python files under a path, and what is left out")
async def survey(task: Task, path: str) -> dict[str, Any]:
    """Walk the folder at `path`."""
    try:
        found = await asyncio.to_thread(surveying.survey, Path(path))
    except UsageError as error:
        raise Reject(str(error)) from error
    return found.to_json()


@analyst.skill("analyse", tags=["code"], description="Sizes, complexity and findings of Python files")
async def analyse(task: Task, root: str, files: list[str]) -> dict[str, Any]:
    """Read `files`, paths relative to the folder `root`.

    Each file is a step: whoever takes the task over reads only what is left.
    """
    started = time.monotonic()
    folder = Path(root)
    for path in files:
        _check_inside(folder, path)

    async def who() -> str:
        return task.replica

    first = str(await task.step("begun-by", who))
    said = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    await task.update(said, replica=task.replica, attempt=task.attempt)
    reviews = [await task.step(f"read {path}", _read, root, path) for path in files]
    work = Work(task.id, tuple(files), task.replica, task.attempt, first, time.monotonic() - started)
    return {"reviews": reviews, "work": work.to_json()}


@editor.skill("review", tags=["code"], description="A Markdown report on a folder of Python code")
async def review(task: Task, path: str) -> str:
    """Review the folder or file at `path`."""
    found = await _survey(task, path)
    if not found.files:
        raise Reject(nothing_to_review(found))
    groups = batches(found.files)
    await task.update(
        f"{count(len(found.files), 'Python file')} in {count(len(groups), 'task')}",
        files=len(found.files),
        tasks=len(groups),
        skipped=len(found.skipped),
    )
    results = await task.gather(
        *(_have_analysed(task, i, root=found.root, files=files) for i, files in enumerate(groups))
    )
    reviews = tuple(review for reviews, _ in results for review in reviews)
    work = tuple(work for _, work in results if work is not None)
    made = Contents(found, reviews, figures(reviews), work)
    await task.update(headline(made))
    focus = await _ask_for_focus(task)
    report = await asyncio.to_thread(render, Contents(found, reviews, made.figures, work, focus))
    await task.artifact(REPORT, report, media_type="text/markdown", description=f"Code review, {FOCUS[focus]}")
    return headline(made)


def parse_focus(answer: str) -> str | None:
    """The focus an answer means: its name, the beginning, or its number in the list; None if unclear."""
    word = answer.strip().lower()
    if word.isdigit():
        return list(FOCUS)[int(word) - 1] if 1 <= int(word) <= len(FOCUS) else None
    matches = [name for name in FOCUS if word and (name.startswith(word) or name in word.split())]
    return matches[0] if len(matches) == 1 else None


def nothing_to_review(found: Survey) -> str:
    """What to say about a path without a file to review."""
    text = f"there is no Python file to review in {found.root}"
    details = [f"{skipped.path} is skipped: {skipped.reason}" for skipped in found.skipped[:3]]
    if found.others:
        details.append(f"{count(found.others, 'file')} in other formats")
    return text + (f" ({'; '.join(details)})" if details else "")


async def _survey(task: Task, path: str) -> Survey:
    try:
        view = await task.delegate("surveyor", path, skill="survey")
    except TaskRejected as error:
        raise Reject(_reason(error)) from error
    return Survey.from_json(view.data)


async def _have_analysed(
    task: Task, index: int, *, root: str, files: Sequence[str]
) -> tuple[list[FileReview], Work | None]:
    """Reviews of some files. A task that fails costs the report these files, not the report."""
    try:
        view = await task.delegate(
            "analyst",
            {"root": root, "files": list(files)},
            skill="analyse",
            key=f"analyse-{index}",
            deadline=TIME_FOR_A_TASK,
        )
    except (TaskEnded, DeadlineExceeded) as error:
        return [FileReview(path, problem=f"not read: {_reason(error)}") for path in files], None
    data = view.data
    return [FileReview.from_json(review) for review in data["reviews"]], Work.from_json(data["work"])


async def _ask_for_focus(task: Task) -> str:
    options = [f"{number} {name}: {title}" for number, (name, title) in enumerate(FOCUS.items(), start=1)]
    question = f"{QUESTION} {', '.join(options)}"
    for _ in range(3):
        answer = await task.ask(question, options=list(FOCUS))
        focus = parse_focus(answer.text)
        if focus is not None:
            return focus
        question = f"{answer.text[:40]!r} is none of {', '.join(FOCUS)}. {QUESTION}"
    return next(iter(FOCUS))


def _read(root: str, path: str) -> dict[str, Any]:
    return analyse_file(Path(root), path).to_json()


def _check_inside(root: Path, path: str) -> None:
    # The paths come from another agent: nothing outside the folder under review is read for it.
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise Reject(f"{path} is not inside {root}")


def _reason(error: Exception) -> str:
    """What a child said, without the id of its task."""
    _, colon, said = str(error).partition(": ")
    return said if colon else str(error)
