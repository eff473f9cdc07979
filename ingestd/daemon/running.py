"""`ingestd run`: the daemon as a process, with its signals, its service manager, its HTTP side and its commands."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd import __version__
from ingestd.config import Config, control_socket
from ingestd.daemon.devices import open_sources
from ingestd.daemon.notify import Notifier
from ingestd.daemon.reporting import report
from ingestd.daemon.service import REFUSED, Daemon
from ingestd.errors import ConfigError, IngestdError, UsageError

if TYPE_CHECKING:
    from aiohttp import web

    from ingestd.daemon.reloading import Changes

log = logging.getLogger(__name__)


def run(config: Config, file: Path, load: Callable[[], Config]) -> int:
    """Record until SIGTERM or SIGINT; the exit code. `load` reads the configuration's file again, for a reload.

    Raises IngestdError where it cannot begin.
    """
    # Decoding runs in threads and reading the buses must not wait for them: a thread holds the interpreter for this
    # long at most when another wants it.
    sys.setswitchinterval(0.001)
    import uvloop

    return uvloop.run(_run(config, file, load))


async def _run(config: Config, file: Path, load: Callable[[], Config]) -> int:
    service = Service(config, file, load)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.daemon.stop, number.name)
    loop.add_signal_handler(signal.SIGHUP, service.hang_up)
    return await service.run()


def _check_certificate(config: Config) -> None:
    """Raises ConfigError where the HTTP side could not be served with it."""
    from ingestd.daemon.access import Access

    http = config.http
    try:
        Access(http.users, http.tls_certificate, http.tls_key).ssl_context()
    except OSError as error:
        raise ConfigError(f"http.tls_certificate: {error.strerror}") from error


class Service:
    """A daemon and what surrounds it in its process."""

    def __init__(self, config: Config, file: Path, load: Callable[[], Config]) -> None:
        """Open the journal. Raises IngestdError."""
        self.daemon = Daemon(config, open_sources(config))
        self._file = file
        self._load = load
        self._notifier = Notifier()
        self._http = AsyncExitStack()
        self._reloading = asyncio.Lock()
        self._has_terminal = os.isatty(0)
        self._hang_ups: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Record until the daemon stops; the exit code."""
        daemon, notifier = self.daemon, self._notifier
        running = asyncio.create_task(daemon.run(), name="daemon")
        await asyncio.sleep(0)  # The sources have begun.
        reporting = asyncio.create_task(report(notifier, daemon.snapshot, daemon.sign_of_life), name="report")
        if notifier.is_listening:
            daemon.watched(reporting)
        try:
            # Here and not above: importing aiohttp takes longer than everything that comes before the first frame.
            from ingestd.daemon import control

            socket = control_socket(daemon.config.control, daemon.config.journal.path)
            async with self._http, control.serve(socket, self._routes()):
                await self._serve_http()
                stopping = asyncio.create_task(daemon.stopped.wait(), name="stop")
                await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
                notifier.stopping("writing what the database takes")
                await running
        finally:
            reporting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reporting
        return daemon.exit_code

    async def reload(self) -> Changes:
        """Read the configuration again and put it into force; one reload at a time, in the order they were asked for.

        Raises IngestdError if it is refused: then the one before stays, as a whole.
        """
        from ingestd.daemon.reloading import reload

        async with self._reloading:
            if self.daemon.stopped.is_set():
                raise IngestdError("the daemon is stopping", "start it again")
            self._notifier.reloading()
            try:
                before = self.daemon.config.http
                wanted = await asyncio.to_thread(self._load)
                await asyncio.to_thread(_check_certificate, wanted)
                changes = await reload(self.daemon, wanted)
                http = self.daemon.config.http
                # A certificate may be another one now, in the same file.
                if (http != before or http.tls_certificate) and not self.daemon.stopped.is_set():
                    await self._http.aclose()
                    await self._serve_http()
                self.daemon.accepted()
            except IngestdError as error:
                self.daemon.refused(error)
                kind = UsageError if error.exit_code == UsageError.exit_code else IngestdError
                raise kind(f"{REFUSED}: {error.args[0]}", error.hint) from error
            finally:
                self._notifier.reloaded()
        return changes

    def hang_up(self) -> None:
        """SIGHUP: a reload, of which only the log tells; or the terminal in which this was started is gone."""
        if self._has_terminal and not os.isatty(0):
            self.daemon.stop("its terminal was closed")
            return
        task = asyncio.create_task(self._hang_up(), name="reload")
        self._hang_ups.add(task)
        task.add_done_callback(self._hang_ups.discard)

    async def _hang_up(self) -> None:
        try:
            await self.reload()
        except IngestdError as error:
            log.debug("told in the log already: %s", error)
        except Exception:
            log.exception("a reload failed; this is a defect")

    async def _serve_http(self) -> None:
        from ingestd.daemon import endpoints
        from ingestd.daemon.access import Access
        from ingestd.daemon.api import api_routes
        from ingestd.daemon.page import page_routes

        daemon, routes = self.daemon, [*page_routes(), *api_routes(self.daemon)]
        http = daemon.config.http
        access = Access(http.users, http.tls_certificate, http.tls_key)
        served = endpoints.serve(http.listen, daemon.snapshot, routes=routes, access=access)
        await self._http.enter_async_context(served)

    def _routes(self) -> list[web.RouteDef]:
        from aiohttp import web

        from ingestd.daemon.live_control import live_routes
        from ingestd.daemon.session_control import session_routes

        async def reload(_: web.Request) -> web.Response:
            return web.json_response((await self.reload()).as_json)

        async def tell(_: web.Request) -> web.Response:
            embedded = self.daemon.config.database.embedded
            return web.json_response(
                {"version": __version__, "pid": os.getpid(), "config": str(self._file), "embedded": embedded}
            )

        return [
            web.get("/daemon", tell),
            web.post("/reload", reload),
            *session_routes(self.daemon),
            *live_routes(self.daemon),
        ]
