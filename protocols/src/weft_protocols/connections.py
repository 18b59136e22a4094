"""What connections are called: the broker tells the coordinator whose connection has closed by its name."""

from __future__ import annotations

from typing import Final

from weft_protocols.subjects import RESERVED_NAMES, TOKEN

COORDINATOR: Final = "coordinator"
"""Stands for the agent in what coordinators are called; no agent can have this name."""


def of_replica(agent: str, replica: str) -> str:
    """Name of the connection of an agent's replica."""
    return f"agent {agent} {replica}"


def of_coordinator(id: str) -> str:
    """Name of a coordinator's connection."""
    return f"{COORDINATOR} {id}"


def peer(account: str, name: str) -> tuple[str, str] | None:
    """(agent, replica) of a connection, or (`COORDINATOR`, id); None where it is neither.

    The account is the broker's word, the name the connection's own: nobody can pass for a replica of another account.
    """
    words = name.split(" ")
    if account == "MESH":
        found = (COORDINATOR, words[1]) if len(words) == 2 and words[0] == COORDINATOR else None
    else:
        agents = len(words) == 3 and words[0] == "agent" and words[1] == account and account not in RESERVED_NAMES
        found = (account, words[2]) if agents else None
    return found if found is not None and TOKEN.match(found[1]) else None
