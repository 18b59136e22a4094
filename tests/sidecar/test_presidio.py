"""Presidio, the real one: what has no form of its own is taken out too, and what nobody looked at is not shown."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from weft.core.broker import Broker
from weft.policy.model import Decision, Obligations
from weft.policy.redaction import Redactor
from weft.sidecar import owed
from weft.sidecar.guards import Guards
from weft.sidecar.pipeline import Call, Outcome, Passing, Pipeline, Refusal
from weft.sidecar.presidio import recognizer as module
from weft.sidecar.presidio.recognizer import LARGEST, QUESTION, Recognizer, Unrecognized
from weft.sidecar.records import Intended, Recorded, Recorder
from weft.sidecar.redacts import Notes, Redacts, hearing
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh
from weft_protocols import mcp
from weft_protocols.audit import AuditRecord
from weft_protocols.errors import ToolError

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PHONE = "(212) 555-0182"  # without a +, which the mesh's own rules need
LEAK = f"call {PHONE} now"
GONE = "call [redacted:phone-number] now"
GUARDS = Guards(redact=("secrets", "presidio"))
CALL = Call(caller="a", server="s", method="tools/call", name="t", params={"name": "t", "arguments": {}}, guards=GUARDS)
MODEL = """
import spacy, sys
made = spacy.blank("en")
made.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Ada Lovelace"}])
made.to_disk(sys.argv[1])
"""


@pytest.fixture(scope="module")
async def presidio() -> AsyncIterator[Recognizer]:
    made = Recognizer()
    assert await made.ready() == ""
    yield made
    await made.aclose()


@pytest.fixture
async def own() -> AsyncIterator[Recognizer]:
    """One that a test may break."""
    made = Recognizer()
    yield made
    await made.aclose()


async def of(recognizer: Recognizer, value: Any, classes: tuple[str, ...] = ("presidio",)) -> Any:
    redactor = await recognizer.redactor(frozenset(classes), lambda one: one.value(value), large=False)
    return redactor.value(value)


# What is recognized --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "made"),
    [
        (LEAK, GONE),
        ("from 10.2.3.4", "from [redacted:ip-address]"),
        ("wallet 1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa.", "wallet [redacted:crypto]."),
        ("My passport number is 912345678.", "My passport number is [redacted:us-passport]."),
        ("order 912345678", "order 912345678"),  # a number alone is none
        ("at 2026-11-30, see https://example.com/a", "at 2026-11-30, see https://example.com/a"),
        ("to jane.doe@example.com!", "to [redacted:email-address]!"),  # without a list from the internet
        ("half a pair \ud800, then (212) 555-0182", "half a pair \ud800, then [redacted:phone-number]"),
        ("😀 (212) 555-0182 😀", "😀 [redacted:phone-number] 😀"),
        ("", ""),
    ],
)
async def test_personal_data_is_found_where_it_is(presidio: Recognizer, text: str, made: str) -> None:
    assert await of(presidio, text) == made


async def test_all_texts_of_a_value_are_looked_at_keys_as_well(presidio: Recognizer) -> None:
    value = {LEAK: [1, None, {"a": LEAK, "b": "nothing"}]}
    assert await of(presidio, value) == {GONE: [1, None, {"a": GONE, "b": "nothing"}]}
    same = {"a": ["nothing", 5]}
    assert await of(presidio, same) is same


class Everything(Recognizer):
    """A model that takes every text for a person."""

    async def spans(self, texts: Iterable[str], within: float = 0) -> dict[str, list[tuple[int, int, str]]]:
        return {text: [(0, len(text), "person")] for text in texts}


async def test_what_belongs_to_the_protocol_is_not_asked_about() -> None:
    """A model that is asked about `isError` alone may take it for a name, and the result would be none any more."""
    result: dict[str, Any] = {
        "resultType": "complete",
        "content": [
            {"type": "text", "text": "Ada Lovelace"},
            {"type": "image", "data": "aGVsbG8=", "mimeType": "image/svg+xml"},
            {"type": "resource_link", "uri": "mem://x", "name": "x"},
        ],
        "structuredContent": {"firstName": "Ada", "Ada Lovelace": 1},
        "isError": False,
        "_meta": {"io.modelcontextprotocol/serverInfo": {"version": "1.2.3"}},
    }
    found = await made(Everything(), result)
    assert found["content"][0] == {"type": "text", "text": "[redacted:person]"}
    assert found["content"][1] == result["content"][1]
    assert found["structuredContent"] == {"firstName": "[redacted:person]", "[redacted:person]": 1}
    assert (found["resultType"], found["isError"]) == ("complete", False)
    assert "io.modelcontextprotocol/serverInfo" in found["_meta"]


async def test_what_the_own_rules_took_out_is_not_taken_out_again(presidio: Recognizer) -> None:
    text = f"mail jane.doe@example.com or {LEAK}"
    assert await of(presidio, text, ("pii", "presidio")) == f"mail [redacted:email] or {GONE}"


@pytest.mark.parametrize("at", [0, QUESTION - 8, QUESTION, QUESTION + 300, 3 * QUESTION - 5])
async def test_a_long_text_is_looked_at_in_pieces_and_nothing_falls_between_them(presidio: Recognizer, at: int) -> None:
    before = ("word " * QUESTION)[:at]
    before = before[:-1] + " " if before else ""
    made = await of(presidio, f"{before}{PHONE} {'word ' * QUESTION}")
    assert made == f"{before}[redacted:phone-number] {'word ' * QUESTION}"


async def test_many_texts_are_asked_about_together(presidio: Recognizer) -> None:
    texts = [f"{number:04} {LEAK}" for number in range(1000)]
    assert await of(presidio, texts) == [f"{number:04} {GONE}" for number in range(1000)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model for spaCy that knows one name."""
    made = tmp_path / "model"
    subprocess.run([sys.executable, "-c", MODEL, str(made)], check=True, timeout=60)
    return made


async def test_a_model_that_the_operator_names_finds_names(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "analyzer.yaml"
    config.write_text(
        textwrap.dedent(f"""
            supported_languages: [en]
            default_score_threshold: 0.5
            nlp_configuration:
              nlp_engine_name: spacy
              models: [{{lang_code: en, model_name: {model}}}]
        """)
    )
    recognizer = Recognizer(str(config))
    try:
        assert await of(recognizer, "Ask Ada Lovelace.") == "Ask [redacted:person]."
        assert await of(recognizer, LEAK) == LEAK  # the configuration wants it surer
    finally:
        await recognizer.aclose()


NOISY = """
import os, sys

def heard(event, arguments):
    if event == "socket.getaddrinfo":
        open({called!r}, "a").write(str(arguments[0]))
    if event == "import" and arguments[0] == "presidio_analyzer":
        os.write(1, b"a recognizer says hello\\n")

sys.addaudithook(heard)
"""


async def test_it_calls_nobody_and_what_it_prints_is_no_answer(
    own: Recognizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOISY.format(called=str(tmp_path / "called")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TLDEXTRACT_CACHE", str(tmp_path / "cache"))
    assert await of(own, "to jane.doe@example.com") == "to [redacted:email-address]"
    assert not (tmp_path / "called").exists()


# What cannot be asked ------------------------------------------------------------------------------


async def test_without_presidio_it_says_what_to_install(
    own: Recognizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "presidio_analyzer.py").write_text("raise ModuleNotFoundError('no', name='presidio_analyzer')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert await own.ready() == "presidio_analyzer is not installed: pip install 'weft[presidio]'"
    with pytest.raises(Unrecognized, match="not installed"):
        await own.spans([LEAK])
    assert own.pid is None


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (None, "No such file"),
        ("models: [", "while parsing"),
        ("", "is no mapping"),
        ("surprise: 1", "Unknown configuration key"),
        ("supported_languages: [en]", "model en_core_web_lg is not installed here: python -m spacy download"),
        ("supported_languages: [en]\nnlp_configuration: {nlp_engine_name: spacy}", "models"),
    ],
)
async def test_a_wrong_configuration_is_said(tmp_path: Path, config: str | None, fault: str) -> None:
    file = tmp_path / "analyzer.yaml"
    if config is not None:
        file.write_text(config)
    recognizer = Recognizer(str(file))
    try:
        said = await recognizer.ready()
    finally:
        await recognizer.aclose()
    assert said.startswith("Presidio cannot be started: ")
    assert fault in said


async def test_one_that_failed_to_start_is_tried_again_later(
    own: Recognizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "presidio_analyzer.py"
    broken.write_text("raise ModuleNotFoundError('no', name='presidio_analyzer')")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        assert await own.ready()
    broken.unlink()
    assert await own.ready()  # not at once, not for every call
    monkeypatch.setattr(module, "AGAIN", 0.0)
    own._retry_at = 0.0
    assert await own.ready() == ""
    assert own.fault == ""


async def test_a_start_goes_on_without_whoever_does_not_wait_for_it(own: Recognizer) -> None:
    assert await own.ready(0.05) == "Presidio was not ready within 0 s"
    starting = own._starting
    assert await own.ready(0.05)
    assert own._starting is starting
    assert await own.ready() == ""


async def test_a_process_that_was_killed_is_started_again(own: Recognizer) -> None:
    assert await of(own, LEAK) == GONE
    killed = own.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    await eventually(lambda: own.pid is None)
    assert await of(own, LEAK) == GONE
    assert own.pid not in (None, killed)


async def test_a_process_that_dies_of_a_question_fails_that_and_no_other(own: Recognizer) -> None:
    assert await own.ready() == ""
    assert own.pid is not None
    os.kill(own.pid, signal.SIGSTOP)
    asked = asyncio.create_task(own.spans([LEAK]))
    await eventually(lambda: own._count == 1)
    os.kill(own.pid, signal.SIGKILL)
    with pytest.raises(Unrecognized, match="process ended"):
        await asked
    assert await of(own, LEAK) == GONE


async def test_a_process_that_hangs_is_replaced(own: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await own.ready() == ""
    hung = own.pid
    assert hung is not None
    os.kill(hung, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(module, "ANSWER", 0.2)
        patch.setattr(module, "LEAVE", 0.2)
        with pytest.raises(Unrecognized, match="did not answer"):
            await own.spans([LEAK])
    assert await of(own, LEAK) == GONE
    assert own.pid != hung


async def test_who_does_not_wait_leaves_no_answer_for_the_next(own: Recognizer) -> None:
    assert await own.ready() == ""
    assert own.pid is not None
    os.kill(own.pid, signal.SIGSTOP)
    with pytest.raises(Unrecognized, match="within 0 s"):
        await own.spans(["from 10.2.3.4"], within=0.1)
    os.kill(own.pid, signal.SIGCONT)
    assert await of(own, LEAK) == GONE


async def test_too_much_is_not_looked_through(presidio: Recognizer) -> None:
    with pytest.raises(Unrecognized, match="more than Presidio looks through"):
        await presidio.spans(["x" * (LARGEST + 1)])


async def test_its_process_ends_with_the_sidecar_however_that_ends() -> None:
    program = """
        import asyncio, time
        from weft.sidecar.presidio.recognizer import Recognizer
        async def main():
            recognizer = Recognizer()
            assert await recognizer.ready() == ""
            print(recognizer.pid, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """
    sidecar = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(program), stdout=asyncio.subprocess.PIPE
    )
    assert sidecar.stdout is not None
    async with asyncio.timeout(60):
        pid = int(await sidecar.stdout.readline())
    sidecar.kill()
    await sidecar.wait()
    await eventually(lambda: not Path(f"/proc/{pid}").exists())


# Calls ---------------------------------------------------------------------------------------------


async def made(recognizer: Recognizer, result: Any, call: Call = CALL) -> dict[str, Any]:
    async def execute(_: Call) -> dict[str, Any]:
        if isinstance(result, ToolError):
            raise result
        return dict(result)

    return await Pipeline([Redacts(recognizer)]).run(call, execute)


async def test_results_and_errors_lose_it_and_say_how_much(presidio: Recognizer) -> None:
    content = [{"type": "text", "text": LEAK}]
    found = await made(presidio, {"content": content, "structuredContent": {"a": LEAK}})
    assert found["content"][0]["text"] == found["structuredContent"]["a"] == GONE
    assert found["_meta"][mcp.META_REDACTED] == {"phone-number": 2}
    with pytest.raises(ToolError, match="now") as raised:
        await made(presidio, ToolError(LEAK, code=7, data={"x": LEAK}))
    assert (str(raised.value), raised.value.data) == (GONE, {"x": GONE})


async def test_the_policy_may_ask_for_it_too(presidio: Recognizer) -> None:
    decision = Decision(allow=True, obligations=Obligations(redact=("presidio",)))
    call = replace(CALL, guards=Guards(redact=())).with_fact(owed.DECISION, decision)
    found = await made(presidio, {"content": [{"type": "text", "text": LEAK}]}, call)
    assert found["content"][0]["text"] == GONE


class Made(Passing):
    """Whether a call came as far as here."""

    def __init__(self) -> None:
        self.calls = 0

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        self.calls += 1
        return call


async def test_what_nobody_can_look_through_is_not_called(tmp_path: Path) -> None:
    recognizer, reached = Recognizer(str(tmp_path / "none.yaml")), Made()

    async def execute(_: Call) -> dict[str, Any]:
        raise AssertionError

    try:
        refused = await Pipeline([Redacts(recognizer), reached]).run(CALL, execute)
    finally:
        await recognizer.aclose()
    assert refused["_meta"][mcp.META_REFUSAL]["kind"] == "unredacted"
    assert "No such file" in refused["content"][0]["text"]
    assert reached.calls == 0


@pytest.mark.parametrize("answer", [{"content": [{"type": "text", "text": LEAK * 20_000}]}, ToolError(LEAK * 20_000)])
async def test_an_answer_that_nobody_looked_through_is_left_out(presidio: Recognizer, answer: Any) -> None:
    if isinstance(answer, ToolError):
        with pytest.raises(ToolError) as raised:
            await made(presidio, answer)
        told = str(raised.value)
        assert raised.value.code == answer.code
    else:
        found = await made(presidio, answer)
        told = found["content"][0]["text"]
        assert found["isError"] is True
        assert len(found["content"]) == 1
    assert PHONE not in told
    assert told.startswith("The call was made, and what came back is left out")
    assert "more than Presidio looks through" in told


async def test_of_other_methods_such_an_answer_is_an_error(presidio: Recognizer) -> None:
    call = replace(CALL, method="resources/read", name="mem://x", params={"uri": "mem://x"})
    with pytest.raises(ToolError, match="is left out") as raised:
        await made(presidio, {"contents": [{"uri": "mem://x", "text": LEAK * 20_000}]}, call)
    assert raised.value.code == mcp.UNREDACTED


async def test_an_answer_is_looked_through_only_as_long_as_its_caller_waits(own: Recognizer) -> None:
    assert await own.ready() == ""
    assert own.pid is not None
    os.kill(own.pid, signal.SIGSTOP)
    begun = time.monotonic()
    call = replace(CALL, deadline=time.time() + 1)
    found = await made(own, {"content": [{"type": "text", "text": LEAK}]}, call)
    os.kill(own.pid, signal.SIGCONT)
    assert time.monotonic() - begun < 15  # not for as long as others might
    assert "what came back is left out" in found["content"][0]["text"]
    assert PHONE not in json.dumps(found)


# Notifications -------------------------------------------------------------------------------------


async def test_notifications_come_in_their_order_and_before_the_answer(presidio: Recognizer) -> None:
    heard: list[Any] = []

    async def telling(call: Call) -> dict[str, Any]:
        hear = hearing(call, lambda *told: heard.append(told))
        for number in range(10):
            hear("notifications/progress", {"progressToken": "of the server", "progress": number, "message": LEAK})
        return {"content": []}

    call = replace(CALL, params={**CALL.params, "_meta": {"progressToken": "mine"}})
    await Pipeline([Redacts(presidio)]).run(call, telling)
    assert heard == [
        ("notifications/progress", {"progressToken": "mine", "progress": number, "message": GONE})
        for number in range(10)
    ]


async def test_a_notification_that_nobody_looked_through_is_left_out(
    presidio: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST", 1000)
    heard: list[Any] = []
    notes = Notes(presidio, frozenset({"presidio"}))
    notes.tell(lambda *told: heard.append(told), "notifications/message", {"data": LEAK})
    notes.tell(lambda *told: heard.append(told), "notifications/message", {"data": LEAK * 100})
    notes.tell(lambda *told: heard.append(told), "notifications/message", {"data": "fine"})
    await notes.end(10.0)
    assert heard == [("notifications/message", {"data": GONE}), ("notifications/message", {"data": "fine"})]
    assert notes.found.counts == {"phone-number": 1}


async def test_of_a_call_that_was_cancelled_nothing_more_is_told_and_what_was_is_in_its_record(
    presidio: Recognizer,
) -> None:
    heard: list[Any] = []
    outcomes: list[Outcome] = []
    told = asyncio.Event()

    class Seen(Passing):
        async def after(self, call: Call, outcome: Outcome) -> Outcome:
            outcomes.append(outcome)
            return outcome

    async def telling(call: Call) -> dict[str, Any]:
        hear = hearing(call, lambda *told: heard.append(told))
        hear("notifications/message", {"data": LEAK})
        await eventually(lambda: heard)
        for _ in range(50):
            hear("notifications/message", {"data": LEAK})
        told.set()
        await asyncio.Event().wait()
        return {}

    running = asyncio.create_task(Pipeline([Seen(), Redacts(presidio)]).run(CALL, telling))
    await told.wait()
    running.cancel()
    await asyncio.wait((running,))
    assert outcomes[0].cancelled
    assert outcomes[0].call is not None
    assert outcomes[0].call.facts[owed.REDACTED] == {"phone-number": 1}
    await presidio.spans(["turn"])
    assert len(heard) <= 2  # the one that was being looked through may still come


async def test_more_than_can_be_looked_through_is_left_out_and_not_kept(own: Recognizer) -> None:
    assert await own.ready() == ""
    assert own.pid is not None
    os.kill(own.pid, signal.SIGSTOP)
    heard: list[Any] = []
    notes = Notes(own, frozenset({"presidio"}))
    for number in range(300):
        notes.tell(lambda *told: heard.append(told), "notifications/message", {"data": number, "text": f"n{number}"})
    os.kill(own.pid, signal.SIGCONT)
    await notes.end(10.0)
    assert [one[1]["data"] for one in heard] == list(range(len(heard)))
    assert 100 <= len(heard) <= 101


# Through a whole sidecar ---------------------------------------------------------------------------


@pytest.fixture
async def broker(mesh: BrokerMesh) -> AsyncIterator[Broker]:
    made = await mesh.connect("sidecar")
    yield made
    await made.close()


class Kept(Recorder):
    """Records that are kept here as well."""

    def __init__(self, broker: Broker, recognizer: Recognizer) -> None:
        super().__init__(broker, recognizer)
        self.kept: list[AuditRecord] = []

    def made(self, *what: Any, **more: Any) -> AuditRecord:
        record = super().made(*what, **more)
        self.kept.append(record)
        return record


async def recorded(broker: Broker, recognizer: Recognizer, call: Call) -> list[AuditRecord]:
    recorder = Kept(broker, recognizer)
    await made_by(Pipeline([Recorded(recorder), Redacts(recognizer), Intended(recorder)]), call)
    await recorder.aclose()
    return recorder.kept


async def made_by(pipeline: Pipeline, call: Call) -> dict[str, Any]:
    async def execute(_: Call) -> dict[str, Any]:
        return {"content": [{"type": "text", "text": LEAK}]}

    return await pipeline.run(call, execute)


async def test_arguments_in_records_lose_what_presidio_finds(presidio: Recognizer, broker: Broker) -> None:
    call = replace(CALL.with_arguments({"who": LEAK, "secret": "x1y2z3"}))
    intent, outcome = await recorded(broker, presidio, call)
    assert intent.what["shown"] == {"who": GONE, "secret": "[redacted:secret]"}
    assert outcome.what == intent.what
    assert outcome.outcome["redactions"] == {"phone-number": 1}


async def test_arguments_that_nobody_looked_through_stand_in_no_record(tmp_path: Path, broker: Broker) -> None:
    recognizer = Recognizer(str(tmp_path / "none.yaml"))
    try:
        (denial,) = await recorded(broker, recognizer, CALL.with_arguments({"who": LEAK}))
    finally:
        await recognizer.aclose()
    assert denial.kind == "denial"
    assert denial.what["shown"] is None
    assert denial.what["arguments"]  # its digest


async def test_nothing_of_a_real_server_gets_past_it_and_its_state_says_why_it_cannot(
    stage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "presidio_analyzer.py").write_text("raise ModuleNotFoundError('no', name='presidio_analyzer')")
    server: str = await stage.bad("--leaks", redact=["secrets", "presidio"])
    (stage.state(server) / "leak").write_text(LEAK)
    heard: list[Any] = []
    params = {"_meta": {"progressToken": "mine"}}
    result = await stage.do(server, "leak", heard=lambda *told: heard.append(list(told)), **params)
    everything = json.dumps([result, heard])
    assert PHONE not in everything
    assert GONE in json.dumps(result)
    assert GONE in json.dumps(heard)
    assert result["_meta"][mcp.META_REDACTED]["phone-number"] > 3

    recognizer = stage.service.plane.recognizer
    os.kill(recognizer.pid, signal.SIGKILL)
    await eventually(lambda: recognizer.pid is None)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    refused = await stage.do(server, "leak")
    assert refused["_meta"][mcp.META_REFUSAL]["kind"] == "unredacted"
    states = {one["name"]: one for one in (await stage.operate("weft/servers"))["servers"]}
    assert states[server]["unredacted"] == "presidio_analyzer is not installed: pip install 'weft[presidio]'"
    monkeypatch.undo()
    recognizer._retry_at = 0.0
    assert GONE in json.dumps(await stage.do(server, "leak"))


def test_a_redactor_leaves_marks_alone_and_takes_out_the_rest() -> None:
    text = "a [redacted:email] b"
    redactor = Redactor(("presidio",), recognize=lambda _: [(0, len(text), "person")])
    assert redactor.text(text) == "[redacted:person][redacted:email][redacted:person]"
