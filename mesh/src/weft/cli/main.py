"""The `mesh` command: a table of commands, each imported when it is used.

Nothing heavy may be imported here: `mesh --help` and completion read the table alone.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from weft_protocols.errors import A2AError, Unreachable, WeftError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C."""
SECTIONS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Start": {
        "init": ("weft.cli.init", "Write a new project: one agent and its test."),
        "demo": ("weft.cli.demo", "Review a folder with a small team of agents."),
        "up": ("weft.cli.up", "Start the mesh of this project."),
        "down": ("weft.cli.down", "Drain the agents and stop the mesh."),
    },
    "Work": {
        "send": ("weft.cli.send", "Send a task to an agent and print its result."),
        "tasks": ("weft.cli.tasks", "List, show, watch and cancel tasks; show what they delegated."),
        "agents": ("weft.cli.agents", "List the agents, their skills and replicas; pin a card."),
        "card": ("weft.cli.card", "Check and print the card of an agent."),
        "schedules": ("weft.cli.schedules", "List what starts by the clock, and when."),
        "tools": ("weft.cli.tools", "Register, inspect, approve and call tool servers (MCP)."),
    },
    "Operate": {
        "ps": ("weft.cli.ps", "List the processes of the mesh."),
        "logs": ("weft.cli.logs", "Print what the processes wrote."),
        "restart": ("weft.cli.restart", "Restart a process or, one by one, an agent's replicas."),
        "scale": ("weft.cli.scale", "Set an agent's number of replicas."),
        "approvals": ("weft.cli.approvals", "List what waits for a person; approve or deny it."),
        "locks": ("weft.cli.locks", "List locks and who waits for whom; take one away."),
        "incidents": ("weft.cli.incidents", "List what is wrong, why, and what to run next."),
        "dlq": ("weft.cli.dlq", "Inspect, redrive and discard dead letters."),
        "policy": ("weft.cli.policy", "Check, test, load and compare policies; ask what they say."),
        "health": ("weft.cli.health", "Check broker, coordinator and agents."),
        "doctor": ("weft.cli.doctor", "Check this machine and this project."),
    },
    "Run one part in the foreground": {
        "run": ("weft.cli.run", "Run a replica of an agent."),
        "coordinator": ("weft.cli.coordinator", "Run a coordinator; show which one leads."),
        "gateway": ("weft.cli.gateway", "Run a gateway: every agent over HTTP and gRPC."),
        "sidecar": ("weft.cli.sidecar", "Run a sidecar: the way from agents to tools."),
        "mcp": ("weft.cli.mcp", "Serve the tools here to a desktop client (MCP over stdio)."),
    },
}
"""Every command by section: the module whose `command` it is, and its line in the help."""
HINTS: Final[dict[type[WeftError], str]] = {
    Unreachable: "`mesh ps` shows what runs, `mesh up` starts it, `mesh doctor` looks for the reason",
}
"""What to do about an error that does not say it itself."""


class LazyGroup(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return [name for section in SECTIONS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        for section in SECTIONS.values():
            if cmd_name in section:
                from importlib import import_module

                found: click.Command = import_module(section[cmd_name][0]).command
                return found
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, with a suggestion for a misspelt name."""
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.list_commands(ctx), n=1)
            suggestion = f"; did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"there is no command {args[0]!r}{suggestion}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of commands, section by section."""
        width = max(len(name) for name in self.list_commands(ctx))
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), line) for name, (_, line) in section.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completions of a command name, from the table."""
        from click.shell_completion import CompletionItem

        return [
            CompletionItem(name, help=line)
            for section in SECTIONS.values()
            for name, (_, line) in section.items()
            if name.startswith(incomplete)
        ]


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"mesh {version('weft')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`mesh COMMAND --help` explains a command.",
    subcommand_metavar="COMMAND [ARGUMENTS]",
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version and exit.",
)
def cli() -> None:
    """Run AI agents as independent services."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code. Errors go to stderr, as JSON where JSON was asked for."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    machine = _wants_json(argv)
    try:
        result = cli.main(argv, prog_name="mesh", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        _report("usage", error.format_message(), hint=_usage_hint(error), machine=machine)
        return error.exit_code
    except (WeftError, BaseExceptionGroup) as error:
        failure = _single(error)
        if failure is None:
            raise
        _trace(failure)
        _report(_code(failure), str(failure), hint=_hint(failure), machine=machine)
        return failure.exit_code
    except OSError as error:
        if error.errno == errno.EPIPE:
            return 1
        _trace(error)
        _report("os_error", str(error), machine=machine)
        return 1


def _wants_json(argv: Sequence[str]) -> bool:
    """Whether `-o json` or `-o jsonl` was given; read here because errors of the parser need it as well."""
    return any(form in ("json", "jsonl") for form in _output_forms(argv))


def _output_forms(argv: Sequence[str]) -> Iterator[str]:
    for i, argument in enumerate(argv):
        if argument == "--":
            return
        if argument in ("-o", "--output"):
            yield "".join(argv[i + 1 : i + 2])
        elif argument.startswith(("-o", "--output=")):
            yield argument.removeprefix("--output=").removeprefix("-o").removeprefix("=")


def _single(error: BaseException) -> WeftError | None:
    """The one error raised on purpose, also out of the groups that task groups wrap it in."""
    while isinstance(error, BaseExceptionGroup):
        found: Iterable[BaseException] = error.exceptions
        error = next((e for e in found if not isinstance(e, WeftError | BaseExceptionGroup)), error.exceptions[0])
    return error if isinstance(error, WeftError) else None


def _code(error: WeftError) -> str:
    """A name for programs: the reason of an A2A error, else the class in snake case."""
    if isinstance(error, A2AError):
        return error.reason.lower()
    name = type(error).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _hint(error: WeftError) -> str:
    """What to do: the error's own note, else what helps against its kind."""
    notes: list[str] = getattr(error, "__notes__", [])
    return " ".join(notes) or next((hint for kind, hint in HINTS.items() if isinstance(error, kind)), "")


def _usage_hint(error: click.ClickException) -> str:
    ctx = getattr(error, "ctx", None)
    return f"{ctx.command_path} --help" if ctx is not None else ""


def _report(code: str, message: str, *, hint: str = "", machine: bool) -> None:
    if machine:
        import json

        body: dict[str, Any] = {"code": code, "message": message, "hint": hint}
        print(json.dumps({"error": body}, ensure_ascii=False), file=sys.stderr)
        return
    print(f"mesh: {message}", file=sys.stderr)
    if hint:
        print(f"  try: {hint}" if code == "usage" else f"  {hint}", file=sys.stderr)


def _trace(error: BaseException) -> None:
    """The traceback, for whoever asked for it with WEFT_DEBUG=1."""
    if os.environ.get("WEFT_DEBUG", "") not in ("", "0"):
        import traceback

        traceback.print_exception(error)


if __name__ == "__main__":
    sys.exit(main())
