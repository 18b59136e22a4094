"""Agent cards: what is built is valid A2A, and what is signed is what the A2A SDK would sign."""

from __future__ import annotations

import json
import logging
import random
from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb
from a2a.utils import signing
from a2a.utils.proto_utils import validate_proto_required_fields
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from weft_protocols import cards
from weft_protocols.a2a import BINDING, SCHEMA_EXTENSION
from weft_protocols.canonical import canonical_json
from weft_protocols.errors import InvalidConfig

SKILL: dict[str, Any] = {
    "id": "say",
    "name": "Say",
    "description": "says it",
    "tags": ["talk"],
    "examples": ["hello"],
    "schema": {"type": "string", "title": "text"},
}


def build(**options: Any) -> pb.AgentCard:
    return cards.core_card("echo", **{"version": "1.0", "description": "an echo", "skills": [SKILL], **options})


def skills_of(card: pb.AgentCard) -> dict[str, pb.AgentSkill]:
    return {skill.id: skill for skill in card.skills}


# Building ------------------------------------------------------------------------------------------


def test_the_card_of_an_agent_is_valid_a2a_once_it_has_an_interface() -> None:
    card = build()
    assert (card.name, card.version, card.description) == ("echo", "1.0", "an echo")
    assert card.capabilities.streaming
    assert card.capabilities.push_notifications
    assert not card.supported_interfaces
    assert not card.signatures
    validate_proto_required_fields(cards.published(card, [cards.mesh_interface("echo")]))


def test_the_least_an_agent_can_say_makes_a_valid_card() -> None:
    card = cards.core_card("echo", version="1", skills=[{"id": "say", "schema": {}}])
    validate_proto_required_fields(cards.published(card, [cards.mesh_interface("echo")]))
    skill = card.skills[0]
    assert (card.description, skill.name, skill.description, list(skill.tags)) == (
        "Agent echo",
        "say",
        "Agent echo",
        ["say"],
    )
    assert not card.capabilities.extensions


def test_an_agent_without_skills_has_a_valid_card_too() -> None:
    card = cards.core_card("echo", version="1")
    validate_proto_required_fields(cards.published(card, [cards.mesh_interface("echo")]))


def test_the_interface_of_the_mesh_names_the_binding_and_the_agent() -> None:
    one = cards.mesh_interface("echo")
    assert (one.url, one.protocol_binding, one.protocol_version, one.tenant) == ("nats://mesh/echo", BINDING, "1.0", "")


def test_the_schemas_of_the_skills_are_in_an_extension() -> None:
    (extension,) = build().capabilities.extensions
    assert extension.uri == SCHEMA_EXTENSION
    assert not extension.required
    assert json_format.MessageToDict(extension.params) == {"say": SKILL["schema"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"default": float("nan")},
        {"not": {1: object()}},
        {"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]},
    ],
    ids=["not a number", "not JSON", "too deep"],
)
def test_a_schema_that_has_no_canonical_form_stays_out(schema: dict[str, Any]) -> None:
    card = build(skills=[{**SKILL, "schema": schema}, {**SKILL, "id": "sing"}])
    assert json_format.MessageToDict(card.capabilities.extensions[0].params).keys() == {"sing"}
    cards.digest(card)


def test_what_the_given_card_says_wins() -> None:
    card = build(
        extra={
            "name": "The Echo",
            "description": "better",
            "provider": {"organization": "Example", "url": "https://example.com"},
            "iconUrl": "https://example.com/icon.png",
            "default_input_modes": ["text/plain"],
            "capabilities": {"extensions": [{"uri": "https://example.com/x", "required": True}]},
        }
    )
    assert (card.name, card.description, card.provider.organization) == ("The Echo", "better", "Example")
    assert list(card.default_input_modes) == ["text/plain"]
    assert {one.uri: one.required for one in card.capabilities.extensions} == {
        "https://example.com/x": True,
        SCHEMA_EXTENSION: False,
    }


def test_skills_of_the_given_card_are_the_ones_shown_completed_by_what_is_declared() -> None:
    extra = pb.AgentCard(skills=[pb.AgentSkill(id="say", description="other words"), pb.AgentSkill(id="new")])
    card = build(extra=extra, skills=[SKILL, {**SKILL, "id": "hidden"}])
    shown = skills_of(card)
    assert shown.keys() == {"say", "new"}
    assert (shown["say"].name, shown["say"].description, list(shown["say"].tags)) == ("Say", "other words", ["talk"])
    assert json_format.MessageToDict(card.capabilities.extensions[0].params).keys() == {"say"}


def test_interfaces_and_signatures_of_the_given_card_do_not_count() -> None:
    extra = pb.AgentCard(
        supported_interfaces=[pb.AgentInterface(url="http://elsewhere")],
        signatures=[pb.AgentCardSignature(protected="x", signature="y")],
    )
    assert build(extra=extra) == build()
    assert extra.signatures


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"nmae": "x"}, "nmae"),
        ({"version": "2.0"}, "'1.0' and its card '2.0'"),
        ({"provider": {"organization": "Example"}}, "provider.url"),
        ({"name": 5}, "not an A2A agent card"),
        ("card.json", "not an A2A agent card"),
        ({"capabilities": {"extensions": [{"uri": "u", "params": {"x": float("nan")}}]}}, "no JSON form"),
    ],
    ids=["an unknown field", "another version", "half a provider", "a wrong type", "no object", "not a number"],
)
def test_a_wrong_card_is_refused_with_what_is_wrong(extra: Any, message: str) -> None:
    with pytest.raises(InvalidConfig, match="echo") as caught:
        build(extra=extra)
    assert message in str(caught.value)


def test_the_extended_card_adds_to_the_card() -> None:
    core = build(extended=True, extra={"default_output_modes": ["text/plain"]})
    assert core.capabilities.extended_agent_card
    made = cards.extended_card(
        core,
        {
            "description": "for friends",
            "skills": [{"id": "shout"}, {"id": "say", "tags": ["loud"]}],
            "capabilities": {"extensions": [{"uri": "https://example.com/secret"}]},
        },
    )
    assert (made.name, made.version, made.description) == ("echo", "1.0", "for friends")
    assert {skill.id: list(skill.tags) for skill in made.skills} == {"say": ["loud"], "shout": ["shout"]}
    assert [one.uri for one in made.capabilities.extensions] == [SCHEMA_EXTENSION, "https://example.com/secret"]
    assert list(made.default_output_modes) == ["text/plain"]
    validate_proto_required_fields(cards.published(made, [cards.mesh_interface("echo")]))


# Canonical form ------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
words = texts.filter(bool)
core_cards = st.builds(
    lambda name, params, modes, provider, extra: cards.parse_card(
        {
            "name": name,
            "version": "1.0",
            "description": name,
            "capabilities": {"streaming": True, "pushNotifications": False, "extensions": [{"uri": "u", **params}]},
            "defaultInputModes": modes,
            "defaultOutputModes": modes,
            "skills": [{"id": name, "name": name, "description": name, "tags": modes}],
            **provider,
            **extra,
        }
    ),
    words,
    st.fixed_dictionaries({}, optional={"params": st.dictionaries(texts, values, max_size=4)}),
    st.lists(words, min_size=1, max_size=3),
    st.fixed_dictionaries(
        {}, optional={"provider": st.fixed_dictionaries({"organization": words, "url": words}), "iconUrl": texts}
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "securitySchemes": st.dictionaries(
                words, st.just({"httpAuthSecurityScheme": {"scheme": "Bearer"}}), max_size=3
            ),
            "securityRequirements": st.lists(
                st.builds(lambda name: {"schemes": {name: {"list": ["read"]}}}, words), max_size=2
            ),
        },
    ),
)


@settings(max_examples=150, deadline=None)
@given(core_cards)
def test_the_bytes_to_sign_are_those_of_the_sdk(card: pb.AgentCard) -> None:
    logging.disable(logging.WARNING)  # the SDK warns that a core card has no interfaces yet
    try:
        expected = signing._canonicalize_agent_card(card)
    finally:
        logging.disable(logging.NOTSET)
    assert cards.canonical(card).decode() == expected


@settings(max_examples=150, deadline=None)
@given(numbers)
def test_numbers_are_written_as_ecmascript_writes_them(number: float) -> None:
    text = canonical_json(number).decode()
    assert float(text) == number
    assert len(text) <= 26


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1e21, "1e+21"),
        (1e20, "100000000000000000000"),
        (1e-6, "0.000001"),
        (1e-7, "1e-7"),
        (-0.0, "0"),
        (4.50, "4.5"),
        (2e-3, "0.002"),
        (333333333.33333329, "333333333.3333333"),
        (1.5e300, "1.5e+300"),
        (5e-324, "5e-324"),
        (-12.25, "-12.25"),
    ],
)
def test_the_numbers_of_rfc_8785_come_out_as_it_says(number: float, text: str) -> None:
    assert canonical_json(number).decode() == text


def test_keys_are_sorted_by_utf16_and_texts_escaped_as_little_as_possible() -> None:
    # RFC 8785, section 3.2.3: U+1F600 sorts before U+FB33, though its code point is higher.
    value = {"\ufb33": 1, "\U0001f600": 2, "ö": 3, "\r": 4, "1": 5, "\x80": 6}
    keys = list(json.loads(canonical_json(value), object_pairs_hook=list))
    assert [key for key, _ in keys] == ["\r", "1", "\x80", "ö", "\U0001f600", "\ufb33"]
    assert canonical_json('€$\x0f\nA\'B"\\\\"/').decode() == '"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 2**53, {1: 2}, "\ud800", {"\ud800": 1}, object(), [[[[[]]]]]],
    ids=["nan", "inf", "large", "key", "text", "text as key", "object", "deep"],
)
def test_what_has_no_canonical_form_is_an_error(value: Any) -> None:
    with pytest.raises(ValueError):
        canonical_json(value, deepest=4)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_a_value_is_written_the_same_alone_and_beside_one_that_needs_more_care(value: Any) -> None:
    try:
        alone = canonical_json(value)
    except ValueError:  # a key that is not Unicode
        with pytest.raises(ValueError):
            canonical_json([value, 0.5])
        return
    assert canonical_json([value, 0.5]) == b"[" + alone + b",0.5]"


def test_the_digest_does_not_depend_on_the_order_of_fields() -> None:
    told = cards.card_json(build(extra={"provider": {"organization": "Example", "url": "https://example.com"}}))

    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return [shuffled(one) for one in value] if isinstance(value, list) else value
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    wanted = cards.digest(cards.parse_card(told))
    assert len(wanted) == 64
    assert {cards.digest(cards.parse_card(shuffled(told))) for _ in range(10)} == {wanted}


def test_the_digest_is_that_of_the_core_whatever_the_card_is_published_under() -> None:
    core = build()
    assert cards.digest(cards.published(core, [cards.mesh_interface("echo")])) == cards.digest(core)
    assert cards.digest(build(description="changed")) != cards.digest(core)


# Versions ------------------------------------------------------------------------------------------

ASCENDING = [
    "0.1",
    "0.1.1",
    "0.9.0",
    "0.10.0",
    "1.0.0-alpha",
    "1.0.0-alpha.1",
    "1.0.0-beta.2",
    "1.0.0-beta.11",
    "1.0rc1",
    "1.0rc10",
    "1.0",
    "1.0.1",
    "v2.0",
    "2026.11.21",
    "2026.12.1",
]


def test_versions_have_the_order_of_semantic_versioning() -> None:
    for i, one in enumerate(ASCENDING):
        for j, other in enumerate(ASCENDING):
            assert cards.compare_versions(one, other) == (i > j) - (i < j), (one, other)


@pytest.mark.parametrize(("one", "other"), [("1", "1.0.0"), ("1.0+build1", "1.0+build2"), ("v1.2", "1.2.0")])
def test_versions_that_mean_the_same_are_equal(one: str, other: str) -> None:
    assert cards.compare_versions(one, other) == 0


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_two_versions_can_be_compared(one: str, other: str) -> None:
    assert cards.compare_versions(one, other) == -cards.compare_versions(other, one)
    assert cards.compare_versions(one, one) == 0


# Searching -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, True),
        ({"name": "echo"}, True),
        ({"name": "ec*"}, True),
        ({"name": "Echo"}, False),
        ({"skill": "say"}, True),
        ({"skill": "s?y"}, True),
        ({"skill": "shout"}, False),
        ({"tag": "talk"}, True),
        ({"tag": "quiet"}, True),
        ({"skill": "say", "tag": "talk"}, True),
        ({"skill": "say", "tag": "quiet"}, False),
        ({"name": "other", "skill": "say"}, False),
    ],
    ids=str,
)
def test_agents_are_found_by_name_skill_and_tag(wanted: dict[str, str], found: bool) -> None:
    skills = [SKILL, {"id": "whisper", "tags": ["quiet"]}]
    assert cards.matches("echo", skills, **wanted) is found


@pytest.mark.parametrize(
    ("modes", "media_type", "taken"),
    [
        ([], "image/png", True),
        (["text/plain"], "text/plain; charset=utf-8", True),
        (["text/plain"], "", True),
        (["text/plain"], "image/png", False),
        (["image/*"], "IMAGE/png", True),
        (["image/*"], "imagery/png", False),
        (["*/*"], "x/y", True),
    ],
)
def test_a_media_type_is_taken_where_the_modes_cover_it(modes: list[str], media_type: str, taken: bool) -> None:
    assert cards.takes(pb.AgentCard(default_input_modes=modes), media_type) is taken


def test_the_modes_of_any_skill_count() -> None:
    card = pb.AgentCard(default_input_modes=["text/plain"], skills=[pb.AgentSkill(input_modes=["image/png"])])
    assert cards.takes(card, "image/png")
    assert not cards.takes(card, "image/jpeg")


def test_an_agent_that_names_no_modes_takes_everything() -> None:
    assert cards.takes(build(), "application/pdf")
