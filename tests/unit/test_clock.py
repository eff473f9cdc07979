"""The offset in force, and the kernel's stamps turned into CLOCK_MONOTONIC while somebody sets the wall clock."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from ingestd import clock
from ingestd.clock import OFFSET_NOISE_NS, OFFSET_TOLERANCE_NS, WallClock, read_offset_ns
from ingestd.model import Clock, ClockState
from ingestd.sources.kernel_stamps import NO_STAMP, ClockStep, KernelStamps, Stamped

OFFSET_NS = 1_800_000_000_000_000_000
HOUR_NS = 3_600_000_000_000
MS = 1_000_000


class Machine:
    """Two clocks that go as the test wants, and the stamps that a kernel would make by them."""

    def __init__(self, offset_ns: int = OFFSET_NS) -> None:
        self.mono_ns = 50_000_000_000
        self.offset_ns = offset_ns
        self.noise_ns = 0
        self.true_ns: list[int] = []  # of the frames that are queued
        self.queue: list[int] = []
        self.stamps = KernelStamps(lambda _: self.offset_ns + self.noise_ns, lambda: self.mono_ns)

    def wait(self, ns: int) -> None:
        self.mono_ns += ns

    def receive(self, count: int = 1, every_ns: int = 100_000) -> None:
        for _ in range(count):
            self.wait(every_ns)
            self.true_ns.append(self.mono_ns)
            self.queue.append(self.mono_ns + self.offset_ns)

    def read(
        self, count: int | None = None, *, meanwhile: Callable[[], None] = lambda: None
    ) -> tuple[Stamped, NDArray[np.int64]]:
        """Read so many frames, or all; also when they were really received. `meanwhile` happens as soon as they are."""
        self.stamps.reading()
        count = len(self.queue) if count is None else count
        wall, true = self.queue[:count], self.true_ns[:count]
        del self.queue[:count], self.true_ns[:count]
        emptied = not self.queue
        self.wait(20_000)
        meanwhile()
        stamped = self.stamps.convert(np.array(wall, np.int64), emptied=emptied)
        return stamped, np.array(true, np.int64)


def clocks(stamped: Stamped) -> list[Clock]:
    """The clock of each frame."""
    every: list[Clock] = []
    for rows, its_clock in stamped.spans:
        assert rows.start == len(every)
        every += [its_clock] * (rows.stop - rows.start)
    return every


SET, AFTER_HOUR = Clock(OFFSET_NS, ClockState.SET), Clock(OFFSET_NS + HOUR_NS, ClockState.SET)


def test_the_offset_is_that_of_the_system() -> None:
    """A reading lies between two of the clocks themselves."""
    low = time.time_ns() - time.monotonic_ns()
    assert abs(read_offset_ns() - low) < 50 * MS


def test_an_interrupted_reading_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickest of a few readings counts."""
    mono = iter([0, 9_000_000, 10_000_000, 10_000_200])
    wall = iter([100, 10_000_200])
    monkeypatch.setattr(clock.time, "monotonic_ns", lambda: next(mono))
    monkeypatch.setattr(clock.time, "time_ns", lambda: next(wall))
    assert read_offset_ns() == 100


def test_a_known_offset_that_still_holds_takes_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that does not is measured."""
    mono = iter([1000, 2000, 3000, 3200])
    wall = iter([1000 + 500 + OFFSET_NOISE_NS, 2000 + 501 + OFFSET_NOISE_NS, 3100 + 777])
    monkeypatch.setattr(clock.time, "monotonic_ns", lambda: next(mono))
    monkeypatch.setattr(clock.time, "time_ns", lambda: next(wall))
    assert read_offset_ns(500) == 500
    assert read_offset_ns(500) == 777


def test_the_offset_in_force_changes_only_beyond_the_tolerance() -> None:
    """Chunks are not cut for a clock that is off by less than anybody sees."""
    wall = WallClock(lambda: OFFSET_NS)
    assert wall.now() == SET
    assert wall.now(OFFSET_NS + OFFSET_TOLERANCE_NS) == SET
    assert wall.now(OFFSET_NS - OFFSET_TOLERANCE_NS) == SET
    assert wall.now(OFFSET_NS + OFFSET_TOLERANCE_NS + 1).utc_offset_ns == OFFSET_NS + OFFSET_TOLERANCE_NS + 1


def test_a_clock_that_was_never_set_says_so_until_it_is() -> None:
    """A car boots in 1970."""
    wall = WallClock(lambda: 0)
    assert wall.now().state is ClockState.UNSET
    assert wall.now(OFFSET_NS).state is ClockState.SET


def test_stamps_of_a_steady_clock_are_exact() -> None:
    """Read after read, and whatever the noise of reading the offset."""
    machine = Machine()
    noise = random.Random(1)
    for _ in range(50):
        machine.receive(7)
        machine.noise_ns = noise.randint(-OFFSET_NOISE_NS, OFFSET_NOISE_NS)
        stamped, true = machine.read()
        assert (stamped.ts_ns == true).all()
        assert clocks(stamped) == [SET] * 7
        assert stamped.step is None


@pytest.mark.parametrize(
    "by_ns", [HOUR_NS, -HOUR_NS, 90 * MS, -90 * MS, 3 * MS, -3 * MS], ids=lambda ns: f"{ns / 1e9}s"
)
@pytest.mark.parametrize("at", [0, 1, 10, 19, 20])
def test_the_clock_is_set_while_frames_wait(by_ns: int, at: int) -> None:
    """Each frame keeps its true time and gets the clock it was received by, wherever among them it was set."""
    machine = Machine()
    machine.receive(3)
    machine.read()
    machine.receive(at)
    machine.wait(30_000)
    machine.offset_ns += by_ns
    machine.receive(20 - at)
    stamped, true = machine.read()
    assert (stamped.ts_ns == true).all()
    after = Clock(OFFSET_NS + by_ns, ClockState.SET)
    assert clocks(stamped) == [SET] * at + [after] * (20 - at)
    assert stamped.step == ClockStep(OFFSET_NS, OFFSET_NS + by_ns)
    machine.receive(3)
    stamped, true = machine.read()
    assert (stamped.ts_ns == true).all()
    assert clocks(stamped) == [after] * 3
    assert stamped.step is None


def test_the_clock_is_set_while_there_are_no_frames() -> None:
    """It is noticed by a read that finds nothing, once."""
    machine = Machine()
    machine.offset_ns += HOUR_NS
    assert machine.read()[0].step == ClockStep(OFFSET_NS, OFFSET_NS + HOUR_NS)
    assert machine.read()[0].step is None
    machine.receive()
    stamped, true = machine.read()
    assert (stamped.ts_ns == true).all()
    assert clocks(stamped) == [AFTER_HOUR]


def test_the_clock_is_set_and_set_back_between_two_reads() -> None:
    """Nothing tells the time of the frames in between but that others came after them; those keep theirs."""
    machine = Machine()
    machine.receive(4)
    machine.offset_ns += HOUR_NS
    machine.receive(3)
    machine.offset_ns -= HOUR_NS
    machine.receive(5)
    stamped, true = machine.read()
    unknown = Clock(OFFSET_NS, ClockState.STEPPED)
    assert clocks(stamped) == [SET] * 4 + [unknown] * 3 + [SET] * 5
    assert (stamped.ts_ns[:4] == true[:4]).all()
    assert (stamped.ts_ns[4:7] == true[7]).all()
    assert (stamped.ts_ns[7:] == true[7:]).all()
    assert stamped.step is None


@pytest.mark.parametrize("by_ns", [HOUR_NS, -HOUR_NS])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_the_clock_is_set_and_frames_come_while_a_read_goes_on(by_ns: int, at: int) -> None:
    """The kernel gives a read's frames, another process sets the clock, more frames come, and only then is it seen."""
    machine = Machine()

    def meanwhile() -> None:
        machine.receive(at)
        machine.offset_ns += by_ns
        machine.receive(5 - at)

    machine.receive(3)
    stamped, true = machine.read(meanwhile=meanwhile)
    assert (stamped.ts_ns == true).all()
    assert clocks(stamped) == [SET] * 3
    assert stamped.step == ClockStep(OFFSET_NS, OFFSET_NS + by_ns)
    machine.receive(2)
    stamped, true = machine.read()
    assert (stamped.ts_ns == true).all()
    assert clocks(stamped) == [SET] * at + [Clock(OFFSET_NS + by_ns, ClockState.SET)] * (7 - at)
    assert stamped.step is None


def test_a_read_that_leaves_frames_behind_leaves_their_clock_in_mind() -> None:
    """Frames older than the step are told from younger ones also in the read after the one that noticed it."""
    machine = Machine()
    machine.receive(10)
    machine.offset_ns -= HOUR_NS
    machine.receive(2)
    stamped, true = machine.read(6)
    assert stamped.step == ClockStep(OFFSET_NS, OFFSET_NS - HOUR_NS)
    assert (stamped.ts_ns == true).all()
    assert clocks(stamped) == [SET] * 6
    stamped, true = machine.read()
    assert stamped.step is None
    assert (stamped.ts_ns == true).all()
    assert clocks(stamped) == [SET] * 4 + [Clock(OFFSET_NS - HOUR_NS, ClockState.SET)] * 2


def test_a_clock_that_drifts_is_followed() -> None:
    """Stamps stay good to the noise of a reading, UTC to the tolerance, and steps are few."""
    machine = Machine()
    steps = 0
    for _ in range(1000):
        machine.receive(5)
        machine.offset_ns += 5_000
        stamped, true = machine.read()
        assert np.abs(stamped.ts_ns - true).max() <= OFFSET_NOISE_NS + 5_000
        assert all(abs(its.utc_offset_ns - machine.offset_ns) <= OFFSET_TOLERANCE_NS + 5_000 for its in clocks(stamped))
        assert ClockState.STEPPED not in {its.state for its in clocks(stamped)}
        steps += stamped.step is not None
    assert steps == 4  # 5 ms in all, told each time it is more than 1 ms


def test_a_frame_may_be_stamped_before_the_queue_was_last_seen_empty() -> None:
    """Between stamp and queue the kernel may be busy elsewhere; such a stamp is as good as any."""
    machine = Machine()
    machine.receive()
    machine.wait(50 * MS)
    late, late_true = machine.queue.pop(), machine.true_ns.pop()
    machine.read()
    machine.queue.append(late)
    machine.true_ns.append(late_true)
    stamped, true = machine.read()
    assert (stamped.ts_ns == true).all()
    assert clocks(stamped) == [SET]


def test_a_frame_without_a_stamp_gets_the_time_of_the_next() -> None:
    """And says so, also where the clock was set meanwhile; its neighbours do not suffer."""
    for by_ns in (0, HOUR_NS):
        machine = Machine()
        machine.receive(3)
        machine.offset_ns += by_ns
        machine.receive(2)
        machine.queue[1] = NO_STAMP
        stamped, true = machine.read()
        assert [its.state for its in clocks(stamped)] == [ClockState.SET, ClockState.STEPPED] + [ClockState.SET] * 3
        assert stamped.ts_ns[1] == true[2]
        assert (np.delete(stamped.ts_ns, 1) == np.delete(true, 1)).all()


def test_a_clock_set_for_the_first_time_while_frames_wait() -> None:
    """Those before it know that their UTC is none."""
    machine = Machine(offset_ns=0)
    machine.receive(2)
    machine.offset_ns = OFFSET_NS
    machine.receive(2)
    stamped, true = machine.read()
    assert (stamped.ts_ns == true).all()
    assert clocks(stamped) == [Clock(0, ClockState.UNSET)] * 2 + [SET] * 2


def test_random_steps_of_minutes_never_move_a_frame() -> None:
    """Set at most once between two reads, by anything from a tenth of a second to weeks."""
    dice = random.Random(7)
    for _ in range(200):
        machine = Machine()
        for _ in range(5):
            machine.receive(dice.randrange(6), dice.randrange(1000, 5 * MS))
            if dice.random() < 0.5:
                machine.offset_ns += dice.choice([-1, 1]) * int(10 ** dice.uniform(8.1, 15))
            machine.receive(dice.randrange(6), dice.randrange(1000, 5 * MS))
            stamped, true = machine.read()
            assert (stamped.ts_ns == true).all()
            assert {its.state for its in clocks(stamped)} <= {ClockState.SET}
