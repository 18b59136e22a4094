"""Sections `watchdog` and `alerts` of mesh.yaml."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from weft.core.config import MeshConfig, parse_mesh_config
from weft.core.watchconf import AlertTarget, WatchConfig
from weft_protocols.errors import InvalidConfig

PATH = Path("/project/mesh.yaml")


def parse(text: str) -> MeshConfig:
    return parse_mesh_config(text, path=PATH)


def test_without_the_sections_the_defaults_hold_and_nobody_is_told() -> None:
    config = parse("name: x\n")
    assert config.watchdog == WatchConfig()
    assert config.alerts == ()


def test_every_limit_can_be_set() -> None:
    names = [one.name for one in fields(WatchConfig) if one.name not in ("enabled", "agents")]
    text = "".join(f"  {name}: 7\n" for name in names)
    watchdog = parse(f"watchdog:\n  enabled: false\n{text}").watchdog
    assert not watchdog.enabled
    assert {getattr(watchdog, name) for name in names} == {7}


def test_an_agent_s_budget_is_its_own_else_that_of_all_else_its_code_s() -> None:
    watchdog = parse("watchdog: {progress_within: 60, agents: {slow: {progress_within: 3600}}}\n").watchdog
    assert (watchdog.budget("slow"), watchdog.budget("other")) == (3600, 60)
    assert WatchConfig().budget("other") is None


def test_targets_name_where_their_address_is() -> None:
    targets = parse("alerts: [{url_env: SLACK_URL, min_severity: critical}, {url_file: secrets/pager}]\n").alerts
    assert targets == (AlertTarget("SLACK_URL", None, "critical"), AlertTarget("", PATH.parent / "secrets/pager"))
    assert [target.name for target in targets] == ["SLACK_URL", "/project/secrets/pager"]


def test_an_address_is_read_when_it_is_needed(tmp_path: Path) -> None:
    assert AlertTarget("X").url({"X": " json://host \n"}) == "json://host"
    with pytest.raises(InvalidConfig, match="X is empty"):
        AlertTarget("X").url({})
    file = tmp_path / "pager"
    with pytest.raises(InvalidConfig, match="cannot be read"):
        AlertTarget("", file).url()
    file.write_text("json://host\n")
    assert AlertTarget("", file).url() == "json://host"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("watchdog: {retrys: 3}", "has no field 'retrys' (did you mean 'retries'?)"),
        ("watchdog: {retries: 0}", "must be a whole number from 1"),
        ("watchdog: {clear_after: 0}", "more than 0 seconds"),
        ("watchdog: {stream_percent: 101}", "from 1 to 100"),
        ("watchdog: {enabled: perhaps}", "true or false"),
        ("watchdog: {agents: {a: {concurrency: 3}}}", "has no field 'concurrency'"),
        ("alerts: {url_env: X}", "must be a list"),
        ("alerts: [{min_severity: warning}]", "either url_env or url_file"),
        ("alerts: [{url_env: A, url_file: b}]", "either url_env or url_file"),
        ("alerts: [{url_env: A, min_severity: loud}]", "use one of info, warning, critical"),
        ("alerts: [{url: 'slack://x'}]", "has no field 'url'"),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse(f"name: x\n{text}\n")
    assert "mesh.yaml:2" in str(caught.value)
    assert words in str(caught.value)


def test_an_address_in_place_of_its_variable_is_a_mistake_that_does_not_repeat_it() -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse("alerts: [{url_env: 'slack://token/secret'}]\n")
    assert "secret" not in str(caught.value)


def test_the_documentation_names_every_limit_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in page.split("```yaml\n")]
    (limits,) = [block for block in blocks if block.startswith("watchdog:")]
    (targets,) = [block for block in blocks if block.startswith("alerts:")]
    assert parse(limits).watchdog == WatchConfig()
    assert [one.name for one in fields(WatchConfig) if f"{one.name}:" not in limits] == []
    assert len(parse(targets).alerts) == 2
