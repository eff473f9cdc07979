"""Decoding equals cantools', bit by bit, for every message of every signal database of the data set.

The oracle is `cantools.Message.decode`. Two things it cannot do are asked of it in pieces: messages whose signals
overlap (its codec misreads them) and signals that reach behind their message's end are decoded by it one signal at a
time, in messages of that one signal.
"""

from __future__ import annotations

import math
import os
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cantools
import numpy as np
import pytest
from cantools.database.can import Message
from cantools.database.errors import DecodeError

from ingestd.decode.can import Decoder, MessageTable
from ingestd.decode.databases import load
from ingestd.model import Flag, FrameBatch, Quality

DATA = Path(os.environ.get("INGESTD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
REFUSED = {"mazda_2017", "honda_civic_touring_2016_can_generated", "tesla_can", "issue_199"}
DATABASES = sorted(
    path
    for path in [*DATA.glob("dbc/*"), *DATA.glob("dbc/edge/*")]
    if path.suffix in {".dbc", ".kcd", ".sym", ".arxml"} and path.stem not in REFUSED
)
PAYLOADS = 1000


def payloads(message: Message, rng: random.Random) -> Iterator[bytes]:
    """All zero, all one, one bit set or clear at every boundary of a signal, random; right, short and long."""
    bits = 8 * message.length
    right: list[bytes] = [bytes(message.length), b"\xff" * message.length]
    for signal in message.signals:
        for bit in (signal.start, signal.start + signal.length - 1, signal.start - signal.length + 1):
            if 0 <= bit < bits:
                one = 1 << bit
                right.append(one.to_bytes(message.length, "little"))
                right.append((2**bits - 1 - one).to_bytes(message.length, "little"))
    while len(right) < PAYLOADS * 6 // 10:
        right.append(rng.randbytes(message.length))
    if message.is_multiplexed():  # Random multiplexor values are seldom known ones: aim.
        right += [aimed(message, rng) for _ in range(PAYLOADS // 2)]
    yield from right
    for _ in range(PAYLOADS // 5):
        yield rng.randbytes(rng.randrange(message.length + 1))
        yield rng.randbytes(min(message.length + rng.randrange(1, 9), 64 if message.length <= 64 else 1785))


def aimed(message: Message, rng: random.Random) -> bytes:
    """A random payload whose multiplexors, set outermost first, mostly have values the database knows."""
    number = int.from_bytes(rng.randbytes(message.length), "little")
    for signal in message.signals:
        known = sorted(
            {v for s in message.signals if s.multiplexer_signal == signal.name for v in s.multiplexer_ids or ()}
        )
        if not signal.is_multiplexer or not known or rng.random() < 0.05:
            continue
        value = rng.choice(known)
        for place in range(signal.length):
            if signal.byte_order == "little_endian":
                bit, weight = signal.start + place, place
            else:
                network = 8 * (signal.start // 8) + 7 - signal.start % 8 + place
                bit, weight = 8 * (network // 8) + 7 - network % 8, signal.length - 1 - place
            number = number & ~(1 << bit) | ((value >> weight) & 1) << bit
    return (number % 2 ** (8 * message.length)).to_bytes(message.length, "little")


def overlapping_or_outside(message: Message) -> bool:
    """Whether cantools' codec cannot be trusted with the whole message."""
    try:
        message.refresh(strict=True)
    except cantools.database.Error:
        return True
    return False


class Oracle:
    """cantools, asked signal by signal where its own codec for the whole message misreads."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.single: dict[str, Message] = {}
        if overlapping_or_outside(message):
            for signal in message.signals:
                ends = (
                    (signal.start + signal.length - 1) // 8
                    if signal.byte_order == "little_endian"
                    else (8 * (signal.start // 8) + 7 - signal.start % 8 + signal.length - 1) // 8
                )
                alone = cantools.database.can.Signal(
                    signal.name,
                    signal.start,
                    signal.length,
                    signal.byte_order,
                    signal.is_signed,
                    conversion=signal.conversion,
                )
                length = max(message.length, ends + 1)
                self.single[signal.name] = Message(
                    message.frame_id, message.name, length, [alone], is_extended_frame=message.is_extended_frame
                )

    def decode(self, payload: bytes) -> dict[str, Any] | None:
        """Raw-number values by signal, or None where the payload has an unknown multiplexor value."""
        if not self.single:
            try:
                return self.message.decode(payload, decode_choices=False, allow_truncated=True)
            except DecodeError:
                return None
        values: dict[str, Any] = {}
        for message in self.single.values():
            values |= message.decode(payload, decode_choices=False, allow_truncated=True)
        if not self.message.is_multiplexed():
            return values
        kept: dict[str, Any] = {}
        waiting: list[Any] = list(self.message.signal_tree)
        while waiting:
            node = waiting.pop()
            name, pages = (node, None) if isinstance(node, str) else next(iter(node.items()))
            if name in values:
                kept[name] = values[name]
                if pages is not None:
                    if values[name] not in pages:
                        return None
                    waiting += pages[values[name]]
        return kept


def frames_of(message: Message, data: list[bytes]) -> FrameBatch:
    """One frame for each payload, numbered by its stamp; FD, so that a short one is not a transport segment."""
    width = max(8, -(-max(map(len, data)) // 8) * 8)
    matrix = np.zeros((len(data), width), np.uint8)
    for row, payload in enumerate(data):
        matrix[row, : len(payload)] = np.frombuffer(payload, np.uint8)
    flags = Flag.FD | (Flag.EXTENDED if message.is_extended_frame else 0)
    return FrameBatch(
        "bus",
        np.arange(len(data), dtype=np.int64),
        np.full(len(data), message.frame_id, np.uint32),
        np.full(len(data), flags, np.uint8),
        np.array([len(p) for p in data], np.uint16),
        matrix,
    )


def same(ours: float, theirs: float) -> bool:
    return struct.pack("d", ours) == struct.pack("d", theirs) or (math.isnan(ours) and math.isnan(theirs))


@pytest.mark.parametrize("path", DATABASES or [None], ids=lambda p: p.name if p else "absent")
def test_every_value_equals_cantools(path: Path | None) -> None:
    """Values, their presence, exact decimals and the short-frame mark agree for at least 1,000 payloads a message."""
    if path is None:
        assert not os.environ.get("CI"), "CI must have the data set"
        pytest.skip(f"the data set is not at {DATA}")
    definitions = {}
    database = load(path)
    for definition in database.messages:
        definitions.setdefault((definition.arbitration_id, definition.extended, definition.name), definition)
    oracle_database = cantools.database.load_file(path, strict=False, encoding=encoding(path))
    compared = 0
    for message in oracle_database.messages:
        if message.is_container or not message.signals:
            continue
        only = database.__class__(
            database.name,
            database.sha256,
            "id",
            (definitions[message.frame_id, message.is_extended_frame, message.name],),
            (),
        )
        decoder = Decoder("bus", MessageTable([only]), keep_not_available=True)
        data = list(payloads(message, random.Random(zlib.crc32(message.name.encode()))))
        assert len(data) >= PAYLOADS
        compared += compare(decoder, Oracle(message), message, data)
    assert compared > 0 or path.stem == "cp1252"


def compare(decoder: Decoder, oracle: Oracle, message: Message, data: list[bytes]) -> int:
    decoded = decoder.decode(frames_of(message, data))
    found: list[dict[str, tuple[float, Any, int]]] = [{} for _ in data]
    for batch in decoded.batches:
        for row, channel in enumerate(batch.group.channels):
            name = channel.name.removeprefix(f"{message.name}.")
            for column, frame in enumerate(batch.ts_ns.tolist()):
                assert name not in found[frame], "a sample was decoded twice"
                found[frame][name] = (
                    float(batch.value[row, column]),
                    None if batch.text is None else batch.text[row, column],
                    0 if batch.quality is None else int(batch.quality[row, column]),
                )
    undecoded = 0
    for payload, ours in zip(data, found, strict=True):
        theirs = oracle.decode(payload)
        undecoded += theirs is None
        theirs = theirs or {}
        assert set(ours) == set(theirs), (message.name, payload.hex())
        for name, number in theirs.items():
            value, text, quality = ours[name]
            assert same(value, float(number)), (message.name, name, payload.hex(), value, number)
            exact = isinstance(number, int) and abs(number) > 2**53
            assert text == (str(number) if exact else None), (message.name, name, payload.hex())
            assert bool(quality & Quality.SHORT_FRAME) == (len(payload) < message.length)
    assert decoded.counts.undecoded == undecoded
    assert decoded.counts.decoded + undecoded == len(data)
    return len(data)


def encoding(path: Path) -> str:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"
