"""bench/replay.py onto real buses: what is sent there is the capture, frame for frame, each source on its own bus."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import generate
import numpy as np
import pytest

from ingestd.model import Flag, FrameBatch
from ingestd.sources.captures import open_capture
from ingestd.sources.socketcan import SocketCan
from tests.can_bus.bus import Bus, Recording, opened, running

BENCH = Path(__file__).parents[2] / "bench"
KIND = Flag.EXTENDED | Flag.FD | Flag.BITRATE_SWITCH


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """Two seconds of two buses, classic and FD frames."""
    load = generate.Load(frames=4000, buses=2, ids=20, rate=1000, fd=0.2, seed=5)
    return generate.generate(tmp_path / "load", load).capture


def replay(capture: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(BENCH / "replay.py"), str(capture), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def sent(capture: Path) -> dict[str, FrameBatch]:
    """The capture's frames by source; all together under the name ""."""
    [batch] = open_capture(capture).batches()
    return {"": batch.frames} | {frames.source: frames for frames in batch.by_source()}


def assert_same(recording: Recording, frames: FrameBatch) -> None:
    """Ids, kinds and payloads in order; nothing lost, nothing twice."""
    assert recording.lost_count == 0
    np.testing.assert_array_equal(recording.column("arbitration_id"), frames.arbitration_id)
    np.testing.assert_array_equal(recording.column("flags") & KIND.value, frames.flags & KIND.value)
    np.testing.assert_array_equal(recording.column("length"), frames.length)
    width = frames.data.shape[1]
    np.testing.assert_array_equal(recording.data()[:, :width], frames.data)


async def test_everything_onto_one_bus(bus: Bus, capture: Path) -> None:
    """Four times as fast: all frames in the order of the file, in a quarter of their time or more."""
    source, recording = SocketCan("can0", bus.channel), Recording()
    frames = sent(capture)[""]
    async with running(source, recording):
        await opened(source)
        player = replay(capture, "--speed", "4", "--onto", bus.channel)
        await recording.has_accounted_for(len(frames))
    said, _ = player.communicate(timeout=60)
    assert player.returncode == 0
    assert said.startswith("4,000 frames of 2.0 s in ")
    assert "late: p50" in said
    assert_same(recording, frames)
    stamps = recording.column("ts_ns")
    # Frames may leave late, never early: the last one's distance from the first is that of the file, or more but for
    # how late the first one was.
    assert stamps[-1] - stamps[0] > 0.5 * (frames.ts_ns[-1] - frames.ts_ns[0]) / 4


async def test_each_source_onto_its_own_bus(buses: list[Bus], capture: Path) -> None:
    """Twice in a loop, twenty times as fast: each bus has what its source sent, twice, and nothing of the other."""
    sources = [SocketCan(f"can{number}", buses[number].channel) for number in range(2)]
    recordings = [Recording(), Recording()]
    by_source = sent(capture)
    onto = ",".join(f"{source.name}={source.channel}" for source in sources)
    async with running(sources[0], recordings[0]), running(sources[1], recordings[1]):
        for source in sources:
            await opened(source)
        player = replay(capture, "--speed", "20", "--loop", "2", "--onto", onto)
        for source, recording in zip(sources, recordings, strict=True):
            await recording.has_accounted_for(2 * len(by_source[source.name]))
    player.communicate(timeout=60)
    assert player.returncode == 0
    for source, recording in zip(sources, recordings, strict=True):
        frames = by_source[source.name]
        twice = np.concatenate([np.arange(len(frames))] * 2)
        assert_same(recording, frames[twice])


def test_a_bus_that_is_not_there(capture: Path) -> None:
    """Is said in a line, not in a traceback."""
    player = subprocess.run(
        [sys.executable, str(BENCH / "replay.py"), str(capture), "--onto", "nocan7"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert player.returncode == 1
    assert player.stderr.startswith("replay: ")
    assert "Traceback" not in player.stderr
