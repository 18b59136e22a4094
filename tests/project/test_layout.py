"""Rules of the source tree that no linter checks."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AREAS = ("protocols", "mesh", "coordinator", "agents")
SOURCES = sorted(path for area in AREAS for path in (ROOT / area).rglob("*.py"))
MAX_MODULE_LINES = 800
MAX_FUNCTION_LINES = 80

pytestmark = pytest.mark.skipif(not (ROOT / "mesh").is_dir(), reason="needs the source tree")


def test_no_area_is_itself_a_package() -> None:
    # An `agents/__init__.py` in the root would shadow the package that openai-agents installs.
    folders = [ROOT / area / inner for area in AREAS for inner in (".", "src")]
    assert [folder for folder in folders if (folder / "__init__.py").exists()] == []


def test_no_test_folder_is_a_package() -> None:
    assert sorted((ROOT / "tests").rglob("__init__.py")) == []


def test_every_source_folder_is_a_package() -> None:
    # Import rules and type checks do not see a folder without an `__init__.py`.
    folders = {path.parent for path in SOURCES if "src" in path.relative_to(ROOT).parts[1:2]}
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").exists()) == []


def test_modules_stay_within_their_length() -> None:
    lengths = {path.relative_to(ROOT): _line_count(path) for path in SOURCES}
    too_long = {str(path): lines for path, lines in lengths.items() if lines > MAX_MODULE_LINES}
    assert too_long == {}


def test_functions_stay_within_their_length() -> None:
    too_long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": lines
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := _last_line(node) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert too_long == {}


def test_every_package_is_typed() -> None:
    packages = [init.parent for area in AREAS for init in (ROOT / area / "src").glob("*/__init__.py")]
    assert [package.name for package in packages if not (package / "py.typed").exists()] == []


def test_constraints_pin_every_package_by_hash() -> None:
    entries = re.split(r"\n(?=\S)", _constraints().strip())
    assert len(entries) > 20
    unpinned = [entry for entry in entries if not re.match(r"[a-z0-9.-]+==\S+[^\n]*\\\n +--hash=sha256:", entry)]
    assert unpinned == []


def test_constraints_name_no_address() -> None:
    # Whoever installs chooses the registry; the file must not choose for them.
    addresses = [line for line in _constraints().splitlines() if re.search(r"[/@]|--(?!hash=)|\.(org|com|io)\b", line)]
    assert addresses == []


def test_constraints_are_the_only_lock() -> None:
    assert [name for name in ("uv.lock", "poetry.lock", "Pipfile.lock", "pdm.lock") if (ROOT / name).exists()] == []


def _constraints() -> str:
    return (ROOT / "constraints.txt").read_text(encoding="utf-8")


def _line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _last_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno
