"""The whole demo: real processes, a real broker, a real SIGKILL."""

import asyncio
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from weft.core.home import process_started
from weft.core.serverproc import exited
from weft_agents.library.review.run import FEWEST_TASKS, default_path, run_demo
from weft_agents.library.review.survey import survey
from weft_protocols.errors import Unavailable, UsageError

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc"),
]

DEADLINE = 50.0


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder and a folder for temporary files; nothing may be left in either."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.delenv("WEFT_HOME", raising=False)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = children_of(os.getpid()).keys()
    yield here
    assert list(temporary.iterdir()) == []
    assert children_of(os.getpid()).keys() <= before


def generate(folder: Path, files: int) -> list[str]:
    """A small repository: modules with work in them, tests, and something of everything that is skipped."""
    body = "".join(
        f"def f{i}(a, b=[]):\n" + "".join(f"    if a == {j} and b:\n        a += {j}\n" for j in range(40))
        for i in range(25)
    )
    paths = [f"src/pkg/module_{i:02}.py" for i in range(files - 1)] + ["tests/test_module_00.py"]
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(body, encoding="utf-8")
    (folder / "src" / "pkg" / "blob.py").write_bytes(b"\0\0")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "other.py").write_text("x = 1\n", encoding="utf-8")
    return paths


def children_of(parent: int) -> dict[int, str]:
    """Command lines of the living children of a process, by pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, ppid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(ppid) == parent and state not in "ZX":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def files_in(report: str) -> list[str]:
    section = report.split("\n## All files\n")[1]
    return [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]


async def test_a_killed_analyst_costs_nothing(tmp_path: Path, workplace: Path) -> None:
    paths = generate(tmp_path / "repo", 40)
    out = io.StringIO()
    async with asyncio.timeout(DEADLINE):
        assert await run_demo(tmp_path / "repo", yes=True, out=out) == 0
    shown = out.getvalue()
    report = (workplace / "weft-review.md").read_text(encoding="utf-8")

    assert files_in(report) == sorted(paths)
    assert "| `src/pkg/blob.py` | binary |" in report
    assert ".venv/other.py" not in report

    victim = re.search(r"Killed (analyst-\d) \(pid (\d+)\) with SIGKILL while it worked on (\d) tasks", shown)
    assert victim is not None, shown
    moved = re.findall(rf"(analyst-\d) takes over task ([0-9a-f]{{8}}) from {victim[1]} ", shown)
    assert moved, shown
    assert victim[1] not in {by for by, _ in moved}
    # Two or more tasks changed hands, and the report names each with its second attempt.
    attempts = report.split("Tasks that needed another attempt:")[1]
    assert all(f"| `{task}` |" in attempts for _, task in moved)
    assert "All 40 tasks ended, each exactly once." in shown
    assert "Answered 'risks' (--yes)" in shown
    assert f"Report: {workplace / 'weft-review.md'}" in shown
    assert "\x1b" not in shown


async def test_with_little_work_nobody_is_killed_and_the_summary_says_so(tmp_path: Path) -> None:
    generate(tmp_path / "repo", FEWEST_TASKS - 1)
    out, report = io.StringIO(), tmp_path / "other.md"
    async with asyncio.timeout(DEADLINE):
        assert await run_demo(tmp_path / "repo" / "src", yes=True, out=out, report=report) == 0
    assert "Nobody was killed: with 10 tasks the work was over too soon." in out.getvalue()
    assert "takes over" not in out.getvalue()
    assert len(files_in(report.read_text(encoding="utf-8"))) == FEWEST_TASKS - 2


async def test_one_file_can_be_reviewed_whatever_mesh_the_environment_names(
    tmp_path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(tmp_path / "repo", 3)
    monkeypatch.setenv("WEFT_URL", "nats://127.0.0.1:1")
    monkeypatch.setenv("WEFT_SEED_FILE", str(tmp_path / "no.nk"))
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "no"))
    monkeypatch.setenv("WEFT_IDENTITY", "somebody")
    async with asyncio.timeout(DEADLINE):
        await run_demo(tmp_path / "repo" / "src" / "pkg" / "module_01.py", yes=False, out=io.StringIO())
    assert files_in((workplace / "weft-review.md").read_text(encoding="utf-8")) == ["module_01.py"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "there is no such file or folder"),
        ("notes.txt", "is not a Python file"),
        ("empty", r"no Python file to review in .*empty; name another path: mesh demo PATH"),
        ("blob.py", r"blob\.py is skipped: binary"),
        ("vendor-only", r"node_modules/ is skipped: vendored"),
    ],
)
async def test_a_path_without_code_is_refused_before_anything_starts(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    (tmp_path / "blob.py").write_bytes(b"\0")
    (tmp_path / "vendor-only" / "node_modules").mkdir(parents=True)
    out = io.StringIO()
    with pytest.raises(UsageError, match=reason):
        await run_demo(tmp_path / name, yes=True, out=out)
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("report", "reason"),
    [("here", "is a folder; name a file"), ("no/where.md", "there is no folder")],
)
async def test_a_report_that_cannot_be_written_is_refused_before_anything_starts(
    tmp_path: Path, report: str, reason: str
) -> None:
    generate(tmp_path / "repo", 2)
    with pytest.raises(UsageError, match=reason):
        await run_demo(tmp_path / "repo", yes=True, out=io.StringIO(), report=tmp_path / report)


class Watched(io.StringIO):
    """Output that tells when something was said."""

    def __init__(self, wanted: str) -> None:
        super().__init__()
        self.said = asyncio.Event()
        self._wanted = wanted

    def write(self, text: str) -> int:
        if self._wanted in text:
            self.said.set()
        return super().write(text)


async def test_a_demo_that_cannot_go_on_says_which_process_ended(tmp_path: Path) -> None:
    generate(tmp_path / "repo", 60)
    out = Watched("The surveyor found")

    async def fails() -> None:
        with pytest.raises(Unavailable, match=r"the demo cannot go on: editor ended with signal 9"):
            await run_demo(tmp_path / "repo", yes=True, out=out)

    async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
        group.create_task(fails())
        await out.said.wait()
        [editor] = [pid for pid, line in children_of(os.getpid()).items() if line.endswith(":editor ")]
        os.kill(editor, signal.SIGKILL)


async def started_demo(tmp_path: Path) -> tuple[asyncio.subprocess.Process, dict[int, str]]:
    """The demo as a process of its own, in the middle of its work, and its children."""
    program = (
        "import asyncio, sys; from pathlib import Path\n"
        "from weft_agents.library.review.run import run_demo\n"
        "sys.exit(asyncio.run(run_demo(Path(sys.argv[1]), yes=True, out=sys.stdout)))\n"
    )
    demo = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        str(tmp_path / "repo"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert demo.stdout is not None
    while b"The surveyor found" not in (line := await demo.stdout.readline()):
        assert line, (await demo.communicate())[1].decode()
    return demo, children_of(demo.pid)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
async def test_a_signal_ends_the_demo_and_everything_it_started(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    generate(tmp_path / "repo", 60)
    async with asyncio.timeout(DEADLINE):
        demo, children = await started_demo(tmp_path)
        assert len(children) >= 6
        demo.send_signal(number)
        await demo.communicate()
    assert demo.returncode == code
    assert [pid for pid in children if process_started(pid) is not None] == []


async def test_killing_the_demo_ends_everything_it_started(tmp_path: Path) -> None:
    generate(tmp_path / "repo", 60)
    async with asyncio.timeout(DEADLINE):
        demo, children = await started_demo(tmp_path)
        demo.kill()
        await demo.communicate()
        for pid in children:
            await exited(pid)
    # Nobody was there to remove it.
    [home] = (tmp_path / "tmp").iterdir()
    await asyncio.to_thread(shutil.rmtree, home)


def test_the_default_is_the_code_of_weft_itself() -> None:
    found = survey(default_path())
    assert [file.path for file in found.files if file.path.endswith("core/broker.py")]
