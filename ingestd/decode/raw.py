"""Frames that are recorded as they are."""

from __future__ import annotations

from ingestd.decode.can import Counts, Decoded
from ingestd.model import FrameBatch, Memory


class RawDecoder:
    """Decodes nothing: for protocols whose frames are recorded and not interpreted."""

    def __init__(self, source: str) -> None:
        self.source = source

    def decode(self, frames: FrameBatch, _: Memory | None = None) -> Decoded:
        """No signals; all frames count as undecoded."""
        return Decoded([], Counts(frames=len(frames), undecoded=len(frames)))
