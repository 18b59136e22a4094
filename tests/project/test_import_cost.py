"""`import weft` and `mesh --help` stay cheap: what is heavy loads when it is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("nats", "a2a", "mcp", "pydantic", "google.protobuf", "opentelemetry")
HELP_CPU_SECONDS = 0.150
MESH = Path(sys.executable).parent / "mesh"


def test_importing_weft_loads_no_heavy_package() -> None:
    assert _heavy_imports("-c", "import weft") == []


def test_listing_the_public_names_loads_no_heavy_package() -> None:
    assert _heavy_imports("-c", "import weft; weft.__all__; dir(weft); weft.__version__") == []


@pytest.mark.parametrize("arguments", [("--help",), ("--version",)], ids=" ".join)
def test_the_command_loads_no_heavy_package(arguments: tuple[str, ...]) -> None:
    assert _heavy_imports("-m", "weft.cli.main", *arguments) == []


@pytest.mark.skipif(sys.platform == "win32", reason="reads the child's CPU time with wait4")
def test_help_stays_within_its_cpu_time() -> None:
    # The best run counts: the others measure the neighbours.
    best = min(_cpu_seconds([str(MESH), "--help"]) for _ in range(7))
    assert best < HELP_CPU_SECONDS, f"mesh --help took {best * 1000:.0f} ms of CPU"


def _heavy_imports(*arguments: str) -> list[str]:
    """Runs Python with these arguments; returns the heavy modules it imported."""
    run = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=False)
    trace = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    talk = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert run.returncode == 0, "\n".join(talk)
    modules = [line.rpartition("|")[2].strip() for line in trace]
    assert any(module == "weft" or module.startswith("weft.") for module in modules)
    return [module for module in modules if _is_heavy(module)]


def _is_heavy(module: str) -> bool:
    return any(module == heavy or module.startswith(f"{heavy}.") for heavy in HEAVY)


def _cpu_seconds(command: list[str]) -> float:
    """User and system time of one run of a command."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{command} exited with {process.returncode}"
    return usage.ru_utime + usage.ru_stime
