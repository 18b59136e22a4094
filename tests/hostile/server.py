"""A tool server that does what a case says, and writes down what reaches it: `server.py STATE_FOLDER`.

`offer.json` has its tools, or `{"by": "process" | "listing", "of": [tools, …]}`. `answer.py` is Python that is run at
every call; it has `ident`, `params`, `n` (calls so far), `answer(result)` and `write(bytes)`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

STATE = Path(sys.argv[1])
LEGACY = "--legacy" in sys.argv
TOOL = {"name": "do", "description": "Does", "inputSchema": {"type": "object"}}
counts = {"calls": 0, "listings": 0}


def write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def send(**message: Any) -> None:
    write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")


def answer(ident: Any, **result: Any) -> None:
    envelope = {} if LEGACY else {"resultType": "complete", "ttlMs": 0, "cacheScope": "public"}
    send(id=ident, result={**envelope, **result})


def offer() -> Any:
    file = STATE / "offer.json"
    told = json.loads(file.read_text()) if file.exists() else [TOOL]
    if isinstance(told, list):
        return told
    started = len((STATE / "started").read_text().split())
    counts["listings"] += 1
    which = started if told["by"] == "process" else counts["listings"]
    return told["of"][min(which, len(told["of"])) - 1]


def call(ident: Any, params: dict[str, Any]) -> None:
    counts["calls"] += 1
    code = (STATE / "answer.py").read_text(encoding="utf-8")
    scope: dict[str, Any] = {
        "ident": ident, "params": params, "n": counts["calls"], "write": write, "send": send, "os": os, "json": json,
        "sys": sys, "answer": lambda **result: answer(ident, **result),
    }  # fmt: skip
    if code:
        exec(code, scope)
    else:
        answer(ident, content=[{"type": "text", "text": f"call {counts['calls']}"}])


(STATE / "started").open("a").write(f"{os.getpid()}\n")
for line in sys.stdin:
    with (STATE / "reached.jsonl").open("a") as file:
        file.write(line)
    message = json.loads(line)
    asked, method = message.get("id"), message.get("method")
    if asked is None or method is None:
        continue
    if method == "server/discover" and not LEGACY:
        identity = json.loads((STATE / "identity.json").read_text()) if (STATE / "identity.json").exists() else {}
        answer(
            asked, **{"supportedVersions": ["2026-07-28"], "capabilities": {"tools": {"listChanged": True}}, **identity}
        )
    elif method == "initialize":
        info = {"name": "evil", "version": "1"}
        answer(asked, protocolVersion="2025-11-25", capabilities={"tools": {}}, serverInfo=info)
    elif method == "tools/list":
        answer(asked, tools=offer())
    elif method == "tools/call":
        call(asked, message.get("params") or {})
    elif method == "subscriptions/listen" and not LEGACY:
        meta = {"io.modelcontextprotocol/subscriptionId": asked}
        send(method="notifications/subscriptions/acknowledged", params={"notifications": {}, "_meta": meta})
    else:
        send(id=asked, error={"code": -32601, "message": "Method not found"})
