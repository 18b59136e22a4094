"""`mesh tools`: register tool servers, see what they offer, approve it, call it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from weft.cli.output import Column, Printer, output_option, safe

if TYPE_CHECKING:
    from weft.client.tools import ToolClient
    from weft.core.broker import Broker
    from weft.core.toolsconf import ToolServer

T = TypeVar("T")
COLUMNS: Final = (
    Column("name", "SERVER"),
    Column("transport"),
    Column("state", state=True),
    Column("version", "MCP"),
    Column("tools", right=True),
    Column("sandbox"),
    Column("quarantined", flexible=True),
    Column("where", flexible=True),
)
OFFERED: Final = (
    Column("key", "OFFERED"),
    Column("quarantine"),
    Column("description", flexible=True),
)
CHECK_FAILED: Final = 3


@click.group()
def command() -> None:
    """Register, inspect, approve and call tool servers, which speak MCP.

    Agents reach them only through the sidecar, which `mesh up` starts when there are any.
    """


@command.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--url", default="", help="Address of a server that speaks streamable HTTP.")
@click.option(
    "--from", "source", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A server.json to read."
)
@click.option("--builtin", default="", help="A server that the sidecar itself is: `code` runs Python of agents.")
@click.option("--env", multiple=True, metavar="NAME[=VARIABLE]", help="A variable of the sidecar it may have.")
@click.option("--header", multiple=True, metavar="NAME=VARIABLE", help="A header, from a variable of the sidecar.")
@click.option("--cwd", default="", help="Folder it runs in.")
@click.option("--era", type=click.Choice(["auto", "modern", "legacy"]), default="auto", show_default=True)
@click.option("--setting", multiple=True, metavar="NAME=JSON", help="A limit, such as timeout=10.")
@click.option("--approve-nothing", is_flag=True, help="Leave everything it offers in quarantine.")
@output_option
def add(name: str, words: tuple[str, ...], *, output: str, **options: Any) -> int:
    """Register tool server NAME, and approve what it offers now.

    What it offers later, or in another form, is in quarantine until `mesh tools approve`. Values of --env and
    --header are names of variables: secrets are never stored.
    """
    server = _server(name, words, options)
    printer = Printer(output)

    async def register(broker: Broker) -> None:
        from weft.core.toolstore import ToolStore

        store = ToolStore(broker)
        await store.pins.remove(name)
        await store.register(server)

    _as_operator(register)
    _start_sidecar(printer)
    told = _as_operator(lambda broker: _once_known(broker, name))
    if told is None:
        printer.record({"name": name, "registered": True}, text=f"{name} is registered; no sidecar runs yet")
        return 0
    _show(printer, told)
    from weft.cli.policysource import hint

    if any(one["key"].startswith("tool:") for one in told["items"]):
        todo = _as_operator(lambda broker: hint(broker, name))
        if todo:
            printer.talk(todo)
    return CHECK_FAILED if any(one["hidden"] for one in told["items"]) else 0


@command.command("list")
@output_option
def list_servers(output: str) -> None:
    """List the tool servers: how they are, and what of them is in quarantine."""

    async def gather(broker: Broker) -> list[dict[str, Any]]:
        from weft.core.toolstore import ToolStore

        registered = await ToolStore(broker).registered()
        states = {one["name"]: one for one in (await _states(broker)) or ()}
        return [_row(server, states.get(name)) for name, server in sorted(registered.items())]

    printer, rows = Printer(output), _as_operator(gather)
    printer.rows(rows, COLUMNS, empty="no tool server yet; `mesh tools add NAME -- COMMAND` registers one")
    for row in rows:
        if row["state"] == "failed" and not printer.machine:
            printer.talk(f"{row['name']}: {row['failure']}")


@command.command()
@click.argument("name")
@output_option
def show(name: str, output: str) -> None:
    """Show what server NAME offers, what of it is in quarantine, and how that differs from what was approved."""
    _show(Printer(output), _as_operator(lambda broker: _ask(broker, "weft/inspect", {"server": name})))


@command.command()
@click.argument("tool")
@click.argument("arguments", nargs=-1)
@click.option("--timeout", type=click.FloatRange(min=0.1), default=60.0, show_default=True, help="Seconds to wait.")
@output_option
def call(tool: str, arguments: tuple[str, ...], *, timeout: float, output: str) -> int:
    """Call TOOL, written server.tool, with ARGUMENTS: NAME=VALUE, or NAME:=JSON, or one JSON object.

    Exit code 1 when the tool says that it failed.
    """
    server, name = _split(tool)
    given = _arguments(arguments)

    async def ask(client: ToolClient) -> dict[str, Any]:
        import time

        from weft.client.tools import ToolRequest

        params = {"name": name, "arguments": given}
        return await client.request(ToolRequest(server, "tools/call", params, deadline=time.time() + timeout))

    result = _as_caller(ask)
    Printer(output).record(result, text=_text(result))
    return 1 if result.get("isError") else 0


@command.command()
@click.argument("name")
@output_option
def test(name: str, output: str) -> int:
    """Connect to server NAME and list what it offers. Exit code 3 when it cannot be called as it should."""
    from weft_protocols.errors import ToolError

    printer = Printer(output)
    try:
        told = _as_operator(lambda broker: _ask(broker, "weft/inspect", {"server": name}))
    except ToolError as error:
        printer.record({"server": name, "ok": False, "reason": str(error)}, text=f"{name} cannot be used: {error}")
        return CHECK_FAILED
    held = [one["key"] for one in told["items"] if one["quarantine"]]
    unredacted = told.get("unredacted", "")
    ok = not held and not unredacted
    record = {"server": name, "ok": ok, "mcp": told["version"], "offers": len(told["items"]), "quarantined": held}
    printer.record(record | ({"reason": _unredacted(unredacted)} if unredacted else {}))
    return 0 if ok else CHECK_FAILED


@command.command()
@click.argument("name")
@click.argument("keys", nargs=-1)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@output_option
def approve(name: str, keys: tuple[str, ...], *, yes: bool, output: str) -> int:
    """Approve what server NAME offers now, all of it or KEYS only, after showing it.

    Characters that nobody would see are written out.
    """
    printer = Printer(output)
    told = _as_operator(lambda broker: _ask(broker, "weft/inspect", {"server": name}))
    if not printer.machine:
        _show(printer, told)
    if not yes and not click.confirm("Approve this?", err=True):
        printer.talk("nothing is approved")
        return 1
    asked = {"server": name, "digest": told["digest"], "keys": list(keys)}
    done = _as_operator(lambda broker: _ask(broker, "weft/approve", asked))
    printer.record(done, text=f"approved: {', '.join(done['approved'])}")
    return 0


@command.command()
@click.argument("name")
@click.argument("keys", nargs=-1)
@output_option
def quarantine(name: str, keys: tuple[str, ...], *, output: str) -> None:
    """Let nobody use what server NAME offers, or KEYS of it, until it is approved again."""
    asked = {"server": name, "keys": list(keys)}
    done = _as_operator(lambda broker: _ask(broker, "weft/quarantine", asked))
    Printer(output).record(done, text=f"in quarantine: {', '.join(done['quarantined'])}")


@command.command()
@click.argument("name")
def remove(name: str) -> None:
    """Forget server NAME, and what of it was approved."""

    async def forget(broker: Broker) -> None:
        from weft.core.toolstore import ToolStore
        from weft_protocols.errors import UsageError

        store = ToolStore(broker)
        server = await store.get(name)
        if server is None:
            known = ", ".join(await store.registered()) or "none"
            raise UsageError(f"there is no tool server {name!r}; there are: {known}")
        if server.source == "mesh.yaml":
            raise UsageError(f"{name} stands in mesh.yaml: take it out there and run `mesh restart sidecar`")
        await store.remove(name)

    _as_operator(forget)
    Printer().talk(f"{name} is removed")


# What is asked -------------------------------------------------------------------------------------


async def _ask(broker: Broker, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """An operator's request, answered by any sidecar."""
    import time

    from weft.client.tools import ToolClient, ToolRequest
    from weft_protocols.mcp import EVERY

    client = ToolClient(broker)
    try:
        return await client.request(ToolRequest(EVERY, method, params, deadline=time.time() + 90.0))
    finally:
        await client.aclose()


async def _states(broker: Broker) -> list[dict[str, Any]] | None:
    """How servers are; None where no sidecar runs."""
    from weft_protocols.errors import Unavailable

    try:
        told = await _ask(broker, "weft/servers", {})
    except Unavailable:
        return None
    found: list[dict[str, Any]] = told["servers"]
    return found


async def _once_known(broker: Broker, name: str) -> dict[str, Any] | None:
    """What a server offers, as soon as a sidecar has heard of it; None where no sidecar runs."""
    from weft_protocols.errors import ToolError, Unavailable
    from weft_protocols.mcp import NO_SERVER

    for _ in range(100):
        try:
            return await _ask(broker, "weft/inspect", {"server": name})
        except Unavailable:
            return None
        except ToolError as error:
            if error.code != NO_SERVER:
                raise
            await asyncio.sleep(0.1)
    return None


def _as_operator(work: Callable[[Broker], Awaitable[T]]) -> T:
    """Run `work` with a connection of the operator."""
    from weft_protocols.subjects import OPERATOR

    return _connected(OPERATOR, work)


def _as_caller(work: Callable[[ToolClient], Awaitable[T]]) -> T:
    """Run `work` with the tools of whoever uses the mesh here."""

    async def with_client(broker: Broker) -> T:
        from weft.client.tools import ToolClient

        client = ToolClient(broker)
        try:
            return await work(client)
        finally:
            await client.aclose()

    return _connected(None, with_client)


def _connected(identity: str | None, work: Callable[[Broker], Awaitable[T]]) -> T:
    from weft.core.broker import Broker
    from weft.core.config import load_settings

    async def connected() -> T:
        broker = await Broker.connect(load_settings(identity), name="mesh tools")
        try:
            return await work(broker)
        finally:
            await broker.close()

    return asyncio.run(connected())


def _start_sidecar(printer: Printer) -> None:
    """Have `mesh up` start a sidecar, where it runs and started none because there were no tools."""
    from weft.cli.supervisor.control import call as ask_supervisor
    from weft.core.config import find_home
    from weft.core.toolsconf import INSTALL, missing_modules
    from weft_protocols.errors import WeftError

    if _as_operator(_states) is not None:
        return
    if missing := missing_modules():
        printer.talk(f"no sidecar can run: {', '.join(missing)} not installed; {INSTALL}")
        return
    try:
        ask_supervisor(find_home(), "restart", tell=printer.progress, timeout=60.0, name="sidecar")
    except WeftError as error:
        printer.talk(f"no sidecar runs, and none could be started: {error}")


# What is written -----------------------------------------------------------------------------------


def _server(name: str, words: Sequence[str], options: dict[str, Any]) -> ToolServer:
    """The server that the options describe. Raises InvalidConfig for what it cannot be."""
    from dataclasses import replace

    from weft.core.serverjson import read_server_json
    from weft.core.toolsconf import ToolServer, builtin_fault, checked
    from weft.sidecar.guards import guards_of
    from weft.sidecar.settings import limits_of
    from weft_protocols.errors import Unavailable, UsageError

    given = [bool(words), bool(options["url"]), bool(options["builtin"]), options["source"] is not None]
    if sum(given) != 1:
        raise UsageError("say how to reach it: -- COMMAND..., or --url, or --from server.json, or --builtin code")
    if fault := builtin_fault(options["builtin"]):
        raise Unavailable(fault)
    env = dict(_pair(one, one) for one in options["env"])
    headers = dict(_pair(one, "") for one in options["header"])
    settings = {key: _json(value, key) for key, value in (_pair(one, "") for one in options["setting"])}
    limits_of(settings)
    guards_of(settings, process=bool(words))
    if options["source"] is not None:
        server = read_server_json(options["source"], name)
        server = replace(server, env={**server.env, **env}, headers_env={**server.headers_env, **headers})
    else:
        reached = {"command": tuple(words), "url": options["url"], "builtin": options["builtin"]}
        server = ToolServer(name, **reached, env=env, headers_env=headers)
    cwd = options["cwd"] or (str(Path.cwd()) if server.command else "")
    trust = "approve" if options["approve_nothing"] else "first-use"
    return checked(replace(server, cwd=cwd, era=options["era"], trust=trust, settings=settings))


def _pair(text: str, default: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    return name, value if sign else default


def _json(text: str, where: str) -> Any:
    from weft_protocols.errors import UsageError

    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where}: {text!r} is not JSON: {error}") from None


def _split(tool: str) -> tuple[str, str]:
    from weft_protocols.errors import UsageError

    server, dot, name = tool.partition(".")
    if not dot or not name:
        raise UsageError(f"{tool!r} names no tool: write server.tool; `mesh tools list` shows the servers")
    return server, name


def _arguments(words: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE`, `NAME:=JSON`, or one JSON object."""
    from weft_protocols.errors import UsageError

    if len(words) == 1 and words[0].lstrip().startswith("{"):
        found = _json(words[0], "arguments")
        if isinstance(found, dict):
            return found
    made: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.rstrip(":"):
            raise UsageError(f"{word!r} is no argument: write NAME=VALUE, or NAME:=JSON for other than text")
        made[name.rstrip(":")] = _json(value, name) if name.endswith(":") else value
    return made


# What is shown -------------------------------------------------------------------------------------


def _row(server: ToolServer, state: dict[str, Any] | None) -> dict[str, Any]:
    if not server.enabled:
        word = "off"
    elif state is None:
        word = "waiting"
    elif state["failure"] or state.get("unredacted"):
        word = "failed"
    else:
        word = "ready" if state["sessions"] or state["version"] else "idle"
    told = state or {"version": "", "tools": None, "quarantined": [], "failure": "no sidecar runs"}
    sandbox = told.get("sandbox", "")
    return {
        "name": server.name,
        "transport": server.transport,
        "state": word,
        "version": told["version"],
        "tools": told["tools"],
        "quarantined": told["quarantined"],
        "where": server.where,
        "source": server.source,
        "failure": told["failure"] or told.get("unredacted", ""),
        "sandbox": f"{sandbox} (degraded)" if told.get("degraded") else sandbox,
        "degraded": told.get("degraded", ""),
    }


def _show(printer: Printer, told: dict[str, Any]) -> None:
    if printer.machine:
        printer.record(told)
        return
    info = told["info"]
    title = " ".join(str(info[key]) for key in ("name", "version") if info.get(key))
    printer.talk(f"{told['server']}: {title or 'no name'}, MCP {told['version'] or '?'}")
    if told.get("sandbox"):
        printer.talk(f"sandbox: {told['sandbox']}")
    if told.get("degraded"):
        printer.talk(f"DEGRADED: its files and network are open: {told['degraded']}")
    if told.get("unredacted"):
        printer.talk(_unredacted(told["unredacted"]))
    rows = [{**one, "description": _description(one["definition"])} for one in told["items"]]
    printer.rows(rows, OFFERED, empty="it offers nothing")
    for one in told["items"]:
        for line in one["hidden"]:
            printer.talk(f"hidden characters in {one['key']}: {line}")
        if one["quarantine"]:
            printer.talk(f"\n{one['key']}: {one['quarantine']}")
            for line in one["difference"]:
                printer.talk(f"  {line}")
    for key in told["gone"]:
        printer.talk(f"approved, but not offered any more: {key}")
    if any(one["quarantine"] for one in told["items"]):
        printer.talk(f"  next: mesh tools approve {told['server']}")


def _unredacted(fault: str) -> str:
    return f"calls are refused: Presidio is to look through what comes back, and cannot: {fault}"


def _description(definition: Any) -> str:
    found = definition.get("description") if isinstance(definition, dict) else definition
    return str(found or "").strip().partition("\n")[0]


def _text(result: dict[str, Any]) -> str:
    """What a person sees of a result."""
    shown = []
    for block in result.get("content") or ():
        if isinstance(block, dict) and block.get("type") == "text":
            shown.append(str(block.get("text", "")))
        elif isinstance(block, dict):
            shown.append(f"[{block.get('type')} {block.get('mimeType') or block.get('uri') or ''}]".replace(" ]", "]"))
    if not shown and result.get("resultType") == "input_required":
        return json.dumps(result.get("inputRequests"), ensure_ascii=False, indent=2)
    return safe("\n".join(shown))
