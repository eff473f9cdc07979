"""What people may watch: a route of the control socket that goes on for as long as somebody reads.

GET /tail?pattern=PATTERN&seconds=SECONDS   JSON lines, one for each channel that has changed, and an empty line
                                            when all that have changed were told
GET /tail/channels                          `channels`: how many have had a value since somebody began to watch
"""

from __future__ import annotations

import json
import math
from contextlib import aclosing, suppress

from aiohttp import web

from ingestd.daemon.live import Value
from ingestd.daemon.service import Daemon
from ingestd.errors import UsageError

SECONDS_MIN, SECONDS_MAX = 0.05, 60.0
PATTERN_CHARACTERS_MAX = 200  # A long one takes long to compile, on the event loop.


def live_routes(daemon: Daemon) -> list[web.RouteDef]:
    """The routes, for `control.serve`."""

    async def tail(request: web.Request) -> web.StreamResponse:
        pattern, seconds = what_of(request)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        # A reset is how a watcher says goodbye.
        with suppress(ConnectionResetError):
            async with aclosing(daemon.live.watch(pattern, seconds)) as watch:
                async for values in watch:
                    # This waits for a slow reader. Meanwhile values change, and only the newest are told.
                    await response.write("".join([*map(_line, values), "\n"]).encode())
        return response

    async def count(_: web.Request) -> web.Response:
        return web.json_response({"channels": daemon.live.channels})

    return [web.get("/tail", tail), web.get("/tail/channels", count)]


def what_of(request: web.Request) -> tuple[str, float]:
    """What somebody wants to see, and how often. Raises UsageError."""
    pattern = request.query.get("pattern", "*")
    if len(pattern) > PATTERN_CHARACTERS_MAX:
        raise UsageError(f"a pattern of {len(pattern)} characters", f"{PATTERN_CHARACTERS_MAX} are the most")
    return pattern, seconds_of(request.query.get("seconds", "0.5"))


def seconds_of(text: str) -> float:
    """How often somebody wants to be told. Raises UsageError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not SECONDS_MIN <= seconds <= SECONDS_MAX:
        raise UsageError(f"every {text} seconds", f"from {SECONDS_MIN:g} to {SECONDS_MAX:g} can be had")
    return seconds


def _line(value: Value) -> str:
    return json.dumps(value.as_json(), ensure_ascii=False, separators=(",", ":")) + "\n"
