"""Derived identifiers: the same for everybody, and different for everything that differs."""

import hashlib
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weft_protocols import ids, subjects

NAME = st.text("abcXYZ019_-", min_size=1, max_size=64)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
CREATION = st.tuples(NAME, NAME, TEXT)


@given(CREATION, CREATION)
@example(("ab", "c", "x"), ("a", "bc", "x"))
@example(("a", "b", "c\0"), ("a", "b", "c"))
def test_two_creations_share_a_task_only_if_they_are_the_same(
    one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    assert (ids.task_id(*one) == ids.task_id(*other)) == (one == other)


@given(CREATION)
def test_a_task_id_is_the_formula_of_the_specification(creation: tuple[str, str, str]) -> None:
    names = b"".join(part.encode() + b"\0" for part in creation)
    assert ids.task_id(*creation) == hashlib.sha256(names).hexdigest()[:32]
    assert subjects.check_task_id(ids.task_id(*creation))


def test_a_known_task_id_stays_what_it_is() -> None:
    assert ids.task_id("local", "analyst", "m-1") == "ce1d1a919d22fda401275506133de013"


@given(TEXT, TEXT)
def test_children_and_keys_of_one_step_differ_from_each_other_and_from_other_steps(one: str, other: str) -> None:
    task = "0" * 32
    made = {ids.child_message_id(task, key) for key in (one, other)}
    made |= {ids.idempotency_key(task, key) for key in (one, other)}
    assert len(made) == 2 * len({one, other})


@given(TEXT)
def test_a_slice_is_two_digits_of_the_checksum(context: str) -> None:
    made = ids.slice_of(context)
    assert subjects.SLICE.match(made)
    assert int(made) == zlib.crc32(context.encode()) % 100


def test_slices_spread_conversations_evenly() -> None:
    counts = [0] * ids.SLICES
    for number in range(20_000):
        counts[int(ids.slice_of(f"context-{number}"))] += 1
    assert min(counts) > 140
    assert max(counts) < 260


@pytest.mark.parametrize("data", [b"", b"weft", bytes(range(256))])
def test_a_digest_names_a_blob(data: bytes) -> None:
    assert subjects.parse(subjects.blob("me", ids.digest(data), 0))["sha256"] == hashlib.sha256(data).hexdigest()
