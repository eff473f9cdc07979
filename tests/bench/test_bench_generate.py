"""The synthetic load of bench/generate.py: the same for the same seed, and just what it says it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import can
import cantools
import generate
import pytest
import truth

LOAD = generate.Load(
    frames=4567, buses=2, ids=12, rate=500, signals=4, fd=0.25, multiplexed=0.25, seed=7
)  # nine cycles and a part of one


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> generate.Made:
    return generate.generate(tmp_path_factory.mktemp("load"), LOAD)


def test_cantools_counts_and_adds_up_what_the_generator_says(made: generate.Made) -> None:
    """Every frame of the text is in the DBC of its bus; of every signal, count and sum of raw values agree."""
    databases = {bus: cantools.database.load_file(path) for bus, path in made.databases.items()}
    counts: Counter[tuple[str, str]] = Counter()
    sums: Counter[tuple[str, str]] = Counter()
    frames = 0
    with can.LogReader(made.capture) as reader:
        for message in reader:
            frames += 1
            definition = databases[str(message.channel)].get_message_by_frame_id(message.arbitration_id)
            assert len(message.data) == definition.length
            assert message.is_fd == (definition.length > 8)
            for name, raw in definition.decode(bytes(message.data), scaling=False, decode_choices=False).items():
                counts[str(message.channel), f"{definition.name}.{name}"] += 1
                sums[str(message.channel), f"{definition.name}.{name}"] += raw
    assert frames == made.frames == LOAD.frames
    expected = {(c.source, c.name): (c.count, c.raw_sum) for c in made.channels if c.count}
    assert {key: (counts[key], sums[key]) for key in counts} == expected
    assert made.signals == counts.total()


def test_the_text_is_a_recording(made: generate.Made) -> None:
    """Stamps rise through the file at the rate asked for; classic, FD and multiplexed frames are there."""
    lines = made.capture.read_text().splitlines()
    stamps = [float(line[1:18]) for line in lines]
    assert stamps == sorted(stamps)
    assert stamps[-1] - stamps[0] == pytest.approx(LOAD.frames / LOAD.buses / LOAD.rate, abs=0.1)
    assert sum("##" in line for line in lines) > 0
    assert {line.split()[1] for line in lines} == {"can0", "can1"}
    assert sum(" M " in path.read_text() for path in made.databases.values()) == 2


def test_the_same_seed_gives_the_same_bytes(made: generate.Made, tmp_path: Path) -> None:
    """The whole folder is equal; a longer load of the seed begins with it; another seed is another load."""
    again = generate.generate(tmp_path / "again", LOAD)
    assert again.channels == made.channels == truth.read(made.capture.with_suffix(".json"))
    for path in (made.capture, *made.databases.values()):
        assert (again.capture.parent / path.name).read_bytes() == path.read_bytes()
    longer = generate.generate(tmp_path / "longer", replace(LOAD, frames=2 * LOAD.frames))
    assert longer.capture.read_bytes().startswith(made.capture.read_bytes())
    other = generate.generate(tmp_path / "other", replace(LOAD, seed=8))
    assert other.capture.read_bytes() != made.capture.read_bytes()


def test_many_ids(tmp_path: Path) -> None:
    """More ids than frames in a second, more than standard ones: each of them occurs, some are extended."""
    made = generate.generate(tmp_path, generate.Load(frames=4000, buses=1, ids=2000, rate=1000, signals=2, fd=0))
    ids = Counter(line.split()[2].partition("#")[0] for line in made.capture.read_text().splitlines())
    assert len(ids) == 2000
    assert {len(text) for text in ids} == {3, 8}


@pytest.mark.parametrize("wrong", [{"signals": 33}, {"fd": 1.5}, {"rate": 600_000}, {"frames": 0}])
def test_an_impossible_load_is_refused(wrong: dict[str, float]) -> None:
    """Before anything is written."""
    with pytest.raises(ValueError, match="Load"):
        replace(LOAD, **wrong)
