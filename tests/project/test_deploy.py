"""What `deploy/` shows is what the mesh takes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from weft.core.config import load_mesh_config

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_the_commented_mesh_yaml_is_valid_and_has_every_setting() -> None:
    text = (DEPLOY / "mesh.yaml").read_text()
    config = load_mesh_config(DEPLOY / "mesh.yaml")
    assert (config.name, list(config.agents), config.callers) == ("demo", ["hello"], ("local",))
    for setting in ("port:", "durability:", "max_bytes:", "run:", "replicas:", "env:", "grace:"):
        assert setting in text, f"{setting} is missing from deploy/mesh.yaml"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_systemd_unit_is_understood(tmp_path: Path) -> None:
    """systemd-analyze ends with 0 on keys it does not know, so what it says counts."""
    text = (DEPLOY / "systemd" / "weft-mesh@.service").read_text()
    unit = tmp_path / "weft-mesh@.service"
    unit.write_text(text.replace("/usr/local/bin/mesh", "/bin/true").replace("User=weft\n", ""))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if unit.name.removesuffix(".service") in line]
    assert said == []
