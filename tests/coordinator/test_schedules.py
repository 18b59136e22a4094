"""Tasks that start by the clock: what can be written, that each time starts one task, and what was missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from a2a.types import a2a_pb2 as pb

from weft.client import coordinator
from weft.core import cron
from weft.core.broker import Broker, Stored
from weft.core.config import parse_mesh_config
from weft.core.history import StreamReader
from weft.testing.agents import coordinator_process, eventually
from weft.testing.invariants import read_log
from weft_coordinator.decide.index import nanoseconds
from weft_coordinator.decide.schedules import STARTED, UNSCHEDULED, Schedules
from weft_coordinator.service.due import SCHEDULE, TARGET
from weft_protocols import headers as h
from weft_protocols import ids
from weft_protocols.errors import ApiError, InvalidConfig, PermissionDenied
from weft_protocols.resources import COORD, DUE, SCHEDULES

if TYPE_CHECKING:
    from tests.coordinator.conftest import Stage

GOOD = (
    "* * * * * *", "0 0 2 * * *", "*/5 * * * * *", "0 0/15 8-18 * * MON-FRI", "0 0 0 29 2 *", "0 0 2 ? JAN,mar 1-5/2",
    "0 0 0 1,15 * 1", "59 59 23 31 12 *", "@hourly", "@daily", "@weekly", "@monthly", "@yearly", "@midnight",
    "@every 10s", "@every 1h30m", "@every 90s",
)  # fmt: skip
BAD = (
    "0 0 2 * *", "0 0 2 * * * *", "60 0 0 * * *", "0 60 0 * * *", "0 0 24 * * *", "0 0 0 0 * *", "0 0 0 32 * *",
    "0 0 0 * 13 *", "0 0 0 * * 7", "0 0 0 30 2 *", "0 0 0 L * *", "0 0 0 * * MON#1", "5-1 * * * * *", "*/0 * * * * *",
    "@every 500ms", "@every", "@every x", "@never",
)  # fmt: skip


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# What can be written -------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_what_is_read_here_is_what_the_broker_takes(fresh_stage: Stage) -> None:
    """Fails if a schedule passes that the broker refuses, or a good one is turned down."""
    broker = await fresh_stage.broker("coordinator")
    for number, (text, good) in enumerate([*((one, True) for one in GOOD), *((one, False) for one in BAD)]):
        values = {SCHEDULE: text, TARGET: f"{DUE}.x-{number}"}
        try:
            await broker.publish(f"{SCHEDULES}.x-{number}", b"", headers=h.block(h.fields(values)))
            taken = True
        except ApiError:
            taken = False
        try:
            cron.parse(text)
            read = True
        except ValueError:
            read = False
        assert (read, taken) == (good, good), text


@pytest.mark.parametrize(
    ("text", "zone", "after", "due"),
    [
        ("0 0 2 * * *", "", "2026-03-01T01:59:59", "2026-03-01T02:00:00"),
        ("0 0 2 * * *", "", "2026-03-01T02:00:00", "2026-03-02T02:00:00"),
        ("0 0 2 * * *", "Europe/Berlin", "2026-01-10T00:00:00", "2026-01-10T01:00:00"),
        ("0 0 2 * * *", "Europe/Berlin", "2026-07-10T00:00:00", "2026-07-11T00:00:00"),
        ("0 30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00", "2026-03-30T00:30:00"),
        ("0 0 0 29 2 *", "", "2026-01-01T00:00:00", "2028-02-29T00:00:00"),
        ("0 0 9 * * MON-FRI", "", "2026-11-27T12:00:00", "2026-11-30T09:00:00"),
        ("0 0 0 13 * 5", "", "2026-11-27T12:00:00", "2026-12-04T00:00:00"),
        ("*/20 * * * * *", "", "2026-11-27T12:00:41", "2026-11-27T12:01:00"),
        ("@weekly", "", "2026-11-27T12:00:41", "2026-11-29T00:00:00"),
    ],
)
def test_the_next_time_is_known(text: str, zone: str, after: str, due: str) -> None:
    assert cron.parse(text, zone).after(at(after)) == at(due)


def config(body: str, *, agents: Iterable[str] = ("reporter",), callers: Iterable[str] = ("local",)) -> str:
    lines = [f"  {agent}:\n    run: agent.py:agent\n" for agent in agents]
    return f"agents:\n{''.join(lines)}callers: [{', '.join(callers)}]\nschedules:\n{body}"


def test_a_schedule_is_read_with_its_defaults() -> None:
    text = config('  nightly:\n    agent: reporter\n    cron: "0 0 2 * * *"\n    message: report\n')
    (made,) = parse_mesh_config(text, path=Path("/p/mesh.yaml")).schedules.values()
    assert made.told() == {
        "name": "nightly", "agent": "reporter", "cron": "0 0 2 * * *", "message": "report", "skill": "",
        "caller": "local", "context": "", "timezone": "", "missed": "last",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("cron", '"0 0 2 * *"', "has 5 fields; it takes six"),
        ("cron", '"0 0 25 * * *"', "the hour '25' must be 0 to 23"),
        ("agent", "reportr", "there is no agent 'reportr' (did you mean 'reporter'?)"),
        ("caller", "nobody", "there is no caller 'nobody'; there are local"),
        ("timezone", "Mars/North", "timezone 'Mars/North' is not known"),
        ("missed", "some", "there are last, all"),
        ("when", "now", "has no field 'when'"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_field(field: str, value: str, said: str) -> None:
    values = {"agent": "reporter", "cron": '"0 0 2 * * *"', "message": "report"} | {field: value}
    body = "  nightly:\n" + "".join(f"    {name}: {text}\n" for name, text in values.items())
    with pytest.raises(InvalidConfig) as caught:
        parse_mesh_config(config(body), path=Path("/p/mesh.yaml"))
    assert said in str(caught.value)
    line = 7 + list(values).index(field)
    assert str(caught.value).startswith(f"/p/mesh.yaml:{line}: schedules.nightly")


def test_what_is_missing_is_told() -> None:
    with pytest.raises(InvalidConfig, match=r"mesh.yaml:7: schedules.nightly: `cron` is missing"):
        parse_mesh_config(config("  nightly:\n    agent: reporter\n    message: x\n"), path=Path("/p/mesh.yaml"))


def test_the_ledger_knows_what_the_broker_was_given() -> None:
    ledger, told = Schedules(), {"agent": "a", "cron": "@daily"}
    events, gone = ledger.change({"one": told})
    for event in (*events, *ledger.change({"one": told, "two": told})[0]):
        ledger.apply(event, number=1, at=7)
    assert (ledger.change({"one": told, "two": told}), gone) == (([], []), [])
    assert ledger.change({"two": told | {"cron": "@hourly"}})[1] == ["one"]
    ledger.apply((STARTED, "one", 50, "task"), number=2, at=8)
    assert ledger.started("one", 50, "task") == [], "told again"
    after = Schedules()
    after.load(ledger.dump())
    assert after.all == ledger.all
    assert (after.all["one"].last, after.all["one"].since) == (50, 7)
    after.apply((UNSCHEDULED, "one"), number=3, at=9)
    assert list(after.all) == ["two"]


# With a broker -------------------------------------------------------------------------------------


def write(stage: Stage, body: str) -> None:
    """A `mesh.yaml` where the coordinator of a stage looks for it."""
    path = stage.mesh.home.parent / "mesh.yaml"
    new = path.with_suffix(".new")
    new.write_text(config(body, agents=("agent-0", "agent-1", "agent-2")))
    new.rename(path)


def schedule(name: str, times: str, **fields: str) -> str:
    told = {"agent": "agent-0", "cron": f'"{times}"', "message": f"do {name}"} | fields
    return f"  {name}:\n" + "".join(f"    {field}: {value}\n" for field, value in told.items())


async def started(stage: Stage) -> list[pb.Message]:
    """The messages of the tasks that were started, in the order of acceptance."""
    log = await read_log(await stage.broker("coordinator"))
    sent = [one for one in log if one.subject.startswith("mesh.task.")]
    return [pb.SendMessageRequest.FromString(one.data).message for one in sent]


def due(message: pb.Message) -> str:
    return str(message.metadata["weft.due"])


@pytest.mark.anyio
async def test_each_time_starts_one_task_and_a_schedule_that_is_gone_none(fresh_stage: Stage) -> None:
    stage = fresh_stage
    write(
        stage,
        schedule("often", "@every 1s", skill="work") + schedule("never", "0 0 0 29 2 *", timezone="Europe/Berlin"),
    )
    await stage.coordinator()
    operator = await stage.broker("operator")
    await eventually(lambda: enough(stage, 1))
    messages = await started(stage)
    assert len({due(one)[:19] for one in messages}) == len(messages), "one task a second"
    first = messages[0]
    assert (first.parts[0].text, first.metadata["weft.skill"], first.metadata["weft.schedule"]) == (
        "do often", "work", "often",
    )  # fmt: skip
    assert first.context_id == ids.task_id("local", "agent-0", first.message_id)
    told = {one["name"]: one for one in (await coordinator.call(operator, "schedules"))["schedules"]}
    assert told["never"]["last"] == 0
    assert datetime.fromtimestamp(told["never"]["next"] / 1000, UTC).month == 2
    assert told["often"]["last"] > 0
    assert 0 < told["often"]["next"] - told["often"]["last"] <= 2000
    with pytest.raises(PermissionDenied):
        await coordinator.call(await stage.broker("local"), "schedules")

    write(stage, schedule("never", "0 0 0 29 2 *"))
    await eventually(lambda: only(stage, ["never"]))
    before = len(await started(stage))
    write(stage, schedule("other", "@every 1s"))
    await more(stage)
    assert {one.parts[0].text for one in (await started(stage))[before:]} == {"do other"}


@pytest.mark.anyio
async def test_a_file_with_a_mistake_changes_nothing(fresh_stage: Stage) -> None:
    stage = fresh_stage
    write(stage, schedule("often", "@every 1s"))
    await stage.coordinator()
    await eventually(lambda: only(stage, ["often"]))
    write(stage, schedule("often", "@every 1x"))
    await more(stage)
    assert await only(stage, ["often"])


@pytest.mark.anyio
@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_a_time_starts_one_task_whichever_coordinator_is_killed(fresh_stage: Stage) -> None:
    """Fails if a time is started twice or not at all when the leader is killed while it starts it."""
    stage = fresh_stage
    write(stage, schedule("often", "@every 1s", missed="all"))
    first = await coordinator_process(stage.mesh).start()
    try:
        await more(stage)
        for _ in range(6):
            async with coordinator_process(stage.mesh) as second:
                first.kill()
                await first.exited()
                await more(stage)
                first = await coordinator_process(stage.mesh).start()
                second.kill()
                await second.exited()
                await more(stage)
        broker = await stage.broker("coordinator")
        await broker.api("STREAM.PURGE.MESH_COORD", {"filter": f"{SCHEDULES}.c-often"})
        await eventually(lambda: handled(stage))
        times = [nanoseconds(one.time) // 1_000_000 for one in await read_due(broker)]
    finally:
        await first.aclose()
    assert sorted(one.message_id for one in await started(stage)) == sorted(f"often-{time}" for time in times)
    assert len(times) > 12


@pytest.mark.anyio
async def test_what_was_due_without_a_coordinator_is_started_when_it_is_back(fresh_stage: Stage) -> None:
    """Fails if times that nobody started are lost, or all come at once where only the last one was wanted."""
    stage = fresh_stage
    write(stage, schedule("every", "@every 1s", missed="all") + schedule("newest", "@every 1s"))
    running = await stage.coordinator()
    await eventually(lambda: only(stage, ["every", "newest"]))
    await stage.stop(running)
    before = Counter(one.parts[0].text for one in await started(stage))
    broker = await stage.broker("coordinator")

    async def pending() -> int:
        return int((await broker.api("CONSUMER.INFO.MESH_COORD.due"))["num_pending"])

    async def missed() -> bool:
        return await pending() >= 4

    await eventually(missed)
    for name in ("every", "newest"):
        await broker.api("STREAM.PURGE.MESH_COORD", {"filter": f"{SCHEDULES}.c-{name}"})
    each = await pending() // 2
    write(stage, schedule("every", "0 0 0 29 2 *", missed="all") + schedule("newest", "0 0 0 29 2 *"))
    await stage.coordinator()
    await eventually(lambda: handled(stage))
    after = Counter(one.parts[0].text for one in await started(stage)) - before
    assert after == {"do every": each, "do newest": 1}


async def handled(stage: Stage) -> bool:
    """Whether everything that was due is done with."""
    info = await (await stage.broker("coordinator")).api("CONSUMER.INFO.MESH_COORD.due")
    return not info["num_pending"] and not info["num_ack_pending"]


async def read_due(broker: Broker) -> list[Stored]:
    """What the broker said is due."""
    reader = await StreamReader(broker).open()
    try:
        return await reader.all(COORD, f"{DUE}.>")
    finally:
        await reader.close()


async def more(stage: Stage) -> None:
    """Return when one more task was started."""
    count = len(await started(stage))
    await eventually(lambda: enough(stage, count + 1))


async def enough(stage: Stage, count: int) -> bool:
    """Whether so many tasks were started."""
    return len(await started(stage)) >= count


async def only(stage: Stage, names: list[str]) -> bool:
    """Whether these are the schedules, for the coordinator and for the broker."""
    broker = await stage.broker("operator")
    told: dict[str, Any] = await coordinator.call(broker, "schedules")
    info = await (await stage.broker("coordinator")).api(
        "STREAM.INFO.MESH_COORD", {"subjects_filter": f"{SCHEDULES}.>"}
    )  # fmt: skip
    stored = [one.rpartition(".c-")[2] for one in info["state"].get("subjects") or {}]
    return [one["name"] for one in told["schedules"]] == names == stored
