"""The embedded broker's life: start, one per folder, crash, orphans, adoption, stop, and accounts changed live."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from weft.core import membership, serverconf, serverproc
from weft.core.broker import Broker, Delivered
from weft.core.config import ConnectionSettings, load_settings
from weft.core.home import BrokerRecord, Home, process_started
from weft.core.keys import new_seed, read_seed, write_seed
from weft.core.server import EmbeddedServer
from weft.testing.broker import BrokerMesh
from weft_protocols import ids, subjects
from weft_protocols.accounts import NEXT
from weft_protocols.errors import (
    InvalidConfig,
    InvalidName,
    NotAuthenticated,
    Unavailable,
    Unreachable,
    UsageError,
)
from weft_protocols.resources import STREAM

pytestmark = pytest.mark.anyio

T = TypeVar("T")
DEADLINE = 10.0
TASK = ids.task_id("local", "analyst", "1")


@pytest.fixture
async def server(home: Path) -> AsyncIterator[EmbeddedServer]:
    """A running server with agent `analyst` and caller `local`."""
    made = EmbeddedServer(home, agents=["analyst"], orphan_protection=True)
    await made.start()
    yield made
    await made.stop()


@contextlib.asynccontextmanager
async def connected(settings: ConnectionSettings) -> AsyncIterator[Broker]:
    broker = await Broker.connect(settings, timeout=DEADLINE)
    try:
        yield broker
    finally:
        await broker.close()


# Start ---------------------------------------------------------------------------------------------


async def test_a_started_server_serves_jetstream_and_every_identity(server: EmbeddedServer) -> None:
    async with connected(server.settings("coordinator")) as coordinator:
        assert (await coordinator.api("INFO"))["streams"] == 0
    for identity in ("operator", "SYS", "analyst", "local"):
        async with connected(server.settings(identity)) as broker:
            assert broker.connected


async def test_nothing_a_server_leaves_on_disk_can_be_read_by_others(server: EmbeddedServer, home: Path) -> None:
    files = [path for path in _files(home) if "js" not in path.relative_to(home).parts]
    assert {path.name for path in files} >= {"nats.conf", "accounts.json", "broker.json", "local.nk", "nats.log"}
    assert {path.name: oct(_mode(path)) for path in files if _mode(path) != 0o600 and path.suffix != ".ports"} == {}
    folders = (home, home / "keys", home / "broker")
    assert [oct(_mode(folder)) for folder in folders] == ["0o700"] * 3


async def test_seeds_are_in_no_file_but_their_own(server: EmbeddedServer, home: Path) -> None:
    seeds = {read_seed(path) for path in (home / "keys").glob("*.nk")}
    assert len(seeds) == 7
    seeds.add((home / "keys" / "cards.pem").read_text().splitlines()[1])
    others = [path for path in _files(home) if path.parent.name != "keys"]
    assert [path for path in others for seed in seeds if seed.encode() in path.read_bytes()] == []


async def test_the_environment_finds_a_started_server(
    server: EmbeddedServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home.parent)
    assert load_settings("analyst") == server.settings("analyst")
    async with connected(load_settings()) as broker:
        assert broker.settings.identity == "local"


async def test_whoever_has_no_key_of_this_mesh_is_refused(server: EmbeddedServer, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.nk"
    write_seed(stranger, new_seed())
    for seed_file in (None, stranger):
        with pytest.raises(NotAuthenticated):
            await Broker.connect(ConnectionSettings(server.url, "local", seed_file), timeout=1.0)


async def test_an_unknown_identity_has_no_settings(server: EmbeddedServer) -> None:
    with pytest.raises(NotAuthenticated, match=r"no identity 'analist' \(did you mean 'analyst'\?\)"):
        server.settings("analist")


@pytest.mark.parametrize(("durability", "sync"), [("laptop", {"sync_interval": 100_000_000}), ("strict", {})])
async def test_durability_is_what_the_server_runs_with(home: Path, durability: str, sync: dict[str, int]) -> None:
    async with EmbeddedServer(home, durability=durability) as server:
        config = (await _varz(server))["jetstream"]["config"]
    assert {key: config.get(key) for key in sync} == sync
    assert config.get("sync_always", False) is (durability == "strict")


async def test_room_is_made_for_the_task_stream(home: Path) -> None:
    async with EmbeddedServer(home, max_bytes=20 * 1024**3) as server:
        assert (await _varz(server))["jetstream"]["config"]["max_storage"] == 40 * 1024**3


async def test_the_server_runs_with_its_fixed_limits(server: EmbeddedServer) -> None:
    varz = await _varz(server)
    wanted = {
        "host": "127.0.0.1",
        "auth_required": True,
        "max_payload": 1024**2,
        "max_connections": 4096,
        "ping_interval": 20_000_000_000,
        "write_deadline": 10_000_000_000,
        "http_port": 0,
    }
    assert {key: varz[key] for key in wanted} == wanted
    log = (server.home.broker / "nats.log").read_text()
    assert "js_ack_fc_v2 (disabled)" in log


async def test_no_agent_can_take_all_connections(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serverconf, "ACCOUNT_CONNECTIONS", 2)
    async with (
        EmbeddedServer(home, agents=["greedy", "modest"]) as server,
        connected(server.settings("greedy")),
        connected(server.settings("greedy")),
    ):
        with pytest.raises(Unreachable, match="maximum account active connections exceeded"):
            await Broker.connect(server.settings("greedy"), timeout=1.0)
        async with connected(server.settings("modest")) as modest:
            assert modest.connected


async def test_no_connection_can_take_all_subscriptions(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serverconf, "MAX_SUBSCRIPTIONS", 20)
    async with EmbeddedServer(home) as server, connected(server.settings("local")) as greedy:
        got: list[Delivered] = []
        for n in range(30):
            await greedy.subscribe(f"own.{n}", got.append)
        await greedy.flush()
        for n in range(30):
            greedy.send(f"own.{n}", b"")
        await greedy.flush()
        assert 10 <= len(got) <= 20


@pytest.mark.parametrize("durability", ["lptop", ""])
def test_an_unknown_durability_is_refused(home: Path, durability: str) -> None:
    with pytest.raises(InvalidConfig, match="use one of laptop, strict"):
        EmbeddedServer(home, durability=durability)


async def test_a_folder_of_any_name_works(tmp_path: Path) -> None:
    home = tmp_path / 'a "quoted" \\ name, $HOME # ü' / ".weft"
    async with EmbeddedServer(home) as server, connected(server.settings("coordinator")) as coordinator:
        await coordinator.api("INFO")
        assert (await _varz(server))["jetstream"]["config"]["store_dir"] == str(home / "broker" / "js" / "jetstream")


@pytest.mark.parametrize("name", ["include", "true", "null", "1k", "10", "-", "__", "a" * 64])
async def test_every_valid_name_can_be_an_account(home: Path, name: str) -> None:
    async with EmbeddedServer(home, agents=[name]) as server, connected(server.settings(name)) as agent:
        answer = json.loads((await agent.request("$SYS.REQ.USER.INFO")).data)
    assert answer["data"]["account"] == name


# Ports ---------------------------------------------------------------------------------------------


async def test_a_random_port_is_kept_so_that_clients_find_the_server_again(home: Path) -> None:
    server = EmbeddedServer(home)
    await server.start()
    port = server.port
    async with connected(server.settings("local")) as client:
        back = asyncio.Event()
        client.on_reconnect(back.set)
        os.kill(server.pid, signal.SIGKILL)
        assert await _within(server.wait()) == -signal.SIGKILL
        await server.start()
        assert server.port == port
        await _within(back.wait())
    await server.stop()
    async with EmbeddedServer(home) as later:
        assert later.port == port


async def test_a_port_that_somebody_took_meanwhile_is_replaced(home: Path) -> None:
    async with EmbeddedServer(home) as server:
        port = server.port
    with _listener(port):
        async with EmbeddedServer(home) as server:
            assert server.port != port


async def test_random_ports_are_out_of_the_way_of_outgoing_connections(server: EmbeddedServer) -> None:
    assert server.port in range(20_000, 32_000)


async def test_a_fixed_port_is_used(home: Path) -> None:
    port = serverproc.free_port()
    async with EmbeddedServer(home, port=port) as server:
        assert (server.port, server.url) == (port, f"nats://127.0.0.1:{port}")


async def test_a_fixed_port_that_is_taken_is_an_error_with_a_remedy(home: Path) -> None:
    with _listener(0) as port:
        with pytest.raises(InvalidConfig, match=f"port {port} on 127.0.0.1 is taken.*`broker.port`"):
            await EmbeddedServer(home, port=port).start()
    async with EmbeddedServer(home, port=port):
        pass


# One per folder ------------------------------------------------------------------------------------


async def test_a_second_start_in_one_folder_is_refused_and_harms_nothing(server: EmbeddedServer, home: Path) -> None:
    with pytest.raises(UsageError, match=rf"already runs .*\(pid {server.pid}, {server.url}\).*`mesh down`"):
        await EmbeddedServer(home).start()
    with pytest.raises(UsageError, match="already started by this object"):
        await server.start()
    async with connected(server.settings("local")) as client:
        assert client.connected


async def test_a_second_process_in_one_folder_is_refused(server: EmbeddedServer, home: Path) -> None:
    with _script(home, "await server.start()") as child:
        code, output = await _ended(child)
    assert code != 0
    assert "UsageError: a broker already runs in" in output


async def test_the_lock_lives_as_long_as_the_server_and_no_longer(server: EmbeddedServer, home: Path) -> None:
    lock = home / "broker" / "lock"
    assert serverproc.try_lock(lock) is None
    os.kill(server.pid, signal.SIGKILL)
    await _within(server.wait())
    held = serverproc.try_lock(lock)
    assert held is not None
    os.close(held)


# Crashes -------------------------------------------------------------------------------------------


async def test_what_was_stored_survives_kill_9(fresh_mesh: BrokerMesh) -> None:
    server = fresh_mesh.server
    await fresh_mesh.add_agent("analyst")
    subject = subjects.task("analyst", "00", "local", TASK)
    async with connected(fresh_mesh.settings("local")) as caller:
        sequence = await caller.publish(subject, b"important")
    os.kill(server.pid, signal.SIGKILL)
    assert await _within(server.wait()) == -signal.SIGKILL
    await server.start()
    async with connected(fresh_mesh.settings("coordinator")) as coordinator:
        found = await coordinator.last(STREAM, subject)
    assert found is not None
    assert (found.seq, found.data) == (sequence, b"important")


async def test_files_left_by_a_killed_server_mislead_nobody(server: EmbeddedServer, home: Path) -> None:
    pid = server.pid
    os.kill(pid, signal.SIGKILL)
    await _within(server.wait())
    left = home / "broker" / "ports" / f"nats-server_{pid}.ports"
    assert left.exists()
    with pytest.raises(Unavailable, match="is not running"):
        load_settings("local", home=home)
    await server.start()
    assert server.pid != pid
    assert [path.name for path in left.parent.iterdir()] == [f"nats-server_{server.pid}.ports"]
    assert load_settings("local", home=home) == server.settings("local")


async def test_a_pid_that_is_somebody_elses_now_is_not_the_server(home: Path) -> None:
    async with EmbeddedServer(home) as server:
        port = server.port
    stale = BrokerRecord(f"nats://127.0.0.1:{port}", os.getpid(), "1", "laptop", port, 1024)
    stale.write(Home(home))
    with pytest.raises(Unavailable, match="is not running"):
        load_settings("local", home=home)
    second = EmbeddedServer(home)
    await second.start(adopt=True)
    assert (second.owned, second.port) == (True, port)
    assert process_started(os.getpid()) is not None, "a stale record must not get an innocent process killed"
    await second.stop()


async def test_the_server_goes_when_its_parent_is_killed(home: Path) -> None:
    with _script(home, "await server.start(); print(server.pid, flush=True); await server.wait()") as child:
        pid = int(await _line(child))
        assert process_started(pid) is not None
        child.kill()
        await _within(serverproc.exited(pid))
    assert _process_gone(pid)


async def test_no_handler_of_a_fork_runs_when_the_server_starts(home: Path) -> None:
    # Those of gRPC now and then abort the new process while their threads are at work.
    body = (
        "import os; forks = []; os.register_at_fork(before=lambda: forks.append(1)); "
        "await server.start(); print(len(forks), flush=True); await server.stop()"
    )
    with _script(home, body) as child:
        assert await _ended(child) == (0, "0\n")


async def test_without_orphan_protection_the_server_outlives_its_parent_and_can_be_adopted(home: Path) -> None:
    body = "await server.start(); print(server.pid, flush=True); await server.wait()"
    with _script(home, body, options="") as child:
        pid = int(await _line(child))
        child.kill()
        await _ended(child)
    try:
        adopted = EmbeddedServer(home)
        await adopted.start(adopt=True)
        assert (adopted.pid, adopted.owned) == (pid, False)
        os.kill(pid, signal.SIGTERM)
        assert await _within(adopted.wait()) is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def test_orphan_protection_is_refused_where_it_would_kill_too_early(home: Path) -> None:
    # The signal is tied to the thread that forks: a worker thread's server would end with that thread.
    def start_in_thread() -> None:
        asyncio.run(EmbeddedServer(home, orphan_protection=True).start())

    with pytest.raises(UsageError, match="main thread"):
        await asyncio.to_thread(start_in_thread)


# Adoption ------------------------------------------------------------------------------------------


async def test_an_adopted_server_is_used_but_not_owned(server: EmbeddedServer, home: Path) -> None:
    guest = EmbeddedServer(home, callers=["guest"])
    await guest.start(adopt=True)
    assert (guest.pid, guest.url, guest.owned) == (server.pid, server.url, False)
    async with connected(guest.settings("guest")) as client:
        assert client.connected
    await guest.stop()
    assert process_started(server.pid) is not None
    async with connected(server.settings("local")) as client:
        assert client.connected


async def test_another_process_can_adopt(server: EmbeddedServer, home: Path) -> None:
    body = "await server.start(adopt=True); print(server.pid, server.owned); await server.stop()"
    with _script(home, body) as child:
        code, output = await _ended(child)
    assert (code, output.split()) == (0, [str(server.pid), "False"])
    assert process_started(server.pid) is not None


async def test_of_several_that_start_at_once_one_owns_and_the_others_adopt(home: Path) -> None:
    contenders = [EmbeddedServer(home, orphan_protection=True) for _ in range(4)]
    async with asyncio.TaskGroup() as group:
        for one in contenders:
            group.create_task(one.start(adopt=True))
    try:
        assert sorted(one.owned for one in contenders) == [False, False, False, True]
        assert len({one.pid for one in contenders}) == 1
    finally:
        for one in contenders:
            await one.stop()


async def test_whoever_adopts_a_dead_server_starts_it(server: EmbeddedServer, home: Path) -> None:
    os.kill(server.pid, signal.SIGKILL)
    await _within(server.wait())
    heir = EmbeddedServer(home, orphan_protection=True)
    await heir.start(adopt=True)
    assert heir.owned
    await heir.stop()


async def test_an_adopter_takes_over_when_the_starter_gives_up(home: Path) -> None:
    (home / "broker").mkdir(parents=True)
    lock = serverproc.try_lock(home / "broker" / "lock")
    assert lock is not None
    heir = EmbeddedServer(home, orphan_protection=True)
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(heir.start(adopt=True))
        await asyncio.sleep(0)
        assert not starting.done()
        os.close(lock)
    assert heir.owned
    await heir.stop()


async def test_a_lock_whose_holder_never_serves_is_an_error_in_time(home: Path) -> None:
    (home / "broker").mkdir(parents=True)
    lock = serverproc.try_lock(home / "broker" / "lock")
    assert lock is not None
    with pytest.raises(Unavailable, match=r"did not answer within 0\.3 s"):
        await EmbeddedServer(home).start(adopt=True, timeout=0.3)
    os.close(lock)


# Stop ----------------------------------------------------------------------------------------------


async def test_a_stop_is_graceful_leaves_no_process_and_can_be_repeated(server: EmbeddedServer, home: Path) -> None:
    pid = server.pid
    waiting = asyncio.Event()

    async def wait() -> int | None:
        waiting.set()
        return await server.wait()

    async with asyncio.TaskGroup() as group:
        exit_code = group.create_task(wait())
        await waiting.wait()
        await server.stop()
    assert exit_code.result() == 0
    assert _process_gone(pid)
    assert list((home / "broker" / "ports").iterdir()) == []
    await server.stop()
    with pytest.raises(Unavailable, match="was not started"):
        _ = server.url
    with pytest.raises(Unavailable, match="is not running"):
        load_settings("local", home=home)


async def test_a_server_that_does_not_end_is_killed(server: EmbeddedServer) -> None:
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    await _within(server.stop(grace=0.2))
    assert _process_gone(pid)


async def test_a_server_that_crashed_can_still_be_stopped(server: EmbeddedServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    await _within(server.wait())
    await server.stop()


# Accounts, live ------------------------------------------------------------------------------------


async def test_an_added_agent_can_connect_at_once_and_after_a_restart(server: EmbeddedServer, home: Path) -> None:
    await server.add_agent("writer")
    await server.add_caller("ci")
    for identity in ("writer", "ci"):
        async with connected(server.settings(identity)) as broker:
            assert broker.connected
    seed = read_seed(home / "keys" / "writer.nk")
    await server.stop()
    await server.start()
    assert read_seed(home / "keys" / "writer.nk") == seed
    async with connected(server.settings("writer")) as broker:
        assert broker.connected


async def test_an_added_agent_and_caller_can_work_at_once(fresh_mesh: BrokerMesh) -> None:
    # What a reload adds must be as good as what was there from the start.
    await fresh_mesh.add_caller("ci")
    await fresh_mesh.add_agent("writer")
    async with connected(fresh_mesh.settings("writer")) as agent, connected(fresh_mesh.settings("ci")) as caller:
        live: asyncio.Queue[Delivered] = asyncio.Queue()
        delivered: asyncio.Queue[Delivered] = asyncio.Queue()
        inbox = agent.new_inbox()
        await caller.subscribe(subjects.live("ci", "o"), live.put_nowait)
        await agent.subscribe(inbox, delivered.put_nowait)
        await caller.flush()
        await agent.flush()
        await caller.publish(subjects.task("writer", "00", "ci", TASK), b"work")
        agent.send(f"{NEXT}.{STREAM}.writer=work", b'{"batch": 1, "expires": 5000000000}', reply=inbox)
        work = await _within(delivered.get())
        assert work.data == b"work"
        await agent.publish(subjects.claim("writer", TASK), b"mine")
        await agent.publish(subjects.step("writer", TASK, "one"), b"step")
        await agent.publish(subjects.event("writer", TASK, "ci", "o"), b"done")
        await agent.request(work.reply, b"+ACK")
        assert (await _within(live.get())).data == b"done"
        assert await agent.last(STREAM, subjects.step("writer", TASK, "one")) is not None
        assert await caller.last(STREAM, subjects.event("writer", TASK, "ci", "o")) is not None


async def test_adding_what_is_there_changes_nothing(server: EmbeddedServer, home: Path) -> None:
    before = (server.accounts, read_seed(home / "keys" / "analyst.nk"))
    async with connected(server.settings("analyst")) as agent:
        await server.add_agent("analyst")
        assert json.loads((await agent.request("$SYS.REQ.USER.INFO")).data)["data"]["account"] == "analyst"
    assert (server.accounts, read_seed(home / "keys" / "analyst.nk")) == before


async def test_a_change_on_a_stopped_broker_holds_from_its_next_start(home: Path) -> None:
    server = EmbeddedServer(home, agents=["analyst"])
    await server.declare(agents=["writer"])
    async with server, connected(server.settings("writer")) as broker:
        assert broker.connected


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ("a.b", "is not a name"),
        ("", "is not a name"),
        ("../operator", "is not a name"),
        ("coordinator", "is reserved"),
        ("MESH", "is reserved"),
        ("sys", "is taken by 'SYS'"),
        ("Operator", "is taken by 'operator'"),
        ("local", "agent name 'local' is taken by 'local'"),
        ("Analyst", "is taken by 'analyst'"),
    ],
)
async def test_a_name_that_would_be_ambiguous_is_refused(mesh: BrokerMesh, agent: str, message: str) -> None:
    if "analyst" not in mesh.server.accounts.agents:
        await mesh.server.add_agent("analyst")
    before = mesh.server.accounts
    with pytest.raises(InvalidName, match=message):
        await mesh.server.add_agent(agent)
    assert mesh.server.accounts == before


async def test_a_revoked_agent_is_cut_and_stays_out_while_the_others_work_on(
    server: EmbeddedServer, home: Path, tmp_path: Path
) -> None:
    await server.add_agent("writer")
    copied = tmp_path / "copy.nk"
    write_seed(copied, read_seed(home / "keys" / "writer.nk"))
    async with connected(server.settings("writer")) as writer, connected(server.settings("analyst")) as analyst:
        lost: list[None] = []
        analyst.on_lost(lambda: lost.append(None))
        await server.revoke("writer")
        await _within(writer.closed.wait())
        assert isinstance(writer.failure, NotAuthenticated)
        await analyst.flush()
        assert lost == []
    assert not (home / "keys" / "writer.nk").exists()
    with pytest.raises(NotAuthenticated):
        await Broker.connect(ConnectionSettings(server.url, "writer", copied), timeout=1.0)
    with pytest.raises(NotAuthenticated):
        server.settings("writer")
    await server.revoke("writer")


async def test_an_agent_that_comes_back_after_being_revoked_has_another_key(server: EmbeddedServer, home: Path) -> None:
    before = read_seed(home / "keys" / "analyst.nk")
    await server.revoke("analyst")
    await server.add_agent("analyst")
    assert read_seed(home / "keys" / "analyst.nk") != before
    async with connected(server.settings("analyst")) as broker:
        assert broker.connected


@pytest.mark.parametrize("name", ["coordinator", "gateway", "operator", "SYS"])
async def test_the_meshs_own_identities_cannot_be_revoked(mesh: BrokerMesh, name: str) -> None:
    with pytest.raises(InvalidName, match="is reserved"):
        await mesh.server.revoke(name)
    assert mesh.home.joinpath("keys", f"{name}.nk").exists()


async def test_changes_made_at_once_by_several_all_hold(server: EmbeddedServer, home: Path) -> None:
    guest = EmbeddedServer(home)
    await guest.start(adopt=True)
    async with asyncio.TaskGroup() as group:
        for n in range(3):
            group.create_task(server.add_agent(f"a{n}"))
            group.create_task(guest.add_agent(f"b{n}"))
    wanted = {"analyst", *(f"{kind}{n}" for kind in "ab" for n in range(3))}
    assert set(server.accounts.agents) == wanted
    for name in wanted:
        async with connected(server.settings(name)) as broker:
            assert broker.connected


async def test_a_change_of_accounts_disturbs_no_open_pull_and_no_subscription(fresh_mesh: BrokerMesh) -> None:
    await fresh_mesh.add_agent("analyst", "doomed")
    async with (
        connected(fresh_mesh.settings("analyst")) as agent,
        connected(fresh_mesh.settings("local")) as caller,
    ):
        delivered: asyncio.Queue[Delivered] = asyncio.Queue()
        live: asyncio.Queue[Delivered] = asyncio.Queue()
        inbox = agent.new_inbox()
        await agent.subscribe(inbox, delivered.put_nowait)
        await caller.subscribe(subjects.live("local", "o"), live.put_nowait)
        await agent.flush()
        await caller.flush()
        agent.send(f"{NEXT}.{STREAM}.analyst=work", b'{"batch": 1, "expires": 30000000000}', reply=inbox)
        await agent.flush()
        await fresh_mesh.server.add_agent("writer")
        await fresh_mesh.server.revoke("doomed")
        await caller.publish(subjects.task("analyst", "00", "local", TASK), b"work")
        assert (await _within(delivered.get())).data == b"work"
        await agent.publish(subjects.event("analyst", TASK, "local", "o"), b"done")
        assert (await _within(live.get())).data == b"done"


async def test_a_reload_the_server_refuses_is_reported_and_the_old_accounts_stay(
    server: EmbeddedServer, fake_server: Callable[[str], Path]
) -> None:
    fake_server('echo "nats-server: nats.conf:7: wrong"; exit 1')
    before = server.accounts
    with pytest.raises(InvalidConfig, match=r"refuses its configuration: nats-server: nats\.conf:7: wrong"):
        await server.add_agent("writer")
    assert server.accounts == before
    async with connected(server.settings("analyst")) as broker:
        assert broker.connected


async def test_a_change_on_a_server_that_died_is_kept_for_the_next(server: EmbeddedServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    await _within(server.wait())
    await server.add_agent("writer")
    await server.start()
    async with connected(server.settings("writer")) as broker:
        assert broker.connected


async def test_a_change_that_a_hanging_server_does_not_take_is_an_error_in_time(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "RELOAD_TIMEOUT", 0.3)
    os.kill(server.pid, signal.SIGSTOP)
    with pytest.raises(Unreachable):
        await server.add_agent("writer")
    os.kill(server.pid, signal.SIGCONT)
    await server.add_agent("writer")
    async with connected(server.settings("writer")) as broker:
        assert broker.connected


# ---------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _process_gone(pid: int) -> bool:
    return process_started(pid) is None


async def _within(awaitable: Awaitable[T]) -> T:
    async with asyncio.timeout(DEADLINE):
        return await awaitable


async def _varz(server: EmbeddedServer) -> dict[str, Any]:
    async with connected(server.settings("SYS")) as system:
        answer: dict[str, Any] = json.loads((await system.request("$SYS.REQ.SERVER.PING.VARZ")).data)["data"]
        return answer


@contextlib.contextmanager
def _listener(port: int) -> Iterator[int]:
    """Another program on a port."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen(1)
        yield int(other.getsockname()[1])


@contextlib.contextmanager
def _script(home: Path, body: str, *, options: str = "orphan_protection=True") -> Iterator[subprocess.Popen[str]]:
    """Another process that runs `body` with a `server` for the same home."""
    program = (
        "import asyncio\nfrom pathlib import Path\nfrom weft.core.server import EmbeddedServer\n"
        f"async def main():\n    server = EmbeddedServer(Path({str(home)!r}), {options})\n    {body}\n"
        "asyncio.run(main())\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


async def _line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return str(await _within(asyncio.to_thread(child.stdout.readline)))


async def _ended(child: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = await asyncio.to_thread(child.communicate, timeout=DEADLINE)
    return child.returncode, output
