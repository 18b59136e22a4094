"""What is wrong with a policy is said when it is loaded: where, what, and what was probably meant."""

from collections.abc import Callable, Sequence

import pytest

from weft.policy.bundle import Bundle, compile_bundle
from weft.policy.catalog import Catalog
from weft.policy.source import chunks

Mistakes = Callable[..., Sequence[str]]
ON_UPDATE = 'permit(principal, action == Action::"call", resource == Tool::"crm.update")\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'permit(principal,\n  action == Action::"call",\n  resource == Tool::"crm.updat");',
            '3: there is no tool "crm.updat"; did you mean "crm.update"?',
        ),
        (
            'permit(principal, action,\n  resource in Server::"crn");',
            '2: there is no server "crn"; did you mean "crm"?',
        ),
        (
            'permit(principal, action == Action::"cal", resource);',
            '1: there is no action "cal"; did you mean "call"?',
        ),
        (
            'permit(principal in Group::"finance", action, resource);',
            '1: there is no group "finance"',
        ),
        (
            'permit(principal == User::"bob", action, resource);',
            "1: User:: is no type of entity; there are: Action, Agent, Group, Prompt, Resource, Server, Tool",
        ),
        (
            ON_UPDATE + 'when {\n  context.args.amout.lessThan(decimal("1.0"))\n};',
            '3: there is no argument "amout" of crm.update; did you mean "amount"?',
        ),
        (
            ON_UPDATE + "when {\n  context.args has amout\n};",
            '3: there is no argument "amout" of crm.update; did you mean "amount"?',
        ),
        (
            ON_UPDATE + "when {\n  context.args.count > 3\n};",
            '3: argument "count" of crm.update may be missing; write `context.args has count && …` first',
        ),
        (
            ON_UPDATE + 'when {\n  context.args has who && context.args.who.nam == "x"\n};',
            '3: there is no argument "nam" of crm.update (in who); did you mean "name"?',
        ),
        (
            ON_UPDATE + "when { context.args.amount > 3 };",
            "1: unexpected type: expected Long but saw decimal",
        ),
        (
            ON_UPDATE + "when {\n  context.our > 3\n};",
            '3: there is no context.our; did you mean "hour"?',
        ),
        (
            'permit(principal, action == Action::"call", resource in Server::"crm")\n'
            'when { context.args.amount.lessThan(decimal("1.0")) };',
            '2: there is no argument "amount" of crm.get; there are: id; a rule about several tools asks first: '
            "`context.args has …`",
        ),
        (
            'permit(principal, action == Action::"get", resource == Prompt::"crm.brief")\n'
            'when { context.args.topi == "x" };',
            '2: there is no argument "topi" of crm.brief; did you mean "topic"?',
        ),
        ("permit(principal, actoin, resource);", "1: found an invalid variable in the policy scope: actoin"),
        ("permit(principal, action, resource)\nwhen { context lke 3 };", "2: unexpected token `lke`"),
        ("permit(principal, action, resource);\npermit(principal, action", "2: unexpected end of input"),
        (
            "permit(principal == ?principal, action, resource);",
            "1: a template (?principal, ?resource) is no rule; name who and what",
        ),
        (
            '@id("one") permit(principal, action, resource);\n@id("one") forbid(principal, action, resource);',
            '2: there is a rule "one" already, at rules.cedar:1',
        ),
        (
            '@aproval("ops")\n' + ON_UPDATE + ";",
            '1: @aproval is no annotation; did you mean "approval"? (own ones begin with x_)',
        ),
        (
            '@limit("10/q")\n' + ON_UPDATE + ";",
            "1: @limit: '10/q' must be like 10/m, 100/h burst 20 or 5/10s per agent",
        ),
        ('@limit("0/m")\n' + ON_UPDATE + ";", "1: @limit: '0/m' would allow nothing; a forbid says that"),
        ('@limit("1/40d")\n' + ON_UPDATE + ";", "1: @limit: '1/40d' counts over more than 30 days"),
        ('@cost("0.02")\n' + ON_UPDATE + ";", "1: @cost: '0.02' must be a unit and an amount, e.g. usd:0.02"),
        (
            '@redact("pij")\n' + ON_UPDATE + ";",
            "1: @redact: 'pij' is none of secrets, pii, presidio; did you mean \"pii\"?",
        ),
        (
            '@sandbox("sandlok")\n' + ON_UPDATE + ";",
            "1: @sandbox: 'sandlok' is none of none, rlimits, bubblewrap, sandlock; did you mean \"sandlock\"?",
        ),
        (
            '@lock("crm/{ide}")\n' + ON_UPDATE + ";",
            '1: @lock("crm/{ide}"): there is no argument "ide" of crm.update; did you mean "id"?',
        ),
        ('@approval_count("2")\n' + ON_UPDATE + ";", "1: @approval_count without @approval: of which role?"),
        (
            '@approval("ops")\nforbid(principal, action, resource);',
            "1: @approval says what a permitted call obliges to; a forbid permits none",
        ),
    ],
)
def test_a_mistake_is_said_with_its_line_and_what_to_do(mistakes: Mistakes, text: str, said: str) -> None:
    assert mistakes(text) == [said]


def test_right_rules_have_no_mistakes(mistakes: Mistakes) -> None:
    assert not mistakes(
        """
        // A comment; with a semicolon, and a "quote.
        @id("small") @approval("ops, security") @approval_count("2") @limit("10/m, 100/h burst 5 per agent")
        @cost("usd:0.02") @redact("pii, secrets") @sandbox("sandlock") @lock("crm/{id}") @side_effects @x_owner("me")
        permit(principal == Agent::"bob", action == Action::"call", resource == Tool::"crm.update")
        when { context.args.amount.lessThan(decimal("100.0")) && context.hour >= 8 && principal.version like "1.*" }
        unless { context.args has tags && context.args.tags.contains("a;b") };
        @reason("not; those") @shadow
        forbid(principal, action, resource) when { context.chain.contains("mallory") && context.depth > 3 };
        permit(principal, action == Action::"call", resource) when { resource.read_only };
        permit(principal, action == Action::"read", resource in Server::"crm") when { resource.uri like "crm://*" };
        permit(principal, action in [Action::"call", Action::"get"], resource in Server::"mail");
        permit(principal, action, resource) when { context.args has id && context.args.id == "x" };
        permit(principal, action, resource is Prompt) when { context.args.topic == "x" };
        permit(principal, action, resource is Tool in Server::"mail") when { context.args.to == "x" };
        """
    )


def test_every_mistake_of_all_files_is_said_in_their_order(catalog: Catalog) -> None:
    bad = "permit(principal, actoin, resource);"
    compiled = compile_bundle(
        Bundle.of({"b.cedar": bad, "a/c.cedar": f"\n{bad}\n\n{bad}", "groups.yaml": "x: [a b]"}), catalog
    )
    assert [(one.file, one.line) for one in compiled.problems] == [
        ("a/c.cedar", 2),
        ("a/c.cedar", 4),
        ("b.cedar", 1),
        ("groups.yaml", 0),
    ]


def test_a_tool_that_is_not_registered_yet_can_be_only_a_warning(mistakes: Mistakes) -> None:
    text = 'permit(principal, action, resource == Tool::"later.tool") when { context.args.x == 1 };'
    assert mistakes(text, lenient=True) == [
        '1: warning: there is no tool "later.tool"; there are: crm.get, crm.update, mail.send'
    ]
    assert mistakes(text) != mistakes(text, lenient=True)


def test_an_agent_the_mesh_does_not_have_is_a_warning(mistakes: Mistakes) -> None:
    text = 'permit(principal == Agent::"bbo", action, resource);'
    assert mistakes(text, agents=frozenset({"bob"})) == ['1: warning: there is no agent "bbo"; did you mean "bob"?']
    assert not mistakes(text)


def test_rules_are_told_apart_whatever_their_texts_hold() -> None:
    text = '// a ; b "\n@reason("x; // y\n z") permit(principal, action, resource)\n;'
    text += "  forbid(principal, action, resource);\n// end ;\n"
    assert [(one.line, one.text[:6]) for one in chunks("f", text)] == [(2, "@reaso"), (4, "forbid")]


def test_a_policy_without_rules_is_warned_about(catalog: Catalog) -> None:
    compiled = compile_bundle(Bundle.of({"a.cedar": "// nothing"}), catalog)
    assert [one.warning for one in compiled.problems] == [True]
