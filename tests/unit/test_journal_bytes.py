"""The bytes of a journal, pinned: files that lie on somebody's disk must be readable by every later version.

If one of these fails, the format has changed: raise `VERSION`, read the old one, too, and describe both in
docs/journal-format.md.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from pathlib import Path
from zlib import crc32

import pytest

from ingestd.journal import Kind, Record, merge
from ingestd.journal.record import HEADER, Hole, Origin, pack, walk
from ingestd.journal.segment import (
    ENDED_AT,
    HEADER_BYTES,
    MACHINE_BYTES_MAX,
    DamagedHeader,
    SegmentHeader,
    pack_ended,
)
from ingestd.model import Books, Clock, ClockState
from tests.journals import open_journal, send_all

ORIGIN = Origin(bytes(range(16)), bytes(range(16, 32)))

RECORD = bytes.fromhex(
    "a94a5231 826737a7 1e000000 01 01 02 04 0807060504030201"
    "000102030405060708090a0b0c0d0e0f 101112131415161718191a1b1c1d1e1f"
    "feffffffffffffff 40420f0000000000 02000000 0900000000000000"
    "63616e30"
    "00000000 e8030000 23010000 ffffff1f 00 01 0300 0500 112233 0102030405"
)

HEAD = bytes.fromhex(
    "494e47455354444a 1b6e7922 0200 0900 0700000000000000 202122232425262728292a2b2c2d2e2f 02000000"
    "101112131415161718191a1b1c1d1e1f 000102030405060708090a0b0c0d0e0f 2a00000000000000"
    "6d616368696e652d31"
)

GOLDEN = Path(__file__).parents[1] / "golden" / "journal-1"  # Written by version 1: every kind of record is in it.
GOLDEN_SHA256 = {
    "00000001.journal": "3451fb6de81c6e19c1d972bd01497b81f510eaf3b27d491e67907b0b3a0691c3",
    "00000003.journal": "83abd9a9899dfd7418b3ece6a114884623eb0196c6bcc8f55b0f382432d6c8e0",
    "rejected-00000002.journal": "455e52ba9e0138d93048eb3285c019bf1532e51b871cc6550f86ec60c95205cb",
}


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
    in_segment_7 = read.pack(seed=7)
    assert in_segment_7.hex() == (RECORD[:4] + bytes.fromhex("f68abd15") + RECORD[8:]).hex()
    assert list(walk(in_segment_7, 7, ORIGIN)) == [read]
    assert (
        list(walk(in_segment_7, 8))
        == list(walk(in_segment_7, 7, Origin(bytes(16), bytes(16))))
        == [Hole(0, len(RECORD))]
    )


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


def test_a_journal_of_version_1_is_read(tmp_path: Path) -> None:
    """Its books, what is still to be sent, and under which name; for as long as anybody may have one."""
    folder = shutil.copytree(GOLDEN, tmp_path / "journal")
    for path in folder.iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN_SHA256[path.name], path.name
    journal = open_journal(folder)
    assert journal.books() == {
        "can0": Books(13, 3, 3, 0, {"overflow": 7}),
        "can1": Books(3, 0, 2, 1, {}),
        "gps": Books(1, 0, 1, 0, {}),
    }
    first, second, _ = journal.stretches()
    assert (first.feed_id, first.acknowledged, first.last_sequence) == (f"{first.id}+c10ned", 3, 8)
    assert (second.feed_id, second.acknowledged, second.last_sequence) == (second.id, 0, 2)
    sent = send_all(journal)
    assert [(record.kind, record.source, record.frames_count) for record in sent[:-1]] == [
        (Kind.FRAMES, "can1", 2), (Kind.FRAMES, "gps", 1), (Kind.EVENT, "gps", 0), (Kind.EVENT, "can0", 0),
        (Kind.SESSION, "", 0), (Kind.SESSION, "", 0), (Kind.FRAMES, "can0", 3),
    ]  # fmt: skip


def test_what_no_journal_has_written_is_not_read() -> None:
    """Whole by its checksum, a record of an unknown kind or clock state and a header beyond its limits are damage."""
    for at, value in ((13, 99), (14, 99)):
        strange = bytearray(RECORD)
        strange[at] = value
        strange[4:8] = crc32(strange[8:]).to_bytes(4, "little")
        assert list(walk(bytes(strange) + RECORD)) == [Hole(0, len(RECORD)), *walk(RECORD)]
    header = bytearray(HEAD.ljust(HEADER_BYTES, b"\0"))
    header[14:16] = (MACHINE_BYTES_MAX + 1).to_bytes(2, "little")
    header[8:12] = crc32(header[12:ENDED_AT]).to_bytes(4, "little")
    with pytest.raises(DamagedHeader, match=r"the header of 00000007\.journal is damaged"):
        SegmentHeader.unpack(bytes(header), "00000007.journal")
