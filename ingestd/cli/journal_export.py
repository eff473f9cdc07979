"""Records of a journal as text that other programs read: candump text, or a line of JSON for each thing recorded.

candump text has microseconds and no place for serial lines, for events, and for payloads and names that no bus has.
What of frames it cannot hold is counted; names are written with `_` for what cannot be in them.
Format: can-utils, lib.c (sprint_canframe), as `candump -L` writes it; ` T` behind frames that were sent, as with -x.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ingestd.model import Flag, FrameBatch, SerialFlag
from ingestd.sources.captures.base import CLASSIC_BYTES_MAX, EXTENDED_ID_MAX, FD_LENGTHS, STANDARD_ID_MAX
from ingestd.sources.captures.candump_lines import ERROR_FRAME

if TYPE_CHECKING:
    from ingestd.journal import Record

_NOT_IN_NAMES = re.compile(r"[^!-\"$-~]")
_FD_FLAGS = {Flag.BITRATE_SWITCH: 1, Flag.ERROR_STATE: 2}  # CANFD_BRS and CANFD_ESI of linux/can.h.


@dataclass(slots=True)
class Told:
    """What was written, and what could not be."""

    frames: Counter[str] = field(default_factory=Counter)
    events: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # frames that the format has no place for
    renamed: dict[str, str] = field(default_factory=dict)
    damages: list[str] = field(default_factory=list)


def candump(record: Record, told: Told) -> bytes:
    """The lines of a record of frames, in wire order; nothing for every other."""
    from ingestd.journal import Kind

    if record.kind is not Kind.FRAMES:
        return b""
    batch = record.frames()
    utc_us = (batch.ts_ns + record.clock.utc_offset_ns) // 1000
    fits = _fits(batch) & (utc_us >= 0)
    if not fits.all():
        told.left_out[record.source] += int(np.count_nonzero(~fits))
        batch, utc_us = batch[fits], utc_us[fits]
    told.frames[record.source] += len(batch)
    name = _NOT_IN_NAMES.sub("_", record.source)
    if name != record.source:
        told.renamed[record.source] = name
    return "".join(_lines(batch, utc_us, name)).encode("ascii")


def _fits(batch: FrameBatch) -> NDArray[np.bool_]:
    """Which frames are such as a CAN bus has."""
    is_fd, is_wide = batch.flags & Flag.FD != 0, batch.flags & (Flag.EXTENDED | Flag.ERROR) != 0
    length_fits = np.where(is_fd, np.isin(batch.length, sorted(FD_LENGTHS)), batch.length <= CLASSIC_BYTES_MAX)
    id_fits = batch.arbitration_id <= np.where(is_wide, EXTENDED_ID_MAX, STANDARD_ID_MAX)
    fits: NDArray[np.bool_] = (batch.flags & SerialFlag.SERIAL == 0) & length_fits & id_fits
    return fits


def _lines(batch: FrameBatch, utc_us: NDArray[np.int64], name: str) -> Iterator[str]:
    payloads, digits = batch.data.tobytes().hex().upper(), 2 * batch.data.shape[1]
    seconds, micros = np.divmod(utc_us, 1_000_000)
    ids = np.where(batch.flags & Flag.ERROR, batch.arbitration_id | ERROR_FRAME, batch.arbitration_id)
    layouts = {flags: _layout(flags, name) for flags in np.unique(batch.flags).tolist()}
    rows = zip(
        seconds.tolist(), micros.tolist(), ids.tolist(), batch.flags.tolist(),
        (2 * batch.length.astype(np.int64)).tolist(), range(0, len(payloads), digits), strict=True,
    )  # fmt: skip
    for second, micro, number, flags, length, begin in rows:
        yield layouts[flags] % (second, micro, number, payloads[begin : begin + length])


def _layout(flags: int, name: str) -> str:
    """A line with places for seconds, microseconds, arbitration id and payload."""
    digits = "%08X" if flags & (Flag.EXTENDED | Flag.ERROR) else "%03X"
    fd = f"#{sum(bit for flag, bit in _FD_FLAGS.items() if flags & flag):X}" if flags & Flag.FD else ""
    remote, sent = "R" * bool(flags & Flag.REMOTE), " T" * bool(flags & Flag.TRANSMITTED)
    return f"(%010d.%06d) {name.replace('%', '%%')} {digits}#{fd}{remote}%s{sent}\n"


def jsonl(record: Record, told: Told, more: dict[str, Any]) -> bytes:
    """A line for each frame, for an event or for the metadata of a session; `more` goes into all of them."""
    from ingestd.journal import Kind

    where = {"session": str(record.session_id), "stretch": record.stretch_id, "sequence": record.sequence, **more}
    if record.kind is Kind.FRAMES:
        lines = list(_frame_lines(record, where))
        told.frames[record.source] += len(lines)
    elif record.kind is Kind.EVENT:
        told.events += 1
        event = record.event()
        at = {"ts_mono_ns": record.ts_ns, "utc": _utc(np.array([record.ts_ns]), record)[0]}
        about = {"event": event.kind, "key": event.key, "payload": event.payload, "lost": record.lost()}
        lines = [{"kind": "event", "source": record.source, **at, **about, **where}]
    elif record.kind is Kind.SESSION:
        lines = [{"kind": "session", "boot": record.boot_id, "fields": record.session(), **where}]
    else:
        return b""
    return msgspec.json.Encoder().encode_lines(lines)


def _frame_lines(record: Record, where: dict[str, Any]) -> Iterator[dict[str, Any]]:
    batch, clock = record.frames(), record.clock.state.name.lower()
    names = {bits: _flag_names(bits) for bits in np.unique(batch.flags).tolist()}
    rows = zip(
        batch.ts_ns.tolist(), _utc(batch.ts_ns, record), batch.arbitration_id.tolist(), batch.flags.tolist(),
        batch.length.tolist(), batch.data, strict=True,
    )  # fmt: skip
    for ts_ns, utc, number, bits, length, row in rows:
        payload = row[:length].tobytes()
        line = {"kind": "frame", "source": record.source, "ts_mono_ns": ts_ns, "utc": utc, "clock": clock}
        if not bits & SerialFlag.SERIAL:
            line["id"] = number
        line["flags"] = names[bits]
        if bits & SerialFlag.SERIAL and bits & SerialFlag.TEXT:
            line["text"] = payload.decode("utf-8", "replace")
        else:
            line["data"] = payload.hex()
        line.update(where)
        yield line


def _flag_names(bits: int) -> list[str]:
    kinds = SerialFlag if bits & SerialFlag.SERIAL else Flag
    return [str(kind.name).lower() for kind in kinds if bits & kind]


def _utc(ts_ns: NDArray[np.int64], record: Record) -> list[str]:
    """Stamps as ISO 8601 to the nanosecond."""
    instants = (ts_ns + record.clock.utc_offset_ns).astype("datetime64[ns]")
    return [f"{instant}Z" for instant in np.datetime_as_string(instants, unit="ns").tolist()]
