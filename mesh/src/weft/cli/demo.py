"""`mesh demo`: a team of agents reviews a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path), required=False)
@click.option("-y", "--yes", is_flag=True, help="Answer every question with yes.")
def command(path: Path | None, yes: bool) -> int:
    """Start a broker and a small team of agents, and have them review PATH (default: Weft itself).

    One of them is killed on the way, and its work goes on. Nothing leaves this machine, and nothing is left
    running.
    """
    import asyncio

    from weft_agents.library.review.run import default_path, run_demo

    return asyncio.run(run_demo(path or default_path(), yes=yes, out=sys.stdout))
