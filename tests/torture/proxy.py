"""A network between a daemon and its database, as bad as one can be: it cuts, stalls, half-closes, loses answers.

A TCP server on loopback in a thread of its own, in front of PostgreSQL. What it is told holds for the
connections there are and, where it says so, for those to come; `mend` makes it a plain wire again.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

PIECE_BYTES = 1024  # Small, so that most cuts fall into the middle of something.
SECONDS_MAX = 10.0
COMMITTED = b"C\x00\x00\x00\x0bCOMMIT\x00"  # CommandComplete of a COMMIT (PostgreSQL manual, 55.7)


class Proxy:
    """One way to the server."""

    def __init__(self, upstream: str | tuple[str, int]) -> None:
        """`upstream` is the path of PostgreSQL's Unix socket, or its host and port."""
        self.upstream = upstream
        self.port = 0
        self.cuts = 0  # connections that were ended here, by whatever order
        self.lost_answers = 0
        self.stalled = 0  # connections that `stall_on` has stalled
        self._loop = asyncio.new_event_loop()
        self._wires: set[_Wire] = set()
        self._bytes_left: int | None = None  # until all is cut; None: not at all
        self._loses_answers = self._refuses = False
        self._stall_on, self._withheld = b"", False
        self._flowing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()
        self._thread.start()
        assert self._started.wait(SECONDS_MAX)

    def cut(self) -> None:
        """End every connection now."""
        self._call(self._cut)

    def cut_after(self, count: int) -> None:
        """End every connection once so many more bytes went through, in whichever direction."""
        self._call(self._set, _bytes_left=count)

    def lose_answer(self) -> None:
        """End the connection instead of telling the client that its next COMMIT went through."""
        self._call(self._set, _loses_answers=True)

    def stall(self) -> None:
        """Let nothing through any more, of all connections, and close none."""
        self._call(self._stall)

    def stall_on(self, words: bytes, *, withheld: bool = False) -> None:
        """Let a connection's bytes through until the client says this, and nothing ever after; `withheld`: nor this."""
        self._call(self._set, _stall_on=words, _withheld=withheld)

    def refuse(self) -> None:
        """End every connection, and each new one at once."""
        self._call(self._set, _refuses=True)
        self.cut()

    def half_close(self, *, to_server: bool) -> None:
        """Say to one side of each connection that no more will come, and go on with the other direction."""
        self._call(self._half_close, to_server)

    def mend(self) -> None:
        """A plain wire again; what was stalled goes on."""
        self._call(self._mend)

    def close(self) -> None:
        """End everything, and the thread."""
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS_MAX)

    def _call(self, what: Callable[..., None], *arguments: Any, **settings: Any) -> None:
        async def run() -> None:
            what(*arguments, **settings)

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(SECONDS_MAX)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._flowing.set()

        async def listen() -> asyncio.Server:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            self._started.set()
            return server

        server = self._loop.run_until_complete(listen())
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        try:
            if isinstance(self.upstream, str):
                up_reader, up_writer = await asyncio.open_unix_connection(self.upstream)
            else:
                up_reader, up_writer = await asyncio.open_connection(*self.upstream)
        except OSError:  # The server is down.
            writer.transport.abort()
            return
        wire = _Wire(writer, up_writer)
        self._wires.add(wire)
        try:
            await asyncio.gather(
                self._carry(wire, reader, up_writer, is_client=True),
                self._carry(wire, up_reader, writer, is_client=False),
            )
        finally:
            wire.abort()
            self._wires.discard(wire)

    async def _carry(
        self, wire: _Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_client: bool
    ) -> None:
        tail = b""
        try:
            while piece := await reader.read(PIECE_BYTES):
                await self._flowing.wait()
                if wire.is_stalled:
                    await asyncio.Event().wait()  # for ever: it is ended by an order, or with the proxy
                seen, tail = tail + piece, piece[-32:]
                if is_client and self._stall_on and _ends_in(seen, self._stall_on, piece):
                    wire.is_stalled, self._stall_on, self.stalled = True, b"", self.stalled + 1
                    if self._withheld:
                        continue
                if not is_client and self._loses_answers and _ends_in(seen, COMMITTED, piece):
                    self._loses_answers, self.lost_answers = False, self.lost_answers + 1
                    self._cut()
                    return
                if self._bytes_left is not None and len(piece) >= self._bytes_left:
                    writer.write(piece[: self._bytes_left])
                    self._bytes_left = None
                    self._loop.call_soon(self._cut)  # after the bytes are out
                    return
                if self._bytes_left is not None:
                    self._bytes_left -= len(piece)
                writer.write(piece)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        except (OSError, RuntimeError):  # RuntimeError: there is more to say where one side was told that there is not.
            wire.abort()

    def _set(self, **settings: Any) -> None:
        for name, value in settings.items():
            setattr(self, name, value)

    def _cut(self) -> None:
        for wire in list(self._wires):
            self.cuts += 1
            wire.abort()

    def _stall(self) -> None:
        self._flowing.clear()

    def _half_close(self, to_server: bool) -> None:
        for wire in list(self._wires):
            side = wire.server if to_server else wire.client
            if side.can_write_eof() and not side.is_closing():
                side.write_eof()

    def _mend(self) -> None:
        self._bytes_left, self._loses_answers, self._refuses, self._stall_on = None, False, False, b""
        self._flowing.set()


def _ends_in(seen: bytes, words: bytes, piece: bytes) -> bool:
    """Whether the end of the words is in the piece that was `seen` last: earlier ones are past."""
    return words in seen[-len(piece) - len(words) + 1 :]


class _Wire:
    """The two ends of one connection."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client, self.server = client, server
        self.is_stalled = False
        client.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def abort(self) -> None:
        """End both without a word more than the kernel says."""
        self.client.transport.abort()
        self.server.transport.abort()
