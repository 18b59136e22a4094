"""A tool server of the later era that runs the Python it is given: `runner.py STATE_FOLDER`.

Tool `run` answers with what the code puts into `result` or `error`; the other tools are `run` by other names.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

STATE = Path(sys.argv[1])
SCHEMA = {"type": "object", "properties": {"code": {"type": "string"}, "id": {"type": "string"}}}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "description": "Runs what it is given", "inputSchema": SCHEMA, **more}


TOOLS = [tool("run"), tool("effect"), tool("same", annotations={"idempotentHint": True}), tool("locked")]


def send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def answer(ident: Any, **result: Any) -> None:
    send({"id": ident, "result": {"resultType": "complete", "ttlMs": 0, "cacheScope": "public", **result}})


def note(text: str) -> int:
    """Write a line down; how many there are."""
    with (STATE / "notes").open("a") as file:
        file.write(text + "\n")
    return len((STATE / "notes").read_text().splitlines())


def call(ident: Any, params: dict[str, Any]) -> None:
    scope: dict[str, Any] = {"send": send, "note": note, "params": params, "result": None, "STATE": STATE}
    try:
        exec(params["arguments"].get("code", "result = note('called')"), scope)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except Exception as error:  # noqa: BLE001 - whatever the code did, the test wants to see it
        failed = {"content": [{"type": "text", "text": f"{type(error).__name__}: {error}"}], "isError": True}
        answer(ident, **failed)
        return
    if "error" in scope:
        send({"id": ident, "error": scope["error"]})
        return
    found = scope["result"]
    if isinstance(found, dict) and "content" in found:
        answer(ident, **found)
    else:
        answer(ident, content=[{"type": "text", "text": json.dumps(found, default=str)}])


(STATE / "started").open("a").write(f"{os.getpid()}\n")
for line in sys.stdin:
    message = json.loads(line)
    ident, params = message.get("id"), message.get("params") or {}
    if ident is None:
        continue
    match message["method"]:
        case "server/discover":
            answer(ident, supportedVersions=["2026-07-28"], capabilities={"tools": {}})
        case "tools/list":
            described = [{**one, "description": os.environ.get("TOLD", one["description"])} for one in TOOLS]
            answer(ident, tools=described)
        case "tools/call":
            call(ident, params)
        case _:
            send({"id": ident, "error": {"code": -32601, "message": "Method not found"}})
