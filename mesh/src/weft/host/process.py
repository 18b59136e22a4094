"""An agent replica as a process: `python -m weft.host TARGET [CARD NAME]` and `mesh run TARGET`.

`python -m weft.host --bridge NAME URL [HEADER=VARIABLE…]` is one of a bridge.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Coroutine
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from weft.client import coordinator
from weft.core import process
from weft.core.broker import Broker
from weft.core.config import load_settings
from weft.core.supervise import Tasks
from weft.host import progress
from weft.host.agent import Agent
from weft.host.loading import load_agent, load_bridge, load_executor
from weft.host.replica import CLOSING, Replica, new_replica_id
from weft_protocols import connections
from weft_protocols.errors import BrokerError, InvalidConfig, TimedOut, Unavailable, Unreachable, WeftError
from weft_protocols.resources import DURABILITY, Durability

log = logging.getLogger("weft.host")

T = TypeVar("T")
HEARTBEAT: Final = 2.0
"""Seconds between a replica's reports to the coordinator."""


def main(arguments: list[str] | None = None) -> int:
    """Run the agent a target names until SIGTERM or SIGINT; the exit code of its end."""
    arguments = sys.argv[1:] if arguments is None else arguments
    process.log_to_stderr()
    bridges = arguments[:1] == ["--bridge"]
    if len(arguments) < 3 if bridges else len(arguments) not in (1, 3):
        sys.stderr.write(
            "usage: python -m weft.host path/to/file.py[:name] [card.json agent-name]\n"
            "       python -m weft.host --bridge agent-name URL [HEADER=VARIABLE...]\n"
        )
        return 2
    try:
        agent = _load(arguments[1:], bridge=True) if bridges else _load(arguments)
        process.collect_seldom()
        return int(run_loop(serve(agent)))
    except WeftError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


def _load(arguments: list[str], *, bridge: bool = False) -> Agent:
    if bridge:
        return load_bridge(*arguments)
    return load_agent(arguments[0]) if len(arguments) == 1 else load_executor(*arguments)


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop where it is installed. A handler that does not stop cannot keep it from returning."""
    loop = process.loop_factory()()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=CLOSING))
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


def leave(code: int) -> NoReturn:
    """End this process, whatever threads its handlers started: nothing they write counts any more."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        os._exit(code)
    sys.exit(code)


async def serve(agent: Agent, *, grace: float | None = None, home: Path | None = None) -> int:
    """Run one replica of an agent until it is told to stop; 0, or the exit code of what ended it.

    Raises:
        InvalidConfig: the identity is not the agent's, or there is no mesh here.
        NotAuthenticated: the account was revoked.
    """
    settings = load_settings(os.environ.get("WEFT_IDENTITY") or agent.name, home=home)
    if settings.identity != agent.name:
        raise InvalidConfig(
            f"this process has the identity {settings.identity!r}, but the agent is called {agent.name!r}; an agent "
            "runs under its own account"
        )
    agent.describe()  # an input that has no schema is an error now, not when the first caller looks
    seconds = grace if grace is not None else float(os.environ.get("WEFT_GRACE", "30"))
    replica_id = new_replica_id()
    name = connections.of_replica(agent.name, replica_id)
    broker = await Broker.connect(settings, name=name, timeout=15.0)
    try:
        replica = Replica(agent, broker, durability=_durability(), replica_id=replica_id)
        background = Tasks(f"process of {agent.name}")
        process.leave_when_told(replica.stop)
        background.start(_report(replica), name="report to the coordinator")
        for service in agent.services:
            background.start(service(), name=f"service of {agent.name}")
        try:
            await replica.run(grace=seconds, ready=lambda: _ready(replica))
        finally:
            await background.aclose()
            with contextlib.suppress(BrokerError, Unavailable):
                await coordinator.leave(broker, agent.name, replica.id)
    finally:
        await broker.close()
    return 0


def _ready(replica: Replica) -> None:
    sys.stderr.write(f"ready: agent {replica.agent.name} {replica.agent.version}, replica {replica.id}\n")
    sys.stderr.flush()


def _durability() -> Durability:
    return DURABILITY.get(os.environ.get("WEFT_DURABILITY", "laptop"), DURABILITY["laptop"])


async def _report(replica: Replica) -> None:
    """Register with the coordinator and report to it. Its absence is no error: nothing here depends on it."""
    registered, refused, shown = False, "", replica.agent.card
    while True:
        try:
            if not registered or replica.agent.card is not shown:
                shown = replica.agent.card
                answer = await _register(replica)
                replica.progress_within = float(answer.get("progress_within") or replica.agent.progress_within)
                _tell_superseded(replica, answer)
            registered = await coordinator.heartbeat(replica.broker, replica.agent.name, _heartbeat(replica))
            refused = ""
        except (Unavailable, Unreachable, TimedOut) as error:
            registered = False
            log.debug("could not report: %s", error)
        except WeftError as error:
            registered = False
            if str(error) != refused:
                log.error("the coordinator refused this replica: %s", error)
            refused = str(error)
        await asyncio.sleep(HEARTBEAT)


async def _register(replica: Replica) -> dict[str, Any]:
    body = _registration(replica)
    return await coordinator.call(replica.broker, "register", body, timeout=coordinator.CHANGE_TIMEOUT)


def _tell_superseded(replica: Replica, answer: dict[str, Any]) -> None:
    """Say that callers see another card of this agent than the one that comes with this code."""
    card = answer.get("card", {})
    if not card.get("current", True):
        name = replica.agent.name
        log.warning(
            "callers see the card of version %s of %s, not that of this replica (%s): this card was replaced before, "
            "or its version is lower; raise the version, or bring it back with: mesh agents pin %s %s",
            card.get("version"),
            name,
            replica.agent.version,
            name,
            replica.agent.version,
        )


def _registration(replica: Replica) -> dict[str, Any]:
    return {
        **replica.agent.describe(),
        "replica": replica.id,
        "pid": os.getpid(),
        "host": platform.node(),
        "slots": replica.slots.total,
        "weight": replica.agent.weight,
        "cost": replica.agent.cost,
        "code_digest": code_digest(replica.agent),
    }


def _heartbeat(replica: Replica) -> dict[str, Any]:
    return {
        "replica": replica.id,
        "state": "draining" if replica.draining else "ready",
        "active": len(replica.live),
        "waiting": sum(1 for run in replica.live.values() if not run.slot.held),
        "slots": replica.slots.total,
        "done": replica.counters.done,
        "failed": replica.counters.failed,
        "last_progress": int(max((run.last_progress for run in replica.live.values()), default=0) * 1000)
        or int(replica.counters.last_progress * 1000),
        "stalled": progress.stalled(replica.live.values(), replica.progress_within, now=time.time()),
        "at": int(time.time() * 1000),
    }


def code_digest(agent: Agent) -> str:
    """Digest of the source files the agent's skills are in: two agents of one name differ in it."""
    digest = sha256()
    files = {
        getattr(skill.handler, "__code__", None) and skill.handler.__code__.co_filename
        for skill in agent.skills.values()
    }
    files.add(agent.turns.source if agent.turns is not None else None)
    for name in sorted(str(file) for file in files if file):
        path = Path(name)
        digest.update(path.read_bytes() if path.is_file() else name.encode())
    return digest.hexdigest()
