"""Waiting for persons to approve, and holding nothing meanwhile.

The coordinator keeps what was asked and what was decided. A task repeats its request until that is settled, which
attaches to the one that is there; so it finds a decision that was made while nobody ran it, or nobody could be told.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Final

import msgpack

from weft.client import coordinator
from weft.core.broker import Delivered
from weft.host.owner import Owner
from weft.host.run import Run
from weft_protocols import a2a, records, subjects
from weft_protocols.errors import BrokerError, InternalError, StepChanged, Unavailable, UsageError
from weft_protocols.records import Control, StepRecord
from weft_protocols.states import State

log = logging.getLogger("weft.host")

OP: Final = "approval"
"""Operation of the control message that says that an approval may be settled."""
PENDING: Final = "pending"
EXPIRES: Final = 86_400.0
"""Seconds until a question nobody decided about counts as refused."""
MAX_TITLE: Final = 500
"""Characters of a question."""
MAX_KEY: Final = 1000
"""Characters of a journal key that is told as it is."""
AGAIN: Final = 10.0
"""Seconds until the coordinator is asked again while nobody says anything; up to twice that, by chance."""
ASK: Final = 5.0
"""Seconds the coordinator has to answer."""
PAUSES: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds before asking again while no coordinator answers."""
METADATA: Final = "weft.approval"
"""Key of a status' metadata: id, title, risk and needs of what it waits for."""


@dataclass(frozen=True, slots=True)
class Approval:
    """What persons said. It counts as true only if they approved.

    Attributes:
        state: `approved`, `denied`, `expired` (nobody decided in time) or `withdrawn`.
        id: as `mesh approvals show` takes it.
        by: who decided, those who approved or the one who denied.
        reason: why, if somebody said so.
    """

    state: str
    id: str = ""
    by: tuple[str, ...] = ()
    reason: str = ""

    def __bool__(self) -> bool:
        return self.state == "approved"

    @property
    def denied(self) -> bool:
        """Whether a person said no."""
        return self.state == "denied"

    @property
    def expired(self) -> bool:
        """Whether nobody decided in time."""
        return self.state == "expired"

    @staticmethod
    def of(told: Mapping[str, Any]) -> Approval:
        """The approval in an answer of the coordinator."""
        decisions = told.get("decisions") or ()
        wanted = told["state"] != "denied"
        said = [one for one in decisions if one["allow"] is wanted]
        reasons = [str(one["reason"]) for one in said if one["reason"]]
        why = "; ".join(reasons) or ("" if told["state"] in ("approved", "denied") else str(told.get("why", "")))
        return Approval(str(told["state"]), str(told["id"]), tuple(str(one["who"]) for one in said), why)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The record of a question, from before it is asked."""

    input: str
    """Digest of what is asked."""
    until: float
    """Unix seconds."""


class Approving:
    """The part of `Task` that asks for approvals."""

    _run: Run

    def approve(
        self,
        title: str,
        *,
        risk: str = "",
        role: str = "",
        count: int = 1,
        expires: float = EXPIRES,
        details: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, Approval]:
        """Have persons approve something before it is done; the result is true only if they did.

        Not the caller is asked but the mesh's approvers (`mesh approvals`); nobody who had a part in the task can be
        one. The wait holds no slot, may leave memory, and survives replicas and coordinators; the decision is recorded.
        One who denies ends it. A question is the same on every attempt: what differs from one to the next does not
        belong into it.

        Args:
            title: What is to be done, for people; up to 500 characters.
            risk: `low`, `medium`, `high` or `critical`.
            role: Who has to approve; empty for any approver.
            count: How many different persons.
            expires: Seconds after which it counts as refused (`expired`), at most 30 days.
            details: JSON values for people, up to 16 KB.

        Raises:
            StepChanged: an earlier attempt asked something else here.
            InvalidParams: the coordinator does not take one of the values.
        """
        if not title.strip() or len(title) > MAX_TITLE:
            raise UsageError(f"title of an approval must be a text of 1 to {MAX_TITLE} characters, not {title!r:.80}")
        try:
            shown = json.loads(json.dumps(dict(details or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UsageError(f"details of approval {title!r:.80} must be JSON values: {error}") from None
        asked = {"title": title, "risk": risk, "needs": [[role, count]], "details": shown}
        # Keys are taken now, not when it is awaited: they must not depend on what runs first, or at all.
        journal = self._run.journal
        keys = (journal.own_key(records.APPROVAL_KEY), journal.own_key(records.APPROVING_KEY))
        return self._approve(*keys, asked=asked, expires=float(expires))

    async def _approve(self, key: str, asking: str, *, asked: Mapping[str, Any], expires: float) -> Approval:
        run = self._run
        digest = sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        stored = await run.journal.read(key)
        if stored is not None:
            return _recorded(run, stored.data, digest)
        before = await run.journal.read(asking)
        if before is None:
            note = _Asked(digest, time.time() + expires)
            await run.journal.write(asking, bytes(msgpack.packb(asdict(note))))
        else:
            note = _Asked(**msgpack.unpackb(before.data))
            _same(run, key, note.input, digest)
        named = key if len(key) <= MAX_KEY else subjects.step_token(key)
        body = {**asked, "task": run.task_id, "key": named, "replica": run.replica}
        told = await self._settled(key, note, body)
        made = Approval.of(told)
        record = StepRecord(key, digest, bytes(msgpack.packb(asdict(made))))
        _, winner = await run.journal.write(key, record.encode())
        made = _recorded(run, winner, digest)
        await run.status(State.WORKING, a2a.parts_of(_words(made)))
        return made

    async def _settled(self, key: str, note: _Asked, body: Mapping[str, Any]) -> dict[str, Any]:
        """Ask until it is settled; what the coordinator says then."""
        run = self._run

        async def ask() -> dict[str, Any]:
            return await request(run, {**body, "expires": max(0.001, note.until - time.time())})

        async with run.slot.waiting():
            with run.waits.open("approval", key=key, until=note.until) as wait:
                with run.waits.kept():  # until the coordinator knows of it, nobody else could wake the task
                    told = await ask()
                if told["state"] == PENDING:
                    wait.targets, wait.until = (told["id"],), told["expires"] / 1000
                    await _say(run, told)
                    told = await settled(run, told, ask)
                return told


async def _say(run: Run, told: Mapping[str, Any]) -> None:
    """Tell the caller, once, what the task waits for. It is not asked itself."""
    key = f"{records.APPROVING_KEY}-{told['id']}"
    if await run.journal.read(key) is not None:
        return
    needs = " and ".join(f"{count} of {role or 'the approvers'}" for role, count in told["needs"])
    text = f"waits for an approval by {needs}: {told['title']}"
    shown = {name: told[name] for name in ("id", "title", "risk", "needs", "expires")}
    await run.status(State.WORKING, a2a.parts_of(text), metadata={METADATA: shown})
    await run.journal.write(key, b"")


async def settled(run: Run, told: dict[str, Any], ask: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """Wait until an approval that is pending is settled; what `ask` says then. Withdrawn if nobody waits any more.

    Args:
        run: The task. Around this, a wait of kind `approval` with the id as its target is open.
        told: What the coordinator said of it.
        ask: Repeats the request that made it.
    """
    id_ = str(told["id"])
    event = run.decided.setdefault(id_, asyncio.Event())
    try:
        while told["state"] == PENDING:
            left = told["expires"] / 1000 - time.time()
            pause = min(AGAIN * (1.0 + random.random()), max(0.2, left + 0.05))
            try:
                async with asyncio.timeout(pause):
                    await event.wait()
            except TimeoutError:
                log.debug("approval %s is asked for again", id_)
            event.clear()
            told = await ask()
        return told
    except asyncio.CancelledError:
        if run.stop is None:  # nobody waits for it any more, and the task goes on
            withdraw(run, id_)
        raise
    finally:
        run.decided.pop(id_, None)


async def awaited(run: Run, id_: str, *, key: str = records.APPROVAL_KEY) -> str:
    """The state of an approval that a sidecar asked for on behalf of a task, once it is settled. Holds no slot.

    May leave memory: then the task is run again, and what it does to get here has to be the same. What comes of it is
    not recorded here: whoever asked decides again.

    Raises:
        InvalidParams: there is no such approval of this agent.
    """

    async def ask() -> dict[str, Any]:
        return await request(run, {"id": id_}, operation="approval")

    told = await ask()
    if told["state"] != PENDING:
        return str(told["state"])
    async with run.slot.waiting():
        with run.waits.open("approval", (told["id"],), key=key, until=told["expires"] / 1000):
            await _say(run, told)
            return str((await settled(run, told, ask))["state"])


async def request(run: Run, body: Mapping[str, Any], *, operation: str = "approval-request") -> dict[str, Any]:
    """How an approval stands, as the coordinator says; asks again as long as none answers."""
    attempt = 0
    while True:
        try:
            return await coordinator.call(run.mesh.broker, operation, body, caller=run.agent.name, timeout=ASK)
        except (Unavailable, BrokerError, InternalError) as error:
            if not attempt:
                log.warning("task %s waits for an approval: %s; it is tried on", run.task_id, error)
            await asyncio.sleep(PAUSES[min(attempt, len(PAUSES) - 1)])
            attempt += 1


def withdraw(run: Run, id_: str) -> None:
    """Take a request back. What gets lost is withdrawn when the task ends."""
    data = json.dumps({"id": id_, "reason": "the task goes on without it"}).encode()
    try:
        run.mesh.broker.send(subjects.coord("approval-withdraw", run.agent.name), data)
    except BrokerError as error:
        log.debug("approval %s is not withdrawn: %s", id_, error)


class Decisions:
    """Hears that approvals are settled."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def on_control(self, control: Control, _: Delivered) -> None:
        """The coordinator says that there is a decision: whoever waits for it asks."""
        try:
            told = msgpack.unpackb(control.data)
            run, id_ = self._owner.live.get(told["task"]), str(told["id"])
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            log.warning("control message %s of the coordinator is not understood: %r", control.op, error)
            return
        if run is not None:  # it may come before the answer to the request
            run.decided.setdefault(id_, asyncio.Event()).set()


def _same(run: Run, key: str, before: str, now: str) -> None:
    if before != now:
        raise StepChanged(
            f"approval {key!r} of task {run.task_id} was asked for with another question: what differs from attempt to "
            "attempt does not belong into it; keep it in a step"
        )


def _recorded(run: Run, data: bytes, digest: str) -> Approval:
    """What is in the journal."""
    record = StepRecord.decode(data)
    _same(run, record.key, record.input, digest)
    told = msgpack.unpackb(record.value)
    return Approval(told["state"], told["id"], tuple(told["by"]), told["reason"])


def _words(approval: Approval) -> str:
    """For the caller."""
    if approval.expired:
        return "nobody approved it in time"
    by = f" by {', '.join(approval.by)}" if approval.by else ""
    return f"{approval.state}{by}{f': {approval.reason}' if approval.reason else ''}"


__all__ = ["Approval", "Approving", "Decisions", "awaited", "request", "settled", "withdraw"]
