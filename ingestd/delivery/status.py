"""How delivering goes, in numbers and words."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ingestd.metrics import Histogram


@dataclass(slots=True)
class DeliveryStatus:
    """What the task says of itself, for metrics and for people."""

    database_up: bool = False
    trouble: str = "not connected yet"
    commits: int = 0
    failures: int = 0
    commit_seconds: Histogram = field(default_factory=Histogram)
    lag_seconds: Histogram = field(default_factory=Histogram)  # wire to committed, of the oldest frame of a live batch
    lag_seconds_last: float = 0.0
    drained_at: float = field(default_factory=time.monotonic)  # when last nothing was left to send
