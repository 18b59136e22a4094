"""What carries the conformance kit's calls over NATS: the A2A SDK's own client transport interface, ours behind it.

Reads `{"id", "method", "params"}` a line, writes `{"id", "result"}` or `{"id", "error"}`, for a stream a line an event
and `{"id", "end": true}`. Ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import JSON_RPC_ERROR_CODE_MAP, A2AError
from google.protobuf import json_format
from google.protobuf.message import Message

import weft
import weft.a2a
from weft.client.cards import CardDirectory
from weft.client.operations import Operations

AGENT = os.environ.get("WEFT_TCK_AGENT", "conformance")
UNARY: dict[str, tuple[type[Message], str]] = {
    "SendMessage": (pb.SendMessageRequest, "send_message"),
    "GetTask": (pb.GetTaskRequest, "get_task"),
    "ListTasks": (pb.ListTasksRequest, "list_tasks"),
    "CancelTask": (pb.CancelTaskRequest, "cancel_task"),
    "CreateTaskPushNotificationConfig": (pb.TaskPushNotificationConfig, "create_task_push_notification_config"),
    "GetTaskPushNotificationConfig": (pb.GetTaskPushNotificationConfigRequest, "get_task_push_notification_config"),
    "ListTaskPushNotificationConfigs": (
        pb.ListTaskPushNotificationConfigsRequest,
        "list_task_push_notification_configs",
    ),
    "DeleteTaskPushNotificationConfig": (
        pb.DeleteTaskPushNotificationConfigRequest,
        "delete_task_push_notification_config",
    ),
    "GetExtendedAgentCard": (pb.GetExtendedAgentCardRequest, "get_extended_agent_card"),
}
STREAMS: dict[str, tuple[type[Message], str]] = {
    "SendStreamingMessage": (pb.SendMessageRequest, "send_message_streaming"),
    "SubscribeToTask": (pb.SubscribeToTaskRequest, "subscribe"),
}


def say(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def plain(message: Message | None) -> dict[str, Any]:
    return {} if message is None else json_format.MessageToDict(message)


def error(failed: Exception) -> dict[str, Any]:
    if isinstance(failed, A2AError):
        return {"code": JSON_RPC_ERROR_CODE_MAP.get(type(failed), -32603), "message": str(failed), "data": failed.data}
    if isinstance(failed, json_format.ParseError):
        return {"code": -32602, "message": str(failed)}
    return {"code": -32603, "message": f"{type(failed).__name__}: {failed}"}


async def answer(transport: weft.a2a.NatsTransport, asked: dict[str, Any]) -> None:
    number, method = asked["id"], asked["method"]
    try:
        kind, name = (UNARY | STREAMS)[method]
        request = json_format.ParseDict(asked["params"], kind())
        if method in UNARY:
            say({"id": number, "result": plain(await getattr(transport, name)(request))})
            return
        async for event in getattr(transport, name)(request):
            say({"id": number, "result": plain(event)})
        say({"id": number, "end": True})
    except Exception as failed:  # noqa: BLE001 - whatever it is, the kit is told
        say({"id": number, "error": error(failed)})


async def main() -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with weft.connect("local") as mesh, asyncio.TaskGroup() as calls:
        directory = CardDirectory(mesh.broker, mesh.caller)
        card = await directory.card(AGENT)
        transport = weft.a2a.NatsTransport(Operations(mesh, directory), card, AGENT)
        running = set[asyncio.Task[None]]()
        while line := await lines.readline():
            call = calls.create_task(answer(transport, json.loads(line)))
            running.add(call)
            call.add_done_callback(running.discard)
        for call in running:
            call.cancel()  # streams that nobody reads any more


if __name__ == "__main__":
    asyncio.run(main())
