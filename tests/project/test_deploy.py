"""What `deploy/` shows is what the mesh takes."""

import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest

from weft.core.config import load_mesh_config
from weft.core.coordconf import CoordinatorConfig
from weft.core.gatewayconf import GatewayConfig, OidcConfig, TokenConfig

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_the_commented_mesh_yaml_is_valid_and_has_every_setting() -> None:
    text = (DEPLOY / "mesh.yaml").read_text()
    config = load_mesh_config(DEPLOY / "mesh.yaml")
    assert (config.name, list(config.agents), config.callers) == ("demo", ["hello"], ("local",))
    assert config.coordinator == CoordinatorConfig(1, "youngest", 20)
    for setting in ("port:", "durability:", "max_bytes:", "run:", "replicas:", "env:", "grace:"):
        assert setting in text, f"{setting} is missing from deploy/mesh.yaml"


def test_the_gateway_of_the_commented_mesh_yaml_is_the_default_but_for_its_ports_and_agent() -> None:
    shown = load_mesh_config(DEPLOY / "mesh.yaml").gateway
    assert (shown.port, shown.grpc_port, shown.default_agent) == (8080, 50051, "hello")
    assert replace(shown, port=None, grpc_port=None, default_agent="") == GatewayConfig()
    text = (DEPLOY / "mesh.yaml").read_text()
    sections = (shown, shown.auth, shown.limits, shown.push, TokenConfig("ci"), OidcConfig("", ""))
    for setting in (field.name for section in sections for field in fields(section)):
        assert setting in text, f"gateway setting {setting} is missing from deploy/mesh.yaml"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", ["weft-mesh@.service", "weft-gateway@.service", "weft-coordinator@.service"])
def test_the_systemd_unit_is_understood(tmp_path: Path, name: str) -> None:
    """systemd-analyze ends with 0 on keys it does not know, so what it says counts."""
    text = (DEPLOY / "systemd" / name).read_text()
    unit = tmp_path / name
    unit.write_text(text.replace("/usr/local/bin/mesh", "/bin/true").replace("User=weft\n", ""))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if unit.name.removesuffix(".service") in line]
    assert said == []
