"""What nothing can be faster than: the same bytes into the same tables, nothing to decide; and into memory and files.

The payload is what ingestd sends for a capture, made beforehand. Signals and raw frames are both in it.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from ingestd.chunks import COPY_HEADER, COPY_TRAILER, Placement
from ingestd.decode.databases import load
from ingestd.imports import feed_items
from ingestd.model import ClockState
from ingestd.pipeline import Binding, Decoders, prepare
from ingestd.sources.captures import open_capture
from ingestd.store import embedded

# As the writer has it: with lz4 where the server knows it.
SETTINGS = (
    "SELECT set_config('default_toast_compression', 'lz4', false) FROM pg_settings"
    " WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals);"
)
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Payload:
    """Files of COPY's binary format, one a table."""

    files: dict[str, Path]
    columns: dict[str, tuple[str, ...]]
    signals: int
    frames: int

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def of(self, table: str) -> Payload:
        """That of one table alone."""
        return replace(self, files={table: self.files[table]})

    def remove(self) -> None:
        """Make room on the disk."""
        for path in self.files.values():
            path.unlink()


def bindings(dbc_arguments: Sequence[str]) -> list[Binding]:
    """Signal databases from SOURCE:FILE; FILE alone is for every source."""
    parts = [entry.rpartition(":") for entry in dbc_arguments]
    return [Binding(source or None, load(Path(path))) for source, _, path in parts]


def make_payload(capture: Path, dbc_arguments: Sequence[str], folder: Path) -> Payload:
    """What an import would send, in files that a server may read, too."""
    files = {table: folder / f"{table}.bin" for table in ("signal_chunks", "frame_chunks")}
    columns: dict[str, tuple[str, ...]] = {}
    handles = {table: path.open("wb") for table, path in files.items()}
    for handle in handles.values():
        handle.write(COPY_HEADER)
    placement = Placement(UUID(int=1), 0, ClockState.SET)
    transaction = None
    for transaction in prepare(feed_items(open_capture(capture)), Decoders(bindings(dbc_arguments)), placement):
        for copy in transaction.batch.copies:
            columns[copy.table] = copy.columns
            payload = b"".join(copy.pieces)
            handles[copy.table].write(payload[len(COPY_HEADER) : -len(COPY_TRAILER)])
    assert transaction is not None, "prepare gives at least one transaction"
    for table, handle in handles.items():
        handle.write(COPY_TRAILER)
        handle.close()
        files[table].chmod(0o644)
    return Payload(files, columns, transaction.counts.signals, transaction.counts.frames)


def copy_by_psql(dsn: str, payload: Payload) -> float:
    """Seconds that psql's \\copy needs for it: over the same socket, from files of the client."""
    return _psql(dsn, [rf"\copy {_target(payload, table)} FROM '{path}' WITH (FORMAT binary)"
                       for table, path in payload.files.items()])  # fmt: skip


def copy_by_server(dsn: str, payload: Payload) -> float:
    """Seconds that COPY needs where the server reads the files itself. It must be allowed to."""
    return _psql(dsn, [f"COPY {_target(payload, table)} FROM '{path}' WITH (FORMAT binary);"
                       for table, path in payload.files.items()])  # fmt: skip


def _target(payload: Payload, table: str) -> str:
    return f"{table} ({', '.join(payload.columns[table])})"


def _psql(dsn: str, statements: Sequence[str]) -> float:
    command = [str(embedded.psql_path()), dsn, "-q", "-X", "-v", "ON_ERROR_STOP=1"]
    started = time.perf_counter()
    subprocess.run(
        command, input="\n".join([SETTINGS, *statements, ""]), text=True, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def copy_in_memory(payload: Payload) -> float:
    """Seconds to copy it from one place in memory to another that has its pages already."""
    source = b"".join(path.read_bytes() for path in payload.files.values())
    there = memoryview(bytearray(len(source)))
    there[:] = source
    started = time.perf_counter()
    there[:] = source
    return time.perf_counter() - started


def write_file(payload: Payload, folder: Path) -> float:
    """Seconds to write it to a file and have it on the disk."""
    pieces = [path.read_bytes() for path in payload.files.values()]
    target = folder / "written"
    started = time.perf_counter()
    with target.open("wb", buffering=0) as file:
        for piece in pieces:
            for at in range(0, len(piece), PIECE_BYTES):
                file.write(memoryview(piece)[at : at + PIECE_BYTES])
        os.fdatasync(file.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds
