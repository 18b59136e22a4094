"""Which agent a delegation goes to: the named one, one with the skill, or the next of the fallbacks.

Whatever is not said by the handler is recorded before the child is sent, so that a later attempt sends to the same.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import msgpack

from weft.client import coordinator
from weft.host.chain import Chain
from weft.host.run import Run
from weft_protocols import ids, records
from weft_protocols.errors import AgentNotFound, CircuitOpen, Unavailable, WeftError

PATIENCE: Final = 10.0
"""Seconds a route is asked for again while no agent with the skill is ready."""
PAUSE: Final = 0.5
"""Seconds between two questions for a route."""


class Choice:
    """The agents of one delegation."""

    def __init__(self, run: Run, key: str, *, agent: str, skill: str, fallback: tuple[str, ...]) -> None:
        self._run = run
        self._key = f"{records.ROUTE_KEY}-{ids.digest(key.encode())[:32]}"
        self._agent = agent
        self._skill = skill
        self._fallback = fallback
        self._tried: list[str] = []
        self._probe = False
        """Whether the child finds out how its agent is."""

    def has_others(self, agent: str) -> bool:
        """Whether a fallback is left after `agent`."""
        return bool(self._others(agent))

    def _others(self, agent: str) -> list[str]:
        return [name for name in self._fallback if name not in (agent, *self._tried)]

    async def recorded(self) -> str:
        """The agent that an earlier attempt sent to last."""
        if self._agent and not self._fallback:
            return self._agent
        stored = await self._run.journal.read(self._key)
        if stored is None:
            return self._agent
        told = msgpack.unpackb(stored.data)
        self._tried = list(told["tried"])
        return str(told["agent"])

    async def first(self) -> str:
        """The agent to begin with, or to go on with.

        Raises:
            AgentNotFound: no agent has the skill.
            Unavailable: none that has it is ready, or no coordinator is there to choose.
        """
        agent = await self.recorded()
        if not agent:
            agent = await self._routed()
            await self._record(agent)
        return agent

    async def after(self, agent: str, error: WeftError) -> str:
        """The agent to try after one; raises `error` where there is none."""
        self._tried.append(agent)
        if others := self._others(agent):
            following = others[0]
        elif not self._agent and isinstance(error, CircuitOpen):
            try:
                following = await self._routed()
            except WeftError:
                raise error from None
        else:
            raise error
        await self._record(following)
        return following

    async def _record(self, agent: str) -> None:
        data = bytes(msgpack.packb({"agent": agent, "tried": self._tried}))
        await self._run.journal.replace(self._key, data)

    async def _routed(self) -> str:
        run = self._run
        exclude = {run.work.agent, *Chain.of(run.work.headers).agents, *self._tried, *run.circuits.open()}
        until = time.time() + PATIENCE
        if run.work.deadline is not None:
            until = min(until, run.work.deadline)
        with run.waits.working():
            while True:
                try:
                    body = {"skill": self._skill, "exclude": sorted(exclude)}
                    return str((await coordinator.call(run.mesh.broker, "route", body))["agent"])
                except Unavailable:
                    if time.time() + PAUSE >= until:
                        raise
                async with run.slot.waiting():
                    await asyncio.sleep(PAUSE)

    async def check(self, agent: str) -> None:
        """Whether a new child may be sent to an agent.

        Raises:
            CircuitOpen: calls to it fail.
            AgentNotFound: there is no such agent, and another one would be tried.
        """
        if self.has_others(agent):
            try:
                found = await coordinator.call(self._run.mesh.broker, "agents", {"name": agent})
            except WeftError:
                pass  # nobody knows: it is sent, and waits for the agent
            else:
                if not found["agents"]:
                    raise AgentNotFound(f"no agent {agent!r} ever registered in this mesh")
        self._probe = self._run.circuits.begin(agent)

    def learned(self, agent: str, *, failed: bool) -> None:
        """A child of an agent ended: of the agent's fault, or not."""
        self._run.circuits.end(agent, failed=failed, probe=self._probe)

    def nothing_learned(self, agent: str) -> None:
        """Nobody waits for a child of an agent any more."""
        self._run.circuits.give_up(agent, probe=self._probe)
