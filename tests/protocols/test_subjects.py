"""The subject grammar: what is built parses, what is hostile does not, patterns match as the broker's do."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weft_protocols import subjects
from weft_protocols.errors import InvalidName
from weft_protocols.subjects import GRAMMAR, Kind

ABNF = Path(__file__).parents[2] / "protocols" / "spec" / "subjects.abnf"
NAME = st.text("ABCXYZabcxyz0189_-", min_size=1, max_size=64)
TASK_ID = st.text("0123456789abcdef", min_size=32, max_size=32)
FORMS = {
    "task": TASK_ID,
    "slice": st.integers(0, 99).map(lambda n: f"{n:02d}"),
    "sha256": st.text("0123456789abcdef", min_size=64, max_size=64),
    "n": st.integers(0, 10**9).map(str),
}
KINDS = st.sampled_from(list(GRAMMAR.values()))
HOSTILE = st.one_of(
    st.sampled_from(["", "*", ">", "a.b", "a b", "a\n", "\na", "a\0", "a\u00e9", "\u0661", "a" * 65, "a=b", "$JS"]),
    st.text(min_size=1, max_size=8).filter(lambda text: not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text)),
)


@st.composite
def built(draw: st.DrawFn) -> tuple[Kind, dict[str, str]]:
    kind = draw(KINDS)
    return kind, {token: draw(FORMS.get(token, NAME)) for token in kind.tokens}


def subject_of(kind: Kind, tokens: dict[str, str]) -> str:
    return ".".join(("mesh", kind.name, *(tokens[token] for token in kind.tokens)))


@given(built())
def test_what_is_built_parses_to_what_it_was_built_from(case: tuple[Kind, dict[str, str]]) -> None:
    kind, tokens = case
    parsed = subjects.parse(subject_of(kind, tokens))
    assert (parsed.kind, parsed.tokens) == (kind.name, tokens)
    assert subjects.matches(kind.wildcard, subject_of(kind, tokens))


@given(NAME, NAME, TASK_ID, NAME)
def test_the_build_functions_keep_to_the_grammar(agent: str, caller: str, task: str, other: str) -> None:
    made = {
        "task": subjects.task(agent, "07", caller, task),
        "input": subjects.input(agent, "07", caller, task),
        "claim": subjects.claim(agent, task),
        "event": subjects.event(agent, task, caller, other),
        "step": subjects.step(agent, task, other),
        "ctl": subjects.ctl(agent, other),
        "rpc": subjects.rpc(agent, other, caller),
        "coord": subjects.coord(other, caller),
        "blob": subjects.blob(caller, "0" * 64, 3),
        "push": subjects.push(caller, agent, task, other),
        "pushed": subjects.pushed(caller, agent, task, other),
    }
    assert {name: subjects.parse(subject).kind for name, subject in made.items()} == {n: n for n in made}
    assert made.keys() == GRAMMAR.keys() - {"live"}


@given(built(), st.data())
def test_a_hostile_token_never_parses(case: tuple[Kind, dict[str, str]], data: st.DataObject) -> None:
    kind, tokens = case
    where = data.draw(st.sampled_from(kind.tokens))
    subject = subject_of(kind, {**tokens, where: data.draw(HOSTILE)})
    with pytest.raises(InvalidName):
        subjects.parse(subject)


@given(HOSTILE)
def test_a_hostile_name_is_refused_where_names_enter(name: str) -> None:
    with pytest.raises(InvalidName, match="is not a name"):
        subjects.check_name(name)


@pytest.mark.parametrize("name", sorted(subjects.RESERVED_NAMES))
def test_names_of_the_mesh_itself_are_refused(name: str) -> None:
    with pytest.raises(InvalidName, match="is reserved"):
        subjects.check_name(name)


@given(NAME.filter(lambda name: name not in subjects.RESERVED_NAMES))
def test_every_other_token_is_a_name(name: str) -> None:
    assert subjects.check_name(name) == name


def reference_match(pattern: list[str], subject: list[str]) -> bool:
    """NATS matching by recursion over tokens, independent of the implementation."""
    if not pattern:
        return not subject
    if not subject:
        return False
    if pattern[0] == ">":
        return True
    return pattern[0] in ("*", subject[0]) and reference_match(pattern[1:], subject[1:])


TOKENS = st.lists(st.sampled_from(["a", "b", "mesh", "*"]), min_size=1, max_size=5)


@given(TOKENS, st.booleans(), TOKENS)
def test_patterns_match_as_the_reference_does(pattern: list[str], tail: bool, subject: list[str]) -> None:
    whole = [*pattern, ">"] if tail else pattern
    assert subjects.matches(".".join(whole), ".".join(subject)) == reference_match(whole, subject)


@given(built(), st.data())
def test_fixing_tokens_narrows_a_pattern_to_them(case: tuple[Kind, dict[str, str]], data: st.DataObject) -> None:
    kind, tokens = case
    fixed = data.draw(st.sets(st.sampled_from(kind.tokens)))
    pattern = kind.pattern(**{token: tokens[token] for token in fixed})
    assert subjects.matches(pattern, subject_of(kind, tokens))
    for token in fixed:
        other = {**tokens, token: "0" * 33 if tokens[token] != "0" * 33 else "1"}
        assert not subjects.matches(pattern, subject_of(kind, other))


def test_a_token_the_kind_has_not_is_refused() -> None:
    with pytest.raises(InvalidName, match="no token"):
        GRAMMAR["claim"].pattern(caller="x")


def test_the_writer_is_a_token_of_its_kind_and_its_position_counts_from_one() -> None:
    for kind in GRAMMAR.values():
        if kind.writer is None:
            assert kind.writer_position is None
            continue
        assert kind.writer_position is not None
        assert kind.pattern(**{kind.writer: "me"}).split(".")[kind.writer_position - 1] == "me"


def test_the_live_feed_carries_the_tokens_of_the_event() -> None:
    event = subjects.parse(subjects.event("analyst", "0" * 32, "local", "o1"))
    live = subjects.parse(f"mesh.live.local.o1.analyst.{'0' * 32}")
    assert event.tokens == live.tokens
    assert subjects.matches(subjects.live("local", "o1"), f"mesh.live.local.o1.analyst.{'0' * 32}")
    assert subjects.matches(subjects.live_task("local", "analyst", "0" * 32), f"mesh.live.local.o9.analyst.{'0' * 32}")


@given(NAME, NAME)
def test_no_two_lanes_share_a_consumer(one: str, other: str) -> None:
    names = {subjects.consumer(agent, lane) for agent in {one, other} for lane in subjects.LANES}
    assert len(names) == len({one, other}) * len(subjects.LANES)


@given(st.text(max_size=80), st.text(max_size=80))
@example("k-5dbf1f0a", "a b")
@example("x" * 64, "x" * 65)
def test_step_keys_become_tokens_and_stay_apart(one: str, other: str) -> None:
    tokens = subjects.step_token(one), subjects.step_token(other)
    assert all(subjects.TOKEN.match(token) for token in tokens)
    assert (tokens[0] == tokens[1]) == (one == other)


@given(st.text(max_size=80))
def test_a_step_key_that_is_the_token_of_another_stays_apart_from_it(key: str) -> None:
    token = subjects.step_token(key)
    assert token == key or subjects.step_token(token) != token


# The published grammar -----------------------------------------------------------------------------


def abnf_rules() -> dict[str, str]:
    """Rules of the grammar file by name, continuation lines joined and comments dropped."""
    rules: dict[str, str] = {}
    name = ""
    for line in ABNF.read_text(encoding="utf-8").splitlines():
        text = line.partition(";")[0].rstrip()
        if not text:
            continue
        if text[0] != " ":
            name, _, text = text.partition("=")
            name = name.strip()
            rules[name] = ""
        rules[name] += " " + text.strip()
    return {name: text.strip() for name, text in rules.items()}


def regex_of(rule: str, rules: dict[str, str]) -> str:
    """A regular expression for a rule; knows as much of ABNF (RFC 5234, RFC 7405) as the file uses."""
    alternatives = []
    for alternative in rules[rule].split(" / "):
        made = ""
        for element in alternative.split():
            repeat = re.match(r"(\d*)(\*?)(\d*)(?=[a-z%])", element)
            assert repeat is not None, element
            body = element[repeat.end() :]
            low, star, high = repeat.groups()
            count = "" if not low and not star else f"{{{low or 0},{high}}}" if star else f"{{{low}}}"
            if literal := re.fullmatch(r'%s"([^"]*)"', body):
                made += re.escape(literal[1]) + count
            elif chars := re.fullmatch(r"%x([0-9A-F]{2})-([0-9A-F]{2})", body):
                made += f"[\\x{chars[1]}-\\x{chars[2]}]" + count
            else:
                made += f"(?:{regex_of(body, rules)}){count}"
        alternatives.append(made)
    return "|".join(alternatives)


@pytest.fixture(scope="module")
def published() -> re.Pattern[str]:
    return re.compile(regex_of("subject", abnf_rules()))


@given(case=built())
def test_the_published_grammar_takes_what_is_built(
    published: re.Pattern[str], case: tuple[Kind, dict[str, str]]
) -> None:
    assert published.fullmatch(subject_of(*case))


@given(case=built(), data=st.data())
def test_the_published_grammar_and_the_parser_agree_on_damaged_subjects(
    published: re.Pattern[str], case: tuple[Kind, dict[str, str]], data: st.DataObject
) -> None:
    subject = subject_of(*case)
    at = data.draw(st.integers(0, len(subject)))
    until = data.draw(st.integers(at, min(len(subject), at + 3)))
    damaged = subject[:at] + data.draw(st.text("abAB.09_-*> \n\u00e9", max_size=3)) + subject[until:]
    try:
        subjects.parse(damaged)
        parses = True
    except InvalidName:
        parses = False
    assert bool(published.fullmatch(damaged)) == parses, damaged


def test_the_published_grammar_has_a_rule_for_every_kind() -> None:
    named = set(re.findall(r'%s"mesh\.([a-z]+)\."', ABNF.read_text(encoding="utf-8")))
    assert named == GRAMMAR.keys()
