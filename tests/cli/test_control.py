"""The supervisor's control socket."""

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from weft.cli.errors import AlreadyRunning, NotFound
from weft.cli.supervisor.control import ControlServer, Tell, call
from weft.cli.supervisor.state import Lock, Record, clear_stale, forget, socket_path
from weft.core.home import make_private_directory, process_started
from weft_protocols.errors import DeadlineExceeded, Unavailable, UsageError, WeftError

pytestmark = pytest.mark.anyio


released = asyncio.Event()


async def operate(operation: str, arguments: dict[str, Any], tell: Tell) -> Any:
    """Operations of a test's supervisor."""
    match operation:
        case "echo":
            tell("first")
            tell("second")
            return arguments
        case "refuse":
            raise {"usage": UsageError, "missing": NotFound, "other": WeftError}[arguments["how"]]("because")
        case "break":
            return arguments["a bug"]
        case "hang":
            await released.wait()
    raise UsageError(f"no operation {operation}")


@asynccontextmanager
async def serving(home: Path) -> AsyncIterator[Path]:
    make_private_directory(home)
    path = socket_path(home)
    async with asyncio.TaskGroup() as group:
        control = ControlServer(path, operate, group=group)
        await control.start()
        Record(os.getpid(), process_started(os.getpid()) or "", str(path), "digest").write(home)
        try:
            yield path
        finally:
            control.hang_up()
            await control.close()
            forget(home)


async def test_an_operation_is_answered_after_its_progress(tmp_path: Path) -> None:
    told: list[str] = []
    async with serving(tmp_path / "h"):
        result = await asyncio.to_thread(call, tmp_path / "h", "echo", tell=told.append, a=1, b="x")
    assert result == {"a": 1, "b": "x"}
    assert told == ["first", "second"]


async def test_the_socket_is_private(tmp_path: Path) -> None:
    async with serving(tmp_path / "h") as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


@pytest.mark.parametrize(("how", "error"), [("usage", UsageError), ("missing", NotFound), ("other", WeftError)])
async def test_a_refusal_keeps_its_kind(how: str, error: type[WeftError], tmp_path: Path) -> None:
    async with serving(tmp_path / "h"):
        with pytest.raises(error, match="because") as caught:
            await asyncio.to_thread(call, tmp_path / "h", "refuse", how=how)
        assert type(caught.value) is error


async def test_a_supervisor_that_is_silent_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    async with serving(tmp_path / "h"):
        with pytest.raises(DeadlineExceeded, match=r"is silent for 0\.2 s"):
            await asyncio.to_thread(call, tmp_path / "h", "hang", timeout=0.2)
        released.set()


@pytest.mark.parametrize("request_line", [b"nonsense\n", b"[]\n", b"{}\n", b'{"op": 1}\n', b"\xff\n"])
async def test_nonsense_is_refused_and_harms_nobody(request_line: bytes, tmp_path: Path) -> None:
    async with serving(tmp_path / "h") as path:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(request_line)
        assert json.loads(await reader.readline())["error"]["type"] == "UsageError"
        writer.close()
        assert await asyncio.to_thread(call, tmp_path / "h", "echo") == {}


async def test_a_bug_in_an_operation_is_told_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path / "h"):
        with pytest.raises(WeftError, match="KeyError: 'a bug'"):
            await asyncio.to_thread(call, tmp_path / "h", "break")
        assert await asyncio.to_thread(call, tmp_path / "h", "echo") == {}
    assert "an operation of the control socket failed" in caplog.text


async def test_whoever_hangs_up_does_not_end_the_supervisor(tmp_path: Path) -> None:
    async with serving(tmp_path / "h") as path:
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"op": "echo"}\n')
        writer.transport.abort()
        assert await asyncio.to_thread(call, tmp_path / "h", "echo") == {}


async def test_a_connection_that_says_nothing_does_not_keep_the_supervisor(tmp_path: Path) -> None:
    async with asyncio.timeout(5):
        async with serving(tmp_path / "h") as path:
            reader, writer = await asyncio.open_unix_connection(path)
            assert await asyncio.to_thread(call, tmp_path / "h", "echo") == {}
        assert await reader.read() is not None
        writer.close()


async def test_a_path_too_long_for_a_socket_gets_one_elsewhere(tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30)
    async with serving(home) as path:
        assert len(os.fsencode(path)) < 104
        assert path.parent.stat().st_mode & 0o077 == 0
        assert await asyncio.to_thread(call, home, "echo", x=1) == {"x": 1}
    assert not path.parent.exists()


def test_a_mesh_that_does_not_run_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="not running; start it with `mesh up`"):
        call(tmp_path, "ps")


def test_a_supervisor_that_does_not_listen_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as unheard:
        unheard.bind(str(path))
        Record(os.getpid(), process_started(os.getpid()) or "", str(path), "").write(tmp_path)
        with pytest.raises(Unavailable, match="cannot be reached"):
            call(tmp_path, "ps")


def test_only_one_holds_the_lock_and_the_other_is_told_who(tmp_path: Path) -> None:
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.acquire()
    Record(4711, "1", "", "").write(tmp_path)
    with pytest.raises(AlreadyRunning, match=r"already running \(pid 4711\)"):
        second.acquire()
    clear_stale(tmp_path)
    assert Record.read(tmp_path) is not None, "the record of a running supervisor is not stale"
    first.release()
    second.acquire()
    second.release()
    clear_stale(tmp_path)
    assert Record.read(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "started": 1}'])
def test_a_damaged_record_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "supervisor.json").write_text(content)
    assert Record.read(tmp_path) is None
