"""What is asked of a policy, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

ACTIONS: Final = ("call", "get", "read", "list")
"""Call a tool, get a prompt, read a resource, list what a server offers."""
ENTITY: Final = {"call": "Tool", "get": "Prompt", "read": "Resource", "list": "Server"}
"""Entity type of the resource of each action."""
SANDBOXES: Final = ("none", "rlimits", "bubblewrap", "sandlock")
"""Levels of isolation, the weakest first."""
UNITS: Final = (("d", 86_400.0), ("h", 3600.0), ("m", 60.0), ("s", 1.0))
"""Units of time in limits, and their seconds, the longest first."""
SCOPES: Final = ("pair", "agent", "tool", "server", "rule")
"""Whose calls a limit counts together: an agent's to one tool, an agent's, to a tool or a server, or all by it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One thing an agent wants to do."""

    agent: str
    """Who asks, as the broker proved it."""
    action: str
    """One of `ACTIONS`."""
    server: str
    name: str = ""
    """The server's own name of the tool or prompt, or the URI of the resource; empty for `list`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    """The agent's version; empty if it is not known."""
    skill: str = ""
    """The skill at work; empty if it is not known."""
    task: str = ""
    caller: str = ""
    """Who sent the task that the agent works on."""
    chain: tuple[str, ...] = ()
    """The delegation chain, `agent/task` items or names of agents, the root first."""
    time: float = 0.0
    """Unix seconds."""
    front: str = ""
    """How the request came: `nats`, `http` or `stdio`."""

    @property
    def resource(self) -> str:
        """Id of the resource's entity: `server.name`, the URI, or the server."""
        if self.action == "read":
            return self.name
        return f"{self.server}.{self.name}" if self.name else self.server

    @property
    def agents(self) -> tuple[str, ...]:
        """Agents of the chain, the root first."""
        return tuple(item.partition("/")[0] for item in self.chain)

    def encode(self) -> dict[str, Any]:
        """As a record has it: JSON, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value}

    @classmethod
    def decode(cls, raw: Mapping[str, Any]) -> Request:
        """As a record has it. Raises ValueError naming what is missing or of the wrong kind."""
        made: dict[str, Any] = {}
        for key in ("agent", "action", "server", "name", "version", "skill", "task", "caller", "front"):
            value = raw.get(key, "")
            if not isinstance(value, str):
                raise ValueError(f"{key} must be text")
            made[key] = value
        if not made["agent"] or not made["server"]:
            raise ValueError("agent and server must be given")
        made["action"] = made["action"] or "call"
        if made["action"] not in ACTIONS:
            raise ValueError(f"action {made['action']!r} is none of {', '.join(ACTIONS)}")
        arguments, chain, at = raw.get("arguments") or {}, raw.get("chain") or (), raw.get("time") or 0.0
        if not isinstance(arguments, Mapping):
            raise ValueError("arguments must be a mapping")
        if not isinstance(chain, list | tuple) or not all(isinstance(one, str) for one in chain):
            raise ValueError("chain must be a list of texts")
        if isinstance(at, bool) or not isinstance(at, int | float):
            raise ValueError("time must be unix seconds")
        return cls(**made, arguments=arguments, chain=tuple(chain), time=float(at))


@dataclass(frozen=True, slots=True)
class Approval:
    """Somebody has to agree."""

    role: str
    count: int = 1
    """How many of that role."""


@dataclass(frozen=True, slots=True)
class Limit:
    """So many calls in so much time."""

    policy: str
    """The rule that says so."""
    calls: int
    seconds: float
    burst: int
    """Calls that may come at once after a pause; `calls` unless the rule says otherwise."""
    per: str = "pair"
    """One of `SCOPES`."""

    @property
    def rate(self) -> float:
        """Calls a second."""
        return self.calls / self.seconds

    @property
    def words(self) -> str:
        """As a rule writes it, e.g. `100/m burst 20 per agent`."""
        burst = f" burst {self.burst}" if self.burst != self.calls else ""
        return f"{self.calls}/{_time(self.seconds)}{burst} per {self.per}"

    def key(self, request: Request) -> str:
        """What is counted together."""
        who = {
            "pair": f"{request.agent}>{request.resource}",
            "agent": request.agent,
            "tool": request.resource,
            "server": request.server,
        }
        return f"{self.policy}:{self.per}:{who.get(self.per, '')}"


@dataclass(frozen=True, slots=True)
class Obligations:
    """What has to be done if a call is made: that of every permit that allows it, the strictest where they differ."""

    approvals: tuple[Approval, ...] = ()
    """All of them have to be given, each role once, by name."""
    limits: tuple[Limit, ...] = ()
    """All of them hold."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """What is reserved of budgets, by unit; the highest of each."""
    redact: tuple[str, ...] = ()
    """Classes of data taken out of results, by name."""
    sandbox: str = ""
    """The weakest level of `SANDBOXES` that will do; empty for any."""
    locks: tuple[str, ...] = ()
    """Names of locks whose fencing token the call has to carry; arguments in braces are filled in."""
    side_effects: bool = False
    """Whether a repeated task gets the recorded result instead of a second call."""

    def __bool__(self) -> bool:
        return self != Obligations()

    def encode(self) -> dict[str, Any]:
        """JSON, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value}


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy says to a request."""

    allow: bool
    reasons: tuple[str, ...] = ()
    """Ids of the rules that decided: the permits, or the forbids; none if nothing permits it."""
    obligations: Obligations = field(default_factory=Obligations)
    errors: tuple[str, ...] = ()
    """What could not be evaluated; such a request is denied."""
    messages: tuple[str, ...] = ()
    """What the deciding rules want to be said (`@reason`)."""
    shadow: Would | None = None
    """What rules in shadow mode would make of it, where that is something else."""
    version: int = 0
    """Of the policy, where it is a stored one."""

    @property
    def why(self) -> str:
        """In words, for the one who is refused or the record."""
        if self.errors:
            return "the policy cannot be evaluated: " + "; ".join(self.errors)
        if self.messages:
            return "; ".join(self.messages)
        if self.allow:
            return f"permitted by {', '.join(self.reasons)}"
        return f"forbidden by {', '.join(self.reasons)}" if self.reasons else "nothing permits it"

    def encode(self) -> dict[str, Any]:
        """JSON for records, without what is empty."""
        parts = {
            "obligations": self.obligations.encode(),
            "errors": list(self.errors),
            "messages": list(self.messages),
            "shadow": self.shadow.encode() if self.shadow is not None else None,
            "version": self.version,
        }
        said = {key: value for key, value in parts.items() if value}
        return {"decision": "allow" if self.allow else "deny", "reasons": list(self.reasons), **said}


@dataclass(frozen=True, slots=True)
class Would:
    """What another set of rules would decide."""

    allow: bool
    reasons: tuple[str, ...] = ()
    obligations: Obligations = field(default_factory=Obligations)
    errors: tuple[str, ...] = ()
    version: int = 0
    """Of the candidate; 0 for rules of the active policy that are marked `@shadow`."""

    def encode(self) -> dict[str, Any]:
        """JSON for records."""
        return {
            "decision": "allow" if self.allow else "deny",
            "reasons": list(self.reasons),
            "obligations": self.obligations.encode(),
            "errors": list(self.errors),
            "version": self.version,
        }


class PolicyEngine(Protocol):
    """Decides. Never raises: what cannot be evaluated is denied."""

    def decide(self, request: Request) -> Decision:
        """What the rules say."""
        ...

    def visible(self, request: Request) -> bool:
        """Whether some arguments, task and time could exist with which this is allowed; for listings only."""
        ...


def _time(seconds: float) -> str:
    """A time as limits have it: the largest unit that it is a whole number of."""
    unit, length = next((one for one in UNITS if seconds % one[1] == 0), ("s", 1.0))
    number = seconds / length
    return unit if number == 1 else f"{number:g}{unit}"
