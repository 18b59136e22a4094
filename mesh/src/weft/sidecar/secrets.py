"""Secrets of tool servers: read where they are kept, given to the server, and taken out of whatever it says.

Nothing here returns, raises or logs a value except to the one who hands it to the server.
"""

from __future__ import annotations

import asyncio
import base64
import html
import json
import os
import re
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, quote_plus

from weft.policy.redaction import DEEPEST, MARK
from weft.sidecar.guards import SecretSource
from weft_protocols.errors import ToolError
from weft_protocols.mcp import UPSTREAM_FAILED

SHORTEST: Final = 6
"""Characters below which a text is not looked for: it would be found everywhere."""
COMMAND_WITHIN: Final = 15.0
"""Seconds a command has to print a secret."""
LARGEST: Final = 64 * 1024
REPLACED: Final = f"{MARK}secret]"
_ESCAPES: Final = re.compile("%[0-9A-F]{2}")
_COMMAND_ENV: Final = ("PATH", "HOME", "LANG", "USER", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "SSH_AUTH_SOCK")


async def resolve(sources: Mapping[str, SecretSource], server: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """What is sent by name, and the bare values. Raises ToolError that names what is missing, never a value."""
    sent: dict[str, str] = {}
    values: list[str] = []
    for name, source in sources.items():
        value = await _value(source, name, server)
        values.append(value)
        sent[name] = source.form.replace("{}", value)
    return sent, tuple(values)


async def _value(source: SecretSource, name: str, server: str) -> str:
    where = f"secret {name} of tool server {server}"
    if isinstance(source.at, tuple):
        value = await _printed(source.at, where)
    elif source.kind == "env":
        value = os.environ.get(source.at, "")
    else:
        value = await asyncio.to_thread(_read, source.at, where)
    value = value.strip("\r\n")
    if not value:
        raise ToolError(f"{where}: {source.where} is not set, or empty", code=UPSTREAM_FAILED)
    if any(c in value for c in "\r\n\0"):
        raise ToolError(f"{where}: {source.where} has more than one line", code=UPSTREAM_FAILED)
    return value


def _read(path: str, where: str) -> str:
    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            return file.read(LARGEST)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ToolError(f"{where}: {path} cannot be read: {reason}", code=UPSTREAM_FAILED) from None


async def _printed(command: tuple[str, ...], where: str) -> str:
    """What a command prints. What it says on standard error is left alone: it may have the secret in it."""
    env = {name: os.environ[name] for name in _COMMAND_ENV if name in os.environ}
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise ToolError(f"{where}: {command[0]} cannot be started: {error}", code=UPSTREAM_FAILED) from None
    assert process.stdout is not None  # noqa: S101 - it was asked for
    try:
        async with asyncio.timeout(COMMAND_WITHIN):
            data = await process.stdout.read(LARGEST)
            code = await process.wait()
    except TimeoutError:
        raise ToolError(
            f"{where}: {command[0]} printed nothing within {COMMAND_WITHIN:g} s", code=UPSTREAM_FAILED
        ) from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if code:
        raise ToolError(f"{where}: {command[0]} ended with {code}", code=UPSTREAM_FAILED)
    return data.decode(errors="replace")


class Scrubber:
    """Takes known secrets out of texts and JSON values, also where they are encoded: base64, hex, URL, JSON, HTML.

    Args:
        values: the secrets; those under `SHORTEST` characters are not looked for.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        forms = {form for value in values if len(value) >= SHORTEST for form in _forms(value)}
        self._forms = tuple(sorted(forms, key=len, reverse=True))

    def __bool__(self) -> bool:
        return bool(self._forms)

    def text(self, text: str) -> str:
        """`text` without them."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, REPLACED)
        return text

    def value(self, value: Any) -> Any:
        """A JSON value without them, keys included; the very same object if there are none to look for."""
        return self._value(value, 0) if self._forms else value

    def _value(self, value: Any, level: int) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return REPLACED if str(value) in self._forms else value
        if level >= DEEPEST:
            return f"{MARK}too-deep]" if isinstance(value, dict | list) else value
        if isinstance(value, dict):
            return {self.text(str(key)): self._value(one, level + 1) for key, one in value.items()}
        if isinstance(value, list):
            return [self._value(one, level + 1) for one in value]
        return value


def _forms(value: str) -> Iterable[str]:
    """How a secret may be written."""
    raw = value.encode()
    quoted = {quote(value, safe=""), quote(value), quote_plus(value)}
    small = {_ESCAPES.sub(lambda found: found[0].lower(), one) for one in quoted}
    within = {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], html.escape(value)}
    made = {value, *quoted, *small, *within, raw.hex(), raw.hex().upper()}
    for before in range(3):
        made |= _inside_base64(raw, before)
    return {form for form in made if len(form) >= SHORTEST}


def _inside_base64(raw: bytes, before: int) -> set[str]:
    """Its base64 where so many bytes stand before it: the characters that nothing around it changes."""
    encoded = base64.b64encode(b"\0" * before + raw).decode()
    whole = (before + len(raw)) % 3
    cut = encoded.rstrip("=")
    kept = cut[(0, 2, 3)[before] : len(cut) - (1 if whole else 0)]
    return {kept, kept.replace("+", "-").replace("/", "_")}
