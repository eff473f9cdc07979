"""Capture files of every kind: whatever was done to them, frames and damage add up, or the file is refused by name."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC
from functools import cache
from typing import Any, Final, NamedTuple
from unittest import mock

import can
import numpy as np
from hypothesis import strategies as st

from ingestd.errors import CaptureError
from ingestd.model import Flag
from ingestd.sources.captures import Capture, open_capture
from ingestd.sources.captures import text as text_captures
from ingestd.sources.captures.base import DAMAGE_DESCRIPTIONS_MAX, EXTENDED_ID_MAX, FD_LENGTHS, SOURCES_MAX, Options
from ingestd.sources.captures.candump import CandumpCapture
from ingestd.sources.captures.candump_lines import LineFrame, parse_line
from ingestd.sources.captures.text import LineError
from tests.property.fuzz.mutations import Corpus, Seed, mutated
from tests.property.fuzz.target import Strategies, Target, scratch

LINES: Final = 60
DESCRIBED = re.compile(r"(line|offset|record) (\d+): .+", re.DOTALL)

CANDUMP = b"".join(
    b"(1436509052.%06d) can%d %s\n" % (n * 613, n % 3, (b"123#1122334455667788", b"18FEF100#R", b"7FF##1" + b"AB" * 12)[n % 3])
    for n in range(LINES)
)  # fmt: skip
CONSOLE = b"".join(b" (%03d.%06d)  can0  1F334455   [2]  11 %02X\n" % (n, n, n) for n in range(LINES))
OLD = b"interface = vcan0, family = 29, type = 3, proto = 1\n" + b"<0x123> [2] 01 02\n" * LINES
ASC_HEAD = b"date Sam Sep 30 10:06:13.191 PM 2017\nbase hex  timestamps absolute\ninternal events logged\n"
ASC = b"".join(
    b"%4d.%06d %s\n" % (n, n, (
        b"1  123             Rx   d 8 01 02 03 04 05 06 07 08", b"2  18FEF100x       Tx   r", b"1  ErrorFrame",
        b"CANFD   1 Rx        4EE                                1 0 f 64 %s 0 0 1000 0 0 0 0 0" % (b"aa " * 64),
    )[n % 4]) for n in range(LINES)
)  # fmt: skip
TRC_HEAD = b";$FILEVERSION=2.1\n;$STARTTIME=43008.920986006946\n;$COLUMNS=N,O,T,B,I,d,R,L,D\n"
TRC = b"".join(
    b"%7d %13d.%03d %s\n" % (n, n, n, (
        b"DT 1      0300 Rx -  7    00 00 00 00 04 00 00", b"FB 2  18FEF100 Tx -  9    00 00 00 00 04 00 00 01 02 03 04 05",
        b"ER 1         - Rx -  5    04 00 02 00 00", b"RR 1      0100 Rx -  3",
    )[n % 4]) for n in range(1, LINES)
)  # fmt: skip
CSV_HEAD = b"timestamp,arbitration_id,extended,remote,error,dlc,data\n"
CSV = b"".join(b"1483389466.%06d,0x%x,%d,0,0,2,AQI=\n" % (n, n, n % 2) for n in range(LINES))
OTHER_CSV_HEAD = b"TimestampEpoch;BusChannel;ID;IDE;DLC;DataLength;Dir;EDL;BRS;DataBytes\n"
OTHER_CSV = b"".join(b"1578922367.%06d;1;2F5;%d;8;8;0;0;0;4406050000001024\n" % (n, n % 2) for n in range(LINES))

TOKENS = (
    b"(1436509052.249713) can0 ", b"#", b"##1", b"#R8", b" T", b" R", b"20000004#", b"(0) ", b"[8]", b"'", b"0x", b"_9",
    b"CANFD   1 Rx ", b"x       Rx   d ", b"ErrorFrame", b"TxRq", b" l 8", b"base dec timestamps relative\n",
    b"Begin Triggerblock Sam Sep 30 10:06:13.191 PM 2017\n", b"date \n", b"// ", b";$FILEVERSION=1.1\n", b";$COLUMNS=",
    b";$STARTTIME=1e99\n", b" 1) 10.5 Rx 0300 2 00 11\n", b"AQ==", CSV_HEAD, OTHER_CSV_HEAD, b"9999-12-31 23:59:59.9",
)  # fmt: skip


class Row(NamedTuple):
    """One frame of a capture."""

    source: str
    ts_ns: int
    arbitration_id: int
    flags: int
    payload: bytes


@cache
def _blf(compression: int, count: int) -> bytes:
    """A BLF of python-can's writer; without compression a changed byte is one of an object."""
    path = scratch() / "made.blf"
    with can.BLFWriter(path, compression_level=compression, max_container_size=2048) as writer:
        for n in range(count):
            kind: dict[str, Any] = ({}, {"is_fd": True, "data": bytes(24)}, {"is_error_frame": True}, {"dlc": 8})[n % 4]
            some = {"data": bytes([n % 256] * 8), "arbitration_id": n, "timestamp": 1_500_000_000 + n / 1000} | kind
            writer.on_message_received(can.Message(channel=n % 2, is_extended_id=n % 3 == 0, check=False, **some))
    return path.read_bytes()


@cache
def _mf4(count: int) -> bytes:
    """An MF4 of python-can's writer."""
    path = scratch() / "made.mf4"
    with can.MF4Writer(path) as writer:
        for n in range(count):
            writer.on_message_received(
                can.Message(1e9 + n, n, is_extended_id=True, data=bytes(8), channel=n % 2, is_rx=bool(n % 2))
            )
    return path.read_bytes()


SEEDS: Final[dict[str, Callable[[], Iterable[Seed]]]] = {
    "candump": lambda: [Seed("log", b"", CANDUMP), Seed("console", b"", CONSOLE), Seed("old", b"", OLD)],
    "asc": lambda: [Seed("asc", ASC_HEAD, ASC), Seed("relative", b"base dec timestamps relative\n", ASC)],
    "trc": lambda: [Seed("trc", TRC_HEAD, TRC)],
    "csv": lambda: [Seed("python-can", CSV_HEAD, CSV), Seed("mdf4-converters", OTHER_CSV_HEAD, OTHER_CSV)],
    "blf": lambda: [Seed("packed", _blf(-1, 60)), Seed("stored", _blf(0, 60)), Seed("one", _blf(0, 1))],
    "mf4": lambda: [Seed("mf4", _mf4(20))],
}
PATTERNS: Final = {
    "candump": ("can/*.log", "can/*.txt", "can/derived/*.log", "can/formats/*.log"),
    "asc": ("can/formats/*.asc",),
    "trc": ("can/*.trc", "can/formats/*.trc"),
    "csv": ("can/formats/*.csv",),
    "blf": ("can/formats/*.blf",),
    "mf4": ("can/kona_ev_uds.mf4", "can/truck_j1939_tp.mf4"),
}
HEAD_LINES: Final = {"candump": 0, "asc": 4, "trc": 12, "csv": 1, "blf": -1, "mf4": -1}


def _seeds(corpus: Corpus, kind: str) -> list[Seed]:
    return corpus.seeds(SEEDS[kind], *PATTERNS[kind], head_lines=HEAD_LINES[kind])


def _draw(kind: str) -> Callable[[Corpus], Strategies]:
    def draw(corpus: Corpus) -> Strategies:
        return {"content": mutated(_seeds(corpus, kind), tokens=TOKENS), "frames_max": st.integers(1, 70)}

    return draw


def _check(kind: str) -> Callable[..., None]:
    def check(content: bytes, frames_max: int) -> None:
        """Refused by name, or: the same frames each time and in batches of any size, and damage that has its place."""
        path = scratch() / f"mutated.{kind}"
        path.write_bytes(content)
        try:
            capture = open_capture(path, rate=100.0)
            found = rows(capture, 64_000)
        except CaptureError as error:
            assert str(path) in str(error)
            assert error.hint
            return
        damage = capture.damage
        assert len(damage.first) == min(damage.count, DAMAGE_DESCRIPTIONS_MAX)
        _check_places(content, damage.first)
        assert rows(capture, frames_max) == found
        assert capture.damage == damage
        if capture.kind in ("asc", "trc", "csv"):
            lines = content.count(b"\n") + 1
            assert len(found) + damage.count <= lines
            with mock.patch.object(text_captures, "BLOCK_BYTES", frames_max):
                assert rows(capture, 64_000) == found
                assert capture.damage == damage

    return check


def _check_places(content: bytes, descriptions: Iterable[str]) -> None:
    most = {"line": content.count(b"\n") + 1, "offset": len(content), "record": len(content)}
    for description in descriptions:
        match = DESCRIBED.fullmatch(description)
        assert match is not None, description
        assert int(match[2]) <= most[match[1]], description


def rows(capture: Capture, frames_max: int) -> list[Row]:
    """The frames, after a look at their columns."""
    return list(_rows(capture, frames_max))


def _rows(capture: Capture, frames_max: int) -> Iterator[Row]:
    last = 0
    sizes = []
    for batch in capture.batches(frames_max):
        frames, count = batch.frames, len(batch)
        sizes.append(count)
        assert frames.data.flags.c_contiguous
        assert frames.data.shape[1] % 8 == 0 < frames.data.shape[1]
        assert np.isin(frames.length, list(FD_LENGTHS)).all()
        assert (frames.arbitration_id <= EXTENDED_ID_MAX).all()
        assert not frames.flags[(frames.flags & 128) != 0].any()
        assert not frames.length[(frames.flags & Flag.REMOTE) != 0].any()
        assert not frames.data[np.arange(frames.data.shape[1]) >= frames.length[:, None]].any()
        assert all(batch.sources)
        assert len(batch.sources) <= SOURCES_MAX
        assert last <= batch.bytes_read <= capture.size_bytes
        last = batch.bytes_read
        for row in range(count):
            yield Row(
                batch.sources[batch.source_index[row]],
                int(frames.ts_ns[row]),
                int(frames.arbitration_id[row]),
                int(frames.flags[row]),
                frames.data[row, : frames.length[row]].tobytes(),
            )
    assert all(size == frames_max for size in sizes[:-1])


def _draw_candump(corpus: Corpus) -> Strategies:
    return {
        "content": mutated(_seeds(corpus, "candump"), bytes_max=6000, tokens=TOKENS),
        "block_bytes": st.sampled_from([1, 2, 7, 100, 1000, 4096, 5000]),
        "packed": st.booleans(),
    }


def check_candump_lines(content: bytes, block_bytes: int, packed: bool) -> None:
    """Line by line the same as from blocks of any size, packed or not; no line changes what its neighbours become."""
    path = scratch() / "mutated.log"
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    expected: list[LineFrame] = []
    bad = 0
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            frame = parse_line(line)
            if frame is not None:
                if frame.ts_ns is None:
                    raise LineError("no time stamp")
                expected.append(frame)
        except LineError:
            bad += 1
    for size in (block_bytes, 1 << 20):
        capture = CandumpCapture(path, Options({}, None, UTC), size)
        found = rows(capture, 64_000)
        assert capture.damage.count == bad
        for row, frame in zip(found, expected, strict=True):
            assert row[1:] == (frame.ts_ns, frame.arbitration_id, frame.flags, frame.payload)
            assert frame.interface is None or row.source.encode() == frame.interface


def _draw_gzip(corpus: Corpus) -> Strategies:
    kinds = ["candump", "asc", "csv"]
    seeds = [
        Seed(f"{kind}.gz", gzip.compress(seed.window(0, 20_000), level))
        for kind in kinds
        for seed in _seeds(corpus, kind)
        for level in (0, 6)
    ]
    return {"content": mutated(seeds), "name": st.sampled_from(["a.log.gz", "a.asc", "a.csv.gz", "a"])}


def check_gzip(content: bytes, name: str) -> None:
    """Refused by name, or read twice the same."""
    path = scratch() / name
    path.write_bytes(content)
    try:
        capture = open_capture(path)
        found = rows(capture, 64_000)
    except CaptureError as error:
        assert str(path) in str(error)
        return
    damage = capture.damage
    assert rows(capture, 3) == found
    assert capture.damage == damage


def _draw_any(corpus: Corpus) -> Strategies:
    seeds = [seed for kind in ("candump", "asc", "trc", "csv", "blf") for seed in _seeds(corpus, kind)]
    return {
        "content": mutated(seeds, bytes_max=500, tokens=(b"LOGG", b"MDF ", b"UnFi", b"\x1f\x8b", *TOKENS)),
        "name": st.sampled_from(["a.log", "a.asc", "a.trc", "a.csv", "a.blf", "a.mf4", "a.log.gz", "a", "a.txt"]),
    }


def check_any(content: bytes, name: str) -> None:
    """Whatever a file is called and holds, it is a capture or refused."""
    check_gzip(content, name)


def _kind(name: str, examples: int) -> Target:
    return Target(f"capture_{name}", _draw(name), _check(name), examples)


TARGETS = (
    Target("candump_lines", _draw_candump, check_candump_lines, 120),
    *(_kind(name, 80) for name in ("candump", "asc", "trc", "csv", "blf")),
    _kind("mf4", 30),
    Target("capture_gzip", _draw_gzip, check_gzip, 60),
    Target("capture_of_any_name", _draw_any, check_any, 60),
)
