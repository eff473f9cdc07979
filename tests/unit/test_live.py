"""What people watch live: the newest value of every channel, at no cost to those who record."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from ingestd.daemon import telling
from ingestd.daemon.live import FRAMES_WAITING_MAX, Live, Value, matches
from ingestd.daemon.telling import Following
from ingestd.decode.databases import load
from ingestd.framing import LineFramer
from ingestd.model import Clock, ClockState, FrameBatch, SerialFlag
from ingestd.pipeline import Binding, Decoders
from ingestd.protocols import Line
from ingestd.sources.serial import columns

CLOCK = Clock(1_000, ClockState.SET)
DBC = """VERSION ""
BU_:
BO_ 256 Engine: 8 ECU
 SG_ Speed : 0|16@1+ (0.5,0) [0|0] "rpm" ECU
 SG_ Mode : 16|8@1+ (1,0) [0|0] "" ECU
BO_ 512 Brakes: 8 ECU
 SG_ Pressure : 0|8@1+ (1,0) [0|0] "bar" ECU
VAL_ 256 Mode 0 "off" 3 "launch" ;
"""


@pytest.fixture
def live(tmp_path: Path) -> Live:
    (tmp_path / "car.dbc").write_text(DBC)
    decoders = Decoders([Binding("can0", load(tmp_path / "car.dbc"))])
    return Live(lambda: decoders)


def engine(*rows: tuple[int, int, int], arbitration_id: int = 256) -> FrameBatch:
    """Frames of stamp, raw speed and mode."""
    data = np.zeros((len(rows), 8), np.uint8)
    for number, (_, speed, mode) in enumerate(rows):
        data[number, :3] = speed & 255, speed >> 8, mode
    count = len(rows)
    return FrameBatch(
        "can0", np.array([at for at, _, _ in rows], np.int64), np.full(count, arbitration_id, np.uint32),
        np.zeros(count, np.uint8), np.full(count, 8, np.uint16), data,
    )  # fmt: skip


async def first(live: Live, *batches: FrameBatch, pattern: str = "*") -> list[Value]:
    """What somebody who begins to watch sees first of frames that come then."""
    async with aclosing(live.watch(pattern, 0.0)) as watch:
        seen = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        for batch in batches:
            live.frames(batch, CLOCK)
        return sorted(await asyncio.wait_for(seen, 10))


async def test_the_newest_value_of_each_channel(live: Live) -> None:
    """With its instant, unit, label and how many samples there were."""
    found = await first(live, engine((5, 100, 0), (7, 6000, 3)), engine((9, 7, 0), arbitration_id=512))
    assert found == [
        Value("can0", "Brakes.Pressure", 9, 1009, 7.0, None, "bar", 0, 1, 7.0, 7.0),
        Value("can0", "Engine.Mode", 7, 1007, 3.0, "launch", None, 0, 2, 0.0, 3.0),
        Value("can0", "Engine.Speed", 7, 1007, 3000.0, None, "rpm", 0, 2, 50.0, 3000.0),
    ]


async def test_keys_that_come_in_turns() -> None:
    """A line without a key says nothing of it: what was there last stays, with its own instant and number."""
    decoders = Decoders([], protocols={"ecu": Line("keyvalue", {"time_field": "t"})})
    framer = LineFramer()
    lines = [frame for n in range(4) for frame in framer.feed((b"t=170000000%d\n", b"rpm=%d u=\n")[n % 2] % n, n)]
    decoded = await first(Live(lambda: decoders), columns("ecu", lines[1:3]), columns("ecu", lines[3:]))
    assert [(each.channel, each.number, each.ts_mono_ns, each.samples) for each in decoded] == [
        ("rpm", 3.0, 3, 2),
        ("t", 1700000002.0, 2, 1),
    ]


async def test_a_frame_that_is_older_than_the_last(live: Live) -> None:
    """Two adapters may deliver out of order: the newest instant is shown."""
    (speed,) = await first(live, engine((7, 6000, 3)), engine((5, 100, 0)), pattern="Speed")
    assert (speed.ts_mono_ns, speed.number, speed.samples) == (7, 3000.0, 2)


async def test_nobody_watches(live: Live) -> None:
    """Then nothing is kept, and nothing decoded; who comes later sees what comes then."""
    live.frames(engine((1, 1, 1)), CLOCK)
    assert not live._waiting
    assert await first(live, engine((2, 4, 0)), pattern="can0/Engine.Speed")
    live.frames(engine((3, 1, 1)), CLOCK)
    assert not live._waiting
    assert live._task is None
    assert not live._values


async def test_who_reads_slowly_gets_the_newest(live: Live) -> None:
    """No backlog: what came meanwhile is one value, and its samples are counted."""
    async with aclosing(live.watch("Speed", 0.0)) as watch:
        seen = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        live.frames(engine((1, 2, 0)), CLOCK)
        assert [value.number for value in await asyncio.wait_for(seen, 10)] == [1.0]
        for at in range(2, 100):
            live.frames(engine((at, 2 * at, 0)), CLOCK)
            if at % 30 == 0:
                await asyncio.sleep(0.15)
        async with live._decoded:
            await asyncio.wait_for(
                live._decoded.wait_for(lambda: live._values["can0", "Engine.Speed"].samples == 99), 10
            )
        (value,) = await asyncio.wait_for(anext(watch), 10)
        assert (value.number, value.samples) == (99.0, 99)
        assert (value.minimum, value.maximum) == (2.0, 99.0), "of what was not told"


async def test_more_than_can_be_decoded(live: Live) -> None:
    """The oldest are left out here, and counted; memory is bounded."""
    async with aclosing(live.watch("*", 0.0)) as watch:
        seen = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        batch = engine(*((at, at, 0) for at in range(1000)))
        for _ in range(2 * FRAMES_WAITING_MAX // 1000):
            live.frames(batch, CLOCK)
        assert live.frames_left_out == FRAMES_WAITING_MAX
        assert live._waiting_count == FRAMES_WAITING_MAX
        assert await asyncio.wait_for(seen, 10)


async def test_frames_that_cannot_be_decoded_and_sources_without_a_decoder(live: Live) -> None:
    """They are not shown, and disturb nobody."""
    broken = FrameBatch("can0", *(np.zeros(0, np.int64) for _ in range(5)))  # type: ignore[arg-type]
    unknown = engine((1, 1, 1))
    unknown = FrameBatch(
        "gps", *(getattr(unknown, name) for name in ("ts_ns", "arbitration_id", "flags", "length", "data"))
    )
    assert len(await first(live, broken, unknown, engine((2, 4, 0)))) == 2


@pytest.mark.parametrize(
    ("pattern", "is_shown"),
    [("*", True), ("", True), ("speed", True), ("can0/*", True), ("can?/engine.*", True), ("gps/*", False),
     ("Engine", True), ("*Mode", False), ("[xc]an0/*", True)],
)  # fmt: skip
def test_patterns(pattern: str, is_shown: bool) -> None:
    """As in a shell, or a part of the name."""
    assert matches(pattern, "can0", "Engine.Speed") == is_shown


async def test_who_comes_later_than_a_header(live: Live) -> None:
    """The rows of a CSV log are named as its header says, which was long before anybody watched."""
    del live
    decoders = Decoders([], protocols={"log": "csv"})
    logger = Live(lambda: decoders)

    def said(*lines: bytes) -> FrameBatch:
        return columns("log", [(at, line, SerialFlag.SERIAL | SerialFlag.TEXT, 0) for at, line in enumerate(lines)])

    logger.frames(said(b"rpm,oil"), CLOCK)
    logger.frames(said(b"800,3.5"), CLOCK)
    assert [(value.channel, value.number) for value in await first(logger, said(b"900,3.25"))] == [
        ("oil", 3.25), ("rpm", 900.0),
    ]  # fmt: skip


@pytest.fixture
def following(live: Live, monkeypatch: pytest.MonkeyPatch) -> Following:
    """Channels as metrics, looked at often."""
    monkeypatch.setattr(telling, "CHANNEL_SECONDS", 0.01)
    monkeypatch.setattr(telling, "UNMATCHED_SECONDS", 0.0)
    monkeypatch.setattr(telling, "mono_ns", lambda: 100)
    return Following(live)


async def followed(live: Live, following: Following, count: int) -> set[str]:
    """The channels that are followed, once there are so many, while the engine turns."""
    async with asyncio.timeout(10):
        while len(found := {each.channel for each in following.channels()}) < count:
            live.frames(engine((5, 100, 0)), CLOCK)
            await asyncio.sleep(0.02)
    return found


async def test_a_pattern_that_nothing_matches_is_said_once(
    live: Live, following: Following, caplog: pytest.LogCaptureFixture
) -> None:
    """By its name; those that something matches are not."""
    following.follow_channels(["speed", "sped", "can0/*.Mode"])
    assert await followed(live, following, 2) == {"Engine.Speed", "Engine.Mode"}
    await asyncio.sleep(0.05)
    following.follow_channels(())
    [said] = [record.getMessage() for record in caplog.records if "metrics.channels" in record.getMessage()]
    assert "patterns=['sped']" in said


async def test_a_pattern_that_too_many_match_is_said_once(
    live: Live, following: Following, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And no more than so many are followed."""
    monkeypatch.setattr(telling, "CHANNELS_MAX", 1)
    following.follow_channels(["*"])
    assert len(await followed(live, following, 1)) == 1
    await followed(live, following, 1)
    following.follow_channels(())
    said = [record.getMessage() for record in caplog.records if "metrics.channels" in record.getMessage()]
    assert said == ["metrics.channels match more than 1 channels: the rest is left out"]
