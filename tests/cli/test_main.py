"""The command itself: help, names, errors, exit codes."""

import json
import os
import subprocess
import sys
from importlib import import_module
from typing import Any

import click
import pytest

from weft.cli.main import SECTIONS, cli, main

HEAVY = ("nats", "a2a", "pydantic", "google.protobuf", "yaml", "asyncio", "json")
NAMES = [name for section in SECTIONS.values() for name in section]


def test_the_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for section, commands in SECTIONS.items():
        assert f"{section}:" in shown
        for name, (_, line) in commands.items():
            assert f"  {name}" in shown
            assert line in shown


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ()], ids=str)
def test_the_table_of_commands_imports_no_command_and_nothing_heavy(arguments: tuple[str, ...]) -> None:
    imported = _imports(*arguments)
    commands = {module for section in SECTIONS.values() for module, _ in section.values()}
    assert imported & commands == set()
    heavy = HEAVY if "--version" not in arguments else HEAVY[:-1]  # reading the version needs json
    assert [name for name in heavy if name in imported] == []


def test_completing_a_command_name_imports_no_command() -> None:
    environment = {**os.environ, "_MESH_COMPLETE": "bash_complete", "COMP_WORDS": "mesh re", "COMP_CWORD": "1"}
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "weft.cli.main"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.split() == ["plain,restart"]
    assert "weft.cli.restart" not in run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: mesh {name}" in shown
    assert "\\" not in shown


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_the_table_leads_to_a_command(name: str) -> None:
    module = next(section[name][0] for section in SECTIONS.values() if name in section)
    assert isinstance(import_module(module).command, click.Command)


def test_no_command_shows_the_help_and_ends_as_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: mesh" in capsys.readouterr().err


def test_a_misspelt_command_is_a_usage_error_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retsart", "x"]) == 2
    shown = capsys.readouterr().err
    assert "there is no command 'retsart'; did you mean 'restart'?" in shown
    assert "mesh --help" in shown


def test_an_unknown_option_is_a_usage_error_that_names_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--nonsense"]) == 2
    shown = capsys.readouterr().err
    assert "--nonsense" in shown
    assert "try: mesh ps --help" in shown


@pytest.mark.parametrize("form", [["-o", "json"], ["-ojson"], ["--output", "jsonl"], ["--output=json"]], ids=str)
def test_errors_are_json_where_json_was_asked_for(form: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["send", *form, "--nonsense"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error = json.loads(captured.err)["error"]
    assert error["code"] == "usage"
    assert "--nonsense" in error["message"]
    assert error["hint"] == "mesh send --help"


def test_what_follows_a_double_dash_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonsense", "--", "-o", "json"]) == 2
    assert capsys.readouterr().err.startswith("mesh: ")


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ("InvalidConfig", 2),
        ("NotAuthenticated", 4),
        ("TaskNotFound", 5),
        ("Denied", 6),
        ("Unreachable", 7),
        ("DeadlineExceeded", 7),
        ("TaskFailed", 1),
    ],
)
def test_an_error_ends_with_its_class_s_exit_code_and_no_traceback(
    raised: str, code: int, failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from weft_protocols import errors

    failing(getattr(errors, raised)("what is wrong"))
    assert main(["failing"]) == code
    shown = capsys.readouterr().err
    assert shown.startswith("mesh: what is wrong")
    assert "Traceback" not in shown


def test_an_error_out_of_a_task_group_is_shown_as_itself(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from weft_protocols.errors import Denied

    failing(ExceptionGroup("group", [ExceptionGroup("inner", [Denied("not you")])]))
    assert main(["failing"]) == 6
    assert capsys.readouterr().err == "mesh: not you\n"


def test_a_bug_beside_an_error_is_not_hidden(failing: Any) -> None:
    from weft_protocols.errors import Denied

    failing(ExceptionGroup("group", [Denied("not you"), ZeroDivisionError("a bug")]))
    with pytest.raises(ExceptionGroup, match="group"):
        main(["failing"])


def test_a_note_on_an_error_is_its_hint(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from weft_protocols.errors import UsageError

    error = UsageError("wrong")
    error.add_note("do this")
    failing(error)
    assert main(["failing", "-o", "json"]) == 2
    assert json.loads(capsys.readouterr().err) == {
        "error": {"code": "usage_error", "message": "wrong", "hint": "do this"}
    }


def test_the_traceback_is_shown_to_whoever_debugs(
    failing: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from weft_protocols.errors import Denied

    monkeypatch.setenv("WEFT_DEBUG", "1")
    failing(Denied("not you"))
    assert main(["failing"]) == 6
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_ends_with_130(failing: Any) -> None:
    failing(KeyboardInterrupt())
    assert main(["failing"]) == 130


def test_an_error_of_the_system_is_told_without_a_traceback(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    failing(PermissionError(13, "Permission denied", "/some/file"))
    assert main(["failing"]) == 1
    assert "/some/file" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds a command `failing` that raises what it is given."""

    def prepare(error: BaseException) -> None:
        @click.command()
        @click.option("-o", "--output")
        def command(output: str | None) -> None:
            raise error

        found = type(cli).get_command
        monkeypatch.setattr(
            type(cli), "get_command", lambda self, ctx, name: command if name == "failing" else found(self, ctx, name)
        )
        monkeypatch.setattr(type(cli), "list_commands", lambda self, ctx: [*NAMES, "failing"])

    return prepare


def _imports(*arguments: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "weft.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == (0 if arguments else 2), run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}
