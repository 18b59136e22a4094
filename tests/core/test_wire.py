"""What the wire relies on in nats-py, and the parser that stands in for nats-py's."""

import ast
import importlib.metadata
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from weft.core import broker as broker_module
from weft.core import wire as wire_module
from weft.core.wire import PRIVATE, PRIVATE_STATE, Wire

pytestmark = pytest.mark.anyio

REPOSITORY = Path(__file__).parents[2]
SIGNATURES = {
    (Client, "_process_msg"): ("async", "self", "sid", "subject", "reply", "data", "headers"),
    (Client, "_process_pong"): ("async", "self"),
    (Client, "_read_loop"): ("async", "self"),
    (Client, "_process_op_err"): ("async", "self", "e"),
    (Client, "_process_err"): ("async", "self", "err_msg"),
    (Client, "_attempt_reconnect"): ("async", "self"),
    (Client, "_connect_to_server"): ("async", "self", "s"),
    (Client, "_process_connect_init"): ("async", "self"),
    (Client, "_send_ping"): ("async", "self", "future"),
    (Client, "_close"): ("async", "self", "status", "do_cbs"),
    (Parser, "parse"): ("async", "self", "data"),
    (Parser, "reset"): ("self",),
}
"""How nats-py declares what the wire overrides or calls."""


# The contract with nats-py -------------------------------------------------------------------------


def instances() -> dict[type, object]:
    classes: tuple[Any, ...] = (Client, TcpTransport, Parser)
    return {owner: owner() for owner in classes}


def test_the_installed_nats_py_is_of_the_minor_version_that_is_pinned() -> None:
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    pin = next(one for one in declared if one.startswith("nats-py"))
    low, high = re.findall(r"(\d+)\.(\d+)", pin)
    installed = tuple(int(part) for part in importlib.metadata.version("nats-py").split(".")[:2])
    assert (int(high[0]), int(high[1])) == (installed[0], installed[1] + 1), f"{pin} allows more than one minor version"
    assert tuple(map(int, low)) == installed, f"nats-py {installed} is installed and {pin} is declared"


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in PRIVATE.items() for name in names])
def test_nats_py_has_every_private_method_with_the_signature_it_had(owner: type, name: str) -> None:
    method = getattr(owner, name, None)
    assert method is not None, f"nats-py has no {owner.__name__}.{name} any more: the wire relies on it"
    found = tuple(inspect.signature(method).parameters)
    if inspect.iscoroutinefunction(method):
        found = ("async", *found)
    assert found == SIGNATURES[(owner, name)], f"nats-py declares {owner.__name__}.{name} otherwise than before"


async def test_nats_py_has_every_attribute_that_the_wire_reads_or_sets() -> None:
    missing = [
        f"{owner.__name__}.{name}"
        for owner, names in PRIVATE_STATE.items()
        for name in names
        if not hasattr(instances()[owner], name)
    ]
    assert not missing, f"nats-py has these no more: {missing}"


async def test_the_wire_uses_nothing_private_of_nats_py_that_it_does_not_name() -> None:
    named = {name for names in (*PRIVATE.values(), *PRIVATE_STATE.values()) for name in names}
    theirs = {name for instance in instances().values() for name in dir(instance) if re.match(r"_[a-z]", name)}
    used = set()
    for module in (wire_module, broker_module):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                used.add(node.name)
    assert used & theirs <= named, f"name these in PRIVATE or PRIVATE_STATE: {sorted(used & theirs - named)}"


# The parser ----------------------------------------------------------------------------------------

Heard = tuple[str, bytes, bytes, bytes, bytes | None]
OURS, THEIRS = 7, 9
HEADERS = b"NATS/1.0\r\nA: 1\r\n\r\n"
MESSAGES: list[tuple[bytes, list[Heard]]] = [
    (b"MSG a.b 7 5\r\nhello\r\n", [("ours", b"a.b", b"", b"hello", None)]),
    (b"MSG a.b 7 reply.x 0\r\n\r\n", [("ours", b"a.b", b"reply.x", b"", None)]),
    (b"MSG a.b 7 9\r\nMSG x 7 1\r\n", [("ours", b"a.b", b"", b"MSG x 7 1", None)]),
    (
        b"HMSG a.b 7 %d %d\r\n%bxy\r\n" % (len(HEADERS), len(HEADERS) + 2, HEADERS),
        [("ours", b"a.b", b"", b"xy", HEADERS)],
    ),
    (
        b"HMSG a.b 7 r %d %d\r\n%b\r\n" % (len(HEADERS), len(HEADERS), HEADERS),
        [("ours", b"a.b", b"r", b"", HEADERS)],
    ),
    (b"MSG c 9 2\r\n\r\n\r\n", [("theirs", b"c", b"", b"\r\n", None)]),
    (
        b"HMSG c 9 r %d %d\r\n%bz\r\n" % (len(HEADERS), len(HEADERS) + 1, HEADERS),
        [("theirs", b"c", b"r", b"z", HEADERS)],
    ),
    (b"PING\r\n", [("ping", b"", b"", b"", None)]),
    (b"PONG\r\n", [("pong", b"", b"", b"", None)]),
    (b"+OK\r\n", []),
    (b"-ERR 'Some Trouble'\r\n", [("error", b"'some trouble'", b"", b"", None)]),
    (b'INFO {"ldm": true}\r\n', [("info", b"", b"", b"", None)]),
]


class Recorder(Wire):
    """A wire that is not connected and notes what its parser hands over."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Heard] = []
        self._handlers[OURS] = lambda subject, reply, data, headers: self.heard.append(
            ("ours", subject, reply, data, headers)
        )

    async def feed(self, data: bytes) -> None:
        await self._ps.parse(data)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        if sid == OURS:
            await super()._process_msg(sid, subject, reply, data, headers)
        else:
            self.heard.append(("theirs", subject, reply, data, headers))

    async def _process_ping(self) -> None:
        self.heard.append(("ping", b"", b"", b"", None))

    async def _process_pong(self) -> None:
        self.heard.append(("pong", b"", b"", b"", None))

    async def _process_err(self, err_msg: str) -> None:
        self.heard.append(("error", err_msg.encode(), b"", b"", None))

    async def _process_info(self, info: object, initial_connection: bool = False) -> None:
        self.heard.append(("info", b"", b"", b"", None))


async def test_every_message_is_handed_over_wherever_the_stream_is_cut_in_two() -> None:
    controls = [one for one in MESSAGES if not one[0].startswith((b"MSG", b"HMSG"))]
    mixed = [*MESSAGES, *(one for i, message in enumerate(MESSAGES) for one in (controls[i % 5], message))]
    stream = b"".join(data for data, _ in mixed)
    expected = [heard for _, all_heard in mixed for heard in all_heard]
    for cut in range(len(stream) + 1):
        recorder = Recorder()
        await recorder.feed(stream[:cut])
        await recorder.feed(stream[cut:])
        assert recorder.heard == expected, f"cut after {stream[:cut]!r}"


@given(
    chosen=st.lists(st.sampled_from(range(len(MESSAGES))), max_size=12),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_every_message_is_handed_over_in_any_order_and_any_pieces(chosen: list[int], sizes: list[int]) -> None:
    stream = b"".join(MESSAGES[i][0] for i in chosen)
    recorder = Recorder()
    at = 0
    for size in sizes * (len(stream) // len(sizes) + 1):
        if at >= len(stream):
            break
        await recorder.feed(stream[at : at + size])
        at += size
    assert recorder.heard == [heard for i in chosen for heard in MESSAGES[i][1]]


async def test_a_message_larger_than_many_reads_arrives_whole() -> None:
    recorder = Recorder()
    body = bytes(range(256)) * 1024
    stream = b"MSG big 7 %d\r\n%b\r\nMSG a 7 1\r\nx\r\n" % (len(body), body)
    for at in range(0, len(stream), 4096):
        await recorder.feed(stream[at : at + 4096])
    assert [one[3] for one in recorder.heard] == [body, b"x"]


async def test_nothing_of_the_connection_before_is_left_after_a_reset() -> None:
    recorder = Recorder()
    for beginning in (b"MSG a.b 7 5\r\nhel", b"PING\r\nMSG a.b 7 5\r\n", b"HMSG", b"PIN"):
        await recorder.feed(beginning)
        recorder._ps.reset()
        recorder.heard.clear()
        await recorder.feed(b"MSG c 7 1\r\nx\r\n")
        assert recorder.heard == [("ours", b"c", b"", b"x", None)], beginning


@pytest.mark.parametrize("garbage", [b"MSG a b c\r\nx\r\n", b"HMSG a 7 x y\r\n\r\n", b"NONSENSE 1\r\n"])
async def test_what_is_not_the_protocol_is_an_error_and_not_a_silence(garbage: bytes) -> None:
    with pytest.raises((ProtocolError, ValueError)):
        await Recorder().feed(garbage)


async def test_a_function_that_raises_does_not_keep_the_next_message_from_the_next_function() -> None:
    recorder = Recorder()
    failed: list[BaseException] = []
    recorder.handler_failed = failed.append

    def fail(subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        raise LookupError("no")

    recorder._handlers[8] = fail
    await recorder.feed(b"MSG a 8 1\r\nx\r\nMSG b 7 1\r\ny\r\n")
    assert [type(error) for error in failed] == [LookupError]
    assert recorder.heard == [("ours", b"b", b"", b"y", None)]
