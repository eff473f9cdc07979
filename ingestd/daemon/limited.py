"""A bound for the connections to a server: what people ask for takes no file descriptor that recording needs.

A connection that asks nothing is closed after a while, so that nobody who only holds some keeps the others out.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any, Final, cast

from aiohttp import web

CONNECTIONS_MAX: Final = 32
REFUSALS_MAX: Final = 8  # connections beyond those that are told why; whoever comes while they are is told nothing
SILENT_SECONDS_MAX: Final = 10.0  # from the connection to the first byte of its first question, or between questions
REFUSAL_SECONDS_MAX: Final = 1.0

_SAID: Final = {
    "error": f"{CONNECTIONS_MAX} connections are open already",
    "hint": "end some of those who watch, and try again",
    "exit_code": 1,
}


class LimitedRunner(web.AppRunner):
    """An `AppRunner` whose sites answer 503, and nothing else, where more than CONNECTIONS_MAX connections would be."""

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(app, keepalive_timeout=SILENT_SECONDS_MAX, **options)
        self._refusals: set[_Refusal] = set()

    @property
    def server(self) -> Any:
        """What makes the protocol of a connection."""
        server = super().server
        return None if server is None else partial(_protocol, server, self._refusals)


def _protocol(server: web.Server, refusals: set[_Refusal]) -> asyncio.Protocol:
    if len(server.connections) < CONNECTIONS_MAX:
        return _Impatient(server(), SILENT_SECONDS_MAX)
    if len(refusals) < REFUSALS_MAX:
        return _Impatient(_Refusal(refusals), REFUSAL_SECONDS_MAX)
    return _End()


class _Impatient(asyncio.Protocol):
    """Another protocol, whose connection is closed if nothing comes."""

    def __init__(self, inner: asyncio.Protocol, seconds: float) -> None:
        self._inner = inner
        self._seconds = seconds
        self._closing: asyncio.TimerHandle | None = None
        # What is called for each piece of data goes there directly.
        self.eof_received = inner.eof_received  # type: ignore[method-assign]
        self.pause_writing = inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._closing = asyncio.get_running_loop().call_later(self._seconds, transport.close)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._cancel()
        self._inner.data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._cancel()
        self._inner.connection_lost(error)

    def _cancel(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None


class _Refusal(asyncio.Protocol):
    """Answers whatever is asked: only who has been asked something is listened to."""

    def __init__(self, refusals: set[_Refusal]) -> None:
        self._refusals = refusals
        refusals.add(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports are of no such class.
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, _: bytes) -> None:
        body = json.dumps(_SAID).encode()
        head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self._transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        self._refusals.discard(self)


class _End(asyncio.Protocol):
    """Closes at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
