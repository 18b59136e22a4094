"""Accounts: by its imports no account can speak as another, and by the exports none could import it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft_protocols import accounts, mcp, subjects
from weft_protocols.accounts import Export, Import
from weft_protocols.resources import (
    BLOBS,
    PUSH,
    PUSH_CONSUMER,
    STREAM,
    TOOL_CHANGES,
    TOOL_PINS,
    TOOL_SERVERS,
    TOOLS,
)
from weft_protocols.subjects import GRAMMAR, Kind

AGENTS = ("analyst", "analyst-2", "b")
CALLERS = ("local", "web")
TASK = "0" * 32
TOKENS = {"agent": "x", "caller": "y", "writer": "z", "slice": "07", "task": TASK, "sha256": "a" * 64, "n": "0"}
LITERAL_WILDCARDS = ("*", ">")
"""The broker takes them in a published subject as if they were ordinary tokens."""


@dataclass(frozen=True)
class Account:
    name: str
    agent: bool

    @property
    def imports(self) -> tuple[Import, ...]:
        return accounts.imports(self.name, agent=self.agent)

    def may_publish(self, subject: str) -> bool:
        """Whether a message on this subject reaches MESH."""
        return any(subjects.matches(i.subject, subject) for i in self.imports if not i.stream)

    def may_hear(self, subject: str) -> bool:
        """Whether a message of MESH on this subject reaches the account."""
        return any(subjects.matches(i.subject, subject) for i in self.imports if i.stream)


ACCOUNTS = [Account(name, True) for name in AGENTS] + [Account(name, False) for name in CALLERS]
ACCOUNT = st.sampled_from(ACCOUNTS)
WRITTEN = [kind for kind in GRAMMAR.values() if kind.writer is not None]


def subject_of(kind: Kind, **tokens: str) -> str:
    return ".".join(("mesh", kind.name, *({**TOKENS, **tokens}.get(token, "t") for token in kind.tokens)))


def covers(wide: str, narrow: str) -> bool:
    """Whether every subject of pattern `narrow` falls under `wide`; `*` of the narrow one stands for anything."""
    want, have = wide.split("."), narrow.split(".")
    for i, token in enumerate(want):
        if token == ">":
            return len(have) > i
        if i >= len(have) or have[i] == ">" or (token != "*" and token != have[i]):
            return False
    return len(want) == len(have)


def admits(account: str, wanted: Import) -> bool:
    """The broker's check of an import: the export of exactly that subject, else any that covers it."""
    exports = [e for e in accounts.exports(AGENTS) if e.stream == wanted.stream]
    exact = [e for e in exports if e.subject == wanted.subject]
    return any(
        _allows(e, account, wanted.subject) for e in exact or [e for e in exports if covers(e.subject, wanted.subject)]
    )


def _allows(export: Export, account: str, subject: str) -> bool:
    if export.account is not None:
        return export.account == account
    if export.account_position is not None:
        return subject.split(".")[export.account_position - 1] == account
    return True


@given(ACCOUNT, st.sampled_from(ACCOUNTS), st.sampled_from(WRITTEN), st.data())
def test_no_account_can_publish_as_another(me: Account, other: Account, kind: Kind, data: st.DataObject) -> None:
    names = [a.name for a in ACCOUNTS] + list(LITERAL_WILDCARDS)
    tokens = {t: data.draw(st.sampled_from([*names, TOKENS.get(t, "t")])) for t in kind.tokens if t != kind.writer}
    assert kind.writer is not None
    as_other = subject_of(kind, **tokens, **{kind.writer: other.name})
    if other.name != me.name:
        assert not me.may_publish(as_other)


@given(ACCOUNT, st.sampled_from(WRITTEN))
def test_a_literal_wildcard_does_not_stand_for_every_writer(me: Account, kind: Kind) -> None:
    assert kind.writer is not None
    for token in LITERAL_WILDCARDS:
        assert not me.may_publish(subject_of(kind, **{kind.writer: token}))


@pytest.mark.parametrize("me", ACCOUNTS, ids=lambda a: a.name)
def test_every_account_can_do_what_a_caller_does(me: Account) -> None:
    for kind in ("task", "input", "rpc", "coord", "blob"):
        writer = GRAMMAR[kind].writer
        assert writer is not None
        assert me.may_publish(subject_of(GRAMMAR[kind], **{writer: me.name}))
    assert me.may_hear(subject_of(GRAMMAR["live"], caller=me.name))
    assert me.may_publish(f"{accounts.DIRECT_GET}.{STREAM}.{subject_of(GRAMMAR['event'], caller=me.name)}")


@pytest.mark.parametrize("me", ACCOUNTS, ids=lambda a: a.name)
def test_only_agents_write_claims_events_and_steps_and_only_their_own(me: Account) -> None:
    for kind in ("claim", "event", "step"):
        assert me.may_publish(subject_of(GRAMMAR[kind], agent=me.name)) == me.agent


@given(ACCOUNT, ACCOUNT)
def test_nobody_reads_the_task_of_two_others(me: Account, other: Account) -> None:
    mine_or_not = other.name == me.name
    for kind, token in (("claim", "agent"), ("step", "agent"), ("event", "caller")):
        get = f"{accounts.DIRECT_GET}.{STREAM}.{subject_of(GRAMMAR[kind], **{token: other.name})}"
        if not mine_or_not:
            assert not me.may_publish(get)
    assert me.may_hear(subject_of(GRAMMAR["live"], caller=other.name)) == mine_or_not
    assert me.may_hear(subject_of(GRAMMAR["ctl"], agent=other.name)) == (mine_or_not and me.agent)


@given(ACCOUNT, st.sampled_from(AGENTS), st.sampled_from(subjects.LANES))
def test_only_an_agent_pulls_and_acknowledges_its_own_work(me: Account, agent: str, lane: str) -> None:
    consumer = subjects.consumer(agent, lane)
    for subject in (f"{accounts.NEXT}.{STREAM}.{consumer}", f"{accounts.ACK}.{STREAM}.{consumer}.1.2.3.4.5"):
        assert me.may_publish(subject) == (me.agent and me.name == agent)


@pytest.mark.parametrize("me", ACCOUNTS, ids=lambda a: a.name)
def test_nobody_reaches_the_rest_of_jetstream(me: Account) -> None:
    for operation in ("STREAM.PURGE", "STREAM.DELETE", "STREAM.MSG.GET", "STREAM.INFO", "CONSUMER.CREATE"):
        assert not me.may_publish(f"$JS.API.{operation}.{STREAM}")
        assert not me.may_publish(f"$JS.API.{operation}.{STREAM}.{me.name}.mesh.task.>")
    assert not me.may_publish(f"{accounts.DIRECT_GET}.{STREAM}")
    assert not me.may_publish(f"{accounts.DIRECT_GET}.{BLOBS}")
    assert not me.may_publish(subject_of(GRAMMAR["live"], caller=me.name))
    assert not me.may_publish(subject_of(GRAMMAR["ctl"], agent=me.name))


@given(ACCOUNT, ACCOUNT)
def test_nobody_reaches_the_credentials_of_push_configs(me: Account, other: Account) -> None:
    for kind in ("push", "pushed"):
        subject = subject_of(GRAMMAR[kind], caller=other.name)
        assert not me.may_publish(subject)
        assert not me.may_hear(subject)
        assert not me.may_publish(f"{accounts.DIRECT_GET}.{PUSH}.{subject}")
    assert not me.may_publish(f"{accounts.NEXT}.{PUSH}.{PUSH_CONSUMER}")
    assert not me.may_publish(f"{accounts.ACK}.{PUSH}.{PUSH_CONSUMER}.1.2.3.4.5")
    exported = [export.subject for export in accounts.exports(AGENTS)]
    assert not [subject for subject in exported if PUSH in subject or ".push" in subject]


@given(ACCOUNT)
def test_the_exports_admit_every_import(me: Account) -> None:
    refused = [wanted.subject for wanted in me.imports if not admits(me.name, wanted)]
    assert refused == []


@given(ACCOUNT, ACCOUNT)
def test_the_exports_admit_nobody_elses_imports(me: Account, thief: Account) -> None:
    public = f"{accounts.DIRECT_GET}.{BLOBS}.{GRAMMAR['blob'].wildcard}"
    stolen = [w.subject for w in me.imports if admits(thief.name, w) and w.subject != public]
    assert not stolen or thief.name == me.name


@pytest.mark.parametrize("export", accounts.exports(AGENTS), ids=lambda e: e.subject)
def test_every_export_but_the_blobs_names_who_may_import_it(export: Export) -> None:
    if export.subject.startswith(f"{accounts.DIRECT_GET}.{BLOBS}."):
        assert export.account is None
        assert export.account_position is None
        return
    assert (export.account is None) != (export.account_position is None)
    if export.account_position is not None:
        assert export.subject.split(".")[export.account_position - 1] == "*"


def test_only_pulls_and_tool_requests_have_many_replies() -> None:
    many = {e.subject for e in accounts.exports(AGENTS) if e.many_replies}
    pulls = {f"{accounts.NEXT}.{STREAM}.{subjects.consumer(a, lane)}" for a in AGENTS for lane in subjects.LANES}
    assert many == {*pulls, mcp.REQUEST_EXPORT}


@given(ACCOUNT, ACCOUNT, st.sampled_from(["files", "_"]), st.sampled_from(["default", "other", *LITERAL_WILDCARDS]))
def test_everybody_asks_for_tools_in_their_own_name_only(me: Account, other: Account, server: str, tenant: str) -> None:
    for caller in (other.name, *LITERAL_WILDCARDS):
        request = mcp.request_subject(caller, server, method="tools/call", name="read", tenant=tenant)
        control = mcp.control_subject(caller, "r1", tenant=tenant)
        assert me.may_publish(request) == me.may_publish(control) == (caller == me.name)
        assert not me.may_hear(request)
        assert not me.may_hear(control)


@given(ACCOUNT)
def test_nobody_reaches_what_is_registered_and_approved(me: Account) -> None:
    for subject in (f"{TOOL_SERVERS}.files", f"{TOOL_PINS}.files", f"{TOOL_CHANGES}.files"):
        assert not me.may_publish(subject)
        assert not me.may_hear(subject)
        assert not me.may_publish(f"{accounts.DIRECT_GET}.{TOOLS}.{subject}")


def test_an_account_that_shares_a_prefix_with_another_is_another() -> None:
    longer = Account("analyst-2", True)
    assert not longer.may_publish(subjects.claim("analyst", TASK))
    assert not admits("analyst-2", Import(f"{accounts.NEXT}.{STREAM}.{subjects.consumer('analyst', 'work')}"))
