"""The embedded broker: one nats-server process per home directory, started, watched, adopted and stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from weft.core import serverproc
from weft.core.broker import Broker
from weft.core.config import DEFAULT_IDENTITY, ConnectionSettings, did_you_mean
from weft.core.home import Accounts, BrokerRecord, Home, make_private_directory, process_started
from weft.core.membership import Membership, options_of
from weft.core.serverconf import MAX_FILE_STORE
from weft_protocols.errors import BrokerError, InvalidConfig, Unavailable, UsageError
from weft_protocols.resources import DURABILITY

if TYPE_CHECKING:
    import subprocess
    from types import TracebackType

log = logging.getLogger("weft.server")

START_TIMEOUT: Final = 15.0
"""Seconds until a server must answer; one with 100 MB to recover takes half a second."""
GRACE: Final = 10.0
"""Seconds a server has to flush and exit before it is killed."""
_LOG_TAIL: Final = 1200


class EmbeddedServer:
    """The broker of one home directory.

    A lock in the directory, inherited by the server process, lives exactly as long as the server: two servers
    never share a store. Whoever starts it owns it and stops it; others can adopt it.

    Args:
        home: The mesh's home directory; created if need be.
        durability: Profile of `weft_protocols.resources.DURABILITY`.
        port: TCP port on 127.0.0.1. 0: the port of the last start if it is free, else any.
        agents: Agents that can connect from the start, besides those declared before.
        callers: Callers that can connect from the start, besides those declared before.
        max_bytes: Size the task stream may reach; makes room for it. -1 for the default of the server.
        orphan_protection: End the server when this process dies, even by SIGKILL (Linux; main thread only).
    """

    def __init__(
        self,
        home: Path,
        *,
        durability: str = "laptop",
        port: int = 0,
        agents: Iterable[str] = (),
        callers: Iterable[str] = (DEFAULT_IDENTITY,),
        max_bytes: int = -1,
        orphan_protection: bool = False,
    ) -> None:
        if durability not in DURABILITY:
            raise InvalidConfig(
                f"durability {durability!r} is unknown{did_you_mean(durability, DURABILITY)}; "
                f"use one of {', '.join(DURABILITY)}"
            )
        self.home = Home(home.absolute())
        self.membership = Membership(self.home)
        self.owned = False
        """Whether this object started the server, and so is the one to stop it."""
        self._durability = durability
        self._wanted_port = port
        self._declared = tuple(agents), tuple(callers)
        self._max_file_store = max(MAX_FILE_STORE, 2 * max_bytes)
        self._orphan_protection = orphan_protection
        self._record: BrokerRecord | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    # Life --------------------------------------------------------------------------------------

    async def start(self, *, adopt: bool = False, timeout: float = START_TIMEOUT) -> None:
        """Start the server, or with `adopt` use the one that runs here already; return when it answers.

        Raises:
            UsageError: another server runs in this home directory and `adopt` is not set.
            InvalidConfig: no or too old a server binary, the port is taken, or the configuration is refused.
            Unavailable: it exited, or did not answer within `timeout` seconds; with the end of its log.
        """
        if self._record is not None and self._record.alive:
            raise UsageError(f"the broker in {self.home.root} was already started by this object")
        self._forget()
        for folder in (self.home.root, self.home.broker, self._ports):
            make_private_directory(folder)
        try:
            async with asyncio.timeout(timeout):
                while True:
                    if await self._own_or_adopt(adopt):
                        break
                    await asyncio.sleep(serverproc.POLL)  # the lock's holder is starting or ending
        except TimeoutError:
            raise Unavailable(
                f"the broker in {self.home.root} did not answer within {timeout:g} s{self._log_tail()}"
            ) from None

    async def stop(self, *, grace: float = GRACE) -> None:
        """Stop the server if this object owns it: SIGTERM, and SIGKILL after `grace` seconds. Idempotent."""
        if self.owned and self._process is not None:
            await _end(self._process, grace)
        self._forget()

    async def wait(self) -> int | None:
        """Return when the server has ended: its exit code, negative for a signal; None if it was adopted."""
        record, process = self._running(), self._process
        if process is None:
            await serverproc.exited(record.pid)
            return None
        if process.poll() is None:
            await serverproc.exited(process.pid)
        return process.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """Address of the server. Raises Unavailable when it was not started."""
        return self._running().url

    @property
    def port(self) -> int:
        """TCP port of the server."""
        return self._running().port

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._running().pid

    def settings(self, identity: str) -> ConnectionSettings:
        """How `identity` connects. Raises NotAuthenticated if it was never declared, or revoked."""
        return self.membership.settings(identity, self.url)

    # Accounts ----------------------------------------------------------------------------------

    @property
    def accounts(self) -> Accounts:
        """Who may connect, as it is on disk."""
        return self.membership.accounts

    async def add_agent(self, name: str) -> None:
        """Let an agent connect: see `declare`."""
        await self.declare(agents=(name,))

    async def add_caller(self, name: str) -> None:
        """Let a caller connect: see `declare`."""
        await self.declare(callers=(name,))

    async def declare(self, *, agents: Iterable[str] = (), callers: Iterable[str] = ()) -> None:
        """Let agents and callers connect, from now on and after restarts. Idempotent.

        In force on return where the server runs, whoever started it; else from its next start.

        Raises:
            InvalidName: a name breaks the grammar, or is taken.
            TimedOut, Unreachable, Unavailable: the server did not take the change; it holds after a restart.
        """
        await self.membership.declare(agents=agents, callers=callers, running=self._alive())

    async def revoke(self, name: str) -> None:
        """Cut an agent or caller off, with every connection it has, and destroy its key. Idempotent."""
        await self.membership.revoke(name, running=self._alive())

    # Starting ----------------------------------------------------------------------------------

    async def _own_or_adopt(self, adopt: bool) -> bool:
        lock = serverproc.try_lock(self.home.broker / "lock")
        if lock is not None:
            try:
                await self._launch(lock)
            finally:
                os.close(lock)  # from here on the server alone holds it
            return True
        record = BrokerRecord.read(self.home)
        if not adopt:
            who = f" (pid {record.pid}, {record.url})" if record is not None and record.alive else ""
            raise UsageError(
                f"a broker already runs in {self.home.root}{who}: use that mesh, stop it with `mesh down`, "
                "or start this one in another folder"
            )
        if record is None or not record.alive or not await self._answers(record):
            return False
        agents, callers = self._declared
        await self.membership.declare(agents=agents, callers=callers, running=record)
        self._record = record
        return True

    async def _launch(self, lock: int) -> None:
        binary = serverproc.find_binary()
        await serverproc.check_version(binary)
        wanted = BrokerRecord("", 0, "", self._durability, self._choose_port(), self._max_file_store)
        agents, callers = self._declared
        await self.membership.prepare(options_of(self.home, wanted), agents=agents, callers=callers)
        process = self._spawn(binary, lock)
        try:
            url = await self._listening(process)
            record = replace(wanted, url=url, pid=process.pid, started=process_started(process.pid) or "")
            if not await self._answers(record):
                raise Unavailable(f"the broker started but does not serve JetStream{self._log_tail()}")
            record.write(self.home)
        except BaseException:
            await _end(process, 1.0)
            raise
        self._record, self._process, self.owned = record, process, True

    def _spawn(self, binary: Path, lock: int) -> subprocess.Popen[bytes]:
        for stale in self._ports.iterdir():
            stale.unlink()
        private = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._log_start = os.lseek(private, 0, os.SEEK_END)
        os.close(private)
        output = os.open(self._startup_log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            return serverproc.spawn(
                binary,
                ["-c", str(self.membership.config), "--ports_file_dir", str(self._ports)],
                lock=lock,
                output=output,
                orphan_protection=self._orphan_protection,
            )
        finally:
            os.close(output)

    def _choose_port(self) -> int:
        """The wanted port; else that of the last start, so that clients find the broker again; else any."""
        if self._wanted_port:
            if not serverproc.port_is_free(self._wanted_port):
                raise InvalidConfig(
                    f"port {self._wanted_port} on 127.0.0.1 is taken by another program: "
                    "choose another `broker.port` in mesh.yaml, or 0 for a free one"
                )
            return self._wanted_port
        last = BrokerRecord.read(self.home)
        if last is not None and serverproc.port_is_free(last.port):
            return last.port
        return serverproc.free_port()

    async def _listening(self, process: subprocess.Popen[bytes]) -> str:
        """The server's address, from the file it writes once it listens; the file's name has its pid."""
        ports = self._ports / f"nats-server_{process.pid}.ports"

        def look() -> str | None:
            if process.poll() is not None:
                raise Unavailable(f"nats-server exited with code {process.returncode}{self._log_tail()}")
            try:
                return str(json.loads(ports.read_bytes())["nats"][0])
            except (FileNotFoundError, ValueError, KeyError, IndexError):
                return None

        return await serverproc.poll(look, every=serverproc.POLL / 4)

    async def _answers(self, record: BrokerRecord) -> bool:
        """Whether the server of `record` serves JetStream to the coordinator."""
        try:
            broker = await Broker.connect(self.membership.settings("coordinator", record.url), name="weft readiness")
            try:
                await broker.api("INFO")
            finally:
                await broker.close()
        except BrokerError as error:
            log.debug("the broker does not answer yet: %s", error)
            return False
        return True

    def _running(self) -> BrokerRecord:
        if self._record is None:
            raise Unavailable(f"the broker in {self.home.root} was not started")
        return self._record

    def _alive(self) -> BrokerRecord | None:
        """The server of this home directory, if it runs, whether this object knows of it or not."""
        record = self._record or BrokerRecord.read(self.home)
        return record if record is not None and record.alive else None

    def _forget(self) -> None:
        self._record, self._process, self.owned = None, None, False

    @property
    def _ports(self) -> Path:
        return self.home.broker / "ports"

    @property
    def _log(self) -> Path:
        return self.home.broker / "nats.log"

    @property
    def _startup_log(self) -> Path:
        return self.home.broker / "startup.log"

    def _log_tail(self) -> str:
        """The end of what the server complained of since its start, for an error message."""
        for path, start in ((self._startup_log, 0), (self._log, self._log_start)):
            try:
                said = path.read_bytes()[start:].decode(errors="replace")
            except FileNotFoundError:
                continue
            complaints = [line for line in said.splitlines() if "[INF]" not in line]
            if complaints:
                return f"; {path} says: {' / '.join(complaints)[-_LOG_TAIL:]}"
        return ""


async def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """SIGTERM, SIGKILL after `grace` seconds, and reap it."""
    if process.poll() is None and grace <= 0:
        serverproc.send_signal(process.pid, signal.SIGKILL)
        await serverproc.exited(process.pid)
    elif process.poll() is None:
        serverproc.send_signal(process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await serverproc.exited(process.pid)
        except TimeoutError:
            log.warning("nats-server %d did not end within %g s: killing it", process.pid, grace)
            serverproc.send_signal(process.pid, signal.SIGKILL)
            await serverproc.exited(process.pid)
    process.wait()
