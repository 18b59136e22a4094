"""An A2A agent outside of the mesh as an agent of it.

One turn sends one message to the outside agent and passes on what comes of it. Which task that is there is recorded
as soon as it is known, and that a message is being sent before it is. So whoever takes a task over does not send
again what has arrived, but reads the outside task and goes on where the log ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from hashlib import sha256
from typing import Final, TypeVar

from a2a.types import a2a_pb2 as pb

from weft.host.agent import Agent
from weft.host.relay import Relay
from weft.host.remote import Away, Remote
from weft.host.turns import Turn
from weft_protocols.errors import (
    A2AError,
    Fail,
    InternalError,
    InvalidConfig,
    TaskNotCancelable,
    TaskNotFound,
    Unavailable,
    UnsupportedOperation,
)
from weft_protocols.states import State

log = logging.getLogger("weft.host")
T = TypeVar("T")

PATIENCE: Final = 120.0
"""Seconds an attempt waits for an agent that does not answer, where the task has no deadline."""
PAUSES: Final = (0.25, 15.0)
"""Shortest and longest seconds between two tries."""
POLLS: Final = (0.2, 5.0)
"""Likewise between two looks at a task that is not streamed."""
SETTLING: Final = 2.0
"""Seconds after a follow-up for which a task may still look as it did before."""
CARD_REFRESH: Final = 300.0
"""Seconds between two looks at the outside agent's card."""
UNKNOWN_VERSION: Final = "0"
"""Version of a bridge whose card could not be fetched yet: lower than any, so that a card known before stays."""
_TRACE: Final = ("traceparent", "tracestate")


def headers_from(names: Mapping[str, str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Header values from the variables that `headers_env` names.

    A value of Authorization without a scheme gets `Bearer`. Raises InvalidConfig for a variable that is not set.
    """
    environment = os.environ if environment is None else environment
    made = {}
    for header, variable in names.items():
        value = environment.get(variable, "").strip()
        if not value:
            raise InvalidConfig(f"headers_env: variable {variable} for header {header} is empty or not set")
        if not value.isascii() or not value.isprintable():
            raise InvalidConfig(f"headers_env: variable {variable} cannot be the value of header {header}")
        made[header] = f"Bearer {value}" if header.lower() == "authorization" and " " not in value else value
    return made


class Bridge:
    """The agent that passes its tasks on to the A2A agent whose card is at an address.

    Args:
        name: on the mesh.
        url: of the card. Any address, private ones, too: it is the operator's configuration.
        headers: for every request to the host of `url`, and to no other.
    """

    def __init__(self, name: str, url: str, *, headers: Mapping[str, str] | None = None) -> None:
        self.agent = Agent(name, version=UNKNOWN_VERSION, description=f"Bridge to {url}")
        self.agent.on_turn(self.answer, cancel=self.cancel, retry=True, source=f"bridge {url}")
        self.agent.services.append(self.refresh)
        self._remote = Remote(url, headers=headers or {})
        self._relays: dict[str, Relay] = {}
        """Of the turns that run, by task."""
        self._trouble = ""

    async def aclose(self) -> None:
        """Close all connections to the outside agent."""
        await self._remote.aclose()

    # The card --------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Fetch the card and show it as the agent's own. Raises as `Remote.fetch_card` does."""
        offered = offered_card(self.agent.name, await self._remote.fetch_card())
        if offered != self.agent.card:
            self.agent.replace_card(offered)

    async def try_to_load(self) -> bool:
        """Likewise; False where the outside agent does not answer. Raises InvalidConfig for what is no card."""
        try:
            await self.load()
        except (Away, Fail) as error:
            if str(error) != self._trouble:
                log.warning("the card of %s cannot be fetched: %s", self.agent.name, error)
            self._trouble = str(error)
            return False
        self._trouble = ""
        return True

    async def refresh(self) -> None:
        """Keep the card as it is outside, for as long as the agent serves."""
        pause = PAUSES[0]
        try:
            while True:
                await asyncio.sleep(CARD_REFRESH if self.agent.card is not None else pause)
                pause = min(pause * 2, PAUSES[1])
                try:
                    await self.try_to_load()
                except InvalidConfig as error:
                    log.warning("the card of %s stays as it was: %s", self.agent.name, error)
        finally:
            await self.aclose()

    # Turns -----------------------------------------------------------------------------------------

    async def answer(self, turn: Turn) -> None:
        """Send a turn's message, unless it has arrived, and pass on what comes of it."""
        mark = f"sent-{turn.number}"
        again = await turn.recall(mark) is not None
        relay = self._relays[turn.task_id] = await Relay.open(turn, again=again)
        try:
            request = self._request(turn, relay)
            arrived = again and await self._patiently(turn, lambda: self._arrived(turn, relay, request))
            if not arrived:
                await turn.remember(mark, b"1")
                if await self._send(turn, relay, request):
                    return
            await self._follow(turn, relay)
        except TaskNotFound as error:
            raise Fail(f"{self._remote.host} does not know the task {relay.task_id} any more") from error
        finally:
            self._relays.pop(turn.task_id, None)

    async def cancel(self, turn: Turn) -> None:
        """Pass a cancel on, and what the outside agent makes of it."""
        relay = self._relays.get(turn.task_id) or await Relay.open(turn, again=True)
        if not relay.task_id:
            request = self._request(turn, relay)
            found = await self._remote.find(request.message.context_id, request.message.message_id)
            if found is None:
                return
            await relay.learn(found.id, found.context_id)
        try:
            task = await self._patiently(turn, lambda: self._remote.cancel(relay.task_id))
        except TaskNotCancelable:
            task = await self._patiently(turn, lambda: self._remote.get(relay.task_id))
        if State(task.status.state).terminal:
            await relay.snapshot(task, settled=True)

    def _request(self, turn: Turn, relay: Relay) -> pb.SendMessageRequest:
        """The turn's message as the outside agent gets it.

        Ids are derived from ours: the same message has the same id whenever it is sent, and callers of the mesh who
        name their conversations alike do not meet outside.
        """
        request = pb.SendMessageRequest(message=turn.request.message)
        message = request.message
        message.message_id = _derived(turn.agent, turn.caller, turn.task_id, message.message_id)
        message.context_id = relay.context_id or _derived(turn.agent, turn.caller, turn.context_id)
        message.task_id = relay.task_id
        del message.reference_task_ids[:]
        if turn.request.HasField("metadata"):
            request.metadata.CopyFrom(turn.request.metadata)
        request.configuration.accepted_output_modes.extend(turn.request.configuration.accepted_output_modes)
        return request

    async def _send(self, turn: Turn, relay: Relay, request: pb.SendMessageRequest) -> bool:
        """Send until the message has arrived; whether the turn is over with what the answer said."""
        parameters = {name: turn.headers[name] for name in _TRACE if name in turn.headers}
        if turn.extensions:
            parameters["A2A-Extensions"] = ", ".join(sorted(turn.extensions))
        tries = _Tries(turn)
        while True:
            heard = False
            try:
                async with aclosing(self._remote.send(request, parameters)) as events:
                    async for event in events:
                        heard = True
                        if await relay.take(event):
                            return True
                if heard:
                    return False
                raise Away(f"{self._remote.host} closed the stream without a word", taken=True)
            except Away as error:
                log.info("task %s: %s", turn.task_id, error)
                if heard:
                    return False
                await tries.pause(error)
                if error.taken and await self._patiently(turn, lambda: self._arrived(turn, relay, request)):
                    return False
            except (UnsupportedOperation, TaskNotFound):
                if turn.number == 1 or not relay.task_id:
                    raise
                # It has ended meanwhile: what became of it is the answer.
                return False

    async def _follow(self, turn: Turn, relay: Relay) -> None:
        """Pass the outside task on until the turn is over, whatever becomes of its streams."""
        began, pause = time.monotonic(), POLLS[0]
        while True:
            task = await self._patiently(turn, lambda: self._remote.get(relay.task_id))
            settled = time.monotonic() - began > SETTLING
            if await relay.snapshot(task, settled=settled):
                return
            if self._remote.streaming and not relay.is_old(task) and await self._stream(turn, relay):
                pause = POLLS[0]
                continue
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(pause * 1.5, POLLS[1])

    async def _stream(self, turn: Turn, relay: Relay) -> bool:
        """Follow the outside task by its stream; whether that brought something.

        A status that ends the turn is left to the reading of the whole task: a stream that is joined later may repeat
        or lack what came just before.
        """
        heard = False
        try:
            async with aclosing(self._remote.subscribe(relay.task_id)) as events:
                async for event in events:
                    if _stops(event):
                        return True
                    await relay.take(event)
                    heard = True
        except (Away, UnsupportedOperation, InternalError) as error:
            log.info("task %s: the stream of %s ended: %s", turn.task_id, self._remote.host, error)
        return heard

    async def _arrived(self, turn: Turn, relay: Relay, request: pb.SendMessageRequest) -> bool:
        """Whether the outside agent has the turn's message, as far as it tells."""
        message = request.message
        if relay.task_id and turn.number == 1:
            return True
        if not relay.task_id:
            found = await self._remote.find(message.context_id, message.message_id)
            if found is not None:
                await relay.learn(found.id, found.context_id)
            return found is not None
        task = await self._remote.get(relay.task_id)
        return not relay.is_old(task) or any(said.message_id == message.message_id for said in task.history)

    async def _patiently(self, turn: Turn, ask: Callable[[], Awaitable[T]]) -> T:
        """What the outside agent answers, asked again while it is away. Raises Unavailable after `PATIENCE`."""
        tries = _Tries(turn)
        while True:
            try:
                return await ask()
            except (Away, InternalError) as error:
                await tries.pause(error)


class _Tries:
    """Pauses between tries to reach the outside agent, and their end."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._began = time.monotonic()
        self._pause = PAUSES[0]

    async def pause(self, error: Away | A2AError) -> None:
        """Wait before the next try. A deadline ends the task; without one, Unavailable ends this attempt."""
        if self._turn.deadline is None and time.monotonic() - self._began > PATIENCE:
            raise Unavailable(f"the outside agent does not answer: {error}") from error
        if self._pause == PAUSES[0]:
            log.warning("task %s: %s; trying again", self._turn.task_id, error)
        await asyncio.sleep(self._pause * random.uniform(0.8, 1.2))
        self._pause = min(self._pause * 2, PAUSES[1])


def offered_card(name: str, card: pb.AgentCard) -> pb.AgentCard:
    """An outside agent's card as the mesh offers it: under the mesh's name, without what only concerns reaching it."""
    made = pb.AgentCard()
    made.CopyFrom(card)
    made.name = name
    made.version = re.sub(r"[^A-Za-z0-9_.+-]", "-", card.version)[:64] or UNKNOWN_VERSION
    made.description = card.description or f"Agent {name}"
    for field in ("supported_interfaces", "signatures", "security_schemes", "security_requirements"):
        made.ClearField(field)
    made.capabilities.ClearField("extended_agent_card")
    for skill in made.skills:
        skill.ClearField("security_requirements")
    return made


def _stops(event: pb.StreamResponse) -> bool:
    state = State.UNSPECIFIED
    if event.HasField("status_update"):
        state = State(event.status_update.status.state)
    elif event.HasField("task"):
        state = State(event.task.status.state)
    return state.terminal or state.interrupted


def _derived(*of: str) -> str:
    return sha256("\0".join(of).encode()).hexdigest()[:32]


__all__ = ["Bridge", "headers_from", "offered_card"]
