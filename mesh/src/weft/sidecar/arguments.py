"""Arguments against the schema of the tool that was approved: nothing is fetched, nothing takes for ever."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Final

from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend, validator_for
from referencing import Registry
from referencing.exceptions import NoSuchResource, Unresolvable

from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft_protocols.mcp import INVALID_PARAMS

KEPT: Final = 1024
"""Schemas that are kept ready."""
MOST: Final = 5
"""Mistakes that are told."""
LONGEST: Final = 4096
"""Characters of a text that is matched with a pattern."""
_UNBOUNDED: Final = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\d*\})")
_REPEATED_GROUP: Final = re.compile(r"\)(?:[*+]|\{)|\\[1-9]|\(\?P=")


class Schemas:
    """Validators of schemas, kept ready."""

    def __init__(self) -> None:
        self._ready: OrderedDict[str, Validator | str] = OrderedDict()

    def validator(self, digest: str, schema: Mapping[str, Any]) -> Validator | str:
        """The validator of a schema, or why there can be none."""
        ready = self._ready.get(digest)
        if ready is None:
            ready = self._ready[digest] = _made(schema)
            if len(self._ready) > KEPT:
                self._ready.popitem(last=False)
        else:
            self._ready.move_to_end(digest)
        return ready

    def fits(self, digest: str, schema: Mapping[str, Any], value: Any) -> bool | None:
        """Whether a value has the form of a schema; None if that cannot be told."""
        validator = self.validator(digest, schema)
        if isinstance(validator, str):
            return None
        try:
            return next(validator.iter_errors(value), None) is None
        except (Unresolvable, RecursionError):
            return None


class Arguments(Passing):
    """Arguments of tools have the form that the tool says."""

    def __init__(self) -> None:
        self._schemas = Schemas()

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse what has not, saying where."""
        schema = call.definition.get("inputSchema") if call.definition is not None else None
        if call.method != "tools/call" or not isinstance(schema, Mapping):
            return call
        validator = self._schemas.validator(call.definition_digest, schema)
        if isinstance(validator, str):
            return Refusal(INVALID_PARAMS, f"the schema of {call.name} cannot be used: {validator}", in_band=True)
        try:
            found = [_told(error) for error, _ in zip(validator.iter_errors(call.arguments), range(MOST), strict=False)]
        except Unresolvable as error:
            found = [f"the schema refers to {error.ref}, which is not in it; nothing is fetched"]
        except RecursionError:
            found = ["they nest too deep"]
        if not found:
            return call
        return Refusal(
            INVALID_PARAMS, f"wrong arguments for {call.name}: {'; '.join(found)}", {"mistakes": found}, in_band=True
        )


def _made(schema: Mapping[str, Any]) -> Validator | str:
    dialect = validator_for(dict(schema), default=Draft202012Validator)
    try:
        dialect.check_schema(dict(schema))
    except SchemaError as error:
        return f"it is no JSON schema ({error.message[:120]})"
    except (re.error, RecursionError) as error:
        return f"it is no JSON schema ({type(error).__name__})"
    careful: Any = extend(dialect, {"pattern": _pattern})  # type: ignore[no-untyped-call]
    registry: Registry[Any] = Registry(retrieve=_nothing)  # type: ignore[call-arg]
    made: Validator = careful(dict(schema), registry=registry)
    return made


def _nothing(uri: str) -> Any:
    raise NoSuchResource(uri)


def _pattern(_: Validator, pattern: str, instance: Any, __: Any) -> Iterator[ValidationError]:
    """Like jsonschema's, but for patterns that could take for ever: those are the server's own to check."""
    if not isinstance(instance, str) or len(instance) > LONGEST:
        return
    if _REPEATED_GROUP.search(pattern) or len(_UNBOUNDED.findall(pattern)) > 3:
        return
    if not re.search(pattern, instance):
        yield ValidationError(f"{instance[:60]!r} does not match {pattern[:60]!r}")


def _told(error: ValidationError) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(".")
    return f"{where}: {error.message[:200]}" if where else error.message[:200]
