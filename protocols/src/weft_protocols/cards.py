"""Agent cards: built from what an agent declares, in canonical form, compared and searched.

The *core card* is what the agent itself says: an `AgentCard` without `supported_interfaces` and `signatures`, which
whoever publishes it adds (the coordinator for NATS, a gateway for HTTP and gRPC).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Any, Final

from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import InvalidParamsError
from a2a.utils.proto_utils import validate_proto_required_fields
from google.protobuf import json_format, struct_pb2
from google.protobuf.message import Message as ProtoMessage

from weft_protocols.a2a import BINDING, MAX_DEPTH, SCHEMA_EXTENSION
from weft_protocols.canonical import canonical_json, without_empty
from weft_protocols.errors import InvalidConfig, WeftError
from weft_protocols.headers import A2A_VERSION

AgentCard = pb.AgentCard
"""The protocol's card, for layers that do not import a2a themselves."""
ANY_MODE: Final = "*/*"
"""Media range in a card's modes: anything is taken."""
INPUT_MODES: Final = ("text/plain", "application/json", ANY_MODE)
"""Default input modes of an agent that names none: text and data by preference, files of any type."""
OUTPUT_MODES: Final = ("text/plain", "application/json")
"""Default output modes of an agent that names none."""


class CardNotTrusted(WeftError):
    """A card is not signed by the keys of this mesh."""

    exit_code = 4


# Building ------------------------------------------------------------------------------------------


def parse_card(
    value: Mapping[str, Any] | pb.AgentCard, *, what: str = "the card", strict: bool = False
) -> pb.AgentCard:
    """A card from its ProtoJSON form, field names in camelCase or snake_case; a copy of one that is a card already.

    Args:
        value: The card, or part of one.
        what: Names the card in the error.
        strict: Unknown fields are a mistake instead of ignored.

    Raises:
        InvalidConfig: it is not a card.
    """
    made = pb.AgentCard()
    if isinstance(value, pb.AgentCard):
        made.CopyFrom(value)
        return made
    try:
        json_format.ParseDict(dict(value), made, ignore_unknown_fields=not strict)
    except (json_format.ParseError, ValueError, TypeError, AttributeError) as error:
        raise InvalidConfig(f"{what} is not an A2A agent card: {error}") from error
    return made


def card_json(card: pb.AgentCard) -> dict[str, Any]:
    """ProtoJSON form of a card; InvalidConfig if a value in it is not JSON."""
    try:
        made: dict[str, Any] = json_format.MessageToDict(card)
    except (json_format.SerializeToJsonError, ValueError) as error:
        raise InvalidConfig(f"the card of {card.name} holds a value that is not JSON: {error}") from error
    return made


def core_card(
    name: str,
    *,
    version: str,
    description: str = "",
    skills: Iterable[Mapping[str, Any]] = (),
    extra: Mapping[str, Any] | pb.AgentCard | None = None,
    extended: bool = False,
) -> pb.AgentCard:
    """The core card of an agent: valid A2A 1.0 in everything but the interfaces it is published under.

    Args:
        name: of the agent; the card's name unless `extra` has one.
        version: of the agent, always the card's.
        description: of the agent.
        skills: Objects with id, name, description, tags, examples, schema, as `Agent.describe` gives them.
        extra: A card or part of one: what it sets wins. Where it lists skills only those are shown, each completed
            from the declared skill with its id.
        extended: Whether there is an extended card.

    Raises:
        InvalidConfig: `extra` is not a card, has another version, or the card would lack a required field.
    """
    declared = list(skills)
    card = parse_card(extra, what=f"the card of agent {name}", strict=True) if extra is not None else pb.AgentCard()
    if card.version and card.version != version:
        raise InvalidConfig(f"agent {name} has version {version!r} and its card {card.version!r}; give both the same")
    card.ClearField("supported_interfaces")
    card.ClearField("signatures")
    card.name = card.name or name
    card.version = version
    card.description = card.description or description or f"Agent {name}"
    if not card.default_input_modes:
        card.default_input_modes.extend(INPUT_MODES)
    if not card.default_output_modes:
        card.default_output_modes.extend(OUTPUT_MODES)
    card.capabilities.streaming = card.capabilities.push_notifications = True
    if extended:
        card.capabilities.extended_agent_card = True
    _add_skills(card, declared)
    _add_schemas(card, declared)
    _tidy(card)
    check_card(card, what=f"the card of agent {name}")
    return card


def extended_card(core: pb.AgentCard, extra: Mapping[str, Any] | pb.AgentCard) -> pb.AgentCard:
    """The extended card: the core card, with what `extra` sets over it and its skills added.

    Raises:
        InvalidConfig: `extra` is not a card, or the card would lack a required field.
    """
    what = f"the extended card of agent {core.name}"
    over = parse_card(extra, what=what, strict=True)
    for ours in ("supported_interfaces", "signatures", "version"):
        over.ClearField(ours)
    made = pb.AgentCard()
    made.CopyFrom(core)
    skills = {skill.id: skill for skill in core.skills} | {skill.id: skill for skill in over.skills}
    for field, _ in over.ListFields():
        if field.name != "capabilities":
            made.ClearField(field.name)
    made.MergeFrom(over)
    made.ClearField("skills")
    made.skills.extend(_complete_skill(skill, {}, core.description) for skill in skills.values())
    made.capabilities.streaming = made.capabilities.push_notifications = True
    made.capabilities.extended_agent_card = True
    _tidy(made)
    check_card(made, what=what)
    return made


def mesh_interface(agent: str) -> pb.AgentInterface:
    """The interface under which an agent of this mesh is reached over NATS (binding specification, section 2)."""
    return pb.AgentInterface(url=f"nats://mesh/{agent}", protocol_binding=BINDING, protocol_version=A2A_VERSION)


def published(core: pb.AgentCard, interfaces: Iterable[pb.AgentInterface]) -> pb.AgentCard:
    """A card to publish under these interfaces, the preferred one first; not signed yet."""
    made = pb.AgentCard()
    made.CopyFrom(core)
    made.ClearField("signatures")
    made.ClearField("supported_interfaces")
    made.supported_interfaces.extend(interfaces)
    return made


def check_card(card: pb.AgentCard, *, what: str = "the card") -> None:
    """InvalidConfig naming every required field a core card lacks, or why it has no canonical form."""
    missing = missing_fields(published(card, [mesh_interface("a")]))
    if missing:
        raise InvalidConfig(f"{what} lacks {', '.join(missing)}; A2A requires it")
    canonical(card)


def missing_fields(message: ProtoMessage) -> tuple[str, ...]:
    """Paths of the fields that A2A requires and that are empty in a message."""
    try:
        validate_proto_required_fields(message)
    except InvalidParamsError as error:
        return tuple(str(one["field"]) for one in (error.data or {}).get("errors", ()))
    return ()


def _add_skills(card: pb.AgentCard, declared: Sequence[Mapping[str, Any]]) -> None:
    by_id = {str(skill["id"]): skill for skill in declared}
    listed = list(card.skills) or [pb.AgentSkill(id=name) for name in by_id] or [pb.AgentSkill(id=card.name)]
    made = [_complete_skill(skill, by_id.get(skill.id, {}), card.description) for skill in listed]
    card.ClearField("skills")
    card.skills.extend(made)


def _complete_skill(skill: pb.AgentSkill, declared: Mapping[str, Any], description: str) -> pb.AgentSkill:
    """A skill with everything A2A requires; one without a tag is found by its id."""
    made = pb.AgentSkill()
    made.CopyFrom(skill)
    made.name = made.name or str(declared.get("name") or "") or made.id
    made.description = made.description or str(declared.get("description") or "") or description
    made.tags[:] = [tag for tag in made.tags or declared.get("tags") or () if tag] or [made.id]
    if not made.examples:
        made.examples.extend(text for text in declared.get("examples") or () if text)
    return made


def _add_schemas(card: pb.AgentCard, declared: Sequence[Mapping[str, Any]]) -> None:
    """The input schemas of the skills shown, in their extension. One that the canonical form cannot hold stays out."""
    if any(extension.uri == SCHEMA_EXTENSION for extension in card.capabilities.extensions):
        return
    shown = {skill.id for skill in card.skills}
    schemas = {str(skill["id"]): _portable(skill.get("schema")) for skill in declared if skill["id"] in shown}
    fitting = {name: schema for name, schema in schemas.items() if schema}
    if fitting:
        extension = card.capabilities.extensions.add(
            uri=SCHEMA_EXTENSION, description="JSON schema of the input of each skill, by the skill's id"
        )
        json_format.ParseDict(fitting, extension.params)


def _portable(schema: Any) -> dict[str, Any] | None:
    """A JSON object as it comes out of protobuf's Struct, without what is empty; None if it has no canonical form."""
    try:
        made: dict[str, Any] | None = without_empty(
            json_format.MessageToDict(json_format.ParseDict(schema, struct_pb2.Struct())), deepest=MAX_DEPTH
        )
        canonical_json(made)
    except (json_format.Error, ValueError, TypeError, AttributeError):
        return None
    return made


def _tidy(card: pb.AgentCard) -> None:
    """Without empty values where readers of the specification and the SDK disagree on whether they are signed."""
    for name in ("documentation_url", "icon_url"):
        if not getattr(card, name):
            card.ClearField(name)
    for extension in card.capabilities.extensions:
        if extension.HasField("params"):
            try:
                kept = without_empty(json_format.MessageToDict(extension.params)) or {}
            except ValueError as error:
                raise InvalidConfig(
                    f"extension {extension.uri} of card {card.name} has no JSON form: {error}"
                ) from error
            extension.params.Clear()
            json_format.ParseDict(kept, extension.params)


# Canonical form ------------------------------------------------------------------------------------


def canonical(card: pb.AgentCard) -> bytes:
    """The bytes that are signed: the card without signatures, by the rules of ProtoJSON and RFC 8785 (A2A 8.4.1).

    Empty values are left out everywhere, as the A2A SDK does.

    Raises:
        InvalidConfig: it has no canonical form: NaN, a whole number over 2^53, text that is not Unicode, too deep.
    """
    values = card_json(card)
    values.pop("signatures", None)
    try:
        return canonical_json(without_empty(values))
    except ValueError as error:
        raise InvalidConfig(f"the card of {card.name} has no canonical form: {error}") from error


def digest(card: pb.AgentCard) -> str:
    """SHA-256 of the canonical core card, 64 hex digits: the same under whichever interfaces it is published."""
    core = pb.AgentCard()
    core.CopyFrom(card)
    core.ClearField("supported_interfaces")
    return sha256(canonical(core)).hexdigest()


# Versions ------------------------------------------------------------------------------------------


def compare_versions(one: str, other: str) -> int:
    """-1, 0 or 1: whether a version is before, the same as or after another one.

    Precedence of Semantic Versioning, also for versions with fewer or more numbers (`1.2` is `1.2.0`) and for
    pre-releases without a dash (`1.0rc1`); build metadata after `+` does not count.
    """
    mine, theirs = _version_key(one), _version_key(other)
    return (mine > theirs) - (mine < theirs)


def _version_key(version: str) -> tuple[tuple[int, ...], int, tuple[tuple[int, int, str], ...]]:
    match = re.match(r"[vV]?(\d+(?:\.\d+)*)?[.\-_]?(.*)\Z", version.partition("+")[0], re.DOTALL)
    release, rest = (match[1] or "", match[2]) if match is not None else ("", version)
    numbers = [int(part) for part in release.split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    words = tuple(
        (0, int(word), "") if word.isdecimal() else (1, 0, word) for word in re.findall(r"\d+|[^\d.\-_]+", rest)
    )
    return tuple(numbers), 0 if words else 1, words


# Searching -----------------------------------------------------------------------------------------


def matches(agent: str, skills: Iterable[Mapping[str, Any]], *, name: str = "", skill: str = "", tag: str = "") -> bool:
    """Whether an agent is one of those looked for: by name, by a skill's id, by a skill's tag.

    Each is a pattern with `*`, `?` and `[…]`, in the case it is written; an empty one matches everything. Skill and
    tag must be those of one and the same skill.
    """
    if name and not fnmatchcase(agent, name):
        return False
    if not skill and not tag:
        return True
    return any(
        (not skill or fnmatchcase(str(one.get("id", "")), skill))
        and (not tag or any(fnmatchcase(str(mine), tag) for mine in one.get("tags", ())))
        for one in skills
    )


def takes(card: pb.AgentCard, media_type: str) -> bool:
    """Whether an agent takes parts of a media type, by the modes of its card and of any of its skills.

    A part without a media type is always taken, and so is everything by a card without modes. Parameters of the
    media type do not count; modes may be ranges (`image/*`, `*/*`).
    """
    wanted = media_type.partition(";")[0].strip().lower()
    modes = [*card.default_input_modes, *(mode for skill in card.skills for mode in skill.input_modes)]
    if not wanted or not modes:
        return True
    return any(_covers(mode.partition(";")[0].strip().lower(), wanted) for mode in modes)


def _covers(mode: str, wanted: str) -> bool:
    return mode in (wanted, ANY_MODE) or (mode.endswith("/*") and wanted.startswith(mode[:-1]))
