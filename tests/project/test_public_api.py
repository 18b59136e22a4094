"""The public names of `weft`, as a list: a change here is a change for users."""

import importlib

import pytest

import weft

PUBLIC_NAMES = [
    "A2AError",
    "Agent",
    "Artifact",
    "Backpressure",
    "Data",
    "DeadlineExceeded",
    "Event",
    "Fail",
    "File",
    "Handle",
    "Mesh",
    "Message",
    "Page",
    "Reject",
    "State",
    "StepOptions",
    "Task",
    "TaskCanceled",
    "TaskEnded",
    "TaskFailed",
    "TaskInterrupted",
    "TaskNotFound",
    "TaskRejected",
    "TaskView",
    "Text",
    "Unavailable",
    "Unreachable",
    "WeftError",
    "connect",
    "current_idempotency_key",
]


def test_the_public_names_are_the_listed_ones() -> None:
    assert sorted(weft.__all__) == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(importlib.import_module("weft"), name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(weft, "no_such_name")  # noqa: B009 - mypy would reject the plain attribute


def test_dir_shows_the_public_names() -> None:
    assert set(PUBLIC_NAMES) <= set(dir(weft))
