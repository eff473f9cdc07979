"""A bound for the connections to a server: what people ask for takes no file descriptor that recording needs.

A connection that asks nothing is closed after a while, so that nobody who only holds some keeps the others out.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
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
    """An `AppRunner` whose sites answer 503, and nothing else, where more than CONNECTIONS_MAX connections would be.

    With a `tls` context all of it is TLS. Sites get none: the event loop's own servers would say nothing of a
    connection whose handshake is not done.
    """

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(app, keepalive_timeout=SILENT_SECONDS_MAX, **options)
        self.tls: ssl.SSLContext | None = None
        self._answered: set[_Impatient] = set()
        self._refused: set[_Impatient] = set()
        self._handshakes: set[asyncio.Task[None]] = set()

    @property
    def server(self) -> Any:
        """What makes the protocol of a connection."""
        server = super().server
        return None if server is None else partial(self._protocol, server)

    def _protocol(self, server: web.Server) -> asyncio.Protocol:
        if len(self._answered) < CONNECTIONS_MAX:
            protocol = _Impatient(server(), SILENT_SECONDS_MAX, self._answered)
        elif len(self._refused) < REFUSALS_MAX:
            protocol = _Impatient(_Refusal(), REFUSAL_SECONDS_MAX, self._refused)
        else:
            return _End()
        return protocol if self.tls is None else _Handshake(protocol, self.tls, self._handshakes)

    async def cleanup(self) -> None:
        """Close every connection, also those that no server knows yet."""
        for each in self._handshakes:
            each.cancel()
        if self._handshakes:
            await asyncio.wait(self._handshakes)
        await super().cleanup()


class _Impatient(asyncio.Protocol):
    """Another protocol, whose connection is closed if nothing comes; among `peers` as long as there is one."""

    def __init__(self, inner: asyncio.Protocol, seconds: float, peers: set[_Impatient]) -> None:
        self.seconds = seconds
        self._inner = inner
        self._closing: asyncio.TimerHandle | None = None
        self._peers = peers
        peers.add(self)
        # What is called for each piece of data goes there directly.
        self.eof_received = inner.eof_received  # type: ignore[method-assign]
        self.pause_writing = inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._closing = asyncio.get_running_loop().call_later(self.seconds, transport.close)
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._cancel()
        self._inner.data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._cancel()
        self.forget()
        self._inner.connection_lost(error)

    def forget(self) -> None:
        """There is no connection any more, or there never was."""
        self._peers.discard(self)

    def _cancel(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None


class _Handshake(asyncio.Protocol):
    """Begins TLS for another protocol, on a second descriptor of the connection.

    The first is given up at once: a transport that became TLS in place could have read the beginning of it already.
    """

    def __init__(self, inner: _Impatient, tls: ssl.SSLContext, under_way: set[asyncio.Task[None]]) -> None:
        self._inner = inner
        self._tls = tls
        self._under_way = under_way

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        try:
            connection = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        except OSError:
            self._inner.forget()
        else:
            task = asyncio.create_task(self._begin(connection))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        cast("asyncio.WriteTransport", transport).abort()  # A cast, because uvloop's transports are of no such class.

    async def _begin(self, connection: socket.socket) -> None:
        loop, inner = asyncio.get_running_loop(), self._inner
        try:
            await loop.connect_accepted_socket(
                lambda: inner, connection, ssl=self._tls, ssl_handshake_timeout=inner.seconds,
                ssl_shutdown_timeout=REFUSAL_SECONDS_MAX,
            )  # fmt: skip
        except OSError:  # Of TLS, too: whoever does not trust the certificate ends it like this.
            inner.forget()


class _Refusal(asyncio.Protocol):
    """Answers whatever is asked: only who has been asked something is listened to."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, _: bytes) -> None:
        body = json.dumps(_SAID).encode()
        head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self._transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self._transport.close()


class _End(asyncio.Protocol):
    """Closes at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
