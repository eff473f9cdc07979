"""The server's disk is full in the middle of an import: said in one line, nothing half done, and it goes on later.

The disk is a small file system of its own with a tablespace on it, so only this database is full and not the server.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from ingestd import demo, imports
from ingestd.decode.databases import load
from ingestd.errors import StoreUnavailable
from ingestd.imports import ImportOptions, import_file
from ingestd.pipeline import Binding
from tests.conftest import on_database, psql


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


def make_room(mount: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=400m", mount], check=True)


@pytest.mark.slow
async def test_the_import_stops_and_goes_on(
    small_database: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is called that; what was committed stays; with space again the same import completes exactly."""
    dsn, mount = small_database
    monkeypatch.setattr(imports, "PATIENCE_SECONDS", 0.5)
    capture = tmp_path / "drive.log"
    frames = demo.write_capture(capture, 1200)
    options = ImportOptions([Binding(source, load(path)) for source, path in demo.databases().items()])
    with pytest.raises(StoreUnavailable, match="disk is full") as caught:
        await import_file(capture, options, dsn)
    assert "free space" in caught.value.hint
    position = int(psql(dsn, "SELECT position FROM feeds"))
    assert 0 < position < frames
    assert int(psql(dsn, "SELECT sum(frame_count) FROM frame_chunks")) == position
    make_room(mount)
    summary = await import_file(capture, options, dsn)
    assert (summary.resumed_at, summary.counts.frames) == (position, frames)
    assert int(psql(dsn, "SELECT sum(frame_count) FROM frame_chunks")) == frames
    samples = "SELECT sum(frame_count * array_length(value_num, 1)) FROM signal_chunks"
    assert int(psql(dsn, samples)) == summary.counts.signals
