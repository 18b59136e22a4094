"""Tests that belong to a policy: a request, and what has to be decided about it. Pure.

::

    - name: a billing agent may change small amounts
      request: {agent: billing, tool: crm.update, arguments: {id: a, amount: 5}, time: 2026-01-05T10:00:00Z}
      expect: allow
      by: [small-amounts]
      obligations: {approval: ops, limit: 10/m}

`tool`, `prompt`, `resource` (with `server`) or `list` says what is done. `by` and `obligations` are checked where they
are given; obligations are written as in annotations, and have to be exactly these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import yaml

from weft.policy import obligations
from weft.policy.model import Decision, Obligations, PolicyEngine, Request
from weft.policy.problems import Problem, not_yaml, suggestion

FIELDS: Final = ("name", "request", "expect", "by", "obligations")
_REQUEST: Final = (
    "agent", "tool", "prompt", "resource", "server", "list", "arguments", "version", "skill", "task", "caller", "chain",
    "time", "front",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One test."""

    file: str
    line: int
    name: str
    request: Request
    allow: bool
    by: tuple[str, ...] | None = None
    obligations: Obligations | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a test came out."""

    case: Case
    decision: Decision
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether it is as expected."""
        return not self.failures


def read(files: Mapping[str, str]) -> tuple[list[Case], list[Problem]]:
    """The tests of some files, and what is wrong with them."""
    cases: list[Case] = []
    problems: list[Problem] = []
    for file, text in sorted(files.items()):
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            problems.append(not_yaml(file, error))
            continue
        if root is None:
            continue
        if not isinstance(root, yaml.SequenceNode):
            problems.append(Problem(file, 1, "must be a list of tests: `- request: …`"))
            continue
        for node in root.value:
            line = node.start_mark.line + 1
            try:
                cases.append(_case(file, line, yaml.SafeLoader("").construct_document(node)))
            except (ValueError, TypeError) as error:
                problems.append(Problem(file, line, str(error)))
    return cases, problems


def run(engine: PolicyEngine, cases: Iterable[Case]) -> list[Outcome]:
    """Decide about every test's request."""
    return [_outcome(case, engine.decide(case.request)) for case in cases]


def _outcome(case: Case, decision: Decision) -> Outcome:
    failures = []
    if decision.allow != case.allow:
        failures.append(f"expected {'allow' if case.allow else 'deny'}, but {decision.why}")
    elif case.by is not None and set(case.by) != set(decision.reasons):
        failures.append(f"expected by {_list(case.by)}, but it is by {_list(decision.reasons)}")
    elif case.obligations is not None and (wrong := _different(case.obligations, decision.obligations)):
        failures += wrong
    return Outcome(case, decision, tuple(failures))


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "no rule"


def _different(wanted: Obligations, found: Obligations) -> list[str]:
    # The rule that owns a limit is not part of the test's notation.
    anonymous = replace(found, limits=tuple(replace(one, policy="") for one in found.limits))
    first, second = wanted.encode(), anonymous.encode()
    return [
        f"expected {key}: {json.dumps(first.get(key))}, but it is {json.dumps(second.get(key))}"
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key)
    ]


def _case(file: str, line: int, raw: Any) -> Case:
    if not isinstance(raw, Mapping):
        raise ValueError("a test is a mapping with `request` and `expect`")
    _known(raw, FIELDS, "")
    expect = raw.get("expect")
    if expect not in ("allow", "deny"):
        raise ValueError("expect must be allow or deny")
    asked = raw.get("request")
    if not isinstance(asked, Mapping):
        raise ValueError("request must be a mapping, e.g. {agent: billing, tool: crm.update}")
    request = request_of(asked)
    by = raw.get("by")
    if isinstance(by, str):
        by = [by]
    if by is not None and (not isinstance(by, list) or not all(isinstance(one, str) for one in by)):
        raise ValueError("by must be a list of ids of rules")
    name = str(raw.get("name") or f"{request.agent} {request.action} {request.resource}")
    owed = raw.get("obligations")
    return Case(
        file,
        line,
        name,
        request,
        expect == "allow",
        tuple(by) if by is not None else None,
        _owed(owed, "obligations" in raw),
    )


def _owed(raw: Any, given: bool) -> Obligations | None:
    if not given:
        return None
    if raw is not None and not isinstance(raw, Mapping):
        raise ValueError("obligations must be a mapping of annotations, e.g. {approval: ops}")
    notes, wrong = obligations.read("", "permit", {str(key): _annotation(value) for key, value in (raw or {}).items()})
    if wrong:
        raise ValueError(f"obligations: {'; '.join(what for _, what in wrong)}")
    return notes.obligations


def _annotation(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(one) for one in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}:{amount}" for key, amount in value.items())
    return "true" if value is True else str(value)


def request_of(raw: Mapping[str, Any]) -> Request:
    """A request as people write it. Raises ValueError saying what is wrong."""
    _known(raw, _REQUEST, "request: ")
    named = [key for key in ("tool", "prompt", "resource", "list") if key in raw]
    if len(named) != 1:
        raise ValueError("request: say one of tool, prompt, resource (with server) or list")
    action = {"tool": "call", "prompt": "get", "resource": "read", "list": "list"}[named[0]]
    what = str(raw[named[0]])
    server, name = str(raw.get("server", "")), ""
    if action in ("call", "get"):
        server, dot, name = what.partition(".")
        if not dot or not name:
            raise ValueError(f"request: {named[0]} {what!r} must be server.name")
    elif action == "read":
        name = what
        if not server:
            raise ValueError("request: a resource needs its server")
    else:
        server = what
    known = {
        key: raw[key]
        for key in ("agent", "arguments", "version", "skill", "task", "caller", "chain", "front")
        if key in raw
    }
    return Request.decode({**known, "action": action, "server": server, "name": name, "time": _time(raw.get("time"))})


def _time(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            raise ValueError(f"request: time {value!r} is none; write e.g. 2026-01-31T12:00:00Z") from None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("request: time must be unix seconds or RFC 3339")
    return float(value)


def _known(raw: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    for key in raw:
        if key not in names:
            raise ValueError(f"{where}there is no field {key!r}{suggestion(str(key), names)}")
