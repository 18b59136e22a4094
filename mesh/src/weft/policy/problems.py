"""What is wrong with a policy, where, and what to do; and names that are nearly right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import yaml

from weft_protocols.errors import InvalidConfig

SHOWN = 8
"""Names listed in a message at most."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake."""

    file: str
    line: int
    """From 1; 0 where it is about the whole file."""
    message: str
    policy: str = ""
    """Id of the rule."""
    warning: bool = False
    """Whether the policy can be used nevertheless."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {'warning: ' if self.warning else ''}{self.message}"


class InvalidPolicy(InvalidConfig):
    """A policy that is not used, with everything that is wrong with it."""

    exit_code = 3

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(one) for one in problems))
        self.problems = tuple(problems)


def not_yaml(file: str, error: yaml.YAMLError) -> Problem:
    """The problem of a file that cannot be read."""
    mark = getattr(error, "problem_mark", None)
    return Problem(file, mark.line + 1 if mark else 0, f"is not YAML: {getattr(error, 'problem', None) or error}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?`, else what there is."""
    names = sorted(set(known))
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"; there are: {', '.join(names[:SHOWN])}{more}"
