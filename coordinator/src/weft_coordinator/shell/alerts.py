"""Sending alerts: one target, in a thread of its own, so that nothing waits for it."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from weft.core.watchconf import AlertTarget, missing_alerts
from weft_protocols.errors import InvalidConfig, Unavailable

DEADLINE: Final = 30.0
"""Seconds one message may take."""
_KINDS: Final = {"info": "info", "warning": "warning", "critical": "failure", "cleared": "success"}


class Sender:
    """Sends messages to one target."""

    def __init__(self, target: AlertTarget) -> None:
        self.target = target
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=f"alerts to {target.name}")
        self._under_way: Future[None] | None = None

    async def send(self, title: str, body: str, *, kind: str) -> None:
        """Send one message; `kind` is a severity or `cleared`.

        Raises:
            InvalidConfig: there is no address, it is none, or what sends is not installed.
            Unavailable: the target did not take it within `DEADLINE` seconds, or the message before is still going.
        """
        if problem := missing_alerts():
            raise InvalidConfig(problem)
        if self._under_way is not None and not self._under_way.done():
            raise Unavailable(f"alerts to {self.target.name}: the message before has not gone yet")
        url = self.target.url()
        self._under_way = self._threads.submit(_send, self.target.name, url, title, body, _KINDS[kind])
        try:
            async with asyncio.timeout(DEADLINE):
                # A thread cannot be stopped: what takes too long goes on by itself, and the next message waits for it.
                await asyncio.shield(asyncio.wrap_future(self._under_way))
        except TimeoutError:
            raise Unavailable(f"alerts to {self.target.name}: no answer within {DEADLINE:g} s") from None

    def close(self) -> None:
        """Send no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _send(name: str, url: str, title: str, body: str, kind: str) -> None:
    # Never the address in an error: it often holds a secret.
    try:
        import apprise

        receiver = apprise.Apprise()
        known = receiver.add(url)
        taken = known and receiver.notify(
            body=body, title=title, notify_type=apprise.NotifyType(kind), body_format="text"
        )
    except Exception as error:  # one of a hundred plugins failed: not taken, so it is tried again
        raise Unavailable(f"alerts to {name}: sending failed with {type(error).__name__}") from error
    if not known:
        raise InvalidConfig(f"alerts: {name} does not hold an Apprise address; the list is in Apprise's documentation")
    if not taken:
        raise Unavailable(f"alerts to {name}: it was not taken; the log above says why")
