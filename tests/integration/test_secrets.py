"""A canary for a password: however the daemon and the commands come by it, right or wrong, it sings nowhere else."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from ingestd.config import HIDDEN, load_config
from ingestd.daemon.client import ask
from ingestd.errors import IngestdError
from ingestd.store import migrate
from ingestd.store.connection import connect
from ingestd.store.dsn import place
from tests.commands import is_listening
from tests.conftest import psql
from tests.integration.test_cli import ingestd
from tests.recorder import Instrument, Recorder, lines_of, wait_until
from tests.tls_server import TlsServer, run, tls_server

CANARY = "kanari7"
PASSWORD = f"{CANARY}/@:?#% {CANARY}"  # with every sign that has to be written otherwise in an address
WRITTEN = quote(PASSWORD, safe="")
VERBOSE = "import sys; sys.argv.append('-v')"
OPTIONS = f'{{ api_key = "{CANARY}", receive_own_messages = true }}'
MASKED = f'[[can]]\nname = "can9"\ninterface = "virtual"\noptions = {OPTIONS}\n'


@pytest.fixture(scope="module")
def server() -> Iterator[TlsServer]:
    """One role comes by its password, another by a certificate whose key has a passphrase."""
    with tls_server() as found:
        psql(found.admin, f"CREATE ROLE pass LOGIN IN ROLE by_password PASSWORD '{PASSWORD}'",
             "CREATE ROLE cert LOGIN IN ROLE by_certificate", "GRANT CREATE ON SCHEMA public TO pass")  # fmt: skip
        by_password = found.dsn("pass", password=PASSWORD)
        ingestd("db", "init", dsn=by_password)
        ingestd("db", "grant", "--writer", "cert", "--reader", "cert", dsn=by_password)
        found.authority.issue("cert", passphrase=PASSWORD)
        yield found


def dsn_of(server: TlsServer, way: str) -> str:
    """The DSNs that a password can be in."""
    if way == "netloc":
        return server.dsn("pass").replace("pass@", f"pass:{WRITTEN}@")
    if way == "query":
        return server.dsn("pass", password=PASSWORD)
    files = server.authority.folder
    return server.dsn("cert", sslmode="verify-full", sslrootcert=server.authority.certificate, sslpassword=PASSWORD,
                      sslcert=files / "cert-locked.crt", sslkey=files / "cert-locked.key", password=CANARY)  # fmt: skip


def arguments_of(pid: int) -> str:
    """The command lines of a process and of all that it has started: everybody can see them."""
    process = psutil.Process(pid)
    return "\n".join(" ".join(each.cmdline()) for each in [process, *process.children(recursive=True)])


def told_by(recorder: Recorder) -> dict[str, str]:
    """Everything that a daemon says to those who ask."""
    address = re.findall(r"listening http=(\S+)", recorder.log()[recorder.begun :])[-1]
    told = {}
    for page in ("", "metrics", "health", "ready"):
        try:
            with urllib.request.urlopen(f"http://{address}/{page}", timeout=20) as answer:
                told[page] = answer.read().decode()
        except urllib.error.HTTPError as error:  # 503, until every source has looked for its device
            with error:
                told[page] = error.read().decode()
    socket = recorder.journal.with_name("journal.sock")
    for method, route, body in (
        ("GET", "/daemon", None),
        ("GET", "/session", None),
        ("GET", "/tail/channels", None),
        ("PATCH", "/session", {"notes": "dry"}),
        ("POST", "/session/start", {"name": "lap"}),
        ("POST", "/session/mark", {"text": "apex"}),
        ("POST", "/session/stop", {}),
        ("POST", "/reload", {}),
        ("POST", "/nonsense", {}),
    ):
        try:
            told[f"{method} {route}"] = json.dumps(ask(socket, method, route, body))
        except IngestdError as error:
            told[f"{method} {route}"] = str(error)
    return told


def told_by_commands(recorder: Recorder) -> dict[str, str]:
    """Everything that the commands say beside it, and what is in its journal."""
    told = {}
    for command in ("check", "check --json", "sessions list", "sessions list --json", "sessions show running --json",
                    "journal status --json", "reload"):  # fmt: skip
        done = ingestd(*command.split(), "-c", recorder.config)
        told[command] = done.stdout + done.stderr
    files = [path for path in recorder.journal.rglob("*") if path.is_file()]
    assert files
    return told | {str(path): path.read_bytes().decode("latin-1") for path in files}


def assert_silent(told: dict[str, str]) -> None:
    """The canary is nowhere, as it is or as it is written in an address."""
    assert all(told.values()), "something that was to be looked at is empty"
    assert [where for where, text in told.items() if CANARY in text] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "given"), [("netloc", "file"), ("query", "environment"), ("key", "credential"), ("netloc", "beside")]
)
def test_a_daemon_keeps_it(
    server: TlsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, given: str
) -> None:
    """Log (-v), HTTP, control socket, commands, command lines, journal, and every table: sessions.config too."""
    dsn = dsn_of(server, way)
    device = Instrument(tmp_path / "instrument")
    device.start()
    # Each of the others goes before the file.
    daemon = Recorder(tmp_path, dsn if given == "file" else "postgresql://nobody@/none", lines_of(device) + MASKED,
                      changes=VERBOSE)  # fmt: skip
    if given == "environment":
        monkeypatch.setenv("INGESTD_DSN", dsn)
    elif given == "credential":
        (tmp_path / "credentials").mkdir()
        (tmp_path / "credentials" / "ingestd.dsn").write_text(dsn + "\n")
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    elif given == "beside":
        daemon.config.with_suffix(".dsn").write_text(dsn + "\n")
    try:
        daemon.start()
        is_listening(daemon)
        daemon.wait_for("the database takes data")
        assert daemon.process is not None
        told = {"command lines": arguments_of(daemon.process.pid)}
        listening = [
            each for each in psutil.Process(daemon.process.pid).net_connections("inet") if each.status == "LISTEN"
        ]
        assert [each.laddr.ip for each in listening] == ["127.0.0.1"], "nothing but http.listen, and that on loopback"
        told |= told_by(daemon)
        if given == "file":  # These read the same variables and credential.
            monkeypatch.delenv("INGESTD_DSN", raising=False)
            told |= {"command lines, later": arguments_of(daemon.process.pid)} | told_by_commands(daemon)
        masked = f"SELECT count(*) FROM sessions WHERE config #>> '{{file,can,0,options,api_key}}' = '{HIDDEN}'"
        wait_until(lambda: int(psql(server.admin, masked)) > 0, "the configuration in SQL", more=daemon.log)
        daemon.stop()
        told["log"] = daemon.log()
        assert "debug" in told["log"]
        told["tables"] = run(server.program("pg_dump"), "--inserts", "-d", server.admin)
        assert '"api_key"' in told["tables"], "what is masked is there"
        assert_silent(told)
    finally:
        daemon.close()
        device.close()


@pytest.mark.slow
def test_a_daemon_that_is_refused(server: TlsServer, tmp_path: Path) -> None:
    """A wrong password, a port where nobody is, nonsense: said in the log and /ready, without it."""
    device = Instrument(tmp_path / "instrument")
    good = server.dsn("pass").replace("pass@", f"pass:{WRITTEN}wrong@")
    daemon = Recorder(tmp_path, good, lines_of(device), changes=VERBOSE)
    try:
        daemon.start()
        is_listening(daemon)
        told = {}
        for dsn, said in (
            (good, "wrong password"),
            (good.replace(f":{server.port}", ":1"), "localhost:1/telemetry"),
        ):
            begun = len(daemon.log())
            daemon.config.write_text(
                re.sub(r'dsn = ".*"', lambda _, dsn=dsn: f'dsn = "{dsn}"', daemon.config.read_text())
            )
            ingestd("reload", "-c", daemon.config)
            daemon.wait_for(said, after=0 if dsn == good else begun)
            told |= {f"{said}: {where}": text for where, text in told_by(daemon).items()}
        for wrong in ("postgresql://pass:%s@localhost:port/x", "postgresql://pass:%s/@localhost/x", "%s"):
            text = re.sub(r'dsn = ".*"', lambda _, wrong=wrong: f'dsn = "{wrong % CANARY}"', daemon.config.read_text())
            daemon.config.write_text(text)
            refused = ingestd("reload", "-c", daemon.config, exit_code=2)
            told[wrong] = refused.stderr
        daemon.kill()  # It would wait for the database, to the end of its grace.
        told["log"] = daemon.log()
        assert_silent(told)
    finally:
        daemon.close()
        device.close()


WRONG = [
    f"postgresql://me:{CANARY}@host:port/x",
    f"postgresql://me:{CANARY}@127.0.0.1:99999/x",
    f"postgresql://me:{CANARY}@127.0.0.1:1/x",
    f"postgresql://me:{CANARY}%@127.0.0.1:1/x",
    f"postgresql://me:{CANARY}%zz@127.0.0.1:1/x",
    f"postgresql://me:a@{CANARY}@127.0.0.1:1/x",
    f"postgresql://me:a@b:{CANARY}@127.0.0.1:1/x",
    f"postgresql://me:a/{CANARY}@127.0.0.1:1/x",
    f"postgresql://me:{CANARY}/a@127.0.0.1:1/x",
    f"postgresql://me:{CANARY}?a@127.0.0.1:1/x",
    f"postgresql://me:{CANARY}#a@127.0.0.1:1/x",
    f"postgresql://me:1?{CANARY}@127.0.0.1:1/x",
    f"postgresql://me:[{CANARY}]@127.0.0.1:1/x",
    f"postgresql://me:{CANARY}℀@127.0.0.1:1/x",
    f"postgresql://me@127.0.0.1:1/x?password=a&{CANARY}",
    f"postgresql://me@127.0.0.1:1/x?password={CANARY}&sslmode=nonsense",
    f"postgresql://me@127.0.0.1:1/x?password={CANARY}&sslmode=verify-full&sslrootcert=/nonexistent",
    f"postgres:/me:{CANARY}@127.0.0.1:1/x",
    f"mysql://me:{CANARY}@127.0.0.1:1/x",
    f"host=127.0.0.1 port=1 password={CANARY}",
    CANARY,
]


@pytest.mark.parametrize("dsn", WRONG)
async def test_a_dsn_that_is_wrong(tmp_path: Path, dsn: str) -> None:
    """Whatever is wrong with it: what connects, migrates and reads configurations says so without it."""
    for call in (connect(dsn, "ingestd/test"), migrate.upgrade(dsn), migrate.check(dsn)):
        with pytest.raises(IngestdError) as caught:
            await call
        assert CANARY not in str(caught.value)
    assert CANARY not in place(dsn)
    path = tmp_path / "car.toml"
    path.write_text(f'[database]\ndsn = """{dsn}"""\n[[can]]\nname = "can0"\n', encoding="utf-8")
    try:
        said = repr(load_config(path, environment={}))
    except IngestdError as error:
        said = str(error)
    assert CANARY not in said


@pytest.mark.parametrize(("dsn", "exit_code"), [(WRONG[0], 2), (WRONG[1], 2), (WRONG[2], 1), (WRONG[8], 2)])
def test_commands_with_a_dsn_that_is_wrong(dsn: str, exit_code: int) -> None:
    """One line, no traceback, no password."""
    for command in (["db", "current"], ["sessions", "list"]):
        done = ingestd(*command, dsn=dsn, exit_code=exit_code)
        assert len(done.stderr.splitlines()) == 1
        assert CANARY not in done.stderr + done.stdout


@pytest.mark.parametrize("way", ["netloc", "query"])
def test_psql_has_it_from_the_environment(server: TlsServer, way: str) -> None:
    """It logs in, and its arguments, which everybody can see, are without it."""
    shown = ingestd("db", "psql", "-XAt", "-c", r"\! tr '\0' ' ' </proc/$PPID/cmdline", "-c", "SELECT current_user",
                    dsn=dsn_of(server, way)).stdout  # fmt: skip
    assert "postgresql://pass@localhost" in shown
    assert shown.endswith("pass\n")
    assert CANARY not in shown
