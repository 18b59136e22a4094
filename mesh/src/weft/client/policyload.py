"""Policies from folders onto a mesh: read, checked against what is registered, tested, stored, and pointed at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weft.client.policies import ACTIVE, Pointer, PolicyStore, Version, known_agents, registered
from weft.policy import cases
from weft.policy.bundle import Bundle, Compiled, belongs, compile_bundle
from weft.policy.problems import InvalidPolicy, Problem
from weft_protocols.errors import InvalidConfig

if TYPE_CHECKING:
    from weft.core.broker import Broker
    from weft.policy.catalog import Catalog


def read_folder(folder: str | Path) -> Bundle:
    """The policy in a folder. Raises InvalidConfig if there is none or it cannot be read."""
    root = Path(folder)
    if not root.is_dir():
        raise InvalidConfig(f"{folder} is no folder; a policy is a folder of .cedar files")
    files: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_file() or not belongs(name) or any(part.startswith(".") for part in Path(name).parts):
            continue
        try:
            files[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"{path} cannot be read: {error}") from None
    if not any(name.endswith(".cedar") for name in files):
        raise InvalidConfig(f"{folder} has no .cedar file")
    return Bundle.of(files)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A policy that was loaded."""

    version: Version
    pointer: Pointer
    warnings: tuple[Problem, ...]


def tested(compiled: Compiled, catalog: Catalog) -> list[cases.Outcome]:
    """How the tests beside a policy come out. Raises InvalidPolicy if tests or rules cannot be read."""
    found, wrong = cases.read(compiled.bundle.tests)
    if wrong:
        raise InvalidPolicy(wrong)
    return cases.run(compiled.engine(catalog), found)


async def checked(broker: Broker, bundle: Bundle, *, lenient: bool = False) -> Compiled:
    """A policy that is right on this mesh. Raises InvalidPolicy if it is not, or a test of it fails.

    Args:
        broker: a connection of account MESH.
        bundle: the policy.
        lenient: whether it may name tools that are not registered (yet).
    """
    catalog = await registered(broker)
    compiled = compile_bundle(bundle, catalog, lenient=lenient, agents=await known_agents(broker))
    if compiled.errors:
        raise InvalidPolicy(compiled.errors)
    failed = [one for one in tested(compiled, catalog) if not one.passed]
    if failed:
        raise InvalidPolicy(
            [Problem(one.case.file, one.case.line, f"{one.case.name}: {'; '.join(one.failures)}") for one in failed]
        )
    return compiled


async def load(
    broker: Broker, bundle: Bundle, *, by: str, note: str = "", lenient: bool = False, what: str = ACTIVE
) -> Loaded:
    """Have a policy decide from now on (or with `SHADOW` watch). Nothing changes if it is wrong: see `checked`."""
    compiled = await checked(broker, bundle, lenient=lenient)
    store = PolicyStore(broker)
    version = await store.store(bundle, author=by, note=note, rules=len(compiled.rules))
    now = await store.pointer(what)
    if now.version != version.number:
        how = "load" if what == ACTIVE else what
        now = await store.point(version.number, by=by, how=how, note=note, what=what)
    return Loaded(version, now, compiled.problems)


__all__ = ["Loaded", "checked", "load", "read_folder", "tested"]
