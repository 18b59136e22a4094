"""What counts as healthy, and which command is named when it is not."""

from dataclasses import replace
from typing import Any

import pytest

from weft.cli.assess import DEGRADED, DOWN, OK, Check, assess, healthy, size
from weft.cli.observe import AgentFacts, Facts, GatewayFacts, LaneFacts, ReplicaFacts, StreamFacts, unix_seconds

LANE = LaneFacts(pending=0, active=0, redelivered=0, oldest=None)
REPLICA = ReplicaFacts("r1", "1.0", "ready", active=0, slots=4, seen=1.0, progress=5.0, pid=11, host="here")
AGENT = AgentFacts("hello", "1.0", "greets", ("greet",), (REPLICA,))
PROCESS: dict[str, Any] = {
    "name": "hello.1", "kind": "agent", "agent": "hello", "pid": 11, "state": "ready", "reason": "",
}  # fmt: skip
COORDINATOR = {"name": "coordinator", "kind": "coordinator", "agent": "", "pid": 2, "state": "ready", "reason": ""}
WELL = Facts(
    url="nats://127.0.0.1:4222",
    latency=0.001,
    clock=0.0,
    streams={"MESH": StreamFacts("MESH", 10, 1000, -1)},
    lanes={("hello", "work"): LANE, ("hello", "input"): LANE},
    agents={"hello": AGENT},
    silence="",
    processes=(COORDINATOR, PROCESS),
)


def found(facts: Facts) -> dict[str, Check]:
    return {check.component: check for check in assess(facts)}


def test_a_mesh_where_everything_answers_is_healthy() -> None:
    checks = assess(WELL)
    assert healthy(checks)
    assert [check.component for check in checks] == ["broker", "stream MESH", "coordinator", "agent hello"]
    assert all(check.status == OK and check.next == "" for check in checks)
    assert "1/1 replicas ready" in checks[-1].detail


def test_a_silent_coordinator_is_down_and_the_rest_is_still_judged() -> None:
    checks = found(replace(WELL, agents=None, silence="no answer within 2 s"))
    assert checks["coordinator"].status == DOWN
    assert checks["coordinator"].next == "mesh restart coordinator"
    assert checks["agent hello"].status == OK
    assert "1/1 replicas ready" in checks["agent hello"].detail


def test_a_standby_that_does_not_run_is_named_although_the_coordinator_answers() -> None:
    standby = {**COORDINATOR, "name": "coordinator.2"}
    assert "coordinator.2" not in found(replace(WELL, processes=(COORDINATOR, standby, PROCESS)))
    failed = {**standby, "state": "failed", "reason": "exit code 2"}
    checks = found(replace(WELL, processes=(COORDINATOR, failed, PROCESS)))
    assert checks["coordinator"].status == OK
    assert (checks["coordinator.2"].status, checks["coordinator.2"].next) == (DOWN, "mesh restart coordinator.2")


def test_a_failed_coordinator_is_told_with_its_reason() -> None:
    failed = {**COORDINATOR, "state": "failed", "reason": "exit 1: no such module"}
    check = found(replace(WELL, agents=None, silence="nobody answers", processes=(failed, PROCESS)))["coordinator"]
    assert "failed; exit 1: no such module" in check.detail


def test_a_missing_stream_is_down() -> None:
    check = found(replace(WELL, streams={"MESH": None}))["stream MESH"]
    assert (check.status, check.next) == (DOWN, "mesh restart broker")


def test_a_stream_that_is_nearly_full_is_degraded() -> None:
    assert found(replace(WELL, streams={"MESH": StreamFacts("MESH", 1, 95, 100)}))["stream MESH"].status == DEGRADED
    assert found(replace(WELL, streams={"MESH": StreamFacts("MESH", 1, 85, 100)}))["stream MESH"].status == OK


def test_an_agent_without_its_consumers_is_down() -> None:
    check = found(replace(WELL, lanes={("hello", "work"): LANE}))["agent hello"]
    assert check.status == DOWN
    assert "consumer input is missing" in check.detail
    assert check.next == "mesh restart hello"


@pytest.mark.parametrize("state", ["starting", "backoff", "failed"])
def test_a_replica_that_is_not_ready_is_named(state: str) -> None:
    row = {**PROCESS, "name": "hello.2", "pid": None, "state": state, "reason": "exit 1: boom"}
    checks = found(replace(WELL, processes=(COORDINATOR, PROCESS, row)))
    assert checks["agent hello"].status == DEGRADED
    assert "1 of 2 not ready" in checks["agent hello"].detail
    replica = checks["replica hello.2"]
    assert replica.detail == f"{state}: exit 1: boom"
    assert replica.next == ("mesh restart hello.2" if state == "failed" else "mesh logs hello.2")


def test_a_replica_that_runs_and_does_not_report_is_degraded() -> None:
    stale = replace(AGENT, replicas=(replace(REPLICA, state="stale", seen=20.0),))
    checks = found(replace(WELL, agents={"hello": stale}))
    assert checks["agent hello"].status == DOWN
    assert checks["replica hello.1"].detail == "runs but does not report"


def test_a_replica_elsewhere_that_stopped_reporting_is_down() -> None:
    stale = replace(AGENT, replicas=(REPLICA, replace(REPLICA, id="r2", pid=12, state="stale", seen=20.0)))
    checks = found(replace(WELL, agents={"hello": stale}, processes=None))
    assert checks["replica hello/r2"].status == DOWN
    assert "no report for 20s" in checks["replica hello/r2"].detail


def test_an_agent_scaled_to_nothing_is_well_until_tasks_wait() -> None:
    idle = replace(WELL, agents={"hello": replace(AGENT, replicas=())}, processes=(COORDINATOR,))
    assert found(idle)["agent hello"].status == OK
    waiting = replace(idle, lanes={**WELL.lanes, ("hello", "work"): replace(LANE, pending=3, oldest=2.0)})
    check = found(waiting)["agent hello"]
    assert (check.status, check.next) == (DOWN, "mesh scale hello 1")


def test_tasks_that_wait_too_long_ask_for_more_replicas() -> None:
    lanes = {**WELL.lanes, ("hello", "work"): replace(LANE, pending=3, active=4, oldest=45.0)}
    check = found(replace(WELL, lanes=lanes))["agent hello"]
    assert (check.status, check.next) == (DEGRADED, "mesh scale hello 2")
    assert "3 waiting (oldest 45s), 4 active" in check.detail


def test_work_without_progress_is_degraded_even_if_the_replica_lives() -> None:
    stuck = replace(AGENT, replicas=(replace(REPLICA, active=2, progress=3600.0),))
    check = found(replace(WELL, agents={"hello": stuck}))["replica hello/r1"]
    assert check.status == DEGRADED
    assert "2 tasks without progress for 1h00m" in check.detail


def test_a_clock_that_is_off_is_degraded() -> None:
    check = found(replace(WELL, clock=-30.0))["broker"]
    assert (check.status, check.next) == (DEGRADED, "mesh doctor")
    assert "30s behind its" in check.detail


def test_a_supervisor_that_does_not_answer_is_down() -> None:
    row = {"name": "supervisor", "kind": "supervisor", "agent": "", "state": "down", "reason": "is silent"}
    assert found(replace(WELL, processes=(row,)))["process supervisor"].status == DOWN


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (1_700_000_000_500, 1_700_000_000.5),
        ("2023-11-14T22:13:20.5Z", 1_700_000_000.5),
        ("2023-11-14T22:13:20.500000999Z", 1_700_000_000.5),
        ("2023-11-14T23:13:20+01:00", 1_700_000_000.0),
        ("2023-11-14T23:13:20.5+01:00", 1_700_000_000.5),
        ("", None),
        ("soon", None),
        (None, None),
        (True, None),
    ],
)
def test_times_are_milliseconds_or_rfc_3339(value: object, seconds: float | None) -> None:
    assert unix_seconds(value) == seconds


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1200, "1.2 kB"), (34_000, "34 kB"), (5e12, "5.0 TB")]
)
def test_sizes_are_short(count: float, shown: str) -> None:
    assert size(count) == shown


GATEWAY = {"name": "gateway", "kind": "gateway", "agent": "", "pid": 4, "state": "ready", "reason": ""}
AT = GatewayFacts("http://127.0.0.1:8080", "127.0.0.1:50051", "")


def test_a_gateway_that_answers_is_shown_with_its_addresses() -> None:
    check = found(replace(WELL, gateway=AT, processes=(GATEWAY, PROCESS)))["gateway"]
    assert (check.status, check.detail) == (OK, "http://127.0.0.1:8080/agents, gRPC 127.0.0.1:50051")


def test_a_gateway_that_does_not_answer_is_degraded() -> None:
    check = found(replace(WELL, gateway=replace(AT, reason="no answer within 2 s")))["gateway"]
    assert (check.status, check.next) == (DEGRADED, "mesh logs gateway")
    assert "no answer within 2 s" in check.detail


def test_a_failed_gateway_is_told_with_its_reason() -> None:
    failed = {**GATEWAY, "state": "failed", "reason": "exit 2: the port is taken"}
    check = found(replace(WELL, processes=(failed, PROCESS)))["gateway"]
    assert (check.status, check.detail, check.next) == (DOWN, "exit 2: the port is taken", "mesh restart gateway")


def test_a_builtin_server_that_cannot_be_used_is_named() -> None:
    sidecar = {"name": "sidecar", "kind": "sidecar", "agent": "", "pid": 3, "state": "ready", "reason": ""}
    server: dict[str, Any] = {"name": "code", "transport": "builtin", "enabled": True, "failure": "", "degraded": ""}
    failed = {**server, "failure": "the builtin code needs pydantic_monty"}
    facts = replace(WELL, processes=(*(WELL.processes or ()), sidecar))
    assert "tool server code" not in found(replace(facts, tools=(server,)))
    check = found(replace(facts, tools=(failed,)))["tool server code"]
    assert (check.status, check.detail, check.next) == (DEGRADED, failed["failure"], "mesh restart sidecar")
    assert "tool server code" not in found(replace(facts, tools=({**failed, "enabled": False},)))


def test_a_server_whose_answers_nobody_can_look_through_is_degraded() -> None:
    sidecar = {**PROCESS, "name": "sidecar", "kind": "sidecar"}
    server = {"name": "crm", "enabled": True, "transport": "http", "failure": "", "unredacted": ""}
    facts = replace(WELL, processes=(COORDINATOR, PROCESS, sidecar), tools=(server,))
    assert "redaction of crm" not in found(facts)
    check = found(replace(facts, tools=({**server, "unredacted": "not installed"},)))["redaction of crm"]
    assert (check.status, check.next) == (DEGRADED, "mesh tools show crm")
    assert check.detail.endswith("not installed")
