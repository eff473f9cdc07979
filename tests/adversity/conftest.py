"""What the tests of adversity share: an instrument that talks, and servers and a network that they may hurt."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest

from ingestd.store import embedded, migrate
from tests.conftest import on_database, psql
from tests.recorder import Instrument
from tests.torture.proxy import Proxy


@pytest.fixture
def instrument(tmp_path: Path) -> Iterator[Instrument]:
    """Numbered lines, some hundreds a second, for as long as the test takes."""
    device = Instrument(tmp_path / "instrument")
    device.start()
    yield device
    device.close()


@pytest.fixture
def proxy(migrated: str) -> Iterator[Proxy]:
    """A network in front of the database of `migrated`."""
    parts = urlsplit(migrated)
    where = parse_qs(parts.query)
    if "host" in where:
        upstream: str | tuple[str, int] = f"{where['host'][0]}/.s.PGSQL.{where.get('port', ['5432'])[0]}"
    else:  # INGESTD_TEST_DSN
        upstream = (parts.hostname or "localhost", parts.port or 5432)
    wire = Proxy(upstream)
    yield wire
    wire.close()


def through(proxy: Proxy, dsn: str) -> str:
    """The DSN of the same database behind the proxy."""
    parts = urlsplit(dsn)
    user = parts.netloc.rpartition("@")[0]
    return f"postgresql://{user}@127.0.0.1:{proxy.port}{parts.path}?sslmode=disable"


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder of a server that the test may stop; it is running and has the schema."""
    # The server of root runs as another user, who must get at its folder.
    folder = Path(tempfile.mkdtemp(prefix="ingestd-test-", dir="/var/lib" if os.geteuid() == 0 else None)) / "postgres"
    asyncio.run(migrate.upgrade(embedded.start(folder)))
    yield folder
    embedded.stop(folder)
    shutil.rmtree(folder.parent)


@pytest.fixture
def small_database(postgres_server: str, migrated_template: str) -> Iterator[tuple[str, Path]]:
    """A database with the schema on a file system of 16 MB; its DSN and the mount point."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    data = Path(psql(postgres_server, "SHOW data_directory"))
    mount = Path(tempfile.mkdtemp(prefix="ingestd-full-", dir="/var/lib"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mount], check=False)
    if mounted.returncode:
        mount.rmdir()
        pytest.skip("this machine does not let us mount a tmpfs")
    name = f"ingestd_small_{uuid4().hex[:8]}"
    try:
        folder = mount / "space"
        folder.mkdir()
        mount.chmod(0o755)
        owner = data.stat()
        shutil.chown(folder, owner.st_uid, owner.st_gid)
        psql(postgres_server, f"CREATE TABLESPACE {name} LOCATION '{folder}'")
        psql(postgres_server, f"CREATE DATABASE {name} TEMPLATE {migrated_template} TABLESPACE {name}")
        yield on_database(postgres_server, name), mount
    finally:
        psql(postgres_server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)", f"DROP TABLESPACE IF EXISTS {name}")
        subprocess.run(["umount", mount], check=True)
        mount.rmdir()
