"""What a capture would give if it were imported, found out without a database: `ingestd check --capture`.

The whole file is read and decoded, so the shares are exact; bytes per day are an estimate, see the constants.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ingestd.decode.can import Counts, Decoder
from ingestd.imports import ImportOptions, feed_items
from ingestd.model import Flag, FrameBatch
from ingestd.pipeline import Decoders
from ingestd.sources.captures import open_capture

# Stored bytes, with indexes, of a busy bus on a server with lz4, rounded up: 3.3 and 15.0 in docs/performance.md.
BYTES_PER_SAMPLE = 4.0
BYTES_PER_FRAME = 16.0

PGN_SUGGESTED_BELOW = 0.05  # An all-extended database that knows fewer frames by id is probably meant by PGN.


@dataclass(slots=True)
class Survey:
    """Counts, ids without a message, channels with their samples, and the time the capture spans."""

    counts: Counts = field(default_factory=Counts)
    unknown_ids: Counter[tuple[str, int, bool]] = field(default_factory=Counter)  # source, arbitration id, extended
    channels: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # source, channel, unit
    first_ns: int = 2**63 - 1
    last_ns: int = -(2**63)
    damaged: int = 0
    damage: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    suggest_pgn: tuple[str, ...] = ()  # databases that hardly match by id and may be meant by PGN

    @property
    def seconds(self) -> float:
        """From the first stamp to the last."""
        return max(0, self.last_ns - self.first_ns) / 1e9 if self.counts.frames else 0.0

    def per_second(self, count: int) -> float:
        """A rate over the capture's span; 0 where it has none."""
        return count / self.seconds if self.seconds else 0.0

    @property
    def gigabytes_per_day(self) -> float:
        """Estimated size of a day of this in the database, raw frames included."""
        per_second = BYTES_PER_SAMPLE * self.per_second(self.counts.signals)
        return 86_400 * (per_second + BYTES_PER_FRAME * self.per_second(self.counts.frames)) / 1e9

    def as_json(self) -> dict[str, Any]:
        """The stable face for programs."""
        counts = self.counts
        return {
            "seconds": round(self.seconds, 6),
            "frames": counts.frames,
            "decoded_frames": counts.decoded,
            "decoded_share": counts.decoded / counts.frames if counts.frames else 0.0,
            "unknown_frames": counts.unknown,
            "undecoded_frames": counts.undecoded,
            "remote_frames": counts.remote,
            "error_frames": counts.error,
            "short_frames": counts.short,
            "damaged": self.damaged,
            "damage": list(self.damage),
            "signals": counts.signals,
            "samples_per_day": round(86_400 * self.per_second(counts.signals)),
            "gigabytes_per_day": round(self.gigabytes_per_day, 3),
            "unknown_ids": [
                {"source": source, "id": f"{number:0{8 if extended else 3}X}", "frames": frames,
                 "per_second": round(self.per_second(frames), 3)}
                for (source, number, extended), frames in self.unknown_ids.most_common()
            ],
            "channels": [
                {"source": source, "channel": channel, "unit": unit or None, "samples": samples,
                 "per_second": round(self.per_second(samples), 3)}
                for (source, channel, unit), samples in sorted(self.channels.items())
            ],
            "warnings": list(self.warnings),
            "suggest_match_pgn": list(self.suggest_pgn),
        }  # fmt: skip


def survey(path: Path, options: ImportOptions) -> Survey:
    """Read and decode a whole capture without storing anything. Raises CaptureError."""
    capture = open_capture(path, source_names=options.source_names, rate=options.rate, timezone=options.timezone)
    decoders = Decoders(options.bindings, keep_not_available=options.keep_not_available)
    result = Survey()
    known: Counter[str] = Counter()  # frames decoded, by database
    extended: Counter[str] = Counter()  # frames with an extended id, by source
    for item in feed_items(capture):
        for batch in item.frames:
            extended[batch.source] += int(np.count_nonzero(batch.flags & Flag.EXTENDED))
            _add(result, known, batch, decoders)
    result.damaged, result.damage = capture.damage.count, tuple(capture.damage.first)
    result.warnings = tuple(decoders.warnings)
    for binding in options.bindings:
        messages = binding.database.messages
        of_sources = sum(count for source, count in extended.items() if binding.source in (None, source))
        matching = known[binding.database.name]
        only_by_id = messages and all(m.extended and not m.by_pgn for m in messages)
        if only_by_id and matching < PGN_SUGGESTED_BELOW * of_sources:
            result.suggest_pgn += (binding.database.name,)
    return result


def _add(result: Survey, known: Counter[str], batch: FrameBatch, decoders: Decoders) -> None:
    decoder = decoders.of(batch.source)
    assert isinstance(decoder, Decoder), "captures are of CAN buses"
    decoded = decoder.decode(batch)
    result.counts.add(decoded.counts)
    result.first_ns = min(result.first_ns, int(batch.ts_ns.min()))
    result.last_ns = max(result.last_ns, int(batch.ts_ns.max()))
    unknown = decoder.unknown(batch)
    keys = batch.arbitration_id[unknown].astype(np.int64) << 1 | (batch.flags[unknown] & Flag.EXTENDED)
    for key, frames in zip(*(column.tolist() for column in np.unique(keys, return_counts=True)), strict=True):
        result.unknown_ids[batch.source, key >> 1, bool(key & 1)] += frames
    for signals in decoded.batches:
        known[signals.group.origin] += len(signals)
        for channel in signals.group.channels:
            result.channels[signals.group.source, channel.name, channel.unit or ""] += len(signals)
