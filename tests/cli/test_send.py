"""`mesh send` and `mesh tasks` against a running mesh."""

import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NOBODY = "a" * 32


def test_the_result_is_on_stdout_and_nothing_else(running: Any) -> None:
    result = running.mesh("send", "worker", "hello there")
    assert (result.out, result.err) == ("echo hello there\n", "")


def test_the_command_works_as_a_process_too(running: Any) -> None:
    result = running.process("send", "worker", "-", said="through a pipe")
    assert (result.out, result.err) == ("echo through a pipe\n", "")
    assert running.process("send", "worker", "fail", "-o", "json", code=1).json["state"] == "failed"


def test_text_can_come_from_stdin(running: Any) -> None:
    assert running.mesh("send", "worker", "-", said="from a pipe").out == "echo from a pipe\n"


def test_a_skill_can_be_named(running: Any) -> None:
    assert running.mesh("send", "worker", "quiet", "--skill", "shout").out == "QUIET\n"
    assert "no skill 'sing'" in running.mesh("send", "worker", "la", "--skill", "sing", code=2).err


def test_data_and_files_travel_along(running: Any, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('{"n": 1}')
    (tmp_path / "a.bin").write_bytes(b"\0" * 400_000)
    sent = ("send", "worker", "data", "--data", f"@{tmp_path}/in.json", "--file", f"{tmp_path}/a.bin")
    assert json.loads(running.mesh(*sent).out) == {"got": {"n": 1}, "files": [["a.bin", 400_000]]}
    assert json.loads(running.mesh("send", "worker", "data", "--data", "[1, 2]").out)["got"] == [1, 2]


def test_the_task_as_json(running: Any) -> None:
    task = running.mesh("send", "worker", "x", "--context", "talk-1", "-o", "json").json
    assert (task["agent"], task["state"], task["context_id"]) == ("worker", "completed", "talk-1")
    assert task["artifacts"][0]["parts"] == [{"text": "echo x"}]


def test_the_same_message_sent_twice_is_one_task(running: Any) -> None:
    ids = {running.mesh("send", "worker", "x", "--message-id", "once", "-o", "json").json["id"] for _ in range(2)}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("text", "ended"), [("fail", "failed: it cannot be done"), ("reject", "was rejected: not like this")]
)
def test_a_task_that_fails_ends_with_1_and_its_reason(text: str, ended: str, running: Any) -> None:
    result = running.mesh("send", "worker", text, code=1)
    assert result.out == ""
    assert f"of worker {ended}" in result.err


def test_a_failed_task_is_whole_json_for_programs(running: Any) -> None:
    task = running.mesh("send", "worker", "fail", "-o", "json", code=1).json
    assert task["state"] == "failed"
    assert task["message"]["parts"] == [{"text": "it cannot be done"}]


def test_a_deadline_that_passes_ends_with_7(running: Any) -> None:
    begun = time.monotonic()
    result = running.mesh("send", "worker", "wait 30", "--deadline", "0.5", code=7)
    assert "deadline" in result.err
    assert time.monotonic() - begun < 8


def test_an_unknown_agent_is_not_found_and_a_near_one_suggested(running: Any) -> None:
    assert "no agent 'workr' (did you mean 'worker'?)" in running.mesh("send", "workr", "x", code=5).err
    assert running.mesh("send", "workr", "x", "-o", "json", code=5).error["code"] == "not_found"


def test_a_name_that_can_be_none_is_a_usage_error(running: Any) -> None:
    assert "is not a name" in running.mesh("send", "no.name", "x", code=2).err


def test_an_identity_the_mesh_does_not_know_cannot_send(running: Any) -> None:
    stranger = type(running)(running.folder, env={"WEFT_IDENTITY": "stranger"})
    assert "knows no identity 'stranger'" in stranger.mesh("send", "worker", "x", code=4).err


def test_follow_streams_progress_to_stderr_and_results_to_stdout(running: Any) -> None:
    result = running.mesh("send", "worker", "hello", "--follow")
    assert result.out == "echo hello\n"
    assert "worker: working: doing hello\n" in result.err


def test_follow_as_json_is_a_line_for_every_event(running: Any) -> None:
    for form in ("json", "jsonl"):
        lines = running.mesh("send", "worker", "hello", "--follow", "-o", form).out.splitlines()
        events = [json.loads(line) for line in lines]
        assert [event["n"] for event in events] == list(range(1, len(events) + 1))
        assert events[-1]["state"] == "completed"
        assert any(event.get("artifact") for event in events)


def test_detach_prints_the_id_of_an_accepted_task(running: Any) -> None:
    task = running.mesh("send", "worker", "later", "--detach").out.strip()
    assert running.mesh("tasks", "watch", task).out.splitlines()[-1].split()[1] == "completed"
    assert "echo later" in running.mesh("tasks", "get", task).out
    accepted = running.mesh("send", "worker", "later", "--detach", "-o", "json").json
    assert accepted["state"] == "submitted"
    assert len(accepted["id"]) == 32


def test_files_among_the_results_are_written_and_stay_in_their_folder(running: Any, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for _ in range(2):
        result = running.mesh("send", "worker", "file", "--output-dir", str(folder))
        assert "written" in result.out
    assert sorted(path.name for path in folder.iterdir()) == ["notes-1.md", "notes.md", "report-1.txt", "report.txt"]
    assert (folder / "report.txt").read_bytes() == b"the report"
    assert not (tmp_path / "report.txt").exists()


def test_a_file_that_is_not_kept_is_mentioned(running: Any) -> None:
    result = running.mesh("send", "worker", "file")
    assert "report.txt, text/plain, 10 bytes: --output-dir FOLDER keeps it" in result.err
    assert "the report" not in result.out


def test_a_question_without_a_person_ends_with_1_and_says_how_to_answer(running: Any) -> None:
    result = running.mesh("send", "worker", "ask", code=1)
    assert "is input-required: which colour?" in result.err
    hint = next(line for line in result.err.splitlines() if "answer with: mesh send worker --task" in line)
    task = hint.split("--task ")[1].split()[0]
    assert running.mesh("send", "worker", "--task", task, "blue").out == "it is blue\n"
    again = running.mesh("send", "worker", "--task", task, "red", code=1)
    assert "has ended as completed" in again.err
    states = [line.split()[1] for line in running.mesh("tasks", "watch", task).out.splitlines()]
    assert "input-required" in states
    assert states[-1] == "completed"


def test_a_person_is_asked_and_the_answer_sent(running: Any, terminal: Any) -> None:
    with terminal("send", "worker", "ask", "--follow") as screen:
        screen.expect("worker asks: which colour?")
        screen.type("\n")
        screen.type("green\n")
        screen.expect("it is green")
        assert screen.wait() == 0


def test_no_input_never_asks(terminal: Any) -> None:
    with terminal("send", "worker", "ask", "--no-input") as screen:
        screen.expect("is input-required: which colour?")
        assert screen.wait() == 1


def test_no_answer_leaves_the_task_waiting(terminal: Any) -> None:
    with terminal("send", "worker", "ask") as screen:
        screen.expect("> ")
        screen.type("\x04")
        screen.expect("answer with: mesh send worker --task")
        assert screen.wait() == 1


def test_an_interrupt_ends_the_waiting_and_not_the_task(terminal: Any) -> None:
    with terminal("send", "worker", "wait 1") as screen:
        screen.expect("doing wait")
        screen.interrupt()
        shown = screen.expect("goes on; `mesh tasks watch")
        assert screen.wait() == 130
    task = shown.split("`mesh tasks watch ")[1].split("`")[0][:32]
    assert screen.project.mesh("tasks", "watch", task).out.splitlines()[-1].split()[1] == "completed"


def test_what_an_agent_says_cannot_drive_the_terminal(running: Any, terminal: Any) -> None:
    assert running.mesh("send", "worker", "escape").out == "\x1b[31mred\x07\n"
    with terminal("send", "worker", "escape") as screen:
        shown = screen.expect("red")
        assert screen.wait() == 0
    assert "\x1b[31mred" not in shown


def test_tasks_are_listed_filtered_and_limited(running: Any) -> None:
    running.mesh("send", "worker", "one", "--context", "list-me")
    running.mesh("send", "worker", "fail", "--context", "list-me", code=1)
    listed = running.mesh("tasks", "list", "--context", "list-me", "-o", "json").json
    assert {task["state"] for task in listed} == {"completed", "failed"}
    assert listed[0]["state"] == "failed", "the one that changed last is first"
    failed = running.mesh("tasks", "list", "--state", "failed", "--context", "list-me", "-o", "jsonl").out
    assert [json.loads(line)["text"] for line in failed.splitlines()] == ["it cannot be done"]
    assert len(running.mesh("tasks", "list", "--limit", "1", "-o", "json").json) == 1
    table = running.mesh("tasks", "list", "--agent", "worker", "--context", "list-me").out
    assert table.splitlines()[0].split() == ["TASK", "AGENT", "STATE", "UPDATED", "TEXT"]
    nothing = running.mesh("tasks", "list", "--context", "no-such-talk")
    assert (nothing.out, nothing.err) == ("", "no tasks\n")


def test_the_operator_sees_the_tasks_of_every_caller(running: Any) -> None:
    task = running.mesh("send", "worker", "mine", "-o", "json").json["id"]
    listed = running.mesh("tasks", "list", "--all", "--limit", "200", "-o", "json").json
    assert task in {entry["id"] for entry in listed}
    assert running.mesh("tasks", "get", task, "--all", "-o", "json").json["id"] == task


def test_a_task_is_shown_with_its_result(running: Any) -> None:
    task = running.mesh("send", "worker", "show me", "-o", "json").json["id"]
    assert running.mesh("tasks", "get", task, "-o", "json").json["state"] == "completed"
    assert running.mesh("tasks", "get", task, "--agent", "worker").out.endswith("echo show me\n")


def test_a_task_can_be_watched_from_any_event_on(running: Any) -> None:
    task = running.mesh("send", "worker", "watch me", "-o", "json").json["id"]
    whole = [json.loads(line) for line in running.mesh("tasks", "watch", task, "-o", "jsonl").out.splitlines()]
    rest = [
        json.loads(line) for line in running.mesh("tasks", "watch", task, "--after", "2", "-o", "json").out.splitlines()
    ]
    assert rest == whole[2:]
    failed = running.mesh("send", "worker", "fail", "-o", "json", code=1).json["id"]
    running.mesh("tasks", "watch", failed, code=1)


def test_a_task_is_cancelled_once(running: Any, until: Callable[..., Any]) -> None:
    task = running.mesh("send", "worker", "wait 60", "--detach").out.strip()
    assert running.mesh("tasks", "cancel", task, "--reason", "no longer needed").out == f"{task} canceled\n"
    assert "ended as canceled" in running.mesh("tasks", "cancel", task, code=1).err


@pytest.mark.parametrize("verb", ["get", "watch", "cancel"])
def test_an_unknown_task_is_not_found(verb: str, running: Any) -> None:
    assert NOBODY in running.mesh("tasks", verb, NOBODY, code=5).err
    assert running.mesh("tasks", verb, NOBODY, "-o", "json", code=5).error["code"] == "task_not_found"
    assert "is not 32 lower-case hex digits" in running.mesh("tasks", verb, "short", code=2).err


class Terminal:
    """A command on a terminal."""

    def __init__(self, project: Any, *arguments: str) -> None:
        self.project = project
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            project.command(*arguments),
            cwd=project.folder,
            env={**project.environment, "NO_COLOR": "1"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        os.set_blocking(self._master, False)
        self.shown = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def expect(self, text: str, timeout: float = 15.0) -> str:
        """Everything shown so far, once this text is among it."""
        deadline = time.monotonic() + timeout
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            try:
                self.shown += os.read(self._master, 65_536).decode()
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                assert text in self.shown, self.shown
        return self.shown

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        os.kill(self._process.pid, signal.SIGINT)

    def wait(self) -> int:
        return self._process.wait(15)


@pytest.fixture
def terminal(running: Any) -> Callable[..., Terminal]:
    return lambda *arguments: Terminal(running, *arguments)
