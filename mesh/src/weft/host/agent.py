"""What a developer writes: an agent and its skills. Importing this imports neither broker nor protocol code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from weft.host.signature import Signature
from weft_protocols import subjects
from weft_protocols.errors import InvalidConfig, InvalidParams

if TYPE_CHECKING:
    from weft.client.mesh import Mesh

Handler = Callable[..., Any]
H = TypeVar("H", bound=Handler)


@dataclass(frozen=True, slots=True)
class Skill:
    """One thing an agent can do."""

    id: str
    handler: Handler
    name: str
    description: str
    tags: tuple[str, ...]
    examples: tuple[str, ...]
    answer: Literal["task", "message"]
    """`message`: the skill answers with one message and nothing else, no task events before it."""
    signature: Signature = field(repr=False)


class Agent:
    """An agent: a name, a version, skills.

    Args:
        name: 1 to 64 of `A-Z a-z 0-9 _ -`; also its account at the broker.
        version: of the code; claims and events carry it.
        description: for people and for other agents.
        concurrency: tasks one replica works on at a time. Waiting for a child, an answer or a timer does not count.
        attempts: how often a task may be started before it is failed and leaves a dead letter.
        suspend_after: seconds a question may wait before the task leaves memory until it is answered.
        cancel_grace: seconds a cancelled handler has for cleaning up before the task is ended without it.

    Raises:
        InvalidName, InvalidConfig: an argument is out of range.
    """

    def __init__(
        self,
        name: str,
        *,
        version: str = "0.1.0",
        description: str = "",
        concurrency: int = 100,
        attempts: int = 3,
        suspend_after: float = 30.0,
        cancel_grace: float = 10.0,
    ) -> None:
        self.name = subjects.check_name(name)
        subjects.check_token(version.replace(".", "_").replace("+", "_"), f"version of agent {name}")
        self.version = version
        self.description = description
        self.concurrency = _at_least(1, concurrency, f"concurrency of agent {name}")
        self.attempts = _at_least(1, attempts, f"attempts of agent {name}")
        self.suspend_after = _at_least(0.0, suspend_after, f"suspend_after of agent {name}")
        self.cancel_grace = _at_least(0.0, cancel_grace, f"cancel_grace of agent {name}")
        self.skills: dict[str, Skill] = {}
        self.on_start: list[Callable[[Mesh], Any]] = []

    def skill(
        self,
        id: str | None = None,
        *,
        name: str = "",
        description: str = "",
        tags: Sequence[str] = (),
        examples: Sequence[str] = (),
        answer: Literal["task", "message"] = "task",
    ) -> Callable[[H], H]:
        """Register a function as a skill. Its signature is its input schema.

        A parameter annotated `Task` gets the task. One other parameter annotated `str` gets the message's text,
        one annotated with a pydantic model or dataclass the whole input; otherwise the fields of the message's
        data part become the arguments. Wrong input is rejected before the function runs.
        """

        def register(handler: H) -> H:
            skill_id = subjects.check_token(id or str(getattr(handler, "__name__", "")), "skill id")
            if skill_id in self.skills:
                raise InvalidConfig(f"agent {self.name} has a skill {skill_id!r} already; give this one another id")
            doc = (handler.__doc__ or "").strip().partition("\n")[0]
            self.skills[skill_id] = Skill(
                id=skill_id,
                handler=handler,
                name=name or skill_id,
                description=description or doc or self.description,
                tags=tuple(tags),
                examples=tuple(examples),
                answer=answer,
                signature=Signature.of(handler, where=f"skill {skill_id} of agent {self.name}"),
            )
            return handler

        return register

    def choose(self, skill_id: str | None) -> Skill:
        """The skill a message asks for; the only or first one where it names none.

        Raises:
            InvalidParams: no such skill; the message lists those there are.
        """
        if not self.skills:
            raise InvalidParams(f"agent {self.name} has no skills")
        if skill_id is None:
            return next(iter(self.skills.values()))
        skill = self.skills.get(skill_id)
        if skill is None:
            raise InvalidParams(f"agent {self.name} has no skill {skill_id!r}; it has {', '.join(self.skills)}")
        return skill

    def describe(self) -> dict[str, Any]:
        """The agent as the registry keeps it: JSON with its skills and their input schemas."""
        return {
            "agent": self.name,
            "version": self.version,
            "description": self.description,
            "skills": [
                {
                    "id": skill.id,
                    "name": skill.name,
                    "description": skill.description,
                    "tags": list(skill.tags),
                    "examples": list(skill.examples),
                    "schema": skill.signature.schema(),
                }
                for skill in self.skills.values()
            ],
        }

    def __repr__(self) -> str:
        return f"<Agent {self.name} {self.version}: {', '.join(self.skills) or 'no skills'}>"


N = TypeVar("N", int, float)


def _at_least(low: N, value: N, what: str) -> N:
    if value < low:
        raise InvalidConfig(f"{what} is {value}; it must be at least {low}")
    return value
