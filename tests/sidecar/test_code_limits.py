"""Code that wants out, or more than it may: it gets nothing, ends within its limits, and disturbs nobody."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from weft.testing.agents import eventually
from weft_protocols.errors import DeadlineExceeded, ToolError

pytestmark = pytest.mark.anyio
pytest.importorskip("pydantic_monty", reason="needs the extra `code`")

SHORT: dict[str, Any] = {"seconds": 0.5, "memory": "32M", "calls": 5, "output": 4096}


def workers() -> set[int]:
    """Processes of Monty below this one, in whatever sandbox."""
    below: dict[int, list[int]] = {}
    named = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        state, parent = rest.split()[:2]
        below.setdefault(int(parent), []).append(int(entry.name))
        if name.startswith("monty") and state != "Z":
            named.add(int(entry.name))
    found: set[int] = set()
    left = [os.getpid()]
    while left:
        own = below.get(left.pop(), [])
        left += own
        found.update(named.intersection(own))
    return found


def computing() -> bool:
    """Whether one of them has computed for a while: until code runs in it, a process waits for its first call."""
    for pid in workers():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[11]) + int(fields[12]) >= 10:  # hundredths of a second
            return True
    return False


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def problem(result: dict[str, Any]) -> dict[str, Any]:
    assert result["isError"] is True, result
    return dict(result["structuredContent"]["error"])


# What it cannot reach ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "open('/etc/passwd').read()",
        "open('/tmp/x', 'w')",
        "from pathlib import Path\nPath('/etc/passwd').read_text()",
        "from pathlib import Path\nlist(Path('/').iterdir())",
        "import os\nos.listdir('/')",
        "import os\nos.environ['HOME']",
        "import os\nos.getenv('HOME')",
        "import os\nos.system('id')",
        "import os\nos.fork()",
        "import os\nos.kill(1, 9)",
        "import socket",
        "import subprocess",
        "import ctypes",
        "import importlib",
        "import weft",
        "import pydantic_monty",
        "__import__('os').system('id')",
        "().__class__.__bases__",
        "type(()).__mro__",
        "getattr((), '__class__').__base__",
        "(lambda: 0).__globals__",
        "(lambda: 0).__code__",
        "tools.__class__.__init__.__globals__",
        "tools.__dict__",
        "getattr(tools, '__module__').x",
        "call.__globals__",
        "call.__self__",
        "ToolError.__subclasses__()",
        "eval('__import__(\"os\")')",
        "exec('import socket')",
        "globals()['__builtins__']",
        "breakpoint()",
        "input()",
        "compile('1', '', 'eval')",
        "memoryview(b'x')",
        "try:\n    1/0\nexcept Exception as e:\n    e.__traceback__.tb_frame",
    ],
)
async def test_nothing_outside_can_be_reached(stage: Any, source: str) -> None:
    found = problem(await stage.python(await stage.code(code=SHORT), source))
    assert found["kind"] in ("exception", "syntax"), found
    assert found["type"] in (
        "AttributeError", "ModuleNotFoundError", "ImportError", "NameError", "NotImplementedError", "PermissionError",
        "RuntimeError", "TypeError",
    )  # fmt: skip
    assert not (Path("/tmp") / "x").exists()


async def test_what_one_run_leaves_the_next_does_not_find(stage: Any) -> None:
    server = await stage.code()
    await stage.python(server, "secret = 1")
    assert problem(await stage.python(server, "secret"))["type"] == "NameError"


# Limits --------------------------------------------------------------------------------------------

ENDLESS = {
    "a loop": ("while True: pass", "code.seconds"),
    "a loop that catches everything": (
        "while True:\n try:\n  while True: pass\n except BaseException: pass",
        "code.seconds",
    ),
    "a loop in finally": ("try:\n while True: pass\nfinally:\n while True: pass", "code.seconds"),
    "a sum": ("sum(range(10**12))", "code.seconds"),
    "memory": ("x = []\nwhile True: x.append('a' * 100000 + str(len(x)))", "code.memory"),
    "memory at once": ("'a' * 10**10", "code.memory"),
    "a list at once": ("[0] * 10**9", "code.memory"),
    "a power": ("10 ** 10**8", "code.memory"),
    "a format": ("f'{1:>1000000000}'", "code.memory"),
    "a replacement": ("('a' * 10**6).replace('a', 'b' * 10**6)", "code.memory"),
    "a join": ("','.join(['x' * 10**6] * 10000)", "code.memory"),
    "a large result": ("list(range(10**6))", "code.memory"),
    "a large argument": ("call('x.y', a='x' * (20 * 10**6))", "code.memory"),
    "recursion": ("def f(n): return f(n + 1)\nf(0)", "code.recursion"),
    "print": ("while True: print('x' * 100)", "code.output"),
    "one large print": ("print('x' * 10**6)", "code.output"),
    "a result": ("'x' * 5000", "code.output"),
    "a result in parts": ("[[1, 2, 3, 4, 5, 6]] * 1000", "code.output"),
    "names": ("while True:\n try:\n  tools.gone\n except AttributeError: pass", "code.calls"),
}
HARMLESS = {
    "a regular expression": ("import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')", "none"),
    "another": ("import re\nre.match(r'(a|aa)+$', 'a' * 60 + 'b')", "none"),
    "digits": ("len(str(7 ** 200000))", "ValueError"),
    "nested text": ("eval('(' * 10000)", "SyntaxError"),
    "nested json": ("import json\njson.loads('[' * 100000)", "json.JSONDecodeError"),
}


@pytest.mark.parametrize("what", ENDLESS)
async def test_a_run_ends_within_its_limits_and_says_which(stage: Any, what: str) -> None:
    source, limit = ENDLESS[what]
    server = await stage.code(code=SHORT)
    begun = time.monotonic()
    found = problem(await stage.python(server, source))
    assert (found["kind"], found.get("limit")) == ("limit", limit), found
    assert time.monotonic() - begun < 5.0


@pytest.mark.parametrize("what", HARMLESS)
async def test_what_elsewhere_takes_for_ever_does_not(stage: Any, what: str) -> None:
    source, ends = HARMLESS[what]
    result = await stage.python(await stage.code(code=SHORT), source)
    if ends == "none":
        assert result["structuredContent"] == {"result": None}
    else:
        assert problem(result)["type"] == ends


async def test_functions_within_each_other_are_as_many_as_is_set(stage: Any) -> None:
    server = await stage.code(code={"recursion": 20})
    deep = "def f(n):\n    return n and f(n - 1)\nf({})"
    assert (await stage.python(server, deep.format(10)))["structuredContent"] == {"result": 0}
    assert problem(await stage.python(server, deep.format(30)))["limit"] == "code.recursion"


async def test_what_does_not_look_at_the_clock_is_killed(stage: Any) -> None:
    found = problem(await stage.python(await stage.code(code=SHORT), "x = 3\nwhile True: x = x * x"))
    assert found["kind"] == "limit"
    assert found["limit"] in ("code.seconds", "code.memory")
    await eventually(lambda: not workers())


async def test_the_number_of_calls_is_limited_and_refused_ones_count(stage: Any) -> None:
    server, other = await stage.code(code=SHORT), await stage.runner()
    source = f"""
done = 0
while True:
    try:
        call('{other}.' + ('run' if done % 2 else 'gone'), code="result = note('called')")
    except ToolError:
        pass
    done += 1
"""
    found = problem(await stage.python(server, source))
    assert found["limit"] == "code.calls"
    assert len((stage.state(other) / "notes").read_text().splitlines()) == 2


async def test_what_it_printed_before_is_told_when_it_is_ended(stage: Any) -> None:
    result = await stage.python(await stage.code(code=SHORT), "print('so far')\nwhile True: pass")
    assert result["content"][0]["text"] == "so far\n"
    assert "it computed for more than 0.5 s (limit: code.seconds)" in result["content"][1]["text"]


@pytest.mark.parametrize("source", ["import time\ntime.sleep(1000)", "import asyncio\nawait asyncio.sleep(1000)"])
async def test_sleeping_is_bounded_by_the_whole_call(stage: Any, source: str) -> None:
    found = problem(await stage.python(await stage.code(timeout=1), source))
    assert found["limit"] == "timeout"
    short = await stage.python(await stage.code(code=SHORT), source.replace("1000", "0.8"))
    assert "isError" not in short  # waiting is no computing


async def test_the_time_of_other_tools_counts_for_the_whole_only(stage: Any) -> None:
    server, other = await stage.code(timeout=3, code=SHORT), await stage.runner()
    slow = f"call('{other}.run', code='import time; time.sleep({{}})')"
    assert "isError" not in await stage.python(server, slow.format(1))
    assert problem(await stage.python(server, slow.format(60)))["limit"] == "timeout"


# Others --------------------------------------------------------------------------------------------


async def test_nobody_is_disturbed_and_the_sidecar_never_stands_still(stage: Any, turns: Any) -> None:
    server = await stage.code(code={**SHORT, "seconds": 1})
    async with turns, asyncio.TaskGroup() as group:
        bad = [group.create_task(stage.python(server, source)) for source, _ in ENDLESS.values()]
        good = [group.create_task(stage.python(server, f"sum(range({n}))")) for n in range(20)]
    assert [one.result()["structuredContent"]["result"] for one in good] == [sum(range(n)) for n in range(20)]
    assert all(one.result()["isError"] for one in bad)
    assert turns.count > 10 * turns.took  # what blocks the loop does so for as long as code runs


async def test_a_worker_that_dies_fails_its_call_only(stage: Any) -> None:
    server, other = await stage.code(), await stage.runner()
    waits = "note('here')\nimport time\nwhile not (STATE / 'go').exists(): time.sleep(0.01)"
    dying = asyncio.create_task(stage.python(server, f"call('{other}.run', code=waits)", waits=waits))
    await eventually((stage.state(other) / "notes").exists)
    [pid] = workers()
    living = asyncio.create_task(stage.python(server, "import time\ntime.sleep(0.3)\n'alive'"))
    os.kill(pid, 9)
    (stage.state(other) / "go").touch()
    assert problem(await dying)["kind"] == "crash"
    assert (await living)["structuredContent"] == {"result": "alive"}
    assert (await stage.python(server, "1"))["structuredContent"] == {"result": 1}


async def test_what_is_killed_from_outside_leaves_no_code_that_runs(stage: Any) -> None:
    """Whoever kills what looks after a worker, as Monty's pool does, has killed the worker."""
    server, other = await stage.code(code={"seconds": 300}), await stage.runner()
    source = f"call('{other}.run', code=\"note('here')\")\nwhile True: pass"
    dying = asyncio.create_task(stage.python(server, source))
    await eventually((stage.state(other) / "notes").exists)
    [pid] = workers()
    around = parent_of(pid)
    assert around != os.getpid(), "it runs in no sandbox"
    os.kill(around, 9)
    assert problem(await dying)["kind"] == "crash"
    await eventually(lambda: not alive(pid))


PROBE = """#!{python}
import os, pathlib, socket, sys
def tried(what):
    try:
        what()
    except OSError as error:
        return "no"
    return "yes"
print(*sys.argv[1:])
print("read", tried(lambda: open("{secret}").read()))
print("write", tried(lambda: open("{folder}/written", "w").write("x")))
print("temporary", tried(lambda: open("/tmp/weft-written", "w").write("x")))
print("connect", tried(lambda: socket.create_connection(("127.0.0.1", {port}), timeout=2)))
"""


def test_a_worker_reaches_neither_files_nor_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were there a way out of Monty, the process would be of little use."""
    from weft.sidecar.code.worker import Worker
    from weft.sidecar.guards import CodeRules, SandboxRules
    from weft.sidecar.sandbox import choose

    if choose(SandboxRules()).degraded:
        pytest.skip("this machine has no sandbox that keeps files and network away")
    secret, program = tmp_path / "secret", tmp_path / "bin" / "monty"
    secret.write_text("s")
    program.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = PROBE.format(python=sys.executable, secret=secret, folder=tmp_path, port=server.getsockname()[1])
        program.write_text(text)
        program.chmod(0o755)
        assert "no" not in subprocess.run([program, "x"], capture_output=True, text=True, check=True).stdout
        monkeypatch.setenv("MONTY_BIN", str(program))
        worker = Worker(SandboxRules(), CodeRules())
        assert worker.path is not None
        run = subprocess.run([worker.path, "a b"], capture_output=True, text=True, check=False)
        worker.close()
    assert run.stdout.splitlines() == ["a b", "read no", "write no", "temporary no", "connect no"], run.stderr
    assert not worker.path.parent.exists()


def test_where_it_may_run_without_it_says_so_and_where_it_must_not_it_does_not_start() -> None:
    from weft.sidecar.code.worker import Worker
    from weft.sidecar.guards import CodeRules, SandboxRules
    from weft.sidecar.sandbox import Level

    assert Worker(SandboxRules(off=True), CodeRules()).path is None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("weft.sidecar.sandbox.choose", lambda _: Level("rlimits", "for the test"))
        with pytest.raises(ToolError, match="must run in sandlock at least, and there is only rlimits"):
            Worker(SandboxRules(level="sandlock"), CodeRules())


@pytest.mark.parametrize("source", ["while True: pass", "call(other, code='import time; time.sleep(60)')"])
async def test_leaving_ends_it(stage: Any, source: str) -> None:
    server, other = await stage.code(code={"seconds": 300}), await stage.runner()
    running = asyncio.create_task(stage.python(server, source, other=f"{other}.run"))
    await eventually(lambda: computing() or stage.service.plane.servers[other].upstream.state["busy"])
    running.cancel()
    await asyncio.wait((running,))
    await eventually(lambda: not workers())


async def test_the_callers_deadline_ends_it(stage: Any) -> None:
    server = await stage.code(code={"seconds": 300})
    try:
        found = problem(await stage.python(server, "while True: pass", deadline=time.time() + 1))
        assert found["limit"] == "timeout"
    except DeadlineExceeded:
        pass
    await eventually(lambda: not workers())


async def test_code_that_takes_too_long_does_not_switch_the_server_off(stage: Any) -> None:
    server = await stage.code(timeout=1, failures=1)
    problem(await stage.python(server, "import time\ntime.sleep(9)"))
    assert (await stage.python(server, "1"))["structuredContent"] == {"result": 1}


async def test_removing_the_server_ends_what_runs(stage: Any) -> None:
    server = await stage.code(code={"seconds": 300})
    running = asyncio.create_task(stage.python(server, "while True: pass"))
    await eventually(computing)
    await stage.store.remove(server)
    with pytest.raises(ToolError, match="ended"):
        await running
    await eventually(lambda: not workers())


async def test_a_hundred_runs_leave_no_process(stage: Any) -> None:
    server = await stage.code(code={"seconds": 0.2})
    sources = ["1", "1/0", "x =", "'a' * 10**10", "print(1)"]
    for n in range(10):
        async with asyncio.TaskGroup() as group:
            for m in range(10):
                group.create_task(stage.python(server, sources[(n + m) % len(sources)]))
    await eventually(lambda: not workers())


async def test_the_least_and_the_most_that_can_be_set(stage: Any) -> None:
    for wrong in ({"memory": "1G"}, {"seconds": 0}, {"recursion": 10_000}, {"calls": -1}, {"output": 1}, {"second": 1}):
        server = await stage.code(code=wrong)
        with pytest.raises(ToolError, match=rf"code\.?.*{next(iter(wrong))}"):
            await stage.python(server, "1")


async def test_without_a_free_process_a_call_is_told_to_come_again() -> None:
    from weft.sidecar.code.journal import Journals
    from weft.sidecar.code.link import CodeLink
    from weft.sidecar.guards import Guards
    from weft.sidecar.inside import InName
    from weft.sidecar.pipeline import Call, Refused
    from weft.sidecar.settings import Limits
    from weft_protocols.mcp import BUSY

    def call(source: str) -> Call:
        params = {"name": "run", "arguments": {"code": source}}
        return Call("local", "code", "tools/call", "run", params, deadline=time.time() + 20)

    limits = Limits(concurrency=1, queue_timeout=0.2)
    link = await CodeLink.start(limits, Journals(None), Guards())  # type: ignore[arg-type]
    await eventually(lambda: not workers())  # that of its start
    within = InName(None, call("1"))  # type: ignore[arg-type]
    first = asyncio.create_task(link.perform(call("import time\ntime.sleep(9)"), within))
    await eventually(workers)
    with pytest.raises(Refused, match="no process is free") as refused:
        await link.perform(call("1"), within)
    assert (refused.value.code, refused.value.refusal.in_band) == (BUSY, True)
    first.cancel()
    await asyncio.wait((first,))
    assert (await link.perform(call("1"), within))["structuredContent"] == {"result": 1}
    await link.aclose()
