"""What a handler waits for and holds nothing meanwhile: a time, an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgpack
from a2a.types import a2a_pb2 as pb

from weft.host.run import Input, Run
from weft_protocols import a2a, records, subjects
from weft_protocols import headers as h
from weft_protocols.errors import DeadlineExceeded
from weft_protocols.parts import Message, Part
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
        async with run.slot.waiting():
            with run.waits.open("timer", key=key, until=until):
                await asyncio.sleep(max(0.0, until - time.time()))

    async def ask(self, question: Any, *, timeout: float | None = None, auth: bool = False, **metadata: Any) -> Message:
        """Ask the caller and wait for the answer (`input-required`, or `auth-required` with `auth`).

        Holds no slot. After the agent's `suspend_after` seconds in which nothing of the task runs it leaves memory
        and goes on, on any replica, when the answer comes. A message sent before the question is not its answer.

        Raises:
            DeadlineExceeded: no answer within `timeout` seconds of the question.
        """
        key = self._run.journal.own_key(records.ANSWER_KEY)
        answer = await self._question(key, a2a.parts_of(question), auth, metadata, timeout)
        return a2a.message_from_proto(answer)

    async def _question(
        self, key: str, parts: Sequence[Part], auth: bool, metadata: dict[str, Any], timeout: float | None = None
    ) -> pb.Message:
        """Ask the caller, under a journal key; the recorded answer where there is one. One question waits at a time."""
        run = self._run
        stored = await run.journal.read(key)
        if stored is not None:
            answer = pb.Message.FromString(stored.data)
            run.recall(answer)
            return answer
        given = run.resumed if run.claim.waiting == key else None
        if given is not None and not run.knows(given.proto.message_id):
            run.resumed = None
            run.history.append(given.proto)
        else:
            async with run.asking:
                given = await self._ask_now(key, parts, auth, metadata=metadata, timeout=timeout)
            if given is None:
                raise DeadlineExceeded(f"no answer within {timeout:g} s")
        _, winner = await run.journal.write(key, given.proto.SerializeToString())
        run.consumed(given)
        await run.status(State.WORKING)
        return pb.Message.FromString(winner)

    async def _ask_now(
        self, key: str, parts: Sequence[Part], auth: bool, *, metadata: dict[str, Any], timeout: float | None
    ) -> Input | None:
        run = self._run
        asked, until = await self._asked(key, timeout)
        state = State.AUTH_REQUIRED if auth else State.INPUT_REQUIRED
        event = run.status_event(state, parts, metadata=metadata or None)
        run.note(event)
        named = h.fields({h.QUESTION: subjects.step_token(key)})
        await run.log.post(event, state=state, extra=named + await run.save_snapshot())
        await run.log.settle()
        try:
            return await self._answer(key, after=asked, until=until)
        except asyncio.CancelledError:
            if run.stop is None:  # nobody waits for the answer any more, and the task goes on
                await run.status(State.WORKING)
            raise

    async def _asked(self, key: str, timeout: float | None) -> tuple[int, float | None]:
        """Sequence of the record that says which question waits, and until when.

        There is one such record. Where it names this question already, what was sent since then may be the answer;
        where another one was asked in between, it may be the answer to that.
        """
        run = self._run
        before = await run.journal.read(records.ASKING_KEY)
        if before is not None and (told := msgpack.unpackb(before.data))["key"] == key:
            return before.seq, told["until"]
        until = None if timeout is None else time.time() + timeout
        data = bytes(msgpack.packb({"key": key, "until": until}))
        return await run.journal.replace(records.ASKING_KEY, data), until

    async def _answer(self, key: str, *, after: int, until: float | None) -> Input | None:
        """The first message that came after the question; None if none does in time."""
        run = self._run
        async with run.slot.waiting():
            with run.waits.open("answer", key=key, until=until) as wait:
                wait.asked = after
                try:
                    async with asyncio.timeout(None if until is None else max(0.0, until - time.time())):
                        while (given := run.take_input(after)) is None:
                            run.arrived.clear()
                            await run.arrived.wait()
                except TimeoutError:
                    return None
                return given
