"""`mesh init` writes a project that works."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_a_new_project_passes_its_own_test(project: Any) -> None:
    result = project.mesh("init", "shop")
    assert "next: cd shop && mesh up" in result.err
    made = project.folder / "shop"
    environment = {**project.environment, "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=made,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert run.returncode == 0, run.stdout
    assert "2 passed" in run.stdout
    written = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    assert written == [
        ".gitignore",
        "README.md",
        "agents/hello.py",
        "mesh.yaml",
        "pyproject.toml",
        "tests/test_hello.py",
    ]


def test_a_new_project_passes_the_checks_of_this_one(tmp_path: Path, project: Any) -> None:
    project.mesh("init")
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", str(project.folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named ruff" in run.stderr:
        pytest.skip("ruff is not installed")
    assert run.returncode == 0, run.stdout


def test_a_new_project_is_named_after_its_folder(tmp_path: Path, project: Any) -> None:
    project.mesh("init", "my shop (2)")
    assert (project.folder / "my shop (2)" / "mesh.yaml").read_text().startswith("name: my-shop-2\n")


def test_nothing_is_overwritten_and_nothing_half_written(project: Any) -> None:
    mine = project.folder / "README.md"
    mine.write_text("mine")
    result = project.mesh("init", code=2)
    assert "README.md exists already" in result.err
    assert mine.read_text() == "mine"
    assert [path.name for path in project.folder.iterdir()] == ["README.md"]


def test_its_mesh_yaml_is_valid_and_shows_every_section(project: Any) -> None:
    from weft.core.config import load_mesh_config

    project.mesh("init")
    config = load_mesh_config(project.folder / "mesh.yaml")
    assert config.agents["hello"].replicas == 2
    assert config.broker.durability == "laptop"
    assert config.callers == ("local",)
