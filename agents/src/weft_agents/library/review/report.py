"""The report in Markdown. Pure: figures in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from weft_agents.library.review.analysis import FileReview
from weft_agents.library.review.figures import COMPLEX, LONG, Figures
from weft_agents.library.review.markdown import bars, code, count, number, plain, table
from weft_agents.library.review.risks import KINDS, SEVERITIES
from weft_agents.library.review.survey import Skipped, Survey

BAND_NAMES: Final = ("1-5 simple", "6-10 moderate", "11-20 complex", "over 20")
FOCUS: Final = {
    "risks": "risks first",
    "complexity": "complexity first",
    "summary": "a short summary",
}
"""What the report can begin with, and how the question names it."""
_ROWS: Final = 15


@dataclass(frozen=True, slots=True)
class Work:
    """One analyst task: who did it, and on which attempt."""

    task: str
    files: tuple[str, ...]
    replica: str
    attempt: int
    first_replica: str
    """Replica that began the task; another one than `replica` when the work was taken over.

    Where the first one died before it could record that, it is the one that finished.
    """
    seconds: float
    """Duration of the attempt that finished."""

    @property
    def taken_over(self) -> bool:
        """Whether another replica finished what one had begun."""
        return self.attempt > 1 and self.first_replica != self.replica

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote."""
        return cls(
            value["task"],
            tuple(value["files"]),
            value["replica"],
            int(value["attempt"]),
            value["first_replica"],
            float(value["seconds"]),
        )


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything a report is made of."""

    survey: Survey
    reviews: tuple[FileReview, ...]
    figures: Figures
    work: tuple[Work, ...]
    focus: str = "risks"


def render(contents: Contents) -> str:
    """The whole report. Every surveyed file has exactly one row in its last section."""
    first = [_risks, _complexity] if contents.focus != "complexity" else [_complexity, _risks]
    detail = [*first, _tests, _words, _marks]
    sections = [_title, _figures, _hot_spots]
    if contents.focus != "summary":
        sections += detail
    sections += [_who, _skipped, _files]
    blocks = ["\n".join(section(contents)).strip("\n") for section in sections]
    return "\n\n".join(block for block in blocks if block) + "\n"


def headline(contents: Contents) -> str:
    """The report in one sentence."""
    f = contents.figures
    high = f.by_severity["high"]
    return (
        f"{count(f.files, 'file')} with {number(f.lines)} lines: "
        f"{count(len(f.findings), 'finding')} outside tests ({high} high), "
        f"{count(len(f.complex_functions), 'complex function')}, "
        + (f"{count(len(f.untested), 'module')} without a test." if f.has_tests else "no tests.")
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _more(rows: Sequence[object], shown: int = _ROWS) -> list[str]:
    return ["", f"… and {number(len(rows) - shown)} more."] if len(rows) > shown else []


def _title(contents: Contents) -> Iterator[str]:
    yield "# Code review"
    yield ""
    yield f"Of {code(contents.survey.root)}, {FOCUS[contents.focus]}."
    yield ""
    yield headline(contents)


def _figures(contents: Contents) -> Iterator[str]:
    f = contents.figures
    yield "## Figures"
    yield ""
    yield table(
        ["", "value:"],
        [
            ["Python files", number(f.files)],
            ["of these tests", number(f.test_files)],
            ["lines", number(f.lines)],
            ["lines of code", number(f.code_lines)],
            ["lines in tests", number(f.test_lines)],
            ["classes", number(f.classes)],
            ["functions", number(f.functions)],
            ["mean complexity of a function", f"{f.complexity:.1f}"],
            ["public names with a docstring", _percent(f.documented)],
            ["parameters and results with a type", _percent(f.annotated)],
        ],
    )
    yield ""
    yield "Findings outside tests by severity:"
    yield ""
    yield bars(f.by_severity)
    yield ""
    yield "Functions by cyclomatic complexity:"
    yield ""
    yield bars(dict(zip(BAND_NAMES, f.bands, strict=True)))
    if len(f.areas) > 1:
        yield ""
        yield table(
            ["folder", "files:", "lines:", "functions:", "mean complexity:", "findings:"],
            [
                [
                    code(area.name),
                    number(area.files),
                    number(area.lines),
                    number(area.functions),
                    f"{area.complexity:.1f}",
                    number(area.findings),
                ]
                for area in f.areas[:_ROWS]
            ],
        )
        yield from _more(f.areas)


def _hot_spots(contents: Contents) -> Iterator[str]:
    hot = contents.figures.hot
    yield "## Hot spots"
    yield ""
    if not hot:
        yield "None: no finding and no complex function outside tests."
        return
    yield (
        "Files where findings and complex functions meet; start here. A file scores 8 for a high finding, "
        f"3 for a medium, 1 for a low one, and what its functions have above a complexity of {COMPLEX}."
    )
    yield ""
    shown = 5 if contents.focus == "summary" else 10
    yield table(
        ["file", "score:", "findings:", "most complex function", "complexity:"],
        [
            [
                code(f"{spot.path}:{spot.worst.line}" if spot.worst else spot.path),
                str(spot.score),
                str(spot.findings),
                code(spot.worst.name) if spot.worst else "",
                str(spot.worst.complexity) if spot.worst else "",
            ]
            for spot in hot[:shown]
        ],
    )
    yield from _more(hot, shown)


def _risks(contents: Contents) -> Iterator[str]:
    f = contents.figures
    yield "## Risks"
    yield ""
    if not f.findings:
        yield "No risky construct was found outside tests."
    for severity in SEVERITIES:
        rows = _grouped(f, severity)
        if rows:
            yield f"### {severity.capitalize()}"
            yield ""
            yield table(["what", "where", "lines", "instead"], rows[:_ROWS])
            yield from _more(rows)
            yield ""
    notes = []
    if f.test_findings:
        notes.append(f"{number(f.test_findings)} more in tests, where most are harmless.")
    if f.waived:
        notes.append(f"{number(f.waived)} more on lines that their authors marked with `noqa` or `nosec`.")
    if notes:
        yield " ".join(notes)


def _grouped(f: Figures, severity: str) -> list[list[str]]:
    """One row for each kind and file; findings of high severity stand alone and show what they found."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for place, finding in f.findings:
        if KINDS[finding.kind].severity == severity:
            shown = finding.detail if severity == "high" else ""
            groups.setdefault((finding.kind, place.path, shown), []).append(place.line)
    rows = []
    for (kind, path, shown), lines in groups.items():
        known = KINDS[kind]
        what = f"{known.title}: {code(shown)}" if shown else known.title
        where = code(f"{path}:{lines[0]}")
        listed = ", ".join(str(line) for line in lines[:8]) + (", …" if len(lines) > 8 else "")
        rows.append([what, where, listed, known.advice])
    return rows


def _complexity(contents: Contents) -> Iterator[str]:
    f = contents.figures
    yield "## Complexity and size"
    yield ""
    if not f.complex_functions and not f.long_functions:
        yield f"No function outside tests is above a complexity of {COMPLEX} or longer than {LONG} lines."
    if f.complex_functions:
        yield f"Functions above a complexity of {COMPLEX}:"
        yield ""
        yield table(
            ["function", "where", "complexity:", "lines:"],
            [
                [code(function.name), code(str(place)), str(function.complexity), str(function.lines)]
                for place, function in f.complex_functions[:_ROWS]
            ],
        )
        yield from _more(f.complex_functions)
    if f.long_functions:
        yield ""
        yield f"Functions longer than {LONG} lines:"
        yield ""
        yield table(
            ["function", "where", "lines:", "complexity:"],
            [
                [code(function.name), code(str(place)), str(function.lines), str(function.complexity)]
                for place, function in f.long_functions[:_ROWS]
            ],
        )
        yield from _more(f.long_functions)


def _tests(contents: Contents) -> Iterator[str]:
    f = contents.figures
    yield "## Missing tests"
    yield ""
    if not f.has_tests:
        yield "There is no test file."
        return
    if not f.untested:
        yield "Every module with functions is imported by a test, or a test is named after it."
        return
    yield "Modules with functions that no test imports directly and none is named after:"
    yield ""
    yield table(["module", "lines:"], [[code(path), number(lines)] for path, lines in f.untested[:_ROWS]])
    yield from _more(f.untested)


def _words(contents: Contents) -> Iterator[str]:
    rows = [
        [code(review.path), number(missing), _percent(review.documented / review.documentable)]
        for review in sorted(contents.reviews, key=lambda r: (r.documented - r.documentable, r.path))
        if not review.is_test and (missing := review.documentable - review.documented) > 2
    ]
    if rows:
        yield "## Missing docstrings"
        yield ""
        yield table(["file", "public names without one:", "documented:"], rows[:_ROWS])
        yield from _more(rows)


def _marks(contents: Contents) -> Iterator[str]:
    marks = contents.figures.marks
    if marks:
        yield "## Left to do"
        yield ""
        yield table(
            ["mark", "where", "text"],
            [[mark.word, code(str(place)), plain(mark.text)] for place, mark in marks[:_ROWS]],
        )
        yield from _more(marks)


def _who(contents: Contents) -> Iterator[str]:
    by_replica: dict[str, list[Work]] = {}
    for work in sorted(contents.work, key=lambda work: work.replica):
        by_replica.setdefault(work.replica, []).append(work)
    replicas = count(len(by_replica), "analyst replica")
    tasks = count(len(contents.work), "task")
    yield "## How this report was made"
    yield ""
    yield f"A surveyor listed the files, {replicas} read them in {tasks}, an editor put this together."
    yield ""
    yield table(
        ["analyst", "tasks:", "files:", "taken over:", "seconds:"],
        [_share_of_work(replica, works) for replica, works in by_replica.items()],
    )
    yield from _moved([work for work in contents.work if work.attempt > 1])


def _share_of_work(replica: str, works: Sequence[Work]) -> list[str]:
    return [
        code(replica),
        number(len(works)),
        number(sum(len(work.files) for work in works)),
        number(sum(work.taken_over for work in works)),
        f"{sum(work.seconds for work in works):.2f}",
    ]


def _moved(moved: Sequence[Work]) -> Iterator[str]:
    if not moved:
        return
    yield ""
    yield "Tasks that needed another attempt:"
    yield ""
    yield table(
        ["task", "begun by", "finished by", "attempt:", "files"],
        [
            [
                code(work.task[:8]),
                code(work.first_replica) if work.taken_over else "",
                code(work.replica),
                str(work.attempt),
                ", ".join(map(code, work.files[:3])) + (" …" if len(work.files) > 3 else ""),
            ]
            for work in moved
        ],
    )


def _skipped(contents: Contents) -> Iterator[str]:
    rows = [*contents.survey.skipped]
    rows += [
        Skipped(f"{review.path}:{review.problem_line}" if review.problem_line else review.path, review.problem)
        for review in contents.figures.problems
    ]
    yield "## Not reviewed"
    yield ""
    yield f"{count(contents.survey.others, 'file')} in other formats."
    if rows:
        yield ""
        yield table(["path", "reason"], [[code(row.path), plain(row.reason)] for row in rows[:100]])
        yield from _more(rows, 100)


def _files(contents: Contents) -> Iterator[str]:
    who = {path: work for work in contents.work for path in work.files}
    yield "## All files"
    yield ""
    yield table(
        ["file", "lines:", "functions:", "complexity:", "findings:", "analyst", "attempt:"],
        [
            [
                code(review.path),
                number(review.lines),
                number(review.functions),
                number(review.complexity),
                "–" if review.problem else number(len(review.findings)),
                code(who[review.path].replica) if review.path in who else "",
                str(who[review.path].attempt) if review.path in who else "",
            ]
            for review in sorted(contents.reviews, key=lambda review: review.path)
        ],
    )
