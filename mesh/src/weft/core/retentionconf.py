"""How long finished tasks stay in the stream: the part `retention` of `mesh.yaml`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from weft.core.yamlfields import YamlReader, size
from weft_protocols.errors import InvalidConfig

if TYPE_CHECKING:
    import yaml

_UNITS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True, slots=True)
class Retention:
    """When a finished task leaves the stream. It can be read afterwards: it is in the coordinators' files."""

    keep: float | None = 86_400.0
    """Seconds from its end until it leaves; None for never."""
    steps: float | None = 3_600.0
    """Seconds from its end until the records of its steps leave, which is most of what it takes; None for never."""
    max_bytes: int = -1
    """Bytes of the stream above which the tasks that ended first leave earlier; -1 for no limit."""

    @staticmethod
    def load(environment: Mapping[str, str], base: Retention) -> Retention:
        """`base`, changed by `WEFT_RETENTION_KEEP`, `_STEPS` and `_MAX_BYTES`. Raises InvalidConfig."""
        values: dict[str, float | int | None] = {}
        for field, read in (("keep", duration), ("steps", duration), ("max_bytes", size)):
            name = f"WEFT_RETENTION_{field.upper()}"
            if text := environment.get(name):
                try:
                    values[field] = read(text)
                except ValueError as error:
                    raise InvalidConfig(f"{name}: {error}") from None
        return Retention(
            keep=values.get("keep", base.keep),
            steps=values.get("steps", base.steps),
            max_bytes=int(values.get("max_bytes", base.max_bytes) or -1),
        )


def read_retention(reader: YamlReader, node: yaml.Node | None) -> Retention:
    """The part as it is written, with defaults; mistakes go to the reader."""
    base = Retention()
    if node is None:
        return base
    fields = reader.mapping(node, "retention", ("keep", "steps", "max_bytes"))
    made = Retention(
        keep=reader.value(fields, "retention.keep", base.keep, duration),
        steps=reader.value(fields, "retention.steps", base.steps, duration),
        max_bytes=reader.value(fields, "retention.max_bytes", base.max_bytes, size),
    )
    if made.keep is not None and made.steps is not None and made.steps > made.keep and "steps" in fields:
        reader.mistake(fields["steps"], "retention.steps", "steps leave with their task at the latest: at most `keep`")
    return made


def duration(text: str) -> float | None:
    """Reads a time such as `90s`, `24h` or `7d`, a number of seconds, or `forever`, which is None."""
    if text == "forever":
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?) ?([smhd]?)", text)
    if match is None:
        raise ValueError(f"{text!r} must be a time such as 90s, 24h or 7d, or forever")
    return float(match[1]) * _UNITS[match[2]]
