"""COBS frames of a struct to signals: against struct and zlib, and against a stuffing written here by the paper."""

from __future__ import annotations

import binascii
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.chunks import encode_signals
from ingestd.decode.can import Counts
from ingestd.decode.checksums import CHECKS, compute
from ingestd.decode.cobs import CobsDecoder, unstuffed
from ingestd.framing import CobsFramer, SerialFrame
from ingestd.framing.cobs import is_stuffed
from ingestd.model import PAYLOAD_BYTES_MAX, FrameBatch, Quality, SerialFlag
from ingestd.sources.serial import columns
from ingestd.struct_fields import StructField
from tests.property.test_framing import balanced, payloads, run, singly
from tests.unit.test_decode_keyed import PLACEMENT, samples, values


def stuff(content: bytes) -> bytes:
    """Blocks of up to 254 bytes without a zero, each behind a code: its length and one, 255 where no zero follows."""
    out = bytearray()
    blocks = content.split(b"\0")
    for number, block in enumerate(blocks):
        while len(block) >= 254:
            out += b"\xff" + block[:254]
            block = block[254:]
            if not block and number == len(blocks) - 1:
                return bytes(out)
        out += bytes([len(block) + 1]) + block
    return bytes(out)


def batch(*contents: bytes) -> FrameBatch:
    """Frames with these contents, a nanosecond apart."""
    return columns("rig", [SerialFrame(n, stuff(each), SerialFlag.SERIAL) for n, each in enumerate(contents)])


FIELDS = ("ms:u32", "rpm:u16*0.25:1/min", "t:i16*0.1-40:degC", "_:u8[2]", "acc:f32[3]:g", "big:u64", "on:u8")
STRUCT = "IHh2x3fQB"


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("crc", ["none", "crc32", "crc16-xmodem"])
def test_a_struct(order: str, crc: str) -> None:
    """What struct packs comes out again, scaled as configured, with the checksums of zlib and binascii behind it."""
    rows = [
        (0, 0, 0, 0.0, 0.0, 0.0, 0, 0),
        (2**32 - 1, 2**16 - 1, -(2**15), 1.5, -2.5, 1e-30, 2**53, 255),
        (1000, 12_400, 1234, 0.1, math.nan, math.inf, 2**64 - 1, 1),
    ]
    mark = "<" if order == "little" else ">"
    contents = []
    for row in rows:
        content = struct.pack(mark + STRUCT, *row)
        if crc == "crc32":
            content += struct.pack(mark + "I", zlib.crc32(content))
        elif crc == "crc16-xmodem":
            content += struct.pack(mark + "H", binascii.crc_hqx(content, 0))
        contents.append(content)
    decoded = CobsDecoder("rig", fields=FIELDS, byte_order=order, crc=crc).decode(batch(*contents))
    assert decoded.counts == Counts(frames=3, decoded=3, signals=24)
    [found] = decoded.batches
    names = [channel.name for channel in found.group.channels]
    assert names == ["ms", "rpm", "t", "acc.0", "acc.1", "acc.2", "big", "on"]
    assert [channel.unit for channel in found.group.channels] == [None, "1/min", "degC", "g", "g", "g", None, None]
    for number, (ms, rpm, t, *acc, big, on) in enumerate(rows):
        single = [struct.unpack("f", struct.pack("f", each))[0] for each in acc]
        finite = [each if math.isfinite(each) else math.nan for each in single]
        expected = [ms, rpm * 0.25, t * 0.1 + -40.0, *finite, float(big), on]
        assert np.array_equal(found.value[:, number], expected, equal_nan=True)
    by_name = {(ts_ns, name): (text, quality) for ts_ns, name, _, text, quality in samples(decoded)}
    assert by_name[2, "big"] == ("18446744073709551615", 0)
    assert by_name[1, "big"] == (None, 0)
    assert by_name[2, "acc.1"] == (None, Quality.NOT_AVAILABLE)
    assert by_name[2, "acc.2"] == (None, Quality.OUT_OF_RANGE)
    encode_signals(decoded.batches, PLACEMENT)


@pytest.mark.parametrize(
    ("crc", "value"),
    {
        "crc8": 0xF4, "crc8-maxim": 0xA1, "crc8-j1850": 0x4B, "crc8-autosar": 0xDF, "crc16-ccitt": 0x29B1,
        "crc16-xmodem": 0x31C3, "crc16-kermit": 0x2189, "crc16-x25": 0x906E, "crc16-modbus": 0x4B37,
        "crc16-arc": 0xBB3D, "crc32": 0xCBF43926, "crc32-mpeg2": 0x0376E6E7, "crc32c": 0xE3069283,
    }.items(),
)  # fmt: skip
def test_check_values(crc: str, value: int) -> None:
    """The catalogue's value of each kind for 123456789, in every row of a matrix."""
    data = np.frombuffer(b"123456789" * 3, np.uint8).reshape(3, 9)
    assert compute(CHECKS[crc], data).tolist() == [value] * 3


def test_every_kind_has_a_check_value() -> None:
    """None was forgotten above."""
    [parameters] = test_check_values.pytestmark  # type: ignore[attr-defined]
    assert set(dict(parameters.args[1])) == set(CHECKS)


def test_what_is_not_the_struct_is_not_decoded() -> None:
    """Another length, another checksum, a code that leads nowhere: counted, and the frames between them decoded."""
    good = b"\1\0\2" + b"\7"
    decoder = CobsDecoder("rig", fields=("a:u8", "b:u16"), byte_order="big", crc="crc8")
    right = good[:3] + bytes([int(compute(CHECKS["crc8"], np.frombuffer(good[:3], np.uint8)[np.newaxis])[0])])
    frames = batch(right, good, right[:3], right + b"\0", right)
    broken = columns(
        "rig", [SerialFrame(0, b"\x09abcd", SerialFlag.SERIAL), SerialFrame(1, b"\0" * 5, SerialFlag.SERIAL)]
    )
    decoded = decoder.decode(frames)
    assert decoded.counts == Counts(frames=5, decoded=2, undecoded=3, signals=4)
    assert values(decoded) == [{"a": 1, "b": 2}, {"a": 1, "b": 2}]
    assert decoded.batches[0].ts_ns.tolist() == [0, 4]
    assert decoder.decode(broken).counts == Counts(frames=2, undecoded=2)


def test_a_checksum_in_the_other_order() -> None:
    """Modbus' checksum is little-endian behind big-endian numbers."""
    content = struct.pack(">H", 0x1234)
    crc = int(compute(CHECKS["crc16-modbus"], np.frombuffer(content, np.uint8)[np.newaxis])[0])
    options: dict[str, Any] = {"fields": ("a:u16",), "byte_order": "big", "crc": "crc16-modbus"}
    frames = batch(content + struct.pack("<H", crc))
    assert CobsDecoder("rig", **options).decode(frames).counts.undecoded == 1
    assert values(CobsDecoder("rig", **options, crc_byte_order="little").decode(frames)) == [{"a": 0x1234}]


@given(st.lists(st.binary(max_size=600), max_size=8), st.integers(0, 300))
def test_unstuffing_is_the_inverse(contents: Sequence[bytes], size: int) -> None:
    """Of one frame, and of many of one length at once, shorter and longer than the longest block."""
    for content in contents:
        assert is_stuffed(stuff(content))
        assert unstuffed(stuff(content)) == content
    fitting = [content.ljust(size + 1, b"\0")[: size + 1] for content in contents]
    fields = (
        ("a:u8", f"b:u8[{size}]")[: 1 + (0 < size < 256)]
        if size < 256
        else ("a:u8", "b:u8[255]", f"c:u8[{size - 255}]")
    )
    decoded = CobsDecoder("rig", fields=fields).decode(batch(*fitting)) if fitting else None
    if decoded is not None:
        assert decoded.counts.decoded == len(fitting)
        columns_of = np.concatenate([each.value for each in decoded.batches]).T.astype(np.uint8)
        assert [row.tobytes() for row in columns_of] == fitting


@settings(deadline=None)
@given(st.lists(st.binary(max_size=12), max_size=8), st.sampled_from(["none", "crc8", "crc16-ccitt"]))
def test_any_frames(frames: Sequence[bytes], crc: str) -> None:
    """Whatever is between two zeros: it is counted once, and nothing raises."""
    found = run(CobsFramer(), [b"\0".join(frames) + b"\0"])
    if found:
        counts = CobsDecoder("rig", fields=("a:u8", "b:f32"), crc=crc).decode(columns("rig", found)).counts
        assert counts.frames == len(found) == counts.decoded + counts.undecoded


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\0\3ab\0\0\2c\0", [b"\3ab", b"\2c"]),
        (b"garbage\0\3ab\0", [b"\3ab"]),
        (b"\3ab", []),
        (b"x" * 9000 + b"\0\2c\0", [b"\2c"]),
        (b"\1" * PAYLOAD_BYTES_MAX + b"\0", [b"\1" * PAYLOAD_BYTES_MAX]),
        (b"\1" * (PAYLOAD_BYTES_MAX + 1) + b"\0\2c\0", [b"\2c"]),
    ],
)
def test_framing(data: bytes, expected: list[bytes]) -> None:
    """From zero to zero; what cannot be unstuffed, or has no end, is skipped."""
    for pieces in ([data], singly(data)):
        framer = CobsFramer()
        assert payloads(framer, pieces) == expected
        assert balanced(framer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ms:u32", StructField("ms", "u32")),
        (" rpm : u16 * 0.25 : 1/min ", StructField("rpm", "u16", factor=0.25, unit="1/min")),
        ("t:i16*0.1-40:degC", StructField("t", "i16", factor=0.1, offset=-40.0, unit="degC")),
        ("t:i16+1e3", StructField("t", "i16", offset=1000.0)),
        ("acc:f32[3]*-1:m/s²", StructField("acc", "f32", 3, True, factor=-1.0, unit="m/s²")),
        ("one:u8[1]", StructField("one", "u8", 1, True)),
    ],
)
def test_fields(text: str, expected: StructField) -> None:
    """The line of a configuration, taken apart."""
    assert StructField.parse(text) == expected
