"""How delivering goes, in numbers and words."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ingestd.decode.can import Counts
from ingestd.metrics import Histogram
from ingestd.model import CopyData


@dataclass(slots=True)
class DeliveryStatus:
    """What the task says of itself, for metrics and for people."""

    database_up: bool = False
    trouble: str = "not connected yet"
    commits: int = 0
    failures: int = 0
    rejections: int = 0  # batches that the database can never take
    connections: int = 0  # that were opened
    samples: int = 0  # committed, as everything below
    copied_bytes: int = 0
    decoded: dict[str, Counts] = field(default_factory=dict)  # what became of the frames of each source
    commit_seconds: Histogram = field(default_factory=Histogram)
    lag_seconds: Histogram = field(default_factory=Histogram)  # wire to committed, of the oldest frame of a live batch
    lag_seconds_last: float = 0.0
    drained_at: float = field(default_factory=time.monotonic)  # when last nothing was left to send

    def note_settled(self, samples: int, copies: Iterable[CopyData], counts: Mapping[str, Counts]) -> None:
        """So many samples are in the database, with these copies and frames."""
        self.samples += samples
        self.copied_bytes += sum(copy.nbytes for copy in copies)
        for source, of_source in counts.items():
            self.decoded.setdefault(source, Counts()).add(of_source)
