"""What a handler uses of the tools: through the sidecar, in the agent's own name, as part of its task."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from weft.client.tools import ToolRequest
from weft.host import approving
from weft.host.locking import Lock
from weft.host.run import Run
from weft_protocols import headers as h
from weft_protocols import mcp
from weft_protocols.errors import InvalidName, ToolError

Progress = Callable[[float, float | None, str], None]
"""Gets how far a call is, of how much (None if that is not known), and what it says about it."""
PATIENCE: Final = 10.0
"""Seconds a call waits for a sidecar where none runs: one is being started or replaced."""
AGAIN_FOR: Final = 60.0
"""Seconds a call that is refused for now waits, all its waits together, before the refusal is its result."""
FOR_NOW: Final = (mcp.RATE_LIMITED, mcp.BUSY)
"""Refusals that say nothing but that it is too early."""
LONGEST_PAUSE: Final = 30.0
"""Seconds before a call is made again that needs an approval, where nobody could be asked for it."""
TOOL_KEY: Final = "_tool"
TRACE: Final = (h.TRACEPARENT, h.TRACESTATE)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool answered."""

    text: str
    """Its text, the parts joined by line breaks."""
    structured: Any
    """Its structured content, or None."""
    content: tuple[Mapping[str, Any], ...]
    """Its content blocks as MCP has them."""
    is_error: bool
    """Whether the tool, or the sidecar in its place, says that it failed."""
    refusal: Mapping[str, Any] | None = None
    """Why the sidecar did not make the call: `code`, `kind` and more; None if it did."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """The whole result."""

    @property
    def redacted(self) -> Mapping[str, int]:
        """What the sidecar took out of it, and how many of each kind; empty if nothing."""
        meta = self.raw.get("_meta")
        found = meta.get(mcp.META_REDACTED) if isinstance(meta, dict) else None
        return found if isinstance(found, dict) else {}

    @staticmethod
    def of(result: Mapping[str, Any]) -> ToolResult:
        """The result in a message."""
        found = result.get("content")
        content = tuple(one for one in found if isinstance(one, dict)) if isinstance(found, list) else ()
        texts = [str(one.get("text", "")) for one in content if one.get("type") == "text"]
        meta = result.get("_meta")
        refusal = meta.get(mcp.META_REFUSAL) if isinstance(meta, dict) else None
        return ToolResult(
            "\n".join(texts),
            result.get("structuredContent"),
            content,
            result.get("isError") is True,
            refusal if isinstance(refusal, dict) else None,
            dict(result),
        )


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool the task may call."""

    name: str
    """`server.tool`, as `call` takes it."""
    description: str
    input_schema: Mapping[str, Any]
    raw: Mapping[str, Any] = field(default_factory=dict)
    """The whole definition."""


@dataclass(frozen=True, slots=True)
class ToolAddress:
    """Where a framework of the task finds its tools: streamable HTTP on this machine."""

    url: str
    token: str
    """Bearer token of this task; it ends with the task."""
    expires: float
    """Unix seconds; ask again before."""

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {"Authorization": f"Bearer {self.token}"}


class Tools:
    """The tools of one task. A call within a step is part of that step: recorded with it, made again with it."""

    def __init__(self, run: Run) -> None:
        self._run = run

    async def call(
        self,
        tool: str,
        /,
        *,
        fence: Lock | None = None,
        timeout: float | None = None,
        progress: Progress | None = None,
        **arguments: Any,
    ) -> ToolResult:
        """Call `server.tool` with these arguments.

        A tool that fails, and a call that the sidecar refuses for a reason an agent can act on, is a result with
        `is_error`. Where persons have to approve the call first, it waits for them, holding nothing, and is made once
        they have; if they do not, that is such a refusal as well. The time they take does not count as `timeout`.

        A call that comes too early, over a rate limit or while the server has no place for it, is made again when the
        sidecar says, holding no slot meanwhile, if that is within `timeout`, the task's deadline and a minute in all;
        else it is such a refusal, with `retryAfter` (seconds).

        Args:
            tool: `server.tool`.
            fence: the lock that protects what the tool changes; the sidecar refuses the call if it is not held.
            timeout: seconds; the task's own deadline if that is sooner.
            progress: told how far it is, where the tool says so.

        Raises:
            ToolError: there is no such server or tool, or it is in quarantine, or the server broke down, or an
                earlier attempt of the task made this call and its outcome is not known (`unknown_outcome`).
            LockLost: the lock is not held any more.
            DeadlineExceeded: it took too long.
            Unavailable: no sidecar runs.
        """
        server, name = split(tool)
        params: dict[str, Any] = {"name": name, "arguments": arguments}
        meta: dict[str, Any] = {mcp.META_STEP: self._run.journal.own_key(f"{TOOL_KEY} {tool}")}
        if progress is not None:
            meta["progressToken"] = "call"
        waited, patience = "", _Patience(timeout)
        while True:
            if fence is not None:
                token = fence.token  # it may be lost while an approval is waited for
                meta[mcp.META_FENCE] = [{"name": one, "token": token} for one in fence.names]
            asked = {**params, "_meta": meta}
            told = await self._ask(server, "tools/call", asked, timeout=patience.left, progress=progress)
            result = ToolResult.of(told)
            pause = patience.pause(result, self._run.work.deadline)
            if pause is not None:
                await self._pause(pause)
                continue
            refused = result.refusal or {}
            waiting = await self._held_up(refused, waited) if refused.get("code") == mcp.PENDING else None
            if waiting is None:
                return result
            waited, patience = waiting, _Patience(timeout)

    async def list(self) -> tuple[Tool, ...]:
        """The tools the task may call, of all servers."""
        told = await self._ask(mcp.EVERY, "tools/list", {})
        found = told.get("tools")
        return tuple(_tool(one) for one in found if isinstance(one, dict)) if isinstance(found, list) else ()

    async def read(self, uri: str, *, timeout: float | None = None) -> bytes | str:
        """A resource: text, or bytes if it is binary. `uri` is `server+uri`, as results and lists have it.

        Raises what `call` raises.
        """
        server, own = mcp.split_uri(uri)
        waited = ""
        while True:
            try:
                return contents(await self._ask(server, "resources/read", {"uri": own}, timeout=timeout))
            except ToolError as error:
                refused = error.data if error.code == mcp.PENDING and isinstance(error.data, dict) else None
                waiting = await self._held_up(refused, waited) if refused is not None else None
                if waiting is None:
                    raise
                waited = waiting

    async def address(self) -> ToolAddress:
        """An address with a token of this task, for frameworks that speak MCP themselves. Raises what `call` raises."""
        told = await self._ask(mcp.EVERY, mcp.ISSUE_TOKEN, {"task": self._run.task_id})
        self._run.tokens.append(str(told["id"]))
        return ToolAddress(str(told["url"]), str(told["token"]), float(told["expires"]))

    async def _pause(self, seconds: float) -> None:
        run = self._run
        with run.waits.working():  # so soon it is not worth to leave memory
            async with run.slot.waiting():
                await asyncio.sleep(seconds)

    async def _held_up(self, refused: Mapping[str, Any], waited: str) -> str | None:
        """Wait for what a refused call waits for, holding no slot; the id of its approval, empty where it has none yet.

        None if there is nothing to wait for, or it was waited for already.
        """
        approval, again = refused.get("approval"), refused.get("retryAfter")
        if isinstance(approval, str) and approval != waited:
            await approving.awaited(self._run, approval)
            return approval
        if approval is None and isinstance(again, int | float):  # nobody could be asked
            async with self._run.slot.waiting():
                await asyncio.sleep(min(max(float(again), 0.1), LONGEST_PAUSE))
            return waited
        return None

    async def _ask(
        self,
        server: str,
        method: str,
        params: Mapping[str, Any],
        *,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        run = self._run
        own = run.work.headers
        before, this = own.get("weft-chain", ""), f"{run.work.agent}/{run.task_id}"
        limits = [run.work.deadline, None if timeout is None else time.time() + timeout]
        request = ToolRequest(
            server,
            method,
            params,
            chain=f"{before},{this}" if before else this,
            deadline=min((one for one in limits if one is not None), default=None),
            trace={name: own[name] for name in TRACE if own.get(name)},
            agent_version=run.agent.version,
            skill=run.skill,
            sender=run.work.caller,
        )

        def heard(name: str, told: dict[str, Any]) -> None:
            done = _number(told.get("progress"))
            if name == "notifications/progress" and progress is not None and done is not None:
                progress(done, _number(told.get("total")), str(told.get("message", "")))

        with run.waits.working():
            result = await run.mesh.tools.request(request, heard=heard, patience=PATIENCE)
        run.last_progress = time.time()
        return result


def _number(value: Any) -> float | None:
    """A number as servers tell them; None for whatever else they may say."""
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


class _Patience:
    """How long a call that is refused for now is tried.

    Args:
        timeout: seconds of the call, with all its waits; None for no limit of its own.
    """

    def __init__(self, timeout: float | None) -> None:
        self._until = None if timeout is None else time.time() + timeout
        self._most = AGAIN_FOR

    @property
    def left(self) -> float | None:
        """Seconds of the timeout."""
        return None if self._until is None else self._until - time.time()

    def pause(self, result: ToolResult, deadline: float | None) -> float | None:
        """Seconds after which it is made again; None if it is not, or if there was another outcome."""
        refusal = result.refusal
        if refusal is None or refusal.get("code") not in FOR_NOW:
            return None
        after = refusal.get("retryAfter")
        if isinstance(after, bool) or not isinstance(after, int | float) or not after > 0:
            return None
        pause = float(after) + random.uniform(0.0, 0.1)  # those that were refused together do not come back together
        ends = [one for one in (self._until, deadline) if one is not None]
        if pause > self._most or time.time() + pause >= min(ends, default=math.inf):
            return None
        self._most -= pause
        return pause


def split(tool: str) -> tuple[str, str]:
    """Server and name of `server.tool`. Raises InvalidName if there is no server in it."""
    server, dot, name = tool.partition(".")
    if not dot or not name:
        raise InvalidName(f"{tool!r} names no tool: write server.tool")
    return mcp.check_server(server), name


def contents(result: Mapping[str, Any]) -> bytes | str:
    """The content of a resource that was read."""
    found = result.get("contents")
    parts = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    if len(parts) == 1 and isinstance(parts[0].get("blob"), str):
        try:
            return base64.b64decode(parts[0]["blob"], validate=True)
        except binascii.Error:
            return str(parts[0]["blob"])
    return "\n".join(str(one["text"]) for one in parts if "text" in one)


def _tool(raw: Mapping[str, Any]) -> Tool:
    server, _, name = str(raw.get("name", "")).partition(mcp.SEPARATOR)
    schema = raw.get("inputSchema")
    described = str(raw.get("description") or "")
    return Tool(f"{server}.{name}", described, schema if isinstance(schema, dict) else {}, dict(raw))
