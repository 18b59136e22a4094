"""Records replicas write for each other: round trip, and tolerance of other versions' records."""

import contextlib
import dataclasses
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft_protocols.errors import ParseError
from weft_protocols.records import Claim, Control, DeadLetter, PushCursor, PushJob, StepRecord

Record = Claim | StepRecord | DeadLetter | Control | PushJob | PushCursor
KINDS: list[type[Record]] = [Claim, StepRecord, DeadLetter, Control, PushJob, PushCursor]
BY_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "str": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    "int": st.integers(0, 2**63 - 1),
    "bytes": st.binary(max_size=40),
    "bool": st.booleans(),
}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    kind = draw(st.sampled_from(KINDS))
    return kind(**{f.name: draw(BY_TYPE[str(f.type)]) for f in dataclasses.fields(kind)})


@given(records())
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    assert type(record).decode(record.encode()) == record


@given(records(), st.dictionaries(st.text(min_size=1, max_size=8), PLAIN, max_size=3))
def test_keys_of_a_newer_version_are_ignored(record: Record, added: dict[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(record)}
    newer = {**msgpack.unpackb(record.encode()), **{k: v for k, v in added.items() if k not in known}}
    assert type(record).decode(msgpack.packb(newer)) == record


@given(records(), st.data())
def test_keys_of_a_newer_version_take_their_default_where_an_older_one_left_them_out(
    record: Record, data: st.DataObject
) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(record) if f.default is not dataclasses.MISSING}
    left_out = data.draw(st.sets(st.sampled_from(sorted(defaults)))) if defaults else set()
    older = {k: v for k, v in msgpack.unpackb(record.encode()).items() if k not in left_out}
    expected = dataclasses.replace(record, **{name: defaults[name] for name in left_out})
    assert type(record).decode(msgpack.packb(older)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_record_cannot_do_without_is_missed(kind: type[Record]) -> None:
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    with pytest.raises(ParseError, match=needed[0]):
        kind.decode(msgpack.packb({}))


@given(st.binary(max_size=60) | PLAIN.map(lambda value: bytes(msgpack.packb(value))), st.sampled_from(KINDS))
def test_whatever_is_not_a_record_is_a_parse_error(data: bytes, kind: type[Record]) -> None:
    with contextlib.suppress(ParseError):
        assert isinstance(kind.decode(data), kind)
