"""Schemas that were made to cost much: a check ends soon, others have their turn meanwhile, and nothing is fetched."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from weft.sidecar.arguments import Arguments
from weft.sidecar.pipeline import Call, Refusal

pytestmark = pytest.mark.anyio
CORPUS = yaml.safe_load(Path(__file__).with_name("corpus.yaml").read_text(encoding="utf-8"))["schemas"]
STALL = 1.5
"""Seconds that others wait at most; the machine may be busy."""


async def longest_wait(over: asyncio.Event) -> float:
    """The longest time that another task had to wait for its turn."""
    longest = 0.0
    while not over.is_set():
        begun = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - begun)
    return longest


@pytest.mark.parametrize("case", [pytest.param(case, id=case["case"]) for case in CORPUS])
async def test_a_check_ends_soon_and_lets_others_have_their_turn(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.sidecar.arguments.SECONDS", STALL + 0.5)  # what a check would hold others up
    schema = eval(case["make"]) if "make" in case else case["schema"]
    arguments = eval(case["arguments"], {"json": json})
    call = Call(
        caller="a", server="s", method="tools/call", name="t", params={"name": "t", "arguments": arguments},
        definition={"inputSchema": schema}, definition_digest=case["case"],
    )  # fmt: skip
    over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        waited = group.create_task(longest_wait(over))
        await asyncio.sleep(0)  # it begins to wait
        async with asyncio.timeout(20):
            decided = await Arguments().before(call)
        over.set()
    told = decided.message if isinstance(decided, Refusal) else ""
    assert case["told"] in told
    assert bool(case["told"]) == bool(told), told
    assert waited.result() < STALL
