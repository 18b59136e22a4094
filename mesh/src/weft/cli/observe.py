"""What can be seen of a mesh from outside: broker, streams, consumers, the coordinator's registry, processes."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weft.core.home import GatewayRecord, Home
from weft_protocols import subjects
from weft_protocols.errors import ApiError, BrokerError, TimedOut, Unavailable, Unreachable, WeftError
from weft_protocols.resources import BLOBS, STREAM

if TYPE_CHECKING:
    from weft.core.broker import Broker

PAGE: Final = 256
"""Consumers the broker lists at a time."""
ANSWER: Final = 2.0
"""Seconds the coordinator has to answer."""
_NOT_FOUND: Final = (10059, 10014, 10037)


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """One stream."""

    name: str
    messages: int
    bytes: int
    max_bytes: int
    """-1 for no limit."""


@dataclass(frozen=True, slots=True)
class LaneFacts:
    """One durable consumer of an agent: `work` or `input`."""

    pending: int
    """Messages no replica has been given yet."""
    active: int
    """Messages given to a replica and not finished."""
    redelivered: int
    """Of these, how many were given out more than once."""
    oldest: float | None
    """Seconds the oldest pending message has been waiting."""


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """One replica, as it reports itself to the coordinator."""

    id: str
    version: str
    state: str
    active: int
    slots: int
    seen: float | None
    """Seconds since its last report."""
    progress: float | None
    """Seconds since any of its tasks made progress; None if it never had one."""
    pid: int | None
    host: str


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """One agent, as the coordinator knows it."""

    name: str
    version: str
    description: str
    skills: tuple[str, ...]
    replicas: tuple[ReplicaFacts, ...]


@dataclass(frozen=True, slots=True)
class GatewayFacts:
    """The gateway that `gateway.json` names."""

    http: str
    """Base address of HTTP."""
    grpc: str
    reason: str
    """Why it is not ready; empty if it is."""


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """What decides about tools."""

    active: int
    """Its version; 0 for none."""
    mode: str
    sidecars: tuple[Mapping[str, Any], ...]
    """What each that runs told of itself; see `PolicyStore.seen`."""
    differs: str = ""
    """The folder that `mesh.yaml` names, where it is not what decides; else empty."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A mesh at one moment."""

    url: str
    latency: float
    """Seconds of one round trip to the broker."""
    clock: float | None
    """Seconds this machine's clock is ahead of the broker's."""
    streams: Mapping[str, StreamFacts | None]
    """By name; None where it does not exist."""
    lanes: Mapping[tuple[str, str], LaneFacts]
    """By agent and lane."""
    agents: Mapping[str, AgentFacts] | None
    """By name; None when the coordinator does not answer."""
    silence: str
    """Why the coordinator does not answer."""
    processes: tuple[Mapping[str, Any], ...] | None
    """Rows of `mesh ps`; None where no supervisor runs on this machine."""
    gateway: GatewayFacts | None = None
    """None where none runs on this machine."""
    incidents: tuple[Mapping[str, Any], ...] = ()
    """Open incidents, as the coordinator's leader tells them."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """States of tool servers, as a sidecar tells them."""
    policy: PolicyFacts | None = None
    """None where it cannot be read."""

    @property
    def names(self) -> list[str]:
        """Every agent that anybody knows."""
        known = {agent for agent, _ in self.lanes} | set(self.agents or ())
        return sorted(known | {row["agent"] for row in self.processes or () if row["agent"]})


async def gather() -> Facts:
    """Look at the mesh here as its operator.

    Raises:
        Unavailable: there is no mesh here, or it is not running.
        Unreachable, NotAuthenticated: its broker does not answer, or not to the operator.
    """
    from weft.core.broker import Broker
    from weft.core.config import load_settings

    settings = load_settings(subjects.OPERATOR)
    elsewhere = bool(os.environ.get("WEFT_URL"))
    broker = await Broker.connect(settings, name="mesh health")
    try:
        begun = time.monotonic()
        await broker.flush()
        latency = time.monotonic() - begun
        infos = {STREAM: await _stream(broker, STREAM)}
        clock = None if infos[STREAM] is None else _ahead(infos[STREAM])
        infos[BLOBS] = await _stream(broker, BLOBS)
        lanes = await _lanes(broker) if infos[STREAM] is not None else {}
        agents, silence = await _registry(broker)
        rows = None if settings.home is None or elsewhere else processes_of(settings.home)
        return Facts(
            url=settings.url,
            latency=latency,
            clock=clock,
            streams={name: None if info is None else _stream_facts(name, info) for name, info in infos.items()},
            lanes=lanes,
            agents=agents,
            silence=silence,
            processes=rows,
            gateway=None if settings.home is None or elsewhere else await asyncio.to_thread(gateway_of, settings.home),
            incidents=await _incidents(broker) if agents is not None else (),
            tools=await _tools(broker) if any(row["kind"] == "sidecar" for row in rows or ()) else (),
            policy=await _policy(broker, None if elsewhere else settings.home),
        )
    finally:
        await broker.close()


def processes_of(home: Path) -> tuple[Mapping[str, Any], ...] | None:
    """What the supervisor here says of its processes; None if there is none."""
    from weft.cli.supervisor.control import call

    try:
        return tuple(call(home, "ps", timeout=ANSWER))
    except Unavailable:
        return None
    except WeftError as error:
        return ({"name": "supervisor", "kind": "supervisor", "agent": "", "state": "down", "reason": str(error)},)


def gateway_of(home: Path) -> GatewayFacts | None:
    """How the gateway of this machine says it is; blocks for `ANSWER` seconds at most."""
    import http.client
    from urllib.parse import urlsplit

    record = GatewayRecord.read(Home(home))
    if record is None or not record.alive:
        return None
    address = urlsplit(record.http)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=ANSWER)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        said = json.loads(answer.read(65_536))
        reason = "" if answer.status == 200 else str(said.get("reason") or f"it answers {answer.status}")
    except TimeoutError:
        reason = f"no answer within {ANSWER:g} s"
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
        reason = f"it does not answer: {error}"
    finally:
        connection.close()
    return GatewayFacts(record.http, record.grpc, reason)


async def _stream(broker: Broker, name: str) -> dict[str, Any] | None:
    try:
        return await broker.api(f"STREAM.INFO.{name}")
    except ApiError as error:
        if error.err_code in _NOT_FOUND:
            return None
        raise


def _stream_facts(name: str, info: Mapping[str, Any]) -> StreamFacts:
    state = info["state"]
    return StreamFacts(name, int(state["messages"]), int(state["bytes"]), int(info["config"].get("max_bytes", -1)))


def _ahead(info: Mapping[str, Any]) -> float | None:
    there = unix_seconds(info.get("ts"))
    return None if there is None else time.time() - there


async def _lanes(broker: Broker) -> dict[tuple[str, str], LaneFacts]:
    lanes: dict[tuple[str, str], LaneFacts] = {}
    offset, total = 0, 1
    while offset < total:
        page = await broker.api(f"CONSUMER.LIST.{STREAM}", {"offset": offset})
        total = int(page.get("total", 0))
        for info in page.get("consumers") or ():
            agent, _, lane = str(info["name"]).partition("=")
            if lane in subjects.LANES:
                lanes[agent, lane] = await _lane(broker, info)
        offset += PAGE
    return lanes


async def _lane(broker: Broker, info: Mapping[str, Any]) -> LaneFacts:
    pending = int(info.get("num_pending", 0))
    oldest = None
    if pending:
        after = int(info.get("delivered", {}).get("stream_seq", 0))
        query = {"seq": after + 1, "next_by_subj": info["config"]["filter_subject"]}
        try:
            found = await broker.api(f"STREAM.MSG.GET.{STREAM}", query)
        except ApiError as error:
            # Delivered or purged since: then nothing is waiting.
            if error.err_code not in _NOT_FOUND:
                raise
        else:
            stored = unix_seconds(found["message"]["time"])
            oldest = None if stored is None else max(0.0, time.time() - stored)
    return LaneFacts(pending, int(info.get("num_ack_pending", 0)), int(info.get("num_redelivered", 0)), oldest)


async def _registry(broker: Broker) -> tuple[dict[str, AgentFacts] | None, str]:
    """What the coordinator knows of the agents, or why it says nothing."""
    try:
        reply = await broker.request(subjects.coord("agents", subjects.OPERATOR), b"{}", timeout=ANSWER)
        entries = json.loads(reply.data)["agents"]
    except Unreachable:
        return None, "nobody answers for it"
    except TimedOut:
        return None, f"no answer within {ANSWER:g} s"
    except BrokerError as error:
        return None, str(error)
    except (ValueError, KeyError, TypeError):
        return None, "its answer is not understood: another version?"
    now = time.time()
    return {entry["name"]: _agent(entry, now) for entry in entries}, ""


async def _tools(broker: Broker) -> tuple[Mapping[str, Any], ...]:
    """Tool servers; none where no sidecar answers, which is told elsewhere."""
    from weft.client.tools import ToolClient, ToolRequest
    from weft_protocols.errors import WeftError
    from weft_protocols.mcp import EVERY

    client = ToolClient(broker)
    try:
        told = await client.request(ToolRequest(EVERY, "weft/servers", deadline=time.time() + ANSWER))
    except WeftError:
        return ()
    finally:
        await client.aclose()
    return tuple(told["servers"])


async def _policy(broker: Broker, home: Path | None) -> PolicyFacts | None:
    from weft.client.policies import PolicyStore

    store = PolicyStore(broker)
    try:
        active = (await store.pointer()).version
        digest = (await store.version(active)).digest if active else ""
        differs = await asyncio.to_thread(_differs, home, digest) if home is not None else ""
        return PolicyFacts(active, await store.mode(), tuple(await store.running()), differs)
    except WeftError:
        return None


def _differs(home: Path, digest: str) -> str:
    """The folder of the policy that `mesh.yaml` names, if what is in it does not have this digest."""
    from weft.client.policyload import read_folder
    from weft.core.config import CONFIG_NAME, load_mesh_config

    try:
        folder = load_mesh_config(home.parent / CONFIG_NAME).policy.folder
    except WeftError:
        return ""
    if folder is None:
        return ""
    try:
        same = read_folder(folder).digest == digest
    except WeftError:
        same = False
    return "" if same else os.path.relpath(folder)


async def _incidents(broker: Broker) -> tuple[Mapping[str, Any], ...]:
    """Open incidents; none where nobody leads right now."""
    try:
        reply = await broker.request(subjects.coord("incidents", subjects.OPERATOR), b"{}", timeout=ANSWER)
        return tuple(json.loads(reply.data)["incidents"])
    except (BrokerError, ValueError, KeyError, TypeError):
        return ()


def _agent(entry: Mapping[str, Any], now: float) -> AgentFacts:
    return AgentFacts(
        name=str(entry["name"]),
        version=str(entry.get("version") or ""),
        description=str(entry.get("description") or ""),
        skills=tuple(
            str(skill.get("id", "")) if isinstance(skill, Mapping) else str(skill)
            for skill in entry.get("skills") or ()
        ),
        replicas=tuple(_replica(replica, now) for replica in entry.get("replicas") or ()),
    )


def _replica(entry: Mapping[str, Any], now: float) -> ReplicaFacts:
    seen, progress = unix_seconds(entry.get("last_seen")), unix_seconds(entry.get("last_progress"))
    return ReplicaFacts(
        id=str(entry.get("replica") or ""),
        version=str(entry.get("version") or ""),
        state=str(entry.get("state") or ""),
        active=int(entry.get("active") or 0),
        slots=int(entry.get("slots") or 0),
        seen=None if seen is None else max(0.0, now - seen),
        progress=None if not progress else max(0.0, now - progress),
        pid=int(entry["pid"]) if entry.get("pid") else None,
        host=str(entry.get("host") or ""),
    )


def unix_seconds(value: object) -> float | None:
    """Unix seconds of a time in milliseconds or RFC 3339 (which may have nanoseconds)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value / 1000
    if not isinstance(value, str) or not value:
        return None
    head, dot, rest = value.partition(".")
    digits = rest.rstrip("Z").partition("+")[0].partition("-")[0]
    zone = rest[len(digits) :] if dot else ""
    try:
        return datetime.fromisoformat(
            (f"{head}.{digits[:6]:0<6}{zone}" if dot else value).replace("Z", "+00:00")
        ).timestamp()
    except ValueError:
        return None
