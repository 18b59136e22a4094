"""Which nats-server is run, and what is said when it or its configuration does not do."""

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from weft.core import serverproc
from weft.core.home import process_started
from weft.core.server import EmbeddedServer
from weft_protocols.errors import InvalidConfig, Unavailable

pytestmark = pytest.mark.anyio

VALID = 'if [ "$1" = --version ]; then echo "nats-server: v2.15.1"; exit; fi\n' + (
    'if [ "$1" = -t ]; then echo "x is valid (sha256:00)"; exit; fi\n'
)


async def test_the_environment_names_another_binary(
    home: Path, tmp_path: Path, fake_server: Callable[[str], Path]
) -> None:
    real, trace = serverproc.find_binary(), tmp_path / "trace"
    fake_server(f'echo "$1" >> {trace}\nexec {real} "$@"')
    async with EmbeddedServer(home):
        pass
    assert trace.read_text().split() == ["--version", "-t", "-c"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo nats-server: v2.14.3", "2.14.3 at .* is too old: 2.14.4 or newer is needed"),
        ("echo nats-server: v1.99.99", "is too old"),
        ("echo hello", "is not a nats-server: its --version says 'hello'"),
        ("exit 3", "is not a nats-server"),
    ],
)
async def test_a_binary_that_does_not_do_is_refused(
    home: Path, fake_server: Callable[[str], Path], script: str, message: str
) -> None:
    fake_server(script)
    with pytest.raises(InvalidConfig, match=message):
        await EmbeddedServer(home).start()
    assert not (home / "broker.json").exists()


@pytest.mark.parametrize("version", ["2.14.4", "2.15.0-RC.1", "3.0.0"])
async def test_versions_from_the_floor_up_are_accepted(fake_server: Callable[[str], Path], version: str) -> None:
    assert await serverproc.check_version(fake_server(f"echo nats-server: v{version}")) == version


async def test_a_binary_that_is_none_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_NATS_SERVER", str(tmp_path / "gone"))
    with pytest.raises(InvalidConfig, match=r"WEFT_NATS_SERVER is .*gone, which is not an executable file"):
        await EmbeddedServer(home).start()
    broken = tmp_path / "broken"
    broken.write_bytes(b"\0")
    broken.chmod(0o755)
    monkeypatch.setenv("WEFT_NATS_SERVER", str(broken))
    with pytest.raises(InvalidConfig, match="cannot be run"):
        await EmbeddedServer(home).start()


def test_the_installed_binary_is_found_wherever_its_package_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = serverproc.find_binary()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert serverproc.find_binary().resolve() == real.resolve()
    monkeypatch.setattr(serverproc, "PACKAGE", "no-such-package")
    with pytest.raises(InvalidConfig, match="set WEFT_NATS_SERVER"):
        serverproc.find_binary()


async def test_a_refused_configuration_is_reported_in_the_servers_words(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text("accounts { a { users: [ {nkey: nonsense} ] } }")
    with pytest.raises(InvalidConfig, match=r"refuses its configuration: .*Not a valid public nkey"):
        await serverproc.check_config(serverproc.find_binary(), config)


async def test_a_server_that_exits_at_once_is_reported_with_its_log(home: Path) -> None:
    (home / "broker").mkdir(parents=True)
    (home / "broker" / "js").write_text("in the way")
    with pytest.raises(
        Unavailable, match=r"nats-server exited with code 1; .*nats.log says: .*storage directory is not a directory"
    ):
        await EmbeddedServer(home).start()
    assert not (home / "broker.json").exists()
    (home / "broker" / "js").unlink()
    async with EmbeddedServer(home):
        pass


async def test_a_server_that_never_answers_is_given_up_and_leaves_no_process(
    home: Path, tmp_path: Path, fake_server: Callable[[str], Path]
) -> None:
    fake_server(f"{VALID}echo $$ > {tmp_path}/pid\necho thinking\nexec sleep 60")
    with pytest.raises(Unavailable, match=r"did not answer within 0.5 s; .*startup.log says: thinking"):
        await EmbeddedServer(home).start(timeout=0.5)
    assert process_started(int((tmp_path / "pid").read_text())) is None
