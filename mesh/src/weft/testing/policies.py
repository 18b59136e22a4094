"""Policies for tests: without one a sidecar allows nothing. Needs the extra `policy`."""

from __future__ import annotations

from typing import Final

from weft.client.policies import PolicyStore
from weft.core.broker import Broker
from weft.policy.bundle import Bundle

EVERYTHING: Final = "permit (principal, action, resource);"
"""Rules that permit everything."""


async def permit(broker: Broker, rules: str = EVERYTHING) -> int:
    """Have these rules decide, unchecked; their version. Sidecars that run follow in a moment.

    Args:
        broker: a connection of the operator.
        rules: Cedar text.
    """
    store = PolicyStore(broker)
    version = (await store.store(Bundle.of({"rules.cedar": rules}), author="test")).number
    await store.point(version, by="test", how="load")
    return version
