"""Tool servers as `mesh.yaml` declares them and as they are stored: how each is reached, and nothing secret."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weft.core.yamlfields import YamlReader, boolean, integer, is_null
from weft_protocols.errors import InvalidConfig, InvalidName
from weft_protocols.mcp import check_server
from weft_protocols.subjects import check_name

if TYPE_CHECKING:
    import yaml

ERAS: Final = ("auto", "modern", "legacy")
"""Which MCP a server speaks: found out, 2026-07-28, or the revisions with a handshake before it."""
TRUST: Final = ("first-use", "approve")
"""When definitions are approved: those seen first by themselves, or none without `mesh tools approve`."""
INSTALL: Final = "pip install 'weft[sidecar]'"
"""What installs what a sidecar needs."""
BUILTINS: Final = {"code": "pydantic_monty"}
"""Servers that are part of the sidecar, and the module each needs."""
CODE_INSTALL: Final = "pip install 'weft[code]'"
"""What installs what the built-in server `code` needs."""
_MODULES: Final = ("aiohttp", "cedarpy", "jsonschema", "mcp", "starlette", "uvicorn")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_HEADER: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")
_URL: Final = re.compile(r"https?://[^\s/@]+(/\S*)?\Z")
_FIELDS: Final = (
    "command", "args", "env", "cwd", "url", "builtin", "headers_env", "era", "enabled", "trust", "settings",
)  # fmt: skip
GUARDS: Final = (
    "secrets", "egress", "sandbox", "lock", "side_effects", "rate", "redact", "records", "code",
)  # fmt: skip
"""Settings that may stand beside the others of a server."""


@dataclass(frozen=True, slots=True)
class ToolServer:
    """One registered tool server."""

    name: str
    command: tuple[str, ...] = ()
    """Program and arguments of a server that speaks over its standard input and output; empty for one at `url`."""
    url: str = ""
    """Address of a server that speaks streamable HTTP."""
    builtin: str = ""
    """One of `BUILTINS`, which the sidecar itself is."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables the process gets, each from a variable of the sidecar, which this names; values never stand here."""
    headers_env: Mapping[str, str] = field(default_factory=dict)
    """Headers of requests to `url`, each from a variable of the sidecar."""
    cwd: str = ""
    """Folder the process runs in; the sidecar's if empty."""
    era: str = "auto"
    enabled: bool = True
    trust: str = "first-use"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Limits and what else is enforced for this server, any JSON values; `weft.sidecar.settings` reads them."""
    source: str = "command"
    """`mesh.yaml` where that file declares it, and takes it away again; else `command`."""

    @property
    def transport(self) -> str:
        """`stdio`, `http` or `builtin`."""
        if self.builtin:
            return "builtin"
        return "http" if self.url else "stdio"

    @property
    def where(self) -> str:
        """How it is reached, for people."""
        return self.url or " ".join(self.command) or f"builtin {self.builtin}"

    def encode(self) -> bytes:
        """As it is stored."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> ToolServer:
        """As it was stored. Fields of later versions are ignored; InvalidConfig if it is none at all."""
        try:
            raw = json.loads(data)
            known = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
            return checked(cls(**{**known, "command": tuple(known.get("command", ()))}))
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidConfig(f"a stored tool server cannot be read: {error}") from None


def checked(server: ToolServer) -> ToolServer:
    """`server` if it can be used. Raises InvalidConfig with everything that is wrong, InvalidName for its name."""
    check_server(server.name)
    found = []
    if sum(map(bool, (server.command, server.url, server.builtin))) != 1:
        found.append("it has either a command or a url, or is a builtin")
    found += _builtin_mistakes(server)
    if server.url and not _URL.match(server.url):
        found.append(f"{server.url!r} is no http or https address (and credentials never stand in it)")
    for name, variable in (*server.env.items(), *server.headers_env.items()):
        if not _VARIABLE.match(str(variable)):
            # Never the text: it may be the secret itself.
            found.append(f"{name} must name an environment variable; the value never stands here")
    found += [f"{name!r} cannot be a variable" for name in server.env if not _VARIABLE.match(name)]
    found += [f"{name!r} cannot be a header" for name in server.headers_env if not _HEADER.match(name)]
    if server.era not in ERAS:
        found.append(f"era {server.era!r} is unknown; use one of {', '.join(ERAS)}")
    if server.trust not in TRUST:
        found.append(f"trust {server.trust!r} is unknown; use one of {', '.join(TRUST)}")
    if found:
        raise InvalidConfig(f"tool server {server.name}: {'; '.join(found)}")
    return server


def _builtin_mistakes(server: ToolServer) -> list[str]:
    if not server.builtin:
        return ["settings.code is for the builtin code"] if "code" in server.settings else []
    found = []
    if server.builtin not in BUILTINS:
        found.append(f"there is no builtin {server.builtin!r}; there are: {', '.join(BUILTINS)}")
    found += [f"a builtin has no {name}" for name in ("secrets", "egress") if name in server.settings]
    box = server.settings.get("sandbox")
    reach = [name for name in ("read", "write", "network") if isinstance(box, Mapping) and name in box]
    found += [f"a builtin's sandbox has no {name}: it reaches neither files nor the network" for name in reach]
    found += [f"a builtin has no {name}" for name in ("env", "headers_env", "cwd") if getattr(server, name)]
    return found


def builtin_fault(name: str) -> str:
    """Why a built-in server cannot be used here; empty if it can."""
    module = BUILTINS.get(name)
    if module is None or find_spec(module) is not None:
        return ""
    return f"the builtin {name} needs {module}, which is not installed: {CODE_INSTALL}"


def missing_modules() -> tuple[str, ...]:
    """What a sidecar needs and is not installed."""
    return tuple(name for name in _MODULES if find_spec(name) is None)


@dataclass(frozen=True, slots=True)
class SidecarConfig:
    """The sidecar that `mesh up` starts."""

    port: int = 0
    """Port on 127.0.0.1 of the HTTP front; 0 for a free one, kept from then on."""
    anonymous: str | None = None
    """The caller that requests without a token are, from this machine; None refuses them."""
    presidio: str = ""
    """Presidio's own configuration, a YAML file, for what `redact` says of `presidio`; empty for its patterns alone."""


# mesh.yaml -----------------------------------------------------------------------------------------


def read_sidecar(reader: YamlReader, node: yaml.Node | None, *, folder: Path) -> SidecarConfig:
    """Section `sidecar` of `mesh.yaml`. Relative files are below `folder`."""
    if node is None:
        return SidecarConfig()
    fields = reader.mapping(node, "sidecar", ("port", "anonymous", "presidio"))
    presidio = reader.value(fields, "sidecar.presidio", "", str)
    return SidecarConfig(
        port=reader.value(fields, "sidecar.port", 0, integer(0, 65535)),
        anonymous=reader.value(fields, "sidecar.anonymous", None, check_name),
        presidio=str(folder / presidio) if presidio else "",
    )


def read_tools(reader: YamlReader, node: yaml.Node | None, *, folder: Path) -> dict[str, ToolServer]:
    """Section `tools` of `mesh.yaml`: servers by name. Relative folders are below `folder`."""
    made: dict[str, ToolServer] = {}
    for name, entry in reader.mapping(node, "tools", None).items() if node is not None else ():
        where = f"tools.{name}"
        fields = reader.mapping(entry, where, (*_FIELDS, *GUARDS))
        guards: dict[str, Any] = {key: _plain(reader, fields[key], f"{where}.{key}") for key in GUARDS if key in fields}
        server = ToolServer(
            name,
            command=_command(reader, fields, where),
            url=reader.value(fields, f"{where}.url", "", str),
            builtin=reader.value(fields, f"{where}.builtin", "", str),
            env=_variables(reader, fields.get("env"), f"{where}.env"),
            headers_env=_variables(reader, fields.get("headers_env"), f"{where}.headers_env"),
            cwd=str(folder / reader.value(fields, f"{where}.cwd", ".", str)),
            era=reader.value(fields, f"{where}.era", "auto", str),
            enabled=reader.value(fields, f"{where}.enabled", True, boolean),
            trust=reader.value(fields, f"{where}.trust", "first-use", str),
            settings={**_settings(reader, fields.get("settings"), f"{where}.settings"), **guards},
            source="mesh.yaml",
        )
        try:
            made[name] = checked(server if server.command else replace(server, cwd=""))
        except (InvalidConfig, InvalidName) as error:
            reader.mistake(entry, "tools", str(error))
    return made


def _command(reader: YamlReader, fields: Mapping[str, yaml.Node], where: str) -> tuple[str, ...]:
    import yaml

    node = fields.get("command")
    words: list[str] = []
    if node is not None:
        listed = node.value if isinstance(node, yaml.SequenceNode) else [node]
        words += [text for one in listed if (text := reader.text(one, f"{where}.command")) is not None]
    for one in reader.sequence(fields.get("args"), f"{where}.args", "[--verbose]"):
        if (text := reader.text(one, f"{where}.args")) is not None:
            words.append(text)
    return tuple(words)


def _variables(reader: YamlReader, node: yaml.Node | None, where: str) -> dict[str, str]:
    """Names to variables; in a list each has the variable of its own name."""
    import yaml

    if node is None or is_null(node):
        return {}
    if isinstance(node, yaml.SequenceNode):
        names = [reader.text(one, where) for one in node.value]
        return {name: name for name in names if name is not None}
    entries = reader.mapping(node, where, None)
    return {name: text for name, one in entries.items() if (text := reader.text(one, f"{where}.{name}")) is not None}


def _settings(reader: YamlReader, node: yaml.Node | None, where: str) -> dict[str, Any]:
    import yaml

    if node is None or is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        reader.mistake(node, where, "must be a mapping")
        return {}
    return dict(_plain(reader, node, where) or {})


def _plain(reader: YamlReader, node: yaml.Node, where: str) -> Any:
    """Any value of JSON."""
    import yaml

    made = yaml.SafeLoader("").construct_document(node)
    try:
        json.dumps(made)
    except (TypeError, ValueError) as error:
        reader.mistake(node, where, f"must be values of JSON: {error}")
        return None
    return made
