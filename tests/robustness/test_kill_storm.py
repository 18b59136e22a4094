"""Tasks go on while workers are killed and frozen, the broker is killed, and the coordinator comes and goes.

The log of the whole run is then checked against every law in `weft.testing.invariants`. README.md beside this
file says how to run it again with a seed.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import weft
from weft.client.mesh import Mesh
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft.testing.invariants import Effect, Findings, check, read_log
from weft.testing.storm import Processes, Storm, Unit
from weft_protocols import ids
from weft_protocols.errors import WeftError

pytestmark = pytest.mark.anyio

AGENT = Path(__file__).parent / "storm_agent.py"
SEED = int(os.environ.get("STORM_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
STEPS = 10


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done and how bad the weather is."""

    tasks: int
    within: float
    """Seconds in which every caller must have its result."""
    in_flight: int = 48
    workers: int = 3
    calm: tuple[float, float] = (0.3, 1.5)
    """Seconds between two faults, at least and at most."""
    pause: float = 0.4
    """Seconds a step takes, at most."""
    weights: tuple[int, int, int, int] = (10, 5, 2, 2)
    """How often in a round: kill a worker, freeze one, kill the broker, kill the coordinator."""


@dataclass(slots=True)
class KillStorm(Storm):
    """Workers, the coordinator and the broker are broken."""

    plan: Plan = field(kw_only=True)

    def __post_init__(self) -> None:
        kinds = (self.kill_worker, self.freeze_worker, self.kill_broker, self.kill_coordinator)
        self.kinds = dict(zip(kinds, self.plan.weights, strict=True))

    def worker(self) -> str:
        return f"worker-{self.dice.randrange(self.plan.workers)}"

    async def kill_worker(self, group: asyncio.TaskGroup) -> None:
        name = self.worker()
        self.note("kill_worker", f"kill {name}")
        self.kill(name)

    async def freeze_worker(self, group: asyncio.TaskGroup) -> None:
        """Longer than the broker waits for signs of life, or shorter."""
        name, seconds = self.worker(), self.dice.uniform(0.2, 8.0)
        self.note("freeze_worker", f"freeze {name} for {seconds:.1f} s")
        self.freeze(name, seconds, group)

    async def kill_coordinator(self, group: asyncio.TaskGroup) -> None:
        """It is away for a while; running tasks must not notice."""
        seconds = self.dice.uniform(0.0, 3.0)
        self.note("kill_coordinator", f"kill the coordinator for {seconds:.1f} s")
        self.remove("coordinator", seconds, group)


@dataclass(slots=True)
class Callers:
    """What callers sent and what they were told."""

    mesh: Mesh
    plan: Plan
    dice: random.Random
    seed: int
    accepted: set[str] = field(default_factory=set)
    results: dict[str, str] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    async def all(self) -> None:
        """Have every task done, so many at a time."""
        numbers = iter(range(self.plan.tasks))

        async def lane() -> None:
            for i in numbers:
                await self.one(i)

        async with asyncio.TaskGroup() as group:
            for _ in range(self.plan.in_flight):
                group.create_task(lane())

    async def one(self, i: int) -> None:
        """Send one task until it is accepted, some of them twice, and wait for its result."""
        deadline = asyncio.get_running_loop().time() + self.plan.within
        pause = round(self.dice.uniform(0.0, self.plan.pause), 4)
        message = {"steps": STEPS, "pause": pause, "abreast": self.dice.choice((1, 1, 2, 5))}
        message_id = f"{self.seed}-{i}"
        for _ in range(2 if self.dice.random() < 0.1 else 1):
            while True:
                left = deadline - asyncio.get_running_loop().time()
                try:
                    handle = await self.mesh.submit("storm", message, message_id=message_id)
                    self.accepted.add(handle.id)
                    async with handle:
                        view = await handle.result(max(0.1, left))
                except WeftError as error:
                    if left > 0 and error.retryable:
                        continue
                    self.troubles.append(f"{ids.task_id('local', 'storm', message_id)}: {error!r}")
                    return
                self.results[view.id] = view.state.label
                if view.text != f"{STEPS}\ncounted {STEPS}":
                    self.troubles.append(f"{view.id}: the result is {view.text!r}, {view}")
                break


def recorded_effects(folder: Path) -> list[Effect]:
    lines = (folder / "effects").read_text().splitlines()
    return [Effect(task, step, key, int(pid)) for task, step, key, pid in (line.split() for line in lines)]


@asynccontextmanager
async def running(folder: Path, plan: Plan) -> AsyncIterator[tuple[BrokerMesh, Processes]]:
    """A broker, a coordinator and the workers."""
    async with await start_test_mesh(["storm"], home=folder / ".weft") as mesh:
        effects = {"STORM_EFFECTS": str(folder / "effects")}
        worker = Unit(("-m", "weft.host", f"{AGENT}:agent"), "storm", effects)
        units = {"coordinator": Unit(("-m", "weft_coordinator.service"), "coordinator")}
        processes = Processes(mesh, folder, units | {f"worker-{i}": worker for i in range(plan.workers)})
        with processes.ended():
            for name in processes.units:
                processes.start(name)
            yield mesh, processes


async def run_storm(folder: Path, plan: Plan, seed: int) -> tuple[KillStorm, Callers, Findings]:
    """Run a plan through a storm, and check the log."""
    dice = random.Random(seed)
    async with running(folder, plan) as (mesh, processes):
        storm = KillStorm(mesh, processes, random.Random(dice.random()), plan.calm, plan=plan)
        async with weft.connect("local", home=mesh.home) as client:
            callers = Callers(client, plan, random.Random(dice.random()), seed)
            async with asyncio.TaskGroup() as group:
                group.create_task(storm.rage())
                try:
                    await callers.all()
                finally:
                    storm.over.set()
        reader = await mesh.connect("coordinator")
        try:
            log = await read_log(reader)
        finally:
            await reader.close()
    findings = check(log, accepted=callers.accepted, results=callers.results, effects=recorded_effects(folder))
    return storm, callers, findings


async def survives(folder: Path, plan: Plan) -> None:
    storm, callers, findings = await run_storm(folder, plan, SEED)
    print(f"STORM_SEED={SEED}\n{dict(storm.faults)}, {storm.processes.exits}\n{findings}\n{callers.troubles[:20]}")
    assert storm.faults.total() >= 5, "the weather was too good to show anything"
    assert findings.takeovers > 0, "no fault hit a running task"
    assert findings.violations == []
    assert callers.troubles == []
    assert len(callers.results) == plan.tasks == findings.tasks
    assert set(callers.results.values()) == {"completed"}
    assert findings.steps == plan.tasks * STEPS


@pytest.mark.timeout(120)
async def test_no_task_is_lost_or_done_twice_in_a_short_storm(tmp_path: Path) -> None:
    await survives(tmp_path, Plan(tasks=160, within=60.0))


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_no_task_is_lost_or_done_twice_in_a_long_storm(tmp_path: Path) -> None:
    await survives(tmp_path, Plan(tasks=1000, within=300.0))
