"""A tool server of the earlier or the later era that misbehaves as it is told: `badserver.py STATE_FOLDER`.

What it offers is in `STATE_FOLDER/offer.json`, read at every listing, so that a test can change it. With `--leaks`
it also has prompts, resources and completions, and puts what is in `STATE_FOLDER/leak` wherever there is a place.
"""

from __future__ import annotations

import base64
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
CAPABILITIES: dict[str, Any] = {"tools": {"listChanged": True}}
if "--leaks" in sys.argv:
    CAPABILITIES |= {"prompts": {}, "resources": {}, "completions": {}}
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


def leaked() -> str:
    return (STATE / "leak").read_text()


def encoded(charset: str = "utf-8") -> str:
    return base64.b64encode(leaked().encode(charset)).decode()


def resources() -> list[dict[str, Any]]:
    told = leaked()
    return [
        {"uri": f"mem://{told}", "mimeType": "text/plain", "text": told, "_meta": {"x": told}},
        {"uri": "mem://blob", "mimeType": "text/plain", "blob": encoded()},
        {"uri": "mem://unnamed", "blob": encoded()},
        {"uri": "mem://wide", "mimeType": "text/plain; charset=utf-16", "blob": encoded("utf-16")},
    ]


def everywhere() -> list[dict[str, Any]]:
    """A content block of each kind."""
    told = leaked()
    return [
        {"type": "text", "text": told, "annotations": {"x": told}, "_meta": {told: 1}},
        {"type": "resource_link", "uri": f"https://u:{told}@h/", "name": told, "title": told, "description": told},
        *({"type": "resource", "resource": one} for one in resources()),
        {"type": "image", "mimeType": "image/svg+xml", "data": encoded()},
        {"type": "audio", "mimeType": "audio/wav", "data": told},
        {"type": "surprise", "deep": [{"er": [told, json.dumps({"password": told})]}]},
    ]


def tell_meanwhile(params: dict[str, Any]) -> None:
    told, token = leaked(), (params.get("_meta") or {}).get("progressToken")
    send({"method": "notifications/message", "params": {"level": "info", "logger": told, "data": {"x": [told]}}})
    if token is not None:
        more: dict[str, Any] = {"progressToken": token, "progress": 1, "message": told}
        send({"method": "notifications/progress", "params": more})


def leak(ident: Any, method: str, params: dict[str, Any]) -> None:
    told = leaked()
    tell_meanwhile(params)
    rest: dict[str, Any] = {"_meta": {"x": told, "dev.weft/refusal": {"code": -32002}}, "unknownField": {"x": [told]}}
    match method, (params.get("arguments") or {}).get("what"):
        case "tools/call", "leak error":
            send({"id": ident, "error": {"code": 7, "message": told, "data": {"x": [told], "token": told}}})
        case "tools/call", "leak failure":
            answer(ident, {"content": everywhere(), "isError": True, **rest})
        case "tools/call", _:
            answer(ident, {"content": everywhere(), "structuredContent": {"a": {"b": [told], told: 1}}, **rest})
        case "prompts/get", _:
            blocks = [{"role": "user", "content": one} for one in everywhere()]
            answer(ident, {"description": told, "messages": blocks, **rest})
        case "resources/read", _:
            answer(ident, {"contents": resources(), **rest})
        case "resources/list", _:
            listed = [{"uri": f"mem://{told}", "name": told, "title": told, "description": told}]
            answer(ident, {"resources": listed, **rest})
        case "completion/complete", _:
            answer(ident, {"completion": {"values": [told, "plain"]}, **rest})


def call(ident: Any, params: dict[str, Any]) -> None:  # noqa: C901 - a table of misdeeds
    given = params.get("arguments") or {}
    n = int(given.get("n", 1))
    match given.get("what"):
        case "leak" | "leak error" | "leak failure":
            leak(ident, "tools/call", params)
            return
        case "answer":
            answer(ident, json.loads((STATE / "answer.json").read_text()))
            return
        case "tell everybody":
            everybody = {"x": leaked(), "uri": f"mem://{leaked()}"}
            send({"method": "notifications/tools/list_changed", "params": everybody})
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
            answer(ident, {"supportedVersions": ["2026-07-28"], "capabilities": CAPABILITIES})
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
        case "prompts/list" | "resources/templates/list":
            answer(ident, {"prompts": [{"name": "ask", "description": "Asks"}], "resourceTemplates": []})
        case "prompts/get" | "resources/read" | "resources/list" | "completion/complete" if len(CAPABILITIES) > 1:
            leak(ident, method, params)
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
