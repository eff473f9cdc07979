"""Who gets in at the HTTP side: passwords over real sockets, and TLS with certificates of our own."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest
import uvloop

from ingestd.config import Address, load_config
from ingestd.daemon import access, limited
from ingestd.daemon.access import Access, Doorkeeper, hash_of
from ingestd.daemon.endpoints import serve
from ingestd.errors import ConfigError
from ingestd.metrics import JournalNumbers, Snapshot, StoreNumbers
from tests.commands import run_ingestd
from tests.tls_server import Authority

ANY_PORT = Address("127.0.0.1", 0)
USERS = {"grafana": hash_of("s3cret"), "zoë": hash_of("pässword")}


def descriptors() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def certified(folder: Path) -> tuple[Path, Path, ssl.SSLContext]:
    """A certificate of this machine's, its key, and what a client needs to trust it."""
    authority = Authority(folder / "ca", "ours")
    certificate, key = authority.issue("localhost", hosts="DNS:localhost,IP:127.0.0.1")
    return certificate, key, ssl.create_default_context(cafile=authority.certificate)


def nothing() -> Snapshot:
    return Snapshot("1.2.3", {}, {}, JournalNumbers(True, 1, 2), StoreNumbers(up=True))


async def status_of(url: str, name: str = "", password: str = "", **options: object) -> int:
    headers = {"Authorization": aiohttp.encode_basic_auth(name, password, "utf-8")} if name else {}
    async with aiohttp.ClientSession() as client, client.get(url, headers=headers, **options) as answer:  # type: ignore[arg-type]
        if answer.status == 401:
            assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
        return answer.status


async def test_only_users_get_in(caplog: pytest.LogCaptureFixture) -> None:
    """With the right password, each time; nobody else, whatever is sent. /health is for everybody.

    The log tells of wrong ones, once in a while, and not what they were.
    """
    async with serve(ANY_PORT, nothing, access=Access(USERS)) as served:
        assert served is not None
        url = f"http://{served.address}/metrics"
        assert await status_of(url, "grafana", "s3cret") == 200
        assert await status_of(url, "grafana", "s3cret") == 200
        assert await status_of(url, "zoë", "pässword") == 200
        for name, password in (
            ("", ""),
            ("grafana", "S3cret"),
            ("nobody", "s3cret"),
            ("grafana", ""),
            ("zoë", "s3cret"),
        ):
            assert await status_of(url, name, password) == 401
        assert await status_of(f"http://{served.address}/health") == 200
        for path in ("/", "/ready", "/nothing"):
            assert await status_of(f"http://{served.address}{path}") == 401
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["wrong name or password at the HTTP side tries=1 last_from=127.0.0.1"]


@pytest.mark.parametrize(
    "header",
    ["Basic", "Basic !", "Basic Z3JhZmFuYQ==", "Bearer czNjcmV0", "Basic " + "QQ==" * 1000, "Basic /w==", "\udcff"],
)
async def test_what_is_no_name_and_password(header: str) -> None:
    """Nobody, and no error."""
    assert await Doorkeeper(USERS).user_of(header) is None


async def test_passwords_are_verified_one_at_a_time_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask: verifying costs a quarter of a second of a processor. What is remembered is bounded."""
    at_once, calls, is_right = 0, 0, access._is_right

    def counted(password: str, hashed: str) -> bool:
        nonlocal at_once, calls
        at_once, calls = at_once + 1, calls + 1
        assert at_once == 1
        try:
            return is_right(password, hashed)
        finally:
            at_once -= 1

    monkeypatch.setattr(access, "_is_right", counted)
    keeper = Doorkeeper(USERS)
    good = aiohttp.encode_basic_auth("grafana", "s3cret")
    bad = aiohttp.encode_basic_auth("grafana", "guess")
    found = await asyncio.gather(*(keeper.user_of(each) for each in [good, bad] * 3))
    assert found == ["grafana", None] * 3
    assert calls == 4  # the right one once
    monkeypatch.setattr(access, "REMEMBERED_SECONDS", -1.0)
    assert await Doorkeeper(USERS).user_of(good) == "grafana"
    for number in range(access.REMEMBERED_MAX + 5):
        keeper._known[bytes([number])] = "x", 0.0
    assert await keeper.user_of(aiohttp.encode_basic_auth("zoë", "pässword", "utf-8")) == "zoë"
    assert len(keeper._known) <= access.REMEMBERED_MAX


async def test_tls(tmp_path: Path) -> None:
    """Served under a certificate that the client verifies; not without TLS."""
    certificate, key, trusting = certified(tmp_path)
    async with serve(ANY_PORT, nothing, access=Access(USERS, certificate, key)) as served:
        assert served is not None
        assert served.address is not None
        url = f"https://localhost:{served.address.port}/metrics"
        assert await status_of(url, "grafana", "s3cret", ssl=trusting) == 200
        assert await status_of(url, ssl=trusting) == 401
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await status_of(url, ssl=ssl.create_default_context())
        with pytest.raises(aiohttp.ClientError):
            await status_of(url.replace("https", "http"))


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def test_no_flood_of_half_handshakes_takes_the_file_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """However many begin TLS and do not finish, only so many are kept open, and not for long; others get in again."""
    monkeypatch.setattr(limited, "SILENT_SECONDS_MAX", 1.0)
    certificate, key, trusting = certified(tmp_path)

    async def work() -> None:
        async with serve(ANY_PORT, nothing, access=Access({}, certificate, key)) as served:
            assert served is not None
            assert served.address is not None
            port = served.address.port
            url = f"https://localhost:{port}/health"
            assert await asyncio.gather(*(status_of(url, ssl=trusting) for _ in range(20))) == [200] * 20
            begin, flood = descriptors(), []
            for _ in range(200):
                flood.append(socket.socket())
                flood[-1].setblocking(False)
                with suppress(BlockingIOError):
                    flood[-1].connect(("127.0.0.1", port))
                await asyncio.sleep(0)
            await asyncio.sleep(0.2)  # Until all of them are accepted.
            kept = descriptors() - begin - len(flood)
            assert limited.CONNECTIONS_MAX <= kept <= limited.CONNECTIONS_MAX + limited.REFUSALS_MAX + 2
            async with asyncio.timeout(30):
                while await _status_or_none(url, trusting) != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            for each in flood:
                each.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(work())


async def _status_or_none(url: str, trusting: ssl.SSLContext) -> int | None:
    try:
        return await status_of(url, ssl=trusting)
    except aiohttp.ClientError:
        return None


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def test_a_handshake_does_not_outlive_its_server(tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Who was let in by the rules of before a reload, but for the handshake, is not let in any more."""
    certificate, key, _ = certified(tmp_path)

    async def work() -> None:
        async with serve(ANY_PORT, nothing, access=Access(USERS, certificate, key)) as served:
            assert served is not None
            assert served.address is not None
            reader, writer = await asyncio.open_connection("127.0.0.1", served.address.port)
            await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(work())


def test_a_silent_connection_is_closed_in_time_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that does not say goodbye, as TLS would have it."""
    monkeypatch.setattr(limited, "SILENT_SECONDS_MAX", 0.5)
    certificate, key, trusting = certified(tmp_path)

    def hold(port: int) -> float:
        plain = socket.create_connection(("127.0.0.1", port))
        with trusting.wrap_socket(plain, server_hostname="localhost") as secure:
            began = time.monotonic()
            with socket.socket(fileno=os.dup(secure.fileno())) as raw:
                while raw.recv(65536):
                    pass  # What TLS says is not answered.
            return time.monotonic() - began

    async def work() -> None:
        async with serve(ANY_PORT, nothing, access=Access({}, certificate, key)) as served:
            assert served is not None
            assert served.address is not None
            assert await asyncio.to_thread(hold, served.address.port) < 10

    uvloop.run(work())


def test_too_many_are_told_so_over_tls(tmp_path: Path) -> None:
    """As they are without it: 503, under the certificate."""
    certificate, key, trusting = certified(tmp_path)

    async def work() -> None:
        async with serve(ANY_PORT, nothing, access=Access({}, certificate, key)) as served:
            assert served is not None
            assert served.address is not None
            others = [
                await asyncio.open_connection("127.0.0.1", served.address.port) for _ in range(limited.CONNECTIONS_MAX)
            ]
            assert await status_of(f"https://localhost:{served.address.port}/health", ssl=trusting) == 503
            for _, writer in others:
                writer.close()

    uvloop.run(work())


async def test_a_certificate_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said, with the file, and tried again until it can."""
    authority = Authority(tmp_path / "ca", "ours")
    certificate, key = authority.issue("localhost", hosts="DNS:localhost,IP:127.0.0.1")
    late, other = tmp_path / "late.crt", authority.issue("other", hosts="DNS:other")[1]
    with pytest.raises(OSError, match=r"late\.crt"):
        Access({}, late, key).ssl_context()
    with pytest.raises(OSError, match=r"other.*cannot be used as certificate and key: key values mismatch"):
        Access({}, certificate, other).ssl_context()
    late.write_text("no certificate")
    with pytest.raises(OSError, match=r"late\.crt and .*cannot be used"):
        Access({}, late, key).ssl_context()
    async with serve(ANY_PORT, nothing, access=Access({}, late, key)) as served:
        assert served is not None
        assert served.address is None
        assert str(late) in caplog.text
        late.write_bytes(certificate.read_bytes())
        async with asyncio.timeout(20):
            while served.address is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


def test_a_key_with_a_password_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody is there to type it."""
    authority = Authority(tmp_path / "ca", "ours")
    certificate, locked = authority.issue("localhost", hosts="DNS:localhost", passphrase="hidden")
    with pytest.raises(OSError, match="cannot be used"):
        Access({}, certificate, locked).ssl_context()


def configured(folder: Path, http: str) -> Path:
    path = folder / "ingestd.toml"
    path.write_text(f'[database]\ndsn = "postgresql://somewhere/db"\n[http]\n{http}\n[[can]]\nname = "can0"\n')
    return path


def test_hashes_in_the_configuration(tmp_path: Path) -> None:
    """The command makes what the configuration takes, which hides it; a password there is refused and not shown."""
    command = [sys.executable, "-m", "ingestd", "hash-password"]
    hashed = subprocess.run(
        command, input="s3cret\n", capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()
    config = load_config(configured(tmp_path, f'users = {{ kim = "{hashed}" }}'))
    assert access._is_right("s3cret", config.http.users["kim"])
    assert hashed not in repr(config)
    with pytest.raises(ConfigError, match=r"http\.users\.kim: is not the hash of a password") as caught:
        load_config(configured(tmp_path, 'users = { kim = "s3cret" }'))
    assert "s3cret" not in str(caught.value)
    assert "ingestd hash-password" in str(caught.value)
    with pytest.raises(ConfigError, match="there is no certificate for it"):
        load_config(configured(tmp_path, 'tls_key = "x.key"'))
    for given, said in (("", "empty password"), ("x" * 73, "more than 72")):
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, said in done.stderr, done.stdout) == (2, True, "")


def test_check_looks_at_it(tmp_path: Path) -> None:
    """A certificate that is not there, and an address that everybody reaches."""
    path = configured(tmp_path, 'listen = ":0"\ntls_certificate = "server.pem"')
    done = run_ingestd("check", "-c", path, exit_code=1)
    said = " ".join(done.stdout.split())
    assert f"{tmp_path / 'server.pem'}: No such file or directory" in said
    assert "http.users" in said
    path = configured(tmp_path, f'listen = ":0"\nusers = {{ kim = "{USERS["grafana"]}" }}')
    said = " ".join(run_ingestd("check", "-c", path, exit_code=1).stdout.split())
    assert "passwords go over the network as they are: see http.tls_certificate" in said
    assert f"http://{socket.gethostname()}:0/metrics" in said
