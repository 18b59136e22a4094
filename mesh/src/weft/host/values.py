"""Step results as bytes and back: plain values as msgpack, models and dataclasses by their annotation."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import msgpack

from weft_protocols.errors import UsageError


def encode(value: Any, *, where: str) -> bytes:
    """Bytes of a step's result; UsageError if it cannot be stored."""
    try:
        return bytes(msgpack.packb(value, default=_plain, datetime=True))
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{where} returned {type(value).__name__}, which cannot be stored: {error}; return JSON values, bytes, "
            "dataclasses or pydantic models"
        ) from error


def decode(data: bytes, annotation: Any = inspect.Parameter.empty, *, where: str = "the value") -> Any:
    """The value, as the step's return annotation says where it names a model or dataclass; UsageError if it is none."""
    value = msgpack.unpackb(data, timestamp=3, strict_map_key=False)
    if annotation in (inspect.Parameter.empty, None, Any) or value is None:
        return value
    if isinstance(annotation, type) and annotation in (str, int, float, bool, bytes, list, dict):
        return value
    import pydantic

    try:
        return pydantic.TypeAdapter(annotation).validate_python(value)
    except (pydantic.ValidationError, pydantic.errors.PydanticUserError) as error:
        raise UsageError(f"{where} is no {annotation}, as its return annotation says: {error}") from error


def returns(fn: Callable[..., Any]) -> Any:
    """A function's return annotation; empty where there is none, or its names are known to type checkers only."""
    given = getattr(fn, "__annotations__", {}).get("return", inspect.Parameter.empty)
    if not isinstance(given, str):
        return given
    names = getattr(inspect.unwrap(fn), "__globals__", {})
    try:
        return typing.get_type_hints(SimpleNamespace(__annotations__={"return": given}), names)["return"]
    except (NameError, AttributeError, SyntaxError, TypeError):
        return inspect.Parameter.empty


def plain(value: Any) -> Any:
    """`value` with every model, dataclass, tuple and set in it as JSON has them; other things stay as they are."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    try:
        made = _plain(value)
    except TypeError:
        return value
    return plain(made)


def digest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Digest of a step's input, to notice that a replay called it with another."""
    data = msgpack.packb([args, sorted(kwargs.items())], default=_anything, datetime=True)
    return sha256(data).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        # The order of a set differs from process to process; a replay must see the same.
        return sorted(value, key=repr)
    raise TypeError(f"{type(value).__name__} is not a plain value")


def _anything(value: Any) -> Any:
    """What cannot be stored still has a name: two objects of one type count as the same input."""
    try:
        return _plain(value)
    except TypeError:
        return f"<{type(value).__module__}.{type(value).__qualname__}>"
