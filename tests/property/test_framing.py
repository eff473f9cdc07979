"""Serial bytes to frames: the shared logs and hypothesis' worst, whole and in pieces."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import xor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.framing import FRAMERS, Framer, LineFramer, NmeaFramer, SerialFrame, UbxFramer
from ingestd.framing.ubx import SYNC, checksum
from ingestd.model import PAYLOAD_BYTES_MAX, SerialFlag

SERIAL, TEXT, TRUNCATED, FIRST = SerialFlag.SERIAL, SerialFlag.TEXT, SerialFlag.TRUNCATED, SerialFlag.FIRST

# The README of the shared data counts by line and so misses a sentence glued to another.
GLUED = {"gpsd_gp-320fw-2019-04-07-coldboot.log": 1}


def checked(body: bytes, start: bytes = b"$") -> bytes:
    """A sentence with its checksum."""
    return start + body + b"*%02X" % reduce(xor, body)


def sentences_in(data: bytes) -> list[bytes]:
    """An independent opinion: everything that has the form of a sentence and the right checksum."""
    found = re.finditer(rb"[$!]([^$!*\r\n]*)\*([0-9A-F]{2})", data)
    return [m[0] for m in found if m[1] and reduce(xor, m[1]) == int(m[2], 16)]


def run(framer: Framer, pieces: Iterable[bytes]) -> list[SerialFrame]:
    """Feed pieces, a nanosecond apart, to the end."""
    frames = [frame for at_ns, piece in enumerate(pieces) for frame in framer.feed(piece, at_ns)]
    return frames + framer.flush()


def payloads(framer: Framer, pieces: Iterable[bytes]) -> list[bytes]:
    return [frame.payload for frame in run(framer, pieces)]


def cut(data: bytes, ends: Iterable[int]) -> Iterator[bytes]:
    ends = sorted({min(end, len(data)) for end in ends} | {len(data)})
    return (data[a:b] for a, b in zip([0, *ends], ends, strict=False))


def singly(data: bytes) -> Iterator[bytes]:
    return cut(data, range(1, len(data)))


def lumps(data: bytes, chance: random.Random) -> Iterator[bytes]:
    return cut(data, [chance.randrange(len(data) + 1) for _ in range(len(data) // 300 + 2)])


def balanced(framer: Framer) -> bool:
    counters = framer.counters
    parts = counters["frame_bytes"] + counters["line_end_bytes"] + counters["skipped_bytes"]
    return counters["received_bytes"] == parts


@pytest.fixture(scope="module")
def logs(shared_data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((shared_data / "serial").iterdir())}


def test_the_sentences_of_every_log(logs: dict[str, bytes], shared_data: Path) -> None:
    """As many as a regular expression finds, the same ones, and as many as the README of the data says."""
    readme = (shared_data / "README.md").read_text()
    said = {m[1]: int(m[2]) for m in re.finditer(r"\| serial/(\S+) \|.*NMEA (\d+)/\d+ ok", readme)}
    found = {name: payloads(NmeaFramer(), [data]) for name, data in logs.items()}
    assert found == {name: sentences_in(data) for name, data in logs.items()}
    assert {name: len(found[name]) - GLUED.get(name, 0) for name in said} == said
    assert len(said) > 30
    assert sum(map(len, found.values())) == 20_437


@pytest.mark.parametrize("protocol", FRAMERS)
def test_every_log_in_pieces(logs: dict[str, bytes], protocol: str) -> None:
    """Byte by byte and in random lumps a log gives the frames and the counters that it gives whole."""
    chance = random.Random(1)
    for name, data in logs.items():
        short = data[:40_000]
        whole = FRAMERS[protocol]()
        frames = payloads(whole, [short])
        assert balanced(whole), name
        for pieces in (singly(short), lumps(short, chance)):
            framer = FRAMERS[protocol]()
            assert payloads(framer, pieces) == frames, name
            assert framer.counters == whole.counters, name


def test_every_log_with_garbage_between(logs: dict[str, bytes]) -> None:
    """Noise between the sentences, without the signs that begin one, costs none of them; nor does a cut at the ends."""
    chance = random.Random(2)
    noise = bytes(set(range(256)) - set(b"$!"))
    for name, data in logs.items():
        sentences = sentences_in(data)
        dirty = b"".join(bytes(chance.choices(noise, k=chance.randrange(30))) + each for each in sentences)
        assert payloads(NmeaFramer(), lumps(dirty, chance)) == sentences, name
        if len(sentences) > 2:
            middle = dirty[dirty.index(sentences[0]) + 3 : -2]
            assert payloads(NmeaFramer(), lumps(middle, chance)) == sentences[1:-1], name


def test_the_messages_of_every_log(logs: dict[str, bytes], shared_data: Path) -> None:
    """As many u-blox messages as the README of the data says, and of sentences those that stand outside of them."""
    readme = (shared_data / "README.md").read_text()
    said = {m[1]: int(m[2]) for m in re.finditer(r"\| serial/(\S+) \|.*UBX (\d+)/\d+ ok", readme)}
    assert len(said) == 12
    for name, data in logs.items():
        found = payloads(UbxFramer(), [data])
        messages = [each for each in found if each[:2] == SYNC]
        assert len(messages) == said.get(name, 0), name
        outside = data
        for each in messages:
            outside = outside.replace(each, b"\0", 1)
        assert [each for each in found if each[:2] != SYNC] == sentences_in(outside), name


def test_messages_and_sentences_with_garbage_between(logs: dict[str, bytes]) -> None:
    """Noise between frames of both kinds costs none of them, in any pieces, and each has the time of its first byte."""
    chance = random.Random(3)
    noise = bytes(set(range(256)) - set(b"$!"))
    for name in ("pyubx2_pygpsdata-MIXED.log", "gpsd_ublox-neo-m8l.log", "pynmeagps_pygpsdata-mixed.log"):
        frames = payloads(UbxFramer(), [logs[name]])
        begins, dirty = [], b""
        for frame in frames:
            dirty += bytes(chance.choices(noise, k=chance.randrange(30))).replace(SYNC, b"")
            begins.append(len(dirty))
            dirty += frame
        assert payloads(UbxFramer(), lumps(dirty, chance)) == frames, name
        found = run(UbxFramer(), singly(dirty))
        assert [(each.ts_ns, each.payload) for each in found] == list(zip(begins, frames, strict=True)), name


GOOD = checked(b"GPGLL,4916.45,N,12311.12,W,225444,A")
UBX = bytes.fromhex("b562 0104 1200 e8030000 0100 0200 0300 0400 0500 0600 0700")
UBX += checksum(UBX[2:])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (UBX + UBX, [UBX, UBX]),
        (b"\xb5" + UBX + b"\xb5", [UBX]),
        (UBX[:-1] + b"\0" + UBX, [UBX]),
        (UBX[:9] + UBX, [UBX]),
        (b"\xb5\x62\x01\x07\xff\xff" + UBX, [UBX]),
        (b"\xb5\x62\x01\x07\xf0\x06" + GOOD + UBX, [GOOD, UBX]),
        (GOOD[:9] + UBX + GOOD[9:] + GOOD, [UBX, GOOD]),
        (GOOD + b"\xb5\x62\x01\x07\x00\x01\r\n" + GOOD, [GOOD, GOOD]),
        (b"\xb5\x62" * 900 + UBX, [UBX]),
    ],
)
def test_false_starts_of_messages(data: bytes, expected: list[bytes]) -> None:
    """What only begins like a message hides neither the message nor the sentence behind it."""
    for pieces in ([data], singly(data)):
        framer = UbxFramer()
        assert payloads(framer, pieces) == expected
        assert balanced(framer)


def test_sentences_among_ubx_messages(logs: dict[str, bytes]) -> None:
    """A receiver that speaks binary and text: all sentences are found, whatever bytes the messages have."""
    ubx, nmea = logs["pyubx2_pygpsdata-MIXED.log"], sentences_in(logs["gpsd_mt3339.log"])
    messages = [b"\xb5\x62" + part for part in ubx.split(b"\xb5\x62")]
    assert any(b"$" in message for message in messages)
    mixed = b"".join(message + nmea[n % len(nmea)] + b"\r\n" for n, message in enumerate(messages))
    found = payloads(NmeaFramer(), [mixed])
    assert [each for each in found if each in set(nmea)] == [nmea[n % len(nmea)] for n in range(len(messages))]


def test_a_clean_log_has_nothing_to_skip(logs: dict[str, bytes]) -> None:
    """With CR LF between them, sentences leave nothing but line ends."""
    framer = NmeaFramer()
    run(framer, [logs["pynmeagps_pygpsdata-nmea4.log"]])
    assert framer.counters["skipped_bytes"] == 0
    assert framer.counters["line_end_bytes"] == 2 * 57


@pytest.mark.parametrize(
    ("data", "expected", "counter"),
    [
        (GOOD[:-1] + b"0\r\n", [], "bad_checksums"),
        (GOOD[:-3] + b"\r\n", [], "unchecked_sentences"),
        (GOOD[:12] + GOOD, [GOOD], None),
        (b"$$$" + GOOD + b"$$", [GOOD], None),
        (b"$GP\x00" + GOOD, [GOOD], None),
        (GOOD + GOOD, [GOOD, GOOD], None),
        (b"$AB,1*" + GOOD + b"$AB,1*4" + GOOD, [GOOD, GOOD], None),
        (b"$AB,1!" + checked(b"AIVDM,1,1,,A,14,0", b"!"), [checked(b"AIVDM,1,1,,A,14,0", b"!")], None),
        (checked(b"GPTXT,01,01,02,Ready!"), [checked(b"GPTXT,01,01,02,Ready!")], None),
        (checked(b"GPTXT,01,01,02,Oh! Ready!"), [checked(b"GPTXT,01,01,02,Oh! Ready!")], None),
        (checked(b"GPTXT,01,01,02,\xb0C"), [], None),
        (GOOD[:-2] + GOOD[-2:].lower(), [GOOD[:-2] + GOOD[-2:].lower()], None),
        (b"\\s:r3669961,c:1120959341*5B\\" + GOOD, [GOOD], None),
        (checked(b"PUBX,41" + b",0" * 600), [checked(b"PUBX,41" + b",0" * 600)], None),
        (b"$AB," + b"x" * PAYLOAD_BYTES_MAX + GOOD, [GOOD], None),
        (checked(b"AB," + b"x" * (PAYLOAD_BYTES_MAX - 7)), [checked(b"AB," + b"x" * (PAYLOAD_BYTES_MAX - 7))], None),
        (checked(b"AB," + b"x" * (PAYLOAD_BYTES_MAX - 6)), [], None),
        (b"$*00!*00$A*41", [], None),
    ],
)
def test_false_starts(data: bytes, expected: list[bytes], counter: str | None) -> None:
    """What is no sentence is skipped, and the sentence behind it found; whole or byte by byte."""
    for pieces in ([data], singly(data)):
        framer = NmeaFramer()
        assert payloads(framer, pieces) == expected
        assert balanced(framer)
        counted = {name: framer.counters[name] for name in ("bad_checksums", "unchecked_sentences")}
        assert counted == {name: int(name == counter) for name in counted}


PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b"$",
                b"!",
                b"*",
                b"\r\n",
                b"\n",
                b"\r",
                b"$AB",
                b"!AB,",
                b"*41",
                b"*4",
                GOOD,
                GOOD + b"\r\n",
                b"\xb5",
                SYNC,
                SYNC + b"\x01\x07\x05\x00",
                SYNC + b"\x01\x07\xf0\x06",
                UBX,
            ]
        ),
        st.binary(max_size=30),
        st.binary(min_size=1, max_size=1).map(lambda byte: byte * (PAYLOAD_BYTES_MAX - 20)),
    ),
    max_size=12,
)


@pytest.mark.parametrize("protocol", FRAMERS)
@settings(deadline=None)
@given(pieces=PIECES)
def test_any_bytes_in_any_pieces(protocol: str, pieces: list[bytes]) -> None:
    """No byte is counted twice or not at all, memory is bounded, pieces do not matter, frames are in the bytes."""
    data = b"".join(pieces)
    whole, singles, given_pieces = FRAMERS[protocol](), FRAMERS[protocol](), FRAMERS[protocol]()
    frames = payloads(whole, [data])
    assert payloads(given_pieces, pieces) == frames
    assert payloads(singles, singly(data)) == frames
    assert whole.counters == singles.counters == given_pieces.counters
    assert balanced(whole)
    assert whole.counters["received_bytes"] == len(data)
    assert whole.counters["frame_bytes"] == sum(map(len, frames))
    assert all(0 < len(frame) <= PAYLOAD_BYTES_MAX for frame in frames)
    at = 0
    for frame in frames:
        at = data.index(frame, at) + len(frame)
    if protocol == "nmea":
        assert all(frame in sentences_in(frame) for frame in frames if frame.count(b"!") + frame.count(b"$") == 1)


@pytest.mark.parametrize("protocol", FRAMERS)
@pytest.mark.parametrize("babble", [b"$", b"!a", b"$AB,*", b"$A!B,", b"\n", b"\x00", b"x", b"\xb5\x62\x01\x07\xf0\x06"])
def test_babble_is_linear_work(protocol: str, babble: bytes) -> None:
    """Ten times as much babble takes some ten times the processor time, not a hundred; what is held stays small."""
    seconds: list[float] = []
    for count in (20_000, 200_000):
        data = babble * (count // len(babble))
        framer = FRAMERS[protocol]()
        begun = time.process_time()
        for at in range(0, len(data), 7):
            framer.feed(data[at : at + 7], at)
            assert len(framer._held) <= PAYLOAD_BYTES_MAX + 3  # type: ignore[attr-defined]
        seconds.append(time.process_time() - begun)
    assert seconds[1] < 40 * seconds[0]


def test_a_frame_is_stamped_with_its_first_byte() -> None:
    """Byte by byte, the stamp of a frame is the time of its first byte, for either framer and any start."""
    data = b"xx\r\n" + GOOD + b"\r\n$AB,1!" + checked(b"AIVDM,1", b"!") + b"\n\r\nabc\rd"
    for framer in (NmeaFramer(), LineFramer()):
        frames = run(framer, singly(data))
        assert len(frames) >= 2
        assert [data[frame.ts_ns : frame.ts_ns + len(frame.payload)] for frame in frames] == [f.payload for f in frames]


def test_flush_begins_anew() -> None:
    """What was held before the end of the stream has no part in what comes after it."""
    framer = NmeaFramer()
    assert framer.feed(GOOD[:10], 1) == framer.flush() == framer.feed(GOOD[10:], 2) == []
    assert [frame.ts_ns for frame in framer.feed(GOOD, 3)] == [3]
    lines = LineFramer()
    assert lines.feed(b"one\ntw", 1) == [SerialFrame(1, b"one", SERIAL | TEXT | FIRST)]
    assert lines.flush() == [SerialFrame(1, b"tw", SERIAL | TEXT)]
    assert lines.feed(b"o\nx\n", 2) == [
        SerialFrame(2, b"o", SERIAL | TEXT | FIRST),
        SerialFrame(2, b"x", SERIAL | TEXT),
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\nb\r\nc\rd", [(b"a", TEXT | FIRST), (b"b", TEXT), (b"c", TEXT), (b"d", TEXT)]),
        (b"\n\r\n\r\r\n a \n", [(b" a ", TEXT)]),
        ("21 °C\n".encode(), [("21 °C".encode(), TEXT | FIRST)]),
        (b"21 \xb0C\na\0b\n", [(b"21 \xb0C", FIRST), (b"a\0b", 0)]),
        (b"x" * PAYLOAD_BYTES_MAX + b"\n", [(b"x" * PAYLOAD_BYTES_MAX, TEXT | FIRST)]),
        (b"x" * 9000 + b"\ny", [(b"x" * PAYLOAD_BYTES_MAX, TEXT | TRUNCATED | FIRST), (b"y", TEXT)]),
        (b"x" * 1784 + "°°".encode(), [(b"x" * 1784, TEXT | TRUNCATED | FIRST)]),
        (b"x" * 1784 + b"\xb0" * 9, [(b"x" * 1784 + b"\xb0", TRUNCATED | FIRST)]),
    ],
)
def test_lines(data: bytes, expected: list[tuple[bytes, int]]) -> None:
    """Line ends of all kinds, empty lines, bytes that are no text, lines that are too long, and which is the first."""
    for pieces in ([data], singly(data)):
        framer = LineFramer()
        assert [(f.payload, f.flags) for f in run(framer, pieces)] == [(p, SERIAL | flags) for p, flags in expected]
        assert balanced(framer)
        assert framer.counters["truncated_frames"] == sum(bool(flags & TRUNCATED) for _, flags in expected)


def test_a_framer_says_what_it_holds() -> None:
    """The representation tells how much of a frame has come."""
    for framer in (NmeaFramer(), LineFramer(), UbxFramer()):
        framer.feed(b"$GPG", 1)
        assert repr(framer).endswith("4 bytes held>")
