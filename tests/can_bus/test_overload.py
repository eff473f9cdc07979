"""More than can be recorded: what was sent is what is stored and what is counted as lost, to the frame."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.can_bus.bus import Bus, numbered
from tests.can_bus.receivers import flooding
from tests.can_bus.test_daemon import fetch
from tests.disk.devices import DISKS, load_modules, mapped, mounted, run
from tests.recorder import Recorder, wait_until

BURST = 2000
STOPPED_BURSTS = 20  # More than the socket's buffer holds.
DELAY_MS = 200  # of every write to the slow disk
RATE, SECONDS = 8_000, 4

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_machine")]


def assert_all_accounted_for(recorder: Recorder, dsn: str, sent: int, *, lost: bool) -> tuple[int, int]:
    """Stop the daemon: sent = stored + counted, and what is stored is in order. How many are stored, and lost."""
    log = recorder.stop()
    said = re.search(rf"books source=can0 received={sent} committed=(\d+) pending=0 rejected=0 dropped\w*=(\d+) ", log)
    assert said is not None, log[-2000:]
    committed, dropped = int(said[1]), int(said[2])
    assert committed + dropped == sent
    assert bool(dropped) is lost
    rows = fetch(dsn, "SELECT data FROM frame_chunks ORDER BY mono_start_ns")
    numbers = np.frombuffer(b"".join(row[0] for row in rows), "<u8").astype(np.int64)
    assert len(numbers) == committed
    assert (np.diff(numbers) > 0).all()
    [[told]] = fetch(dsn, "SELECT coalesce(sum((payload ->> 'frames')::int), 0) FROM events WHERE kind = 'gap'")
    assert told == dropped
    return committed, dropped


def test_a_daemon_that_is_stopped_for_seconds(tmp_path: Path, migrated: str, bus: Bus) -> None:
    """SIGSTOP and SIGCONT while the bus goes on: the kernel keeps what it has room for and counts the rest, thrice."""
    source = f'[[can]]\nname = "can0"\nchannel = "{bus.channel}"\nreceive_buffer = "4MiB"\n'
    recorder = Recorder(tmp_path, migrated, source)
    try:
        recorder.start()
        recorder.wait_for("the database takes data")
        assert recorder.process is not None
        sent, stopped_ns = 0, []
        with bus.sender() as sender:
            for _ in range(3):
                sender.send(numbered(100, first=sent))
                recorder.process.send_signal(signal.SIGSTOP)
                stopped_ns.append(time.monotonic_ns())
                for number in range(STOPPED_BURSTS):
                    sender.send(numbered(BURST, first=sent + 100 + number * BURST))
                    time.sleep(0.05)
                recorder.process.send_signal(signal.SIGCONT)
                sent += 100 + STOPPED_BURSTS * BURST
                until = f"SELECT count(*) FROM events WHERE kind = 'gap' AND ts_mono_ns >= {stopped_ns[-1]}"
                wait_until(lambda until=until: fetch(migrated, until)[0][0] > 0, "the gap", more=recorder.log)
        stored, lost = assert_all_accounted_for(recorder, migrated, sent, lost=True)
        assert "Traceback" not in recorder.log()
    finally:
        recorder.close()
    sys.stdout.write(f"\nstopped three times: {sent} frames sent, {stored} stored, {lost} counted as lost\n")


def test_a_disk_slower_than_the_bus(tmp_path: Path, migrated: str, bus: Bus) -> None:
    """Every write takes a fifth of a second, a sync several of them: recording waits for none, nothing is lost."""
    load_modules()
    run("mkfs.ext4", "-q", "-F", DISKS[0])
    with (
        mapped("slow", f"delay {DISKS[0]} 0 0 {DISKS[0]} 0 {DELAY_MS}") as device,
        mounted(device.path, tmp_path / "disk", "ext4") as folder,
    ):
        recorder = Recorder(folder, migrated, f'[[can]]\nname = "can0"\nchannel = "{bus.channel}"\n')
        try:
            recorder.start()
            recorder.wait_for("the database takes data", seconds=120)
            with flooding(RATE, SECONDS, bus.channel) as flood:
                assert flood.stdin is not None
                assert flood.stdout is not None
                flood.stdin.write("go\n")
                flood.stdin.flush()
                assert flood.stdout.readline() == "done\n"
            assert_all_accounted_for(recorder, migrated, RATE * SECONDS, lost=False)
        finally:
            recorder.close()
