"""Run the public A2A conformance kit against a mesh: three bindings through the gateway, then NATS.

    python tests/tck/run.py KIT [--python KIT_PYTHON] [--only http|nats]

KIT is a checkout of the kit's branch `1.0-dev`, KIT_PYTHON an interpreter it is installed for (not this project's:
both bring generated code for the same messages). Ends with 1 if a test failed that `explained.yaml` does not
explain, or if an explained one passes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

HERE = Path(__file__).parent
SERVICE = HERE.parents[1] / "agents" / "services" / "conformance"
SUT = "http://127.0.0.1:9999"
MESH = (sys.executable, "-m", "weft.cli.main")
UP_WITHIN = 90
KIT_WITHIN = 900
HTTP_NAMES = "not (grpc or http_json or _rest or HttpJson or Sse or TestJsonRpcFormat or TestJsonRpcStreaming)"
"""Tests of another binding, or of HTTP headers."""
HTTP_ONLY = ("agent_card", "jsonrpc", "http_json", "grpc")
"""Folders of the kit's tests that speak HTTP or gRPC themselves, whatever client they are given."""


@contextmanager
def mesh() -> Iterator[Path]:
    """The conformance service, running in a folder of its own; that folder."""
    with tempfile.TemporaryDirectory(prefix="weft-tck-") as name:
        folder = Path(name) / "conformance"
        shutil.copytree(SERVICE, folder, ignore=shutil.ignore_patterns(".weft", "__pycache__"))
        subprocess.run([*MESH, "up", "--detach"], cwd=folder, check=True, timeout=UP_WITHIN)
        try:
            yield folder
        finally:
            subprocess.run([*MESH, "down"], cwd=folder, check=False, timeout=UP_WITHIN)


def run_kit(kit: Path, python: str, folder: Path, *, nats: bool) -> dict[str, tuple[str, str]]:
    """Run the kit; (outcome, text) by test."""
    report = folder / ("nats.xml" if nats else "http.xml")
    command = [
        python, "-m", "pytest", "tests/compatibility/", f"--sut-host={SUT}", "--tb=short", "-q",
        "-p", "no:cacheprovider", "-p", "kit_fixes", f"--junitxml={report}",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    if nats:
        command += ["-p", "nats_slot", "--transport=jsonrpc", "-k", HTTP_NAMES]
        command += [f"--ignore=tests/compatibility/{name}" for name in HTTP_ONLY]
        env["WEFT_TCK_SIDE"] = f"{sys.executable} {HERE / 'nats_side.py'}"
        env["WEFT_HOME"] = str(folder / ".weft")
    subprocess.run(command, cwd=kit, env=env, check=False, timeout=KIT_WITHIN)
    return outcomes(report)


def outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """(outcome, text) by test, of a JUnit report."""
    found: dict[str, tuple[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.compatibility.')}::{case.get('name')}"
        outcome, text = "passed", ""
        for kind in ("failure", "error", "skipped"):
            if (told := case.find(kind)) is not None:
                outcome, text = kind, told.get("message", "")
                if kind == "skipped" and told.get("type") == "pytest.xfail":
                    outcome = "xfail"
        found[name] = outcome, text
    return found


def judge(slot: str, found: dict[str, tuple[str, str]]) -> bool:
    """Print what came out; whether everything that did not pass is explained."""
    explained = yaml.safe_load((HERE / "explained.yaml").read_text())[slot] or []
    print(f"\n{slot}: {dict(Counter(outcome for outcome, _ in found.values()))}")
    fine = True
    for name, (outcome, text) in sorted(found.items()):
        if outcome == "passed":
            continue
        reason = next((one["why"] for one in explained if re.search(one["test"], name)), "")
        fine = fine and bool(reason)
        print(
            f"  {outcome:8} {name}\n           {reason or 'UNEXPLAINED: ' + text.splitlines()[0] if text else reason}"
        )
    for one in explained:
        if all(outcome == "passed" for name, (outcome, _) in found.items() if re.search(one["test"], name)):
            print(f"  explained, but it passes or is not there: {one['test']}")
            fine = False
    return fine


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path)
    parser.add_argument("--python", default="python3")
    parser.add_argument("--only", choices=["http", "nats"])
    options = parser.parse_args()
    kit = options.kit.resolve()
    if not (kit / "tests" / "compatibility").is_dir():
        parser.error(f"{kit} is no checkout of the kit's branch 1.0-dev: it has no tests/compatibility")
    fine = True
    with mesh() as folder:
        for slot in ("http", "nats"):
            if options.only in (None, slot):
                fine = judge(slot, run_kit(kit, options.python, folder, nats=slot == "nats")) and fine
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
