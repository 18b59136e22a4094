"""A policy as it is kept, its tests, and how two of them differ."""

import json
import zlib
from typing import Any

import pytest

from weft.policy import cases, compare
from weft.policy.active import NONE_LOADED, ActivePolicy
from weft.policy.bundle import Bundle, belongs, compile_bundle, running
from weft.policy.catalog import Catalog
from weft.policy.compare import Recorded
from weft.policy.engine import CedarEngine
from weft.policy.model import Request
from weft.policy.problems import InvalidPolicy
from weft.policy.redaction import Redactor
from weft_protocols.errors import InvalidConfig

SMALL = """@id("small") @limit("10/m") @approval("ops")
permit(principal == Agent::"bob", action == Action::"call", resource == Tool::"crm.update")
when { context.args.amount.lessThan(decimal("100.0")) };
"""
LARGE = SMALL.replace("100.0", "1000.0")


def call(amount: float, **more: Any) -> Request:
    return Request("bob", "call", "crm", "update", {"id": "a", "amount": amount, "note": "private"}, **more)


def engine(text: str, catalog: Catalog, version: int = 1) -> CedarEngine:
    return compile_bundle(Bundle.of({"a.cedar": text}), catalog).engine(catalog, version=version)


def test_a_bundle_survives_being_stored_and_has_a_digest_of_its_files() -> None:
    made = Bundle.of({"b/x.cedar": SMALL, "a.test.yaml": "- x", "groups.yaml": "g: [a]"})
    again = Bundle.decode(made.encode())
    assert again == made
    assert (again.digest, len(again.digest)) == (made.digest, 64)
    assert Bundle.of({**made.files, "b/x.cedar": LARGE}).digest != made.digest
    assert (list(made.rules), list(made.tests)) == (["b/x.cedar"], ["a.test.yaml"])


@pytest.mark.parametrize("data", [b"", b"x", zlib.compress(b"[1]"), zlib.compress(b'{"../x.cedar": ""}')])
def test_what_is_no_bundle_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidConfig):
        Bundle.decode(data)


def test_files_of_a_bundle_are_told_by_their_names() -> None:
    assert [belongs(one) for one in ("x.cedar", "a/b.test.yaml", "groups.yaml", "a/groups.yaml", "tools.json")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_a_bundle_with_mistakes_decides_nothing(catalog: Catalog) -> None:
    with pytest.raises(InvalidPolicy, match=r"a\.cedar:1: found an invalid variable") as raised:
        engine("permit(principal, actoin, resource);", catalog)
    assert raised.value.exit_code == 3


def test_a_stored_policy_decides_although_a_tool_it_names_is_gone() -> None:
    bundle = Bundle.of({"a.cedar": SMALL + 'permit(principal == Agent::"eve", action, resource);'})
    made = running(bundle, Catalog(), version=3)
    assert "definition is not known" in made.decide(call(5)).why
    assert made.decide(Request("eve", "call", "crm", "update")).allow


TESTS = """
- name: small amounts
  request: {agent: bob, tool: crm.update, arguments: {id: a, amount: 5}, time: 2026-01-05T10:00:00Z}
  expect: allow
  by: [small]
  obligations: {approval: ops, limit: 10/m}
- request: {agent: bob, tool: crm.update, arguments: {id: a, amount: 500}}
  expect: deny
- request: {agent: bob, prompt: crm.brief, arguments: {topic: x}}
  expect: deny
- request: {agent: bob, resource: "crm://1", server: crm}
  expect: deny
- request: {agent: bob, list: crm}
  expect: allow
"""


def test_tests_of_a_policy_pass_where_it_decides_as_they_say(catalog: Catalog) -> None:
    found, problems = cases.read({"a.test.yaml": TESTS})
    assert not problems
    outcomes = cases.run(engine(SMALL, catalog), found)
    assert [one.failures for one in outcomes] == [()] * 5
    assert (found[0].line, found[1].name) == (2, "bob call crm.update")


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (("amount: 5}", "amount: 500}"), "expected allow, but nothing permits it"),
        (("by: [small]", "by: [other]"), "expected by other, but it is by small"),
        (("approval: ops", "approval: legal"), "expected approvals: "),
        (("limit: 10/m", "redact: pii"), "expected limits: null"),
    ],
)
def test_a_test_fails_with_what_was_decided_instead(catalog: Catalog, change: tuple[str, str], failure: str) -> None:
    found, _ = cases.read({"a.test.yaml": TESTS.replace(*change, 1)})
    outcomes = cases.run(engine(SMALL, catalog), found)
    assert failure in " ".join(outcomes[0].failures)
    assert all(one.passed for one in outcomes[1:])


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: b", 1, "must be a list of tests"),
        ("- [", 1, "is not YAML: expected the node content"),
        ("- x\n- request: {agent: a}", 1, "a test is a mapping"),
        ("- request: {agent: a, tool: s.x}\n  expect: maybe", 1, "expect must be allow or deny"),
        ("- request: {agent: a, tol: s.x}\n  expect: deny", 1, "there is no field 'tol'; did you mean \"tool\"?"),
        ("- request: {agent: a, tool: x}\n  expect: deny", 1, "tool 'x' must be server.name"),
        ("- request: {agent: a}\n  expect: deny", 1, "say one of tool, prompt, resource (with server) or list"),
        ("- request: {tool: s.x}\n  expect: deny", 1, "agent and server must be given"),
        ("- request: {agent: a, tool: s.x, time: soon}\n  expect: deny", 1, "time 'soon' is none"),
        ("- request: {agent: a, tool: s.x}\n  expect: allow\n  obligations: {lmit: 1/m}", 1, "@lmit is no annotation"),
    ],
)
def test_a_test_that_cannot_be_read_is_said_with_its_line(text: str, line: int, said: str) -> None:
    _, problems = cases.read({"a.test.yaml": text})
    assert problems[0].line == line
    assert said in problems[0].message


def test_differences_are_by_rule(catalog: Catalog) -> None:
    old = compile_bundle(Bundle.of({"a.cedar": SMALL + '@id("gone") permit(principal, action, resource);'}), None)
    new = compile_bundle(Bundle.of({"b.cedar": LARGE, "groups.yaml": "g: [bob]"}), None)
    found = {one.rule: one for one in compare.changes(old, new)}
    assert {name: one.kind for name, one in found.items()} == {
        "gone": "removed",
        "groups.yaml": "added",
        "small": "changed",
    }
    assert [line for line in found["small"].lines if line[0] in "+-"] == [
        '-when { context.args.amount.lessThan(decimal("100.0")) };',
        '+when { context.args.amount.lessThan(decimal("1000.0")) };',
    ]
    assert not compare.changes(old, old)


def recorded(made: CedarEngine, request: Request, **more: Any) -> Recorded:
    kept = {**compare.record(request, made.decide(request)), **more}
    return Recorded.decode(json.loads(json.dumps({"kind": "call", "policy": kept})))


def test_recorded_decisions_show_what_a_candidate_would_flip(catalog: Catalog) -> None:
    made = engine(SMALL, catalog)
    records = [recorded(made, call(amount)) for amount in (5, 50, 500)]
    tighter = engine(SMALL.replace("100.0", "10.0"), catalog)
    result = compare.replay(tighter, tighter.needs, records)
    flips = [(one.kind, one.recorded.request.arguments["amount"]) for one in result.flips]
    assert (result.same, result.redacted, flips) == (2, 0, [("allow>deny", 50)])
    wider = engine(LARGE, catalog)
    assert [one.kind for one in compare.replay(wider, wider.needs, records).flips] == ["deny>allow"]
    other = engine(SMALL.replace('"ops"', '"legal"'), catalog)
    assert [one.kind for one in compare.replay(other, other.needs, records).flips] == ["obligations"] * 2
    renamed = engine(SMALL.replace('"small"', '"renamed"'), catalog)
    assert compare.replay(renamed, renamed.needs, records).same == 3


def test_a_record_whose_arguments_are_redacted_is_not_decided_anew(catalog: Catalog) -> None:
    made = engine(SMALL.replace("when", 'when { context.args.id != "x" } when'), catalog)
    secret = Request("bob", "call", "crm", "update", {"id": "password=hunter2", "amount": 5, "note": "n" * 5000})
    kept = compare.record(secret, made.decide(secret), redact=Redactor().value)
    assert kept["request"]["arguments"] == {
        "id": "password=[redacted:password]",
        "amount": 5,
        "note": "n" * 200 + "[redacted:4800 characters]",
    }
    assert compare.replay(made, made.needs, [Recorded.decode(kept)]).redacted == 1
    other = engine(SMALL, catalog)  # reads the amount alone
    assert compare.replay(other, other.needs, [Recorded.decode(kept)]).same == 1


def test_a_candidate_may_read_what_the_active_policy_did_not(catalog: Catalog) -> None:
    made = engine(SMALL, catalog)
    other = engine(SMALL + "forbid(principal, action, resource) when { context.args has note };", catalog)
    assert [one.kind for one in compare.replay(other, other.needs, [recorded(made, call(5))]).flips] == ["allow>deny"]


@pytest.mark.parametrize(
    "raw", [{}, [], {"decision": "maybe"}, {"decision": "allow"}, {"decision": "deny", "request": {"agent": "a"}}]
)
def test_what_holds_no_decision_is_no_record(raw: Any) -> None:
    with pytest.raises(ValueError, match=r"decision|request|must be given"):
        Recorded.decode(raw)


def test_without_a_policy_nothing_is_allowed(catalog: Catalog) -> None:
    policy = ActivePolicy()
    assert (policy.decide(call(5)).allow, policy.decide(call(5)).why) == (False, NONE_LOADED)
    policy.use(None, failure="version 3 cannot be used")
    assert "version 3 cannot be used" in policy.decide(call(5)).why
    assert not policy.visible(call(5))


def test_a_candidate_only_watches_and_its_differences_are_counted(catalog: Catalog) -> None:
    policy = ActivePolicy()
    policy.use(engine(SMALL, catalog, 1), engine(SMALL.replace("100.0", "10.0"), catalog, 2))
    decisions = [policy.decide(call(amount, task="t")) for amount in (5, 50, 500)]
    assert [one.allow for one in decisions] == [True, True, False]
    assert [one.shadow is not None for one in decisions] == [False, True, False]
    assert decisions[1].encode()["shadow"]["version"] == 2
    seen = policy.differences.encode()
    assert (seen["version"], seen["decided"], seen["counts"]) == (2, 3, {"allow>deny": 1})
    assert seen["examples"][0]["resource"] == "crm.update"
    assert "private" not in json.dumps(seen)
    policy.use(policy.active, engine(LARGE, catalog, 3))
    assert policy.differences.encode()["decided"] == 0
