"""`mesh health`: is every part of the mesh well?"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any, Final

import click

from weft.cli.assess import DOWN, Check, assess, healthy
from weft.cli.observe import Facts, gather
from weft.cli.output import Column, Printer, output_option, rfc3339
from weft_protocols.errors import BrokerError

CHECK_FAILED: Final = 3
"""Exit code when something is degraded or down."""
COLUMNS: Final = (Column("component"), Column("status", state=True), Column("detail", flexible=True))


@click.command()
@click.option("--watch", is_flag=True, help="Check again and again, until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.2),
    default=2.0,
    show_default=True,
    help="Seconds between checks with --watch.",
)
@output_option
def command(watch: bool, interval: float, output: str) -> int:
    """Check the broker, its streams and consumers, the coordinator, the gateway and every replica.

    Exit code 3 when something is degraded or down; what it is, and the command to run next, is named.
    """
    printer = Printer("jsonl" if watch and output == "json" else output)
    while True:
        code = _once(printer, clear=watch and printer.out.isatty())
        if not watch:
            return code
        time.sleep(interval)


def _once(printer: Printer, *, clear: bool) -> int:
    facts: Facts | None = None
    try:
        facts = asyncio.run(gather())
        checks = assess(facts)
    except BrokerError as error:
        checks = [Check("broker", DOWN, str(error), "mesh doctor")]
    if clear:
        click.clear()
    if printer.machine:
        printer.record(_record(facts, checks))
    else:
        printer.rows([asdict(check) for check in checks], COLUMNS)
        for check in checks:
            if check.next:
                printer.talk(f"{check.component} is {check.status}; next: {check.next}")
    printer.out.flush()
    return 0 if healthy(checks) else CHECK_FAILED


def _record(facts: Facts | None, checks: list[Check]) -> dict[str, Any]:
    """The whole picture as JSON values. Durations are seconds."""
    worst = "down" if any(check.status == DOWN for check in checks) else "degraded"
    record: dict[str, Any] = {
        "time": rfc3339(time.time()),
        "status": "ok" if healthy(checks) else worst,
        "checks": [asdict(check) for check in checks],
    }
    if facts is not None:
        record["broker"] = {"url": facts.url, "latency": facts.latency, "clock_skew": facts.clock}
        record["streams"] = [asdict(stream) for stream in facts.streams.values() if stream is not None]
        record["gateway"] = asdict(facts.gateway) if facts.gateway is not None else None
        record["coordinator"] = {"up": facts.agents is not None, "reason": facts.silence}
        record["agents"] = [agent_record(facts, name) for name in facts.names]
    return record


def agent_record(facts: Facts, name: str) -> dict[str, Any]:
    """One agent as JSON values; what the coordinator did not say is null. Durations are seconds."""
    known = (facts.agents or {}).get(name)
    work, answers = facts.lanes.get((name, "work")), facts.lanes.get((name, "input"))
    replicas = known.replicas if known is not None else ()
    seen = [replica.seen for replica in replicas if replica.seen is not None]
    return {
        "name": name,
        "version": known.version if known is not None else None,
        "description": known.description if known is not None else None,
        "skills": list(known.skills) if known is not None else None,
        "replicas": [asdict(replica) for replica in replicas] if known is not None else None,
        "active": sum(replica.active for replica in replicas) if known is not None else None,
        "queue": work.pending if work is not None else None,
        "oldest_waiting": work.oldest if work is not None else None,
        "in_work": work.active if work is not None else None,
        "redelivered": work.redelivered if work is not None else None,
        "inputs_waiting": answers.pending if answers is not None else None,
        "last_seen": min(seen) if seen else None,
    }
