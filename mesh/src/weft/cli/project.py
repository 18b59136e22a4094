"""Where a command works: the project folder with `mesh.yaml`, and the home directory of its mesh."""

from __future__ import annotations

import os
from pathlib import Path

from weft.core.config import CONFIG_NAME
from weft.core.home import HOME_NAME
from weft_protocols.errors import InvalidConfig


def find_config(start: Path | None = None) -> Path:
    """`mesh.yaml` here or in the nearest folder above; InvalidConfig if there is none."""
    start = (start or Path.cwd()).absolute()
    for folder in (start, *start.parents):
        if (folder / CONFIG_NAME).is_file():
            return folder / CONFIG_NAME
    raise InvalidConfig(f"there is no {CONFIG_NAME} in {start} or above it; `mesh init` makes one")


def home_for(config: Path) -> Path:
    """The home directory of the mesh of this `mesh.yaml`: `WEFT_HOME`, else `.weft` beside it."""
    named = os.environ.get("WEFT_HOME")
    return Path(named).expanduser().absolute() if named else config.absolute().parent / HOME_NAME
