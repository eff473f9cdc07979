"""A wall clock that is wrong by years, and set while the daemon records: frames, their times and the sending bear it.

A car boots in 1970, or in the year its firmware was built, and is set right at the first fix; a bad fix sets it wrong.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from ingestd.clock import CLOCK_SET_NS_MIN, OFFSET_TOLERANCE_NS, mono_ns, read_offset_ns
from ingestd.model import ClockState, Quality
from tests.can_bus.bus import Bus, numbered
from tests.can_bus.test_daemon import fetch
from tests.conftest import psql
from tests.recorder import Instrument, Recorder, wait_until

SLACK_NS = 50_000  # of reading the offset, where a system call takes microseconds and others share the processor
FRAMES = 40  # in each of the years
POWER = Path("/sys/power/state")
DBC = """VERSION ""
NS_ :
BS_:
BU_: engine
BO_ 291 Counter: 8 engine
 SG_ number : 0|32@1+ (1,0) [0|0] "" engine
"""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_machine")]


def year(number: int) -> float:
    """The second of January of a year."""
    return datetime(number, 1, 2, tzinfo=UTC).timestamp()


@pytest.fixture
def clock() -> Iterator[None]:
    """Afterwards the wall clock is right again."""
    right_s, began_s = time.time(), time.monotonic()
    yield
    time.clock_settime(time.CLOCK_REALTIME, right_s + time.monotonic() - began_s)


@pytest.fixture
def instrument(tmp_path: Path) -> Iterator[Instrument]:
    """Numbered lines of a serial port, all the time."""
    device = Instrument(tmp_path / "instrument", pause_s=0.01)
    device.start()
    yield device
    device.close()


@pytest.fixture
def dbc(tmp_path: Path) -> Path:
    """What the frames of the bus mean. For tests that need it: parsing it takes a user-mode kernel a while."""
    path = tmp_path / "counter.dbc"
    path.write_text(DBC)
    return path


@pytest.fixture
def recorder(
    request: pytest.FixtureRequest, tmp_path: Path, migrated: str, bus: Bus, instrument: Instrument
) -> Iterator[Recorder]:
    """A daemon for the bus and the instrument; not started."""
    sources = f'[[can]]\nname = "can0"\nchannel = "{bus.channel}"\n'
    if "dbc" in request.fixturenames:
        sources += f'dbc = ["{request.getfixturevalue("dbc")}"]\n'
    sources += f'[[serial]]\nname = "line"\nport = "{instrument.link}"\nprotocol = "lines"\n'
    daemon = Recorder(tmp_path, migrated, sources)
    yield daemon
    daemon.close()


class Sent(NamedTuple):
    """When each frame was sent, between two instants, and how far UTC was from CLOCK_MONOTONIC then."""

    from_ns: list[int]
    to_ns: list[int]
    offset_ns: list[int]

    def frames(self, bus: Bus, count: int) -> None:
        """Send some more, some milliseconds from each other."""
        with bus.sender() as sender:
            for _ in range(count):
                number, offset_ns = len(self.from_ns), read_offset_ns()
                self.from_ns.append(mono_ns())
                sender.send(numbered(1, first=number))
                self.to_ns.append(mono_ns())
                self.offset_ns.append(offset_ns)
                time.sleep(0.003)


class Chunk(NamedTuple):
    """Frames of the bus as they are in the database."""

    ts_ns: list[int]
    data: bytes
    offset_ns: int
    state: int

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The numbers of its frames."""
        return np.frombuffer(self.data, "<u8").astype(np.int64)


def chunks(dsn: str, source: str = "can0") -> list[Chunk]:
    """What SQL holds of a source, in the order of time."""
    rows = fetch(
        dsn,
        "SELECT ts_mono_ns, data, utc_offset_ns, clock_state FROM frame_chunks WHERE source = $1"
        " ORDER BY mono_start_ns",
        source,
    )
    return [Chunk(*row) for row in rows]


def let_in(server: str, dsn: str, *, clients: bool) -> None:
    """Open a database to its clients, or close it and put out those who are in."""
    name = dsn.partition("?")[0].rpartition("/")[2]
    psql(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS {clients}")
    psql(server, f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '{name}'")


def settled(recorder: Recorder, dsn: str, sent: Sent) -> None:
    """Until SQL has every frame that was sent so far: the sending goes on, whatever the year."""
    recorder.wait_for("the database takes data")  # A look at the log costs less than one at the database.
    count = "SELECT coalesce(sum(frame_count), 0) FROM frame_chunks WHERE source = 'can0'"
    wait_until(lambda: fetch(dsn, count)[0][0] == len(sent.from_ns), f"{len(sent.from_ns)} frames", more=recorder.log)


def assert_true_times(found: list[Chunk], sent: Sent) -> None:
    """Every frame once, in order, stamped when it was sent; each chunk under the one offset that was in force."""
    numbers = np.concatenate([chunk.numbers for chunk in found])
    assert (numbers == np.arange(len(sent.from_ns))).all()
    ts_ns = np.concatenate([chunk.ts_ns for chunk in found])
    assert (ts_ns >= np.array(sent.from_ns) - SLACK_NS).all()
    assert (ts_ns <= np.array(sent.to_ns) + SLACK_NS).all()
    assert (np.diff(ts_ns) > 0).all()
    offsets = np.array(sent.offset_ns)
    for chunk in found:
        assert (np.abs(offsets[chunk.numbers] - chunk.offset_ns) <= 2 * OFFSET_TOLERANCE_NS).all()
        is_set = chunk.ts_ns[0] + chunk.offset_ns >= CLOCK_SET_NS_MIN
        assert chunk.state == (ClockState.SET if is_set else ClockState.UNSET)


@pytest.mark.usefixtures("dbc", "clock")
def test_a_clock_that_jumps_by_years(
    recorder: Recorder, instrument: Instrument, migrated: str, postgres_server: str, bus: Bus
) -> None:
    """Booted in 1970, set right, set wrong in both directions: times, order, values, books and sending stay true.

    Once the database is away meanwhile: what waits for it is not made to wait for a year that is past or to come.
    """
    now_s = time.time()
    sent = Sent([], [], [])
    years = [year(1970), now_s, year(2000), year(2040), year(2000), now_s]
    time.clock_settime(time.CLOCK_REALTIME, years[0])
    recorder.start()
    recorder.wait_for("link up source=can0")
    sent.frames(bus, FRAMES)
    for wall_s in years[1:]:
        if wall_s == year(2040):
            let_in(postgres_server, migrated, clients=False)
            recorder.wait_for("kept in the journal until the database takes it")
        time.clock_settime(time.CLOCK_REALTIME, wall_s)
        sent.frames(bus, FRAMES)
        if wall_s == year(2040):
            let_in(postgres_server, migrated, clients=True)
        settled(recorder, migrated, sent)
    instrument.stop()
    log = recorder.stop()
    assert f"books source=can0 received={len(sent.from_ns)} committed={len(sent.from_ns)} pending=0" in log
    assert log.count("balanced=True") == 2
    assert "Traceback" not in log
    assert_true_times(chunks(migrated), sent)

    lines = chunks(migrated, "line")
    stamps = np.concatenate([chunk.ts_ns for chunk in lines])
    assert (np.diff(stamps) >= 0).all()
    assert {chunk.state for chunk in lines} == {ClockState.SET, ClockState.UNSET}
    steps = fetch(migrated, "SELECT payload FROM events WHERE kind = 'clock_step' AND source = 'can0'")
    assert len(steps) == len(years) - 1
    rows = fetch(
        migrated, "SELECT value_num, quality, ts_utc FROM signals WHERE channel = 'Counter.number' ORDER BY value_num"
    )
    assert [row[0] for row in rows] == list(range(len(sent.from_ns)))
    for number, quality, utc in rows:
        wall_s = years[int(number) // FRAMES]
        assert abs(utc.timestamp() - wall_s) < 60
        assert bool(quality & Quality.CLOCK_UNSET) == (wall_s * 1e9 < CLOCK_SET_NS_MIN)
    [[created, ended]] = fetch(migrated, "SELECT created_utc, ended_utc FROM sessions")
    assert abs(created.timestamp() - years[0]) < 60
    assert abs(ended.timestamp() - now_s) < 120


@pytest.mark.usefixtures("clock")
def test_restarts_in_other_years(recorder: Recorder, migrated: str, bus: Bus) -> None:
    """Begun in 2040 and killed, continued in 1971, begun anew in the right year: nothing is lost or out of order.

    What somebody wrote about the session while the clock was behind its beginning stays.
    """
    sent = Sent([], [], [])
    now_s = time.time()
    for wall_s, ends in ((year(2040), False), (year(1971), True), (now_s, True)):
        time.clock_settime(time.CLOCK_REALTIME, wall_s)
        begun = len(recorder.log())
        recorder.start()
        recorder.wait_for("link up source=can0", after=begun)
        sent.frames(bus, FRAMES)
        settled(recorder, migrated, sent)
        if ends:
            recorder.stop()
            continue
        recorder.kill()
        time.clock_settime(time.CLOCK_REALTIME, year(1971))
        psql(migrated, "UPDATE sessions SET notes = 'wet track', updated_utc = now()")
    assert_true_times(chunks(migrated), sent)
    rows = fetch(migrated, "SELECT created_utc, ended_utc, notes FROM sessions ORDER BY id")
    assert [(row[0].year, row[2]) for row in rows] == [
        (datetime.fromtimestamp(now_s, UTC).year, None),
        (2040, "wet track"),
    ]
    assert all(row[1] is not None for row in rows)


@pytest.mark.usefixtures("clock")
def test_a_machine_that_sleeps(recorder: Recorder, migrated: str, bus: Bus) -> None:
    """Asleep for hours and for seconds, frames on both sides waiting for the daemon: none is lost, all times are true.

    A suspended machine freezes its processes, CLOCK_MONOTONIC stands still, and UTC has gone on when it wakes. The
    user-mode kernel really suspends its devices, but wakes at once; the hours are then added to its wall clock.
    """
    sleeps_s = (8 * 3600, 2, 5 * 86_400)
    sent = Sent([], [], [])
    recorder.start()
    recorder.wait_for("link up source=can0")
    assert recorder.process is not None
    for slept_s in sleeps_s:
        sent.frames(bus, FRAMES)
        recorder.process.send_signal(signal.SIGSTOP)
        sent.frames(bus, FRAMES)
        POWER.write_text("mem")
        time.clock_settime(time.CLOCK_REALTIME, time.time() + slept_s)
        sent.frames(bus, FRAMES)
        recorder.process.send_signal(signal.SIGCONT)
        settled(recorder, migrated, sent)
    log = recorder.stop()
    assert f"books source=can0 received={len(sent.from_ns)} committed={len(sent.from_ns)} pending=0" in log
    assert log.count("balanced=True") == 2
    assert "Traceback" not in log
    assert_true_times(chunks(migrated), sent)
    moved_ns = "(payload ->> 'to_offset_ns')::bigint - (payload ->> 'from_offset_ns')::bigint"
    steps = f"SELECT ({moved_ns}) / 1e9 FROM events WHERE kind = 'clock_step' AND source = 'can0' ORDER BY ts_mono_ns"
    moved_s = [float(row[0]) for row in fetch(migrated, steps)]
    # Falling asleep and waking up take a moment of their own, in which CLOCK_MONOTONIC stands still, too.
    assert len(moved_s) == len(sleeps_s)
    assert all(abs(moved - slept) < 1 for moved, slept in zip(moved_s, sleeps_s, strict=True)), moved_s
    lines = fetch(migrated, "SELECT payload_json ->> 'text' FROM frames WHERE payload_json ->> 'source' = 'line'")
    numbers = sorted(int(text.removeprefix("n=")) for (text,) in lines)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert len(fetch(migrated, "SELECT id FROM sessions")) == 1
