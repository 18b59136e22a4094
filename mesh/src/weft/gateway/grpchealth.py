"""The health service of gRPC, for load balancers and orchestrators."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from typing import Any, Final

import grpc
from google.protobuf import wrappers_pb2

SERVING: Final = 1
NOT_SERVING: Final = 2
WATCHERS: Final = 64
"""Whoever watches needs no credentials, so that only so many can."""
LOOK_EVERY: Final = 1.0
"""Seconds between looks for whoever watches."""


class Health:
    """`grpc.health.v1.Health` of one server.

    Args:
        serving: whether the gateway can serve.
        services: those there are, by full name.
    """

    def __init__(self, serving: Callable[[], bool], *, services: Collection[str] = ()) -> None:
        self._services = services
        self._serving = serving
        self._leaving = asyncio.Event()
        self._watchers = asyncio.Semaphore(WATCHERS)

    def leave(self) -> None:
        """From now on nothing is served."""
        self._leaving.set()

    def handlers(self) -> grpc.GenericRpcHandler:
        """The service."""
        # A message with one text field 1, and one with one number field 1: the same bytes as those of the health
        # service, whose package would be a dependency.
        read, write = wrappers_pb2.StringValue.FromString, wrappers_pb2.Int32Value.SerializeToString
        return grpc.method_handlers_generic_handler(
            "grpc.health.v1.Health",
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check, read, write),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch, read, write),
            },
        )

    def _status(self) -> wrappers_pb2.Int32Value:
        well = not self._leaving.is_set() and self._serving()
        return wrappers_pb2.Int32Value(value=SERVING if well else NOT_SERVING)

    async def _check(self, request: wrappers_pb2.StringValue, context: Any) -> wrappers_pb2.Int32Value:
        if request.value and request.value not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.value!r} here")
        return self._status()

    async def _watch(self, request: wrappers_pb2.StringValue, context: Any) -> None:
        if self._watchers.locked():
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many are watching")
        async with self._watchers:
            await self._tell(context)

    async def _tell(self, context: Any) -> None:
        last = None
        while True:
            status = self._status()
            if status.value != last:
                await context.write(status)
                last = status.value
            if self._leaving.is_set():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):
                    await self._leaving.wait()
