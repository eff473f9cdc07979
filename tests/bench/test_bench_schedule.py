"""The deadlines of bench/replay.py, with a clock that the test sets: nothing early, nothing lost, no drift."""

from __future__ import annotations

import socket
import struct
from itertools import pairwise
from pathlib import Path

import generate
import numpy as np
import pytest
from schedule import Lateness, Schedule, looped
from wires import UdpWire

from ingestd.sources.captures import Capture, CaptureBatch, open_capture

BEGAN_NS = 5_000_000_000_000


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    load = generate.Load(frames=5000, buses=2, ids=10, rate=500, fd=0.2)
    return open_capture(generate.generate(tmp_path_factory.mktemp("load"), load).capture)


def whole(capture: Capture) -> CaptureBatch:
    [batch] = capture.batches()
    return batch


def test_frames_leave_when_they_are_due_and_in_order(capture: Capture) -> None:
    """At ten times the speed: each frame's stamp is its deadline, in order, and none is handed out before it."""
    schedule, now_ns, taken = Schedule(looped(capture, 1), BEGAN_NS, 10.0), BEGAN_NS - 1_000_000, []
    held_up = iter((40_000_000, 7_000_000, 30_000_000))
    assert schedule.take(now_ns) is None
    while (next_ns := schedule.next_ns) is not None:
        now_ns = max(now_ns, next_ns) + next(held_up, 50_000)
        batch = schedule.take(now_ns)
        assert batch is not None
        assert batch.frames.ts_ns.max() <= now_ns
        assert schedule.next_ns is None or len(batch) == 4096 or schedule.next_ns > now_ns
        taken.append(batch)
    stamps = np.concatenate([batch.frames.ts_ns for batch in taken])
    sent = whole(capture).frames
    np.testing.assert_array_equal(stamps, BEGAN_NS + ((sent.ts_ns - sent.ts_ns[0]) / 10).astype(np.int64))
    np.testing.assert_array_equal(np.concatenate([batch.frames.data for batch in taken]), sent.data)
    assert schedule.taken_count == len(sent) == 5000
    # Being held up once delays nothing that comes later: half of the frames are no later than the steps of the clock.
    assert schedule.lateness.max_ns >= 39_000_000
    assert schedule.lateness.quantile_ms(0.5) < 0.2


def test_flat_out_everything_is_due_and_keeps_its_distances(capture: Capture) -> None:
    """Nothing is late, and stamps are those of the capture from the start on."""
    schedule = Schedule(looped(capture, 1), BEGAN_NS, None)
    stamps = []
    while (batch := schedule.take(0)) is not None:
        stamps.append(batch.frames.ts_ns)
    ts_ns = whole(capture).frames.ts_ns
    np.testing.assert_array_equal(np.concatenate(stamps), BEGAN_NS + ts_ns - ts_ns[0])
    assert schedule.lateness.max_ns == 0


def test_loops_go_on_rising(capture: Capture) -> None:
    """Three passes are three times the frames; between passes a stamp rises by a mean distance."""
    batches = list(looped(capture, 3))
    ts_ns = np.concatenate([batch.frames.ts_ns for batch in batches])
    assert len(ts_ns) == 3 * 5000
    assert (np.diff(ts_ns) >= 0).all()
    length_ns = ts_ns[4999]
    assert ts_ns[5000] - ts_ns[4999] == length_ns // 4999
    np.testing.assert_array_equal(ts_ns[5000:10000] - ts_ns[5000], ts_ns[:5000])


def test_stamps_that_go_back_are_due_with_the_one_before(tmp_path: Path) -> None:
    """Captures of two interfaces are not always in order: frames stay in theirs."""
    path = tmp_path / "back.log"
    path.write_text("".join(f"(1000000000.{at:06d}) can0 123#{n:02X}\n" for n, at in enumerate([0, 500, 300, 900])))
    schedule, payloads, dues = Schedule(looped(open_capture(path), 1), 0, 1.0), [], []
    while (next_ns := schedule.next_ns) is not None:
        batch = schedule.take(next_ns)
        assert batch is not None
        payloads += batch.frames.data[:, 0].tolist()
        dues += [next_ns // 1000] * len(batch)
    assert payloads == [0, 1, 2, 3]
    assert dues == [0, 500, 500, 900]


def test_lateness_is_told_within_two_percent() -> None:
    """The bins keep quantiles, whatever the scale; the latest of all is exact."""
    late = Lateness()
    for scale in (1_000, 1_000_000, 10_000_000_000):
        late.add(np.linspace(0, scale, 1001).astype(np.int64))
    assert late.max_ns == 10_000_000_000
    assert late.quantile_ms(0.5) == pytest.approx(0.5, rel=0.03)
    assert late.quantile_ms(1.0) == 10_000.0
    assert Lateness().quantile_ms(0.99) == 0.0


def test_datagrams_hold_every_frame_in_order(capture: Capture) -> None:
    """Taken apart as cannelloni's format says: ids, FD flags and payloads as in the capture, sequence numbers rise."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(10)
        wire = UdpWire(*receiver.getsockname())
        frames = whole(capture).frames[:300]
        wire.send(frames)
        wire.close()
        received, sequence = [], []
        while len(received) < 300:
            datagram = receiver.recv(2000)
            assert len(datagram) <= 1405
            version, opcode, number, count = struct.unpack_from(">BBBH", datagram)
            assert (version, opcode) == (2, 0)
            sequence.append(number)
            at = 5
            for _ in range(count):
                can_id, length = struct.unpack_from(">IB", datagram, at)
                at += 6 if length & 0x80 else 5
                received.append((can_id, bool(length & 0x80), datagram[at : at + (length & 0x7F)]))
                at += length & 0x7F
            assert at == len(datagram)
    assert all(after == before + 1 for before, after in pairwise(sequence))
    expected = zip(frames.arbitration_id, frames.flags & 8 != 0, frames.length, frames.data, strict=True)
    assert received == [(int(i), bool(fd), bytes(data[:length])) for i, fd, length, data in expected]
