"""One run of a piece of code in Monty: every name it does not have and every call of a tool is answered here.

The worker process has no files, network, environment or clock of its own; what it asks of the system is refused. Calls
are made one after another, so that a repeat meets them in the same order.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from weft.sidecar.code import names
from weft.sidecar.code.journal import Journal, entry
from weft.sidecar.code.values import as_json
from weft.sidecar.inside import Within
from weft.sidecar.pipeline import Outcome, Refusal
from weft_protocols.errors import ToolError
from weft_protocols.mcp import BROKEN_STREAM, CODES, LATE, PENDING, UPSTREAM_FAILED

if TYPE_CHECKING:
    import pydantic_monty as monty

    Answer = monty.ExternalSettledResult

PRELUDE: Final = "ToolError = RuntimeError"
"""What the code finds; classes of its own cannot be errors."""
RESERVED: Final = ("tools", "call", "ToolError")
ARGUMENTS: Final = 1024 * 1024
"""Bytes of the arguments of one call."""
RECEIVED: Final = 32 * 1024 * 1024
"""Bytes that all calls of a run may give."""
SAID: Final = 2000
"""Characters of an error that the code gets."""
_UNSURE: Final = (UPSTREAM_FAILED, LATE, BROKEN_STREAM)
"""Errors after which nobody knows whether a call was made."""


class OverLimit(Exception):
    """The code did more than it may."""

    def __init__(self, limit: str, message: str) -> None:
        super().__init__(message)
        self.limit = limit
        """Which setting it is."""


class Suspended(Exception):
    """A call has to wait for an approval."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Tools:
    """How the code sees all tools; only its name is shown."""


class Server:
    """How the code sees a server."""


class Tool:
    """How the code sees a tool that it does not call at once."""


class Run:
    """One run.

    Args:
        within: the tools.
        journal: of the call; it answers the calls that an earlier run made, and gets all.
        step: names the call among those of its task.
        calls: how many of tools may be made.
    """

    def __init__(self, within: Within, journal: Journal, *, step: str, calls: int) -> None:
        self._within = within
        self._journal = journal
        self._replayed = list(journal.before)
        self._step = step
        self._calls = calls
        self._answered: dict[tuple[str, str], int] = {}
        self._offered: dict[str, list[str]] = {}
        self._seen: dict[Any, tuple[str, ...]] = {}
        """Server, or server and tool, by the id of the object that the code has in their place."""
        self._settled: dict[int, Answer] = {}
        self._source = b""

    async def drive(
        self, session: monty.AsyncMontySession, code: str, inputs: Mapping[str, Any], printed: monty.CollectString
    ) -> Any:
        """Run the code to its end, in a session that has run `PRELUDE`; the value of its last expression.

        Raises OverLimit, Suspended, and Monty's errors.
        """
        import pydantic_monty as monty

        self._source = code.encode(errors="replace")
        given = {**inputs, "tools": self._object(Tools(), ())}
        now = await session.feed_start(code, inputs=given, print_callback=printed)
        while not isinstance(now, monty.MontyComplete):
            if isinstance(now, monty.AsyncNameLookupSnapshot):
                now = await self._looked_up(now)
            elif isinstance(now, monty.AsyncFutureSnapshot):
                now = await now.resume({one: self._settled.pop(one) for one in now.pending_call_ids})
            elif now.is_os_function and now.function_name not in _SLEEPS:
                now = await now.resume_not_handled()
            else:
                now = await self._called(now)
        return now.output

    async def _looked_up(self, now: monty.AsyncNameLookupSnapshot) -> monty.AsyncSnapshot:
        name = now.variable_name
        if now.object_id is None:
            return await (now.resume(value=call) if name == "call" else now.resume())
        path = self._seen.get(now.object_id, ("", "", ""))
        if path == ():
            server = names.meant(name, self._within.servers())
            return await (now.resume(value=self._object(Server(), (server,))) if server else now.resume())
        if len(path) == 1:
            return await now.resume(value=self._object(Tool(), (*path, name)))
        return await now.resume()

    async def _called(self, now: monty.AsyncFunctionSnapshot) -> monty.AsyncSnapshot:
        answer = await self._answer(now)
        if not self._awaited(now):
            return await now.resume(answer)
        self._settled[now.call_id] = answer
        return await now.resume({"future": ...})

    def _awaited(self, now: monty.AsyncFunctionSnapshot) -> bool:
        """Whether the code wrote `await` before the call. Both forms are served."""
        if now.allow_eager_await:
            return True
        before = self._source[: now.position.start].rstrip()
        return now.position.filename != "<string>" and before.endswith(b"await")

    async def _answer(self, now: monty.AsyncFunctionSnapshot) -> Answer:
        name, args, kwargs = str(now.function_name), now.args, now.kwargs
        if now.is_os_function:
            return await _slept(args)
        path = self._seen.get(now.object_id) if now.object_id is not None else None
        if path is not None:
            wanted = path if name == "__call__" else (*path, name)
        elif now.object_id is None and name == "call" and args and isinstance(args[0], str):
            wanted, args = tuple(args[0].split(".", 1)), args[1:]
        elif now.object_id is None and name == "call":
            return _error("TypeError", 'call("server.tool", {arguments})')
        else:
            return _error("NameError", f"name {name!r} is not defined")
        if len(wanted) != 2 or not all(wanted):
            return _error("TypeError", "a tool is called as tools.server.tool(name=value)")
        try:
            arguments = as_json(_arguments(args, kwargs), ARGUMENTS, f"the arguments of {'.'.join(wanted)}")
        except ValueError as error:
            return _error("ValueError", str(error))
        except TypeError as error:
            return _error("TypeError", str(error))
        server, tool = wanted
        if path is not None:
            try:
                tool = await self._exact(server, tool)
            except ToolError as error:
                return _error("RuntimeError", f"{server}: {error}")
        return await self._made(server, tool, arguments)

    async def _exact(self, server: str, attribute: str) -> str:
        """The name of a tool that the code wrote as an attribute."""
        if "_" not in attribute:
            return attribute
        if server not in self._offered:
            self._offered[server] = [str(one.get("name")) for one in await self._within.offered(server)]
        return names.meant(attribute, self._offered[server]) or attribute

    # Calls -------------------------------------------------------------------------------------

    async def _made(self, server: str, tool: str, arguments: Mapping[str, Any]) -> Answer:
        """Call a tool, unless an earlier attempt did."""
        if self._journal.calls >= self._calls:
            raise OverLimit("calls", f"it made more than {self._calls} calls of tools")
        if self._journal.size > RECEIVED:
            raise OverLimit("calls", f"its calls gave more than {RECEIVED} bytes")
        if server not in self._within.servers():
            return _error("RuntimeError", f"there is no tool server {server!r} here; see the tool `tools`")
        wanted = entry(f"{server}.{tool}", arguments)
        told = self._replay(wanted)
        if told is None:
            same = (wanted["tool"], wanted["arguments"])
            step = f"{self._step} > {self._answered.get(same, 0)} {wanted['tool']} {wanted['arguments'][:16]}"
            outcome = await self._within.call(server, tool, arguments, step=step)
            if outcome.refused is not None and outcome.refused.code == PENDING:
                raise Suspended(outcome.refused)
            told = {**wanted, **_told(outcome)}
        self._journal.add(told)
        if told.get("answered"):
            same = (told["tool"], told["arguments"])
            self._answered[same] = self._answered.get(same, 0) + 1
        return _heard(f"{server}.{tool}", told)

    def _replay(self, wanted: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """What came of this call when the code ran before. Where it went another way since, nothing later counts."""
        if not self._replayed:
            return None
        told = self._replayed.pop(0)
        if told.get("tool") == wanted["tool"] and told.get("arguments") == wanted["arguments"]:
            return told
        self._replayed.clear()
        return None

    def _object(self, value: object, path: tuple[str, ...]) -> monty.ClassInstance:
        import pydantic_monty as monty

        made = monty.ClassInstance(value)
        self._seen[made.id] = path
        return made


def call(*_: Any, **__: Any) -> None:
    """What `call` is where the code hands it on; calls of it are answered by `Run`."""


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if len(args) > 1 or not all(isinstance(one, Mapping) for one in args):
        raise TypeError("arguments of a tool are given by name, or as one mapping")
    return {**(args[0] if args else {}), **kwargs}


_SLEEPS: Final = ("system.sleep", "system.async_sleep")


async def _slept(args: Sequence[Any]) -> Answer:
    """Wait; the time of the whole call bounds it."""
    seconds = args[0] if args else None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return _error("TypeError", "sleep takes a number of seconds")
    if not math.isfinite(seconds) or seconds < 0:
        return _error("ValueError", "sleep takes a number of seconds, not below 0")
    await asyncio.sleep(seconds)
    return {"return_value": None}


def _error(kind: Any, message: str) -> Answer:
    return {"exc_type": kind, "message": message[:SAID]}


def _told(outcome: Outcome) -> dict[str, Any]:
    """What is kept of an outcome."""
    if outcome.result is not None:
        return {"result": dict(outcome.result), "answered": True}
    error = outcome.error or ToolError("the call has no outcome")
    return {
        "error": {"code": error.code, "message": str(error)},
        "answered": outcome.refused is None and error.code not in _UNSURE,
    }


def _heard(tool: str, told: Mapping[str, Any]) -> Answer:
    """What the code gets of it."""
    error = told.get("error")
    if isinstance(error, Mapping):
        kind = CODES.get(int(error.get("code", 0)), ("failed", ""))[0]
        return _error("RuntimeError", f"{tool}: {kind}: {error.get('message')}")
    result = told["result"]
    if result.get("isError") is True:
        return _error("RuntimeError", f"{tool}: failed: {_text(result)}")
    return {"return_value": _value(result)}


def _value(result: Mapping[str, Any]) -> Any:
    """What a result is in Python: its structured content, else its text, else its content as it is."""
    if result.get("structuredContent") is not None:
        return result["structuredContent"]
    found = result.get("content")
    content = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return _text(result) if all(one.get("type") == "text" for one in content) else content


def _text(result: Mapping[str, Any]) -> str:
    found = result.get("content")
    content = found if isinstance(found, list) else []
    return "\n".join(str(one.get("text", "")) for one in content if isinstance(one, dict) and one.get("type") == "text")
