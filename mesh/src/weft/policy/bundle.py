"""A policy as it is kept: its files, their digest, and what is made of them. Pure but for Cedar's parser."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final, Self

import yaml

from weft.policy import rules, validate
from weft.policy.catalog import Catalog
from weft.policy.engine import CedarEngine
from weft.policy.problems import InvalidPolicy, Problem, not_yaml
from weft.policy.rules import Rule
from weft.policy.validate import Known
from weft_protocols.canonical import canonical_json
from weft_protocols.errors import InvalidConfig, InvalidName
from weft_protocols.subjects import check_name

RULES: Final = ".cedar"
TESTS: Final = ".test.yaml"
GROUPS: Final = "groups.yaml"
"""Groups of agents: `name: [agent, …]`; rules say `principal in Group::"name"`."""
LARGEST: Final = 4 * 1024 * 1024
"""Bytes of a bundle's files together."""
_PATH: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\Z")


def belongs(path: str) -> bool:
    """Whether a file of that path, relative to the bundle's folder, is part of it."""
    name = PurePosixPath(path).name
    return name.endswith((RULES, TESTS)) or path == GROUPS


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files of a policy by path: rules, tests and groups."""

    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of all files, in hex."""
        return hashlib.sha256(canonical_json(dict(self.files))).hexdigest()

    @property
    def rules(self) -> dict[str, str]:
        """Files of rules."""
        return {path: text for path, text in sorted(self.files.items()) if path.endswith(RULES)}

    @property
    def tests(self) -> dict[str, str]:
        """Files of tests."""
        return {path: text for path, text in sorted(self.files.items()) if path.endswith(TESTS)}

    def encode(self) -> bytes:
        """As it is stored."""
        return zlib.compress(json.dumps(dict(self.files), sort_keys=True).encode(), 9)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """As it was stored. Raises InvalidConfig if it is none."""
        try:
            unpacker = zlib.decompressobj()
            raw = json.loads(unpacker.decompress(data, 2 * LARGEST))
            return cls.of({str(path): str(text) for path, text in dict(raw).items()})
        except (zlib.error, ValueError, TypeError) as error:
            raise InvalidConfig(f"a stored policy cannot be read: {error}") from None

    @classmethod
    def of(cls, files: Mapping[str, str]) -> Self:
        """Of files by path. Raises InvalidConfig for a path that is none, and for too much."""
        for path in files:
            if not _PATH.match(path) or ".." in path.split("/"):
                raise InvalidConfig(f"{path!r} cannot be a file of a policy: letters, digits, _ . - and / make a path")
        if sum(len(text.encode()) for text in files.values()) > LARGEST:
            raise InvalidConfig(f"a policy has at most {LARGEST} bytes")
        return cls(dict(sorted(files.items())))


@dataclass(frozen=True, slots=True)
class Compiled:
    """A policy, read."""

    bundle: Bundle
    rules: tuple[Rule, ...]
    groups: Mapping[str, tuple[str, ...]]
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Why it cannot be used."""
        return tuple(one for one in self.problems if not one.warning)

    def engine(self, catalog: Catalog, *, version: int = 0) -> CedarEngine:
        """What decides by it. Raises InvalidPolicy if it cannot be used."""
        if self.errors:
            raise InvalidPolicy(self.errors)
        return CedarEngine(self.rules, catalog, groups=self.groups, version=version)


def compile_bundle(
    bundle: Bundle, catalog: Catalog | None, *, agents: frozenset[str] | None = None, lenient: bool = False
) -> Compiled:
    """Read a policy and check it.

    Args:
        bundle: the policy.
        catalog: what rules may name; None checks only what can be checked without.
        agents: names of the mesh's agents, to warn about others; None if they are not known.
        lenient: whether tools and servers that are not registered are only warned about.

    Raises InvalidConfig where Cedar is not installed.
    """
    made, problems = rules.parse(bundle.rules)
    groups, wrong = _groups(bundle.files.get(GROUPS, ""))
    problems += wrong
    if catalog is not None:
        problems += validate.validate(made, Known(catalog, frozenset(groups), agents, lenient))
    if not made and not problems:
        problems.append(Problem("policy", 0, "there are no rules, so that everything is denied", warning=True))
    return Compiled(bundle, made, groups, tuple(sorted(problems)))


def running(bundle: Bundle, catalog: Catalog, *, version: int = 0) -> CedarEngine:
    """What decides by a stored policy, whatever has been registered or removed since it was checked.

    A rule that reads an argument which is not there any more cannot be evaluated; what cannot be is denied.
    Raises InvalidPolicy where not even the rules can be read.
    """
    return compile_bundle(bundle, None).engine(catalog, version=version)


def _groups(text: str) -> tuple[dict[str, tuple[str, ...]], list[Problem]]:
    problems: list[Problem] = []
    try:
        raw: Any = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        return {}, [not_yaml(GROUPS, error)]
    if not isinstance(raw, dict):
        return {}, [Problem(GROUPS, 0, "must be a mapping of groups to lists of agents, e.g. `finance: [billing]`")]
    made: dict[str, tuple[str, ...]] = {}
    for group, agents in raw.items():
        members = agents if isinstance(agents, list) else [agents]
        for agent in members:
            try:
                check_name(agent if isinstance(agent, str) else repr(agent))
            except InvalidName as error:
                problems.append(Problem(GROUPS, 0, f"{group}: {error}"))
        made[str(group)] = tuple(one for one in members if isinstance(one, str))
    return made, problems
