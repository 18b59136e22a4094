"""Deadlocks: found when the wait that closes the circle is known, confirmed, then broken by one task giving way.

A circle in the graph is only a suspicion: what was told may be over. So every replica with a wait in it is asked once
more whether the wait goes on, and nobody gives way before all have said yes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from weft.core.supervise import Tasks
from weft_coordinator.decide.found import FOUND, Deadlock, Deadlocks, plain
from weft_coordinator.decide.graph import Core, Facts, Policy, WaitGraph, victim
from weft_coordinator.decide.index import ANY_AGENT
from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.locks import Request
from weft_coordinator.decide.parked import Parked, ParkedTasks
from weft_coordinator.decide.registry import Fields
from weft_coordinator.service.deciding import Key, Shared
from weft_coordinator.service.part import Answer, Body, Handler, LeanHandler, Part, operator_only
from weft_protocols.errors import CycleEdge, InvalidParams, WeftError

log = logging.getLogger("weft.coordinator")

ANSWER: Final = 2.0
"""Seconds a replica has to confirm a wait."""
REACTION: Final = 5.0
"""Seconds a task that was told to give way has, before another one is."""
REMEMBERED: Final = 60.0
"""Seconds in which whoever gave way is spared."""
AGAIN: Final = (1.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds until a suspicion that was not confirmed is looked at again."""
MAX_ASKED: Final = 64
"""Tasks beside a circle that are asked as well, because those in it could go on if they did."""
PATROL: Final = 500
"""Tasks looked at in each round, for what single checks left out."""
MAX_WAITS: Final = 10_000
"""Waits of one message."""
MAX_TOLD: Final = 100_000
"""Waits of one replica that are known at a time; more are left out."""
MAX_TARGETS: Final = 1_000
SHOWN: Final = 500
"""Edges the operator is shown unless it asks for more."""
MAX_SHOWN: Final = 3_000
KINDS: Final = ("child", "order", "outside")
USELESS: Final = 1_000
"""Times a task counts as victim that holds no lock of the circle, where several do: it would come again."""
TOLD: Final = 1_000_000
"""The same for one that was told to give way a short while ago."""
AWAY: Final = 1_000_000_000
"""The same for one that is not in memory to be told."""
PARKED: Final = "parked"
"""Name of the wait of a task that left memory."""


class Decide(Protocol):
    """`LockPart.decide`."""

    def __call__(self, act: Callable[[], list[Event]], *, answer: Answer | None = None) -> list[Event]:
        """Decide at once; whom it concerns is told, and `answer` called, once it is stored."""
        ...


@dataclass(frozen=True, slots=True)
class _Told:
    """A wait that a replica told of."""

    task: str
    wait: str
    need: int
    targets: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Doubt:
    """A suspicion to be looked at again."""

    task: str
    due: float
    times: int


class Detector(Part):
    """Operations `waits` and `confirm`, and for the operator `graph`.

    Args:
        found: The ledger of the deadlocks.
        parked: The ledger of the tasks that left memory; they wait as well.
        policy: Which task of a circle gives way.
    """

    def __init__(
        self,
        shared: Shared,
        graph: WaitGraph,
        *,
        found: Deadlocks,
        parked: ParkedTasks,
        policy: Policy = "youngest",
    ) -> None:
        self.graph = graph
        self.outside: Callable[[], Iterable[tuple[str, CycleEdge]]] = lambda: ()
        """Waits that are shown and never block: for somebody outside the mesh."""
        self._parked = parked
        parked.follow = self._on_parked
        self._leader = shared.leader
        self._locks = shared.locks
        self._found = found
        self._find = shared.find
        self._ancestors = shared.ancestors
        self._tail = shared.tail
        self._speaker = shared.speaker
        self._clock = shared.clock
        self._policy = policy
        self._decide: Decide | None = None
        self._heard: Callable[[Key], None] = lambda key: None
        self._owner: dict[tuple[str, str], Key] = {}
        """Replica of each wait that was told, by (task, wait)."""
        self._by_replica: dict[Key, set[tuple[str, str]]] = {}
        self._handling: set[frozenset[str]] = set()
        self._questions: dict[str, asyncio.Future[bool]] = {}
        self._numbers = itertools.count(1)
        self._doubts: dict[frozenset[str], _Doubt] = {}
        self._chosen: dict[str, float] = {}
        """When a task was told to give way."""
        self._told: dict[tuple[str, str], float] = {}
        """When a wait was told to end that its replica has to end; one for a lock the coordinator ends itself."""
        self._tasks = Tasks("deadlocks", on_error=lambda _: None)

    def bind(self, decide: Decide, heard: Callable[[Key], None]) -> None:
        """How locks are decided on, and a replica's lease begins anew."""
        self._decide, self._heard = decide, heard

    @property
    def lean_operations(self) -> Mapping[str, LeanHandler]:
        """What replicas tell."""
        return {"waits": self._waits, "confirm": self._confirm}

    @property
    def leader_operations(self) -> Mapping[str, Handler]:
        """What the operator asks."""
        return {"graph": self._show}

    async def lead(self) -> None:
        """Begin with the waits for locks; replicas tell the others."""
        self._forget()
        for parked in self._parked.all():
            self._put_parked(parked)
        for request in sorted(self._locks.waiting(), key=lambda one: one.number):
            core = self.graph.lock(request)
            if core is not None:
                self._doubt(core, 0)

    def deposed(self) -> None:
        """Forget what was told."""
        self._forget()

    def _forget(self) -> None:
        self.graph.clear()
        for known in (self._owner, self._by_replica, self._doubts, self._chosen, self._told):
            known.clear()
        for question in self._questions.values():
            question.cancel()

    async def aclose(self) -> None:
        """End what is under way."""
        await self._tasks.aclose()

    async def tick(self, now: int) -> None:
        """Look again at what was not confirmed, and at what single checks left out."""
        time = self._clock()
        for key, doubt in list(self._doubts.items()):
            if doubt.due <= time:
                core = self.graph.check(doubt.task)
                if core is None:
                    del self._doubts[key]
                else:
                    self._suspect(core)
        for core in self.graph.patrol(PATROL):
            self._suspect(core)
        self._chosen = {task: at for task, at in self._chosen.items() if time - at < REMEMBERED}
        self._told = {wait: at for wait, at in self._told.items() if time - at < REACTION}

    # What is told ------------------------------------------------------------------------------

    def queued(self, request: Request) -> None:
        """A request waits for a lock."""
        self._move(request.task, (request.agent, request.replica))
        self._check(self.graph.lock(request))

    def settled(self, request: Request) -> None:
        """A request does not wait any more."""
        self.graph.remove(request.task, request.request)
        if self.graph.waits(request.task):  # what another branch waits for may be all that is left
            self._check(self.graph.check(request.task))

    def ended(self, task: str) -> None:
        """A task ended."""
        for wait in self.graph.waits(task):
            owner = self._owner.get((task, wait))
            if owner is not None:
                self._over(task, wait, owner)
        self.graph.ended(task)

    def _on_parked(self, parked: Parked, here: bool) -> None:
        """A task left memory, or is woken."""
        if not self._leader.leading:
            return
        self.graph.remove(parked.task, PARKED)
        if here:
            self._put_parked(parked)
            self._check(self.graph.check(parked.task))

    def _put_parked(self, parked: Parked) -> None:
        """It waits for its children. Where it is woken at some time it is not stuck."""
        if parked.children and not parked.until:
            targets = [("child", child.task) for child in parked.children]
            self.graph.put(parked.task, PARKED, agent=parked.agent, need=max(1, parked.need), targets=targets)

    def told_by(self, key: Key) -> int:
        """How many waits of a replica are known."""
        return len(self._by_replica.get(key, ()))

    def forget(self, key: Key) -> None:
        """A replica says nothing any more: its waits are over."""
        for task, wait in self._by_replica.pop(key, ()):
            self._owner.pop((task, wait), None)
            self.graph.remove(task, wait)

    def _move(self, task: str, key: Key) -> None:
        """Whoever speaks for a task now: what another replica told of it is over."""
        for wait in self.graph.waits(task):
            owner = self._owner.get((task, wait))
            if owner is not None and owner != key:
                self._over(task, wait, owner)

    def _over(self, task: str, wait: str, key: Key) -> None:
        if self._owner.get((task, wait)) == key:
            del self._owner[task, wait]
            self._by_replica[key].discard((task, wait))
            if not self._by_replica[key]:
                del self._by_replica[key]
            self.graph.remove(task, wait)

    def _waits(self, body: Body, caller: str, answer: Answer) -> None:
        fields = Fields(body)
        key = (caller, fields.token("replica"))
        fields.check(f"waits of {caller}")
        told = [_told(one) for one in _list(body, "set", MAX_WAITS)]
        for task, wait in _list(body, "clear", MAX_WAITS):
            self._over(str(task), str(wait), key)
        unknown = [one for one in told if self._find(caller, one.task) is None]
        if unknown:
            self._tasks.start(self._look(key, unknown), name=f"waits of {caller}")
        self._take(key, [one for one in told if one not in unknown] if unknown else told)
        for task in _list(body, "check", MAX_WAITS):
            self._check(self.graph.check(str(task)))
        answer({"known": self.told_by(key)})

    async def _look(self, key: Key, told: list[_Told]) -> None:
        """Waits of tasks that the index did not know. One that was over meanwhile is found out by the session."""
        try:
            await self._tail.sync()
            self._take(key, [one for one in told if self._find(key[0], one.task) is not None])
        except WeftError as error:
            log.debug("waits of %s are not known: %s", key, error)

    def _take(self, key: Key, told: Iterable[_Told]) -> None:
        if not self._leader.leading or self.told_by(key) > MAX_TOLD:
            return
        tasks: dict[str, None] = {}
        for one in told:
            self._move(one.task, key)
            self.graph.put(one.task, one.wait, agent=key[0], need=one.need, targets=one.targets)
            self._owner[one.task, one.wait] = key
            self._by_replica.setdefault(key, set()).add((one.task, one.wait))
            tasks[one.task] = None
        if tasks:
            self._heard(key)
        for task in tasks:
            self._check(self.graph.check(task))

    # Breaking ----------------------------------------------------------------------------------

    def _check(self, core: Core | None) -> None:
        if core is not None:
            self._suspect(core)

    def _suspect(self, core: Core) -> None:
        """Find out whether a circle is one, unless that is under way."""
        key = frozenset(core.waits)
        if key not in self._handling and self._leader.leading:
            self._handling.add(key)
            self._tasks.start(self._resolve(core, key), name="a deadlock")

    async def _resolve(self, core: Core, key: frozenset[str]) -> None:
        try:
            if core.overtake:
                self._let_pass_now(core)
                return
            if not await self._confirmed(core):
                self._doubt(core, self._doubts[key].times + 1 if key in self._doubts else 0)
                return
            again = self.graph.check(core.cycle[0].task) if self._leader.leading else None
            self._doubts.pop(key, None)
            if again is not None and frozenset(again.waits) == key:
                self._break(again)
            elif again is not None:
                self._suspect(again)
        except WeftError as error:
            log.warning("a deadlock is looked at again: %s", error)
            self._doubt(core, 0)
        finally:
            self._handling.discard(key)

    def _doubt(self, core: Core, times: int) -> None:
        pause = AGAIN[min(times, len(AGAIN) - 1)]
        self._doubts[frozenset(core.waits)] = _Doubt(core.cycle[0].task, self._clock() + pause, times)

    async def _confirmed(self, core: Core) -> bool:
        """Whether every wait of the circle goes on, and nothing else of its tasks does."""
        cycle = {edge.task: edge.agent for edge in core.cycle}
        beside = [task for task in core.stuck if task not in cycle]
        asked: dict[tuple[str, str], Key] = {}
        for task in (*cycle, *(beside if len(beside) <= MAX_ASKED else ())):
            for wait in self.graph.waits(task):
                owner = self._owner.get((task, wait)) or self._asker(task, wait)
                if owner is not None:
                    asked[task, wait] = owner
                elif wait != PARKED:
                    return False
        answers = [self._ask(task, wait, key) for (task, wait), key in asked.items()]
        try:
            if answers:
                await asyncio.wait(answers, timeout=ANSWER)
            if PARKED in core.waits:  # nobody can be asked: it is woken once its children's ends are read
                await self._tail.sync()
            return all(one.done() and not one.cancelled() and one.result() for one in answers)
        finally:
            for one in answers:
                one.cancel()

    def _asker(self, task: str, request: str) -> Key | None:
        """The replica that waits for a lock."""
        found = next((r for r in self._locks.of_task(task) if r.request == request), None)
        return (found.agent, found.replica) if found is not None else None

    def _ask(self, task: str, wait: str, key: Key) -> asyncio.Future[bool]:
        number = f"{next(self._numbers)}"
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._questions[number] = future
        future.add_done_callback(lambda _: self._questions.pop(number, None))
        self._speaker.tell(key, "waiting?", {"question": f"{number}.{key[1]}", "task": task, "wait": wait})
        return future

    def _confirm(self, body: Body, caller: str, answer: Answer) -> None:
        number, _, _ = str(body.get("question", "")).partition(".")
        question = self._questions.get(number)
        if question is not None and not question.done():
            question.set_result(body.get("waits") is True)
        answer({})

    def _let_pass_now(self, core: Core) -> None:
        """The same circle may have been opened meanwhile, by somebody else who went before his turn."""
        again = self.graph.check(core.cycle[0].task) if self._leader.leading else None
        if again is not None and again.overtake:
            self._let_pass(again)
        elif again is not None:
            self._doubt(again, 0)

    def _let_pass(self, core: Core) -> None:
        """Nobody has to give way: one that only waits for its place in a queue goes before its turn."""
        assert self._decide is not None  # noqa: S101 - bound when the parts are made
        for agent, request in core.overtake:
            if self._decide(lambda a=agent, r=request: self._locks.overtake(a, r)):  # type: ignore[misc]
                log.warning(
                    "request %s of %s goes before its turn: %s", request, agent, "; ".join(map(str, core.cycle))
                )
                break
        for task in core.stuck:
            self._check(self.graph.check(task))

    def _break(self, core: Core) -> None:
        """Have one task of a circle give way."""
        assert self._decide is not None  # noqa: S101 - bound when the parts are made
        now = self._clock()
        tasks = [edge.task for edge in core.cycle]
        if any(now - self._told.get(one, -REACTION) < REACTION for one in zip(tasks, core.waits, strict=True)):
            self._doubt(core, 0)  # it was told, and has its time
            return
        own = self._barred_by_its_own(core)
        chosen = own or victim(core, self._facts(core), self._policy)
        place = tasks.index(chosen)
        edge, wait = core.cycle[place], core.waits[place]
        self._chosen[chosen] = now
        if edge.kind != "lock":
            self._told[chosen, wait] = now
        explained = Deadlock(0, 0, core.cycle, chosen)
        log.warning("deadlock: %s (%s)", explained, self._policy)
        owner = self._owner.get((chosen, wait)) or self._asker(chosen, wait)
        lock = edge.kind == "lock"

        def tell(answer: dict[str, Any] | WeftError) -> None:
            if owner is not None and not isinstance(answer, WeftError):
                data = {"task": chosen, "wait": wait, "cycle": plain(core.cycle), "lasting": bool(own)}
                told = {**data, "request": wait, "state": "deadlock"} if lock else data
                self._speaker.tell(owner, "lock" if lock else "deadlock", told)

        self._decide(lambda: [(FOUND, plain(core.cycle), chosen)])
        if lock:  # its request is gone before it is told, so that it can ask again at once
            self._decide(lambda: self._locks.deny(edge.agent, wait, str(explained)))
        self._decide(lambda: self._locks.chosen(chosen), answer=tell)
        self._doubt(core, 0)
        for task in core.stuck:
            if task != chosen:
                self._check(self.graph.check(task))

    def _barred_by_its_own(self, core: Core) -> str:
        """A task that waits for a lock of a task that delegated it and waits for it; empty if there is none.

        Nobody else can end such a circle for good: whoever comes again finds it as it was.
        """
        for edge in core.cycle:
            entry = self._find(edge.agent, edge.task) if edge.kind == "lock" else None
            if entry is not None and edge.holder in self._ancestors(entry) and len(_locks_in(core)) == 1:
                return edge.task
        return ""

    def _facts(self, core: Core) -> dict[str, Facts]:
        """What the choice looks at. Who cannot be told, was told, or would free nothing by giving way comes last."""
        holders = {edge.holder for edge in core.cycle if edge.kind == "lock"}
        facts = {}
        for edge, wait in zip(core.cycle, core.waits, strict=True):
            spared = 0
            if len(holders) > 1 and edge.task not in holders:
                spared += USELESS
            if edge.task in self._chosen:
                spared += TOLD
            if wait == PARKED:
                spared += AWAY
            facts[edge.task] = self._fact(edge.task, edge.agent, spared)
        return facts

    def _fact(self, task: str, agent: str, spared: int) -> Facts:
        requests = self._locks.of_task(task)
        entry = self._find(agent, task)
        told = min((request.created for request in requests), default=0)
        created = entry.created if entry is not None else told * 1_000_000  # the finer, the rarer a tie
        return Facts(
            created=created,
            work=max((r.work for r in requests), default=0),
            priority=max((r.priority for r in requests), default=0),
            victims=spared + self._locks.victims(task),
        )

    # The operator ------------------------------------------------------------------------------

    async def _show(self, body: Body, caller: str) -> dict[str, Any]:
        """Who waits for whom, and the last deadlocks."""
        operator_only(caller, "graph")
        fields = Fields(body)
        limit = min(fields.number("limit", default=SHOWN), MAX_SHOWN)
        fields.check("graph")
        nodes: dict[str, str] = {}
        edges: list[dict[str, Any]] = []
        # Those that wait for locks first: circles go through them.
        tasks = dict.fromkeys(request.task for request in self._locks.waiting())
        shown = itertools.chain(self.graph.edges(tasks), self._others(tasks), self.outside())
        for wait, edge in itertools.islice(shown, limit):
            nodes[edge.task] = edge.agent
            if edge.holder != wait:  # a task, and not the wait itself
                nodes.setdefault(edge.holder, "")
            held = edge.kind != "lock" or any(r.task == edge.holder for r in self._locks.view(edge.target)[0])
            edges.append({"wait": wait, **asdict(edge), "held": held})
        for task in [task for task, agent in nodes.items() if not agent]:
            entry = self._find(ANY_AGENT, task)
            nodes[task] = entry.agent if entry is not None else ""
        return {
            "nodes": [{"task": task, "agent": agent} for task, agent in nodes.items()],
            "edges": edges,
            "waiting": len(self.graph),
            "deadlocks": {"count": self._found.count, "last": [one.shown() for one in self._found.last]},
        }

    def _others(self, tasks: Mapping[str, None]) -> Iterator[tuple[str, CycleEdge]]:
        return (one for one in self.graph.edges() if one[1].task not in tasks)


def _locks_in(core: Core) -> list[CycleEdge]:
    return [edge for edge in core.cycle if edge.kind == "lock"]


def _list(body: Body, name: str, limit: int) -> list[Any]:
    found = body.get(name, [])
    if not isinstance(found, list) or len(found) > limit:
        raise InvalidParams(f"{name} must be a list of at most {limit}")
    return found


def _told(one: Any) -> _Told:
    """A wait in a message; InvalidParams if it is none."""
    try:
        task, wait, need, targets = one
        found = tuple((str(kind), str(target)) for kind, target in targets)
    except (TypeError, ValueError):
        raise InvalidParams(f"not a wait: {one!r:.200}") from None
    if len(found) > MAX_TARGETS or type(need) is not int or any(kind not in KINDS for kind, _ in found):
        raise InvalidParams(f"wait {wait!r} of task {task}: a kind is not one of {KINDS}, or it has too many targets")
    return _Told(str(task), str(wait), need, found)
