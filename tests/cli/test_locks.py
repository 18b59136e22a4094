"""`mesh locks`, `mesh tasks tree` and `mesh coordinator`, by the answers a coordinator gives."""

import itertools
import re
import time
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.cli import drawing, treeview, waitgraph
from weft.cli.drawing import Arrow, Box
from weft.client.locks import Edge, WaitGraph
from weft.client.trees import Tree, TreeNode

if TYPE_CHECKING:
    from tests.cli.conftest import Stub

A, B, C = ("a" * 32, "b" * 32, "c" * 32)
NOW = int(time.time() * 1000)


@pytest.fixture
def mesh(stub: "tuple[Stub, Any]", project: Any) -> Any:
    """The `mesh` command beside the stub, as `mesh.run`; `mesh.stub` is that."""
    made, folder = stub
    made.answers.clear()
    made.asked.clear()
    project.env["WEFT_HOME"] = str(folder / ".weft")
    return project


@pytest.fixture
def answers(stub: "tuple[Stub, Any]") -> dict[str, Any]:
    return stub[0].answers


def holding(agent: str, task: str, **more: Any) -> dict[str, Any]:
    return {"agent": agent, "task": task, "replica": "r1", "since": NOW - 65_000, **more}


LOCKS = {
    "locks": [
        {"name": "ledger", "mode": "shared", "holders": [holding("bank", C, token=7)], "waiters": []},
        {
            "name": "crm/acme",
            "mode": "exclusive",
            "holders": [holding("writer", B, token=41)],
            "waiters": [holding("analyst", A, mode="exclusive"), holding("bank", C, mode="shared")],
        },
    ]
}


def wait(agent: str, task: str, kind: str, target: str, holder: str) -> dict[str, Any]:
    return {"agent": agent, "task": task, "wait": "w", "kind": kind, "target": target, "holder": holder}


GRAPH = {
    "nodes": [{"task": A, "agent": "analyst"}, {"task": B, "agent": ""}, {"task": C, "agent": "bank"}],
    "edges": [
        wait("analyst", A, "lock", "crm/acme", B),
        wait("writer", B, "child", C, C),
        wait("bank", C, "lock", "ledger", A),
    ],
    "deadlocks": {
        "count": 4,
        "last": [
            {
                "number": 9,
                "at": NOW - 65_000,
                "victim": B,
                "cycle": [["writer", B, "lock", "x", A], ["a", A, "child", B, B]],
            }
        ],
    },
}


def test_locks_are_listed_with_holders_and_who_is_next(mesh: Any, answers: dict[str, Any]) -> None:
    answers["locks"] = LOCKS
    shown = mesh.mesh("locks", "list").out.splitlines()
    assert shown[0].split() == ["LOCK", "MODE", "HELD", "BY", "HELD", "FOR", "TOKEN", "WAITING", "NEXT", "WAITS", "FOR"]
    assert re.split(r"  +", shown[1])[:3] == ["crm/acme", "exclusive", "writer bbbbbbbb"]
    assert re.split(r"  +", shown[1])[4:7] == ["41", "2", "analyst aaaaaaaa"]
    told = mesh.mesh("locks", "list", "-o", "json").json
    assert [one["name"] for one in told] == ["crm/acme", "ledger"]
    assert [one["task"] for one in told[0]["waiters"]] == [A, C]
    assert told[0]["holders"][0]["token"] == 41
    assert told[0]["holders"][0]["since"].endswith("Z")
    answers["locks"] = {"locks": []}
    assert mesh.mesh("locks", "list").err == "no lock is held\n"


def test_the_graph_marks_who_waits_for_each_other(mesh: Any, answers: dict[str, Any]) -> None:
    answers.update(locks=LOCKS, graph=GRAPH)
    shown = mesh.mesh("locks", "graph").out
    assert "  waits for lock crm/acme, held by writer bbbbbbbb  [circle 1]" in shown
    assert "  waits for its child bank cccccccc  [circle 1]" in shown
    assert "circle 1:\n  analyst aaaaaaaa waits" in shown
    assert re.search(r"deadlock 9, \d+m\d\ds ago: writer bbbbbbbb gave way", shown)
    told = mesh.mesh("locks", "graph", "-o", "json").json
    assert [[edge["task"] for edge in knot] for knot in told["circles"]] == [[A, B, C]]
    assert told["deadlocks"]["count"] == 4
    last = mesh.mesh("locks", "graph", "--last", "-o", "json").json
    assert [one["target"] for one in last["waits"]] == ["x", B]
    answers["graph"] = {"nodes": [], "edges": []}
    assert mesh.mesh("locks", "graph").err == "nobody waits for anybody\n"
    assert "no deadlock" in mesh.mesh("locks", "graph", "--last", code=5).err


def test_the_graph_is_drawn_and_what_is_stuck_is_red(mesh: Any, answers: dict[str, Any]) -> None:
    answers.update(locks=LOCKS, graph=GRAPH)
    file = mesh.folder / "graph.svg"
    assert "wrote" in mesh.mesh("locks", "graph", "--svg", str(file)).err
    root = ElementTree.fromstring(file.read_text(encoding="utf-8"))
    classes = [one.get("class") for one in root.iter() if one.get("class")]
    assert classes.count("lock hot") == 2
    assert classes.count("task hot") == 3
    assert classes.count("arrow hot") == 5
    assert mesh.mesh("locks", "graph", "--svg", "-").out.startswith("<svg")


def test_a_lock_is_taken_away_with_a_reason(mesh: Any, answers: dict[str, Any], stub: "tuple[Stub, Any]") -> None:
    answers["locks"] = LOCKS
    answers["lock-release"] = {"name": "crm/acme", "released": [holding("writer", B, token=41)], "reason": "stuck"}
    assert (
        mesh.mesh("locks", "release", "crm/acme", "--reason", "stuck").out
        == "crm/acme was taken from writer bbbbbbbb\n"
    )
    assert stub[0].asked[-1] == ("lock-release", "operator", {"name": "crm/acme", "reason": "stuck"})
    mesh.mesh("locks", "release", "crm/acme", "--reason", "stuck", "--task", "bbbb", "-o", "json")
    assert stub[0].asked[-1][2]["task"] == B
    assert "--reason" in mesh.mesh("locks", "release", "crm/acme", code=2).err
    assert "say why" in mesh.mesh("locks", "release", "crm/acme", "--reason", " ", code=2).err
    wrong = mesh.mesh("locks", "release", "crm/acne", "--reason", "x", code=5).err
    assert "nobody holds lock 'crm/acne' (did you mean 'crm/acme'?); held are crm/acme, ledger" in wrong
    wrong = mesh.mesh("locks", "release", "ledger", "--reason", "x", "--task", "aaa", code=5).err
    assert "held by no task whose id begins with 'aaa'; by bank cccccccc" in wrong
    assert [operation for operation, *_ in stub[0].asked].count("lock-release") == 2


def test_without_a_leader_the_error_says_so(mesh: Any, answers: dict[str, Any]) -> None:
    answers["locks"] = {"error": {"type": "Unavailable", "message": "no coordinator leads right now; try again"}}
    failed = mesh.mesh("locks", "list", "-o", "json", code=7)
    assert failed.error["message"].startswith("no coordinator leads right now")


def node(agent: str, task: str, parent: str | None, **more: Any) -> dict[str, Any]:
    above = {"agent": "x", "task": parent} if parent else None
    told = {"state": "working", "caller": "local", "context": "c", "created": NOW - 60_000, "updated": NOW, "text": ""}
    return {"agent": agent, "task": task, "parent": above, **told, **more}


def test_a_delegation_tree_shows_who_does_what_for_whom(
    mesh: Any, answers: dict[str, Any], stub: "tuple[Stub, Any]"
) -> None:
    nodes = [
        node("planner", A, None, text="two \x1b[31mlines\nof text"),
        node("writer", C, A, created=NOW - 30_000, state="input-required"),
        node("reader", B, A, created=NOW - 50_000),
        node("reader", "d" * 32, B),
    ]
    answers["tree"] = {"root": {"agent": "planner", "task": A}, "nodes": nodes, "more": True}
    result = mesh.mesh("tasks", "tree", C)
    assert stub[0].asked[-1] == ("tree", "local", {"task": C})
    lines = result.out.splitlines()
    assert [re.split(r" +(planner|reader|writer) ", line)[0] for line in lines[1:]] == [
        "aaaaaaaa",
        "├─ bbbbbbbb",
        "│  └─ dddddddd",
        "└─ cccccccc",
    ]
    assert "\x1b" not in result.out
    assert "there are more than these 4 tasks" in result.err
    told = mesh.mesh("tasks", "tree", C, "--all", "-o", "json").json
    assert {caller for _, caller, _ in stub[0].asked} == {"local", "operator"}
    assert [one["task"] for one in told["root"]["children"]] == [B, C]
    assert told["root"]["children"][0]["children"][0]["agent"] == "reader"
    answers["tree"] = {"error": {"type": "TaskNotFound", "message": f"there is no task {C}"}}
    assert "there is no task" in mesh.mesh("tasks", "tree", C, code=5).err


def test_the_read_models_are_made_anew(mesh: Any, answers: dict[str, Any]) -> None:
    answers["rebuild"] = {"started": True, "coordinators": 2}
    assert "the rebuild has begun on 2 coordinators" in mesh.mesh("coordinator", "rebuild").out


def test_without_a_leader_the_status_of_the_coordinators_is_a_failed_check(mesh: Any, answers: dict[str, Any]) -> None:
    answers["coordinators"] = {
        "coordinator": "c1",
        "role": "standby",
        "pid": 1,
        "started": NOW,
        "projection": {"lag": 3},
    }
    result = mesh.mesh("coordinator", "status", "-o", "json", code=3)
    assert (result.json["leader"], result.json["coordinators"][0]["lag"]) == (None, 3)
    assert "no coordinator leads" in result.err


# Pure --------------------------------------------------------------------------------------------------

TASKS = st.integers(0, 7).map(lambda n: f"{n}" * 32)
EDGES = st.lists(st.tuples(TASKS, st.sampled_from(["lock", "child"]), st.sampled_from("xyz"), TASKS), max_size=20)


def edges_of(told: list[tuple[str, str, str, str]]) -> tuple[Edge, ...]:
    return tuple(Edge("a", task, kind, name if kind == "lock" else held, held) for task, kind, name, held in told)


@given(EDGES)
def test_a_circle_is_what_leads_back_to_itself(told: list[tuple[str, str, str, str]]) -> None:
    edges = edges_of(told)
    found = {(edge.task, edge.holder) for knot in waitgraph.circles(WaitGraph({}, edges)) for edge in knot}
    after: dict[str, set[str]] = {}
    for edge in edges:
        after.setdefault(edge.task, set()).add(edge.holder)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for following in after.get(left.pop(), set()) - seen:
                seen.add(following)
                left.append(following)
        return seen

    back = [edge for edge in edges if edge.task == edge.holder or edge.task in reached(edge.holder)]
    assert found == {(edge.task, edge.holder) for edge in back}


@given(EDGES)
def test_no_two_boxes_of_a_picture_overlap(told: list[tuple[str, str, str, str]]) -> None:
    edges = edges_of(told)
    text = drawing.svg(*waitgraph.picture(WaitGraph({}, edges)), title="t")
    root = ElementTree.fromstring(text)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    boxes = [
        tuple(float(one.get(key, 0)) for key in ("x", "y", "width", "height"))
        for one in root.iter()
        if (one.get("class") or "").split()[:1] in (["task"], ["lock"])
    ]
    for x, y, w, h in boxes:
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
    for (x, y, w, h), (u, v, m, n) in itertools.combinations(boxes, 2):
        assert x + w <= u or u + m <= x or y + h <= v or v + n <= y


def test_names_cannot_break_out_of_the_picture() -> None:
    boxes = [Box("1", '<script>"&', "<b>"), Box("2", "x" * 200)]
    root = ElementTree.fromstring(drawing.svg(boxes, [Arrow("1", "2", "<i>"), Arrow("1", "gone")], title="<t>"))
    assert not [one for one in root.iter() if one.tag.endswith(("script", "}b", "}i"))]


def test_a_tree_that_is_none_ends() -> None:
    nodes = (TreeNode("a", A, "working", B), TreeNode("b", B, "working", A))
    assert [row["agent"] for row in treeview.rows(Tree(A, nodes), now=0.0)] == ["a", "b"]
