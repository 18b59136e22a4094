"""Section `policy` of `mesh.yaml`: the folder whose rules decide about tools, and whether they hold or only watch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weft.core.yamlfields import YamlReader, did_you_mean

if TYPE_CHECKING:
    import yaml

POLICY_MODES: Final = ("enforce", "shadow")
"""What no rule permits is denied; or everything is allowed, and what would have been denied is recorded."""


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Who may use which tool."""

    folder: Path | None = None
    """What `mesh up` loads where it differs from what decides; None leaves that to `mesh policy load`."""
    mode: str = POLICY_MODES[0]


def read_policy(reader: YamlReader, node: yaml.Node | None, *, folder: Path) -> PolicyConfig:
    """The section `policy`, or just the folder; mistakes are the reader's. Relative folders are below `folder`."""
    import yaml

    if node is None:
        return PolicyConfig()
    fields = {"folder": node} if isinstance(node, yaml.ScalarNode) else reader.mapping(node, "policy", _FIELDS)
    named = reader.value(fields, "policy.folder", "", str)
    mode = reader.value(fields, "policy.mode", POLICY_MODES[0], _mode)
    return PolicyConfig(folder / named if named else None, mode)


_FIELDS: Final = ("folder", "mode")


def _mode(text: str) -> str:
    if text not in POLICY_MODES:
        hint = did_you_mean(text, POLICY_MODES)
        raise ValueError(f"{text!r} is unknown{hint}; use one of {', '.join(POLICY_MODES)}")
    return text
