"""The bytes of a journal, pinned: files that lie on somebody's disk must be readable by every later version.

If one of these fails, the format has changed: raise `VERSION`, read the old one, too, and describe both in
docs/journal-format.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from uuid import UUID
from zlib import crc32

import pytest

from ingestd.journal import Kind, Record, merge
from ingestd.journal.record import HEADER, Origin, pack, walk
from ingestd.journal.segment import HEADER_BYTES, SegmentHeader, pack_ended, read_header
from ingestd.model import Clock, ClockState, Event
from tests.journals import CLOCK, SESSION, frames, open_journal, send_all

DOCUMENT = Path(__file__).parents[2] / "docs" / "journal-format.md"

ORIGIN = Origin(bytes(range(16)), bytes(range(16, 32)))

RECORD = bytes.fromhex(
    "a94a5231 b5b07d9a 1e000000 01 01 02 04 0807060504030201"
    "000102030405060708090a0b0c0d0e0f 101112131415161718191a1b1c1d1e1f"
    "feffffffffffffff 40420f0000000000 02000000 0900000000000000"
    "63616e30"
    "00000000 e8030000 23010000 ffffff1f 00 01 0300 0500 112233 0102030405"
)

HEAD = bytes.fromhex(
    "494e4745535444 4a 7d76fd4c 0100 0900 0700000000000000 202122232425262728292a2b2c2d2e2f 02000000"
    "101112131415161718191a1b1c1d1e1f 000102030405060708090a0b0c0d0e0f 2a00000000000000"
    "6d616368696e652d31"
)

SEGMENT_SHA256 = ""


def test_a_record() -> None:
    """Two frames of a source under a clock that was stepped, byte for byte, there and back."""
    payload = RECORD[HEADER.size + 4 :]
    record = pack(
        Kind.FRAMES, ORIGIN, 0x0102030405060708, payload, source="can0", clock=Clock(-2, ClockState.STEPPED),
        ts_ns=1_000_000, frames_count=2, frames_before=9,
    )  # fmt: skip
    assert record.hex() == RECORD.hex()
    (read,) = walk(RECORD)
    assert isinstance(read, Record)
    assert read.pack() == RECORD
    assert (read.source, read.clock, read.frames_before) == ("can0", Clock(-2, ClockState.STEPPED), 9)
    batch = merge([read])
    assert batch.ts_ns.tolist() == [1_000_000, 1_001_000]
    assert batch.arbitration_id.tolist() == [0x123, 0x1FFFFFFF]
    assert batch.flags.tolist() == [0, 1]
    assert [batch.data[row, :length].tobytes() for row, length in enumerate(batch.length)] == [
        b"\x11\x22\x33", b"\x01\x02\x03\x04\x05",
    ]  # fmt: skip


def test_the_header_of_a_segment() -> None:
    """Byte for byte, there and back, with the mark of a clean end and without."""
    header = SegmentHeader(7, bytes(range(32, 48)), 2, ORIGIN, 42, "machine-1")
    packed = header.pack()
    assert packed == HEAD.ljust(HEADER_BYTES, b"\0")
    assert SegmentHeader.unpack(packed, "name") == header
    mark = pack_ended(41)
    assert mark.hex() == "454e4444" + struct.pack("<I", crc32(struct.pack("<Q", 41))).hex() + "2900000000000000"
    assert SegmentHeader.unpack(packed[: -len(mark)] + mark, "name").ended
    torn = mark[:-1] + b"\x01"
    assert not SegmentHeader.unpack(packed[: -len(torn)] + torn, "name").ended


def test_kinds_keep_their_numbers() -> None:
    """They are in files."""
    assert {kind.name: kind.value for kind in Kind} == {
        "FRAMES": 1, "EVENT": 2, "SESSION": 3,
        "SETTLE": 16, "FEED": 17, "REMOVED": 18, "STATE": 19, "REJECTED": 20,
    }  # fmt: skip


def test_a_whole_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of record that one process writes, as one checksum."""
    ids = iter([UUID(int=0xA), UUID(int=0xB)])
    monkeypatch.setattr("ingestd.journal.log.uuid4", lambda: next(ids))
    journal = open_journal(tmp_path)
    journal.append_frames(frames(0, 5), CLOCK)
    journal.append_frames(frames(0, 3, "can1", length=64), CLOCK)
    journal.append_event(Event("can0", "gap", 6000, "overflow", {"frames": 2}), CLOCK, lost={"overflow": 2})
    journal.assign_feed(UUID(int=0xA).hex, "feed-1", 0)
    send_all(journal)
    journal.append_session({**SESSION.fields, "ended_utc": "2026-01-01T00:00:00+00:00"})
    journal.close(ended=True)
    (path,) = tmp_path.glob("*.journal")
    header = read_header(path)
    assert header is not None
    assert header.ended
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SEGMENT_SHA256


def test_the_page_says_what_is_written() -> None:
    """The tables of docs/journal-format.md add up to the headers, field by field."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for heading, layout, total in (("## Record", HEADER.format, HEADER.size), ("## Segment", None, HEADER_BYTES)):
        section = text.split(heading, 1)[1].split("\n## ", 1)[0]
        rows = re.findall(r"^\| *(\d+) *\| *(\d+) *\|", section, re.MULTILINE)
        offset = 0
        for start, size in rows:
            assert int(start) == offset, (heading, start)
            offset += int(size)
        assert offset == total
        if layout is not None:
            sizes = [struct.calcsize("<" + code) for code in re.findall(r"\d*[a-zA-Z]", layout)]
            flat = [1 if code == "B" else size for code, size in zip(re.findall(r"\d*([a-zA-Z])", layout), sizes, strict=True)]
            assert [int(size) for _, size in rows] == [
                size for code, whole in zip(re.findall(r"\d*[a-zA-Z]", layout), flat, strict=True)
                for size in ([1] * int(code[:-1] or 1) if code.endswith("B") else [whole])
            ]
    for kind in Kind:
        assert f"| {kind.value} | {kind.name} |" in text
    for example in re.findall(r"```json\n(.*?)```", text, re.DOTALL):
        json.loads(example)
