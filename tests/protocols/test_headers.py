"""Header blocks: nothing can be injected, and the two readers agree on every block, also a hostile one."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weft_protocols import headers as h
from weft_protocols.errors import InvalidRequest

NAMES = st.text("ABCabcXYZ019-", min_size=1, max_size=20)
VALUES = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=40)
ANYTHING = st.text(st.characters(exclude_categories=[]), max_size=12)
OWN = [value for name, value in vars(h).items() if name.isupper() and isinstance(value, str) and "-" in value]


def lines_of(block: bytes) -> list[bytes]:
    """The lines a reader sees: the first, the last empty one and its end taken off."""
    assert block.startswith(b"NATS/1.0\r\n")
    assert block.endswith(b"\r\n\r\n")
    return block[len(b"NATS/1.0\r\n") : -2].split(b"\r\n")[:-1]


@given(st.lists(st.tuples(NAMES, VALUES), max_size=6))
def test_every_field_becomes_one_line_and_is_read_back(pairs: list[tuple[str, str]]) -> None:
    block = h.block(h.fields(pairs))
    assert len(lines_of(block)) == len(pairs)
    expected: dict[str, str] = {}
    for name, value in pairs:
        expected.setdefault(name.lower(), value.strip(" \t\v\f"))
    assert h.parse(block) == expected


@given(ANYTHING, ANYTHING)
@example("X", "1\r\nA2A-Error: FORGED")
@example("X\r\nA2A-Error", "FORGED")
@example("A2A-Error: X\r\nB", "1")
@example("X", "\ud800")
def test_no_name_or_value_can_add_a_header(name: str, value: str) -> None:
    try:
        block = h.block(h.fields({"Before": "1", name: value, "After": "2"}))
    except InvalidRequest:
        return
    assert len(lines_of(block)) == len({"Before", name, "After"})
    assert set(h.parse(block)) == {"before", name.lower(), "after"}


@given(st.binary(max_size=200), NAMES)
@example(b"NATS/1.0\r\nX: 1\r\nx: 2\r\n\r\n", "X")
@example(b"NATS/1.0\r\nX : 1\r\nX: 2\r\n\r\n", "X")
@example(b"NATS/1.0\r\nX:1", "X")
@example(b"X: 1\r\nX: 2\r\n", "X")
@example("NATS/1.0\r\n\u212a: 1\r\nk: 2\r\n\r\n".encode(), "K")
@example("NATS/1.0\r\nX: \u00a01\u00a0\r\n\r\n".encode(), "X")
def test_the_quick_reader_and_the_parser_agree_on_any_bytes(block: bytes, name: str) -> None:
    quick = h.get(block, name.encode())
    assert (None if quick is None else quick.decode("utf-8", "replace")) == h.parse(block).get(name.lower())


@given(
    st.lists(
        st.sampled_from(
            [b"Weft-Event: 3", b"weft-event:4", b"X: Weft-Event: 5", b"Weft-Event : 6", b":", b"", b"\xff:\xff"]
        ),
        max_size=6,
    )
)
def test_the_readers_agree_on_blocks_of_tricky_lines(lines: list[bytes]) -> None:
    block = b"\r\n".join((b"NATS/1.0", *lines, b"", b""))
    parsed = h.parse(block)
    for name in (b"Weft-Event", b"X"):
        quick = h.get(block, name)
        assert (None if quick is None else quick.decode()) == parsed.get(name.decode().lower())


@given(NAMES, VALUES, VALUES)
def test_of_a_repeated_name_the_first_counts(name: str, first: str, second: str) -> None:
    block = h.block(h.fields([(name.upper(), first), (name.lower(), second)]))
    assert h.parse(block) == {name.lower(): first.strip(" \t\v\f")}


@pytest.mark.parametrize("name", sorted(OWN))
def test_our_own_names_can_be_written_and_are_found_in_any_case(name: str) -> None:
    assert h.get(h.block(h.fields({name.swapcase(): "1"})), name.encode()) == b"1"


def test_a_block_over_the_limit_is_refused() -> None:
    fits = h.MAX_BLOCK - len(h.block(h.fields({"X": ""})))
    assert len(h.block(h.fields({"X": "v" * fits}))) == h.MAX_BLOCK
    with pytest.raises(InvalidRequest, match="4097 bytes"):
        h.block(h.fields({"X": "v" * (fits + 1)}))


@pytest.mark.parametrize("block", [None, b"", b"NATS/1.0\r\n\r\n"])
def test_no_headers_is_not_an_error(block: bytes | None) -> None:
    assert (h.get(block, b"Weft-Event"), h.parse(block), h.status(block)) == (None, {}, (0, ""))


def test_a_status_line_is_read() -> None:
    assert h.status(b"NATS/1.0 503\r\n\r\n") == (503, "")
    assert h.status(b"NATS/1.0 404 Message Not Found\r\n\r\n") == (404, "Message Not Found")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_what_the_broker_appends_counts_over_what_a_sender_forged(sequences: list[int]) -> None:
    block = h.block(h.fields([("Nats-Sequence", str(n)) for n in sequences] + [("nats-sequence-x", "1")]))
    assert h.stamped(block, b"Nats-Sequence") == str(sequences[-1]).encode()
    assert h.get(block, b"Nats-Sequence") == str(sequences[0]).encode()
    assert h.stamped(block, b"Nats-Subject") is None
    assert h.stamped(None, b"Nats-Sequence") is None


@pytest.mark.parametrize("character", ["\r", "\n", "\0"], ids=ascii)
def test_no_character_that_any_reader_takes_for_an_end_can_be_written(character: str) -> None:
    with pytest.raises(InvalidRequest, match="line break"):
        h.fields({"X": f"1{character}2"})
    with pytest.raises(InvalidRequest, match="line break"):
        h.fields({f"X{character}Y": "1"})
