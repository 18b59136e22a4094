"""What is enforced for one tool server besides its limits: read from the `settings` of its registration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from weft.core.yamlfields import did_you_mean
from weft.policy.egress import Egress
from weft.policy.model import SANDBOXES, Limit, Obligations, Request
from weft.policy.obligations import NOTHING, READERS, fill
from weft.policy.patterns import CLASSES
from weft_protocols.errors import InvalidConfig

SOURCES: Final = ("env", "file", "command")
"""Where a secret is read: a variable of the sidecar, a file, the output of a command."""
EVERY_TOOL: Final = "*"
MIB: Final = 1024 * 1024
MOST_SECONDS: Final = 300
MOST_MEMORY: Final = 256 * MIB
MOST_RECURSION: Final = 1000
MOST_OUTPUT: Final = 4 * MIB
"""The most that code may be given: with more, one call could hold up the sidecar."""
_UNITS: Final = {"": 1, "K": 1024, "M": MIB, "G": 1024 * MIB}
_SIZE: Final = re.compile(r"(\d{1,9})([KMG]?)\Z")


@dataclass(frozen=True, slots=True)
class SecretSource:
    """Where a secret is; never what it is."""

    kind: str
    """One of `SOURCES`."""
    at: str | tuple[str, ...]
    """The variable, the path, or program and arguments."""
    form: str = "{}"
    """What is sent, the value in place of `{}`, such as `Bearer {}`."""

    @property
    def where(self) -> str:
        """For people."""
        return f"command {self.at[0]}" if isinstance(self.at, tuple) else f"{self.kind} {self.at}"


@dataclass(frozen=True, slots=True)
class SandboxRules:
    """What a process may use. Paths have `~` and are relative to its folder where they are not absolute."""

    level: str = ""
    """The weakest of `weft.policy.model.SANDBOXES` that will do; empty for the best there is."""
    read: tuple[str, ...] | None = None
    """What it may read besides the system's programs and libraries; None for everything that is no one's secret."""
    write: tuple[str, ...] | None = None
    """What it may write; None for its folder, the folder for temporary files, and caches."""
    network: bool = True
    memory: int = 0
    """Bytes, of all its processes together; 0 for no limit."""
    processes: int = 512
    """At a time."""
    cpu: int = 0
    """Seconds of processor time that one process may use in its life; 0 for no limit."""
    off: bool = False
    """Whether it runs without any."""


@dataclass(frozen=True, slots=True)
class CodeRules:
    """What code that agents write may use in one call of the built-in server `code`."""

    seconds: float = 5.0
    """It may compute; what it waits for its calls does not count, and is bounded by `timeout`."""
    memory: int = 64 * MIB
    """Bytes of its values."""
    recursion: int = 200
    """Functions within each other."""
    calls: int = 50
    """Of tools."""
    output: int = 64 * 1024
    """Bytes that it prints, and bytes of its result."""


@dataclass(frozen=True, slots=True)
class Guards:
    """Everything of it."""

    secrets: Mapping[str, SecretSource] = field(default_factory=dict)
    """By name of the variable, or of the header."""
    egress: Egress = field(default_factory=Egress)
    sandbox: SandboxRules = field(default_factory=SandboxRules)
    locks: Mapping[str, str] = field(default_factory=dict)
    """Names of locks by tool, arguments in braces; `*` for every tool."""
    rates: Mapping[str, tuple[Limit, ...]] = field(default_factory=dict)
    """Limits by tool; `*` for whatever is asked of the server. Their rule is that key."""
    effects: frozenset[str] = frozenset()
    """Tools with side effects; `*` for every tool."""
    redact: tuple[str, ...] = ("secrets",)
    """Classes of data that are taken out of what it says, whatever the policy asks for."""
    required: bool = True
    """Whether a call is only made once it is recorded."""
    code: CodeRules = field(default_factory=CodeRules)
    """Only the built-in server `code` looks at it."""
    show_arguments: bool = True
    """Whether records have the arguments, redacted; else only their digest."""

    def locks_of(self, tool: str, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The locks that a call needs. Raises ValueError for an argument that is missing or cannot be in a name."""
        named = tuple(self.locks[key] for key in (tool, EVERY_TOOL) if key in self.locks)
        asked = Request(agent="", action="call", server="", name=tool, arguments=arguments)
        return tuple(dict.fromkeys(fill(Obligations(locks=named), asked).locks))

    def rates_of(self, tool: str) -> tuple[Limit, ...]:
        """The limits that a call of a tool counts for; of what is none, for an empty name."""
        return tuple(limit for key in dict.fromkeys((tool, EVERY_TOOL)) for limit in self.rates.get(key, ()))

    def has_effects(self, tool: str) -> bool:
        """Whether a tool is marked as one with side effects."""
        return tool in self.effects or EVERY_TOOL in self.effects


def guards_of(settings: Mapping[str, Any], where: str = "settings", *, process: bool = False) -> Guards:
    """What `settings` asks for. Raises InvalidConfig for what cannot be, or is not kept for a `process`."""
    if process and settings.get("egress") is not None:
        raise InvalidConfig(
            f"{where}.egress is for servers at an address: a command connects by itself, and is kept from that by "
            "sandbox: {network: false}"
        )
    record = _record(settings.get("records"), f"{where}.records")
    return Guards(
        secrets=_secrets(settings.get("secrets"), f"{where}.secrets"),
        egress=Egress.of(settings.get("egress"), f"{where}.egress"),
        sandbox=_sandbox(settings.get("sandbox"), f"{where}.sandbox"),
        locks=_locks(settings.get("lock"), f"{where}.lock"),
        rates=_rates(settings.get("rate"), f"{where}.rate"),
        effects=_effects(settings.get("side_effects"), f"{where}.side_effects"),
        redact=_redact(settings.get("redact"), f"{where}.redact"),
        required=record[0],
        code=_code(settings.get("code"), f"{where}.code"),
        show_arguments=record[1],
    )


def _mapping(raw: Any, where: str, known: tuple[str, ...] | None = None) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping) or not all(isinstance(key, str) for key in raw):
        raise InvalidConfig(f"{where} must be a mapping")
    for key in raw if known is not None else ():
        if known is not None and key not in known:
            raise InvalidConfig(f"{where} has no {key!r}{did_you_mean(key, known)}")
    return raw


def _secrets(raw: Any, where: str) -> dict[str, SecretSource]:
    made: dict[str, SecretSource] = {}
    for name, one in (_mapping(raw, where) if raw is not None else {}).items():
        told = _mapping(one, f"{where}.{name}", (*SOURCES, "format"))
        kinds = [kind for kind in SOURCES if kind in told]
        if len(kinds) != 1:
            raise InvalidConfig(f"{where}.{name} has exactly one of {', '.join(SOURCES)}")
        at: Any = told[kinds[0]]
        if kinds[0] == "command":
            words = [at] if isinstance(at, str) else at
            if not isinstance(words, list) or not words or not all(isinstance(one, str) and one for one in words):
                raise InvalidConfig(f"{where}.{name}.command must be a program, or a list of it and its arguments")
            at = tuple(words)
        elif not isinstance(at, str) or not at:
            raise InvalidConfig(f"{where}.{name}.{kinds[0]} must be a text")
        form = told.get("format", "{}")
        if not isinstance(form, str) or form.count("{}") != 1:
            raise InvalidConfig(f"{where}.{name}.format must have {{}} once, such as 'Bearer {{}}'")
        made[name] = SecretSource(kinds[0], at, form)
    return made


def _sandbox(raw: Any, where: str) -> SandboxRules:
    if raw is None or raw is True:
        return SandboxRules()
    if raw is False:
        return SandboxRules(off=True)
    known = ("level", "read", "write", "network", "memory", "processes", "cpu")
    told = _mapping(raw, where, known)
    level = told.get("level", "")
    if level not in ("", *SANDBOXES):
        raise InvalidConfig(f"{where}.level {level!r} is unknown; use one of {', '.join(SANDBOXES)}")
    network = told.get("network", True)
    if not isinstance(network, bool):
        raise InvalidConfig(f"{where}.network must be true or false")
    return SandboxRules(
        level=level,
        read=_paths(told.get("read"), f"{where}.read"),
        write=_paths(told.get("write"), f"{where}.write"),
        network=network,
        memory=_size(told.get("memory", 0), f"{where}.memory"),
        processes=_number(told.get("processes", 512), f"{where}.processes"),
        cpu=_number(told.get("cpu", 0), f"{where}.cpu", least=0),
    )


def _code(raw: Any, where: str) -> CodeRules:
    usual = CodeRules()
    told = _mapping(raw, where, CodeRules.__slots__) if raw is not None else {}
    seconds = told.get("seconds", usual.seconds)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MOST_SECONDS:
        raise InvalidConfig(f"{where}.seconds must be a number above 0, and at most {MOST_SECONDS}; not {seconds!r}")
    memory = _size(told.get("memory", usual.memory), f"{where}.memory")
    if not 0 < memory <= MOST_MEMORY:
        raise InvalidConfig(f"{where}.memory must be at most {MOST_MEMORY // MIB}M")
    recursion = _number(told.get("recursion", usual.recursion), f"{where}.recursion")
    if recursion > MOST_RECURSION:
        raise InvalidConfig(f"{where}.recursion must be at most {MOST_RECURSION}")
    output = _number(told.get("output", usual.output), f"{where}.output", least=1024)
    if output > MOST_OUTPUT:
        raise InvalidConfig(f"{where}.output must be at most {MOST_OUTPUT}")
    calls = _number(told.get("calls", usual.calls), f"{where}.calls", least=0)
    return CodeRules(float(seconds), memory, recursion, calls, output)


def _paths(raw: Any, where: str) -> tuple[str, ...] | None:
    if raw is None:
        return None
    if not isinstance(raw, list) or not all(isinstance(one, str) and one for one in raw):
        raise InvalidConfig(f"{where} must be a list of paths")
    return tuple(raw)


def _number(raw: Any, where: str, *, least: int = 1) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or raw < least:
        raise InvalidConfig(f"{where} must be a whole number from {least}, not {raw!r}")
    return raw


def _size(raw: Any, where: str) -> int:
    match = _SIZE.match(str(raw)) if not isinstance(raw, bool) else None
    made = int(match[1]) * _UNITS[match[2]] if match else -1
    if made < 0 or 0 < made < 16 * MIB:
        raise InvalidConfig(f"{where} must be bytes, or such as 512M, and at least 16M; not {raw!r}")
    return made


def _locks(raw: Any, where: str) -> dict[str, str]:
    if raw is None:
        return {}
    told = {EVERY_TOOL: raw} if isinstance(raw, str) else _mapping(raw, where)
    for tool, lock in told.items():
        try:
            READERS["lock"](NOTHING, "", lock if isinstance(lock, str) else "")
        except ValueError as error:
            raise InvalidConfig(f"{where}.{tool}: {error}") from None
    return dict(told)


def _rates(raw: Any, where: str) -> dict[str, tuple[Limit, ...]]:
    if raw is None:
        return {}
    told = {EVERY_TOOL: raw} if isinstance(raw, str) else _mapping(raw, where)
    made: dict[str, tuple[Limit, ...]] = {}
    for tool, text in told.items():
        at = where if isinstance(raw, str) else f"{where}.{tool}"
        if not isinstance(text, str):
            raise InvalidConfig(f"{at} must be a limit such as 100/m per agent, not {text!r}")
        try:
            made[tool] = READERS["limit"](NOTHING, tool, text).limits
        except ValueError as error:
            raise InvalidConfig(f"{at}: {error}") from None
    return made


def _effects(raw: Any, where: str) -> frozenset[str]:
    if raw is None or raw is False:
        return frozenset()
    if raw is True:
        return frozenset({EVERY_TOOL})
    if not isinstance(raw, list) or not all(isinstance(one, str) and one for one in raw):
        raise InvalidConfig(f"{where} must be true, or a list of tools")
    return frozenset(raw)


def _redact(raw: Any, where: str) -> tuple[str, ...]:
    if raw is None:
        return Guards().redact
    if not isinstance(raw, list) or not all(isinstance(one, str) for one in raw):
        raise InvalidConfig(f"{where} must be a list of {', '.join(CLASSES)}; empty to take nothing out")
    for one in raw:
        if one not in CLASSES:
            raise InvalidConfig(f"{where}: {one!r} is none of {', '.join(CLASSES)}{did_you_mean(one, CLASSES)}")
    return tuple(raw)


def _record(raw: Any, where: str) -> tuple[bool, bool]:
    told = _mapping(raw, where, ("required", "arguments")) if raw is not None else {}
    required, arguments = told.get("required", True), told.get("arguments", True)
    if not isinstance(required, bool) or not isinstance(arguments, bool):
        raise InvalidConfig(f"{where}: required and arguments are true or false")
    return required, arguments
