"""Errors of the command line alone."""

from __future__ import annotations

from weft_protocols.errors import WeftError


class NotFound(WeftError):
    """This mesh has no process, agent or task of that name."""

    exit_code = 5


class AlreadyRunning(WeftError):
    """Another supervisor runs this mesh."""


class Failed(WeftError):
    """Something another process was asked to do went wrong; its exit code is passed on."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]
