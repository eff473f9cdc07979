"""`ingestd journal`: what lies in the journal's folder. Only reads it; a daemon may go on recording."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

from ingestd.cli.console import Listing, err, json_option, out, warn
from ingestd.config import journal_folder, load_config
from ingestd.errors import IngestdError, UsageError
from ingestd.journal import JournalView, Kind, Record, scan
from ingestd.model import Flag, FrameBatch, SerialFlag

ERROR_FRAME = 0x20000000  # CAN_ERR_FLAG of linux/can.h, which candump prints as part of the id.


def place_options(command: Any) -> Any:
    """PATH or -c FILE: which journal."""
    command = click.argument("path", required=False, type=click.Path(path_type=Path))(command)
    return click.option(
        "-c", "--config", type=click.Path(path_type=Path), metavar="FILE", help="Take the folder from a configuration."
    )(command)


def place(path: Path | None, config: Path | None) -> JournalView:
    """The journal that was asked for: PATH, that of a configuration, or the one the daemon uses by default."""
    if path is not None and config is not None:
        raise UsageError("give PATH or --config, not both")
    return scan(path or (load_config(config).journal.path if config else journal_folder()))


@click.group("journal")
def journal_group() -> None:
    """What the daemon has recorded and the database does not have yet, or had last."""


@journal_group.command("status")
@place_options
@json_option
def status_command(path: Path | None, config: Path | None, as_json: bool) -> None:
    """What is in the journal at PATH: its stretches, and where the frames of each source are."""
    view = place(path, config)
    if as_json:
        out.print_json(json.dumps(status_json(view)), indent=None)
        return
    held = f"held by {view.holder}" if view.holder else "not in use"
    out.print(f"{view.folder}: {view.bytes_used:,} bytes, {held}")
    listed = Listing(
        "stretch", "session", "segments", "bytes", "records", "acknowledged", "frames", "pending",
        whole=["stretch", "session"],
    )  # fmt: skip
    for each in view.stretches():
        account = each.account
        listed.add(
            account.id, account.session_id, each.segments, f"{each.bytes:,}", f"{each.records:,}",
            f"{account.acknowledged:,} of {account.sequence_last:,}", f"{each.frames:,}", f"{each.pending:,}",
        )  # fmt: skip
    out.print(listed)
    books = Listing("source", "received", "committed", "pending", "rejected", "dropped", "", whole=["source"])
    for source, of in view.books().items():
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in of.dropped.items()) or "0"
        balance = "balanced" if of.balanced else "NOT BALANCED"
        books.add(source, *(f"{n:,}" for n in (of.received, of.committed, of.pending, of.rejected)), dropped, balance)
    out.print(books)
    for message in [*view.stock.warnings, *map(str, view.stock.damages)]:
        warn(message)


def status_json(view: JournalView) -> dict[str, Any]:
    """The status for programs."""
    return {
        "path": str(view.folder),
        "bytes": view.bytes_used,
        "held_by": view.holder,
        "torn_bytes": view.stock.torn_bytes,
        "warnings": view.stock.warnings,
        "damage": [{"file": d.path.name, "offset": d.offset, "bytes": len(d.data)} for d in view.stock.damages],
        "stretches": [
            {
                "id": each.account.id,
                "feed_id": each.account.feed_id,
                "session_id": str(each.account.session_id),
                "segments": each.segments,
                "bytes": each.bytes,
                "records": each.records,
                "acknowledged": each.account.acknowledged,
                "last_sequence": each.account.sequence_last,
                "frames": each.frames,
                "pending": each.pending,
            }
            for each in view.stretches()
        ],
        "books": {
            source: {
                "received": of.received,
                "committed": of.committed,
                "pending": of.pending,
                "rejected": of.rejected,
                "dropped": dict(of.dropped),
                "balanced": of.balanced,
            }
            for source, of in view.books().items()
        },
    }


@journal_group.command("verify")
@place_options
@json_option
def verify_command(path: Path | None, config: Path | None, as_json: bool) -> None:
    """Read everything in the journal at PATH and check every byte. Exits with 1 if anything is damaged."""
    view = place(path, config)
    problems = list(view.verify())
    if as_json:
        found = [{"file": p.file, "offset": p.offset, "what": p.what, "frames": dict(p.frames)} for p in problems]
        out.print_json(json.dumps({"torn_bytes": view.stock.torn_bytes, "problems": found}), indent=None)
    for problem in [] if as_json else problems:
        where = (
            f"{problem.file} at {problem.offset}: " if problem.offset else f"{problem.file}: " if problem.file else ""
        )
        lost = "".join(f"; {source}: {count:,} frames lost" for source, count in problem.frames.items())
        out.print(f"{where}{problem.what}{lost}")
    if problems:
        raise IngestdError(f"{len(problems)} problems in {view.folder}", "what can be read is sent all the same")
    if not as_json:
        records = sum(each.records for each in view.stretches())
        out.print(
            f"{view.folder}: {records:,} records in {len(view.stock.segments)} segments, all as they were written"
        )


@journal_group.command("export")
@place_options
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Default: stdout.")
@click.option("--rejected", is_flag=True, help="The records that the database can never take, instead of the others.")
@click.option("--stretch", metavar="ID", help="Only this stretch; the first digits are enough.")
@click.option("--source", metavar="NAME", help="Only this source.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["candump", "jsonl"]),
    default="candump",
    help="candump: CAN frames as `candump -L` writes them, for `ingestd import`. jsonl: everything, a line each.",
)
def export_command(
    path: Path | None,
    config: Path | None,
    output: Path | None,
    rejected: bool,
    stretch: str | None,
    source: str | None,
    form: str,
) -> None:
    """Write what is in the journal at PATH as text, with stamps in UTC."""
    view = place(path, config)
    lines = candump_lines if form == "candump" else json_lines
    left_out = 0
    with _open(output) as file:
        records = (record for record, _ in view.rejected_records()) if rejected else view.records(stretch)
        for record in records:
            if source not in (None, record.source) or not record.stretch_id.startswith(stretch or ""):
                continue
            count = 0
            for line in lines(record):
                file.write(line + "\n")
                count += 1
            left_out += record.frames_count - count if form == "candump" else 0
    if left_out:
        warn(f"{left_out:,} frames of serial lines are not in candump text; --format jsonl has them")
    if output is not None:
        err.print(f"written to {output}")


@contextmanager
def _open(output: Path | None) -> Iterator[IO[str]]:
    if output is None:
        yield sys.stdout
        return
    with output.open("w", encoding="utf-8") as file:
        yield file


def candump_lines(record: Record) -> Iterator[str]:
    """The CAN frames of a record, as can-utils' sprint_canframe and `candump -L` write them, to the nanosecond."""
    if record.kind is not Kind.FRAMES:
        return
    for ts_ns, number, flags, data in _frames(record):
        if flags & SerialFlag.SERIAL:
            continue
        seconds, rest_ns = divmod(ts_ns, 1_000_000_000)
        if flags & Flag.ERROR:
            name = f"{number | ERROR_FRAME:08X}"
        else:
            name = f"{number:08X}" if flags & Flag.EXTENDED else f"{number:03X}"
        if flags & Flag.FD:
            digit = bool(flags & Flag.BITRATE_SWITCH) | bool(flags & Flag.ERROR_STATE) << 1
            payload = f"#{digit:X}{data.hex().upper()}"
        else:
            payload = "R" if flags & Flag.REMOTE else data.hex().upper()
        direction = " T" if flags & Flag.TRANSMITTED else ""
        yield f"({seconds}.{rest_ns:09d}) {record.source} {name}#{payload}{direction}"


def json_lines(record: Record) -> Iterator[str]:
    """Whatever a record holds, an object a line."""
    about = {"stretch": record.stretch_id, "sequence": record.sequence, "session_id": str(record.session_id)}
    if record.kind is Kind.FRAMES:
        for ts_ns, number, flags, data in _frames(record):
            frame: dict[str, Any] = {"kind": "frame", "source": record.source, "ts_utc_ns": ts_ns, "id": number}
            frame |= {"flags": flags, "data": data.hex()}
            if flags & SerialFlag.SERIAL and flags & SerialFlag.TEXT:
                frame["text"] = data.decode("utf-8", "replace")
            yield json.dumps(about | frame)
        return
    what: dict[str, Any] = {"kind": record.kind.name.lower(), "source": record.source}
    if record.kind is Kind.EVENT:
        what["ts_utc_ns"] = record.ts_ns + record.clock.utc_offset_ns
    yield json.dumps(about | what | {"payload": record.json()})


def _frames(record: Record) -> Iterator[tuple[int, int, int, bytes]]:
    """UTC in nanoseconds, arbitration id, flags and data of each frame."""
    batch: FrameBatch = record.frames()
    stamps = (batch.ts_ns + record.clock.utc_offset_ns).tolist()
    columns = zip(stamps, batch.arbitration_id.tolist(), batch.flags.tolist(), batch.length.tolist(), strict=True)
    for row, (ts_ns, number, flags, length) in enumerate(columns):
        yield ts_ns, number, flags, batch.data[row, :length].tobytes()
