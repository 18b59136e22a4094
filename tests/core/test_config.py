"""Where the broker is and as whom to connect; `mesh.yaml`, with every mistake named."""

import json
import os
from pathlib import Path

import pytest

from weft.core.config import (
    AgentConfig,
    BrokerConfig,
    ConnectionSettings,
    find_home,
    load_mesh_config,
    load_settings,
    parse_mesh_config,
)
from weft.core.home import Accounts, BrokerRecord, Home, process_started
from weft_protocols.errors import InvalidConfig, InvalidName, NotAuthenticated, Unavailable


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home directory whose broker is this very process, as far as its files say."""
    made = Home(tmp_path / "project" / ".weft")
    made.root.mkdir(parents=True)
    Accounts({"analyst": "UA"}, {"local": "UL"}, {"coordinator": "UC", "operator": "UO", "SYS": "US"}).write(made)
    _record(made, process_started(os.getpid()) or "").write(made)
    return made


# The home directory --------------------------------------------------------------------------------


def test_the_nearest_home_above_is_found(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = home.root.parent / "agents" / "analyst"
    deep.mkdir(parents=True)
    assert find_home(deep) == home.root
    monkeypatch.chdir(deep)
    assert find_home() == home.root


def test_the_environment_names_the_home_whatever_the_folder(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_HOME", str(home.root))
    assert find_home(tmp_path) == home.root


def test_without_a_home_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no mesh in .* or above it: run `mesh up`.*WEFT_HOME.*WEFT_URL"):
        find_home(tmp_path)


def test_a_home_that_the_environment_names_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "gone"))
    with pytest.raises(Unavailable, match=r"WEFT_HOME is .*gone, which is not a directory"):
        find_home()


# Settings ------------------------------------------------------------------------------------------


def test_settings_come_from_the_home(home: Home) -> None:
    settings = load_settings("analyst", home=home.root)
    assert settings == ConnectionSettings(
        "nats://127.0.0.1:4222", "analyst", home.root / "keys" / "analyst.nk", home.root
    )
    assert settings.inbox_prefix == "_INBOX_analyst"


def test_the_identity_is_the_environments_or_local(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(home=home.root).identity == "local"
    monkeypatch.setenv("WEFT_IDENTITY", "analyst")
    assert load_settings(home=home.root).identity == "analyst"
    assert load_settings("operator", home=home.root).identity == "operator"


def test_a_mesh_elsewhere_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEFT_URL", "nats://broker:4222")
    monkeypatch.setenv("WEFT_SEED_FILE", "/run/secrets/seed")
    assert load_settings("analyst") == ConnectionSettings(
        "nats://broker:4222", "analyst", Path("/run/secrets/seed"), None
    )


def test_an_address_without_a_seed_file_is_an_error_where_there_are_no_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEFT_URL", "nats://broker:4222")
    with pytest.raises(InvalidConfig, match="set WEFT_SEED_FILE"):
        load_settings("analyst")


def test_either_variable_alone_replaces_its_part_of_the_home(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.root.parent)
    monkeypatch.setenv("WEFT_URL", "nats://tunnel:4222")
    assert load_settings("analyst").url == "nats://tunnel:4222"
    assert load_settings("analyst").seed_file == home.seed("analyst")
    monkeypatch.delenv("WEFT_URL")
    monkeypatch.setenv("WEFT_SEED_FILE", "/elsewhere/seed.nk")
    assert load_settings("guest") == ConnectionSettings(
        "nats://127.0.0.1:4222", "guest", Path("/elsewhere/seed.nk"), home.root
    )


def test_a_named_home_wins_over_the_environment(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_URL", "nats://broker:4222")
    monkeypatch.setenv("WEFT_SEED_FILE", "/run/secrets/seed")
    assert load_settings("analyst", home=home.root).url == "nats://127.0.0.1:4222"


def test_an_unknown_identity_is_answered_with_those_that_exist(home: Home) -> None:
    with pytest.raises(NotAuthenticated, match=r"no identity 'analist' \(did you mean 'analyst'\?\)") as refused:
        load_settings("analist", home=home.root)
    assert "it knows analyst, local" in str(refused.value)


def test_an_identity_that_could_be_a_path_is_refused(home: Home) -> None:
    with pytest.raises(InvalidName):
        load_settings("../operator", home=home.root)


@pytest.mark.parametrize("started", ["0", ""], ids=["another process", "nothing"])
def test_a_broker_that_is_gone_is_not_running_even_if_its_pid_is_used_again(home: Home, started: str) -> None:
    _record(home, started).write(home)
    with pytest.raises(Unavailable, match="is not running; start it with `mesh up`"):
        load_settings("local", home=home.root)


def test_a_home_without_a_broker_is_not_running(home: Home) -> None:
    home.broker_file.unlink()
    with pytest.raises(Unavailable, match="is not running"):
        load_settings("local", home=home.root)


def test_a_home_that_never_ran_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="was never started"):
        load_settings("local", home=tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"agents": {}}', '{"agents": 1, "callers": {}, "members": {}}'])
def test_damaged_accounts_are_named_with_what_to_do(home: Home, text: str) -> None:
    home.accounts_file.write_text(text)
    with pytest.raises(InvalidConfig, match=r"accounts.json is damaged .*delete it and run `mesh up`"):
        load_settings("local", home=home.root)


def test_the_files_of_a_home_are_what_was_written(home: Home) -> None:
    assert json.loads(home.broker_file.read_text())["port"] == 4222
    assert set(json.loads(home.accounts_file.read_text())) == {"agents", "callers", "members"}
    assert home.broker_file.stat().st_mode & 0o777 == 0o600
    record = BrokerRecord.read(home)
    assert record is not None
    assert record.alive


# mesh.yaml -----------------------------------------------------------------------------------------

FULL = """
name: demo
broker: {port: 4333, durability: strict, max_bytes: 2GB}
agents:
  analyst: {run: "agents/analyst.py:agent", replicas: 3, env: {MODEL: small, RETRIES: 3, DEBUG: yes}, grace: 12.5}
  no:
    run: package.module:agent
callers: [local, ci]
"""


def test_a_full_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(FULL)
    config = load_mesh_config(path)
    assert (config.name, config.folder, config.callers) == ("demo", tmp_path, ("local", "ci"))
    assert config.broker == BrokerConfig(4333, "strict", 2 * 1024**3)
    assert config.agents == {
        "analyst": AgentConfig(
            "analyst", "agents/analyst.py:agent", 3, {"MODEL": "small", "RETRIES": "3", "DEBUG": "yes"}, 12.5
        ),
        "no": AgentConfig("no", "package.module:agent"),
    }


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "agents:\n", "broker: {}\nagents: {}\n"])
def test_everything_has_a_default(tmp_path: Path, text: str) -> None:
    config = parse_mesh_config(text, path=tmp_path / "My project!" / "mesh.yaml")
    assert (config.name, config.broker, dict(config.agents)) == ("My-project", BrokerConfig(), {})
    assert config.callers == ("local",)


MISTAKES = {
    "unknown field": ("nmae: x\n", "1: has no field 'nmae' (did you mean 'name'?)"),
    "unknown field without a near one": ("zzz: x\n", "1: has no field 'zzz'; it takes name, broker, agents, callers"),
    "nested unknown field": ("broker:\n  prot: 1\n", "2: broker: has no field 'prot' (did you mean 'port'?)"),
    "agent field": ("agents:\n  a:\n    run: m:a\n    replica: 2\n", "4: agents.a: has no field 'replica'"),
    "twice": ("name: a\nname: b\n", "2: names 'name' twice"),
    "agent twice": ("agents:\n  a: {run: m:a}\n  a: {run: m:b}\n", "3: agents: names 'a' twice"),
    "mesh name": ("name: my mesh\n", "1: name: mesh name 'my mesh' is not a name"),
    "agent name": ("agents:\n  a.b: {run: m:a}\n", "2: agents: agent name 'a.b' is not a name"),
    "reserved agent": ("agents:\n  operator: {run: m:a}\n", "2: agents: agent name 'operator' is reserved"),
    "agents that differ in case": (
        "agents:\n  a: {run: m:a}\n  A: {run: m:a}\n",
        "3: agents: 'A' and 'a' differ only in case",
    ),
    "run is missing": ("agents:\n  a: {replicas: 2}\n", "2: agents.a: `run` is missing"),
    "agent without fields": ("agents:\n  a:\n", "2: agents.a: `run` is missing"),
    "run without an attribute": (
        "agents:\n  a: {run: agents/a.py}\n",
        "2: agents.a.run: 'agents/a.py' must name a file or module and the agent in it",
    ),
    "replicas": ("agents:\n  a: {run: m:a, replicas: many}\n", "2: agents.a.replicas: 'many' must be a whole number"),
    "negative": (
        "agents:\n  a: {run: m:a, replicas: -1}\n",
        "2: agents.a.replicas: '-1' must be a whole number from 0",
    ),
    "grace": ("agents:\n  a: {run: m:a, grace: 5m}\n", "2: agents.a.grace: '5m' must be a number of seconds"),
    "env name": ("agents:\n  a: {run: m:a, env: {A-B: x}}\n", "2: agents.a.env: 'A-B' cannot be the name"),
    "env value": ("agents:\n  a: {run: m:a, env: {A: [1]}}\n", "2: agents.a.env.A: must be one value"),
    "env without a value": ("agents:\n  a: {run: m:a, env: {A: }}\n", "2: agents.a.env.A: has no value"),
    "agents as a list": ("agents:\n  - a\n", "2: agents: must be a mapping"),
    "port": ("broker: {port: 70000}\n", "1: broker.port: '70000' must be a whole number from 0 to 65535"),
    "durability": (
        "broker: {durability: strickt}\n",
        "1: broker.durability: 'strickt' is unknown (did you mean 'strict'?); use one of laptop, strict",
    ),
    "size": ("broker: {max_bytes: lots}\n", "1: broker.max_bytes: 'lots' must be a size such as 512MB"),
    "no size": ("broker: {max_bytes: 0}\n", "1: broker.max_bytes: '0' must be a size"),
    "callers as a word": ("callers: local\n", "1: callers: must be a list of names"),
    "caller name": ("callers: [a b]\n", "1: callers: caller name 'a b' is not a name"),
    "caller that is an agent": (
        "agents:\n  a: {run: m:a}\ncallers: [a]\n",
        "3: callers: 'a' is taken by 'a': every agent and caller needs its own name",
    ),
    "not a mapping": ("- a\n- b\n", "1: must be a mapping"),
    "not YAML": ("name: [a\nagents: {}\n", "2: this is not YAML"),
    "a tab": ("broker:\n\tport: 1\n", "2: this is not YAML"),
    "code": ("name: !!python/object/apply:os.getcwd []\n", "1: name: must be one value"),
}


@pytest.mark.parametrize(("text", "wanted"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_reported_with_file_line_field_and_remedy(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(text)
    with pytest.raises(InvalidConfig) as refused:
        load_mesh_config(path)
    assert f"{path}:{wanted}" in str(refused.value)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = "nmae: x\nbroker: {port: x, durability: y}\nagents:\n  a b: {run: m:a}\n  c: {}\n"
    with pytest.raises(InvalidConfig) as refused:
        parse_mesh_config(text, path=tmp_path / "mesh.yaml")
    assert [line.split(":")[1] for line in str(refused.value).splitlines()] == ["1", "4", "5", "2", "2"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"there is no .*mesh.yaml; `mesh init` makes one"):
        load_mesh_config(tmp_path / "mesh.yaml")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidConfig, match="cannot be read"):
        load_mesh_config(path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("1K", 1024), ("512MB", 512 * 1024**2), ("10GiB", 10 * 1024**3), ("1 TB", 1024**4)],
)
def test_sizes_are_read(tmp_path: Path, text: str, size: int) -> None:
    config = parse_mesh_config(f"broker: {{max_bytes: {text}}}", path=tmp_path / "mesh.yaml")
    assert config.broker.max_bytes == size


def _record(home: Home, started: str) -> BrokerRecord:
    return BrokerRecord("nats://127.0.0.1:4222", os.getpid(), started, "laptop", 4222, 1024)
