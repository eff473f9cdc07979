"""What commands may ask about the session that is recorded, and do to it: routes of the control socket.

    GET   /session        the session: id, metadata, when each was edited
    PATCH /session        edit metadata: a JSON object of them, null takes one away
    POST  /session/start  end the session and begin another, with the metadata given and else the configuration's
    POST  /session/stop   end the session; what comes is recorded in another, of which nobody has said anything
    POST  /session/mark   a marker at this instant, with `text`

Each answers when the journal has what was asked, on the disk; the database learns of it when it takes it.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ingestd.daemon.control import json_of
from ingestd.daemon.service import Daemon
from ingestd.daemon.session import RunningSession
from ingestd.errors import UsageError
from ingestd.store.writer import METADATA

UNNAMED: dict[str, Any] = {name: None for name in METADATA if name != "car_id"}  # It is the same car.


def session_routes(daemon: Daemon) -> list[web.RouteDef]:
    """The routes, for `control.serve`."""

    def told(ended: RunningSession | None = None) -> web.Response:
        said: dict[str, Any] = {"session": daemon.session.as_json}
        if ended is not None:
            said["ended"] = ended.as_json
        if not daemon.journal.writable:
            said["warning"] = f"the journal takes nothing, and a crash would forget this: {daemon.journal.trouble}"
        return web.json_response(said)

    async def show(_: web.Request) -> web.Response:
        return told()

    async def edit(request: web.Request) -> web.Response:
        changes = await json_of(request)
        if not changes:
            raise UsageError("nothing is to be edited", f"name one of {', '.join(METADATA)}")
        await daemon.edit_session(changes)
        return told()

    async def start(request: web.Request) -> web.Response:
        return told(await daemon.begin_session({"name": None} | await json_of(request)))

    async def stop(_: web.Request) -> web.Response:
        return told(await daemon.begin_session(UNNAMED))

    async def mark(request: web.Request) -> web.Response:
        text = (await json_of(request)).get("text")
        if not isinstance(text, str) or not text:
            raise UsageError("a marker needs a text")
        await daemon.mark(text)
        return told()

    return [
        web.get("/session", show),
        web.patch("/session", edit),
        web.post("/session/start", start),
        web.post("/session/stop", stop),
        web.post("/session/mark", mark),
    ]
