"""Makes the broker's streams and consumers agree with `weft_protocols.resources`, or says where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from weft_protocols.errors import ApiError
from weft_protocols.resources import ConsumerSpec, StreamSpec, Topology

if TYPE_CHECKING:
    from weft.core.broker import Broker

_STREAM_NOT_FOUND: Final = 10059
_CONSUMER_NOT_FOUND: Final = 10014
_EXISTS: Final = (10058, 10148, 10013, 10105)
"""A stream or consumer of that name exists with another configuration: somebody else created it meanwhile."""


@dataclass(frozen=True, slots=True)
class Drift:
    """One setting of the broker that is not what the specification says."""

    resource: str
    """`stream MESH` or `consumer MESH/analyst=work`."""
    field: str
    wanted: Any
    found: Any
    reason: str = ""
    """Why it could not be changed, where that was tried."""

    def __str__(self) -> str:
        text = f"{self.resource}: {self.field} is {self.found!r}, should be {self.wanted!r}"
        return f"{text} ({self.reason})" if self.reason else text


@dataclass(frozen=True, slots=True)
class Report:
    """What `reconcile` found and did, by name of the resource."""

    created: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    drifted: tuple[Drift, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether the broker is now as specified."""
        return not self.drifted


@dataclass(frozen=True, slots=True)
class _Resource:
    """One stream or consumer: how the API calls it, and what is wanted of it."""

    name: str
    info: str
    create: str
    update: str
    not_found: int
    wanted: Mapping[str, Any]
    envelope: Mapping[str, Any] | None = None
    """Fields around `config` in requests; None where the configuration is the request itself."""

    def request(self, config: Mapping[str, Any], action: str) -> dict[str, Any]:
        if self.envelope is None:
            return dict(config)
        return {**self.envelope, "config": dict(config), "action": action}

    def drift(self, found: Mapping[str, Any], reason: str = "") -> list[Drift]:
        """Every named field that differs. The API omits fields that have their zero value."""
        return [
            Drift(self.name, key, wanted, found.get(key), reason)
            for key, wanted in self.wanted.items()
            if found.get(key, type(wanted)()) != wanted
        ]


@dataclass(slots=True)
class _Findings:
    created: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    drifted: list[Drift] = field(default_factory=list)


async def reconcile(broker: Broker, topology: Topology, *, apply: bool = False) -> Report:
    """Create what is missing, and compare what exists in the fields the specification names.

    A difference is reported and left alone, unless `apply` is set: then what the broker lets be changed is
    changed, and the rest reported with its reason. Any number of these may run at once. `broker` must be
    connected as a member of account MESH.

    Raises:
        Denied, Unreachable, TimedOut: the broker does not serve this identity, or not now.
        ApiError: it refuses to create a resource.
    """
    findings = _Findings()
    for stream in topology.streams:
        await _settle(broker, _stream(stream), findings, apply=apply)
    for consumer in topology.consumers:
        await _settle(broker, _consumer(consumer), findings, apply=apply)
    return Report(
        tuple(findings.created),
        tuple(findings.unchanged),
        tuple(findings.updated),
        tuple(findings.drifted),
    )


async def _settle(broker: Broker, resource: _Resource, findings: _Findings, *, apply: bool) -> None:
    found = await _found(broker, resource)
    if found is None:
        try:
            await broker.api(resource.create, resource.request(resource.wanted, "create"))
            findings.created.append(resource.name)
            return
        except ApiError as error:
            if error.err_code not in _EXISTS:
                raise
            found = await _found(broker, resource)
            if found is None:
                raise
    drift = resource.drift(found)
    if drift and apply:
        drift = await _correct(broker, resource, found, drift)
        if not drift:
            findings.updated.append(resource.name)
            return
    if drift:
        findings.drifted += drift
    else:
        findings.unchanged.append(resource.name)


async def _correct(broker: Broker, resource: _Resource, found: Mapping[str, Any], drift: list[Drift]) -> list[Drift]:
    """Set every drifted field at once, or as many of them as the broker lets be changed; return the rest."""
    try:
        return await _update(broker, resource, found, drift)
    except ApiError as error:
        if len(drift) == 1:
            return [replace(drift[0], reason=str(error))]
    left: list[Drift] = []
    for one in drift:
        left += await _correct(broker, resource, await _found(broker, resource) or found, [one])
    return left


async def _update(broker: Broker, resource: _Resource, found: Mapping[str, Any], drift: list[Drift]) -> list[Drift]:
    changed = {**found, **{one.field: one.wanted for one in drift}}
    await broker.api(resource.update, resource.request(changed, "update"))
    # The answer can still show the configuration from before the update.
    now = await _found(broker, resource) or found
    fields = {one.field for one in drift}
    return [one for one in resource.drift(now, "the broker kept its value") if one.field in fields]


async def _found(broker: Broker, resource: _Resource) -> dict[str, Any] | None:
    """The resource's configuration in the broker; None if it does not exist."""
    try:
        answer = await broker.api(resource.info)
    except ApiError as error:
        if error.err_code == resource.not_found:
            return None
        raise
    config: dict[str, Any] = answer["config"]
    return config


def _stream(spec: StreamSpec) -> _Resource:
    return _Resource(
        f"stream {spec.name}",
        info=f"STREAM.INFO.{spec.name}",
        create=f"STREAM.CREATE.{spec.name}",
        update=f"STREAM.UPDATE.{spec.name}",
        not_found=_STREAM_NOT_FOUND,
        wanted=spec.config(),
    )


def _consumer(spec: ConsumerSpec) -> _Resource:
    create = f"CONSUMER.CREATE.{spec.stream}.{spec.name}.{spec.filter_subject}"
    return _Resource(
        f"consumer {spec.stream}/{spec.name}",
        info=f"CONSUMER.INFO.{spec.stream}.{spec.name}",
        create=create,
        update=create,
        not_found=_CONSUMER_NOT_FOUND,
        wanted=spec.config(),
        envelope={"stream_name": spec.stream},
    )
