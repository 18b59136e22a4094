"""A handler's signature as its input schema."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from typing import Any

from weft_protocols.errors import FieldViolation, InvalidConfig, InvalidParams
from weft_protocols.parts import Part, data_of, text_of


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    annotation: Any
    default: Any


class Signature:
    """How a message becomes the arguments of a handler."""

    def __init__(
        self, *, task: str | None, fields: tuple[_Field, ...], is_async: bool, returns: Any, where: str = "the handler"
    ) -> None:
        self._where = where
        self.task = task
        """Name of the parameter that gets the task."""
        self.is_async = is_async
        self.returns = returns
        self._fields = fields
        only = fields[0] if len(fields) == 1 else None
        self._text = only.name if only is not None and only.annotation in (str, inspect.Parameter.empty) else None
        self._whole = only.name if only is not None and self._text is None and _is_model(only.annotation) else None

    @staticmethod
    def of(handler: Callable[..., Any], *, where: str) -> Signature:
        """Read a handler's signature; InvalidConfig if it cannot be called with named arguments."""
        if inspect.isasyncgenfunction(handler) or inspect.isgeneratorfunction(handler):
            raise InvalidConfig(f"{where} is a generator; stream what it yields with `task.artifact(name, chunks)`")
        try:
            hints = typing.get_type_hints(handler)
        except (NameError, TypeError) as error:
            raise InvalidConfig(f"{where}: an annotation cannot be resolved: {error}") from error
        task: str | None = None
        fields = []
        for parameter in inspect.signature(handler).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise InvalidConfig(f"{where}: parameter {parameter.name!r} cannot be passed by name")
            annotation = hints.get(parameter.name, parameter.empty)
            is_task = getattr(annotation, "__name__", "") == "Task" and annotation.__module__ == "weft.host.task"
            if is_task or (annotation is parameter.empty and parameter.name == "task"):
                task = parameter.name
                continue
            fields.append(_Field(parameter.name, annotation, parameter.default))
        return Signature(
            task=task,
            fields=tuple(fields),
            is_async=inspect.iscoroutinefunction(handler),
            returns=hints.get("return", inspect.Parameter.empty),
            where=where,
        )

    @cached_property
    def _adapter(self) -> Any:
        # pydantic costs 80 ms and 8 MB: only agents with typed input pay for it.
        import pydantic

        if self._whole is not None:
            return pydantic.TypeAdapter(self._fields[0].annotation)
        fields: dict[str, Any] = {
            f.name: (
                Any if f.annotation is inspect.Parameter.empty else f.annotation,
                ... if f.default is inspect.Parameter.empty else f.default,
            )
            for f in self._fields
        }
        config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True)
        return pydantic.TypeAdapter(pydantic.create_model("Input", __config__=config, **fields))

    def schema(self) -> dict[str, Any]:
        """JSON schema of the input; text where the handler takes text, {} where it takes anything.

        Raises:
            InvalidConfig: a parameter is of a type that JSON has no form for.
        """
        if not self._fields:
            return {}
        if self._text is not None:
            return {"type": "string", "title": self._text}
        import pydantic

        try:
            schema: dict[str, Any] = self._adapter.json_schema()
        except pydantic.errors.PydanticUserError as error:
            raise InvalidConfig(f"{self._where}: a parameter has no form in JSON: {error}") from error
        return schema

    def bind(self, parts: tuple[Part, ...]) -> dict[str, Any]:
        """Arguments for a message's parts, without the task.

        Raises:
            InvalidParams: the input does not fit; `violations` names each field.
        """
        if not self._fields:
            return {}
        if self._text is not None:
            text = text_of(parts)
            if not text and self._fields[0].default is not inspect.Parameter.empty:
                return {}
            if not text:
                raise InvalidParams(
                    f"{self._text}: the message has no text part",
                    violations=(FieldViolation(self._text, "the message has no text part"),),
                )
            return {self._text: text}
        return self._validated(_structured(parts))

    def _validated(self, value: Any) -> dict[str, Any]:
        import pydantic

        if value is None:
            if any(f.default is inspect.Parameter.empty for f in self._fields) or self._whole is not None:
                names = ", ".join(f.name for f in self._fields)
                raise InvalidParams(
                    f"the message has no data part; send one with the fields: {names}",
                    violations=tuple(FieldViolation(f.name, "missing") for f in self._fields),
                )
            value = {}
        try:
            made = self._adapter.validate_python(value)
        except pydantic.ValidationError as error:
            violations = tuple(
                FieldViolation(".".join(str(p) for p in item["loc"]) or "input", item["msg"]) for item in error.errors()
            )
            text = "; ".join(f"{v.field}: {v.description}" for v in violations)
            raise InvalidParams(f"wrong input: {text}", violations=violations) from error
        if self._whole is not None:
            return {self._whole: made}
        return {f.name: getattr(made, f.name) for f in self._fields}


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and (
        hasattr(annotation, "model_validate") or is_dataclass(annotation) or hasattr(annotation, "__required_keys__")
    )


def _structured(parts: tuple[Part, ...]) -> Any:
    """The data part, or a text part that is a JSON object."""
    data = data_of(parts)
    if data is not None:
        return data
    text = text_of(parts).strip()
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError:
            return None
    return None
