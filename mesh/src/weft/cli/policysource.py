"""Where the commands about policies get them from: a folder, the mesh, or a stored version; and the tools they name."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from weft.cli.operate import as_operator
from weft_protocols.errors import InvalidConfig, WeftError

if TYPE_CHECKING:
    from weft.core.broker import Broker
    from weft.policy.arguments import Kind
    from weft.policy.bundle import Bundle
    from weft.policy.catalog import Catalog
    from weft.policy.model import Request

T = TypeVar("T")
NAME: Final = "mesh policy"
FOLDER: Final = "policies"
"""Where a project's policy is, unless another folder is named."""
DEFINITIONS: Final = ("tools.json", "tools.yaml")
"""Definitions of tools beside a policy, so that it can be checked without a mesh."""


def with_mesh(work: Callable[[Broker], Awaitable[T]]) -> T:
    """Run `work` with a connection of the operator."""
    return as_operator(work, name=NAME)


def read_folder(folder: str) -> Bundle:
    """The policy in a folder. Raises InvalidConfig if there is none or it cannot be read."""
    from weft.client import policyload

    return policyload.read_folder(folder)


@dataclass(frozen=True, slots=True)
class Tools:
    """The definitions that a policy is checked against."""

    catalog: Catalog | None
    """None if they are not known."""
    source: str
    """Where they are from, for people; or why they are not known."""
    agents: frozenset[str] | None = None
    """Agents of the mesh, where it was asked."""


def tools(folder: str, file: str) -> Tools:
    """The file that was named, else one in the policy's folder, else what is registered on the mesh."""
    from weft.policy.catalog import Catalog

    beside = [str(Path(folder) / name) for name in DEFINITIONS if (Path(folder) / name).is_file()] if folder else []
    named = file or next(iter(beside), "")
    if named:
        import yaml

        try:
            # JSON is YAML as well.
            return Tools(Catalog.read(yaml.safe_load(Path(named).read_text(encoding="utf-8"))), named)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InvalidConfig(f"{named} cannot be read as definitions of tools: {error}") from None
    from weft.client.policies import known_agents, registered

    async def ask(broker: Broker) -> Tools:
        return Tools(await registered(broker), "the mesh", await known_agents(broker))

    try:
        return with_mesh(ask)
    except WeftError as error:
        return Tools(None, f"the mesh cannot be asked: {error}")


def bundle_of(spec: str) -> Bundle:
    """What `diff` compares: a folder, `active`, or the number of a version."""
    if spec.isdigit() or spec == "active":
        return with_mesh(lambda broker: stored(broker, 0 if spec == "active" else int(spec)))[1]
    return read_folder(spec)


async def stored(broker: Broker, number: int) -> tuple[int, Bundle]:
    """A version, or with 0 the active one. Raises PolicyNotFound."""
    from weft.client.policies import PolicyStore
    from weft_protocols.errors import PolicyNotFound

    store = PolicyStore(broker)
    number = number or (await store.pointer()).version
    if not number:
        raise PolicyNotFound("no policy is loaded, so that nothing is allowed; `mesh policy load DIR` loads one")
    return number, (await store.version(number)).bundle


async def hint(broker: Broker, server: str) -> str:
    """What to do so that the tools of a server can be called; empty where somebody may call one of them."""
    from weft.client.policies import PolicyStore, known_agents, registered
    from weft.policy.bundle import running
    from weft.policy.model import Request

    store = PolicyStore(broker)
    number = (await store.pointer()).version
    if await store.mode() != "enforce":
        return ""
    if not number:
        return "no policy is loaded, so that nobody may call them; next: mesh policy init --load"
    catalog = await registered(broker)
    try:
        engine = running((await store.version(number)).bundle, catalog, version=number)
    except InvalidConfig as error:
        return f"nobody may call them: policy version {number} cannot be used: {error}"
    tools = [one.name for one in catalog.tools.values() if one.server == server]
    agents = await known_agents(broker)
    if any(engine.visible(Request(agent, "call", server, name)) for name in tools for agent in agents):
        return ""
    return f"policy version {number} permits nobody to call them; next: write a rule, then mesh policy load"


class Argument(click.ParamType):  # type: ignore[type-arg]
    """An argument of a tool, `name=value`."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Name and text; click's error if it is none."""
        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        if not name or not equals:
            self.fail(f"{value!r} is no argument; write name=value", param, ctx)
        return name, text


def arguments(given: tuple[tuple[str, str], ...], kinds: Mapping[str, tuple[Kind, bool]]) -> dict[str, Any]:
    """Arguments from the command line: what a tool declares as text stays text, anything else is read as JSON."""
    made: dict[str, Any] = {}
    for name, text in given:
        made[name] = text
        if name not in kinds or kinds[name][0].name != "String":
            try:
                made[name] = json.loads(text)
            except ValueError:
                continue
    return made


def request(asked: Mapping[str, Any], given: tuple[tuple[str, str], ...], catalog: Catalog) -> Request:
    """A request as the commands take it; see `weft.policy.cases.request_of`."""
    from dataclasses import replace

    from weft.policy.cases import request_of

    try:
        made = request_of({key: value for key, value in asked.items() if value not in ("", None, ())})
    except ValueError as error:
        raise click.UsageError(str(error).removeprefix("request: ")) from None
    offer = catalog.offer(made.action, made.resource)
    return replace(made, arguments=arguments(given, offer.arguments.fields if offer is not None else {}))
