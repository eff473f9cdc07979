"""Dates in the headers of captures to nanoseconds since 1970, exactly, in the zone the user gave."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo

from ingestd.sources.captures.base import SECOND_NS, STAMP_NS_MAX

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def zoned_ns(parts: tuple[int, int, int, int, int, int], fraction_ns: int, zone: tzinfo) -> int | None:
    """Nanoseconds since 1970 of year, month, day, hour, minute, second in `zone`; None when that is no date."""
    try:
        ns = (datetime(*parts, tzinfo=zone) - EPOCH) // timedelta(microseconds=1) * 1000 + fraction_ns
    except (ValueError, OverflowError):
        return None
    return ns if abs(ns) <= STAMP_NS_MAX else None


def local_ns(naive_ns: int, zone: tzinfo) -> int | None:
    """Nanoseconds since 1970 of a local time in `zone`, given as if it were UTC; None when that is out of range."""
    date = EPOCH + timedelta(seconds=naive_ns // SECOND_NS)
    parts = (date.year, date.month, date.day, date.hour, date.minute, date.second)
    return zoned_ns(parts, naive_ns % SECOND_NS, zone)


def hour_of_day(hour: str, half: str | None) -> int:
    """0 to 23 from the hour of a clock with 24 hours, or with 12 and am or pm."""
    if half is None:
        return int(hour)
    return int(hour) % 12 + (12 if half.lower() == "pm" else 0)
