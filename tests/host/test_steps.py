"""Steps: recorded once, tried again where that helps, and the same after a crash."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pydantic
import pytest

import weft
from weft.testing.agents import LocalReplica, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft_protocols.errors import DeadlineExceeded, StepChanged, UsageError

Unique = Callable[[str], str]


class Page(pydantic.BaseModel):
    url: str
    words: list[str]


@dataclass(frozen=True)
class Point:
    x: int
    y: float


class Count:
    """How often each body ran, in this process."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.keys: list[str] = []

    def of(self, name: str) -> int:
        return self.runs.count(name)


async def test_a_step_returns_what_its_body_returned_in_the_type_it_declares(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("typed"))
    seen: list[Any] = []

    async def page(url: str) -> Page:
        return Page(url=url, words=["a"])

    async def pages() -> list[Page]:
        return [Page(url="1", words=[]), Page(url="2", words=[])]

    def point(x: int) -> Point:
        return Point(x, 0.5)

    def pair() -> tuple[int, str]:
        return (1, "one")

    def unique_words() -> set[str]:
        return {"a", "b"}

    def raw() -> bytes:
        return b"\x00\xff"

    def plain(value: Any) -> Any:
        return value

    def maybe() -> Point | None:
        return None

    @agent.skill()
    async def work(task: weft.Task) -> None:
        seen.append(await task.step("page", page, "here"))
        seen.append(await task.step("pages", pages))
        seen.append(await task.step("point", point, x=3))
        seen.append(await task.step("pair", pair))
        seen.append(await task.step("set", unique_words))
        seen.append(await task.step("bytes", raw))
        seen.append(await task.step("dict", plain, {"a": [1, None, 2.5], "b": b"x"}))
        seen.append(await task.step("none", maybe))
        seen.append(await task.step("lambda", lambda: [1, 2]))

    async with running(mesh, agent):
        await caller.send(agent.name, "go")
    assert seen == [
        Page(url="here", words=["a"]),
        [Page(url="1", words=[]), Page(url="2", words=[])],
        Point(3, 0.5),
        (1, "one"),
        {"a", "b"},
        b"\x00\xff",
        {"a": [1, None, 2.5], "b": b"x"},
        None,
        [1, 2],
    ]


async def test_a_return_annotation_only_type_checkers_can_resolve_does_not_matter(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("unresolvable"))

    async def fetch(url: "Nowhere") -> "dict[str, Nowhere]":  # type: ignore[name-defined]  # noqa: F821
        return {"url": url}

    async def known(url: "Nowhere") -> "Page":  # type: ignore[name-defined]  # noqa: F821
        return Page(url=url, words=[])

    @agent.skill()
    async def work(task: weft.Task) -> str:
        page = await task.step("known", known, "u")
        return f"{await task.step('fetch', fetch, 'u')} {type(page).__name__}"

    async with running(mesh, agent):
        assert (await caller.send(agent.name, "go")).text == "{'url': 'u'} Page"


@pytest.mark.parametrize("value", [object(), {"at": object()}, 2**70, Page], ids=["object", "inside", "huge", "class"])
async def test_a_result_that_cannot_be_stored_fails_the_task_and_names_the_step(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, value: Any
) -> None:
    agent = weft.Agent(unique("unserialisable"))
    runs = []

    @agent.skill()
    async def work(task: weft.Task) -> None:
        runs.append(task.attempt)
        await task.step("odd one", lambda: value)

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go")
    assert view.state is weft.State.FAILED
    assert f"step 'odd one' returned {type(value).__name__}, which cannot be stored" in view.text
    assert runs == [1]


async def test_a_result_that_is_not_what_the_annotation_says_fails_the_task_and_names_the_step(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("liar"))

    async def liar() -> Page:
        return {"url": 1}  # type: ignore[return-value]

    @agent.skill()
    async def work(task: weft.Task) -> None:
        await task.step("fetch", liar)

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go")
    assert view.state is weft.State.FAILED
    assert "step 'fetch'" in view.text
    assert "Page" in view.text


async def test_a_large_result_is_a_blob_and_comes_back_whole(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("large"))

    def large() -> bytes:
        return bytes(range(256)) * 8000

    async def large_page() -> Page:
        return Page(url="u", words=["word"] * 100_000)

    @agent.skill()
    async def work(task: weft.Task) -> str:
        raw = await task.step("raw", large)
        page = await task.step("page", large_page)
        return f"{len(raw)} {raw[-1]} {type(page).__name__} {len(page.words)}"

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        assert (await handle.result()).text == "2048000 255 Page 100000"
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    assert all(len(record.data) < 1000 for records in stored.steps.values() for record in records)


async def test_retries_backoff_and_final_errors_decide_how_often_a_body_runs(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("retries"), attempts=1)
    ran = Count()

    async def flaky(*, until: int, name: str = "flaky") -> int:
        ran.runs.append(name)
        if ran.of(name) < until:
            raise ConnectionError("not yet")
        return ran.of(name)

    def picky() -> None:
        ran.runs.append("picky")
        raise KeyError("never")

    def failing() -> None:
        ran.runs.append("failing")
        raise weft.Fail("for good")

    def quick(retries: int, *final: type[Exception]) -> weft.StepOptions:
        return weft.StepOptions(retries=retries, final=final, backoff=0.001, max_backoff=0.002)

    @agent.skill()
    async def work(task: weft.Task) -> str:
        assert await task.step("a", flaky, until=3, step_options=quick(2)) == 3
        with pytest.raises(ConnectionError):
            await task.step("b", flaky, until=9, name="short", step_options=quick(1))
        with pytest.raises(KeyError):
            await task.step("c", picky, step_options=quick(5, LookupError))
        with pytest.raises(weft.Fail):
            await task.step("d", failing, step_options=quick(5))
        return "done"

    async with running(mesh, agent):
        assert (await caller.send(agent.name, "go")).text == "done"
    assert {name: ran.of(name) for name in set(ran.runs)} == {"flaky": 3, "short": 2, "picky": 1, "failing": 1}


async def test_a_try_that_takes_too_long_is_tried_again_and_then_deadline_exceeded(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("slow"), attempts=1)
    tries = []

    async def slow() -> None:
        tries.append(1)
        await asyncio.sleep(30)

    @agent.skill()
    async def work(task: weft.Task) -> None:
        with pytest.raises(DeadlineExceeded, match=r"step 'slow' took longer than 0\.05 s"):
            await task.step("slow", slow, step_options=weft.StepOptions(retries=1, timeout=0.05, backoff=0.001))

    async with running(mesh, agent):
        assert (await caller.send(agent.name, "go")).state is weft.State.COMPLETED
    assert len(tries) == 2


async def test_a_timeout_of_the_body_itself_is_its_own_error(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a body's own TimeoutError is told as the step's timeout, which was not set."""
    agent = weft.Agent(unique("own-timeout"), attempts=1)

    def times_out() -> None:
        raise TimeoutError("the other side is slow")

    @agent.skill()
    async def work(task: weft.Task) -> None:
        with pytest.raises(TimeoutError, match="the other side is slow"):
            await task.step("call", times_out)

    async with running(mesh, agent):
        assert (await caller.send(agent.name, "go")).state is weft.State.COMPLETED


async def test_a_key_used_again_gets_an_ordinal_and_steps_inside_steps_get_their_place(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("keys"))

    @agent.skill()
    async def work(task: weft.Task) -> None:
        async def outer(n: int) -> int:
            return int(await task.step("inner", lambda: n)) + int(await task.step("inner", lambda: n))

        for n in range(3):
            await task.step("loop", lambda: n)  # noqa: B023
        assert await task.gather(*(task.step("outer", outer, n) for n in range(3))) == [0, 2, 4]
        assert await task.step("a key with spaces & signs", lambda: "ok") == "ok"

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await handle.result()
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    stored.check()
    keys = set(stored.steps)
    assert len([key for key in keys if key in ("loop", "outer")]) == 2
    assert len(keys) == 3 + 3 + 6 + 1
    assert all(len(records) == 1 for records in stored.steps.values())


async def test_steps_under_gather_run_together_and_keep_their_order(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("parallel"))
    together = threading.Barrier(4)

    def meet(n: int) -> int:
        together.wait(10)
        return n

    @agent.skill()
    async def work(task: weft.Task) -> list[int]:
        return await task.gather(*(task.step("meet", meet, n) for n in range(4)))

    async with running(mesh, agent):
        assert (await caller.send(agent.name, "go")).data == [0, 1, 2, 3]


async def test_the_idempotency_key_is_one_per_step_and_the_same_in_every_try(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("idempotent"))
    given: dict[str, list[str]] = {"a": [], "b": [], "thread": []}

    async def named(which: str, *, idempotency_key: str) -> None:
        assert weft.current_idempotency_key() == idempotency_key
        given[which].append(idempotency_key)
        if len(given[which]) < 3:
            raise ConnectionError

    def in_thread() -> None:
        given["thread"].append(weft.current_idempotency_key())

    @agent.skill()
    async def work(task: weft.Task) -> None:
        options = weft.StepOptions(retries=3, backoff=0.001)
        await task.step("a", named, "a", step_options=options)
        await task.step("b", named, "b", step_options=options)
        await task.step("thread", in_thread)
        assert weft.current_idempotency_key() == ""

    async with running(mesh, agent):
        assert (await caller.send(agent.name, "go")).state is weft.State.COMPLETED
    keys = [set(values) for values in given.values()]
    assert all(len(values) == 1 and "" not in values for values in keys)
    assert len(set.union(*keys)) == 3


async def test_steps_inside_a_step_that_is_tried_again_are_not_done_again(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if the second try of the outer body gives its inner steps other keys, so that they run and pay again."""
    agent = weft.Agent(unique("nested-retry"))
    ran = Count()

    def pay() -> int:
        ran.runs.append("pay")
        ran.keys.append(weft.current_idempotency_key())
        return ran.of("pay")

    @agent.skill()
    async def work(task: weft.Task) -> int:
        async def outer() -> int:
            paid = int(await task.step("pay", pay))
            ran.runs.append("outer")
            if ran.of("outer") < 3:
                raise ConnectionError("after the payment")
            return paid

        return int(await task.step("order", outer, step_options=weft.StepOptions(retries=5, backoff=0.001)))

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        assert (await handle.result()).data == 1
        (await StoredTask.read(mesh, agent.name, handle.id)).check()
    assert (ran.of("outer"), ran.of("pay")) == (3, 1)


async def test_after_a_crash_finished_steps_return_what_is_recorded_and_the_rest_is_done(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a recorded step's body runs again, returns another value, or its key changes between attempts."""
    agent = weft.Agent(unique("replay"))
    ran = Count()
    reached = asyncio.Event()
    words = {f"word-{n}" for n in range(50)}

    def once(name: str, *, words: set[str], idempotency_key: str) -> int:
        ran.runs.append(name)
        ran.keys.append(idempotency_key)
        return ran.of(name)

    async def stuck(attempt: int, *, idempotency_key: str) -> str:
        ran.runs.append("stuck")
        ran.keys.append(idempotency_key)
        if attempt == 1:
            reached.set()
            await asyncio.Event().wait()
        return "through"

    @agent.skill()
    async def work(task: weft.Task) -> list[Any]:
        first = await task.step("first", once, "first", words=words)
        both = await task.gather(
            task.step("same", once, "second", words=set(words)),
            task.step("same", once, "third", words=words),
        )
        attempt = task.attempt
        last = await task.step("stuck", lambda *, idempotency_key: stuck(attempt, idempotency_key=idempotency_key))
        return [first, *both, last]

    async with running(mesh, agent, replicas=2) as replicas:
        async with await caller.submit(agent.name, "go") as handle:
            await reached.wait()
            await owner(replicas, handle).crash()
            view = await handle.result(20)
            stored = await StoredTask.read(mesh, agent.name, handle.id)
    assert view.data == [1, 1, 1, "through"]
    assert {name: ran.of(name) for name in set(ran.runs)} == {"first": 1, "second": 1, "third": 1, "stuck": 2}
    assert len(set(ran.keys)) == 4
    stored.check()
    assert stored.attempts == [1, 2]


async def test_a_step_replayed_with_another_input_is_named_as_the_error(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if the recorded result of another input is taken for this one."""
    agent = weft.Agent(unique("changed"))
    seen: list[StepChanged] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        try:
            await task.step("fetch", lambda n: n, task.attempt)
        except StepChanged as error:
            seen.append(error)
            raise
        raise ConnectionError("so that there is another attempt")

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go")
    assert [str(error).partition(" is recorded with another input")[0] for error in seen] == [
        f"step 'fetch' of task {view.id}"
    ]
    assert view.state is weft.State.FAILED
    assert "recorded with another input" in view.text
    assert issubclass(StepChanged, UsageError)


def test_the_digest_of_an_input_is_the_same_in_every_process() -> None:
    """Fails if a set's order, which is another one in each process, makes a replay look changed."""
    code = "from weft.host.values import digest; print(digest(({'a', 'b', 'c', 'd'},), {'k': frozenset('xyz')}))"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1


def owner(replicas: list[LocalReplica], handle: weft.Handle) -> LocalReplica:
    """The replica that runs a task."""
    (found,) = [replica for replica in replicas if handle.id in replica.owned]
    return found
