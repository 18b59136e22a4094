"""Questions to the leading coordinator, sent together: those of one turn of the loop are one message.

Under load most of what a question costs is its message: it crosses two accounts and is answered by another one.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from weft.client import coordinator
from weft.core.broker import Broker
from weft_protocols import subjects
from weft_protocols.errors import BrokerError, Unavailable, WeftError

log = logging.getLogger("weft.client")

SEVERAL: Final = "several"
"""The coordinator's operation that is several in one message."""
TOGETHER: Final = 64
"""Questions of one message at most."""
Told: TypeAlias = Callable[[Mapping[str, Any] | WeftError], None]
"""Gets the answer to a question, or the error it was answered with; Unavailable if nobody answered. Must not raise."""


class Asks:
    """What one caller asks. Questions arrive in the order in which they were asked.

    Args:
        broker: a connection that may speak for the caller.
        caller: its identity.
    """

    def __init__(self, broker: Broker, caller: str) -> None:
        self._broker = broker
        self._caller = caller
        self._open: list[tuple[str, Mapping[str, Any], Told]] = []
        self._flushing: asyncio.Handle | None = None
        self._unanswered = 0
        """Messages on their way."""

    def ask(self, operation: str, body: Mapping[str, Any], then: Told, *, patient: bool = False) -> None:
        """Ask together with what else is asked in this turn of the loop; `then` gets the answer.

        A `patient` question nobody waits for: it goes with the next one, at the latest when no message is on its way.
        """
        self._open.append((operation, body, then))
        if not (patient and self._unanswered):
            self._flush_soon()

    async def call(
        self, operation: str, body: Mapping[str, Any], *, timeout: float, patient: bool = False
    ) -> Mapping[str, Any]:
        """Ask, and wait for the answer; raises what `coordinator.call` raises. Who leaves has asked all the same."""
        told: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()

        def then(answer: Mapping[str, Any] | WeftError) -> None:
            if told.done():
                return
            if isinstance(answer, WeftError):
                told.set_exception(answer)
            else:
                told.set_result(answer)

        self.ask(operation, body, then, patient=patient)
        try:
            async with asyncio.timeout(timeout):
                return await told
        except TimeoutError:
            raise Unavailable(f"{operation} got no answer within {timeout:g} s; see: mesh ps") from None

    def _flush_soon(self) -> None:
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Send what was asked now: what is sent after this arrives after it."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        asked, self._open = self._open, []
        for at in range(0, len(asked), TOGETHER):
            self._send(asked[at : at + TOGETHER])

    def _send(self, asked: Sequence[tuple[str, Mapping[str, Any], Told]]) -> None:
        if len(asked) == 1:
            operation, body = asked[0][:2]
        else:
            operation, body = SEVERAL, {"asks": [one[:2] for one in asked]}
        thens = [then for *_, then in asked]

        def answered(data: bytes, headers: bytes | None, error: WeftError | None) -> None:
            self._unanswered -= 1
            if self._open and not self._unanswered:
                self._flush_soon()
            for then, answer in zip(thens, _answers(operation, len(thens), data, headers, error), strict=True):
                then(answer)

        self._unanswered += 1
        try:
            self._broker.publish_then(subjects.coord(operation, self._caller), json.dumps(body).encode(), then=answered)
        except BrokerError as error:
            answered(b"", None, error)


def _answers(
    operation: str, count: int, data: bytes, headers: bytes | None, error: WeftError | None
) -> Sequence[Mapping[str, Any] | WeftError]:
    """One answer to each question."""
    if error is not None:
        return [coordinator.unanswered(operation, error)] * count
    try:
        told = coordinator.answered(operation, data, headers)
        if operation != SEVERAL:
            return [told]
        answers = told.get("answers")
        if not isinstance(answers, list) or len(answers) != count:
            raise Unavailable(f"{operation}: the coordinator's answer is not understood: another version?")
    except WeftError as failed:
        return [failed] * count
    return [coordinator.error_in(answer) or answer for answer in answers]
