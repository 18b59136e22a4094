"""Coordinators among themselves: how far each has read, and what one has in its file and another lacks.

Every coordinator says about once a second how far its file goes, and hears it of the others, on the control subjects
of `coordinator`, a name no agent can have. What has left the stream before one had read it, it gets from another.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from weft.core.broker import Broker, Delivered, Stored, Subscription
from weft.core.history import Batch
from weft.core.supervise import Tasks
from weft_coordinator.shell.store import Store
from weft_protocols import subjects
from weft_protocols.errors import BrokerError, ParseError, Unavailable, WeftError

NAME: Final = "coordinator"
ALL: Final = subjects.ctl(NAME, "all")
ALIVE: Final = 15.0
"""Seconds without a word after which a coordinator counts as gone."""
PATIENCE: Final = 2.5
"""Seconds in which a coordinator that runs makes itself heard."""
PIECE: Final = 256 * 1024
"""Bytes of messages in one answer, and of one message that is larger."""
TRIES: Final = 3


@dataclass(slots=True)
class Peer:
    """Another coordinator."""

    position: int
    whole: bool
    """Whether nothing is missing in its file."""
    heard: float


@dataclass(slots=True)
class _Told:
    """A message between coordinators."""

    op: str
    token: str
    fields: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        return bytes(msgpack.packb({"op": self.op, "token": self.token, **self.fields}))

    @staticmethod
    def decode(data: bytes) -> _Told:
        try:
            told = dict(msgpack.unpackb(data))
            return _Told(str(told.pop("op")), str(told.pop("token")), told)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise ParseError(f"not a message of a coordinator: {error}") from error


class Copies:
    """What this coordinator knows of the others, and what they may read of its file."""

    def __init__(self, broker: Broker, store: Store) -> None:
        self.token = uuid.uuid4().hex
        self.peers: dict[str, Peer] = {}
        self.on_rebuild = asyncio.Event()
        """Set when every coordinator is to make its file anew."""
        self._broker = broker
        self._store = store
        self._tasks = Tasks("answers to other coordinators")
        self._subscriptions: list[Subscription] = []
        self._heard = asyncio.Event()

    async def open(self) -> None:
        """Listen to the others and ask them to say something."""
        for subject in (ALL, subjects.ctl(NAME, self.token)):
            self._subscriptions.append(await self._broker.subscribe(subject, self._on_message))
        await self._broker.flush()
        self._broker.send(ALL, _Told("hello", self.token).encode())

    async def close(self) -> None:
        """Hear and answer nothing more, and say so."""
        if self._subscriptions:
            try:
                self._broker.send(ALL, _Told("bye", self.token).encode())
            except BrokerError:
                pass
        for subscription in self._subscriptions:
            await subscription.close()
        await self._tasks.aclose()

    def say(self) -> None:
        """Tell the others how far this file goes."""
        told = {"position": self._store.position, "whole": self._store.whole}
        self._broker.send(ALL, _Told("at", self.token, told).encode())

    def rebuild_all(self) -> None:
        """Have every other coordinator make its file anew."""
        self._broker.send(ALL, _Told("rebuild", self.token).encode())

    def floor(self) -> int:
        """Sequence up to which every coordinator that lives has the stream in its file."""
        now = time.monotonic()
        self.peers = {token: peer for token, peer in self.peers.items() if now - peer.heard < ALIVE}
        return min((self._store.position, *(peer.position for peer in self.peers.values())))

    async def page(self, start: int, end: int) -> Batch | None:
        """Messages from `start` to `end` out of another's file; None if no other coordinator has them."""
        for _ in range(TRIES):
            token = await self._one_with(end)
            if token is None:
                return None
            try:
                found, more = await self._ask(token, start, end)
            except (WeftError, ValueError, TypeError, KeyError):
                self.peers.pop(token, None)
                continue
            return Batch(found, more)
        return None

    async def _one_with(self, end: int) -> str | None:
        """A coordinator whose file is whole and goes as far as `end`."""
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while True:
            for token, peer in self.peers.items():
                if peer.whole and peer.position >= end:
                    return token
            self._heard.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._heard.wait()
            except TimeoutError:
                return None

    async def _ask(self, token: str, start: int, end: int) -> tuple[list[Stored], bool]:
        answer = await self._request(token, _Told("page", self.token, {"start": start, "end": end}))
        found: list[Stored] = []
        for seq, subject, at, headers, data, size in answer["messages"]:
            while len(data) < size:
                rest = _Told("piece", self.token, {"seq": seq, "offset": len(data)})
                piece = (await self._request(token, rest))["data"]
                if not piece:
                    raise ParseError(f"message {seq} ends early")
                data += piece
            found.append(Stored(subject, seq, headers, data, at))
        return found, bool(answer["more"])

    async def _request(self, token: str, told: _Told) -> dict[str, Any]:
        reply = await self._broker.request(subjects.ctl(NAME, token), told.encode(), timeout=5.0)
        return _Told.decode(reply.data).fields

    # Answering ---------------------------------------------------------------------------------

    def _on_message(self, message: Delivered) -> None:
        try:
            told = _Told.decode(message.data)
        except ParseError:
            return
        if told.token == self.token:
            return
        if told.op == "at":
            position, whole = int(told.fields.get("position", 0)), bool(told.fields.get("whole"))
            self.peers[told.token] = Peer(position, whole, time.monotonic())
            self._heard.set()
        elif told.op == "hello":
            self.say()
        elif told.op == "bye":
            self.peers.pop(told.token, None)
        elif told.op == "rebuild":
            self.on_rebuild.set()
        elif message.reply:
            self._tasks.start(self._answer(told, message.reply))

    async def _answer(self, told: _Told, reply: str) -> None:
        """Answer what can be answered; whoever gets no answer asks another."""
        try:
            answer = await (self._page(told.fields) if told.op == "page" else self._piece(told.fields))
            self._broker.send(reply, _Told(told.op, self.token, answer).encode())
        except (WeftError, KeyError, TypeError):
            return

    async def _page(self, asked: dict[str, Any]) -> dict[str, Any]:
        start, end = int(asked["start"]), int(asked["end"])
        batch = await self._store.batch(start, size=PIECE)
        within = [one for one in batch.messages if one.seq <= end]
        shown = [(one.seq, one.subject, one.time, one.headers, one.data[:PIECE], len(one.data)) for one in within]
        return {"messages": shown, "more": batch.more and len(within) == len(batch.messages)}

    async def _piece(self, asked: dict[str, Any]) -> dict[str, Any]:
        message = await self._store.message(int(asked["seq"]))
        if message is None:
            raise Unavailable(f"message {asked['seq']} is not here")
        return {"data": message.data[int(asked["offset"]) :][:PIECE]}
