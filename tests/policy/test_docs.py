"""The examples of docs/policy.md hold."""

import re
from pathlib import Path

import pytest

from weft.policy import cases, obligations
from weft.policy.bundle import Bundle, compile_bundle
from weft.policy.catalog import Catalog
from weft.policy.patterns import CLASSES
from weft.policy.schema import CONTEXT, ENTITIES

PAGE = Path(__file__).parents[2] / "docs" / "policy.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the documentation")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_rules_and_their_tests_are_right(catalog: Catalog) -> None:
    groups, tests, *_ = blocks("yaml")
    made = compile_bundle(Bundle.of({"rules.cedar": blocks("cedar")[0], "groups.yaml": groups}), catalog)
    assert not made.problems
    found, wrong = cases.read({"a.test.yaml": tests})
    assert not wrong
    assert [one.failures for one in cases.run(made.engine(catalog), found)] == [(), ()]


def test_what_rules_can_say_is_all_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in (*CONTEXT, *obligations.READERS, *obligations.FREE, *CLASSES, *ENTITIES, *ENTITIES["Tool"]):
        assert re.search(rf"[`@.]{name}\b", text), name
