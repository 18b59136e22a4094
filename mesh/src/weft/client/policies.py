"""Policies in the broker: every version with who loaded it and why, which one decides, and which one only watches."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgpack

from weft.core.config import DEFAULT_IDENTITY
from weft.core.latest import Follower, Latest
from weft.policy.active import ENFORCE, MODES, ActivePolicy
from weft.policy.bundle import Bundle, Compiled, compile_bundle
from weft.policy.catalog import Catalog
from weft_protocols.errors import ApiError, Backpressure, BrokerError, Conflict, InvalidConfig, PolicyNotFound, TooLarge
from weft_protocols.resources import (
    POLICY,
    POLICY_CHANGES,
    POLICY_SEEN,
    POLICY_STATE,
    POLICY_VERSIONS,
    RATES,
    REGISTRY,
    TOOL_PINS,
    TOOL_SERVERS,
    TOOLS,
)
from weft_protocols.subjects import OPERATOR

if TYPE_CHECKING:
    from weft.core.broker import Broker
    from weft.policy.engine import CedarEngine

log = logging.getLogger("weft.policy")

ACTIVE: Final = "active"
SHADOW: Final = "shadow"
"""Which version decides, and which watches beside it, as `PolicyStore.pointer` takes them."""
MODE: Final = "mode"
"""Record of whether what the policy says holds."""
FRESH: Final = 90.0
"""Seconds for which what a sidecar told of itself is believed."""
UNREAD: Final = "which policy holds could not be read yet; try again"
FAREWELL: Final = 2.0
"""Seconds a sidecar that ends has to say so; without a broker it cannot."""
TRIES: Final = 8
SMALLEST_ROOM: Final = 4096
"""Bytes of a message that are left for what is around a policy."""
_NO_MESSAGE: Final = 10037
_NO_STREAM: Final = 10059
_LARGEST_PIN: Final = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Version:
    """One stored policy."""

    number: int
    digest: str
    author: str
    note: str
    at: float
    """Unix seconds."""
    rules: int
    bundle: Bundle


@dataclass(frozen=True, slots=True)
class Pointer:
    """Which version decides, or watches, and since when."""

    version: int
    """0 for none."""
    by: str = ""
    note: str = ""
    at: float = 0.0
    how: str = ""
    """`load`, `rollback`, `shadow` or `stop`; of the mode, which one."""

    def encode(self) -> bytes:
        """As it is stored."""
        raw = {"version": self.version, "by": self.by, "note": self.note, "at": self.at, "how": self.how}
        return json.dumps(raw).encode()

    @classmethod
    def decode(cls, data: bytes) -> Pointer:
        """As it was stored. Raises InvalidConfig if it is none."""
        try:
            raw = json.loads(data)
            version, at = int(raw["version"]), float(raw["at"])
            return cls(version, str(raw["by"]), str(raw["note"]), at, str(raw["how"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidConfig(f"which policy holds cannot be read: {error}") from None


class PolicyStore:
    """The policies of a mesh, over a connection of account MESH."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._versions = Latest(broker, POLICY, POLICY_VERSIONS)
        self._state = Latest(broker, POLICY, POLICY_STATE)
        self._seen = Latest(broker, RATES, POLICY_SEEN)

    async def versions(self) -> list[Version]:
        """Every version, the oldest first."""
        found = await self._versions.all()
        return sorted((_version(int(key), one.data) for key, one in found.items()), key=lambda one: one.number)

    async def version(self, number: int) -> Version:
        """One version. Raises PolicyNotFound."""
        found = await self._versions.get(str(number)) if number > 0 else None
        if found is None:
            raise PolicyNotFound(f"there is no policy of version {number}; `mesh policy list` shows which there are")
        return _version(number, found.data)

    async def store(self, bundle: Bundle, *, author: str, note: str = "", rules: int = 0) -> Version:
        """Keep a policy under the next number; one that is kept already, under its own.

        Raises TooLarge for one that does not fit a message.
        """
        data = bundle.encode()
        room = self._broker.max_payload - SMALLEST_ROOM
        if len(data) > room:
            raise TooLarge(f"the policy has {len(data)} bytes compressed; {room} fit")
        made = {"digest": bundle.digest, "author": author, "note": note, "at": time.time(), "rules": rules}
        for _ in range(TRIES):
            known = await self.versions()
            if (same := next((one for one in known if one.digest == bundle.digest), None)) is not None:
                return same
            number = known[-1].number + 1 if known else 1
            packed: bytes = msgpack.packb({**made, "bundle": data})
            try:
                await self._versions.put(str(number), packed, after=0)
            except Conflict:
                continue
            return _version(number, packed)
        raise Backpressure("others store policies as well; try again")

    async def pointer(self, what: str = ACTIVE) -> Pointer:
        """Which version decides, or with `SHADOW` watches."""
        found = await self._state.get(what)
        return Pointer.decode(found.data) if found is not None else Pointer(0)

    async def point(self, version: int, *, by: str, how: str, note: str = "", what: str = ACTIVE) -> Pointer:
        """Have a version decide, or watch, from now on: on every sidecar. Raises PolicyNotFound; 0 is for none."""
        if version:
            await self.version(version)
        made = Pointer(version, by, note, time.time(), how)
        await self._state.put(what, made.encode())
        return made

    async def history(self, what: str = ACTIVE) -> list[Pointer]:
        """Everything that decided, the oldest first."""
        found: list[Pointer] = []
        after = 1
        while True:
            body = {"seq": after, "next_by_subj": f"{POLICY_STATE}.{what}"}
            try:
                message = (await self._broker.api(f"STREAM.MSG.GET.{POLICY}", body))["message"]
            except ApiError as error:
                if error.err_code == _NO_MESSAGE:
                    return found
                raise
            found.append(Pointer.decode(base64.b64decode(message.get("data", ""))))
            after = int(message["seq"]) + 1

    async def mode(self) -> str:
        """Whether what the policy says holds: one of `MODES`, and `enforce` where nobody said anything else."""
        found = await self._state.get(MODE)
        how = Pointer.decode(found.data).how if found is not None else ENFORCE
        return how if how in MODES else ENFORCE

    async def set_mode(self, mode: str, *, by: str, note: str = "") -> bool:
        """Have what the policy says hold (`enforce`), or only be recorded (`shadow`); whether that is a change."""
        if mode not in MODES:
            raise InvalidConfig(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}")
        if mode == await self.mode():
            return False
        await self._state.put(MODE, Pointer(0, by, note, time.time(), mode).encode())
        return True

    async def seen(self) -> list[dict[str, Any]]:
        """What every sidecar told of itself, also of those that were killed: `at` is when, in unix seconds.

        `active`, `mode` and `failure` are what it decides by, `calls` and `denied` how often since it began; `version`,
        `decided`, `counts` and `examples` what the version in shadow mode would have decided otherwise.
        """
        return [json.loads(one.data) for one in (await self._seen.all()).values()]

    async def running(self) -> list[dict[str, Any]]:
        """The same of the sidecars that run now."""
        oldest = time.time() - FRESH
        return [one for one in await self.seen() if "active" in one and one["at"] > oldest]

    async def followed(self, version: int, *, timeout: float = 5.0) -> list[str]:
        """Wait until every sidecar that runs decides by a version; those that do not within `timeout` seconds."""
        news = asyncio.Event()
        subscription = await self._broker.subscribe(f"{POLICY_SEEN}.*", lambda _: news.set())
        try:
            async with asyncio.timeout(timeout):
                while True:
                    news.clear()
                    if not (left := await self._behind(version)):
                        return left
                    await news.wait()
        except TimeoutError:
            return await self._behind(version)
        finally:
            await subscription.close()

    async def _behind(self, version: int) -> list[str]:
        return [one["replica"] for one in await self.running() if one["active"] != version and not one["failure"]]

    async def forget(self, replica: str) -> None:
        """A sidecar has ended."""
        await self._seen.remove(replica)

    async def tell(self, replica: str, seen: dict[str, Any]) -> None:
        """Keep what one sidecar tells of itself."""
        await self._seen.put(replica, json.dumps({"replica": replica, "at": time.time(), **seen}).encode())


def _version(number: int, data: bytes) -> Version:
    try:
        raw = msgpack.unpackb(data)
        bundle = Bundle.decode(raw["bundle"])
        return Version(number, raw["digest"], raw["author"], raw["note"], raw["at"], raw["rules"], bundle)
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise InvalidConfig(f"version {number} of the policy cannot be read: {error}") from None


async def registered(broker: Broker) -> Catalog:
    """The definitions that are approved of every registered tool server."""
    try:
        servers = await Latest(broker, TOOLS, TOOL_SERVERS).all()
        found = await Latest(broker, TOOLS, TOOL_PINS).all()
    except ApiError as error:
        if error.err_code == _NO_STREAM:
            return Catalog()
        raise
    definitions: dict[str, list[tuple[str, Any]]] = {server: [] for server in servers}
    for server, record in found.items():
        try:
            items = json.loads(zlib.decompressobj().decompress(record.data, _LARGEST_PIN))["items"]
            definitions[server] = [(key.partition(":")[0], one) for key, one in items.items()]
        except (zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("what is approved of %s cannot be read: %s", server, error)
    return Catalog.of(definitions)


async def known_agents(broker: Broker) -> frozenset[str]:
    """Names that rules can be about: the agents that are registered, and those of whoever uses the mesh itself."""
    prefix = "mesh.registry."
    info = await broker.api(f"STREAM.INFO.{REGISTRY}", {"subjects_filter": f"{prefix}*"})
    agents = (subject.removeprefix(prefix) for subject in info["state"].get("subjects") or ())
    return frozenset((*agents, DEFAULT_IDENTITY, OPERATOR))


class PolicyFollower:
    """Keeps an `ActivePolicy` at what is stored, and tells how this sidecar decides.

    A sidecar that cannot reach the broker goes on with what it had; one that starts without it allows nothing.

    Args:
        broker: a connection of account MESH.
        policy: what decides.
        catalog: the definitions that are approved now.
        replica: a name of this process, a token of subjects.
        changed: called when another policy, or another mode, decides.
    """

    def __init__(
        self,
        broker: Broker,
        policy: ActivePolicy,
        catalog: Callable[[], Catalog],
        *,
        replica: str,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = PolicyStore(broker)
        self._policy = policy
        self._catalog = catalog
        self._replica = replica
        self._changed = changed
        self._follower = Follower(broker, POLICY_CHANGES, self._look)
        self._used: tuple[int, int, str] | None = None
        self._compiled: dict[int, Compiled] = {}
        self._failures: dict[int, str] = {}
        self._outdated = False
        policy.use(None, failure=UNREAD)

    async def run(self, ready: Callable[[], None]) -> None:
        """Follow until cancelled; `ready` is called once what is stored decides."""
        await self._follower.run(ready)

    async def aclose(self) -> None:
        """Tell that this sidecar decides nothing any more."""
        try:
            async with asyncio.timeout(FAREWELL):
                await self._store.forget(self._replica)
        except (BrokerError, TimeoutError) as error:
            log.debug("it is not told that %s has ended: %s", self._replica, error)

    def outdate(self) -> None:
        """What is approved has changed: `refresh` has something to do."""
        self._outdated = True

    def refresh(self) -> None:
        """Decide by the definitions that are approved now. Costs nothing while they are the same."""
        if self._outdated:
            self._use()

    async def _look(self) -> None:
        try:
            active = (await self._store.pointer(ACTIVE)).version
            shadow = (await self._store.pointer(SHADOW)).version
            mode = await self._store.mode()
        except InvalidConfig as error:
            log.error("nothing is allowed: %s", error)
            self._used = None
            self._policy.use(None, failure=str(error))
            return
        if (active, shadow, mode) != self._used:
            for number in {active, shadow} - {0}:
                await self._read(number)
            self._compiled = {number: one for number, one in self._compiled.items() if number in (active, shadow)}
            before, self._used = self._used, (active, shadow, mode)
            self._use()
            log.info("policy version %d decides%s; mode %s", active, f", {shadow} watches" if shadow else "", mode)
            if before is not None:
                self._changed()
        await self._tell()

    async def _read(self, number: int) -> None:
        if number in self._compiled:
            return
        self._failures.pop(number, None)
        try:
            bundle = (await self._store.version(number)).bundle
            # Hundreds of rules take a tenth of a second, during which calls go on by the version before.
            compiled = await asyncio.to_thread(compile_bundle, bundle, None)
        except (InvalidConfig, PolicyNotFound) as error:
            self._failures[number] = f"version {number} cannot be used: {error}"
        else:
            self._compiled[number] = compiled

    def _use(self) -> None:
        """Decide by what was read last. Rules are read already, so that this takes no time."""
        if self._used is None:
            return
        self._outdated = False
        catalog = self._catalog()
        active, shadow, mode = self._used
        engine, failure = self._engine(active, catalog)
        candidate, unwatched = self._engine(shadow, catalog)
        if failure:
            log.error("nothing is allowed: policy %s", failure)
        if unwatched:
            log.warning("it is not watched: policy %s", unwatched)
        self._policy.use(engine, candidate, failure=failure, mode=mode)

    def _engine(self, number: int, catalog: Catalog) -> tuple[CedarEngine | None, str]:
        """What decides by a version, or why nothing can; neither for 0."""
        if number not in self._compiled:
            return None, self._failures.get(number, "")
        try:
            return self._compiled[number].engine(catalog, version=number), ""
        except InvalidConfig as error:
            return None, f"version {number} cannot be used: {error}"

    async def _tell(self) -> None:
        policy = self._policy
        said = {
            **policy.differences.encode(),
            "active": policy.version,
            "mode": policy.mode,
            "failure": policy.failure,
            "calls": policy.decided,
            "denied": policy.denied,
        }
        try:
            await self._store.tell(self._replica, said)
        except BrokerError as error:
            log.debug("it is not told how %s decides: %s", self._replica, error)


__all__ = ["ACTIVE", "SHADOW", "Pointer", "PolicyFollower", "PolicyStore", "Version", "known_agents", "registered"]
