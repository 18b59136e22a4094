"""`mesh policy`: check, test, load and compare policies, and ask what they say."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from weft.cli import policysource as source
from weft.cli.operate import ListingGroup, Since
from weft.cli.output import Column, Printer, output_option, rfc3339, safe

if TYPE_CHECKING:
    from weft.client.policies import Pointer, Version
    from weft.client.policyload import Loaded
    from weft.core.broker import Broker
    from weft.policy.bundle import Bundle, Compiled
    from weft.policy.catalog import Catalog
    from weft.policy.engine import CedarEngine
    from weft.policy.model import Decision, Request
    from weft.policy.rules import Rule

FAILED: Final = 3
DENIED: Final = 6
PROBLEMS: Final = (
    Column("place"),
    Column("kind", state=True),
    Column("rule"),
    Column("message"),
)
VERSIONS: Final = (
    Column("version", right=True),
    Column("state", state=True),
    Column("sidecars", right=True, show=lambda value: str(len(value))),
    Column("at", "LOADED", show=lambda value: f"{value[:19]}Z"),
    Column("author"),
    Column("rules", right=True),
    Column("digest", show=lambda value: str(value)[:12]),
    Column("note", flexible=True),
)
FLIPS: Final = (
    Column("change"),
    Column("agent"),
    Column("resource"),
    Column("task", show=lambda value: str(value)[:8] or "-"),
    Column("before", "BY"),
    Column("after", "WOULD BE BY"),
    Column("why", flexible=True),
)
TESTS: Final = (Column("place"), Column("name"), Column("result", state=True), Column("why", flexible=True))
SEEN: Final = (
    Column("replica"),
    Column("decided", right=True),
    Column("allow>deny", right=True),
    Column("deny>allow", right=True),
    Column("obligations", right=True),
    Column("error", right=True),
)


@click.group(cls=ListingGroup)
def command(**_: Any) -> None:
    """Check, test, load and compare policies, and ask what they say.

    A policy is a folder of .cedar files, with tests beside them. Without a command it is `list`.
    """


def _folder(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("folder", metavar="[DIR]", default=source.FOLDER)(function)


def _tools(function: Callable[..., Any]) -> Callable[..., Any]:
    text = "Definitions of tools: {server: [tool, …]}. Default: tools.json in DIR, else those of the mesh."
    return click.option("--tools", "file", default="", metavar="FILE", help=text)(function)


@command.command()
@_folder
@_tools
@output_option
def check(folder: str, file: str, output: str) -> int:
    """Check the policy in DIR (default: policies) against the registered tools. Exit code 3 if something is wrong."""
    printer = Printer(output)
    known = source.tools(folder, file)
    if known.catalog is None:
        printer.talk(f"names of tools and arguments are not checked: {known.source} (--tools FILE gives them)")
    compiled = _compiled(source.read_folder(folder), known.catalog, agents=known.agents)
    _, wrong = _cases(compiled)
    problems = [*compiled.problems, *wrong]
    if problems or printer.machine:
        printer.rows([_problem(one) for one in problems], PROBLEMS)
    if any(not one.warning for one in problems):
        return FAILED
    printer.talk(f"{len(compiled.rules)} rules are right, checked against {known.source}")
    return 0


@command.command()
@_folder
@_tools
@output_option
def test(folder: str, file: str, output: str) -> int:
    """Run the tests of the policy in DIR (*.test.yaml). Exit code 3 if one fails."""
    printer = Printer(output)
    known = source.tools(folder, file)
    if known.catalog is None:
        raise click.UsageError(f"tests need the definitions of tools: {known.source} (--tools FILE gives them)")
    rows, failed = _tested(_compiled(source.read_folder(folder), known.catalog), known.catalog)
    shown = rows if printer.machine else [row for row in rows if row["result"] != "ok"]
    printer.rows(shown, TESTS)
    printer.talk(f"{len(rows) - failed} of {len(rows)} tests pass" if rows else "there are no tests (*.test.yaml)")
    return FAILED if failed else 0


@command.command()
@_folder
@click.option("--load", "also", is_flag=True, help="Have it decide from now on.")
@output_option
def init(folder: str, also: bool, output: str) -> None:
    """Write a policy to begin with into DIR (default: policies), made of the tools that are registered.

    It permits what only reads to everybody, and everything to the identity `local`, which `mesh tools call` has. What
    else there is stands in it as comments.
    """
    from weft.client.policies import registered
    from weft.core.config import DEFAULT_IDENTITY
    from weft.policy.starter import starter

    root = Path(folder)
    if root.is_dir() and any(root.rglob("*.cedar")):
        raise click.UsageError(f"{folder} has rules already; they are left as they are")
    catalog = source.with_mesh(registered)
    bundle = starter(catalog, operator=DEFAULT_IDENTITY)
    for name, text in bundle.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    printer = Printer(output)
    printer.record(
        {"folder": folder, "files": sorted(bundle.files), "servers": sorted(catalog.servers)},
        text=f"{folder}: rules about {len(catalog.tools)} tools of {len(catalog.servers)} servers",
    )
    if also:
        _load(printer, bundle, note="to begin with")
    else:
        printer.talk(f"next: read it, then `mesh policy load {folder}`")
    printer.talk(f"`policy: {folder}` in mesh.yaml has `mesh up` load it from now on")


@command.command()
@_folder
@click.option("--note", default="", help="What it is about; it is kept with the version.")
@click.option("--allow-unknown", is_flag=True, help="Also if it names tools that are not registered (yet).")
@output_option
def load(folder: str, note: str, allow_unknown: bool, output: str) -> None:
    """Have the policy in DIR (default: policies) decide from now on.

    It is checked and its tests run before; nothing changes if they fail.
    """
    _load(Printer(output), source.read_folder(folder), note=note, lenient=allow_unknown)


def _load(printer: Printer, bundle: Bundle, *, note: str, lenient: bool = False) -> None:
    async def work(broker: Broker) -> tuple[Loaded, str, list[str]]:
        from weft.client.policies import PolicyStore
        from weft.client.policyload import load

        loaded = await load(broker, bundle, by=_author(), note=note, lenient=lenient)
        store = PolicyStore(broker)
        return loaded, await store.mode(), await store.followed(loaded.version.number)

    loaded, mode, behind = source.with_mesh(work)
    version = loaded.version
    for problem in loaded.warnings:
        printer.talk(str(problem))
    record = {
        "version": version.number,
        "digest": version.digest,
        "rules": version.rules,
        "since": rfc3339(loaded.pointer.at),
        "mode": mode,
    }
    watches = "" if mode == "enforce" else f"; mode {mode}: nothing is denied"
    printer.record(record, text=f"version {version.number} decides, {version.rules} rules{watches}")
    _tell_behind(printer, behind)


@command.command()
@click.argument("version", type=click.IntRange(min=1))
@click.option("--note", default="", help="Why.")
@output_option
def rollback(version: int, note: str, output: str) -> None:
    """Have an earlier (or any other) VERSION decide again."""

    async def work(broker: Broker) -> tuple[int, Pointer, list[str]]:
        from weft.client.policies import PolicyStore

        store = PolicyStore(broker)
        before = (await store.pointer()).version
        return (
            before,
            await store.point(version, by=_author(), how="rollback", note=note),
            await store.followed(version),
        )

    before, now, behind = source.with_mesh(work)
    record = {"version": now.version, "before": before, "since": rfc3339(now.at)}
    printer = Printer(output)
    printer.record(record, text=f"version {version} decides, instead of {before or 'none'}")
    _tell_behind(printer, behind)


@command.command("list")
@click.option("--history", is_flag=True, help="Which version decided when, instead.")
@output_option
def list_versions(history: bool, output: str) -> None:
    """List the versions, and which of them decides."""

    async def work(broker: Broker) -> tuple[Any, ...]:
        from weft.client.policies import SHADOW, PolicyStore

        store = PolicyStore(broker)
        if history:
            return (await store.history(),)
        pointers = [(await store.pointer(what)).version for what in ("active", SHADOW)]
        return await store.versions(), *pointers, await store.mode(), await store.running()

    found = source.with_mesh(work)
    printer = Printer(output)
    if history:
        past: list[Pointer] = found[0]
        columns = (Column("at", "SINCE"), Column("version", right=True), Column("how"), Column("by"), Column("note"))
        rows = [
            {"at": rfc3339(one.at), "version": one.version, "how": one.how, "by": one.by, "note": one.note}
            for one in past
        ]
        printer.rows(rows, columns, empty="no policy was ever loaded")
        return
    versions, active, shadow, mode, sidecars = found
    printer.rows(
        [_row(one, active, shadow, sidecars) for one in versions],
        VERSIONS,
        empty="no policy is loaded, so that nothing is allowed; `mesh policy init` writes one to begin with",
    )
    if mode != "enforce":
        printer.talk(f"mode {mode}: nothing is denied, what would be is recorded (policy.mode in mesh.yaml)")
    for one in sidecars:
        if one["failure"]:
            printer.talk(f"sidecar {one['replica']} allows nothing: {one['failure']}")


# For the help and for completion: options without a command are those of the list.
command.params += [one for one in list_versions.params if isinstance(one, click.Option)]


@command.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@output_option
def diff(before: str, after: str, output: str) -> None:
    """Show how the rules of two policies differ: each is a version, `active` or a folder."""
    from weft.policy.compare import changes

    found = changes(_compiled(source.bundle_of(before), None), _compiled(source.bundle_of(after), None))
    printer = Printer(output)
    if not found:
        printer.talk("the rules are the same")
    for one in found:
        text = "\n".join([f"{one.kind} {one.rule}", *(f"  {line}" for line in one.lines)])
        printer.item({"rule": one.rule, "kind": one.kind, "lines": list(one.lines)}, text=safe(text))


def _request(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a request may have besides agent and tool."""
    for option in (
        click.option("--dir", "folder", default="", help="Ask the policy in this folder, not the active one."),
        click.option("--tools", "file", default="", metavar="FILE", help="Definitions of tools; default: of the mesh."),
        click.option("--time", type=Since(), default=None, help="When: now unless said, e.g. 2026-01-31T12:00:00Z."),
        click.option("--chain", default="", help="Agents of the delegation chain, the root first: a,b,c."),
        click.option("--caller", default="", help="Who sent the task."),
        click.option("--task", default="", help="Id of the task."),
        click.option("--skill", default="", help="The skill at work."),
        click.option("--version", default="", help="The agent's version."),
        click.option("--arg", "given", type=source.Argument(), multiple=True, help="An argument; may be repeated."),
    ):
        function = option(function)
    return function


@command.command()
@click.option("--agent", required=True, help="Who asks.")
@click.option("--tool", default="", help="server.tool")
@click.option("--prompt", default="", help="server.prompt")
@click.option("--resource", default="", help="URI of a resource of --server.")
@click.option("--server", default="", help="Server of the resource.")
@_request
@output_option
def explain(output: str, **asked: Any) -> None:
    """Say what a policy decides about a request, which rules decide, and which others are about it."""
    engine, request = _asked(asked)
    decision = engine.decide(request)
    rules = engine.matching(request)
    record = {
        "request": request.encode(),
        **decision.encode(),
        "why": decision.why,
        "rules": [_rule(rule, decision) for rule in rules],
    }
    Printer(output).record(record, text="\n".join(safe(line) for line in _explained(request, decision, rules)))


@command.command("can-i")
@click.argument("agent")
@click.argument("tool")
@_request
@output_option
def can_i(agent: str, tool: str, output: str, **asked: Any) -> int:
    """Say whether AGENT may call TOOL (server.tool). Exit code 6 if not.

    Without arguments: whether there could be some with which it may.
    """
    engine, request = _asked({**asked, "agent": agent, "tool": tool})
    needs = sorted(engine.needs(request).arguments - set(request.arguments))
    decision = engine.decide(request)
    allow, why = decision.allow, decision.why
    if needs and not request.arguments and not allow and engine.visible(request):
        allow, why = True, f"it depends on {', '.join(needs)} (--arg)"
    record = {"allow": allow, "why": why, "depends_on": needs, "obligations": decision.obligations.encode()}
    owed = _owed(decision.obligations.encode()) if decision.allow else []
    Printer(output).record(record, text=safe("\n".join([f"{'yes' if allow else 'no'}: {why}", *owed])))
    return 0 if allow else DENIED


@command.command()
@click.argument("folder", metavar="[DIR]", default="")
@click.option("--stop", is_flag=True, help="Watch no policy any more.")
@click.option("--note", default="", help="What it is about; it is kept with the version.")
@click.option("--allow-unknown", is_flag=True, help="Also if it names tools that are not registered (yet).")
@output_option
def shadow(folder: str, stop: bool, note: str, allow_unknown: bool, output: str) -> None:
    """Evaluate the policy in DIR beside the active one, without effect.

    Without DIR: what it would have decided otherwise so far.
    """
    if stop and folder:
        raise click.UsageError("name a folder, or say --stop; not both")
    bundle = source.read_folder(folder) if folder else None

    async def work(broker: Broker) -> tuple[int, list[dict[str, Any]]]:
        from weft.client.policies import SHADOW, PolicyStore
        from weft.client.policyload import load

        store = PolicyStore(broker)
        if bundle is not None:
            loaded = await load(broker, bundle, by=_author(), note=note, lenient=allow_unknown, what=SHADOW)
            for problem in loaded.warnings:
                Printer().talk(str(problem))
        if stop:
            await store.point(0, by=_author(), how="stop", what=SHADOW)
        now = (await store.pointer(SHADOW)).version
        return now, [one for one in await store.seen() if now and one["version"] == now]

    now, seen = source.with_mesh(work)
    printer = Printer(output)
    if printer.machine:
        printer.record({"version": now, "seen": seen})
        return
    printer.talk(f"version {now} watches" if now else "no policy watches")
    printer.rows(
        [
            {**dict.fromkeys(("allow>deny", "deny>allow", "obligations", "error"), 0), **one, **one["counts"]}
            for one in seen
        ],
        SEEN,
    )
    for example in [one for told in seen for one in told["examples"]][-10:]:
        by = ", ".join(example["candidate"]) or "no rule"
        printer.record(example, text=safe(f"{example['kind']}: {example['agent']} {example['resource']}, by {by}"))


@command.command()
@click.option("--against", "folder", required=True, metavar="DIR", help="The candidate.")
@click.option("--strict", is_flag=True, help="Exit code 3 if a decision would be another.")
@click.option("--since", type=Since(), default="7d", help="Of the mesh's own only later ones: 15m, 2h, 7d or a time.")
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=10_000, help="Of these the last ones, so many.")
@click.argument("records", metavar="[RECORDS.jsonl]", default="", type=click.Path(allow_dash=True))
@_tools
@output_option
def replay(folder: str, strict: bool, records: str, file: str, output: str, **last: int) -> int:
    """Decide about recorded requests by the policy in DIR, and show what would change.

    The records are those of the mesh, or those of a file with one a line (`-`: standard input).
    """
    from weft.policy import compare

    printer = Printer(output)
    known = source.tools(folder, file)
    if known.catalog is None:
        raise click.UsageError(f"deciding needs the definitions of tools: {known.source} (--tools FILE gives them)")
    engine = _compiled(source.read_folder(folder), known.catalog, lenient=True).engine(known.catalog)
    recorded, unreadable = _records(records) if records else _of_mesh(last["since"] / 1000, last["limit"])
    result = compare.replay(engine, engine.needs, recorded)
    rows = [
        {
            "change": flip.kind,
            "agent": flip.recorded.request.agent,
            "resource": flip.recorded.request.resource,
            "task": flip.recorded.request.task,
            "before": list(flip.recorded.reasons),
            "after": list(flip.decision.reasons),
            "why": flip.decision.why,
        }
        for flip in result.flips
    ]
    printer.rows(rows, FLIPS)
    said = f"{len(result.flips)} of {result.same + len(result.flips)} decisions would change"
    said += f"; {result.redacted} cannot be made again, their arguments are redacted or cut" if result.redacted else ""
    said += f"; {unreadable} lines hold no decision" if unreadable else ""
    printer.talk(said)
    return FAILED if strict and result.flips else 0


# What the commands share ---------------------------------------------------------------------------


def _compiled(
    bundle: Bundle, catalog: Catalog | None, *, lenient: bool = False, agents: frozenset[str] | None = None
) -> Compiled:
    from weft.policy.bundle import compile_bundle

    return compile_bundle(bundle, catalog, lenient=lenient, agents=agents)


def _cases(compiled: Compiled) -> tuple[list[Any], list[Any]]:
    from weft.policy import cases

    return cases.read(compiled.bundle.tests)


def _tested(compiled: Compiled, catalog: Catalog) -> tuple[list[dict[str, Any]], int]:
    """Every test as a row, and how many failed. Raises InvalidPolicy if tests or rules cannot be read."""
    from weft.client.policyload import tested

    outcomes = tested(compiled, catalog)
    rows = [
        {
            "place": f"{one.case.file}:{one.case.line}",
            "name": one.case.name,
            "result": "ok" if one.passed else "failed",
            "why": "; ".join(one.failures),
        }
        for one in outcomes
    ]
    return rows, sum(not one.passed for one in outcomes)


def _asked(asked: Mapping[str, Any]) -> tuple[CedarEngine, Request]:
    """What a request is put to, and the request."""
    import time

    folder, file, given = asked["folder"], asked["file"], asked["given"]
    known = source.tools(folder, file)
    if known.catalog is None:
        raise click.UsageError(f"deciding needs the definitions of tools: {known.source} (--tools FILE gives them)")
    names = ("agent", "tool", "prompt", "resource", "server", "version", "skill", "task", "caller")
    fields = {name: asked.get(name, "") for name in names}
    fields["chain"] = [one.strip() for one in asked["chain"].split(",") if one.strip()] or None
    fields["time"] = time.time() if asked["time"] is None else asked["time"] / 1000
    request = source.request(fields, given, known.catalog)
    if folder:
        return _compiled(source.read_folder(folder), known.catalog).engine(known.catalog), request
    from weft.policy.bundle import running

    number, bundle = source.with_mesh(lambda broker: source.stored(broker, 0))
    return running(bundle, known.catalog, version=number), request


def _of_mesh(since: float, limit: int) -> tuple[list[Any], int]:
    """The mesh's own records of decisions, and how many of them cannot be read."""
    from weft.client import audit

    return _readable(source.with_mesh(lambda broker: audit.decisions(broker, since=since, limit=limit)))


def _records(path: str) -> tuple[list[Any], int]:
    """What can be read of a file of records, and how many lines cannot."""
    import json

    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path} cannot be read as records: {error}") from None
    lines: list[Any] = []
    for line in text.splitlines():
        if line.strip():
            try:
                lines.append(json.loads(line))
            except ValueError:
                lines.append(None)
    return _readable(lines)


def _readable(records: Iterable[Any]) -> tuple[list[Any], int]:
    from weft.policy.compare import Recorded

    found, unreadable = [], 0
    for one in records:
        try:
            found.append(Recorded.decode(one))
        except ValueError:
            unreadable += 1
    return found, unreadable


def _author() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _problem(one: Any) -> dict[str, Any]:
    return {
        "place": f"{one.file}:{one.line}" if one.line else one.file,
        "file": one.file,
        "line": one.line,
        "kind": "warning" if one.warning else "error",
        "rule": one.policy,
        "message": one.message,
    }


def _tell_behind(printer: Printer, behind: Sequence[str]) -> None:
    if behind:
        printer.talk(f"not yet on {', '.join(behind)}: it has ended, or does not hear of it; see `mesh health`")


def _row(one: Version, active: int, shadow: int, sidecars: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    state = [word for word, number in (("active", active), ("shadow", shadow)) if number == one.number]
    return {
        "version": one.number,
        "state": " ".join(state),
        "sidecars": [told["replica"] for told in sidecars if told["active"] == one.number],
        "at": rfc3339(one.at),
        "author": one.author,
        "rules": one.rules,
        "digest": one.digest,
        "note": one.note,
    }


def _rule(rule: Rule, decision: Decision) -> dict[str, Any]:
    return {
        "id": rule.id,
        "effect": rule.effect,
        "place": f"{rule.chunk.file}:{rule.chunk.line}",
        "decided": rule.id in decision.reasons,
        "shadow": rule.notes.shadow,
        "text": rule.chunk.text,
    }


def _explained(request: Request, decision: Decision, rules: Sequence[Rule]) -> list[str]:
    lines = [f"{'allow' if decision.allow else 'deny'}: {request.agent} {request.action} {request.resource}"]
    lines += [f"because {decision.why}", *_owed(decision.obligations.encode())]
    if decision.shadow is not None:
        by = ", ".join(decision.shadow.reasons) or "no rule"
        lines.append(f"rules in shadow mode would {'allow' if decision.shadow.allow else 'deny'} it, by {by}")
    decided = [rule for rule in rules if rule.id in decision.reasons]
    others = [rule for rule in rules if rule.id not in decision.reasons]
    for title, several in (("decided by", decided), ("also about it, and not the reason", others)):
        for rule in several:
            lines += ["", f"{title}: {rule.id} ({rule.chunk.file}:{rule.chunk.line})"]
            lines += [f"  {line}" for line in rule.chunk.text.splitlines()]
    if not rules:
        lines.append("no rule is about this agent and this tool")
    return lines


def _owed(owed: Mapping[str, Any]) -> list[str]:
    """Obligations in words."""
    words = {
        "approvals": lambda value: ", ".join(f"{one['count']} of {one['role']}" for one in value),
        "limits": lambda value: ", ".join(
            f"{one['calls']} in {one['seconds']:g} s (burst {one['burst']}, per {one['per']})" for one in value
        ),
        "cost": lambda value: ", ".join(f"{amount:g} {unit}" for unit, amount in value.items()),
    }
    lines = []
    for key, value in owed.items():
        shown = words[key](value) if key in words else ", ".join(value) if isinstance(value, list | tuple) else value
        lines.append(f"  {key.replace('_', ' ')}: {'yes' if shown is True else shown}")
    return lines
