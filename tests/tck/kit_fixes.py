"""A plugin for the conformance kit's pytest that makes its message ids unique.

The kit sends each of its messages under one id for a whole session. A message id is the unique identifier of a message
(A2A v1.0.1, 4.1.4), and to a mesh the same message sent again is the same task; so most tests would get the finished
task of an earlier one. Nothing else of the kit is changed.
"""

from __future__ import annotations

import itertools
from typing import Any

from tck.transport import grpc_client, http_json_client, jsonrpc_client  # type: ignore[import-not-found]

_numbers = itertools.count(1)


def _unique(client: type[Any], name: str) -> None:
    send = getattr(client, name)

    def sends(self: Any, message: dict[str, Any], **options: Any) -> Any:
        key = "messageId" if "messageId" in message else "message_id"
        if key in message:
            message = {**message, key: f"{message[key]}-{next(_numbers)}"}
        return send(self, message, **options)

    setattr(client, name, sends)


for _client in (grpc_client.GrpcClient, http_json_client.HttpJsonClient, jsonrpc_client.JsonRpcClient):
    for _name in ("send_message", "send_streaming_message"):
        _unique(_client, _name)
