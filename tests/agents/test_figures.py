"""Figures of a whole folder."""

import pytest

from weft_agents.library.review.analysis import FileReview, analyse
from weft_agents.library.review.figures import Figures, figures
from weft_agents.library.review.risks import SEVERITIES


def branches(n: int, name: str = "f") -> str:
    """A function of complexity n + 1."""
    return f"def {name}(a: int) -> int:\n" + "    if a: pass\n" * n + "    return a\n"


def of(**files: str) -> Figures:
    """Figures of files given as `pkg__module="source"`."""
    return figures(review(name.replace("__", "/") + ".py", source) for name, source in files.items())


def review(path: str, source: str) -> FileReview:
    return analyse(path, source.encode())


def test_nothing_gives_zeros() -> None:
    empty = of()
    assert (empty.files, empty.lines, empty.complexity, empty.documented) == (0, 0, 0.0, None)
    assert empty.by_severity == dict.fromkeys(SEVERITIES, 0)
    assert (empty.hot, empty.areas, empty.untested) == ((), (), ())


def test_counts_are_totals() -> None:
    made = of(a__x=branches(2), a__y="class A: ...\n", tests__test_x=branches(0) + branches(0, "g"))
    assert (made.files, made.test_files, made.functions, made.classes) == (3, 1, 3, 1)
    assert (made.lines, made.test_lines) == (9, 4)
    assert made.complexity == pytest.approx((3 + 1 + 1) / 3)
    assert made.bands == (3, 0, 0, 0)


def test_findings_in_tests_are_counted_apart() -> None:
    made = of(a="eval(x)\nassert x\n", test_a="eval(x)\n")
    assert made.by_kind == {"eval": 1, "assert": 1}
    assert made.by_severity == {"high": 1, "medium": 0, "low": 1}
    assert made.test_findings == 1


def test_findings_come_most_severe_first_with_their_places() -> None:
    made = of(b="assert x\neval(x)\n", a="assert x\nexec(x)\n")
    assert [(str(place), finding.kind) for place, finding in made.findings] == [
        ("a.py:2", "eval"),
        ("b.py:2", "eval"),
        ("a.py:1", "assert"),
        ("b.py:1", "assert"),
    ]


def test_complex_and_long_functions_are_ranked() -> None:
    made = of(a=branches(10) + branches(9, "fine"), b=branches(30), test_c=branches(50), d=branches(0) + "\n" * 99)
    assert [(str(place), f.complexity) for place, f in made.complex_functions] == [
        ("b.py:1", 31),
        ("a.py:1", 11),
    ]
    long = of(a=branches(59), b=branches(58))
    assert [(str(place), f.lines) for place, f in long.long_functions] == [("a.py:1", 61)]


def test_hot_files_are_ranked_by_findings_and_complexity() -> None:
    made = of(a="eval(x)\n", b=branches(15) + "assert b\n", c=branches(2), test_d="eval(x)\n")
    assert [(hot.path, hot.score, hot.findings) for hot in made.hot] == [("a.py", 8, 1), ("b.py", 7, 1)]
    assert made.hot[0].worst is None
    assert made.hot[1].worst is not None


def test_areas_are_the_top_folders() -> None:
    made = of(setup="x = 1\n", src__a__x=branches(1), src__b__y=branches(3), tests__test_x="assert 1\n")
    assert [(area.name, area.files) for area in made.areas] == [("src", 2), (".", 1), ("tests", 1)]
    assert made.areas[0].complexity == 3.0


def test_shares_leave_tests_out() -> None:
    made = of(a='"""Docs."""\ndef f(a: int) -> None: ...\n', test_a="def g(a): ...\n")
    assert (made.documented, made.annotated) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("module", "test"),
    [
        ("src__pkg__core__broker", "from pkg.core.broker import Broker\n"),
        ("src__pkg__core__broker", "from pkg.core import broker\n"),
        ("mesh__src__pkg__core__broker", "import pkg.core.broker as b\n"),
        ("src__tool", "import tool\n"),
        ("tool", "from tool import f\n"),
    ],
)
def test_a_module_that_a_test_imports_is_tested(module: str, test: str) -> None:
    assert of(**{module: branches(1), "tests__test_other": test}).untested == ()


@pytest.mark.parametrize("test", ["tests__test_broker", "tests__core__broker_test", "tests__test_core_broker"])
def test_a_module_that_a_test_is_named_after_is_tested(test: str) -> None:
    assert of(**{"src__core__broker": branches(1), test: "x = 1\n"}).untested == ()


@pytest.mark.parametrize(
    "test",
    ["import json\n", "from pkg.core import other\n", "from broker_tools import x\n", "import broker\n"],
)
def test_a_module_that_no_test_names_is_untested(test: str) -> None:
    made = of(src__pkg__core__broker=branches(1), tests__test_other=test)
    assert made.untested == (("src/pkg/core/broker.py", 3),)


def test_modules_without_functions_need_no_test() -> None:
    assert of(a="X = 1\n", test_b="x = 1\n").untested == ()


def test_the_longest_untested_module_comes_first() -> None:
    made = of(a=branches(1), b=branches(9))
    assert [path for path, _ in made.untested] == ["b.py", "a.py"]
    assert not made.has_tests


def test_broken_files_are_problems_and_still_counted() -> None:
    made = of(a="def f(:\n", b="x = 1\n")
    assert made.files == 2
    assert [problem.path for problem in made.problems] == ["a.py"]
    assert made.bands == (0, 0, 0, 0)
