"""The agents of the contract suite: the first word of a message says what is done with it.

`contract` does everything; `strict` requires an extension, takes nothing but text, and declares an extended card it
does not have; `limited` declares neither streaming nor push notifications.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any, Final

import weft
from weft_protocols.cards import card_json, digest, parse_card
from weft_protocols.parts import Data, File, Text

CONTRACT: Final = "contract"
STRICT: Final = "strict"
LIMITED: Final = "limited"
OPTIONAL_EXTENSION: Final = "https://example.com/extensions/notes/v1"
REQUIRED_EXTENSION: Final = "https://example.com/extensions/receipt/v1"
ANSWER_SKILL: Final = "answer"
"""Skill that answers with a message instead of a task."""


class Contract:
    """Agent `contract`, and the gates that hold its tasks."""

    def __init__(self) -> None:
        self.gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        """By the second word of the message."""
        self.holding: set[str] = set()
        """Ids of the tasks at a gate."""
        self.canceled: list[str] = []
        """Ids of the tasks that noticed their cancel."""
        self.agent = weft.Agent(
            CONTRACT,
            version="1.2.3",
            description="Does what the first word says",
            concurrency=64,
            suspend_after=0.5,
            cancel_grace=2.0,
            card={
                "provider": {"organization": "Weft", "url": "https://example.com"},
                "documentationUrl": "https://example.com/contract",
                "capabilities": {"extensions": [{"uri": OPTIONAL_EXTENSION, "description": "takes notes"}]},
            },
            extended_card={
                "skills": [{"id": "secret", "name": "Secret", "description": "for those who ask", "tags": ["hidden"]}]
            },
        )
        self.agent.skill("do", name="Do", description="Does what the first word says", tags=["contract"])(self._do)
        self.agent.skill(
            ANSWER_SKILL, name="Answer", description="Answers with a message", tags=["contract"], answer="message"
        )(self._answer)

    async def _answer(self, task: weft.Task) -> Any:
        word, _, rest = task.text.partition(" ")
        if word == "hold":
            await self.gates[rest].wait()
        return [Text(f"you said {task.text}"), Data({"parts": len(task.parts)})]

    async def _do(self, task: weft.Task) -> Any:
        word, _, rest = task.text.partition(" ")
        actions = {
            "parts": self._parts,
            "stream": self._stream,
            "ask": self._ask,
            "auth": self._auth,
            "hold": self._hold,
            "chat": self._chat,
            "steps": self._steps,
            "status": self._status,
            "refs": self._refs,
        }
        action = actions.get(word)
        if action is not None:
            return await action(task, rest)
        if word == "reject":
            raise weft.Reject(f"not {rest}")
        if word == "fail":
            raise weft.Fail(f"cannot {rest}")
        return task.text.partition(" ")[2] if word == "echo" else [Data(task.data), *task.files]

    async def _parts(self, task: weft.Task, rest: str) -> None:
        await task.artifact("text", "plain words", description="words")
        await task.artifact("raw", File("blob.bin", bytes(range(256)), media_type="application/octet-stream"))
        await task.artifact("link", File("page.html", url="https://example.com/page.html", media_type="text/html"))
        await task.artifact("data", {"text": "ü", "number": 1.5, "whole": 7, "list": [True, None], "object": {}})
        await task.artifact("mixed", [Text("one", "text/markdown", {"lang": "en"}), Data([1, 2])])

    async def _stream(self, task: weft.Task, rest: str) -> None:
        async def chunks() -> AsyncIterator[str]:
            for n in range(int(rest)):
                yield f"{n} "

        await task.artifact("stream", chunks())

    async def _ask(self, task: weft.Task, rest: str) -> str:
        first = await task.ask("which one?")
        second = await task.ask([Text("how many?"), Data({"of": first.text})])
        return f"{second.text} {first.text} ones"

    async def _auth(self, task: weft.Task, rest: str) -> str:
        answer = await task.ask("sign in at https://example.com/login", auth=True)
        return f"authorised with {answer.text}"

    async def _hold(self, task: weft.Task, rest: str) -> str:
        """Say something, wait for the gate, say something more."""
        await task.update("at the gate")
        self.holding.add(task.id)
        try:
            await self.gates[rest].wait()
        except asyncio.CancelledError:
            self.canceled.append(task.id)
            raise
        await task.update("behind the gate")
        return "through the gate"

    async def _chat(self, task: weft.Task, rest: str) -> str:
        """Wait for the gate without a word before it."""
        await self.gates[rest].wait()
        return "at last"

    async def _steps(self, task: weft.Task, rest: str) -> str:
        """Ten statuses, an artifact in between, with the gate in the middle."""
        for n in range(10):
            await task.update(f"step {n}")
            if n == 4:
                await task.artifact("middle", "half")
                await self.gates[rest].wait()
        return "ten steps"

    async def _status(self, task: weft.Task, rest: str) -> str:
        await task.update("looking", progress=0.25, where={"page": 3})
        await task.update([Text("found"), Data({"hits": [1, 2]})], progress=0.75)
        return "told"

    async def _refs(self, task: weft.Task, rest: str) -> Any:
        work = task._run.work
        return {
            "references": list(work.request.message.reference_task_ids),
            "message": list(work.request.message.extensions),
            "requested": work.headers.get("a2a-extensions", ""),
            "trace": work.headers.get("traceparent", ""),
            "metadata": task.metadata,
        }


def strict() -> weft.Agent:
    """Agent `strict`."""
    agent = weft.Agent(
        STRICT,
        description="Takes text from those who know its extension",
        card={
            "defaultInputModes": ["text/plain"],
            "capabilities": {
                "extendedAgentCard": True,
                "extensions": [{"uri": REQUIRED_EXTENSION, "required": True}],
            },
        },
    )

    @agent.skill("repeat", tags=["contract"])
    async def repeat(text: str) -> str:
        return text

    return agent


def limited() -> weft.Agent:
    """Agent `limited`, which describes itself as an implementation of little might."""
    agent = weft.Agent(LIMITED, description="Neither streams nor pushes")

    @agent.skill("repeat", tags=["contract"])
    async def repeat(text: str) -> str:
        return text

    return agent


def registration(agent: weft.Agent) -> dict[str, Any]:
    """What a replica of one of these agents registers."""
    told = agent.describe()
    if agent.name == LIMITED:
        card = parse_card(told["card"])
        card.capabilities.streaming = card.capabilities.push_notifications = False
        told |= {"card": card_json(card), "card_digest": digest(card)}
    return told
