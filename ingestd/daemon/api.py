"""What the live page asks for, and others may: routes of the HTTP side.

    GET   /api/live?pattern=PATTERN&seconds=SECONDS   server-sent events, for as long as somebody reads
    GET   /api/session                                the session that is recorded
    PATCH /api/session, POST /api/session/start …     change it: session_control.py, for those who may (browsers.py)

The events, each with JSON, in this order where there is news of them:

    hello    once: the daemon's `version` and `run`, which another start changes; `charts`, whether plotly.js is there;
             `may_change`, and if not the reason and what to do about it
    session  what is known of the session, when it has changed
    state    every second: sources with their books, backlog, journal, database, what is wrong
    values   channels that have changed, as `ingestd tail --json` has them, at most once in SECONDS
    events   those that were recorded; first the newest that the daemon still knows

Nothing here waits for a watcher, and a watcher costs what he reads: who reads slowly is told less often, of what is
newest then; no more than one message waits for him, and who takes nothing for SLOW_SECONDS_MAX is let go. How many
there may be is limited.py's matter.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import aclosing, suppress
from typing import Any, Final
from uuid import uuid4

import msgspec
from aiohttp import web

from ingestd import __version__
from ingestd.clock import mono_ns
from ingestd.daemon.browsers import Forbidden, guarded, may_change, may_change_from, may_look
from ingestd.daemon.live import Value, utc
from ingestd.daemon.live_control import what_of
from ingestd.daemon.page import plotly_file
from ingestd.daemon.recording import Told
from ingestd.daemon.reporting import unready
from ingestd.daemon.service import Daemon
from ingestd.daemon.session_control import session_routes
from ingestd.metrics import Snapshot
from ingestd.model import Books

STATE_SECONDS: Final = 1.0
SLOW_SECONDS_MAX: Final = 30.0
SEND_BUFFER_BYTES: Final = 1 << 17  # in the kernel, for a watcher: what waits there is not the newest any more
RECONNECT_MS: Final = 1000
RUN: Final = uuid4().hex  # of this process: the page notices another one


def api_routes(daemon: Daemon) -> list[web.RouteDef]:
    """The routes, for `endpoints.serve`."""
    listen = daemon.config.http.listen
    look = may_look("" if listen is None else listen.host or "")
    change = may_change(look)

    async def live(request: web.Request) -> web.StreamResponse:
        pattern, seconds = what_of(request)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "X-Accel-Buffering": "no",  # for nginx, should it be between
            }
        )
        await response.prepare(request)
        _bound_buffer(request)
        news = News(daemon)
        hello = {"version": __version__, "run": RUN, "charts": plotly_file() is not None} | _rights(request)
        # A reset is how a watcher says goodbye.
        with suppress(ConnectionResetError):
            await _write(request, response, b"retry: %d\n\n" % RECONNECT_MS + message("hello", hello))
            async with aclosing(daemon.live.watch(pattern, seconds, STATE_SECONDS)) as watch:
                async for values in watch:
                    await _write(request, response, news.since_told(values))
        return response

    routes = [web.get("/api/live", guarded(live, look))]
    for route in session_routes(daemon):
        check = look if route.method == "GET" else change
        routes.append(web.RouteDef(route.method, f"/api{route.path}", guarded(route.handler, check), {}))
    return routes


class News:
    """What a watcher has not been told yet."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._session: dict[str, Any] | None = None
        self._event_number = 0
        self._state_at = float("-inf")
        self._before: tuple[float, Snapshot] | None = None

    def since_told(self, values: list[Value]) -> bytes:
        """The messages of what is new, with these values; perhaps none."""
        said = []
        if (session := self._daemon.session.as_json) != self._session:
            self._session = session
            said.append(message("session", session))
        if (now := time.monotonic()) >= self._state_at + STATE_SECONDS:
            # Aimed at every full second, wherever in it the values come.
            self._state_at = max(self._state_at + STATE_SECONDS, now - STATE_SECONDS / 2)
            said.append(message("state", self._state(now)))
        if values:
            said.append(message("values", [value.as_json() for value in values]))
        events = [told for told in self._daemon.recording.newest_events if told.number > self._event_number]
        if events:
            self._event_number = events[-1].number
            said.append(message("events", [_event(told) for told in events]))
        return b"".join(said)

    def _state(self, now: float) -> dict[str, Any]:
        snapshot = self._daemon.snapshot()
        before_at, before = self._before or (now, snapshot)
        self._before = now, snapshot
        delivery = self._daemon.delivery
        return {
            "now_utc": utc(time.time_ns()),
            "now_mono_ns": mono_ns(),
            **state(snapshot, before, now - before_at),
            "lag_seconds": None if delivery is None else delivery.status.lag_seconds_last or None,
            "channels": self._daemon.live.channels,
            "frames_left_out": self._daemon.live.frames_left_out,
        }


def state(now: Snapshot, before: Snapshot, seconds: float) -> dict[str, Any]:
    """How it goes, as JSON; rates since `before`, so many seconds ago."""
    names = sorted({*now.statuses, *now.books})
    sources = [_source(name, now, before.books.get(name, Books()), seconds) for name in names]
    if now.recovered != before.recovered:  # The books have just got what earlier runs received.
        sources = [source | {"frames_per_second": None} for source in sources]
    return {
        "recovered": now.recovered,
        "balanced": all(books.balanced for books in now.books.values()),
        "backlog_frames": sum(books.pending for books in now.books.values()),
        "backlog_seconds": now.journal.oldest_pending_seconds,
        "journal": {
            "writable": now.journal.writable,
            "trouble": now.journal.trouble,
            "bytes": now.journal.bytes,
            "bytes_max": now.journal.bytes_max,
        },
        "database_up": now.store.up,
        "unready": unready(now),
        "trouble": dict(now.trouble),
        "sources": sources,
    }


def _source(name: str, snapshot: Snapshot, was: Books, seconds: float) -> dict[str, Any]:
    """A source, whose books were such so many seconds ago; one that is in the books alone has no link."""
    status, now = snapshot.statuses.get(name), snapshot.books.get(name, Books())
    bus_load = snapshot.sources[name].bus_load if name in snapshot.sources else None
    return {
        "source": name,
        "link": None if status is None else status.link.value,
        "reason": "" if status is None else status.reason,
        "controller": "" if status is None else status.controller,
        "bus_load": bus_load,
        "frames_per_second": max(now.received - was.received, 0) / seconds if seconds > 0 else None,
        "received": now.received,
        "committed": now.committed,
        "pending": now.pending,
        "rejected": now.rejected,
        "dropped": dict(now.dropped),
        "balanced": now.balanced,
    }


def _event(told: Told) -> dict[str, Any]:
    event = told.event
    return {
        "ts_utc": utc(event.ts_ns + told.clock.utc_offset_ns),
        "ts_mono_ns": event.ts_ns,
        "source": event.source,
        "kind": event.kind,
        "key": event.key,
        "payload": event.payload,
    }


def message(kind: str, data: Any) -> bytes:
    """A server-sent event (HTML standard, section 9.2.6); JSON of ours has no line breaks."""
    try:
        said = msgspec.json.encode(data)
    except (TypeError, ValueError):  # A path that is no UTF-8, say: one word is no reason to tell nothing.
        said = json.dumps(data, default=str).encode()
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), said)


def _rights(request: web.Request) -> dict[str, Any]:
    try:
        may_change_from(request)
    except Forbidden as refused:
        return {"may_change": False, "reason": str(refused), "hint": refused.hint}
    return {"may_change": True}


def _bound_buffer(request: web.Request) -> None:
    connection = None if request.transport is None else request.transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


async def _write(request: web.Request, response: web.StreamResponse, said: bytes) -> None:
    """Write, for as long as the reader takes some of it now and then; else the connection is cut."""
    if not said:
        return
    try:
        async with asyncio.timeout(SLOW_SECONDS_MAX):
            await response.write(said)
    except TimeoutError as error:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the watcher takes nothing") from error
