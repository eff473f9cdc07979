"""TLS to PostgreSQL: certificates of both sides, and whatever can be wrong with them, against a server that demands it.

Whatever it is: nothing is lost, the reason is said with its remedy, and once it is mended the daemon goes on by itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from ingestd.errors import StoreError
from ingestd.store import migrate, tls
from ingestd.store.connection import connect
from ingestd.store.faults import translate
from tests.books import assert_books
from tests.commands import assert_every_number_once
from tests.conftest import psql
from tests.integration.test_cli import ingestd
from tests.recorder import Instrument, Recorder, lines_of, wait_until
from tests.tls_server import Authority, TlsServer, tls_server

Pair = tuple[Path, Path]
OVER_TLS = "SELECT version, client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"


@dataclass(slots=True)
class Garage:
    """The server, another CA, and the certificates of two roles."""

    server: TlsServer
    stranger: Authority
    owner: Pair
    car: Pair

    def dsn(self, role: str, pair: Pair | None, *, host: str = "localhost", **parameters: object) -> str:
        """With everything that verify-full needs, unless `parameters` say otherwise."""
        mine = {} if pair is None else {"sslcert": pair[0], "sslkey": pair[1]}
        root = self.server.authority.certificate
        return self.server.dsn(role, host=host, **{"sslmode": "verify-full", "sslrootcert": root, **mine, **parameters})


@pytest.fixture(scope="module")
def garage() -> Iterator[Garage]:
    """The schema is made, and the car allowed to write, over TLS: so Alembic's way is one of those that are tried."""
    with tls_server() as server:
        found = Garage(server, Authority(server.folder / "stranger", "Another CA"),
                       server.authority.issue("owner"), server.authority.issue("car"))  # fmt: skip
        for role in ("owner", "car"):
            psql(server.admin, f"CREATE ROLE {role} LOGIN IN ROLE by_certificate")
        psql(server.admin, "GRANT CREATE ON SCHEMA public TO owner")
        dsn = found.dsn("owner", found.owner)
        assert "schema is at" in ingestd("db", "init", dsn=dsn).stdout
        assert "car: given" in ingestd("db", "grant", "--writer", "car", dsn=dsn).stdout
        yield found


@pytest.fixture
def files(garage: Garage, tmp_path: Path) -> Garage:
    """Copies of the car's certificate and key, to break."""
    pair = (tmp_path / "car.crt", tmp_path / "car.key")
    for source, target in zip(garage.car, pair, strict=True):
        shutil.copy(source, target)
    return Garage(garage.server, garage.stranger, garage.owner, pair)


# ------------------------------------------------------------------------------------------------------- the daemon


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is done, what has to be said of it, and what is done to mend it."""

    break_it: Callable[[], object]
    said: str
    mend: Callable[[], object]


def troubles(garage: Garage, root: Path, pair: Pair) -> Iterator[Trouble]:
    """Each thing that can be wrong with the files of a client that is connected, or with the server's."""
    server, certificate, key = garage.server, *pair
    ca, good = server.authority.certificate, (server.data / "server.crt", server.data / "server.key")
    kept = tuple(shutil.copy(path, root.parent / path.name) for path in good)

    def put(*paths: Path) -> Callable[[], object]:
        """The car's certificate and key."""
        return lambda: [shutil.copy(source, target) for source, target in zip(paths, pair, strict=True)]

    def present(pair: Pair) -> Callable[[], object]:
        return lambda: (server.present(*pair), server.reload())

    yield Trouble(lambda: shutil.copy(garage.stranger.certificate, root), f"is not signed by a CA in {root}",
                  lambda: shutil.copy(ca, root))  # fmt: skip
    yield Trouble(root.unlink, f"{root} (sslrootcert) cannot be read: No such file or directory",
                  lambda: shutil.copy(ca, root))  # fmt: skip
    yield Trouble(key.unlink, f"{key} (sslkey) cannot be read: No such file or directory", put(*garage.car))
    yield Trouble(lambda: key.chmod(0o644), f"the key {key} is open to others: its mode is 0644",
                  lambda: key.chmod(0o600))  # fmt: skip
    yield Trouble(put(*garage.owner), 'certificate authentication failed for user "car"', put(*garage.car))
    foreign = garage.stranger.issue("car")
    yield Trouble(put(*foreign), f"if it is not: {certificate} has to be valid, and signed by a CA in the server's",
                  put(*garage.car))  # fmt: skip
    mend = present((Path(kept[0]), Path(kept[1])))
    expired = server.authority.issue("server", hosts="DNS:localhost", days=-1)
    yield Trouble(present(expired), "has expired (renew it on the server; is this machine's clock right?)", mend)
    elsewhere = server.authority.issue("elsewhere", hosts="DNS:db.example")
    mismatch = "is not for that host: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: Hostname mismatch"
    yield Trouble(present(elsewhere), mismatch, mend)
    yield Trouble(lambda: server.reload("ssl = off"), "has no TLS, and the DSN demands it",
                  lambda: server.reload("ssl = on"))  # fmt: skip


def ready(recorder: Recorder) -> str:
    """What /ready says."""
    address = re.findall(r"listening http=(\S+)", recorder.log())[-1]
    with urllib.request.urlopen(f"http://{address}/ready", timeout=20) as answer:
        return json.dumps(json.load(answer), ensure_ascii=False)


@pytest.mark.slow
def test_a_daemon_goes_on_when_it_is_mended(files: Garage, tmp_path: Path) -> None:
    """Over TLS with its own certificate. Whatever is broken is said, in the log and by /ready; no frame is lost."""
    root = tmp_path / "root.crt"
    shutil.copy(files.server.authority.certificate, root)
    device = Instrument(tmp_path / "instrument", pause_s=0.01)
    device.start()
    daemon = Recorder(tmp_path, files.dsn("car", files.car, sslrootcert=root), lines_of(device))
    original = Garage(files.server, files.stranger, files.owner, shared_pair(files))
    try:
        daemon.start()
        daemon.wait_for("the database takes data")
        seen = psql(files.server.admin, "SELECT DISTINCT version, client_dn FROM pg_stat_ssl JOIN pg_stat_activity"
                    " USING (pid) WHERE usename = 'car'")  # fmt: skip
        assert seen == "TLSv1.3|/CN=car"
        for trouble in troubles(original, root, files.car):
            begun = len(daemon.log())
            trouble.break_it()
            files.server.cut()
            daemon.wait_for(trouble.said, after=begun)
            wait_until(lambda said=trouble.said: json.dumps(said, ensure_ascii=False)[1:-1] in ready(daemon),  # type: ignore[misc]
                       f"{trouble.said!r} in /ready", more=daemon.log)  # fmt: skip
            trouble.mend()
            daemon.wait_for("the database takes data", after=begun)
        assert_books(daemon, files.server.admin, {"line": device.stop()})
        assert_every_number_once(files.server.admin)
    finally:
        daemon.close()
        device.close()


def shared_pair(files: Garage) -> Pair:
    """The car's certificate as it was issued."""
    return files.server.authority.folder / "car.crt", files.server.authority.folder / "car.key"


# ----------------------------------------------------------------------------------------------------- connections


async def refusal(dsn: str) -> StoreError:
    with pytest.raises(StoreError) as caught:
        await connect(dsn, "ingestd/test")
    return caught.value


async def test_a_client_without_a_certificate(garage: Garage) -> None:
    """The server's own words, and which parameters of the DSN name one."""
    error = await refusal(garage.dsn("car", None))
    assert "refuses the login: connection requires a valid client certificate" in str(error)
    assert "sslcert and sslkey in the DSN name a certificate whose common name is the user" in error.hint


async def test_an_address_instead_of_the_name(garage: Garage) -> None:
    """verify-full compares what is in the DSN; verify-ca does not."""
    error = await refusal(garage.dsn("car", garage.car, host="127.0.0.1"))
    assert "is not for that host: " in str(error)
    assert "subjectAltName" in error.hint
    (await connect(garage.dsn("car", garage.car, host="127.0.0.1", sslmode="verify-ca"), "ingestd/test")).terminate()


async def test_a_key_with_a_passphrase(garage: Garage) -> None:
    """It is taken from sslpassword; without it, or with a wrong one, both files are named, and no passphrase is."""
    certificate, key = garage.server.authority.issue("car", passphrase="hush")
    (await connect(garage.dsn("car", (certificate, key), sslpassword="hush"), "ingestd/test")).terminate()
    for wrong in ({"sslpassword": "hushhush"}, {}):
        error = await refusal(garage.dsn("car", (certificate, key), **wrong))
        assert f"{certificate} (sslcert) and {key} (sslkey) are no certificate with its key" in str(error)
        assert "sslpassword its passphrase" in error.hint
        assert "hush" not in str(error)


async def test_the_usual_places(garage: Garage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~/.postgresql, as libpq has it, and the variables of libpq; without a CA's certificate nobody can be verified."""
    monkeypatch.setenv("HOME", str(tmp_path))
    dsn = garage.server.dsn("car", sslmode="verify-full")
    error = await refusal(dsn)
    assert "sslmode=verify-full needs the certificate of the CA" in str(error)
    assert "sslrootcert=" in error.hint
    usual = tmp_path / ".postgresql"
    usual.mkdir()
    shutil.copy(garage.server.authority.certificate, usual / "root.crt")
    shutil.copy(garage.car[0], usual / "postgresql.crt")
    shutil.copy(garage.car[1], usual / "postgresql.key")
    await migrate.check(dsn)
    assert (await connection_by(dsn)).endswith("/CN=car")
    monkeypatch.setenv("PGSSLROOTCERT", str(garage.stranger.certificate))
    assert f"is not signed by a CA in {garage.stranger.certificate}" in str(await refusal(dsn))
    monkeypatch.setenv("PGSSLROOTCERT", "")
    both = usual / "postgresql.crt"
    both.write_text(garage.car[0].read_text() + garage.car[1].read_text())
    (usual / "postgresql.key").unlink()
    assert f"the key {both} is open to others" in str(await refusal(dsn))
    both.chmod(0o600)
    assert (await connection_by(dsn)).endswith("/CN=car")


async def connection_by(dsn: str) -> str:
    """How the server sees it."""
    connection = await connect(dsn, "ingestd/test")
    try:
        return "|".join(await connection.fetchrow(OVER_TLS))
    finally:
        connection.terminate()


def test_psql_takes_the_same_dsn(garage: Garage) -> None:
    """`ingestd db psql` is over TLS with the same certificate."""
    said = ingestd("db", "psql", "-XAtc", OVER_TLS, dsn=garage.dsn("car", garage.car)).stdout
    assert said.strip() == "TLSv1.3|/CN=car"


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert"])
async def test_files_that_are_something_else(files: Garage, tmp_path: Path, name: str) -> None:
    """They are named, and what they should hold."""
    other = tmp_path / "notes.txt"
    other.write_text("no certificate")
    other.chmod(0o600)
    error = await refusal(files.dsn("car", files.car, **{name: other}))
    assert f"{other} ({name})" in str(error)
    assert "PEM" in error.hint
    with pytest.raises(StoreError, match=r"notes\.txt"):
        await migrate.upgrade(files.dsn("car", files.car, **{name: other}))


async def test_a_key_of_roots(files: Garage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group may read it, as libpq allows; where the key is another's, that is too much."""
    key = files.car[1]
    key.chmod(0o640)
    if os.geteuid() == 0:
        tls.check_files(files.dsn("car", files.car))
        os.chown(key, 65534, 65534)
    with pytest.raises(StoreError, match="is open to others: its mode is 0640"):
        tls.check_files(files.dsn("car", files.car))


def test_who_has_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there is no usual place."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert tls.files_of("postgresql://car@db.example/x") == tls.TlsFiles("prefer", None, None, None)


@pytest.mark.parametrize(
    "dsn", ["postgresql://car@/x?host=/run/postgresql", "postgresql://car@db/x?sslmode=disable", "postgresql://[x"]
)
def test_where_no_file_is_read(dsn: str) -> None:
    """A socket, TLS turned off, an address that nobody understands."""
    assert tls.files_of(dsn) is None
    tls.check_files(dsn)


def test_what_tls_says_otherwise() -> None:
    """Alerts about our certificate are told from other failures; a clock that is behind passes; all is kept."""
    dsn = "postgresql://car@db.example/x?sslmode=require"

    def said(reason: str) -> str:
        error = ssl.SSLError(1, f"[SSL: {reason}] said so")
        error.reason = reason
        return str(translate(error, dsn))

    assert "does not accept this client's certificate" in said("SSLV3_ALERT_CERTIFICATE_EXPIRED")
    assert "does not accept this client's certificate" in said("TLSV1_ALERT_UNKNOWN_CA")
    assert "TLS with PostgreSQL at db.example:5432/x failed" in said("TLSV1_ALERT_PROTOCOL_VERSION")
    unverified = ssl.SSLCertVerificationError(1, "revoked")
    for code, words in ((9, "is not valid yet"), (23, "cannot be trusted"), (20, "a CA in the file of sslrootcert")):
        unverified.verify_code = code
        assert words in str(translate(unverified, dsn))
    broken = asyncpg.ConnectionDoesNotExistError("closed")
    assert "ssl_ca_file" not in translate(broken, dsn).hint
