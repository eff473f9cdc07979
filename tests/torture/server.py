"""A PostgreSQL that is there to be hurt: processes killed, sessions ended, databases lost and restored from backups."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil

from ingestd.store import embedded, migrate
from tests.conftest import on_database, psql

TEMPLATE = "torture_template"


class Server:
    """One server, its databases by name. Nothing of it is used by anybody else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.maintenance = on_database(embedded.start(folder), "postgres")
        psql(self.maintenance, f"CREATE DATABASE {TEMPLATE}")
        asyncio.run(migrate.upgrade(self.dsn(TEMPLATE)))

    def dsn(self, name: str) -> str:
        """Of a database, past any proxy."""
        return on_database(self.maintenance, name)

    @property
    def socket(self) -> str:
        """The path of its Unix socket."""
        where = parse_qs(urlsplit(self.maintenance).query)
        return f"{where['host'][0]}/.s.PGSQL.{where['port'][0]}"

    def create(self, name: str) -> None:
        """A database with the schema and nothing in it."""
        psql(self.maintenance, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")

    def drop(self, name: str) -> None:
        """The database and its backup are needed no more."""
        for each in (name, f"{name}_backup"):
            psql(self.maintenance, f"DROP DATABASE IF EXISTS {each} WITH (FORCE)")

    def kill(self) -> None:
        """SIGKILL for every process of it, the first one first, as the kernel does when memory is short."""
        server = psutil.Process(int((self.folder / "postmaster.pid").read_text().split()[0]))
        processes = [server, *server.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=30)

    def stop(self) -> None:
        """As an operator does."""
        embedded.stop(self.folder)

    def start(self) -> None:
        """Start it, unless it runs."""
        assert on_database(embedded.start(self.folder), "postgres") == self.maintenance

    def end_sessions(self, name: str) -> None:
        """End every session of a database."""
        psql(
            self.maintenance,
            f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '{name}'",
        )

    @contextmanager
    def closed(self, name: str) -> Iterator[None]:
        """Nobody is connected to a database while inside."""
        psql(self.maintenance, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        self.end_sessions(name)
        yield
        psql(self.maintenance, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

    def back_up(self, name: str) -> None:
        """Keep the database as it is now."""
        backup = f"{name}_backup"
        with self.closed(name):
            psql(self.maintenance, f"DROP DATABASE IF EXISTS {backup}", f"CREATE DATABASE {backup} TEMPLATE {name}")

    def restore(self, name: str, template: str) -> None:
        """Lose the database, and make it anew as another one."""
        with self.closed(name):
            psql(
                self.maintenance,
                f"DROP DATABASE {name} WITH (FORCE)",
                f"CREATE DATABASE {name} TEMPLATE {template} ALLOW_CONNECTIONS false",
            )

    def set(self, name: str, setting: str) -> None:
        """A setting of a database, in force for everybody at once."""
        psql(self.maintenance, f"ALTER DATABASE {name} {setting}")
        self.end_sessions(name)


@contextmanager
def own_server() -> Iterator[Server]:
    """A server for the time being."""
    # The server of root runs as another user, who must get at its folder.
    parent = Path(tempfile.mkdtemp(prefix="ingestd-torture-", dir="/var/lib" if os.geteuid() == 0 else None))
    try:
        yield Server(parent / "postgres")
    finally:
        embedded.stop(parent / "postgres")
        shutil.rmtree(parent)


def suspend(pid: int) -> None:
    """Stop a process where it is."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)


def resume(pid: int) -> None:
    """Let it go on."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
