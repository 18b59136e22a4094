"""Redaction: what may not be seen reaches no agent and no record, wherever a server puts it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from weft.client.tools import ToolRequest
from weft.core.broker import Broker
from weft.policy.model import Decision, Obligations
from weft.sidecar import owed
from weft.sidecar.guards import Guards, guards_of
from weft.sidecar.pipeline import Call, Outcome, Passing, Pipeline, Refusal
from weft.sidecar.records import Recorded, Recorder
from weft.sidecar.redacts import LARGEST_NOTE, Redacts, hearing
from weft.sidecar.settings import Limits
from weft.sidecar.stages import ResponseSize
from weft.sidecar.weight import CHARACTERS
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh, unique_name
from weft_protocols import mcp
from weft_protocols.audit import AuditRecord, Kind
from weft_protocols.errors import InvalidConfig, ToolError
from weft_protocols.resources import AUDIT, AUDIT_RECORDS

pytestmark = pytest.mark.anyio

SECRET = "ghp_" + "Aa1Bb2Cc3" * 4
MAIL = "jane.doe@example.com"
LEAK = f"key {SECRET} of {MAIL}."
GONE = f"key [redacted:github-token] of {MAIL}."
NOTHING_OF_BOTH = "key [redacted:github-token] of [redacted:email]."
META = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {}}
CALL = Call(caller="a", server="s", method="tools/call", name="t", params={"name": "t", "arguments": {}})
PII = Decision(allow=True, obligations=Obligations(redact=("pii",)))


def strings(value: Any) -> Iterator[str]:
    """Every text in a value, keys included, and what it is in base64."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from strings(key)
            yield from strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value
        for charset in ("utf-8", "utf-16"):
            try:
                yield base64.b64decode(value, validate=True).decode(charset)
            except (binascii.Error, UnicodeDecodeError):
                continue


def shown(*values: Any) -> str:
    return "\n".join(one for value in values for one in strings(value))


class Decided(Passing):
    """A policy that obliges to take out personal data as well."""

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        return call.with_fact(owed.DECISION, PII)


@pytest.fixture
def obliged(stage: Any) -> Iterator[None]:
    pipeline = stage.service.plane.pipeline
    stages = pipeline.stages
    at = [type(one).__module__ for one in stages].index("weft.sidecar.decided") + 1
    pipeline.stages = (*stages[:at], Decided(), *stages[at:])
    yield
    pipeline.stages = stages


@pytest.fixture
async def broker(mesh: BrokerMesh) -> AsyncIterator[Broker]:
    made = await mesh.connect("sidecar")
    yield made
    await made.close()


async def leaking(stage: Any, leak: str = LEAK, **settings: Any) -> str:
    server: str = await stage.bad("--leaks", **settings)
    (stage.state(server) / "leak").write_text(leak)
    return server


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("tools/call", {"name": "do", "arguments": {"what": "leak"}}),
    ("tools/call", {"name": "do", "arguments": {"what": "leak failure"}}),
    ("tools/call", {"name": "do", "arguments": {"what": "leak error"}}),
    ("prompts/get", {"name": "ask"}),
    ("resources/read", {"uri": "mem://x"}),
    ("resources/list", {}),
    ("completion/complete", {"ref": {"type": "ref/prompt", "name": "ask"}, "argument": {"name": "x", "value": ""}}),
]


async def over_nats(stage: Any, server: str, method: str, params: dict[str, Any]) -> tuple[Any, list[Any]]:
    heard: list[Any] = []
    request = ToolRequest(server, method, {**params, "_meta": {"progressToken": "mine"}})
    try:
        answer = await stage.caller.request(request, heard=lambda *told: heard.append(list(told)))
    except ToolError as error:
        answer = {"error": [str(error), error.data]}
    return answer, heard


async def over_http(stage: Any, server: str, method: str, params: dict[str, Any]) -> tuple[Any, list[Any]]:
    token, _ = stage.service.tokens.issue("local", "0" * 32)
    headers = {
        "accept": "application/json, text/event-stream",
        "authorization": f"Bearer {token}",
        "mcp-protocol-version": mcp.VERSION,
        "mcp-method": method,
    }
    if name := mcp.name_of(method, params):
        headers["mcp-name"] = name
    full = {**params, "_meta": {**META, "progressToken": "mine"}}
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": full}
    url = f"{stage.service.web.url}/{server}/mcp"
    async with httpx2.AsyncClient(trust_env=False) as client:
        text = (await client.post(url, json=body, headers=headers, timeout=15)).text
    lines = [line.removeprefix("data:") for line in text.splitlines() if line.startswith("data:")] or [text]
    messages = [json.loads(line) for line in lines if line.strip()]
    answer = messages.pop()
    return answer.get("result", answer.get("error")), messages


@pytest.mark.parametrize("front", [over_nats, over_http])
@pytest.mark.parametrize(("method", "params"), ASKED)
async def test_a_secret_reaches_nobody_wherever_a_server_puts_it(
    stage: Any, front: Any, method: str, params: dict[str, Any]
) -> None:
    server = await leaking(stage)
    answer, heard = await front(stage, server, method, params)
    everything = shown(answer, heard)
    assert SECRET not in everything
    assert "[redacted:" in shown(answer)
    assert MAIL in everything  # nobody asked for that to be taken out
    assert "[redacted:" in shown(heard)  # also before an error
    assert "mine" in shown(heard)  # its caller knows what the progress is of
    told = answer.get("_meta", {})
    assert mcp.META_REFUSAL not in told  # what only the sidecar says
    if method != "tools/call" or params["arguments"]["what"] != "leak error":
        counts = told[mcp.META_REDACTED]
        assert counts["github-token"] == shown(json.loads(json.dumps(answer))).count("[redacted:github-token]")


@pytest.mark.usefixtures("obliged")
@pytest.mark.parametrize(("method", "params"), ASKED)
async def test_what_the_policy_names_is_taken_out_as_well(stage: Any, method: str, params: dict[str, Any]) -> None:
    server = await leaking(stage)
    answer, heard = await over_nats(stage, server, method, params)
    everything = shown(answer, heard)
    assert SECRET not in everything
    assert MAIL not in everything
    assert NOTHING_OF_BOTH in everything


async def test_a_server_that_hands_out_secrets_may(stage: Any) -> None:
    server = await leaking(stage, redact=[])
    answer, heard = await over_nats(stage, server, *ASKED[0])
    assert answer["content"][0]["text"] == LEAK
    assert mcp.META_REDACTED not in answer["_meta"]
    assert SECRET in shown(heard)


@pytest.mark.usefixtures("obliged")
async def test_what_the_policy_names_is_taken_out_even_there(stage: Any) -> None:
    server = await leaking(stage, redact=[])
    answer, _ = await over_nats(stage, server, *ASKED[0])
    assert answer["content"][0]["text"] == f"key {SECRET} of [redacted:email]."


@pytest.mark.parametrize("which", ["server", "_"])
async def test_what_a_server_tells_everybody_is_looked_through(stage: Any, which: str) -> None:
    server = await leaking(stage)
    heard: list[Any] = []
    asked = {"notifications": {"toolsListChanged": True}}
    request = ToolRequest(server if which == "server" else "_", "subscriptions/listen", asked)
    listening = asyncio.create_task(stage.caller.request(request, heard=lambda *told: heard.append(list(told))))
    await eventually(lambda: heard)
    await stage.do(server, "tell everybody")
    if which == "_":  # the bad server tells no subscription of its own
        await eventually(lambda: any(one[0].endswith("list_changed") and "x" in one[1] for one in heard))
        assert GONE in shown(heard)
    listening.cancel()
    await asyncio.wait((listening,))
    assert SECRET not in shown(heard)


async def test_definitions_are_what_was_approved(stage: Any) -> None:
    server = await leaking(stage)
    schema = {"type": "object", "properties": {"password": {"type": "string", "description": "what it is"}}}
    offer = {"tools": [{"name": "login", "description": f"such as {SECRET}", "inputSchema": schema}]}
    (stage.state(server) / "offer.json").write_text(json.dumps(offer))
    listed = await stage.ask(server, "tools/list")
    assert listed["tools"][0]["inputSchema"] == schema


# Records -------------------------------------------------------------------------------------------


async def records(broker: Broker, server: str, kind: str) -> AuditRecord:
    found: list[AuditRecord] = []

    async def there() -> bool:
        subject = f"{AUDIT_RECORDS}.{kind}.local.{server}"
        last = await broker.last(AUDIT, subject)
        found[:] = [AuditRecord.decode(last.data)] if last is not None else []
        return bool(found)

    await eventually(there)
    return found[0]


async def test_a_record_says_how_much_of_what_was_taken_out(stage: Any, broker: Broker) -> None:
    server = await leaking(stage)
    (stage.state(server) / "answer.json").write_text(
        json.dumps(
            {"content": [{"type": "text", "text": f"{SECRET} {SECRET}"}, {"type": "text", "text": "pwd=x1y2z3"}]}
        )
    )
    result = await stage.do(server, "answer")
    record = await records(broker, server, "outcome")
    assert result["_meta"][mcp.META_REDACTED] == {"github-token": 2, "password": 1}
    assert record.outcome["redactions"] == {"github-token": 2, "password": 1}


async def test_a_record_of_an_error_has_neither_secrets_nor_personal_data(stage: Any, broker: Broker) -> None:
    server = await leaking(stage)
    await over_nats(stage, server, "tools/call", {"name": "do", "arguments": {"what": "leak error"}})
    record = await records(broker, server, "outcome")
    assert record.outcome["message"] == NOTHING_OF_BOTH
    assert record.outcome["redactions"]["github-token"] >= 1


async def test_arguments_in_records_are_redacted_whatever_a_server_may_hand_out(stage: Any, broker: Broker) -> None:
    """Records know every class of data, so that no obligation can ask for more."""
    server = await stage.runner(redact=[])
    await stage.run(server, f"result = '{LEAK}'")
    intent = await records(broker, server, "intent")
    assert intent.what["shown"] == {"code": f"result = '{NOTHING_OF_BOTH}'"}
    await stage.run(server, "x", id=1, arguments={"code": [LEAK]})
    denial = await records(broker, server, "denial")
    assert SECRET not in json.dumps(denial.outcome)
    assert MAIL not in json.dumps(denial.outcome)


class Kept(Recorder):
    """Records that are kept here."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker)
        self.kept: list[AuditRecord] = []

    async def store_later(self, kind: Kind, call: Call, outcome: Outcome) -> None:
        self.kept.append(self.made(kind, call, outcome))


async def test_what_a_notification_lost_is_in_the_record_and_not_in_the_result(broker: Broker) -> None:
    recorder = Kept(broker)
    heard: list[Any] = []

    async def telling(call: Call) -> dict[str, Any]:
        hearing(call, lambda *told: heard.append(told))("notifications/message", {"data": LEAK})
        return {"content": []}

    result = await Pipeline([Recorded(recorder), Redacts()]).run(CALL, telling)
    assert heard == [("notifications/message", {"data": GONE})]
    assert "_meta" not in result
    assert recorder.kept[0].outcome["redactions"] == {"github-token": 1}


async def test_what_a_notification_of_a_call_that_was_cut_off_lost_is_in_the_record(broker: Broker) -> None:
    recorder = Kept(broker)

    async def telling(call: Call) -> dict[str, Any]:
        hearing(call, lambda *_: None)("notifications/message", {"data": LEAK})
        return {"content": [{"type": "text", "text": "x" * 1000}]}

    stages = [Recorded(recorder), Redacts(), ResponseSize()]
    result = await Pipeline(stages).run(replace(CALL, limits=Limits(response_bytes=100)), telling)
    assert result["_meta"][mcp.META_REFUSAL]["kind"] == "too_large"
    assert recorder.kept[0].outcome["redactions"] == {"github-token": 1}


# Structured content --------------------------------------------------------------------------------


def declaring(schema: dict[str, Any]) -> Call:
    return replace(CALL, definition={"outputSchema": schema}, definition_digest=unique_name("d"))


async def of(call: Call, result: dict[str, Any]) -> dict[str, Any]:
    async def execute(_: Call) -> dict[str, Any]:
        return result

    return await Pipeline([Redacts()]).run(call, execute)


OBJECT = {"type": "object", "properties": {"key": {"type": "string"}, "pin": {"type": "integer"}}}


async def test_a_text_is_replaced_by_a_text_so_that_the_form_holds() -> None:
    made = await of(declaring(OBJECT), {"content": [], "structuredContent": {"key": SECRET, "n": 5}})
    assert made["structuredContent"] == {"key": "[redacted:github-token]", "n": 5}
    assert "isError" not in made


@pytest.mark.parametrize(
    ("schema", "content"),
    [
        (OBJECT, {"pin": 1234}),
        ({"type": "object", "properties": {"key": {"pattern": "^ghp_"}}}, {"key": SECRET}),
        ({"type": "object", "properties": {"key": {"maxLength": 8}}}, {"key": "", "password": "x"}),
    ],
)
async def test_where_the_form_would_not_hold_there_is_no_structured_content_and_it_says_so(
    schema: dict[str, Any], content: dict[str, Any]
) -> None:
    if "maxLength" in str(schema):
        schema = {"type": "object", "properties": {"password": {"maxLength": 8}}}
    result = {"content": [{"type": "text", "text": f"see {SECRET}"}], "structuredContent": content}
    made = await of(declaring(schema), result)
    assert "structuredContent" not in made
    assert made["isError"]
    assert "left out" in made["content"][0]["text"]
    assert made["content"][1]["text"] == "see [redacted:github-token]"
    assert made["_meta"][mcp.META_REDACTED]


async def test_without_a_declared_form_a_secret_number_is_a_marked_text() -> None:
    made = await of(CALL, {"content": [], "structuredContent": {"pin": 1234, "n": 1}})
    assert made["structuredContent"] == {"pin": "[redacted:secret]", "n": 1}
    assert made["_meta"][mcp.META_REDACTED] == {"secret": 1}


async def test_what_had_not_the_declared_form_before_is_the_clients_to_refuse() -> None:
    made = await of(declaring(OBJECT), {"content": [], "structuredContent": {"key": 5, "other": SECRET}})
    assert made["structuredContent"] == {"key": 5, "other": "[redacted:github-token]"}


@pytest.mark.parametrize(
    "result",
    [
        {"content": [{"type": "text", "text": "all is well"}], "structuredContent": {"a": [1, 2.5, None, True]}},
        {"content": [{"type": "image", "mimeType": "image/png", "data": base64.b64encode(bytes(range(256))).decode()}]},
        {"content": "no list", "_meta": "no object", "structuredContent": None},
        {"contents": [{"uri": "mem://x", "blob": "!!! no base64"}], "messages": [1, {"role": "user"}]},
        {"content": [None, 7, {"type": "resource"}, {"type": "resource", "resource": 3}, {"data": 5}]},
    ],
)
async def test_what_holds_nothing_of_it_is_handed_on_as_it_is(result: dict[str, Any]) -> None:
    assert await of(CALL, result) == result


async def test_malformed_results_hide_nothing() -> None:
    result = {
        "content": LEAK,
        "contents": {"blob": LEAK},
        "messages": [LEAK, {"content": [{"text": LEAK}]}],
        "_meta": LEAK,
    }
    made = await of(CALL, result)
    assert SECRET not in shown(made)
    assert made["_meta"] == {mcp.META_REDACTED: {"github-token": 5}}


async def test_base64_with_spaces_or_of_the_other_alphabet_is_looked_into() -> None:
    wide = base64.urlsafe_b64encode(f"??>>{LEAK}".encode()).decode()
    for blob in (f"{wide[:20]}\n{wide[20:]}", wide.rstrip("="), SECRET):
        made = await of(CALL, {"contents": [{"uri": "mem://x", "mimeType": "application/octet-stream", "blob": blob}]})
        assert mcp.META_REDACTED in made["_meta"], blob


async def test_a_form_to_be_filled_in_may_ask_for_a_password() -> None:
    form = {"type": "object", "properties": {"password": {"type": "string", "description": LEAK}}}
    made = await of(
        CALL, {"resultType": "input_required", "inputRequests": {"q": {"params": {"requestedSchema": form}}}}
    )
    asked = made["inputRequests"]["q"]["params"]["requestedSchema"]["properties"]["password"]
    assert asked == {"type": "string", "description": GONE}


async def test_a_large_result_is_looked_through_while_other_calls_go_on() -> None:
    text = f"{'prose and more ' * CHARACTERS}{SECRET}"
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    beside = asyncio.create_task(others())
    made = await of(CALL, {"content": [{"type": "text", "text": text}]})
    beside.cancel()
    await asyncio.wait((beside,))
    assert made["content"][0]["text"].endswith("[redacted:github-token]")
    assert turns > 5


async def test_the_callers_own_token_of_its_progress_is_left_alone() -> None:
    decided = await Redacts().before(replace(CALL, params={**CALL.params, "_meta": {"progressToken": SECRET}}))
    assert isinstance(decided, Call)
    heard: list[Any] = []
    told = {"progressToken": SECRET, "progress": 1, "message": LEAK}
    hearing(decided, lambda *told: heard.append(told))("notifications/progress", told)
    assert heard == [("notifications/progress", {**told, "message": GONE})]


async def test_a_notification_that_is_too_large_is_left_out() -> None:
    decided = await Redacts().before(CALL)
    assert isinstance(decided, Call)
    heard: list[Any] = []
    tell = hearing(decided, lambda *told: heard.append(told))
    tell("notifications/message", {"data": "x" * (LARGEST_NOTE + 1)})
    tell("notifications/message", {"data": "x"})
    assert heard == [("notifications/message", {"data": "x"})]


# Settings ------------------------------------------------------------------------------------------


def test_secrets_are_taken_out_unless_a_server_says_otherwise() -> None:
    assert guards_of({}).redact == Guards().redact == ("secrets",)
    assert guards_of({"redact": ["secrets", "pii"]}).redact == ("secrets", "pii")
    assert guards_of({"redact": []}).redact == ()


@pytest.mark.parametrize("wrong", ["secrets", False, ["secret"], [1], {"secrets": True}])
def test_classes_that_are_none_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidConfig, match=r"settings.redact.*secrets, pii"):
        guards_of({"redact": wrong})
