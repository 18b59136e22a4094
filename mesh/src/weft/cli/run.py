"""`mesh run`: one replica of an agent, in the foreground."""

from __future__ import annotations

import os
import sys

import click


@click.command()
@click.argument("target", metavar="FILE[:NAME]")
@click.option("--identity", help="Account to run under; by default the one of the agent's name.")
@click.option("--card", metavar="CARD", help="Agent card (JSON or YAML): NAME is then an executor of the A2A SDK.")
@click.option("--name", help="With --card: name of the agent; by default the card's.")
def command(target: str, identity: str | None, card: str | None, name: str | None) -> int:
    """Run a replica of the agent NAME in FILE (path/to/agent.py or package.module) until Ctrl-C.

    An agent that the mesh of this folder does not know yet gets an account and starts to serve at once; to keep
    it, add it to mesh.yaml. Ctrl-C lets running tasks finish.
    """
    import asyncio
    import logging

    from weft.host.loading import load_agent, load_executor
    from weft.host.process import leave, run_loop, serve

    logging.basicConfig(
        level=os.environ.get("WEFT_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if name is not None and card is None:
        raise click.UsageError("--name is for executors: it goes with --card")
    agent = load_agent(target) if card is None else load_executor(target, card, name)
    if identity is not None:
        os.environ["WEFT_IDENTITY"] = identity
    elif not os.environ.get("WEFT_SEED_FILE"):
        os.environ["WEFT_IDENTITY"] = agent.name
    if asyncio.run(_admit(os.environ.get("WEFT_IDENTITY", agent.name))):
        sys.stderr.write(f"agent {agent.name} is new to this mesh; add it to mesh.yaml to have `mesh up` run it\n")
    leave(int(run_loop(serve(agent))))


async def _admit(name: str) -> bool:
    """Give an agent an account and its consumers on the mesh of this machine; whether that was needed."""
    from weft.core.broker import Broker
    from weft.core.config import find_home, load_settings
    from weft.core.home import Accounts, BrokerRecord, Home
    from weft.core.membership import Membership
    from weft.core.topology import reconcile
    from weft_protocols.errors import Unavailable
    from weft_protocols.resources import topology

    try:
        home = Home(find_home())
    except Unavailable:
        return False
    record = BrokerRecord.read(home)
    if os.environ.get("WEFT_URL") or record is None or not record.alive or name in Accounts.read(home).names:
        return False
    await Membership(home).declare(agents=(name,), running=record)
    broker = await Broker.connect(load_settings("coordinator", home=home.root), name="mesh run")
    try:
        await reconcile(broker, topology((name,), record.durability))
    finally:
        await broker.close()
    return True
