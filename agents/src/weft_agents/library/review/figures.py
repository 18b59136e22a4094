"""Figures of a whole folder, from the reviews of its files. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from weft_agents.library.review.analysis import FileReview, FunctionReview, Mark
from weft_agents.library.review.risks import KINDS, SEVERITIES, Finding

COMPLEX: Final = 10
"""Cyclomatic complexity above which a function is hard to test."""
LONG: Final = 60
"""Lines above which a function is hard to read."""
_WEIGHT: Final = {"high": 8, "medium": 3, "low": 1}


@dataclass(frozen=True, slots=True)
class Place:
    """A function, finding or mark together with its file."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class HotFile:
    """A file where findings and complex functions meet."""

    path: str
    score: int
    lines: int
    findings: int
    worst: FunctionReview | None
    """Its most complex function."""


@dataclass(frozen=True, slots=True)
class Area:
    """Figures of one folder."""

    name: str
    files: int
    lines: int
    functions: int
    complexity: float
    """Mean per function."""
    findings: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What the report shows. Findings in tests are counted apart: there, most of them are harmless."""

    files: int
    test_files: int
    lines: int
    code_lines: int
    test_lines: int
    classes: int
    functions: int
    complexity: float
    """Mean cyclomatic complexity per function."""
    bands: tuple[int, int, int, int]
    documented: float | None
    """Share of public modules, classes and functions with a docstring, tests left out; None without any."""
    annotated: float | None
    """Share of parameters and return values with a type annotation, tests left out."""
    findings: tuple[tuple[Place, Finding], ...]
    """Outside tests, most severe first."""
    test_findings: int
    waived: int
    complex_functions: tuple[tuple[Place, FunctionReview], ...]
    """Outside tests, above `COMPLEX`, most complex first."""
    long_functions: tuple[tuple[Place, FunctionReview], ...]
    """Outside tests, above `LONG`, longest first."""
    hot: tuple[HotFile, ...]
    areas: tuple[Area, ...]
    untested: tuple[tuple[str, int], ...]
    """Paths and lines of the modules that no test file names or imports, longest first."""
    has_tests: bool
    marks: tuple[tuple[Place, Mark], ...]
    problems: tuple[FileReview, ...]
    """Files that could not be read or parsed."""

    @property
    def by_severity(self) -> dict[str, int]:
        """Findings outside tests by severity, every severity present."""
        counts = Counter(KINDS[finding.kind].severity for _, finding in self.findings)
        return {severity: counts[severity] for severity in SEVERITIES}

    @property
    def by_kind(self) -> dict[str, int]:
        """Findings outside tests by kind, most severe kind first, absent kinds left out."""
        counts = Counter(finding.kind for _, finding in self.findings)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}


def figures(reviews: Iterable[FileReview]) -> Figures:
    """The figures of a folder."""
    every = sorted(reviews, key=lambda review: review.path)
    read = [review for review in every if not review.problem]
    code = [review for review in read if not review.is_test]
    tests = [review for review in read if review.is_test]
    return Figures(
        files=len(every),
        test_files=len(tests),
        lines=_total(every, "lines"),
        code_lines=_total(read, "code_lines"),
        test_lines=_total(tests, "lines"),
        classes=_total(read, "classes"),
        functions=_total(read, "functions"),
        complexity=_share(read, "complexity", "functions") or 0.0,
        bands=_bands(read),
        documented=_share(code, "documented", "documentable"),
        annotated=_share(code, "annotated", "annotatable"),
        findings=_findings(code),
        test_findings=sum(len(review.findings) for review in tests),
        waived=_total(read, "waived"),
        complex_functions=_functions(code, above=COMPLEX, by_length=False),
        long_functions=_functions(code, above=LONG, by_length=True),
        hot=_hot(code),
        areas=_areas(read),
        untested=_untested(code, tests),
        has_tests=bool(tests),
        marks=tuple((Place(review.path, mark.line), mark) for review in read for mark in review.marks),
        problems=tuple(review for review in every if review.problem),
    )


def _total(reviews: Sequence[FileReview], count: str) -> int:
    return sum(getattr(review, count) for review in reviews)


def _share(reviews: Sequence[FileReview], part: str, whole: str) -> float | None:
    """Total of one count over the total of another; None where that is zero."""
    total = _total(reviews, whole)
    return _total(reviews, part) / total if total else None


def _bands(reviews: Sequence[FileReview]) -> tuple[int, int, int, int]:
    totals = [0, 0, 0, 0]
    for review in reviews:
        for i, count in enumerate(review.complexities):
            totals[i] += count
    return totals[0], totals[1], totals[2], totals[3]


def _findings(code: Sequence[FileReview]) -> tuple[tuple[Place, Finding], ...]:
    order = {kind: i for i, kind in enumerate(KINDS)}
    found = [(Place(review.path, finding.line), finding) for review in code for finding in review.findings]
    return tuple(sorted(found, key=lambda item: (order[item[1].kind], item[0].path, item[0].line)))


def _functions(code: Sequence[FileReview], *, above: int, by_length: bool) -> tuple[tuple[Place, FunctionReview], ...]:
    def size(function: FunctionReview) -> int:
        return function.lines if by_length else function.complexity

    found = [
        (Place(review.path, function.line), function)
        for review in code
        for function in review.top
        if size(function) > above
    ]
    return tuple(sorted(found, key=lambda item: (-size(item[1]), item[0].path, item[0].line)))


def _hot(code: Sequence[FileReview]) -> tuple[HotFile, ...]:
    made: list[HotFile] = []
    for review in code:
        score = sum(_WEIGHT[KINDS[finding.kind].severity] for finding in review.findings)
        score += sum(max(0, function.complexity - COMPLEX) for function in review.top)
        if score:
            worst = max(review.top, key=lambda function: function.complexity, default=None)
            made.append(HotFile(review.path, score, review.lines, len(review.findings), worst))
    return tuple(sorted(made, key=lambda hot: (-hot.score, hot.path)))


def _areas(read: Sequence[FileReview]) -> tuple[Area, ...]:
    groups: dict[str, list[FileReview]] = {}
    for review in read:
        folders = PurePosixPath(review.path).parts[:-1]
        groups.setdefault(folders[0] if folders else ".", []).append(review)
    areas = [
        Area(
            name,
            len(reviews),
            _total(reviews, "lines"),
            _total(reviews, "functions"),
            _share(reviews, "complexity", "functions") or 0.0,
            sum(len(review.findings) for review in reviews),
        )
        for name, reviews in groups.items()
    ]
    return tuple(sorted(areas, key=lambda area: (-area.lines, area.name)))


def _untested(code: Sequence[FileReview], tests: Sequence[FileReview]) -> tuple[tuple[str, int], ...]:
    """Modules with functions that no test file imports and none is named after."""
    imported = {name for review in tests for name in review.imports}
    stems = {PurePosixPath(review.path).stem for review in tests}
    stems = {stem.removeprefix("test_").removesuffix("_test") for stem in stems}
    missing = [
        (review.path, review.lines)
        for review in code
        if review.functions and not _is_tested(PurePosixPath(review.path), imported, stems)
    ]
    return tuple(sorted(missing, key=lambda item: (-item[1], item[0])))


def _is_tested(path: PurePosixPath, imported: set[str], stems: set[str]) -> bool:
    parts = list(path.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    if not parts:
        return False
    if parts[-1] in stems or "_".join(parts[-2:]) in stems:
        return True
    # Where the import path begins is not known (`src/`, an area), so every suffix counts as the module's
    # name; a bare name only for a module without a package around it.
    names = {".".join(parts[i:]) for i in range(len(parts))}
    if len(parts) > 1 and parts[-2] not in ("src", "lib"):
        names.discard(parts[-1])
    return not names.isdisjoint(imported)
