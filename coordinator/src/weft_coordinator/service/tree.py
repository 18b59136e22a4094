"""A task as a whole: the delegation tree around it, as much of it as the caller may see, and all its messages."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any, Final

from weft.core.broker import Stored
from weft_coordinator.decide.index import ANY_AGENT, Entry
from weft_coordinator.decide.registry import Fields
from weft_coordinator.service.part import Body, Handler, Part
from weft_coordinator.shell.projection import Projection
from weft_coordinator.shell.tail import Tail
from weft_protocols import subjects
from weft_protocols.errors import A2AError, InvalidParams, PermissionDenied, TaskNotFound
from weft_protocols.events import read_stored
from weft_protocols.states import State

NODES: Final = 1000
"""Tasks of one answer."""
DEPTH: Final = 64
"""Ancestors that are looked for."""
PAGE: Final = 500
"""Messages of one answer."""
PAGE_BYTES: Final = 400_000
"""Bytes of them; an answer in base64 has a third more."""
TEXT: Final = 200
"""Characters of a status that are shown."""


class Trees(Part):
    """The operations `tree` and `messages`."""

    def __init__(self, projection: Projection, tail: Tail) -> None:
        self._index = projection.index
        self._store = projection.store
        self._tail = tail

    @property
    def operations(self) -> Mapping[str, Handler]:
        """By name."""
        return {"tree": self._tree, "messages": self._messages}

    async def _tree(self, body: Body, caller: str) -> dict[str, Any]:
        """The tree from the highest ancestor the caller sent or works on down: parents come before their children.

        The first node is the root; it has no parent here, whatever is above it for others to see.
        """
        fields = Fields(body)
        task = fields.text("task")
        fields.check("tree")
        if not subjects.TASK_ID.match(task):
            raise InvalidParams(f"tree: task {task[:64]!r} is not 32 lower-case hex digits")
        await self._tail.sync()
        entry = await self._find(ANY_AGENT, task)
        line = await self._ancestors(entry) if entry is not None else []
        seen = [one for one in line if caller in (subjects.OPERATOR, one.caller, one.agent)]
        if not seen:
            raise TaskNotFound(f"there is no task {task}")
        nodes, more = await self._below(seen[-1])
        told = await self._store.messages_at([one.seq for one in nodes if one.status])
        shown = [_node(one, told.get(one.seq)) for one in nodes]
        shown[0]["parent"] = None
        return {"root": _name(seen[-1]), "nodes": shown, "more": more}

    async def _messages(self, body: Body, caller: str) -> dict[str, Any]:
        """What is stored about a task, wherever it is: creating message, inputs, claims, events and steps, in order.

        For the operator, since steps are the agent's own. `after` is the sequence of the last message of the page
        before. Headers and data are in base64; data that does not fit into an answer is left out (null).
        """
        if caller != subjects.OPERATOR:
            raise PermissionDenied(
                f"messages is for the operator of the mesh; connect with identity {subjects.OPERATOR}"
            )
        fields = Fields(body)
        task, after = fields.text("task"), fields.number("after", default=0)
        fields.check("messages")
        await self._tail.sync()
        batch = await self._store.of_task(task, after=after, count=PAGE, size=PAGE_BYTES)
        shown = [
            {
                "seq": one.seq,
                "subject": one.subject,
                "time": one.time,
                "headers": base64.b64encode(one.headers or b"").decode(),
                "data": base64.b64encode(one.data).decode() if len(one.data) <= PAGE_BYTES else None,
                "size": len(one.data),
            }
            for one in batch.messages
        ]
        return {"messages": shown, "more": batch.more}

    async def _find(self, agent: str, task: str) -> Entry | None:
        """In memory, else in the file."""
        entry = self._index.find(agent, task, caller=subjects.OPERATOR)
        if entry is None or not entry.created:
            entry = await self._store.find(agent, task, caller=subjects.OPERATOR) or entry
        return entry

    async def _ancestors(self, entry: Entry) -> list[Entry]:
        """A task, its parent, and so on."""
        line = [entry]
        while len(line) < DEPTH and line[-1].parent is not None:
            above = await self._find(*line[-1].parent)
            if above is None or above.key in {one.key for one in line}:
                break
            line.append(above)
        return line

    async def _below(self, root: Entry) -> tuple[list[Entry], bool]:
        """A task and its descendants, level by level; whether there are more than fit."""
        nodes = {root.key: root}
        level = [root]
        while level:
            keys = {one.key for one in level}
            found = await self._store.children([one.task for one in level])
            level = [one for one in found if one.parent in keys and one.key not in nodes]
            nodes |= {one.key: one for one in level}
            if len(nodes) > NODES:
                return list(nodes.values())[:NODES], True
        return list(nodes.values()), False


def _name(entry: Entry) -> dict[str, str]:
    return {"agent": entry.agent, "task": entry.task}


def _node(entry: Entry, status: Stored | None) -> dict[str, Any]:
    parent = entry.parent
    return {
        **_name(entry),
        "state": State(entry.state).label,
        "parent": {"agent": parent[0], "task": parent[1]} if parent is not None else None,
        "caller": entry.caller,
        "context": entry.context,
        "created": (entry.created or entry.time) // 1_000_000,
        "updated": max(entry.last_time, entry.created) // 1_000_000,
        "text": _text(entry, status) if status is not None else "",
    }


def _text(entry: Entry, stored: Stored) -> str:
    """What the event said that brought the task into its state, cut to `TEXT` characters."""
    for event in read_stored(stored.data, stored.headers, seq=stored.seq):
        if event.n != entry.status:
            continue
        try:
            proto = event.decode()
        except A2AError:
            return ""
        message = proto.message if proto.HasField("message") else proto.status_update.status.message
        return _short(part.text for part in message.parts if part.text)
    return ""


def _short(texts: Iterable[str]) -> str:
    text = " ".join(" ".join(texts).split())
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"
