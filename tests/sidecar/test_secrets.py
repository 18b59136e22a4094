"""Secrets: they reach the server, and nobody else, whatever it does with them."""

from __future__ import annotations

import base64
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from weft.sidecar.guards import guards_of
from weft.sidecar.secrets import REPLACED, Scrubber, resolve
from weft_protocols.errors import InvalidConfig, ToolError

pytestmark = pytest.mark.anyio

SECRET = "s3cr3t/Ünïcode+value=="
Said = Callable[[dict[str, Any]], str]


def shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


async def test_secrets_come_from_a_variable_a_file_or_a_command(
    stage: Any, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARDS_TEST", "from-the-variable")
    (tmp_path / "key").write_text("from-the-file\n")
    command = [sys.executable, "-c", "print('from-the-command')"]
    secrets = {"A": {"env": "GUARDS_TEST"}, "B": {"file": str(tmp_path / "key")}, "C": {"command": command}}
    server = await stage.runner(secrets=secrets)
    code = "import os; result = [len(os.environ[one]) for one in 'ABC'] + sorted(os.environ)"
    found = json.loads(said(await stage.run(server, code)))
    assert found[:3] == [len("from-the-variable"), len("from-the-file"), len("from-the-command")]
    assert "GUARDS_TEST" not in found


async def test_a_secret_that_comes_back_is_taken_out_wherever_it_stands(
    stage: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GUARDS_TEST", SECRET)
    caplog.set_level(logging.DEBUG)
    server = await stage.runner(secrets={"KEY": {"env": "GUARDS_TEST"}, "TOLD": {"env": "GUARDS_TEST"}})
    code = (
        "import os, sys, base64, urllib.parse\n"
        "k = os.environ['KEY']\n"
        "sys.stderr.write(k)\n"
        "send({'method': 'notifications/message', 'params': {'data': k}})\n"
        "print('no message ' + k, flush=True)\n"
        "b = base64.b64encode(('user:' + k + ':x').encode()).decode()\n"
        "result = {'content': [{'type': 'text', 'text': f'a {k} b'}, {'type': 'text', 'text': b}],\n"
        "  'structuredContent': {k: [1, {'deep': urllib.parse.quote(k, safe='')}], 'hex': k.encode().hex()},\n"
        "  '_meta': {'x': k}}\n"
    )
    heard: list[Any] = []
    from weft.client.tools import ToolRequest

    params = {"name": "run", "arguments": {"code": code}}
    result = await stage.caller.request(
        ToolRequest(server, "tools/call", params), heard=lambda method, told: heard.append(told)
    )
    assert result["content"][0]["text"] == f"a {REPLACED} b"
    with pytest.raises(ToolError) as failed:
        await stage.run(
            server, "import os; error = {'code': 7, 'message': os.environ['KEY'], 'data': os.environ['KEY']}"
        )
    with pytest.raises(ToolError) as ended:
        await stage.run(server, "import os, sys; sys.stderr.write(os.environ['KEY']); sys.stderr.flush(); os._exit(3)")
    listed = await stage.ask(server, "tools/list")
    inspected = await stage.operate("weft/inspect", server=server)
    everything = shown([result, heard, str(failed.value), failed.value.data, str(ended.value), listed, inspected])
    everything += caplog.text
    assert heard
    assert "3" in str(ended.value)
    inside, shifted = (base64.b64encode(f"{before}{SECRET}".encode()).decode()[8:24] for before in ("", "user:"))
    for form in (SECRET, quote(SECRET, safe=""), SECRET.encode().hex(), inside, shifted):
        assert form not in everything


async def test_what_is_missing_is_named_and_no_value_is_told(stage: Any, tmp_path: Path) -> None:
    for source, told in (
        ({"env": "GUARDS_NOT_SET"}, "secret KEY.*env GUARDS_NOT_SET"),
        ({"file": str(tmp_path / "none")}, "cannot be read"),
        ({"command": ["sh", "-c", "echo half-a-secret; echo other-half >&2; exit 4"]}, "ended with 4"),
        ({"command": ["no-such-program-here"]}, "cannot be started"),
    ):
        server = await stage.runner(secrets={"KEY": source})
        with pytest.raises(ToolError, match=told) as refused:
            await stage.run(server, "result = 1")
        assert "half" not in str(refused.value)


async def test_a_secrets_form_is_sent_and_its_value_is_what_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDS_TEST", "abcdef-ghi")
    sources = guards_of({"secrets": {"Authorization": {"env": "GUARDS_TEST", "format": "Bearer {}"}}}).secrets
    sent, values = await resolve(sources, "s")
    assert sent == {"Authorization": "Bearer abcdef-ghi"}
    assert Scrubber(values).text("it is abcdef-ghi") == f"it is {REPLACED}"


@pytest.mark.parametrize("before", range(5))
@pytest.mark.parametrize("after", range(4))
def test_base64_is_found_whatever_stands_around_the_secret(before: int, after: int) -> None:
    text = base64.b64encode(b"x" * before + b"top-secret-value" + b"y" * after).decode()
    found = Scrubber(["top-secret-value"]).text(text)
    assert REPLACED in found
    assert len(found.replace(REPLACED, "")) <= (before + after) * 4 / 3 + 7  # of the secret, its edges at most


def test_short_values_are_not_looked_for_and_nothing_is_changed_without_secrets() -> None:
    value = {"a": ["x", 1]}
    assert Scrubber(["abc"]).value(value) is value
    assert not Scrubber([])


@pytest.mark.parametrize(
    "secrets",
    [{"K": "value"}, {"K": {}}, {"K": {"environ": "A"}}, {"K": {"env": "A", "file": "b"}}, {"K": {"env": ""}},
     {"K": {"env": "A", "format": "x"}}, {"K": {"command": []}}, ["K"]],
)  # fmt: skip
def test_what_is_no_source_is_refused(secrets: Any) -> None:
    with pytest.raises(InvalidConfig, match="secrets"):
        guards_of({"secrets": secrets})
