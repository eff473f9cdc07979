"""MDF 4 with bus logging (ASAM MDF bus logging, as CANedge writes it), read by asammdf.

Limits: frames of all channel groups are merged by time, those of one stamp in the order of their groups. All of them
are in memory at once: some 100 bytes a frame. A frame whose length its group cannot store, or no frame can have, is
damage; the group's record is named.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingestd.errors import CaptureError
from ingestd.model import Flag, FrameBatch, padded_width
from ingestd.sources.captures.base import (
    CLASSIC_BYTES_MAX,
    EXTENDED_ID_MAX,
    FD_LENGTHS,
    STANDARD_ID_MAX,
    Capture,
    CaptureBatch,
    Options,
    Sources,
)
from ingestd.sources.captures.dates import local_ns

UNFINISHED = b"UnFinMF"

Columns = dict[str, NDArray[Any]]


class Mf4Capture(Capture):
    """MDF 4 with bus logging (ASAM MDF bus logging, as CANedge writes it), read by asammdf.

    Frames of all channel groups are merged by time, those of one stamp in the order of their groups. All of them are
    in memory at once: some 100 bytes a frame.
    """

    kind = "mf4"

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        self._unreadable: list[int] = []  # Numbers of records.
        self._table, date = self._load()
        self._set_clock(date)

    def _pieces(self) -> Iterator[CaptureBatch]:
        sources, table = Sources(self._options.source_names), self._table
        for number in self._unreadable:
            self.damage.add_record(number, "a frame of impossible length")
        if table is not None:
            columns = (table[name] for name in ("ts_ns", "id", "flags", "length", "data"))
            index = sources.indices(table["channel"])
            yield CaptureBatch(FrameBatch("", *columns), index, sources.seen(), self.size_bytes)

    def _load(self) -> tuple[Columns | None, int | None]:
        with self.path.open("rb") as file:
            version = file.read(16)[8:].decode("ascii", "replace").strip(" \0")
        if version[:1] != "4":
            raise CaptureError(f"{self.path} is MDF {version}, without bus frames", "convert it to MF4")
        try:
            with TemporaryDirectory(prefix="ingestd-") as folder:
                mdf = _open_mdf(self.path, Path(folder))
                try:
                    groups = [group for index in range(len(mdf.groups)) for group in self._group(mdf, index)]
                    return _merge(groups), self._date(mdf.header)
                finally:
                    mdf.close()
        except (CaptureError, OSError, MemoryError):
            raise
        except Exception as error:  # asammdf lets through whatever a damaged file makes its code raise.
            raise CaptureError(f"{self.path} is damaged or not an MF4 file: {error}", "try asammdf's repair") from error

    def _date(self, header: Any) -> int | None:
        """The start of the measurement; where it is local time without a zone, in the zone of the options."""
        if header.abs_time <= 0:
            return None
        if not header.time_flags & 1:
            return int(header.abs_time)
        return local_ns(int(header.abs_time), self._options.timezone)

    def _group(self, mdf: Any, index: int) -> Iterator[Columns]:
        """The columns of a channel group, if it holds CAN frames of any sort."""
        names = {channel.name for channel in mdf.groups[index].channels}
        for event, flag in (("CAN_DataFrame", 0), ("CAN_RemoteFrame", Flag.REMOTE), ("CAN_ErrorFrame", Flag.ERROR)):
            if event in names and mdf.groups[index].channel_group.cycles_nr > 0:
                signal = mdf.get(event, index, raw=False)
                columns, good = _mf4_columns(signal, event, int(flag))
                if event == "CAN_DataFrame" and not columns["data"].size and columns["length"].any():
                    raise CaptureError(f"{self.path} has frames without DataBytes", "was the file converted?")
                self._unreadable += (np.flatnonzero(~good) + 1).tolist()
                yield {name: column[good] for name, column in columns.items()}


def _open_mdf(path: Path, folder: Path) -> Any:
    """asammdf's object of an MDF 4 file, to be closed. What it has to write goes into `folder`.

    An unfinished file, which is what loggers write, it copies with its permissions and then finishes the copy: of a
    read-only file that fails, and the copy stays behind. So it gets a copy of ours, which it may write.
    """
    try:
        import asammdf  # An extra, and a second to import.
        from asammdf.blocks import mdf_v4, v4_blocks
    except ImportError as error:
        raise CaptureError(f"{path} is MF4, which needs asammdf", "pip install 'ingestd[mf4]'") from error
    logging.getLogger(asammdf.__name__).setLevel(logging.CRITICAL)  # It logs what it also raises …
    for module in (mdf_v4, v4_blocks):
        module.print = lambda *_args, **_kwargs: None  # type: ignore[attr-defined]  # … and prints.

    class QuietMDF4(mdf_v4.MDF4):
        def __del__(self) -> None:
            """A file too damaged to open leaves an object behind, whose finaliser would print an error.

            It lacks a header, or its temporary file has gone with its folder.
            """
            with contextlib.suppress(FileNotFoundError):
                if hasattr(self, "header") and hasattr(self, "_file"):
                    super().__del__()
                elif hasattr(self, "_tempfile"):
                    self._tempfile.close()

    with path.open("rb") as file:
        unfinished = file.read(len(UNFINISHED)) == UNFINISHED
    copy = folder / "unfinished.mf4"
    if unfinished:
        shutil.copyfile(path, copy)
    # As asammdf's own class MDF makes it.
    return QuietMDF4(copy if unfinished else path, original_name=path, temporary_folder=str(folder), __internal__=True)


def _mf4_columns(signal: Any, event: str, kind: int) -> tuple[Columns, NDArray[np.bool_]]:
    """The columns of a group's frames, and which frames have a length that can be. `data` is empty if there is none."""
    samples, count = signal.samples, len(signal.timestamps)

    def column(name: str) -> NDArray[Any]:
        name = f"{event}.{name}"
        return samples[name] if name in samples.dtype.names else np.zeros(count, np.uint8)

    number = column("ID").astype(np.uint32)
    has_ide = f"{event}.IDE" in samples.dtype.names
    extended = column("IDE") != 0 if has_ide else (number >> 31 != 0) | (number & EXTENDED_ID_MAX > STANDARD_ID_MAX)
    direction = column("Dir")
    sent = direction == b"Tx" if direction.dtype.kind == "S" else direction.astype(np.int64) == 1
    flags = np.full(count, kind, np.uint8)
    for name, flag in (("EDL", Flag.FD), ("BRS", Flag.BITRATE_SWITCH), ("ESI", Flag.ERROR_STATE)):
        flags |= np.where(column(name) != 0, np.uint8(flag), np.uint8(0))
    if kind != Flag.ERROR:  # As in the other kinds: what was disturbed has no format.
        flags |= np.where(extended, np.uint8(Flag.EXTENDED), np.uint8(0))
    flags |= np.where(sent, np.uint8(Flag.TRANSMITTED), np.uint8(0))
    data = column("DataBytes")
    data = data if data.ndim == 2 else np.zeros((count, 0), np.uint8)
    length = np.minimum(column("DataLength").astype(np.int64), 0xFFFF).astype(np.uint16)
    if kind & Flag.REMOTE:
        length[:] = 0
    good = np.ones(count, np.bool_)
    if not kind:
        good = (length <= data.shape[1]) & np.isin(length, list(FD_LENGTHS))
        if f"{event}.EDL" in samples.dtype.names:
            good &= (length <= CLASSIC_BYTES_MAX) | (flags & Flag.FD != 0)
    if data.shape[1] or kind:
        length = np.minimum(length, min(data.shape[1], 64)).astype(np.uint16)
    width = padded_width(length) if data.shape[1] or kind else 0
    padded = np.zeros((count, width), np.uint8)
    shared = min(width, data.shape[1])
    padded[:, :shared] = np.where(np.arange(shared) < length[:, None], data[:, :shared], 0)
    columns = {
        "stamp": signal.timestamps,
        "ts_ns": np.round(signal.timestamps * 1e6).astype(np.int64) * 1000,
        "id": number & np.uint32(EXTENDED_ID_MAX),
        "flags": flags,
        "length": length,
        "data": padded,
        "channel": column("BusChannel").astype(np.int64),
    }
    return columns, good


def _merge(groups: list[Columns]) -> Columns | None:
    """One table by time; frames of one stamp keep the order of the groups. None if there are no frames."""
    if not groups:
        return None
    width = max(group["data"].shape[1] for group in groups)
    for group in groups:
        group["data"] = np.pad(group["data"], ((0, 0), (0, width - group["data"].shape[1])))
    table = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    order = np.argsort(table.pop("stamp"), kind="stable")
    return {name: column[order] for name, column in table.items()}
