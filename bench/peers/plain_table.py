"""What the scripts written by hand share: one plain table with the usual indexes, and a row for each signal.

Kept deliberately ordinary: python-can reads, cantools decodes, a tuple is made of each value.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import can
import cantools

TABLE = """
CREATE TABLE naive_signals (
    id bigserial PRIMARY KEY,
    session_id text NOT NULL,
    source text NOT NULL,
    channel text NOT NULL,
    ts timestamptz NOT NULL,
    ts_ns bigint NOT NULL,
    value double precision,
    unit text
);
CREATE INDEX ON naive_signals (session_id);
CREATE INDEX ON naive_signals (source);
CREATE INDEX ON naive_signals (channel, ts);
CREATE INDEX ON naive_signals (ts);
"""
COLUMNS = ["session_id", "source", "channel", "ts", "ts_ns", "value", "unit"]
ROWS_AT_ONCE = 10_000

Row = tuple[Any, ...]


def load(databases: list[str]) -> dict[str, Any]:
    """The signal database of each source, from SOURCE:FILE; '' is every source."""
    by_source = {}
    for entry in databases:
        source, _, path = entry.rpartition(":")
        by_source[source] = cantools.database.load_file(path)
    return by_source


def rows(capture: str, by_source: dict[str, Any]) -> Iterator[Row]:
    """A row for each signal of each frame that is in a database."""
    for message in can.LogReader(capture):
        database = by_source.get(str(message.channel)) or by_source.get("")
        try:
            definition = database.get_message_by_frame_id(message.arbitration_id)
        except KeyError:
            continue
        values = definition.decode(bytes(message.data), decode_choices=False, allow_truncated=True)
        ns = round(message.timestamp * 1e6) * 1000
        moment = datetime.fromtimestamp(message.timestamp, UTC)
        for name, value in values.items():
            unit = definition.get_signal_by_name(name).unit
            yield "s1", message.channel, f"{definition.name}.{name}", moment, ns, float(value), unit


def batches(capture: str, by_source: dict[str, Any]) -> Iterator[list[Row]]:
    """The rows, 10,000 at a time."""
    found = rows(capture, by_source)
    while batch := list(islice(found, ROWS_AT_ONCE)):
        yield batch


def say(count: int, seconds: float) -> None:
    """What the runner reads."""
    sys.stdout.write(json.dumps({"count": count, "seconds": seconds}) + "\n")
