"""Shared by the tests of the embedded broker."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "project" / ".weft"


@pytest.fixture
def fake_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a nats-server out of a shell script and has it used."""

    def make(script: str) -> Path:
        path = tmp_path / "nats-server"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("WEFT_NATS_SERVER", str(path))
        return path

    return make
