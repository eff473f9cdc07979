"""Capture files to frame batches: candump text, Vector ASC and BLF, PCAN TRC, CSV and MF4.

`open_capture` finds out by content what a file is; the `Capture` it returns gives batches of all sources interleaved,
in file order. A module is imported once a file of its kind is opened: python-can and asammdf take long to import.

Limits and invariants, besides those of `base`:
- Memory is bounded whatever the file's size, except for MF4, whose channel groups are merged in memory.
- Stamps are integers. candump, CSV and BLF stamps are read as such (BLF: 10 µs or 1 ns units; CSV is rounded to
  microseconds, because its writers print floats). ASC and TRC go through python-can and MF4 through asammdf, which
  hand out float seconds: they are rounded to microseconds. Relative to the file's start a float64 resolves better
  than a nanosecond for months, so that what was written in microseconds comes back exactly.
- ASC, TRC, BLF and MF4 hold stamps relative to a date in their header: the stamp stays relative and the date becomes
  `utc_offset_ns`. A date without a zone is in the `timezone` given.
- A source is the interface's name. Where a file only has channel numbers, channel 1 is `can0` (ASC, BLF, TRC, CSV);
  MF4 of CANedge calls its channels CAN1 and CAN2, and so do we: bus 1 is `can1`.
"""

from __future__ import annotations

import math
import re
from codecs import BOM_UTF8
from collections.abc import Mapping
from datetime import UTC, tzinfo
from fractions import Fraction
from importlib import import_module
from pathlib import Path

from ingestd.errors import CaptureError, UsageError
from ingestd.sources.captures.base import SUPPORTED_HINT, Capture, CaptureBatch, Damage, Options, unreadable
from ingestd.sources.captures.candump_lines import parse_line
from ingestd.sources.captures.text import GZIP_MAGIC, LineError, decode_text, read_blocks

__all__ = ["Capture", "CaptureBatch", "Damage", "open_capture"]

RATE_MIN, RATE_MAX = 1e-3, 1e9
_HEAD_BYTES = 1 << 16  # What detection looks at.
_MAGIC = {b"LOGG": "blf", b"MDF ": "mf4", b"UnFi": "mf4"}
_CLASSES = {
    "candump": ("candump", "CandumpCapture"),
    "asc": ("asc", "AscCapture"),
    "trc": ("trc", "TrcCapture"),
    "csv": ("python_can_csv", "CsvCapture"),
    "blf": ("blf", "BlfCapture"),
    "mf4": ("mf4", "Mf4Capture"),
}
_EXTENSIONS = {
    ".log": "candump",
    ".mdf": "mf4",
    **{f".{kind}": kind for kind in _CLASSES},
}
_SIGNS = {
    "asc": r"date\s+\w+\s+\w+\s+\d|base\s+(hex|dec)\b|begin\s+triggerblock\b"
    r"|\d+\.\d+\s+(\d+\s+(\w+\s+(Tx|Rx)|ErrorFrame)|CANFD)",
    "trc": r";\$(FILEVERSION|STARTTIME|COLUMNS)=|;\s*(PCAN|Start time:)|\d+\)\s+\d+(\.\d+)?\s+\S",
    "csv": r"timestamp,arbitration_id,extended,remote,error,dlc,data"
    r"|timestampepoch;buschannel;id;ide;dlc;datalength;dir;edl;brs;databytes",
}


def open_capture(
    path: Path | str,
    *,
    source_names: Mapping[str, str] | None = None,
    rate: float | None = None,
    timezone: tzinfo = UTC,
) -> Capture:
    """The capture at `path`, whatever its kind: found by content first, by the name's extension second.

    `source_names` renames interfaces of the file; `rate` is frames per second for captures without stamps;
    `timezone` is the zone of dates that have none. Raises CaptureError for anything that is not a readable capture,
    UsageError for an impossible rate.
    """
    path = Path(path)
    if rate is not None and not (math.isfinite(rate) and RATE_MIN <= rate <= RATE_MAX):
        raise UsageError(f"a rate of {rate} frames per second is impossible", f"{RATE_MIN:g} to {RATE_MAX:g}")
    options = Options(source_names or {}, None if rate is None else Fraction(rate), timezone)
    try:
        if path.is_dir():
            raise CaptureError(f"{path} is a directory, not a capture", "name the files in it")
        if path.exists() and not path.is_file():
            raise CaptureError(f"{path} is not a regular file", "write the capture to a file first")
        capture = _capture_class(_detect(path))(path, options)
        capture.probe()
    except OSError as error:
        raise unreadable(path, error) from error
    return capture


def _capture_class(kind: str) -> type[Capture]:
    module, name = _CLASSES[kind]
    found: type[Capture] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def _detect(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise CaptureError(f"{path} is empty", SUPPORTED_HINT)
    name = path
    if head.startswith(GZIP_MAGIC):
        name = path.with_suffix("")
        head = next((data for data, _ in read_blocks(path, _HEAD_BYTES, Damage())), b"")
        if head[:4] in _MAGIC:
            raise CaptureError(f"{path} is a gzipped {_MAGIC[head[:4]]} file", "unpack it with gunzip first")
    kind = _MAGIC.get(head[:4]) or _detect_text(head.removeprefix(BOM_UTF8)) or _EXTENSIONS.get(name.suffix.lower())
    if kind is None:
        raise CaptureError(f"{path} is not a capture of a known kind", SUPPORTED_HINT)
    return kind


def _detect_text(head: bytes) -> str | None:
    """The kind of the first line that only one kind has."""
    for line in head.splitlines():
        text = decode_text(line).strip()
        for kind, sign in _SIGNS.items():
            if re.match(sign, text, re.IGNORECASE):
                return kind
        try:
            if parse_line(line) is not None:
                return "candump"
        except LineError:
            pass
    return None
