"""A coordinator's life: restarts of it and of the broker, several at once, overload, its process."""

from __future__ import annotations

import asyncio
import logging
import shutil
from typing import TYPE_CHECKING

import pytest
from a2a.types import a2a_pb2 as pb

from weft.client import coordinator, reads
from weft.client.coordinator import Heartbeat, Registration
from weft.core.history import StreamReader
from weft.core.home import Accounts
from weft.core.keys import new_seed, write_seed
from weft.testing.agents import Process, client, coordinator_process, eventually
from weft_coordinator.service.settings import Settings
from weft_protocols import events, subjects
from weft_protocols.errors import A2AError, InternalError, InvalidConfig, Unavailable, WeftError
from weft_protocols.resources import STREAM
from weft_protocols.states import State

if TYPE_CHECKING:
    from tests.coordinator.conftest import Running, Sent, Stage

pytestmark = pytest.mark.anyio

QUICK = Settings(poll=0.05, beat=0.05)


def state(task: pb.Task) -> State:
    return State(task.status.state)


async def restart_broker(stage: Stage, running: Running, *, empty: bool = False) -> None:
    """Stop the broker and start it again on its port; `empty`: without anything it had stored."""
    server = stage.mesh.server
    await server.stop()
    if empty:
        await asyncio.to_thread(shutil.rmtree, stage.mesh.home / "broker" / "js")
    await server.start()
    for broker in (running.broker, *[await stage.broker(name) for name in ("local", "operator", "agent-0")]):
        await broker.wait_connected(10)


# Restarts ------------------------------------------------------------------------------------------


async def test_a_restarted_coordinator_knows_everything_again(fresh_stage: Stage) -> None:
    stage = fresh_stage
    running = await stage.coordinator()
    done, waiting = await stage.done("agent-0"), await stage.send("agent-1")
    lost = await stage.send("agent-0")
    await (await stage.claim(lost)).give_up("no use")
    broker = await stage.broker("agent-0")
    await coordinator.register(broker, Registration("agent-0", "1.0", "r1", 1, 4, description="an echo"))
    await stage.stop(running)

    with pytest.raises(Unavailable):
        await reads.page(await stage.broker("local"), None, pb.ListTasksRequest(), caller="local")
    await stage.coordinator()
    assert {task.id for task in (await stage.list("local")).tasks} == {done.task, waiting.task, lost.task}
    status = await coordinator.status(await stage.broker("operator"))
    assert (status.tasks, status.dead_letters) == (3, 1)
    assert [(agent.name, agent.description) for agent in status.agents] == [("agent-0", "an echo")]
    assert await coordinator.heartbeat(broker, "agent-0", Heartbeat("r1"))


async def test_dead_letters_of_before_are_counted_but_not_told_again(
    fresh_stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage = fresh_stage
    sent = await stage.send("agent-0")
    await (await stage.claim(sent)).give_up("no use")
    with caplog.at_level(logging.WARNING, "weft.coordinator"):
        await stage.coordinator()
    assert "1 dead letters" in caplog.text
    assert sent.task not in caplog.text


async def test_a_page_token_outlives_the_coordinator_that_made_it(fresh_stage: Stage) -> None:
    stage = fresh_stage
    sent = [(await stage.done("agent-0", f"{n}")).task for n in range(4)]
    running = await stage.coordinator()
    first = await stage.list("local", page_size=2)
    await stage.stop(running)
    await stage.done("agent-0", "meanwhile")
    await stage.coordinator()
    rest = await stage.list("local", page_size=9, page_token=first.next_page_token)
    assert [task.id for task in (*first.tasks, *rest.tasks)] == sent[::-1]
    assert rest.next_page_token == ""


async def test_it_serves_on_after_the_broker_was_restarted(fresh_stage: Stage) -> None:
    stage = fresh_stage
    running = await stage.coordinator(QUICK)
    before = await stage.done("agent-0", "before")
    await coordinator.register(await stage.broker("agent-0"), Registration("agent-0", "1.0", "r1", 1, 4))
    assert (await stage.list("local")).total_size == 1
    await restart_broker(stage, running)
    after = await stage.done("agent-0", "after")
    assert state(await stage.get(before)) == state(await stage.get(after)) == State.COMPLETED
    assert {task.id for task in (await stage.list("local")).tasks} == {before.task, after.task}
    assert await coordinator.heartbeat(await stage.broker("agent-0"), "agent-0", Heartbeat("r1"))
    assert running.errors == []


async def test_a_broker_that_comes_back_empty_is_set_up_anew(fresh_stage: Stage) -> None:
    stage = fresh_stage
    running = await stage.coordinator(QUICK)
    lost = await stage.done("agent-0", "lost")
    assert (await stage.list("local")).total_size == 1
    await restart_broker(stage, running, empty=True)
    operator = await stage.broker("coordinator")

    async def consumer() -> bool:
        try:
            await operator.api(f"CONSUMER.INFO.{STREAM}.{subjects.consumer('agent-0', 'input')}")
        except WeftError:
            return False
        return True

    await eventually(consumer)
    kept = await stage.done("agent-0", "kept")
    assert [task.id for task in (await stage.list("local")).tasks] == [kept.task]
    assert (await stage.refused("local", "GetTask", pb.GetTaskRequest(id=lost.task))).reason == "TASK_NOT_FOUND"


async def test_work_goes_on_without_any_coordinator(fresh_stage: Stage) -> None:
    async with client(fresh_stage.mesh) as mesh:
        handle = await mesh.submit("agent-0", "hello")
        claimed = await fresh_stage.claim(
            await _as_sent(fresh_stage, handle.id, context=handle.context_id, origin=mesh.origin)
        )
        await claimed.complete("hello back")
        view = await handle.result(10)
        assert (view.state, view.text) == (State.COMPLETED, "hello back")
        with pytest.raises(Unavailable):
            await mesh.get("agent-0", handle.id)


async def _as_sent(stage: Stage, task: str, *, context: str, origin: str) -> Sent:
    template = await stage.send("agent-1")
    return type(template)("agent-0", "local", task, context, "", 1, origin)


# Several at once -----------------------------------------------------------------------------------


async def test_two_coordinators_answer_alike_and_one_is_enough(fresh_stage: Stage) -> None:
    stage = fresh_stage
    one, two = await stage.coordinator(QUICK), await stage.coordinator(QUICK)
    sent = [(await stage.done("agent-0", f"{n}")).task for n in range(30)]
    seen: list[str] = []
    token = ""
    while True:
        page = await stage.list("local", page_size=3, page_token=token)
        seen += [task.id for task in page.tasks]
        await stage.done("agent-0", "another")
        if not (token := page.next_page_token):
            break
    assert seen == sent[::-1]
    statuses = [await coordinator.status(await stage.broker("operator")) for _ in range(40)]
    assert {status.coordinator for status in statuses} == {one.coordinator.id, two.coordinator.id}
    await stage.stop(one)
    assert (await stage.list("local")).total_size == 40
    assert (await coordinator.status(await stage.broker("operator"))).coordinator == two.coordinator.id


async def test_every_coordinator_hears_every_sign_of_life(fresh_stage: Stage) -> None:
    stage = fresh_stage
    await stage.coordinator()
    await stage.coordinator()
    broker, operator = await stage.broker("agent-0"), await stage.broker("operator")
    await coordinator.register(broker, Registration("agent-0", "1.0", "r1", 1, 4))
    assert await coordinator.heartbeat(broker, "agent-0", Heartbeat("r1", active=3))
    await asyncio.gather(*(broker.flush(), operator.flush()))

    async def both() -> bool:
        told = {}
        for _ in range(40):
            status = await coordinator.status(operator)
            told[status.coordinator] = [replica.active for agent in status.agents for replica in agent.replicas]
        return len(told) == 2 and all(active == [3] for active in told.values())

    await eventually(both)


async def test_a_change_by_one_coordinator_is_known_to_the_other(fresh_stage: Stage) -> None:
    stage = fresh_stage
    await stage.coordinator()
    await stage.coordinator()
    broker = await stage.broker("agent-0")
    for n in range(8):
        await coordinator.register(broker, Registration("agent-0", "1.0", f"r{n}", 1, 4))
        for _ in range(3):
            (agent,) = await coordinator.agents(await stage.broker("local"))
            assert agent.ready == n + 1


# Bounds --------------------------------------------------------------------------------------------


async def test_too_many_requests_are_refused_by_name_and_the_rest_answered(fresh_stage: Stage) -> None:
    stage = fresh_stage
    await stage.coordinator(Settings(concurrency=1, backlog=4, backlog_per_caller=4))
    sent = await stage.done("agent-0")
    outcomes = await asyncio.gather(*(stage.get(sent) for _ in range(60)), return_exceptions=True)
    refused = [one for one in outcomes if isinstance(one, A2AError)]
    answered = [one for one in outcomes if isinstance(one, pb.Task)]
    assert len(refused) + len(answered) == 60
    assert len(answered) >= 4
    assert refused
    assert {(type(one), one.metadata["weft.error"]) for one in refused} == {(InternalError, "Backpressure")}
    assert state(await stage.get(sent)) == State.COMPLETED


async def test_one_callers_flood_leaves_room_for_others(fresh_stage: Stage) -> None:
    stage = fresh_stage
    await stage.coordinator(Settings(concurrency=1, backlog=100, backlog_per_caller=3))
    mine, theirs = await stage.done("agent-0"), await stage.done("agent-0", caller="mallory")
    flood = [stage.get(theirs) for _ in range(60)]
    *_, answer = await asyncio.gather(*flood, stage.get(mine), return_exceptions=True)
    assert isinstance(answer, pb.Task)


async def test_what_takes_too_long_is_answered_with_an_error(fresh_stage: Stage) -> None:
    await fresh_stage.coordinator(Settings(deadline=0.0))
    sent = await fresh_stage.send("agent-0")
    error = await fresh_stage.refused("local", "GetTask", pb.GetTaskRequest(id=sent.task))
    assert (type(error), error.metadata["weft.error"]) == (InternalError, "TimedOut")


async def test_old_finished_tasks_read_the_same_without_their_detail(fresh_stage: Stage) -> None:
    stage = fresh_stage
    await stage.coordinator(Settings(finished_tasks=0))
    sent = await stage.send("agent-0", "go")
    worker = await stage.claim(sent)
    await worker.ask("sure?")
    await stage.follow_up(sent, "yes")
    await worker.complete("gone")
    task = await stage.get(sent)
    assert [message.parts[0].text for message in task.history] == ["go", "sure?", "yes"]
    assert task.artifacts[0].parts[0].text == "gone"
    page = await stage.rpc("local", "SubscribeToTask", pb.SubscribeToTaskRequest(id=sent.task))
    assert [event.n for event in events.unpack(page.data)] == [1, 2, 3, 4]
    listed = (await stage.list("local", include_artifacts=True, history_length=9)).tasks[0]
    assert listed == task


async def test_more_tasks_than_one_read_takes_are_all_known(fresh_stage: Stage) -> None:
    stage = fresh_stage
    async with asyncio.TaskGroup() as group:
        for n in range(1100):
            group.create_task(stage.send("agent-0", f"{n}"))
    running = await stage.coordinator()
    assert (await stage.list("local", page_size=1)).total_size == 1100
    reader = await StreamReader(running.broker).open()
    assert len(await reader.all(STREAM, "mesh.task.>")) == 1100
    batch = await reader.batch(STREAM, "mesh.task.>", start=1099, count=1)
    assert ([one.seq for one in batch.messages], batch.more) == ([1099], True)
    assert await reader.message(STREAM, 5000) is None
    await reader.close()


async def test_a_difference_in_the_broker_is_told_and_left_alone(
    fresh_stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    operator = await fresh_stage.broker("coordinator")
    config = (await operator.api(f"STREAM.INFO.{STREAM}"))["config"]
    await operator.api(f"STREAM.UPDATE.{STREAM}", {**config, "max_msgs": 1_000_000})
    with caplog.at_level(logging.WARNING, "weft.coordinator"):
        await fresh_stage.coordinator()
    assert "max_msgs" in caplog.text
    (drift,) = (await coordinator.status(await fresh_stage.broker("operator"))).drift
    assert "max_msgs is 1000000" in drift
    assert (await operator.api(f"STREAM.INFO.{STREAM}"))["config"]["max_msgs"] == 1_000_000


# The process ---------------------------------------------------------------------------------------


async def test_the_process_says_ready_serves_and_ends_well_when_told_to(fresh_stage: Stage) -> None:
    sent = await fresh_stage.done("agent-0")
    async with coordinator_process(fresh_stage.mesh) as process:
        assert process.ready_line == "ready"
        assert state(await fresh_stage.get(sent)) == State.COMPLETED
        process.terminate()
        assert await process.exited() == 0, process.tail()


async def test_the_process_ends_when_whoever_started_it_is_gone(fresh_stage: Stage) -> None:
    async with coordinator_process(fresh_stage.mesh) as process:
        process.orphan()
        assert await process.exited() == 0, process.tail()


async def test_a_killed_process_is_replaced_by_another(fresh_stage: Stage) -> None:
    sent = await fresh_stage.done("agent-0")
    async with coordinator_process(fresh_stage.mesh) as first:
        first.kill()
        await first.exited()
    async with coordinator_process(fresh_stage.mesh):
        assert [task.id for task in (await fresh_stage.list("local")).tasks] == [sent.task]


async def _failing(env: dict[str, str]) -> Process:
    process = Process(("-m", "weft_coordinator.service"), ready="ready", env=env)
    with pytest.raises(Unavailable):
        await process.start()
    return process


async def test_without_a_broker_the_process_says_why_it_cannot_start(fresh_stage: Stage) -> None:
    await fresh_stage.mesh.server.stop()
    process = await _failing({"WEFT_HOME": str(fresh_stage.mesh.home)})
    assert process.exit_code == Unavailable.exit_code
    assert "is not running" in process.tail()
    assert "Traceback" not in process.tail()


async def test_with_a_foreign_key_the_process_is_not_let_in(fresh_stage: Stage) -> None:
    home = fresh_stage.mesh.home
    assert "coordinator" in Accounts.read(fresh_stage.mesh.server.home).names
    write_seed(home / "keys" / "coordinator.nk", new_seed())
    process = await _failing({"WEFT_HOME": str(home), "WEFT_IDENTITY": "coordinator"})
    assert process.exit_code == 4
    assert "refused identity 'coordinator'" in process.tail()
    assert "Traceback" not in process.tail()


async def test_as_somebody_else_the_process_cannot_serve(fresh_stage: Stage) -> None:
    process = await _failing({"WEFT_HOME": str(fresh_stage.mesh.home), "WEFT_IDENTITY": "local"})
    assert process.exit_code not in (None, 0)
    assert "Traceback" not in process.tail()


@pytest.mark.parametrize("value", ["many", "-1", "1e3"])
def test_a_setting_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(InvalidConfig, match="WEFT_COORDINATOR_FINISHED"):
        Settings.load({"WEFT_COORDINATOR_FINISHED": value})


def test_settings_come_from_the_environment() -> None:
    assert Settings.load({}) == Settings()
    assert Settings.load({"WEFT_COORDINATOR_FINISHED": "7"}).finished_tasks == 7
