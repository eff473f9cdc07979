"""The benchmarks measure what they say: the same result from everyone, and a replay that stores what was generated."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import compare
import generate
import pytest
import truth

BENCH = Path(__file__).parents[2] / "bench"
LOAD = generate.Load(frames=3000, buses=2, ids=20, rate=1000, signals=4, fd=0.2, multiplexed=0.2, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> generate.Made:
    return generate.generate(tmp_path_factory.mktemp("load"), LOAD)


def replay(made: generate.Made, dsn: str, out: Path, *options: str) -> dict[str, object]:
    """bench/replay.py in a process of its own, into a database; its figures."""
    databases = [part for entry in made.dbc_arguments for part in ("--dbc", entry)]
    command = [sys.executable, str(BENCH / "replay.py"), str(made.capture), *databases, "--dsn", dsn]
    subprocess.run([*command, "--json", str(out), *options], check=True, timeout=120)
    figures: dict[str, object] = json.loads(out.read_text())
    return figures


@pytest.mark.slow
@pytest.mark.parametrize(("speed", "loops"), [("max", 3), ("10", 1)])
def test_a_replay_stores_what_was_generated(
    made: generate.Made, migrated: str, tmp_path: Path, speed: str, loops: int
) -> None:
    """Through journal, decode and COPY of the daemon, flat out and in a loop, or on time: each sample, once."""
    figures = replay(made, migrated, tmp_path / "figures.json", "--speed", speed, "--loop", str(loops))
    assert figures["frames"] == loops * made.frames
    assert asyncio.run(truth.differences(migrated, truth.times(made.channels, loops))) == []
    assert (figures["late_max_ms"] == 0) == (speed == "max")


@pytest.mark.slow
def test_what_is_missing_or_wrong_is_found(made: generate.Made, migrated: str, tmp_path: Path) -> None:
    """The check that all comparisons rest on fails where a channel has a sample less, or another value."""
    replay(made, migrated, tmp_path / "figures.json", "--speed", "max")
    first, *others = made.channels
    fewer = truth.Channel(first.source, first.name, first.factor, first.offset, first.count - 1, first.raw_sum)
    other = truth.Channel(first.source, first.name, first.factor, first.offset, first.count, first.raw_sum + 1)
    for wrong in (fewer, other):
        [found] = asyncio.run(truth.differences(migrated, [wrong, *others]))
        assert found.startswith(f"{first.source} {first.name}: ")
    assert asyncio.run(truth.differences(migrated, others)) == [f"{first.count} samples of channels that were not sent"]


@pytest.mark.slow
def test_every_peer_stores_the_same(postgres_server: str) -> None:
    """ingestd what the load says; each peer what ingestd stores, or `compare` ends; the limits take the same bytes."""
    with tempfile.TemporaryDirectory() as folder:  # The server may run as another user, who must get at it.
        rates = list(compare.compare(postgres_server, LOAD, 1000, Path(folder)))
    kinds = [rate.kind for rate in rates]
    assert kinds[:7] == ["ingestd", "ingestd", "peer", "peer", "peer", "peer", "capture"]
    # A server that was given may not allow us to have it read a file.
    assert kinds[7:] == ["limit"] * (5 if "INGESTD_TEST_DSN" not in os.environ else len(kinds) - 7)
    assert rates[0].frames == rates[1].frames == rates[-1].frames == LOAD.frames
    assert rates[0].signals == rates[-1].signals
    assert all(rate.signals_per_second > 0 for rate in rates)
