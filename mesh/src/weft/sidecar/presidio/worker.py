"""The process that Presidio runs in: `python -m weft.sidecar.presidio.worker [ANALYZER.yaml]`.

Reads questions from standard input, one JSON value a line, `{"id": …, "texts": […]}`, and answers each with
`{"id": …, "spans": […]}`: for each text what is to be taken out of it, `[begin, end, kind]` in characters, in order and
nowhere twice; or with `{"id": …, "fault": "why not"}`. Its first line is `{"ready": true}`, or `{"fault": "why it
cannot"}`. Ends with its input.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import yaml

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine, RecognizerResult
    from presidio_analyzer.nlp_engine import NlpEngine

LANGUAGE: Final = "en"
"""Of Presidio's own recognizers, where no configuration says otherwise."""
SURE: Final = 0.4
"""How sure Presidio has to be, from 0 to 1, where no configuration says otherwise."""
IMPERSONAL: Final = ("DATE_TIME", "URL", "UUID")
"""What no person is known by and results are full of; left in, where no configuration says otherwise."""
INSTALL: Final = "pip install 'weft[presidio]'"
Span = tuple[int, int, str]


def analyzer(path: str) -> Callable[[str], list[RecognizerResult]]:
    """What finds something in a text: as Presidio's own configuration at `path` says, else by patterns, in English.

    Raises ImportError, OSError, ValueError, or whatever a recognizer of the configuration raises.
    """
    import spacy.cli
    import tldextract.tldextract as domains

    # It would fetch the newest list of domains for the first mail address, though it brings one with it; and models.
    domains.TLD_EXTRACTOR = domains.TLDExtract(suffix_list_urls=())
    vars(spacy.cli)["download"] = _missing
    from presidio_analyzer import AnalyzerEngine, AnalyzerEngineProvider

    if path:
        # The provider would go on with a configuration of its own.
        if not isinstance(yaml.safe_load(Path(path).read_text(encoding="utf-8")), dict):
            raise ValueError(f"{path} is no mapping")
        engine = AnalyzerEngineProvider(analyzer_engine_conf_file=path).create_engine()
        return lambda text: _every_language(engine, text)
    engine = AnalyzerEngine(nlp_engine=_words_only(), supported_languages=[LANGUAGE], default_score_threshold=SURE)
    kinds = [kind for kind in engine.get_supported_entities(LANGUAGE) if kind not in IMPERSONAL]
    return lambda text: engine.analyze(text, language=LANGUAGE, entities=kinds)


def _missing(model: str) -> None:
    raise ValueError(f"model {model} is not installed here: python -m spacy download {model}")


def _every_language(engine: AnalyzerEngine, text: str) -> list[RecognizerResult]:
    return [one for language in engine.supported_languages for one in engine.analyze(text, language=language)]


def _words_only() -> NlpEngine:
    """An engine without a model, which is no package and would have to be fetched."""
    import spacy
    from presidio_analyzer.nlp_engine import SpacyNlpEngine
    from spacy.language import Language
    from spacy.tokens import Doc

    @Language.component("weft_words")
    def words(doc: Doc) -> Doc:
        """Words beside a number (passport, licence) make Presidio surer; it looks for them among the lemmas."""
        for token in doc:
            token.lemma_ = token.lower_
        return doc

    made = spacy.blank(LANGUAGE)
    made.add_pipe("weft_words")
    engine = SpacyNlpEngine(models=[{"lang_code": LANGUAGE, "model_name": "blank"}])
    engine.nlp = {LANGUAGE: made}  # type: ignore[assignment]  # it is declared as None, until something is loaded
    return engine


def spans(found: Iterable[RecognizerResult]) -> list[Span]:
    """What was found, in order; of what overlaps, all of it under the name Presidio is surest of."""
    made: list[tuple[int, int, float, str]] = []
    for one in sorted(found, key=lambda one: (one.start, -one.end)):
        begin, end, score, kind = one.start, one.end, one.score, one.entity_type
        if made and begin < made[-1][1]:
            first, last, best, name = made.pop()
            begin, end = first, max(last, end)
            score, kind = (score, kind) if score > best else (best, name)
        made.append((begin, end, score, kind))
    return [(begin, end, _mark(kind)) for begin, end, _, kind in made if begin < end]


def _mark(kind: str) -> str:
    """A kind as it stands in a mark."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in kind.lower()) or "personal"


def serve(lines: Iterable[str], out: TextIO, find: Callable[[str], list[RecognizerResult]]) -> None:
    """Answer until the input ends."""
    for line in lines:
        asked: dict[str, Any] = json.loads(line)
        # Half a surrogate pair is a character like others here, and none to whoever encodes the text.
        texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in asked["texts"]]
        try:
            told: dict[str, Any] = {"spans": [spans(find(text)) for text in texts]}
        except Exception as error:  # noqa: BLE001 - whatever a recognizer raises at a text is the answer
            told = {"fault": f"{type(error).__name__}: {error}"}
        _say(out, {"id": asked["id"], **told})


def _say(out: TextIO, told: dict[str, Any]) -> None:
    out.write(json.dumps(told) + "\n")
    out.flush()


def main(arguments: Sequence[str]) -> int:
    """Serve; the exit code."""
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)  # it warns of every recognizer it does not load
    warnings.simplefilter("ignore")
    # Whatever a recognizer prints is no answer.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        find = analyzer(arguments[0] if arguments else "")
    except ImportError as error:
        _say(out, {"fault": f"{error.name or error} is not installed: {INSTALL}"})
        return 1
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a model or a recognizer raises is told
        _say(out, {"fault": f"Presidio cannot be started: {error}"})
        return 1
    _say(out, {"ready": True})
    serve(sys.stdin, out, find)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
