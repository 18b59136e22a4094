"""The error table: the same as the A2A SDK's, complete, and carried whole by a reply's body."""

import json
from pathlib import Path

import pytest
from a2a.types import a2a_pb2 as pb
from a2a.utils import errors as sdk
from google.protobuf import any_pb2, json_format
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from weft_protocols import a2a, errors
from weft_protocols.errors import A2A_ERRORS, A2AError, FieldViolation, InternalError, WeftError

TABLE = Path(__file__).parents[2] / "protocols" / "spec" / "errors.json"
REASONS = st.sampled_from(sorted(A2A_ERRORS))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VIOLATIONS = st.lists(st.builds(FieldViolation, TEXT, TEXT), max_size=3).map(tuple)


def classes(root: type[WeftError] = WeftError) -> list[type[WeftError]]:
    return [root, *(found for child in root.__subclasses__() for found in classes(child))]


@pytest.mark.parametrize("reason", sorted(A2A_ERRORS))
def test_every_reason_has_a_class_of_its_own(reason: str) -> None:
    error = A2AError.from_reason(reason)
    assert type(error) is not A2AError
    assert (error.reason, error.spec.reason, type(error).__name__) == (reason, reason, A2A_ERRORS[reason].name)


def test_every_class_has_a_reason_in_the_table() -> None:
    named = [c for c in classes(A2AError) if c is not A2AError]
    assert sorted(c.reason for c in named if issubclass(c, A2AError)) == sorted(A2A_ERRORS)


@pytest.mark.parametrize(
    "error",
    sorted(sdk.JSON_RPC_ERROR_CODE_MAP, key=str),
    ids=[e.__name__ for e in sorted(sdk.JSON_RPC_ERROR_CODE_MAP, key=str)],
)
def test_codes_are_those_of_the_a2a_sdk(error: type[sdk.A2AError]) -> None:
    name = {"JSONParseError": "ParseError"}.get(error.__name__, error.__name__.removesuffix("Error"))
    spec = next(s for s in A2A_ERRORS.values() if s.name in (name, error.__name__))
    assert spec.code == sdk.JSON_RPC_ERROR_CODE_MAP[error]
    mapping = sdk.A2A_ERROR_MAPPING.get(error)
    if mapping is not None:
        assert (spec.reason, spec.http) == (mapping.reason, mapping.http_code)
        if spec.reason != "METHOD_NOT_FOUND":  # gRPC itself answers UNIMPLEMENTED
            assert spec.grpc == mapping.grpc_status


@given(REASONS, TEXT.filter(bool), st.dictionaries(TEXT, TEXT, max_size=3), VIOLATIONS)
def test_a_body_carries_the_whole_error(
    reason: str, message: str, metadata: dict[str, str], violations: tuple[FieldViolation, ...]
) -> None:
    error = A2AError.from_reason(reason, message, metadata=metadata, violations=violations)
    back = a2a.error_from_body(reason, a2a.error_body(error))
    assert type(back) is type(error)
    assert (back.message, back.metadata, back.violations) == (message, metadata, violations)


@given(REASONS)
def test_a_body_is_a_status_with_the_error_info_that_a2a_asks_for(reason: str) -> None:
    status = status_pb2.Status.FromString(a2a.error_body(A2AError.from_reason(reason, "why")))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, status.message) == (A2A_ERRORS[reason].code, "why")
    assert (info.reason, info.domain) == (reason, "a2a-protocol.org")
    assert json_format.MessageToDict(status)["details"][0]["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"


@given(REASONS | TEXT, st.binary(max_size=60))
def test_any_body_still_gives_an_error_with_the_headers_reason(reason: str, body: bytes) -> None:
    error = a2a.error_from_body(reason, body)
    assert error.reason == (reason if reason in A2A_ERRORS else "INTERNAL_ERROR")


def test_a_broken_detail_leaves_the_rest_readable() -> None:
    status = status_pb2.Status(code=-32001, message="no such task")
    status.details.append(any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff"))
    status.details.append(
        any_pb2.Any(type_url="type.googleapis.com/lf.a2a.v1.Task", value=pb.Task(id="x").SerializeToString())
    )
    error = a2a.error_from_body("TASK_NOT_FOUND", status.SerializeToString())
    assert (str(error), error.metadata) == ("no such task", {})


def test_a_reason_of_a_newer_protocol_is_an_internal_error_that_says_what_was_said() -> None:
    body = a2a.error_body(InternalError("generation mismatch"))
    error = a2a.error_from_body("TASK_GENERATION_MISMATCH", body)
    assert type(error) is InternalError
    assert str(error) == "generation mismatch"


@pytest.mark.parametrize("error", classes(), ids=lambda c: c.__name__)
def test_every_error_has_an_exit_code_of_the_command(error: type[WeftError]) -> None:
    assert error.exit_code in range(1, 8)
    assert not (error.retryable and error.exit_code == 2)


def test_jetstream_codes_that_mean_a_lost_race_are_conflicts() -> None:
    conflicts = {code for code, named in errors.JETSTREAM_CODES.items() if named.error is errors.Conflict}
    assert conflicts >= {10071, 10164}
    assert all(named.meaning for named in errors.JETSTREAM_CODES.values())


def test_the_published_table_is_ours() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert table["domain"] == errors.A2A_DOMAIN
    assert table["errors"] == [
        {"name": s.name, "reason": s.reason, "code": s.code, "http": s.http, "grpc": s.grpc}
        for s in A2A_ERRORS.values()
    ]
