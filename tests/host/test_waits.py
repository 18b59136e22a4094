"""The registry of what a task waits for."""

import asyncio

from weft.host.waits import Wait, Waits


def states(waits: Waits) -> tuple[bool, bool]:
    """Whether it only waits, and whether it may leave memory."""
    return waits.idle, waits.parkable


async def test_a_task_is_idle_while_something_waits_and_nothing_works() -> None:
    waits = Waits("t")
    assert states(waits) == (False, False)
    with waits.open("timer", key="_sleep", until=5.0) as wait:
        assert states(waits) == (True, True)
        assert (wait.key, wait.until, waits.all) == ("_sleep", 5.0, (wait,))
        with waits.working():
            assert states(waits) == (False, False)
        with waits.kept():
            assert states(waits) == (True, False)
        with waits.open("lock", ("crm",)):
            assert states(waits) == (True, False)
        assert states(waits) == (True, True)
    assert states(waits) == (False, False)


async def test_observers_are_told_of_each_wait_and_every_change_counts() -> None:
    """Fails if whoever keeps the graph of waits misses one, also one that ends by an error."""
    told: list[tuple[str, str, tuple[str, ...], int, bool]] = []

    def observe(waits: Waits, wait: Wait, opened: bool) -> None:
        told.append((waits.task_id, wait.kind, wait.targets, wait.need, opened))

    observers = [observe]
    waits = Waits("t", observers=observers)
    before = waits.changes
    try:
        with waits.open("child", ("a", "b"), need=1):
            raise RuntimeError
    except RuntimeError:
        pass
    observers.clear()
    with waits.open("child", ("c",)):
        pass
    assert told == [("t", "child", ("a", "b"), 1, True), ("t", "child", ("a", "b"), 1, False)]
    assert waits.changes == before + 4


async def test_branches_that_only_wait_know_that_they_are_together() -> None:
    waits = Waits("t")
    opened: list[Wait] = []

    async def branch(target: str) -> None:
        with waits.open("child", (target,)) as wait:
            opened.append(wait)

    with waits.together(2, 1):
        async with asyncio.TaskGroup() as group:
            for target in ("a", "b"):
                group.create_task(branch(target))
    await branch("c")
    first, second, alone = opened
    assert first.together is not None
    assert (first.together.size, first.together.need) == (2, 1)
    assert second.together is first.together
    assert alone.together is None
