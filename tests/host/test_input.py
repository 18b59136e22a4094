"""How a message becomes the arguments of a handler, and what comes back where it does not fit."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pydantic
import pytest

import weft
from weft.testing.agents import running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft_protocols.errors import InvalidConfig, InvalidParams

Unique = Callable[[str], str]


class Order(pydantic.BaseModel):
    item: str
    count: int = pydantic.Field(ge=1)
    tags: list[str] = []


@dataclass
class Place:
    street: str
    number: int
    extras: list[str] = field(default_factory=list)


def every_form(name: str) -> weft.Agent:
    agent = weft.Agent(name)

    @agent.skill()
    async def nothing() -> str:
        return "ran"

    @agent.skill()
    async def whole_task(task: weft.Task) -> str:
        return f"{task.text}|{task.data}|{len(task.files)}"

    @agent.skill()
    async def named_task(task) -> str:  # type: ignore[no-untyped-def]
        return str(task.text)

    @agent.skill()
    async def text(words: str) -> str:
        return words.upper()

    @agent.skill()
    async def optional_text(words: str = "nobody said anything") -> str:
        return words

    @agent.skill()
    async def several(task: weft.Task, name: str, size: int, ratio: float = 0.5, deep: bool = False) -> dict[str, Any]:
        return {"name": name, "size": size, "ratio": ratio, "deep": deep, "caller": task.caller}

    @agent.skill()
    async def model(order: Order) -> str:
        return f"{type(order).__name__} {order.item} {order.count} {order.tags}"

    @agent.skill()
    async def data_class(place: Place) -> str:
        return f"{type(place).__name__} {place.street} {place.number} {place.extras}"

    @agent.skill()
    def in_a_thread(words: str) -> str:
        import threading

        assert threading.current_thread() is not threading.main_thread()
        return f"thread: {words}"

    return agent


@pytest.mark.parametrize(
    ("skill", "message", "said"),
    [
        ("nothing", "whatever", "ran"),
        ("nothing", {"a": 1}, "ran"),
        ("whole_task", "hello", "hello|None|0"),
        ("whole_task", {"a": 1}, "|{'a': 1}|0"),
        ("named_task", "hello", "hello"),
        ("text", "quiet", "QUIET"),
        ("text", [weft.Text("two"), weft.Text("lines")], "TWO\nLINES"),
        ("optional_text", {"no": "text"}, "nobody said anything"),
        ("optional_text", "something", "something"),
        ("model", {"item": "tea", "count": 2}, "Order tea 2 []"),
        ("model", '{"item": "tea", "count": 2, "tags": ["hot"]}', "Order tea 2 ['hot']"),
        ("data_class", {"street": "High", "number": 7}, "Place High 7 []"),
        ("in_a_thread", "work", "thread: work"),
    ],
)
async def test_a_handler_gets_its_input_in_the_form_its_signature_asks_for(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, skill: str, message: Any, said: str
) -> None:
    agent = every_form(unique("forms"))
    async with running(mesh, agent):
        view = await caller.send(agent.name, message, skill=skill)
    assert (view.state, view.text) == (weft.State.COMPLETED, said)


async def test_fields_of_the_data_part_become_arguments_and_defaults_fill_the_rest(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = every_form(unique("fields"))
    async with running(mesh, agent):
        view = await caller.send(agent.name, {"name": "x", "size": "3"}, skill="several")
    assert view.data == {"name": "x", "size": 3, "ratio": 0.5, "deep": False, "caller": "local"}


@pytest.mark.parametrize(
    ("skill", "message", "fields"),
    [
        ("several", {"name": "x"}, {"size"}),
        ("several", {"name": "x", "size": "many"}, {"size"}),
        ("several", {"name": "x", "size": 1, "sizes": 2}, {"sizes"}),
        ("several", "only words", {"name", "size", "ratio", "deep"}),
        ("several", [1, 2], {"input"}),
        ("model", {"item": "tea", "count": 0}, {"count"}),
        ("model", {"count": 1, "tags": [1]}, {"item", "tags.0"}),
        ("data_class", {"street": "High", "number": "seven"}, {"number"}),
        ("text", {"no": "text"}, {"words"}),
    ],
)
async def test_wrong_input_is_rejected_with_each_field_named_and_no_other_attempt(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, skill: str, message: Any, fields: set[str]
) -> None:
    """Fails if the handler runs on input it was not made for, or the sender cannot tell which field is wrong."""
    agent = every_form(unique("wrong"))
    async with running(mesh, agent), await caller.submit(agent.name, message, skill=skill) as handle:
        with pytest.raises(InvalidParams) as refused:
            await handle.result()
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    assert {violation.field for violation in refused.value.violations} == fields
    assert all(name.split(".")[0] in str(refused.value) for name in fields if name != "input")
    assert stored.states == ["rejected"]
    assert [claim.attempt for _, claim in stored.claims] == [1]


async def test_an_unknown_skill_is_rejected_with_the_skills_there_are(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = every_form(unique("skills"))
    async with running(mesh, agent):
        with pytest.raises(InvalidParams, match=r"no skill 'sing'; it has nothing, whole_task, .*in_a_thread"):
            await caller.send(agent.name, "la", skill="sing")


async def test_without_a_skill_named_the_first_one_runs(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("first"))

    @agent.skill()
    async def one() -> str:
        return "one"

    @agent.skill()
    async def two() -> str:
        return "two"

    async with running(mesh, agent):
        assert (await caller.send(agent.name, "")).text == "one"


def test_the_description_of_an_agent_has_the_schema_of_every_skill(unique: Unique) -> None:
    described = every_form(unique("described")).describe()
    schemas = {skill["id"]: skill["schema"] for skill in described["skills"]}
    assert schemas["nothing"] == schemas["whole_task"] == {}
    assert schemas["text"] == {"type": "string", "title": "words"}
    assert schemas["model"]["properties"]["count"]["minimum"] == 1
    assert set(schemas["data_class"]["required"]) == {"street", "number"}
    assert schemas["several"]["properties"]["ratio"]["default"] == 0.5
    assert schemas["several"]["additionalProperties"] is False
    assert "task" not in schemas["several"]["properties"]


def test_a_parameter_that_json_has_no_form_for_is_named_when_the_agent_is_described(unique: Unique) -> None:
    agent = weft.Agent(unique("opaque"))

    class Opaque: ...

    async def work(thing: Opaque, name: str) -> None: ...

    agent.skill()(work)
    with pytest.raises(InvalidConfig, match=rf"skill work of agent {agent.name}: a parameter has no form in JSON"):
        agent.describe()


@pytest.mark.parametrize(
    "form", ["var-positional", "var-keyword", "positional-only", "unresolvable", "generator", "async-generator"]
)
def test_a_handler_that_cannot_be_called_by_name_is_refused_when_it_is_registered(form: str, unique: Unique) -> None:
    agent = weft.Agent(unique("refused"))

    async def positional(*words: str) -> None: ...
    async def keyword(**words: str) -> None: ...
    async def only(words: str, /) -> None: ...
    async def unresolvable(words: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    def generator(words: str) -> Iterator[str]:
        yield words

    async def async_generator(words: str) -> AsyncIterator[str]:
        yield words

    handlers: dict[str, Callable[..., Any]] = {
        "var-positional": positional,
        "var-keyword": keyword,
        "positional-only": only,
        "unresolvable": unresolvable,
        "generator": generator,
        "async-generator": async_generator,
    }
    with pytest.raises(InvalidConfig, match=f"skill taken of agent {agent.name}"):
        agent.skill("taken")(handlers[form])
