"""A backend at the other end of the broker: what `mesh mcp` is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.client.tools import ToolClient, ToolRequest
from weft.sidecar.backend import Request
from weft.sidecar.link import Heard
from weft.sidecar.session import OWN_META
from weft_protocols.errors import DeadlineExceeded, ToolError, WeftError
from weft_protocols.mcp import LATE, UPSTREAM_FAILED


class RemoteBackend:
    """Requests of a front, over MCP over NATS in the name of this connection's identity."""

    def __init__(self, client: ToolClient) -> None:
        self._client = client

    async def handle(self, request: Request, heard: Heard) -> dict[str, Any]:
        """See `Backend`."""
        params = request.params if request.modern else _enveloped(request.params)
        asked = ToolRequest(
            request.server, request.method, params, chain=",".join(request.chain), deadline=request.deadline,
            id=request.id,
        )  # fmt: skip
        try:
            return await self._client.request(asked, heard=heard)
        except ToolError:
            raise
        except DeadlineExceeded as error:
            raise ToolError(str(error), code=LATE) from None
        except WeftError as error:
            raise ToolError(str(error), code=UPSTREAM_FAILED) from None


def _enveloped(params: Mapping[str, Any]) -> dict[str, Any]:
    """Params of the earlier era as the bus has them: with no capabilities, since nothing can be asked of the caller."""
    meta = params.get("_meta")
    return {**params, "_meta": {**(meta if isinstance(meta, dict) else {}), **OWN_META}}
