"""Chains of delegations: what is handed down them, and that none goes in circles."""

import uuid
from collections.abc import Callable

import pytest

import weft
from weft.host.chain import Chain, call
from weft.testing.agents import client, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft_protocols import budgets
from weft_protocols import headers as h
from weft_protocols.errors import InvalidRequest, UsageError

Unique = Callable[[str], str]
TASK = "0123456789abcdef0123456789abcdef"


def chain_of(*agents: str, seen: tuple[str, ...] = ()) -> Chain:
    return Chain(tuple((agent, uuid.uuid4().hex) for agent in agents), seen)


def test_a_chain_is_read_as_it_was_written() -> None:
    chain = chain_of("a", "b").through("c", TASK, call="12345678")
    assert Chain.of({name.lower(): value for name, value in chain.headers().items()}) == chain
    assert chain.told[-1] == f"c/{TASK}"
    assert Chain.of({}) == Chain()


@pytest.mark.parametrize("told", ["a", f"a/{TASK},", f"a b/{TASK}", "a/short", f"/{TASK}"])
def test_a_chain_that_cannot_be_read_is_refused(told: str) -> None:
    with pytest.raises(InvalidRequest, match="delegation chain is not readable"):
        Chain.of({"weft-chain": told})


@pytest.mark.parametrize(
    ("chain", "kind"),
    [
        (chain_of("a", "b", "c"), ""),
        (chain_of("a", "b", "c", "d"), "hops"),
        (chain_of("me", "b"), "re-entry"),
        (chain_of("a", "b", seen=("x",) * 3), ""),
        (chain_of("a", "b", seen=("x", "x", "y", "x", "x")), "repetition"),
        (chain_of("a", "b", seen=("x", "x", "x", "x", "y")), ""),
    ],
)
def test_a_chain_is_a_loop_by_its_length_its_agents_or_its_calls(chain: Chain, kind: str) -> None:
    if not kind:
        chain.check("me", max_hops=3, reentrant=False)
        return
    with pytest.raises(weft.DelegationLoop, match=r"me$") as caught:
        chain.check("me", max_hops=3, reentrant=False)
    assert (caught.value.kind, caught.value.chain) == (kind, chain.told)
    if kind == "re-entry":
        chain.check("me", max_hops=3, reentrant=True)


def test_the_longest_chain_there_may_be_fits_into_a_message() -> None:
    chain = Chain()
    for _ in range(30):
        chain = chain.through("a" * 64, TASK, call=call("a", "b", skill="", digest=""))
    assert len(h.fields(chain.headers())) < h.MAX_BLOCK - 500


@pytest.mark.parametrize(
    ("own", "wanted", "expected"),
    [
        ("", {"tokens": 1000, "usd": 0.5}, "tokens=1000,usd=0.5"),
        ("tokens=1000", {"tokens": 10}, "tokens=10"),
        ("tokens=1000, usd=2", {"tokens": 5000, "calls": 3}, "tokens=1000,usd=2,calls=3"),
        ("usd=0.000001", {"usd": 1e-7}, "usd=0.0000001"),
    ],
)
def test_a_budget_is_only_lowered(own: str, wanted: dict[str, float], expected: str) -> None:
    assert budgets.lowered(own, wanted) == expected


@pytest.mark.parametrize("own", ["tokens", "tokens=-1", "tokens=1,tokens=2", "Tokens=1", "tokens=1e9", "=1"])
def test_a_budget_that_cannot_be_read_is_refused(own: str) -> None:
    with pytest.raises(InvalidRequest, match="is not readable"):
        budgets.parse(own)


@pytest.mark.parametrize("wanted", [{"US dollars": 1}, {"usd": -1}, {"usd": float("nan")}])
def test_a_budget_that_cannot_be_told_is_an_error_of_the_handler(wanted: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="not possible"):
        budgets.lowered("", wanted)


async def test_a_child_inherits_budget_and_traces_and_may_get_less(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child, parent = weft.Agent(unique("child")), weft.Agent(unique("parent"))
    budget: list[dict[str, float]] = []
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

    @child.skill()
    async def work(task: weft.Task) -> None:
        budget.append(task.budget)

    @parent.skill()
    async def delegate(task: weft.Task) -> list[str]:
        first = await task.delegate(child.name, "all")
        second = await task.delegate(child.name, "less", budget={"usd": 0.25, "tokens": 9000})
        return [first.id, second.id]

    headers = {h.BUDGET: "tokens=1000, usd=0.50", h.TRACEPARENT: trace}
    async with running(mesh, child, parent), await caller.submit(parent.name, "go", headers=headers) as handle:
        children = (await handle.result()).data
        stored = [await StoredTask.read(mesh, child.name, one) for one in children]
    sent = [h.parse(one.messages[0].headers) for one in stored]
    assert [one["weft-budget"] for one in sent] == ["tokens=1000, usd=0.50", "tokens=1000,usd=0.25"]
    assert [one["traceparent"] for one in sent] == [trace, trace]
    assert budget == [{"tokens": 1000, "usd": 0.5}, {"tokens": 1000, "usd": 0.25}]


def relay(name: str, to: Callable[[], str], **options: bool | int) -> weft.Agent:
    """An agent that delegates what it gets to another, and tells how that was refused."""
    agent = weft.Agent(name, **options)  # type: ignore[arg-type]

    @agent.skill()
    async def work(task: weft.Task) -> str:
        try:
            return (await task.delegate(to(), task.text)).text
        except weft.DelegationLoop as loop:
            return f"{loop.kind} at {agent.name} after {len(loop.chain)}"

    return agent


async def test_a_triangle_is_refused_by_the_agent_it_comes_back_to(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    names = [unique(n) for n in "abc"]
    agents = [relay(names[i], lambda i=i: names[(i + 1) % 3]) for i in range(3)]  # type: ignore[misc]
    async with running(mesh, *agents):
        assert (await caller.send(names[0], "round")).text == f"re-entry at {names[2]} after 3"


async def test_an_agent_that_calls_itself_is_stopped_before_it_sends(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    name = unique("self")
    async with running(mesh, relay(name, lambda: name)), await caller.submit(name, "round") as handle:
        assert (await handle.result()).text == f"re-entry at {name} after 1"
        stored = await StoredTask.read(mesh, name, handle.id)
    assert "_children" not in stored.steps


async def test_a_long_chain_ends_at_its_hop_limit(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("deep"), reentrant=True, max_hops=4)

    @agent.skill()
    async def work(task: weft.Task, n: int) -> str:
        try:
            return (await task.delegate(agent.name, {"n": n + 1})).text
        except weft.DelegationLoop as loop:
            return f"{loop.kind} at {n}"

    async with running(mesh, agent):
        assert (await caller.send(agent.name, {"n": 0})).text == "hops at 4"


async def test_ping_pong_with_the_same_input_is_stopped_without_anybody_counting_in_the_middle(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    ping, pong = unique("ping"), unique("pong")
    agents = [
        relay(ping, lambda: pong, reentrant=True, max_hops=30),
        relay(pong, lambda: ping, reentrant=True, max_hops=30),
    ]
    async with running(mesh, *agents):
        assert (await caller.send(ping, "ball")).text == f"repetition at {ping} after 7"


async def test_one_task_may_not_make_the_same_call_without_end(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child, parent = weft.Agent(unique("child")), weft.Agent(unique("parent"))

    @child.skill()
    async def echo(text: str) -> str:
        return text

    @parent.skill()
    async def work(task: weft.Task) -> list[object]:
        calls = 0
        while True:
            try:
                await task.delegate(child.name, "same")
            except weft.DelegationLoop as loop:
                other = await task.delegate(child.name, "another")
                return [calls, loop.kind, other.text]
            calls += 1

    async with running(mesh, child, parent):
        assert (await caller.send(parent.name, "go")).data == [10, "repetition", "another"]


@pytest.mark.parametrize(
    ("agents", "said", "loop"),
    [
        (("other",), "and the message came from", None),
        (("x", "y", "z", "parent"), "at most 3", "hops"),
        (("child", "parent"), "is not declared reentrant", "re-entry"),
    ],
)
async def test_a_host_believes_no_sender_that_its_chain_is_in_order(
    mesh: BrokerMesh, unique: Unique, agents: tuple[str, ...], said: str, loop: str | None
) -> None:
    """Fails if only the sender's host checks."""
    child, parent = weft.Agent(unique("child"), max_hops=3), unique("parent")
    names = {"child": child.name, "parent": parent}
    started: list[str] = []

    @child.skill()
    async def work(task: weft.Task) -> None:
        started.append(task.id)

    chain = chain_of(*(names.get(agent, agent) for agent in agents))
    async with running(mesh, child), client(mesh, parent) as sender:
        async with await sender.submit(child.name, "go", headers={h.CHAIN: chain.headers()[h.CHAIN]}) as handle:
            with pytest.raises(InvalidRequest, match=said) as caught:
                await handle.result()
            stored = await StoredTask.read(mesh, child.name, handle.id)
    assert (stored.states, started) == (["rejected"], [])
    assert caught.value.metadata.get("loop") == loop


async def test_a_host_refuses_a_budget_it_cannot_read(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("budget"))

    @agent.skill()
    async def work(task: weft.Task) -> None:
        pass

    async with running(mesh, agent):
        with pytest.raises(InvalidRequest, match="the budget 'lots' is not readable"):
            await caller.send(agent.name, "go", headers={h.BUDGET: "lots"})


async def test_a_loop_that_nobody_catches_fails_the_task_at_once(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("uncaught"))

    @agent.skill()
    async def work(task: weft.Task) -> None:
        await task.delegate(agent.name, "again")

    async with running(mesh, agent):
        view = await caller.send(agent.name, "go")
    assert view.state is weft.State.FAILED
    assert "DelegationLoop: the chain comes back to" in view.text
