"""python-can's interfaces as sources: its slcan driver on a pty whose far end is the adapter, and its virtual bus."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import threading
import time
import tty
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import can
import numpy as np
import pytest
from can.interfaces.virtual import VirtualBus

from ingestd.clock import mono_ns, read_offset_ns
from ingestd.model import Clock, ClockState, Event, Flag, FrameBatch, Link
from ingestd.sources import canbus
from ingestd.sources.canbus import CanBus, Stamps

SECONDS_MAX = 20.0
SLCAN = {"sleep_after_open": 0.0, "bitrate": 500_000}


class Recorded:
    """A recorder that keeps everything."""

    def __init__(self) -> None:
        self.batches: list[tuple[FrameBatch, Clock]] = []
        self.events: list[Event] = []

    def frames(self, batch: FrameBatch, clock: Clock) -> None:
        assert len(batch.ts_ns) == len(batch.arbitration_id) == len(batch.flags) == len(batch.length) == len(batch.data)
        assert batch.data.flags.c_contiguous
        assert batch.data.shape[1] % 8 == 0
        self.batches.append((batch, clock))

    def overflow(self, source: str, frames_count: int, from_ns: int, to_ns: int) -> None:
        raise AssertionError("python-can tells of no overflow")

    def event(self, event: Event) -> None:
        self.events.append(event)

    def rows(self) -> list[tuple[int, Flag, bytes]]:
        """Id, flags and payload of every frame, in order."""
        return [
            (int(batch.arbitration_id[i]), Flag(int(batch.flags[i])), batch.data[i, : batch.length[i]].tobytes())
            for batch, _ in self.batches
            for i in range(len(batch))
        ]

    def stamps(self) -> list[int]:
        return [int(ts) for batch, _ in self.batches for ts in batch.ts_ns]

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


class Adapter:
    """The far end of a pty pair that answers to a link, as udev would make it, and speaks slcan."""

    def __init__(self, link: Path) -> None:
        self._master, slave = pty.openpty()
        tty.setraw(slave)
        name = os.ttyname(slave)
        os.close(slave)
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        self.heard = b""

    async def opened(self) -> None:
        """Until the driver has opened the channel."""
        os.set_blocking(self._master, False)

        def hear() -> bool:
            with contextlib.suppress(BlockingIOError, OSError):  # EIO: nobody has opened the other end.
                self.heard += os.read(self._master, 1024)
            return self.heard.rstrip(b"\r").endswith(b"O")

        await until(hear)
        os.set_blocking(self._master, True)

    def say(self, text: str) -> None:
        os.write(self._master, text.encode("ascii"))

    def unplug(self) -> None:
        os.close(self._master)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other threads
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(source: CanBus, recorded: Recorded) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(source.run(recorded))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(lambda: not any(thread.name == f"can {source.name}" for thread in threading.enumerate()))


@pytest.fixture
def channel(request: pytest.FixtureRequest) -> str:
    return request.node.name


async def test_slcan_frames_of_every_kind(tmp_path: Path) -> None:
    """Values, lengths, flags and order are those on the line: standard, extended, remote, CAN FD, empty."""
    adapter, recorded = Adapter(tmp_path / "can"), Recorded()
    async with running(CanBus("c", "slcan", str(tmp_path / "can"), **SLCAN), recorded):
        await adapter.opened()
        adapter.say("t12381122334455667788\rT1ABCDEF02AABB\rr0103\rR000000FF8\rt7FF0\r")
        adapter.say(
            "d1239" + "01" * 12 + "\rD1ABCDEF0F" + "02" * 64 + "\rb0018" + "03" * 8 + "\rB000000019" + "04" * 12
        )
        adapter.say("\r")
        await until(lambda: len(recorded.rows()) == 9)
    ext, fd = Flag.EXTENDED, Flag.FD
    assert recorded.rows() == [
        (0x123, Flag(0), bytes.fromhex("1122334455667788")),
        (0x1ABCDEF0, ext, b"\xaa\xbb"),
        (0x010, Flag.REMOTE, b""),
        (0x0FF, ext | Flag.REMOTE, b""),
        (0x7FF, Flag(0), b""),
        (0x123, fd, b"\x01" * 12),
        (0x1ABCDEF0, ext | fd, b"\x02" * 64),
        (0x001, fd | Flag.BITRATE_SWITCH, b"\x03" * 8),
        (0x1, ext | fd | Flag.BITRATE_SWITCH, b"\x04" * 12),
    ]
    assert b"S6\r" in adapter.heard, "the bit rate of the options reached the adapter"
    adapter.unplug()


async def test_slcan_loses_and_reorders_nothing(tmp_path: Path) -> None:
    """Ten thousand numbered frames written in lumps that cut lines anywhere arrive once each, stamped in order."""
    adapter, recorded, count = Adapter(tmp_path / "can"), Recorded(), 10_000
    text = "".join(f"t1008{number:016X}\r" for number in range(count))
    async with running(CanBus("c", "slcan", str(tmp_path / "can"), **SLCAN), recorded):
        await adapter.opened()
        began_ns = mono_ns()
        await asyncio.to_thread(lambda: [adapter.say(text[at : at + 997]) for at in range(0, len(text), 997)])
        await until(lambda: len(recorded.stamps()) == count)
        ended_ns = mono_ns()
    assert [int.from_bytes(data, "big") for _, _, data in recorded.rows()] == list(range(count))
    stamps = np.array(recorded.stamps())
    assert (np.diff(stamps) >= 0).all()
    assert began_ns <= stamps[0]
    assert stamps[-1] <= ended_ns
    assert len(recorded.batches) < count / 4, "frames travel in batches"
    assert recorded.events == []
    adapter.unplug()


async def test_what_the_driver_holds_when_cancelled_is_recorded(tmp_path: Path) -> None:
    """A stop reads the rest, closes the channel and ends the thread."""
    adapter, recorded = Adapter(tmp_path / "can"), Recorded()
    async with running(CanBus("c", "slcan", str(tmp_path / "can"), **SLCAN), recorded):
        await adapter.opened()
        adapter.say("t1001AA\r" * 100)  # And cancelled at once.
    assert len(recorded.rows()) == 100
    assert os.read(adapter._master, 100).endswith(b"C\r")
    adapter.unplug()


async def test_slcan_unplugged_and_plugged_in_again(tmp_path: Path) -> None:
    """Missing at start, there, gone, there again: one event for each change, and nothing of what was read is lost."""
    link, recorded = tmp_path / "can", Recorded()
    source = CanBus("c", "slcan", str(link), **SLCAN)
    async with running(source, recorded) as task:
        await until(lambda: source.status.link is Link.RETRYING)
        assert "No such file" in source.status.reason
        for life in range(2):
            adapter = Adapter(link)
            plugged_ns = mono_ns()
            await adapter.opened()
            assert mono_ns() - plugged_ns < 2_000_000_000, "back-off is capped at a second"
            await until(lambda: source.status.link is Link.OPEN)
            adapter.say("t1001AA\r" * 10)
            await until(lambda life=life: len(recorded.rows()) == 10 * (life + 1))  # type: ignore[misc]
            adapter.unplug()
            await until(lambda: source.status.link is Link.RETRYING)
            assert source.status.reason
        assert not task.done()
    assert recorded.kinds() == ["link_down", "link_up", "link_down", "link_up", "link_down"]
    assert source.status.counters["link_downs"] == 3
    assert {event.source for event in recorded.events} == {"c"}
    assert "reason" in recorded.events[0].payload


async def test_a_port_that_went_away_is_let_go(tmp_path: Path) -> None:
    """An open file of a dead port would keep ttyUSB0 from being ttyUSB0 again."""
    adapter, recorded = Adapter(tmp_path / "can"), Recorded()
    name = str((tmp_path / "can").readlink())
    source = CanBus("c", "slcan", str(tmp_path / "can"), **SLCAN)

    def held() -> int:
        found = 0
        for each in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found += str(each.readlink()).startswith(name)
        return found

    async with running(source, recorded):
        await adapter.opened()
        await until(lambda: source.status.link is Link.OPEN)
        assert held() == 1
        adapter.unplug()
        (tmp_path / "can").unlink()
        await until(lambda: source.status.link is Link.RETRYING)
        assert held() == 0


async def test_garbled_lines_are_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    """Cut and garbled lines between good ones; no bad one becomes a frame, no good one is lost."""
    adapter, recorded = Adapter(tmp_path / "can"), Recorded()
    source = CanBus("c", "slcan", str(tmp_path / "can"), **SLCAN)
    bad = ["t12", "tXYZ0", "t1238AABB", "t8001AA", "T3FFFFFFF0", "T1234", "t123Z", "\r\a\r"]
    async with running(source, recorded):
        await adapter.opened()
        adapter.say("".join(f"{line}\rt1001{number:02X}\r" for number, line in enumerate(bad)))
        await until(lambda: len(recorded.rows()) == len(bad))
    assert [data[0] for _, _, data in recorded.rows()] == list(range(len(bad)))
    assert source.status.counters["malformed_frames"] == len(bad) - 1, "empty lines are answers to commands"
    assert recorded.events == []
    adapter.unplug()


async def test_nothing_but_garbage_is_a_link_that_does_not_work(tmp_path: Path) -> None:
    """The operator learns of it instead of the log filling; the processor rests meanwhile."""
    adapter, recorded = Adapter(tmp_path / "can"), Recorded()
    source = CanBus("c", "slcan", str(tmp_path / "can"), **SLCAN)
    async with running(source, recorded):
        await adapter.opened()
        adapter.say("tgarbage\r" * canbus.MALFORMED_RUN_MAX)
        await until(lambda: "link_down" in recorded.kinds())
    assert "nothing that is a frame" in recorded.events[0].payload["reason"]
    adapter.unplug()


async def test_virtual_bus_flags_and_stamps(channel: str) -> None:
    """Error frames, frames that were sent from here, the error state; stamps of the wall clock become monotonic."""
    recorded = Recorded()
    async with running(source := CanBus("v", "virtual", channel, preserve_timestamps=True), recorded):
        await until(lambda: source.status.link is Link.OPEN)
        with VirtualBus(channel, preserve_timestamps=True) as sender:
            sent_ns = mono_ns()
            stamp_s = time.time()
            sender.send(can.Message(stamp_s, 0x20, is_extended_id=False, data=b"abc"))
            sender.send(can.Message(stamp_s, 0x21, is_error_frame=True, data=b"\x01"))
            sender.send(
                can.Message(stamp_s, 0x1FF, is_fd=True, bitrate_switch=True, error_state_indicator=True, data=bytes(20))
            )
            echo = can.Message(stamp_s, 0x22, is_extended_id=False, is_rx=False, data=b"me")
            for queue in sender.channel:  # `send` says of every message that it was received.
                queue.put(echo)
            await until(lambda: len(recorded.rows()) == 4)
    assert recorded.rows() == [
        (0x20, Flag(0), b"abc"),
        (0x21, Flag.ERROR, b"\x01"),
        (0x1FF, Flag.EXTENDED | Flag.FD | Flag.BITRATE_SWITCH | Flag.ERROR_STATE, bytes(20)),
        (0x22, Flag.TRANSMITTED, b"me"),
    ]
    assert source.status.counters["error_frames"] == 1
    expected_ns = round(stamp_s * 1e6) * 1000 - read_offset_ns()
    assert all(abs(ts - expected_ns) < 100_000 for ts in recorded.stamps()), "the stamp counts, not the time of reading"
    assert abs(expected_ns - sent_ns) < 1_000_000_000


@pytest.mark.parametrize("stamp_s", [0.0, 12.5, float("nan"), -1e300, 4e9])
async def test_ticks_of_an_adapter_are_not_taken_for_the_wall_clock(channel: str, stamp_s: float) -> None:
    """Stamps that are not the system's time give way to the time of reading, and the clock is not blamed."""
    recorded = Recorded()
    async with running(source := CanBus("v", "virtual", channel, preserve_timestamps=True), recorded):
        await until(lambda: source.status.link is Link.OPEN)
        with VirtualBus(channel, preserve_timestamps=True) as sender:
            before_ns = mono_ns()
            sender.send(can.Message(stamp_s, 0x20))
            await until(lambda: len(recorded.rows()) == 1)
    assert before_ns <= recorded.stamps()[0] <= mono_ns()
    assert recorded.batches[0][1].state is ClockState.SET


async def test_a_stalled_loop_makes_the_reader_wait_and_loses_nothing(channel: str) -> None:
    """While the loop is held up, what arrives stays in the driver; all of it is recorded afterwards, in order."""
    recorded, count = Recorded(), 3000
    async with running(source := CanBus("v", "virtual", channel), recorded):
        await until(lambda: source.status.link is Link.OPEN)
        with VirtualBus(channel) as sender:
            for number in range(count):
                sender.send(can.Message(arbitration_id=number))
                if number % 100 == 0:
                    time.sleep(0.005)  # noqa: ASYNC251 - the stall: more batches than may wait, and nobody takes them
            waiting = sum(queue.qsize() for queue in sender.channel)
            assert waiting > 0, "nothing had to wait"
            await until(lambda: len(recorded.stamps()) == count)
    assert [row[0] for row in recorded.rows()] == list(range(count))


@pytest.mark.parametrize(
    ("interface", "options", "reason"),
    [("no-such-adapter", {}, "not supported"), ("slcan", {"nonsense": "@"}, "could not open port")],
)
async def test_what_cannot_be_opened_is_said_once(interface: str, options: dict[str, str], reason: str) -> None:
    """A driver that is unknown, and a port that is not there, are waited for and named."""
    recorded = Recorded()
    source = CanBus("c", interface, "nowhere", **options)
    async with running(source, recorded) as task:
        await until(lambda: source.status.link is Link.RETRYING)
        await asyncio.sleep(0.3)  # Several attempts.
        assert not task.done()
    assert re.search(reason, source.status.reason)
    assert recorded.kinds() == ["link_down"]
    assert source.status.counters["link_downs"] == 1


async def test_bus_off_is_told_once(channel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a driver knows the state of its bus, going off and coming back are events, and it can be seen why."""
    state, recorded = [can.BusState.ACTIVE], Recorded()
    monkeypatch.setattr(VirtualBus, "state", property(lambda _: state[0]))
    monkeypatch.setattr(canbus, "STATE_NS", 0)
    async with running(source := CanBus("v", "virtual", channel), recorded):
        await until(lambda: source.status.link is Link.OPEN)
        state[0] = can.BusState.ERROR
        await until(lambda: source.status.reason == "bus-off")
        state[0] = can.BusState.ACTIVE
        await until(lambda: source.status.reason == "")
    assert recorded.kinds() == ["bus_off", "bus_restarted"]
    assert source.status.counters["bus_offs"] == 1


async def test_a_clock_that_was_set_is_an_event(channel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each step, with both offsets; the frames keep their monotonic time."""
    moved_ns, recorded = [0], Recorded()
    monkeypatch.setattr(canbus, "read_offset_ns", lambda: read_offset_ns() + moved_ns[0])
    monkeypatch.setattr(Stamps.__init__, "__defaults__", (canbus.read_offset_ns, mono_ns))
    async with running(source := CanBus("v", "virtual", channel, preserve_timestamps=True), recorded):
        await until(lambda: source.status.link is Link.OPEN)
        with VirtualBus(channel, preserve_timestamps=True) as sender:
            for count, hours in enumerate((0, 1, 1), 1):
                moved_ns[0] = hours * 3_600_000_000_000
                before_ns = mono_ns()
                sender.send(can.Message(time.time() + hours * 3600, 0x20))
                await until(lambda count=count: len(recorded.stamps()) == count)  # type: ignore[misc]
                assert before_ns - 100_000 <= recorded.stamps()[-1] <= mono_ns()
    assert recorded.kinds() == ["clock_step"]
    payload = recorded.events[0].payload
    assert abs(payload["to_offset_ns"] - payload["from_offset_ns"] - 3_600_000_000_000) < 1_000_000


class Clocks:
    """A monotonic clock and its offset to the wall clock, set by hand."""

    def __init__(self) -> None:
        self.mono_ns = 1_000_000_000_000
        self.offset_ns = 1_790_000_000_000_000_000

    def wall_s(self, mono_ns: int) -> float:
        return (mono_ns + self.offset_ns) / 1e9


def test_a_clock_set_between_two_reads_is_bridged() -> None:
    """Frames stamped before and after the wall clock was set by an hour keep their place, to the microsecond."""
    clocks = Clocks()
    stamps = Stamps(lambda: clocks.offset_ns, lambda: clocks.mono_ns)
    true_ns = clocks.mono_ns + np.array([1_000_000, 2_000_000, 3_000_000, 4_000_000])
    wall_s = [clocks.wall_s(int(ts)) for ts in true_ns[:2]]
    clocks.offset_ns += 3_600_000_000_000
    wall_s += [clocks.wall_s(int(ts)) for ts in true_ns[2:]]
    ts_ns, clock = stamps.convert(np.array(wall_s), true_ns + 500_000)
    assert np.abs(ts_ns - true_ns).max() <= 1000
    assert clock == Clock(clocks.offset_ns, ClockState.SET)


def test_a_clock_set_while_frames_waited_is_said() -> None:
    """Two steps within one batch: no offset places the frames; they get the time of reading, and the state says so."""
    clocks = Clocks()
    stamps = Stamps(lambda: clocks.offset_ns, lambda: clocks.mono_ns)
    clocks.offset_ns += 7_000_000_000
    wall_s = clocks.wall_s(clocks.mono_ns)
    clocks.offset_ns += 3_600_000_000_000
    read_ns = np.array([clocks.mono_ns + 1000])
    ts_ns, clock = stamps.convert(np.array([wall_s]), read_ns)
    assert ts_ns.tolist() == read_ns.tolist()
    assert clock.state is ClockState.STEPPED


def test_a_batch_has_one_kind_of_stamp() -> None:
    """One stamp out of bounds makes all of them times of reading: mixing would put frames out of order."""
    clocks = Clocks()
    stamps = Stamps(lambda: clocks.offset_ns, lambda: clocks.mono_ns)
    stamps.empty(clocks.mono_ns)
    read_ns = clocks.mono_ns + np.array([5_000_000, 6_000_000])
    old_s, new_s = clocks.wall_s(clocks.mono_ns - 5_000_000), clocks.wall_s(clocks.mono_ns + 5_500_000)
    ts_ns, clock = stamps.convert(np.array([old_s, new_s]), read_ns)
    assert ts_ns.tolist() == read_ns.tolist()
    assert clock.state is ClockState.SET
