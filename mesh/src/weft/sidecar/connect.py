"""Opens links to servers: processes in a sandbox, and addresses through a client that goes only where it may.

Both get their secrets here, and take them out of whatever the server says.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence

from weft.core.broker import Broker
from weft.core.toolsconf import ToolServer
from weft.policy.egress import Refused
from weft.sidecar.code.journal import Journals
from weft.sidecar.code.link import CodeLink
from weft.sidecar.egress import Clients
from weft.sidecar.guards import guards_of
from weft.sidecar.http import HttpLink
from weft.sidecar.link import Heard, Link
from weft.sidecar.sandbox import NONE, jailed
from weft.sidecar.secrets import Scrubber, resolve
from weft.sidecar.settings import Limits, limits_of
from weft.sidecar.stdio import ProcessCommand, StdioLink
from weft_protocols.errors import ToolError
from weft_protocols.mcp import UPSTREAM_FAILED


class Connector:
    """Opens links.

    Args:
        clients: for servers at addresses.
        broker: a connection of account MESH, for what built-in servers keep.
        private: files and folders no process may read: the mesh's own.
    """

    def __init__(self, clients: Clients, broker: Broker, *, private: Sequence[str] = ()) -> None:
        self._clients = clients
        self._broker = broker
        self._private = tuple(private)

    async def __call__(self, server: ToolServer, on_event: Heard) -> Link:
        """A link to a server. Raises LinkEnded, or ToolError that says what is missing or not allowed."""
        guards = guards_of(server.settings, f"settings of {server.name}")
        if server.builtin:
            limits = limits_of(server.settings, f"settings of {server.name}")
            return await CodeLink.start(limits, Journals(self._broker), guards, private=self._private)
        more = 2 * max(0, limits_of(server.settings).response_bytes - Limits().response_bytes)
        sent, values = await resolve(guards.secrets, server.name)
        if server.url:
            try:
                guards.egress.check_url(server.url)
            except Refused as error:
                raise ToolError(f"its address is not called: {error}", code=UPSTREAM_FAILED) from None
            headers = from_environment(server.headers_env, server.name)
            scrub = Scrubber([*values, *_parts(headers.values())])
            client = self._clients.of(guards.egress)
            sent = {**headers, **sent}
            return HttpLink(client, server.url, headers=sent, on_event=on_event, scrub=scrub, more=more)
        env = {**from_environment(server.env, server.name), **sent}
        run = await asyncio.to_thread(
            jailed, server.command, guards.sandbox, cwd=server.cwd or None, private=self._private
        )
        command = ProcessCommand(
            server.name, run.argv, env, server.cwd or None, more=more, jailed=run.level.name != NONE
        )
        return await StdioLink.start(command, on_event, scrub=Scrubber(values))


def from_environment(names: Mapping[str, str], server: str) -> dict[str, str]:
    """The values of variables. Raises ToolError naming those that are not set, never a value."""
    missing = sorted({variable for variable in names.values() if variable not in os.environ})
    if missing:
        raise ToolError(
            f"tool server {server} needs {', '.join(missing)}, which the sidecar's environment does not have",
            code=UPSTREAM_FAILED,
        )
    return {name: os.environ[variable] for name, variable in names.items()}


def _parts(values: Iterable[str]) -> Iterable[str]:
    """Values of headers, and what is after a scheme such as `Bearer`."""
    for value in values:
        yield value
        if " " in value:
            yield value.rpartition(" ")[2]
