"""A plugin for the conformance kit's pytest: its JSON-RPC client speaks NATS instead.

The kit runs in its own process and knows nothing of Weft: requests go as lines of JSON to `nats_side.py`, which
uses the SDK's client with our transport, and come back in the form of JSON-RPC, which the kit's checks understand.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import shlex
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from tck.transport import jsonrpc_client, manager  # type: ignore[import-not-found]

WITHIN = 40.0
"""Seconds an answer or the next event of a stream may take."""


class NatsClient(jsonrpc_client.JsonRpcClient):  # type: ignore[misc]
    """The kit's JSON-RPC client, its calls carried by NATS."""

    def __init__(self, base_url: str) -> None:
        super().__init__(base_url)
        self._count = itertools.count(1)
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._side = subprocess.Popen(
            shlex.split(os.environ["WEFT_TCK_SIDE"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def close(self) -> None:
        """End the process that speaks NATS."""
        assert self._side.stdin is not None
        self._side.stdin.close()
        self._side.wait(timeout=WITHIN)
        super().close()

    def _read(self) -> None:
        assert self._side.stdout is not None
        for line in self._side.stdout:
            told = json.loads(line)
            self._answers[told["id"]].put(told)

    def _ask(self, method: str, params: dict[str, Any]) -> queue.Queue[dict[str, Any]]:
        assert self._side.stdin is not None
        number = next(self._count)
        answers = self._answers[number] = queue.Queue()
        self._side.stdin.write(json.dumps({"id": number, "method": method, "params": params}) + "\n")
        return answers

    def _call(self, method: str, params: dict[str, Any]) -> Any:
        told = self._ask(method, params).get(timeout=WITHIN)
        return jsonrpc_client.JsonRpcResponse(
            transport=self.transport, success="error" not in told, raw_response={"jsonrpc": "2.0", **told}
        )

    def _call_streaming(self, method: str, params: dict[str, Any]) -> Any:
        answers = self._ask(method, params)
        first = answers.get(timeout=WITHIN)
        failed = "error" in first
        return jsonrpc_client.JsonRpcStreamingResponse(
            transport=self.transport,
            success=not failed,
            raw_response={"jsonrpc": "2.0", **first} if failed else None,
            events=iter([]) if failed else _events(first, answers),
        )


def _events(first: dict[str, Any], answers: queue.Queue[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    told = first
    while not told.get("end"):
        yield {"jsonrpc": "2.0", **told}
        told = answers.get(timeout=WITHIN)


jsonrpc_client.JsonRpcClient = NatsClient
manager._TRANSPORT_FACTORIES["jsonrpc"] = NatsClient
