"""The HTTP side: metrics for Prometheus, health and readiness for whoever watches.

    /metrics   what metrics.py makes of a snapshot
    /health    200 as long as the event loop answers
    /ready     200 or 503: every source has its device or is looking for it, and the journal takes frames; and what
               else is wrong, in words: a database that takes nothing, a signal database that cannot be read
    /          a line about each of them, for a browser the page (page.py), whose data is under /api (api.py)

Recording never depends on this: an address that is taken or not there yet is said once and tried again for as long as
the daemon runs. By default it listens on the machine itself alone; who gets in is access.py's matter, and what may be
changed from here and by whom is in browsers.py.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from ingestd.backoff import Backoff
from ingestd.config import Address
from ingestd.daemon.access import Access, only_for
from ingestd.daemon.limited import LimitedRunner
from ingestd.daemon.reporting import unready
from ingestd.metrics import Snapshot, render

RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 1.0, 30.0
SHUTDOWN_SECONDS_MAX = 1.0  # for a scrape that is under way

INDEX = """ingestd
/metrics  numbers for Prometheus
/health   200 while it runs
/ready    200 while it records, 503 and the reasons while it does not
/         the live page, for a browser
"""

HINTS = {
    errno.EADDRINUSE: 'another program listens there: set http.listen to another port, or to "off"',
    errno.EADDRNOTAVAIL: "this machine has no such address (yet)",
    errno.EACCES: "ports below 1024 are for root",
}

log = logging.getLogger(__name__)


class Endpoints:
    """A server that is or will be listening. `address` is where, None until then; a port of 0 has become a real one."""

    def __init__(
        self,
        listen: Address,
        snapshot: Callable[[], Snapshot],
        unready_now: Callable[[], Mapping[str, str]],
        routes: Sequence[web.RouteDef] = (),
        access: Access | None = None,
    ) -> None:
        self.address: Address | None = None
        self._listen = listen
        self._snapshot = snapshot
        self._unready = unready_now
        self._access = access or Access()
        app = web.Application(middlewares=[only_for(self._access.users)] if self._access.users else [])
        app.router.add_routes(routes or [web.get("/", index)])
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        self._runner = LimitedRunner(app, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_SECONDS_MAX)

    def __repr__(self) -> str:
        return f"<Endpoints at {self.address or f'{self._listen}, not yet'}>"

    async def listen(self) -> None:
        """Try until the address can be had."""
        await self._runner.setup()
        backoff, said = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX), ""
        while self.address is None:
            # IPv4 and IPv6 would each get a free port of its own.
            everywhere = None if self._listen.port else "0.0.0.0"
            try:
                self._runner.tls = self._access.ssl_context()
            except OSError as error:
                said = self._cannot(error, said)
                await asyncio.sleep(backoff.next_seconds())
                continue
            site = web.TCPSite(self._runner, self._listen.host or everywhere, self._listen.port)
            try:
                await site.start()
                self.address = Address(self._listen.host, self._runner.addresses[0][1])
                log.info("listening https=%s" if self._runner.tls else "listening http=%s", self.address)
            except (OSError, UnicodeError) as error:  # UnicodeError: a host that no DNS name can be
                await site.stop()  # or the runner keeps every one that failed
                said = self._cannot(error, said)
                await asyncio.sleep(backoff.next_seconds())

    def _cannot(self, error: OSError | UnicodeError, said: str) -> str:
        """Say why not, unless that is what was said last; the reason."""
        reason = getattr(error, "strerror", None) or str(error)
        if reason != said:
            hint = HINTS.get(getattr(error, "errno", None) or 0, "see [http] in the configuration")
            log.warning("cannot listen, tried again http=%s reason=%r hint=%r", self._listen, reason, hint)
        return reason

    async def close(self) -> None:
        """Stop listening and end what is under way."""
        await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        body, content_type = render(self._snapshot(), request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.Request) -> web.Response:
        snapshot, unready_now = self._snapshot(), dict(self._unready())
        sources = {
            name: {"link": status.link.value, **({"reason": status.reason} if status.reason else {})}
            for name, status in sorted(snapshot.statuses.items())
        }
        said = {
            "ready": not unready_now,
            "unready": unready_now,
            "trouble": dict(snapshot.trouble),
            "sources": sources,
        }
        return web.json_response(text=json.dumps(said, indent=2) + "\n", status=503 if unready_now else 200)


async def index(_: web.Request) -> web.StreamResponse:
    """What there is, in text."""
    return web.Response(text=INDEX)


@asynccontextmanager
async def serve(
    listen: Address | None,
    snapshot: Callable[[], Snapshot],
    unready_now: Callable[[], Mapping[str, str]] | None = None,
    routes: Sequence[web.RouteDef] = (),
    access: Access | None = None,
) -> AsyncIterator[Endpoints | None]:
    """Serve at an address while inside; None serves nothing. `routes` are further ones, with one for `/` among them.

    `snapshot` and `unready_now` (by default: what `unready` says of the snapshot) are called on the event loop for
    every request. Neither starting nor what happens later raises.
    """
    if listen is None:
        yield None
        return
    endpoints = Endpoints(listen, snapshot, unready_now or (lambda: unready(snapshot())), routes, access)
    listening = asyncio.create_task(endpoints.listen(), name="http")
    # Usually it is there at once; whoever needs `address` then has it, and nobody waits for one that is taken.
    await asyncio.wait([listening], timeout=0.1)
    try:
        yield endpoints
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await endpoints.close()
