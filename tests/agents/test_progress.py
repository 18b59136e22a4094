"""How the demo follows its tasks, and what it shows of them."""

import io
from pathlib import Path

import pytest

from weft_agents.library.review.progress import Look, Progress, Seen, panel
from weft_agents.library.review.screen import Screen
from weft_agents.library.review.summary import summary

TASK = "a" * 32
OTHER = "b" * 32


def progress_of_two() -> Progress:
    progress = Progress()
    progress.add("editor", "editor", 10)
    progress.add("analyst-1", "analyst", 11)
    progress.add("analyst-2", "analyst", 12)
    see(progress, Seen("editor", "e" * 32, "working", "10-x", 1, "40 files", files=40, tasks=20))
    return progress


def see(progress: Progress, seen: Seen, now: float = 0.0) -> list[str]:
    return list(progress.observe(seen, now))


def begun(replica: str, task: str = TASK, attempt: int = 1, text: str = "src/a.py") -> Seen:
    return Seen("analyst", task, "working", replica, attempt, text)


def ended(task: str = TASK, state: str = "completed") -> Seen:
    return Seen("analyst", task, state)


def test_the_editor_says_how_much_there_is() -> None:
    progress = progress_of_two()
    assert (progress.files, progress.total) == (40, 20)


def test_a_task_belongs_to_the_process_its_replica_id_begins_with() -> None:
    progress = progress_of_two()
    see(progress, begun("12-abcdef"))
    assert progress.workers["analyst-2"].working == {TASK: "src/a.py"}
    assert progress.workers["analyst-1"].working == {}


def test_an_ended_task_counts_for_its_owner_once() -> None:
    progress = progress_of_two()
    see(progress, begun("11-x"))
    see(progress, ended())
    assert (progress.done, progress.doubled) == (1, 0)
    see(progress, ended())
    assert (progress.done, progress.doubled) == (1, 1)
    worker = progress.workers["analyst-1"]
    assert (worker.done, worker.later_attempts, worker.working) == (1, 0, {})


@pytest.mark.parametrize("state", ["completed", "failed", "rejected", "canceled", "message"])
def test_every_terminal_state_ends_a_task(state: str) -> None:
    progress = progress_of_two()
    see(progress, ended(state=state))
    assert progress.done == 1


def test_a_kill_remembers_what_was_held_and_a_takeover_who_went_on() -> None:
    progress = progress_of_two()
    see(progress, begun("11-x"))
    see(progress, begun("11-x", OTHER, text="src/b.py"))
    see(progress, ended(OTHER))
    progress.killed("analyst-1", 10.0)
    assert progress.workers["analyst-1"].held == 1
    assert progress.held_by("analyst-1") == [TASK]
    notices = see(progress, Seen("analyst", TASK, "working", "12-y", 2, "attempt 2, on replica 12-y"), 14.25)
    assert notices == [
        "analyst-2 takes over task aaaaaaaa from analyst-1 after 4.2 s (attempt 2): src/a.py",
    ]
    [takeover] = progress.takeovers
    assert (takeover.before, takeover.after, takeover.attempt, takeover.seconds) == (
        "analyst-1",
        "analyst-2",
        2,
        4.25,
    )
    assert progress.held_by("analyst-1") == []
    see(progress, ended())
    assert progress.workers["analyst-2"].later_attempts == 1


def test_a_takeover_is_told_once_it_is_known_what_the_task_is_about() -> None:
    progress = progress_of_two()
    see(progress, begun("11-x", text=""))
    progress.killed("analyst-1", 10.0)
    assert see(progress, Seen("analyst", TASK, "working", "12-y", 2, "attempt 2, on replica 12-y"), 14.0) == []
    [notice] = see(progress, begun("12-y", attempt=2), 14.1)
    assert notice.endswith("after 4.0 s (attempt 2): src/a.py")
    assert see(progress, ended()) == []


def test_a_claim_counts_only_where_no_owner_is_known() -> None:
    progress = progress_of_two()
    see(progress, Seen("analyst", TASK, replica="11-x", attempt=1, is_claim=True))
    assert progress.held_by("analyst-1") == [TASK]
    see(progress, Seen("analyst", TASK, replica="12-y", attempt=2, is_claim=True))
    assert progress.takeovers == []
    see(progress, begun("12-y", attempt=2))
    assert [takeover.before for takeover in progress.takeovers] == ["analyst-1"]


def test_further_signs_of_the_same_owner_are_no_takeover() -> None:
    progress = progress_of_two()
    assert see(progress, begun("11-x")) == see(progress, begun("11-x", text="src/b.py")) == []
    assert progress.workers["analyst-1"].working == {TASK: "src/b.py"}


def test_an_unknown_replica_changes_nothing() -> None:
    progress = progress_of_two()
    assert see(progress, begun("999-z")) == []
    assert progress.rows[TASK].owner == ""


def test_a_single_worker_is_credited_without_naming_itself() -> None:
    progress = progress_of_two()
    see(progress, Seen("editor", "f" * 32, "completed"))
    assert progress.workers["editor"].done == 1


def test_the_panel_shows_each_analyst_and_what_it_reads() -> None:
    progress = progress_of_two()
    see(progress, begun("11-x"))
    see(progress, begun("12-y", OTHER, text="src/b.py"))
    see(progress, ended(OTHER))
    lines = panel(progress, look=Look(), seconds=3.2)
    assert lines == [
        "  █" + "░" * 29 + " 1/20 tasks, 40 files, 3 s",
        "  analyst-1  pid 11     0 done  src/a.py",
        "  analyst-2  pid 12     1 done  ",
    ]


def test_the_panel_says_what_became_of_a_killed_analyst() -> None:
    progress = progress_of_two()
    see(progress, begun("11-x"))
    progress.killed("analyst-1", 1.0)
    assert panel(progress, look=Look(), seconds=1)[1].endswith("killed; 1 task left to take over")
    see(progress, begun("12-y", attempt=2), 5.0)
    assert panel(progress, look=Look(color=True), seconds=5)[1].endswith(
        "\x1b[31mkilled; its work was taken over\x1b[0m"
    )


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_of_the_panel_is_wider_than_the_screen(width: int) -> None:
    progress = progress_of_two()
    see(progress, begun("11-x", text="a/very/long/path/" * 12 + "module.py"))
    for line in panel(progress, look=Look(width), seconds=999):
        assert len(line) <= max(width, 33)


def test_a_path_is_cut_in_its_middle() -> None:
    shown = Look().fit("mesh/src/weft/core/broker.py", 16)
    assert len(shown) == 16
    assert shown.endswith("broker.py")
    assert "…" in shown


class Terminal(io.StringIO):
    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_block_that_is_replaced() -> None:
    out = Terminal()
    screen = Screen(out, environment={"TERM": "xterm"})
    screen.draw(["one", "two"])
    screen.line("stays")
    screen.draw(["three"])
    screen.clear()
    assert out.getvalue() == "one\ntwo\n\x1b[2A\x1b[Jstays\nthree\n\x1b[1A\x1b[J"


def test_a_file_gets_lines_only() -> None:
    out = io.StringIO()
    screen = Screen(out, environment={"TERM": "xterm"})
    screen.draw(["one", "two"])
    screen.line("stays")
    screen.clear()
    assert out.getvalue() == "stays\n"
    assert not screen.is_terminal


@pytest.mark.parametrize(
    ("environment", "terminal", "color"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, False, False),
        ({}, False, False),
    ],
)
def test_the_environment_is_heeded(environment: dict[str, str], terminal: bool, color: bool) -> None:
    screen = Screen(Terminal(), environment=environment)
    assert (screen.is_terminal, screen.look.color) == (terminal, color)


def test_a_terminal_without_unicode_gets_plain_characters() -> None:
    out = Terminal("ascii")
    screen = Screen(out, environment={"TERM": "xterm"})
    screen.line("модуль … ×")
    assert out.getvalue() == "?????? ? ?\n"
    assert screen.look.meter(1, 2, 4) == "##.."


def finished(victim: str = "", moved: bool = False) -> str:
    progress = progress_of_two()
    progress.total = 1
    see(progress, begun("11-x"))
    if victim:
        progress.killed(victim, 1.0)
    if moved:
        see(progress, begun("12-y", attempt=2), 5.1)
    see(progress, ended())
    lines = summary(
        progress,
        headline="All is well.",
        report=Path("/tmp/weft-review.md"),
        processes={"broker": 7, "coordinator": 8},
        victim=victim,
        times=(3.0, 4.5),
    )
    return "\n".join(lines)


def test_the_summary_says_where_the_report_is_what_ran_and_what_to_try() -> None:
    text = finished("analyst-1", moved=True)
    assert "Report: /tmp/weft-review.md" in text
    assert "broker       7\n" in text
    assert "analyst-1    11   0                  killed\n" in text
    assert "analyst-2    12   1      1\n" in text
    assert "7.5 s: 3.0 s to start the mesh, 4.5 s for the review." in text
    assert "mesh demo PATH" in text
    assert "less weft-review.md" in text


def test_the_summary_tells_the_takeover() -> None:
    assert (
        "analyst-1 was killed; 1 task went over to analyst-2 within 4.1 s. All 1 task ended, each exactly once."
        in finished("analyst-1", moved=True)
    )


def test_the_summary_is_honest_about_a_kill_that_hit_nothing_and_about_none() -> None:
    assert "there was nothing to take over" in finished("analyst-1")
    assert "Nobody was killed: with 1 task the work was over too soon." in finished()
