"""What a child asks is asked of the root's caller, and the answer finds its way down, whatever dies in between."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import weft
from weft.client.handle import Handle
from weft.testing.agents import LocalReplica, Process, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, seen, settled
from weft_protocols.records import SUSPENDED

Unique = Callable[[str], str]
SOON = 0.05
"""Seconds after which a waiting task leaves memory."""


def asker(name: str, *, count: int = 1, suspend_after: float = 30.0, auth: bool = False) -> weft.Agent:
    agent = weft.Agent(name, suspend_after=suspend_after)

    @agent.skill()
    async def work(task: weft.Task) -> list[Any]:
        answers = []
        for n in range(count):
            answer = await task.ask(f"{task.text} {n}?", auth=auth, n=n)
            answers.append(answer.data or answer.text)
        return answers

    return agent


def passing(name: str, to: str, *, children: int = 1, suspend_after: float = 30.0) -> weft.Agent:
    """An agent that has `children` tasks done by another, all at once."""
    agent = weft.Agent(name, suspend_after=suspend_after)

    @agent.skill()
    async def work(task: weft.Task) -> list[Any]:
        texts = [task.text] if children == 1 else [f"{task.text}-{n}" for n in range(children)]
        views = await task.gather(*(task.delegate(to, text) for text in texts))
        return views[0].data if children == 1 else [view.data for view in views]

    return agent


async def test_a_childs_question_is_asked_by_its_parent_and_the_answer_goes_down(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    leaf = asker(unique("leaf"), count=2)
    root = passing(unique("root"), leaf.name)
    async with running(mesh, leaf, root), await caller.submit(root.name, "color") as handle:
        first = await handle.result()
        assert (first.state, first.text, first.metadata["n"]) == (weft.State.INPUT_REQUIRED, "color 0?", 0)
        agent, _, task_id = first.metadata["weft.asked_by"].partition("/")
        assert (agent, first.metadata["weft.path"]) == (leaf.name, [f"{leaf.name}/{task_id}"])
        second = await handle.send({"red": True})
        assert (second.text, second.metadata["n"]) == ("color 1?", 1)
        assert (await handle.send("blue")).data == [{"red": True}, "blue"]
        stored = [
            await StoredTask.read(mesh, root.name, handle.id),
            await StoredTask.read(mesh, leaf.name, task_id),
        ]
    for one in stored:
        one.check()
        assert one.states == ["working", "input-required", "working", "input-required", "working", "completed"]


@pytest.mark.parametrize("suspend_after", [30.0, SOON], ids=["in memory", "suspended"])
async def test_a_question_comes_up_through_all_levels(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process, suspend_after: float
) -> None:
    leaf = asker(unique("leaf"), auth=True, suspend_after=suspend_after)
    middle = passing(unique("middle"), leaf.name, suspend_after=suspend_after)
    root = passing(unique("root"), middle.name, suspend_after=suspend_after)
    async with running(mesh, leaf, middle, root) as replicas, await caller.submit(root.name, "login") as handle:
        view = await handle.result()
        assert (view.state, view.text) == (weft.State.AUTH_REQUIRED, "login 0?")
        path = [item.partition("/")[0] for item in view.metadata["weft.path"]]
        assert path == [middle.name, leaf.name]
        assert view.metadata["weft.asked_by"] == view.metadata["weft.path"][-1]
        if suspend_after == SOON:
            await eventually(lambda: not any(one.owned for one in replicas))
        assert (await handle.send("token")).data == ["token"]


async def test_only_what_asks_is_in_memory_no_more_and_no_replica_that_dies_loses_the_answer(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    """All levels are suspended, then every replica is replaced by another one."""
    leaf = asker(unique("leaf"), count=2, suspend_after=SOON)
    middle = passing(unique("middle"), leaf.name, suspend_after=SOON)
    root = passing(unique("root"), middle.name, suspend_after=SOON)
    async with await caller.submit(root.name, "go") as handle:
        for n in range(2):
            async with running(mesh, leaf, middle, root) as replicas:
                await heard(handle, f"go {n}?", timeout=20)
                await eventually(lambda: not any(one.owned for one in replicas))
                stored = await StoredTask.read(mesh, root.name, handle.id)
                assert stored.claims[-1][1].state == SUSPENDED
                for one in replicas:
                    await one.crash()
            await follow_up(handle, f"answer {n}")
        async with running(mesh, leaf, middle, root):
            await heard(handle, weft.State.COMPLETED, timeout=20)
            assert (await handle.result()).data == ["answer 0", "answer 1"]
            (await StoredTask.read(mesh, root.name, handle.id)).check()


async def test_a_parent_that_dies_while_its_question_is_open_asks_it_again_and_has_one_answer(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    leaf = asker(unique("leaf"), count=2)
    root = passing(unique("root"), leaf.name)
    async with running(mesh, leaf), running(mesh, root, replicas=2) as roots:
        async with await caller.submit(root.name, "go") as handle:
            await heard(handle, "go 0?")
            await next(one for one in roots if one.owned).crash()
            await heard(handle, lambda event: event.attempt == 2)
            await heard(handle, lambda event: event.text == "go 0?" and event.n > 3)
            assert (await handle.send("first")).text == "go 1?"
            assert (await handle.send("second")).data == ["first", "second"]


async def test_a_question_that_a_child_asks_again_after_it_was_answered_is_not_asked_again(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """The child's replica died before it read the answer. Fails if a repeated question is taken for a new one."""
    leaf = asker(unique("leaf"), count=2)
    root = passing(unique("root"), leaf.name)
    async with running(mesh, root), await caller.submit(root.name, "go") as handle:
        async with running(mesh, leaf) as (first,):
            view = await handle.result()
            await first.crash()
        child = view.metadata["weft.asked_by"].partition("/")[2]
        await follow_up(handle, "one")

        async def stored(texts: int) -> bool:
            found = await StoredTask.read(mesh, leaf.name, child)
            return sum(".input." in message.subject for message in found.messages) == texts

        await eventually(lambda: stored(1))
        async with running(mesh, leaf):
            await heard(handle, "go 1?", timeout=20)
            asked = await StoredTask.read(mesh, leaf.name, child)
            assert asked.states.count("input-required") == 3, "it was asked again"
            await follow_up(handle, "two")
            await heard(handle, weft.State.COMPLETED)
        questions = [event.text for event in seen(handle) if event.state is weft.State.INPUT_REQUIRED]
        assert (questions, (await handle.result()).data) == (["go 0?", "go 1?"], ["one", "two"])


async def follow_up(handle: Handle, text: str) -> None:
    """Send an answer and do not wait for what comes of it."""
    options = {"context_id": handle.context_id}
    await handle._mesh._follow_up(handle.agent, handle.id, message=text, options=options)  # type: ignore[attr-defined]


@pytest.mark.soak
async def test_an_answer_that_was_recorded_and_not_sent_is_sent_by_the_next_replica(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = asker(unique("leaf"))
    root = passing(unique("root"), leaf.name)
    replicas: list[LocalReplica] = []
    tries: list[str] = []
    reply = Handle.reply

    async def reply_or_die(self: Handle, request: Any) -> None:
        tries.append(request.message.message_id)
        if len(tries) == 1:
            (owner,) = [one for one in replicas if one.replica.agent.name == root.name and one.owned]
            await owner.replica.broker.close()
            await asyncio.Event().wait()
        await reply(self, request)
        await reply(self, request)  # as if the one before had died after this

    monkeypatch.setattr(Handle, "reply", reply_or_die)
    async with running(mesh, leaf, root, replicas=2) as started, await caller.submit(root.name, "go") as handle:
        replicas.extend(started)
        await handle.result()
        await follow_up(handle, "yes")
        await heard(handle, weft.State.COMPLETED, timeout=20)
        assert (await handle.result()).data == ["yes"]
        await settled(mesh, leaf.name)
    assert len(set(tries)) == 1
    assert len(tries) >= 2


async def test_children_that_ask_at_once_are_asked_one_after_the_other(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if two questions are open together: nobody could tell which one an answer is for."""
    leaf = asker(unique("leaf"), count=2)
    root = passing(unique("root"), leaf.name, children=3)
    async with running(mesh, leaf, root), await caller.submit(root.name, "q") as handle:
        view = await handle.result()
        asked = []
        while view.state is weft.State.INPUT_REQUIRED:
            asked.append(view.text)
            view = await handle.send(f"re {view.text}")
        stored = await StoredTask.read(mesh, root.name, handle.id)
    assert sorted(asked) == sorted(f"q-{n} {i}?" for n in range(3) for i in range(2))
    assert view.data == [[f"re q-{n} {i}?" for i in range(2)] for n in range(3)]
    stored.check()


@pytest.mark.soak
async def test_children_that_ask_at_once_get_their_own_answers_also_after_a_crash(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    leaf = asker(unique("leaf"))
    root = passing(unique("root"), leaf.name, children=2)
    async with running(mesh, leaf), running(mesh, root, replicas=2) as roots:
        async with await caller.submit(root.name, "q") as handle:
            first = await handle.result()
            (owner,) = [one for one in roots if one.owned]
            await owner.crash()
            await heard(handle, lambda event: event.attempt == 2)
            again = await heard(handle, lambda event: bool(event.metadata) and event.n > first.events + 1)
            assert again.text in ("q-0 0?", "q-1 0?")
            view = await handle.send(f"re {again.text}")
            assert view.text != again.text
            assert (await handle.send(f"re {view.text}")).data == [["re q-0 0?"], ["re q-1 0?"]]


async def test_a_task_whose_child_ended_while_its_question_was_open_hears_of_it_with_the_answer(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    leaf, root = asker(unique("leaf")), weft.Agent(unique("root"))

    @root.skill()
    async def work(task: weft.Task) -> str:
        try:
            await task.delegate(leaf.name, "go", deadline=1.0)
        except weft.TaskFailed as error:
            return str(error)
        return "answered"

    async with running(mesh, leaf, root), await caller.submit(root.name, "go") as handle:
        await handle.result()
        await settled(mesh, leaf.name)
        assert "the deadline has passed" in (await handle.send("too late")).text
