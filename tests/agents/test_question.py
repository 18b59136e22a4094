"""The question of a review and its answers."""

import io
import os
import sys

import pytest

from weft_agents.library.review.agents import parse_focus
from weft_agents.library.review.question import Answerer
from weft_agents.library.review.screen import Screen

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("answer", "focus"),
    [
        ("risks", "risks"),
        ("1", "risks"),
        ("r", "risks"),
        (" Complexity ", "complexity"),
        ("2", "complexity"),
        ("complexity first", "complexity"),
        ("summary", "summary"),
        ("3", "summary"),
        ("a short summary", "summary"),
        ("", None),
        ("0", None),
        ("4", None),
        ("everything", None),
        ("risks and complexity", None),
    ],
)
def test_an_answer_names_a_focus(answer: str, focus: str | None) -> None:
    assert parse_focus(answer) == focus


@pytest.mark.parametrize(("yes", "terminal", "reason"), [(True, True, "--yes"), (False, False, "no terminal")])
async def test_without_a_person_the_first_choice_is_taken_and_shown(yes: bool, terminal: bool, reason: str) -> None:
    out = io.StringIO()
    answerer = Answerer(Screen(out), yes=yes, terminal=terminal, source=io.StringIO())
    assert await answerer.answer("What first?") == "risks"
    assert out.getvalue() == f"The editor asks: What first?\nAnswered 'risks' ({reason})\n"


async def test_a_closed_input_counts_as_no_terminal() -> None:
    source = io.StringIO()
    source.close()
    answerer = Answerer(Screen(io.StringIO()), yes=False, terminal=True, source=source)
    assert await answerer.answer("What first?") == "risks"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
@pytest.mark.parametrize(
    ("typed", "answer"), [(b"2\n", "2"), (b"  summary \n", "summary"), (b"\n", "risks"), (b"\x04", "risks")]
)
async def test_a_person_is_asked_and_may_just_press_return(typed: bytes, answer: str) -> None:
    import pty

    ours, theirs = pty.openpty()
    out = io.StringIO()
    with os.fdopen(theirs, encoding="utf-8") as source:
        answerer = Answerer(Screen(out), yes=False, terminal=True, source=source)
        os.write(ours, typed)
        assert await answerer.answer("What first? 1 this, 2 that") == answer
    os.close(ours)
    assert out.getvalue().startswith("The editor asks: What first?\n")
    assert "  2  complexity first\n" in out.getvalue()
    assert out.getvalue().rstrip("\n").endswith("Number or name [1]: ")
