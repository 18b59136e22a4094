"""When a schedule is due: the broker's own notation, read so that mistakes are found early and times can be shown.

The broker starts what is scheduled; nothing here does. Six fields: second, minute, hour, day of the month, month, and
day of the week (0 is Sunday). Each is `*`, a number, a range `a-b`, either with a step `/n`, or several of these with
commas between; months and days of the week also have names. `?` is `*`. Where both days are restricted, one is enough.
Besides `@hourly`, `@daily`, `@weekly`, `@monthly`, `@yearly`, and `@every 10s` (`90s`, `5m`, `1h30m`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final

MACROS: Final = {
    "@yearly": "0 0 0 1 1 *",
    "@annually": "0 0 0 1 1 *",
    "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * 0",
    "@daily": "0 0 0 * * *",
    "@midnight": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
}
FIELDS: Final = ("second", "minute", "hour", "day of the month", "month", "day of the week")
_RANGES: Final = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_NAMES: Final = {4: {name: n for n, name in enumerate(_MONTHS, 1)}, 5: {name: n for n, name in enumerate(_DAYS)}}
_UNITS: Final = {"h": 3600, "m": 60, "s": 1}
_YEARS: Final = 5
"""Years within which a date must come: 29 February does."""


@dataclass(frozen=True, slots=True)
class Every:
    """At an interval."""

    seconds: int

    def after(self, last: datetime) -> datetime:
        """The time after one at which it was due."""
        return last + timedelta(seconds=self.seconds)


@dataclass(frozen=True, slots=True)
class Cron:
    """At the times that six fields match."""

    allowed: tuple[frozenset[int], ...]
    any_day: bool
    """Whether the day of the month is not restricted."""
    any_weekday: bool
    zone: tzinfo = UTC

    def after(self, last: datetime) -> datetime | None:
        """The next time after a time with a zone, in UTC; None where there is none within five years."""
        seconds, minutes, hours, _, months, _ = self.allowed
        at = last.astimezone(self.zone).replace(tzinfo=None, microsecond=0) + timedelta(seconds=1)
        end = at + timedelta(days=366 * _YEARS)
        while at < end:
            if at.month not in months:
                at = (at.replace(day=1) + timedelta(days=32)).replace(day=1, hour=0, minute=0, second=0)
            elif not self._on(at):
                at = at.replace(hour=0, minute=0, second=0) + timedelta(days=1)
            elif at.hour not in hours:
                at = at.replace(minute=0, second=0) + timedelta(hours=1)
            elif at.minute not in minutes:
                at = at.replace(second=0) + timedelta(minutes=1)
            elif at.second not in seconds:
                at += timedelta(seconds=1)
            else:
                found = at.replace(tzinfo=self.zone).astimezone(UTC)
                if found.astimezone(self.zone).replace(tzinfo=None) == at and found > last:
                    return found
                at += timedelta(seconds=1)  # an hour that the change to summer time leaves out, or one that comes twice
        return None

    def _on(self, day: datetime) -> bool:
        in_month, in_week = day.day in self.allowed[3], (day.weekday() + 1) % 7 in self.allowed[5]
        return (in_month and in_week) if self.any_day or self.any_weekday else (in_month or in_week)


def parse(text: str, timezone: str = "") -> Cron | Every:
    """What a schedule says. Raises ValueError with what is wrong and what to write."""
    text = text.strip()
    if text.startswith("@every"):
        if timezone:
            raise ValueError("an interval has no timezone; leave it out")
        return Every(_interval(text.removeprefix("@every").strip()))
    zone = _zone(timezone)
    if text.startswith("@") and text not in MACROS:
        raise ValueError(f"{text!r} is unknown; use one of {', '.join(MACROS)}, or @every 10s")
    fields = MACROS.get(text, text).split()
    if len(fields) != len(FIELDS):
        raise ValueError(
            f"{text!r} has {len(fields)} fields; it takes six: {', '.join(FIELDS)}; 0 0 2 * * * is 02:00 every day"
        )
    allowed = tuple(_field(n, field) for n, field in enumerate(fields))
    made = Cron(allowed, fields[3][:1] in ("*", "?"), fields[5][:1] in ("*", "?"), zone)
    if made.after(datetime(2024, 1, 1, tzinfo=UTC)) is None:
        raise ValueError(f"{text!r} is never due: there is no such day")
    return made


def _interval(text: str) -> int:
    found = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", text)
    seconds = sum(int(n or 0) * unit for n, unit in zip(found.groups(), _UNITS.values(), strict=True)) if found else 0
    if not text or seconds < 1:
        raise ValueError(f"@every takes a duration of at least a second, e.g. @every 10s or @every 1h30m, not {text!r}")
    return seconds


def _zone(name: str) -> tzinfo:
    from zoneinfo import ZoneInfo

    if not name:
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"timezone {name!r} is not known on this machine; use a name such as Europe/Berlin") from None


def _field(n: int, text: str) -> frozenset[int]:
    values: set[int] = set()
    for item in text.split(","):
        values.update(_item(n, item))
    return frozenset(values)


def _item(n: int, item: str) -> range:
    low, high = _RANGES[n]
    span, slash, step = item.partition("/")
    if slash and (not re.fullmatch(r"\d{1,3}", step) or int(step) == 0):
        raise ValueError(f"the {FIELDS[n]} {item!r} has no step after the slash, such as 5")
    if span in ("*", "?"):
        first, last = low, high
    else:
        begin, dash, end = span.partition("-")
        first = _number(n, begin, item)
        last = _number(n, end, item) if dash else (high if slash else first)
    if first > last:
        raise ValueError(f"the {FIELDS[n]} {item!r} goes backwards")
    return range(first, last + 1, int(step) if slash else 1)


def _number(n: int, text: str, item: str) -> int:
    low, high = _RANGES[n]
    value = _NAMES.get(n, {}).get(text.lower())
    if value is None and re.fullmatch(r"\d{1,2}", text):
        value = int(text)
    if value is None or not low <= value <= high:
        raise ValueError(f"the {FIELDS[n]} {item!r} must be {low} to {high}, *, a range or a list of these")
    return value
