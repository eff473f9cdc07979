"""The control socket: what the commands ask of a running daemon, and have it do.

HTTP over a Unix socket, with JSON both ways. Who may use it is a matter of the file system: the daemon's user and its
group, nobody else. What can be asked is in `Route`s, which their parts bring along (`session_control`, `reloading`); a
route may stream for as long as its client reads, it is ended with the daemon.

An `IngestdError` that a route raises becomes an answer that the client raises again: status 400 where the exit code is
2, else 503, and JSON with `error`, `hint` and `exit_code`.

Recording never depends on this. A socket that cannot be had is said once and tried for as long as the daemon runs; one
that somebody deletes is made again. The socket that a killed daemon left is replaced, that of a running one is not.

Limits: a path may be longer than the 107 bytes that the kernel takes: it is reached through its folder then, and so by
our own commands alone. More than `CONNECTIONS_MAX` connections at a time are refused.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from ingestd.backoff import Backoff
from ingestd.daemon.client import reachable
from ingestd.daemon.limited import LimitedRunner
from ingestd.errors import IngestdError, UsageError

LOOK_SECONDS = 2.0  # how soon a socket that somebody deleted is noticed
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 1.0, 30.0
SHUTDOWN_SECONDS_MAX = 1.0  # for what is being answered
SOCKET_MODE = 0o660
FOLDER_MODE = 0o750  # of a folder that is made for it

HINTS = {
    errno.EACCES: "let the daemon's user write to that folder, or set control.socket",
    errno.EPERM: "its file system may hold no sockets: set control.socket",
    errno.EROFS: "set control.socket to a path on another file system",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Routes = Sequence[web.RouteDef]

log = logging.getLogger(__name__)


async def json_of(request: web.Request) -> dict[str, Any]:
    """The JSON object that a request carries; one without a body is an empty one. Raises UsageError."""
    if not request.can_read_body:
        return {}
    try:
        value = await request.json()
    except ValueError as error:
        raise UsageError(f"{request.method} {request.path}: the body is not JSON") from error
    if not isinstance(value, dict):
        raise UsageError(f"{request.method} {request.path}: the body is not a JSON object")
    return value


class ControlSocket:
    """A server on a Unix socket, that is or will be listening."""

    def __init__(self, path: Path, routes: Routes) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None  # device and inode of our socket
        self._said = ""
        app = web.Application(middlewares=[errors_as_json])
        app.router.add_routes(routes)
        self._runner = LimitedRunner(app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_SECONDS_MAX)

    def __repr__(self) -> str:
        return f"<ControlSocket {self.path}{'' if self._identity else ', not yet'}>"

    async def listen(self) -> None:
        """Listen, and see to it that the path leads to us, until cancelled."""
        await self._runner.setup()
        backoff = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
        while True:
            if self._identity is None or _identity(self.path) != self._identity:
                try:
                    await self._begin()
                    backoff.reset()
                except OSError as error:
                    self._cannot(error)
                    await asyncio.sleep(backoff.next_seconds())
                    continue
            await asyncio.sleep(LOOK_SECONDS)

    async def _begin(self) -> None:
        for site in list(self._runner.sites):
            await site.stop()
        self._identity = None
        self.path.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        await web.SockSite(self._runner, _bind(self.path)).start()
        self._identity, self._said = _identity(self.path), ""
        log.info("listening control=%s", self.path)

    def _cannot(self, error: OSError) -> None:
        reason = error.strerror or str(error)
        if reason != self._said:
            hint = HINTS.get(error.errno or 0, "see control.socket in the configuration")
            log.warning("cannot listen, tried again control=%s reason=%r hint=%r", self.path, reason, hint)
        self._said = reason

    async def close(self) -> None:
        """Stop listening, end what is under way, and remove the socket if it is still ours."""
        is_ours = self._identity is not None and _identity(self.path) == self._identity
        if is_ours:
            with suppress(OSError):
                self.path.unlink()
        await self._runner.cleanup()


@asynccontextmanager
async def serve(path: Path, routes: Routes) -> AsyncIterator[ControlSocket]:
    """Answer at a socket while inside. Neither starting nor what happens later raises."""
    control = ControlSocket(path, routes)
    listening = asyncio.create_task(control.listen(), name="control")
    try:
        yield control
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await control.close()


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The answer of a handler, or what it raises as an answer."""
    try:
        return await handler(request)
    except IngestdError as error:
        message = str(error).removesuffix(f" ({error.hint})")
        said = {"error": message, "hint": error.hint, "exit_code": error.exit_code}
        return web.json_response(said, status=400 if error.exit_code == UsageError.exit_code else 503)


def _bind(path: Path) -> socket.socket:
    """A listener at the path, in place of one that nobody serves any more. Raises OSError."""
    with reachable(path) as name:
        _remove_stale(path, name)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setblocking(False)
            os.fchmod(listener.fileno(), SOCKET_MODE)  # Linux makes the file with this mode at most: never wider.
            listener.bind(name)
            Path(name).chmod(SOCKET_MODE)  # What the umask has taken from the group.
            listener.listen()
        except BaseException:
            listener.close()
            raise
    return listener


def _remove_stale(path: Path, name: str) -> None:
    try:
        mode = Path(name).stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, f"{path} is there and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.setblocking(False)
        try:
            caller.connect(name)
        except ConnectionRefusedError:
            Path(name).unlink()  # Nobody listens: whoever did was killed.
            return
        except BlockingIOError:
            pass  # Its queue of callers is full.
    raise OSError(errno.EADDRINUSE, "another daemon listens there")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
