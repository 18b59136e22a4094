"""What leaves code, and how tools are written in it."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.sidecar.code.names import described, meant, written
from weft.sidecar.code.values import TooMuch, as_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_json_is_as_it_was(value: Any) -> None:
    assert as_json(value, 10**6, "it") == value


def test_what_json_has_in_another_form() -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    assert as_json((moment, {1}, {None: 1, 2.5: 2, True: 3}), 100, "it") == [
        "2026-01-02T03:04:00+00:00", [1], {"None": 1, "2.5": 2, "True": 3},
    ]  # fmt: skip
    assert as_json("a\ud800", 100, "it") == "a?"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"x", object(), 1 << 5000, {(1,): 2}])
def test_what_json_has_not(value: Any) -> None:
    with pytest.raises(ValueError, match="the thing has"):
        as_json([value], 1000, "the thing")


def test_size_is_counted_before_everything_is_gone_through() -> None:
    shared: Any = [1]
    for _ in range(60):
        shared = [shared, shared]  # 2 ** 60 in all
    with pytest.raises(TooMuch):
        as_json(shared, 10_000, "it")
    with pytest.raises(TooMuch, match="it has 12 bytes"):
        as_json("é" * 5, 11, "it")
    assert as_json("é" * 5, 12, "it") == "é" * 5


def test_names() -> None:
    assert [written(one) for one in ("crm", "get-it", "a.b/c", "import", "1st", "_x", "", "é")] == [
        "crm", "get_it", "a_b_c", "import_", "", "", "", "",
    ]  # fmt: skip
    assert meant("a_b", ["a-b", "a_b"]) == "a_b"
    assert meant("a_b", ["a-b", "a.b"]) == ""
    assert meant("a_b", ["a-b", "c"]) == "a-b"
    assert meant("x", ["a-b"]) == ""


def test_a_description_has_what_a_call_needs() -> None:
    schema = {
        "properties": {"note": {"type": ["string", "null"]}, "id": {"type": "integer"}, "any": {}},
        "required": ["id"],
    }
    text = "Changes\n  it. " + "x" * 500
    tools: list[dict[str, Any]] = [
        {"name": "update", "description": text, "inputSchema": schema, "outputSchema": {"type": "object"}},
        {"name": "1st", "inputSchema": True},
    ]  # fmt: skip
    first, text, second = described("my-crm", tools).splitlines()
    assert first == "tools.my_crm.update(id: int, note: str | None = …, any: object = …) -> dict"
    assert text.startswith("    Changes it. x")
    assert len(text) == 304
    assert second == 'call("my-crm.1st", {})'
