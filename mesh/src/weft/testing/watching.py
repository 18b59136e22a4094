"""Waiting in tests for what a task says, and for an agent's lanes to be empty."""

from __future__ import annotations

from collections.abc import Callable

from weft.client.mesh import Handle
from weft.client.watch import Event, event_of
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh
from weft_protocols import subjects
from weft_protocols.resources import STREAM
from weft_protocols.states import State


def seen(handle: Handle) -> list[Event]:
    """The events a handle has got so far, in order."""
    watch = handle._watched.watch
    return [event_of(raw, raw.decode(), task_id=handle.id, agent=handle.agent) for raw in watch._events]


async def heard(handle: Handle, what: str | State | Callable[[Event], bool], *, timeout: float = 15.0) -> Event:
    """The first event of a handle with a text, into a state, or for which a condition holds.

    Raises:
        TimeoutError: there was none within `timeout` seconds.
        AssertionError: the task ended without one.
    """

    def matches(event: Event) -> bool:
        if isinstance(what, State):
            return event.state is what
        return event.text == what if isinstance(what, str) else what(event)

    def found() -> Event | None:
        events = seen(handle)
        match = next((event for event in events if matches(event)), None)
        if match is None and handle._watched.watch.ended:
            raise AssertionError(f"the task ended without it: {[(event.state, event.text) for event in events]}")
        return match

    event = await eventually(found, timeout=timeout)
    assert event is not None  # noqa: S101 - for the type checker
    return event


async def settled(mesh: BrokerMesh, agent: str, *, timeout: float = 15.0) -> None:
    """Return once no message for an agent waits or is in work. TimeoutError after `timeout` seconds."""
    broker = await mesh.connect("coordinator")

    async def quiet() -> bool:
        for lane in subjects.LANES:
            info = await broker.api(f"CONSUMER.INFO.{STREAM}.{subjects.consumer(agent, lane)}")
            if info["num_ack_pending"] or info["num_pending"]:
                return False
        return True

    try:
        await eventually(quiet, timeout=timeout)
    finally:
        await broker.close()
