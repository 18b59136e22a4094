"""fastmcp as a proxy with one client that is kept: `python peer_fastmcp.py PORT URL`, in an environment of its own."""

import asyncio
import logging
import sys

from fastmcp import Client
from fastmcp.server import create_proxy


async def main() -> None:
    """Serve until the end."""
    async with Client(sys.argv[2]) as client:
        await create_proxy(client, name="proxy").run_async(
            transport="http",
            host="127.0.0.1",
            port=int(sys.argv[1]),
            show_banner=False,
            log_level="critical",
            uvicorn_config={"access_log": False},
        )


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    asyncio.run(main())
