"""Cutting batches into chunks and summarising them. (That PostgreSQL reads them: tests/integration.)"""

from __future__ import annotations

from uuid import UUID

import numpy as np
import pytest

from ingestd.chunks import COPY_HEADER, COPY_TRAILER, Placement, chunk_slices, encode_frames, encode_signals, summarise
from ingestd.model import CHUNK_FRAMES_MAX, Channel, ClockState, FrameBatch, SignalBatch, SignalGroup

PLACEMENT = Placement(UUID(int=7), 0, ClockState.SET)


@pytest.mark.parametrize("frames", [0, 1, 4095, 4096, 4097, 8192, 8193, 64_000])
def test_chunks_cover_every_frame_once(frames: int) -> None:
    """Chunks are as few as possible, never too long, of nearly equal size, and leave nothing out."""
    slices = list(chunk_slices(frames))
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(frames))
    lengths = [part.stop - part.start for part in slices]
    assert len(slices) == -(-frames // CHUNK_FRAMES_MAX)
    assert not lengths or (max(lengths) <= CHUNK_FRAMES_MAX and max(lengths) - min(lengths) <= 1)


def test_summaries_ignore_nan() -> None:
    """Minimum, maximum, mean and count of the numbers there are; a row without any has a count of 0."""
    nan, inf = np.nan, np.inf
    low, high, mean, count = summarise(np.array([[1.0, 2.0, 6.0], [nan, 4.0, 2.0], [nan, nan, nan], [inf, -inf, 1.0]]))
    assert low[:2].tolist() == [1.0, 2.0]
    assert high[:2].tolist() == [6.0, 4.0]
    assert mean[:2].tolist() == [3.0, 3.0]
    assert count.tolist() == [3, 2, 0, 3]
    assert np.isnan([low[2], high[2], mean[2], mean[3]]).all()
    assert (low[3], high[3]) == (-inf, inf)


def signal_batch(frames: int) -> SignalBatch:
    channels = (Channel("M.A"), Channel("M.B"))
    group = SignalGroup.make("can0", "M", "", "m.dbc", channels)
    return SignalBatch(group, np.arange(frames, dtype=np.int64), np.arange(2.0 * frames).reshape(2, frames))


def test_encoding_is_deterministic_and_complete() -> None:
    """The same batch gives the same bytes, with COPY's header and trailer around as many rows as there are chunks."""
    one, two = (encode_signals([signal_batch(10_000)], PLACEMENT) for _ in range(2))
    assert one.pieces == two.pieces
    assert (one.table, one.rows) == ("signal_chunks", 3)
    joined = b"".join(one.pieces)
    assert joined.startswith(COPY_HEADER)
    assert joined.endswith(COPY_TRAILER)
    assert len(joined) == one.nbytes


def test_nothing_to_encode_is_an_empty_copy() -> None:
    """No batches, no rows."""
    assert encode_signals([], PLACEMENT).rows == 0
    assert encode_frames([], PLACEMENT).rows == 0


def test_payloads_are_taken_out_of_their_padding() -> None:
    """Payloads of different lengths are stored one after the other, without what pads them in the batch."""
    data = np.zeros((3, 8), np.uint8)
    data[0, :2], data[2, :3] = [1, 2], [7, 8, 9]
    lengths = np.array([2, 0, 3], np.uint16)
    frames = FrameBatch("can0", np.arange(3), np.arange(3, dtype=np.uint32), np.zeros(3, np.uint8), lengths, data)
    encoded = b"".join(encode_frames([frames], PLACEMENT).pieces)
    assert encoded.endswith(b"\x00\x00\x00\x05" + bytes([1, 2, 7, 8, 9]) + COPY_TRAILER)
