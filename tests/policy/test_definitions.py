"""Whatever a server says its tools are, the schema made of them is one, and rules about other tools stay right."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.policy.bundle import Bundle, compile_bundle
from weft.policy.catalog import Catalog
from weft.policy.model import Request

names = st.text(max_size=12) | st.sampled_from(
    ["a", "in", "if", "has", "__entity", "principal", "a.b", 'q"uote', "é\n"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
schemas: Any = st.recursive(
    st.sampled_from(
        [
            {},
            True,
            {"type": "string"},
            {"type": "integer"},
            {"type": "number"},
            {"type": ["string", "null"]},
            {"type": "bogus"},
        ]
    )
    | st.fixed_dictionaries({"$ref": st.text(max_size=5)})
    | st.fixed_dictionaries({"enum": st.lists(scalars, max_size=3)})
    | scalars,
    lambda inner: (
        st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(names, inner, max_size=3)})
        | st.fixed_dictionaries({"type": st.just("array"), "items": inner})
        | st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=3)})
        | st.fixed_dictionaries({"type": st.just("object"), "properties": inner, "required": inner})
    ),
    max_leaves=8,
)
values: Any = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)


@settings(max_examples=150, deadline=None)
@given(name=names, own=schemas, arguments=st.dictionaries(names, values, max_size=4))
def test_no_definition_breaks_the_check_or_a_decision(name: str, own: Any, arguments: dict[str, Any]) -> None:
    tools = [{"name": "good", "inputSchema": {"type": "object", "properties": {"x": {"type": "integer"}}}}]
    tools.append({"name": name, "inputSchema": own})
    known = Catalog.read({"s": tools})
    head = 'permit(principal, action == Action::"call", resource == Tool::"s.good")'
    text = f"{head} when {{ context.args has x && context.args.x > 1 }};"
    compiled = compile_bundle(Bundle.of({"a.cedar": text}), known)
    assert not compiled.errors
    engine = compiled.engine(known)
    assert engine.decide(Request("a", "call", "s", "good", {"x": 2})).allow
    assert not engine.decide(Request("a", "call", "s", name or "x", arguments)).allow or name == "good"
    everything = compile_bundle(
        Bundle.of({"a.cedar": "permit(principal, action, resource) when { context == context };"}), None
    )
    decision = everything.engine(known).decide(Request("a", "call", "s", name or "x", arguments))
    assert decision.allow or decision.errors


@pytest.mark.parametrize("literal", [r"\u{7}\n\t\\\"", "é漢", r"a\*b*c", "'; permit(principal, action, resource); //"])
def test_texts_in_rules_survive_the_check(literal: str) -> None:
    known = Catalog.read(
        {
            "s": [
                {
                    "name": "t",
                    "inputSchema": {"type": "object", "required": ["x"], "properties": {"x": {"type": "string"}}},
                }
            ]
        }
    )
    head = 'permit(principal, action == Action::"call", resource == Tool::"s.t")'
    text = f'{head} when {{ context.args.x like "{literal}" }};'
    assert not compile_bundle(Bundle.of({"a.cedar": text}), known).problems


def test_a_tool_with_an_odd_name_is_named_in_messages() -> None:
    known = Catalog.read(
        {"s": [{"name": 'q"é', "inputSchema": {"type": "object", "properties": {"xyz": {"type": "string"}}}}]}
    )
    compiled = compile_bundle(
        Bundle.of({"a.cedar": 'permit(principal, action, resource is Tool) when { context.args.xy == "" };'}), known
    )
    assert "xyz" in compiled.problems[0].message


def test_of_two_tools_with_one_name_the_first_counts() -> None:
    kinds = [
        {"name": "t", "inputSchema": {"type": "object", "properties": {"x": {"type": kind}}}}
        for kind in ("string", "integer")
    ]
    assert Catalog.read({"s": kinds}).tools["s.t"].arguments.fields["x"][0].cedar == "String"


def test_an_argument_that_may_be_null_may_be_missing() -> None:
    own = {"type": "object", "required": ["x"], "properties": {"x": {"type": ["string", "null"]}}}
    known = Catalog.read({"s": [{"name": "t", "inputSchema": own}]})
    rule = 'permit(principal, action == Action::"call", resource == Tool::"s.t") when { context.args.x == "a" };'
    (problem,) = compile_bundle(Bundle.of({"a.cedar": rule}), known).problems
    assert 'argument "x" of s.t may be missing' in problem.message
