"""How other commands speak to a running supervisor: one JSON line there, JSON lines back, over a Unix socket.

A request is `{"op": …, …arguments}`. The answer is any number of `{"progress": text}` and then one
`{"result": …}` or `{"error": {"type", "message"}}`. Who may open the socket may do everything: its
directory belongs to the user alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from weft.cli.errors import NotFound
from weft.cli.supervisor.state import running
from weft_protocols.errors import (
    DeadlineExceeded,
    InvalidConfig,
    InvalidName,
    Unavailable,
    UsageError,
    WeftError,
)

log = logging.getLogger("weft.supervisor")

LONGEST_REQUEST: Final = 64 * 1024
REQUEST_WITHIN: Final = 10.0
"""Seconds whoever connects has to say what it wants."""


ERRORS: Final[dict[str, type[WeftError]]] = {
    error.__name__: error for error in (UsageError, InvalidConfig, InvalidName, Unavailable, DeadlineExceeded, NotFound)
}
"""Errors that keep their type, and with it the exit code, on their way to the caller."""

Tell = Callable[[str], None]
"""Says a line of progress to whoever asked."""
Handler = Callable[[str, dict[str, Any], Tell], Awaitable[Any]]
"""Does an operation: name, arguments, progress in; a JSON value out."""


class ControlServer:
    """Serves the control socket until closed."""

    def __init__(self, path: Path, handler: Handler, *, group: asyncio.TaskGroup) -> None:
        self._path = path
        self._handler = handler
        self._group = group
        self._server: asyncio.Server | None = None
        self._silent: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen. What another supervisor left at this path is replaced."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._connected, str(self._path), limit=LONGEST_REQUEST)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Take no more connections."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
        self._path.unlink(missing_ok=True)

    def hang_up(self) -> None:
        """End the connections that have not asked for anything."""
        if self._server is not None:
            self._server.close()
        for writer in self._silent:
            writer.close()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._group.create_task(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and hang up."""
        self._silent.add(writer)

        def tell(text: str) -> None:
            _send(writer, {"progress": text})

        try:
            operation, arguments = await _request(reader)
            self._silent.discard(writer)
            _send(writer, {"result": await self._handler(operation, arguments, tell)})
            await writer.drain()
        except WeftError as error:
            _send(writer, {"error": {"type": type(error).__name__, "message": str(error)}})
        except ConnectionError:
            # Whoever asked does not wait for the answer; the operation is done all the same.
            pass
        except Exception as error:
            # One operation that fails for a reason nobody foresaw must not end the mesh.
            log.exception("an operation of the control socket failed")
            _send(writer, {"error": {"type": "WeftError", "message": f"{type(error).__name__}: {error}"}})
        finally:
            self._silent.discard(writer)
            writer.close()


async def _request(reader: asyncio.StreamReader) -> tuple[str, dict[str, Any]]:
    """The operation asked for and its arguments; UsageError if there is none in the first line."""
    try:
        async with asyncio.timeout(REQUEST_WITHIN):
            request = json.loads(await reader.readline())
        return str(request.pop("op")), request
    except (ValueError, KeyError, AttributeError, TypeError, TimeoutError):
        raise UsageError("not a request this supervisor knows") from None


def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


def call(home: Path, operation: str, *, tell: Tell | None = None, timeout: float = 10.0, **arguments: Any) -> Any:
    """Ask the supervisor of `home` and return its result. `timeout` is the longest silence in seconds.

    Raises:
        Unavailable: no supervisor runs there, or it ended meanwhile.
        DeadlineExceeded: it does not answer.
        WeftError: it refused; the message says why.
    """
    record = running(home)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(record.socket)
            connection.sendall(json.dumps({"op": operation, **arguments}).encode() + b"\n")
            for line in connection.makefile("rb"):
                answer = json.loads(line)
                if "error" in answer:
                    raise ERRORS.get(answer["error"]["type"], WeftError)(answer["error"]["message"])
                if "result" in answer:
                    return answer["result"]
                if tell is not None:
                    tell(str(answer.get("progress", "")))
        except TimeoutError:
            raise DeadlineExceeded(
                f"the supervisor (pid {record.pid}) is silent for {timeout:g} s; see `mesh logs supervisor`"
            ) from None
        except OSError as error:
            raise Unavailable(f"the supervisor (pid {record.pid}) cannot be reached: {error}") from None
    raise Unavailable("the supervisor ended before it answered")
