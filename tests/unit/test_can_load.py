"""Bus load from bits: frames whose length on the wire is known, and the kernel's answer about a controller."""

from __future__ import annotations

import struct
import threading
import time

import numpy as np
import pytest

from ingestd.model import CONTROLLER_STATES, Flag, FrameBatch
from ingestd.sources import can_link, can_load
from ingestd.sources.can_link import Controller, Inquiry, ask, understand
from ingestd.sources.can_load import BusLoad, crc_15, stuff_count, stuffable_bits

SECOND_NS = 1_000_000_000


def frames(count: int, arbitration_id: int, flags: int, payload: bytes) -> FrameBatch:
    data = np.zeros((count, max(8, len(payload))), np.uint8)
    data[:, : len(payload)] = np.frombuffer(payload, np.uint8)
    return FrameBatch(
        "can0", np.arange(count), np.full(count, arbitration_id, np.uint32), np.full(count, flags, np.uint8),
        np.full(count, len(payload), np.uint16), data,
    )  # fmt: skip


def load_of(batch: FrameBatch, bitrate: int = 500_000, data_bitrate: int = 0) -> float:
    """What a second with these frames is, as soon as the stuff bits are known."""
    load = BusLoad(bitrate, data_bitrate)
    for _ in range(80):  # What is counted in a sample is weighed with those before.
        load.add(batch)
        ratio = load.ratio(load._since_ns + SECOND_NS)
    assert type(ratio) is float
    return ratio


def test_bits_with_nothing_to_stuff() -> None:
    """A frame of 8 bytes has 111 bits, 131 with an extended id (ISO 11898-1); and what is stuffed on top."""
    for flags, arbitration_id, bits in ((0, 0x555, 111), (Flag.EXTENDED, 0x15555555, 131)):
        stuffable = stuffable_bits(arbitration_id, flags, b"\x55" * 8)
        assert len(stuffable) + can_load.UNSTUFFED_BITS == bits
        expected = 1000 * (bits + stuff_count(stuffable)) / 500_000
        assert load_of(frames(1000, arbitration_id, flags, b"\x55" * 8)) == pytest.approx(expected, rel=0.002)


def test_stuffing() -> None:
    """After five alike one of the other kind, which counts for the next five: ISO 11898-1, 10.5."""
    assert [stuff_count(bits) for bits in ("", "00000", "0000", "000001111", "0000011110000", "0" * 21)] == [
        0, 1, 0, 2, 3, 4,
    ]  # fmt: skip


def test_the_check_sequence() -> None:
    """CRC-15/CAN of "123456789", as the catalogue of parametrised CRC algorithms has it."""
    assert crc_15("".join(f"{byte:08b}" for byte in b"123456789")) == 0x059E
    bits = stuffable_bits(0x14, 0, b"\x01")
    assert bits[:27] == "0" + "00000010100" + "0" + "0" + "0" + "0001" + "00000001"
    assert len(bits) == 27 + 15


def test_remote_and_error_frames() -> None:
    """A remote frame has no data on the wire; of an error frame nobody knows the length."""
    assert load_of(frames(100, 0x555, Flag.REMOTE, b"")) == pytest.approx(
        100 * (47 + stuff_count(stuffable_bits(0x555, Flag.REMOTE, b""))) / 500_000, rel=0.002
    )
    assert load_of(frames(100, 4, Flag.ERROR, bytes(8))) == 0


def test_fd_frames_at_two_rates() -> None:
    """The data go at the faster rate where the frame says so; the rest never does."""
    switched = frames(1000, 0x123, Flag.FD | Flag.BITRATE_SWITCH, bytes(64))
    slow, fast = 1000 * 29 / 500_000, 1000 * (579 - 29) / 2_000_000  # linux/can/length.h: 579 bits, 598 extended
    assert load_of(switched, 500_000, 2_000_000) == pytest.approx(slow + fast)
    assert load_of(frames(1000, 0x123, Flag.FD, bytes(8)), 500_000, 2_000_000) == pytest.approx(
        1000 * (29 + 33 + 64) / 5e5
    )


def test_an_answer_that_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks does not wait; what is known is of the interface that is looked at."""
    may_answer = threading.Event()

    def slow(ifindex: int) -> Controller:
        assert may_answer.wait(20)
        return Controller(ifindex * 1000)

    monkeypatch.setattr(can_link, "ask", slow)
    inquiry = Inquiry()
    assert [inquiry.look(3) for _ in range(100)] == [Controller()] * 100
    may_answer.set()
    deadline = time.monotonic() + 20
    while inquiry.look(3) == Controller():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert inquiry.look(3) == Controller(3000)
    assert inquiry.look(4) == Controller()


def test_it_is_asked_as_often_as_one_likes() -> None:
    """Within a second it is what it was; without a bit rate nobody knows."""
    load = BusLoad(500_000)
    begun = load._since_ns
    load.add(frames(10, 1, 0, b""))
    assert load.ratio(begun + 1) is None
    first = load.ratio(begun + SECOND_NS)
    assert first is not None
    assert first > 0
    assert load.ratio(begun + SECOND_NS + 1) == first
    assert load.ratio(begun + 2 * SECOND_NS) == 0
    unknown = BusLoad()
    unknown.add(frames(10, 1, 0, b""))
    assert unknown.ratio(begun + SECOND_NS) is None


def attribute(kind: int, value: bytes) -> bytes:
    """A struct rtattr, padded."""
    return (struct.pack("=HH", 4 + len(value), kind) + value).ljust(4 + -(-len(value) // 4) * 4, b"\0")


def answer(info: bytes, kind: int = 16) -> bytes:
    body = struct.pack("=BxHiII", 0, 280, 3, 0, 0) + attribute(3, b"can0\0") + attribute(0x8000 | 18, info)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body


def test_what_the_kernel_says_of_a_controller() -> None:
    """Its rates and its state; of anything else, nothing. The emulated machine asks a real one: tests/machine."""
    timing = struct.pack("=8I", 500_000, 875, *[0] * 6)
    data = (
        attribute(1, timing)
        + attribute(4, struct.pack("=I", 2))
        + attribute(9, struct.pack("=8I", 2_000_000, *[0] * 7))
    )
    info = attribute(1, b"can\0") + attribute(2, data)
    assert understand(answer(info)) == Controller(500_000, 2_000_000, "error-passive")
    assert understand(answer(info, kind=2)) == Controller()
    for state, name in enumerate((*CONTROLLER_STATES, "", "")):  # Stopped and sleeping are of no bus.
        assert understand(answer(attribute(2, attribute(4, struct.pack("=I", state))))).state == name
    for length in range(len(answer(info))):
        try:
            understand(answer(info)[:length])
        except struct.error:
            assert length < 16


def test_an_interface_that_is_no_controller() -> None:
    """The loopback interface, and one that is not there."""
    assert ask(1) == ask(2**31 - 1) == Controller()


def test_a_rate_that_is_not_known_yet_or_not_any_more() -> None:
    """Time without one counts for nothing: no adapter is no idle bus, and the first second with one is a whole one."""
    load = BusLoad()
    began_ns = load._since_ns
    assert load.ratio(began_ns + 600 * SECOND_NS) is None
    load.bitrate = 500_000
    load.add(frames(2000, 0x123, 0, b"\x55" * 8))
    at_once = load.ratio(began_ns + 601 * SECOND_NS)
    assert at_once is not None
    assert 0.4 < at_once < 0.6
    load.bitrate = 0
    assert load.ratio(began_ns + 602 * SECOND_NS) is None
    load.bitrate = 500_000
    assert load.ratio(began_ns + 602 * SECOND_NS + 1) is None
