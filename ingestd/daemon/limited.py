"""A bound for the connections to a server: what people ask for takes no file descriptor that recording needs."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any, Final

from aiohttp import web

CONNECTIONS_MAX: Final = 32

_SAID: Final = {
    "error": f"{CONNECTIONS_MAX} connections are open already",
    "hint": "end some of those who watch, and try again",
    "exit_code": 1,
}


class LimitedRunner(web.AppRunner):
    """An `AppRunner` whose sites answer 503, and nothing else, where more than CONNECTIONS_MAX connections would be."""

    @property
    def server(self) -> Any:
        """What makes the protocol of a connection."""
        server = super().server
        return None if server is None else partial(_protocol, server)


def _protocol(server: web.Server) -> asyncio.BaseProtocol:
    return server() if len(server.connections) < CONNECTIONS_MAX else _Refusal()


class _Refusal(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        body = json.dumps(_SAID).encode()
        head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        transport.close()
