"""A stream without room refuses large messages and still takes small ones. No task may end without its result."""

import pytest

import weft
from weft import Agent
from weft.testing.agents import running
from weft.testing.broker import start_test_mesh
from weft.testing.invariants import check, read_log
from weft_protocols.errors import Backpressure, DeadlineExceeded
from weft_protocols.resources import STREAM
from weft_protocols.states import State

pytestmark = pytest.mark.anyio

RESULT = 200_000
"""Bytes of each result; below the size that goes to a blob."""

agent = Agent("large", description="Returns much")


@agent.skill("large")
async def large(size: int) -> str:
    """Return so many bytes."""
    return "x" * size


async def test_a_result_that_finds_no_room_is_not_lost_and_the_task_ends_with_it_when_there_is_room() -> None:
    async with await start_test_mesh(["large"]) as mesh:
        operator = await mesh.connect("coordinator")
        try:
            config = (await operator.api(f"STREAM.INFO.{STREAM}"))["config"]
            await operator.api(f"STREAM.UPDATE.{STREAM}", {**config, "max_bytes": RESULT + RESULT // 2})
            async with running(mesh, agent), weft.connect("local", home=mesh.home) as client:
                first = await client.send("large", {"size": RESULT})
                assert len(first.text) == RESULT
                handle = await client.submit("large", {"size": RESULT})
                with pytest.raises((DeadlineExceeded, Backpressure)):
                    await handle.result(3.0)
                await operator.api(f"STREAM.UPDATE.{STREAM}", {**config, "max_bytes": 100 * RESULT})
                view = await handle.result(8.0)
                assert view.state is State.COMPLETED
                assert len(view.text) == RESULT
            findings = check(await read_log(operator), accepted=[first.id, handle.id])
            assert findings.violations == []
        finally:
            await operator.close()
