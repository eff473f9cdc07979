"""`ingestd journal`: what lies on the local disk, whether it is whole, and out of it without a database."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ingestd.cli.console import Listing, err, json_option, moment, out, warn
from ingestd.cli.journal_export import Told, candump, jsonl
from ingestd.config import existing_journal, load_config
from ingestd.errors import UsageError
from ingestd.model import ClockState

# The journal itself is imported by its commands: the others do without, also where its kind of lock is unknown.
if TYPE_CHECKING:
    from ingestd.journal import Record
    from ingestd.journal.inspection import JournalSight, StretchSight
    from ingestd.journal.verification import Verification

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAMAGES_SHOWN_MAX = 50
ANY_DATABASE = "postgresql://"  # These commands need none, and a configuration must name one.


def where_options(command: Callable[..., None]) -> Callable[..., None]:
    """PATH and -c."""
    configuration = click.option(
        "-c", "--config", "config", type=click.Path(path_type=Path), metavar="FILE",
        help="The journal of this configuration.",
    )  # fmt: skip
    return click.argument("path", required=False, type=click.Path(path_type=Path))(configuration(command))


def folder_of(path: Path | None, config: Path | None) -> Path:
    """The journal's folder: as named, as configured, or the default. Raises UsageError."""
    if path is not None and config is not None:
        raise UsageError("a PATH and -c name a journal each", "leave one of the two out")
    if config is not None:
        return load_config(config, dsn=ANY_DATABASE).journal.path
    return existing_journal() if path is None else path


@click.group("journal")
def journal_group() -> None:
    """The journal: what is on the local disk, sent or not. Works beside a running daemon and changes nothing.

    PATH is the journal's folder. Without it and without -c it is the default one.
    """


@journal_group.command("status")
@where_options
@json_option
def journal_status(path: Path | None, config: Path | None, as_json: bool) -> None:
    """Where every frame is: who holds the journal, its stretches, and the books of each source."""
    from ingestd.journal.inspection import look

    folder, bytes_max = folder_of(path, config), None
    if config is not None:
        bytes_max = load_config(config, dsn=ANY_DATABASE).journal.max_bytes
    sight = look(folder)
    if as_json:
        out.print_json(json.dumps({**status_json(sight), "bytes_max": bytes_max}), indent=None)
    else:
        print_status(sight, bytes_max)


def print_status(sight: JournalSight, bytes_max: int | None) -> None:
    """What is in a journal, for people."""
    for message in sight.warnings:
        warn(message)
    out.print(f"journal {sight.folder}: {f'held by {sight.holder}' if sight.holder else 'nobody holds it'}")
    unused = f", and {sight.unused:,} allocated ahead" if sight.unused else ""
    out.print(
        f"{sight.segments:,} segment{'s' * (sight.segments != 1)}{unused}; {decimal(sight.bytes)} in all"
        + (f", of {decimal(bytes_max)} that it may take" if bytes_max else "")
    )
    stretches = Listing(
        "stretch", "session", "begun (UTC)", "segments", "bytes", "frames", "pending", "records", "acknowledged",
        whole=["stretch"],
    )  # fmt: skip
    for stretch in sight.stretches:
        stretches.add(
            stretch.id[:8], stretch.session_name or stretch.session_id, begun(stretch), f"{stretch.segments:,}",
            decimal(stretch.bytes), f"{sum(stretch.frames.values()):,}", f"{sum(stretch.pending.values()):,}",
            f"{stretch.records:,}", f"{stretch.acknowledged:,}",
        )  # fmt: skip
    out.print(stretches if sight.stretches else "nothing is recorded in it")
    for stretch in sight.stretches:
        if stretch.feed_id != stretch.id:
            out.print(f"stretch {stretch.id[:8]} is sent as feed {stretch.feed_id}")
    if sight.books:
        books = Listing("source", "received", "committed", "pending", "rejected", "dropped", "books", whole=["source"])
        for source, of in sight.books.items():
            dropped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(of.dropped.items()))
            books.add(
                source, f"{of.received:,}", f"{of.committed:,}", f"{of.pending:,}", f"{of.rejected:,}", dropped or "0",
                "balanced" if of.balanced else "NOT BALANCED",
            )  # fmt: skip
        out.print(books)
    if sight.torn_bytes:
        out.print(f"{sight.torn_bytes:,} bytes at the ends of stretches were not written whole")
    for damage in sight.damages[:DAMAGES_SHOWN_MAX]:
        out.print(f"damaged: {damage}")
    if sight.damages:
        out.print(f"{len(sight.damages):,} damaged places in what was read; ingestd journal verify reads all of it")
    aside = (sight.rejected, "rejected records: ingestd journal export --rejected"), (sight.aside, "damage kept aside")
    for files, what in aside:
        if files:
            out.print(
                f"{len(files):,} file{'s' * (len(files) > 1)}, {decimal(sum(file.bytes for file in files))}, of {what}"
            )


def begun(stretch: StretchSight) -> str:
    """When a stretch begins, for people."""
    if stretch.begun_ns is None or stretch.begun_clock is None:
        return ""
    shown = moment(EPOCH + timedelta(microseconds=stretch.begun_ns // 1000))
    clock = stretch.begun_clock.state
    return shown if clock is ClockState.SET else f"{shown} (clock {clock.name.lower()})"


def status_json(sight: JournalSight) -> dict[str, Any]:
    """What is in a journal, for programs."""
    return {
        "folder": str(sight.folder),
        "held_by": sight.holder,
        "segments": sight.segments,
        "unused_segments": sight.unused,
        "bytes": sight.bytes,
        "stretches": [
            {
                "id": stretch.id,
                "session": str(stretch.session_id),
                "session_name": stretch.session_name,
                "boot": stretch.boot_id,
                "machine": stretch.machine_id,
                "feed": stretch.feed_id,
                "newest": stretch.is_newest,
                "begun_utc": (
                    None if stretch.begun_ns is None
                    else (EPOCH + timedelta(microseconds=stretch.begun_ns // 1000)).isoformat()
                ),
                "clock": None if stretch.begun_clock is None else stretch.begun_clock.state.name.lower(),
                "segments": stretch.segments,
                "bytes": stretch.bytes,
                "records": stretch.records,
                "acknowledged": stretch.acknowledged,
                "frames": stretch.frames,
                "pending": stretch.pending,
            }
            for stretch in sight.stretches
        ],
        "books": {
            source: {
                "received": of.received, "committed": of.committed, "pending": of.pending, "rejected": of.rejected,
                "dropped": dict(of.dropped), "balanced": of.balanced,
            }
            for source, of in sight.books.items()
        },
        "torn_bytes": sight.torn_bytes,
        "damage": [{"file": d.path.name, "offset": d.offset, "bytes": len(d.data)} for d in sight.damages],
        "rejected_files": [{"file": file.path.name, "bytes": file.bytes} for file in sight.rejected],
        "damage_files": [{"file": file.path.name, "bytes": file.bytes} for file in sight.aside],
        "warnings": sight.warnings,
    }  # fmt: skip


@journal_group.command("verify")
@where_options
@json_option
def journal_verify(path: Path | None, config: Path | None, as_json: bool) -> None:
    """Read every byte. Says what is damaged and what that cost; then, or if a file cannot be read, exits with 1."""
    from ingestd.journal.verification import verify

    folder = folder_of(path, config)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(folder.name, total=None)
        found = verify(folder, lambda done, total: bar.update(task, completed=done, total=total))
    for message in found.warnings:
        warn(message)
    if as_json:
        out.print_json(json.dumps(verification_json(folder, found)), indent=None)
    else:
        print_verification(folder, found)
    if found.findings or found.warnings:
        raise click.exceptions.Exit(1)


def print_verification(folder: Path, found: Verification) -> None:
    """What reading all of it found, for people."""
    for finding in found.findings[:DAMAGES_SHOWN_MAX]:
        out.print(f"damaged: {finding}")
    if len(found.findings) > DAMAGES_SHOWN_MAX:
        out.print(f"… and {len(found.findings) - DAMAGES_SHOWN_MAX:,} more places; --json has all")
    frames = ", ".join(f"{count:,} of {source}" for source, count in sorted(found.frames.items()))
    out.print(
        f"journal {folder}: {found.segments:,} segments, {decimal(found.bytes)}, {found.records:,} records, "
        f"frames: {frames or 'none'}"
    )
    if found.torn_bytes:
        out.print(f"{found.torn_bytes:,} bytes at the ends of stretches were not written whole, which is no damage")
    places = "1 damaged place" if len(found.findings) == 1 else f"{len(found.findings):,} damaged places"
    out.print(places if found.findings else "no damage")


def verification_json(folder: Path, found: Verification) -> dict[str, Any]:
    """What reading all of it found, for programs."""
    return {
        "folder": str(folder),
        "segments": found.segments,
        "bytes": found.bytes,
        "records": found.records,
        "frames": dict(found.frames),
        "rejected_frames": dict(found.rejected_frames),
        "torn_bytes": found.torn_bytes,
        "damage": [finding.as_json() for finding in found.findings],
        "warnings": found.warnings,
    }


@journal_group.command("export")
@where_options
@click.option("--rejected", is_flag=True, help="What PostgreSQL refused for good, and not what is stored or waits.")
@click.option("--stretch", metavar="ID", help="One stretch; the first characters of its id, as status shows it.")
@click.option("--source", metavar="NAME", help="One source.")
@click.option(
    "--format", "kind", type=click.Choice(["candump", "jsonl"]), default="candump", show_default=True,
    help="candump: text as of candump -L, in microseconds of UTC, CAN frames alone. "
    "jsonl: a line of JSON for each frame (nanoseconds, serial lines too), event and session.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Default: stdout.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
def journal_export_command(
    path: Path | None,
    config: Path | None,
    rejected: bool,
    stretch: str | None,
    source: str | None,
    kind: str,
    output: Path | None,
    force: bool,
) -> None:
    """Write frames out as text, sent or not; `ingestd import` reads candump text back.

    Frames of a source are in the order of the wire; sources follow each other in blocks of a moment. FILE appears once
    it is complete.
    """
    folder, told, sources = folder_of(path, config), Told(), set[str]()
    if output is not None:
        require_writable(output, force=force)
    found = refused(folder, stretch or "", told) if rejected else kept(folder, stretch or "", told)
    with destination(output) as file:
        for record, more in found:
            sources.add(record.source)
            if source is None or record.source == source:
                file.write(candump(record, told) if kind == "candump" else jsonl(record, told, more))
        if source is not None and source not in sources:
            known = ", ".join(sorted(sources - {""}))
            raise UsageError(f"there is nothing of a source {source}", f"there is {known}" if known else "")
    tell(told, output)


def kept(folder: Path, stretch: str, told: Told) -> Iterator[tuple[Record, dict[str, Any]]]:
    """What is in the stretches."""
    from ingestd.journal.inspection import recorded

    return ((record, {}) for record in recorded(folder, stretch, told.damages.append))


def refused(folder: Path, stretch: str, told: Told) -> Iterator[tuple[Record, dict[str, Any]]]:
    """What PostgreSQL refused, with its reason."""
    from ingestd.journal.inspection import rejected

    return ((record, {"reason": reason}) for record, reason in rejected(folder, stretch, told.damages.append))


def require_writable(output: Path, *, force: bool) -> None:
    """Raise UsageError for an output that is there, unless it may be replaced, or that is no file."""
    try:
        status = output.stat()
    except FileNotFoundError:
        if not output.absolute().parent.is_dir():
            raise UsageError(f"{output.absolute().parent} is not a folder", "make it first") from None
        return
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{output} is not a regular file", "leave -o out and redirect the output")
    if not force:
        raise UsageError(f"{output} exists", "--force replaces it")


@contextmanager
def destination(output: Path | None) -> Iterator[IO[bytes]]:
    """Where to write: stdout, or a file that takes its name once it is complete and on the disk."""
    if output is None:
        stdout = sys.stdout.buffer
        yield stdout
        stdout.flush()
        return
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


def tell(told: Told, output: Path | None) -> None:
    """What was written and what was not, on stderr."""
    for damage in told.damages[:DAMAGES_SHOWN_MAX]:
        warn(damage)
    if len(told.damages) > DAMAGES_SHOWN_MAX:
        warn(f"{len(told.damages):,} such places in all; ingestd journal verify says what they cost")
    for source, name in told.renamed.items():
        warn(f"source {source!r} is written as {name}: candump text has no blanks and no # in names, only ASCII")
    for source, count in told.left_out.items():
        warn(f"{count:,} frames of {source} left out: candump text cannot hold them; use --format jsonl")
    if output is not None:
        frames = ", ".join(f"{count:,} of {source}" for source, count in sorted(told.frames.items()) if count)
        events = f"; {told.events:,} events" if told.events else ""
        err.print(f"{output}: frames: {frames or 'none'}{events}")
