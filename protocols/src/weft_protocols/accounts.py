"""Who may say what: account exports and imports, derived from the subject grammar.

JetStream lives in account MESH. Each agent and each caller has an account without JetStream that reaches
MESH by imports alone, with its own name fixed in the subject. The broker enforces it on both sides: the
export carries the position of the writer's token, or names the one account that may import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from weft_protocols import mcp, subjects
from weft_protocols.resources import BLOBS, STREAM

MESH: Final = "MESH"
SYSTEM: Final = "SYS"
DIRECT_GET: Final = "$JS.API.DIRECT.GET"
NEXT: Final = "$JS.API.CONSUMER.MSG.NEXT"
ACK: Final = "$JS.ACK"


@dataclass(frozen=True, slots=True)
class Export:
    """One export of MESH."""

    subject: str
    stream: bool = False
    """A stream export (messages flow out) instead of a service export (requests flow in)."""
    account_position: int | None = None
    """1-based token that must equal the importing account's name."""
    account: str | None = None
    """The one account that may import it."""
    many_replies: bool = False
    """Whether one request may have many responses (a pull, a tool call)."""


@dataclass(frozen=True, slots=True)
class Import:
    """One import of an agent's or a caller's account from MESH."""

    subject: str
    stream: bool = False


CONNECTED: Final = "$SYS.ACCOUNT.*.CONNECT"
"""Told by the broker itself when a client of the account in the third token has connected."""
DISCONNECTED: Final = "$SYS.ACCOUNT.*.DISCONNECT"
"""And when its connection ended, however it did."""
SYSTEM_EXPORTS: Final = tuple(Export(subject, stream=True, account=MESH) for subject in (CONNECTED, DISCONNECTED))
"""What the system account tells MESH, and nobody else."""


def _direct(stream: str, kind: str) -> str:
    return f"{DIRECT_GET}.{stream}.{subjects.GRAMMAR[kind].wildcard}"


def exports(agents: tuple[str, ...]) -> tuple[Export, ...]:
    """All exports of MESH for a set of agents."""
    made = [
        Export(kind.wildcard, account_position=kind.writer_position)
        for kind in subjects.GRAMMAR.values()
        if kind.writer is not None
    ]
    made.append(Export(subjects.GRAMMAR["live"].wildcard, stream=True, account_position=3))
    made.append(Export(subjects.GRAMMAR["ctl"].wildcard, stream=True, account_position=3))
    made.append(Export(mcp.REQUEST_EXPORT, account_position=mcp.CALLER_POSITION, many_replies=True))
    made.append(Export(mcp.CONTROL_EXPORT, account_position=mcp.CALLER_POSITION))
    prefix = len(f"{DIRECT_GET}.{STREAM}".split("."))
    for kind_name, token in (("claim", "agent"), ("event", "caller"), ("step", "agent")):
        position = prefix + 2 + subjects.GRAMMAR[kind_name].tokens.index(token) + 1
        made.append(Export(_direct(STREAM, kind_name), account_position=position))
    for agent in agents:
        # One pattern can be checked for one token only: callers read their own events, so agents need their own line.
        made.append(Export(f"{DIRECT_GET}.{STREAM}.{subjects.GRAMMAR['event'].pattern(agent=agent)}", account=agent))
        for lane in subjects.LANES:
            name = subjects.consumer(agent, lane)
            made.append(Export(f"{NEXT}.{STREAM}.{name}", account=agent, many_replies=True))
            made.append(Export(f"{ACK}.{STREAM}.{name}.>", account=agent))
    made.append(Export(_direct(BLOBS, "blob")))
    return tuple(made)


def imports(name: str, *, agent: bool) -> tuple[Import, ...]:
    """All imports of one account: what every caller may do, and for an agent what its replicas may do."""
    grammar = subjects.GRAMMAR
    made = [
        Import(grammar["task"].pattern(caller=name)),
        Import(grammar["input"].pattern(caller=name)),
        Import(grammar["rpc"].pattern(caller=name)),
        Import(grammar["coord"].pattern(caller=name)),
        Import(grammar["blob"].pattern(writer=name)),
        Import(_direct(BLOBS, "blob")),
        Import(f"{DIRECT_GET}.{STREAM}.{grammar['event'].pattern(caller=name)}"),
        Import(grammar["live"].pattern(caller=name), stream=True),
        Import(f"{mcp.REQUESTS}.*.{name}.>"),
        Import(f"{mcp.CONTROLS}.*.{name}.*"),
    ]
    if agent:
        made += [Import(grammar[kind].pattern(agent=name)) for kind in ("claim", "event", "step")]
        made += [
            Import(f"{DIRECT_GET}.{STREAM}.{grammar[kind].pattern(agent=name)}") for kind in ("claim", "event", "step")
        ]
        for lane in subjects.LANES:
            consumer = subjects.consumer(name, lane)
            made += [Import(f"{NEXT}.{STREAM}.{consumer}"), Import(f"{ACK}.{STREAM}.{consumer}.>")]
        made.append(Import(grammar["ctl"].pattern(agent=name), stream=True))
    return tuple(made)
