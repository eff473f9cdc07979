"""Bytes as the kernel writes them, turned into columns: frames, control messages, and what error frames say."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import pytest

from ingestd.model import Event, Flag, FrameBatch, SourceStatus
from ingestd.sources.can_bus_state import EVENT_NS, EVENTS_MAX, BusWatch
from ingestd.sources.can_socket import (
    CANFD_FRAME_BYTES,
    FRAME,
    SO_RXQ_OVFL,
    SO_TIMESTAMPNS,
    SO_TIMESTAMPNS_OLD,
    SOL_SOCKET,
    ControlLayout,
    Frames,
    columns,
    join,
)
from ingestd.sources.kernel_stamps import NO_STAMP

SO_MARK = 36
STAMP_NS = 1_800_000_000_123_456_789


class Abi:
    """How a machine lays out control messages (cmsg(3)), written a message at a time."""

    def __init__(self, long_bytes: int, stamp: int) -> None:
        self.long_bytes, self.stamp_kind = long_bytes, stamp
        self.layout = ControlLayout(long_bytes, stamp)

    def message(self, kind: int, data: bytes, level: int = SOL_SOCKET) -> bytes:
        header = struct.pack("=Q" if self.long_bytes == 8 else "=I", self.long_bytes + 8 + len(data))
        padding = bytes(-len(data) % self.long_bytes)
        return header + struct.pack("=ii", level, kind) + data + padding

    def stamp(self, ns: int) -> bytes:
        wide = self.stamp_kind == SO_TIMESTAMPNS or self.long_bytes == 8
        return self.message(self.stamp_kind, struct.pack("=qq" if wide else "=ii", *divmod(ns, 10**9)))

    def count(self, count: int) -> bytes:
        return self.message(SO_RXQ_OVFL, struct.pack("=I", count))

    def parse(self, *controls: bytes) -> list[tuple[int, int]]:
        rows = np.full((len(controls), ControlLayout.CONTROL_BYTES), 0xAA, np.uint8)  # what was there before
        for row, control in zip(rows, controls, strict=True):
            row[: len(control)] = np.frombuffer(control, np.uint8)
        wall_ns, count = self.layout.parse(rows, np.array([len(control) for control in controls], np.uintp))
        return list(zip(wall_ns.tolist(), count.tolist(), strict=True))


@pytest.fixture(params=[(8, SO_TIMESTAMPNS), (8, SO_TIMESTAMPNS_OLD), (4, SO_TIMESTAMPNS), (4, SO_TIMESTAMPNS_OLD)])
def abi(request: pytest.FixtureRequest) -> Abi:
    return Abi(*request.param)


def test_the_usual_control_messages(abi: Abi) -> None:
    """A stamp, and once something was lost a count behind it, on machines of 64 and 32 bits, old kernels and new."""
    assert abi.parse(abi.stamp(STAMP_NS), abi.stamp(1)) == [(STAMP_NS, 0), (1, 0)]
    with_count = abi.stamp(STAMP_NS) + abi.count(0xFFFF_FFFE)
    assert abi.parse(abi.stamp(STAMP_NS), with_count, with_count) == [
        (STAMP_NS, 0), (STAMP_NS, 0xFFFF_FFFE), (STAMP_NS, 0xFFFF_FFFE)
    ]  # fmt: skip


def test_unusual_control_messages_are_walked(abi: Abi) -> None:
    """In any order, among others, cut off, or none at all; the usual ones beside them are read all the same."""
    stamp, count, mark = abi.stamp(STAMP_NS), abi.count(7), abi.message(SO_MARK, struct.pack("=I", 9))
    other_level = abi.message(abi.stamp_kind, bytes(16), level=101)
    assert abi.parse(
        count + stamp, mark + stamp + count, stamp + mark, stamp + mark + count, other_level + stamp, b"", count,
        stamp[:-1], stamp + count[:5], bytes(32), stamp, stamp + count,
    ) == [
        (STAMP_NS, 7), (STAMP_NS, 7), (STAMP_NS, 0), (STAMP_NS, 7), (STAMP_NS, 0), (NO_STAMP, 0), (NO_STAMP, 7),
        (NO_STAMP, 0), (STAMP_NS, 0), (NO_STAMP, 0), (STAMP_NS, 0), (STAMP_NS, 7),
    ]  # fmt: skip


def one_by_one(frames: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> list[tuple[int, Flag, bytes]]:
    """Arbitration id, flags and payload of each frame, as linux/can.h has it."""
    found = []
    for frame, size in zip(frames, sizes.tolist(), strict=True):
        can_id = int(frame["can_id"])
        flags = Flag(0)
        if can_id & 0x2000_0000:
            flags |= Flag.ERROR
        else:
            flags |= Flag.EXTENDED if can_id & 0x8000_0000 else Flag(0)
            flags |= Flag.REMOTE if can_id & 0x4000_0000 else Flag(0)
        wide = bool(flags & (Flag.EXTENDED | Flag.ERROR))
        if size == CANFD_FRAME_BYTES:
            flags |= Flag.FD
            flags |= Flag.BITRATE_SWITCH if frame["flags"] & 1 else Flag(0)
            flags |= Flag.ERROR_STATE if frame["flags"] & 2 else Flag(0)
        payload = frame["data"][: frame["length"]].tobytes()
        found.append((can_id & (0x1FFF_FFFF if wide else 0x7FF), flags, b"" if flags & Flag.REMOTE else payload))
    return found


@pytest.mark.parametrize("with_fd", [False, True])
def test_columns_are_what_the_frames_say(with_fd: bool) -> None:
    """Every kind of frame, against a reading of the header one frame at a time; nothing is left of earlier frames."""
    dice = np.random.default_rng(3)
    count = 2000
    frames = dice.integers(0, 256, (count, FRAME.itemsize), np.uint8).view(FRAME)[:, 0]
    fd = dice.random(count) < 0.5 if with_fd else np.zeros(count, bool)
    frames["can_id"][fd] &= 0x9FFF_FFFF
    sizes = np.where(fd, CANFD_FRAME_BYTES, 16)
    frames["length"] = np.where(fd, dice.choice([0, 1, 8, 12, 64], count), dice.integers(0, 9, count))
    arbitration_id, flags, length, data = columns(frames, sizes)
    assert data.shape == (count, 64 if with_fd else 8)
    assert data.flags.c_contiguous
    found = [
        (one_id, Flag(one_flags), row[:n].tobytes())
        for one_id, one_flags, n, row in zip(arbitration_id.tolist(), flags.tolist(), length, data, strict=True)
    ]
    assert found == one_by_one(frames, sizes)
    assert not data[np.arange(data.shape[1]) >= length[:, None]].any()
    assert (arbitration_id.dtype, flags.dtype, length.dtype, data.dtype) == (np.uint32, np.uint8, np.uint16, np.uint8)


def test_a_classic_frame_is_never_longer_than_eight() -> None:
    """Whatever a driver wrote there."""
    frames = np.zeros(2, FRAME)
    frames["length"] = 200
    assert columns(frames, np.array([16, 16]))[2].tolist() == [8, 8]
    assert columns(frames, np.array([16, 72]))[2].tolist() == [8, 64]


def test_reads_of_different_width_are_joined() -> None:
    """One call found classic frames alone, the next a long one."""
    frames = np.zeros(1, FRAME)
    frames["length"], frames["data"] = 8, 1
    parts = [
        Frames(np.array([n]), np.array([n], np.uint32), *columns(frames, np.array([size])))
        for n, size in ((1, 16), (2, 72))
    ]
    joined = join(parts)
    assert joined.wall_ns.tolist() == [1, 2]
    assert joined.data.shape == (2, 64)
    assert joined.data.sum(axis=1).tolist() == [8, 8]


# linux/can/error.h
CRTL, BUSOFF, RESTARTED, CNT = 0x4, 0x40, 0x100, 0x200
RX_WARNING, RX_PASSIVE, TX_PASSIVE, ACTIVE, RX_OVERFLOW = 0x04, 0x10, 0x20, 0x40, 0x01
OFF, BACK = (BUSOFF, b""), (RESTARTED, b"")


class Watched:
    """A bus state, fed with error frames a millisecond apart."""

    def __init__(self) -> None:
        self.status = SourceStatus()
        self.watch = BusWatch("can0", self.status)
        self.now_ns = 10**12
        self.overflows = 0

    def see(self, *errors: tuple[int, bytes], flags: Flag = Flag.ERROR) -> list[Event]:
        count = len(errors)
        ts_ns = self.now_ns + np.arange(1, count + 1) * 1_000_000
        self.now_ns += count * 1_000_000
        data = np.frombuffer(b"".join(payload.ljust(8, b"\0") for _, payload in errors), np.uint8).reshape(count, 8)
        classes = np.array([classes for classes, _ in errors], np.uint32)
        every = np.full(count, flags, np.uint8)
        found = self.watch.look(FrameBatch("can0", ts_ns, classes, every, np.full(count, 8, np.uint16), data))
        self.overflows += found.overflows_count
        return found.events


def controller(status: int, tx: int = 0, rx: int = 0, classes: int = CRTL) -> tuple[int, bytes]:
    return classes, bytes([0, status, 0, 0, 0, 0, tx, rx])


def test_each_change_of_the_bus_is_told_once() -> None:
    """Through all the states and back, with the time of the frame that said so and its error counters."""
    bus = Watched()
    began_ns = bus.now_ns
    events = bus.see(
        controller(RX_WARNING), controller(RX_WARNING), (0x80, b""), controller(TX_PASSIVE, 130, 96, CRTL | CNT),
        OFF, OFF, BACK, controller(ACTIVE),
    )  # fmt: skip
    assert [(event.kind, (event.ts_ns - began_ns) // 1_000_000) for event in events] == [
        ("error_warning", 1), ("error_passive", 4), ("bus_off", 5), ("bus_restarted", 7), ("error_active", 8),
    ]  # fmt: skip
    assert [dict(event.payload) for event in events] == [{}, {"tx_errors": 130, "rx_errors": 96}, {}, {}, {}]
    assert bus.status.counters == {"error_frames": 8, "bus_offs": 1}


def test_a_state_that_stays_is_not_told_again() -> None:
    """Not in the next batch, and not for frames that say nothing of it."""
    bus = Watched()
    assert [event.kind for event in bus.see(controller(RX_PASSIVE))] == ["error_passive"]
    assert bus.see(controller(RX_PASSIVE), (0x80, b"\0\x50")) == []
    assert bus.see(controller(ACTIVE), flags=Flag(0)) == []  # an ordinary frame of that id
    assert bus.watch.rest(bus.now_ns) == []
    assert bus.status.counters == {"error_frames": 3}


def test_a_controller_that_overflowed_lost_a_frame_each_time() -> None:
    """It does not say how many."""
    bus = Watched()
    bus.see(controller(RX_OVERFLOW), controller(RX_OVERFLOW | RX_WARNING), (0x80, b"\0\x01"))
    assert bus.overflows == 2


def test_an_error_storm_is_bounded_and_the_last_state_is_told() -> None:
    """A bus that goes off a hundred times a second for a minute: every time counted, few told, nothing left open."""
    bus = Watched()
    told: list[Event] = []
    for _ in range(600):
        told += bus.see(*[OFF, BACK] * 50)
        told += bus.watch.rest(bus.now_ns)
    told += bus.see(OFF)
    assert bus.status.counters["bus_offs"] == 30_001
    assert len(told) <= EVENTS_MAX + 60_000_000_000 // EVENT_NS + 1
    assert bus.watch.is_off
    bus.now_ns += EVENT_NS
    told += bus.watch.rest(bus.now_ns)
    assert told[-1].kind == "bus_off"
    assert bus.watch.rest(bus.now_ns + 100 * EVENT_NS) == []
    changes = 60_001
    assert sum(event.payload.get("untold_changes", 0) + 1 for event in told) == changes


def test_random_error_frames_do_no_harm() -> None:
    """Any classes, any payload."""
    dice = random.Random(5)
    bus = Watched()
    for _ in range(300):
        for event in bus.see(*[(dice.getrandbits(29), dice.randbytes(8)) for _ in range(dice.randint(1, 30))]):
            assert event.kind in {"error_active", "error_warning", "error_passive", "bus_off", "bus_restarted"}
