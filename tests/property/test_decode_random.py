"""Decoding equals cantools' for signals of any kind at any place, in payloads of up to 1,785 bytes."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import cantools
import numpy as np
import pytest

from ingestd.decode.can import Decoder, MessageTable
from ingestd.decode.databases import SignalDefinition, load
from ingestd.decode.layout import Layout, channel_of
from ingestd.model import PAYLOAD_BYTES_MAX, SignalGroup
from tests.property.test_decode import Oracle, compare, payloads


def random_signals(rng: random.Random, payload_bytes: int) -> str:
    """SG_ lines of signals that do not overlap, both byte orders, 1 to 64 bits, some of them floats."""
    free = set(range(8 * payload_bytes))  # in little-endian numbering
    lines, types = [], []
    for number in range(200 if payload_bytes < 9 else 60):
        floating = payload_bytes >= 8 and rng.random() < 0.15
        length = rng.choice((32, 64)) if floating else rng.randint(1, min(64, 8 * payload_bytes))
        big_endian = rng.random() < 0.5
        first = rng.randrange(8 * payload_bytes)
        if big_endian:
            bits = [8 * (bit // 8) + 7 - bit % 8 for bit in range(first, first + length)]
        else:
            bits = list(range(first, first + length))
        if not free.issuperset(bits):
            continue
        free.difference_update(bits)
        sign = "-" if floating or rng.random() < 0.5 else "+"
        scale = rng.choice(["1", "2", "-1", "0.1", "-0.25", "1e-7", "3", "0.125", "100"])
        offset = rng.choice(["0", "1", "-40", "0.5", "1e6"])
        order = 0 if big_endian else 1
        lines.append(f' SG_ S{number} : {bits[0]}|{length}@{order}{sign} ({scale},{offset}) [0|0] "" E')
        if floating:
            types.append(f"SIG_VALTYPE_ 256 S{number} : {1 if length == 32 else 2};")
    return "\n".join([*lines, "", *types, ""])


@pytest.mark.parametrize("seed", range(60))
def test_random_messages_equal_cantools(tmp_path: Path, seed: int) -> None:
    """A random message: values, presence, exact decimals and short frames agree for every payload."""
    rng = random.Random(seed)
    payload_bytes = rng.choice([1, 3, 8, 12, 64, rng.randint(65, 300), PAYLOAD_BYTES_MAX])
    path = tmp_path / "random.dbc"
    preamble = 'VERSION ""\n\nNS_ :\n\nBS_:\n\nBU_: E\n\n'
    path.write_text(f"{preamble}BO_ 256 Random: {payload_bytes} E\n{random_signals(rng, payload_bytes)}")
    [message] = cantools.database.load_file(path).messages
    decoder = Decoder("bus", MessageTable([load(path)]))
    sample = rng.sample(list(payloads(message, rng)), 120)
    assert compare(decoder, Oracle(message), message, sample) == 120


def test_every_float16() -> None:
    """All 65,536 bit patterns of a half float, at an odd place and in both byte orders, equal Python's own reading."""
    patterns = np.arange(2**16, dtype=np.uint64)
    expected = [struct.unpack("<e", struct.pack("<H", pattern))[0] for pattern in range(2**16)]
    for big_endian, start in ((False, 5), (True, 3)):
        signal = SignalDefinition(
            "F", start, 16, big_endian, False, True, 1, 0, None, None, None, None, False, None, None
        )
        group = SignalGroup.make("bus", "M", "", "test", (channel_of("M", signal),))
        words = patterns << np.uint64(5) if not big_endian else (patterns << np.uint64(64 - 16 - 3)).byteswap()
        [batch] = Layout((group,), (signal,)).decode(words.reshape(-1, 1), np.zeros(2**16, np.int64))
        np.testing.assert_array_equal(batch.value[0], expected)
