"""`mesh up`: start the mesh of this project, in the foreground or detached."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weft.cli.errors import AlreadyRunning
from weft.cli.project import find_config, home_for
from weft_protocols.errors import WeftError

if TYPE_CHECKING:
    from weft.cli.supervisor.supervisor import Listener
    from weft.core.config import MeshConfig


@click.command()
@click.option("-d", "--detach", is_flag=True, help="Return when everything is ready; the mesh runs on.")
@click.option("--port", type=click.IntRange(0, 65535), help="TCP port of the broker; 0 for a free one.")
@click.option(
    "--durability",
    type=click.Choice(["laptop", "strict"]),
    help="What a power failure may cost: 100 ms of writes, or nothing.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=120.0,
    show_default=True,
    help="Seconds to wait with --detach.",
)
@click.option("--notify-fd", type=int, hidden=True)
def command(
    detach: bool, port: int | None, durability: str | None, timeout: float, notify_fd: int | None
) -> int | None:
    """Start the broker, the coordinator, the gateway and the agents of mesh.yaml, and keep them running.

    In the foreground it shows what they write, and Ctrl-C drains the agents and stops everything.
    """
    config = find_config()
    home = home_for(config)
    _refuse_twice(config, home)
    wanted = _with(config, port=port, durability=durability)
    overrides = [
        *(["--port", str(port)] if port is not None else []),
        *(["--durability", durability] if durability is not None else []),
    ]
    if detach:
        from weft.cli.detach import start_detached

        return start_detached(config, home, overrides=overrides, timeout=timeout)
    from weft.cli.show import Notifier, Screen

    if notify_fd is None:
        _supervise(wanted, home, listener=Screen(wanted.name, sys.stderr))
        return None
    notifier = Notifier(notify_fd, sys.stderr)
    try:
        _supervise(wanted, home, listener=notifier)
    except (WeftError, ExceptionGroup) as error:
        notifier.failed(error)
        raise
    return None


def _supervise(config: MeshConfig, home: Path, *, listener: Listener) -> None:
    import asyncio
    import logging

    from weft.cli.supervisor.supervisor import Supervisor, watch_signals

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)

    async def run() -> None:
        supervisor = Supervisor(config, home, listener=listener)
        watch_signals(supervisor.stop)
        await supervisor.run()

    asyncio.run(run())


def _refuse_twice(config: Path, home: Path) -> None:
    """AlreadyRunning if this mesh runs; says so when `mesh.yaml` is not what it was started with."""
    from weft.cli.supervisor.state import Record, config_digest

    record = Record.read(home)
    if record is None or not record.alive:
        return
    error = AlreadyRunning(f"the mesh in {home.parent} is already running (pid {record.pid})")
    if record.config != config_digest(config):
        error.add_note("mesh.yaml changed since it started: `mesh restart` applies it")
    else:
        error.add_note("`mesh ps` shows it, `mesh down` stops it")
    raise error


def _with(config: Path, *, port: int | None, durability: str | None) -> MeshConfig:
    """`mesh.yaml` with what the command line says instead."""
    from dataclasses import replace

    from weft.core.config import load_mesh_config

    loaded = load_mesh_config(config)
    changes: dict[str, Any] = {"port": port, "durability": durability}
    return replace(
        loaded,
        broker=replace(loaded.broker, **{key: value for key, value in changes.items() if value is not None}),
    )
