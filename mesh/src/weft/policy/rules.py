"""Rules out of files: each with its id, its place and what it obliges to. Pure but for Cedar's parser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from weft.policy import cedar, expressions, obligations
from weft.policy.expressions import Reads, Uid
from weft.policy.obligations import Notes
from weft.policy.problems import Problem
from weft.policy.source import Chunk, chunks


@dataclass(frozen=True, slots=True)
class Rule:
    """One permit or forbid."""

    id: str
    """`@id`, else `file:line`, with `.2` for the second in a line."""
    effect: str
    """`permit` or `forbid`."""
    chunk: Chunk
    json: Mapping[str, Any]
    """Cedar's JSON form."""
    notes: Notes
    reads: Reads

    @property
    def unconditional(self) -> bool:
        """Whether its head alone decides."""
        return not self.json["conditions"]

    def applies(self, principal: Uid, action: Uid, resource: Uid, ancestors: Mapping[str, frozenset[Uid]]) -> bool:
        """Whether its head fits; `ancestors` of `principal` and `resource`."""
        return (
            expressions.applies(self.json["action"], action)
            and expressions.applies(self.json["resource"], resource, ancestors["resource"])
            and expressions.applies(self.json["principal"], principal, ancestors["principal"])
        )


def parse(files: Mapping[str, str]) -> tuple[tuple[Rule, ...], list[Problem]]:
    """Every rule of some Cedar files, and what is wrong with them. Raises InvalidConfig without Cedar."""
    cedar.require()
    rules: dict[str, Rule] = {}
    problems: list[Problem] = []
    for file, text in sorted(files.items()):
        for chunk in chunks(file, text):
            try:
                raw = cedar.parse(chunk.text)
            except ValueError as error:
                problems.append(Problem(file, chunk.line_of(*_quoted(str(error))), f"{error}"))
                continue
            rule = _rule(chunk, raw, rules, problems)
            if (other := rules.get(rule.id)) is not None:
                where = f"{other.chunk.file}:{other.chunk.line}"
                problems.append(Problem(file, chunk.line, f'there is a rule "{rule.id}" already, at {where}', rule.id))
                continue
            rules[rule.id] = rule
    return tuple(rules.values()), problems


def _rule(chunk: Chunk, raw: Mapping[str, Any], known: Mapping[str, Rule], problems: list[Problem]) -> Rule:
    annotations = raw["annotations"]
    name = (annotations.get("id") or "").strip()
    if not name:
        place = f"{chunk.file}:{chunk.line}"
        name = next(one for n in count(1) if (one := place if n == 1 else f"{place}.{n}") not in known)
    notes, wrong = obligations.read(name, raw["effect"], annotations)
    problems += [Problem(chunk.file, chunk.line_of(f"@{word}"), what, name) for word, what in wrong]
    return Rule(name, raw["effect"], chunk, raw, notes, expressions.reads(raw))


def _quoted(message: str) -> list[str]:
    """Words that a message of Cedar's parser names."""
    found = [part for i, part in enumerate(message.split("`")) if i % 2]
    _, colon, last = message.rpartition(": ")
    return [*found, last] if colon else found
