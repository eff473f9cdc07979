"""How long to wait before trying again: everything here that retries, retries like this, and for as long as it takes.

The pause doubles from try to try up to a cap, so that what is away for days costs nothing. Of each pause a random part,
half at least, is waited for: recorders that lost one server at one moment do not all come back to it at another.
"""

from __future__ import annotations

import random


class Backoff:
    """The pauses of one thing that is tried again."""

    def __init__(self, seconds_min: float, seconds_max: float) -> None:
        self._seconds_min, self._seconds_max = seconds_min, seconds_max
        self._seconds = seconds_min

    def __repr__(self) -> str:
        return f"<Backoff {self._seconds:g} of at most {self._seconds_max:g} s>"

    def next_seconds(self) -> float:
        """The pause that is due now; the one after it may be twice as long."""
        seconds = self._seconds
        self._seconds = min(2 * seconds, self._seconds_max)
        return seconds * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It went well: the next pause is the shortest again."""
        self._seconds = self._seconds_min
