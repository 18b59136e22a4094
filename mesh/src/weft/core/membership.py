"""Who may connect to the embedded broker: its accounts, their keys, and changing them while it runs."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from weft.core import serverproc
from weft.core.broker import Broker
from weft.core.cardkeys import ensure_card_key
from weft.core.config import ConnectionSettings, did_you_mean
from weft.core.home import MEMBERS, Accounts, BrokerRecord, Home, make_private_directory, write_private
from weft.core.keys import ensure_seed
from weft.core.serverconf import ServerOptions, render
from weft_protocols.accounts import SYSTEM
from weft_protocols.errors import ApiError, InvalidName, NotAuthenticated, TimedOut, Unavailable
from weft_protocols.subjects import check_name

RELOAD_TIMEOUT: Final = 10.0
"""Seconds until a change must be in force, and until another process must have finished its own."""
_RELOADS: Final = 2
"""The service imports of an account that a reload creates answer "no responders" until the next reload."""
_PING: Final = "$SYS.REQ.SERVER.PING"


class Membership:
    """The accounts of one home directory. Changes are made by one process at a time and survive crashes.

    `accounts.json` is the truth, the server's configuration is derived from it. A change is written first and
    then put in force on the running server, if there is one; if that fails, it holds after the next start.
    """

    def __init__(self, home: Home) -> None:
        self.home = home

    @property
    def accounts(self) -> Accounts:
        """Who may connect, as it is on disk."""
        return Accounts.read(self.home)

    @property
    def config(self) -> Path:
        """The server's configuration file."""
        return self.home.broker / "nats.conf"

    def settings(self, identity: str, url: str) -> ConnectionSettings:
        """How `identity` connects to `url`. Raises NotAuthenticated if it was never declared, or revoked."""
        names = self.accounts.names
        if identity not in names:
            raise NotAuthenticated(
                f"the mesh in {self.home.root.parent} knows no identity {identity!r}"
                f"{did_you_mean(identity, names)}; it knows {', '.join(names)}"
            )
        return ConnectionSettings(url, identity, self.home.seed(identity), self.home.root)

    async def prepare(self, options: ServerOptions, *, agents: Iterable[str] = (), callers: Iterable[str] = ()) -> str:
        """Write accounts, keys (also that of the cards) and configuration for a start; return the latter's digest."""
        async with self._editing():
            ensure_card_key(self.home)
            return await self._install(self._with(self.accounts, agents, callers), options)

    async def declare(
        self, *, agents: Iterable[str] = (), callers: Iterable[str] = (), running: BrokerRecord | None
    ) -> None:
        """Let agents and callers connect. Idempotent.

        Raises:
            InvalidName: a name breaks the grammar, or is taken.
            TimedOut, Unreachable, Unavailable: the running server did not take the change.
        """
        wanted_agents, wanted_callers = tuple(agents), tuple(callers)
        await self._change(lambda accounts: self._with(accounts, wanted_agents, wanted_callers), running)

    async def revoke(self, name: str, *, running: BrokerRecord | None) -> None:
        """Cut an agent or caller off, with every connection it has, and destroy its key. Idempotent."""
        check_name(name, "identity")

        def without(accounts: Accounts) -> Accounts:
            return replace(accounts, agents=_except(accounts.agents, name), callers=_except(accounts.callers, name))

        await self._change(without, running, obsolete=name)

    async def _change(
        self,
        edit: Callable[[Accounts], Accounts],
        running: BrokerRecord | None,
        *,
        obsolete: str | None = None,
    ) -> None:
        async with self._editing():
            accounts = edit(self.accounts)
            digest = ""
            if running is None:
                accounts.write(self.home)
            else:
                digest = await self._install(accounts, options_of(self.home, running))
            if obsolete is not None:
                self._destroy_key(obsolete)  # before the reload: a key that was cut off must not come back
            if running is not None:
                await self._reload(running, digest)

    def _with(self, accounts: Accounts, agents: Iterable[str], callers: Iterable[str]) -> Accounts:
        """`accounts` with more names in it, and a seed on disk for every one."""
        have = {"agent": list(accounts.agents), "caller": list(accounts.callers)}
        for kind, names in (("agent", agents), ("caller", callers)):
            for name in names:
                if check_name(name, f"{kind} name") in have[kind]:
                    continue
                # Seeds are files: two names must differ by more than case to have one each on every system.
                taken = (*MEMBERS, *have["agent"], *have["caller"])
                twin = next((one for one in taken if one.lower() == name.lower()), None)
                if twin is not None:
                    raise InvalidName(
                        f"{kind} name {name!r} is taken by {twin!r}: every agent and every caller needs a name "
                        "of its own, also where upper and lower case are not told apart"
                    )
                have[kind].append(name)
        make_private_directory(self.home.keys)
        agent_keys, caller_keys, member_keys = (
            {name: ensure_seed(self.home.seed(name)) for name in names}
            for names in (have["agent"], have["caller"], MEMBERS)
        )
        return Accounts(agent_keys, caller_keys, member_keys)

    def _destroy_key(self, name: str) -> None:
        self.home.seed(name).unlink(missing_ok=True)

    async def _install(self, accounts: Accounts, options: ServerOptions) -> str:
        """Write accounts and configuration, if the server finds it valid; return the latter's digest."""
        draft = self.config.with_suffix(".new")
        write_private(draft, render(accounts, options).encode())
        digest = await serverproc.check_config(serverproc.find_binary(), draft)
        accounts.write(self.home)
        draft.replace(self.config)
        return digest

    async def _reload(self, running: BrokerRecord, digest: str) -> None:
        """Return when the configuration with `digest` is in force.

        The system account's reload request does what SIGHUP does, and answers when it is done.
        """
        broker = await Broker.connect(self.settings(SYSTEM, running.url), name="weft reload", timeout=RELOAD_TIMEOUT)
        try:
            server = (await _ask(broker, f"{_PING}.IDZ"))["id"]
            for _ in range(_RELOADS):
                answer = await _ask(broker, f"$SYS.REQ.SERVER.{server}.RELOAD")
                if "error" in answer:
                    raise ApiError(f"nats-server refuses to reload its configuration: {answer['error']}")
            in_force = (await _ask(broker, f"{_PING}.VARZ"))["data"]["config_digest"]
        finally:
            await broker.close()
        if in_force != digest:
            raise Unavailable(
                f"the broker did not take over {self.config}, which somebody changed meanwhile; try again"
            )

    @asynccontextmanager
    async def _editing(self) -> AsyncIterator[None]:
        """One change at a time, whichever process makes it."""
        make_private_directory(self.home.broker)
        path = self.home.broker / "accounts.lock"
        try:
            async with asyncio.timeout(RELOAD_TIMEOUT):
                lock = await serverproc.poll(lambda: serverproc.try_lock(path))
        except TimeoutError:
            raise TimedOut(
                f"another process has been changing the accounts in {self.home.root} for {RELOAD_TIMEOUT:g} s"
            ) from None
        try:
            yield
        finally:
            os.close(lock)


def options_of(home: Home, record: BrokerRecord) -> ServerOptions:
    """The options a running server was started with: a reload can change nothing but the accounts."""
    return ServerOptions(
        store=home.broker / "js",
        log=home.broker / "nats.log",
        durability=record.durability,
        port=record.port,
        max_file_store=record.max_file_store,
    )


def _except(names: dict[str, str], name: str) -> dict[str, str]:
    return {one: key for one, key in names.items() if one != name}


async def _ask(broker: Broker, subject: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((await broker.request(subject, timeout=RELOAD_TIMEOUT)).data)
    return answer
