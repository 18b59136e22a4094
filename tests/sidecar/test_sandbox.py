"""Sandboxes: what a server may not read, reach and use up, at every level that this machine has; nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from weft.policy.model import Decision, Obligations
from weft.sidecar import sandbox
from weft.sidecar.guards import SandboxRules, guards_of
from weft.sidecar.pipeline import Call, Refusal
from weft.sidecar.sandbox import Level
from weft.sidecar.sandboxed import Sandboxed
from weft.testing.agents import eventually
from weft_protocols.errors import InvalidConfig, ToolError

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are Linux's")]

Said = Callable[[dict[str, Any]], str]
TESTS = str(Path(__file__).parent)
REFUSED = ("PermissionError", "FileNotFoundError", "OSError")
LEVELS = ("sandlock", "bubblewrap", "rlimits")
TRY = """
def tried(work):
    try:
        return work()
    except Exception as error:
        return type(error).__name__
"""


def have(level: str) -> None:
    """Skip where this machine does not have a level."""
    if level == "sandlock" and (fault := sandbox.sandlock_fault()):
        pytest.skip(fault)
    if level == "bubblewrap" and (fault := sandbox.bubblewrap_fault()):
        pytest.skip(fault)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One level, in which every server of the test runs."""
    have(request.param)
    monkeypatch.setattr(sandbox, "choose", lambda rules: Level(request.param, "the test wants it"))
    return str(request.param)


@pytest.fixture(params=LEVELS[:2])
def isolating(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, for the levels that isolate."""
    have(request.param)
    monkeypatch.setattr(sandbox, "choose", lambda rules: Level(request.param))
    return str(request.param)


@pytest.fixture
async def marked(stage: Any) -> AsyncIterator[Callable[[], list[int]]]:
    """The processes below this one that servers started; at the end of the test there are none."""
    mark = f"WEFT_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
    name, _, value = mark.partition("=")
    os.environ[name] = value

    def found() -> list[int]:
        pids = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if mark.encode() in (entry / "environ").read_bytes():
                        pids.append(int(entry.name))
                except OSError:
                    continue
        return pids

    yield found
    del os.environ[name]
    for server in list(stage.names):
        await stage.store.remove(server)
    await eventually(lambda: not found())


MARK = {"WEFT_TEST_MARK": "WEFT_TEST_MARK"}


async def test_only_listed_files_are_read_and_written(stage: Any, said: Said, isolating: str, tmp_path: Path) -> None:
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rules = {"read": [TESTS, str(tmp_path / "open")], "write": ["."]}
    server = await stage.runner(sandbox=rules)
    code = f"""{TRY}
import os
base = {str(tmp_path)!r}
result = [
    tried(lambda: open(base + '/open/file').read()),
    tried(lambda: open(base + '/closed/file').read()),
    tried(lambda: open(base + '/open/../closed/file').read()),
    tried(lambda: open('/proc/self/root' + base + '/closed/file').read()),
    tried(lambda: open(base + '/open/file', 'w').write('x')),
    tried(lambda: open('own', 'w').write('x')),
    tried(lambda: os.listdir(base)),
]
"""
    found = json.loads(said(await stage.run(server, code)))
    assert found[0] == "open"
    assert all(one in REFUSED for one in found[1:5]), found
    assert found[5] == 1
    assert found[6] == ["open"] or found[6] in REFUSED
    assert (tmp_path / "open" / "file").read_text() == "open"


async def test_without_rules_everything_is_read_but_keys_and_little_is_written(
    stage: Any, said: Said, isolating: str, mesh: Any
) -> None:
    server = await stage.runner()
    seeds = [str(one) for one in mesh.home.rglob("*.nk")] or [str(mesh.home)]
    outside = Path.home() / f".weft-test-{os.getpid()}"  # a checkout may be in /tmp, which is writable
    code = f"""{TRY}
import os
def environ():
    return open('/proc/{os.getpid()}/environ').read()
result = [
    tried(lambda: len(open({__file__!r}).read())),
    [tried(lambda: open(one).read() if not os.path.isdir(one) else os.listdir(one)) for one in {seeds!r}],
    tried(lambda: open('/etc/shadow').read()),
    tried(lambda: open({str(outside)!r}, 'w').write('x')),
    tried(environ),
    tried(lambda: open('own', 'w').write('x')),
]
"""
    found = json.loads(said(await stage.run(server, code)))
    assert found[0] > 100
    assert all(one in ("PermissionError", "FileNotFoundError", []) for one in found[1]), found
    assert found[2] in ("PermissionError", "")
    assert found[3] in ("PermissionError", "OSError")
    assert found[4] in ("PermissionError", "FileNotFoundError")
    assert found[5] == 1


async def test_the_network_is_switched_off(stage: Any, said: Said, isolating: str) -> None:
    with socket.socket() as listening, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hearing:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        hearing.bind(("127.0.0.1", 0))
        hearing.setblocking(False)
        code = f"""{TRY}
import socket
def connect():
    socket.create_connection(('127.0.0.1', {listening.getsockname()[1]}), timeout=2).close()
    return 'connected'
def send():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    return s.sendto(b'x', ('127.0.0.1', {hearing.getsockname()[1]}))
result = [tried(connect), tried(send)]
"""
        off = json.loads(said(await stage.run(await stage.runner(sandbox={"network": False}), code)))
        with pytest.raises(BlockingIOError):
            hearing.recv(1)
        on = json.loads(said(await stage.run(await stage.runner(), code)))
        assert hearing.recv(1) == b"x"
    assert on == ["connected", 1]
    assert off[0] != "connected"


@pytest.mark.soak  # it takes the whole machine for some seconds
async def test_a_fork_bomb_is_bounded_and_swept_away(stage: Any, level: str, marked: Any) -> None:
    server = await stage.runner(sandbox={"processes": 40}, timeout=2, env=MARK)
    # Where nothing but a look now and then bounds it, its children do not fork as well: others use this machine too.
    also = "True" if level == "sandlock" else "False"
    code = f"""
import os, time
if os.getpid() != os.getpgid(0):
    os.setsid()
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        if os.fork() == 0 and not {also}:
            break
    except OSError:
        time.sleep(0.01)
time.sleep(60)
"""
    most = 0
    begun = time.monotonic()
    call = asyncio.create_task(stage.run(server, code))

    def over() -> bool:
        nonlocal most
        most = max(most, len(marked()))
        return call.done()

    await eventually(over, timeout=20)
    await asyncio.wait((call,))
    assert not call.cancelled()
    assert call.exception() is None or isinstance(call.exception(), ToolError)
    if level == "sandlock":  # it is not ended for that, but gets no more
        assert most <= 45
    else:
        await eventually(lambda: not marked(), timeout=20)  # by itself
    assert time.monotonic() - begun < 15
    await stage.store.remove(server)
    await eventually(lambda: not marked(), timeout=20)


async def test_a_server_that_wants_too_much_memory_does_not_get_it(stage: Any, level: str, marked: Any) -> None:
    server = await stage.runner(sandbox={"memory": "128M"}, env=MARK)
    failed = ""
    try:
        result = await stage.run(server, "x = bytearray(600_000_000); result = len(x)")
        failed = result["content"][0]["text"] if result.get("isError") else ""
    except ToolError as error:
        failed = str(error)
    assert "MemoryError" in failed or "ended" in failed
    assert (await stage.run(server, "result = len(bytearray(10_000_000))")).get("isError") is not True


async def test_memory_of_all_its_processes_counts_together(stage: Any, level: str, marked: Any) -> None:
    server = await stage.runner(sandbox={"memory": "160M"}, env=MARK)
    code = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        try:
            x = bytearray(os.urandom(1) * 60_000_000)
            note('got it')
            time.sleep(2)
        finally:
            os._exit(0)
time.sleep(2)
result = 'still here'
"""
    with contextlib.suppress(ToolError):
        await stage.run(server, code)
    notes = stage.state(server) / "notes"
    assert len(notes.read_text().splitlines() if notes.exists() else ()) < 6


async def test_processor_time_is_bounded(stage: Any, level: str, marked: Any) -> None:
    server = await stage.runner(sandbox={"cpu": 1}, env=MARK)
    begun = time.monotonic()
    with pytest.raises(ToolError, match="ended"):
        await stage.run(server, "while True: pass")
    assert time.monotonic() - begun < 12


async def test_what_a_server_left_behind_in_other_sessions_goes_with_it(
    stage: Any, said: Said, level: str, marked: Any
) -> None:
    server = await stage.runner(env=MARK)
    code = """
import os, time
made = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.closerange(0, 3)
        time.sleep(300)
        os._exit(0)
    made.append(child)
result = made
"""
    await stage.run(server, code)
    await eventually(lambda: len(marked()) >= 4)
    await stage.store.remove(server)
    await eventually(lambda: not marked())


async def test_a_level_that_is_not_there_is_a_refusal(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "choose", lambda rules: Level("rlimits", "sandlock is not installed"))
    server = await stage.runner(sandbox={"level": "bubblewrap"})
    with pytest.raises(ToolError, match=r"must run in bubblewrap at least.*only rlimits.*sandlock is not installed"):
        await stage.run(server, "result = 1")
    assert not stage.started(server)


async def test_what_is_degraded_is_said(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.sidecar.upstream.choose", lambda rules: Level("rlimits", "neither is installed"))
    monkeypatch.setattr(sandbox, "choose", lambda rules: Level("rlimits", "neither is installed"))
    server = await stage.runner()
    states = (await stage.operate("weft/servers"))["servers"]
    [state] = [one for one in states if one["name"] == server]
    assert (state["sandbox"], state["degraded"]) == ("rlimits", "neither is installed")
    inspected = await stage.operate("weft/inspect", server=server)
    assert (inspected["sandbox"], inspected["degraded"]) == ("rlimits", "neither is installed")


async def test_the_policy_may_ask_for_a_stronger_level() -> None:
    call = Call(caller="a", server="s", method="tools/call", name="t", params={})
    wanted = Decision(True, obligations=Obligations(sandbox="bubblewrap"))
    for level, passes in (("sandlock", True), ("bubblewrap", True), ("rlimits", False), ("", False)):
        decided = await Sandboxed().before(replace(call, facts={"sandbox": level, "decision": wanted}))
        assert isinstance(decided, Refusal) is not passes


async def test_a_command_that_is_not_there_says_so(stage: Any, level: str) -> None:
    from weft.core.toolsconf import ToolServer

    name = f"gone-{level}"
    await stage.register(ToolServer(name, command=("/no/such/program",)))
    with pytest.raises(ToolError, match="/no/such/program"):
        await stage.run(name, "result = 1")


def test_switched_off_is_a_level_too() -> None:
    assert sandbox.choose(guards_of({"sandbox": False}).sandbox) == Level("none", "it is switched off")
    assert sandbox.choose(guards_of({"sandbox": False}).sandbox).degraded


@pytest.mark.parametrize(
    "rules",
    [{"level": "docker"}, {"memory": "lots"}, {"memory": 1}, {"network": "no"}, {"read": "/"}, {"proceses": 3},
     {"processes": 0}, "on"],
)  # fmt: skip
def test_rules_that_are_none_are_refused(rules: Any) -> None:
    with pytest.raises(InvalidConfig, match="sandbox"):
        guards_of({"sandbox": rules})


def test_sizes_have_units() -> None:
    assert guards_of({"sandbox": {"memory": "512M"}}).sandbox == SandboxRules(memory=512 * 1024 * 1024)
