"""`ingestd run`: the daemon as a process, with its signals, its service manager and its HTTP side."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

from ingestd.config import Config, control_socket
from ingestd.daemon.devices import open_sources
from ingestd.daemon.notify import Notifier
from ingestd.daemon.service import Daemon


def run(config: Config) -> int:
    """Record until SIGTERM or SIGINT; the exit code. Raises IngestdError where it cannot begin."""
    # Decoding runs in threads and reading the buses must not wait for them: a thread holds the interpreter for this
    # long at most when another wants it.
    sys.setswitchinterval(0.001)
    import uvloop

    return uvloop.run(_run(config))


async def _run(config: Config) -> int:
    daemon = Daemon(config, open_sources(config))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop, number.name)
    notifier = Notifier()
    running = asyncio.create_task(daemon.run(), name="daemon")
    await asyncio.sleep(0)  # The sources have begun.
    notifier.ready(f"recording {len(config.can) + len(config.serial)} sources")
    watchdog = asyncio.create_task(notifier.keep_watchdog_quiet(), name="watchdog")
    try:
        # Here and not above: importing aiohttp takes longer than everything that comes before the first frame.
        from ingestd.daemon import control, endpoints
        from ingestd.daemon.live_control import live_routes
        from ingestd.daemon.session_control import session_routes

        socket = control_socket(config.control, config.journal.path)
        async with (
            endpoints.serve(config.http.listen, daemon.snapshot),
            control.serve(socket, [*session_routes(daemon), *live_routes(daemon)]),
        ):
            stopping = asyncio.create_task(daemon.stopped.wait(), name="stop")
            await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
            notifier.stopping("writing what the database takes")
            await running
    finally:
        watchdog.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watchdog
    return daemon.exit_code
