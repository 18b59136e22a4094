"""The report as text."""

import re

import pytest

from weft_agents.library.review.analysis import FileReview, analyse
from weft_agents.library.review.figures import figures
from weft_agents.library.review.markdown import bar, bars, code, count, plain, table
from weft_agents.library.review.report import FOCUS, Contents, Work, headline, render
from weft_agents.library.review.survey import Skipped, SourceFile, Survey

SOURCES = {
    "src/app.py": "import os\n\ndef main(a=[]):\n    os.system(a)\n    # TODO: *ask* first\n",
    "src/big.py": "def f(a):\n" + "    if a: pass\n" * 70,
    "src/broken.py": "def f(:\n",
    "src/we|ird.py": "try: a\nexcept Exception: pass\n",
    "tests/test_app.py": "import app\nassert app\neval('1' + x)\n",
}


def contents(sources: dict[str, str] | None = None, focus: str = "risks", moved: bool = True) -> Contents:
    sources = SOURCES if sources is None else sources
    survey = Survey(
        "/home/me/project",
        tuple(SourceFile(path, len(text)) for path, text in sources.items()),
        (Skipped(".git/", "hidden"), Skipped("blob.py", "binary")),
        others=7,
        folders=3,
    )
    reviews: tuple[FileReview, ...] = tuple(analyse(path, text.encode()) for path, text in sources.items())
    work = [
        Work(f"{i:032x}", (path,), f"analyst-{i % 2}", 1, f"analyst-{i % 2}", 0.5) for i, path in enumerate(sources)
    ]
    if moved and work:
        work[0] = Work("f" * 32, work[0].files, "analyst-1", 2, "analyst-0", 0.25)
    return Contents(survey, reviews, figures(reviews), tuple(work), focus)


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, flags=re.MULTILINE)


def rows_of(text: str, heading: str) -> list[str]:
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [line for line in section.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("focus", FOCUS)
def test_every_file_has_exactly_one_row_whatever_the_focus(focus: str) -> None:
    rows = rows_of(render(contents(focus=focus)), "All files")
    shown = [re.match(r"\| `(.+?)` \|", row) for row in rows]
    assert sorted(match[1].replace("\\|", "|") for match in shown if match) == sorted(SOURCES)


def test_risks_come_first_when_asked_for() -> None:
    order = headings(render(contents(focus="risks")))
    assert order.index("Risks") < order.index("Complexity and size")


def test_complexity_comes_first_when_asked_for() -> None:
    order = headings(render(contents(focus="complexity")))
    assert order.index("Complexity and size") < order.index("Risks")


def test_a_summary_leaves_the_details_out() -> None:
    order = headings(render(contents(focus="summary")))
    assert order == ["Figures", "Hot spots", "How this report was made", "Not reviewed", "All files"]


def test_high_findings_stand_alone_and_show_what_was_found() -> None:
    text = render(contents())
    assert "| command through a shell: `os.system(a)` | `src/app.py:4` | 4 |" in text
    assert "| mutable default argument | `src/app.py:3` | 3 |" in text
    assert "1 more in tests, where most are harmless." in text


def test_findings_of_one_kind_in_one_file_share_a_row() -> None:
    text = render(contents({"a.py": "assert a\n" * 10, "b.py": "assert a\n"}))
    rows = [row for row in text.splitlines() if row.startswith("| assert outside tests")]
    assert [row.split("|")[3].strip() for row in rows] == ["1, 2, 3, 4, 5, 6, 7, 8, …", "1"]


def test_complex_and_long_functions_are_listed_with_their_place() -> None:
    assert render(contents()).count("| `f` | `src/big.py:1` | 71 | 71 |") == 2


def test_a_taken_over_task_names_both_replicas() -> None:
    text = render(contents())
    assert "| `ffffffff` | `analyst-0` | `analyst-1` | 2 | `src/app.py` |" in text
    assert "another attempt" not in render(contents(moved=False))


def test_the_share_of_each_replica_is_shown() -> None:
    rows = rows_of(render(contents(moved=False)), "How this report was made")
    assert rows == ["| `analyst-0` | 3 | 3 | 0 | 1.50 |", "| `analyst-1` | 2 | 2 | 0 | 1.00 |"]


def test_a_takeover_is_another_replica_and_not_only_another_attempt() -> None:
    assert Work("t", (), "b", 2, "a", 0.0).taken_over
    assert not Work("t", (), "a", 2, "a", 0.0).taken_over
    assert not Work("t", (), "a", 1, "a", 0.0).taken_over


def test_what_was_skipped_or_broken_is_listed_with_the_reason() -> None:
    text = render(contents())
    assert "7 files in other formats." in text
    assert "| `blob.py` | binary |" in text
    assert re.search(r"\| `src/broken\.py:1` \| syntax error: .+ \|", text)


def test_text_of_reviewed_files_cannot_become_markup() -> None:
    text = render(contents())
    assert "\\*ask\\* first" in text
    assert "`src/we\\|ird.py`" in text


def test_clean_code_is_said_to_be_clean() -> None:
    text = render(contents({"a.py": '"""Docs."""\nX = 1\n', "test_a.py": "import a\n"}, moved=False))
    assert "None: no finding and no complex function outside tests." in text
    assert "No risky construct was found outside tests." in text
    assert "Every module with functions is imported by a test" in text
    assert "No function outside tests is above a complexity of 10" in text
    assert "Left to do" not in text


def test_a_folder_without_tests_is_said_to_have_none() -> None:
    text = render(contents({"a.py": "def f(): ...\n"}))
    assert "There is no test file." in text
    assert headline(contents({"a.py": "def f(): ...\n"})).endswith("no tests.")


def test_a_long_list_is_cut_and_says_how_much_is_missing() -> None:
    text = render(contents({f"m{i:02}.py": "assert a\n" for i in range(40)}))
    assert "… and 25 more." in text


def test_every_table_has_as_many_cells_in_each_row() -> None:
    for block in re.findall(r"(?:^\|.*\n)+", render(contents()), flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_the_report_has_no_doubled_blank_lines() -> None:
    text = render(contents())
    assert "\n\n\n" not in text
    assert text.endswith("|\n")


def test_a_work_record_survives_json() -> None:
    work = Work("t", ("a.py", "b.py"), "r1", 2, "r0", 0.125)
    assert Work.from_json(work.to_json()) == work


def test_a_bar_chart_is_scaled_and_small_values_stay_visible() -> None:
    assert bars({"a": 300, "bcd": 1, "e": 0}).splitlines() == [
        "```text",
        "a    " + "█" * 30 + " 300",
        "bcd  █ 1",
        "e     0",
        "```",
    ]
    assert bars({}) == "```text\n```"
    assert bar(0, 0) == ""


def test_a_code_span_holds_backticks() -> None:
    assert code("a`b") == "``a`b``"
    assert code("`a`") == "`` `a` ``"


def test_a_table_escapes_its_separator() -> None:
    assert table(["a", "b:"], [["x|y", "1"]]) == "| a | b |\n|---|---:|\n| x\\|y | 1 |"


def test_numbers_agree_with_their_nouns() -> None:
    assert [count(n, "file") for n in (0, 1, 1234)] == ["0 files", "1 file", "1,234 files"]


def test_plain_text_escapes_markup() -> None:
    assert plain("<b> [x](y) *z* `q`") == "\\<b\\> \\[x\\](y) \\*z\\* \\`q\\`"
