"""The three agents against a real broker: replicas in this process, one client."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from weft.client.mesh import Mesh
from weft.host.agent import Agent
from weft.testing import agents
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft_agents.library.review.agents import QUESTION, REPORT, analyst, editor, surveyor
from weft_agents.library.review.analysis import FileReview
from weft_agents.library.review.report import Work
from weft_protocols.parts import TaskView
from weft_protocols.records import SUSPENDED, Claim
from weft_protocols.states import State

pytestmark = pytest.mark.anyio

DEADLINE = 20.0


@pytest.fixture(scope="module")
async def broker_mesh() -> AsyncIterator[BrokerMesh]:
    async with await start_test_mesh(agents=("surveyor", "analyst", "editor")) as mesh:
        yield mesh


@pytest.fixture
async def client(broker_mesh: BrokerMesh) -> AsyncIterator[Mesh]:
    async with agents.client(broker_mesh) as mesh:
        yield mesh


@pytest.fixture
async def team(broker_mesh: BrokerMesh) -> AsyncIterator[None]:
    async with agents.running(broker_mesh, surveyor, analyst, editor):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "risky.py").write_text("def f(a=[]):\n    return eval(a)\n", encoding="utf-8")
    (tmp_path / "pkg" / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (tmp_path / "pkg" / "blob.py").write_bytes(b"\0\1\2")
    (tmp_path / "test_risky.py").write_text("from pkg.risky import f\n", encoding="utf-8")
    return tmp_path


def said(view: TaskView) -> str:
    return view.message.text if view.message is not None else ""


async def test_a_folder_is_reviewed_after_one_question(client: Mesh, team: None, folder: Path) -> None:
    async with await client.submit("editor", str(folder)) as handle:
        asked = await handle.result(DEADLINE)
        assert asked.state is State.INPUT_REQUIRED
        assert QUESTION in said(asked)
        done = await handle.send("complexity", timeout=DEADLINE)
    assert done.state is State.COMPLETED
    report = next(artifact for artifact in done.artifacts if artifact.name == REPORT)
    assert report.parts[0].media_type == "text/markdown"
    text = report.text
    assert text.index("## Complexity and size") < text.index("## Risks")
    rows = [line for line in text.split("## All files")[1].splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["pkg/broken.py", "pkg/risky.py", "test_risky.py"]
    assert "| `pkg/blob.py` | binary |" in text
    assert "| `pkg/broken.py:1` | syntax error" in text
    assert "eval(a)" in text


async def test_an_unclear_answer_is_asked_again(client: Mesh, team: None, folder: Path) -> None:
    async with await client.submit("editor", str(folder)) as handle:
        await handle.result(DEADLINE)
        again = await handle.send("whatever", timeout=DEADLINE)
        assert again.state is State.INPUT_REQUIRED
        assert said(again).startswith("'whatever' is none of risks, complexity, summary.")
        done = await handle.send("3", timeout=DEADLINE)
    assert done.state is State.COMPLETED
    assert "a short summary" in done.text


async def test_after_three_unclear_answers_the_editor_decides(client: Mesh, team: None, folder: Path) -> None:
    async with await client.submit("editor", str(folder)) as handle:
        view = await handle.result(DEADLINE)
        for _ in range(3):
            assert view.state is State.INPUT_REQUIRED
            view = await handle.send("?", timeout=DEADLINE)
    assert view.state is State.COMPLETED
    assert "risks first" in view.text


async def test_a_person_may_take_long_and_another_replica_goes_on(
    client: Mesh, broker_mesh: BrokerMesh, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor, "suspend_after", 0.05)
    claims: asyncio.Queue[Claim] = asyncio.Queue()
    watcher = await broker_mesh.connect("operator")
    await watcher.subscribe("mesh.claim.editor.*", lambda message: claims.put_nowait(Claim.decode(message.data)))
    await watcher.flush()
    async with (
        asyncio.timeout(DEADLINE),
        agents.running(broker_mesh, surveyor, analyst) as [_, reader],
        await client.submit("editor", str(folder)) as handle,
    ):
        async with agents.running(broker_mesh, editor):
            await handle.result(DEADLINE)
            while (await claims.get()).state != SUSPENDED:
                pass
        async with agents.running(broker_mesh, editor):
            done = await handle.send("summary", timeout=DEADLINE)
        # The journal answered for the survey and the analysts: nothing was read twice.
        assert reader.replica.counters.done == 3
    await watcher.close()
    assert done.state is State.COMPLETED
    assert "a short summary" in done.text


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere", "there is no such file or folder"),
        ("notes.txt", "is not a Python file"),
        ("empty", "there is no Python file to review"),
        ("pkg/blob.py", "blob.py is skipped: binary"),
    ],
)
async def test_a_path_without_code_is_rejected_with_the_reason(
    client: Mesh, team: None, folder: Path, path: str, reason: str
) -> None:
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("x", encoding="utf-8")
    view = await client.send("editor", str(folder / path), timeout=DEADLINE)
    assert view.state is State.REJECTED
    assert reason in said(view)
    assert view.id not in said(view)


async def test_an_analyst_says_who_read_what(client: Mesh, team: None, folder: Path) -> None:
    files = ["pkg/risky.py", "test_risky.py"]
    view = await client.send("analyst", {"root": str(folder), "files": files}, timeout=DEADLINE)
    work = Work.from_json(view.data["work"])
    assert (work.task, work.files, work.attempt, work.taken_over) == (view.id, tuple(files), 1, False)
    assert work.replica == work.first_replica != ""
    assert [FileReview.from_json(review).path for review in view.data["reviews"]] == files


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.py", "pkg/../../secret.py"])
async def test_an_analyst_reads_nothing_outside_the_folder(client: Mesh, team: None, folder: Path, path: str) -> None:
    view = await client.send("analyst", {"root": str(folder), "files": [path]}, timeout=DEADLINE)
    assert view.state is State.REJECTED
    assert "is not inside" in said(view)


async def test_an_analyst_refuses_input_of_another_form(client: Mesh, team: None) -> None:
    from weft_protocols.errors import InvalidParams

    with pytest.raises(InvalidParams, match="files"):
        await client.send("analyst", {"root": "/tmp"}, timeout=DEADLINE)


async def test_a_file_that_disappears_meanwhile_is_reported(client: Mesh, team: None, folder: Path) -> None:
    view = await client.send("analyst", {"root": str(folder), "files": ["gone.py"]}, timeout=DEADLINE)
    assert view.data["reviews"][0]["problem"] == "it is gone"


async def test_a_failed_analyst_costs_its_files_and_not_the_report(
    client: Mesh, broker_mesh: BrokerMesh, folder: Path
) -> None:
    broken = Agent("analyst")

    @broken.skill("analyse")
    async def analyse(root: str, files: list[str]) -> dict[str, str]:
        from weft_protocols.errors import Fail

        raise Fail("no glasses")

    async with agents.running(broker_mesh, surveyor, broken, editor):
        async with await client.submit("editor", str(folder)) as handle:
            await handle.result(DEADLINE)
            done = await handle.send("risks", timeout=DEADLINE)
    assert done.state is State.COMPLETED
    assert done.text.count("not read: no glasses") == 3
    assert done.text.split("## All files")[1].count("| `pkg/risky.py` |") == 1
