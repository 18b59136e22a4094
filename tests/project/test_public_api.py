"""The public names of `weft`, as a list: a change here is a change for users."""

import importlib
import subprocess
import sys

import pytest

import weft
import weft.a2a

PUBLIC_NAMES = [
    "A2AError",
    "Agent",
    "AgentNotFound",
    "Approval",
    "Artifact",
    "Backpressure",
    "BreakerPolicy",
    "CircuitOpen",
    "Data",
    "DeadlineExceeded",
    "DeadlockError",
    "DelegationLoop",
    "Event",
    "Fail",
    "File",
    "Handle",
    "Lock",
    "LockLost",
    "LockTimeout",
    "Mesh",
    "Message",
    "Page",
    "Reject",
    "RetryPolicy",
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
    "ToolError",
    "ToolResult",
    "Unavailable",
    "Unreachable",
    "WeftError",
    "connect",
    "current_idempotency_key",
]

A2A_NAMES = ["BINDING", "NatsTransport", "agent_from_executor", "client", "register", "resolve"]
"""Of `weft.a2a`."""


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


def test_the_public_names_for_the_sdk_are_the_listed_ones() -> None:
    assert sorted(weft.a2a.__all__) == A2A_NAMES
    assert set(A2A_NAMES) <= set(dir(weft.a2a))


@pytest.mark.parametrize("name", A2A_NAMES)
def test_every_public_name_for_the_sdk_resolves(name: str) -> None:
    assert getattr(weft.a2a, name) is not None


def test_the_sdk_is_loaded_when_a_name_is_used() -> None:
    script = "import sys, weft.a2a; dir(weft.a2a); assert 'a2a' not in sys.modules; weft.a2a.BINDING; import a2a.types"
    subprocess.run([sys.executable, "-c", script], check=True)
