"""The embedded server's configuration as text: pure, so that it can be read and tested."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weft.core.home import Accounts
from weft_protocols import accounts as policy
from weft_protocols.accounts import MESH, SYSTEM, Export, Import
from weft_protocols.resources import DURABILITY

MAX_PAYLOAD: Final = "1MB"
MAX_CONNECTIONS: Final = 4096
MAX_MEMORY_STORE: Final = 256 * 1024**2
MAX_FILE_STORE: Final = 10 * 1024**3
ACCOUNT_CONNECTIONS: Final = 1024
"""Connections of one agent's or caller's account: all its processes together."""
MAX_SUBSCRIPTIONS: Final = 16_384
"""Subscriptions of one connection; the server enforces no limit per account in a static configuration."""
LOG_BYTES: Final = 16 * 1024**2


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the configuration text depends on besides the accounts."""

    store: Path
    """Directory of JetStream's files."""
    log: Path
    durability: str = "laptop"
    port: int = -1
    """-1 lets the system choose."""
    max_file_store: int = MAX_FILE_STORE
    """Bytes JetStream may use on disk."""


def quote(text: str) -> str:
    """`text` as a string of the server's configuration language, whatever it contains."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    for character, escape in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        escaped = escaped.replace(character, escape)
    return f'"{escaped}"'


def render(accounts: Accounts, options: ServerOptions) -> str:
    """The whole configuration: one account per agent and per caller, nothing but public keys in it."""
    sync = DURABILITY[options.durability].sync_interval
    lines = [
        "# Written by weft from accounts.json and mesh.yaml; changes here are lost.",
        'server_name: "weft"',
        f'listen: "127.0.0.1:{options.port}"',
        f"max_payload: {MAX_PAYLOAD}",
        f"max_connections: {MAX_CONNECTIONS}",
        f"max_subscriptions: {MAX_SUBSCRIPTIONS}",
        'write_deadline: "10s"',
        'ping_interval: "20s"',
        "ping_max: 2",
        f"log_file: {quote(str(options.log))}",
        f"log_size_limit: {LOG_BYTES}",
        "log_max_num: 3",
        "logtime_utc: true",
        "feature_flags { js_ack_fc_v2: false }",
        "jetstream {",
        f"  store_dir: {quote(str(options.store))}",
        f"  sync_interval: {quote(sync)}",
        f"  max_memory_store: {MAX_MEMORY_STORE}",
        f"  max_file_store: {options.max_file_store}",
        "}",
        f"system_account: {SYSTEM}",
        "accounts {",
        *_system(accounts),
        *_mesh(accounts),
    ]
    for name, key in accounts.agents.items():
        lines += _account(name, key, policy.imports(name, agent=True))
    for name, key in accounts.callers.items():
        lines += _account(name, key, policy.imports(name, agent=False))
    lines.append("}")
    return "\n".join(lines) + "\n"


def _system(accounts: Accounts) -> Iterable[str]:
    yield f"  {SYSTEM} {{"
    yield f"    users: [{_user(accounts.members[SYSTEM])}]"
    yield "    exports: ["
    for export in policy.SYSTEM_EXPORTS:
        yield f"      {_export(export)}"
    yield "    ]"
    yield "  }"


def _mesh(accounts: Accounts) -> Iterable[str]:
    users = ", ".join(_user(key) for name, key in accounts.members.items() if name != SYSTEM)
    yield f"  {MESH} {{"
    yield "    jetstream: enabled"
    yield f"    users: [{users}]"
    yield "    exports: ["
    for export in policy.exports(tuple(accounts.agents)):
        yield f"      {_export(export)}"
    yield "    ]"
    yield "    imports: ["
    for export in policy.SYSTEM_EXPORTS:
        yield f"      {_import(SYSTEM, Import(export.subject, stream=export.stream))}"
    yield "    ]"
    yield "  }"


def _account(name: str, key: str, imports: Iterable[Import]) -> Iterable[str]:
    yield f"  {quote(name)} {{"
    yield f"    users: [{_user(key)}]"
    yield f"    limits {{ max_connections: {ACCOUNT_CONNECTIONS} }}"
    yield "    imports: ["
    for one in imports:
        yield f"      {_import(MESH, one)}"
    yield "    ]"
    yield "  }"


def _import(account: str, one: Import) -> str:
    kind = "stream" if one.stream else "service"
    return f"{{ {kind}: {{ account: {account}, subject: {quote(one.subject)} }} }}"


def _export(export: Export) -> str:
    fields = [f"{'stream' if export.stream else 'service'}: {quote(export.subject)}"]
    if export.many_replies:
        fields.append("response_type: stream")
    if export.account_position is not None:
        fields.append(f"account_token_position: {export.account_position}")
    if export.account is not None:
        fields.append(f"accounts: [{quote(export.account)}]")
    return "{ " + ", ".join(fields) + " }"


def _user(key: str) -> str:
    return f"{{ nkey: {quote(key)} }}"
