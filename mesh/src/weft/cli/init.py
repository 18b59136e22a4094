"""`mesh init`: a new project that works."""

from __future__ import annotations

import re
from pathlib import Path

import click

from weft.cli.output import Printer
from weft_protocols.errors import UsageError


@click.command()
@click.argument("folder", metavar="[DIR]", type=click.Path(file_okay=False, path_type=Path), default=Path())
def command(folder: Path) -> None:
    """Write a project into DIR (default: here): an agent, its test, and the mesh.yaml that runs it.

    Nothing that exists is overwritten.
    """
    from weft.cli.templates import FILES

    name = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-")[:64] or "mesh"
    files = {folder / path: text.replace("{{name}}", name) for path, text in FILES.items()}
    taken = [str(path) for path in files if path.exists()]
    if taken:
        raise UsageError(f"{', '.join(taken)} exists already; name an empty folder: mesh init DIR")
    printer = Printer()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        printer.talk(f"wrote {path}")
    enter = "" if folder.resolve() == Path.cwd() else f"cd {folder} && "
    printer.talk(f"next: {enter}mesh up --detach && mesh send hello world")
