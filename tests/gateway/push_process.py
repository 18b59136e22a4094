"""A deliverer as a process of its own, so that a test can kill it. The mesh is that of WEFT_HOME."""

import asyncio
import os
import sys

from weft.core.broker import Broker
from weft.core.config import load_settings
from weft.core.gatewayconf import PushConfig
from weft.gateway.push import Backoff, Deliverer


async def main() -> None:
    broker = await Broker.connect(load_settings(os.environ["WEFT_IDENTITY"]))
    settings = PushConfig(allow_private=True, timeout=10.0)
    deliverer = Deliverer(broker, settings, backoff=Backoff(first=0.1), ack_wait=float(os.environ["ACK_WAIT"]))
    await deliverer.start()
    print("ready", file=sys.stderr, flush=True)
    await broker.closed.wait()


asyncio.run(main())
