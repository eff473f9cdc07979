"""Who may look at the live page's data, and who may change something with it.

Whoever reaches the address may look; by default that is the machine itself. A browser there also runs the pages of
strangers, and these must neither read nor change anything:

- A stranger's name that leads to our address (DNS rebinding) is not ours: the request's Host has to be an IP address,
  localhost, the machine's own name, or the host in `http.listen`.
- A change comes from the page itself: its Origin is our Host. It is JSON, which no form of a stranger's can send.

And a change comes from the machine itself, or from somebody who has said who he is (`request[USER]`, of
access.py). What a proxy on this machine passes on comes from elsewhere; one that does not say so in its headers cannot
be told from the machine itself, and needs users.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from ingestd.daemon.access import USER
from ingestd.daemon.control import Handler, errors_as_json

PROXIES = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")

Check = Callable[[web.Request], None]


class Forbidden(Exception):
    """What this request asks is not for whoever asks it; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def guarded(handler: Handler, check: Check) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The handler, behind a check: 403 with `error` and `hint` where that raises; errors are answered as JSON."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            check(request)
        except Forbidden as refused:
            return web.json_response({"error": str(refused), "hint": refused.hint, "exit_code": 1}, status=403)
        return await errors_as_json(request, handler)

    return answer


def may_look(listen: str) -> Check:
    """The check of who may look, where the address that is listened at has this host. Raises Forbidden."""
    name = socket.gethostname().lower()
    ours = {"localhost", name, f"{name}.local", listen.lower()} - {""}

    def check(request: web.Request) -> None:
        host = _host_of(_netloc(request))
        if host in ours or _is_address(host) or _is_known(request):
            return
        raise Forbidden(
            f"{host or 'nobody'} is no name of this machine",
            f"ask by its address, or for {name}; http.listen in the configuration may give another name",
        )

    return check


def may_change_from(request: web.Request) -> None:
    """Whether whoever is at the other end may change anything. Raises Forbidden."""
    passed_on = any(header in request.headers for header in PROXIES)
    if _is_known(request) or (_is_loopback(request.remote) and not passed_on):
        return
    raise Forbidden(
        "this browser is not on the recorder itself, and nobody has said who it is",
        "open the page on the recorder, or through ssh -L 9464:localhost:9464; ingestd sessions does the same there",
    )


def may_change(look: Check) -> Check:
    """The check of who may change something, beyond that of who may look. Raises Forbidden."""

    def check(request: web.Request) -> None:
        look(request)
        may_change_from(request)
        origin = request.headers.get("Origin", "")
        if not origin or origin.partition("://")[2] != _netloc(request):
            raise Forbidden(
                f"a change asked for by {origin or 'no page'} is not taken",
                "only the page itself may ask here; programs ask at the control socket",
            )
        if request.content_type != "application/json":
            raise Forbidden("a change that is not JSON is not taken", "send it as application/json")

    return check


def _is_known(request: web.Request) -> bool:
    return bool(request.get(USER))


def _netloc(request: web.Request) -> str:
    """What was asked for; not aiohttp's `host`, which asks the resolver where a request has none."""
    return request.headers.get("Host", "")


def _host_of(given: str) -> str:
    """The host of a Host header, without the port and the brackets of IPv6."""
    try:
        return (urlsplit(f"//{given}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(remote: str | None) -> bool:
    try:
        address = ipaddress.ip_address((remote or "").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
