"""BLF containers read as a chain of columns, and object by object: the same frames and the same damage, always."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from ingestd.errors import CaptureError
from ingestd.sources.captures import blf, open_capture
from ingestd.sources.captures.blf_objects import regular_objects

FILES, DAMAGES = 60, 8


def an_object(dice: random.Random, stamp: int) -> bytes:
    """A frame of one of four types, or something that is no frame, with as much padding as some writer makes."""
    kind = dice.choice([1, 86, 100, 101, 65])
    if kind in (1, 86):
        body = struct.pack("<HBBL8s", dice.randrange(1, 3), 0, 8, dice.randrange(2048), dice.randbytes(8))
    elif kind == 100:
        body = struct.pack("<HBBLLBBBBL64s", 1, 0, 9, dice.randrange(2048), 0, 0, 1, 12, 0, 0, dice.randbytes(12))
    elif kind == 101:
        length = dice.choice([8, 12, 16, 64])
        head = struct.pack("<BBBBLLLLLLLHBBL", 1, 9, length, 0, dice.randrange(2048), 0, 0x1000, 0, 0, 0, 0, 0, 0, 0, 0)
        body = head + dice.randbytes(length)
    else:
        body = dice.randbytes(dice.randrange(40))
    size = 32 + len(body)
    data = struct.pack("<4sHHLLLHHQ", b"LOBJ", 32, 1, size, kind, 2, 0, 0, stamp) + body
    return data + bytes(-size % dice.choice([4, 4, 4, 8]))


def read(path: Path) -> tuple[list[tuple[object, ...]], dict[str, object]]:
    try:
        capture = open_capture(path)
    except CaptureError as error:
        return [], {"error": str(error)}
    rows: list[tuple[object, ...]] = []
    for batch in capture.batches():
        frames = batch.frames
        columns = frames.ts_ns, frames.arbitration_id, frames.flags, frames.length
        payloads = [row[:length].tobytes() for row, length in zip(frames.data, frames.length, strict=True)]
        rows += zip(*(column.tolist() for column in columns), payloads, strict=True)
    return rows, capture.damage.as_json()


@pytest.mark.parametrize("seed", range(FILES))
def test_the_same_as_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Also with flipped bytes, cuts, and signatures where none should be."""
    dice = random.Random(seed)
    data = b"".join(an_object(dice, number) for number in range(dice.randrange(2, 80)))
    damaged = bytearray(data)
    for _ in range(dice.randrange(DAMAGES) if seed % 4 else 0):
        at = dice.randrange(len(damaged))
        match dice.randrange(4):
            case 0:
                damaged[at] ^= 1 << dice.randrange(8)
            case 1:
                damaged[at : at + 4] = b"LOBJ"
            case 2:
                del damaged[at : at + dice.randrange(1, 9)]
            case 3:
                start = damaged.find(b"LOBJ", at)
                damaged[start + 8 : start + 12] = struct.pack("<L", dice.randrange(200))
    split = dice.randrange(len(damaged))
    parts = [bytes(damaged[:split]), bytes(damaged[split:])]
    containers = b"".join(
        struct.pack("<4sHHLLHHLLL", b"LOBJ", 16, 1, 32 + len(part), 10, 0, 0, 0, len(part), 0)
        + part
        + bytes(-len(part) % 4)
        for part in parts
    )
    header = struct.pack("<4sL", b"LOGG", 144) + bytes(32) + struct.pack("<8H", 2020, 9, 0, 13, 12, 26, 40, 0)
    path = tmp_path / "a.blf"
    path.write_bytes(header.ljust(144, b"\0") + containers)
    chained = read(path)
    monkeypatch.setattr(blf, "regular_objects", lambda _: ({}, 0))
    one_by_one = read(path)
    assert chained == one_by_one
    if seed % 4 == 0:
        assert not one_by_one[1].get("damaged")


def test_a_chain_ends_before_the_last_object() -> None:
    """What the last one leads to is not known yet; what is no chain at all is left to the other way."""
    dice = random.Random(1)
    first, second = an_object(dice, 1), an_object(dice, 2)
    assert regular_objects(first + second)[1] == len(first)
    for rest in (b"LOBJ", b"LOBJ" + bytes(11), b"LOBJLOBJ", b"LOBJ\0\0\0\0LOBJ"):
        assert regular_objects(first + second + rest)[1] in (len(first), len(first + second))
    for data in (b"", first, b"x" + first + second, first[:10], first + b"LOBJx" + second):
        assert regular_objects(data) == ({}, 0)
