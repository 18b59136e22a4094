"""Schemas that were made to cost much: a check ends soon, others have their turn meanwhile, and nothing is fetched."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from weft.sidecar.arguments import SECONDS, Arguments
from weft.sidecar.pipeline import Call, Refusal

pytestmark = pytest.mark.anyio
CORPUS = yaml.safe_load(Path(__file__).with_name("corpus.yaml").read_text(encoding="utf-8"))["schemas"]


@pytest.mark.parametrize("case", [pytest.param(case, id=case["case"]) for case in CORPUS])
async def test_a_check_ends_soon_and_lets_others_have_their_turn(case: dict[str, Any], turns: Any) -> None:
    schema = eval(case["make"]) if "make" in case else case["schema"]
    arguments = eval(case["arguments"], {"json": json})
    call = Call(
        caller="a", server="s", method="tools/call", name="t", params={"name": "t", "arguments": arguments},
        definition={"inputSchema": schema}, definition_digest=case["case"],
    )  # fmt: skip
    async with turns, asyncio.timeout(20):
        decided = await Arguments().before(call)
    told = decided.message if isinstance(decided, Refusal) else ""
    assert case["told"] in told
    assert bool(case["told"]) == bool(told), told
    assert turns.work < SECONDS / 2
