"""The agents of the mesh in the terms of the NATS services protocol (`nats micro`): every ready replica an instance."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from weft_coordinator.decide.presence import Presence
from weft_coordinator.decide.registry import AgentRecord, Replica
from weft_protocols import subjects

PREFIX: Final = "$SRV"
VERBS: Final = ("PING", "INFO", "STATS")
ENDPOINT: Final = "tasks"
_SEMVER: Final = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(-(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(\.(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*)?"
    r"(\+[0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*)?\Z"
)


def answers(
    subject: str, records: Mapping[str, AgentRecord], presence: Presence, *, now: int
) -> Iterator[dict[str, Any]]:
    """One answer for each ready replica that `$SRV.{verb}[.{name}[.{id}]]` asks for; none for any other subject."""
    prefix, _, rest = subject.partition(".")
    verb, *named = rest.split(".")
    if prefix != PREFIX or verb not in VERBS or len(named) > 2:
        return
    for agent in sorted(records):
        if named and named[0] != agent:
            continue
        for replica in records[agent].replicas.values():
            if len(named) == 2 and named[1] != replica.replica:
                continue
            if presence.state(agent, replica.replica, registered=replica.registered, now=now) == "ready":
                yield _answer(verb, records[agent], replica, presence)


def _answer(verb: str, record: AgentRecord, replica: Replica, presence: Presence) -> dict[str, Any]:
    told: dict[str, Any] = {
        "type": f"io.nats.micro.v1.{verb.lower()}_response",
        "name": record.agent,
        "id": replica.replica,
        "version": semver(replica.version),
        "metadata": {
            "weft.version": replica.version,
            "weft.card_digest": replica.card_digest,
            "weft.host": replica.host,
            "weft.pid": str(replica.pid),
        },
    }
    endpoint = {
        "name": ENDPOINT,
        "subject": subjects.GRAMMAR["task"].pattern(agent=record.agent),
        "queue_group": subjects.consumer(record.agent, "work"),
    }
    if verb == "INFO":
        told["description"] = record.description
        skills = ",".join(str(skill["id"]) for skill in record.skills)
        told["endpoints"] = [{**endpoint, "metadata": {"weft.skills": skills, "weft.slots": str(replica.slots)}}]
    elif verb == "STATS":
        said = presence.show(record.agent, replica.replica, registered=replica.registered)
        told["started"] = _rfc3339(replica.registered)
        told["endpoints"] = [
            {
                **endpoint,
                "num_requests": said.get("done", 0) + said.get("failed", 0),
                "num_errors": said.get("failed", 0),
                "last_error": "",
                "processing_time": 0,
                "average_processing_time": 0,
                "data": {name: said[name] for name in ("active", "waiting", "slots", "last_progress") if name in said},
            }
        ]
    return told


def semver(version: str) -> str:
    """A version in the form the services protocol demands: as it is if it has it, else its numbers filled up."""
    if _SEMVER.match(version):
        return version
    match = re.match(r"[vV]?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in match[1].split(".")] if match is not None else []
    return ".".join(str(number) for number in (*numbers, 0, 0, 0)[:3])


def _rfc3339(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
