"""What of an outside task has been passed on, so that of the same task, read again, only what is new is.

Ids are those of the mesh's task; everything else stays as the outside agent sent it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from a2a.types import a2a_pb2 as pb

from weft.host.turns import Turn
from weft_protocols.errors import InvalidAgentResponse
from weft_protocols.states import State

REMOTE: Final = "remote"
"""Key of the record that names the outside task."""
RELAYED: Final = "relayed"
"""Key of the record of what was passed on in a turn; its last version counts."""
INTERVAL: Final = 1.0
"""Seconds between two such records while only chunks of artifacts pass."""


@dataclass(slots=True)
class _Sent:
    """An artifact as it was passed on."""

    count: int = 0
    digest: str = ""
    """Over its parts, one after the other."""
    sure: bool = True
    """False after a takeover, until it is passed on again: the log may have more of it than is known."""

    def add(self, parts: Iterable[pb.Part]) -> None:
        """Parts that follow."""
        for part in parts:
            self.count += 1
            self.digest = _chained(self.digest, part)


class Relay:
    """Passes one outside task on to the mesh's task of a turn.

    Use `open`: it reads what an earlier attempt at the turn has passed on.
    """

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.task_id = ""
        """The outside task; empty as long as it is unknown."""
        self.context_id = ""
        self._messages: set[str] = set()
        self._artifacts: dict[str, _Sent] = {}
        self._state = pb.TASK_STATE_UNSPECIFIED
        self._noted = 0.0

    @classmethod
    async def open(cls, turn: Turn, *, again: bool = False) -> Relay:
        """The relay of a turn; `again` where it was begun before, by whomever."""
        relay = cls(turn)
        if turn.task is not None:
            relay._messages |= {message.message_id for message in turn.task.history}
            relay._messages.add(turn.task.status.message.message_id)
            for artifact in turn.task.artifacts:
                relay._artifacts.setdefault(artifact.artifact_id, _Sent()).add(artifact.parts)
        if (stored := await turn.recall(REMOTE)) is not None:
            known = json.loads(stored)
            relay.task_id, relay.context_id = known["task"], known["context"]
        if (stored := await turn.recall(RELAYED)) is not None and (told := json.loads(stored))["turn"] == turn.number:
            relay._messages |= set(told["messages"])
            relay._artifacts |= {key: _Sent(*entry) for key, entry in told["artifacts"].items()}
        if again:
            for sent in relay._artifacts.values():
                sent.sure = False
        return relay

    async def learn(self, task_id: str, context_id: str) -> None:
        """Record which outside task it is, before anything of it is passed on."""
        if not self.task_id and task_id:
            record = json.dumps({"task": task_id, "context": context_id}).encode()
            known = json.loads(await self._turn.remember(REMOTE, record))
            self.task_id, self.context_id = known["task"], known["context"]
        if task_id not in ("", self.task_id):
            raise InvalidAgentResponse(f"the outside agent answered for task {task_id} instead of {self.task_id}")

    async def take(self, event: pb.StreamResponse) -> bool:
        """Pass on what a stream says; whether the turn is over with it."""
        which = event.WhichOneof("payload")
        if which == "message":
            return await self._answer(event.message)
        if which == "task":
            return await self.snapshot(event.task)
        if which == "status_update":
            await self.learn(event.status_update.task_id, event.status_update.context_id)
            return await self._status(event.status_update)
        if which == "artifact_update":
            await self.learn(event.artifact_update.task_id, event.artifact_update.context_id)
            await self._chunk(event.artifact_update)
        return False

    async def snapshot(self, task: pb.Task, *, settled: bool = False) -> bool:
        """Pass on what a whole task has that is not known yet; whether the turn is over with it.

        An interruption from before the turn ends it only if it is `settled`: the task may have been read before the
        turn's message counted.
        """
        await self.learn(task.id, task.context_id)
        for message in task.history:
            known = {*self._messages, task.status.message.message_id}
            if message.role == pb.ROLE_AGENT and message.message_id not in known:
                status = pb.TaskStatus(state=pb.TASK_STATE_WORKING, message=message)
                await self._status(pb.TaskStatusUpdateEvent(status=status))
        for artifact in task.artifacts:
            await self._whole(artifact)
        if not settled and self.is_old(task):
            return False
        update = pb.TaskStatusUpdateEvent(status=task.status)
        before = self._turn.task.metadata if self._turn.task is not None else None
        if task.HasField("metadata") and task.metadata != before:
            update.metadata.CopyFrom(task.metadata)
        return await self._status(update)

    def is_old(self, task: pb.Task) -> bool:
        """Whether a task waits as it did before the turn."""
        before = self._turn.task
        return (
            before is not None
            and State(task.status.state).interrupted
            and task.status.state == before.status.state
            and task.status.message.message_id == before.status.message.message_id
            and task.status.timestamp == before.status.timestamp
        )

    async def _answer(self, message: pb.Message) -> bool:
        if self.task_id:
            raise InvalidAgentResponse("the outside agent answered a task with a message outside of it")
        await self._turn.emit(self._ours(message))
        return True

    async def _status(self, given: pb.TaskStatusUpdateEvent) -> bool:
        state = State(given.status.state)
        told = given.status.message.message_id if given.status.HasField("message") else ""
        final = state.terminal or state.interrupted
        if not final and (told in self._messages if told else given.status.state == self._state):
            return False
        event = pb.TaskStatusUpdateEvent()
        event.CopyFrom(given)
        event.task_id, event.context_id = self._turn.task_id, self._turn.context_id
        if told:
            event.status.message.CopyFrom(self._ours(given.status.message))
            self._messages.add(told)
        self._state = given.status.state
        await self._turn.emit(event)
        if told and not final:
            await self._note()
        return final

    async def _whole(self, artifact: pb.Artifact) -> None:
        """An artifact as it is now: what is missing of it, or all of it in place of what was passed on."""
        sent = self._artifacts.get(artifact.artifact_id)
        digest, counted = "", 0
        prefix = sent is not None and sent.count == 0
        for part in artifact.parts:
            digest, counted = _chained(digest, part), counted + 1
            prefix = prefix or (sent is not None and counted == sent.count and digest == sent.digest)
        if sent is not None and (sent.count, sent.digest) == (counted, digest):
            return
        update = pb.TaskArtifactUpdateEvent(artifact=artifact, last_chunk=True)
        if sent is not None and sent.sure and prefix:
            del update.artifact.parts[: sent.count]
            update.append = True
        await self._chunk(update)

    async def _chunk(self, given: pb.TaskArtifactUpdateEvent) -> None:
        key = given.artifact.artifact_id
        event = pb.TaskArtifactUpdateEvent()
        event.CopyFrom(given)
        event.task_id, event.context_id = self._turn.task_id, self._turn.context_id
        event.append = given.append and key in self._artifacts
        if not event.append:
            self._artifacts[key] = _Sent()
        self._artifacts[key].add(given.artifact.parts)
        await self._turn.emit(event)
        if time.monotonic() - self._noted >= INTERVAL:
            await self._note()

    async def _note(self) -> None:
        """Record what was passed on, once it is stored: an attempt that dies before may repeat, and lose nothing."""
        self._noted = time.monotonic()
        told: dict[str, Any] = {
            "turn": self._turn.number,
            "messages": sorted(self._messages),
            "artifacts": {key: [sent.count, sent.digest] for key, sent in self._artifacts.items()},
        }
        await self._turn.note(RELAYED, json.dumps(told).encode())

    def _ours(self, message: pb.Message) -> pb.Message:
        made = pb.Message()
        made.CopyFrom(message)
        made.task_id, made.context_id = self._turn.task_id, self._turn.context_id
        return made


def _chained(digest: str, part: pb.Part) -> str:
    return sha256(digest.encode() + part.SerializeToString(deterministic=True)).hexdigest()
