"""What the specification says in tables and samples is what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from weft_protocols import a2a, ids, mcp, resources, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2A_ERRORS, JETSTREAM_CODES
from weft_protocols.states import END_LABELS, State

PROTOCOLS = Path(__file__).parents[2] / "protocols"
TEXT = (PROTOCOLS / "spec" / "a2a-over-nats.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Text of a heading up to the next one of its level or above."""
    start = re.search(rf"^(#+) {re.escape(title)}$", TEXT, flags=re.MULTILINE)
    assert start is not None, title
    end = re.search(rf"^#{{1,{len(start[1])}}} ", TEXT[start.end() :], flags=re.MULTILINE)
    return TEXT[start.end() : start.end() + end.start()] if end else TEXT[start.end() :]


def rows(text: str) -> list[list[str]]:
    """Cells of the table rows in a text, headings and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return cells


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_identifier_is_ours() -> None:
    assert code(rows(TEXT)[0][1]) == [a2a.BINDING]
    card = json.loads(re.findall(r"```json\n(.*?)```", section("2 Identifier and agent card"), flags=re.DOTALL)[0])
    assert (card["protocolBinding"], card["protocolVersion"]) == (a2a.BINDING, h.A2A_VERSION)
    assert f"`{a2a.SCHEMA_EXTENSION}`" in TEXT
    assert f'`metadata["{a2a.SKILL}"]`' in TEXT


def test_the_table_of_subjects_is_the_grammar() -> None:
    table = {row[0]: row for row in rows(section("3.2 Kinds"))[1:]}
    assert list(table) == list(subjects.GRAMMAR)
    for kind in subjects.GRAMMAR.values():
        _, subject, writer, *_ = table[kind.name]
        tokens = ".".join(f"{{{token}}}" for token in kind.tokens)
        assert code(subject) == [f"mesh.{kind.name}.{tokens}"]
        assert writer == (kind.writer or "none")


def test_the_reserved_names_are_ours() -> None:
    sentence = next(
        line for line in section("3.1 Grammar").replace("\n", " ").split(". ") if "MUST NOT be taken" in line
    )
    assert set(code(sentence)) == subjects.RESERVED_NAMES


def test_what_accounts_may_do_is_what_they_import() -> None:
    from weft_protocols import accounts

    said: dict[str, set[str]] = {"caller": set(), "agent": set()}
    for what, caller, agent in rows(section("3.3 Accounts"))[1:]:
        for who, cell in (("caller", caller), ("agent", agent)):
            for pattern in code(cell):
                if what.startswith("read"):
                    stream = resources.BLOBS if ".blob." in pattern else resources.STREAM
                    said[who].add(f"{accounts.DIRECT_GET}.{stream}.{pattern}")
                elif what.startswith("pull"):
                    prefix = f"{resources.STREAM}.{pattern}"
                    said[who] |= {f"{accounts.NEXT}.{prefix}", f"{accounts.ACK}.{prefix}.>"}
                else:
                    said[who].add(pattern)
    assert said["caller"] == {i.subject for i in accounts.imports("A", agent=False)}
    assert said["caller"] | said["agent"] == {i.subject for i in accounts.imports("A", agent=True)}


def test_every_header_of_ours_is_in_the_table() -> None:
    listed = {name for row in rows(section("5 Headers"))[1:] for name in code(row[0])}
    values = {v for k, v in vars(h).items() if k.isupper() and isinstance(v, str)}
    ours = {v for v in values if re.fullmatch(r"(A2A|Weft|Nats)-[A-Za-z-]+|Content-Type|Accept|trace[a-z]+", v)}
    assert ours - listed == set()
    used = set(re.findall(r"\b(?:A2A|Weft)-[A-Z][A-Za-z]*(?:-[A-Z][A-Za-z]*)*", TEXT))
    assert used - listed == set()
    assert f"**{h.MAX_BLOCK} bytes**" in TEXT


def test_the_table_of_task_ids_holds() -> None:
    table = rows(section("6.1 Task id"))[1:]
    assert len(table) == 3
    for caller, agent, message, task in table:
        assert ids.task_id(code(caller)[0], code(agent)[0], code(message)[0]) == code(task)[0]


def test_the_slices_that_are_named_hold() -> None:
    context, slice_ = code(section("6.3 Slice"))[1:3]
    assert ids.slice_of(context) == slice_
    assert ids.slice_of("") == "00"


def test_the_table_of_states_is_ours() -> None:
    table = rows(section("9 Events"))[1:]
    listed = {code(row[0])[0]: row for row in table if row[1]}
    assert listed.keys() == {f"TASK_STATE_{state.name}" for state in State} - {"TASK_STATE_UNSPECIFIED"}
    for name, (_, number, label, kind) in listed.items():
        state = State[name.removeprefix("TASK_STATE_")]
        assert (number, code(label)) == (str(int(state)), [state.label])
        assert kind == ("terminal" if state.terminal else "interrupted" if state.interrupted else "")
    terminal = {code(row[2])[0] for row in table if row[3].startswith("terminal")}
    assert terminal == END_LABELS


def test_the_table_of_errors_is_ours() -> None:
    listed = [(n, int(c), code(r)[0], int(web), g) for n, c, r, web, g in rows(section("14.2 Table"))[1:]]
    assert listed == [(s.name, s.code, s.reason, s.http, s.grpc) for s in A2A_ERRORS.values()]


def test_the_table_of_jetstream_codes_is_ours() -> None:
    listed = {
        int(number) for row in rows(section("Appendix B: JetStream error codes"))[1:] for number in row[0].split(",")
    }
    assert listed == JETSTREAM_CODES.keys()


def test_the_streams_are_ours() -> None:
    table = {row[0]: row[1:] for row in rows(section("Appendix A: Streams and consumers"))[1:]}
    made = {spec.name: spec.config() for spec in resources.streams()}
    tasks, blobs, push = (made[name] for name in (resources.STREAM, resources.BLOBS, resources.PUSH))
    assert [code(cell) for cell in table["subjects"]] == [one["subjects"] for one in (tasks, blobs, push)]
    assert code(table["republish"][0]) == [tasks["republish"]["src"], tasks["republish"]["dest"]]
    kept = next(cells for name, cells in table.items() if "max_msgs_per_subject" in name)
    assert [int(cell) for cell in kept] == [one["max_msgs_per_subject"] for one in (tasks, blobs, push)]
    age = next(cells for name, cells in table.items() if "max_age" in name)
    assert age[2] == f"{push['max_age'] // resources.SECOND // 86_400} days"
    for config in (tasks, blobs, push):
        assert (config["retention"], config["storage"], config["discard"]) == ("limits", "file", "new")
        assert config["allow_direct"]
        assert config["deny_delete"]
        assert not config["allow_rollup_hdrs"]
        off = next(key for key in table if "allow_rollup_hdrs" in key)
        assert not any(config.get(name) for name in code(off))


def test_consumers_are_named_and_filtered_as_said() -> None:
    made = {c.name: c.filter_subject for c in resources.consumers("agent", resources.DURABILITY["laptop"])}
    assert made == {"agent=work": "mesh.task.agent.>", "agent=input": "mesh.input.agent.>"}
    assert "`{agent}=work` on `mesh.task.{agent}.>`" in TEXT
    assert "`{agent}=input` on `mesh.input.{agent}.>`" in TEXT


def test_the_consumer_of_push_deliveries_is_as_said() -> None:
    made = resources.push_consumer()
    said = f"The consumer `{made.name}` on `{made.filter_subject}` has an `ack_wait` of {made.ack_wait:.0f} s"
    assert f"{said} and a `max_ack_pending` of {made.max_ack_pending:,}:" in TEXT


SAMPLES = re.findall(r"<!-- vector: (\w+) \"([^\"]+)\" (\w+) -->\n```(?:json)?\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize(("file", "name", "part", "sample"), SAMPLES, ids=[f"{s[1]}, {s[2]}" for s in SAMPLES])
def test_a_sample_is_the_vector_it_names(file: str, name: str, part: str, sample: str) -> None:
    vectors = json.loads((PROTOCOLS / "vectors" / f"{file}.json").read_text(encoding="utf-8"))
    case = next(c for c in vectors["cases"] if name in (c.get("name"), c.get("message")))
    assert (json.loads(sample) if part == "json" else "".join(sample.split())) == case[part]


def test_there_are_samples() -> None:
    assert len(SAMPLES) == len(re.findall("<!-- vector", TEXT)) >= 7


def test_every_vector_file_names_a_section_that_speaks_of_it() -> None:
    for path in sorted((PROTOCOLS / "vectors").glob("*.json")):
        number = json.loads(path.read_text(encoding="utf-8"))["spec"].removeprefix("section ")
        if number.startswith("mcp-over-nats.md"):
            continue  # of the other binding
        title = re.search(rf"^## ({number} .*)$", TEXT, flags=re.MULTILINE)
        assert title is not None, path.name
        assert f"(../vectors/{path.name})" in section(title[1]), path.name


# MCP over NATS -------------------------------------------------------------------------------------

MCP_TEXT = (PROTOCOLS / "spec" / "mcp-over-nats.md").read_text(encoding="utf-8")


def test_the_codes_of_the_tool_binding_are_those_of_the_code() -> None:
    told = re.findall(r"^\| (-\d+) \| (\w+) \| ([^|]+) \|$", MCP_TEXT, flags=re.MULTILINE)
    assert {int(code): (name, meaning.strip()) for code, name, meaning in told} == mcp.CODES


def test_the_tool_binding_names_what_the_code_has() -> None:
    for number, what in ((mcp.KEEP_ALIVE, "for 15 s"), (mcp.SILENCE, "for 50 s"), (mcp.LEASE, "100 s after")):
        assert f"{number:g} s" in what
        assert what in MCP_TEXT
    assert f"account_token_position: {mcp.CALLER_POSITION}" in MCP_TEXT
    for header in (mcp.METHOD_HEADER, mcp.NAME_HEADER, mcp.VERSION_HEADER, mcp.REQUEST_HEADER, mcp.CLAIM_HEADER):
        assert f"| `{header}` |" in MCP_TEXT
    for control in mcp.CONTROLS_KNOWN:
        assert f"| `{control}` |" in MCP_TEXT
    for frame in mcp.FRAMES:
        assert f"| `{frame}` |" in MCP_TEXT
