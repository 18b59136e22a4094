"""Arguments against the schema of the tool that was approved: nothing is fetched, nothing takes for ever.

A schema is the server's and arguments are the agent's, and either may be made to cost much. Patterns are matched by
RE2, which takes time in proportion to the text, and every step of a check counts against a budget.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final

import re2
from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend, validator_for
from referencing import Registry
from referencing.exceptions import NoSuchResource, Unresolvable

from weft.sidecar.pipeline import Call, Outcome, Passing, Refusal
from weft.sidecar.weight import aside, heavy
from weft_protocols.mcp import INVALID_PARAMS

KEPT: Final = 1024
"""Schemas that are kept ready."""
MOST: Final = 5
"""Mistakes that are told."""
LONGEST: Final = 64 * 1024
"""Characters of a text that is matched with a pattern."""
AT_ONCE: Final = 400
"""Steps of a check that are taken without letting others have a turn; it goes on in a thread."""
MOST_AT_ONCE: Final = 1_000_000
"""What a single step may cost, in steps: it cannot be interrupted."""
SECONDS: Final = 1.0
"""Of processor time that a check may take there; a call that needs more is refused."""
PATTERN_MEMORY: Final = 1024 * 1024
_SPEND: ContextVar[Callable[[int], None]] = ContextVar("weft_schema_steps")


class _Spent(Exception):
    """There are no steps left."""


class Schemas:
    """Validators of schemas, kept ready."""

    def __init__(self) -> None:
        self._ready: OrderedDict[str, Validator | str] = OrderedDict()

    async def validator(self, digest: str, schema: Mapping[str, Any]) -> Validator | str:
        """The validator of a schema, or why there can be none."""
        ready = self._ready.get(digest)
        if ready is None:
            ready = self._ready[digest] = await aside(_made, schema, large=heavy(schema))
            if len(self._ready) > KEPT:
                self._ready.popitem(last=False)
        else:
            self._ready.move_to_end(digest)
        return ready

    async def fits(self, digest: str, schema: Mapping[str, Any], value: Any) -> bool | None:
        """Whether a value has the form of a schema; None if that cannot be told."""
        validator = await self.validator(digest, schema)
        if isinstance(validator, str):
            return None
        return await aside(_fits, validator, value, large=True)


class Arguments(Passing):
    """Arguments of tools have the form that the tool says."""

    def __init__(self) -> None:
        self._schemas = Schemas()

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        """Refuse what has not, saying where."""
        schema = call.definition.get("inputSchema") if call.definition is not None else None
        if call.method != "tools/call" or not isinstance(schema, Mapping):
            return call
        validator = await self._schemas.validator(call.definition_digest, schema)
        if isinstance(validator, str):
            return Refusal(INVALID_PARAMS, f"the schema of {call.name} cannot be used: {validator}", in_band=True)
        large = heavy(call.arguments)
        found = None if large else _mistakes(validator, call.arguments, _steps)
        if found is None:
            found = await aside(_mistakes, validator, call.arguments, _time, large=True)
        if found is None:
            found = ["to check them takes too long; the schema is too involved, or they are too many"]
        if not found:
            return call
        return Refusal(
            INVALID_PARAMS, f"wrong arguments for {call.name}: {'; '.join(found)}", {"mistakes": found}, in_band=True
        )


def _steps() -> Callable[[int], None]:
    """A budget of `AT_ONCE` steps: raises when they are spent."""
    left = AT_ONCE

    def spend(cost: int) -> None:
        nonlocal left
        left -= cost
        if left < 0:
            raise _Spent

    return spend


def _time() -> Callable[[int], None]:
    """A budget of `SECONDS` of this thread's time."""
    end = time.thread_time() + SECONDS

    def spend(cost: int) -> None:
        if cost > MOST_AT_ONCE or time.thread_time() > end:
            raise _Spent

    return spend


def _mistakes(
    validator: Validator, arguments: Mapping[str, Any], budget: Callable[[], Callable[[int], None]]
) -> list[str] | None:
    """What is wrong with arguments; None if the budget did not suffice to find out."""
    _SPEND.set(budget())
    try:
        return [_told(error) for error, _ in zip(validator.iter_errors(arguments), range(MOST), strict=False)]
    except _Spent:
        return None
    except Unresolvable as error:
        return [f"the schema refers to {error.ref}, which is not in it; nothing is fetched"]
    except RecursionError:
        return ["they nest too deep"]


def _fits(validator: Validator, value: Any) -> bool | None:
    _SPEND.set(_time())
    try:
        return next(validator.iter_errors(value), None) is None
    except (_Spent, Unresolvable, RecursionError):
        return None


def _made(schema: Mapping[str, Any]) -> Validator | str:
    dialect = validator_for(dict(schema), default=Draft202012Validator)
    try:
        dialect.check_schema(dict(schema))
    except SchemaError as error:
        return f"it is no JSON schema ({error.message[:120]})"
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is no JSON schema ({type(error).__name__})"
    own = {"pattern": _pattern, "patternProperties": _pattern_properties, "additionalProperties": _additional}
    checks = {**dialect.VALIDATORS, **{key: check for key, check in own.items() if key in dialect.VALIDATORS}}
    if _has(schema, "patternProperties"):
        checks.pop("unevaluatedProperties", None)  # jsonschema would match the patterns by itself
    counted = {key: _counted(key, check) for key, check in checks.items()}
    careful: Any = extend(dialect, {**dict.fromkeys(dialect.VALIDATORS, _nothing_wrong), **counted})  # type: ignore[no-untyped-call]
    registry: Registry[Any] = Registry(retrieve=_nothing)  # type: ignore[call-arg]
    made: Validator = careful(dict(schema), registry=registry)
    return made


def _nothing(uri: str) -> Any:
    raise NoSuchResource(uri)


def _nothing_wrong(*_: Any) -> None:
    return None


def _counted(keyword: str, check: Callable[..., Any]) -> Callable[..., Any]:
    """A keyword's check that takes steps of the budget, more for what it has to go through."""

    def run(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        cost = (8 if keyword in ("$ref", "$dynamicRef") else 1) + (_length(value) + _length(instance)) // 8
        if (
            keyword == "uniqueItems"
            and isinstance(instance, list)
            and any(isinstance(i, dict | list) for i in instance)
        ):
            cost += len(instance) ** 2 // 8  # each with each
        _SPEND.get()(cost)
        return check(validator, value, instance, schema)

    return run


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | dict) else len(value) // 64 if isinstance(value, str) else 0


def _has(schema: Any, keyword: str) -> bool:
    left = [schema]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            if keyword in one:
                return True
            left += one.values()
        elif isinstance(one, list):
            left += one
    return False


# Patterns ------------------------------------------------------------------------------------------


@lru_cache(KEPT)
def _compiled(pattern: str) -> Any:
    """A pattern, or None where RE2 does not have what it uses: then it is the server's own to check."""
    options = re2.Options()
    options.log_errors = False
    options.max_mem = PATTERN_MEMORY
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError):
        return None


def _matches(pattern: str, text: str) -> bool | None:
    """Whether a text has a match; None if that is not checked here."""
    compiled = _compiled(pattern) if len(text) <= LONGEST else None
    if compiled is None:
        return None
    return compiled.search(text.encode(errors="replace").decode()) is not None


def _pattern(_: Validator, pattern: str, instance: Any, __: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and _matches(pattern, instance) is False:
        yield ValidationError(f"{instance[:60]!r} does not match {pattern[:60]!r}")


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], instance: Any, _: Any
) -> Iterator[ValidationError]:
    for pattern, inner in patterns.items() if isinstance(instance, dict) else ():
        for key, value in instance.items():
            if _matches(pattern, key):
                yield from validator.descend(value, inner, path=key, schema_path=pattern)


def _additional(validator: Any, allowed: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """Properties that are neither named nor match a pattern; what may match one that is not checked here passes."""
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    extra = [
        key
        for key in (instance if isinstance(instance, dict) else ())
        if key not in named and all(_matches(pattern, key) is False for pattern in patterns)
    ]
    if isinstance(allowed, dict):
        for key in extra:
            yield from validator.descend(instance[key], allowed, path=key)
    elif not allowed and extra:
        names = ", ".join(repr(key[:60]) for key in sorted(extra)[:MOST])
        yield ValidationError(f"Additional properties are not allowed ({names} unexpected)")


def _told(error: ValidationError) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(".")
    return f"{where}: {error.message[:200]}" if where else error.message[:200]
