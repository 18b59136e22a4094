"""The policy that decides, and beside it a candidate that only watches: its differences are counted. Pure.

In mode `shadow` the active policy itself only watches: everything passes, and what it would have said is told.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any, Final

from weft.policy.compare import SAME, difference
from weft.policy.engine import CedarEngine
from weft.policy.model import Decision, Obligations, Request, Would

EXAMPLES: Final = 50
"""Differing requests that are kept, the newest."""
NONE_LOADED: Final = (
    "no policy is loaded, so that nothing is allowed; `mesh policy init` writes one to begin with, "
    "`mesh policy load` has it decide"
)
ENFORCE: Final = "enforce"
WATCH: Final = "shadow"
MODES: Final = (ENFORCE, WATCH)
"""What a policy says holds; or everything is allowed, and what would have been denied is recorded."""
WATCHES: Final = "the policy only watches (policy.mode is shadow in mesh.yaml)"


@dataclass(slots=True)
class Differences:
    """What a candidate would have decided otherwise, since it is watched."""

    version: int
    decided: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """By kind: `allow>deny`, `deny>allow`, `obligations`, `error`."""
    examples: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=EXAMPLES))

    def encode(self) -> dict[str, Any]:
        """JSON."""
        return {
            "version": self.version,
            "decided": self.decided,
            "counts": dict(self.counts),
            "examples": list(self.examples),
        }


class ActivePolicy:
    """Decides by the active policy; without one, nothing is allowed.

    Both engines are replaced as a whole, so that a decision is by one version.
    """

    def __init__(self) -> None:
        self.active: CedarEngine | None = None
        self.candidate: CedarEngine | None = None
        self.differences = Differences(0)
        self.failure = ""
        """Why the active version cannot be used; then nothing is allowed."""
        self.mode = ENFORCE
        """One of `MODES`."""
        self.decided = 0
        """Requests so far."""
        self.denied = 0
        """How many of them it denied, or would have in mode `shadow`."""

    def use(
        self,
        active: CedarEngine | None,
        candidate: CedarEngine | None = None,
        *,
        failure: str = "",
        mode: str = ENFORCE,
    ) -> None:
        """Decide by `active` from now on, and watch `candidate`."""
        self.active, self.failure, self.mode = active, failure, mode
        version = candidate.version if candidate is not None else 0
        if version != self.differences.version:
            self.differences = Differences(version)
        self.candidate = candidate

    @property
    def version(self) -> int:
        """Of the active policy; 0 if there is none."""
        return self.active.version if self.active is not None else 0

    def decide(self, request: Request) -> Decision:
        """What holds: what the active policy says, with what the candidate would have said where that differs.

        In mode `shadow` everything is allowed and owes nothing; `shadow` has what the active policy says instead.
        """
        made = self._said(request)
        self.decided += 1
        self.denied += not made.allow
        if self.mode == ENFORCE or (made.allow and not made.obligations):
            return made
        would = Would(made.allow, made.reasons, made.obligations, made.errors, made.version)
        return Decision(True, messages=(WATCHES,), shadow=would, version=made.version)

    def _said(self, request: Request) -> Decision:
        if self.active is None:
            return Decision(False, errors=(self.failure,)) if self.failure else Decision(False, messages=(NONE_LOADED,))
        made = self.active.decide(request)
        if self.candidate is None:
            return made
        other = self.candidate.decide(request)
        self.differences.decided += 1
        kind = "error" if other.errors and not made.errors else _kind(made, other)
        if kind == SAME:
            return made
        self.differences.counts[kind] += 1
        self.differences.examples.append(_example(request, made, other, kind))
        would = Would(other.allow, other.reasons, other.obligations, other.errors, other.version)
        return replace(made, shadow=would)

    def visible(self, request: Request) -> bool:
        """See `PolicyEngine`."""
        if self.mode == WATCH or (self.active is None and request.action == "list"):
            return True  # without rules none hides a server; what it offers is not seen all the same
        return self.active is not None and self.active.visible(request)


def _kind(made: Decision, other: Decision) -> str:
    return difference(made.allow, _nameless(made.obligations), other.allow, _nameless(other.obligations))


def _nameless(owed: Obligations) -> Obligations:
    """Without the names of rules: a limit that another rule says is the same limit."""
    return replace(owed, limits=tuple(replace(one, policy="") for one in owed.limits)) if owed.limits else owed


def _example(request: Request, made: Decision, other: Decision, kind: str) -> dict[str, Any]:
    # Arguments may be secret; what differs is said by the rules.
    return {
        "kind": kind,
        "agent": request.agent,
        "action": request.action,
        "resource": request.resource,
        "task": request.task,
        "time": request.time,
        "active": list(made.reasons),
        "candidate": list(other.reasons),
        "errors": list(other.errors),
    }
