"""Capture files of every kind: what they are found to be, their frames, their clocks, and what damage costs."""

from __future__ import annotations

import gzip
import math
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import can
import numpy as np
import pytest

from ingestd.errors import CaptureError, UsageError
from ingestd.model import ClockState, Flag
from ingestd.sources.captures import Capture, CaptureBatch, open_capture
from ingestd.sources.captures.base import SOURCES_MAX, Options
from ingestd.sources.captures.candump import CandumpCapture

DATA = Path(os.environ.get("INGESTD_TEST_DATA", str(Path(__file__).parents[3] / "shared" / "data")))
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no test data at {DATA}; set INGESTD_TEST_DATA")
Row = tuple[int, str, int, int, bytes]  # stamp with offset, source, id, flags, payload
Write = Callable[[str, str | bytes], Path]

# Frames and flags as in the data README's table; there `frames` leaves the error frames out.
EXPECTED = {
    "subaru.log": ("candump", 82558, 35, {}),
    "icsim_sample.log": ("candump", 6158, 34, {}),
    "boat_candump_l_with_comments.txt": ("candump", 2368, 33, {}),
    "boat_candump_old_format.txt": ("candump", 6026, 28, {}),
    "boat_garmin_pcan.trc": ("trc", 12274, 52, {}),
    "truck_j1939_gps.mf4": ("mf4", 57849, 54, {}),
    "car_obd2_gps_part1.mf4": ("mf4", 65296, 11, {}),
    "car_obd2_gps_part5.mf4": ("mf4", 5477, 11, {}),
    "boat_nmea2000_gps.mf4": ("mf4", 84730, 89, {}),
    "truck_j1939_tp.mf4": ("mf4", 1815, 16, {}),
    "kona_ev_uds.mf4": ("mf4", 2010, 2, {}),
    "formats/pycan_logfile.asc": ("asc", 20, 8, {Flag.ERROR: 4, Flag.REMOTE: 4, Flag.FD: 4}),
    "formats/pycan_logfile_errorframes.asc": ("asc", 12, 4, {Flag.ERROR: 3, Flag.REMOTE: 2}),
    "formats/pycan_issue_1256.asc": ("asc", 1457, 6, {}),
    "formats/pycan_test_CanFdMessage64.asc": ("asc", 2, 2, {Flag.FD: 2}),
    "formats/pycan_test_CanMessage.asc": ("asc", 2, 2, {}),
    "formats/pycan_test_CanRemoteMessage.asc": ("asc", 3, 3, {Flag.REMOTE: 3}),
    "formats/pycan_test_CanMessage.blf": ("blf", 2, 1, {}),
    "formats/pycan_test_CanFdMessage64.blf": ("blf", 2, 1, {Flag.REMOTE: 2, Flag.FD: 2}),
    "formats/pycan_test_CanErrorFrameExt.blf": ("blf", 2, 0, {Flag.ERROR: 2}),
    "formats/pycan_test_CanMessage_V1_0_BUS1.trc": ("trc", 11, 3, {Flag.REMOTE: 1}),
    "formats/pycan_test_CanMessage_V1_1.trc": ("trc", 11, 3, {Flag.REMOTE: 1}),
    "formats/pycan_test_CanMessage_V2_1.trc": ("trc", 11, 3, {Flag.REMOTE: 1}),
    "formats/mdf4conv_multiple_can.asc": ("asc", 164, 2, {Flag.FD: 56}),
    "formats/mdf4conv_multiple_can.csv": ("csv", 164, 2, {Flag.FD: 128}),
    "formats/mdf4conv_multiple_can.trc": ("trc", 164, 2, {Flag.FD: 128}),
    "formats/mdf4conv_multiple_can.log": ("candump", 164, 2, {Flag.FD: 128}),
    "formats/vblf_CanMessage2.blf": ("blf", 2, 1, {}),
    "formats/vblf_CanFdMessage.blf": ("blf", 2, 1, {Flag.FD: 2}),
    # The README counts what python-can reads; its objects are two error frames (type 104), which python-can skips.
    "formats/vblf_CanFdErrorFrame64.blf": ("blf", 2, 0, {Flag.ERROR: 2}),
    "formats/vblf_J1708Message.blf": ("blf", 0, 0, {}),
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file and give its path."""

    def write_(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_


def rows(capture: Capture, frames_max: int = 64_000) -> list[Row]:
    """Every frame as a tuple, with its time in UTC."""
    return [row for batch in capture.batches(frames_max) for row in batch_rows(batch, capture.utc_offset_ns)]


def batch_rows(batch: CaptureBatch, offset_ns: int = 0) -> Iterator[Row]:
    frames = batch.frames
    for i, length in enumerate(frames.length.tolist()):
        source = batch.sources[batch.source_index[i]]
        payload = frames.data[i, :length].tobytes()
        yield int(frames.ts_ns[i]) + offset_ns, source, int(frames.arbitration_id[i]), int(frames.flags[i]), payload


LOG = "(1436509052.249713) can0 123#1122\n(1436509053.249713) can1 124#33\n(1436509054.249713) can0 123#44\n"
ASC = """date Sat Sep 30 03:06:13.191 PM 2017
base hex  timestamps absolute
internal events logged
   0.000000 Start of measurement
   0.015991 CAN 1 Status:chip status error active
   1.000001 1  123             Rx   d 2 11 22  Length = 0
   1.500000 2  18EBFF00x       Tx   d 1 33
   2.000000 CANFD   3 Rx        4EE                   1 0 9 12 01 02 03 04 05 06 07 08 09 0A 0B 0C
   3.000000 1 ErrorFrame
"""
ASC_START = 1506783973_191000000  # 2017-09-30T15:06:13.191Z
TRC = """;$FILEVERSION=1.1
;$STARTTIME=44548.6028595139
;---+--   ----+----  --+--  ----+---  +  -+ --
     1)     17535.4  Tx     00000100  2  01 02
     2)     17540.3  Warng  FFFFFFFF  4  00 00 00 08  BUSHEAVY
     3)     17700.3  Rx         0123  1  03
"""
CSV = """timestamp,arbitration_id,extended,remote,error,dlc,data
1483389946.197,0xdadada,1,0,0,2,ESI=
1483389947.5,0x123,0,1,0,8,
1483389948.000001,0x0,0,0,1,0,
"""


# What a file is.


@pytest.mark.parametrize(("text", "kind"), [(LOG, "candump"), (ASC, "asc"), (TRC, "trc"), (CSV, "csv")])
@pytest.mark.parametrize("name", ["capture", "capture.txt", "capture.blf", "capture.csv"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_content_says_what_a_file_is(write: Write, text: str, kind: str, name: str, packed: bool) -> None:
    """A text capture is recognised whatever its name is, also gzipped, and gives the same frames."""
    path = write(name, gzip.compress(text.encode()) if packed else text)
    capture = open_capture(path)
    assert capture.kind == kind
    assert capture.size_bytes == path.stat().st_size
    found = rows(capture)
    assert found == rows(open_capture(write("plain", text)))
    assert capture.damage.count == 0
    assert found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.log", b"", "is empty"),
        ("photo.jpg", b"\xff\xd8\xff\xe0" + bytes(range(256)), "not a capture of a known kind"),
        ("letter.txt", b"Dear Sir,\n", "not a capture of a known kind"),
        ("rubbish.log", b"rubbish\nmore\n", "holds no frame .* line 1: not a candump line"),
        ("nul.log", bytes(100_000), "holds no frame"),
        ("rubbish.asc", b"rubbish\n", "holds no frame"),
        ("rubbish.trc", b"rubbish\n", "holds no frame"),
        ("rubbish.csv", b"a,b\n", "holds no frame"),
        ("rubbish.blf", b"rubbish\n", "not a BLF file"),
        ("cut.blf", b"LOGG", "not a BLF file"),
        ("rubbish.mf4", b"MDF     4.10    " + bytes(range(256)) * 10, "damaged or not an MF4 file"),
        ("broken.gz", b"\x1f\x8bxxxx", "not a capture of a known kind"),
        ("old.trc", b";$FILEVERSION=3.0\n;$STARTTIME=1\n1 2 3\n", "version 3.0"),
    ],
)
def test_what_is_no_capture_is_refused(write: Write, name: str, content: bytes, message: str) -> None:
    """Anything else is a CaptureError that names the file and hints at what would do."""
    with pytest.raises(CaptureError, match=message) as caught:
        open_capture(write(name, content))
    assert name in str(caught.value)
    assert caught.value.hint


def test_missing_files_and_directories_are_refused(tmp_path: Path) -> None:
    """A path that leads to no file is a clear error, too."""
    with pytest.raises(CaptureError, match="cannot be read: No such file"):
        open_capture(tmp_path / "missing.log")
    with pytest.raises(CaptureError, match="is a directory"):
        open_capture(tmp_path)


def test_mf4_without_asammdf_says_what_to_install(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optional dependency is named, with the command that installs it."""
    monkeypatch.setitem(__import__("sys").modules, "asammdf", None)
    with pytest.raises(CaptureError, match=r"ingestd\[mf4\]"):
        open_capture(write("a.mf4", b"MDF     4.10    " + bytes(1000)))


def test_a_format_is_imported_when_a_file_of_it_is_opened(write: Write) -> None:
    """Neither the package nor candump costs the time that python-can, asammdf and pandas take to import."""
    code = (
        "import sys; from ingestd.sources.captures import open_capture; open_capture(sys.argv[1]); "
        "sys.exit(' '.join({'can', 'asammdf', 'pandas'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code, write("a.log", LOG)], check=True, cwd=Path(__file__).parents[2])


# Batches.


def test_batches_have_fixed_boundaries(write: Write) -> None:
    """All batches but the last are full, whatever the blocks were, and reading again starts anew."""
    path = write("a.log", "".join(f"({n}.000000) can{n % 3} 123#{'00' * (n % 9)}\n" for n in range(1, 1001)))
    options = Options({}, None, ZoneInfo("UTC"))
    reference = rows(open_capture(path))
    assert len(reference) == 1000
    for block_bytes in (1, 7, 33, 1000, 1 << 20):
        capture = CandumpCapture(path, options, block_bytes)
        for _ in range(2):
            batches = list(capture.batches(64))
            assert [len(batch) for batch in batches] == [64] * 15 + [40]
            assert [row for batch in batches for row in batch_rows(batch)] == reference
            assert batches[-1].bytes_read == path.stat().st_size
    with pytest.raises(ValueError, match="at least one frame"):
        next(open_capture(path).batches(0))


def test_sources_are_those_seen_so_far(write: Write) -> None:
    """`sources` grows with the frames, not with the blocks, and by_source keeps the wire order of each."""
    batches = list(open_capture(write("a.log", LOG)).batches(1))
    assert [batch.sources for batch in batches] == [("can0",), ("can0", "can1"), ("can0", "can1")]
    assert [batch.frames.source for batch in batches] == [""] * 3
    (batch,) = open_capture(write("a.log", LOG)).batches()
    parts = batch.by_source()
    assert [(part.source, part.ts_ns.tolist()) for part in parts] == [
        ("can0", [1436509052249713000, 1436509054249713000]),
        ("can1", [1436509053249713000]),
    ]
    assert [part.source for part in batch[1:2].by_source()] == ["can1"]
    assert batch[3:].by_source() == []
    assert batches[0].by_source()[0].data is batches[0].frames.data


def test_sources_can_be_renamed(write: Write) -> None:
    """`--map` renames interfaces, and may make one source of two."""
    capture = open_capture(write("a.log", LOG), source_names={"can0": "powertrain", "can1": "powertrain"})
    (batch,) = capture.batches()
    assert batch.sources == ("powertrain",)
    assert batch.source_index.tolist() == [0, 0, 0]


def test_more_sources_than_an_index_can_tell_apart_are_refused(write: Write) -> None:
    """Source indices have 16 bits; a file with more names than that is no capture."""
    path = write("a.log", "".join(f"(1.0) c{n} 123#\n" for n in range(SOURCES_MAX + 1)))
    with pytest.raises(CaptureError, match="more than 65535 sources"):
        rows(open_capture(path))


def test_width_follows_the_longest_payload_of_the_batch(write: Write) -> None:
    """A batch is 8 bytes wide unless it needs more, then a multiple of 8."""
    text = "(1.0) a 123#00\n(2.0) a 123##0" + "11" * 20 + "\n(3.0) a 123#00\n"
    assert [batch.frames.data.shape for batch in open_capture(write("a.log", text)).batches(1)] == [
        (1, 8),
        (1, 24),
        (1, 8),
    ]
    assert all(batch.frames.data.flags.c_contiguous for batch in open_capture(write("a.log", text)).batches(2))


# Clocks.


def test_candump_stamps_are_absolute_or_relative(write: Write) -> None:
    """Stamps of our time are the time itself; small ones count from nobody knows when."""
    capture = open_capture(write("a.log", LOG))
    assert (capture.utc_offset_ns, capture.clock_state) == (0, ClockState.SET)
    assert next(capture.batches()).frames.ts_ns[0] == 1436509052249713000
    capture = open_capture(write("b.log", "(000.249713) can0 123#00\n"))
    assert (capture.utc_offset_ns, capture.clock_state) == (0, ClockState.UNSET)


def test_captures_without_stamps_need_a_rate(write: Write) -> None:
    """Without stamps a capture is refused; with a rate the ordinal gives the time in integers."""
    path = write("a.txt", "# old\n<0x123> [1] 01\n<0x123> [1] 02\n  can7  123   [1]  03\n")
    with pytest.raises(CaptureError, match="--rate"):
        open_capture(path)
    capture = open_capture(path, rate=3)
    assert capture.clock_state == ClockState.UNSET
    assert [(row[0], row[1]) for row in rows(capture)] == [(0, "can0"), (333_333_333, "can0"), (666_666_667, "can7")]
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError):
            open_capture(path, rate=rate)
    assert rows(open_capture(write("b.log", LOG), rate=3))[0][0] == 1436509052249713000


def test_asc_frames_and_clock(write: Write) -> None:
    """Stamps stay relative, the header's date is in the zone given, and every kind of frame is read."""
    capture = open_capture(write("a.asc", ASC))
    assert (capture.utc_offset_ns, capture.clock_state) == (ASC_START, ClockState.SET)
    assert rows(capture) == [
        (ASC_START + 1_000001000, "can0", 0x123, 0, b"\x11\x22"),
        (ASC_START + 1_500000000, "can1", 0x18EBFF00, Flag.EXTENDED | Flag.TRANSMITTED, b"\x33"),
        (ASC_START + 2_000000000, "can2", 0x4EE, Flag.FD | Flag.BITRATE_SWITCH, bytes(range(1, 13))),
        (ASC_START + 3_000000000, "can0", 0, Flag.ERROR, b""),
    ]
    assert next(capture.batches()).frames.ts_ns[0] == 1_000001000
    berlin = open_capture(write("a.asc", ASC), timezone=ZoneInfo("Europe/Berlin"))
    assert berlin.utc_offset_ns == ASC_START - 2 * 3600 * 10**9


@pytest.mark.parametrize(
    ("date", "utc"),
    [
        ("Sam Sep 30 15:06:13.191 2017", ASC_START),
        ("Sat Sep 30 03:06:13 pm 2017", ASC_START - 191_000_000),
        ("Mit Mär 1 00:00:00 2017", 1488326400_000000000),
        ("Mit Dez 6 12:00:00 AM 2017", 1512518400_000000000),
        ("Sat Foo 30 15:06:13.191 2017", None),
        ("Sat Sep 31 15:06:13.191 2017", None),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_asc_dates(write: Write, date: str, utc: int | None, encoding: str) -> None:
    """12 and 24 hours, English and German; a date that is none leaves the clock unset."""
    text = f"date {date}\nbase hex  timestamps absolute\n 1.0 1 123 Rx d 0\n"
    capture = open_capture(write("a.asc", text.encode(encoding)))
    assert capture.utc_offset_ns == (utc or 0)
    assert capture.clock_state == (ClockState.UNSET if utc is None else ClockState.SET)
    assert len(rows(capture)) == 1


def test_asc_trigger_blocks(write: Write) -> None:
    """The trigger block's date wins over the header's, and a later block moves its frames."""
    text = ASC.replace("   0.000000 Start", "Begin Triggerblock Sat Sep 30 04:06:13.191 PM 2017\n   0.000000 Start")
    text += "End TriggerBlock\nBegin Triggerblock Sat Sep 30 05:06:13.191 PM 2017\n 1.0 1 123 Rx d 0\n"
    capture = open_capture(write("a.asc", text))
    assert capture.utc_offset_ns == ASC_START + 3600 * 10**9
    found = rows(capture)
    assert found[0][0] == ASC_START + 3600 * 10**9 + 1_000001000
    assert found[-1][0] == ASC_START + 7200 * 10**9 + 1_000000000


def test_asc_relative_stamps_accumulate(write: Write) -> None:
    """With `timestamps relative` each stamp counts from the line before, frame or not."""
    capture = open_capture(write("a.asc", ASC.replace("absolute", "relative")))
    assert [row[0] - ASC_START for row in rows(capture)] == [1_015992000, 2_515992000, 4_515992000, 7_515992000]


def test_asc_without_header_keeps_its_first_frame(write: Write) -> None:
    """python-can drops the first line when `internal events logged` is missing; we do not."""
    assert len(rows(open_capture(write("a.asc", " 1.0 1 123 Rx d 1 00\n 2.0 1 123 Rx d 1 01\n")))) == 2


@pytest.mark.parametrize("base", ["base dec timestamps absolute", "Base DEC Timestamps Absolute"])
def test_asc_decimal_base(write: Write, base: str) -> None:
    """`base dec` makes ids and bytes decimal, however it is spelled."""
    text = f"{base}\n 1.0 1 100 Rx d 2 10 255\n"
    assert rows(open_capture(write("a.asc", text))) == [(1_000000000, "can0", 100, 0, b"\x0a\xff")]


def test_trc_frames_and_clock(write: Write) -> None:
    """STARTTIME counts days since 1899-12-30 in the zone given; bus 1 is can0; warnings are no frames."""
    capture = open_capture(write("a.trc", TRC))
    assert (capture.utc_offset_ns, capture.clock_state) == (1639837687_062001000, ClockState.SET)  # 14:28:07.062 Z
    assert [(row[0] - capture.utc_offset_ns, *row[1:]) for row in rows(capture)] == [
        (17_535400000, "can0", 0x100, Flag.EXTENDED | Flag.TRANSMITTED, b"\x01\x02"),
        (17_700300000, "can0", 0x123, 0, b"\x03"),
    ]
    tokyo = open_capture(write("a.trc", TRC), timezone=ZoneInfo("Asia/Tokyo"))
    assert capture.utc_offset_ns - tokyo.utc_offset_ns == 9 * 3600 * 10**9


@pytest.mark.parametrize(
    ("comment", "utc"),
    [
        (";   Start time: 18.12.2021 14:28:07.062", 1639837687_062000000),
        (";   Start time: 2021-12-18 14:28:07.062.5", 1639837687_062005000),
        (";   Start time: 12/18/2021 2:28:07 PM", 1639837687_000000000),
        (";   Start time: yesterday", None),
        (";$STARTTIME=rubbish", None),
        (";$STARTTIME=1e999999", None),
        (";$STARTTIME=nan", None),
    ],
)
def test_trc_start_comment(write: Write, comment: str, utc: int | None) -> None:
    """Version 1.0 has its date in a comment only; without one the clock is unset."""
    capture = open_capture(write("a.trc", comment + "\n     1)     17535  00000100  1  00\n"))
    assert capture.utc_offset_ns == (utc or 0)
    assert capture.clock_state == (ClockState.UNSET if utc is None else ClockState.SET)


def test_trc_error_frames(write: Write) -> None:
    """Error frames are kept, though python-can skips them."""
    text = ";$FILEVERSION=2.1\n;$STARTTIME=44548.5\n;$COLUMNS=N,O,T,B,I,d,R,L,D\n 1 17.5 ER 2 - Rx - 5 04 00 02 00 00\n"
    assert [row[1:] for row in rows(open_capture(write("a.trc", text)))] == [("can1", 0, Flag.ERROR, b"")]


def test_csv_of_python_can(write: Write) -> None:
    """Stamps are absolute, payloads base64, and there is one source."""
    capture = open_capture(write("a.csv", CSV))
    assert (capture.utc_offset_ns, capture.clock_state) == (0, ClockState.SET)
    assert rows(capture) == [
        (1483389946_197000000, "can0", 0xDADADA, Flag.EXTENDED, b"\x11\x22"),
        (1483389947_500000000, "can0", 0x123, Flag.REMOTE, b""),
        (1483389948_000001000, "can0", 0, Flag.ERROR, b""),
    ]


# Damage.


@pytest.mark.parametrize(
    ("name", "text", "bad"),
    [
        ("a.log", LOG, "(1436509052.249713) can0 123#112"),
        ("a.asc", ASC, "   1.5 1  123  Rx   d 3 11"),
        ("a.asc", ASC, "   1.5 1  123  Rx   d 2 11 zz"),
        ("a.asc", ASC, "   1.5 1  123  "),
        ("a.asc", ASC, "   1.5 1  FFFF Rx d 0"),
        ("a.asc", ASC, "   1.5 CANFD  1 Rx 123 1 0 9 12 01 02"),
        ("a.asc", ASC, "rubbish"),
        ("a.trc", TRC, "     3)     17700.3  Rx         0123  4  03"),
        ("a.trc", TRC, "     3)     xx  Rx         0123  1  03"),
        ("a.trc", TRC, "     3)     17"),
        ("a.trc", TRC, "rubbish"),
        ("a.csv", CSV, "1483389946.197,0xdadada,1,0"),
        ("a.csv", CSV, "1483389946.197,0xdadada,1,0,0,2,!!!"),
        ("a.csv", CSV, "x,0xdadada,1,0,0,2,ESI="),
        ("a.csv", CSV, "1483389946.197,0xdadada,1,0,0,3,ESI="),
        ("a.csv", CSV, "1e999500,0x1,0,0,0,1,EQ=="),
        ("a.csv", CSV, "-1e999500,0x1,0,0,0,1,EQ=="),
        ("a.csv", CSV, "nan,0x1,0,0,0,1,EQ=="),
        ("a.csv", CSV, "\x00" * 100_000),
    ],
)
def test_a_bad_line_is_named_and_reading_goes_on(write: Write, name: str, text: str, bad: str) -> None:
    """One bad line costs itself: it is counted and named by its number, the rest is read as before."""
    lines = text.splitlines(keepends=True)
    reference = rows(open_capture(write("good", text)))
    capture = open_capture(write(name, "".join([*lines[:-1], bad + "\n", lines[-1]])))
    assert capture.damage.count == 0
    for _ in range(2):
        assert rows(capture) == reference
        assert capture.damage.count == 1
        assert capture.damage.first[0].startswith(f"line {len(lines)}: ")


def test_only_the_first_damages_are_described(write: Write) -> None:
    """All bad lines are counted, five are described."""
    capture = open_capture(write("a.log", LOG + "rubbish\n" * 1000))
    assert len(rows(capture)) == 3
    assert capture.damage.count == 1000
    assert capture.damage.first == [f"line {n}: not a candump line" for n in range(4, 9)]


def test_rubbish_without_line_ends_is_one_damage(write: Write) -> None:
    """Megabytes without a line end are dropped as they are read, and the line after them is good."""
    capture = open_capture(write("a.log", LOG.encode() + b"x" * (5 << 20) + b"\n" + LOG.encode()))
    assert len(rows(capture)) == 6
    assert capture.damage.first == ["line 4: longer than 4096 bytes"]


def test_a_cut_gzip_gives_what_is_there(write: Write) -> None:
    """Everything before the cut is read, the cut is one damage; several gzip members are one file."""
    text = "".join(f"({n}.{n:06d}) can0 123#{n:08X}\n" for n in range(20_000)).encode()
    packed = gzip.compress(text)
    capture = open_capture(write("a.log.gz", packed[: len(packed) // 2]))
    count = len(rows(capture))
    assert 5_000 < count < 15_000
    assert any("cut off" in description for description in capture.damage.first)
    assert rows(open_capture(write("b.gz", packed + packed)))[20_000:] == rows(open_capture(write("c.log", text)))


# BLF.


def write_blf(path: Path, count: int, **kwargs: object) -> list[can.Message]:
    random = Random(7)
    messages = []
    for n in range(count):
        fd = n % 5 == 4
        payload = random.randbytes(random.choice([12, 64, 3]) if fd else n % 9)
        messages.append(
            can.Message(
                timestamp=1_600_000_000 + n * 1e-3,
                arbitration_id=random.randrange(0x800),
                is_extended_id=n % 3 == 0,
                is_remote_frame=n % 7 == 6 and not fd,
                is_error_frame=n % 50 == 49,
                is_fd=fd,
                bitrate_switch=fd and n % 2 == 0,
                is_rx=n % 4 != 0,
                channel=n % 3,
                dlc=len(payload),
                data=b"" if n % 7 == 6 and not fd else payload,
            )
        )
    with can.BLFWriter(path, **kwargs) as writer:
        for message in messages:
            writer.on_message_received(message)
    return messages


def test_blf_equals_python_can(tmp_path: Path) -> None:
    """Every column of every kind of object equals what python-can's reader gives."""
    path = tmp_path / "a.blf"
    write_blf(path, 20_000)
    capture = open_capture(path)
    found = rows(capture)
    assert capture.clock_state == ClockState.SET
    assert capture.damage.count == 0
    assert len(found) == 20_000
    for row, message in zip(found, can.BLFReader(path), strict=True):
        flags = row[3]
        assert abs(row[0] - round(message.timestamp * 1e6) * 1000) <= 1000
        assert row[1:3] == (f"can{message.channel}", message.arbitration_id)
        assert bool(flags & Flag.ERROR) == message.is_error_frame
        assert bool(flags & Flag.REMOTE) == message.is_remote_frame
        assert bool(flags & Flag.FD) == message.is_fd
        assert bool(flags & Flag.BITRATE_SWITCH) == message.bitrate_switch
        assert bool(flags & Flag.EXTENDED) == message.is_extended_id
        assert bool(flags & Flag.TRANSMITTED) == (not message.is_rx)
        assert row[4] == bytes(message.data)


def blf(*objects: bytes, date: tuple[int, ...] = (2020, 9, 0, 13, 12, 26, 40, 0)) -> bytes:
    return struct.pack("<4sL32x8H", b"LOGG", 144, *date).ljust(144, b"\0") + b"".join(objects)


def blf_object(stamp: int, flags: int, identifier: int = 0x123) -> bytes:
    head = struct.pack("<4sHHLLLHHQ", b"LOBJ", 32, 1, 48, 1, flags, 0, 0, stamp)
    return head + struct.pack("<HBBL8s", 1, 0, 2, identifier, b"\x11\x22")


def blf_container(data: bytes) -> bytes:
    packed = zlib.compress(data)
    head = struct.pack("<4sHHLLH6xL4x", b"LOBJ", 16, 1, 32 + len(packed), 10, 2, len(data))
    return head + packed + bytes(len(packed) % 4)


def test_blf_stamps_are_exact(write: Write) -> None:
    """Stamps in 10 µs and in nanoseconds are exact; a header without date leaves the clock unset."""
    path = write("a.blf", blf(blf_container(blf_object(123, 1) + blf_object(1_234_567_891, 2))))
    assert [row[0] for row in rows(open_capture(path))] == [1_600_000_000_001_230_000, 1_600_000_001_234_567_891]
    unset = open_capture(write("b.blf", blf(blf_object(5, 2), date=(0,) * 8)))
    assert (unset.clock_state, [row[0] for row in rows(unset)]) == (ClockState.UNSET, [5])


def test_blf_damage_costs_itself(write: Write) -> None:
    """A broken container, a broken object and rubbish between them are counted; the other frames are all there."""
    good = [blf_container(b"".join(blf_object(100 * k + n, 2) for n in range(100))) for k in range(3)]
    broken = bytearray(good[1])
    broken[60:64] = b"XXXX"
    capture = open_capture(write("a.blf", blf(good[0], bytes(broken), good[2])))
    assert [row[0] % 1000 for row in rows(capture)] == [*range(100), *range(200, 300)]
    assert capture.damage.count == 1
    assert capture.damage.first[0].startswith(f"offset {144 + len(good[0])}: the container cannot be unpacked")

    capture = open_capture(write("b.blf", blf(good[0], b"rubbish" * 1000, good[2])))
    assert len(rows(capture)) == 200
    assert capture.damage.count == 1

    objects = bytearray(b"".join(blf_object(n, 2) for n in range(100)))
    struct.pack_into("<L", objects, 48 * 50 + 8, 0)  # A size of 0 makes python-can repeat the frame for ever.
    capture = open_capture(write("c.blf", blf(blf_container(bytes(objects)))))
    assert len(rows(capture)) == 99
    assert capture.damage.count >= 1


def test_blf_signature_in_the_header_of_a_damaged_object(write: Write) -> None:
    """An object that begins where the header of the one before it should still be: damage, and reading goes on."""
    capture = open_capture(write("a.blf", blf(b"LOBJ" + b"\xff" * 4 + b"LOBJ" + b"\xff" * 20, blf_object(7, 2))))
    assert [row[0] - capture.utc_offset_ns for row in rows(capture)] == [7]
    assert capture.damage.count > 0


def test_a_cut_blf_gives_all_whole_frames(tmp_path: Path) -> None:
    """Cut anywhere, a BLF gives a prefix of its frames and one damage at most."""
    path, cut_path = tmp_path / "a.blf", tmp_path / "cut.blf"
    write_blf(path, 3_000, max_container_size=16 * 1024)
    reference, content, counts = rows(open_capture(path)), path.read_bytes(), []
    for size in range(400, len(content), len(content) // 37):
        cut_path.write_bytes(content[:size])
        try:
            capture = open_capture(cut_path)
        except CaptureError:
            continue
        found = rows(capture)
        assert found == reference[: len(found)]
        assert capture.damage.count == 1
        counts.append(len(found))
    assert counts == sorted(counts)
    assert counts[-1] > 2_500


# Real files.


@needs_data
def test_every_capture_of_the_data_set_is_expected() -> None:
    """The table above leaves out no file."""
    found = {str(path.relative_to(DATA / "can")) for path in (DATA / "can").rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("derived")} == set(EXPECTED)


@needs_data
@pytest.mark.parametrize("name", EXPECTED)
def test_real_captures(name: str) -> None:
    """Kind, frames, ids and flags are those of the data set's table, and there is no damage."""
    kind, count, ids_count, flags = EXPECTED[name]
    capture = open_capture(DATA / "can" / name, rate=100 if "old_format" in name else None)
    found = rows(capture, 1000)
    assert (capture.kind, len(found), capture.damage.count) == (kind, count, 0)
    assert len({(row[2], row[3] & Flag.EXTENDED) for row in found if not row[3] & Flag.ERROR}) == ids_count
    tally = Counter(flag for row in found for flag in (Flag.ERROR, Flag.REMOTE, Flag.FD) if row[3] & flag)
    assert dict(tally) == flags


@needs_data
def test_four_formats_of_the_same_traffic() -> None:
    """The same frames in four formats are the same rows, but for what a format cannot say or its converter got wrong.

    The TRC's date is a day early. The ASC writes CAN FD frames as classic ones: no flags, FD known by length alone.
    """
    reference, csv, asc, trc = (
        rows(open_capture(DATA / "can" / "formats" / f"mdf4conv_multiple_can.{kind}"))
        for kind in ("log", "csv", "asc", "trc")
    )
    assert csv == reference
    fd_only = ~int(Flag.FD | Flag.BITRATE_SWITCH)
    assert [(*row[:3], row[3] & fd_only, row[4]) for row in asc] == [
        (*row[:3], row[3] & fd_only, row[4]) for row in reference
    ]
    assert [row[1:] for row in trc] == [row[1:] for row in reference]
    lag = {round((row[0] - other[0]) / 1e5) for row, other in zip(reference, trc, strict=True)}
    assert lag == {864_000_000}


@needs_data
@pytest.mark.parametrize(
    "name", ["boat_nmea2000_gps", "car_obd2_gps_part1", "kona_ev_uds", "truck_j1939_gps", "truck_j1939_tp"]
)
def test_mf4_equals_derived_text(name: str) -> None:
    """MF4 gives the frames, stamps, payloads and sources of the texts made from it, in their order."""
    mf4 = rows(open_capture(DATA / "can" / f"{name}.mf4"))
    assert mf4 == rows(open_capture(DATA / "can" / "derived" / f"{name}.log"))


@needs_data
@pytest.mark.parametrize("name", [name for name in EXPECTED if not name.endswith((".log", "txt"))])
def test_corrupted_files_never_raise_anything_else(name: str, tmp_path: Path) -> None:
    """Random bytes changed, or the end cut off: frames and damage, or a CaptureError, never another exception."""
    content = (DATA / "can" / name).read_bytes()[:50_000]
    path = tmp_path / Path(name).name
    for seed in range(3 if name.endswith("mf4") else 12):
        random = Random(seed)
        corrupted = bytearray(content)
        for _ in range(random.randint(1, 30)):
            corrupted[random.randrange(len(corrupted))] = random.randrange(256)
        path.write_bytes(corrupted[: random.randint(len(corrupted) // 2, len(corrupted))])
        try:
            found = rows(open_capture(path))
        except CaptureError:
            continue
        assert all(len(row[4]) <= 64 for row in found)


def test_payload_padding_is_zero(write: Write) -> None:
    """Bytes behind a payload's length are zero in every kind, as FrameBatch promises."""
    for text in (LOG, ASC, TRC, CSV):
        (batch,) = open_capture(write("a", text)).batches()
        behind = np.arange(batch.frames.data.shape[1]) >= batch.frames.length[:, None]
        assert not batch.frames.data[behind].any()


@needs_data
def test_an_unfinished_mf4_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What asammdf writes to finish a logger's file goes away, and the file itself stays as it was."""
    path = DATA / "can" / "kona_ev_uds.mf4"
    before = path.read_bytes()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert sum(len(batch) for batch in open_capture(path).batches()) == 2010
    assert list(tmp_path.iterdir()) == []
    assert path.read_bytes() == before


# What a hostile review found.


def test_values_that_raise_anything_are_damage_of_their_line(write: Write) -> None:
    """A letter in base64 and a stamp beyond any number cost their lines."""
    bad = "1483389946.197,0x1,0,0,0,1,éQ==\n1e999999,0x1,0,0,0,1,EQ==\n"
    capture = open_capture(write("a.csv", CSV + bad))
    assert len(rows(capture)) == 3
    assert [line[:7] for line in capture.damage.first] == ["line 5:", "line 6:"]


def test_what_python_can_has_to_say_of_lines_is_not_logged(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    """Damage is counted and the first of it described; a log line for each would drown that."""
    bad = "   1.5 CANFD  1 Rx 123 1 0 9 1 01\n" * 50
    assert open_capture(write("a.asc", ASC + bad)).damage.count == 0
    assert not caplog.records


@needs_data
def test_what_asammdf_prints_is_not_seen(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a damaged file our error tells; its traceback would be taken for one of ours."""
    content = (DATA / "can" / "kona_ev_uds.mf4").read_bytes().replace(b"##DG", b"##XX")
    with pytest.raises(CaptureError, match="damaged or not an MF4 file"):
        open_capture(write("a.mf4", content))
    assert capfd.readouterr() == ("", "")


def test_requests_to_transmit_are_no_frames(write: Write) -> None:
    """TxRq is the frame before it is sent: skipped in ASC and BLF, and no damage."""
    requests = "   2.5 1  123  TxRq  d 1 11\n   2.6 CANFD   3 TxRq   4EE   1 0 1 1 11\n"
    capture = open_capture(write("a.asc", ASC + requests))
    assert rows(capture) == rows(open_capture(write("b.asc", ASC)))
    assert capture.damage.count == 0
    objects = []
    for kind, size, at in ((1, 48, 34), (86, 56, 34), (100, 120, 34), (101, 136, 66)):
        for direction in (0, 2):
            head = struct.pack("<4sHHLLLHHQ", b"LOBJ", 32, 1, size, kind, 2, 0, 0, 7)
            one = bytearray(head.ljust(size, b"\0"))
            one[at] = direction
            objects.append(bytes(one))
    capture = open_capture(write("a.blf", blf(blf_container(b"".join(objects)))))
    assert len(rows(capture)) == 4
    assert capture.damage.count == 0


@pytest.mark.parametrize(
    ("field", "flags", "payload"),
    [
        ("200040", 0, b"\x11\x22"),
        ("203000", Flag.FD | Flag.BITRATE_SWITCH | Flag.ERROR_STATE, b"\x11\x22"),
        ("200050", Flag.REMOTE, b""),
    ],
)
@pytest.mark.parametrize("name", ["", "7Name"])
def test_asc_flags_tell_classic_frames_of_canfd_lines(
    write: Write, field: str, flags: int, payload: bytes, name: str
) -> None:
    """The flags behind the payload say which frames of CANFD lines are CAN FD."""
    line = f" 1.0 CANFD 1 Rx 123 {name} 1 1 2 2 11 22 102203 133 {field} e0006659 46500250\n"
    assert [row[3:] for row in rows(open_capture(write("a.asc", line)))] == [(flags, payload)]


def open_mf4(write: Write, monkeypatch: pytest.MonkeyPatch, event: str, **columns: object) -> Capture:
    """A capture of one channel group, as asammdf would give it."""
    arrays = {f"{event}.{name}": np.array(values, np.uint8) for name, values in columns.items()}
    count = len(next(iter(arrays.values())))
    samples = np.zeros(count, [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()])
    for name, array in arrays.items():
        samples[name] = array
    signal = SimpleNamespace(samples=samples, timestamps=np.arange(count, dtype=np.float64))
    group = SimpleNamespace(
        channels=[SimpleNamespace(name=event)], channel_group=SimpleNamespace(cycles_nr=count), comment=""
    )
    mdf = SimpleNamespace(
        groups=[group],
        header=SimpleNamespace(abs_time=0),
        get=lambda *_args, **_kwargs: signal,
        close=lambda: None,
    )
    monkeypatch.setattr("ingestd.sources.captures.mf4._open_mdf", lambda *_args: mdf)
    return open_capture(write("a.mf4", b"MDF     4.10    " + bytes(100)))


def test_mf4_lengths_that_cannot_be_are_damage(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """No payload is made up or cut: its frame is left out and counted."""
    data = [[1] * 12] * 5
    lengths, fd = [8, 12, 12, 9, 64], [0, 0, 1, 1, 1]
    capture = open_mf4(write, monkeypatch, "CAN_DataFrame", ID=[5] * 5, DataLength=lengths, EDL=fd, DataBytes=data)
    for _ in range(2):
        assert [row[4] for row in rows(capture)] == [b"\1" * 8, b"\1" * 12]
        assert [line.partition(":")[0] for line in capture.damage.first] == ["record 2", "record 4", "record 5"]


@pytest.mark.parametrize("columns", [{}, {"DataBytes": [1, 2]}])
def test_mf4_without_payloads_is_refused(
    write: Write, monkeypatch: pytest.MonkeyPatch, columns: dict[str, list[int]]
) -> None:
    """Zeros are no payload; frames without any bytes need none."""
    with pytest.raises(CaptureError, match=r"a\.mf4 has frames without DataBytes"):
        open_mf4(write, monkeypatch, "CAN_DataFrame", ID=[5, 6], DataLength=[0, 1], **columns)
    capture = open_mf4(write, monkeypatch, "CAN_DataFrame", ID=[5, 6], DataLength=[0, 0], **columns)
    assert [row[4] for row in rows(capture)] == [b"", b""]


def test_mf4_error_frames_are_not_extended(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error frame has one flag, as in the other kinds."""
    capture = open_mf4(write, monkeypatch, "CAN_ErrorFrame", ID=[5], IDE=[1])
    assert [row[3] for row in rows(capture)] == [Flag.ERROR]


def test_a_broken_gzip_gives_what_comes_before(write: Write) -> None:
    """A flipped bit in the checksum costs no line, one in the middle only what comes after it."""
    packed = bytearray(gzip.compress(LOG.encode()))
    packed[-6] ^= 1
    capture = open_capture(write("a.log.gz", bytes(packed)))
    assert len(rows(capture)) == 3
    assert capture.damage.count == 1
    random = Random(3)
    text = "".join(f"({n}.000000) can0 123#{random.randbytes(8).hex()}\n" for n in range(1000)).encode()
    half = zlib.compressobj(wbits=31)
    packed = bytearray(half.compress(text) + half.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 100)
    capture = open_capture(write("b.log.gz", bytes(packed)))
    assert len(rows(capture)) == 1000
    assert capture.damage.count == 1


@pytest.mark.parametrize("in_container", [True, False])
def test_blf_damage_that_hides_objects_is_counted(write: Write, in_container: bool) -> None:
    """A gap, a wrong size and a wrong type cost at most the object they are in, and always count."""
    good = [blf_object(n, 2) for n in range(100)]

    def read(objects: list[bytes]) -> tuple[list[int], int]:
        data = b"".join(objects)
        capture = open_capture(write("a.blf", blf(blf_container(data) if in_container else data)))
        return [row[0] % 1000 for row in rows(capture)], capture.damage.count

    def resized(size: int, kind: int = 1) -> list[bytes]:
        one = bytearray(good[50])
        struct.pack_into("<LL", one, 8, size, kind)
        return [*good[:50], bytes(one), *good[51:]]

    everything, others = list(range(100)), [*range(50), *range(51, 100)]
    assert read([*good[:50], bytes(7), *good[50:], bytes(100)])[0] == everything
    for gap in (8, 100, 5000):
        assert read([*good[:50], bytes(gap), *good[50:]]) == (everything, 1)
    for size in (4 * 48, 150, 5_000_000):
        assert read(resized(size)) == (others, 1)
    for size in (150, 5_000_000):
        assert read(resized(size, 6)) == (others, 1)


def test_blf_zeros_at_the_end_of_a_container_count(write: Write) -> None:
    """A gap is one, though its end is in the next container."""
    parts = [blf_container(blf_object(1, 2) + bytes(100)), blf_container(blf_object(2, 2))]
    capture = open_capture(write("a.blf", blf(*parts)))
    assert len(rows(capture)) == 2
    assert capture.damage.count == 1


@pytest.mark.parametrize("stored", [False, True])
def test_blf_container_of_wrong_type_or_size(write: Write, stored: bool) -> None:
    """A container that claims to be something else, or to hold the next one, is damage."""
    data = b"".join(blf_object(n, 2) for n in range(10))
    one = bytearray(blf_container(data))
    if stored:
        one = bytearray(struct.pack("<4sHHLL16x", b"LOBJ", 16, 1, 32 + len(data), 10) + data)
    capture = open_capture(write("a.blf", blf(bytes(one), bytes(one))))
    assert (len(rows(capture)), capture.damage.count) == (20, 0)
    wrong = bytearray(one)
    wrong[12] = 11
    capture = open_capture(write("b.blf", blf(bytes(one), bytes(wrong), bytes(one))))
    assert (len(rows(capture)), capture.damage.count) == (30, 1)
    next_ones = bytes(one) * 2
    struct.pack_into("<L", one, 8, 2 * len(one))
    capture = open_capture(write("c.blf", blf(bytes(one) + next_ones)))
    assert (len(rows(capture)), capture.damage.count) == (30, 1)


def test_classic_dlc_above_8_means_8_bytes(write: Write) -> None:
    """A classic TRC frame may have a DLC of 9 to 15."""
    text = ";$FILEVERSION=2.1\n;$STARTTIME=44548.5\n;$COLUMNS=N,O,T,B,I,d,R,L,D\n"
    text += " 1 17.5 DT 1 0123 Rx - 12 01 02 03 04 05 06 07 08\n"
    capture = open_capture(write("a.trc", text))
    assert [row[3:] for row in rows(capture)] == [(0, bytes(range(1, 9)))]


def test_blf_fd_error_frames_are_read(write: Write) -> None:
    """CAN_FD_ERROR_64 is an error frame like the others."""
    head = struct.pack("<4sHHLLLHHQ", b"LOBJ", 32, 1, 84, 104, 2, 0, 0, 7)
    body = struct.pack("<BBBBHHHBBL", 2, 8, 8, 0, 0, 0, 0, 84, 0, 0x123).ljust(44, b"\0") + bytes(range(8))
    capture = open_capture(write("a.blf", blf(head + body)))
    assert [row[1:] for row in rows(capture)] == [("can1", 0x123, Flag.ERROR, bytes(range(8)))]


def test_error_frames_may_have_29_bits(write: Write) -> None:
    """The id of an error frame is not held against it."""
    capture = open_capture(write("a.csv", CSV + "1483389948.5,0x1fffffff,0,0,1,0,\n"))
    assert rows(capture)[-1][2:] == (0x1FFFFFFF, Flag.ERROR, b"")


@pytest.mark.parametrize("text", [LOG, LOG.splitlines()[0], ASC, TRC, CSV])
@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_order_mark_is_no_text(write: Write, text: str, packed: bool) -> None:
    """What an editor puts before the first line changes nothing."""
    content = b"\xef\xbb\xbf" + text.encode()
    capture = open_capture(write("a", gzip.compress(content) if packed else content))
    assert rows(capture) == rows(open_capture(write("b", text)))
    assert capture.damage.count == 0


@pytest.mark.parametrize("line", ["//0.0 previous log file: a", "0.0 previous log file: a", "previous log file: a"])
def test_asc_names_of_previous_files_are_no_damage(write: Write, line: str) -> None:
    """The header may say which file came before."""
    capture = open_capture(write("a.asc", ASC.replace("internal", f"{line}\ninternal")))
    assert rows(capture) == rows(open_capture(write("b.asc", ASC)))
    assert capture.damage.count == 0
