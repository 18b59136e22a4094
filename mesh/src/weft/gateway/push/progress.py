"""The cursor of a delivery, and what ends or postpones the work on it."""

from __future__ import annotations

import base64
import logging
import time
from datetime import datetime
from typing import Final

from weft.core.broker import Broker
from weft_protocols import headers as h
from weft_protocols.errors import ApiError, Conflict, ParseError
from weft_protocols.records import PushCursor, PushJob
from weft_protocols.resources import PUSH

log = logging.getLogger("weft.push")
_NO_MESSAGE: Final = 10037


class Ended(Exception):
    """There is nothing more to deliver."""


class Lost(Exception):
    """The lease is another's by now, or the config was changed or deleted."""


class Later(Exception):
    """The job is to come again after `delay` seconds."""

    def __init__(self, delay: float) -> None:
        super().__init__(f"again in {delay:.1f} s")
        self.delay = delay


class Progress:
    """The cursor of one job, as it is stored.

    Args:
        broker: Of account MESH.
        subject: Where the cursor is.
        job: What is delivered.
        since: Unix seconds at which the job was stored.
    """

    def __init__(self, broker: Broker, subject: str, job: PushJob, *, since: float) -> None:
        self._broker = broker
        self._subject = subject
        self._sequence = 0
        self.cursor = PushCursor(job.series, n=job.after)
        self.told = ""
        """When the last message of the log was stored, as the broker writes it."""
        self._since = since

    @property
    def age(self) -> float:
        """Seconds for which the task, or else the config, has said nothing new."""
        try:
            since = datetime.fromisoformat(self.told).timestamp() if self.told else self._since
        except ValueError:
            return 0.0
        return max(0.0, time.time() - since)

    async def read(self) -> None:
        """Take the stored cursor, unless it belongs to a config that was deleted."""
        found = await last(self._broker, self._subject)
        if found is None:
            return
        self._sequence, data = found
        try:
            cursor = PushCursor.decode(data)
        except ParseError as error:
            log.warning("%s: %s; beginning again", self._subject, error)
            return
        if cursor.series == self.cursor.series:
            self.cursor = cursor

    async def store(self, cursor: PushCursor) -> None:
        """Store the cursor, expecting the one that was read. Later if another gateway has moved it."""
        expected = h.block(h.fields({h.EXPECTED_SEQUENCE: str(self._sequence)}))
        try:
            self._sequence = await self._broker.publish(self._subject, cursor.encode(), headers=expected)
        except Conflict:
            raise Later(0.5) from None
        self.cursor = cursor


async def last(broker: Broker, subject: str) -> tuple[int, bytes] | None:
    """Sequence and body of the last message of a subject of `MESH_PUSH`, from the stream's leader."""
    try:
        message = (await broker.api(f"STREAM.MSG.GET.{PUSH}", {"last_by_subj": subject}))["message"]
    except ApiError as error:
        if error.err_code == _NO_MESSAGE:
            return None
        raise
    return int(message["seq"]), base64.b64decode(message.get("data", ""))
