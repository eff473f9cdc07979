"""The whole daemon on a real bus: a capture played onto it gives what importing the file gives."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import pytest

from ingestd.decode.databases import load
from ingestd.imports import ImportOptions, import_file
from ingestd.pipeline import Binding
from ingestd.sources.can_socket import dropped_count
from tests.can_bus.bus import Bus
from tests.can_bus.receivers import flooding
from tests.recorder import Recorder, wait_until

PLAYED_SECONDS = 6.0  # of the capture, with its own spacing
RATE, SECONDS = 8_000, 20  # of each of four buses
JITTER_MS_MAX = 50.0  # The player and the daemon share one processor, which is not the guest's alone.


@pytest.fixture
def recorder(tmp_path: Path, migrated: str, shared_data: Path, bus: Bus) -> Iterator[Recorder]:
    database = shared_data / "dbc" / "subaru_sample.dbc"
    bus_table = f'[[can]]\nname = "can0"\nchannel = "{bus.channel}"\ndbc = ["{database}"]\n'
    daemon = Recorder(tmp_path, migrated, bus_table)
    daemon.start()
    daemon.wait_for("link up")
    yield daemon
    daemon.close()


def fetch(dsn: str, query: str, *arguments: Any) -> list[asyncpg.Record]:
    async def work() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(dsn)
        try:
            return list(await connection.fetch(query, *arguments))
        finally:
            await connection.close()

    return asyncio.run(work())


def play(capture: Path, bus: Bus, *options: str) -> None:
    subprocess.run(["canplayer", *options, "-I", str(capture), f"{bus.channel}=can0"], check=True, timeout=120)


def in_sql(dsn: str, session: Any) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]], np.ndarray[Any, Any]]:
    """The frames of a session in wire order; its samples, a channel after the other, in order; the frames' stamps."""
    frames = fetch(
        dsn,
        "SELECT payload_json ->> 'id', payload_json ->> 'data', ts_mono_ns FROM frames WHERE session_id = $1"
        " ORDER BY id",
        session,
    )
    samples = fetch(
        dsn,
        "SELECT channel, value_num, value_text, unit, quality FROM signals WHERE session_id = $1"
        " ORDER BY channel, id / 131072, id % 131072 / 32",
        session,
    )
    stamps = np.array([row[2] for row in frames], np.int64)
    return [tuple(row)[:2] for row in frames], [tuple(row) for row in samples], stamps


def played_and_imported(recorder: Recorder, dsn: str, capture: Path, database: Path) -> Iterator[Any]:
    """What SQL holds of the recorded session, then of the imported one."""
    frames = len(capture.read_text().splitlines())
    count = "SELECT coalesce(sum(frame_count), 0) FROM frame_chunks"
    wait_until(lambda: fetch(dsn, count)[0][0] == frames, f"{frames} frames", more=recorder.log)
    log = recorder.stop()
    assert f"received={frames} committed={frames} pending=0 rejected=0 dropped=0 balanced=True" in log
    [[session]] = fetch(dsn, "SELECT id FROM sessions")
    yield in_sql(dsn, session)
    summary = asyncio.run(import_file(capture, ImportOptions([Binding(None, load(database))]), dsn))
    yield in_sql(dsn, summary.session_id)


@pytest.mark.slow
def test_a_capture_played_flat_out(recorder: Recorder, migrated: str, shared_data: Path, bus: Bus) -> None:
    """All 82,558 frames of a real car: equal frames in equal order, equal values, equal counts."""
    capture = shared_data / "can" / "subaru.log"
    play(capture, bus, "-t")
    recorded, imported = played_and_imported(recorder, migrated, capture, shared_data / "dbc" / "subaru_sample.dbc")
    assert len(recorded[0]) == 82_558
    assert recorded[0] == imported[0]
    assert len(recorded[1]) == 91_381  # as cantools has it: expected/derived
    assert recorded[1] == imported[1]
    assert all(one <= other for one, other in pairwise(recorded[2].tolist()))


@pytest.mark.slow
def test_a_capture_played_in_its_own_time(
    recorder: Recorder, migrated: str, shared_data: Path, bus: Bus, tmp_path: Path
) -> None:
    """Some seconds of it, as they were spaced: the stamps agree within the player's jitter, the rest exactly."""
    lines = (shared_data / "can" / "subaru.log").read_text().splitlines(keepends=True)
    first = float(lines[0][1:].split(")")[0])
    capture = tmp_path / "seconds.log"
    capture.write_text("".join(line for line in lines if float(line[1:].split(")")[0]) < first + PLAYED_SECONDS))
    play(capture, bus)
    recorded, imported = played_and_imported(recorder, migrated, capture, shared_data / "dbc" / "subaru_sample.dbc")
    assert recorded[:2] == imported[:2]
    apart_ms = ((recorded[2] - recorded[2][0]) - (imported[2] - imported[2][0])) / 1e6
    apart_ms -= np.median(apart_ms)
    assert np.percentile(np.abs(apart_ms), 90) < JITTER_MS_MAX
    assert np.median(np.abs(apart_ms)) < JITTER_MS_MAX / 10


@pytest.mark.slow
@pytest.mark.usefixtures("own_machine")
def test_four_buses_at_8000_frames_a_second_into_the_database(tmp_path: Path, migrated: str, buses: list[Bus]) -> None:
    """The daemon and PostgreSQL on one processor: every frame of 20 s that the kernel had room for is stored, once.

    The sender shares the processor, and what it could not send in time it sends in a burst; what is lost then is lost
    in the kernel, and counted exactly: sent = stored + counted.
    """
    sent = RATE * SECONDS
    tables = "".join(f'[[can]]\nname = "{bus.channel}"\n' for bus in buses)
    daemon = Recorder(tmp_path, migrated, tables)
    daemon.start()
    try:
        daemon.wait_for("the database takes data")
        with flooding(RATE, SECONDS, *(bus.channel for bus in buses)) as flood:
            assert flood.stdin is not None
            assert flood.stdout is not None
            flood.stdin.write("go\n")
            flood.stdin.flush()
            assert flood.stdout.readline() == "done\n"
        # What the kernel's queue of packets for all interfaces had no room for never came to the sockets.
        dropped = {bus.channel: dropped_count(bus.channel) for bus in buses}
        count = "SELECT coalesce(sum(frame_count), 0) FROM frame_chunks"
        stored = 4 * sent - sum(dropped.values())
        wait_until(lambda: fetch(migrated, count)[0][0] >= stored, "every frame", 120, daemon.stop)
        log = daemon.stop()
    finally:
        daemon.close()
    for bus in buses:
        lost = dropped[bus.channel]
        words = f"dropped_overflow={lost}" if lost else "dropped=0"
        assert f"source={bus.channel} received={sent} committed={sent - lost} pending=0 rejected=0 {words}" in log
        rows = fetch(migrated, "SELECT data FROM frame_chunks WHERE source = $1 ORDER BY id", bus.channel)
        numbers = np.frombuffer(b"".join(row[0] for row in rows), "<u8")
        assert len(numbers) == sent - lost
        assert (np.diff(numbers.astype(np.int64)) > 0).all()
    sys.stdout.write(
        f"\n4 buses, {4 * RATE} frames/s for {SECONDS} s: dropped before the sockets {sum(dropped.values())}\n"
    )
    assert sum(dropped.values()) < 4 * sent / 100
