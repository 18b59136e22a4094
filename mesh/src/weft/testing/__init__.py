"""What tests of meshes and agents use. Names are imported when first used.

::

    from weft.testing import mesh_for

    async def test_my_agent() -> None:
        async with mesh_for(agent) as mesh:
            assert (await mesh.send("my-agent", "hello")).text == "hello back"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft._lazy import lazy

if TYPE_CHECKING:
    from weft.testing.agents import (
        LocalReplica,
        Process,
        ReplicaProcess,
        ReplicaProcesses,
        client,
        coordinator_process,
        eventually,
        mesh_for,
        running,
        sidecar_process,
    )
    from weft.testing.broker import BrokerMesh, start_test_mesh, unique_name
    from weft.testing.scratch import Scratch
    from weft.testing.stored import StoredTask
    from weft.testing.watching import heard, seen, settled

_WHERE = {
    "BrokerMesh": "weft.testing.broker",
    "LocalReplica": "weft.testing.agents",
    "Process": "weft.testing.agents",
    "ReplicaProcess": "weft.testing.agents",
    "ReplicaProcesses": "weft.testing.agents",
    "Scratch": "weft.testing.scratch",
    "StoredTask": "weft.testing.stored",
    "client": "weft.testing.agents",
    "coordinator_process": "weft.testing.agents",
    "eventually": "weft.testing.agents",
    "heard": "weft.testing.watching",
    "mesh_for": "weft.testing.agents",
    "running": "weft.testing.agents",
    "seen": "weft.testing.watching",
    "sidecar_process": "weft.testing.agents",
    "settled": "weft.testing.watching",
    "start_test_mesh": "weft.testing.broker",
    "unique_name": "weft.testing.broker",
}

__all__ = [
    "BrokerMesh",
    "LocalReplica",
    "Process",
    "ReplicaProcess",
    "ReplicaProcesses",
    "Scratch",
    "StoredTask",
    "client",
    "coordinator_process",
    "eventually",
    "heard",
    "mesh_for",
    "running",
    "seen",
    "settled",
    "sidecar_process",
    "start_test_mesh",
    "unique_name",
]


__getattr__, __dir__ = lazy(globals(), _WHERE)
