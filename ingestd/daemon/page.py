"""The live page's files: what is in `ingestd/page`, and plotly.js where the package that has it is installed.

    /           the page for a browser, a text for everybody else
    /page/FILE  its style and its scripts
    /page/plotly.min.js   from the Python package plotly, an extra; without it the page draws no chart, and says so

The page asks nobody but us: no other server, no font, no script from elsewhere. Browsers are told to run nothing else
(Content-Security-Policy), and keep the files as long as they have not changed (ETag).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from aiohttp import web

from ingestd.daemon import endpoints

FOLDER: Final = Path(__file__).parents[1] / "page"
TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PLOTLY: Final = "plotly.min.js"

HEADERS: Final = {
    # plotly.js sets the style of what it draws in attributes, which is 'unsafe-inline'; scripts are never inline.
    "Content-Security-Policy": (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # Kept, and asked for each time whether it is still the same.
}


def page_routes() -> list[web.RouteDef]:
    """The routes, for `endpoints.serve`."""
    files = {path.name: path for path in FOLDER.iterdir() if path.suffix in TYPES}
    plotly = plotly_file()
    if plotly is not None:
        files[PLOTLY] = plotly

    def sent(name: str) -> web.FileResponse:
        path = files[name]
        return web.FileResponse(path, headers={**HEADERS, "Content-Type": f"{TYPES[path.suffix]}; charset=utf-8"})

    async def root(request: web.Request) -> web.StreamResponse:
        if "text/html" in request.headers.get("Accept", ""):
            return sent("index.html")
        return await endpoints.index(request)

    async def file(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name not in files:
            raise web.HTTPNotFound
        return sent(name)

    return [web.get("/", root), web.get("/page/{name}", file)]


def plotly_file() -> Path | None:
    """Where plotly.js is; None where its package is not installed. It is not imported: that takes long, and memory."""
    spec = importlib.util.find_spec("plotly")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        if (path := Path(folder) / "package_data" / PLOTLY).is_file():
            return path
    return None
