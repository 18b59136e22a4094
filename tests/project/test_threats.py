"""The table of threats: every test it names exists, and both lists are there as they are published."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "threats.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))
TITLES = (
    "ASI01: Agent Goal Hijack",
    "ASI02: Tool Misuse and Exploitation",
    "ASI03: Identity and Privilege Abuse",
    "ASI04: Agentic Supply Chain Vulnerabilities",
    "ASI05: Unexpected Code Execution",
    "ASI06: Memory and Context Poisoning",
    "ASI07: Insecure Inter-Agent Communication",
    "ASI08: Cascading Failures",
    "ASI09: Human-Agent Trust Exploitation",
    "ASI10: Rogue Agents",
    "MCP01: Token Mismanagement & Secret Exposure",
    "MCP02: Privilege Escalation via Scope Creep",
    "MCP03: Tool Poisoning",
    "MCP04: Software Supply Chain Attacks & Dependency Tampering",
    "MCP05: Command Injection & Execution",
    "MCP06: Prompt Injection via Contextual Payloads",
    "MCP07: Insufficient Authentication & Authorization",
    "MCP08: Lack of Audit and Telemetry",
    "MCP09: Shadow MCP Servers",
    "MCP10: Context Injection & Over-Sharing",
)


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(one.name for one in tree.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))


def test_both_lists_are_told_in_their_order() -> None:
    assert tuple(re.findall(r"^### (.+)$", TEXT, re.MULTILINE)) == TITLES


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{Path(file).stem}-{name}" for file, name in NAMED])
def test_every_test_that_is_named_exists(file: str, name: str) -> None:
    assert name in functions_of(file)


def test_every_row_has_a_test_or_says_why_it_has_none() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| threat ")]
    without = [row for row in rows if "::" not in row]
    assert len(rows) > 50
    assert not [
        row for row in without if not re.search(r"out of scope|the operator's|see tests/sidecar/test_\w+\.py", row)
    ]


def test_every_test_of_hostility_is_in_the_table() -> None:
    for file in sorted((ROOT / "tests" / "hostile").glob("test_*.py")):
        own = f"tests/hostile/{file.name}"
        named = {name for one, name in NAMED if one == own}
        assert named, own
