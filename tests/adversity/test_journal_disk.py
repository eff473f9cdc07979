"""The disk under the journal of a running daemon: full, read-only, emptied by somebody. What is lost is counted.

I/O errors need a device that has them: tests/disk/test_io_errors.py, in a kernel of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.books import Said, assert_books, in_metrics, metric
from tests.recorder import SMALL_SEGMENTS, Instrument, Recorder, lines_of, stored, wait_until
from tests.torture.blows import small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path) as folder:
        if folder is None:
            pytest.skip("only root, where it may mount, can make a small file system")
        yield folder


@pytest.fixture
def recorder(tmp_path: Path, disk: Path, migrated: str, instrument: Instrument) -> Iterator[Recorder]:
    """A daemon that records the instrument onto a small disk and is at it."""
    daemon = Recorder(tmp_path, migrated, lines_of(instrument), disk=disk, changes=SMALL_SEGMENTS)
    daemon.start()
    try:
        wait_until(lambda: len(stored(migrated)) > 100, "first frames", 20.0, daemon.log)
        yield daemon
    finally:
        daemon.close()


def books(recorder: Recorder) -> Said:
    return in_metrics(recorder)["line"]


def wait_for_frames(recorder: Recorder, count: int = 200) -> None:
    """Until so many more are received."""
    before = books(recorder).received
    wait_until(lambda: books(recorder).received > before + count, f"{count} frames", more=recorder.log)


def fill(disk: Path) -> Path:
    """Take all that is left of a file system."""
    hog = disk / "hog"
    with hog.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
    return hog


@pytest.mark.slow
def test_a_full_disk(recorder: Recorder, disk: Path, migrated: str, instrument: Instrument) -> None:
    """What finds no room is counted to the frame and told by an event; with room again it goes on by itself."""
    hog = disk / "hog"

    def is_dropping() -> bool:
        """The journal gives up what the database has, to have room; somebody else is quicker."""
        with hog.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        return bool(books(recorder).dropped)

    wait_until(is_dropping, "frames that find no room", more=recorder.log)
    assert metric(recorder, "ingestd_journal_writable") == 0
    wait_for_frames(recorder)
    hog.unlink()
    before = books(recorder).committed
    wait_until(lambda: books(recorder).committed > before + 200, "frames after it", more=recorder.log)
    assert metric(recorder, "ingestd_journal_writable") == 1
    said = assert_books(recorder, migrated, {"line": instrument.stop()})["line"]
    assert set(said.dropped) == {"journal"}
    assert f"the journal {recorder.journal} cannot be written: No space left on device" in recorder.log()
    assert f"the journal {recorder.journal} can be written again" in recorder.log()


def newest(journal: Path) -> Path:
    """The segment that is being written, or was a moment ago."""
    return max(journal.glob("*.journal"))


def delete_the_newest(journal: Path) -> None:
    newest(journal).unlink()


def delete_all_files(journal: Path) -> None:
    for path in journal.iterdir():
        path.unlink()


def delete_the_folder(journal: Path) -> None:
    shutil.rmtree(journal)


def move_the_folder_away(journal: Path) -> None:
    journal.rename(journal.with_name(f"elsewhere-{time.monotonic_ns()}"))


def replace_the_newest_by_a_copy(journal: Path) -> None:
    """As an editor does, or a tool that restores files."""
    copy = journal / "copy"
    shutil.copy(newest(journal), copy)
    copy.replace(newest(journal))


def replace_the_newest_by_noise(journal: Path) -> None:
    noise = journal / "noise"
    noise.write_bytes(os.urandom(100_000))
    noise.replace(newest(journal))


def truncate_the_newest(journal: Path) -> None:
    os.truncate(newest(journal), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "done",
    [
        delete_the_newest, delete_all_files, delete_the_folder, move_the_folder_away, replace_the_newest_by_a_copy,
        replace_the_newest_by_noise, truncate_the_newest,
    ],
)  # fmt: skip
def test_what_somebody_does_to_the_files(
    recorder: Recorder, migrated: str, instrument: Instrument, done: Callable[[Path], None]
) -> None:
    """Recording goes on, in another file if need be; each frame is in SQL once, or it is counted as lost and told."""
    for _ in range(3):
        done(recorder.journal)
        wait_for_frames(recorder)
        before = books(recorder).committed
        wait_until(lambda before=before: books(recorder).committed > before, "frames in SQL", more=recorder.log)  # type: ignore[misc]
    is_kept = done is not truncate_the_newest  # It may have been sent, and be the only segment there was.
    said = assert_books(recorder, migrated, {"line": instrument.stop()}, is_kept=is_kept)["line"]
    assert set(said.dropped) <= {"damage", "journal"}
    assert "Traceback" not in recorder.log()
    recorder.start()
    recorder.wait_for("recording session", after=recorder.begun)
    recorder.wait_for("link up", after=recorder.begun)
    assert "Traceback" not in recorder.stop()
