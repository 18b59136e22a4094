"""Pages for readers: links lead somewhere, commands and names exist, every decision has its parts."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import click
import pytest

import weft
from weft.cli.main import SECTIONS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "protocols").rglob("*.md")])
DECISIONS = sorted((ROOT / "docs" / "adr").glob("0*.md"))
COMMANDS = {name: module for section in SECTIONS.values() for name, (module, _) in section.items()}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchor(heading: str) -> str:
    """A heading's anchor, as forges make it."""
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"`|\[|\]\([^)]*\)", "", heading).lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            broken.append(target)
        elif fragment:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            if fragment not in {anchor(heading) for heading in headings}:
                broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_exists_with_its_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`(mesh [^`]+)`", text)
    for line in lines:
        if not line.startswith("mesh "):
            continue
        words = line.partition("#")[0].split()
        assert words[1] in COMMANDS, line
        if importlib.util.find_spec(COMMANDS[words[1]]) is None:
            continue
        command = importlib.import_module(COMMANDS[words[1]]).command
        if isinstance(command, click.Group) and len(words) > 2 and words[2] in command.commands:
            command = command.commands[words[2]]
        if "--" in words:
            words = words[: words.index("--")]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words[2:] if word.startswith("-")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_in_pages_compiles_and_uses_names_that_exist(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "weft":
                assert {alias.name for alias in node.names} <= set(weft.__all__)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "weft":
                assert node.attr in weft.__all__


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_and_test_that_is_named_exists(page: Path) -> None:
    for named in re.findall(
        r"`((?:tests|protocols|mesh|bench)/[^`\s:]+)(?:::(\w+))?`", page.read_text(encoding="utf-8")
    ):
        path, test = ROOT / named[0], named[1]
        assert path.exists(), named
        assert not test or re.search(rf"def {test}\b", path.read_text(encoding="utf-8")), named


@pytest.mark.parametrize("page", DECISIONS, ids=name)
def test_every_decision_has_its_parts_and_is_listed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parts = re.findall(r"^\*\*(\w+)\.\*\*", text, flags=re.MULTILINE)
    assert parts == ["Context", "Decision", "Consequences", "Evidence"]
    assert text.startswith(f"# {int(page.name[:4])}. ")
    assert f"]({page.name})" in (page.parent / "README.md").read_text(encoding="utf-8")


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))
