"""How many frames the player has sent from each source: memory that it shares with its parent and that outlives it.

A file mapped by both: the state, then one number for each source, all int64. Each is written by the player alone, in
one store, after the frames have left; so what somebody has received may be ahead of it for an instant.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence
from enum import IntEnum
from typing import IO

import numpy as np


class State(IntEnum):
    """What the player does."""

    STARTING = 0
    READY = 1
    PLAYING = 2
    STOPPED = 3


class Counts:
    """The counters of the sources, in the order in which they are named."""

    def __init__(self, descriptor: int, sources: Sequence[str]) -> None:
        self._sources = list(sources)
        size = 8 * (1 + len(self._sources))
        self._numbers = np.frombuffer(mmap.mmap(descriptor, size), np.int64)

    @staticmethod
    def file(sources_count: int) -> IO[bytes]:
        """A file of the right size, zeroed, without a name."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller's
        file.truncate(8 * (1 + sources_count))
        return file

    @property
    def state(self) -> State:
        """What the player does now."""
        return State(int(self._numbers[0]))

    def set_state(self, state: State) -> None:
        """For the player."""
        self._numbers[0] = state

    def sent(self) -> dict[str, int]:
        """Frames or sentences sent, by source."""
        return dict(zip(self._sources, self._numbers[1:].tolist(), strict=True))

    def set_sent(self, source: str, count: int) -> None:
        """For the player."""
        self._numbers[1 + self._sources.index(source)] = count
