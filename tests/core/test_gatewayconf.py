"""Section `gateway` of `mesh.yaml`, with every mistake named, and the environment that wins over it."""

import subprocess
import sys
from pathlib import Path

import pytest

from weft.core.config import parse_mesh_config
from weft.core.gatewayconf import (
    AuthConfig,
    GatewayConfig,
    LimitsConfig,
    OidcConfig,
    PushConfig,
    TokenConfig,
    checked,
    from_environment,
    is_loopback,
    with_options,
)
from weft_protocols.errors import InvalidConfig

FULL = f"""
agents:
  hello: {{run: m:a}}
gateway:
  host: 0.0.0.0
  port: 8443
  grpc_port: 0
  public_url: https://agents.example.com/mesh/
  public_grpc: agents.example.com:443
  default_agent: hello
  auth:
    tokens:
      - {{name: ci, token_env: CI_TOKEN}}
      - {{name: phone, token_file: secrets/phone}}
      - {{name: desk, sha256: {"AB" * 32}}}
    oidc:
      - {{issuer: "https://login.example.com/", audience: mesh, caller_claim: email, algorithms: [ES256]}}
      - issuer: http://127.0.0.1:9000
        audience: mesh
        jwks_url: http://127.0.0.1:9000/keys
  limits: {{body: 1MB, requests: 10, streams: 20, streams_per_caller: 5, slow_reader: 2.5}}
  push: {{allow_private: yes, timeout: 3, attempts_for: 60}}
"""


def read(text: str, folder: Path = Path("/project")) -> GatewayConfig:
    return parse_mesh_config(text, path=folder / "mesh.yaml").gateway


def test_a_full_section_is_read() -> None:
    assert read(FULL) == GatewayConfig(
        host="0.0.0.0",
        port=8443,
        grpc_port=0,
        public_url="https://agents.example.com/mesh",
        public_grpc="agents.example.com:443",
        default_agent="hello",
        auth=AuthConfig(
            anonymous=None,
            tokens=(
                TokenConfig("ci", token_env="CI_TOKEN"),
                TokenConfig("phone", token_file=Path("/project/secrets/phone")),
                TokenConfig("desk", sha256="ab" * 32),
            ),
            oidc=(
                OidcConfig("https://login.example.com/", "mesh", caller_claim="email", algorithms=("ES256",)),
                OidcConfig("http://127.0.0.1:9000", "mesh", "http://127.0.0.1:9000/keys"),
            ),
        ),
        limits=LimitsConfig(1024**2, 10, 20, 5, 2.5),
        push=PushConfig(True, 3.0, 60.0),
    )


@pytest.mark.parametrize(
    "text", ["", "gateway:\n", "gateway: true\n", "gateway: {}\n", "gateway: {auth: , limits: , public_url: ''}\n"]
)
def test_everything_has_a_default(text: str) -> None:
    assert read(text) == GatewayConfig()


@pytest.mark.parametrize("text", ["gateway: false\n", "gateway: no\n", "gateway: {enabled: false}\n"])
def test_it_can_be_switched_off(text: str) -> None:
    assert not read(text).enabled


@pytest.mark.parametrize(
    ("section", "anonymous"),
    [
        ("{}", "local"),
        ("{host: localhost}", "local"),
        ("{host: '[::1]', public_url: 'http://localhost:8080'}", "local"),
        ("{auth: {anonymous: guest}}", "guest"),
        ("{auth: {tokens: [{name: ci, token_env: T}]}}", None),
        ("{auth: {anonymous: guest, tokens: [{name: ci, token_env: T}]}}", "guest"),
        ("{auth: {anonymous: false, tokens: [{name: ci, token_env: T}]}}", None),
        ("{auth: {anonymous: null, tokens: [{name: ci, token_env: T}]}}", None),
        ("{host: 0.0.0.0, auth: {tokens: [{name: ci, token_env: T}]}}", None),
        ("{public_url: 'https://a.example', auth: {anonymous: proxy}}", "proxy"),
    ],
)
def test_callers_without_credentials_are_accepted_only_where_nothing_else_was_said(
    section: str, anonymous: str | None
) -> None:
    assert read(f"gateway: {section}\n").auth.anonymous == anonymous


MISTAKES = {
    "field": ("gateway:\n  prot: 1\n", "2: gateway: has no field 'prot' (did you mean 'port'?)"),
    "a word": ("gateway: 8080\n", "1: gateway: must be a mapping"),
    "port": ("gateway: {port: 70000}\n", "1: gateway.port: '70000' must be a whole number from 0 to 65535"),
    "no port": ("gateway: {port: }\n", "1: gateway.port: has no value"),
    "one port for both": ("gateway: {port: 80, grpc_port: 80}\n", "1: gateway: port and grpc_port are both 80"),
    "host": ("gateway: {host: '127.0.0.1:80'}\n", "1: gateway.host: '127.0.0.1:80' must be an address or a host name"),
    "bad address": ("gateway: {host: 127.0.0.300}\n", "1: gateway.host: '127.0.0.300' must be an address"),
    "public_url": (
        "gateway: {public_url: agents.example.com}\n",
        "1: gateway.public_url: 'agents.example.com' must be",
    ),
    "credentials in the url": (
        "gateway: {public_url: 'https://me@x'}\n",
        "1: gateway.public_url: 'https://me@x' must be",
    ),
    "public_grpc": (
        "gateway: {public_grpc: a.example}\n",
        "1: gateway.public_grpc: 'a.example' must be a host and a port",
    ),
    "default agent": ("gateway: {default_agent: a.b}\n", "1: gateway.default_agent: agent name 'a.b' is not a name"),
    "open to the world": (
        "gateway:\n  host: 0.0.0.0\n  auth: {anonymous: local}\n",
        "2: gateway: host '0.0.0.0' can be reached from elsewhere, so callers without credentials cannot be accepted",
    ),
    "nobody could call": (
        "gateway: {host: 0.0.0.0}\n",
        "1: gateway: nobody could call this gateway: configure auth.tokens",
    ),
    "public without credentials": ("gateway: {public_url: 'https://a.example'}\n", "1: gateway: nobody could call"),
    "a token in clear": (
        "gateway:\n  auth:\n    tokens:\n      - {name: ci, token: secret}\n",
        "4: gateway.auth.tokens: has no field 'token' (did you mean 'token_env'?)",
    ),
    "no source": ("gateway: {auth: {tokens: [{name: ci}]}}\n", "takes one of token_env, token_file and sha256"),
    "two sources": (
        "gateway: {auth: {tokens: [{name: ci, token_env: A, token_file: b}]}}\n",
        "takes one of token_env, token_file and sha256",
    ),
    "a token of nobody": ("gateway: {auth: {tokens: [{token_env: A}]}}\n", "`name` is missing"),
    "a digest": ("gateway: {auth: {tokens: [{name: ci, sha256: abc}]}}\n", "must be the 64 hex digits"),
    "a variable": ("gateway: {auth: {tokens: [{name: ci, token_env: A-B}]}}\n", "cannot be the name of an environment"),
    "a caller that is an agent": (
        "agents:\n  a: {run: m:a}\ngateway: {auth: {tokens: [{name: a, token_env: A}]}}\n",
        "3: gateway.auth.tokens.name: 'a' is an agent",
    ),
    "a caller of a claim": (
        f"gateway: {{auth: {{anonymous: u-{'0' * 32}}}}}\n",
        "has the form of names that gateways make themselves",
    ),
    "a reserved caller": ("gateway: {auth: {anonymous: operator}}\n", "caller name 'operator' is reserved"),
    "tokens as a mapping": (
        "gateway: {auth: {tokens: {name: ci}}}\n",
        "gateway.auth.tokens: must be a list, e.g. [{name",
    ),
    "issuer without audience": ("gateway: {auth: {oidc: [{issuer: 'https://x'}]}}\n", "`audience` missing"),
    "issuer in clear": (
        "gateway: {auth: {oidc: [{issuer: 'http://x.example', audience: a}]}}\n",
        "gateway.auth.oidc.issuer: 'http://x.example' must begin with https://",
    ),
    "issuer twice": (
        "gateway: {auth: {oidc: [{issuer: 'https://x', audience: a}, {issuer: 'https://x', audience: b}]}}\n",
        "gateway.auth.oidc: names an issuer twice",
    ),
    "a symmetric algorithm": (
        "gateway: {auth: {oidc: [{issuer: 'https://x', audience: a, algorithms: [HS256]}]}}\n",
        "gateway.auth.oidc.algorithms: 'HS256' is not allowed; use some of RS256",
    ),
    "no limit": ("gateway: {limits: {streams: 0}}\n", "gateway.limits.streams: '0' must be a whole number from 1"),
    "no time": ("gateway: {limits: {slow_reader: 0}}\n", "gateway.limits.slow_reader: '0' must be a number of seconds"),
    "a size": ("gateway: {limits: {body: lots}}\n", "gateway.limits.body: 'lots' must be a size"),
    "neither true nor false": ("gateway: {push: {allow_private: maybe}}\n", "'maybe' must be true or false"),
}


@pytest.mark.parametrize(("text", "wanted"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_reported_with_file_line_field_and_remedy(text: str, wanted: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        read(text)
    line, colon, rest = wanted.partition(": ")
    expected = f"/project/mesh.yaml:{line}: {rest}" if colon and line.isdigit() else wanted
    assert expected in str(refused.value)


def test_what_is_switched_off_need_not_be_complete() -> None:
    assert not read("gateway: {enabled: false, host: 0.0.0.0}\n").enabled


def test_the_environment_wins_over_the_file() -> None:
    given = {
        "WEFT_GATEWAY_HOST": "::1",
        "WEFT_GATEWAY_PORT": "0",
        "WEFT_GATEWAY_GRPC_PORT": "5000",
        "WEFT_GATEWAY_PUBLIC_URL": "http://localhost/x/",
        "WEFT_GATEWAY_DEFAULT_AGENT": "hello",
        "OTHER": "x",
    }
    made = from_environment(read("gateway: {port: 1, host: localhost}\n"), given)
    assert (made.host, made.port, made.grpc_port, made.public_url) == ("::1", 0, 5000, "http://localhost/x")
    assert made.default_agent == "hello"
    assert from_environment(made, {"WEFT_GATEWAY_PORT": ""}) == made


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(InvalidConfig, match="WEFT_GATEWAY_PORT: 'many' must be a whole number"):
        from_environment(GatewayConfig(), {"WEFT_GATEWAY_PORT": "many"})


def test_an_option_that_opens_the_gateway_takes_no_callers_without_credentials() -> None:
    opened = with_options(GatewayConfig(), host="0.0.0.0", port=None)
    assert opened.auth.anonymous is None
    with pytest.raises(InvalidConfig, match="nobody could call this gateway"):
        checked(opened)
    assert checked(with_options(GatewayConfig(), port=99)).port == 99


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.example.com", False)],
)  # fmt: skip
def test_loopback_is_told_from_the_rest(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_reading_a_configuration_imports_no_server() -> None:
    heavy = "{'grpc', 'starlette', 'uvicorn', 'a2a', 'nats', 'google.protobuf', 'pydantic', 'httpx'}"
    code = (
        f"import sys, weft.core.gatewayconf; found = {heavy} & set(sys.modules); sys.exit(str(found) if found else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
