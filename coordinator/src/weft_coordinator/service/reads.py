"""The A2A operations that read, answered on `mesh.rpc.{agent}.{method}.{caller}`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from a2a.types import a2a_pb2 as pb
from google.protobuf.message import Message as ProtoMessage

from weft.core.broker import Broker
from weft_coordinator.decide import listing
from weft_coordinator.decide import task as tasks
from weft_coordinator.decide.index import Entry
from weft_coordinator.decide.listing import Listed, Query, Selection
from weft_coordinator.service import push
from weft_coordinator.service.cards import CardService
from weft_coordinator.shell.fit import fit
from weft_coordinator.shell.projection import Projection
from weft_coordinator.shell.tail import Tail
from weft_coordinator.shell.tasks import TaskReader
from weft_protocols import a2a, events, ids, subjects
from weft_protocols import headers as h
from weft_protocols.errors import (
    FieldViolation,
    InternalError,
    InvalidParams,
    MethodNotFound,
    TaskNotCancelable,
    TaskNotFound,
    TooLarge,
    UnsupportedOperation,
)
from weft_protocols.states import State
from weft_protocols.subjects import TASK_ID

AT_ONCE: Final = 16
"""Tasks of one page read at the same time."""
HEADROOM: Final = 8 * 1024
"""Bytes of a reply left to its headers."""
AGENT: Final = "Weft-Agent"
"""Header of an answer: the agent of its task."""
AGENTS: Final = "Weft-Agents"
"""Header of a list: the agent of each task, in order, separated by commas."""
CATCH_UP: Final = 3
"""Times a list reads on for a token of another replica that had read further."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request; the caller is the account the broker let it through for."""

    agent: str
    method: str
    caller: str
    headers: dict[str, str]
    data: bytes

    @property
    def content_type(self) -> str:
        """Encoding of the body."""
        return self.headers.get("content-type", h.PROTOBUF)

    @property
    def answer_type(self) -> str:
        """Encoding of the answer: what is accepted, else that of the request."""
        wanted = self.headers.get("accept") or self.content_type
        return h.JSON if wanted.partition(";")[0].strip().lower() in (h.JSON, "application/a2a+json") else h.PROTOBUF

    def size(self, message: pb.Task) -> int:
        """Bytes a task takes in the answer."""
        return message.ByteSize() if self.answer_type == h.PROTOBUF else len(a2a.encode(message, self.answer_type))


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply's body and headers."""

    data: bytes
    headers: dict[str, str]


class Reads:
    """Answers reads out of the projection and the stream, each only to the caller the task belongs to."""

    def __init__(
        self, broker: Broker, projection: Projection, tail: Tail, reader: TaskReader, *, cards: CardService
    ) -> None:
        self._broker = broker
        self._index = projection.index
        self._store = projection.store
        self._tail = tail
        self._reader = reader
        self._cards = cards
        self._push = push.PushConfigs(broker)
        self._methods: dict[str, Callable[[Request], Awaitable[Answer]]] = {
            "GetTask": self._get,
            "ListTasks": self._list,
            "SubscribeToTask": self._subscribe,
            "CancelTask": self._cancel,
            "GetExtendedAgentCard": self._extended_card,
        }

    async def answer(self, request: Request) -> Answer:
        """The answer to a request. Raises the A2A error to answer with instead."""
        a2a.check_version(request.headers.get("a2a-version", ""))
        method = self._methods.get(request.method)
        if method is not None:
            return await method(request)
        if request.method in push.METHODS:
            return _encoded(request, await self._push.answer(request, partial(self._entry, request)), {})
        if request.method in ("SendMessage", "SendStreamingMessage"):
            raise UnsupportedOperation(
                f"{request.method} is a durable message on {subjects.GRAMMAR['task'].wildcard}, not a request"
            )
        raise MethodNotFound(f"there is no operation {request.method}")

    # GetTask -----------------------------------------------------------------------------------

    async def _get(self, request: Request) -> Answer:
        asked = a2a.decode(pb.GetTaskRequest, request.data, request.content_type)
        length = asked.history_length if asked.HasField("history_length") else None
        if length is not None and length < 0:
            wrong = FieldViolation("history_length", f"{length} is negative")
            raise InvalidParams(f"GetTask: history_length: {wrong.description}", violations=(wrong,))
        entry = await self._entry(request, asked.id)
        return await self._task(request, entry, history_length=length)

    async def _task(self, request: Request, entry: Entry, *, history_length: int | None = None) -> Answer:
        found = await self._reader.task(entry, history=history_length != 0)
        task = await self._fit(request, tasks.trim(found.task, history_length=history_length))
        return _encoded(request, task, {h.EVENT: str(found.events), AGENT: entry.agent})

    async def _entry(self, request: Request, task_id: str) -> Entry:
        """The task, as the index has it after reading on if need be. TaskNotFound for one of another caller."""
        if not task_id:
            wrong = FieldViolation("id", "missing")
            raise InvalidParams(f"{request.method}: the task's id is missing", violations=(wrong,))
        if not TASK_ID.match(task_id):
            raise TaskNotFound(f"there is no task {task_id[:64]}")
        entry = await self._find(request, task_id)
        if entry is None or not entry.last:
            await self._tail.sync()
            entry = await self._find(request, task_id)
        if entry is None:
            raise TaskNotFound(f"there is no task {task_id}")
        return entry

    async def _find(self, request: Request, task_id: str) -> Entry | None:
        """In memory, else in the file."""
        entry = self._index.find(request.agent, task_id, caller=request.caller)
        if (entry is None or not entry.created) and self._index.partial:
            entry = await self._store.find(request.agent, task_id, caller=request.caller) or entry
        return entry

    async def _fit(self, request: Request, task: pb.Task) -> pb.Task:
        try:
            return await fit(self._broker, task, limit=self._room, size=request.size)
        except TooLarge as error:
            raise InternalError(str(error)) from error

    @property
    def _room(self) -> int:
        return self._broker.max_payload - HEADROOM

    # ListTasks ---------------------------------------------------------------------------------

    async def _list(self, request: Request) -> Answer:
        asked = a2a.decode(pb.ListTasksRequest, request.data, request.content_type)
        query = listing.query(asked, agent=request.agent, caller=request.caller)
        await self._read_as_far(query)
        selection = await self._store.page(query, now=self._index.watermark)
        length = asked.history_length if asked.HasField("history_length") else 0
        page, agents = await self._page(
            request, selection.tasks, history_length=length, artifacts=asked.include_artifacts
        )
        return _encoded(
            request,
            pb.ListTasksResponse(
                tasks=page,
                next_page_token=_next(query, selection, len(page)),
                page_size=query.size,
                total_size=selection.total,
            ),
            {AGENTS: ",".join(agents)},
        )

    async def _read_as_far(self, query: Query) -> None:
        """Bring the index up to date, at least to where the replica had read that made the first page."""
        for _ in range(CATCH_UP):
            await self._tail.sync()
            if query.seen is None or self._index.watermark.covers(query.seen):
                return
        wrong = FieldViolation("page_token", "it names messages that are not in this mesh; begin again without a token")
        raise InvalidParams(f"ListTasks: page_token: {wrong.description}", violations=(wrong,))

    async def _page(
        self, request: Request, chosen: tuple[Listed, ...], *, history_length: int, artifacts: bool
    ) -> tuple[list[pb.Task], list[str]]:
        """As many of the chosen tasks, from the first on, as fit into a reply, and their agents."""
        page: list[pb.Task] = []
        agents: list[str] = []
        room, names = self._room, h.MAX_BLOCK - 256
        for begin in range(0, len(chosen), AT_ONCE):
            group = chosen[begin : begin + AT_ONCE]
            async with asyncio.TaskGroup() as reading:
                reads = [
                    reading.create_task(self._reader.listed(one, history=history_length != 0, artifacts=artifacts))
                    for one in group
                ]
            for one, read in zip(group, reads, strict=True):
                trimmed = tasks.trim(read.result(), history_length=history_length, artifacts=artifacts)
                task = await self._fit(request, trimmed)
                room -= request.size(task) + 8
                names -= len(one.entry.agent) + 1
                if page and (room < 0 or names < 0):
                    return page, agents
                page.append(task)
                agents.append(one.entry.agent)
        return page, agents

    # SubscribeToTask ---------------------------------------------------------------------------

    async def _subscribe(self, request: Request) -> Answer:
        asked = a2a.decode(pb.SubscribeToTaskRequest, request.data, request.content_type)
        after = request.headers.get("weft-event", "0")
        if not after.isascii() or not after.isdigit() or len(after) > 18:
            raise InvalidParams(f"SubscribeToTask: {h.EVENT} is {after[:32]!r}; it must be the number of an event")
        entry = await self._entry(request, asked.id)
        page = events.pack(await self._reader.after(entry, int(after)))
        return Answer(page, {AGENT: entry.agent})

    # CancelTask --------------------------------------------------------------------------------

    async def _cancel(self, request: Request) -> Answer:
        """Forward the cancel to the task's input lane, on behalf of its caller; the task as it is then."""
        asked = a2a.decode(pb.CancelTaskRequest, request.data, request.content_type)
        entry = await self._entry(request, asked.id)
        if not entry.ended:
            await self._tail.sync()
        if entry.ended:
            raise TaskNotCancelable(f"task {entry.task} has ended as {State(entry.state).label}")
        subject = subjects.input(entry.agent, ids.slice_of(entry.context), entry.caller, entry.task)
        origin = request.headers.get("weft-origin", "")
        values = {h.VERSION: h.A2A_VERSION, h.METHOD: "CancelTask"}
        values[h.ORIGIN] = origin if subjects.TOKEN.match(origin) else "none"
        block = h.block(h.fields(values))
        await self._broker.publish(subject, asked.SerializeToString(), headers=block)
        return await self._task(request, entry)

    # GetExtendedAgentCard ----------------------------------------------------------------------

    async def _extended_card(self, request: Request) -> Answer:
        a2a.decode(pb.GetExtendedAgentCardRequest, request.data, request.content_type)
        return _encoded(request, await self._cards.extended(request.agent), {})


def _encoded(request: Request, message: ProtoMessage, headers: dict[str, str]) -> Answer:
    content_type = request.answer_type
    if content_type != h.PROTOBUF:
        headers[h.CONTENT_TYPE] = content_type
    return Answer(a2a.encode(message, content_type), headers)


def _next(query: Query, selection: Selection, shown: int) -> str:
    """Token of the next page; empty on the last."""
    if not shown or (shown == len(selection.tasks) and not selection.more):
        return ""
    return listing.token(query, selection, last=selection.tasks[shown - 1])
