"""Is what was observed healthy? Pure: facts in, checks with the next command out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from weft.cli.observe import AgentFacts, Facts, LaneFacts, ReplicaFacts
from weft.cli.output import ago
from weft_protocols.subjects import LANES

SERVING: Final = frozenset({"ready", "unknown"})
"""States in the coordinator's registry that count as serving; `unknown`: not heard of since it began."""
SILENT: Final = frozenset({"stale", "gone", "offline"})
"""States of replicas that stopped to report."""
WAITED: Final = 30.0
"""Seconds a task may wait for a replica."""
STUCK: Final = 600.0
"""Seconds a replica may work without any of its tasks making progress."""
FULL: Final = 0.9
"""Part of a stream's limit that may be used."""
SKEW: Final = 2.0
"""Seconds between this clock and the broker's."""
OK: Final = "ok"
DEGRADED: Final = "degraded"
DOWN: Final = "down"


@dataclass(frozen=True, slots=True)
class Check:
    """One part of the mesh and how it is."""

    component: str
    status: str
    """`ok`, `degraded` or `down`."""
    detail: str
    next: str = ""
    """The command to run about it."""


def assess(facts: Facts) -> list[Check]:
    """Every part of the mesh, from the broker to the agents."""
    return [
        _broker(facts),
        *_streams(facts),
        _coordinator(facts),
        *_further_coordinators(facts),
        *_incidents(facts),
        *_gateway(facts),
        *_sidecar(facts),
        *_policy(facts),
        *(check for name in facts.names for check in _agent(facts, name)),
        *_other_processes(facts),
    ]


def healthy(checks: list[Check]) -> bool:
    """Whether nothing is degraded or down."""
    return all(check.status == OK for check in checks)


def _broker(facts: Facts) -> Check:
    detail = f"{facts.url}, {facts.latency * 1000:.1f} ms"
    if facts.clock is not None and abs(facts.clock) > SKEW:
        where = "ahead of" if facts.clock > 0 else "behind"
        return Check("broker", DEGRADED, f"{detail}; this clock is {ago(abs(facts.clock))} {where} its", "mesh doctor")
    return Check("broker", OK, detail)


def _streams(facts: Facts) -> Iterator[Check]:
    for name, stream in facts.streams.items():
        if stream is None:
            yield Check(f"stream {name}", DOWN, "it does not exist", "mesh restart broker")
            continue
        detail = f"{stream.messages} messages, {size(stream.bytes)}"
        if stream.max_bytes > 0:
            detail += f" of {size(stream.max_bytes)}"
            if stream.bytes > FULL * stream.max_bytes:
                yield Check(f"stream {name}", DEGRADED, f"{detail}: nearly full", "mesh doctor")
                continue
        yield Check(f"stream {name}", OK, detail)


def _coordinator(facts: Facts) -> Check:
    row = next((row for row in facts.processes or () if row["kind"] == "coordinator"), None)
    if facts.agents is not None:
        return Check("coordinator", OK, "answers")
    reason = f"; {row['reason']}" if row is not None and row["reason"] else ""
    state = f" (its process is {row['state']}{reason})" if row is not None else ""
    after = "mesh restart coordinator" if row is not None else "mesh ps"
    return Check("coordinator", DOWN, f"{facts.silence}{state}; tasks run on, locks and lists wait", after)


def _incidents(facts: Facts) -> Iterator[Check]:
    """Open incidents by name. Only critical ones say that the mesh is not well."""
    for one in facts.incidents:
        critical = one["severity"] == "critical"
        after = f"mesh incidents show {one['id']}"
        detail = f"{one['severity']}: {one['title']}"
        yield Check(f"incident {one['id']}", DEGRADED if critical else OK, detail, after if critical else "")


def _further_coordinators(facts: Facts) -> Iterator[Check]:
    """Those that do not run as they should: where one answers, the others would not be missed."""
    for row in facts.processes or ():
        if row["kind"] == "coordinator" and row["name"] != "coordinator" and row["state"] != "ready":
            failed = row["state"] == "failed"
            after = f"mesh {'restart' if failed else 'logs'} {row['name']}"
            yield Check(row["name"], DOWN if failed else DEGRADED, row["reason"] or row["state"], after)


def _sidecar(facts: Facts) -> Iterator[Check]:
    """The sidecar, where one runs here or should."""
    row = next((row for row in facts.processes or () if row["kind"] == "sidecar"), None)
    if row is None:
        return
    if row["state"] == "ready":
        yield Check("sidecar", OK, f"pid {row['pid']}")
        for one in facts.tools:
            if one["enabled"] and one.get("degraded"):
                detail = f"runs in {one['sandbox']}, its files and network are open: {one['degraded']}"
                yield Check(f"tool server {one['name']}", DEGRADED, detail, f"mesh tools show {one['name']}")
            elif one["enabled"] and one["transport"] == "builtin" and one["failure"]:
                yield Check(f"tool server {one['name']}", DEGRADED, one["failure"], "mesh restart sidecar")
            if one["enabled"] and one.get("unredacted"):
                detail = f"calls are refused: what comes back cannot be looked through: {one['unredacted']}"
                yield Check(f"redaction of {one['name']}", DEGRADED, detail, f"mesh tools show {one['name']}")
    else:
        failed = row["state"] == "failed"
        after = "mesh restart sidecar" if failed else "mesh logs sidecar"
        yield Check("sidecar", DOWN if failed else DEGRADED, row["reason"] or row["state"], after)


def _policy(facts: Facts) -> Iterator[Check]:
    """What decides about tools, where there are sidecars or a policy."""
    found = facts.policy
    if found is None or not (found.active or found.sidecars):
        return
    version = f"version {found.active}"
    failed = [one for one in found.sidecars if one["failure"]]
    behind = [one for one in found.sidecars if one["active"] != found.active and not one["failure"]]
    detail = f"{version} decides on {len(found.sidecars)} sidecars"
    if failed:
        yield Check("policy", DOWN, f"no tool may be used: {failed[0]['failure']}", "mesh policy list")
    elif found.mode != "enforce":
        calls, denied = (sum(one[key] for one in found.sidecars) for key in ("calls", "denied"))
        what = f"NOTHING IS DENIED: {version} only watches (policy.mode is shadow)"
        said = f"{what}; it would have denied {denied} of {calls} calls"
        yield Check("policy", DEGRADED, said, "mesh policy check, then policy.mode: enforce in mesh.yaml")
    elif not found.active:
        yield Check("policy", DEGRADED, "none is loaded, so that no tool may be used", "mesh policy init")
    elif behind:
        names = ", ".join(f"{one['replica']} by version {one['active']}" for one in behind)
        yield Check("policy", DEGRADED, f"{version} is to decide, but {names} does", "mesh restart sidecar")
    elif found.differs:
        said = f"{detail}; {found.differs} is something else"
        yield Check("policy", DEGRADED, said, f"mesh policy check {found.differs}")
    else:
        yield Check("policy", OK, detail)


def _gateway(facts: Facts) -> Iterator[Check]:
    """The gateway, where one runs here or should."""
    row = next((row for row in facts.processes or () if row["kind"] == "gateway"), None)
    if row is not None and row["state"] != "ready":
        failed = row["state"] == "failed"
        after = "mesh restart gateway" if failed else "mesh logs gateway"
        yield Check("gateway", DOWN if failed else DEGRADED, row["reason"] or row["state"], after)
    elif facts.gateway is not None:
        detail = f"{facts.gateway.http}/agents, gRPC {facts.gateway.grpc}"
        if facts.gateway.reason:
            yield Check("gateway", DEGRADED, f"{detail}; {facts.gateway.reason}", "mesh logs gateway")
        else:
            yield Check("gateway", OK, detail)


def _agent(facts: Facts, name: str) -> Iterator[Check]:
    """The agent's queue, then every replica that is not well."""
    known = (facts.agents or {}).get(name)
    rows = [row for row in facts.processes or () if row["agent"] == name]
    work = facts.lanes.get((name, "work"))
    serving = _serving(facts, known, rows)
    wanted = len(rows) if rows else len(known.replicas) if known else 0
    detail = _agent_detail(name, known, facts, serving=serving, wanted=wanted)
    component = f"agent {name}"
    problem = _agent_problem(name, facts, work, serving=serving, wanted=wanted)
    yield Check(component, *problem_or_ok(detail, problem))
    reported = {replica.pid for replica in known.replicas if _alive(replica)} if known else set()
    for row in rows:
        if row["state"] != "ready":
            reason = f": {row['reason']}" if row["reason"] else ""
            status = DOWN if row["state"] == "failed" else DEGRADED
            after = f"mesh restart {row['name']}" if row["state"] == "failed" else f"mesh logs {row['name']}"
            yield Check(f"replica {row['name']}", status, f"{row['state']}{reason}", after)
        elif facts.agents is not None and row["pid"] not in reported:
            yield Check(f"replica {row['name']}", DEGRADED, "runs but does not report", f"mesh restart {row['name']}")
    for replica in known.replicas if known else ():
        yield from _replica(name, replica, mine=bool(rows))


def problem_or_ok(detail: str, problem: tuple[str, str, str] | None) -> tuple[str, str, str]:
    """Status, detail and next command of a check."""
    if problem is None:
        return OK, detail, ""
    status, what, after = problem
    return status, f"{detail}; {what}", after


def _agent_problem(
    name: str, facts: Facts, work: LaneFacts | None, *, serving: int, wanted: int
) -> tuple[str, str, str] | None:
    missing = [lane for lane in LANES if (name, lane) not in facts.lanes]
    if missing:
        return DOWN, f"its consumer {' and '.join(missing)} is missing", f"mesh restart {name}"
    if serving < wanted:
        return (DEGRADED if serving else DOWN), f"{wanted - serving} of {wanted} not ready", f"mesh logs {name}"
    if work is not None and work.pending:
        if not serving:
            return DOWN, "tasks wait and no replica runs", f"mesh scale {name} 1"
        if work.oldest is not None and work.oldest > WAITED:
            return DEGRADED, "tasks wait too long", f"mesh scale {name} {serving + 1}"
    return None


def _agent_detail(name: str, known: AgentFacts | None, facts: Facts, *, serving: int, wanted: int) -> str:
    work, answers = facts.lanes.get((name, "work")), facts.lanes.get((name, "input"))
    parts = [f"{serving}/{max(serving, wanted)} replicas ready"]
    if work is not None:
        oldest = f" (oldest {ago(work.oldest)})" if work.oldest is not None else ""
        parts.append(f"{work.pending} waiting{oldest}, {work.active} active")
        if work.redelivered:
            parts.append(f"{work.redelivered} redelivered")
    if answers is not None and answers.pending:
        parts.append(f"{answers.pending} answers or cancels waiting")
    progress = [r.progress for r in known.replicas if r.progress is not None] if known else []
    if progress:
        parts.append(f"last progress {ago(min(progress))} ago")
    return ", ".join(parts)


def _serving(facts: Facts, known: AgentFacts | None, rows: list[Any]) -> int:
    """Replicas that serve: those that report, or where nobody listens to reports, the ready processes."""
    if facts.agents is None:
        return sum(row["state"] == "ready" for row in rows)
    return sum(replica.state in SERVING for replica in known.replicas) if known else 0


def _replica(agent: str, replica: ReplicaFacts, *, mine: bool) -> Iterator[Check]:
    component = f"replica {agent}/{replica.id}"
    if not _alive(replica):
        # A process of this machine is judged by its process.
        if not mine:
            yield Check(component, DOWN, f"no report for {ago(replica.seen)}", f"mesh logs {agent}")
    elif replica.active and replica.progress is not None and replica.progress > STUCK:
        yield Check(
            component,
            DEGRADED,
            f"{replica.active} tasks without progress for {ago(replica.progress)}",
            f"mesh tasks list --agent {agent} --state working --all",
        )


def _alive(replica: ReplicaFacts) -> bool:
    return replica.state not in SILENT


def _other_processes(facts: Facts) -> Iterator[Check]:
    for row in facts.processes or ():
        if row["kind"] not in ("coordinator", "gateway", "sidecar", "agent") and row["state"] != "ready":
            status = DOWN if row["state"] in ("down", "failed") else DEGRADED
            yield Check(f"process {row['name']}", status, row["reason"] or row["state"], f"mesh logs {row['name']}")


def size(count: float) -> str:
    """Bytes for people: `512 B`, `34 kB`, `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
