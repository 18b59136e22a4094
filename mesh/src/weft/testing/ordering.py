"""Whether an agent worked on each context's tasks in order and one at a time, as the log says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from a2a.types import a2a_pb2 as pb

from weft.testing.invariants import Entry, claim_of
from weft_protocols import a2a, subjects
from weft_protocols.states import END_LABELS


@dataclass(slots=True)
class Span:
    """A task in the log, by stream sequences."""

    task: str
    context: str
    accepted: int
    begun: int = 0
    """Its first claim on its message, before its end; 0 if there is none. A cancel in the queue begins nothing."""
    ended: int = 0
    """Its terminal event; 0 if there is none."""


def spans(entries: Iterable[Entry], agent: str) -> list[Span]:
    """The tasks of an agent, in the order of their acceptance."""
    found: dict[str, Span] = {}
    for entry in entries:
        parsed = subjects.parse(entry.subject)
        if "agent" not in parsed.tokens or parsed["agent"] != agent:
            continue
        task = parsed["task"]
        if parsed.kind == "task":
            request = a2a.decode(pb.SendMessageRequest, entry.data, entry.headers.get("content-type", ""))
            found.setdefault(task, Span(task, request.message.context_id or task, entry.seq))
        elif task in found and parsed.kind == "claim" and not found[task].ended and claim_of(entry).message != 0:
            found[task].begun = found[task].begun or entry.seq
        elif task in found and parsed.kind == "event" and entry.headers.get("weft-state") in END_LABELS:
            found[task].ended = found[task].ended or entry.seq
    return list(found.values())


def out_of_order(entries: Iterable[Entry], agent: str) -> list[str]:
    """Where a task of a context was begun before the one accepted before it had ended; empty where none was."""
    contexts: dict[str, list[Span]] = defaultdict(list)
    for span in spans(entries, agent):
        contexts[span.context].append(span)
    broken = []
    for context, tasks in contexts.items():
        for n, after in enumerate(tasks):
            # Not only the one just before: that may have been cancelled in the queue.
            before = next((one for one in tasks[:n] if after.begun and not 0 < one.ended < after.begun), None)
            if before is not None:
                broken.append(
                    f"context {context}: task {after.task} was begun at {after.begun}, and {before.task}, which was "
                    f"accepted before it, ended at {before.ended}"
                )
    return broken
