"""The server's disk is full in the middle of an import: said in one line, nothing half done, and it goes on later.

The disk is a small file system of its own with a tablespace on it, so only this database is full and not the server.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ingestd import demo, imports
from ingestd.decode.databases import load
from ingestd.errors import StoreUnavailable
from ingestd.imports import ImportOptions, import_file
from ingestd.pipeline import Binding
from tests.conftest import psql


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
