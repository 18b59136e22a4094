"""What `mesh.yaml` says about policies, made so: the mode, and the folder whose rules decide."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from weft.client.policies import PolicyStore
from weft.client.policyload import load, read_folder
from weft.client.tools import ToolClient, ToolRequest
from weft.core.toolstore import ToolStore
from weft_protocols.errors import ToolError, WeftError
from weft_protocols.mcp import EVERY

if TYPE_CHECKING:
    from weft.core.broker import Broker
    from weft.core.policyconf import PolicyConfig
    from weft.core.toolsconf import ToolServer

BY: Final = "mesh.yaml"
OFFERED_WITHIN: Final = 45.0
"""Seconds that servers have to say what they offer, where it is not known yet."""
Say = Callable[[str], None]


async def declare_mode(broker: Broker, config: PolicyConfig, say: Say) -> None:
    """Have what the policy says hold, or not."""
    if await PolicyStore(broker).set_mode(config.mode, by=BY) or config.mode != "enforce":
        said = {
            "enforce": "what the policy does not permit is denied",
            "shadow": "THE POLICY ONLY WATCHES: every tool that is approved may be used by everybody",
        }
        say(said[config.mode])


async def apply(broker: Broker, config: PolicyConfig, say: Say) -> None:
    """Load the folder, if it is not what decides already. Says what is wrong with it; then what decides goes on.

    Args:
        broker: a connection of the operator.
        config: the section `policy`.
        say: says a line.
    """
    store = PolicyStore(broker)
    active = await store.pointer()
    if config.folder is None:
        if not active.version and await ToolStore(broker).registered():
            say("no policy is loaded, so that no tool may be used: `mesh policy init` writes one to begin with")
        return
    try:
        bundle = read_folder(config.folder)
        versions = {one.number: one for one in await store.versions()}
        if active.version in versions and versions[active.version].digest == bundle.digest:
            return
        known = next((one for one in versions.values() if one.digest == bundle.digest), None)
        if known is not None and active.how == "rollback":
            say(
                f"policy version {active.version} decides, as {active.by} rolled it back; {config.folder.name} is "
                f"version {known.number} still: `mesh policy load {config.folder.name}` has it decide"
            )
            return
        unknown = await _unknown(broker)
        if unknown:
            say(f"names of tools of {', '.join(unknown)} are not checked in the policy: none of them is approved yet")
        loaded = await load(broker, bundle, by=BY, note=str(config.folder), lenient=bool(unknown))
        behind = await store.followed(loaded.version.number)
    except (WeftError, OSError) as error:
        kept = f"version {active.version} goes on to decide" if active.version else "no tool may be used"
        say(f"THE POLICY IN {config.folder} IS REFUSED; {kept}:")
        for line in str(error).splitlines():
            say(f"  {line}")
        return
    for warning in loaded.warnings:
        say(f"  {warning}")
    say(f"policy version {loaded.version.number} decides, {loaded.version.rules} rules of {config.folder.name}")
    if behind:
        say(f"  not yet on {', '.join(behind)}")


async def _unknown(broker: Broker) -> list[str]:
    """Servers of which nothing is approved, once those that are approved at first sight have been seen."""
    store = ToolStore(broker)
    unseen = await _unpinned(store)
    wanted = [name for name, server in unseen.items() if server.trust == "first-use"]
    if wanted:
        client = ToolClient(broker)
        try:
            async with asyncio.TaskGroup() as group:
                for name in wanted:
                    group.create_task(_look(client, name))
        finally:
            await client.aclose()
    return sorted(await _unpinned(store))


async def _unpinned(store: ToolStore) -> Mapping[str, ToolServer]:
    pinned = await store.pins.all()
    return {name: one for name, one in (await store.registered()).items() if one.enabled and name not in pinned}


async def _look(client: ToolClient, name: str) -> None:
    """Have a sidecar read what a server offers."""
    asked = ToolRequest(EVERY, "weft/inspect", {"server": name}, deadline=time.time() + OFFERED_WITHIN)
    try:
        await client.request(asked, patience=5.0)
    except (ToolError, WeftError):
        return  # it stays unknown, which is said


__all__ = ["apply", "declare_mode"]
