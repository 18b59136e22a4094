"""What one Python file shows: sizes, complexity, documentation and findings, from its syntax tree.

Nothing is imported or run. A file that cannot be read or parsed gives a `FileReview` that says so.
"""

from __future__ import annotations

import ast
import io
import re
import threading
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self

from weft_agents.library.review.risks import Finding, Scope, checks_for
from weft_agents.library.review.survey import printable

TOP: Final = 12
"""Functions of a file that are kept by name; the others only count."""
MARKS: Final = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b:?\s*(.*)")
_WAIVER: Final = re.compile(r"#\s*(noqa|nosec)\b")
_TEST_FILE: Final = re.compile(r"(test_.*|.*_test|conftest)\.pyw?\Z")
_PARSING: Final = threading.Lock()

Function = ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class FunctionReview:
    """One function or method."""

    name: str
    """Qualified within the file: `Class.method`."""
    line: int
    lines: int
    complexity: int
    """Cyclomatic complexity: 1 and one for each branch."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A TODO, FIXME, XXX or HACK in a comment."""

    word: str
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class FileReview:
    """Everything the report needs to know about one file."""

    path: str
    problem: str = ""
    """Why the file could not be read or parsed; the counts are then zero."""
    problem_line: int = 0
    is_test: bool = False
    lines: int = 0
    code_lines: int = 0
    """Lines that are neither empty nor only a comment."""
    classes: int = 0
    functions: int = 0
    complexity: int = 0
    """Sum over all functions."""
    complexities: tuple[int, ...] = ()
    """How many functions fall into the complexity bands 1-5, 6-10, 11-20, over 20."""
    documentable: int = 0
    """Public modules, classes and functions."""
    documented: int = 0
    annotatable: int = 0
    """Parameters and return values of functions."""
    annotated: int = 0
    top: tuple[FunctionReview, ...] = ()
    """The most complex and the longest functions."""
    findings: tuple[Finding, ...] = ()
    waived: int = 0
    """Findings on lines that the authors marked with `noqa` or `nosec`."""
    marks: tuple[Mark, ...] = ()
    imports: tuple[str, ...] = ()
    """Dotted names of what the file imports; only of test files."""

    def to_json(self) -> dict[str, Any]:
        """The review as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The review that `to_json` wrote, also after JSON turned its integers into floats."""
        return cls(
            path=value["path"],
            problem=value["problem"],
            problem_line=int(value["problem_line"]),
            is_test=bool(value["is_test"]),
            **{name: int(value[name]) for name in _COUNTS},
            complexities=tuple(int(n) for n in value["complexities"]),
            top=tuple(
                FunctionReview(f["name"], int(f["line"]), int(f["lines"]), int(f["complexity"])) for f in value["top"]
            ),
            findings=tuple(Finding(f["kind"], int(f["line"]), f["detail"]) for f in value["findings"]),
            marks=tuple(Mark(m["word"], int(m["line"]), m["text"]) for m in value["marks"]),
            imports=tuple(value["imports"]),
        )


_COUNTS: Final = (
    "lines", "code_lines", "classes", "functions", "complexity", "documentable", "documented", "annotatable",
    "annotated", "waived",
)  # fmt: skip


def analyse_file(root: Path, path: str) -> FileReview:
    """The review of the file at `path`, relative to `root`. Reads the file; raises nothing for a bad one."""
    try:
        source = (root / path).read_bytes()
    except FileNotFoundError:
        return FileReview(path, problem="it is gone")
    except OSError as error:
        return FileReview(path, problem=(error.strerror or str(error)).lower())
    return analyse(path, source)


def analyse(path: str, source: bytes) -> FileReview:
    """The review of `source`, the bytes of a file called `path`."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        text = io.TextIOWrapper(io.BytesIO(source), encoding).read()
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        return FileReview(path, problem=f"cannot be decoded: {_first_line(error)}", is_test=is_test(path))
    try:
        return _Reader(path, text, _parse(source)).review()
    except SyntaxError as error:
        return FileReview(
            path,
            problem=f"syntax error: {error.msg}",
            problem_line=error.lineno or 0,
            is_test=is_test(path),
            lines=text.count("\n") + 1,
        )
    except (ValueError, RecursionError, MemoryError) as error:
        return FileReview(path, problem=f"cannot be parsed: {_first_line(error)}", is_test=is_test(path))


def is_test(path: str) -> bool:
    """Whether a file belongs to a test suite, by its name and folders."""
    pure = PurePosixPath(path)
    return bool(_TEST_FILE.match(pure.name)) or any(part in ("tests", "test", "testing") for part in pure.parts[:-1])


def complexity(function: ast.AST) -> int:
    """Cyclomatic complexity of a function, without the functions and classes defined in it."""
    return 1 + sum(_branches(node) for node in _own_nodes(function))


def _parse(source: bytes) -> ast.Module:
    # Warnings of the reviewed file are not ours to show; `catch_warnings` is not safe across threads.
    with _PARSING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            waiting.extend(ast.iter_child_nodes(node))


def _branches(node: ast.AST) -> int:
    match node:
        case ast.If() | ast.IfExp() | ast.For() | ast.AsyncFor() | ast.While() | ast.ExceptHandler():
            return 1
        case ast.BoolOp():
            return len(node.values) - 1
        case ast.comprehension():
            return 1 + len(node.ifs)
        case ast.match_case():
            catches_all = isinstance(node.pattern, ast.MatchAs) and node.pattern.pattern is None
            return 0 if catches_all and node.guard is None else 1
    return 0


@dataclass(slots=True)
class _Reader:
    """One pass over a tree, with an explicit stack: source nested a thousand deep is legal."""

    path: str
    text: str
    tree: ast.Module
    functions: list[FunctionReview] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    classes: int = 0
    documentable: int = 0
    documented: int = 0
    annotatable: int = 0
    annotated: int = 0

    def review(self) -> FileReview:
        """The whole review."""
        test = is_test(self.path)
        self._walk(test)
        comments, code_lines = _tokens(self.text)
        waived = {line for line, text in comments if _WAIVER.search(text)}
        by_complexity = sorted(self.functions, key=lambda f: (-f.complexity, f.line))[:TOP]
        by_length = sorted(self.functions, key=lambda f: (-f.lines, f.line))[:TOP]
        kept = sorted(set(by_complexity) | set(by_length), key=lambda f: f.line)
        return FileReview(
            self.path,
            is_test=test,
            lines=len(self.text.splitlines()),
            code_lines=code_lines,
            classes=self.classes,
            functions=len(self.functions),
            complexity=sum(f.complexity for f in self.functions),
            complexities=bands([f.complexity for f in self.functions]),
            documentable=self.documentable,
            documented=self.documented,
            annotatable=self.annotatable,
            annotated=self.annotated,
            top=tuple(kept),
            findings=tuple(sorted((f for f in self.findings if f.line not in waived), key=lambda f: (f.line, f.kind))),
            waived=sum(f.line in waived for f in self.findings),
            marks=tuple(_marks(comments)),
            imports=tuple(sorted(_imported(self.tree))) if test else (),
        )

    def _walk(self, test: bool) -> None:
        self._count_docstring(self.tree, public=True)
        top = Scope.of_file(self.tree, is_test=test)
        waiting: list[tuple[ast.AST, Scope]] = [(node, top) for node in reversed(self.tree.body)]
        while waiting:
            node, scope = waiting.pop()
            for check in checks_for(node):
                self.findings.extend(check(node, scope))
            inner = scope
            if isinstance(node, _FUNCTIONS):
                inner = scope.inside(node.name, function=True, is_async=isinstance(node, ast.AsyncFunctionDef))
                self._count_function(node, scope)
            elif isinstance(node, ast.ClassDef):
                inner = scope.inside(node.name)
                self.classes += 1
                self._count_docstring(node, public=scope.is_public(node.name))
            elif isinstance(node, ast.Lambda):
                inner = scope.inside("<lambda>", function=True)
            waiting.extend((child, inner) for child in ast.iter_child_nodes(node))

    def _count_function(self, node: Function, scope: Scope) -> None:
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        self.functions.append(FunctionReview(scope.qualified(node.name), node.lineno, lines, complexity(node)))
        self._count_docstring(node, public=scope.is_public(node.name))
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if scope.in_class and arguments and arguments[0].arg in ("self", "cls"):
            del arguments[0]
        arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
        slots = [argument.annotation for argument in arguments]
        if node.name != "__init__":
            slots.append(node.returns)
        self.annotatable += len(slots)
        self.annotated += sum(slot is not None for slot in slots)

    def _count_docstring(self, node: ast.Module | ast.ClassDef | Function, *, public: bool) -> None:
        if public and node.body:
            self.documentable += 1
            self.documented += ast.get_docstring(node, clean=False) is not None


def bands(values: list[int]) -> tuple[int, int, int, int]:
    """How many values fall into 1-5, 6-10, 11-20 and over 20."""
    counts = [0, 0, 0, 0]
    for value in values:
        counts[0 if value <= 5 else 1 if value <= 10 else 2 if value <= 20 else 3] += 1
    return counts[0], counts[1], counts[2], counts[3]


def _tokens(text: str) -> tuple[list[tuple[int, str]], int]:
    """The comments with their lines, and the number of lines that hold code."""
    comments: list[tuple[int, str]] = []
    code: set[int] = set()
    layout = (
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
        tokenize.ENCODING,
    )
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments.append((token.start[0], token.string))
            elif token.type not in layout:
                code.update(range(token.start[0], token.end[0] + 1))
    except (tokenize.TokenError, SyntaxError):
        # The parser accepts a little more than the tokenizer; what was read so far stands.
        pass
    return comments, len(code)


def _marks(comments: list[tuple[int, str]]) -> Iterator[Mark]:
    for line, text in comments:
        if found := MARKS.search(text):
            yield Mark(found[1], line, printable(found[2].strip()[:120]))


def _imported(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
