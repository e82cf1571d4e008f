"""Runs the HTTP application on a port and ends it in order: first no new connections, then no connections. Knows no endpoint."""

import socket
from typing import Self

from aiohttp import web

SHUTDOWN_TIMEOUT_S = 0.5  # whoever drains has waited already; aiohttp takes it twice, then cancels handlers
BACKLOG = 1024


class Listener:
    """`await Listener(app).open(host, port)`; then `stop_accepting` and `close`, both idempotent."""

    def __init__(self, app: web.Application) -> None:
        # handler_cancellation: a client that goes away ends its request at once.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S
        )
        self._site: web.SockSite | None = None
        self.port = 0

    async def open(self, host: str, port: int, *, shared: bool = False) -> Self:
        """Port 0 takes a free one; see `port`. shared: other gateways of this host may listen on it too. Raises OSError."""
        await self._runner.setup()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=shared)
        self.port = sock.getsockname()[1]
        self._site = web.SockSite(self._runner, sock, backlog=BACKLOG)
        await self._site.start()
        return self

    async def stop_accepting(self) -> None:
        """New connections are refused; open ones go on."""
        if self._site is not None:
            site, self._site = self._site, None
            await site.stop()

    async def close(self) -> None:
        """Gives responses a moment to finish and closes every connection."""
        await self._runner.cleanup()
