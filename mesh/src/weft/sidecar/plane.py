"""The tool plane: every registered server, behind one pipeline, whichever front a request came by."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Final

from weft.client.limits import SharedLimits
from weft.client.policies import PolicyFollower
from weft.core.broker import Broker
from weft.core.latest import Follower
from weft.core.supervise import Tasks
from weft.core.toolsconf import ToolServer
from weft.core.toolstore import ToolStore
from weft.policy.active import ActivePolicy
from weft.policy.catalog import Catalog
from weft.policy.patterns import PRESIDIO
from weft.sidecar import decided
from weft.sidecar.aggregate import Aggregate
from weft.sidecar.approved import Approved, by_persons
from weft.sidecar.arguments import Arguments
from weft.sidecar.backend import Request
from weft.sidecar.decided import Decided, Hidden, Policy
from weft.sidecar.events import ACKNOWLEDGED, Events, Paced
from weft.sidecar.fence import Fenced, by_coordinator
from weft.sidecar.guards import SandboxRules
from weft.sidecar.inside import InName, Inside
from weft.sidecar.link import Heard, known_as
from weft.sidecar.paramheaders import param_headers
from weft.sidecar.pins import Pin
from weft.sidecar.pipeline import Call, Outcome, Pipeline, Stage
from weft.sidecar.presidio.recognizer import Recognizer
from weft.sidecar.rated import Rated
from weft.sidecar.records import Intended, Recorded, Recorder
from weft.sidecar.redacts import Notes, Redacts, hearing
from weft.sidecar.repeats import Repeats
from weft.sidecar.sandbox import choose
from weft.sidecar.sandboxed import Sandboxed
from weft.sidecar.served import CHANGES, Served
from weft.sidecar.session import Session, as_modern
from weft.sidecar.siblings import Siblings
from weft.sidecar.stages import ENDLESS, KINDS, Breaker, Concurrency, Deadline, Known, Pinned, ResponseSize
from weft.sidecar.upstream import Connect
from weft_protocols.errors import Conflict, InvalidConfig, ToolError, Unavailable
from weft_protocols.mcp import (
    EVERY,
    META_REDACTED,
    META_REFUSAL,
    META_SUBSCRIPTION,
    METHOD_NOT_FOUND,
    NO_SERVER,
    VERSION,
    name_of,
)
from weft_protocols.resources import TOOL_CHANGES

log = logging.getLogger("weft.sidecar")

TTL: Final = 60_000
"""Milliseconds for which a list of definitions may be kept by its caller."""
LISTS: Final = {
    "tools/list": ("tool", "tools"),
    "prompts/list": ("prompt", "prompts"),
    "resources/templates/list": ("template", "resourceTemplates"),
}
"""Listings that are answered from what is approved: the kind, and the field of the result."""
FORWARDED: Final = (
    "tools/call", "prompts/get", "resources/read", "resources/list", "completion/complete", "subscriptions/listen",
)  # fmt: skip
VERSION_TEXT: Final = re.compile(r"[A-Za-z0-9.+_-]{1,40}\Z")
OURS: Final = (META_REFUSAL, META_REDACTED)
"""Keys of `_meta` of results that no server sets."""
STARTED_WITHIN: Final = 20.0
"""Seconds to read which servers are registered."""
POLICY_WITHIN: Final = 5.0
"""Seconds more to read the policy, before it is served without: then nothing is allowed."""


def usual_stages(
    broker: Broker, recorder: Recorder, policy: Policy, recognizer: Recognizer, *, sidecars: Callable[[], int]
) -> list[Stage]:
    """What every sidecar has, in its order. Who decides comes before what a decision obliges to.

    `sidecars` says how many there are about now.
    """
    return [
        Recorded(recorder),
        Deadline(),
        Known(),
        Pinned(),
        Arguments(),
        Decided(policy),
        Sandboxed(),
        Fenced(by_coordinator(broker)),
        Repeats(broker),
        Rated(SharedLimits(broker, sidecars=sidecars)),
        Approved(by_persons(broker)),
        Redacts(recognizer),
        ResponseSize(),  # on the way back it comes first: what is too large is not looked through
        Breaker(),
        Concurrency(),
        Intended(recorder),
    ]


class Plane:
    """All servers of a mesh.

    Args:
        broker: a connection of account MESH.
        connect: opens links to servers.
        stages: what calls pass.
        presidio: Presidio's own configuration, a YAML file; empty for its patterns alone.
    """

    def __init__(
        self, broker: Broker, connect: Connect, stages: Sequence[Stage] | None = None, *, presidio: str = ""
    ) -> None:
        self.store = ToolStore(broker)
        self.recognizer = Recognizer(presidio)
        self.recorder = Recorder(broker, self.recognizer)
        self._siblings = Siblings(broker)
        self.policy = ActivePolicy()
        """What decides."""
        self.policies = PolicyFollower(
            broker, self.policy, self._definitions, replica=self.recorder.by.replace("/", "-"), changed=self._tell
        )
        usual = usual_stages(broker, self.recorder, self.policy, self.recognizer, sidecars=lambda: self.sidecars)
        self.pipeline = Pipeline(usual if stages is None else stages)
        self.events = Events()
        self._connect = connect
        self._served: dict[str, Served] = {}
        self._pins: dict[str, tuple[int, Pin | None]] = {}
        self._notes: dict[frozenset[str], Notes] = {}
        self._follower = Follower(broker, TOOL_CHANGES, self._look)
        self._aggregate = Aggregate(self)
        self._tasks = Tasks("tool plane")
        self._ending = Tasks("ends of tool servers")

    async def start(self) -> None:
        """Read what is registered, and follow it from now on. Raises Unavailable if it cannot be read."""
        await asyncio.to_thread(choose, SandboxRules())  # it is tried out once
        await self._siblings.start()
        ready = asyncio.Event()
        self._tasks.start(self._follower.run(ready.set), name="registrations")
        try:
            async with asyncio.timeout(STARTED_WITHIN):
                await ready.wait()
        except TimeoutError:
            raise Unavailable("which tool servers are registered cannot be read: is the mesh up?") from None
        decides = asyncio.Event()
        self._tasks.start(self.policies.run(decides.set), name="policy")
        try:
            async with asyncio.timeout(POLICY_WITHIN):
                await decides.wait()
        except TimeoutError:
            log.error("the policy cannot be read; until it can, nothing is allowed")

    async def aclose(self) -> None:
        """End every server's processes and connections."""
        await self._tasks.aclose()
        await self._siblings.aclose()
        await self.events.aclose()
        await self.policies.aclose()
        await self.recorder.aclose()
        await self.recognizer.aclose()
        served, self._served = list(self._served.values()), {}
        async with asyncio.TaskGroup() as group:
            for one in served:
                group.create_task(one.aclose())
            group.create_task(self._ending.idle())  # to the end of each: a process must not outlive it

    @property
    def sidecars(self) -> int:
        """How many sidecars there are about now, this one included."""
        return self._siblings.count

    @property
    def servers(self) -> dict[str, Served]:
        """Those that are enabled, by name."""
        return {name: one for name, one in sorted(self._served.items()) if one.server.enabled}

    @property
    def state(self) -> list[dict[str, Any]]:
        """Every registered server, for operators."""
        return [
            {**one.state, "unredacted": self.recognizer.fault if _recognizes(one) else ""}
            for _, one in sorted(self._served.items())
        ]

    async def unredacted(self, one: Served) -> str:
        """Why nobody can look through what a server answers, tried out; empty if that is not needed, or works."""
        return await self.recognizer.ready() if _recognizes(one) else ""

    def served(self, name: str) -> Served:
        """A server. Raises ToolError if there is none of that name, or it is switched off."""
        found = self._served.get(name)
        if found is None or not found.server.enabled:
            raise ToolError(_none(name, self.servers), code=NO_SERVER)
        return found

    def shown(self, request: Request) -> dict[str, Served]:
        """Those that are enabled and that whoever asks may see, by name."""
        self.policies.refresh()
        return {name: one for name, one in self.servers.items() if not decided.hidden(self.policy, request, name)}

    async def handle(self, request: Request, heard: Heard) -> dict[str, Any]:
        """See `Backend`."""
        if request.server == EVERY:
            return await self._aggregate.handle(request, heard)
        return await self.one(request, heard)

    async def one(self, request: Request, heard: Heard) -> dict[str, Any]:
        """A request to one server, names being its own."""
        heard = Paced(heard, request.server)
        self.policies.refresh()
        server = request.server
        if server not in self.servers:
            raise ToolError(_none(server, self.shown(request)), code=NO_SERVER)
        served = self.served(server)
        if decided.hidden(self.policy, request, server) and decided.useless(
            self.policy, request, request.method, request.params, server=server
        ):
            return await self._conceal(request)
        if request.method == "ping":
            return {}
        if request.method == "server/discover":
            return await self._discover(served)
        if request.method not in LISTS and request.method not in FORWARDED:
            raise ToolError(f"{request.method} is not served here", code=METHOD_NOT_FOUND)
        call = await self._call_of(served, request)
        if request.method in LISTS:
            return await self.pipeline.run(call, lambda call: self._listed(served, call))
        return await self.pipeline.run(call, lambda call: self._forward(served, call, request, heard))

    async def outcome(self, request: Request, facts: Mapping[str, Any]) -> Outcome:
        """How a call of a tool ended that is part of another one, with what is known about it."""
        try:
            served = self.served(request.server)
            call = await self._call_of(served, request)
        except ToolError as error:
            return Outcome(error=error)
        call = replace(call, facts={**call.facts, **facts})
        return await self.pipeline.outcome(call, lambda call: self._forward(served, call, request, lambda *_: None))

    async def _conceal(self, request: Request) -> dict[str, Any]:
        """Answer as if there were no such server; that it was tried is recorded."""
        hide = Hidden(_none(request.server, self.shown(request)))
        call = _asked(request)

        async def never(_: Call) -> dict[str, Any]:
            raise ToolError("a hidden server is not called", code=NO_SERVER)

        return await Pipeline([Recorded(self.recorder), hide]).run(call, never)

    async def _call_of(self, served: Served, request: Request) -> Call:
        """A request as the stages see it. Raises ToolError if the server was never reached and cannot be."""
        await served.known()
        self.policies.refresh()
        name = name_of(request.method, request.params)
        kind = KINDS.get(request.method)
        definition, digest, quarantine = served.definition(kind, name) if kind else (None, "", "")
        if kind and definition is None:
            await served.look_again()
            definition, digest, quarantine = served.definition(kind, name)
        return replace(
            _asked(request),
            limits=served.upstream.limits,
            guards=served.upstream.guards,
            facts={"sandbox": served.upstream.sandbox.name} if served.server.transport != "http" else {},
            definition=definition,
            definition_digest=digest,
            quarantine=quarantine,
        )

    async def _discover(self, served: Served) -> dict[str, Any]:
        identity = (await served.known()).identity
        if identity is None:
            raise ToolError(f"{served.name} has not said who it is", code=NO_SERVER)
        capabilities = dict(identity.capabilities)
        made: dict[str, Any] = {
            "supportedVersions": [VERSION],
            "capabilities": capabilities,
            # A name, title or description of its own is pinned by nobody, and could be another server's.
            "_meta": {"io.modelcontextprotocol/serverInfo": {"name": served.name, "version": _version(identity.info)}},
        }
        if identity.instructions and not served.catalog.why("instructions"):
            made["instructions"] = identity.instructions
        return as_modern("server/discover", made)

    async def _listed(self, served: Served, call: Call) -> dict[str, Any]:
        kind, part = LISTS[call.method]
        offered = [dict(one) for one in served.catalog.approved(kind)]
        action, named = ("read", "uriTemplate") if kind == "template" else ("call" if kind == "tool" else "get", "name")
        made: dict[str, Any] = {part: self._visible(call, offered, action, named)}
        return as_modern(call.method, {"ttlMs": TTL, **made}) if call.modern else made

    def _visible(self, call: Call, offered: Iterable[Any], action: str, named: str) -> list[Any]:
        """What of a list its reader could call."""
        policy = self.policy
        return [
            one
            for one in offered
            if isinstance(one, dict) and policy.visible(decided.request(call, action, str(one.get(named, ""))))
        ]

    async def _forward(self, served: Served, call: Call, request: Request, heard: Heard) -> dict[str, Any]:
        headers = {**request.extra, **param_headers(call)}
        heard = hearing(call, heard)
        async with served.upstream.borrowed() as session:
            if call.method in ENDLESS:
                return await self._listen(session, call, request, heard)
            if call.method == "tools/call" and served.server.builtin and isinstance(session.link, Inside):
                return await session.link.perform(call, InName(self, call))
            try:
                return await self._call(session, call, heard, headers)
            except asyncio.CancelledError:
                if call.deadline is not None and time.time() >= call.deadline:
                    self._tasks.start(served.upstream.doubt(session), name=f"whether {served.name} lives")
                raise

    async def _call(self, session: Session, call: Call, heard: Heard, headers: Mapping[str, str]) -> dict[str, Any]:
        result = await session.call(call.method, call.params, modern=call.modern, heard=heard, headers=headers)
        result = _without_ours(result)
        if call.method in ("resources/list", "resources/read") and "cacheScope" in result:
            # Who may see it is decided for each caller, so that nobody may keep it for others.
            result = {**result, "cacheScope": "private"}
        if call.method == "resources/list" and isinstance(result.get("resources"), list):
            result = {**result, "resources": self._visible(call, result["resources"], "read", "uri")}
        return result

    async def _listen(self, session: Session, call: Call, request: Request, heard: Heard) -> dict[str, Any]:
        """A subscription, known to the caller by its own id."""
        if not session.identity.modern:
            return await self._hear_of(session, call, request, heard)

        with ExitStack() as stack:

            def told(method: str, params: dict[str, Any]) -> None:
                heard(method, known_as(params, request.id))
                if method == ACKNOWLEDGED:  # nothing is told before
                    agreed = params.get("notifications")
                    stack.enter_context(self.events.also(agreed, ident=request.id, heard=heard))

            return known_as(await session.call(call.method, call.params, heard=told), request.id)

    async def _hear_of(self, session: Session, call: Call, request: Request, heard: Heard) -> dict[str, Any]:
        """A subscription to a server of the earlier era: what it says by itself."""
        wanted = call.params.get("notifications")
        listed = wanted.get("resourceSubscriptions") if isinstance(wanted, dict) else None
        offered = session.identity.capabilities.get("resources")
        watched: list[str] = []
        if isinstance(listed, list) and isinstance(offered, dict) and offered.get("subscribe"):
            watched = [str(uri) for uri in listed]
            for uri in watched:
                await session.call("resources/subscribe", {"uri": uri}, modern=False)
        await self.events.listen((call.server,), wanted, ident=request.id, heard=heard, resources=watched)
        return {"resultType": "complete", "_meta": {META_SUBSCRIPTION: request.id}}

    # Registrations -----------------------------------------------------------------------------

    async def _look(self) -> None:
        """Take over what is registered and approved now."""
        pins = self._pins
        before = {name: one.server for name, one in self._served.items()}, pins
        registered = await self.store.registered()
        await self._read_pins()
        # Whoever takes a pin away wants what is seen next to be the first.
        unpinned = {name for name in pins if name not in self._pins}
        changed = {name for name, one in self._served.items() if registered.get(name) != one.server}
        for name in (changed | unpinned) & self._served.keys():
            gone = self._served.pop(name)
            self._ending.start(gone.aclose(), name=f"end of {name}")
            log.info("tool server %s: %s", name, "changed" if name in registered else "removed")
        for name, server in registered.items():
            sequence, pin = self._pins.get(name, (0, None))
            served = self._served.get(name)
            if served is None:
                self._served[name] = self._made(server, pin, sequence)
                log.info("tool server %s: %s", name, server.where)
            elif pin is not None:
                served.repin(pin, sequence)
        if any(map(_recognizes, self._served.values())):
            self.recognizer.begin()
        if (registered, self._pins) != before:
            self.policies.outdate()
            self._tell()

    def _tell(self) -> None:
        """What somebody may call has changed."""
        for method in CHANGES:
            self.events.said(EVERY, method, {})

    def _definitions(self) -> Catalog:
        """Everything that is approved."""
        found: dict[str, list[tuple[str, Any]]] = {}
        for name, one in self._served.items():
            items = one.pin.items if one.pin is not None else {}
            found[name] = [(key.partition(":")[0], item) for key, item in items.items()]
        return Catalog.of(found)

    def _made(self, server: ToolServer, pin: Pin | None, sequence: int) -> Served:
        return Served(
            server,
            self._connect,
            pin=pin,
            pin_sequence=sequence,
            remember=self._remember,
            on_event=self._said,
            on_pinned=self.policies.outdate,
        )

    def _said(self, server: str, method: str, params: dict[str, Any]) -> None:
        """Tell whoever listens what a server said by itself."""
        served = self._served.get(server)
        classes = frozenset(served.upstream.guards.redact) if served is not None else frozenset()
        if not classes:
            self.events.said(server, method, params)
            return
        notes = self._notes.setdefault(classes, Notes(self.recognizer, classes))
        notes.tell(partial(self.events.said, server), method, params)

    async def _read_pins(self) -> None:
        found: dict[str, tuple[int, Pin | None]] = {}
        for name, record in (await self.store.pins.all()).items():
            before = self._pins.get(name)
            if before is not None and before[0] == record.seq:
                found[name] = before
                continue
            try:
                found[name] = (record.seq, Pin.decode(record.data))
            except InvalidConfig as error:
                log.warning("%s: %s; nothing of it is approved", name, error)
                found[name] = (record.seq, Pin())
        self._pins = found

    async def _remember(self, name: str, pin: Pin) -> tuple[Pin, int]:
        """Store a server's first pin; the one that holds, which another sidecar may have stored first."""
        record = await self.store.pins.get(name)
        if record is None:
            last = await self.store.pins.last_sequence(name)
            try:
                await self.store.pins.put(name, pin.encode(), after=last)
            except Conflict:
                log.debug("another sidecar pinned %s first", name)
            record = await self.store.pins.get(name)
        return (Pin.decode(record.data), record.seq) if record is not None else (Pin(), 0)


def _recognizes(one: Served) -> bool:
    """Whether Presidio looks through what a server answers, whatever the policy says."""
    return PRESIDIO in one.upstream.guards.redact


def _asked(request: Request) -> Call:
    """What a request itself says of a call."""
    return Call(
        caller=request.caller,
        server=request.server,
        method=request.method,
        name=name_of(request.method, request.params),
        params=request.params,
        modern=request.modern,
        front=request.front,
        request=request.token,
        task=request.task,
        chain=request.chain,
        agent_version=request.agent_version,
        skill=request.skill,
        sender=request.sender,
        deadline=request.deadline,
    )


def _version(info: Mapping[str, Any]) -> str:
    """A server's version as it says it, if it looks like one."""
    told = info.get("version")
    return told if isinstance(told, str) and VERSION_TEXT.match(told) else ""


def _without_ours(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what only the sidecar says: a server could pass for it."""
    meta = result.get("_meta")
    if not isinstance(meta, dict) or not any(key in meta for key in OURS):
        return result
    return {**result, "_meta": {key: value for key, value in meta.items() if key not in OURS}}


def _none(name: str, known: Iterable[str]) -> str:
    return f"there is no tool server {name!r}; there are: {', '.join(known) or 'none'}"
