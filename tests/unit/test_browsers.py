"""Who may look at the page's data and who may change something with it, request by request."""

from __future__ import annotations

import json
import socket
from unittest.mock import Mock

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from ingestd.daemon.access import USER
from ingestd.daemon.browsers import Forbidden, guarded, may_change, may_look
from ingestd.errors import UsageError

HERE = "127.0.0.1:9464"
LOOK = may_look("")


def request(
    *, peer: str = "127.0.0.1", host: str | None = HERE, origin: str | None = "http://" + HERE, user: str = "",
    kind: str = "application/json", **headers: str,
) -> web.Request:  # fmt: skip
    """A change as the page asks for it, but for what is given."""
    transport = Mock()
    transport.get_extra_info = lambda name, otherwise=None: (peer, 50_000) if name == "peername" else otherwise
    sent = {"Host": host, "Origin": origin, "Content-Type": kind, **headers}
    made = make_mocked_request(
        "POST", "/api/session/mark", {key: value for key, value in sent.items() if value is not None},
        transport=transport,
    )  # fmt: skip
    if user:
        made[USER] = user
    return made


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_the_page_on_the_machine_itself_may(peer: str) -> None:
    """Over IPv4 and IPv6."""
    may_change(LOOK)(request(peer=peer))


@pytest.mark.parametrize("host", ["localhost:9464", "LOCALHOST", "[::1]:9464", "192.0.2.1", socket.gethostname()])
def test_names_of_this_machine(host: str) -> None:
    """An address cannot be another's, and so cannot the machine's own names."""
    LOOK(request(host=host))
    may_change(LOOK)(request(host=host, origin=f"https://{host}"))


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9464", "127.0.0.1.evil.example", "localhost.evil.example", "", None, "[::1"]
)
def test_a_strangers_name_is_refused(host: str | None) -> None:
    """It may lead to our address by now: DNS rebinding. That goes for looking, too."""
    with pytest.raises(Forbidden, match="no name of this machine"):
        LOOK(request(host=host))
    with pytest.raises(Forbidden, match="no name of this machine"):
        may_change(LOOK)(request(host=host, origin=f"http://{host}"))


def test_the_configured_name_is_ours() -> None:
    """As in http.listen."""
    may_look("Rig.example")(request(host="rig.example:9464"))


@pytest.mark.parametrize(
    "origin", [None, "null", "", "http://evil.example", "http://127.0.0.1", "http://127.0.0.1:80", "http://[", HERE]
)
def test_a_change_comes_from_the_page_itself(origin: str | None) -> None:
    """Another origin's scripts and forms change nothing, nor does who says none."""
    with pytest.raises(Forbidden, match="is not taken"):
        may_change(LOOK)(request(origin=origin))
    LOOK(request(origin=origin))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_change_is_json(kind: str) -> None:
    """What forms can send is not."""
    with pytest.raises(Forbidden, match="not JSON"):
        may_change(LOOK)(request(kind=kind))


@pytest.mark.filterwarnings("ignore::aiohttp.web_exceptions.NotAppKeyWarning")
@pytest.mark.parametrize(
    "how",
    [{"peer": "192.0.2.7"}, {"peer": "fe80::1%eth0"}, {"peer": ""}, {"X-Forwarded-For": "192.0.2.7"}, {"Via": "1.1 x"}],
)
def test_from_elsewhere_somebody_has_to_say_who_he_is(how: dict[str, str]) -> None:
    """Also through a proxy on this machine; the hint says what to do."""
    with pytest.raises(Forbidden, match="not on the recorder") as refused:
        may_change(LOOK)(request(**how))
    assert "ssh -L" in refused.value.hint
    may_change(LOOK)(request(**how, user="kim"))


async def test_what_is_refused_is_answered() -> None:
    """403 with the reason and what to do; what a handler raises is answered as on the control socket."""

    async def handler(_: web.Request) -> web.StreamResponse:
        raise UsageError("a marker needs a text")

    refused = await guarded(handler, may_change(LOOK))(request(peer="192.0.2.7"))
    assert isinstance(refused, web.Response)
    assert refused.status == 403
    assert set(json.loads(refused.text or "")) == {"error", "hint", "exit_code"}
    asked = await guarded(handler, may_change(LOOK))(request())
    assert isinstance(asked, web.Response)
    assert (asked.status, json.loads(asked.text or "")["error"]) == (400, "a marker needs a text")
