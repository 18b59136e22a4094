"""What a developer writes: an agent and its skills. Importing this imports neither broker nor protocol code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from weft.host.breaker import BREAKER, BreakerPolicy
from weft.host.chain import HOPS, MOST_HOPS
from weft.host.retry import RetryPolicy
from weft.host.signature import Signature
from weft_protocols import subjects
from weft_protocols.errors import ExtensionSupportRequired, InvalidConfig, InvalidParams

if TYPE_CHECKING:
    from weft.client.mesh import Mesh
    from weft.host.turns import Turn, Turns
    from weft_protocols.cards import AgentCard

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
        attempts: how often a task may be started before it is failed and leaves a dead letter; 3 by default.
        retry: the same with the pauses between the attempts, and errors that end a task at once.
        suspend_after: seconds a task may only wait, for answers, timers or children, before it leaves memory until
            what it waits for has happened.
        progress_within: seconds within which a task in work must write an event, or begin or finish a step; later
            the coordinator opens an incident. Waiting for a child, an answer, a timer or a lock does not count.
        cancel_grace: seconds a cancelled handler has for cleaning up before the task is ended without it.
        breaker: when a replica of this agent stops calling another one whose tasks fail; None is never.
        shed: whether a task is failed at once where even a quick run of its skill, as far as this replica has seen
            at least 20, would not be done by its deadline.
        rollback_timeout: seconds for undoing what a task did (`Task.on_rollback`) before it ends without.
        weight: how much of what is delegated by skill it gets, against other agents with that skill; 0 is none.
        cost: what a task costs here, against those agents: with 1 it gets half as much as with 0, with 3 a quarter.
        max_hops: delegations from the root of a chain to a task of this agent, and to those it delegates; up to 30.
        reentrant: whether a task of this agent may, further down its chain, delegate to this agent again.
        ordering: `context`: the tasks of a context are worked on strictly one after the other, in the order in which
            they were accepted, whatever replica works on them; it takes a coordinator. None: side by side.
        card: an A2A agent card or part of one, as its message or as ProtoJSON: provider, modes, security, extensions…
            What it sets wins over what is declared here; where it lists skills, only those are shown.
        extended_card: what callers who ask for the extended card see over the card: the same form, skills are added.

    Raises:
        InvalidName, InvalidConfig: an argument is out of range.
    """

    def __init__(  # noqa: PLR0913 - the settings of an agent, each with its default
        self,
        name: str,
        *,
        version: str = "0.1.0",
        description: str = "",
        concurrency: int = 100,
        attempts: int | None = None,
        retry: RetryPolicy | None = None,
        suspend_after: float = 30.0,
        cancel_grace: float = 10.0,
        weight: float = 1.0,
        cost: float = 0.0,
        breaker: BreakerPolicy | None = BREAKER,
        shed: bool = True,
        rollback_timeout: float = 60.0,
        max_hops: int = HOPS,
        reentrant: bool = False,
        ordering: Literal["context"] | None = None,
        progress_within: float = 600.0,
        card: Mapping[str, Any] | AgentCard | None = None,
        extended_card: Mapping[str, Any] | AgentCard | None = None,
    ) -> None:
        self.name = subjects.check_name(name)
        subjects.check_token(version.replace(".", "_").replace("+", "_"), f"version of agent {name}")
        self.version = version
        self.description = description
        self.concurrency = _at_least(1, concurrency, f"concurrency of agent {name}")
        self.retry = _retry(name, attempts, retry)
        self.suspend_after = _at_least(0.0, suspend_after, f"suspend_after of agent {name}")
        self.progress_within = _at_least(0.1, progress_within, f"progress_within of agent {name}")
        self.cancel_grace = _at_least(0.0, cancel_grace, f"cancel_grace of agent {name}")
        self.breaker = breaker
        self.shed = shed
        self.rollback_timeout = _at_least(0.0, rollback_timeout, f"rollback_timeout of agent {name}")
        self.weight = _at_least(0.0, weight, f"weight of agent {name}")
        self.cost = _at_least(0.0, cost, f"cost of agent {name}")
        self.max_hops = _at_least(1, max_hops, f"max_hops of agent {name}")
        if max_hops > MOST_HOPS:
            raise InvalidConfig(f"max_hops of agent {name} is {max_hops}; a message has room for {MOST_HOPS}")
        self.reentrant = reentrant
        if ordering not in ("context", None):
            raise InvalidConfig(f"ordering of agent {name} is {ordering!r}; it must be 'context' or None")
        self.ordering = ordering
        self.card = card
        self.extended_card = extended_card
        self.skills: dict[str, Skill] = {}
        self.turns: Turns | None = None
        """How it answers messages itself, in place of skills."""
        self.on_start: list[Callable[[Mesh], Any]] = []
        self.services: list[Callable[[], Coroutine[Any, Any, None]]] = []
        """What its process runs beside its replica, as long as it serves."""

    @property
    def attempts(self) -> int:
        """How often a task may be started."""
        return self.retry.attempts

    @attempts.setter
    def attempts(self, value: int) -> None:
        self.retry = replace(self.retry, attempts=value)

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

    def on_turn(
        self,
        handler: Callable[[Turn], Awaitable[None]],
        *,
        cancel: Callable[[Turn], Awaitable[None]] | None = None,
        retry: bool = False,
        source: str = "",
    ) -> Callable[[Turn], Awaitable[None]]:
        """Have `handler` answer every message with A2A events of its own; skills are then only described.

        It is called once for the message that creates a task, and once for each follow-up. When it returns, the task
        must have ended or wait in an interrupted state, else it fails.

        Args:
            handler: gets a `Turn`.
            cancel: gets the turn of a task that is cancelled, within `cancel_grace`. What it emits counts; where the
                task has not ended after it, the handler is stopped and the task ends as canceled.
            retry: whether a turn that raised is tried again up to `attempts`; else the task fails at once. `Fail`,
                `Reject` and A2A errors always end it.
            source: file with the agent's code, where that is not the handler's.
        """
        from weft.host.turns import Turns

        code = getattr(handler, "__code__", None)
        self.turns = Turns(handler, cancel, retry=retry, source=source or (code.co_filename if code else ""))
        return handler

    @cached_property
    def required_extensions(self) -> frozenset[str]:
        """URIs a message must name in `A2A-Extensions`, or it is rejected: those its card requires."""
        if self.card is None:
            return frozenset()
        from weft_protocols.cards import parse_card

        card = parse_card(self.card, what=f"the card of agent {self.name}")
        return frozenset(extension.uri for extension in card.capabilities.extensions if extension.required)

    def replace_card(self, card: AgentCard) -> None:
        """Show another card, with its version and description, from now on."""
        self.version, self.description, self.card = card.version, card.description, card
        self.__dict__.pop("required_extensions", None)

    def check_extensions(self, requested: str) -> None:
        """Check the `A2A-Extensions` of a message.

        Raises:
            ExtensionSupportRequired: it lacks one that the card requires; the message lists them.
        """
        if self.required_extensions:
            missing = self.required_extensions.difference(uri.strip() for uri in requested.split(","))
            if missing:
                raise ExtensionSupportRequired(
                    f"agent {self.name} requires the extension {', '.join(sorted(missing))}; name it in A2A-Extensions",
                    metadata={"extensions": ",".join(sorted(missing))},
                )

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
        """The agent as the registry keeps it: JSON with its skills, their input schemas and its core card.

        Raises InvalidConfig for an input without a schema, and for a card that is not valid.
        """
        told: dict[str, Any] = {
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
        return {**told, **self._cards(told["skills"])}

    def _cards(self, skills: list[dict[str, Any]]) -> dict[str, Any]:
        from weft_protocols import cards

        core = cards.core_card(
            self.name,
            version=self.version,
            description=self.description,
            skills=skills,
            extra=self.card,
            extended=self.extended_card is not None,
        )
        told = {"card": cards.card_json(core), "card_digest": cards.digest(core)}
        if self.extended_card is not None:
            told["extended_card"] = cards.card_json(cards.extended_card(core, self.extended_card))
        return told

    def __repr__(self) -> str:
        return f"<Agent {self.name} {self.version}: {', '.join(self.skills) or 'no skills'}>"


N = TypeVar("N", int, float)


def _at_least(low: N, value: N, what: str) -> N:
    if value < low:
        raise InvalidConfig(f"{what} is {value}; it must be at least {low}")
    return value


def _retry(name: str, attempts: int | None, retry: RetryPolicy | None) -> RetryPolicy:
    if retry is None:
        return RetryPolicy(attempts=_at_least(1, 3 if attempts is None else attempts, f"attempts of agent {name}"))
    if attempts is not None and attempts != retry.attempts:
        raise InvalidConfig(f"agent {name} has attempts={attempts} and {retry.attempts} in its retry; give one of them")
    if retry.timeout is not None:
        raise InvalidConfig(
            f"the retry of agent {name} has a timeout: that is for steps; callers set a task's deadline"
        )
    return retry
