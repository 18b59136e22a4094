"""One registered server: its sessions, started when needed, shared, supervised, and ended when nobody needs them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from weft.core.supervise import Tasks
from weft.core.toolsconf import ToolServer, builtin_fault
from weft.sidecar.guards import Guards, guards_of
from weft.sidecar.link import Heard, Link, LinkEnded
from weft.sidecar.pins import escaped, oneline
from weft.sidecar.sandbox import NONE, Level, choose
from weft.sidecar.session import Session, open_session
from weft.sidecar.settings import Limits, limits_of
from weft_protocols.errors import InvalidConfig, ToolError, WeftError
from weft_protocols.mcp import UPSTREAM_FAILED

log = logging.getLogger("weft.sidecar")

FIRST_PAUSE: Final = 0.5
"""Seconds without a new attempt after a server failed to start; doubled each time."""
LONGEST_PAUSE: Final = 30.0
LOOK: Final = 5.0
"""Seconds between looks for processes that nobody uses."""

Connect = Callable[[ToolServer, Heard], Awaitable[Link]]
"""Opens a link to a server; raises LinkEnded or ToolError."""


class Upstream:
    """One server.

    Args:
        server: how it is reached.
        connect: opens a link.
        opened: called with every new session, before anybody else uses it.
        on_event: gets what the server says that belongs to no request.
    """

    def __init__(
        self,
        server: ToolServer,
        connect: Connect,
        *,
        opened: Callable[[Session], Awaitable[None]],
        on_event: Heard,
    ) -> None:
        self.server = server
        self.fault = ""
        """What is wrong with its settings; then nothing is limited by them and no session is opened."""
        where = f"settings of {server.name}"
        try:
            self.limits = limits_of(server.settings, where)
            self.guards = guards_of(server.settings, where, process=server.transport == "stdio")
        except InvalidConfig as error:
            self.limits, self.guards, self.fault = Limits(), Guards(), str(error)
        self.fault = self.fault or builtin_fault(server.builtin)
        self.restarts = 0
        """Sessions that ended by themselves."""
        self._connect = connect
        self._opened = opened
        self._on_event = on_event
        self._sessions: list[Session] = []
        self._starting: asyncio.Task[Session | ToolError] | None = None
        self._era = server.era
        self._pause = 0.0
        self._not_before = 0.0
        self._failure = ""
        self._used = 0.0
        self._tasks = Tasks(f"upstream {server.name}")
        self._closed = False

    @property
    def sessions(self) -> list[Session]:
        """Those that are open."""
        return [one for one in self._sessions if not one.link.ended.is_set()]

    @property
    def sandbox(self) -> Level:
        """In what its processes run; nothing, for a server at an address."""
        return choose(self.guards.sandbox) if self._here else Level(NONE, "it runs elsewhere")

    @property
    def _here(self) -> bool:
        """Whether it is processes of this machine."""
        return self.server.transport != "http"

    @property
    def failure(self) -> str:
        """Why it cannot be used now; empty if it can, as far as is known."""
        return self.fault or ("" if self.sessions else self._failure)

    @asynccontextmanager
    async def borrowed(self) -> AsyncIterator[Session]:
        """A session to use, opened if need be.

        Raises ToolError if the server cannot be started or reached, at once while it is left in peace after a failure.
        """
        session = await self._session()
        self._used = _now()
        session.busy += 1
        try:
            yield session
        finally:
            session.busy -= 1
            self._used = _now()

    async def doubt(self, session: Session) -> None:
        """A call took too long: end the session if its server does not answer anything."""
        if session.link.ended.is_set() or await session.alive():
            return
        log.warning("%s answers nothing; it is started again", self.server.name)
        await session.link.aclose()

    async def aclose(self) -> None:
        """End every session, process and all."""
        self._closed = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait((self._starting,))
        sessions, self._sessions = self._sessions, []
        async with asyncio.TaskGroup() as group:
            for session in sessions:
                group.create_task(session.link.aclose())
        await self._tasks.aclose()

    async def _session(self) -> Session:
        """A session for one more. Whoever waits may leave: it is opened all the same, for those who come next."""
        while True:
            found = self._free()
            if found is not None:
                return found
            if self._starting is None:
                self._starting = self._tasks.start(self._start(), name=f"start of {self.server.name}")
            made = await asyncio.shield(self._starting)
            if isinstance(made, ToolError):
                raise ToolError(str(made), code=made.code, data=made.data)
            if not made.busy:
                return made

    async def _start(self) -> Session | ToolError:
        try:
            return await self._open()
        except ToolError as error:
            return error
        except asyncio.CancelledError:
            if not self._closed:
                raise
            return ToolError(f"{self.server.name} was removed", code=UPSTREAM_FAILED)
        finally:
            self._starting = None

    def _free(self) -> Session | None:
        """The least busy session, unless one more may be started for it."""
        sessions = self.sessions
        if not sessions:
            return None
        best = min(sessions, key=lambda one: one.busy)
        more = self.server.transport == "stdio" and len(sessions) < self.limits.processes
        return None if best.busy and more else best

    async def _open(self) -> Session:
        if self.fault or self._closed:
            raise ToolError(self.fault or f"{self.server.name} was removed", code=UPSTREAM_FAILED)
        left = self._not_before - _now()
        if left > 0:
            raise ToolError(
                f"{self.server.name}: {self._failure}; it is tried again in {left:.1f} s",
                code=UPSTREAM_FAILED,
                data={"retryAfter": round(left, 1)},
            )
        try:
            async with asyncio.timeout(self.limits.start_timeout):
                session = await self._attempt()
        except TimeoutError:
            raise self._failed(f"it did not say who it is within {self.limits.start_timeout:g} s") from None
        except ToolError as error:
            raise self._failed(str(error)) from None
        except (WeftError, ValueError, RecursionError) as error:
            raise self._failed(f"what it offers cannot be taken: {error}") from error
        self._pause, self._failure = 0.0, ""
        self._sessions.append(session)
        self._tasks.start(self._watch(session), name=f"session of {self.server.name}")
        return session

    async def _attempt(self) -> Session:
        """Connect and find out the era. A server that does not survive the question is not asked again."""
        link = await self._connect(self.server, self._on_event)
        try:
            try:
                session = await open_session(link, self._era)
            except LinkEnded:
                if self._era != "auto" or self.server.transport != "stdio":
                    raise
                await link.aclose()
                link = await self._connect(self.server, self._on_event)
                session = await open_session(link, "legacy")
            await self._opened(session)
        except BaseException:
            await link.aclose()
            raise
        if self.server.era == "auto":
            self._era = "modern" if session.identity.modern else "legacy"
        return session

    def _failed(self, reason: str) -> ToolError:
        self._pause = min(LONGEST_PAUSE, self._pause * 2 or FIRST_PAUSE)
        self._not_before = _now() + self._pause
        self._failure = escaped(reason)
        self._era = self.server.era  # it may be another one when it comes back
        reason = escaped(reason)
        log.warning("tool server %s cannot be used: %s", self.server.name, oneline(reason))
        return ToolError(f"{self.server.name}: {reason}", code=UPSTREAM_FAILED, data={"retryAfter": self._pause})

    async def _watch(self, session: Session) -> None:
        """Wait for a session's end, or make it when nobody needs it any more."""
        ended = session.link.ended
        while not ended.is_set():
            try:
                async with asyncio.timeout(LOOK):
                    await ended.wait()
            except TimeoutError:
                if self.server.transport == "stdio" and not session.busy and _now() - self._used > self.limits.idle:
                    log.info("%s is not used; its process ends", self.server.name)
                    await self._put_away(session)
                    return
        if session in self._sessions:
            self.restarts += 1
            log.warning("tool server %s: %s", self.server.name, oneline(session.link.reason))
        await self._put_away(session)

    async def _put_away(self, session: Session) -> None:
        """End a session, which stays among the others until it is gone: `aclose` can then wait for it."""
        await session.link.aclose()
        if session in self._sessions:
            self._sessions.remove(session)

    @property
    def state(self) -> dict[str, Any]:
        """For operators."""
        sessions = self.sessions
        return {
            "sessions": len(sessions),
            "busy": sum(one.busy for one in sessions),
            "restarts": self.restarts,
            "version": sessions[0].identity.version if sessions else "",
            "failure": self.failure,
            "sandbox": self.sandbox.name if self._here else "",
            "degraded": self.sandbox.why if self._here and self.sandbox.degraded else "",
        }


def _now() -> float:
    return asyncio.get_running_loop().time()
