"""The car that drives for ever: pieces that join, a GPS that says where it is, ports that count what they sent."""

from __future__ import annotations

import os
import tty
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from pynmeagps import NMEAReader

from ingestd import demo
from ingestd.demo import ports, vehicle
from ingestd.demo.counts import Counts, State
from ingestd.demo.gps import FIX_NS, Receiver, _angle
from ingestd.demo.player import Piece, Player, Wire, drive_pieces
from ingestd.demo.ports import SlcanPort, TerminalPort, VirtualInterface, slcan_lines, socket_frames
from ingestd.demo.simulate import Bus, frames
from ingestd.demo.vehicle import Drive, drive
from ingestd.model import Flag, FrameBatch

PIECES_SECONDS = (0.01, 3.0, 0.25, 4.0, 0.74)
UTC_NS = 1_789_219_800_123_456_789


def test_pieces_of_a_drive_are_the_drive() -> None:
    """Every column goes on exactly where it broke off: noise, sums, differences and counters too."""
    whole, car = drive(sum(PIECES_SECONDS)), Drive()
    pieces = [car.go_on(seconds) for seconds in PIECES_SECONDS]
    for name, column in whole.items():
        np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces]), column, err_msg=name)


@pytest.mark.parametrize("bus", demo.BUSES)
def test_frames_of_pieces_are_the_frames_of_the_drive(bus: str) -> None:
    """No frame is doubled, lost or out of order at a joint; counters and multiplexed pages go on."""
    (whole,) = (batch for batch in frames(drive(sum(PIECES_SECONDS))) if batch.source == bus)
    car, wire = Drive(), Bus(bus)
    pieces = [wire.carry(car.go_on(seconds)) for seconds in PIECES_SECONDS]
    for column in ("ts_ns", "arbitration_id", "flags", "length", "data"):
        joined = np.concatenate([getattr(piece, column) for piece in pieces])
        np.testing.assert_array_equal(joined, getattr(whole, column), err_msg=column)


def test_the_car_stops_for_fuel_and_drives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tank that is nearly empty it brakes to the start line, takes fuel standing still, and goes."""
    monkeypatch.setattr(vehicle, "PIT_LITRES", 30.9)
    columns = drive(240)
    standing = np.flatnonzero((columns["speed"] == 0) & (columns["time_s"] > 10))
    assert 5 < len(standing) / 100 < 30
    assert np.diff(standing).max() == 1, "one stop"
    rises = np.flatnonzero(np.diff(columns["fuel_litres"]) > 0)
    assert set(rises) <= set(standing), "fuel flows while it stands"
    assert columns["fuel_litres"].max() == pytest.approx(vehicle.FILLED_LITRES, abs=0.1)
    to_line_m = -columns["distance_m"][standing] % vehicle.lap_length_m()
    assert 0 < to_line_m.max() < 10
    assert columns["speed"][standing[-1] + 1000] > 20
    assert np.abs(np.diff(columns["speed"]) * 100).max() < 12, "no jump"


def test_fuel_lasts_for_ever() -> None:
    """An hour and more never runs dry: the stop comes by itself."""
    car, lowest = Drive(), []
    for _ in range(8):
        litres = car.go_on(500)["fuel_litres"]
        lowest.append(litres.min())
        assert litres.min() > 0
        assert litres.max() < vehicle.TANK_LITRES
    assert lowest[-1] > lowest[-2], "there was one"


def sentences_of(seconds: float, pieces: int = 1) -> tuple[np.ndarray, list[bytes]]:
    receiver, car = Receiver(UTC_NS), Drive()
    sent_ns, sentences = [], []
    for _ in range(pieces):
        times, said = receiver.sentences(car.go_on(seconds / pieces))
        sent_ns += times
        sentences += said
    return np.array(sent_ns), sentences


def test_gps_sentences_are_understood_and_say_where_the_car_is() -> None:
    """pynmeagps reads every one, checksum included; position, speed, course, height and time are the drive's."""
    columns = drive(30)
    _, sentences = sentences_of(30)
    fixes, kinds = 0, {}
    for raw in sentences:
        assert raw.endswith(b"\r\n")
        assert len(raw) <= 82, "NMEA 0183, 5.3.1"
        message = NMEAReader.parse(raw, validate=1)
        kinds.setdefault(message.identity, []).append(message)
    for message in kinds["GNRMC"]:
        at_ns = -UTC_NS % FIX_NS + fixes * FIX_NS
        fixes += 1
        sample = int(at_ns / 1e7)
        utc = datetime.fromtimestamp((UTC_NS + at_ns) // 1_000_000_000, UTC)
        utc += timedelta(microseconds=(UTC_NS + at_ns) % 1_000_000_000 // 1000)
        assert datetime.combine(message.date, message.time, UTC) == utc
        assert message.lat == pytest.approx(columns["latitude"][sample], abs=1e-7)
        assert message.lon == pytest.approx(columns["longitude"][sample], abs=1e-7)
        assert message.spd == pytest.approx(columns["gps_speed"][sample] * 3600 / 1852, abs=1e-3)
        assert message.cog == pytest.approx(columns["course_deg"][sample] % 360, abs=0.01)
        assert message.status == "A"
    assert fixes == len(kinds["GNGGA"]) == len(kinds["GNVTG"]) == 300, "ten a second"
    assert {message.numSV for message in kinds["GNGGA"]} <= {12, 13, 14}
    assert kinds["GNGGA"][-1].alt == pytest.approx(columns["altitude_m"][-1], abs=0.1)
    assert kinds["GNVTG"][-1].sogk == pytest.approx(columns["gps_speed"][-1] * 3.6, abs=1.0)
    assert len(kinds["GNGSA"]) == 2 * 30
    assert len(kinds["GPGSV"]) == len(kinds["GLGSV"]) == 2 * 30, "two sentences each, once a second"


def test_gps_sentences_leave_as_a_serial_line_lets_them() -> None:
    """One after the other, none before its fix, all before the next one; and pieces join."""
    sent_ns, sentences = sentences_of(8, pieces=4)
    again_ns, same = sentences_of(8)
    assert sentences == same
    assert sent_ns.tolist() == again_ns.tolist()
    assert (np.diff(sent_ns) > 3_000_000).all()
    fix_ns = [at for at, sentence in zip(sent_ns.tolist(), sentences, strict=True) if b"RMC" in sentence]
    assert all(20_000_000 < (at + UTC_NS) % FIX_NS < 60_000_000 for at in fix_ns)


@pytest.mark.parametrize(
    ("degrees", "digits", "said"),
    [
        (52.4735, 2, "5228.41000,N"),
        (-13.402, 3, "01324.12000,S"),
        (0.0, 2, "0000.00000,N"),
        (9.99999999999, 2, "1000.00000,N"),
        (-0.5, 3, "00030.00000,S"),
    ],
)
def test_angles_carry_over(degrees: float, digits: int, said: str) -> None:
    """Sixty minutes are a degree, whatever rounding says."""
    assert _angle(degrees, digits, "NS") == said


def batch_of(*rows: tuple[int, Flag, bytes]) -> FrameBatch:
    data = np.zeros((len(rows), 64), np.uint8)
    for i, (_, _, payload) in enumerate(rows):
        data[i, : len(payload)] = list(payload)
    return FrameBatch(
        "b",
        np.arange(len(rows), dtype=np.int64),
        np.array([row[0] for row in rows], np.uint32),
        np.array([int(row[1]) for row in rows], np.uint8),
        np.array([len(row[2]) for row in rows], np.uint16),
        data,
    )


ROWS = (
    (0x123, Flag(0), b"\x01\x02"),
    (0x7, Flag.EXTENDED, b""),
    (0x1ABCDEF0, Flag.EXTENDED | Flag.FD | Flag.BITRATE_SWITCH, b"\xaa" * 32),
    (0x10, Flag.FD, b"\xbb" * 64),
)


def test_frames_as_slcan_lines() -> None:
    """Lawicel's letters for classic frames, CANable's for CAN FD."""
    assert slcan_lines(batch_of(*ROWS)) == [
        b"t12320102\r",
        b"T000000070\r",
        b"B1ABCDEF0D" + b"AA" * 32 + b"\r",
        b"d010F" + b"BB" * 64 + b"\r",
    ]


def test_frames_as_socketcan_has_them() -> None:
    """struct can_frame is 16 bytes, canfd_frame 72; the id has its flag."""
    classic, extended, switched, fd = socket_frames(batch_of(*ROWS))
    assert classic == bytes.fromhex("23010000 02000000 0102000000000000")
    assert extended == bytes.fromhex("07000080 00000000 0000000000000000")
    assert switched == bytes.fromhex("f0debc9a 20010000") + b"\xaa" * 32 + bytes(32)
    assert fd == bytes.fromhex("10000000 40000000") + b"\xbb" * 64


@pytest.fixture
def opened() -> Callable[[str], int]:
    return lambda device: os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)


def test_a_terminal_sends_to_a_listener_and_counts(opened: Callable[[str], int]) -> None:
    """What nobody listens to is not sent; what was sent can be read to the last byte."""
    port = TerminalPort()
    port.send([b"lost\n"])
    assert port.sent == 0
    reader = opened(port.device)
    tty.setraw(reader)
    port.send([b"one\n", b"two\n"])
    assert port.push()
    assert port.sent == 2
    assert os.read(reader, 100) == b"one\ntwo\n"
    os.close(reader)
    port.send([b"lost\n"])
    assert port.push()
    assert port.sent == 2
    port.close()


def test_a_terminal_that_is_full_waits_and_counts_whole_items(opened: Callable[[str], int]) -> None:
    """A reader that does not read holds the rest back, to a bound; what is read is whole and in order."""
    port, count = TerminalPort(), ports.BACKLOG_MAX
    reader = opened(port.device)
    tty.setraw(reader)
    items = [f"{number:0199d}\n".encode() for number in range(count)]
    port.send(items)
    assert not port.push()
    assert 0 < port.sent < count
    port.send(items)  # Beyond the bound: not sent, and not counted as sent.
    read = b""
    while not port.push() or len(read) < 200 * port.sent:
        read += os.read(reader, 65536)
    whole = read.splitlines()
    assert len(whole) == port.sent
    assert [int(line) for line in whole[:count]] == list(range(count))
    os.close(reader)
    port.close()


def test_an_slcan_adapter_is_silent_until_its_channel_is_open(opened: Callable[[str], int]) -> None:
    """Commands in any lumps; after C, and after the port was closed, it is silent again."""
    port = SlcanPort()
    reader = opened(port.device)
    tty.setraw(reader)
    port.send([b"t0010\r"])
    os.write(reader, b"C\rS6\r\rO")
    port.send([b"t0010\r"])
    assert port.sent == 0
    os.write(reader, b"\r")
    port.send([b"t0011AA\r"])
    assert port.sent == 1
    assert os.read(reader, 100) == b"t0011AA\r"
    os.write(reader, b"C\r")
    port.send([b"t0010\r"])
    assert port.sent == 1
    os.write(reader, b"O\r")
    assert port.push()
    os.close(reader)
    assert port.push()
    reader = opened(port.device)
    port.send([b"t0010\r"])
    assert port.sent == 1, "a new listener has to open the channel anew"
    os.close(reader)
    port.close()


def test_a_virtual_interface_needs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `ip`, as without permission, there is an OSError, which makes the demo take pseudo terminals."""
    monkeypatch.setattr(ports.shutil, "which", lambda *_, **__: None)
    with pytest.raises(OSError, match="no `ip`"):
        VirtualInterface("demo-nowhere")


class Everything:
    """A port that takes all and keeps it."""

    def __init__(self) -> None:
        self.items: list[bytes] = []

    @property
    def sent(self) -> int:
        return len(self.items)

    def send(self, items: list[bytes]) -> None:
        self.items += items

    def push(self) -> bool:
        return True

    def close(self) -> None:
        raise AssertionError("nobody closes it")


def test_the_player_sends_everything_once_when_it_is_due() -> None:
    """Over the joints of pieces, whose last frames are carried after the next piece has begun; in order, none early."""
    port = Everything()
    with Counts.file(1) as file:
        counts = Counts(file.fileno(), ["s"])
    player = Player({"s": Wire(port, {})}, counts)
    pieces = [([1, 5, 11], [b"1", b"5", b"11"]), ([9, 12], [b"9", b"12"]), ([21, 22], [b"21", b"22"])]
    for due_ns, items in pieces[1:]:
        player._ahead.put({"s": Piece(due_ns, items)})
    player._playing = [{"s": Piece(*pieces[0])}]
    for now_ns, sent in ((0, 0), (5, 2), (10, 2), (11, 4), (20, 5), (21, 6)):
        player._send("s", port, now_ns)
        assert port.sent == sent, now_ns
    assert port.items == [b"1", b"5", b"11", b"9", b"12", b"21"]
    assert len(player._playing) == 1, "pieces that were played are gone"


def test_pieces_of_the_player_hold_all_of_the_drive() -> None:
    """What the player would send in the first pieces is what the buses and the receiver give."""
    wires = {name: Wire(Everything(), {}, slcan_lines) for name in demo.BUSES} | {demo.GPS: Wire(Everything(), {})}
    played = drive_pieces(wires, UTC_NS)
    first, second = next(played), next(played)
    for batch in frames(drive(8), start_ns=0):
        assert first[batch.source].items + second[batch.source].items == slcan_lines(batch)
        assert first[batch.source].due_ns + second[batch.source].due_ns == batch.ts_ns.tolist()
    assert first[demo.GPS].items + second[demo.GPS].items == sentences_of(8)[1]


def test_counts_are_seen_by_whoever_maps_them() -> None:
    """One writes, the other reads, also after the file was closed."""
    with Counts.file(2) as file:
        here, there = Counts(file.fileno(), ["a", "b"]), Counts(file.fileno(), ["a", "b"])
    assert there.state is State.STARTING
    assert there.sent() == {"a": 0, "b": 0}
    here.set_state(State.PLAYING)
    here.set_sent("b", 7_000_000_000)
    assert there.state is State.PLAYING
    assert there.sent() == {"a": 0, "b": 7_000_000_000}
