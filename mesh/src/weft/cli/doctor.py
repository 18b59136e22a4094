"""`mesh doctor`: what is wrong on this machine or in this project, and how to mend it."""

from __future__ import annotations

from typing import Final

import click

from weft.cli.output import Column, Printer, output_option

CHECK_FAILED: Final = 3
COLUMNS: Final = (
    Column("check"),
    Column("status", state=True),
    Column("detail", flexible=True),
)


@click.command()
@output_option
def command(output: str) -> int:
    """Check Python, packages, the broker's binary, ports, gateway, key files, stale state, clock, disk, topology.

    Nothing is changed. Exit code 3 when a check failed; warnings do not count.
    """
    import asyncio

    from weft.cli.examine import FAILED, examine

    findings = asyncio.run(examine())
    printer = Printer(output)
    printer.rows([finding.record() for finding in findings], COLUMNS)
    if not printer.machine:
        for finding in findings:
            if finding.fix:
                printer.talk(f"{finding.check}: {finding.fix}")
    return CHECK_FAILED if any(finding.status == FAILED for finding in findings) else 0
