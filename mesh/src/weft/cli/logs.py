"""`mesh logs`: what the processes wrote, merged by time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

import click

from weft.cli.output import Printer, rfc3339, safe

FOLLOW_EVERY: Final = 0.2
"""Seconds between looks at the files: they are all that is left when the supervisor is gone."""
TAIL_BLOCK: Final = 256 * 1024
_STAMP: Final = re.compile(r"(\d{4}-\d\d-\d\dT[\d:.]+Z) (.*)", re.DOTALL)
_NATS_STAMP: Final = re.compile(r"\[\d+\] (\d{4}/\d\d/\d\d \d\d:\d\d:\d\d)\.(\d{3})\d* (.*)", re.DOTALL)


@dataclass(slots=True)
class Source:
    """The log of one process."""

    name: str
    path: Path
    last_time: str = ""
    _file: IO[bytes] | None = None
    _inode: int = 0
    _rest: bytes = field(default=b"")

    def tail(self, count: int) -> list[tuple[str, str]]:
        """The last `count` lines as (time, text); later `more` goes on from there."""
        file = self._open()
        if file is None:
            return []
        size = file.seek(0, 2)
        data = b""
        while size > 0 and data.count(b"\n") <= count:
            step = min(TAIL_BLOCK, size)
            size -= step
            file.seek(size)
            data = file.read(step) + data
        file.seek(0, 2)
        *lines, self._rest = data.split(b"\n")
        return [self._parse(line) for line in lines[-count:]] if count else []

    def more(self) -> Iterator[tuple[str, str]]:
        """Lines written since, also into the file that took this one's place."""
        if self._open() is None:
            return
        yield from self._read()
        try:
            replaced = self.path.stat().st_ino != self._inode
        except FileNotFoundError:
            return
        if replaced:
            yield from self._read()
            self.close()
            self._open()
            yield from self._read()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes] | None:
        if self._file is None:
            try:
                self._file = self.path.open("rb")
            except FileNotFoundError:
                return None
            self._inode = os.fstat(self._file.fileno()).st_ino
        return self._file

    def _read(self) -> Iterator[tuple[str, str]]:
        if self._file is not None:
            *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
            yield from map(self._parse, lines)

    def _parse(self, line: bytes) -> tuple[str, str]:
        text = line.decode("utf-8", "replace")
        if match := _STAMP.fullmatch(text):
            self.last_time, text = match.groups()
        elif match := _NATS_STAMP.fullmatch(text):
            local = time.mktime(time.strptime(match[1], "%Y/%m/%d %H:%M:%S"))
            self.last_time, text = rfc3339(local + int(match[2]) / 1000), match[3]
        # A line without a time of its own belongs to the one before it.
        return self.last_time, text


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on.")
@click.option("-n", "--lines", type=click.IntRange(min=0), default=100, show_default=True, help="Lines to begin with.")
@click.option(
    "-o", "--output", type=click.Choice(["table", "jsonl"]), default="table", show_default=True,
    help="Form of the output.",
)  # fmt: skip
def command(names: tuple[str, ...], follow: bool, lines: int, output: str) -> None:
    """Print the logs of NAME...: agents, replicas such as hello.2, coordinator, gateway, broker, supervisor.

    Without NAME all of them but the broker's. The files are .weft/logs/NAME.log.
    """
    from weft.core.config import find_home

    home = find_home()
    printer = Printer(output)
    sources = find_sources(home, names)
    try:
        _print_tail(printer, sources, lines=lines, several=len(sources) > 1 or (follow and not names))
        if follow:
            _follow(printer, home, names=names, sources=sources)
    finally:
        for source in sources:
            source.close()


def _print_tail(printer: Printer, sources: list[Source], *, lines: int, several: bool) -> None:
    """The last lines of all sources together."""
    found = sorted(
        ((stamp, source.name, text) for source in sources for stamp, text in source.tail(lines)),
        key=lambda entry: entry[0],
    )
    for stamp, name, text in found[-lines:] if lines else []:
        _print(printer, stamp, name=name, text=text, several=several)


def _follow(printer: Printer, home: Path, *, names: tuple[str, ...], sources: list[Source]) -> None:
    """What is written from now on, also by processes that are new; without end."""
    while True:
        time.sleep(FOLLOW_EVERY)
        known = {source.name for source in sources}
        sources += [source for source in find_sources(home, names) if source.name not in known]
        for source in sources:
            for stamp, text in source.more():
                _print(printer, stamp, name=source.name, text=text, several=not names or len(sources) > 1)


def find_sources(home: Path, names: tuple[str, ...]) -> list[Source]:
    """The logs that the names stand for; NotFound for a name without one."""
    from weft.cli.errors import NotFound
    from weft.core.config import did_you_mean

    files = {path.name.removesuffix(".log"): path for path in sorted((home / "logs").glob("*.log"))}
    if not names:
        return [Source(name, path) for name, path in files.items()]
    files["broker"] = home / "broker" / "nats.log"
    chosen: dict[str, Path] = {}
    for name in names:
        matching = {key: path for key, path in files.items() if key == name or key.rpartition(".")[0] == name}
        if not matching:
            agents = {key.rpartition(".")[0] for key in files} - {""}
            known = sorted({*files, *agents})
            raise NotFound(f"no log of {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
        chosen.update(matching)
    return [Source(name, path) for name, path in chosen.items()]


def _print(printer: Printer, stamp: str, *, name: str, text: str, several: bool) -> None:
    shown = f"{stamp} {safe(text)}" if stamp else safe(text)
    printer.item({"time": stamp, "process": name, "text": text}, text=f"{name} | {shown}" if several else shown)
