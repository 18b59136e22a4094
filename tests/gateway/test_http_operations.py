"""JSON-RPC and HTTP+JSON, operation by operation, as bytes on a socket."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from a2a.types import a2a_pb2 as pb

from weft.client.operations import Operations
from weft.testing.agents import eventually

if TYPE_CHECKING:
    from tests.gateway.conftest import Served, Worker

pytestmark = pytest.mark.anyio

PUSH_URL = "https://example.com/hook"


def message(text: str, **more: Any) -> dict[str, Any]:
    return {"messageId": uuid.uuid4().hex, "role": "ROLE_USER", "parts": [{"text": text}], **more}


class Rpc:
    """Results of JSON-RPC calls."""

    def __init__(self, http: httpx.AsyncClient, agent: str) -> None:
        self.http = http
        self.agent = agent

    async def __call__(self, method: str, **params: Any) -> Any:
        body = {"jsonrpc": "2.0", "id": "r1", "method": method, "params": params}
        response = await self.http.post(f"/agents/{self.agent}", json=body)
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        answer = response.json()
        assert answer["id"] == "r1"
        assert answer["jsonrpc"] == "2.0"
        assert "error" not in answer, answer
        return answer["result"]


@pytest.fixture
def rpc(http: httpx.AsyncClient, worker: Worker) -> Rpc:
    return Rpc(http, worker.name)


async def begun(worker: Worker, count: int = 1) -> None:
    await eventually(lambda: len(worker.started) >= count)


# JSON-RPC --------------------------------------------------------------------------------------------


async def test_a_message_is_answered_over_json_rpc(rpc: Rpc) -> None:
    result = await rpc("SendMessage", message=message("hello", contextId="c-1"))

    task = result["task"]
    assert task["status"]["state"] == "TASK_STATE_COMPLETED"
    assert task["contextId"] == "c-1"
    assert task["artifacts"][0]["parts"][0]["text"] == "HELLO"


async def test_the_path_with_a_slash_at_its_end_is_the_same(http: httpx.AsyncClient, worker: Worker) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {"message": message("hello")}}
    response = await http.post(f"/agents/{worker.name}/", json=body)
    assert response.json()["result"]["task"]["artifacts"][0]["parts"][0]["text"] == "HELLO"


async def test_the_same_message_twice_is_one_task(rpc: Rpc, worker: Worker) -> None:
    sent = message("hello")
    first, second = await asyncio.gather(rpc("SendMessage", message=sent), rpc("SendMessage", message=sent))
    assert first["task"]["id"] == second["task"]["id"]
    assert len(worker.started) == 1


async def test_a_task_is_had_listed_and_canceled_over_json_rpc(rpc: Rpc, worker: Worker) -> None:
    context = uuid.uuid4().hex
    sent = await rpc(
        "SendMessage", message=message("gate", contextId=context), configuration={"returnImmediately": True}
    )
    task_id = sent["task"]["id"]
    assert sent["task"]["status"]["state"] == "TASK_STATE_SUBMITTED"
    await begun(worker)

    async def working() -> Any:
        found = await rpc("GetTask", id=task_id)
        return found if found["status"]["state"] == "TASK_STATE_WORKING" else None

    found = await eventually(working)
    assert found["id"] == task_id

    listed = await rpc("ListTasks", contextId=context)
    assert [task["id"] for task in listed["tasks"]] == [task_id]
    assert "artifacts" not in listed["tasks"][0]
    assert listed["nextPageToken"] == ""
    assert listed["totalSize"] == 1
    assert listed["pageSize"] == 50

    canceled = await rpc("CancelTask", id=task_id)
    assert canceled["status"]["state"] == "TASK_STATE_CANCELED"


async def test_history_is_as_long_as_asked_for(rpc: Rpc) -> None:
    task = (await rpc("SendMessage", message=message("chunks 3")))["task"]
    assert "history" not in await rpc("GetTask", id=task["id"], historyLength=0)
    assert len((await rpc("GetTask", id=task["id"], historyLength=2))["history"]) == 2


async def test_a_question_is_answered_in_the_same_task(rpc: Rpc) -> None:
    asked = (await rpc("SendMessage", message=message("ask")))["task"]
    assert asked["status"]["state"] == "TASK_STATE_INPUT_REQUIRED"
    # Without its context: the gateway's side knows it.
    answered = (await rpc("SendMessage", message=message("red", taskId=asked["id"])))["task"]
    assert answered["id"] == asked["id"]
    assert answered["contextId"] == asked["contextId"]
    assert answered["artifacts"][0]["parts"][0]["text"] == "a red one"


async def test_data_and_files_keep_their_form(rpc: Rpc) -> None:
    data = (await rpc("SendMessage", message=message("data")))["task"]["artifacts"][0]["parts"][0]
    assert data["data"] == {"number": 1, "nested": {"list": [1, "two", None]}}
    file = (await rpc("SendMessage", message=message("file")))["task"]["artifacts"][0]["parts"][0]
    assert base64.b64decode(file["raw"]) == b"\x00\x01binary"
    assert file["filename"] == "answer.bin"
    assert file["mediaType"] == "application/octet-stream"


async def test_text_of_every_script_comes_back(rpc: Rpc) -> None:
    text = "ßtraße 漢字 🧵 \u2028 \r\n"
    task = (await rpc("SendMessage", message=message(text)))["task"]
    assert task["artifacts"][0]["parts"][0]["text"] == text.upper()


async def test_a_client_that_does_not_wait_finds_a_task_although_nobody_works(
    rpc: Rpc, http: httpx.AsyncClient
) -> None:
    sent = await rpc("SendMessage", message=message("hold"), configuration={"returnImmediately": True})
    found = await rpc("GetTask", id=sent["task"]["id"])
    assert found["status"]["state"] in ("TASK_STATE_SUBMITTED", "TASK_STATE_WORKING")


# HTTP+JSON -------------------------------------------------------------------------------------------


async def test_a_message_is_answered_over_http_and_json(http: httpx.AsyncClient, worker: Worker) -> None:
    response = await http.post(
        f"/agents/{worker.name}/message:send",
        json={"message": message("hello")},
        headers={"content-type": "application/a2a+json"},
    )
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/a2a+json"
    assert response.json()["task"]["artifacts"][0]["parts"][0]["text"] == "HELLO"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"content-type": "application/json"}, "application/json"),
        ({"content-type": "application/json; charset=utf-8"}, "application/json"),
        ({"content-type": "application/a2a+json"}, "application/a2a+json"),
        ({"content-type": "application/json", "accept": "application/a2a+json"}, "application/a2a+json"),
        ({"content-type": "application/a2a+json", "accept": "application/json"}, "application/json"),
    ],
)
async def test_an_answer_is_of_the_type_the_client_speaks(
    http: httpx.AsyncClient, worker: Worker, headers: dict[str, str], expected: str
) -> None:
    response = await http.post(f"/agents/{worker.name}/message:send", json={"message": message("x")}, headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == expected


async def test_a_task_is_had_listed_and_canceled_over_http_and_json(http: httpx.AsyncClient, worker: Worker) -> None:
    base, context = f"/agents/{worker.name}", uuid.uuid4().hex
    request = {"message": message("gate", contextId=context), "configuration": {"returnImmediately": True}}
    task_id = (await http.post(f"{base}/message:send", json=request)).json()["task"]["id"]
    await begun(worker)

    async def found() -> Any:
        response = await http.get(f"{base}/tasks/{task_id}", params={"historyLength": 1})
        return response if response.json()["status"]["state"] == "TASK_STATE_WORKING" else None

    response = await eventually(found)
    assert response.headers["content-type"] == "application/a2a+json"

    listed = (await http.get(f"{base}/tasks", params={"contextId": context, "pageSize": 5})).json()
    assert [task["id"] for task in listed["tasks"]] == [task_id]
    assert listed["pageSize"] == 5

    canceled = await http.post(f"{base}/tasks/{task_id}:cancel")
    assert canceled.status_code == 200
    assert canceled.json()["status"]["state"] == "TASK_STATE_CANCELED"


async def test_push_configurations_are_made_had_listed_and_deleted(
    http: httpx.AsyncClient, start_worker: Callable[..., Any], served: Served
) -> None:
    async with start_worker(served, card={"capabilities": {"pushNotifications": True}}) as worker:
        rpc, base = Rpc(http, worker.name), f"/agents/{worker.name}"
        request = {"message": message("gate"), "configuration": {"returnImmediately": True}}
        task_id = (await http.post(f"{base}/message:send", json=request)).json()["task"]["id"]

        url = f"{base}/tasks/{task_id}/pushNotificationConfigs"
        first = (await http.post(url, json={"url": PUSH_URL, "id": "one"})).json()
        assert (first["taskId"], first["id"], first["url"]) == (task_id, "one", PUSH_URL)
        second = await rpc("CreateTaskPushNotificationConfig", taskId=task_id, url=PUSH_URL, id="two")
        assert second["id"] == "two"

        assert (await http.get(f"{url}/two")).json()["id"] == "two"
        assert (await rpc("GetTaskPushNotificationConfig", taskId=task_id, id="one"))["id"] == "one"
        assert {one["id"] for one in (await http.get(url)).json()["configs"]} == {"one", "two"}
        assert (await http.delete(f"{url}/one")).status_code == 200
        assert await rpc("DeleteTaskPushNotificationConfig", taskId=task_id, id="two") is None
        assert not (await rpc("ListTaskPushNotificationConfigs", taskId=task_id)).get("configs")


async def test_the_extended_card_is_had_in_both_bindings(
    http: httpx.AsyncClient, start_worker: Callable[..., Any], served: Served
) -> None:
    options = {"card": {"capabilities": {"extendedAgentCard": True}}, "extended_card": {"description": "All of it"}}
    async with start_worker(served, **options) as worker:
        over_rest = (await http.get(f"/agents/{worker.name}/extendedAgentCard")).json()
        assert over_rest["description"] == "All of it"
        assert await Rpc(http, worker.name)("GetExtendedAgentCard") == over_rest


async def test_metadata_of_a_cancel_gets_through_over_http_and_json(
    http: httpx.AsyncClient, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[pb.CancelTaskRequest] = []

    async def cancel(self: Operations, agent: str, request: pb.CancelTaskRequest, call: Any) -> pb.Task:
        seen.append(request)
        return pb.Task(id=request.id)

    monkeypatch.setattr(Operations, "cancel_task", cancel)
    url = f"/agents/{worker.name}/tasks/t-1:cancel"
    assert (await http.post(url, json={"metadata": {"reason": "enough"}})).status_code == 200
    assert dict(seen[0].metadata) == {"reason": "enough"}
    assert (await http.post(url, json={"metadata": 5})).status_code == 400


async def test_tenants_do_not_see_each_others_tasks(http: httpx.AsyncClient, worker: Worker) -> None:
    base = f"/agents/{worker.name}"
    sent = (await http.post(f"{base}/blue/message:send", json={"message": message("hello")})).json()["task"]

    assert (await http.get(f"{base}/blue/tasks/{sent['id']}")).status_code == 200
    assert (await http.get(f"{base}/red/tasks/{sent['id']}")).status_code == 404
    assert (await http.get(f"{base}/tasks/{sent['id']}")).status_code == 404
    body = {"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": {"id": sent["id"], "tenant": "blue"}}
    assert (await http.post(base, json=body)).json()["result"]["id"] == sent["id"]


async def test_the_version_may_stand_in_the_query(served: Any, worker: Worker) -> None:
    async with httpx.AsyncClient(base_url=served.url) as client:
        response = await client.get(f"/agents/{worker.name}/tasks", params={"A2A-Version": "1.0"})
    assert response.status_code == 200
