"""What one file shows: sizes, complexity, documentation; and files that are no Python at all."""

import ast
import json
import sys
import threading
import warnings
from pathlib import Path
from textwrap import dedent

import pytest

from weft_agents.library.review.analysis import (
    TOP,
    FileReview,
    Mark,
    analyse,
    analyse_file,
    bands,
    complexity,
    is_test,
)


def review(source: str, path: str = "pkg/module.py") -> FileReview:
    made = analyse(path, dedent(source).encode())
    assert made.problem == ""
    return made


def complexity_of(body: str) -> int:
    source = "async def f(a, b, c):\n" + "".join(f"    {line}\n" for line in dedent(body).strip().splitlines())
    return complexity(ast.parse(source).body[0])


def test_sizes_are_counted() -> None:
    made = review('''
        """Docs,
        two lines."""

        import os  # why

        # only a comment
        class A:
            def f(self):
                return """a

                b"""

        async def g(): ...
    ''')
    assert (made.classes, made.functions) == (1, 2)
    assert made.lines == 14
    # The docstring is 2 lines, the import 1, class and method 5, the last function 1.
    assert made.code_lines == 9


def test_an_empty_file_is_fine() -> None:
    made = review("")
    assert (made.lines, made.code_lines, made.functions, made.documentable, made.findings) == (0, 0, 0, 0, ())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("pass", 1),
        ("if a: pass", 2),
        ("if a: pass\nelif b: pass\nelse: pass", 3),
        ("for i in a: pass", 2),
        ("async for i in a: pass", 2),
        ("while a: pass", 2),
        ("return a and b", 2),
        ("return a and b or c", 3),
        ("return a if b else c", 2),
        ("try: pass\nexcept OSError: pass\nexcept ValueError: pass\nfinally: pass", 3),
        ("return [i for i in a if i if b]", 4),
        ("with a: pass", 1),
        ("match a:\n    case 1: pass\n    case 2 | 3: pass\n    case _: pass", 3),
        ("match a:\n    case x if b: pass", 2),
        ("match a:\n    case x: pass", 1),
        ("return lambda x: x or b", 2),
        ("def g():\n    if a: pass", 1),
    ],
)
def test_complexity_counts_the_branches(body: str, expected: int) -> None:
    assert complexity_of(body) == expected


def test_functions_are_named_with_what_is_around_them() -> None:
    made = review("""
        class A:
            class B:
                def method(self):
                    def inner():
                        if 1: pass
    """)
    assert [(f.name, f.line, f.lines, f.complexity) for f in made.top] == [
        ("A.B.method", 4, 3, 1),
        ("A.B.method.inner", 5, 2, 2),
    ]
    assert made.complexity == 3
    assert made.complexities == (2, 0, 0, 0)


def test_only_the_largest_functions_are_kept_by_name() -> None:
    source = "".join(f"def f{i}(a):\n" + "    if a: pass\n" * i + "    pass\n" for i in range(40))
    made = review(source)
    assert made.functions == 40
    assert [f.name for f in made.top] == [f"f{i}" for i in range(40 - TOP, 40)]


def test_bands_count_by_size() -> None:
    assert bands([1, 5, 6, 10, 11, 20, 21, 99]) == (2, 2, 2, 2)


def test_docstrings_are_expected_of_public_names_only() -> None:
    made = review('''
        """A module."""
        def documented():
            """Yes."""
            def inner(): ...
        def bare(): ...
        def _private(): ...
        class Public:
            def method(self): ...
            def _hidden(self): ...
            def __repr__(self): ...
        class _Private:
            def method(self): ...
    ''')
    # The module, documented, bare, Public, Public.method.
    assert (made.documented, made.documentable) == (2, 5)


def test_annotations_are_counted_by_slot() -> None:
    made = review("""
        def full(a: int, *rest: str, k: int = 0, **more: int) -> None: ...
        def none(a, b): ...
        class A:
            def __init__(self, a: int): ...
            @classmethod
            def make(cls, a) -> 'A': ...
    """)
    # full 5 of 5, none 0 of 3, __init__ 1 of 1 (no return), make 1 of 2.
    assert (made.annotated, made.annotatable) == (7, 11)


def test_marks_are_read_from_comments_only() -> None:
    made = review("""
        # TODO: first
        text = "TODO: not one"
        x = 1  # FIXME later | soon
        # todo in small letters, and TODOLIST, are prose
        # XXX
    """)
    assert made.marks == (Mark("TODO", 2, "first"), Mark("FIXME", 4, "later | soon"), Mark("XXX", 6, ""))


def test_a_mark_cannot_steer_the_terminal_it_is_shown_on() -> None:
    assert review("# TODO \x1b[2J look\n").marks == (Mark("TODO", 1, "\\x1b[2J look"),)


def test_a_waived_finding_is_counted_and_not_listed() -> None:
    made = review("""
        eval(a)  # noqa: S307
        exec(a)  # nosec
        eval(b)
    """)
    assert made.waived == 2
    assert [finding.line for finding in made.findings] == [4]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tests/agents/test_x.py", True),
        ("pkg/x_test.py", True),
        ("conftest.py", True),
        ("src/pkg/testing/broker.py", True),
        ("test/data.py", True),
        ("src/pkg/contest.py", False),
        ("src/pkg/latest.py", False),
        ("src/attest_x.py", False),
    ],
)
def test_tests_are_known_by_name_and_folder(path: str, expected: bool) -> None:
    assert is_test(path) is expected


def test_imports_are_kept_for_tests_only() -> None:
    source = "import a.b\nfrom c import d\nfrom . import e\n"
    assert review(source, "test_x.py").imports == ("a.b", "c", "c.d")
    assert review(source, "x.py").imports == ()


@pytest.mark.parametrize(
    ("source", "problem", "line"),
    [
        (b"def f(:\n", "syntax error", 1),
        (b"x = 1\nprint 'two'\n", "syntax error", 2),
        (b"x = 1\n  y = 2\n", "syntax error: unexpected indent", 2),
        (b"x = '\xff\xfe'\n", "cannot be decoded", 0),
        (b"# coding: no-such-encoding\n", "cannot be decoded: unknown encoding", 0),
        ("x = 1".encode("utf-16"), "cannot be decoded", 0),
        (b"x = 1\0\n", "", 0),
    ],
)
def test_a_broken_file_is_reported_and_raises_nothing(source: bytes, problem: str, line: int) -> None:
    made = analyse("bad.py", source)
    assert made.problem
    assert made.problem.startswith(problem)
    assert "\n" not in made.problem
    assert made.problem_line == line
    assert (made.functions, made.findings) == (0, ())


def test_a_file_in_a_declared_encoding_is_read() -> None:
    made = analyse("latin.py", "# coding: latin-1\nx = 'é'  # TODO é\n".encode("latin-1"))
    assert (made.problem, made.marks[0].text) == ("", "é")


def test_a_byte_order_mark_is_no_problem() -> None:
    assert analyse("bom.py", b"\xef\xbb\xbfx = 1\n").problem == ""


def test_windows_line_ends_are_counted_once() -> None:
    assert analyse("crlf.py", b"x = 1\r\ny = 2\r\n").lines == 2


@pytest.mark.parametrize(
    "source",
    [
        "x = " + "(" * 150 + "1" + ")" * 150,
        "x = " + "+".join(["1"] * 5_000),
        "x = " + "-" * 3_000 + "1",
        "f" + "(0)" * 2_000,
        "if a:\n    pass\n" + "elif a:\n    pass\n" * 1_500,
    ],
    ids=["brackets", "sum", "signs", "calls", "elifs"],
)
def test_deep_nesting_ends_in_a_review(source: str) -> None:
    made = analyse("deep.py", source.encode())
    assert made.path == "deep.py"
    assert made.problem == "" or made.problem.startswith(("cannot be parsed", "syntax error"))


def test_warnings_of_the_reviewed_file_stay_inside() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert analyse("escape.py", b"x = '\\d'\nassert (x, 'always true')\n").problem == ""
    assert seen == []


def test_threads_can_analyse_at_once() -> None:
    source = b"x = '\\d'\n" + b"def f(a=[]): ...\n" * 50
    made: list[FileReview] = []
    threads = [threading.Thread(target=lambda: made.append(analyse("t.py", source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(made) == 4
    assert {len(one.findings) for one in made} == {50}


def test_a_file_that_is_gone_is_reported(tmp_path: Path) -> None:
    assert analyse_file(tmp_path, "gone.py").problem == "it is gone"


def test_a_folder_in_place_of_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    assert analyse_file(tmp_path, "folder.py").problem


def test_a_review_survives_json() -> None:
    source = Path(ast.__file__).read_bytes()
    made = analyse("test_ast.py", source)
    assert made.top
    assert made.findings
    # Structs of the protocol hold every number as a float.
    value = json.loads(json.dumps(made.to_json()), parse_int=float)
    assert FileReview.from_json(value) == made


@pytest.mark.parametrize("name", ["argparse", "typing", "asyncio.base_events", "turtle"])
def test_the_standard_library_is_read_without_a_problem(name: str) -> None:
    path = Path(ast.__file__).parent / (name.replace(".", "/") + ".py")
    if not path.exists():
        pytest.skip(f"Python {sys.version_info[:2]} has no {name}")
    made = analyse(path.name, path.read_bytes())
    assert made.problem == ""
    assert made.functions > 20
