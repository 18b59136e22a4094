"""The watchdog, alerts and dead letters on a real broker, with coordinators that come and go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import pytest

import weft
from weft.client import coordinator, incidents, letters
from weft.client.coordinator import Registration
from weft.client.letters import Redrive, Redriven, Which
from weft.host import process
from weft.testing.agents import ReplicaProcesses, client, coordinator_process, eventually, running
from weft_coordinator.decide import presence
from weft_coordinator.service import alerts as service_alerts
from weft_coordinator.service.settings import Settings
from weft_protocols import a2a, ids, subjects
from weft_protocols import headers as h
from weft_protocols.errors import Conflict, InvalidParams, PermissionDenied, TaskNotFound, WeftError
from weft_protocols.records import SUSPENDED, Claim
from weft_protocols.states import State

if TYPE_CHECKING:
    from tests.coordinator.conftest import Running, Sent, Stage

pytestmark = [
    pytest.mark.anyio,
    # One of Apprise's modules asks for it.
    pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning"),
]

FAST = Settings(poll=0.2, look=0.2, beat=0.2)


async def watched(stage: Stage, config: str = "") -> Running:
    """A coordinator under a mesh.yaml."""
    (stage.mesh.home.parent / "mesh.yaml").write_text(config or "name: watched\n", encoding="utf-8")
    return await stage.coordinator(FAST)


async def operator(stage: Stage) -> Any:
    return await stage.broker("operator")


def opened(stage: Stage, key: str, *, severity: str = "") -> Callable[[], Awaitable[incidents.Incident | None]]:
    """The open incident with a key."""

    async def look() -> incidents.Incident | None:
        seen = (await incidents.incidents(await operator(stage))).incidents
        return next((one for one in seen if one.key == key and severity in ("", one.severity)), None)

    return look


def cleared(stage: Stage, id_: int) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return (await incidents.incident(await operator(stage), id_)).state == "cleared"

    return look


async def given_up(stage: Stage, agent: str, *, caller: str = "local", reason: str = "out of paper") -> Sent:
    """A task that left a dead letter."""
    sent = await stage.send(agent, "print it", caller=caller)
    await (await stage.claim(sent)).give_up(reason)
    return sent


# Incidents ------------------------------------------------------------------------------------------


async def test_a_handler_that_hangs_is_an_incident_and_one_that_waits_is_not(
    fresh_stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "HEARTBEAT", 0.2)
    stage = fresh_stage
    await watched(stage, "watchdog: {clear_after: 0.5}\n")
    agent = weft.Agent(stage.agent(), progress_within=0.5)

    async def fetch() -> None:
        await asyncio.sleep(3600)

    @agent.skill()
    async def work(task: weft.Task) -> str:
        if task.text == "ask":
            return (await task.ask("which one?")).text
        await task.step("fetch", fetch)
        return "done"

    async with running(stage.mesh, agent) as replicas, client(stage.mesh) as mesh, asyncio.TaskGroup() as group:
        reports = group.create_task(process._report(replicas[0].replica))
        waits = await mesh.submit(agent.name, "ask")
        await waits.stopped(10)
        hangs = await mesh.submit(agent.name, "hang")
        found = await eventually(opened(stage, f"no-progress:{agent.name}"))
        assert found is not None
        assert (list(found.tasks), found.severity, found.count) == ([hangs.id], "warning", 1)
        assert "step 'fetch'" in found.cause
        assert found.command == f"mesh tasks get {hangs.id} --all"
        await mesh.cancel(agent.name, hangs.id)
        await eventually(cleared(stage, found.id))
        reports.cancel()


STUCK = """
import asyncio
from weft import Agent

agent = Agent({name!r})


@agent.skill()
async def work(text: str) -> None:
    await asyncio.sleep(3600)
"""


async def test_a_replica_that_dies_again_and_again_is_a_crash_loop_and_its_task_is_nobodys(
    fresh_stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "STALE_AFTER", 2200)
    stage, agent = fresh_stage, fresh_stage.agent()
    await watched(stage, "watchdog: {crashes: 2, silent_after: 0.5, lost_after: 1, clear_after: 0.5}\n")
    (tmp_path / "stuck.py").write_text(STUCK.format(name=agent))
    sent = await stage.send(agent, "hang")
    async with ReplicaProcesses(stage.mesh, f"{tmp_path / 'stuck.py'}:agent", identity=agent) as replicas:
        for _ in range(2):
            started = await replicas.start()
            replica = started.id

            async def begun(replica: str = replica) -> bool:
                seen = await coordinator.agents(await operator(stage))
                works = int((await stage.get(sent)).status.state) == int(State.WORKING)
                return works and any(one.replica == replica for a in seen for one in a.replicas)

            await eventually(begun)
            started.kill()
        loop = await eventually(opened(stage, f"crash-loop:{agent}"))
        assert loop is not None
        assert (loop.severity, loop.count, loop.command) == ("critical", 2, f"mesh logs {agent}")
        silent = await eventually(opened(stage, f"silent-replica:{agent}", severity="critical"))
        assert silent is not None
        assert list(silent.tasks) == [sent.task]


async def test_a_task_that_waits_is_not_missed_with_the_replica_that_began_it(fresh_stage: Stage) -> None:
    stage, agent = fresh_stage, fresh_stage.agent()
    await watched(stage, "watchdog: {silent_after: 0.2, lost_after: 0.5}\n")
    owned, parked = [await stage.send(agent) for _ in range(2)]
    for sent in (parked, owned):
        worker = await stage.claim(sent)
        await worker.status("working")
        if sent is parked:
            let_go = Claim(
                "r1", "1.0", 1, "local", "o1", sent.context, "00", sent.seq, state=SUSPENDED, waiting="_sleep"
            )
            block = h.block(h.fields({h.EXPECTED_SEQUENCE: str(worker.token)}))
            await worker.broker.publish(subjects.claim(agent, sent.task), let_go.encode(), headers=block)
    found = await eventually(opened(stage, f"silent-replica:{agent}"))
    assert found is not None
    assert list(found.tasks) == [owned.task]


async def test_waiting_tasks_without_a_replica_are_critical_until_somebody_takes_them(fresh_stage: Stage) -> None:
    stage = fresh_stage
    await watched(stage, "watchdog: {unserved_after: 0.5, clear_after: 0.3}\n")
    agent = weft.Agent(stage.agent())

    release = asyncio.Event()

    @agent.skill()
    async def do(text: str) -> str:
        await release.wait()
        return text

    for _ in range(3):
        await stage.send(agent.name)
    async with running(stage.mesh, agent, grace=0.0) as (replica,):
        await eventually(lambda: len(replica.owned) == 3)  # and hands them back
    found = await eventually(opened(stage, f"backlog:{agent.name}"))
    assert found is not None
    assert (found.severity, found.count, found.command) == ("critical", 3, f"mesh scale {agent.name} 1")
    release.set()
    async with running(stage.mesh, agent):
        await eventually(cleared(stage, found.id))


async def test_attempts_that_fail_again_and_again_are_a_storm(fresh_stage: Stage) -> None:
    stage, agent = fresh_stage, fresh_stage.agent()
    await watched(stage, "watchdog: {retries: 3}\n")
    await eventually(_has_looked(stage))
    sent = await stage.send(agent)
    token, n = 0, 0
    for attempt in range(1, 5):
        worker = await stage.claim(sent, attempt=attempt, expected=token, n=n)
        n = await worker.status("working", f"attempt {attempt}")
        token = worker.token
    found = await eventually(opened(stage, f"retries:{agent}"))
    assert found is not None
    assert found.count == 3


def _has_looked(stage: Stage) -> Callable[[], bool]:
    """What was counted before the first look is no storm."""
    (coordinator_,) = stage._running
    return lambda: coordinator_.coordinator.leader.leading and _watchdog(coordinator_)._looked > 0


def _watchdog(running_: Running) -> Any:
    from weft_coordinator.service.watch import Watchdog

    return next(part for part in running_.coordinator._parts if isinstance(part, Watchdog))


async def test_a_dead_letter_is_an_incident_until_it_is_decided_also_under_the_next_leader(fresh_stage: Stage) -> None:
    stage, agent = fresh_stage, fresh_stage.agent()
    first = await watched(stage, "watchdog: {clear_after: 0.3}\n")
    sent = await given_up(stage, agent)
    found = await eventually(opened(stage, f"dead-letters:{agent}"))
    assert found is not None
    assert list(found.tasks) == [sent.task]
    assert "out of paper" in found.cause
    second = await stage.coordinator(FAST)
    await stage.stop(first)
    await eventually(lambda: second.coordinator.leader.leading)
    same = await opened(stage, f"dead-letters:{agent}")()
    assert same is not None
    assert (same.id, same.opened) == (found.id, found.opened)
    assert await letters.discard(await operator(stage), [sent.task], reason="nobody needs it") == 1
    await eventually(cleared(stage, found.id))
    everything = await incidents.incidents(await operator(stage), everything=True)
    assert [one.id for one in everything.incidents if one.key == found.key] == [found.id]


async def test_only_the_operator_sees_incidents_and_letters(stage: Stage) -> None:
    caller = await stage.broker("local")
    for operation in ("incidents", "dead-letters", "dead-letter", "redrive", "redrives", "redrive-stop", "discard"):
        with pytest.raises(PermissionDenied):
            await coordinator.call(caller, operation, {})


async def test_the_watchdog_can_be_turned_off_and_on_while_it_runs(fresh_stage: Stage) -> None:
    stage, agent = fresh_stage, fresh_stage.agent()
    await watched(stage, "watchdog: {enabled: false}\n")
    await given_up(stage, agent)
    assert not (await incidents.incidents(await operator(stage))).watching
    (stage.mesh.home.parent / "mesh.yaml").write_text("name: on\n", encoding="utf-8")
    assert await eventually(opened(stage, f"dead-letters:{agent}"))


async def test_replicas_are_told_the_budget_that_mesh_yaml_sets(fresh_stage: Stage) -> None:
    stage, agent, other = fresh_stage, fresh_stage.agent(), fresh_stage.agent()
    await watched(stage, f"watchdog: {{progress_within: 30, agents: {{{agent}: {{progress_within: 5}}}}}}\n")
    for name, expected in ((agent, 5.0), (other, 30.0)):
        registration = Registration(name, "1.0", "r1", 1, 4)
        body = {**{field: getattr(registration, field) for field in Registration.__slots__}, "skills": []}
        assert (await coordinator.call(await stage.broker(name), "register", body))["progress_within"] == expected


# Alerts ---------------------------------------------------------------------------------------------


class Receiver:
    """A web hook on this machine."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.refusing = False
        self.refused = 0
        self.asked = 0
        self.open = Event()
        """Answers only while it is set."""
        self.open.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.asked += 1
                receiver.open.wait(3)
                if receiver.refusing:
                    receiver.refused += 1
                else:
                    receiver.taken.append(body)
                self.send_response(500 if receiver.refusing else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"json://127.0.0.1:{self._server.server_port}/hook"
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,))

    @contextmanager
    def serving(self) -> Iterator[Receiver]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().serving() as made:
        yield made


ALERTS = """
watchdog: {clear_after: 0.3, alerts_window: 1.2}
alerts:
  - {url_env: TEST_HOOK}
"""


async def test_a_storm_is_one_message_and_nothing_is_told_twice_by_the_next_leader(
    fresh_stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_HOOK", receiver.url)
    stage = fresh_stage
    agents = [stage.agent() for _ in range(3)]
    first = await watched(stage, ALERTS)
    sent = []
    for agent in agents:
        sent.append(await given_up(stage, agent))
        await eventually(opened(stage, f"dead-letters:{agent}"))
    await eventually(lambda: bool(receiver.taken))
    (message,) = receiver.taken
    assert message["title"].startswith("mesh: 3 incidents")
    assert message["type"] == "warning"
    for agent in agents:
        assert f"mesh dlq list --agent {agent}" in message["message"]

    async def recorded() -> bool:
        seen = await incidents.incidents(await operator(stage))
        return all(one.told == {"TEST_HOOK": ["warning", "opened"]} for one in seen.incidents)

    await eventually(recorded)
    second = await stage.coordinator(FAST)
    await stage.stop(first)
    await eventually(lambda: second.coordinator.leader.leading)
    await letters.discard(await operator(stage), [one.task for one in sent], reason="seen")
    await eventually(lambda: len(receiver.taken) > 1)
    assert receiver.taken[1]["type"] == "success"
    assert receiver.taken[1]["message"].count("cleared") == 3
    assert len(receiver.taken) == 2


async def test_a_message_that_is_not_taken_is_sent_again_and_does_not_hold_up_the_watchdog(
    fresh_stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_HOOK", receiver.url)
    monkeypatch.setattr(service_alerts, "BACKOFF", (0.1,))
    receiver.refusing = True
    receiver.open.clear()
    stage = fresh_stage
    await watched(stage, ALERTS)
    await given_up(stage, stage.agent())
    other = stage.agent()
    await eventually(lambda: receiver.asked > 0)
    await given_up(stage, other)
    assert await eventually(opened(stage, f"dead-letters:{other}"))
    assert receiver.refused == 0
    receiver.open.set()

    async def untold() -> Any:
        (target,) = (await incidents.incidents(await operator(stage))).alerts
        return target if target["failed"] else None

    target = await eventually(untold)
    assert (target["target"], target["sent"]) == ("TEST_HOOK", 0)
    assert "was not taken" in target["problem"]
    assert receiver.url not in target["problem"]
    receiver.refusing = False
    await eventually(lambda: bool(receiver.taken))


async def test_alerts_that_cannot_be_sent_are_an_incident_that_says_what_to_install(
    fresh_stage: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weft.core import watchconf

    monkeypatch.setattr(watchconf, "find_spec", lambda name: None)
    monkeypatch.setenv("TEST_HOOK", receiver.url)
    stage = fresh_stage
    await watched(stage, ALERTS)
    await given_up(stage, stage.agent())
    found = await eventually(opened(stage, "alerts:mesh"))
    assert found is not None
    assert "pip install 'weft[alerts]'" in found.cause


# Dead letters ---------------------------------------------------------------------------------------


async def test_a_letter_is_redriven_as_its_caller_in_its_conversation_and_once(stage: Stage) -> None:
    agent = weft.Agent(stage.agent())
    release = asyncio.Event()

    @agent.skill()
    async def do(task: weft.Task) -> str:
        await release.wait()
        return f"{task.text} for {task.caller}, again: {task.metadata['weft.redrive_of']}"

    caller = stage.caller()
    sent = await given_up(stage, agent.name, caller=caller)
    broker = await operator(stage)
    done = await letters.redrive(broker, [sent.task])
    assert isinstance(done, tuple)
    new = done[0].redriven_as
    assert done == (Redriven(sent.task, ids.task_id(caller, agent.name, f"redrive-of:{sent.task}:1"), 1, False),)
    assert await letters.redrive(broker, [sent.task]) == (Redriven(sent.task, new, 1, True),)
    async with running(stage.mesh, agent), client(stage.mesh, caller) as mesh:
        with pytest.raises(Conflict, match="has not ended"):
            await letters.redrive(broker, [sent.task], again=True)
        release.set()
        view = await mesh.result(agent.name, new, timeout=10)
        assert view.state is State.COMPLETED
        assert view.text == f"print it for {caller}, again: {sent.task}"
        assert (await mesh.get(agent.name, new)).context_id == sent.context
        await eventually(_ended(stage, new))
        again = await letters.redrive(broker, [sent.task], again=True)
        assert isinstance(again, tuple)
        assert (again[0].n, again[0].repeated) == (2, False)
        assert again[0].redriven_as != new


def _ended(stage: Stage, task: str) -> Callable[[], bool]:
    (running_,) = stage._running
    return lambda: any(one.ended for one in [running_.coordinator._index.find("_", task, caller="operator")] if one)


async def test_letters_are_found_by_agent_reason_state_and_page_by_page(stage: Stage) -> None:
    one, other = stage.agent(), stage.agent()
    paper = [await given_up(stage, one) for _ in range(3)]
    ink = await given_up(stage, one, reason="out of ink")
    await given_up(stage, other)
    broker = await operator(stage)
    newest = [sent.task for sent in reversed(paper)]
    page = await letters.letters(broker, Which(one, "paper"), limit=2)
    assert ([letter.task for letter in page.letters], page.total) == (newest[:2], 3)
    rest = await letters.letters(broker, Which(one, "paper"), limit=2, after=page.next)
    assert ([letter.task for letter in rest.letters], rest.next) == (newest[2:], 0)
    assert await letters.discard(broker, which=Which(one, "ink"), reason="bought some") == 1
    gone = await letters.letters(broker, Which(one), state="discarded")
    assert [(letter.task, letter.discarded_because) for letter in gone.letters] == [(ink.task, "bought some")]
    assert (await letters.letters(broker, Which(one), state="open")).total == 3
    assert (await letters.letters(broker, Which(since=2**50))).total == 0
    with pytest.raises(Conflict, match="bought some"):
        await letters.redrive(broker, [ink.task])


async def test_a_letter_shows_its_message_and_last_events(stage: Stage) -> None:
    agent = stage.agent()
    sent = await given_up(stage, agent)
    told = await letters.letter(await operator(stage), sent.task)
    assert [part["text"] for part in told["parts"]] == ["print it"]
    assert told["events"][-1] == {"n": 1, "state": "failed", "text": "out of paper"}
    assert (told["error"], told["replica"], told["message"], told["chain"]) == ("Boom", "r1", sent.seq, [])
    with pytest.raises(TaskNotFound):
        await letters.letter(await operator(stage), "f" * 32)


@pytest.mark.parametrize(
    ("operation", "body", "words"),
    [
        ("redrive", {}, "name tasks"),
        ("redrive", {"tasks": "all"}, "list of at most"),
        ("redrive", {"all": True, "rate": 0}, "letters a second"),
        ("redrive", {"agent": "a.b"}, "name of an agent"),
        ("discard", {"all": True}, "reason"),
        ("discard", {"reason": "x"}, "name tasks"),
        ("dead-letters", {"state": "lost"}, "must be one of"),
        ("redrive-stop", {"job": 12345}, "no redrive job"),
        ("incidents", {"state": "shut"}, "open or all"),
        ("incidents", {"id": 12345}, "no incident"),
    ],
)
async def test_what_cannot_be_asked_is_refused_with_words(
    stage: Stage, operation: str, body: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidParams, match=words):
        await coordinator.call(await operator(stage), operation, body)


async def test_a_bulk_redrive_survives_the_death_of_the_leader_and_sends_each_letter_once(fresh_stage: Stage) -> None:
    stage, agent = fresh_stage, fresh_stage.agent()
    async with coordinator_process(stage.mesh) as leader:
        sent = [await given_up(stage, agent) for _ in range(30)]
        other = await given_up(stage, agent, reason="out of ink")
        broker = await operator(stage)
        await eventually(lambda: leads(stage))
        standby = await watched(stage)
        job = await letters.redrive_all(broker, Which(agent, "paper"), rate=20)
        assert (job.state, job.redriven) == ("running", 0)

        async def under_way() -> bool:
            (seen,) = await letters.redrives(broker)
            return 3 <= seen.redriven < 30

        await eventually(under_way)
        late = await given_up(stage, agent)
        assert not standby.coordinator.leader.leading
        leader.kill()

        async def ended() -> Redrive | None:
            try:
                (seen,) = await letters.redrives(broker, timeout=1.0)
            except WeftError:
                return None  # between two leaders
            return seen if seen.state != "running" else None

        over = await eventually(ended)
        assert over is not None
        assert (over.state, over.redriven, over.failed) == ("done", 30, 0)
        page = await letters.letters(broker, Which(agent), state="redriven")
        assert {letter.task: letter.redriven_as for letter in page.letters} == {
            one.task: ids.task_id("local", agent, f"redrive-of:{one.task}:1") for one in sent
        }
        left = (await letters.letters(broker, state="open")).letters
        assert [letter.task for letter in left] == [late.task, other.task]
        async with client(stage.mesh) as mesh:
            tasks = await mesh.list(agent, page_size=100)
            assert len(tasks.tasks) == 32 + 30


async def leads(stage: Stage) -> bool:
    """Whether a coordinator leads."""
    try:
        await incidents.incidents(await operator(stage), timeout=0.5)
    except WeftError:
        return False
    return True


async def test_a_bulk_redrive_can_be_stopped_and_names_what_it_could_not_send(stage: Stage) -> None:
    agent = stage.agent()
    ghost = "e" * 32
    # A host can say that it gave up a task nobody sent.
    forged = await stage.claim(_Forged(agent, "local", ghost, "c", "m", 1))
    await forged.give_up("never was")
    for _ in range(10):
        await given_up(stage, agent)
    broker = await operator(stage)
    job = await letters.redrive_all(broker, Which(agent), rate=5)

    async def failed() -> Redrive | None:
        seen = next(one for one in await letters.redrives(broker) if one.job == job.job)
        return seen if seen.failed and seen.redriven else None

    seen = await eventually(failed)
    assert seen is not None
    assert [(one["task"], "not stored" in one["why"]) for one in seen.failures] == [(ghost, True)]
    stopped = await letters.stop(broker, job.job)
    assert stopped.state == "stopped"
    assert stopped.redriven < 10


def _Forged(*facts: Any) -> Any:
    from tests.coordinator.conftest import Sent

    return Sent(*facts)


async def test_a_redriven_message_keeps_its_parts_and_loses_its_deadline(stage: Stage) -> None:
    from weft_coordinator.shell.letters import REDRIVE_OF, request_of, send_again

    agent = stage.agent()
    (running_,) = stage._running
    async with client(stage.mesh) as mesh:
        handle = await mesh.submit(agent, {"page": 7}, deadline=0.1, skill="print", metadata={"why": "test"})
    worker = await stage.claim(_Forged(agent, "local", handle.id, handle.id, "m", 1))
    await worker.give_up("out of paper")
    reader = _watchdog(running_)._observer._records
    await letters.letters(await operator(stage), limit=1)  # whoever asks for them has the stream read
    entry = running_.coordinator._index.find(agent, handle.id, caller="local")
    assert entry is not None
    # A leader that ended between sending and recording: the next one sends nothing twice.
    unrecorded = await send_again(running_.broker, entry, await reader.message(entry), 1)
    (done,) = await letters.redrive(await operator(stage), [handle.id])  # type: ignore[misc]
    assert (done.redriven_as, done.repeated) == (unrecorded, False)
    await letters.letters(await operator(stage), limit=1)  # whoever asks for them has the stream read
    stored = await reader.message(running_.coordinator._index.find(agent, done.redriven_as, caller="local"))
    message = a2a.message_from_proto(request_of(stored).message)
    assert message.metadata == {"weft.skill": "print", "why": "test", REDRIVE_OF: handle.id}
    assert [getattr(part, "data", None) for part in message.parts] == [{"page": 7}]
    assert b"weft-deadline" not in (stored.headers or b"").lower()
