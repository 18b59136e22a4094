"""What the demo ends with. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from weft_agents.library.review.markdown import count
from weft_agents.library.review.progress import Progress, Worker


def summary(
    progress: Progress,
    *,
    headline: str,
    report: Path,
    processes: Mapping[str, int],
    victim: str,
    times: tuple[float, float],
) -> Iterator[str]:
    """The last lines: the report, what ran where, what was taken over, what to try next.

    Args:
        progress: what was seen.
        headline: the report in one sentence.
        report: where the report is.
        processes: pids of the processes that are no agents.
        victim: label of the killed analyst; empty if none was killed.
        times: seconds to start, and to review.
    """
    yield ""
    yield headline
    yield f"Report: {report}"
    yield ""
    yield from _aligned([("PROCESS", "PID", "TASKS", "TAKEN OVER", ""), *_rows(progress, processes)])
    yield ""
    yield from _takeover(progress, victim)
    start, review = times
    yield f"{start + review:.1f} s: {start:.1f} s to start the mesh, {review:.1f} s for the review."
    yield ""
    yield "Next:"
    yield from _aligned(
        [
            (f"  less {report.name}", "read the report"),
            ("  mesh demo PATH", "review another folder"),
            ("  mesh init my-mesh", "write a project with an agent of your own"),
            ("  cd my-mesh && mesh up", "run it; mesh ps, mesh tasks and mesh --help show the rest"),
        ]
    )


def _rows(progress: Progress, processes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    for name, pid in processes.items():
        yield name, str(pid), "", "", ""
    for worker in progress.workers.values():
        yield worker.label, str(worker.pid), str(worker.done), str(worker.later_attempts or ""), _end(worker)


def _end(worker: Worker) -> str:
    return "killed" if worker.killed_at is not None else ""


def _takeover(progress: Progress, victim: str) -> Iterator[str]:
    if not victim:
        yield f"Nobody was killed: with {count(progress.total, 'task')} the work was over too soon."
        return
    moved = [takeover for takeover in progress.takeovers if takeover.before == victim]
    if not moved:
        yield f"{victim} was killed, but had just finished what it held: there was nothing to take over."
        return
    by = ", ".join(sorted({takeover.after for takeover in moved}))
    longest = max(takeover.seconds for takeover in moved)
    text = f"{victim} was killed; {count(len(moved), 'task')} went over to {by} within {longest:.1f} s."
    if (just_ended := progress.workers[victim].held - len(moved)) > 0:
        text += f" It had just ended {just_ended} more."
    if progress.done == progress.total and not progress.doubled:
        text += f" All {count(progress.total, 'task')} ended, each exactly once."
    yield text


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
