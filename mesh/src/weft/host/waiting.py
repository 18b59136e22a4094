"""What a handler waits for and holds nothing meanwhile: a time, an answer."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgpack
from a2a.types import a2a_pb2 as pb

from weft.host.run import Input, Run, Stop
from weft_protocols import a2a, records
from weft_protocols.errors import DeadlineExceeded
from weft_protocols.parts import Message
from weft_protocols.states import State


class Waiting:
    """The part of `Task` that waits."""

    _run: Run

    async def sleep(self, seconds: float) -> None:
        """Wait, without holding a slot; after a crash only for what is left."""
        run = self._run
        key = run.journal.own_key(records.TIMER_KEY)
        until = time.time() + seconds
        stored = await run.journal.read(key)
        if stored is not None:
            until = float(msgpack.unpackb(stored.data)["until"])
        else:
            await run.journal.write(key, bytes(msgpack.packb({"until": until})))
        run.busy += 1
        try:
            async with run.slot.waiting():
                await asyncio.sleep(max(0.0, until - time.time()))
        finally:
            run.rest()

    async def ask(self, question: Any, *, timeout: float | None = None, auth: bool = False, **metadata: Any) -> Message:
        """Ask the caller and wait for the answer (`input-required`, or `auth-required` with `auth`).

        Holds no slot. After the agent's `suspend_after` seconds the task leaves memory and goes on, on any
        replica, when the answer comes; with a `timeout` (seconds) it stays. A message sent before the question
        is not its answer.

        Raises:
            DeadlineExceeded: no answer within `timeout`.
        """
        run = self._run
        key = run.journal.own_key(records.ANSWER_KEY)
        stored = await run.journal.read(key)
        if stored is not None:
            answer = pb.Message.FromString(stored.data)
            run.recall(answer)
            return a2a.message_from_proto(answer)
        given = run.resumed if run.claim.waiting == key else None
        if given is not None and not run.knows(given.proto.message_id):
            run.resumed = None
            run.history.append(given.proto)
        else:
            before = await run.journal.read(f"{key}-asked")
            asked = before.seq if before is not None else (await run.journal.write(f"{key}-asked", b""))[0]
            state = State.AUTH_REQUIRED if auth else State.INPUT_REQUIRED
            event = run.status_event(state, a2a.parts_of(question), metadata=metadata or None)
            run.note(event)
            await run.log.post(event, state=state, extra=await run.save_snapshot())
            await run.log.settle()
            given = await self._answer(key, after=asked, timeout=timeout)
        _, winner = await run.journal.write(key, given.proto.SerializeToString())
        run.consumed(given)
        await run.status(State.WORKING)
        return a2a.message_from_proto(pb.Message.FromString(winner))

    async def _answer(self, key: str, *, after: int, timeout: float | None) -> Input:
        run = self._run
        now = asyncio.get_running_loop().time
        give_up = None if timeout is None else now() + timeout
        suspend_at = now() + run.agent.suspend_after
        async with run.slot.waiting():
            while True:
                if (given := run.take_input(after)) is not None:
                    return given
                run.arrived.clear()
                may_suspend = give_up is None and run.busy == 0
                try:
                    async with asyncio.timeout_at(suspend_at if may_suspend else give_up):
                        await run.arrived.wait()
                except TimeoutError:
                    if give_up is not None:
                        raise DeadlineExceeded(f"no answer within {timeout:g} s") from None
                    run.waiting, run.asked = key, after
                    run.interrupt(Stop.SUSPEND)
                    await asyncio.Event().wait()
