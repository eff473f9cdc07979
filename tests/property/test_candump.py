"""The candump parser: what each kind of line becomes, and that blocks, grouping and damage change nothing else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random

import can
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.model import Flag
from ingestd.sources.captures.candump import CandumpParser
from ingestd.sources.captures.candump_lines import LineFrame, parse_line
from ingestd.sources.captures.text import LINE_BYTES_MAX, LineError

DATA = Path(os.environ.get("INGESTD_TEST_DATA", str(Path(__file__).parents[3] / "shared" / "data")))
STAMP = 1436509052_249713000
FD, BRS, ESI = int(Flag.FD), int(Flag.BITRATE_SWITCH), int(Flag.ERROR_STATE)
EXTENDED, SENT = int(Flag.EXTENDED), int(Flag.TRANSMITTED)
AT = b"(1436509052.249713) "
LONG_NAME = b"an-interface-" + b"x" * 60
FD_LENGTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 32, 48, 64)


@dataclass
class Parsed:
    frames: list[LineFrame]
    damage: list[tuple[int, str]]


def parse(*blocks: bytes, rate: Fraction | None = None) -> Parsed:
    """All frames of the blocks as rows, whatever path through the parser they took."""
    result = Parsed([], [])
    parser = CandumpParser(lambda number, reason: result.damage.append((number, reason)), rate)
    for block in blocks:
        found = parser.parse(block)
        columns = found.frames
        assert columns.data.shape[1] % 8 == 0
        for row, length in enumerate(columns.length.tolist()):
            assert not columns.data[row, length:].any()
            interface = found.interfaces[found.interface[row]]
            payload = columns.data[row, :length].tobytes()
            identifier, flags = int(columns.arbitration_id[row]), int(columns.flags[row])
            result.frames.append(LineFrame(int(columns.ts_ns[row]), interface, identifier, flags, payload))
    return result


def both_paths(line: bytes) -> LineFrame:
    """The frame of a line, after checking that it is the same alone (careful path) and among its like (columns)."""
    alone, many = parse(line + b"\n"), parse((line + b"\n") * 40)
    assert alone.damage == many.damage == []
    assert many.frames == alone.frames * 40
    return alone.frames[0]


@pytest.mark.parametrize(
    ("line", "frame"),
    [
        (AT + b"can0 123#1122", (b"can0", 0x123, 0, b"\x11\x22")),
        (AT + b"can0 7ff#", (b"can0", 0x7FF, 0, b"")),
        (AT + b"can0 00000123#abCD", (b"can0", 0x123, EXTENDED, b"\xab\xcd")),
        (AT + b"slcan0 1FFFFFFF#0102030405060708", (b"slcan0", 0x1FFFFFFF, EXTENDED, bytes(range(1, 9)))),
        (AT + b"can0 123##0", (b"can0", 0x123, FD, b"")),
        (AT + b"can0 123##1AA", (b"can0", 0x123, FD | BRS, b"\xaa")),
        (AT + b"can0 12345678##2" + b"5A" * 64, (b"can0", 0x12345678, EXTENDED | FD | ESI, b"\x5a" * 64)),
        (AT + b"can0 123##f" + b"01" * 12, (b"can0", 0x123, FD | BRS | ESI, b"\x01" * 12)),
        (AT + b"can0 123#R", (b"can0", 0x123, Flag.REMOTE, b"")),
        (AT + b"can0 00000123#R8", (b"can0", 0x123, EXTENDED | Flag.REMOTE, b"")),
        (AT + b"can0 123#R8_9", (b"can0", 0x123, Flag.REMOTE, b"")),
        (AT + b"can0 20000080#0000000000000000", (b"can0", 0x80, Flag.ERROR, bytes(8))),
        (AT + b"can0 123#1122334455667788_9", (b"can0", 0x123, 0, bytes.fromhex("1122334455667788"))),
        (AT + b"can0 123#11 T", (b"can0", 0x123, SENT, b"\x11")),
        (AT + b"can0 123#11 R", (b"can0", 0x123, 0, b"\x11")),
        (AT + b"can0 123#R T", (b"can0", 0x123, Flag.REMOTE | SENT, b"")),
        (b"  (1436509052.249713)\t can0   123#1122  ", (b"can0", 0x123, 0, b"\x11\x22")),
        (AT + LONG_NAME + b" 123#11", (LONG_NAME, 0x123, 0, b"\x11")),
        (b" (1436509052.249713)  can0  123   [2]  11 22", (b"can0", 0x123, 0, b"\x11\x22")),
        (b" (1436509052.249713)  can0  TX B E  123  [02]  11 22", (b"can0", 0x123, SENT | FD | BRS | ESI, b"\x11\x22")),
        (b" (1436509052.249713)  can0  123   [8]  remote request", (b"can0", 0x123, Flag.REMOTE, b"")),
        (
            b" (1436509052.249713)  can0  20000080   [8]  00 00 00 00 00 00 00 00   ERRORFRAME",
            (b"can0", 0x80, Flag.ERROR, bytes(8)),
        ),
        (b" (1436509052.249713)  can0  123   [2]  41 42   'AB'", (b"can0", 0x123, 0, b"AB")),
        (b" (2015-07-10 06:17:32.249713)  can0  123   [1]  01", (b"can0", 0x123, 0, b"\x01")),
    ],
)
def test_each_format_of_a_line(line: bytes, frame: tuple[bytes, int, int, bytes]) -> None:
    """Every way candump writes a frame is read the same by both parsers."""
    assert both_paths(line) == LineFrame(STAMP, *frame)


@pytest.mark.parametrize(
    ("text", "ts_ns"),
    [
        (b"1436509052.249713", 1436509052249713000),
        (b"1436509052.1", 1436509052100000000),
        (b"1436509052.123456789", 1436509052123456789),
        (b"0.000000001", 1),
        (b"12.000100", 12000100000),
        (b"9223372036.854775807", 2**63 - 1),
    ],
)
def test_stamps_are_exact_integers(text: bytes, ts_ns: int) -> None:
    """One to nine decimals and any number of seconds int64 can hold give the exact nanosecond."""
    assert both_paths(b"(" + text + b") can0 123#00").ts_ns == ts_ns


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"rubbish", "not a candump line"),
        (b"(1436509052.249713) can0 123#112", "odd number"),
        (b"(1436509052.249713) can0 123#1g", "not hexadecimal"),
        (b"(1436509052.249713) can0 123#112233445566778899", "classic payload of 9 bytes"),
        (b"(1436509052.249713) can0 123##0" + b"00" * 65, "cannot have 65 bytes"),
        (b"(1436509052.249713) can0 123##0" + b"00" * 9, "cannot have 9 bytes"),
        (b"(1436509052.249713) can0 800#00", "out of range"),
        (b"(1436509052.249713) can0 40000000#00", "out of range"),
        (b"(1436509052.249713) can0 1234#00", "neither 3 nor 8"),
        (b"(1436509052.249713) can0 12g#00", "not hexadecimal"),
        (b"(9223372036.854775808) can0 123#00", "out of range"),
        (b"(9999999999.000000) can0 123#00", "out of range"),
        (b"(1436509052.2497131234) can0 123#00", "time stamp"),
        (b"(14365o9052.249713) can0 123#00", "time stamp"),
        (b"(2015-13-10 06:17:32.249713)  can0  123   [1]  01", "date"),
        (b"(1436509052.249713) can0 123##", "flags digit"),
        (b" can0  123   [3]  11 22", "fewer than 3"),
        (b" can0  123   [1]  11 22", "more than 1"),
        (b" can0  123   [2]  11 22", "no time stamp"),
        (b"x" * (LINE_BYTES_MAX + 1), "longer than"),
    ],
)
def test_bad_lines_are_damage_by_number(line: bytes, reason: str) -> None:
    """A bad line is named by its number and reason, and the good lines around it are read."""
    good = b"(1436509052.249713) can0 123#1122\n"
    for copies in (1, 30):
        parsed = parse(good * copies + line + b"\n" + good * copies)
        assert len(parsed.frames) == 2 * copies
        assert [number for number, _ in parsed.damage] == [copies + 1]
        assert reason in parsed.damage[0][1]
    many = parse((line + b"\n") * 30)
    assert [number for number, _ in many.damage] == list(range(1, 31))


def test_comments_blank_lines_line_ends_and_missing_newline() -> None:
    """What is not a frame is no damage, line numbers count it, and neither CRLF nor the end of the file matters."""
    line = b"(1436509052.249713) can0 123#1122"
    text = b"# comment with a #\r\n\r\n" + (line + b"\r\n") * 20 + b"  # another\n\n  \nrubbish\n" + line
    parsed = parse(text)
    assert parsed.frames == [LineFrame(STAMP, b"can0", 0x123, 0, b"\x11\x22")] * 21
    assert parsed.damage == [(26, "not a candump line")]


@pytest.mark.parametrize(
    "odd",
    [
        AT + b"can0 12345678\n#1\n",
        AT + b"can0 12345678 T\n#1\n",
        AT + b"can0 123 T\n#122\n",
        AT + b"can0 x 123#11\n",
        AT + b"can0123#11\n",
        AT + b"can0 1_2#11\n",
        AT + b"can0 123##11\n",
        b"#1122334455\n",
        b"[1436509052.249713) can0 123#11\n",
        b"(1436509052,249713) can0 123#11\n",
        b"(1436509052.24971:) can0 123#11\n",
        b"(14365090/2.249713) can0 123#11\n",
    ],
)
def test_what_only_resembles_a_frame_is_none(odd: bytes) -> None:
    """A line that differs from its good neighbours in one sign is no frame, and neither are they changed by it."""
    good = AT + b"can0 123#11\n"
    parsed = parse((good * 3 + odd) * 10 + good)
    assert parsed.frames == [LineFrame(STAMP, b"can0", 0x123, 0, b"\x11")] * 31
    assert len(parsed.damage) == (0 if odd.startswith(b"#") else 10)


def test_stamps_of_several_layouts_in_one_block() -> None:
    """The columns are for one layout and names of 15 bytes; lines with others are read all the same."""
    stamps = [b"1436509052.249713", b"1436509052.2497", b"999.999999", b"1000.000001", b"1436509052.249713001"]
    lines = [b"(%s) %s 123#%02X\n" % (stamp, name, n) for n, stamp in enumerate(stamps) for name in (b"c", b"y" * 16)]
    parsed = parse(*[b"".join(lines[n:] + lines[:n]) * 20 for n in range(len(lines))])
    alone = [parse(line).frames[0] for line in lines]
    assert parsed.frames == [frame for n in range(len(lines)) for frame in (alone[n:] + alone[:n]) * 20]
    assert parsed.damage == []


def test_old_format_and_its_preamble() -> None:
    """`<0x123> [2] 01 02` needs a rate; the preamble names the interface, and three digits mean a standard id."""
    text = b"interface = vcan7, family = 29, type = 3, proto = 1\n<0x18eeff01> [2] 05 a0 \n<0x123> [0] \n"
    assert [number for number, _ in parse(text).damage] == [2, 3]
    parsed = parse(text, rate=Fraction(3))
    assert parsed.frames == [
        LineFrame(0, b"vcan7", 0x18EEFF01, Flag.EXTENDED, b"\x05\xa0"),
        LineFrame(333_333_333, b"vcan7", 0x123, 0, b""),
    ]


def test_interfaces_are_numbered_by_first_line() -> None:
    """Interfaces come in the order of their first lines, though groups are parsed in another order."""
    lines = [b"(1.000000) can%d 123#%s\n" % (n % 7, b"00" * (n % 9)) for n in range(700)]
    parser = CandumpParser(lambda number, reason: pytest.fail(reason))
    found = parser.parse(b"(1.000000) z 123#R\n" + b"".join(lines))
    assert found.interfaces == (b"z", b"can0", b"can1", b"can2", b"can3", b"can4", b"can5", b"can6")
    assert found.interface.tolist() == [0] + [1 + n % 7 for n in range(700)]


def test_parse_line_gives_none_for_what_is_no_frame() -> None:
    """Blank lines, comments and the preamble are neither frames nor damage."""
    assert [parse_line(line) for line in (b"", b"  ", b"# x", b"interface = can0, family = 29")] == [None] * 4
    with pytest.raises(LineError, match="not a candump line"):
        parse_line(b"<0xzz> [1] 00")


NAMES = st.sampled_from(["can0", "can1", "vcan12", "slcan0", "x", "any-name.of:some+length"])


@st.composite
def frames(draw: st.DrawFn) -> tuple[bytes, LineFrame]:
    """A line as candump writes it and what it means."""
    decimals = draw(st.sampled_from([6, 6, 6, 1, 3, 9]))
    seconds = draw(st.integers(0, 9_223_372_035))
    fraction = draw(st.integers(0, 10**decimals - 1))
    name = draw(NAMES)
    kind = draw(st.sampled_from(["standard", "standard", "extended", "error"]))
    number = draw(st.integers(0, 0x7FF if kind == "standard" else 0x1FFFFFFF))
    flags = {"standard": 0, "extended": int(Flag.EXTENDED), "error": int(Flag.ERROR)}[kind]
    text = f"{number:03X}" if kind == "standard" else f"{number | (0x20000000 if kind == 'error' else 0):08X}"
    body = draw(st.sampled_from(["classic", "classic", "fd", "remote"]))
    payload = b""
    if body == "fd":
        payload = draw(st.sampled_from(FD_LENGTHS).flatmap(lambda n: st.binary(min_size=n, max_size=n)))
        bits = draw(st.integers(0, 3))
        flags |= Flag.FD | (Flag.BITRATE_SWITCH if bits & 1 else 0) | (Flag.ERROR_STATE if bits & 2 else 0)
        text += f"##{bits:X}{payload.hex().upper()}"
    elif body == "remote":
        flags |= Flag.REMOTE
        text += draw(st.sampled_from(["#R", "#R0", "#R8"]))
    else:
        payload = draw(st.binary(max_size=8))
        text += f"#{payload.hex()}"
    direction = draw(st.sampled_from(["", "", "", " R", " T"]))
    flags |= Flag.TRANSMITTED if direction == " T" else 0
    line = f"({seconds}.{fraction:0{decimals}d}) {name} {text}{direction}"
    ts_ns = seconds * 10**9 + fraction * 10 ** (9 - decimals)
    return line.encode(), LineFrame(ts_ns, name.encode(), number, int(flags), payload)


def cut(text: bytes, random: Random) -> list[bytes]:
    """Blocks of whole lines, cut at random."""
    lines, blocks = text.splitlines(keepends=True), []
    while lines:
        count = random.choice([1, 2, 5, 30, 200])
        blocks.append(b"".join(lines[:count]))
        del lines[:count]
    return blocks


@settings(max_examples=60, deadline=None)
@given(st.lists(frames(), min_size=1, max_size=25), st.integers(1, 40), st.randoms(use_true_random=False))
def test_formatted_lines_parse_to_what_was_formatted(
    pool: list[tuple[bytes, LineFrame]], repeats: int, random: Random
) -> None:
    """Random valid lines, in random order, quantity and blocks, give exactly the frames they were made from."""
    chosen = pool * repeats
    random.shuffle(chosen)
    parsed = parse(*cut(b"".join(line + b"\n" for line, _ in chosen), random))
    assert parsed.damage == []
    assert parsed.frames == [frame for _, frame in chosen]


@settings(max_examples=60, deadline=None)
@given(st.lists(frames(), min_size=1, max_size=10), st.randoms(use_true_random=False))
def test_corruption_stays_in_its_line(pool: list[tuple[bytes, LineFrame]], random: Random) -> None:
    """Random bytes written over a line never raise and never change what the other lines become."""
    chosen = [random.choice(pool) for _ in range(300)]
    lines = [bytearray(line) for line, _ in chosen]
    corrupted = set(random.sample(range(len(lines)), 40))
    for row in corrupted:
        for _ in range(random.randint(1, 4)):
            byte = random.choice([random.randrange(256), *b"#()[]. RT_0g\0\xff"])
            lines[row][random.randrange(len(lines[row]))] = byte if byte not in b"\n" else 0
    parsed = parse(*cut(b"".join(bytes(line) + b"\n" for line in lines), random))
    careful = []
    for row, line in enumerate(lines):
        try:
            frame = parse_line(bytes(line))
        except LineError:
            assert row in corrupted
            continue
        if row not in corrupted:
            assert frame == chosen[row][1]
        if frame is not None and frame.ts_ns is not None:
            careful.append(frame)
    assert parsed.frames == careful  # The columnar parser accepts what the careful one does, and nothing else.


@pytest.mark.parametrize("seed", range(5))
def test_rubbish_never_raises(seed: int) -> None:
    """Random bytes, with and without line ends, give no frame and one damage per line at most."""
    rubbish = Random(seed).randbytes(100_000)
    parsed = parse(rubbish, bytes(1000), b"\n" * 100, b"#\n(\n)\n##\n[\n")
    assert parsed.frames == []
    assert len(parsed.damage) <= rubbish.count(b"\n") + 10


@pytest.mark.parametrize(
    "name",
    [
        "can/subaru.log",
        "can/icsim_sample.log",
        "can/formats/mdf4conv_multiple_can.log",
        "can/derived/truck_j1939_gps.log",
    ],
)
def test_equals_python_can(name: str) -> None:
    """Real captures read frame by frame like python-can's reader reads them."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no test data at {DATA}; set INGESTD_TEST_DATA")
    found = CandumpParser(lambda number, reason: pytest.fail(f"{number}: {reason}")).parse(path.read_bytes())
    columns = found.frames
    messages = list(can.CanutilsLogReader(path))
    assert len(messages) == len(columns.ts_ns)
    stamps = np.array([round(message.timestamp * 1e6) * 1000 for message in messages])
    assert np.array_equal(stamps, columns.ts_ns)
    assert [message.arbitration_id for message in messages] == columns.arbitration_id.tolist()
    assert [message.is_extended_id for message in messages] == ((columns.flags & Flag.EXTENDED) != 0).tolist()
    assert [message.is_fd for message in messages] == ((columns.flags & Flag.FD) != 0).tolist()
    rows = zip(columns.data, columns.length.tolist(), strict=True)
    assert [bytes(message.data) for message in messages] == [data[:length].tobytes() for data, length in rows]
    assert [message.channel for message in messages] == [found.interfaces[i].decode() for i in found.interface]
