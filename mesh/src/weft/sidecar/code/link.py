"""The built-in server `code` as a link: what it offers, and its pool of Monty's worker processes.

A worker serves one call and ends, so that nothing of one caller's is left for the next.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, Self

from weft.core.toolsconf import CODE_INSTALL, builtin_fault
from weft.sidecar.code import answers, names
from weft.sidecar.code.journal import Journal, Journals, key
from weft.sidecar.code.run import PRELUDE, RESERVED, OverLimit, Run, Suspended
from weft.sidecar.code.values import TooMuch, as_json
from weft.sidecar.code.worker import Worker
from weft.sidecar.guards import CodeRules, Guards
from weft.sidecar.inside import Within
from weft.sidecar.link import Heard, LinkEnded
from weft.sidecar.pipeline import Call, Refusal, Refused
from weft.sidecar.settings import Limits
from weft_protocols.errors import ToolError, WeftError
from weft_protocols.mcp import BUSY, INVALID_PARAMS, META_STEP, METHOD_NOT_FOUND, UNRECORDED, UPSTREAM_FAILED, VERSION

if TYPE_CHECKING:
    import pydantic_monty as monty

log = logging.getLogger("weft.sidecar")

AHEAD: Final = 0.1
"""Seconds before the call's own end at which the code is ended, so that it is said why."""
SUSPENSIONS: Final = 20
"""Questions of the code to us, such as a name it looks up, for each call that it may make."""
LONGEST: Final = 100_000
"""Characters of code."""
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
RUN: Final[dict[str, Any]] = {
    "name": "run",
    "title": "Run Python",
    "description": (
        "Runs Python code that can call the other tools, and answers with the value of its last expression (or of "
        "`return`) and what it printed. Call a tool as `tools.server.tool(name=value)`, or "
        '`call("server.tool", {"name": value})` where a name cannot be written in Python; list them with the tool '
        "`tools` of this server first. A call gives the tool's structured result, else its text; one that fails or is "
        "refused raises ToolError, whose text says why. Values of `inputs` are variables. There is a subset of Python "
        "with json, re, math, datetime, random and some more of the standard library: no files, network, environment, "
        "generators or inheritance of classes. The clock stands still. Results must be JSON values."
    ),
    "inputSchema": {
        "type": "object",
        "properties": {
            "code": {"type": "string", "description": "Python", "maxLength": LONGEST},
            "inputs": {"type": "object", "description": "Variables of the code, by name"},
        },
        "required": ["code"],
        "additionalProperties": False,
    },
}
LIST: Final[dict[str, Any]] = {
    "name": "tools",
    "title": "Tools for code",
    "description": "Lists the tools that code of this caller can call, and how each is written in Python.",
    "inputSchema": {
        "type": "object",
        "properties": {"server": {"type": "string", "description": "Only those of this server"}},
        "additionalProperties": False,
    },
    "annotations": {"readOnlyHint": True},
}


class CodeLink:
    """See `Link` and `Inside`. `CodeLink.start` makes one."""

    def __init__(self, pool: monty.AsyncMonty, journals: Journals, worker: Worker) -> None:
        self.ended = asyncio.Event()
        self.reason = ""
        self._pool = pool
        self._journals = journals
        self._stack = AsyncExitStack()
        self._stack.callback(worker.close)
        self._running: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def start(cls, limits: Limits, journals: Journals, guards: Guards, *, private: Sequence[str] = ()) -> Self:
        """Get ready to run code, in processes that may not read what is `private`.

        Raises ToolError if Monty is not installed, or its worker does not start.
        """
        if fault := builtin_fault("code"):
            raise ToolError(fault, code=UPSTREAM_FAILED)
        import pydantic_monty as monty

        worker = await asyncio.to_thread(Worker, guards.sandbox, guards.code, private=private)
        pool = monty.AsyncMonty(
            binary_path=worker.path,
            min_processes=0,  # none for calls that may never come
            max_processes=limits.concurrency,
            max_checkouts_per_worker=1,
            checkout_timeout=limits.queue_timeout,
        )
        made = cls(pool, journals, worker)
        try:
            await made._stack.enter_async_context(pool)
            async with pool.checkout() as session:  # so that what is wrong with it is known before it is needed
                await session.feed_run("1")
        except (monty.MontyError, OSError, RuntimeError) as error:
            await made.aclose()
            raise ToolError(f"Monty does not start: {error}; {CODE_INSTALL}", code=UPSTREAM_FAILED) from None
        return made

    async def request(
        self, method: str, params: Mapping[str, Any], *, heard: Heard | None = None, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        """See `Link`."""
        if method == "server/discover":
            info = {"io.modelcontextprotocol/serverInfo": {"name": "code", "version": "1"}}
            return {"supportedVersions": [VERSION], "capabilities": {"tools": {}}, "_meta": info}
        if method == "tools/list":
            return {"resultType": "complete", "tools": [RUN, LIST]}
        if method == "subscriptions/listen":
            await self.ended.wait()
            raise LinkEnded(self.reason)
        raise ToolError("Method not found", code=METHOD_NOT_FOUND)

    async def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """See `Link`."""

    async def handshaken(self) -> None:
        """See `Link`."""

    async def aclose(self) -> None:
        """End what runs, and every worker."""
        if self.ended.is_set():
            return
        self.reason = "the built-in server was ended"
        self.ended.set()
        for limit in self._running:
            limit.reschedule(asyncio.get_running_loop().time())
        await self._idle.wait()
        await self._stack.aclose()

    async def perform(self, call: Call, within: Within) -> dict[str, Any]:
        """See `Inside`."""
        if call.name == LIST["name"]:
            return await _listed(call, within)
        if call.name != RUN["name"]:
            raise ToolError(f"Unknown tool: {call.name[:80]!r}", code=INVALID_PARAMS)
        if wrong := _wrong_inputs(call.arguments.get("inputs") or {}):
            raise Refused(Refusal(INVALID_PARAMS, wrong, in_band=True))
        found = await self._found(call)
        journal = found or Journal(time.time(), secrets.token_hex(8))
        try:
            made = await self._bounded(call, within, journal)
        except Suspended as waiting:
            await self._kept(call, journal)
            raise Refused(waiting.refusal) from None
        if found is not None:
            await self._journals.drop(call)
        return made

    async def _bounded(self, call: Call, within: Within, journal: Journal) -> dict[str, Any]:
        """Run within the time of the whole call."""
        until = None
        if call.deadline is not None:
            until = asyncio.get_running_loop().time() + max(0.0, call.deadline - time.time() - AHEAD)
        limit = asyncio.timeout_at(until)
        self._running.add(limit)
        self._idle.clear()
        try:
            async with limit:
                return await self._run(call, within, journal)
        except TimeoutError:
            if not limit.expired():
                busy = Refusal(BUSY, "no process is free to run code; try again later", in_band=True)
                raise Refused(busy) from None
            if self.ended.is_set():
                raise LinkEnded(self.reason) from None
            return answers.over("timeout", "the whole call took too long", "")
        finally:
            self._running.discard(limit)
            if not self._running:
                self._idle.set()

    async def _run(self, call: Call, within: Within, journal: Journal) -> dict[str, Any]:
        import pydantic_monty as monty

        rules = call.guards.code
        code = str(call.arguments["code"])
        step = call.meta.get(META_STEP)
        run = Run(within, journal, step=step if isinstance(step, str) else "", calls=rules.calls)
        printed = monty.CollectString(rules.output)
        try:
            session = self._pool.checkout(
                script_name="code",
                limits=_limits(rules),
                os_policy={
                    "datetime": datetime.datetime.fromtimestamp(journal.at, datetime.UTC),
                    "random_start": {"seed": f"{journal.seed} {key(call)}"},
                },
            )
            async with AsyncExitStack() as stack:
                await _entered(stack, session)
                value = await run.drive(session, code, call.arguments.get("inputs") or {}, printed)
            return answers.done(as_json(value, rules.output, "the result"), printed.output)
        except OverLimit as over:
            return answers.over(over.limit, str(over), printed.output)
        except TooMuch as over:
            return answers.over("output", f"{over}; {rules.output} are allowed", printed.output)
        except ValueError as error:
            return answers.failed("result", f"{error}", printed.output)
        except monty.MontyError as error:
            return answers.of_monty(error, rules, printed.output)

    async def _found(self, call: Call) -> Journal | None:
        try:
            return await self._journals.read(call)
        except WeftError as error:
            log.warning("what was kept for code of task %s cannot be read: %s", call.task, error)
            message = "whether this code ran before cannot be told now; try again"
            raise Refused(Refusal(UNRECORDED, message, in_band=True)) from None

    async def _kept(self, call: Call, journal: Journal) -> None:
        if not call.task:
            return
        try:
            await self._journals.write(call, journal)
        except WeftError as error:
            log.error("what code of task %s did so far is not kept: %s", call.task, error)
            message = "a call needs an approval, and what was called before cannot be recorded now; try again"
            raise Refused(Refusal(UNRECORDED, message, in_band=True)) from None


async def _entered(stack: AsyncExitStack, session: monty.AsyncMontySession) -> None:
    """Get a process for a session. Raises ToolError if none can be started."""
    import pydantic_monty as monty

    try:
        await stack.enter_async_context(session)
        await session.feed_run(PRELUDE)
    except (RuntimeError, monty.MontyCrashedError) as error:
        raise ToolError(f"no process to run code in can be started: {error}", code=UPSTREAM_FAILED) from None


def _limits(rules: CodeRules) -> monty.ResourceLimits:
    return {
        "max_feed_duration_secs": rules.seconds,
        "max_memory": rules.memory,
        "max_recursion_depth": rules.recursion,
        "max_suspensions": (rules.calls + 10) * SUSPENSIONS,
    }


def _wrong_inputs(inputs: Mapping[str, Any]) -> str:
    """What is wrong with the variables; empty if nothing is."""
    for name in inputs:
        if not _IDENTIFIER.match(name) or name in RESERVED:
            return f"inputs: {name[:80]!r} cannot be a variable"
    return ""


async def _listed(call: Call, within: Within) -> dict[str, Any]:
    """What the code could call."""
    wanted = call.arguments.get("server")
    parts = []
    for server in within.servers():
        if wanted not in (None, server):
            continue
        try:
            parts.append(names.described(server, await within.offered(server)))
        except ToolError as error:
            parts.append(f"# {server} cannot be used now: {error}")
    text = "\n".join(one for one in parts if one) or "there are none"
    return {"resultType": "complete", "content": [{"type": "text", "text": text}]}
