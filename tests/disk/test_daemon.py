"""A running daemon whose disk fails, or turns read-only, for a while: it records on, says so, counts what is lost."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.books import assert_books, in_metrics, metric
from tests.disk.devices import DISKS, Mapped, mapped, mounted, run
from tests.recorder import SMALL_SEGMENTS, Instrument, Recorder, lines_of, wait_until

HEALTHY, BROKEN = f"linear {DISKS[2]} 0", "error"
# Without a journal of its own ext4 goes on after an error, and need not be mounted anew.
MAKE = ("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=0")
FAULT_SECONDS = 3.0
SAYS = re.compile(r"the journal \S+ cannot be|no new segment can be made: Read-only file system")
SECONDS_MAX = 120.0
Fault = Callable[[Mapped, Path], Iterator[None]]


@contextmanager
def refuses_everything(device: Mapped, _: Path) -> Iterator[None]:
    """EIO for each read and write, as of a disk that has lost its cable."""
    device.become(BROKEN)
    yield
    device.become(HEALTHY)


@contextmanager
def is_read_only(_: Mapped, folder: Path) -> Iterator[None]:
    """As the kernel makes a file system that it found damaged: a file that is open takes more, and no other is made."""
    Path("/proc/sysrq-trigger").write_text("u")  # Of all block devices; there are no others here.
    wait_until(lambda: f" {folder} ext4 ro" in Path("/proc/mounts").read_text(), "read-only file system")
    yield
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [refuses_everything, is_read_only])
def test_a_disk_that_fails_for_a_while(tmp_path: Path, migrated: str, fault: Fault) -> None:
    """What was said is in SQL or counted under its reason, each number once; afterwards it goes on by itself."""
    run(*MAKE, DISKS[2])
    instrument = Instrument(tmp_path / "instrument", pause_s=0.005)
    with mapped("failing", HEALTHY) as device, mounted(device.path, tmp_path / "disk", "ext4") as folder:
        recorder = Recorder(tmp_path, migrated, lines_of(instrument), disk=folder, changes=SMALL_SEGMENTS)
        try:
            recorder.start()
            instrument.start()
            recorder.wait_for("the database takes data", seconds=SECONDS_MAX)
            with fault(device, folder):  # type: ignore[attr-defined]
                time.sleep(FAULT_SECONDS)
                received = in_metrics(recorder)["line"].received
                wait_until(lambda: in_metrics(recorder)["line"].received > received, "frames", SECONDS_MAX)
                wait_until(lambda: bool(SAYS.search(recorder.log())), "word of it", SECONDS_MAX, recorder.log)
            committed = in_metrics(recorder)["line"].committed
            wait_until(
                lambda: in_metrics(recorder)["line"].committed > committed + 100, "frames", SECONDS_MAX, recorder.log
            )
            wait_until(lambda: metric(recorder, "ingestd_journal_writable") == 1, "journal_writable 1", SECONDS_MAX)
            said = assert_books(recorder, migrated, {"line": instrument.stop()}, seconds=SECONDS_MAX)["line"]
            assert set(said.dropped) <= {"journal", "damage"}
        finally:
            recorder.close()
            instrument.close()
