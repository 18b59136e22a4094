"""Push notifications: what happens to a task, delivered over HTTP (A2A v1.0.1, section 4.3.3; `docs/push.md`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft._lazy import lazy

if TYPE_CHECKING:
    from weft.gateway.push.deliver import Deliverer
    from weft.gateway.push.limits import Backoff, Limits
    from weft.gateway.push.sign import Signer
    from weft.gateway.push.target import Poster

_WHERE = {
    "Backoff": "weft.gateway.push.limits",
    "Deliverer": "weft.gateway.push.deliver",
    "Limits": "weft.gateway.push.limits",
    "Poster": "weft.gateway.push.target",
    "Signer": "weft.gateway.push.sign",
}

__all__ = ["Backoff", "Deliverer", "Limits", "Poster", "Signer"]

__getattr__, __dir__ = lazy(globals(), _WHERE)
