"""Errors over HTTP: the codes and details of each binding, and nothing internal in any of them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from weft.client.operations import Operations
from weft.testing.agents import eventually
from weft_protocols import errors as weft_errors

if TYPE_CHECKING:
    from tests.gateway.conftest import Served, Worker

pytestmark = pytest.mark.anyio

ERROR_INFO = "type.googleapis.com/google.rpc.ErrorInfo"
BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"
SECRET = "postgres://user:hunter2@internal.host/db"
NOBODY = "0" * 32


def message(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"messageId": uuid.uuid4().hex, "role": "ROLE_USER", "parts": [{"text": text}], **more}


def rest_details(response: httpx.Response, status: int, name: str) -> list[dict[str, Any]]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] in ("application/json", "application/a2a+json")
    error = response.json()["error"]
    assert error["code"] == status
    assert error["status"] == name
    assert error["message"]
    details: list[dict[str, Any]] = error["details"]
    assert details[0]["@type"] == ERROR_INFO
    assert details[0]["domain"] == "a2a-protocol.org"
    assert all(isinstance(value, str) for value in details[0]["metadata"].values())
    return details


def rpc_details(response: httpx.Response, code: int, request_id: Any = "r1") -> list[dict[str, Any]]:
    assert response.status_code == 200
    answer = response.json()
    assert answer["id"] == request_id
    assert answer["jsonrpc"] == "2.0"
    assert answer["error"]["code"] == code, answer
    assert answer["error"]["message"]
    details: list[dict[str, Any]] = answer["error"]["data"]
    assert details[0]["@type"] == ERROR_INFO
    assert all(isinstance(value, str) for value in details[0]["metadata"].values())
    return details


class Call:
    """Requests to one agent in both bindings."""

    def __init__(self, http: httpx.AsyncClient, agent: str) -> None:
        self.http = http
        self.base = f"/agents/{agent}"

    async def rpc(self, method: str, params: Any, **options: Any) -> httpx.Response:
        body = {"jsonrpc": "2.0", "id": "r1", "method": method, "params": params}
        return await self.http.post(self.base, json=body, **options)

    async def send(self, params: Any, **options: Any) -> httpx.Response:
        return await self.http.post(f"{self.base}/message:send", json=params, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.http.get(f"{self.base}{path}", **options)

    async def post(self, path: str, **options: Any) -> httpx.Response:
        return await self.http.post(f"{self.base}{path}", **options)

    async def task(self, text: str = "hello") -> str:
        task_id: str = (await self.send({"message": message(text)})).json()["task"]["id"]
        return task_id


@pytest.fixture
def call(http: httpx.AsyncClient, worker: Worker) -> Call:
    return Call(http, worker.name)


# Errors of A2A ---------------------------------------------------------------------------------------


async def test_an_unknown_task_is_not_found(call: Call) -> None:
    assert rpc_details(await call.rpc("GetTask", {"id": NOBODY}), -32001)[0]["reason"] == "TASK_NOT_FOUND"
    assert rest_details(await call.get(f"/tasks/{NOBODY}"), 404, "NOT_FOUND")[0]["reason"] == "TASK_NOT_FOUND"
    rpc_details(await call.rpc("CancelTask", {"id": NOBODY}), -32001)
    rest_details(await call.post(f"/tasks/{NOBODY}:cancel"), 404, "NOT_FOUND")
    rpc_details(await call.rpc("SubscribeToTask", {"id": NOBODY}), -32001)
    rest_details(await call.get(f"/tasks/{NOBODY}:subscribe"), 404, "NOT_FOUND")
    rest_details(await call.send({"message": message(taskId=NOBODY)}), 404, "NOT_FOUND")
    rest_details(await call.post("/message:stream", json={"message": message(taskId=NOBODY)}), 404, "NOT_FOUND")


async def test_an_ended_task_cannot_be_canceled_followed_or_continued(call: Call) -> None:
    task_id = await call.task()
    told = rpc_details(await call.rpc("CancelTask", {"id": task_id}), -32002)
    assert told[0]["reason"] == "TASK_NOT_CANCELABLE"
    rest_details(await call.post(f"/tasks/{task_id}:cancel"), 400, "FAILED_PRECONDITION")
    told = rpc_details(await call.rpc("SubscribeToTask", {"id": task_id}), -32004)
    assert told[0]["reason"] == "UNSUPPORTED_OPERATION"
    rest_details(await call.get(f"/tasks/{task_id}:subscribe"), 400, "FAILED_PRECONDITION")
    rpc_details(await call.rpc("SendMessage", {"message": message(taskId=task_id)}), -32004)
    rest_details(await call.send({"message": message(taskId=task_id)}), 400, "FAILED_PRECONDITION")


async def test_wrong_fields_are_named(call: Call) -> None:
    for details in (
        rpc_details(await call.rpc("SendMessage", {"message": {"role": "ROLE_USER"}}), -32602),
        rest_details(await call.send({"message": {"role": "ROLE_USER"}}), 400, "INVALID_ARGUMENT"),
    ):
        assert details[0]["reason"] == "INVALID_PARAMS"
        assert details[1]["@type"] == BAD_REQUEST
        fields = [wrong["field"] for wrong in details[1]["fieldViolations"]]
        assert any("message" in field for field in fields)
        assert all(wrong["description"] for wrong in details[1]["fieldViolations"])


async def test_another_context_than_the_tasks_is_refused(call: Call) -> None:
    asked = (await call.send({"message": message("ask")})).json()["task"]
    wrong = {"message": message("red", taskId=asked["id"], contextId="another")}
    rpc_details(await call.rpc("SendMessage", wrong), -32602)
    assert (await call.send(wrong)).status_code == 400


@pytest.mark.parametrize("version", ["", "0.3", "0.5", "1.1", "2.0", "1", "nonsense", "1.0.1.x"])
async def test_another_version_is_refused(call: Call, version: str) -> None:
    headers = {"A2A-Version": version}
    told = rpc_details(await call.rpc("GetTask", {"id": NOBODY}, headers=headers), -32009)
    assert told[0]["reason"] == "VERSION_NOT_SUPPORTED"
    told = rest_details(await call.get(f"/tasks/{NOBODY}", headers=headers), 400, "FAILED_PRECONDITION")
    assert told[0]["reason"] == "VERSION_NOT_SUPPORTED"


async def test_the_patch_of_a_version_does_not_matter(call: Call) -> None:
    task_id = await call.task()
    assert (await call.get(f"/tasks/{task_id}", headers={"A2A-Version": "1.0.1"})).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "", "application/json; charset=latin-1"])
async def test_a_body_of_another_type_is_refused_before_it_is_read(call: Call, content_type: str) -> None:
    options: dict[str, Any] = {"content": b"{'not': 'json'}", "headers": {"content-type": content_type}}
    told = rpc_details(await call.http.post(call.base, **options), -32005, None)
    assert told[0]["reason"] == "CONTENT_TYPE_NOT_SUPPORTED"
    told = rest_details(await call.post("/message:send", **options), 400, "INVALID_ARGUMENT")
    assert told[0]["reason"] == "CONTENT_TYPE_NOT_SUPPORTED"


# Requests that are none ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"{", b"\xff\xfe{}", b"", b'{"a": ' + b"[" * 100_000, b"[" * 100_000],
    ids=["cut", "not UTF-8", "empty", "deep", "deep list"],
)
async def test_what_is_not_json_is_a_parse_error_and_says_nothing_of_the_parser(call: Call, body: bytes) -> None:
    options: dict[str, Any] = {"content": body, "headers": {"content-type": "application/json"}}
    response = await call.http.post(call.base, **options)
    code = response.json()["error"]["code"]
    assert code in (-32700, -32600)
    rpc_details(response, code, None)
    rest = await call.post("/message:send", **options)
    rest_details(rest, 400, "INVALID_ARGUMENT")
    for text in (response.text, rest.text):
        assert "recursion" not in text
        assert "codec" not in text


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ([], -32600),
        ([{"jsonrpc": "2.0", "id": 1, "method": "GetTask"}], -32600),
        ("text", -32600),
        (17, -32600),
        (None, -32600),
        ({"id": 1, "method": "GetTask"}, -32600),
        ({"jsonrpc": "1.0", "id": 1, "method": "GetTask"}, -32600),
        ({"jsonrpc": "2.0", "id": 1}, -32600),
        ({"jsonrpc": "2.0", "id": 1, "method": "Nonsense"}, -32601),
        ({"jsonrpc": "2.0", "id": 1, "method": 5}, -32600),
        ({"jsonrpc": "2.0", "id": {"a": 1}, "method": "GetTask"}, -32600),
        ({"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": [1]}, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {"message": 5}}, -32602),
        ({"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {"message": {"parts": "x"}}}, -32602),
    ],
    ids=str,
)
async def test_json_rpc_that_is_none_has_its_own_codes(call: Call, body: Any, code: int) -> None:
    headers = {"content-type": "application/json"}
    response = await call.http.post(call.base, content=json.dumps(body), headers=headers)
    assert response.status_code == 200
    assert response.json()["error"]["code"] == code, response.text


@pytest.mark.parametrize("body", [[], "text", 17, None, {"message": 5}, {"message": {"parts": {"a": 1}}}], ids=str)
async def test_a_body_of_another_shape_is_refused(call: Call, body: Any) -> None:
    rest_details(await call.send(body), 400, "INVALID_ARGUMENT")


async def test_a_wrong_query_is_refused(call: Call) -> None:
    rest_details(await call.get("/tasks", params={"pageSize": "many"}), 400, "INVALID_ARGUMENT")
    rest_details(await call.get("/tasks", params={"pageSize": "1000"}), 400, "INVALID_ARGUMENT")
    rest_details(await call.get(f"/tasks/{NOBODY}", params={"historyLength": "-1"}), 400, "INVALID_ARGUMENT")


async def test_a_path_that_is_none_and_a_method_that_is_none_are_problems(call: Call) -> None:
    for response, status in (
        (await call.get("/nonsense"), 404),
        (await call.get("/message:send"), 405),
        (await call.http.get(call.base), 405),
        (await call.http.get("/nonsense"), 404),
    ):
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == status
    assert (await call.http.get(call.base)).headers["allow"] == "POST"


async def test_an_unknown_agent_is_a_problem_that_names_the_nearest(http: httpx.AsyncClient, worker: Worker) -> None:
    near = worker.name[:-1] + ("0" if worker.name[-1] != "0" else "1")
    for response in (
        await http.post(f"/agents/{near}", json={"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": {}}),
        await http.get(f"/agents/{near}/tasks"),
        await http.get(f"/agents/{near}/.well-known/agent-card.json"),
    ):
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert worker.name in response.json()["similar"]
        assert worker.name in response.json()["detail"]
    assert (await http.get("/agents/not%20a%20name/tasks")).status_code == 404


async def test_an_agent_whose_card_nobody_can_tell_is_unavailable(
    served: Served, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*args: Any, **options: Any) -> Any:
        raise weft_errors.Unavailable(SECRET)

    monkeypatch.setattr(served.directory, "card", away)
    monkeypatch.setattr(served.directory, "list", away)
    for response in (await http.post("/agents/some-agent", json={}), await http.get("/agents")):
        assert response.status_code == 503
        assert "retry-after" in response.headers
        assert response.headers["content-type"] == "application/problem+json"
        assert SECRET not in response.text


# Nothing internal leaves -----------------------------------------------------------------------------

STREAMING = "numbered_send_streaming_message"
BROKEN: dict[str, tuple[str, Callable[[Call], Any]]] = {
    "send by rpc": ("send_message", lambda call: call.rpc("SendMessage", {"message": message()})),
    "send": ("send_message", lambda call: call.send({"message": message()})),
    "get by rpc": ("get_task", lambda call: call.rpc("GetTask", {"id": NOBODY})),
    "get": ("get_task", lambda call: call.get(f"/tasks/{NOBODY}")),
    "list": ("list_tasks", lambda call: call.get("/tasks")),
    "stream by rpc": (STREAMING, lambda call: call.rpc("SendStreamingMessage", {"message": message()})),
    "stream": (STREAMING, lambda call: call.post("/message:stream", json={"message": message()})),
}


@pytest.mark.parametrize(("operation", "request_"), list(BROKEN.values()), ids=list(BROKEN))
async def test_an_exception_inside_is_an_internal_error_with_a_number_only(
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    operation: str,
    request_: Callable[[Call], Any],
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(Operations, operation, broken)
    response = await request_(call)

    assert SECRET not in response.text
    assert "RuntimeError" not in response.text
    error = response.json()["error"]
    assert error["code"] in (-32603, 500)
    (incident,) = [word for word in error["message"].replace(":", " ").split() if len(word) == 12]
    assert any(incident in record.message for record in caplog.records)


async def test_an_exception_in_the_middle_of_a_stream_is_an_event_without_details(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Operations.numbered_send_streaming_message

    async def broken(*args: Any, **options: Any) -> Any:
        async for item in original(*args, **options):
            yield item
            raise RuntimeError(SECRET)

    monkeypatch.setattr(Operations, "numbered_send_streaming_message", broken)
    for response in (
        await call.rpc("SendStreamingMessage", {"message": message()}),
        await call.post("/message:stream", json={"message": message()}),
    ):
        assert response.status_code == 200
        assert SECRET not in response.text
        last = response.text.strip().split("\n\n")[-1]
        assert last.startswith("event: error\ndata: ")
        body = json.loads(last.partition("data: ")[2])
        assert body["error"]["code"] in (-32603, 500)


async def test_an_exception_inside_says_nothing_to_clients_of_version_0_3(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(Operations, "send_message", broken)
    monkeypatch.setattr(Operations, STREAMING, broken)
    old = {"messageId": "m-1", "role": "user", "parts": [{"kind": "text", "text": "x"}], "kind": "message"}
    proto = {"message": {"messageId": "m-1", "role": "ROLE_USER", "content": [{"text": "x"}]}}
    headers = {"A2A-Version": ""}
    for method in ("message/send", "message/stream"):
        response = await call.rpc(method, {"message": old}, headers=headers)
        assert SECRET not in response.text
        assert "-32603" in response.text
    for path in ("/v1/message:send", "/v1/message:stream"):
        response = await call.post(path, json=proto, headers=headers)
        assert response.status_code == 500
        assert SECRET not in response.text
        assert response.json()["type"] == "InternalError"


async def test_what_is_wrong_with_a_request_of_version_0_3_has_its_codes(call: Call) -> None:
    headers = {"A2A-Version": "0.3"}
    unknown = await call.rpc("tasks/get", {"id": NOBODY}, headers=headers)
    assert unknown.json()["error"]["code"] == -32001
    assert (await call.rpc("message/send", {"message": 5}, headers=headers)).json()["error"]["code"] == -32600
    ahead = await call.rpc("tasks/get", {"id": NOBODY}, headers={"A2A-Version": "0.4"})
    assert "error" in ahead.json()
    stream = await call.get(f"/v1/tasks/{NOBODY}:subscribe", headers=headers)
    assert (stream.status_code, stream.json()["type"]) == (404, "TaskNotFoundError")


async def test_a_gateway_that_leaves_opens_no_stream(call: Call, served: Served) -> None:
    await served.gateway.streams.drain(0)
    told = await call.post("/message:stream", json={"message": message()})
    assert told.status_code == 503
    assert "retry-after" in told.headers
    rpc_details(await call.rpc("SendStreamingMessage", {"message": message()}), -32603)
    assert (await call.http.get("/readyz")).status_code == 503


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (weft_errors.Unavailable(SECRET), 503),
        (weft_errors.Unreachable(SECRET), 503),
        (weft_errors.Backpressure(SECRET), 503),
        (weft_errors.TimedOut(SECRET), 504),
        (weft_errors.ApiError(SECRET), 500),
        (weft_errors.Denied(SECRET), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_trouble_of_the_mesh_says_whether_to_try_again_and_no_more(
    call: Call, monkeypatch: pytest.MonkeyPatch, raised: Exception, status: int
) -> None:
    async def broken(*args: Any, **options: Any) -> Any:
        raise raised

    monkeypatch.setattr(Operations, "get_task", broken)
    rest, rpc = await call.get(f"/tasks/{NOBODY}"), await call.rpc("GetTask", {"id": NOBODY})
    assert rest.status_code == status
    assert SECRET not in rest.text + rpc.text
    rpc_details(rpc, -32603)
    assert ("retry-after" in rest.headers) == (status != 500)
    assert ("retry-after" in rpc.headers) == (status != 500)


async def test_every_error_of_a2a_has_its_form_in_both_bindings(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, spec in weft_errors.A2A_ERRORS.items():
        wrong = (weft_errors.FieldViolation("message.parts", "must not be empty"),)
        error = weft_errors.A2AError.from_reason(reason, "why", metadata={"key": "value"}, violations=wrong)

        async def broken(*args: Any, error: Exception = error, **options: Any) -> Any:
            raise error

        monkeypatch.setattr(Operations, "get_task", broken)
        for details in (
            rpc_details(await call.rpc("GetTask", {"id": NOBODY}), spec.code),
            rest_details(await call.get(f"/tasks/{NOBODY}"), spec.http, spec.grpc),
        ):
            assert details[0]["reason"] == reason
            assert details[0]["metadata"] == {"key": "value"}
            violation = {"field": "message.parts", "description": "must not be empty"}
            assert details[1] == {"@type": BAD_REQUEST, "fieldViolations": [violation]}


async def test_a_gateway_without_a_broker_is_not_ready_and_says_so(served: Served, http: httpx.AsyncClient) -> None:
    assert (await http.get("/readyz")).json() == {"status": "ready"}
    await served.broker.close()
    response = await eventually(lambda: http.get("/readyz"))
    assert response.status_code == 503
    assert (await http.get("/healthz")).status_code == 200
