"""The program that Monty's pool starts for each call: Monty itself, in the sandbox that stdio servers have.

The pool takes a program without arguments, so that of a sandbox is a file of its own, in a folder nobody else reads.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from weft.sidecar.guards import CodeRules, SandboxRules
from weft.sidecar.sandbox import NONE, jailed
from weft_protocols.errors import ToolError
from weft_protocols.mcp import UPSTREAM_FAILED

SPARE: Final = 30
"""Seconds of processor time a worker has besides those of the code."""


class Worker:
    """Where the program is; `close` removes what was made for it.

    Args:
        rules: of the sandbox: level, memory, processes and processor time. Files and network it has none.
        code: of the code.
        private: what it may not read in any case.

    Raises:
        ToolError: the sandbox cannot be as strong as the rules want it, or nothing can be started here.
    """

    def __init__(self, rules: SandboxRules, code: CodeRules, *, private: Sequence[str] = ()) -> None:
        from pydantic_monty._binary import find_monty_binary

        self.path: Path | None = None
        self._folder = ""
        closed = replace(rules, read=(), write=(), network=False, cpu=rules.cpu or math.ceil(code.seconds) + SPARE)
        try:
            run = jailed([find_monty_binary()], closed, cwd="/", private=private)
            if run.level.name == NONE:
                return
            self._folder = tempfile.mkdtemp(prefix="weft-code-", dir=_where())
            self.path = Path(self._folder) / "monty"
            self.path.write_text(f'#!/bin/sh\nexec {shlex.join(run.argv)} "$@"\n', encoding="utf-8")
            self.path.chmod(0o700)
        except OSError as error:
            self.close()
            raise ToolError(f"its processes cannot be started in a sandbox: {error}", code=UPSTREAM_FAILED) from None

    def close(self) -> None:
        """Remove it."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _where() -> str:
    """A folder whose programs may be run: the one for temporary files is not always."""
    folders = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), str(Path.home())]
    for folder in filter(None, folders):
        try:
            if not os.statvfs(folder).f_flag & os.ST_NOEXEC and os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    raise OSError(f"no program may be run in any of {', '.join(filter(None, folders))}")
