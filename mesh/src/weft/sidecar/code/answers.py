"""What a caller is told of a run: its value and what it printed, or what went wrong, where, and which limit it was."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from weft.sidecar.guards import CodeRules

if TYPE_CHECKING:
    import pydantic_monty as monty

TRACEBACK: Final = 4000
"""Characters of a traceback, its end."""
SETTINGS: Final = {
    "seconds": "code.seconds",
    "memory": "code.memory",
    "recursion": "code.recursion",
    "calls": "code.calls",
    "output": "code.output",
    "timeout": "timeout",
}
"""Which setting of the server each limit is."""
_FILE: Final = re.compile(r'File "<python-input-\d+>"')
_BYTES: Final = re.compile(r"memory limit exceeded: \d+ bytes > (\d+) bytes")


def done(value: Any, printed: str) -> dict[str, Any]:
    """It ran to its end."""
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    texts = [printed, shown] if value is not None else [printed or shown]
    return _result(texts) | {"structuredContent": {"result": value}}


def over(limit: str, why: str, printed: str) -> dict[str, Any]:
    """It was ended because of a limit."""
    text = f"the code was ended: {why} (limit: {SETTINGS[limit]})"
    return _failed({"kind": "limit", "limit": SETTINGS[limit], "message": why}, text, printed)


def failed(kind: str, message: str, printed: str) -> dict[str, Any]:
    """It did not come to a result."""
    return _failed({"kind": kind, "message": message}, message, printed)


def of_monty(error: monty.MontyError, rules: CodeRules, printed: str) -> dict[str, Any]:
    """It raised an error, was ended, or its worker was."""
    import pydantic_monty as monty

    if isinstance(error, monty.MontyCrashedError):
        if error.timed_out:
            return over("seconds", f"it computed for more than {rules.seconds:g} s", printed)
        return failed("crash", "the process that ran the code ended; the code can be run again", printed)
    if isinstance(error, monty.MontyRuntimeError) and (limit := _limit(error, rules)):
        return over(limit, f"{_SAID[limit].format(rules)}", printed)
    if not isinstance(error, monty.MontyRuntimeError | monty.MontySyntaxError):
        return failed("inputs", f"{error}", printed)
    frames = error.traceback()
    text = _FILE.sub('File "code"', error.display("traceback"))[-TRACEBACK:]
    told = {
        "kind": "syntax" if isinstance(error, monty.MontySyntaxError) else "exception",
        "type": error.display("type-msg").partition(":")[0],
        "message": error.display("msg"),
        "line": frames[-1].line if frames else None,
    }
    return _failed(told, text, printed)


_SAID: Final = {
    "seconds": "it computed for more than {0.seconds:g} s",
    "memory": "it used more than {0.memory} bytes of memory",
    "recursion": "more than {0.recursion} functions called each other",
    "calls": "it asked for too many names and calls",
    "output": "it printed more than {0.output} bytes",
}


def _limit(error: monty.MontyRuntimeError, rules: CodeRules) -> str:
    """Which limit it is; empty where it is an error of the code."""
    said = error.display("type-msg")
    if said.startswith("TimeoutError: feed time limit exceeded"):
        return "seconds"
    if said.startswith("RecursionError: maximum recursion depth exceeded"):
        return "recursion"
    if said.startswith("RuntimeError: suspension limit"):
        return "calls"
    if said.startswith("MemoryError: the worker exceeded its memory limit"):
        return "memory"
    found = _BYTES.search(said) if said.startswith("MemoryError") else None
    if found is None:
        return ""
    return "output" if int(found[1]) == rules.output else "memory"


def _failed(error: dict[str, Any], text: str, printed: str) -> dict[str, Any]:
    kept = {key: value for key, value in error.items() if value is not None}
    return _result([printed, text]) | {"isError": True, "structuredContent": {"error": kept}}


def _result(texts: list[str]) -> dict[str, Any]:
    content = [{"type": "text", "text": one} for one in texts if one]
    return {"resultType": "complete", "content": content}
