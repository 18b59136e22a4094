"""Names to addresses, in threads of their own: a slow name server delays nothing else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""The addresses of a host; OSError if it has none."""

LOOKUPS: Final = 8
"""Names that are resolved at a time."""


class SystemResolver:
    """The system's resolver."""

    def __init__(self, name: str = "resolver") -> None:
        self._threads = ThreadPoolExecutor(LOOKUPS, thread_name_prefix=name)

    async def __call__(self, host: str, port: int) -> list[str]:
        """The host's addresses, each once, in the system's order."""

        def look_up() -> list[str]:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(info[4][0]) for info in found))

        return await asyncio.get_running_loop().run_in_executor(self._threads, look_up)

    def close(self) -> None:
        """Start no further look-up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
