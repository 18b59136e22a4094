"""Projects on disk, the `mesh` command as a process, and one running mesh for the tests that only use one."""

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest

from weft.cli.main import main
from weft.cli.supervisor.state import Record
from weft.core.broker import Broker, Delivered
from weft.core.home import process_started
from weft.testing.broker import start_test_mesh
from weft_protocols.errors import WeftError
from weft_protocols.subjects import GRAMMAR

T = TypeVar("T")
OWN_PROCESS = ("up", "run", "coordinator", "gateway", "sidecar", "mcp", "demo")

AGENT = '''
"""An agent for tests of the command line: what it does is in the message."""

import asyncio

from weft import Agent, Fail, Reject, Task
from weft_protocols.parts import File

agent = Agent("{name}", version="1.2.3", description="Does as it is told")


@agent.skill("do", tags=["test"])
async def do(task: Task) -> object:
    word, _, rest = task.text.strip().partition(" ")
    await task.update(f"doing {{word}}")
    match word:
        case "fail":
            raise Fail("it cannot be done")
        case "reject":
            raise Reject("not like this")
        case "ask":
            answer = await task.ask("which colour?")
            return f"it is {{answer.text}}"
        case "wait":
            await asyncio.sleep(float(rest))
            return "waited"
        case "file":
            await task.artifact("report", File("../../report.txt", b"the report", media_type="text/plain"))
            await task.artifact("notes.md", "# Notes")
            return "written"
        case "data":
            return {{"got": task.data, "files": [[f.name, len(f.content or b"")] for f in task.files]}}
        case "escape":
            return "\\x1b[31mred\\x07"
    return f"echo {{task.text}}"


@agent.skill("shout")
async def shout(text: str) -> str:
    return text.upper()
'''


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The error object on standard error."""
        found: dict[str, Any] = json.loads(self.err.splitlines()[-1])["error"]
        return found


@dataclass(slots=True)
class Project:
    """A project folder and the command run in it."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / ".weft"

    def write(self, config: str, **agents: str) -> None:
        """Write mesh.yaml and the files of agents; without a gateway, which takes long to start, unless it has one."""
        if "gateway:" not in config:
            config = f"{config.rstrip()}\ngateway: false\n"
        (self.folder / "agents").mkdir(parents=True, exist_ok=True)
        (self.folder / "mesh.yaml").write_text(config, encoding="utf-8")
        for name, source in agents.items():
            (self.folder / "agents" / f"{name}.py").write_text(source, encoding="utf-8")

    def permit(self, rules: str, *, file: str = "policies/rules.cedar") -> None:
        """Write rules."""
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / file).write_text(rules, encoding="utf-8")

    def mesh(self, *arguments: str, code: int | None = 0, said: str = "", timeout: float = 30.0) -> Result:
        """Run `mesh` with these arguments and expect this exit code; `said` goes to its standard input.

        Within this process, which saves half a second of imports; a command that runs on gets one of its own.
        """
        if arguments and arguments[0] in OWN_PROCESS and arguments[1:2] not in (("status",), ("rebuild",)):
            return self.process(*arguments, code=code, said=said, timeout=timeout)
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self.folder),
            mock.patch.dict(os.environ, self.environment, clear=True),
            mock.patch("sys.stdin", io.StringIO(said)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            ended = main(arguments)
        result = Result(ended, out.getvalue(), err.getvalue())
        assert code is None or result.code == code, result
        return result

    def process(self, *arguments: str, code: int | None = 0, said: str = "", timeout: float = 30.0) -> Result:
        """Like `mesh`, in a process of its own."""
        run = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            input=said,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        result = Result(run.returncode, run.stdout, run.stderr)
        assert code is None or result.code == code, result
        assert "Traceback" not in result.err
        return result

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "weft.cli.main", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("WEFT_")}
        return {**own, **self.env}

    def rows(self) -> dict[str, dict[str, Any]]:
        """`mesh ps` by name."""
        return {row["name"]: row for row in self.mesh("ps", "-o", "json").json}

    @property
    def supervisor(self) -> int:
        record = Record.read(self.home)
        assert record is not None
        return record.pid

    def processes(self) -> list[int]:
        """Every living process that belongs to this project, whoever its parent is."""
        marks = (f"WEFT_HOME={self.home}\0".encode(), f"{self.home}/broker/nats.conf".encode())
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or process_started(int(entry.name)) is None:
                continue
            try:
                told = (entry / "environ").read_bytes() + b"\0" + (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if any(mark in told for mark in marks):
                found.append(int(entry.name))
        return found

    def clean(self) -> None:
        """Stop what runs; nothing may be left."""
        record = Record.read(self.home)
        if record is not None and record.alive:
            self.mesh("down", code=None)
            if record.alive:
                os.kill(record.pid, signal.SIGKILL)
        until(lambda: not self.processes())


def until(check: Callable[[], T], timeout: float = 15.0) -> T:
    """What `check` returns once it is true; for what tells nobody when it changes."""
    deadline = time.monotonic() + timeout
    while not (found := check()):
        assert time.monotonic() < deadline, f"{check} stayed false for {timeout} s"
        time.sleep(0.02)
    return found


@pytest.fixture(name="until")
def until_fixture() -> Callable[..., Any]:
    return until


@pytest.fixture(scope="session")
def project_class() -> type[Project]:
    """For a mesh of a module's own."""
    return Project


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """An empty project folder."""
    made = Project(tmp_path / "project")
    made.folder.mkdir()
    yield made
    made.clean()


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A mesh with two replicas of agent `worker`, for tests that leave its processes alone."""
    made = Project(tmp_path_factory.mktemp("running"))
    made.write(
        "name: shared\nagents:\n  worker: {run: agents/worker.py:agent, replicas: 2}\n",
        worker=AGENT.format(name="worker"),
    )
    made.mesh("up", "--detach", timeout=50)
    yield made
    made.clean()


@pytest.fixture(scope="session")
def agent_source() -> str:
    """Source of the test agent, with `{name}` in it."""
    return AGENT


class Stub:
    """Answers operations by name, and keeps what was asked: (operation, caller, body)."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, str, Any]] = []

    def listen(self, broker: Broker) -> Any:
        def answer(message: Delivered) -> None:
            _, _, operation, caller = message.subject.split(".")
            self.asked.append((operation, caller, json.loads(message.data or b"{}")))
            missing = {"error": {"type": "MethodNotFound", "message": f"there is no operation {operation}"}}
            broker.send(message.reply, json.dumps(self.answers.get(operation, missing)).encode())

        return broker.subscribe(GRAMMAR["coord"].wildcard, answer)


@contextlib.contextmanager
def stubbed(home: Path) -> Iterator[Stub]:
    """The stub at work on a broker of its own, in a thread beside the test."""
    stub, ready, stop = Stub(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    failed: list[BaseException] = []

    async def serve() -> None:
        async with await start_test_mesh([], home=home) as mesh:
            broker = await mesh.connect("coordinator")
            await stub.listen(broker)
            await broker.flush()
            ready.set()
            await stop.wait()
            await broker.close()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        except (OSError, WeftError) as error:
            failed.append(error)
        finally:
            loop.close()
            ready.set()

    thread = threading.Thread(target=run, name="coordinator of a test")
    thread.start()
    try:
        assert ready.wait(20)
        assert not failed, failed
        yield stub
    finally:
        if not failed:
            loop.call_soon_threadsafe(stop.set)
        thread.join(20)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stub, Path]]:
    """The stub, and the folder of its mesh."""
    folder = tmp_path_factory.mktemp("stub")
    with stubbed(folder / ".weft") as made:
        yield made, folder
