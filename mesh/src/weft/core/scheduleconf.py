"""Section `schedules` of `mesh.yaml`: tasks that start by the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from weft.core import cron
from weft.core.yamlfields import did_you_mean
from weft_protocols.errors import InvalidName
from weft_protocols.subjects import check_token

if TYPE_CHECKING:
    import yaml

_T = TypeVar("_T")
FIELDS: Final = ("agent", "cron", "message", "skill", "caller", "context", "timezone", "missed")
MISSED: Final = ("last", "all")
NAME: Final = 62
"""Characters of a schedule's name at most: with what goes before it, it is a token of a subject."""


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """One schedule."""

    name: str
    agent: str
    """The agent that gets a task each time."""
    cron: str
    """Six fields, seconds first, or `@daily`, `@every 10s`, … (`weft.core.cron`)."""
    message: str
    """Text of the message."""
    skill: str = ""
    """Skill it is for; the agent's first if empty."""
    caller: str = "local"
    """Whose tasks they are."""
    context: str = ""
    """Context of all of them; each has its own if empty. With an agent that works in order none overtakes another."""
    timezone: str = ""
    """IANA name of the zone the fields are in; UTC if empty."""
    missed: str = "last"
    """What is started of the times at which no coordinator ran: `last`, the last one, or `all` of them."""

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @staticmethod
    def of(told: Mapping[str, Any]) -> ScheduleConfig:
        """The schedule in a JSON object; unknown fields are left out."""
        known = ("name", *FIELDS)
        return ScheduleConfig(**{name: value for name, value in told.items() if name in known})


class Reader(Protocol):
    """Reads the fields of a YAML file and remembers the mistakes (`weft.core.yamlfields.YamlReader`)."""

    def value(self, fields: Mapping[str, yaml.Node], where: str, default: _T, read: Callable[[str], _T]) -> _T:
        """A field."""

    def mapping(self, node: yaml.Node, where: str, known: tuple[str, ...] | None) -> dict[str, yaml.Node]:
        """Entries of a mapping."""

    def mistake(self, node: yaml.Node, where: str, what: str) -> None:
        """Remember what is wrong."""


def read_schedules(
    reader: Reader, node: yaml.Node | None, *, agents: tuple[str, ...], callers: tuple[str, ...]
) -> dict[str, ScheduleConfig]:
    """The section's schedules by name. Mistakes go to the reader.

    Args:
        reader: of the file.
        node: the section; no schedules if None.
        agents: names that `agent` can have.
        callers: names that `caller` can have.
    """
    made: dict[str, ScheduleConfig] = {}
    for name, entry in reader.mapping(node, "schedules", None).items() if node is not None else ():
        where = f"schedules.{name}"
        try:
            check_token(name, "schedule name")
        except InvalidName as error:
            reader.mistake(entry, "schedules", str(error))
            continue
        if len(name) > NAME:
            reader.mistake(entry, "schedules", f"{name!r} has {len(name)} characters; {NAME} fit")
            continue
        fields = reader.mapping(entry, where, FIELDS)
        for needed in ("agent", "cron", "message"):
            if needed not in fields:
                reader.mistake(entry, where, f"`{needed}` is missing; write e.g. {_EXAMPLES[needed]}")
        zone = reader.value(fields, f"{where}.timezone", "", _zone)
        base = ScheduleConfig(name, "", "", "")
        made[name] = ScheduleConfig(
            name,
            agent=reader.value(fields, f"{where}.agent", "", _one_of(agents, "agent")),
            cron=reader.value(fields, f"{where}.cron", "", lambda text, zone=zone: _cron(text, zone)),  # type: ignore[misc]
            message=reader.value(fields, f"{where}.message", "", str),
            skill=reader.value(fields, f"{where}.skill", base.skill, _token("skill")),
            caller=reader.value(fields, f"{where}.caller", base.caller, _one_of(callers, "caller")),
            context=reader.value(fields, f"{where}.context", base.context, _token("context")),
            timezone=zone,
            missed=reader.value(fields, f"{where}.missed", base.missed, _one_of(MISSED, "value")),
        )
        if "caller" not in fields and base.caller not in callers:
            reader.mistake(entry, where, f"`caller` is missing: it must be one of {', '.join(callers)}")
    return made


_EXAMPLES: Final = {"agent": "agent: reporter", "cron": 'cron: "0 0 2 * * *"', "message": 'message: "report"'}


def _cron(text: str, zone: str) -> str:
    cron.parse(text, zone)
    return text.strip()


def _zone(text: str) -> str:
    cron.parse("@daily", text)
    return text


def _token(what: str) -> Callable[[str], str]:
    return lambda text: check_token(text, what)


def _one_of(known: tuple[str, ...], what: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(
                f"there is no {what} {text!r}{did_you_mean(text, known)}; there are {', '.join(known) or 'none'}"
            )
        return text

    return read
