"""Logs: written with times, rotated, merged, followed."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from weft.cli.logs import Source
from weft.cli.supervisor.logfile import LogFile
from weft.cli.supervisor.pipe import LONGEST_LINE, Lines


def test_a_log_is_rotated_by_size_and_old_files_leave(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log", now=lambda: "T", max_bytes=50, kept=2)
    for n in range(30):
        log.write(f"line {n:02}")
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["a.log", "a.log.1", "a.log.2"]
    assert all((tmp_path / name).stat().st_size <= 50 for name in files)
    assert (tmp_path / "a.log").read_text().splitlines()[-1] == "T line 29"
    assert (tmp_path / "a.log.1").read_text() < (tmp_path / "a.log").read_text()


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    for text in ("one", "two"):
        log = LogFile(tmp_path / "a.log", now=lambda: "T")
        log.write(text)
        log.close()
    assert (tmp_path / "a.log").read_text() == "T one\nT two\n"


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    log = LogFile(Path("/dev/full"), now=lambda: "T")
    log.write("lost")
    log.close()


def test_lines_are_cut_where_they_end_and_where_they_are_too_long() -> None:
    lines = Lines()
    assert list(lines.feed(b"a\nb")) == ["a"]
    assert list(lines.feed(b"c\r\n")) == ["bc"]
    assert list(lines.feed(b"x" * (LONGEST_LINE + 3))) == ["x" * LONGEST_LINE]
    assert list(lines.end()) == ["xxx"]
    assert list(lines.end()) == []


def test_the_last_lines_of_a_long_log_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("".join(f"2026-01-01T00:00:00.{n % 1000:03}Z line {n} {'x' * 100}\n" for n in range(10_000)))
    source = Source("a", path)
    tail = source.tail(3)
    assert [text.split()[1] for _, text in tail] == ["9997", "9998", "9999"]
    assert tail[0][0] == "2026-01-01T00:00:00.997Z"
    assert source.tail(0) == []
    source.close()


def test_following_survives_rotation_and_a_half_written_line(tmp_path: Path) -> None:
    times = count()
    log = LogFile(tmp_path / "a.log", now=lambda: f"2026-01-01T00:00:{next(times):02}Z", max_bytes=100)
    log.write("before")
    source = Source("a", tmp_path / "a.log")
    assert [text for _, text in source.tail(10)] == ["before"]
    for n in range(4):
        log.write(f"line {n}")
    log.close()
    assert [text for _, text in source.more()] == ["line 0", "line 1", "line 2", "line 3"]
    with (tmp_path / "a.log").open("a") as file:
        file.write("2026-01-01T00:01:00Z half")
        file.flush()
        assert list(source.more()) == []
        file.write(" whole\n")
    assert [text for _, text in source.more()] == ["half whole"]
    source.close()


def test_the_broker_s_own_times_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        path = tmp_path / "nats.log"
        path.write_text("[12] 2026/01/01 01:00:00.123456 [INF] Server is ready\n  more of it\n")
        source = Source("broker", path)
        assert source.tail(5) == [
            ("2026-01-01T00:00:00.123Z", "[INF] Server is ready"),
            ("2026-01-01T00:00:00.123Z", "  more of it"),
        ]
        source.close()
    finally:
        monkeypatch.undo()
        time.tzset()


def test_logs_of_several_processes_are_merged_by_time(project: Any) -> None:
    logs = project.home / "logs"
    logs.mkdir(parents=True)
    (logs / "a.1.log").write_text("2026-01-01T00:00:01Z one\n2026-01-01T00:00:03Z three\n")
    (logs / "a.2.log").write_text("2026-01-01T00:00:02Z two\n")
    (logs / "coordinator.log").write_text("2026-01-01T00:00:04Z four\n")
    shown = project.mesh("logs").out.splitlines()
    assert [line.split()[-1] for line in shown] == ["one", "two", "three", "four"]
    assert shown[1] == "a.2 | 2026-01-01T00:00:02Z two"
    assert [line.split()[-1] for line in project.mesh("logs", "a", "-n", "2").out.splitlines()] == ["two", "three"]
    assert project.mesh("logs", "a.2").out == "2026-01-01T00:00:02Z two\n"
    entries = [json.loads(line) for line in project.mesh("logs", "coordinator", "-o", "jsonl").out.splitlines()]
    assert entries == [{"time": "2026-01-01T00:00:04Z", "process": "coordinator", "text": "four"}]


def test_a_name_without_a_log_is_not_found_and_the_others_are_named(project: Any) -> None:
    (project.home / "logs").mkdir(parents=True)
    (project.home / "logs" / "hello.1.log").write_text("")
    result = project.mesh("logs", "helo", code=5)
    assert "no log of 'helo' (did you mean 'hello'?); there are broker, hello, hello.1" in result.err


def test_follow_prints_what_is_written_meanwhile(project: Any, until: Callable[..., Any]) -> None:
    logs = project.home / "logs"
    logs.mkdir(parents=True)
    (logs / "a.1.log").write_text("2026-01-01T00:00:01Z old\n")
    seen = project.folder / "seen"
    with (
        seen.open("w") as out,
        subprocess.Popen(
            project.command("logs", "--follow"), cwd=project.folder, env=project.environment, stdout=out
        ) as following,
    ):
        try:
            until(lambda: "old" in seen.read_text())
            with (logs / "a.1.log").open("a") as file:
                file.write("2026-01-01T00:00:02Z new\n")
            (logs / "b.1.log").write_text("2026-01-01T00:00:03Z another\n")
            until(lambda: "a.1 | 2026-01-01T00:00:02Z new" in seen.read_text())
            until(lambda: "b.1 | 2026-01-01T00:00:03Z another" in seen.read_text())
        finally:
            os.kill(following.pid, signal.SIGINT)
        assert following.wait(10) == 130
