"""Streams and consumers as data. `weft.core.topology` makes the broker agree with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from weft_protocols import subjects
from weft_protocols.errors import InvalidConfig

STREAM: Final = "MESH"
BLOBS: Final = "MESH_BLOBS"
REGISTRY: Final = "MESH_REGISTRY"
"""Which agents exist, one message each on `mesh.registry.{agent}`; no account but MESH reaches it."""
PUSH: Final = "MESH_PUSH"
"""Push notification configs, each also the job of delivering to it, and how far each delivery has come."""
PUSH_CONSUMER: Final = "push"
"""The consumer through which gateways share those jobs."""
PUSH_ACK_WAIT: Final = 20.0
"""Seconds without a sign of life after which another gateway takes a delivery over."""
PUSH_KEEP: Final = 30 * 86_400.0
"""Seconds a push notification config is kept after it was last set."""
PUSH_JOBS: Final = 1_000_000
"""Deliveries under way, waiting for an event or for their next attempt. Each counts until its task has ended."""
POLICY: Final = "MESH_POLICY"
"""Policies and which of them decides, with all their history; no account but MESH reaches it."""
POLICY_VERSIONS: Final = "mesh.policy.version"
"""Prefix of policies: `mesh.policy.version.{n}` is written once, numbers count from 1."""
POLICY_STATE: Final = "mesh.policy.state"
"""Prefix of what decides: the last message on `mesh.policy.state.active` and on `mesh.policy.state.shadow`."""
POLICY_CHANGES: Final = "mesh.policychange"
"""Prefix under which the broker republishes what decides once it is stored."""
RATES: Final = "MESH_RATES"
"""What sidecars count, of each thing the last number; no account but MESH reaches it."""
RATE_PREFIX: Final = "mesh.rate"
"""Prefix of how far rate limits are used: `mesh.rate.{digest}`."""
POLICY_SEEN: Final = "mesh.seen"
"""Prefix of what each sidecar saw a policy in shadow mode decide otherwise: `mesh.seen.{replica}`."""
SIDECARS: Final = "mesh.sidecar"
"""Prefix of sidecars' signs of life, `mesh.sidecar.{id}`; they are not stored."""
RATE_KEEP: Final = 31 * 86_400.0
"""Seconds after its last use for which a number is kept: longer than a limit counts."""
COORD: Final = "MESH_COORD"
"""What the coordinator decides; no account but MESH reaches it."""
DECIDED: Final = "mesh.decided"
"""Subject of the coordinator's log: each message expects the one before, so that it has one writer at a time."""
LEASE: Final = "mesh.lead.coordinator"
"""Subject of the leader's lease, a message with a time to live."""
SNAPSHOTS: Final = "mesh.snap"
"""Prefix of snapshots of the coordinator's state: `mesh.snap.head` names the chunks `mesh.snap.{id}.{n}`."""
SCHEDULES: Final = "mesh.schedule"
"""Prefix of schedules, `mesh.schedule.{name}`: the broker stores a message on `mesh.due.{name}` when one is due."""
DUE: Final = "mesh.due"
"""Prefix of what is due."""
ARCHIVED: Final = "mesh.archived"
"""Subject of the sequence in `MESH` up to which messages may have left it: they are in the coordinators' files."""
DUE_CONSUMER: Final = "due"
"""The consumer through which the leader starts scheduled tasks."""
TOOLS: Final = "MESH_TOOLS"
"""Which tool servers exist, and what of their definitions was approved; no account but MESH reaches it."""
TOOL_SERVERS: Final = "mesh.tools"
"""Prefix of registrations: the last message on `mesh.tools.{server}` is what holds."""
TOOL_PINS: Final = "mesh.pins"
"""Prefix of pins: the last message on `mesh.pins.{server}` is what was approved."""
TOOL_CHANGES: Final = "mesh.toolchange"
"""Prefix under which the broker republishes both once they are stored."""
TOOL_HISTORY: Final = 8
"""Messages kept of each registration and pin."""
AUDIT: Final = "MESH_AUDIT"
"""What was done through tools, and by whom: written by sidecars, never by agents; nobody deletes from it."""
AUDIT_RECORDS: Final = "mesh.audit"
"""Prefix of records, `mesh.audit.{kind}.{agent}.{server}`."""
AUDIT_KEEP: Final = 90 * 86_400.0
"""Seconds an audit record is kept in the broker."""
EFFECTS: Final = "MESH_EFFECTS"
"""What became of calls with side effects, so that a task that runs again does not repeat them."""
EFFECT_RECORDS: Final = "mesh.effect"
"""Prefix of these, `mesh.effect.{agent}.{task}.{call}`: the last one holds."""
EFFECT_KEEP: Final = 30 * 86_400.0
"""Seconds a call with side effects is known: no task is delivered again after so long."""
SECOND: Final = 1_000_000_000
"""Nanoseconds, the unit of every duration in JetStream's API."""


@dataclass(frozen=True, slots=True)
class Durability:
    """How long the broker may keep a write in memory, and how soon a silent worker is taken for dead."""

    name: str
    sync_interval: str
    """nats-server `sync_interval`: `always`, or the loss window on power failure such as `100ms`."""
    ack_wait: float
    """Seconds without a sign of life after which a task is delivered to another replica."""

    ordered: bool = True
    """Whether the broker is a single server, which keeps the order of one connection's writes even when it loses
    some. A cluster that elects a leader may lose one and take the next."""

    @property
    def sign_interval(self) -> float:
        """Seconds between a working replica's signs of life."""
        return self.ack_wait / 4


DURABILITY: Final[dict[str, Durability]] = {
    "laptop": Durability("laptop", "100ms", 4.0),
    "strict": Durability("strict", "always", 30.0),
}
"""`laptop` loses at most 100 ms of accepted writes in a power failure; `strict` loses none and waits out elections."""


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A stream as `$JS.API.STREAM.CREATE` takes it. Only what is named here is compared when reconciling."""

    name: str
    subjects: tuple[str, ...]
    max_age: float = 0.0
    """Seconds; 0 keeps for ever."""
    max_bytes: int = -1
    max_per_subject: int = -1
    """Messages kept of each subject, the newest; -1 for all."""
    max_consumers: int = 10_000
    duplicate_window: float = 120.0
    """Seconds in which a repeated `Nats-Msg-Id` is recognised."""
    replicas: int = 1
    discard: str = "new"
    ttl: bool = False
    """Whether messages may have a time to live of their own."""
    schedules: bool = False
    """Whether the broker stores messages at times that other messages name."""
    deny_purge: bool = False
    """Whether nobody may empty it."""
    republish: tuple[str, str] | None = None
    """(source pattern, destination) of the live feed."""

    def config(self) -> dict[str, Any]:
        """The API's JSON."""
        config: dict[str, Any] = {
            "name": self.name,
            "subjects": list(self.subjects),
            "retention": "limits",
            "storage": "file",
            "discard": self.discard,
            "max_age": int(self.max_age * SECOND),
            "max_bytes": self.max_bytes,
            "max_msgs": -1,
            "max_msgs_per_subject": self.max_per_subject,
            "max_consumers": self.max_consumers,
            "num_replicas": self.replicas,
            "duplicate_window": int(self.duplicate_window * SECOND),
            "allow_direct": True,
            "allow_rollup_hdrs": False,
            "deny_delete": True,
            "deny_purge": self.deny_purge,
        }
        if self.ttl:
            config["allow_msg_ttl"] = True
        if self.schedules:
            config |= {"allow_msg_schedules": True, "allow_rollup_hdrs": True}
        if self.republish is not None:
            config["republish"] = {"src": self.republish[0], "dest": self.republish[1]}
        return config


@dataclass(frozen=True, slots=True)
class ConsumerSpec:
    """A durable pull consumer as `$JS.API.CONSUMER.CREATE` takes it."""

    stream: str
    name: str
    filter_subject: str
    ack_wait: float
    """Seconds."""
    max_ack_pending: int = 10_000
    description: str = ""

    def config(self) -> dict[str, Any]:
        """The API's JSON."""
        return {
            "durable_name": self.name,
            "name": self.name,
            "description": self.description,
            "filter_subject": self.filter_subject,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": int(self.ack_wait * SECOND),
            "max_deliver": -1,
            "max_ack_pending": self.max_ack_pending,
            "max_waiting": 512,
            "replay_policy": "instant",
        }


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything that has to exist in the broker for a set of agents."""

    streams: tuple[StreamSpec, ...]
    consumers: tuple[ConsumerSpec, ...]
    agents: tuple[str, ...] = field(default=())


def streams(*, replicas: int = 1, keep: float = 86_400.0, max_bytes: int = -1) -> tuple[StreamSpec, ...]:
    """The streams of one namespace. `keep` is the age in seconds at which blobs leave; tasks stay until archived."""
    return (
        StreamSpec(
            STREAM,
            tuple(f"mesh.{kind}.>" for kind in ("task", "input", "claim", "event", "step")),
            replicas=replicas,
            max_bytes=max_bytes,
            republish=(
                subjects.GRAMMAR["event"].wildcard,
                "mesh.live.{{wildcard(3)}}.{{wildcard(4)}}.{{wildcard(1)}}.{{wildcard(2)}}",
            ),
        ),
        StreamSpec(BLOBS, ("mesh.blob.>",), replicas=replicas, max_age=keep),
        StreamSpec(
            COORD,
            (DECIDED, LEASE, f"{SNAPSHOTS}.>", f"{SCHEDULES}.*", f"{DUE}.*", ARCHIVED),
            replicas=replicas,
            discard="old",  # the broker does not allow schedules otherwise; without a limit nothing is discarded
            ttl=True,
            schedules=True,
        ),
        StreamSpec(REGISTRY, ("mesh.registry.*",), replicas=replicas, max_per_subject=1),
        StreamSpec(
            TOOLS,
            (f"{TOOL_SERVERS}.*", f"{TOOL_PINS}.*"),
            replicas=replicas,
            max_per_subject=TOOL_HISTORY,
            discard="old",  # of a subject, its oldest makes room
            republish=("mesh.>", f"{TOOL_CHANGES}.>"),
        ),
        StreamSpec(
            PUSH,
            tuple(f"mesh.{kind}.>" for kind in ("push", "pushed")),
            replicas=replicas,
            max_age=PUSH_KEEP,
            max_per_subject=1,
        ),
        StreamSpec(
            POLICY,
            (f"{POLICY_VERSIONS}.*", f"{POLICY_STATE}.*"),
            replicas=replicas,
            republish=(f"{POLICY_STATE}.*", f"{POLICY_CHANGES}.{{{{wildcard(1)}}}}"),
        ),
        StreamSpec(
            RATES,
            (f"{RATE_PREFIX}.*", f"{POLICY_SEEN}.*"),
            replicas=replicas,
            max_age=RATE_KEEP,
            max_per_subject=1,
        ),
        StreamSpec(AUDIT, (f"{AUDIT_RECORDS}.>",), replicas=replicas, max_age=AUDIT_KEEP, deny_purge=True),
        StreamSpec(
            EFFECTS,
            (f"{EFFECT_RECORDS}.>",),
            replicas=replicas,
            max_age=EFFECT_KEEP,
            max_per_subject=1,
            discard="old",  # of a subject, what was known before makes room
        ),
    )


def consumers(agent: str, durability: Durability) -> tuple[ConsumerSpec, ...]:
    """The durable consumers of one agent, one a lane."""
    return tuple(
        ConsumerSpec(
            STREAM,
            subjects.consumer(agent, lane),
            subjects.GRAMMAR["task" if lane == "work" else "input"].pattern(agent=agent).removesuffix(".*.*.*") + ".>",
            durability.ack_wait,
            description=f"{lane} of agent {agent}",
        )
        for lane in subjects.LANES
    )


def push_consumer() -> ConsumerSpec:
    """The durable consumer of push deliveries: a delivered message is the lease of its config."""
    return ConsumerSpec(
        PUSH,
        PUSH_CONSUMER,
        subjects.GRAMMAR["push"].wildcard,
        PUSH_ACK_WAIT,
        max_ack_pending=PUSH_JOBS,
        description="deliveries of push notifications",
    )


def due_consumer() -> ConsumerSpec:
    """The durable consumer of schedules that are due: acknowledged once the task they start is accepted."""
    return ConsumerSpec(COORD, DUE_CONSUMER, f"{DUE}.*", 20.0, description="scheduled tasks that are due")


def topology(
    agents: tuple[str, ...], durability: str, *, replicas: int = 1, keep: float = 86_400.0, max_bytes: int = -1
) -> Topology:
    """Streams and consumers for a set of agents under a named durability."""
    profile = DURABILITY.get(durability)
    if profile is None:
        raise InvalidConfig(f"durability {durability!r} is unknown; use one of {', '.join(DURABILITY)}")
    made = tuple(spec for agent in agents for spec in consumers(subjects.check_name(agent), profile))
    return Topology(
        streams(replicas=replicas, keep=keep, max_bytes=max_bytes), (*made, push_consumer(), due_consumer()), agents
    )
