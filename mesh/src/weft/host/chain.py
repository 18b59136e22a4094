"""The delegations a task came through, and when one more would go in circles.

A chain travels in headers, so no memory is shared between hosts: `Weft-Chain` has the tasks, `Weft-Seen` a short
digest of each call. The caller's host checks before it sends, the callee's when it receives; the callee trusts
nothing but its caller's name, which the broker proved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.errors import A2AError, DelegationLoop, InvalidName, InvalidRequest

HOPS: Final = 8
"""Delegations from the root to a task, unless an agent says otherwise."""
MOST_HOPS: Final = 30
"""What an agent may say: the headers of a message hold no longer chain."""
REPEATS: Final = 3
"""Times one caller may make the same call to the same agent in one chain."""
BREADTH: Final = 10
"""Times one attempt of a task may make the same call."""
LOOP: Final = "loop"
"""Error metadata with the kind of a loop."""
CHAIN: Final = "chain"
"""Error metadata with the chain."""
_DIGITS: Final = 8


@dataclass(frozen=True, slots=True)
class Chain:
    """The chain of one task, the root first, without the task itself."""

    items: tuple[tuple[str, str], ...] = ()
    """(agent, task) of each delegating task."""
    seen: tuple[str, ...] = ()
    """Digest of each call."""

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Chain:
        """The chain in a message's headers, whose names are lower-case. InvalidRequest if it is not one."""
        told, seen = headers.get("weft-chain", ""), headers.get("weft-seen", "")
        items: list[tuple[str, str]] = []
        for item in told.split(",") if told else ():
            agent, _, task = item.strip().partition("/")
            try:
                subjects.check_token(agent, "agent")
                subjects.check_task_id(task)
            except (InvalidName, A2AError):
                raise InvalidRequest(f"the delegation chain is not readable at {item[:100]!r}") from None
            items.append((agent, task))
        return cls(tuple(items), tuple(part.strip() for part in seen.split(",") if part.strip()))

    @property
    def agents(self) -> tuple[str, ...]:
        """The agents in it."""
        return tuple(agent for agent, _ in self.items)

    @property
    def told(self) -> tuple[str, ...]:
        """Its items as the header has them."""
        return tuple(f"{agent}/{task}" for agent, task in self.items)

    def through(self, agent: str, task: str, *, call: str) -> Chain:
        """The chain of a child of this chain's task, which makes `call`."""
        return Chain((*self.items, (agent, task)), (*self.seen, call))

    def headers(self) -> dict[str, str]:
        """As headers."""
        return {h.CHAIN: ",".join(self.told), h.SEEN: ",".join(self.seen)}

    def check(self, agent: str, *, max_hops: int, reentrant: bool) -> None:
        """Whether a task of `agent` may come through this chain.

        Raises:
            DelegationLoop: it is too long, has the agent in it already, or repeats its last call too often.
        """
        way = " > ".join((*self.told, agent))
        if len(self.items) > max_hops:
            raise DelegationLoop(
                f"{len(self.items)} delegations in a row, and {agent} takes at most {max_hops}: {way}",
                kind="hops",
                chain=self.told,
            )
        if agent in self.agents and not reentrant:
            raise DelegationLoop(
                f"the chain comes back to {agent}, which is not declared reentrant: {way}",
                kind="re-entry",
                chain=self.told,
            )
        if self.seen and Counter(self.seen)[self.seen[-1]] > REPEATS:
            raise DelegationLoop(
                f"the same call of {agent} was made more than {REPEATS} times in one chain: {way}",
                kind="repetition",
                chain=self.told,
            )


def call(caller: str, agent: str, *, skill: str, digest: str) -> str:
    """A short digest of a call with an input of that digest: equal for equal calls of one caller."""
    return sha256(f"{caller}\0{agent}\0{skill}\0{digest}".encode()).hexdigest()[:_DIGITS]


def received(headers: Mapping[str, str], *, caller: str, task: str, agent: str, max_hops: int, reentrant: bool) -> None:
    """Check the chain of a message that came in.

    Raises:
        InvalidRequest: it cannot be read, is not its sender's, or goes in circles; then the metadata say how.
    """
    chain = Chain.of(headers)
    if not chain.items:
        return
    if chain.items[-1][0] != caller:
        raise InvalidRequest(f"the delegation chain ends with {chain.items[-1][0]}, and the message came from {caller}")
    if (agent, task) in chain.items:
        raise refusal(DelegationLoop("the task is in its own delegation chain", kind="re-entry", chain=chain.told))
    try:
        chain.check(agent, max_hops=max_hops, reentrant=reentrant)
    except DelegationLoop as loop:
        raise refusal(loop) from None


def refusal(loop: DelegationLoop) -> InvalidRequest:
    """A loop as the A2A error its caller gets."""
    return InvalidRequest(str(loop), metadata={LOOP: loop.kind, CHAIN: ",".join(loop.chain)})


def loop_of(error: A2AError) -> DelegationLoop | None:
    """The loop an A2A error of a child tells of, if it does."""
    kind = error.metadata.get(LOOP)
    if not isinstance(error, InvalidRequest) or kind is None:
        return None
    return DelegationLoop(
        error.message, kind=kind, chain=tuple(item for item in error.metadata.get(CHAIN, "").split(",") if item)
    )
