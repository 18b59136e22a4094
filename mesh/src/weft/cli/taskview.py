"""Tasks as commands show them: a record for programs, text for people."""

from __future__ import annotations

import base64
import json
from typing import Any

from weft_protocols.parts import Artifact, Data, File, Message, Part, TaskView, Text


def record(view: TaskView, *, contents: bool = True) -> dict[str, Any]:
    """A task as JSON values. Without `contents` the bytes of files are left out."""
    made: dict[str, Any] = {
        "id": view.id,
        "agent": view.agent,
        "context_id": view.context_id,
        "state": view.state.label,
        "updated": view.updated,
        "artifacts": [artifact_record(artifact, contents=contents) for artifact in view.artifacts],
    }
    if view.message is not None:
        made["message"] = message_record(view.message, contents=contents)
    if view.history:
        made["history"] = [message_record(message, contents=contents) for message in view.history]
    if view.metadata:
        made["metadata"] = view.metadata
    return made


def artifact_record(artifact: Artifact, *, contents: bool = True) -> dict[str, Any]:
    """An artifact as JSON values."""
    made: dict[str, Any] = {"id": artifact.id, "name": artifact.name}
    if artifact.description:
        made["description"] = artifact.description
    return {**made, "parts": [part_record(part, contents=contents) for part in artifact.parts]}


def message_record(message: Message, *, contents: bool = True) -> dict[str, Any]:
    """A message as JSON values."""
    parts = [part_record(part, contents=contents) for part in message.parts]
    return {"id": message.id, "role": message.role, "parts": parts}


def part_record(part: Part, *, contents: bool = True) -> dict[str, Any]:
    """A part as JSON values: one of `text`, `data`, `url`, or `bytes` with base64 in `content`."""
    made: dict[str, Any]
    if isinstance(part, Text):
        made = {"text": part.text}
    elif isinstance(part, Data):
        made = {"data": part.data}
    elif part.content is None:
        made = {"name": part.name, "url": part.url}
    else:
        made = {"name": part.name, "bytes": len(part.content)}
        if contents:
            made["content"] = base64.b64encode(part.content).decode()
    if part.media_type:
        made["media_type"] = part.media_type
    return made


def part_text(part: Part) -> str:
    """A part as people read it; the bytes of a file only by their number."""
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Data):
        return json.dumps(part.data, ensure_ascii=False, indent=2)
    if part.content is None:
        return part.url
    return f"[{file_label(part)}]"


def file_label(part: File) -> str:
    """A file's name, type and size."""
    size = len(part.content or b"")
    shown = f"{size} bytes" if size < 10_000 else f"{size / 1000:.0f} kB"
    return ", ".join(text for text in (part.name or "file", part.media_type, shown) if text)


def result_text(view: TaskView) -> str:
    """What a task produced, as text: its artifacts, or its message where there are none. Files are left out."""
    lists = [artifact.parts for artifact in view.artifacts]
    if not lists and view.message is not None:
        lists = [view.message.parts]
    return "\n".join(text for parts in lists for text in _joined(parts))


def files_of(view: TaskView) -> list[File]:
    """The files among a task's results that came with their bytes."""
    parts = [part for artifact in view.artifacts for part in artifact.parts]
    return [part for part in parts if isinstance(part, File) and part.content is not None]


def explanation(view: TaskView) -> str:
    """The text of a task's last message, on one line."""
    return " ".join(view.message.text.split()) if view.message is not None else ""


def _joined(parts: tuple[Part, ...]) -> list[str]:
    """Parts as text; neighbouring text parts are chunks of one text."""
    texts: list[str] = []
    chunk = False
    for part in parts:
        if isinstance(part, File) and part.content is not None:
            continue
        if chunk and isinstance(part, Text):
            texts[-1] += part.text
        else:
            texts.append(part_text(part))
        chunk = isinstance(part, Text)
    return texts
