"""Configuration, read once at the edge into frozen objects: how to reach the broker, and `mesh.yaml`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weft.core.approversconf import read_approvers
from weft.core.coordconf import CoordinatorConfig, read_coordinator
from weft.core.gatewayconf import GatewayConfig, read_gateway
from weft.core.home import HOME_NAME, MEMBERS, Accounts, BrokerRecord, Home
from weft.core.policyconf import PolicyConfig, read_policy
from weft.core.retentionconf import Retention, read_retention
from weft.core.scheduleconf import ScheduleConfig, read_schedules
from weft.core.toolsconf import SidecarConfig, ToolServer, read_sidecar, read_tools
from weft.core.watchconf import AlertTarget, WatchConfig, read_alerts, read_watchdog
from weft.core.yamlfields import YamlReader, integer, is_null, seconds, size
from weft.core.yamlfields import did_you_mean as did_you_mean
from weft_protocols.errors import InvalidConfig, InvalidName, NotAuthenticated, Unavailable
from weft_protocols.resources import DURABILITY
from weft_protocols.subjects import check_name, check_token

if TYPE_CHECKING:
    import yaml

DEFAULT_IDENTITY: Final = "local"
"""Caller name of whoever uses a mesh on a laptop without saying who they are."""
CONFIG_NAME: Final = "mesh.yaml"


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """Where the broker is and as whom to connect."""

    url: str
    """One address, or several of one cluster separated by commas."""
    identity: str
    """Name of the account: an agent, a caller, or a member of the mesh such as `coordinator`."""
    seed_file: Path | None = None
    home: Path | None = None
    """The mesh's home directory, where it is on this machine."""

    @property
    def inbox_prefix(self) -> str:
        """First token of all reply subjects of this identity."""
        return f"_INBOX_{self.identity}"


def find_home(start: Path | None = None) -> Path:
    """The home directory of the mesh here: `WEFT_HOME`, else `.weft` in `start` or the nearest folder above.

    Raises Unavailable when there is none.
    """
    named = os.environ.get("WEFT_HOME")
    if named:
        home = Path(named).expanduser().absolute()
        if not home.is_dir():
            raise Unavailable(f"WEFT_HOME is {home}, which is not a directory; run `mesh up`, or correct WEFT_HOME")
        return home
    start = (start or Path.cwd()).absolute()
    for folder in (start, *start.parents):
        if (folder / HOME_NAME).is_dir():
            return folder / HOME_NAME
    raise Unavailable(
        f"no mesh in {start} or above it: run `mesh up` in the project folder, "
        "or set WEFT_HOME, or WEFT_URL and WEFT_SEED_FILE for a mesh elsewhere"
    )


def load_settings(identity: str | None = None, *, home: Path | None = None) -> ConnectionSettings:
    """How `identity` (default: `WEFT_IDENTITY`, else `local`) connects.

    `home` wins over the environment. Else `WEFT_URL` with `WEFT_SEED_FILE` is a mesh elsewhere; either alone
    replaces that part of what the home directory says.

    Raises:
        Unavailable: there is no mesh here, or it is not running.
        NotAuthenticated: the mesh knows no such identity; the message lists those it knows.
        InvalidConfig: the environment is contradictory, or a file is damaged.
    """
    identity = identity or os.environ.get("WEFT_IDENTITY") or DEFAULT_IDENTITY
    check_token(identity, "identity")
    url = seed_file = None
    if home is None:
        url = os.environ.get("WEFT_URL") or None
        seed_file = Path(given).expanduser() if (given := os.environ.get("WEFT_SEED_FILE")) else None
        if url and seed_file:
            return ConnectionSettings(url, identity, seed_file, _home_or_none())
        try:
            home = find_home()
        except Unavailable:
            if url:
                raise InvalidConfig(
                    "WEFT_URL is set but WEFT_SEED_FILE is not, and there is no mesh here with keys: "
                    "set WEFT_SEED_FILE to the file with the identity's seed"
                ) from None
            raise
    paths = Home(home.absolute())
    if seed_file is None:
        seed_file = _known_seed(paths, identity)
    return ConnectionSettings(url or _running_url(paths), identity, seed_file, paths.root)


def _home_or_none() -> Path | None:
    try:
        return find_home()
    except Unavailable:
        return None


def _running_url(home: Home) -> str:
    record = BrokerRecord.read(home)
    if record is None or not record.alive:
        raise Unavailable(f"the mesh in {home.root.parent} is not running; start it with `mesh up`")
    return record.url


def _known_seed(home: Home, identity: str) -> Path:
    names = Accounts.read(home).names
    if identity in names:
        return home.seed(identity)
    if not names:
        raise Unavailable(f"the mesh in {home.root.parent} was never started; start it with `mesh up`")
    shown = sorted(name for name in names if name not in MEMBERS) or sorted(names)
    raise NotAuthenticated(
        f"the mesh in {home.root.parent} knows no identity {identity!r}{did_you_mean(identity, names)}; "
        f"it knows {', '.join(shown)}. Add it to `callers` or `agents` in {CONFIG_NAME} and run `mesh up`"
    )


# mesh.yaml -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """The embedded broker."""

    port: int = 0
    """TCP port on 127.0.0.1; 0 takes a free one at the first start and keeps it."""
    durability: str = "laptop"
    """Name of a profile in `weft_protocols.resources.DURABILITY`."""
    max_bytes: int = -1
    """Limit of the task stream in bytes; -1 for none of its own."""


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """One agent and how its replicas are run."""

    name: str
    run: str
    """`path/to/file.py:attribute` or `package.module:attribute`, relative to the project folder."""
    replicas: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables its processes get on top of the supervisor's."""
    grace: float = 30.0
    """Seconds a replica has to finish its tasks when it is stopped."""
    card: str = ""
    """File of an agent card, relative to the project folder: what `run` names is then an executor of the A2A SDK."""
    bridge: str = ""
    """Address of the card of an A2A agent outside of the mesh, which is this agent; then there is no `run`."""
    headers_env: Mapping[str, str] = field(default_factory=dict)
    """Of a bridge: headers of its requests, and the environment variable that holds the value of each."""

    @property
    def target(self) -> tuple[str, ...]:
        """Arguments of `python -m weft.host`."""
        if self.bridge:
            headers = (f"{header}={variable}" for header, variable in self.headers_env.items())
            return ("--bridge", self.name, self.bridge, *headers)
        return (self.run, self.card, self.name) if self.card else (self.run,)


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """What `mesh.yaml` declares."""

    name: str
    folder: Path
    """The project folder: where the file is."""
    broker: BrokerConfig = BrokerConfig()
    agents: Mapping[str, AgentConfig] = field(default_factory=dict)
    callers: tuple[str, ...] = (DEFAULT_IDENTITY,)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    schedules: Mapping[str, ScheduleConfig] = field(default_factory=dict)
    retention: Retention = field(default_factory=Retention)
    watchdog: WatchConfig = field(default_factory=WatchConfig)
    alerts: tuple[AlertTarget, ...] = ()
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    tools: Mapping[str, ToolServer] = field(default_factory=dict)
    """Tool servers that stand in the file; `mesh tools add` registers others."""
    sidecar: SidecarConfig = field(default_factory=SidecarConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The rules about tools."""
    approvers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Roles of each person who may decide about approvals."""


def load_mesh_config(path: Path) -> MeshConfig:
    """Read `mesh.yaml`. Raises InvalidConfig naming file, line and field, all mistakes at once."""
    path = path.absolute()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidConfig(f"there is no {path}; `mesh init` makes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{path} cannot be read: {error}") from None
    return parse_mesh_config(text, path=path)


def own_mesh_config(connection: ConnectionSettings) -> MeshConfig | None:
    """The `mesh.yaml` of a process: `WEFT_CONFIG`, else in its mesh's project folder or the current one; None for none.

    Raises InvalidConfig.
    """
    named = os.environ.get("WEFT_CONFIG")
    folders = [*([connection.home.parent] if connection.home is not None else []), Path.cwd()]
    path = Path(named) if named else next((f / CONFIG_NAME for f in folders if (f / CONFIG_NAME).is_file()), None)
    return load_mesh_config(path) if path is not None else None


def parse_mesh_config(text: str, *, path: Path) -> MeshConfig:
    """Like `load_mesh_config` for a text; `path` is named in errors and gives the project folder."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise InvalidConfig(f"{where}: this is not YAML: {getattr(error, 'problem', None) or error}") from None
    reader = _Reader(path)
    config = reader.mesh(root)
    if reader.mistakes:
        raise InvalidConfig("\n".join(reader.mistakes))
    return config


class _Reader(YamlReader):
    """Reads `mesh.yaml`."""

    def mesh(self, root: yaml.Node | None) -> MeshConfig:
        known = (
            "name", "broker", "agents", "callers", "gateway", "coordinator", "schedules", "retention", "watchdog",
            "alerts", "tools", "sidecar", "policy", "approvers",
        )  # fmt: skip
        fields = self.mapping(root, "", known) if root is not None else {}
        folder = self.path.parent
        default = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name)[:64].strip("-") or "mesh"
        agents = self._agents(fields.get("agents"))
        callers = self._callers(fields.get("callers"), agents)
        return MeshConfig(
            name=self.value(fields, "name", default, _token),
            folder=folder,
            broker=self._broker(fields.get("broker")),
            agents=agents,
            callers=callers,
            gateway=read_gateway(self, fields.get("gateway"), folder=folder, agents=tuple(agents)),
            schedules=read_schedules(self, fields.get("schedules"), agents=tuple(agents), callers=callers),
            retention=read_retention(self, fields.get("retention")),
            watchdog=read_watchdog(self, fields.get("watchdog")),
            alerts=read_alerts(self, fields.get("alerts"), folder=folder),
            coordinator=read_coordinator(self, fields.get("coordinator")),
            tools=read_tools(self, fields.get("tools"), folder=folder),
            sidecar=read_sidecar(self, fields.get("sidecar"), folder=folder),
            policy=read_policy(self, fields.get("policy"), folder=folder),
            approvers=read_approvers(self, fields.get("approvers")),
        )

    def _broker(self, node: yaml.Node | None) -> BrokerConfig:
        if node is None:
            return BrokerConfig()
        fields = self.mapping(node, "broker", ("port", "durability", "max_bytes"))
        base = BrokerConfig()
        return BrokerConfig(
            port=self.value(fields, "broker.port", base.port, integer(0, 65535)),
            durability=self.value(fields, "broker.durability", base.durability, _durability),
            max_bytes=self.value(fields, "broker.max_bytes", base.max_bytes, size),
        )

    def _agents(self, node: yaml.Node | None) -> dict[str, AgentConfig]:
        agents: dict[str, AgentConfig] = {}
        if node is None:
            return agents
        for name, entry in self.mapping(node, "agents", None).items():
            where = f"agents.{name}"
            try:
                check_name(name, "agent name")
            except InvalidName as error:
                self.mistake(entry, "agents", str(error))
                continue
            if (twin := _same_file(name, agents)) is not None:
                self.mistake(entry, "agents", f"{name!r} and {twin!r} differ only in case; rename one")
            fields = self.mapping(entry, where, ("run", "replicas", "env", "grace", "card", "bridge", "headers_env"))
            if "bridge" in fields or "headers_env" in fields:
                self._check_bridge(fields, entry, where)
            elif "run" not in fields:
                self.mistake(entry, where, '`run` is missing; write e.g. run: "agents/analyst.py:agent"')
            agents[name] = AgentConfig(
                name,
                run=self.value(fields, f"{where}.run", "", _run),
                replicas=self.value(fields, f"{where}.replicas", 1, integer(0, 1000)),
                env=self._environment(fields.get("env"), f"{where}.env"),
                grace=self.value(fields, f"{where}.grace", 30.0, seconds),
                card=self.value(fields, f"{where}.card", "", str),
                bridge=self.value(fields, f"{where}.bridge", "", _card_url),
                headers_env=self._headers(fields.get("headers_env"), f"{where}.headers_env"),
            )
        return agents

    def _check_bridge(self, fields: Mapping[str, yaml.Node], entry: yaml.Node, where: str) -> None:
        if "bridge" not in fields:
            self.mistake(entry, where, "headers_env is for a bridge: write bridge: and the address of an agent card")
        for other in ("run", "card"):
            if other in fields:
                self.mistake(fields[other], where, f"a bridge is an agent elsewhere: it has no `{other}`")

    def _headers(self, node: yaml.Node | None, where: str) -> dict[str, str]:
        made: dict[str, str] = {}
        for name, value in self.mapping(node, where, None).items() if node is not None else ():
            variable = self.text(value, f"{where}.{name}")
            if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
                self.mistake(value, where, f"{name!r} cannot be the name of a header")
            elif variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
                # Never the text: it may be the secret itself.
                self.mistake(value, where, f"{name} must name an environment variable; the value never stands here")
            elif variable is not None:
                made[name] = variable
        return made

    def _environment(self, node: yaml.Node | None, where: str) -> dict[str, str]:
        if node is None or is_null(node):
            return {}
        made: dict[str, str] = {}
        for name, value in self.mapping(node, where, None).items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                self.mistake(value, where, f"{name!r} cannot be the name of an environment variable")
            elif (text := self.text(value, f"{where}.{name}")) is not None:
                made[name] = text
        return made

    def _callers(self, node: yaml.Node | None, agents: Mapping[str, AgentConfig]) -> tuple[str, ...]:
        import yaml

        if node is None:
            return (DEFAULT_IDENTITY,)
        if not isinstance(node, yaml.SequenceNode):
            self.mistake(node, "callers", "must be a list of names, e.g. [local]")
            return ()
        made: list[str] = []
        for entry in node.value:
            name = self.text(entry, "callers")
            if name is None:
                continue
            try:
                check_name(name, "caller name")
            except InvalidName as error:
                self.mistake(entry, "callers", str(error))
                continue
            if (twin := _same_file(name, (*agents, *made))) is not None:
                self.mistake(
                    entry,
                    "callers",
                    f"{name!r} is taken by {twin!r}: every agent and caller needs its own name",
                )
            made.append(name)
        return tuple(made)


# Readers of one value: text in, ValueError with what to do ------------------------------------------


def _durability(text: str) -> str:
    if text not in DURABILITY:
        raise ValueError(f"{text!r} is unknown{did_you_mean(text, DURABILITY)}; use one of {', '.join(DURABILITY)}")
    return text


def _run(text: str) -> str:
    target, colon, attribute = text.rpartition(":")
    if not colon or not target or not attribute.isidentifier():
        raise ValueError(f"{text!r} must name a file or module and the agent in it, e.g. agents/analyst.py:agent")
    return text


def _token(text: str) -> str:
    return check_token(text, "mesh name")


def _card_url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", text):
        raise ValueError(
            f"{text!r} must be the address of an agent card, e.g. https://host/.well-known/agent-card.json"
        )
    return text


def _same_file(name: str, taken: Iterable[str]) -> str | None:
    """The taken name whose seed file would be the same one on a file system that ignores case."""
    return next((other for other in taken if other.lower() == name.lower()), None)
