"""The HTTP server under the application: how long a connection may say nothing, and what becomes of all at the end.

uvicorn alone waits for ever for the head of a request, and told to stop it hangs up on those that were about to ask.
Its other protocol, httptools, ends a request at its head where a client would like to upgrade (Java's does), and does
not see a hang-up behind a second request.
"""

import asyncio
import socket
import time
from types import FrameType
from typing import Any

import uvicorn

from glm52.errors import GLMError
from glm52.server.app import create_app
from glm52.server.service import Service

_GRACE_S = 0.5  # from closing the door to hanging up: a request that is on its way is told 503
_LATE_S = 3.0  # from the end of their time to hanging up: they are told that it is over


class Server(uvicorn.Server):
    """Told to stop, it lets what runs end, for as long as the limits allow; told again, for no longer."""

    def __init__(self, service: Service) -> None:
        self._service, self._limits = service, service.options.limits
        super().__init__(
            uvicorn.Config(create_app(service), http="h11", ws="none", log_level="warning", access_log=False)
        )
        self._asking: dict[Any, float] = {}

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.drain(0.0 if self.should_exit else self._limits.drain_s)
        self.should_exit = True

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. GLMError if it had to stop by itself."""
        super().run(sockets)
        if self._service.failure is not None:
            raise GLMError("the engine has failed, so the server has stopped; see above")

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: hangs up on those whose request's head is too long in coming, and stops where nothing can
        be served any more, so that who watches over the process starts it anew."""
        if self._service.failure is not None:
            self.should_exit = True
        now = time.monotonic()
        asking = [c for c in self.server_state.connections if _is_asking(c)]
        self._asking = {c: self._asking.get(c, now) for c in asking}
        for connection, since in self._asking.items():
            if now - since > self._limits.head_s:
                connection.timeout_keep_alive_handler()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.drain(self._limits.drain_s)
        for server in self.servers:
            server.close()
        ends_at = time.monotonic() + _GRACE_S
        while self.server_state.connections and time.monotonic() < ends_at:
            await asyncio.sleep(0.02)
        hanging_up = asyncio.ensure_future(self._hang_up())
        await super().shutdown(sockets)
        hanging_up.cancel()

    async def _hang_up(self) -> None:
        """Replies end by themselves when their time is over; what is left then is what nobody reads."""
        while time.monotonic() < self._service.stops_at + _LATE_S:
            await asyncio.sleep(0.1)
        for connection in self.server_state.connections:
            connection.transport.abort()


def _is_asking(connection: Any) -> bool:
    """Whether it waits for the head of a request, and not under uvicorn's own limit for the time between two."""
    is_idle = connection.cycle is None or connection.cycle.response_complete
    return is_idle and connection.timeout_keep_alive_task is None
