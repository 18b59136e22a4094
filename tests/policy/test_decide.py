"""What rules decide: default deny, forbid before permit, and nothing that cannot be evaluated is allowed."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.policy import cedar, rules
from weft.policy.arguments import of_schema
from weft.policy.catalog import Catalog
from weft.policy.engine import CedarEngine
from weft.policy.model import Limit, Request

Engine = Callable[..., CedarEngine]
MONDAY_NINE = 1_767_603_600.0  # 2026-01-05T09:00:00Z


def call(agent: str = "bob", tool: str = "crm.update", **more: Any) -> Request:
    server, _, name = tool.partition(".")
    arguments = more.pop("arguments", {"id": "a", "amount": 5})
    return Request(agent, "call", server, name, arguments, time=MONDAY_NINE, **more)


def test_nothing_is_allowed_that_no_rule_permits(engine: Engine) -> None:
    made = engine('permit(principal == Agent::"bob", action == Action::"call", resource in Server::"crm");')
    assert made.decide(call()).allow
    for other in (
        call("eve"),
        call(tool="mail.send"),
        Request("bob", "get", "crm", "brief"),
        Request("bob", "read", "crm", "u"),
    ):
        decision = made.decide(other)
        assert (decision.allow, decision.reasons, decision.why) == (False, (), "nothing permits it")


def test_a_forbid_wins_and_says_its_reason(engine: Engine) -> None:
    made = engine(
        """permit(principal, action, resource);
        @id("no") @reason("not on Mondays") forbid(principal, action, resource) when { context.weekday == 1 };"""
    )
    decision = made.decide(call())
    assert (decision.allow, decision.reasons, decision.why, decision.version) == (False, ("no",), "not on Mondays", 7)


@pytest.mark.parametrize(
    ("condition", "request_", "allowed"),
    [
        ('principal.version like "1.*"', call(version="1.4"), True),
        ('principal.version like "1.*"', call(version="2.0"), False),
        ('principal.skill == "pay"', call(skill="pay"), True),
        ('context.task == "t1"', call(task="t1"), True),
        ('context.caller == "alice"', call(caller="alice"), True),
        ('context.chain.contains("root")', call(chain=("root/t0", "mid/t1")), True),
        ('context.root == "root" && context.depth == 2', call(chain=("root/t0", "mid/t1")), True),
        ('context.root == "bob" && context.depth == 0', call(), True),
        ("context.hour == 9 && context.weekday == 1", call(), True),
        ('context.time > datetime("2026-01-05T08:59:59Z")', call(), True),
        ('context.time.toTime() < duration("9h")', call(), False),
        ('context.front == "http"', call(front="http"), True),
        ('context.args.amount.lessThan(decimal("5.0001"))', call(), True),
        ('context.args.amount == decimal("0.3")', call(arguments={"id": "a", "amount": 0.1 + 0.2}), True),
        (
            "context.args has count && context.args.count > 3",
            call(arguments={"id": "a", "amount": 1, "count": 4}),
            True,
        ),
        ("context.args has count && context.args.count > 3", call(), False),
        (
            'context.args has tags && context.args.tags.contains("x")',
            call(arguments={"id": "a", "amount": 1, "tags": ["x"]}),
            True,
        ),
        (
            'context.args has who && context.args.who.name == "z"',
            call(arguments={"id": "", "amount": 1, "who": {"name": "z"}}),
            True,
        ),
        ("context.args has note", call(arguments={"id": "a", "amount": 1, "note": None}), False),
        (
            'context.args has extra && context.args.extra like "*\\"a\\":1*"',
            call(arguments={"id": "", "amount": 1, "extra": {"a": 1}}),
            True,
        ),
        ("!resource.read_only && resource.destructive", call(), True),
        ('resource.name == "update" && resource.server == "crm"', call(), True),
    ],
)
def test_rules_read_the_request(engine: Engine, condition: str, request_: Request, allowed: bool) -> None:
    made = engine(
        f'permit(principal, action == Action::"call", resource == Tool::"crm.update") when {{ {condition} }};'
    )
    decision = made.decide(request_)
    assert (decision.allow, decision.errors) == (allowed, ())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"id": "a", "amount": "5"}, "argument amount is no number"),
        ({"id": "a", "amount": True}, "argument amount is no number"),
        ({"id": "a", "amount": float("nan")}, "argument amount is no number"),
        ({"id": "a", "amount": 1e30}, "argument amount is larger than rules can compare (922337203685477.5807)"),
        ({"id": "a", "amount": 1, "count": 2**63}, "argument count is no whole number of 64 bits"),
        ({"id": "a", "amount": 1, "tags": ["a", 1]}, "argument tags[1] is no text"),
        ({"id": "\ud800", "amount": 1}, "argument id is not Unicode"),
        ({"amount": 1}, "while evaluating policy `no`"),
        ({"id": {"__entity": {"type": "Agent", "id": "root"}}, "amount": 1}, "argument id is no text"),
    ],
)
def test_what_cannot_be_evaluated_is_denied(engine: Engine, arguments: dict[str, Any], error: str) -> None:
    made = engine(
        """permit(principal, action, resource);
        @id("no") forbid(principal, action == Action::"call", resource == Tool::"crm.update")
        when { context.args.id == "x" || context.args.amount.greaterThan(decimal("7.0")) ||
               (context.args has count && context.args.count > 3) ||
               (context.args has tags && context.args.tags.isEmpty()) };"""
    )
    decision = made.decide(call(arguments=arguments))
    assert not decision.allow
    assert error in decision.why


def test_an_argument_that_no_rule_reads_decides_nothing(engine: Engine) -> None:
    made = engine(
        'permit(principal, action == Action::"call", resource == Tool::"crm.update") when { context.args.id == "a" };'
    )
    assert made.decide(call(arguments={"id": "a", "amount": "no number", "other": object()})).allow


def test_a_tool_without_a_definition_is_denied_where_rules_read_its_arguments(engine: Engine) -> None:
    made = engine(
        'forbid(principal, action, resource) when { context.args has id && context.args.id == "x" }; '
        "permit(principal, action, resource);"
    )
    assert made.decide(call(tool="crm.get", arguments={"id": "y"})).allow
    decision = made.decide(call(tool="crm.new", arguments={"id": "y"}))
    assert "whose definition is not known" in decision.why


def test_groups_hold_agents(engine: Engine) -> None:
    made = engine(
        'permit(principal in Group::"finance", action, resource);', groups="finance: [bob, carol]\nother: eve"
    )
    assert [made.decide(call(agent)).allow for agent in ("bob", "carol", "eve")] == [True, True, False]


def test_prompts_and_resources_have_their_own_actions(engine: Engine) -> None:
    made = engine(
        """permit(principal, action == Action::"get", resource == Prompt::"crm.brief")
        when { context.args.topic != "x" };
        permit(principal, action == Action::"read", resource in Server::"crm")
        when { resource.uri like "crm://open/*" };"""
    )
    assert made.decide(Request("bob", "get", "crm", "brief", {"topic": "y"})).allow
    assert not made.decide(Request("bob", "get", "crm", "brief", {"topic": "x"})).allow
    assert made.decide(Request("bob", "read", "crm", "crm://open/1")).allow
    assert not made.decide(Request("bob", "read", "crm", "crm://secret/1")).allow
    assert not made.decide(Request("bob", "read", "mail", "crm://open/1")).allow


def test_a_listing_shows_what_may_be_called_with_some_arguments(engine: Engine) -> None:
    made = engine(
        """permit(principal == Agent::"bob", action == Action::"call", resource in Server::"crm")
        when { principal.version like "1.*" && context.hour > 22 };
        forbid(principal, action, resource == Tool::"crm.get");
        forbid(principal, action, resource == Tool::"crm.update") when { context.args.id == "x" };
        forbid(principal == Agent::"eve", action == Action::"list", resource == Server::"crm");"""
    )
    assert made.visible(call(version="1.0"))
    assert not made.visible(call(version="2.0"))
    assert not made.visible(call(version="1.0", tool="crm.get"))
    assert not made.visible(call("eve", version="1.0"))
    assert made.visible(Request("bob", "list", "crm"))
    assert not made.visible(Request("eve", "list", "crm"))
    assert made.decide(Request("eve", "list", "mail")).allow


def test_what_rules_oblige_to_is_the_strictest_of_all_that_permit(engine: Engine) -> None:
    made = engine(
        """@id("a") @approval("ops") @limit("10/m") @cost("usd:0.02") @redact("pii") @sandbox("rlimits")
        permit(principal, action == Action::"call", resource in Server::"crm");
        @id("b") @approval("ops,legal") @approval_count("2") @limit("5/10s burst 2 per agent") @cost("usd:0.01,calls:1")
        @redact("secrets") @sandbox("sandlock") @lock("crm/{id}") @side_effects
        permit(principal, action == Action::"call", resource == Tool::"crm.update");
        @id("c") @approval("nobody") permit(principal == Agent::"eve", action, resource);"""
    )
    decision = made.decide(call())
    assert decision.reasons == ("a", "b")
    assert decision.obligations.encode() == {
        "approvals": ({"role": "legal", "count": 2}, {"role": "ops", "count": 2}),
        "limits": (
            {"policy": "a", "calls": 10, "seconds": 60.0, "burst": 10, "per": "pair"},
            {"policy": "b", "calls": 5, "seconds": 10.0, "burst": 2, "per": "agent"},
        ),
        "cost": {"usd": 0.02, "calls": 1.0},
        "redact": ("pii", "secrets"),
        "sandbox": "sandlock",
        "locks": ("crm/a",),
        "side_effects": True,
    }
    assert not made.decide(call(tool="crm.get")).obligations.locks


def test_a_lock_whose_name_cannot_be_made_denies(engine: Engine) -> None:
    made = engine('@lock("crm/{id}") permit(principal, action == Action::"call", resource == Tool::"crm.update");')
    assert "needs argument 'id'" in made.decide(call(arguments={"amount": 1, "id": ["a"]})).why


def test_limits_count_what_belongs_together() -> None:
    keys = {
        per: {
            Limit("r", 1, 1.0, 1, per).key(call(agent, tool)) for agent, tool in itertools.product("ab", ("s.x", "s.y"))
        }
        for per in ("pair", "agent", "tool", "server", "rule")
    }
    assert {per: len(found) for per, found in keys.items()} == {
        "pair": 4,
        "agent": 2,
        "tool": 2,
        "server": 1,
        "rule": 1,
    }


def test_rules_in_shadow_mode_change_nothing_and_are_told(engine: Engine) -> None:
    made = engine(
        'permit(principal, action, resource); @id("soon") @shadow forbid(principal == Agent::"bob", action, resource);'
    )
    decision = made.decide(call())
    assert decision.allow
    assert decision.shadow is not None
    assert (decision.shadow.allow, decision.shadow.reasons) == (False, ("soon",))
    assert made.decide(call("eve")).shadow is None


def test_a_rule_that_permits_nothing_is_no_reason(engine: Engine) -> None:
    assert engine("@shadow permit(principal, action, resource);").decide(call()).allow is False


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "string"}, "String"),
        ({"enum": ["a", "b"]}, "String"),
        ({"const": True}, "Bool"),
        ({"type": ["integer", "null"]}, "Long"),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, "decimal"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "Long"),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "String"),
        ({"type": "array", "items": {"type": "boolean"}}, "Set<Bool>"),
        ({"type": "array"}, "Set<String>"),
        ({"type": "array", "items": {"type": ["string", "null"]}}, "Set<String>"),
        ({"type": "object"}, "String"),
        ({"type": "object", "properties": {"x-y": {"type": "integer"}}}, '{"x-y"?: Long}'),
        ({"$ref": "#/$defs/n"}, "decimal"),
        ({"$ref": "#/$defs/loop"}, '{"next"?: {"next"?: {"next"?: String}}}'),
        ({"$ref": "https://example.org/schema"}, "String"),
        ({"$ref": "#/nowhere"}, "String"),
        ({"allOf": [{"type": "integer"}]}, "Long"),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "String"),
        (True, "String"),
        ({}, "String"),
    ],
)
def test_types_of_arguments_are_mapped_as_documented(schema: Any, kind: str) -> None:
    loop = {"type": "object", "properties": {"next": {"$ref": "#/$defs/loop"}}}
    root = {"type": "object", "properties": {"x": schema}, "$defs": {"n": {"type": "number"}, "loop": loop}}
    assert of_schema(root).fields["x"][0].cedar == kind


def test_names_that_cedar_reserves_are_no_arguments() -> None:
    made = of_schema({"type": "object", "properties": {"__extn": {"type": "string"}, "ok": {"type": "string"}}})
    assert set(made.fields) == {"ok"}


SCOPES = [
    *(
        f"principal{who}"
        for who in ("", ' == Agent::"a"', ' == Agent::"b"', ' in Group::"g"', " is Agent", ' is Agent in Group::"g"')
    ),
]
ACTIONS = [
    "action",
    'action == Action::"call"',
    'action in [Action::"call", Action::"get"]',
    'action == Action::"read"',
]
RESOURCES = [
    "resource",
    'resource == Tool::"s.x"',
    'resource in Server::"s"',
    "resource is Tool",
    'resource is Tool in Server::"t"',
]
CONDITIONS = [
    "",
    "when { context.hour > 11 }",
    'unless { principal.version == "1" }',
    "when { context.depth == 1 }",
    "when { resource.read_only }",
]
rule_texts = st.builds(
    lambda effect, who, what, which, condition: f"{effect}({who}, {what}, {which}) {condition};",
    st.sampled_from(["permit", "forbid"]),
    st.sampled_from(SCOPES),
    st.sampled_from(ACTIONS),
    st.sampled_from(RESOURCES),
    st.sampled_from(CONDITIONS),
)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(rule_texts, max_size=8),
    agent=st.sampled_from(["a", "b", "c"]),
    tool=st.sampled_from(["s.x", "s.y", "t.x"]),
    hour=st.integers(0, 23),
)
def test_leaving_out_rules_whose_heads_do_not_fit_changes_no_decision(
    texts: list[str], agent: str, tool: str, hour: int
) -> None:
    """The engine evaluates a part of the rules; Cedar with all of them, and its own reading of heads, is the oracle."""
    parsed, problems = rules.parse({"r.cedar": "\n".join(texts)})
    assert not problems
    known = Catalog.read({"s": [{"name": "x"}, {"name": "y"}], "t": [{"name": "x"}]})
    made = CedarEngine(parsed, known, groups={"g": ["b"]})
    server, _, name = tool.partition(".")
    decision = made.decide(Request(agent, "call", server, name, time=hour * 3600.0, version="1"))
    attributes = {"version": "1", "skill": ""}
    entities: list[dict[str, Any]] = [
        {
            "uid": {"type": "Agent", "id": agent},
            "attrs": attributes,
            "parents": [{"type": "Group", "id": "g"}] if agent == "b" else [],
        },
        {
            "uid": {"type": "Tool", "id": tool},
            "attrs": {
                "server": server,
                "name": name,
                "read_only": False,
                "destructive": True,
                "idempotent": False,
                "open_world": True,
            },
            "parents": [{"type": "Server", "id": server}],
        },
    ]
    asked = {
        "principal": {"type": "Agent", "id": agent},
        "action": {"type": "Action", "id": "call"},
        "resource": {"type": "Tool", "id": tool},
        "context": f'{{"hour": {hour}, "depth": 0}}',
    }
    whole = cedar.evaluate(
        asked, cedar.policy_set({rule.id: dict(rule.json) for rule in parsed}), cedar.entity_set(entities)
    )
    assert (decision.allow, decision.reasons) == (whole.allow, whole.reasons)
