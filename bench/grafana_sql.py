"""What Grafana sends to PostgreSQL for a query in a dashboard: its variables and macros put in as it does it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise

# Lengths of a point that Grafana rounds to, in milliseconds, up to a week.
INTERVALS_MS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 15_000, 20_000, 30_000),
    *(minutes * 60_000 for minutes in (1, 2, 5, 10, 15, 20, 30, 60, 120, 180, 360, 720, 1440, 10_080)),
)


@dataclass(frozen=True, slots=True)
class View:
    """A dashboard as somebody looks at it: a window of time, the points of a panel, and what was chosen."""

    begin: datetime
    end: datetime
    points: int = 1000
    variables: Mapping[str, str | Sequence[str]] = field(default_factory=dict)

    @property
    def interval_ms(self) -> int:
        """The length of a point: that of the list which is nearest."""
        wanted = (self.end - self.begin) / timedelta(milliseconds=1) / self.points
        return next((low for low, high in pairwise(INTERVALS_MS) if wanted < (low + high) / 2), INTERVALS_MS[-1])

    def filled(self, query: str) -> str:
        """The query as PostgreSQL gets it. Raises KeyError for a variable that nobody has chosen."""
        begin, end = (f"'{moment:%Y-%m-%dT%H:%M:%S.%fZ}'" for moment in (self.begin, self.end))
        query = re.sub(r"\$\{(\w+):sqlstring\}", lambda found: _quoted(self.variables[found[1]]), query)
        query = re.sub(r"\$__timeFilter\(([^()]+)\)", rf"\1 BETWEEN {begin} AND {end}", query)
        query = query.replace("$__timeFrom()", begin).replace("$__timeTo()", end)
        numbers = {"interval_ms": self.interval_ms, "from": _milliseconds(self.begin), "to": _milliseconds(self.end)}
        return re.sub(r"\$__(interval_ms|from|to)\b", lambda found: str(numbers[found[1]]), query)


def _quoted(chosen: str | Sequence[str]) -> str:
    values = [chosen] if isinstance(chosen, str) else chosen
    return ",".join("'" + value.replace("'", "''") + "'" for value in values)


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
