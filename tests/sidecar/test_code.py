"""Code of agents: what it gets, how it calls tools, and in whose name."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from weft.client.tools import ToolRequest
from weft.core.toolsconf import ToolServer
from weft.testing.broker import unique_name

if TYPE_CHECKING:
    from tests.sidecar.conftest import Stage  # type: ignore[import-not-found,unused-ignore]

pytestmark = pytest.mark.skipif(find_spec("pydantic_monty") is None, reason="needs weft[code]")


async def code(stage: Stage, **settings: Any) -> str:
    name = unique_name("code")
    await stage.register(ToolServer(name, builtin="code", settings=settings))
    return name


async def run(stage: Stage, server: str, source: str, **more: Any) -> dict[str, Any]:
    arguments = {"code": source, **more}
    return await stage.caller.request(ToolRequest(server, "tools/call", {"name": "run", "arguments": arguments}))


async def test_the_last_expression_and_what_was_printed_come_back(stage: Stage) -> None:
    server = await code(stage)
    result = await run(stage, server, "print('so far')\n[x, y * 2]", inputs={"x": 1, "y": "a"})
    assert result["structuredContent"] == {"result": [1, "aa"]}
    assert [one["text"] for one in result["content"]] == ["so far\n", '[1, "aa"]']
    assert "isError" not in result


async def test_code_calls_other_tools(stage: Stage) -> None:
    server, other = await code(stage), await stage.runner()
    source = f"one = tools.{other.replace('-', '_')}.run(code='result = {{\"a\": 1}}')\ncall('{other}.run', {{'code': 'result = 2'}}), one"
    result = await run(stage, server, source)
    assert result["structuredContent"] == {"result": ["2", '{"a": 1}']}, result
