"""What was sent over a real (virtual) bus is what was recorded: frames, loss, links, and time."""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np
import pytest

from ingestd.clock import OFFSET_TOLERANCE_NS, mono_ns
from ingestd.model import ClockState, Flag, Link
from ingestd.sources.socketcan import SocketCan
from tests.can_bus.bus import Bus, Recording, can_errors, numbered, opened, running, until

EXTENDED, REMOTE = 0x8000_0000, 0x4000_0000
BRS, ESI = 1, 2
FD_LENGTHS = [0, 1, 7, 8, 12, 16, 20, 24, 32, 48, 64]


async def test_frames_of_every_kind_are_recorded_as_sent(bus: Bus) -> None:
    """Classic, FD, remote and error frames, field by field, in order, with stamps inside the sending interval."""
    dice = np.random.default_rng(11)
    count = 3000
    frames = numbered(count)
    kind = dice.integers(0, 4, count)  # classic, FD, remote, error
    extended = dice.random(count) < 0.5
    can_id = np.where(extended, dice.integers(0, 1 << 29, count) | EXTENDED, dice.integers(0, 1 << 11, count))
    classes = dice.integers(0, 1 << 9, count) & ~0x144 | 0x80  # nothing about the controller's state
    frames["can_id"] = np.choose(kind, [can_id, can_id, can_id | REMOTE, classes | 0x2000_0000])
    frames["length"] = np.choose(kind, [dice.integers(0, 9, count), dice.choice(FD_LENGTHS, count), 5, 8])
    frames["data"] = dice.integers(0, 256, (count, 64), np.uint8)
    frames["flags"] = np.where(kind == 1, dice.integers(0, 4, count), 0)

    source, recording = SocketCan("engine", bus.channel), Recording()
    async with running(source, recording):
        await opened(source)
        began_ns = mono_ns()
        with bus.sender() as sender:
            sender.send(frames, np.where(kind == 1, 72, 16))
        ended_ns = mono_ns()
        await until(lambda: recording.count == count, "all frames")

    flags = np.zeros(count, np.uint8)
    flags |= np.where((kind != 3) & extended, Flag.EXTENDED.value, 0).astype(np.uint8)
    flags |= np.choose(kind, [0, Flag.FD.value, Flag.REMOTE.value, Flag.ERROR.value]).astype(np.uint8)
    flags |= np.where(frames["flags"] & BRS, Flag.BITRATE_SWITCH.value, 0).astype(np.uint8)
    flags |= np.where(frames["flags"] & ESI, Flag.ERROR_STATE.value, 0).astype(np.uint8)
    length = np.where(kind == 2, 0, frames["length"])
    data = np.where(np.arange(64) < length[:, None], frames["data"], 0)
    np.testing.assert_array_equal(recording.column("flags"), flags)
    np.testing.assert_array_equal(recording.column("arbitration_id"), np.where(kind == 3, classes, can_id & 0x1FFFFFFF))
    np.testing.assert_array_equal(recording.column("length"), length)
    np.testing.assert_array_equal(recording.data(), data)
    ts_ns = recording.column("ts_ns")
    assert began_ns <= ts_ns[0]
    assert ts_ns[-1] <= ended_ns
    assert (np.diff(ts_ns) >= 0).all()
    assert {clock.state for _, clock in recording.batches} == {ClockState.SET}
    assert dict(source.status.counters, received_bytes=0) == {
        "error_frames": int((kind == 3).sum()),
        "received_bytes": 0,
    }
    assert recording.events == []


async def test_classic_frames_alone_are_eight_wide(bus: Bus) -> None:
    """Also for a source that does not want CAN FD, which then hears none."""
    frames = numbered(4)
    for fd, heard in ((True, [0, 1, 2, 3]), (False, [0, 1])):
        source, recording = SocketCan("engine", bus.channel, fd=fd), Recording()
        async with running(source, recording):
            await opened(source)
            with bus.sender() as sender:
                sender.send(frames, np.array([16, 16, 72, 72]))
        assert recording.numbers().tolist() == heard
        assert {batch.data.shape[1] for batch, _ in recording.batches} == {64 if fd else 8}


async def test_filters_let_error_frames_pass(bus: Bus) -> None:
    """What the kernel filters is not even counted."""
    frames = np.concatenate([numbered(10, can_id=0x100), numbered(10, can_id=0x200), can_errors((0x80, b"12345678"))])
    frames["can_id"][3] = 0x100 | EXTENDED
    source = SocketCan("engine", bus.channel, filters=[(0x100, 0x7FF | EXTENDED), (0x777, 0x7FF)])
    recording = Recording()
    async with running(source, recording):
        await opened(source)
        with bus.sender() as sender:
            sender.send(frames)
    assert recording.numbers().tolist()[:9] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert recording.count == 10
    assert recording.column("flags")[-1] == Flag.ERROR
    assert recording.lost_count == 0


@pytest.mark.parametrize("goes_on", [False, True], ids=["nothing follows", "more follows"])
async def test_overflow_is_counted_exactly(bus: Bus, goes_on: bool) -> None:
    """Sent = recorded + counted, while the process sleeps with a small buffer, and the loss lies where it was."""
    source, recording = SocketCan("engine", bus.channel, receive_buffer_bytes=64 << 10), Recording()
    sent = 0
    async with running(source, recording):
        await opened(source)
        with bus.sender() as sender:
            for _ in range(3):
                recorded_before = recording.count
                began_ns = mono_ns()
                sender.send(numbered(5000, first=sent))  # without letting the loop run
                ended_ns = mono_ns()
                sent += 5000
                await recording.has_accounted_for(sent)
                assert 50 < recording.count - recorded_before < 5000
                assert recording.overflows[-1][2] >= began_ns
                if goes_on:
                    sender.send(numbered(20, first=sent))
                    sent += 20
                    await recording.has_accounted_for(sent)
                    assert recording.numbers()[-20:].tolist() == list(range(sent - 20, sent))
                    assert began_ns <= recording.overflows[-1][1] <= ended_ns
    assert recording.count + recording.lost_count == sent
    assert (np.diff(recording.numbers().astype(np.int64)) > 0).all()
    assert dict(source.status.counters, received_bytes=0) == {
        "overflow_frames": recording.lost_count,
        "received_bytes": 0,
    }


@pytest.mark.parametrize("by", ["deleting the interface", "stopping the source"])
async def test_overflow_is_counted_before_a_socket_goes(bus: Bus, by: str) -> None:
    """Nobody has read what is queued when the interface is deleted, or the source stopped."""
    source, recording = SocketCan("engine", bus.channel, receive_buffer_bytes=64 << 10), Recording()
    sent = 3000
    async with running(source, recording):
        await opened(source)
        with bus.sender() as sender:
            sender.send(numbered(3000))
        if by == "deleting the interface":
            bus.delete()
            await until(lambda: source.status.link is Link.RETRYING, "gone")
            assert recording.count + recording.lost_count == sent
            bus.add()
            await opened(source)
            with bus.sender() as sender:
                sender.send(numbered(3000))
            sent = 6000
    assert recording.count + recording.lost_count == sent
    assert recording.lost_count > 1000


async def test_a_small_buffer_is_said(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    """What the administrator allows is less than was asked for: one line that names the setting."""
    source = SocketCan("engine", bus.channel, receive_buffer_bytes=64 << 10)
    async with running(source, Recording()):
        await opened(source)
    assert "rmem_max" not in caplog.text
    wanted = SocketCan("engine", bus.channel, receive_buffer_bytes=2**31 - 1)
    async with running(wanted, Recording()):
        await opened(wanted)
    assert "net.core.rmem_max" in caplog.text


async def test_capture_resumes_when_the_interface_is_up_again(bus: Bus) -> None:
    """Within a second; the first frames after its return are there, and each change is told once."""
    source, recording = SocketCan("engine", bus.channel), Recording()
    async with running(source, recording):
        await opened(source)
        for turn in range(3):
            with bus.sender() as sender:
                sender.send(numbered(10, first=100 * turn))
                bus.down()
            await until(lambda: source.status.link is Link.RETRYING, "down", 1.0)
            assert source.status.reason == f"{bus.channel} is down: ip link set {bus.channel} up"
            bus.up()
            with bus.sender() as sender:
                sender.send(numbered(5, first=100 * turn + 10))
            await until(lambda: source.status.link is Link.OPEN, "up", 1.0)
    assert recording.numbers().tolist() == [100 * turn + n for turn in range(3) for n in range(15)]
    assert recording.kinds == ["link_down", "link_up"] * 3


async def test_capture_resumes_when_the_interface_was_made_anew(bus: Bus) -> None:
    """As a USB adapter that is replugged: nothing that was queued is lost, and it is back within a second."""
    source, recording = SocketCan("engine", bus.channel), Recording()
    async with running(source, recording):
        await opened(source)
        for turn in range(3):
            with bus.sender() as sender:
                sender.send(numbered(10, first=100 * turn))
            bus.delete()
            if turn < 2:  # The last time it is back before anybody looks.
                await until(lambda: source.status.link is Link.RETRYING, "gone", 1.0)
                assert "no interface" in source.status.reason
            bus.add()
            if turn == 2:
                await until(lambda: len(recording.events) == 6, "gone and back", 1.0)
            await until(lambda: source.status.link is Link.OPEN, "back", 1.0)
            with bus.sender() as sender:
                sender.send(numbered(5, first=100 * turn + 10))
            await until(lambda turn=turn: recording.count == 15 * (turn + 1), "the frames after it")
    assert recording.numbers().tolist() == [100 * turn + n for turn in range(3) for n in range(15)]
    assert recording.kinds == ["link_down", "link_up"] * 3
    assert recording.lost_count == 0


async def test_an_interface_that_is_not_there_yet() -> None:
    """It appears, then it is brought up; from then on every frame is recorded."""
    bus = Bus()
    source, recording = SocketCan("engine", bus.channel), Recording()
    async with running(source, recording):
        await until(lambda: "no interface" in source.status.reason, "missing")
        bus.add(up=False)
        await until(lambda: "is down" in source.status.reason, "down", 1.0)
        bus.up()
        with bus.sender() as sender:
            sender.send(numbered(10))
        await until(lambda: source.status.link is Link.OPEN, "up", 1.0)
    bus.delete()
    assert recording.numbers().tolist() == list(range(10))
    assert recording.kinds == ["link_down", "link_up"]


async def test_the_bus_goes_off_and_comes_back(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    """Events, counters and a reason while it is off; the error frames themselves are recorded too."""
    caplog.set_level(logging.INFO, "ingestd")
    source, recording = SocketCan("engine", bus.channel), Recording()
    async with running(source, recording):
        await opened(source)
        with bus.sender() as sender:
            sender.send(can_errors((0x4, b"\0\x08"), (0x4, b"\0\x20"), (0x40, b""), (0x40, b"")))
            await until(lambda: "bus-off" in source.status.reason, "the reason")
            assert source.status.link is Link.OPEN
            sender.send(can_errors((0x100, b""), (0x4, b"\0\x01")))
            await until(lambda: source.status.reason == "", "no reason any more")
    assert recording.kinds == ["error_warning", "error_passive", "bus_off", "bus_restarted"]
    assert dict(source.status.counters, received_bytes=0) == {
        "error_frames": 6,
        "bus_offs": 1,
        "controller_overflows": 1,
        "received_bytes": 0,
    }
    assert recording.lost_count == 1
    assert recording.count == 6
    assert caplog.text.count("bus off") == 1


@pytest.mark.usefixtures("own_machine")
async def test_the_wall_clock_is_set_while_frames_come(bus: Bus) -> None:
    """By an hour forwards and back, between two reads: every stamp stays between the instants around its sending."""
    source, recording = SocketCan("engine", bus.channel, coalesce_s=0.05), Recording()
    instants: list[tuple[int, int]] = []
    async with running(source, recording):
        await opened(source)
        with bus.sender() as sender:
            for number in range(300):
                began_ns = mono_ns()
                sender.send(numbered(1, first=number))
                instants.append((began_ns, mono_ns()))
                if number % 50 == 25:
                    hour_s = 3600 if number % 100 == 25 else -3600
                    time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) + hour_s)
                await asyncio.sleep(0.002)
        await until(lambda: recording.count == 300, "all frames")
    began_ns, ended_ns = np.array(instants).T
    ts_ns = recording.column("ts_ns")
    assert (recording.numbers() == np.arange(300)).all()
    slack_ns = OFFSET_TOLERANCE_NS  # of reading the offset, on a machine that has other things to do
    assert (ts_ns >= began_ns - slack_ns).all()
    assert (ts_ns <= ended_ns + slack_ns).all()
    assert {clock.state for _, clock in recording.batches} == {ClockState.SET}
    steps = [event.payload for event in recording.events]
    assert recording.kinds == ["clock_step"] * 6
    hours = [round((step["to_offset_ns"] - step["from_offset_ns"]) / 3.6e12, 3) for step in steps]
    assert hours == [1, -1, 1, -1, 1, -1]
    offsets = np.concatenate([np.full(len(batch), clock.utc_offset_ns) for batch, clock in recording.batches])
    assert np.flatnonzero(np.abs(np.diff(offsets)) > 10**12).tolist() == [25, 75, 125, 175, 225, 275]


@pytest.mark.usefixtures("own_machine")
async def test_the_wall_clock_is_set_and_set_back_unseen(bus: Bus) -> None:
    """Only the frames in between get the time of reading, and their clock says so."""
    source, recording = SocketCan("engine", bus.channel), Recording()
    async with running(source, recording):
        await opened(source)
        with bus.sender() as sender:
            began_ns = mono_ns()
            for hour_s in (3600, -3600, 0):
                sender.send(numbered(10))
                time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) + hour_s)
            await until(lambda: recording.count == 30, "all frames")
    states = [clock.state for batch, clock in recording.batches for _ in range(len(batch))]
    assert states == [ClockState.SET] * 10 + [ClockState.STEPPED] * 10 + [ClockState.SET] * 10
    ts_ns = recording.column("ts_ns")
    assert (ts_ns >= began_ns).all()
    assert (ts_ns <= mono_ns()).all()
