"""The one subject grammar: build, parse, match, validate.

Every subject is `mesh.{kind}.` and then the tokens of its kind; `GRAMMAR` is the whole of it. Tokens are
`[A-Za-z0-9_-]{1,64}`. Build functions validate nothing: names are validated once, where they enter
(`check_name`, `check_token`), so that the hot path only joins strings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from weft_protocols.errors import InvalidName

TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
TASK_ID: Final = re.compile(r"[0-9a-f]{32}\Z")
SLICE: Final = re.compile(r"[0-9]{2}\Z")
DIGEST: Final = re.compile(r"[0-9a-f]{64}\Z")
NUMBER: Final = re.compile(r"(?:0|[1-9][0-9]{0,9})\Z")
_FORMS: Final = {"task": TASK_ID, "slice": SLICE, "sha256": DIGEST, "n": NUMBER}
"""Tokens with a form of their own; every other is a `TOKEN`."""
RESERVED_NAMES: Final = frozenset(
    {"MESH", "SYS", "operator", "coordinator", "gateway", "sidecar", "broker", "G", "default", "_"}
)
"""Names of the mesh's own accounts and identities, and `_` for "all agents"; no agent or caller may take them."""
OPERATOR: Final = "operator"
"""Caller name of whoever holds an identity inside the MESH account: sees every caller's tasks."""
LANES: Final = ("work", "input")
"""Consumers of one agent: `work` delivers new tasks, `input` follow-ups and cancels, which never wait behind work."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of subject: its tokens, and which of them the broker fixes to the writer's account."""

    name: str
    tokens: tuple[str, ...]
    writer: str | None
    """The token that must equal the publishing account's name; None where only MESH writes."""

    @property
    def wildcard(self) -> str:
        """Pattern for all subjects of the kind."""
        return ".".join(("mesh", self.name, *("*" for _ in self.tokens)))

    @property
    def writer_position(self) -> int | None:
        """1-based position of the writer's token, as `account_token_position` counts."""
        return None if self.writer is None else self.tokens.index(self.writer) + 3

    def pattern(self, **fixed: str) -> str:
        """Pattern with some tokens fixed and the others `*`."""
        unknown = fixed.keys() - set(self.tokens)
        if unknown:
            raise InvalidName(f"mesh.{self.name} has no token {sorted(unknown)}; it has {list(self.tokens)}")
        return ".".join(("mesh", self.name, *(fixed.get(token, "*") for token in self.tokens)))


GRAMMAR: Final[dict[str, Kind]] = {
    kind.name: kind
    for kind in (
        Kind("task", ("agent", "slice", "caller", "task"), "caller"),
        Kind("input", ("agent", "slice", "caller", "task"), "caller"),
        Kind("claim", ("agent", "task"), "agent"),
        Kind("event", ("agent", "task", "caller", "origin"), "agent"),
        Kind("step", ("agent", "task", "key"), "agent"),
        Kind("live", ("caller", "origin", "agent", "task"), None),
        Kind("ctl", ("agent", "replica"), None),
        Kind("rpc", ("agent", "method", "caller"), "caller"),
        Kind("coord", ("operation", "caller"), "caller"),
        Kind("blob", ("writer", "sha256", "n"), "writer"),
        Kind("push", ("caller", "agent", "task", "config"), None),
        Kind("pushed", ("caller", "agent", "task", "config"), None),
    )
}
"""All kinds of subjects by name."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed subject: its kind, and its tokens by name."""

    kind: str
    tokens: dict[str, str]

    def __getitem__(self, token: str) -> str:
        return self.tokens[token]


def check_token(value: str, what: str) -> str:
    """`value` if it is a token; `what` names it in the error."""
    if not TOKEN.match(value):
        raise InvalidName(f"{what} {value!r} is not a name: use 1 to 64 of A-Z a-z 0-9 _ -")
    return value


def check_name(value: str, what: str = "agent name") -> str:
    """`value` if it may name an agent or a caller."""
    check_token(value, what)
    if value in RESERVED_NAMES:
        raise InvalidName(
            f"{what} {value!r} is reserved; choose another (reserved: {', '.join(sorted(RESERVED_NAMES))})"
        )
    return value


def check_task_id(value: str) -> str:
    """`value` if it has the form of a task id."""
    if not TASK_ID.match(value):
        raise InvalidName(f"task id {value!r} is not 32 lower-case hex digits")
    return value


def parse(subject: str) -> Parsed:
    """The kind and tokens of a concrete subject; InvalidName says what is wrong with it."""
    first, _, rest = subject.partition(".")
    name, _, tail = rest.partition(".")
    kind = GRAMMAR.get(name)
    if first != "mesh" or kind is None:
        raise InvalidName(f"subject {subject!r} is not of this mesh: it must begin with mesh.<kind>")
    tokens = tail.split(".")
    if len(tokens) != len(kind.tokens):
        raise InvalidName(f"subject {subject!r}: mesh.{name} takes {len(kind.tokens)} tokens {list(kind.tokens)}")
    for token, value in zip(kind.tokens, tokens, strict=True):
        if not _FORMS.get(token, TOKEN).match(value):
            raise InvalidName(f"subject {subject!r}: {token} {value!r} breaks the grammar")
    return Parsed(name, dict(zip(kind.tokens, tokens, strict=True)))


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject falls under a NATS pattern (`*` one token, `>` the rest)."""
    want, have = pattern.split("."), subject.split(".")
    for i, token in enumerate(want):
        if token == ">":
            return len(have) > i
        if i >= len(have) or (token not in ("*", have[i])):
            return False
    return len(want) == len(have)


def task(agent: str, slice_: str, caller: str, task_id: str) -> str:
    """Subject of the message that creates a task."""
    return f"mesh.task.{agent}.{slice_}.{caller}.{task_id}"


def input(agent: str, slice_: str, caller: str, task_id: str) -> str:
    """Subject of follow-ups and cancels of a task."""
    return f"mesh.input.{agent}.{slice_}.{caller}.{task_id}"


def claim(agent: str, task_id: str) -> str:
    """Subject of a task's claims."""
    return f"mesh.claim.{agent}.{task_id}"


def event(agent: str, task_id: str, caller: str, origin: str) -> str:
    """Subject of a task's public log."""
    return f"mesh.event.{agent}.{task_id}.{caller}.{origin}"


def step(agent: str, task_id: str, key: str) -> str:
    """Subject of one record of a task's private journal."""
    return f"mesh.step.{agent}.{task_id}.{key}"


def ctl(agent: str, replica: str) -> str:
    """Subject on which one replica is spoken to."""
    return f"mesh.ctl.{agent}.{replica}"


def rpc(agent: str, method: str, caller: str) -> str:
    """Subject of an A2A operation answered by request and reply."""
    return f"mesh.rpc.{agent}.{method}.{caller}"


def coord(operation: str, caller: str) -> str:
    """Subject of a coordinator operation."""
    return f"mesh.coord.{operation}.{caller}"


def blob(writer: str, sha256: str, n: int) -> str:
    """Subject of chunk `n` of a blob."""
    return f"mesh.blob.{writer}.{sha256}.{n}"


def push(caller: str, agent: str, task_id: str, config: str) -> str:
    """Subject of a push notification config, which is also the job of delivering to it."""
    return f"mesh.push.{caller}.{agent}.{task_id}.{config}"


def pushed(caller: str, agent: str, task_id: str, config: str) -> str:
    """Subject of how far the delivery to a push notification config has come."""
    return f"mesh.pushed.{caller}.{agent}.{task_id}.{config}"


def live(caller: str, origin: str) -> str:
    """Pattern of all live events for one origin of a caller."""
    return f"mesh.live.{caller}.{origin}.>"


def live_task(caller: str, agent: str, task_id: str) -> str:
    """Pattern of the live events of one task, whichever origin it belongs to."""
    return f"mesh.live.{caller}.*.{agent}.{task_id}"


def consumer(agent: str, lane: str) -> str:
    """Name of an agent's durable consumer. `=` cannot occur in a name, so no two agents can share one."""
    return f"{agent}={lane}"


def step_token(key: str) -> str:
    """Subject token for a step key or a push config's id: the text itself where it is a token, else a digest of it."""
    if TOKEN.match(key) and not key.startswith("k-"):
        return key
    from hashlib import sha256

    return "k-" + sha256(key.encode()).hexdigest()[:32]
