"""Executors of the A2A SDK as agents, unchanged: `agent_from_executor`.

`execute()` is called once for each message of a task, as the SDK's request handler calls it, and what it enqueues is
appended to the task's log. What differs from the SDK is what happens around it: a task whose replica dies is run
again by another one, one that waits for its caller is in nobody's memory, and no task is left without an end.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final

from a2a.auth.user import User
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.context import ServerCallContext
from a2a.server.events import Event, EventQueue
from a2a.types import a2a_pb2 as pb
from a2a.utils import errors as sdk
from google.protobuf import json_format

from weft.client import reads
from weft.host.agent import Agent
from weft.host.turns import Turn
from weft_protocols.errors import A2AError, InvalidConfig, WeftError

log = logging.getLogger("weft.host")

RELATED: Final = 16
"""Tasks a message may refer to that are read for it; further ones are left out."""
PATIENCE: Final = 2.0
"""Seconds the reading of them may take."""


def agent_from_executor(
    executor: AgentExecutor,
    card: pb.AgentCard | Mapping[str, Any] | str | PathLike[str],
    *,
    name: str | None = None,
    **options: Any,
) -> Agent:
    """An agent that runs an executor of the A2A SDK.

    Args:
        executor: as it is; several tasks may be in its `execute` at a time.
        card: its agent card, as the SDK has it, as JSON values, or the path of a JSON or YAML file.
        name: of the agent on the mesh; the card's, where that can be a name.
        options: of `Agent`: `concurrency`, `attempts`, `cancel_grace`, …

    Raises:
        InvalidConfig: the card cannot be read, or the executor is none.
        InvalidName: the card's name cannot be an agent's; give one.
    """
    given: Any = executor
    if not isinstance(given, AgentExecutor):
        what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise InvalidConfig(f"{what} is no executor; give an instance of a2a.server.agent_execution.AgentExecutor")
    proto = read_card(card)
    options = {"version": proto.version or "0.1.0", "description": proto.description, **options}
    agent = Agent(name or re.sub(r"[^A-Za-z0-9_-]+", "-", proto.name).strip("-")[:64], card=proto, **options)
    hosted = _Hosted(executor)
    agent.on_turn(hosted.answer, cancel=hosted.cancel, source=_source(executor))
    return agent


def _source(executor: AgentExecutor) -> str:
    try:
        return inspect.getsourcefile(type(executor)) or ""
    except TypeError:
        return ""  # a class that was made at the prompt


def read_card(card: pb.AgentCard | Mapping[str, Any] | str | PathLike[str]) -> pb.AgentCard:
    """An agent card; InvalidConfig if it is none. Fields that this version does not know are ignored."""
    if isinstance(card, pb.AgentCard):
        return card
    where = "the agent card"
    if not isinstance(card, Mapping):
        path = Path(card)
        where = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InvalidConfig(f"{path}: there is no such agent card") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"{path}: the agent card cannot be read: {error}") from error
        card = _parsed(text, path)
    try:
        return json_format.ParseDict(dict(card), pb.AgentCard(), ignore_unknown_fields=True)
    except (json_format.ParseError, TypeError, ValueError) as error:
        raise InvalidConfig(f"{where} is not an agent card: {error}") from error


def _parsed(text: str, path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidConfig(f"{path}: the agent card cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InvalidConfig(f"{path} is not an agent card: it must be one object")
    return values


class Caller(User):
    """Who sent a message: an account of the mesh, which the broker has authenticated."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def is_authenticated(self) -> bool:
        """True."""
        return True

    @property
    def user_name(self) -> str:
        """Name of the account."""
        return self._name


class Queue(EventQueue):
    """Where an executor's events go: the log of its task. Closed when its `execute` has returned."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._closed = False

    async def enqueue_event(self, event: Event) -> None:
        """Append an event to the task's log; see `Turn.emit`."""
        if self._closed:
            log.warning("task %s: a %s was enqueued after execute() had returned", self._turn.task_id, type(event))
            return
        await self._turn.emit(event)

    def close(self) -> None:
        """Take no more events."""
        self._closed = True


class _Hosted:
    """An executor as the handler of turns."""

    def __init__(self, executor: AgentExecutor) -> None:
        self._executor = executor

    async def answer(self, turn: Turn) -> None:
        """One call of `execute`."""
        task = None if turn.task is None else _as_the_sdk(turn.task)
        related = await _related(turn)
        context = RequestContext(
            _call_context(turn),
            request=turn.request,
            task_id=turn.task_id,
            context_id=turn.context_id,
            task=task,
            related_tasks=related,
        )
        queue = Queue(turn)
        try:
            await self._executor.execute(context, queue)
        except sdk.A2AError as error:
            raise _translated(error) from error
        finally:
            queue.close()

    async def cancel(self, turn: Turn) -> None:
        """One call of `cancel`, with a queue of its own."""
        context = RequestContext(
            _call_context(turn), task_id=turn.task_id, context_id=turn.context_id, task=_as_the_sdk(turn.now())
        )
        queue = Queue(turn)
        try:
            await self._executor.cancel(context, queue)
        finally:
            queue.close()


def _call_context(turn: Turn) -> ServerCallContext:
    return ServerCallContext(
        state={"headers": dict(turn.headers), "weft.attempt": turn.attempt, "weft.turn": turn.number},
        user=Caller(turn.caller),
        tenant=turn.tenant,
        requested_extensions=set(turn.extensions),
    )


def _as_the_sdk(task: pb.Task) -> pb.Task:
    """A task as the SDK's stores have it: the message of the current status is not in the history yet."""
    if task.status.HasField("message") and task.history:
        last = task.history[-1]
        if last.message_id == task.status.message.message_id and last.role == task.status.message.role:
            del task.history[-1]
    return task


async def _related(turn: Turn) -> list[pb.Task]:
    """Tasks the message refers to, as far as this agent may read them: those it sent itself."""
    found: list[pb.Task] = []
    wanted = list(turn.request.message.reference_task_ids)[:RELATED]
    if not wanted:
        return found
    try:
        async with asyncio.timeout(PATIENCE):
            for task_id in wanted:
                request = pb.GetTaskRequest(id=task_id)
                try:
                    read = await reads.task(turn.mesh.broker, reads.ANY_AGENT, request, caller=turn.mesh.caller)
                except A2AError as error:
                    log.debug("task %s refers to %s, which is left out: %s", turn.task_id, task_id, error)
                else:
                    found.append(read.task)
    except (TimeoutError, WeftError) as error:
        log.debug("task %s: tasks it refers to are left out: %s", turn.task_id, error)
    return found


def _translated(error: sdk.A2AError) -> A2AError:
    """Our error for one of the SDK's."""
    reason = next((sdk.A2A_ERROR_REASONS[kind] for kind in type(error).__mro__ if kind in sdk.A2A_ERROR_REASONS), "")
    return A2AError.from_reason(reason, error.message)


__all__ = ["agent_from_executor", "read_card"]
