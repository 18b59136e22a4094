"""The registry of agents: what is kept of each, who may register, and what callers are shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final

from weft_coordinator.decide import pinning
from weft_coordinator.decide.pinning import Cards, Shown
from weft_coordinator.decide.presence import Presence
from weft_protocols import cards, subjects
from weft_protocols.errors import (
    AgentNotFound,
    Conflict,
    FieldViolation,
    InvalidConfig,
    InvalidParams,
    ParseError,
    PermissionDenied,
)

MAX_TEXT: Final = 16_384
"""Characters of a description."""
MAX_BODY: Final = 256 * 1024
"""Bytes of one card, and of the skills: cards are small, and every coordinator keeps them all."""
MAX_SHOWN: Final = 512 * 1024
"""Bytes of a card, its extended card and the skills together: a record with some older cards is one message."""
_SKILL_TEXTS: Final = ("id", "name", "description")
_SKILL_LISTS: Final = ("tags", "examples")


@dataclass(frozen=True, slots=True)
class Replica:
    """One registered process of an agent."""

    replica: str
    version: str
    code_digest: str
    pid: int
    host: str
    slots: int
    registered: int
    """Unix milliseconds."""
    card_digest: str = ""
    """Of the card it came with, which need not be the agent's current one."""
    weight: float = 1.0
    """How much of what is routed by skill it gets, against others."""
    cost: float = 0.0
    """What a task costs there, against others."""


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """What is stored of an agent: its cards, and its replicas."""

    agent: str
    cards: Cards = field(default_factory=Cards)
    replicas: Mapping[str, Replica] = field(default_factory=dict)
    revoked: bool = False

    @property
    def version(self) -> str:
        """Version of the current card."""
        return self.cards.shown.version

    @property
    def description(self) -> str:
        """What the agent does."""
        return self.cards.shown.description

    @property
    def skills(self) -> tuple[Mapping[str, Any], ...]:
        """Its skills with their schemas."""
        return self.cards.shown.skills

    def encode(self) -> bytes:
        """JSON, as it is stored."""
        values = {
            "agent": self.agent,
            **self.cards.told(),
            "replicas": [dataclasses.asdict(replica) for replica in self.replicas.values()],
            "revoked": self.revoked,
        }
        return json.dumps(values, separators=(",", ":")).encode()

    @staticmethod
    def decode(data: bytes) -> AgentRecord:
        """The record in `data`; unknown fields are ignored. ParseError if it is none."""
        try:
            raw = json.loads(data)
            names = {f.name for f in dataclasses.fields(Replica)}
            replicas = [Replica(**{k: v for k, v in one.items() if k in names}) for one in raw["replicas"]]
            return AgentRecord(
                raw["agent"],
                Cards.of(raw),
                {replica.replica: replica for replica in replicas},
                raw.get("revoked", False),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ParseError(f"not a registry record: {error}") from error


@dataclass(frozen=True, slots=True)
class Registration:
    """A replica's checked request to be known."""

    agent: str
    shown: Shown
    replica: Replica


def registration(body: Mapping[str, Any], *, caller: str, now: int) -> Registration:
    """Check a registration.

    Raises:
        PermissionDenied: the caller is another agent, or the mesh itself.
        InvalidParams: a field is missing or wrong; every such field is named.
    """
    fields = Fields(body)
    agent = fields.text("agent")
    if not fields.wrong and (agent != caller or agent in subjects.RESERVED_NAMES):
        raise PermissionDenied(f"{caller} cannot register agent {agent!r}: an agent registers itself only")
    shown = _shown(fields, agent)
    replica = Replica(
        fields.token("replica"),
        shown.version,
        fields.text("code_digest", default=""),
        fields.number("pid"),
        fields.text("host", default=""),
        fields.number("slots"),
        now,
        shown.digest,
        fields.real("weight", default=1.0),
        fields.real("cost", default=0.0),
    )
    fields.check(f"registration of {caller}")
    return Registration(agent, shown, replica)


def admit(
    record: AgentRecord | None, wanted: Registration, *, presence: Presence, ended: frozenset[str], now: int
) -> AgentRecord:
    """The agent's record with this replica in it, and without those that are gone.

    Two processes under one name and version must run the same code and have the same card; a new version may run
    beside an old one. Which card the agent has then: `pinning.offer`.

    Args:
        record: What is stored.
        wanted: The request.
        presence: Who was heard of.
        ended: Replicas whose process is known to have ended.
        now: Unix milliseconds.

    Raises:
        Conflict: a live replica of the same version runs other code, or has another card.
    """
    new = wanted.replica
    kept: dict[str, Replica] = {}
    live: list[tuple[str, str]] = []
    for other in record.replicas.values() if record is not None else ():
        state = presence.state(wanted.agent, other.replica, registered=other.registered, now=now)
        if other.replica == new.replica or other.replica in ended or state == "gone":
            continue
        kept[other.replica] = other
        if state not in ("ready", "unknown"):
            continue
        live.append((other.version, other.card_digest))
        if other.version == new.version and other.code_digest != new.code_digest:
            raise Conflict(
                f"agent {wanted.agent} {new.version} is running with other code already: replica {other.replica} "
                f"(pid {other.pid} on {other.host or 'an unknown host'}) has digest {other.code_digest[:12] or '-'}, "
                f"this one {new.code_digest[:12] or '-'}. Give the new code another version, or stop the old replicas "
                "first"
            )
    kept[new.replica] = new
    before = record.cards if record is not None else Cards()
    return AgentRecord(wanted.agent, pinning.offer(before, wanted.shown, agent=wanted.agent, live=live, now=now), kept)


def leave(record: AgentRecord, replica: str) -> AgentRecord:
    """The record without a replica."""
    left = {name: one for name, one in record.replicas.items() if name != replica}
    return dataclasses.replace(record, replicas=left)


def revoke(agent: str) -> AgentRecord:
    """The record of an agent that may not connect any more."""
    return AgentRecord(agent, revoked=True)


def known(records: Mapping[str, AgentRecord], agent: str) -> AgentRecord:
    """The record of an agent that has a card; AgentNotFound, with the nearest name, if there is none."""
    record = records.get(agent)
    if record is None or not record.cards.shown.digest:
        near = get_close_matches(agent, records, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AgentNotFound(f"no agent {agent!r} ever registered in this mesh{hint}")
    return record


def show(record: AgentRecord, presence: Presence, *, now: int, replicas: bool) -> dict[str, Any]:
    """An agent as `agents` answers; with its replicas where they may be seen."""
    states = {
        one.replica: presence.state(record.agent, one.replica, registered=one.registered, now=now)
        for one in record.replicas.values()
    }
    found = set(states.values())
    shown: dict[str, Any] = {
        "name": record.agent,
        "version": record.version,
        "description": record.description,
        "skills": list(record.skills),
        "card_digest": record.cards.shown.digest,
        "state": next((state for state in ("ready", "unknown", "draining", "stale") if state in found), "offline"),
        "ready": sum(state == "ready" for state in states.values()),
    }
    if replicas:
        shown["replicas"] = [
            {
                **dataclasses.asdict(one),
                "state": states[one.replica],
                **presence.show(record.agent, one.replica, registered=one.registered),
            }
            for one in record.replicas.values()
            if states[one.replica] != "gone"
        ]
    return shown


def storable(value: Any) -> bool:
    """Whether it is a text that can be stored: JSON can carry halves of characters, which no log takes."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


class Fields:
    """Reads the fields of a JSON object and collects what is wrong with them."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body
        self.wrong: list[FieldViolation] = []

    def text(self, name: str, *, limit: int = 256, default: str | None = None) -> str:
        """A text of at most `limit` characters; required unless it has a default."""
        value = self._body.get(name, default)
        if not isinstance(value, str) or len(value) > limit or (not value and default is None):
            self.mistake(name, f"must be a text of 1 to {limit} characters")
            return ""
        if not storable(value):
            self.mistake(name, "has half a character in it (a lone surrogate)")
            return ""
        return value

    def object(self, name: str, *, limit: int) -> Mapping[str, Any] | None:
        """A JSON object of at most `limit` bytes; None if there is none."""
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, dict) or (size := len(json.dumps(value))) > limit:
            what = f"has {size} bytes; {limit} fit" if isinstance(value, dict) else "must be an object"
            self.mistake(name, what)
            return None
        return value

    def token(self, name: str) -> str:
        """A text that can stand in a subject."""
        value = self.text(name)
        if value and not subjects.TOKEN.match(value):
            self.mistake(name, "must be 1 to 64 of A-Z a-z 0-9 _ -")
        return value

    def number(self, name: str, *, default: int | None = None) -> int:
        """A whole number from 0; required unless it has a default."""
        value = self._body.get(name, default)
        if type(value) is not int or not 0 <= value < 2**53:
            self.mistake(name, "must be a whole number from 0")
            return 0
        return value

    def real(self, name: str, *, default: float) -> float:
        """A number from 0."""
        value = self._body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            self.mistake(name, "must be a number from 0")
            return default
        return float(value)

    def texts(self, name: str, *, limit: int = 256) -> tuple[str, ...]:
        """A list of at most `limit` texts; empty if there is none."""
        value = self._body.get(name, [])
        if not isinstance(value, list) or len(value) > limit or not all(map(storable, value)):
            self.mistake(name, f"must be a list of at most {limit} texts")
            return ()
        return tuple(value)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of several texts."""
        value = self._body.get(name)
        if value not in choices:
            self.mistake(name, f"must be one of {', '.join(choices)}")
            return choices[0]
        return str(value)

    def check(self, what: str) -> None:
        """Raise InvalidParams if anything was wrong."""
        if self.wrong:
            text = "; ".join(f"{one.field} {one.description}" for one in self.wrong)
            raise InvalidParams(f"{what}: {text}", violations=tuple(self.wrong))

    def mistake(self, name: str, what: str) -> None:
        """Note what is wrong with a field."""
        self.wrong.append(FieldViolation(name, what))


def _shown(fields: Fields, agent: str) -> Shown:
    """The card of a registration, made from its other fields where it has none, and what goes with it."""
    version = fields.text("version")
    description = fields.text("description", limit=MAX_TEXT, default="")
    skills = _skills(fields)
    given, extended = fields.object("card", limit=MAX_BODY), fields.object("extended_card", limit=MAX_BODY)
    if fields.wrong:
        return Shown(version)
    try:
        core = _core(given) if given is not None else _made(agent, version, description, skills)
        if core.version != version:
            raise InvalidConfig(f"it has version {core.version!r} and the registration {version!r}")
        digest = cards.digest(core)
        if fields.text("card_digest", default=digest) != digest:
            raise InvalidConfig(f"its digest is {digest} and not the one named in card_digest")
        if given is not None:
            skills = _of_card(core, skills)
        more = cards.card_json(_core(extended)) if extended is not None else None
    except InvalidConfig as error:
        fields.mistake("card", f"cannot be used: {error}")
        return Shown(version)
    shown = Shown(version, digest, description, skills, cards.card_json(core), more)
    if (size := len(json.dumps(dataclasses.asdict(shown)))) > MAX_SHOWN:
        fields.mistake("card", f"has {size} bytes with its extended card and skills; {MAX_SHOWN} fit")
    return shown


def _core(told: Mapping[str, Any]) -> cards.AgentCard:
    card = cards.published(cards.parse_card(told), ())
    cards.check_card(card)
    return card


def _made(agent: str, version: str, description: str, skills: tuple[Mapping[str, Any], ...]) -> cards.AgentCard:
    return cards.core_card(agent, version=version, description=description, skills=skills)


def _of_card(card: cards.AgentCard, skills: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
    """The skills a card shows, with the registered schemas."""
    schemas = {skill["id"]: skill["schema"] for skill in skills}
    return tuple(
        {
            **{name: getattr(skill, name) for name in _SKILL_TEXTS},
            **{name: list(getattr(skill, name)) for name in _SKILL_LISTS},
            "schema": schemas.get(skill.id, {}),
        }
        for skill in card.skills
    )


def _skills(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """The skills of a registration, known fields only."""
    raw = fields._body.get("skills", [])
    made: list[Mapping[str, Any]] = []
    for skill in raw if isinstance(raw, list) else [None]:
        if not isinstance(skill, dict) or not _skill_fits(skill):
            fields.mistake("skills", "must be a list of {id, name, description, tags, schema}")
            return ()
        made.append(
            {
                **{name: skill.get(name, "") for name in _SKILL_TEXTS},
                **{name: skill.get(name, []) for name in _SKILL_LISTS},
                "schema": skill.get("schema", {}),
            }
        )
    return tuple(made)


def _skill_fits(skill: Mapping[str, Any]) -> bool:
    texts = all(isinstance(skill.get(name, ""), str) for name in _SKILL_TEXTS)
    lists = all(
        isinstance(skill.get(name, []), list) and all(isinstance(item, str) for item in skill.get(name, []))
        for name in _SKILL_LISTS
    )
    return bool(skill.get("id")) and texts and lists and isinstance(skill.get("schema", {}), dict)
