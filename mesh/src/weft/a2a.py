"""The A2A SDK on a mesh: its clients over NATS, its executors as agents.

Names are imported when first used, so that `import weft.a2a` does not load the SDK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft._lazy import lazy

if TYPE_CHECKING:
    from weft.client.transport import BINDING, NatsTransport, client, register, resolve
    from weft.host.executor import agent_from_executor

_WHERE = {
    "BINDING": "weft.client.transport",
    "NatsTransport": "weft.client.transport",
    "agent_from_executor": "weft.host.executor",
    "client": "weft.client.transport",
    "register": "weft.client.transport",
    "resolve": "weft.client.transport",
}

__all__ = ["BINDING", "NatsTransport", "agent_from_executor", "client", "register", "resolve"]

__getattr__, __dir__ = lazy(globals(), _WHERE)
