"""`mesh send`: a task from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weft.cli.output import output_option

if TYPE_CHECKING:
    from weft_protocols.parts import File, Part


@click.command()
@click.argument("agent")
@click.argument("text", required=False)
@click.option("--data", metavar="JSON|@FILE", help="A structured part: JSON, or a file with it.")
@click.option(
    "--file",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A file to send along; may be repeated.",
)
@click.option("--skill", help="The skill to run, where the agent has several.")
@click.option("--context", help="Id of the conversation this belongs to.")
@click.option("--task", "task_id", help="Id of a task this is a follow-up to, such as an answer to its question.")
@click.option("--message-id", help="Id of the message: sent twice, it is one task.")
@click.option(
    "--deadline",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="The task fails when it has not ended by then.",
)
@click.option("--follow", is_flag=True, help="Show progress and results as they arrive.")
@click.option("--detach", is_flag=True, help="Print the task's id as soon as it is accepted.")
@click.option("--no-input", is_flag=True, help="Never ask; a question ends the command with exit code 1.")
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for files among the results; created if need be.",
)
@output_option
def command(
    agent: str,
    text: str | None,
    output: str,
    *,
    data: str | None,
    files: tuple[Path, ...],
    **options: Any,
) -> int:
    """Send TEXT to AGENT, wait, and print the result.

    TEXT of - is read from stdin. When the agent asks something and a person sits at the terminal, the answer is
    read from there. Ctrl-C stops the waiting, not the task.

    Exit code 1: the task failed, was rejected or cancelled, or waits for input. Exit code 7: its deadline passed.
    """
    import asyncio

    from weft.cli.conversation import Conversation, Request

    request = Request(agent=agent, parts=_parts(text, data, files), **options)
    if request.detach and request.task_id:
        raise click.UsageError("--detach starts a task, --task continues one; use one of them")
    if request.detach and request.follow:
        raise click.UsageError("--detach does not wait, --follow does; use one of them")
    may_ask = not request.no_input and text != "-" and sys.stdin.isatty() and sys.stderr.isatty()
    return asyncio.run(Conversation(request, output=output, may_ask=may_ask).run())


def _parts(text: str | None, data: str | None, files: tuple[Path, ...]) -> list[Part]:
    """The message's parts, in the order text, data, files."""
    from weft_protocols.parts import Data, Text

    parts: list[Part] = []
    if text is not None:
        parts.append(Text(sys.stdin.read() if text == "-" else text))
    if data is not None:
        parts.append(Data(_json(data)))
    parts += [_file(path) for path in files]
    if not parts:
        raise click.UsageError("there is nothing to send: give TEXT, - for stdin, --data or --file")
    return parts


def _json(given: str) -> Any:
    """The value of `--data`."""
    import json

    source, where = given, "--data"
    if given.startswith("@"):
        where = given[1:]
        try:
            source = sys.stdin.read() if where == "-" else Path(where).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise click.UsageError(f"--data: {where} cannot be read: {error}") from None
    try:
        return json.loads(source)
    except ValueError as error:
        raise click.UsageError(f"{where} is not JSON: {error}; quote text as '\"text\"'") from None


def _file(path: Path) -> File:
    import mimetypes

    from weft_protocols.parts import File

    kind, _ = mimetypes.guess_type(path.name)
    return File(path.name, path.read_bytes(), media_type=kind or "application/octet-stream")
