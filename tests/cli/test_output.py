"""Tables, JSON, JSON lines and YAML."""

import io
import json
from typing import Any

import pytest
import yaml

from weft.cli.output import Column, Printer, ago, columns_of, cut, rfc3339, safe, table

COLUMNS = (Column("name"), Column("state", state=True), Column("count", right=True), Column("text", flexible=True))
ROWS: list[dict[str, Any]] = [
    {"name": "a", "state": "ready", "count": 5, "text": "short"},
    {"name": "longer", "state": "failed", "count": 12, "text": "x" * 80},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_has_headings_and_aligned_columns() -> None:
    lines = table(ROWS, COLUMNS).splitlines()
    assert lines[0] == "NAME    STATE   COUNT  TEXT"
    assert lines[1] == "a       ready       5  short"
    assert lines[2].startswith("longer  failed     12  xxxx")


def test_only_flexible_columns_are_cut_to_the_terminal() -> None:
    for line in table(ROWS, COLUMNS, width=40).splitlines():
        assert columns_of(line) <= 40
    assert table(ROWS, COLUMNS, width=40).splitlines()[2].endswith("…")


def test_a_table_in_a_pipe_is_never_cut() -> None:
    out = io.StringIO()
    Printer("table", out=out).rows(ROWS, COLUMNS)
    assert "x" * 80 in out.getvalue()


def test_wide_characters_take_two_columns() -> None:
    assert columns_of("日本") == 4
    assert columns_of("e\u0301") == 1
    assert cut("日本語", 5) == "日本…"
    lines = table([{"name": "日本", "x": 1}, {"name": "a", "x": 2}], (Column("name"), Column("x"))).splitlines()
    assert lines[1] == "日本  1"
    assert lines[2] == "a     2"


def test_colour_is_for_terminals_and_never_instead_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen, pipe = Terminal(), io.StringIO()
    Printer("table", out=screen).rows(ROWS, COLUMNS)
    Printer("table", out=pipe).rows(ROWS, COLUMNS)
    assert "\x1b[32mready\x1b[0m" in screen.getvalue()
    assert "\x1b" not in pipe.getvalue()
    assert "ready" in pipe.getvalue()


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    screen = Terminal()
    Printer("table", out=screen).rows(ROWS, COLUMNS)
    assert "\x1b" not in screen.getvalue()


def test_text_of_others_cannot_drive_the_terminal() -> None:
    assert safe("\x1b[2Jgone\x07\u202e") == "�[2Jgone��"
    assert safe("tab\tand\nline — ünï") == "tab\tand\nline — ünï"
    assert "\x1b" not in table([{"name": "\x1b[31m", "x": "a\nb"}], (Column("name"), Column("x")))


def test_lists_have_a_form_for_every_program() -> None:
    forms = {}
    for form in ("json", "jsonl", "yaml"):
        out = io.StringIO()
        Printer(form, out=out).rows(ROWS, COLUMNS)
        forms[form] = out.getvalue()
    assert json.loads(forms["json"]) == ROWS
    assert [json.loads(line) for line in forms["jsonl"].splitlines()] == ROWS
    assert yaml.safe_load(forms["yaml"]) == ROWS


def test_an_empty_list_is_said_to_people_and_is_empty_to_programs() -> None:
    out, talk = io.StringIO(), io.StringIO()
    Printer("table", out=out, talk_to=talk).rows([], COLUMNS, empty="nothing here")
    assert (out.getvalue(), talk.getvalue()) == ("", "nothing here\n")
    Printer("json", out=out, talk_to=io.StringIO()).rows([], COLUMNS, empty="nothing here")
    assert json.loads(out.getvalue()) == []


def test_progress_is_only_for_somebody_who_watches() -> None:
    pipe, screen = io.StringIO(), Terminal()
    Printer(talk_to=pipe).progress("half done")
    Printer(talk_to=screen).progress("half done")
    assert (pipe.getvalue(), screen.getvalue()) == ("", "half done\n")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.04, "0s"), (1.25, "1.2s"), (59, "59s"), (200, "3m20s"), (18_180, "5h03m"), (187_200, "2d4h")],
)
def test_durations_are_short(seconds: float | None, shown: str) -> None:
    assert ago(seconds) == shown


def test_times_for_programs_are_utc() -> None:
    assert rfc3339(0.5) == "1970-01-01T00:00:00.500Z"
