"""A PostgreSQL for a benchmark, gone afterwards: the distribution's with default settings, if there is one.

The embedded server has no lz4 and would show other figures than the server people run; it is the fallback.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg

from ingestd.store import embedded, migrate


def server_binaries() -> Path | None:
    """The folder of the newest PostgreSQL that the distribution has installed, or None."""
    found = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = max(found, key=lambda path: float(path.parts[-3]), default=None)
    return None if newest is None else newest.parent


@contextmanager
def temporary_server(binaries: Path) -> Iterator[str]:
    """Start a fresh server with its default settings; yields the DSN of its database `postgres`."""
    as_user: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="ingestd-bench-"))
    folder.chmod(0o755)
    data = folder / "data"
    data.mkdir()
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root.
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(data, "postgres", "postgres")
    control = [*as_user, str(binaries / "pg_ctl"), "-D", str(data), "-w"]
    try:
        initdb = [*as_user, str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        subprocess.run([*initdb, "--locale=C.UTF-8"], check=True, stdout=subprocess.DEVNULL, cwd="/")
        options = f"-c listen_addresses='' -c unix_socket_directories='{data}'"
        start = [*control, "-l", str(data / "log"), "-o", options, "start"]
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL, cwd="/")
        try:
            data.chmod(0o711)
            yield f"postgresql://postgres@/postgres?host={data}"
        finally:
            subprocess.run([*control, "-m", "fast", "stop"], check=True, stdout=subprocess.DEVNULL, cwd="/")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def server(dsn: str | None, *, use_embedded: bool = False) -> Iterator[tuple[str, str]]:
    """The DSN of a maintenance database and a word on what server it is."""
    binaries = None if use_embedded else server_binaries()
    if dsn:
        yield dsn, "the given server"
    elif binaries is not None:
        with temporary_server(binaries) as started:
            yield started, f"PostgreSQL of the distribution ({binaries.parts[-2]}), default settings, Unix socket"
    else:
        # The server of root runs as another user, who must get at its folder.
        folder = Path(tempfile.mkdtemp(prefix="ingestd-bench-", dir="/var/lib" if os.geteuid() == 0 else None))
        try:
            yield embedded.start(folder / "postgres"), "the embedded PostgreSQL (no lz4)"
        finally:
            embedded.stop(folder / "postgres")
            shutil.rmtree(folder)


async def fresh(dsn: str, name: str, *, schema: bool = True) -> str:
    """A new database on the server; its DSN."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    made = dsn_of(dsn, name)
    if schema:
        await migrate.upgrade(made)
    return made


def dsn_of(dsn: str, name: str) -> str:
    """The DSN of another database on the same server."""
    base, _, query = dsn.partition("?")
    return f"{base.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")
