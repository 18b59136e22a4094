"""Parts of messages and artifacts as plain values, so that handlers need no protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from weft_protocols.states import State


@dataclass(frozen=True, slots=True)
class Text:
    """A text part."""

    text: str
    media_type: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Data:
    """A structured part: anything JSON can hold."""

    data: Any
    media_type: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class File:
    """A file part: its bytes, or the URL where they are."""

    name: str = ""
    content: bytes | None = None
    url: str = ""
    media_type: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


Part = Text | Data | File
"""One part of a message or an artifact."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a conversation."""

    id: str
    role: str
    """`user` or `agent`."""
    parts: tuple[Part, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All text parts, joined by line breaks."""
        return text_of(self.parts)

    @property
    def data(self) -> Any:
        """The first data part, or None."""
        return data_of(self.parts)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A result of a task."""

    id: str
    name: str
    parts: tuple[Part, ...]
    description: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All text parts, joined; streamed chunks are joined without a separator."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def data(self) -> Any:
        """The first data part, or None."""
        return data_of(self.parts)


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task as its caller sees it."""

    id: str
    agent: str
    context_id: str
    state: State
    message: Message | None = None
    """Message of the last status: a question, an explanation, or the whole answer of a message-only skill."""
    artifacts: tuple[Artifact, ...] = ()
    history: tuple[Message, ...] = ()
    updated: str = ""
    """RFC 3339 time of the last status."""
    events: int = 0
    """Number of the last event this view includes."""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Text of the artifacts, or of the message where there are none."""
        joined = "\n".join(text for a in self.artifacts if (text := a.text))
        return joined or (self.message.text if self.message else "")

    @property
    def data(self) -> Any:
        """The first data part among the artifacts, then in the message; None if there is none."""
        for artifact in self.artifacts:
            if (found := artifact.data) is not None:
                return found
        return self.message.data if self.message else None


def text_of(parts: Sequence[Part]) -> str:
    """All text parts, joined by line breaks."""
    return "\n".join(part.text for part in parts if isinstance(part, Text))


def data_of(parts: Sequence[Part]) -> Any:
    """The first data part, or None."""
    return next((part.data for part in parts if isinstance(part, Data)), None)
