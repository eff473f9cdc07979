"""u-blox messages to signals: against the fields at their offsets, against gpsd, and what is cut or unknown."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.chunks import Placement, encode_signals
from ingestd.decode.ubx import UbxDecoder
from ingestd.framing import SerialFrame, UbxFramer
from ingestd.framing.ubx import checksum
from ingestd.model import ClockState, FrameBatch, Quality, SerialFlag
from ingestd.sources.serial import columns

PLACEMENT = Placement(UUID(int=1), 0, ClockState.SET)


def message(kind: bytes, payload: bytes) -> bytes:
    """A message with its length and checksum; `kind` is class and id."""
    content = kind + len(payload).to_bytes(2, "little") + payload
    return b"\xb5\x62" + content + checksum(content)


def batch(*payloads: bytes) -> FrameBatch:
    """Frames a nanosecond apart."""
    return columns("gps", [SerialFrame(n, each, SerialFlag.SERIAL) for n, each in enumerate(payloads)])


def read(log: Path) -> list[bytes]:
    framer = UbxFramer()
    return [frame.payload for frame in framer.feed(log.read_bytes(), 0) + framer.flush()]


def values(frames: FrameBatch) -> list[dict[str, Any]]:
    """Number, text or None by channel, of each frame; asserts that no channel occurs twice in one."""
    found: list[dict[str, Any]] = [{} for _ in range(len(frames))]
    for each in UbxDecoder("gps").decode(frames).batches:
        for row, channel in enumerate(each.group.channels):
            for column, number in enumerate(each.ts_ns.tolist()):
                value = float(each.value[row, column])
                text = None if each.text is None else each.text[row, column]
                assert channel.name not in found[number]
                found[number][channel.name] = text if math.isnan(value) else value
    return found


def test_positions_are_what_stands_at_their_offsets(shared_data: Path) -> None:
    """NAV-PVT read with struct as the receiver description has it: time, position, height, speed, course, flags."""
    payloads = [each for log in sorted((shared_data / "serial").glob("*ublox*")) for each in read(log)]
    payloads = [each for each in payloads if each[:4] == b"\xb5\x62\x01\x07" and len(each) == 100]
    assert len(payloads) > 50
    for payload, found in zip(payloads, values(batch(*payloads)), strict=True):
        fields = struct.unpack_from("<IH5BBIiBBBBiiiiIIiiiii", payload, 6)
        itow, year, month, day, hour, minute, second, valid, _, nano, fix, flags, _, satellites = fields[:14]
        lon, lat, height, msl, hacc, vacc, vn, ve, vd, speed, course = fields[14:]
        expected = {
            "iTOW": itow, "year": year, "month": month, "day": day, "hour": hour, "min": minute, "second": second,
            "nano": nano, "fixType": fix, "gnssFixOk": flags & 1, "numSV": satellites, "height": height, "hMSL": msl,
            "hAcc": hacc, "vAcc": vacc, "velN": vn, "velE": ve, "velD": vd, "gSpeed": speed, "validDate": valid & 1,
        }  # fmt: skip
        assert {name: found[f"NAV-PVT.{name}"] for name in expected} == expected
        assert found["NAV-PVT.lat"] == pytest.approx(lat * 1e-7, abs=1e-12)
        assert found["NAV-PVT.lon"] == pytest.approx(lon * 1e-7, abs=1e-12)
        assert found["NAV-PVT.headMot"] == pytest.approx(course * 1e-5, abs=1e-12)


@pytest.mark.parametrize("name", ["gpsd_ublox-neo-m8n.log", "gpsd_ublox-zed-f9p-rtk.log", "gpsd_ublox-neo-m8u.log"])
def test_gpsd_reports_the_same_fixes(shared_data: Path, name: str) -> None:
    """Each time and position that gpsd made of the log is among ours."""
    ours = [
        (round(each["NAV-PVT.utc"], 1), each["NAV-PVT.lat"], each["NAV-PVT.lon"])
        for each in values(batch(*read(shared_data / "serial" / name)))
        if each.get("NAV-PVT.utc") is not None
    ]
    lines = (shared_data / "expected" / f"{name}.chk").read_text().splitlines()
    reports = [json.loads(line) for line in lines if '"class":"TPV"' in line]
    theirs = [
        (round(datetime.fromisoformat(each["time"]).timestamp(), 1), each["lat"], each["lon"])
        for each in reports
        if each["mode"] > 1
    ]
    assert len(theirs) > 1
    for at, lat, lon in theirs:
        assert any(
            at == time and abs(lat - latitude) < 2e-7 and abs(lon - longitude) < 2e-7
            for time, latitude, longitude in ours
        ), (at, lat, lon)


def test_every_message_of_the_logs(shared_data: Path) -> None:
    """All of them are known, decoded and can be stored; sentences among them are decoded as NMEA is."""
    names: set[str] = set()
    for log in sorted((shared_data / "serial").iterdir()):
        payloads = read(log) if "ubx" in log.name or "ublox" in log.name or "mixed" in log.name else []
        if not payloads:
            continue
        decoded = UbxDecoder("gps").decode(batch(*payloads), {})
        assert decoded.counts.frames == len(payloads)
        messages = sum(each[:2] == b"\xb5\x62" for each in payloads)
        assert decoded.counts.decoded >= messages, log.name
        names |= {each.group.name for each in decoded.batches}
        encode_signals(decoded.batches, PLACEMENT)
    assert {"NAV-PVT", "NAV-SAT", "ESF-MEAS", "GGA", "RMC"} <= names


def test_repeats_bits_text_and_units() -> None:
    """Satellites are numbered, bit fields are taken apart, characters are text, 33 fields are two groups."""
    satellites = b"".join(struct.pack("<BBBbhhI", 0, n, 30 + n, 10, 100, -5, 0b1101) for n in range(1, 4))
    decoded = UbxDecoder("gps").decode(
        batch(
            message(b"\x01\x35", struct.pack("<IBBH", 1000, 1, 3, 0) + satellites),
            message(b"\x04\x02", b"out of order"),
            message(b"\x0a\x04", b"EXT CORE 3.01\0".ljust(30, b"\0") + b"00080000\0\0"),
        ),
        {},
    )
    found = {
        channel.name: (each.value[row, 0], None if each.text is None else each.text[row, 0], channel.unit)
        for each in decoded.batches
        for row, channel in enumerate(each.group.channels)
    }
    assert found["NAV-SAT.cno_02"] == (32.0, None, "dBHz")
    assert found["NAV-SAT.prRes_03"] == (-0.5, None, "m")
    assert [found[f"NAV-SAT.{name}_01"][0] for name in ("qualityInd", "svUsed", "health")] == [5, 1, 0]
    assert found["INF-NOTICE.message"][1] == "out of order"
    assert found["MON-VER.swVersion"][1] == "EXT CORE 3.01"
    assert not [name for name in found if "reserved" in name]
    assert max(len(each.group.channels) for each in decoded.batches) == 32


def test_a_message_shorter_than_its_definition_has_no_invented_zeros() -> None:
    """NAV-PVT of 84 bytes, as firmware of 2013 sends it: what is there is there, the rest is not, and it is said."""
    payload = struct.pack("<IH5BBIiBBBBii", 1, 2026, 11, 25, 10, 0, 59, 3, 0, -5, 3, 1, 0, 9, 1, 2).ljust(84, b"\1")
    decoded = UbxDecoder("gps").decode(batch(message(b"\x01\x07", payload)), {})
    names = {channel.name for each in decoded.batches for channel in each.group.channels}
    assert "NAV-PVT.pDOP" in names
    assert not {"NAV-PVT.headVeh", "NAV-PVT.magDec"} & names
    assert (decoded.counts.decoded, decoded.counts.short) == (1, 1)
    for each in decoded.batches:
        assert each.quality is not None
        assert (each.quality & Quality.SHORT_FRAME).all()


@pytest.mark.parametrize(
    ("flags", "second", "expected"),
    [(3, 59, 1795600859.0), (3, 60, 1795600860.0), (1, 59, None), (2, 59, None), (0, 59, None), (3, 255, 1795601055.0)],
)
def test_utc_only_where_the_message_calls_it_valid(flags: int, second: int, expected: float | None) -> None:
    """Before the first fix a receiver says some date: that is none. A leap second is the next minute."""
    payload = struct.pack("<IH5BB", 1, 2026, 11, 25, 10, 0, second, flags).ljust(92, b"\0")
    [found] = values(batch(message(b"\x01\x07", payload)))
    assert found["NAV-PVT.utc"] == expected


def test_unknown_messages_and_announced_repeats() -> None:
    """A message nobody knows is unknown; one that announces 255 satellites and has none ends where its bytes do."""
    lying = message(b"\x01\x35", struct.pack("<IBBH", 1000, 1, 255, 0))
    decoded = UbxDecoder("gps").decode(batch(message(b"\x77\x01", b"abc"), lying, b"\xb5\x62", b"junk"), {})
    assert (decoded.counts.unknown, decoded.counts.undecoded) == (2, 1)
    assert (decoded.counts.decoded, decoded.counts.short) == (1, 1)


KINDS = st.sampled_from([b"\x01\x07", b"\x01\x35", b"\x10\x02", b"\x0a\x04", b"\x13\x40", b"\x06\x8b", b"\x02\x15"])


@given(st.lists(st.tuples(st.one_of(KINDS, st.binary(min_size=2, max_size=2)), st.binary(max_size=120)), max_size=6))
def test_any_messages(contents: Sequence[tuple[bytes, bytes]]) -> None:
    """Whatever stands in a message that is whole: it is counted once, and what comes of it can be stored."""
    if not contents:
        return
    decoded = UbxDecoder("gps").decode(batch(*(message(*each) for each in contents)), {})
    counts = decoded.counts
    assert counts.frames == len(contents) == counts.decoded + counts.unknown + counts.undecoded
    encode_signals(decoded.batches, PLACEMENT)
