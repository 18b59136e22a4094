"""The manifest of what A2A asks for: every named test is there, and every MUST has one or says why not."""

from __future__ import annotations

import ast
import functools
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFEST = Path(__file__).with_name("requirements.yaml")
KIT = 129
"""Requirements of the conformance kit that the manifest was made from."""


class _Unique(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"{node.start_mark}: a key is there twice"
        return super().construct_mapping(node, deep)


def _manifest() -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = yaml.load(MANIFEST.read_text(), Loader=_Unique)
    return made


REQUIREMENTS = _manifest()


@functools.cache
def _tests_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_a_requirement_says_what_it_is_and_what_holds_it(name: str) -> None:
    one = REQUIREMENTS[name]
    assert set(one) <= {"clause", "level", "kit", "text", "tests", "gap", "note"}
    assert one["level"] in ("MUST", "SHOULD", "MAY")
    assert one["clause"]
    assert one["text"]
    assert bool(one.get("tests")) != bool(one.get("gap")), "it has tests, or a gap that says why there are none"
    assert len(str(one.get("gap", "a reason of some length"))) > 20


@pytest.mark.parametrize("name", [name for name in REQUIREMENTS if REQUIREMENTS[name].get("tests")])
def test_the_tests_a_requirement_names_are_there(name: str) -> None:
    for test in REQUIREMENTS[name]["tests"]:
        path, _, function = test.partition("::")
        assert (ROOT / path).is_file(), test
        assert function.startswith("test_")
        assert function in _tests_in(ROOT / path), test


def test_every_requirement_of_the_kit_is_listed() -> None:
    assert sum(one["kit"] for one in REQUIREMENTS.values()) == KIT


def test_the_gaps_are_few_and_known() -> None:
    gaps = {name for name, one in REQUIREMENTS.items() if one["level"] == "MUST" and one.get("gap")}
    assert gaps == {"AUTH-TLS-001", "GRPC-SVC-003"}
