"""Sentences to signals: pynmeagps' own objects and gpsd's regression outputs as the oracles."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

import numpy as np
import pynmeagps
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.decode.nmea import UNITS, NmeaDecoder
from ingestd.decode.raw import RawDecoder
from ingestd.framing import NmeaFramer, SerialFrame
from ingestd.model import FrameBatch, Quality, SerialFlag
from ingestd.sources.serial import columns

FLAGS = SerialFlag.SERIAL | SerialFlag.TEXT
WEEKS_1024 = 1024 * 7 * 86_400  # What gpsd may add to a date: it guesses the roll-over of the GPS week.


def checked(body: bytes, start: bytes = b"$") -> bytes:
    return start + body + b"*%02X" % reduce(xor, body)


def batch(*sentences: bytes) -> FrameBatch:
    """Sentences a nanosecond apart."""
    return columns("gps", [SerialFrame(ts_ns, each, FLAGS) for ts_ns, each in enumerate(sentences)])


def framed(data: bytes) -> list[bytes]:
    return [frame.payload for frame in NmeaFramer().feed(data, 0)]


def samples(frames: FrameBatch, decoder: NmeaDecoder | None = None) -> dict[int, dict[str, Any]]:
    """Channel → number, text or None, by stamp; asserts that every channel occurs once."""
    found: dict[int, dict[str, Any]] = {}
    for each in (decoder or NmeaDecoder("gps")).decode(frames).batches:
        for column, channel in enumerate(each.group.channels):
            for row, ts_ns in enumerate(each.ts_ns.tolist()):
                number = float(each.value[column, row])
                text = None if each.text is None else each.text[column, row]
                quality = 0 if each.quality is None else each.quality[column, row]
                value = text if math.isnan(number) else number
                assert (value is None) == (quality == Quality.NOT_AVAILABLE)
                at = found.setdefault(ts_ns, {})
                assert channel.name not in at
                at[channel.name] = value
    return found


def one(sentence: bytes) -> dict[str, Any]:
    """The samples of one sentence."""
    return samples(batch(sentence))[0]


@pytest.fixture(scope="module")
def logs(shared_data: Path) -> dict[str, list[bytes]]:
    # gpsd's player writes on the wire what is between its delay cookies.
    folder = shared_data / "serial"
    return {path.stem: framed(path.read_bytes().replace(b"|", b"")) for path in sorted(folder.iterdir())}


def test_every_sentence_as_pynmeagps_has_it(logs: dict[str, list[bytes]]) -> None:
    """Each field of each sentence of each log is the value that pynmeagps' own reader gives, under its name."""
    decoder, compared = NmeaDecoder("gps"), 0
    for sentences in logs.values():
        if not sentences:
            continue
        found = samples(batch(*sentences), decoder)
        for ts_ns, sentence in enumerate(sentences):
            try:
                message = pynmeagps.NMEAReader.parse(sentence, validate=pynmeagps.VALCKSUM)
            except pynmeagps.NMEATypeError:
                assert ts_ns not in found
                continue
            fields = {name: value for name, value in vars(message).items() if name[0] != "_"}
            if "field_01" in fields or not fields:
                assert ts_ns not in found
                continue
            name = message.identity[len(message.talker) :]
            expected = {f"{name}.{key}": plain(value) for key, value in fields.items()}
            known = {key: value for key, value in found[ts_ns].items() if ".field_" not in key and key[-4:] != ".utc"}
            assert known == expected, sentence
            compared += len(expected)
    assert compared > 230_000


def plain(value: Any) -> Any:
    """pynmeagps' objects as we store them."""
    if isinstance(value, time):
        return value.hour * 3600 + value.minute * 60 + value.second + value.microsecond / 1e6
    if isinstance(value, date):
        return value.isoformat()
    return None if value == "" else value


def test_what_became_of_the_frames_of_every_log(logs: dict[str, list[bytes]]) -> None:
    """Every frame is counted once, and how many pynmeagps does not know is what it was."""
    decoder = NmeaDecoder("gps")
    total = [decoder.decode(batch(*sentences)).counts for sentences in logs.values() if sentences]
    assert all(c.frames == c.decoded + c.unknown + c.undecoded for c in total)
    assert sum(c.decoded for c in total) == 19_224
    assert sum(c.unknown for c in total) == 1_212
    assert sum(c.undecoded for c in total) == 1


def positions(found: dict[int, dict[str, Any]]) -> list[tuple[float, float]]:
    """In wire order."""
    values = (found[ts_ns] for ts_ns in sorted(found))
    both = (([v for k, v in each.items() if k[-4:] == end] for end in (".lat", ".lon")) for each in values)
    return [(lat[0], lon[0]) for lat, lon in both if lat and lon and None not in (lat[0], lon[0])]


def reports(shared_data: Path, log: str) -> Iterator[dict[str, Any]]:
    """gpsd's TPV objects."""
    path = shared_data / "expected" / f"{log}.log.chk"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return (json.loads(line) for line in lines if line.startswith('{"class":"TPV"'))


def test_positions_against_gpsd(logs: dict[str, list[bytes]], shared_data: Path) -> None:
    """gpsd's sequence of positions is within ours, in order (it repeats some), to 1e-8 degrees, in every log.

    Left out are receivers whose position is in binary messages.
    """
    compared = 0
    for log, sentences in logs.items():
        ours = positions(samples(batch(*sentences))) if sentences else []
        theirs = [(t["lat"], t["lon"]) for t in reports(shared_data, log) if "lat" in t]
        if not ours:
            continue
        at = 0
        for lat, lon in theirs:
            while abs(ours[at][0] - lat) > 1e-8 or abs(ours[at][1] - lon) > 1e-8:
                at += 1
                assert at < len(ours), f"{log}: {lat} {lon}"
            compared += 1
    assert compared == 3_399


def test_speeds_against_gpsd(shared_data: Path) -> None:
    """Where gpsd, which echoes what it reads, reports a speed behind an RMC, it is the speed of that RMC, in m/s."""
    pairs: list[tuple[bytes, float]] = []
    for path in sorted((shared_data / "expected").glob("gpsd_*.chk")):
        last = b""
        for line in path.read_bytes().splitlines():
            if line.startswith((b"$", b"!")):
                last = line
            elif line.startswith(b'{"class":"TPV"') and last[3:6] == b"RMC" and b'"speed"' in line:
                pairs.append((last, json.loads(line)["speed"]))
    found = samples(batch(*(sentence for sentence, _ in pairs)))
    ours = np.array([found[ts_ns]["RMC.spd"] for ts_ns in range(len(pairs))]) * 1852 / 3600
    np.testing.assert_allclose(ours, [speed for _, speed in pairs], atol=6e-4)
    assert len(pairs) == 458


def test_clock_reference_against_gpsd(logs: dict[str, list[bytes]], shared_data: Path) -> None:
    """gpsd's times, but for the 1,024 weeks that it may add, are our clock references.

    A few are not: gpsd also takes times of day from sentences without a date.
    """
    agreed = others = 0
    for log, sentences in logs.items():
        found = samples(batch(*sentences)).values() if sentences else []
        ours = np.array([v for each in found for k, v in each.items() if k[-4:] == ".utc" and v is not None])
        for report in reports(shared_data, log):
            if "time" in report and len(ours):
                theirs = datetime.fromisoformat(report["time"]).timestamp()
                agrees = bool(np.any(np.abs((theirs - ours + 1) % WEEKS_1024 - 1) < 1e-3))
                agreed, others = agreed + agrees, others + (not agrees)
    assert (agreed, others) == (3_274, 39)


def test_rmc() -> None:
    """Position, speed, date, time and clock reference of the sentence everybody sends."""
    sentence = checked(b"GPRMC,123519.25,A,4807.038,S,01131.000,W,022.4,084.4,230394,003.1,W")
    found = one(sentence)
    assert found["RMC.lat"] == pytest.approx(-48.1173)
    assert found["RMC.lon"] == pytest.approx(-11.51666667)
    assert found["RMC.time"] == 12 * 3600 + 35 * 60 + 19.25
    assert (found["RMC.date"], found["RMC.status"], found["RMC.spd"]) == ("1994-03-23", "A", 22.4)
    assert found["RMC.utc"] == datetime(1994, 3, 23, 12, 35, 19, 250_000, UTC).timestamp()
    (decoded,) = NmeaDecoder("gps").decode(batch(sentence)).batches
    assert (decoded.group.source, decoded.group.name) == ("gps/GP", "RMC")
    units = {channel.name: channel.unit for channel in decoded.group.channels}
    assert (units["RMC.lat"], units["RMC.spd"], units["RMC.cog"], units["RMC.time"]) == ("deg", "kn", "deg", "s")


@pytest.mark.parametrize(
    ("body", "utc"),
    [
        (b"GPRMC,000000,A,,,,,,,010100,,", datetime(2000, 1, 1, tzinfo=UTC)),
        (b"GPRMC,000000,A,,,,,,,010168,,", datetime(2068, 1, 1, tzinfo=UTC)),
        (b"GPRMC,000000,A,,,,,,,010180,,", datetime(1980, 1, 1, tzinfo=UTC)),
        (b"GPRMC,000000,V,,,,,,,010126,,", None),
        (b"GPRMC,,A,,,,,,,010126,,", None),
        (b"GPRMC,000000,A,,,,,,,,,", None),
        (b"GPRMC,000000,A,,,,,,,310226,,", None),
        (b"GPRMC,999999,A,,,,,,,010126,,", None),
        (b"GPZDA,235959.5,31,12,2025,00,00", datetime(2025, 12, 31, 23, 59, 59, 500_000, UTC)),
        (b"GPZDA,235959.5,31,02,2025,00,00", None),
        (b"GPZDA,235959.5,,,,,", None),
        (b"GPZDA,235959.5,31,12", None),
        (b"GPZDA,235959.5,31,12,99999999999999999999,00,00", None),
    ],
)
def test_clock_reference(body: bytes, utc: datetime | None) -> None:
    """Only a valid sentence with a possible date and a time is a clock reference; the rest of it is decoded anyway."""
    found = one(checked(body))
    assert found[f"{body[2:5].decode()}.utc"] == (None if utc is None else utc.timestamp())


def test_more_and_fewer_fields() -> None:
    """RMC of NMEA 2.0, 2.3 and 4.1, and one with a field that nobody knows: each a group, none loses a field."""
    old = b"GNRMC,123519,A,4807.038,N,01131.000,E,022.4,084.4,230394,003.1,W"
    decoder, versions = NmeaDecoder("gps"), (old, old + b",A", old + b",A,V", old + b",A,V,later")
    decoded = decoder.decode(batch(*(checked(each) for each in versions)))
    assert [len(each.group.channels) for each in decoded.batches] == [12, 13, 14, 15]
    assert len({each.group.id for each in decoded.batches}) == 4
    assert one(checked(versions[3]))["RMC.field_14"] == "later"
    again = decoder.decode(batch(*(checked(each) for each in versions)))
    assert [a.group is b.group for a, b in zip(decoded.batches, again.batches, strict=True)] == [True] * 4


def test_content_does_not_make_groups() -> None:
    """Empty or full, valid or not, moving or not: one group, numbers stay numbers and text stays text."""
    bodies = [
        b"GPRMC,,V,,,,,,,,,,N",
        b"GPRMC,123519,A,4807.038,N,01131.000,E,022.4,084.4,230394,003.1,W,A",
        b"GPRMC,123519,A,nonsense,N,01131.000,E,0,0,000000,1e3,1,2",
    ]
    (decoded,) = NmeaDecoder("gps").decode(batch(*map(checked, bodies))).batches
    assert len(decoded) == 3
    assert decoded.ts_ns.tolist() == [0, 1, 2]
    assert decoded.text is not None
    texts = {c.name for c, text in zip(decoded.group.channels, decoded.text, strict=True) if any(text)}
    numbers = {c.name for c, row in zip(decoded.group.channels, decoded.value, strict=True) if not np.isnan(row).all()}
    assert texts == {"RMC.status", "RMC.NS", "RMC.EW", "RMC.date", "RMC.mvEW", "RMC.posMode"}
    assert not texts & numbers
    assert one(checked(bodies[2]))["RMC.lat"] is None


def test_satellites() -> None:
    """A GSV has one to four satellites, with or without a signal id: a group for each."""
    bodies = [b"GPGSV,1,1,%02d" % n + b",22,42,067,42" * n + tail for n in (1, 2, 4) for tail in (b"", b",1")]
    found = samples(batch(*map(checked, bodies)))
    assert [sum("svid" in name for name in found[ts_ns]) for ts_ns in range(6)] == [1, 1, 2, 2, 4, 4]
    assert [found[ts_ns].get("GSV.signalID") for ts_ns in range(6)] == [None, "1"] * 3
    assert found[5]["GSV.az_04"] == 67


def test_more_fields_than_a_group_holds() -> None:
    """PUBX,03 of 16 satellites has 98 channels: several groups, of 32 at most, and nothing is missing."""
    satellites = b"".join(b",%d,U,103,37,28,010" % n for n in range(16))
    decoded = NmeaDecoder("gps").decode(batch(checked(b"PUBX,03,16" + satellites)))
    assert [len(each.group.channels) for each in decoded.batches] == [32, 32, 32, 2]
    assert {each.group.source for each in decoded.batches} == {"gps/P"}
    found = one(checked(b"PUBX,03,16" + satellites))
    assert found["UBX03.svid_16"] == 15
    assert decoded.counts.signals == len(found) == 98


@pytest.mark.parametrize(
    ("payload", "fate"),
    [
        (checked(b"GPXYZ,1"), "unknown"),
        (checked(b"GP"), "unknown"),
        (checked(b"PUBX,77,1"), "unknown"),
        (b"no sentence", "unknown"),
        (b"", "unknown"),
        (b"$GPGLL,1*00", "undecoded"),
        (b"$GPGLL,1*zz", "undecoded"),
        (b"$GPGLL,\xff*00", "undecoded"),
        (checked(b"GPRMC,1,A,1,N,1,E,fast"), "undecoded"),
        (checked(b"GPGGA,1,1,N,1,E,1,one"), "undecoded"),
        (checked(b"PUBX"), "undecoded"),
        (checked(b"PASHR,,"), "undecoded"),
        (checked(b"PQTMSN"), "undecoded"),
        (checked(b"GNFOO,,"), "undecoded"),
        (checked(b"PUBX,03,99999999,1"), "undecoded"),
        (checked(b"GPRMC,123519,A,4807.038,N,01131.000,E,022.4,084.4,230394,003.1," + b"9" * 1700), "decoded"),
        (checked(b"GPGGA,1,,,,," + b"9" * 1700), "undecoded"),
        (checked(b"QZGSA,A,3,,,,,,,,,,,,,1.7,1.0,1.4"), "decoded"),
        (checked(b"AIVDM,1,1,,A,14eG;o@034o8sd<L9i:a;WF>062D,0", b"!"), "decoded"),
    ],
)
def test_fates(payload: bytes, fate: str) -> None:
    """Whatever it is, a frame is counted once, and none stops the decoder, not even one that announces much."""

    def too_long(*_: object) -> None:
        raise AssertionError("hangs")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(5)
    try:
        counts = NmeaDecoder("gps").decode(batch(payload)).counts
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert {name: getattr(counts, name) for name in ("decoded", "unknown", "undecoded")} == {
        name: int(name == fate) for name in ("decoded", "unknown", "undecoded")
    }


KNOWN = [f"GP{name}" for name in pynmeagps.NMEA_PAYLOADS_GET] + [f"P{n}" for n in pynmeagps.NMEA_PAYLOADS_GET_PROP]
FIELD = st.one_of(
    st.sampled_from(["", "A", "1", "-1", "4807.038", "N", "W", "123519.00", "230394", "nan", "inf", "1e999", "99999"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="$!*,"), max_size=8),
)


@given(name=st.sampled_from(KNOWN), fields=st.lists(FIELD, max_size=60), prefixed=st.booleans())
def test_any_sentence(name: str, fields: list[str], prefixed: bool) -> None:
    """Any sentence that pynmeagps knows, with any fields: counted once, no field lost, all shapes right."""
    if prefixed:
        for prefix in pynmeagps.NMEA_PREFIX_PROP:
            if name.startswith(f"P{prefix}"):
                fields, name = [name[1 + len(prefix) :], *fields], f"P{prefix}"
    payload = checked(",".join([name, *fields]).encode())
    decoded = NmeaDecoder("gps").decode(batch(payload))
    counts = decoded.counts
    assert counts.frames == counts.decoded + counts.unknown + counts.undecoded == 1
    if counts.decoded:
        channels = [channel.name for each in decoded.batches for channel in each.group.channels]
        clocks = sum(each in ("RMC.utc", "ZDA.utc") for each in channels)
        assert len(channels) - clocks == len(fields)
        assert all(each.value.shape == (len(each.group.channels), 1) for each in decoded.batches)


def test_units_are_of_fields_that_there_are() -> None:
    """A unit for a field that pynmeagps calls otherwise would never be seen."""
    tables = {**pynmeagps.NMEA_PAYLOADS_GET, **pynmeagps.NMEA_PAYLOADS_GET_PROP}
    known = {
        f"{name}.{each}"
        for name, fields in tables.items()
        for key, kind in fields.items()
        for each in (kind[1] if isinstance(kind, tuple) else [key])
    }
    assert set(UNITS) <= known


def test_can_frames_are_unknown() -> None:
    """Frames without the flag of serial lines are none of ours."""
    frames = columns("can0", [SerialFrame(0, checked(b"GPGLL,1"), SerialFlag(0))])
    assert NmeaDecoder("can0").decode(frames).counts.unknown == 1


def test_raw_frames_are_not_decoded() -> None:
    """Lines are counted and left as they are."""
    decoded = RawDecoder("logger").decode(batch(b"21.3 C", b"21.4 C"))
    assert (decoded.batches, decoded.counts.frames, decoded.counts.undecoded) == ([], 2, 2)
