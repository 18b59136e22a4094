"""The wait-for graph: which tasks can never go on, found when the wait that closes the circle is added.

In short::

    graph = WaitGraph(locks)                              # what a lock wait waits for is read from `locks` when needed
    core = graph.lock(request)                            # a queued `locks.Request`; its wait is `request.request`
    core = graph.add(task, wait, agent=, need=, targets=[(kind, target), ...])     # everything else
    graph.put(task, wait, ...); graph.put(...); core = graph.check(task)           # several waits at once: check once
    graph.remove(task, wait); graph.ended(task)           # O(1); a removal needs no check, but see below
    core = graph.check(task); cores = graph.patrol(2_000); cores = graph.sweep()   # one, the next ones, all
    core.cycle, core.waits, core.stuck, core.overtake     # see `Core`
    task = victim(core, {task: Facts(...)}, policy)       # `youngest`, `least-work`, `priority`

When is a task stuck? A wait is over when `need` of its targets have ended; a lock wait when all that `Locks.before`
tells has ended, or was granted and let go. A task may wait at several points at once (branches under `gather`), and is
stuck if **every** one of its waits is: as long as one branch can go on, the task can. A task without waits is free. So

    free = the smallest set with every task that has no waits, every request all of whose `before` is free, and every
           task with a wait of whose targets `need` are free;   stuck = the rest.

- Nothing is invented: no wait of a stuck task has `need` targets outside the stuck ones. Whichever of them were to go
  on first would do so before what it needs; so none does, unless from outside (a victim, a time limit, a cancellation).
- Nothing is missed: tasks that are free can end one after the other, in the order in which they came into the set.
- Adding a wait makes nobody stuck unless it makes its own task stuck: if that is still free, every derivation that used
  it holds. If it is stuck, then by tasks that were so before (that deadlock was told when it came about), or by one
  that became so just now and therefore leads back to it: there is a circle through it. So a check walks forward from
  one task and is over if nothing leads back. Only if something does, and a wait on the way would be content with less
  than all, it reduces what it walked over.

What that asks of the caller:

- A running branch of a task that also waits is a wait too, with one target of kind `outside`, which never blocks.
- Removing a wait only frees, but for one case: where a branch of a task gave up its wait and other waits are left,
  `check` the task, for now all of its waits may be stuck.
- A check finds circles through its task. A task that only waits for others that are stuck is no deadlock of its own.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain
from typing import Final, TypeAlias

from weft_coordinator.decide.deadlock import LOCK, Core, Facts, Policy, victim
from weft_coordinator.decide.locks import Locks, Request
from weft_protocols.errors import CycleEdge

__all__ = ["Core", "Facts", "Policy", "WaitGraph", "victim"]

Node: TypeAlias = "str | Request"
"""A task by its id, or a request that waits in a queue."""
OUTSIDE: Final = "outside"
"""Kind of a target that never blocks: an answer, a timer, an approval, or a branch of the task that runs."""
CAP: Final = 20_000
"""Nodes one check visits at most; what it leaves is found by `sweep`."""


_LOCKS: Final = (LOCK,)


class _Wait:
    """One wait of a task."""

    __slots__ = ("agent", "kinds", "need", "nodes", "wait")

    def __init__(self, wait: str, agent: str, need: int, nodes: tuple[Node, ...], kinds: tuple[str, ...]) -> None:
        self.wait = wait
        self.agent = agent
        self.need = need
        """How many of the nodes must be free."""
        self.nodes = nodes
        self.kinds = kinds
        """Kind of each node."""


class WaitGraph:
    """Who waits for whom.

    Args:
        locks: Where lock waits look up what stands before them.
        cap: Nodes one check visits at most.
    """

    def __init__(self, locks: Locks, *, cap: int = CAP) -> None:
        self._locks = locks
        self._cap = cap
        self._waits: dict[str, tuple[_Wait, ...]] = {}
        self._awaited: dict[str, set[str]] = {}
        """Who waits for a task, other than for a lock."""
        self._round: list[str] = []
        self.unchecked: set[str] = set()
        """Tasks whose check reached the cap; `sweep` empties it."""

    def clear(self) -> None:
        """Forget everything."""
        self._waits.clear()
        self._awaited.clear()
        self._round.clear()
        self.unchecked.clear()

    def __len__(self) -> int:
        """Number of tasks that wait."""
        return len(self._waits)

    # Changing ----------------------------------------------------------------------------------

    def lock(self, request: Request) -> Core | None:
        """A request was queued: its task waits for it. A deadlock this closes, if any."""
        if not request.waits:
            return None
        self._set(request.task, _Wait(request.request, request.agent, 1, (request,), _LOCKS))
        return self.check(request.task)

    def add(self, task: str, wait: str, *, agent: str, need: int, targets: Sequence[tuple[str, str]]) -> Core | None:
        """`put`, then `check`."""
        self.put(task, wait, agent=agent, need=need, targets=targets)
        return self.check(task)

    def put(self, task: str, wait: str, *, agent: str, need: int, targets: Sequence[tuple[str, str]]) -> None:
        """Set a wait, without a check: `need` of the targets `(kind, task id)` must end. Replaces one of that id.

        A target counts once, and a `need` of more than there are means all of them. Targets that ended count as ended.
        With none needed the wait blocks nobody, like one for something outside.
        """
        kinds = {("" if kind == OUTSIDE else target): kind for kind, target in targets}
        self._set(task, _Wait(wait, agent, max(0, min(need, len(kinds))), tuple(kinds), tuple(kinds.values())))

    def _set(self, task: str, wait: _Wait) -> None:
        known = self._waits.get(task)
        if known is not None:
            self.remove(task, wait.wait)
            known = self._waits.get(task)
        self._waits[task] = (wait,) if known is None else (*known, wait)
        if wait.kinds is not _LOCKS:
            for node in wait.nodes:
                if isinstance(node, str) and node:
                    self._awaited.setdefault(node, set()).add(task)

    def remove(self, task: str, wait: str) -> None:
        """A wait is over; nothing if it is not known."""
        known = self._waits.get(task)
        if known is None:
            return
        left = tuple(w for w in known if w.wait != wait)
        if left:
            self._waits[task] = left
        else:
            del self._waits[task]
        for w in known:
            if w.wait == wait and w.kinds is not _LOCKS:
                for node in w.nodes:
                    if isinstance(node, str) and not any(node in other.nodes for other in left):
                        self._forget(node, task)

    def ended(self, task: str) -> None:
        """A task ended: it waits for nothing and blocks nobody."""
        for wait in self._waits.pop(task, ()):
            for node in wait.nodes:
                if isinstance(node, str):
                    self._forget(node, task)

    def _forget(self, target: str, task: str) -> None:
        tasks = self._awaited.get(target)
        if tasks is not None:
            tasks.discard(task)
            if not tasks:
                del self._awaited[target]

    # Looking up --------------------------------------------------------------------------------

    def waits(self, task: str) -> tuple[str, ...]:
        """Ids of the waits of a task."""
        return tuple(w.wait for w in self._waits.get(task, ()))

    def edges(self, tasks: Iterable[str] | None = None) -> Iterator[tuple[str, CycleEdge]]:
        """(wait, edge) of some tasks or of all, for people."""
        for task in self._waits if tasks is None else tasks:
            for wait in self._waits.get(task, ()):
                for kind, node in zip(wait.kinds, wait.nodes, strict=True):
                    if isinstance(node, str):
                        yield wait.wait, CycleEdge(wait.agent, task, kind, node, node)
                    elif node.waits:
                        for name, before in self._locks.named(node):
                            if isinstance(before, str):
                                yield wait.wait, CycleEdge(wait.agent, task, kind, name, before)

    # Finding -----------------------------------------------------------------------------------

    def check(self, task: str) -> Core | None:
        """A deadlock through this task, if there is one."""
        return self._check(task, self._cap)

    def patrol(self, tasks: int) -> list[Core]:
        """Check so many tasks that wait, each time the next ones, and all of `unchecked` without the cap.

        A safety net in small pieces: every deadlock has a circle, and each task on it finds it.
        """
        found = {task: self._check(task, 1 << 62) for task in sorted(self.unchecked)}
        self.unchecked.clear()
        if not self._round:
            self._round = list(self._waits)
        turn, self._round = self._round[-tasks:], self._round[:-tasks]
        found.update((task, self._check(task, self._cap)) for task in turn)
        return [core for core in found.values() if core is not None]

    def _check(self, task: str, cap: int) -> Core | None:
        if task not in self._waits:
            return None
        back = self._leads_back(task, cap)
        if back is False:
            return None
        order, came = _start(task)
        last = self._walk(order, came, goal=task, cap=cap) if back else None
        if last is None:
            if back is None or len(order) > cap:
                self.unchecked.add(task)
            return None
        path = _path(task, last, came)
        if all(self._strict(node) for node in path):
            return self._core(path, _tasks(path))
        stuck = self._reduce([task], cap=cap)
        if stuck is None:
            self.unchecked.add(task)
            return None
        if task not in stuck:
            return None
        order, came = _start(task)
        last = self._walk(order, came, goal=task, within=stuck, cap=cap)
        return None if last is None else self._core(_path(task, last, came), _tasks(stuck))

    def sweep(self) -> list[Core]:
        """Every deadlock there is, by reducing the whole graph: circles that share no task, and all that is stuck."""
        self.unchecked.clear()
        stuck = self._reduce(list(self._waits), cap=1 << 62) or set()
        tasks = _tasks(stuck)
        ahead: dict[Node, Node] = {}
        rounds: dict[Node, int] = {}
        found: list[Core] = []
        for n, task in enumerate(sorted(tasks)):
            node: Node = task
            while node not in rounds:
                rounds[node] = n
                ahead[node] = next(target for target in self._targets(node) if target in stuck)
                node = ahead[node]
            if rounds[node] != n:
                continue
            while not isinstance(node, str):  # queues alone make no circle: there is a task on it
                node = ahead[node]
            path: list[Node] = [node]
            while ahead[path[-1]] != node:
                path.append(ahead[path[-1]])
            found.append(self._core(path, tasks))
        return found

    def _leads_back(self, task: str, cap: int) -> bool | None:
        """Whether a circle through the task is possible; None at the cap.

        It walks in turn to those who wait for the task and to what it waits for. One side may be a large tree or a long
        queue where the other has a node or two; over is it when either has no more.
        """
        waits, awaited, behind = self._waits, self._awaited, self._locks.behind
        ahead: list[Node] = [task]
        seen: set[Node] = {task}
        back = {task}
        for n, waited in enumerate(backward := [task]):  # both grow
            others = behind(waited)
            for waiter in chain(awaited.get(waited, ()), others) if others else awaited.get(waited, ()):
                if waiter in seen:
                    return True
                if waiter not in back:
                    back.add(waiter)
                    backward.append(waiter)
            if n + 1 == len(backward):
                return False
            for target in self._targets(ahead[n]):
                if target in back:
                    return True
                if target not in seen and (target in waits or not isinstance(target, str)):
                    seen.add(target)
                    ahead.append(target)
            if n + 1 == len(ahead):
                return False
            if n > cap:
                return None
        return False

    def _targets(self, node: Node) -> Sequence[Node]:
        """What a node waits for, in all of its waits; nothing for one that does not wait."""
        if isinstance(node, str):
            waits = self._waits.get(node, ())
            return waits[0].nodes if len(waits) == 1 else [target for wait in waits for target in wait.nodes]
        return self._locks.before(node) if node.waits else ()

    def _strict(self, node: Node) -> bool:
        """Whether it is stuck as soon as one of its targets is."""
        if not isinstance(node, str):
            return True
        waits = self._waits[node]
        return len(waits) == 1 and waits[0].need == len(waits[0].nodes)

    def _walk(
        self,
        order: list[Node],
        came: dict[Node, Node],
        *,
        goal: str,
        within: Container[Node] | None = None,
        cap: int,
    ) -> Node | None:
        """Visit what can be reached, nearest first, until a node waits for the goal: that one; None if none does.

        `order` grows by what is visited, `came` says from where. It stops with more than `cap` nodes in `order`.
        """
        waits = self._waits
        for node in order:
            for target in self._targets(node):
                if target == goal:
                    return node
                if target in came or not (target in waits or not isinstance(target, str)):
                    continue
                if within is None or target in within:
                    came[target] = node
                    order.append(target)
            if len(order) > cap:
                return None
        return None

    def _reduce(self, order: list[Node], *, cap: int) -> set[Node] | None:
        """The stuck ones among some nodes and all they wait for; None at the cap."""
        waits = self._waits
        stuck = set(order)
        owners: list[Node] = []
        left: list[int] = []
        awaited: dict[Node, list[int]] = {}
        free: list[Node] = []
        for node in order:  # grows
            if len(order) > cap:
                return None
            for need, targets in self._needs(node):
                number = len(left)
                for target in targets:
                    if target not in stuck:
                        if target not in waits and isinstance(target, str):
                            need -= 1
                            continue
                        stuck.add(target)
                        order.append(target)
                    awaited.setdefault(target, []).append(number)
                owners.append(node)
                left.append(need)
                if need <= 0:
                    free.append(node)
                    break
        stuck.difference_update(free)
        for node in free:  # grows
            for number in awaited.get(node, ()):
                left[number] -= 1
                if not left[number] and owners[number] in stuck:
                    stuck.discard(owners[number])
                    free.append(owners[number])
        return stuck

    def _needs(self, node: Node) -> list[tuple[int, Sequence[Node]]]:
        if isinstance(node, str):
            return [(wait.need, wait.nodes) for wait in self._waits[node]]
        targets = self._targets(node)
        return [(len(targets), targets)]

    def _core(self, path: list[Node], stuck: frozenset[str]) -> Core:
        """A circle as people read it: tasks only. Who is before another in a queue stands for his request."""
        edges: dict[str, tuple[CycleEdge, str]] = {}
        overtake: dict[tuple[str, str], None] = {}
        for i, node in enumerate(path):
            target = path[(i + 1) % len(path)]
            if isinstance(node, str):
                if not isinstance(target, str):
                    continue
                wait, kind = next(
                    (w, kind)
                    for w in self._waits[node]
                    for kind, n in zip(w.kinds, w.nodes, strict=True)
                    if n == target
                )
                edge, name = CycleEdge(wait.agent, node, kind, target, target), wait.wait
            else:
                holder = target if isinstance(target, str) else target.task
                lock = next(name for name, before in self._locks.named(node) if before == target)
                edge, name = CycleEdge(node.agent, node.task, LOCK, lock, holder), node.request
                if self._locks.may_overtake(node):
                    overtake[(node.agent, node.request)] = None
            while edge.task in edges:  # it came by its request and by itself: leave out the way between the two
                edges.popitem()
            edges[edge.task] = (edge, name)
        found = edges.values()
        return Core(tuple(e for e, _ in found), tuple(w for _, w in found), stuck, tuple(overtake))


def _start(task: str) -> tuple[list[Node], dict[Node, Node]]:
    return [task], {task: task}


def _path(task: str, last: Node, came: dict[Node, Node]) -> list[Node]:
    """The way from the task to the node that leads back to it."""
    path = [last]
    while path[-1] != task:
        path.append(came[path[-1]])
    path.reverse()
    return path


def _tasks(nodes: Iterable[Node]) -> frozenset[str]:
    return frozenset(node for node in nodes if isinstance(node, str))
