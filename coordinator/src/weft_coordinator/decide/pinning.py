"""Which card of an agent counts: pinned by version and digest, so that an old one cannot return by itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from weft_protocols.cards import compare_versions
from weft_protocols.errors import Conflict, InvalidParams

KEPT: Final = 8
"""Earlier cards whose content is kept, so that an operator can bring one back."""
KEPT_BYTES: Final = 128 * 1024
"""Bytes the earlier cards of one agent may have together."""
SEEN: Final = 200
"""Cards of which version and digest are remembered."""
SHORTEST: Final = 6
"""Digits by which a digest can be named."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What callers see of an agent: a card, and what goes with it."""

    version: str = ""
    digest: str = ""
    """Of the core card."""
    description: str = ""
    skills: tuple[Mapping[str, Any], ...] = ()
    """With the schemas of their input."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """The core card, ProtoJSON."""
    extended: Mapping[str, Any] | None = None
    """The extended card, ProtoJSON."""

    @staticmethod
    def of(told: Mapping[str, Any]) -> Shown:
        """What JSON says; unknown fields are ignored."""
        return Shown(
            told["version"],
            told.get("digest", ""),
            told["description"],
            tuple(told["skills"]),
            told.get("card", {}),
            told.get("extended"),
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """A card that was current at some time."""

    version: str
    digest: str
    first_seen: int
    """Unix milliseconds."""


@dataclass(frozen=True, slots=True)
class Cards:
    """The cards of one agent."""

    shown: Shown = field(default_factory=Shown)
    """The current one."""
    seen: tuple[Seen, ...] = ()
    """Every one that ever was current, the oldest first."""
    kept: tuple[Shown, ...] = ()
    """Earlier ones with their content, the last replaced first."""

    @staticmethod
    def of(told: Mapping[str, Any]) -> Cards:
        """What JSON says."""
        return Cards(
            Shown.of(told),
            tuple(Seen(*one) for one in told.get("seen", ())),
            tuple(Shown.of(one) for one in told.get("kept", ())),
        )

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **dataclasses.asdict(self.shown),
            "seen": [dataclasses.astuple(one) for one in self.seen],
            "kept": [dataclasses.asdict(one) for one in self.kept],
        }

    def history(self) -> list[dict[str, Any]]:
        """Version, digest and first sight of every card that was current, the newest first, for the operator."""
        kept = {one.digest for one in (self.shown, *self.kept)}
        return [
            {**dataclasses.asdict(one), "current": one.digest == self.shown.digest, "kept": one.digest in kept}
            for one in reversed(self.seen)
        ]


def offer(cards: Cards, wanted: Shown, *, agent: str, live: Iterable[tuple[str, str]], now: int) -> Cards:
    """The cards after a replica offered its own.

    A card never seen before becomes the current one if its version is not lower. One that was replaced before, or
    with a lower version, changes nothing: the replica runs, the current card stays.

    Args:
        cards: What is stored.
        wanted: The replica's card.
        agent: Its name, for the error.
        live: Version and card digest of the other live replicas.
        now: Unix milliseconds.

    Raises:
        Conflict: a live replica of the same version has another card.
    """
    others = list(live)
    current = cards.shown
    if wanted.digest == current.digest:
        # Its extended card may have changed; one of several replicas alone cannot change it.
        alone = all(digest != wanted.digest for _, digest in others)
        return dataclasses.replace(cards, shown=wanted) if alone else cards
    if current.digest and not comes_after(cards, wanted):
        return cards
    twin = next((d for v, d in others if d and d != wanted.digest and compare_versions(v, wanted.version) == 0), None)
    if twin is not None:
        raise Conflict(
            f"agent {agent} {wanted.version} is running with another card already: digest {twin[:12]}, this one "
            f"{wanted.digest[:12]}. Give the new card another version, or stop the old replicas first"
        )
    seen = (*cards.seen, Seen(wanted.version, wanted.digest, now))[-SEEN:]
    earlier = (current, *cards.kept) if current.digest else cards.kept
    return Cards(wanted, seen, _keep(earlier))


def comes_after(cards: Cards, wanted: Shown) -> bool:
    """Whether a card may replace the current one: never seen before, and not of a lower version."""
    known = any(one.digest == wanted.digest for one in cards.seen)
    return not known and compare_versions(wanted.version, cards.shown.version) >= 0


def pin(cards: Cards, what: str, *, agent: str) -> Cards:
    """The cards with an earlier one made the current one, named by version or by the beginning of its digest.

    Raises:
        InvalidParams: there is no such card, it is not the only one, or its content is not kept any more.
    """
    known = (cards.shown, *cards.kept)
    found = [one for one in known if one.version == what] or [one for one in known if _named(one.digest, what)]
    if len(found) == 1:
        chosen = found[0]
        if chosen.digest == cards.shown.digest:
            return cards
        rest = (cards.shown, *(one for one in cards.kept if one.digest != chosen.digest))
        return dataclasses.replace(cards, shown=chosen, kept=_keep(rest))
    there = ", ".join(f"{one.version} ({one.digest[:12]})" for one in (found or known))
    if found:
        raise InvalidParams(f"agent {agent} had several cards {what}; name one by its digest: {there}")
    if any(one.version == what or _named(one.digest, what) for one in cards.seen):
        raise InvalidParams(f"card {what} of agent {agent} is not kept any more; those that are: {there}")
    raise InvalidParams(f"agent {agent} never had a card {what}; those that can be pinned: {there}")


def _named(digest: str, what: str) -> bool:
    return len(what) >= SHORTEST and digest.startswith(what.lower())


def _keep(earlier: Iterable[Shown]) -> tuple[Shown, ...]:
    """As many of the earlier cards, the last replaced first, as there is room for."""
    made: list[Shown] = []
    room = KEPT_BYTES
    for one in earlier:
        room -= len(json.dumps(dataclasses.asdict(one)))
        if len(made) == KEPT or room < 0:
            break
        made.append(one)
    return tuple(made)
