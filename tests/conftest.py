"""What every test may ask for: a PostgreSQL server, databases on it, and the shared captures.

The server is the embedded one, new for this run; INGESTD_TEST_DSN names another, as a user who may create databases.
INGESTD_TEST_DATA names the folder of the captures; with CI set, missing captures fail the tests that need them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import pytest

from ingestd.store import embedded, migrate


def on_database(dsn: str, name: str) -> str:
    """The DSN of another database of the same server."""
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))


def as_user(dsn: str, role: str) -> str:
    """The DSN for another user of the same database, who needs no password."""
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{role}@{parts.netloc.rpartition('@')[2]}"))


def psql(dsn: str, *statements: str) -> str:
    """Run statements, one transaction each, from outside of any event loop, and return what they print."""
    arguments = [str(embedded.psql_path()), "-XqAt", "-v", "ON_ERROR_STOP=1", "-d", dsn]
    for statement in statements:
        arguments += ["-c", statement]
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The DSN of a server on which the tests may create databases."""
    given = os.environ.get("INGESTD_TEST_DSN")
    if given:
        yield given
        return
    # The server of root runs as another user, who must get at its folder.
    folder = Path(tempfile.mkdtemp(prefix="ingestd-test-", dir="/var/lib" if os.geteuid() == 0 else None))
    try:
        yield embedded.start(folder / "postgres")
    finally:
        embedded.stop(folder / "postgres")
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def migrated_template(postgres_server: str) -> Iterator[str]:
    """The name of a database with the schema, to be copied: quicker than migrating each."""
    name = f"ingestd_template_{uuid4().hex}"
    psql(postgres_server, f"CREATE DATABASE {name}")
    with ThreadPoolExecutor(1) as thread:  # A loop of its own, whatever the loop of the test that comes first.
        thread.submit(asyncio.run, migrate.upgrade(on_database(postgres_server, name))).result()
    yield name
    psql(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(postgres_server: str) -> Iterator[str]:
    """The DSN of a new, empty database."""
    yield from _new_database(postgres_server, "template1")


@pytest.fixture
def migrated(postgres_server: str, migrated_template: str) -> Iterator[str]:
    """The DSN of a new database with the schema and nothing in it."""
    yield from _new_database(postgres_server, migrated_template)


def _new_database(server: str, template: str) -> Iterator[str]:
    name = f"ingestd_test_{uuid4().hex}"
    psql(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield on_database(server, name)
    psql(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the public captures, their signal databases and what they should decode to."""
    repository = Path(__file__).resolve().parent.parent
    given = os.environ.get("INGESTD_TEST_DATA")
    folder = Path(given) if given else repository.parent / "shared" / "data"
    if not folder.is_dir():
        message = f"no captures in {folder}: set INGESTD_TEST_DATA"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
