"""What standard bindings look like on the wire: the forms of requests, answers, errors and streams (A2A 9 to 11).

Raw HTTP and raw gRPC, without the SDK's transports.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import httpx
import pytest
from a2a.client.client import Client
from a2a.types import a2a_pb2 as pb
from a2a.types import a2a_pb2_grpc
from google.protobuf import json_format
from google.protobuf.message import Message as ProtoMessage
from google.rpc import error_details_pb2, status_pb2

from weft_protocols.errors import A2A_DOMAIN, A2A_ERRORS

if TYPE_CHECKING:
    from tests.contract.conftest import Stage

pytestmark = pytest.mark.anyio
REQUIRED = "https://example.com/extensions/receipt/v1"
VERSION = {"A2A-Version": "1.0"}
REST = {
    "SendMessage": ("POST", "/message:send"),
    "SendStreamingMessage": ("POST", "/message:stream"),
    "GetTask": ("GET", "/tasks/{id}"),
    "ListTasks": ("GET", "/tasks"),
    "CancelTask": ("POST", "/tasks/{id}:cancel"),
    "SubscribeToTask": ("POST", "/tasks/{id}:subscribe"),
    "CreateTaskPushNotificationConfig": ("POST", "/tasks/{task_id}/pushNotificationConfigs"),
    "GetTaskPushNotificationConfig": ("GET", "/tasks/{task_id}/pushNotificationConfigs/{id}"),
    "ListTaskPushNotificationConfigs": ("GET", "/tasks/{task_id}/pushNotificationConfigs"),
    "DeleteTaskPushNotificationConfig": ("DELETE", "/tasks/{task_id}/pushNotificationConfigs/{id}"),
    "GetExtendedAgentCard": ("GET", "/extendedAgentCard"),
}
"""Method and path of each operation (A2A 11.3)."""


@pytest.fixture
async def web(stage: Stage) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"{stage.gateway.http}/agents/", timeout=15, verify=False) as made:
        yield made


@pytest.fixture
async def caller(stage: Stage) -> AsyncIterator[Client]:
    async with stage.dial("nats", streaming=False) as made:
        yield made


def plain(message: ProtoMessage) -> dict[str, Any]:
    made: dict[str, Any] = json_format.MessageToDict(message)
    return made


async def rpc(
    web: httpx.AsyncClient, method: str, request: ProtoMessage, *, agent: str = "contract", **headers: str
) -> httpx.Response:
    body = {"jsonrpc": "2.0", "id": "one", "method": method, "params": plain(request)}
    return await web.post(agent, json=body, headers={**VERSION, **headers})


async def rest(
    web: httpx.AsyncClient, method: str, request: ProtoMessage, *, agent: str = "contract", **headers: str
) -> httpx.Response:
    verb, path = REST[method]
    address = agent + path.format(id=getattr(request, "id", ""), task_id=getattr(request, "task_id", ""))
    named = {name for name in ("id", "task_id") if "{" + name + "}" in path}
    fields = plain(request)
    rest_of_it = {name: value for name, value in fields.items() if name not in {"id", "taskId"} or not named}
    if verb == "POST":
        return await web.post(address, json=fields, headers={**VERSION, **headers})
    return await web.request(verb, address, params=rest_of_it, headers={**VERSION, **headers})


@dataclass
class Wrong:
    """A request that is refused, and why."""

    reason: str
    method: str
    request: ProtoMessage
    agent: str = "contract"
    headers: dict[str, str] = field(default_factory=dict)


def _send(**fields: Any) -> pb.SendMessageRequest:
    parts = fields.pop("parts", [pb.Part(text="echo x")])
    return pb.SendMessageRequest(
        message=pb.Message(message_id=uuid.uuid4().hex, role=pb.ROLE_USER, parts=parts, **fields)
    )


def provocations(done: str) -> list[Wrong]:
    """One for each error that a client can provoke; `done` is a task that has ended."""
    nobody = uuid.uuid4().hex
    named = {"A2A-Extensions": REQUIRED}
    image = [pb.Part(raw=b"GIF89a", media_type="image/gif")]
    return [
        Wrong("TASK_NOT_FOUND", "GetTask", pb.GetTaskRequest(id=nobody)),
        Wrong("TASK_NOT_FOUND", "SendMessage", _send(task_id=nobody)),
        Wrong("TASK_NOT_CANCELABLE", "CancelTask", pb.CancelTaskRequest(id=done)),
        Wrong(
            "PUSH_NOTIFICATION_NOT_SUPPORTED",
            "GetTaskPushNotificationConfig",
            pb.GetTaskPushNotificationConfigRequest(task_id=nobody, id="c"),
            agent="limited",
        ),
        Wrong("UNSUPPORTED_OPERATION", "SendMessage", _send(task_id=done)),
        Wrong("UNSUPPORTED_OPERATION", "GetExtendedAgentCard", pb.GetExtendedAgentCardRequest(), agent="limited"),
        Wrong("CONTENT_TYPE_NOT_SUPPORTED", "SendMessage", _send(parts=image), agent="strict", headers=named),
        Wrong(
            "EXTENDED_AGENT_CARD_NOT_CONFIGURED",
            "GetExtendedAgentCard",
            pb.GetExtendedAgentCardRequest(),
            agent="strict",
            headers=named,
        ),
        Wrong("EXTENSION_SUPPORT_REQUIRED", "SendMessage", _send(), agent="strict"),
        Wrong("VERSION_NOT_SUPPORTED", "ListTasks", pb.ListTasksRequest(), headers={"A2A-Version": "9.9"}),
        Wrong("INVALID_PARAMS", "SendMessage", _send(parts=[])),
        Wrong("INVALID_PARAMS", "ListTasks", pb.ListTasksRequest(page_size=500)),
    ]


def info_of(details: list[dict[str, Any]]) -> dict[str, Any]:
    """The one ErrorInfo among an error's details."""
    assert all("@type" in detail for detail in details)
    (info,) = [one for one in details if one["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"]
    assert info["domain"] == A2A_DOMAIN
    return info


async def test_errors_of_json_rpc_have_its_form(stage: Stage, web: httpx.AsyncClient, caller: Client) -> None:
    done = await stage.task(caller, "echo done")
    for wrong in provocations(done.id):
        reply = await rpc(web, wrong.method, wrong.request, agent=wrong.agent, **wrong.headers)
        body = reply.json()
        assert (body["jsonrpc"], body["id"], "result" in body) == ("2.0", "one", False), wrong
        assert body["error"]["code"] == A2A_ERRORS[wrong.reason].code, (wrong, body)
        assert body["error"]["message"]
        assert info_of(body["error"]["data"])["reason"] == wrong.reason


async def test_errors_of_http_and_json_have_its_form(stage: Stage, web: httpx.AsyncClient, caller: Client) -> None:
    done = await stage.task(caller, "echo done")
    for wrong in provocations(done.id):
        reply = await rest(web, wrong.method, wrong.request, agent=wrong.agent, **wrong.headers)
        error = reply.json()["error"]
        spec = A2A_ERRORS[wrong.reason]
        assert (reply.status_code, error["code"], error["status"]) == (spec.http, spec.http, spec.grpc), (wrong, error)
        assert error["message"]
        assert info_of(error["details"])["reason"] == wrong.reason


async def test_errors_of_grpc_have_its_form(stage: Stage, caller: Client) -> None:
    done = await stage.task(caller, "echo done")
    async with grpc.aio.insecure_channel(stage.gateway.grpc) as channel:
        stub: Any = a2a_pb2_grpc.A2AServiceStub(channel)  # type: ignore[no-untyped-call]
        for wrong in provocations(done.id):
            wrong.request.tenant = wrong.agent  # type: ignore[attr-defined]
            metadata = [(name.lower(), value) for name, value in {**VERSION, **wrong.headers}.items()]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub, wrong.method)(wrong.request, metadata=metadata)
            assert caught.value.code().name == A2A_ERRORS[wrong.reason].grpc, (wrong, caught.value)
            (packed,) = [v for k, v in caught.value.trailing_metadata() or () if k == "grpc-status-details-bin"]
            status = status_pb2.Status.FromString(packed)
            infos = [error_details_pb2.ErrorInfo() for _ in status.details]
            reasons = [i.reason for i, d in zip(infos, status.details, strict=True) if d.Unpack(i)]
            assert reasons == [wrong.reason]


async def test_wrong_fields_are_named_in_the_details(web: httpx.AsyncClient) -> None:
    for reply, path in (
        (await rpc(web, "SendMessage", _send(parts=[])), ("error", "data")),
        (await rest(web, "SendMessage", _send(parts=[])), ("error", "details")),
    ):
        details = reply.json()[path[0]][path[1]]
        (bad,) = [one for one in details if one["@type"] == "type.googleapis.com/google.rpc.BadRequest"]
        assert bad["fieldViolations"][0]["field"] == "message.parts"
        assert bad["fieldViolations"][0]["description"]


async def test_answers_of_json_rpc_have_its_form(web: httpx.AsyncClient) -> None:
    reply = await rpc(web, "SendMessage", _send())
    assert reply.status_code == 200
    assert reply.headers["content-type"].partition(";")[0] == "application/json"
    body = reply.json()
    assert set(body) == {"jsonrpc", "id", "result"}
    assert (body["jsonrpc"], body["id"], set(body["result"])) == ("2.0", "one", {"task"})
    unknown = (await rpc(web, "message/nothing", pb.ListTasksRequest())).json()
    assert unknown["error"]["code"] == -32601
    broken = await web.post(
        "contract", content=b'{"jsonrpc": ', headers={**VERSION, "content-type": "application/json"}
    )
    assert broken.json()["error"]["code"] == -32700
    no_request = await web.post("contract", json={"id": 1, "params": {}}, headers=VERSION)
    assert no_request.json()["error"]["code"] == -32600


async def test_json_is_written_as_proto_json_says(web: httpx.AsyncClient) -> None:
    task = (await rest(web, "SendMessage", _send(parts=[pb.Part(text="status")]))).json()["task"]
    assert task["status"]["state"] == "TASK_STATE_COMPLETED"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", task["status"]["timestamp"])
    assert task["history"][0]["role"] == "ROLE_USER"
    names = set(re.findall(r'"(\w+)":', json.dumps({**task, "metadata": {}})))
    assert {"contextId", "messageId", "artifactId"} <= names
    assert not [name for name in names if "_" in name]


async def test_unknown_fields_are_ignored(web: httpx.AsyncClient) -> None:
    body = plain(_send()) | {"fromTheFuture": {"a": 1}}
    body["message"]["unheardOf"] = True
    reply = await web.post("contract/message:send", json=body, headers=VERSION)
    assert reply.json()["task"]["status"]["state"] == "TASK_STATE_COMPLETED"


async def test_every_operation_has_its_method_and_path(stage: Stage, web: httpx.AsyncClient, caller: Client) -> None:
    task = await stage.task(caller, "ask")
    config = pb.TaskPushNotificationConfig(task_id=task.id, id="c", url="http://127.0.0.1:9/hook")
    requests: list[tuple[str, Any]] = [
        ("SendMessage", _send()),
        ("GetTask", pb.GetTaskRequest(id=task.id)),
        ("ListTasks", pb.ListTasksRequest(page_size=1)),
        ("CreateTaskPushNotificationConfig", config),
        ("GetTaskPushNotificationConfig", pb.GetTaskPushNotificationConfigRequest(task_id=task.id, id="c")),
        ("ListTaskPushNotificationConfigs", pb.ListTaskPushNotificationConfigsRequest(task_id=task.id)),
        ("DeleteTaskPushNotificationConfig", pb.DeleteTaskPushNotificationConfigRequest(task_id=task.id, id="c")),
        ("GetExtendedAgentCard", pb.GetExtendedAgentCardRequest()),
        ("CancelTask", pb.CancelTaskRequest(id=task.id)),
    ]
    for method, request in requests:
        reply = await rest(web, method, request)
        assert reply.status_code == 200, (method, reply.text)
        assert reply.headers["content-type"].partition(";")[0] in ("application/a2a+json", "application/json")
    for method, request in [*requests[:-1], ("ListTasks", pb.ListTasksRequest())]:
        answer = (await rpc(web, method, request)).json()
        assert "result" in answer, (method, answer)


async def test_query_parameters_are_in_camel_case(stage: Stage, web: httpx.AsyncClient, caller: Client) -> None:
    context = f"query-{uuid.uuid4()}"
    for n in range(3):
        await stage.task(caller, f"echo {n}", context_id=context)
    query = {"contextId": context, "pageSize": "2", "historyLength": "0", "includeArtifacts": "true"}
    first = (await web.get("contract/tasks", params=query, headers=VERSION)).json()
    assert (len(first["tasks"]), first["totalSize"], first["pageSize"]) == (2, 3, 2)
    assert first["tasks"][0]["artifacts"]
    query["pageToken"] = first["nextPageToken"]
    second = (await web.get("contract/tasks", params=query, headers=VERSION)).json()
    assert (len(second["tasks"]), second["nextPageToken"]) == (1, "")
    one = first["tasks"][0]["id"]
    shown = (await web.get(f"contract/tasks/{one}", params={"historyLength": "1"}, headers=VERSION)).json()
    assert len(shown["history"]) == 1


async def _events(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.status_code == 200
    assert reply.headers["content-type"].partition(";")[0] == "text/event-stream"
    return [json.loads(line[5:]) async for line in reply.aiter_lines() if line.startswith("data:")]


async def test_streams_are_server_sent_events(stage: Stage, web: httpx.AsyncClient) -> None:
    body = {"jsonrpc": "2.0", "id": 7, "method": "SendStreamingMessage", "params": plain(_send())}
    async with web.stream("POST", "contract", json=body, headers=VERSION) as reply:
        wrapped = await _events(reply)
    assert {(event["jsonrpc"], event["id"]) for event in wrapped} == {("2.0", 7)}
    async with web.stream("POST", "contract/message:stream", json=plain(_send()), headers=VERSION) as reply:
        bare = await _events(reply)
    for events in ([event["result"] for event in wrapped], bare):
        assert [set(event) <= {"task", "statusUpdate", "artifactUpdate"} for event in events] == [True] * len(events)
        assert "task" in events[0]
        assert events[-1]["statusUpdate"]["status"]["state"] == "TASK_STATE_COMPLETED"


async def test_a_grpc_stream_is_a_server_stream(stage: Stage) -> None:
    async with grpc.aio.insecure_channel(stage.gateway.grpc) as channel:
        stub: Any = a2a_pb2_grpc.A2AServiceStub(channel)  # type: ignore[no-untyped-call]
        request = _send()
        request.tenant = "contract"
        items = [item async for item in stub.SendStreamingMessage(request, metadata=[("a2a-version", "1.0")])]
    assert items[0].HasField("task")
    assert items[-1].status_update.status.state == pb.TASK_STATE_COMPLETED


async def test_without_a_version_it_is_0_3(stage: Stage, web: httpx.AsyncClient) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": {"id": uuid.uuid4().hex}}
    reply = (await web.post("contract", json=body)).json()
    assert reply["error"]["code"] in (-32601, -32009)
    old = {"jsonrpc": "2.0", "id": 1, "method": "tasks/get", "params": {"id": uuid.uuid4().hex}}
    assert (await web.post("contract", json=old)).json()["error"]["code"] == -32001


async def test_activated_extensions_are_echoed(web: httpx.AsyncClient) -> None:
    asked = "https://example.com/extensions/notes/v1"
    headers = {"A2A-Extensions": f"{asked},https://example.com/unknown"}
    for reply in (
        await rpc(web, "SendMessage", _send(), **headers),
        await rest(web, "SendMessage", _send(), **headers),
    ):
        assert reply.headers["a2a-extensions"] == asked


async def test_the_card_can_be_kept_and_asked_for_again(web: httpx.AsyncClient) -> None:
    path = "contract/.well-known/agent-card.json"
    first = await web.get(path)
    assert first.status_code == 200
    assert re.search(r"max-age=\d+", first.headers["cache-control"])
    assert "last-modified" in first.headers
    again = await web.get(path, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_nothing_internal_is_told(web: httpx.AsyncClient) -> None:
    for content in (b"\xff\xfe", b"[" * 5000, b'{"message": {"parts": 7}}', b"null"):
        reply = await web.post(
            "contract/message:send", content=content, headers={**VERSION, "content-type": "application/json"}
        )
        assert reply.status_code == 400
        assert not re.search(r"Traceback|\.py\b|google\.protobuf|json_format|0x[0-9a-f]{6}", reply.text)


async def test_a_tenants_tasks_are_its_own(web: httpx.AsyncClient) -> None:
    made = await web.post("contract/acme/message:send", json=plain(_send()), headers=VERSION)
    task = made.json()["task"]["id"]
    assert (await web.get(f"contract/acme/tasks/{task}", headers=VERSION)).status_code == 200
    for other in (f"contract/tasks/{task}", f"contract/umbrella/tasks/{task}"):
        assert (await web.get(other, headers=VERSION)).status_code == 404
