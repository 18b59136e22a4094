"""A tool server of the earlier or the later era that misbehaves as it is told: `badserver.py STATE_FOLDER`.

What it offers is in `STATE_FOLDER/offer.json`, read at every listing, so that a test can change it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STATE = Path(sys.argv[1])
MODERN = "--legacy" not in sys.argv
META = "io.modelcontextprotocol/"
DEFAULT: dict[str, Any] = {
    "tools": [
        {
            "name": "do",
            "description": "Does as it is told",
            "inputSchema": {
                "type": "object",
                "properties": {"what": {"type": "string"}, "n": {"type": "integer"}},
                "required": ["what"],
                "additionalProperties": False,
            },
        }
    ]
}


def offer() -> dict[str, Any]:
    file = STATE / "offer.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else DEFAULT
    return found


def send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def answer(ident: Any, result: dict[str, Any]) -> None:
    envelope = {"resultType": "complete", "ttlMs": 0, "cacheScope": "public"} if MODERN else {}
    send({"id": ident, "result": {**envelope, **result}})


def said(words: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": words}]}


def call(ident: Any, params: dict[str, Any]) -> None:  # noqa: C901 - a table of misdeeds
    given = params.get("arguments") or {}
    n = int(given.get("n", 1))
    match given.get("what"):
        case "exit":
            os._exit(n)
        case "hang":
            time.sleep(3600)
        case "silence":
            return
        case "wait":
            (STATE / "waiting").touch()
            while not (STATE / "go").exists():
                time.sleep(0.02)
        case "garbage":
            sys.stdout.write("this is no message\n" * n + '{"half": \n[1, 2]\n')
            sys.stdout.flush()
        case "flood":
            for _ in range(n):
                sys.stderr.write("x" * 1000 + "\n")
            sys.stderr.flush()
        case "large":
            answer(ident, said("x" * n))
            return
        case "endless line":
            while True:
                sys.stdout.write("x" * 1_000_000)
        case "spawn":
            child = subprocess.Popen(["sleep", "3600"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            answer(ident, said(str(child.pid)))
            return
        case "progress":
            for i in range(n):
                token = params["_meta"]["progressToken"]
                told = {"progressToken": token, "progress": i + 1, "total": n, "message": f"step {i + 1}"}
                send({"method": "notifications/progress", "params": told})
        case "environment":
            answer(ident, said(json.dumps(sorted(os.environ))))
            return
        case "meta":
            answer(ident, {**said("here"), "structuredContent": params, "unknownField": {"kept": True}})
            return
        case "ask me":
            send({"id": "q1", "method": "sampling/createMessage", "params": {}})
        case "tools changed":
            send({"method": "notifications/tools/list_changed"})
    answer(ident, said(f"pid {os.getpid()}"))


def handle(message: dict[str, Any]) -> None:
    method, ident, params = message.get("method"), message.get("id"), message.get("params") or {}
    if method == "notifications/cancelled":
        (STATE / "cancelled").touch()
    if ident is None or method is None:
        return
    match method:
        case "server/discover" if MODERN:
            answer(ident, {"supportedVersions": ["2026-07-28"], "capabilities": {"tools": {"listChanged": True}}})
        case "initialize" if "--slow" in sys.argv:
            refused: dict[str, Any] = {"supported": ["2026-07-28"], "requested": "2025-11-25"}
            send({"id": ident, "error": {"code": -32022, "message": "this serves the later era", "data": refused}})
        case "initialize":
            info = {"name": "bad", "version": "1"}
            tools = {"tools": {"listChanged": True}}
            answer(ident, {"protocolVersion": "2025-11-25", "capabilities": tools, "serverInfo": info})
        case "ping":
            answer(ident, {})
        case "tools/list":
            (STATE / "listed").open("a").write("x")
            answer(ident, offer())
        case "tools/call":
            call(ident, params)
        case "subscriptions/listen" if MODERN:
            meta = {f"{META}subscriptionId": ident}
            told = {"notifications": params["notifications"], "_meta": meta}
            send({"method": "notifications/subscriptions/acknowledged", "params": told})
        case _:
            send({"id": ident, "error": {"code": -32601, "message": "Method not found"}})


(STATE / "started").open("a").write(f"{os.getpid()}\n")
if "--stubborn" in sys.argv:
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "--dies-of-discover" in sys.argv:
    MODERN = False
if "--slow" in sys.argv:
    time.sleep(0.6)
for line in sys.stdin:
    found = json.loads(line)
    if "--dies-of-discover" in sys.argv and found.get("method") == "server/discover":
        sys.exit(3)
    handle(found)
while "--stubborn" in sys.argv:
    time.sleep(1)
