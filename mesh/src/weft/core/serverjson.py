"""A tool server out of a `server.json`, the format of the MCP registry: its packages and its remotes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from weft.core.toolsconf import ToolServer, checked
from weft_protocols.errors import InvalidConfig

RUNNERS: Final = {"npm": "npx", "pypi": "uvx", "oci": "docker"}
"""What starts a package of each registry, unless `runtimeHint` says otherwise."""
_LARGEST: Final = 1024 * 1024


def read_server_json(path: Path, name: str = "") -> ToolServer:
    """The server that a file describes: its first remote over streamable HTTP, else its first package over stdio.

    Args:
        path: of the file.
        name: what to call it; the last part of its own name if empty.

    Raises InvalidConfig saying what is missing or cannot be used.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise InvalidConfig(f"{path} has more than {_LARGEST} bytes; a server.json is small")
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise InvalidConfig(f"{path} is not JSON: {error}") from None
    raw = raw.get("server", raw) if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        raise InvalidConfig(f"{path} is no server.json: it has no `name`")
    own = name or re.sub(r"[^A-Za-z0-9-]+", "-", raw["name"].rpartition("/")[2]).strip("-")[:32]
    remotes = [one for one in _mappings(raw.get("remotes")) if one.get("type") == "streamable-http"]
    packages = [one for one in _mappings(raw.get("packages")) if _transport(one) == "stdio"]
    if remotes:
        return checked(_remote(own, remotes[0]))
    if packages:
        return checked(_package(own, packages[0], path))
    raise InvalidConfig(f"{path} has neither a streamable-http remote nor a stdio package")


def _remote(name: str, remote: Mapping[str, Any]) -> ToolServer:
    headers = {str(one["name"]): _variable(str(one["name"])) for one in _named(remote.get("headers"))}
    return ToolServer(name, url=str(remote.get("url", "")), headers_env=headers)


def _package(name: str, package: Mapping[str, Any], path: Path) -> ToolServer:
    registry = str(package.get("registryType", ""))
    runner = str(package.get("runtimeHint") or RUNNERS.get(registry, ""))
    identifier, version = str(package.get("identifier", "")), str(package.get("version", ""))
    if not runner or not identifier:
        raise InvalidConfig(f"{path}: packages[0] names no package that can be run here (registryType {registry!r})")
    env = {str(one["name"]): str(one["name"]) for one in _named(package.get("environmentVariables"))}
    runtime = _arguments(package.get("runtimeArguments"))
    words = [runner]
    if runner == "npx":
        words += [*runtime, "-y", f"{identifier}@{version}" if version else identifier]
    elif runner == "docker":
        passed = [word for variable in env for word in ("-e", variable)]
        words += ["run", "-i", "--rm", *passed, *runtime, f"{identifier}:{version}" if version else identifier]
    else:
        words += [*runtime, f"{identifier}=={version}" if version and runner == "uvx" else identifier]
    return ToolServer(name, command=(*words, *_arguments(package.get("packageArguments"))), env=env)


def _arguments(found: Any) -> list[str]:
    """Arguments that have a value; those that somebody would have to fill in are left out."""
    words: list[str] = []
    for one in _mappings(found):
        value = one.get("value", one.get("default"))
        if one.get("type") == "named" and isinstance(one.get("name"), str):
            words += [one["name"], *([str(value)] if value is not None else [])]
        elif value is not None:
            words.append(str(value))
    return words


def _transport(package: Mapping[str, Any]) -> str:
    transport = package.get("transport")
    return str(transport.get("type", "stdio")) if isinstance(transport, dict) else "stdio"


def _mappings(found: Any) -> list[dict[str, Any]]:
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _named(found: Any) -> list[dict[str, Any]]:
    return [one for one in _mappings(found) if isinstance(one.get("name"), str)]


def _variable(header: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", header).strip("_").upper()
