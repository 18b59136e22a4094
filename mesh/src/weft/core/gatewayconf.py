"""Configuration of a gateway: section `gateway` of `mesh.yaml`, and what the environment says instead."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

from weft.core.yamlfields import boolean, integer, is_null, seconds, size
from weft_protocols.errors import InvalidConfig
from weft_protocols.subjects import check_name

if TYPE_CHECKING:
    import yaml

_T = TypeVar("_T")
DEFAULT_PORT: Final = 8080
"""HTTP port of the first gateway on a machine, if it is free."""
DEFAULT_GRPC_PORT: Final = 50051
"""gRPC port of the first gateway on a machine, if it is free."""
ALGORITHMS: Final = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
"""Signatures of OIDC tokens that can be allowed: with public keys only."""
_DERIVED: Final = re.compile(r"[ut]-[0-9a-f]{32}")
"""Callers that gateways derive from OIDC claims and tenants."""
_PORT: Final = integer(0, 65535)
_COUNT: Final = integer(1, 1_000_000)
INSTALL: Final = "pip install 'weft[gateway]'"
"""What installs what a gateway needs."""
_MODULES: Final = ("grpc", "httptools", "sse_starlette", "starlette", "uvicorn")
ENVIRONMENT: Final = {
    "WEFT_GATEWAY_HOST": "host",
    "WEFT_GATEWAY_PORT": "port",
    "WEFT_GATEWAY_GRPC_PORT": "grpc_port",
    "WEFT_GATEWAY_PUBLIC_URL": "public_url",
    "WEFT_GATEWAY_PUBLIC_GRPC": "public_grpc",
    "WEFT_GATEWAY_DEFAULT_AGENT": "default_agent",
}
"""Variables that win over `mesh.yaml`, and the field each sets."""


@dataclass(frozen=True, slots=True)
class TokenConfig:
    """A static bearer token and who presents it. One of the three sources says what the token is."""

    name: str
    """The caller it stands for."""
    token_env: str = ""
    """Environment variable of the gateway that holds the token."""
    token_file: Path | None = None
    """File that holds the token and nothing else."""
    sha256: str = ""
    """SHA-256 of the token in 64 lower-case hex digits."""


@dataclass(frozen=True, slots=True)
class OidcConfig:
    """An OpenID Connect issuer whose tokens are accepted."""

    issuer: str
    audience: str
    """What `aud` must name."""
    jwks_url: str = ""
    """Where its keys are; from its discovery document if empty."""
    caller_claim: str = "sub"
    """The claim that tells one caller from another."""
    algorithms: tuple[str, ...] = ("RS256", "ES256", "EdDSA")


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """Who may call."""

    anonymous: str | None = "local"
    """The caller that requests without credentials are; None refuses them. Only with a loopback host."""
    tokens: tuple[TokenConfig, ...] = ()
    oidc: tuple[OidcConfig, ...] = ()


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What one gateway takes on at once."""

    body: int = 8 * 1024**2
    """Bytes of a request."""
    requests: int = 512
    """Requests in flight that are no streams."""
    streams: int = 1000
    streams_per_caller: int = 100
    slow_reader: float = 30.0
    """Seconds after which a stream ends whose client takes nothing."""


@dataclass(frozen=True, slots=True)
class PushConfig:
    """Delivery of push notifications."""

    allow_private: bool = False
    """Whether notifications may go to private and loopback addresses, and over plain HTTP."""
    timeout: float = 15.0
    """Seconds a receiver has to answer."""
    attempts_for: float = 86400.0
    """Seconds for which a failed delivery is tried again."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """One gateway."""

    enabled: bool = True
    """Whether `mesh up` starts one."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int | None = None
    """HTTP port; 0 for any free one; None for 8080 if it is free, else another one, kept from then on."""
    grpc_port: int | None = None
    """gRPC port; likewise, from 50051."""
    public_url: str = ""
    """How clients reach it, where that is not `host` and `port`; without a slash at the end."""
    public_grpc: str = ""
    """`host:port` at which clients reach gRPC, where that is not the host of `public_url` and `grpc_port`."""
    default_agent: str = ""
    """The agent that requests which name none are for."""
    auth: AuthConfig = AuthConfig()
    limits: LimitsConfig = LimitsConfig()
    push: PushConfig = PushConfig()

    def problems(self) -> list[str]:
        """What cannot be together, each with what to do about it."""
        found = []
        if self.auth.anonymous is not None and not is_loopback(self.host):
            found.append(
                f"host {self.host!r} can be reached from elsewhere, so callers without credentials cannot be "
                "accepted: remove auth.anonymous and configure auth.tokens or auth.oidc, or use host 127.0.0.1"
            )
        if self.auth.anonymous is None and not self.auth.tokens and not self.auth.oidc:
            found.append(
                "nobody could call this gateway: configure auth.tokens or auth.oidc, or use host 127.0.0.1 "
                "and set auth.anonymous to the caller that requests without credentials are"
            )
        if self.port and self.port == self.grpc_port:
            found.append(f"port and grpc_port are both {self.port}: every protocol has a port of its own")
        return found


class Reader(Protocol):
    """Reads the fields of a YAML file and remembers the mistakes (`weft.core.yamlfields.YamlReader`)."""

    def value(self, fields: Mapping[str, yaml.Node], where: str, default: _T, read: Callable[[str], _T]) -> _T:
        """A field."""

    def text(self, node: yaml.Node, where: str) -> str | None:
        """A scalar."""

    def mapping(self, node: yaml.Node, where: str, known: tuple[str, ...] | None) -> dict[str, yaml.Node]:
        """A mapping."""

    def sequence(self, node: yaml.Node | None, where: str, example: str) -> list[yaml.Node]:
        """A list."""

    def mistake(self, node: yaml.Node, where: str, what: str) -> None:
        """Remember what is wrong."""


def read_gateway(
    reader: Reader, node: yaml.Node | None, *, folder: Path, agents: tuple[str, ...] = ()
) -> GatewayConfig:
    """Section `gateway` of `mesh.yaml`: a mapping, or `true` or `false`. Mistakes go to the reader.

    Args:
        reader: of the file.
        node: the section; defaults if None.
        folder: what paths are relative to.
        agents: names that callers cannot have.
    """
    if node is None or is_null(node):
        return GatewayConfig()
    if (switch := _switch(node)) is not None:
        return GatewayConfig(enabled=switch)
    where, base = "gateway", GatewayConfig()
    fields = reader.mapping(node, where, _FIELDS)
    host = reader.value(fields, f"{where}.host", base.host, _host)
    public_url = reader.value(fields, f"{where}.public_url", base.public_url, _optional(_url))
    config = GatewayConfig(
        enabled=reader.value(fields, f"{where}.enabled", base.enabled, boolean),
        host=host,
        port=reader.value(fields, f"{where}.port", base.port, _PORT),
        grpc_port=reader.value(fields, f"{where}.grpc_port", base.grpc_port, _PORT),
        public_url=public_url,
        public_grpc=reader.value(fields, f"{where}.public_grpc", base.public_grpc, _optional(_address)),
        default_agent=reader.value(fields, f"{where}.default_agent", base.default_agent, _optional(_agent)),
        auth=_Auth(reader, folder, agents).read(fields.get("auth"), open_to_all=_is_local(host, public_url)),
        limits=_limits(reader, fields.get("limits")),
        push=_push(reader, fields.get("push")),
    )
    for problem in config.problems() if config.enabled else ():
        reader.mistake(node, where, problem)
    return config


def from_environment(config: GatewayConfig, environment: Mapping[str, str] | None = None) -> GatewayConfig:
    """`config` with what `WEFT_GATEWAY_*` say instead. Raises InvalidConfig naming the variable."""
    environment = os.environ if environment is None else environment
    given: dict[str, Any] = {}
    for name, field in ENVIRONMENT.items():
        if text := environment.get(name):
            try:
                given[field] = _READ[field](text)
            except ValueError as error:
                raise InvalidConfig(f"{name}: {error}") from None
    return with_options(config, **given)


def with_options(config: GatewayConfig, **options: Any) -> GatewayConfig:
    """`config` with other values for the fields that are not None, as if they were written in `mesh.yaml`.

    A host that others can reach takes no anonymous callers unless they were allowed for it.
    """
    made = replace(config, **{field: value for field, value in options.items() if value is not None})
    was_default = config.auth.anonymous == AuthConfig().anonymous
    if was_default and not _is_local(made.host, made.public_url) and _is_local(config.host, config.public_url):
        made = replace(made, auth=replace(made.auth, anonymous=None))
    return made


def checked(config: GatewayConfig) -> GatewayConfig:
    """`config` if a gateway can run with it. Raises InvalidConfig with everything that is wrong."""
    if problems := config.problems():
        raise InvalidConfig("\n".join(f"gateway: {problem}" for problem in problems))
    return config


def missing_modules() -> tuple[str, ...]:
    """What of the extra `gateway` is not installed here; nothing is imported to find out."""
    return tuple(name for name in _MODULES if find_spec(name) is None)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_local(host: str, public_url: str) -> bool:
    """Whether only this machine calls, as far as the configuration tells."""
    return is_loopback(host) and (not public_url or is_loopback(urlsplit(public_url).hostname or ""))


class _Auth:
    """Reads section `gateway.auth`."""

    def __init__(self, reader: Reader, folder: Path, agents: tuple[str, ...]) -> None:
        self._reader = reader
        self._folder = folder
        self._agents = agents

    def read(self, node: yaml.Node | None, *, open_to_all: bool) -> AuthConfig:
        where, reader = "gateway.auth", self._reader
        fields = reader.mapping(node, where, ("anonymous", "tokens", "oidc")) if node is not None else {}
        example = "[{name: ci, token_env: CI_TOKEN}]"
        tokens = [self._token(entry) for entry in reader.sequence(fields.get("tokens"), f"{where}.tokens", example)]
        example = "[{issuer: https://login.example.com, audience: mesh}]"
        oidc = [self._oidc(entry) for entry in reader.sequence(fields.get("oidc"), f"{where}.oidc", example)]
        default = "local" if open_to_all and not fields.get("tokens") and not fields.get("oidc") else None
        made = AuthConfig(
            anonymous=self._anonymous(fields, default),
            tokens=tuple(token for token in tokens if token is not None),
            oidc=tuple(issuer for issuer in oidc if issuer is not None),
        )
        if len({issuer.issuer for issuer in made.oidc}) < len(made.oidc):
            reader.mistake(fields["oidc"], f"{where}.oidc", "names an issuer twice; keep one")
        return made

    def _token(self, node: yaml.Node) -> TokenConfig | None:
        where, reader = "gateway.auth.tokens", self._reader
        fields = reader.mapping(node, where, ("name", "token_env", "token_file", "sha256"))
        sources = [field for field in ("token_env", "token_file", "sha256") if field in fields]
        if "name" not in fields:
            reader.mistake(node, where, "`name` is missing: the caller the token stands for")
        elif len(sources) != 1:
            reader.mistake(
                node, where, "takes one of token_env, token_file and sha256; a token itself never stands here"
            )
        else:
            return TokenConfig(
                name=reader.value(fields, f"{where}.name", "", self._caller),
                token_env=reader.value(fields, f"{where}.token_env", "", _variable),
                token_file=reader.value(fields, f"{where}.token_file", None, lambda text: self._path(text)),
                sha256=reader.value(fields, f"{where}.sha256", "", _sha256),
            )
        return None

    def _oidc(self, node: yaml.Node) -> OidcConfig | None:
        where, reader = "gateway.auth.oidc", self._reader
        fields = reader.mapping(node, where, ("issuer", "audience", "jwks_url", "caller_claim", "algorithms"))
        missing = [field for field in ("issuer", "audience") if field not in fields]
        if missing:
            reader.mistake(node, where, f"{' and '.join(f'`{field}`' for field in missing)} missing")
            return None
        allowed: list[str] = []
        for entry in reader.sequence(fields.get("algorithms"), f"{where}.algorithms", "[RS256, ES256]"):
            name = reader.text(entry, f"{where}.algorithms")
            if name is not None and name not in ALGORITHMS:
                reader.mistake(
                    entry, f"{where}.algorithms", f"{name!r} is not allowed; use some of {', '.join(ALGORITHMS)}"
                )
            elif name is not None:
                allowed.append(name)
        return OidcConfig(
            issuer=reader.value(fields, f"{where}.issuer", "", _secure_url),
            audience=reader.value(fields, f"{where}.audience", "", _word),
            jwks_url=reader.value(fields, f"{where}.jwks_url", "", _secure_url),
            caller_claim=reader.value(fields, f"{where}.caller_claim", "sub", _word),
            algorithms=tuple(allowed) or OidcConfig("", "").algorithms,
        )

    def _anonymous(self, fields: Mapping[str, yaml.Node], default: str | None) -> str | None:
        node = fields.get("anonymous")
        if node is not None and (is_null(node) or _switch(node) is False):
            return None
        return self._reader.value(fields, "gateway.auth.anonymous", default, self._caller)

    def _caller(self, text: str) -> str:
        check_name(text, "caller name")
        if text in self._agents:
            raise ValueError(f"{text!r} is an agent; a caller at the gateway needs a name of its own")
        if _DERIVED.fullmatch(text):
            raise ValueError(f"{text!r} has the form of names that gateways make themselves; choose another")
        return text

    def _path(self, text: str) -> Path | None:
        return self._folder / Path(text).expanduser()


def _limits(reader: Reader, node: yaml.Node | None) -> LimitsConfig:
    where, base = "gateway.limits", LimitsConfig()
    known = ("body", "requests", "streams", "streams_per_caller", "slow_reader")
    fields = reader.mapping(node, where, known) if node is not None else {}
    return LimitsConfig(
        body=reader.value(fields, f"{where}.body", base.body, size),
        requests=reader.value(fields, f"{where}.requests", base.requests, _COUNT),
        streams=reader.value(fields, f"{where}.streams", base.streams, _COUNT),
        streams_per_caller=reader.value(fields, f"{where}.streams_per_caller", base.streams_per_caller, _COUNT),
        slow_reader=reader.value(fields, f"{where}.slow_reader", base.slow_reader, _positive),
    )


def _push(reader: Reader, node: yaml.Node | None) -> PushConfig:
    where, base = "gateway.push", PushConfig()
    fields = reader.mapping(node, where, ("allow_private", "timeout", "attempts_for")) if node is not None else {}
    return PushConfig(
        allow_private=reader.value(fields, f"{where}.allow_private", base.allow_private, boolean),
        timeout=reader.value(fields, f"{where}.timeout", base.timeout, _positive),
        attempts_for=reader.value(fields, f"{where}.attempts_for", base.attempts_for, _positive),
    )


def _switch(node: yaml.Node) -> bool | None:
    """The value of `gateway: true` and `gateway: false`."""
    return boolean(str(node.value)) if node.tag == "tag:yaml.org,2002:bool" else None


# Readers of one value: text in, ValueError with what to do ------------------------------------------


def _optional(read: Callable[[str], str]) -> Callable[[str], str]:
    """Like `read`, but takes an empty text, which means none."""
    return lambda text: read(text) if text else ""


def _positive(text: str) -> float:
    value = seconds(text)
    if value <= 0:
        raise ValueError(f"{text!r} must be a number of seconds above 0")
    return value


def _host(text: str) -> str:
    bare = text.strip("[]")
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        pass
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", bare) or re.fullmatch(r"[0-9.]+", bare):
        raise ValueError(f"{text!r} must be an address or a host name without a port, e.g. 127.0.0.1")
    return bare


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
        parts = urlsplit("")
    if not valid or parts.query or parts.fragment or parts.username or re.search(r"[\s\x00-\x1f]", text):
        raise ValueError(f"{text!r} must be an http or https address, e.g. https://agents.example.com")
    return text.rstrip("/")


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} must be a host and a port, e.g. grpc.example.com:443")
    return f"[{checked_host}]:{port}" if ":" in (checked_host := _host(host)) else f"{checked_host}:{port}"


def _secure_url(text: str) -> str:
    url = _url(text)
    if urlsplit(url).scheme != "https" and not is_loopback(urlsplit(url).hostname or ""):
        raise ValueError(f"{text!r} must begin with https://, since keys that are fetched in clear prove nothing")
    return text


def _agent(text: str) -> str:
    return check_name(text, "agent name")


def _variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError(f"{text!r} cannot be the name of an environment variable")
    return text


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError("must be the 64 hex digits of `printf %s TOKEN | sha256sum`")
    return text.lower()


def _word(text: str) -> str:
    if not text or re.search(r"[\s\x00-\x1f]", text):
        raise ValueError(f"{text!r} must be one word")
    return text


_FIELDS: Final = (
    "enabled", "host", "port", "grpc_port", "public_url", "public_grpc", "default_agent", "auth", "limits", "push",
)  # fmt: skip
_READ: Final[Mapping[str, Callable[[str], Any]]] = {
    "host": _host,
    "port": _PORT,
    "grpc_port": _PORT,
    "public_url": _url,
    "public_grpc": _address,
    "default_agent": _agent,
}
