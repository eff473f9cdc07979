"""`ingestd import`: capture files into the database."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ingestd import imports
from ingestd.cli.console import Listing, complain, database, dsn_option, err, json_option, out, run, share, warn
from ingestd.cli.reading import reading, reading_options, storable
from ingestd.errors import IngestdError, StoreError, StoreRejected, StoreUnavailable
from ingestd.imports import ImportOptions, ImportSummary, import_file


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@reading_options
@click.option("--session", metavar="NAME", help="Put all files into one session; an existing one is added to.")
@click.option("--car-id", "--car", metavar="ID", help="Recorded with a new session.")
@click.option("--again", is_flag=True, help="Import a file anew although it is in the database, e.g. with another DBC.")
@click.option("--no-frames", is_flag=True, help="Store the signals only, not the raw frames.")
@click.option("--strict", is_flag=True, help="Exit with 1 if anything in a file was damaged.")
@dsn_option
@json_option
def import_command(
    files: tuple[Path, ...],
    session: str | None,
    car_id: str | None,
    again: bool,
    no_frames: bool,
    strict: bool,
    dsn: str | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Import capture FILES: candump text, ASC, BLF, TRC, CSV, MF4.

    Each file becomes a session, unless --session names one for all. Importing a file twice changes nothing; an import
    that was stopped goes on where it was.
    """
    storable("--session", session)
    storable("--car-id", car_id)
    options = replace(reading(**how), session=session, car_id=car_id, again=again, store_frames=not no_frames)
    dsn = database(dsn)
    failed: list[Path] = []
    for path in files:
        try:
            summary = import_with_progress(path, options, dsn)
        except IngestdError as error:
            if len(files) == 1 or (isinstance(error, StoreError) and not isinstance(error, StoreRejected)):
                raise  # Of a database that is away or closed to us, the next file would meet the same.
            complain(error, f"error: {path}" if isinstance(error, StoreRejected) else "error")
            failed.append(path)
            continue
        print_import(summary, as_json=as_json)
        if strict and summary.damaged:
            failed.append(path)
    if failed:
        names = ", ".join(map(str, failed))
        raise IngestdError(f"{len(failed)} of {len(files)} files failed or are damaged: {names}")


def import_with_progress(path: Path, options: ImportOptions, dsn: str) -> ImportSummary:
    """Import one file, with a progress bar if somebody watches."""

    def on_retry(error: StoreUnavailable) -> None:
        warn(f"{error}; trying again")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(path.name, total=None, rates="")
        started = bar.get_time()

        def on_progress(progress: imports.Progress) -> None:
            seconds = max(bar.get_time() - started, 1e-3)
            rates = f"{progress.frames / seconds:,.0f} frames/s  {progress.signals / seconds:,.0f} signals/s"
            bar.update(task, total=progress.size_bytes, completed=progress.read_bytes, rates=rates)

        return run(import_file(path, options, dsn, on_progress=on_progress, on_retry=on_retry))


def print_import(summary: ImportSummary, *, as_json: bool) -> None:
    """The result of one file, and on stderr what was odd about it."""
    for message in summary.warnings:
        warn(message)
    if summary.damaged:
        warn(f"{summary.file}: {summary.damaged:,} damaged lines or records left out: {'; '.join(summary.damage)}")
    if as_json:
        out.print_json(json.dumps(summary.as_json()), indent=None)
        return
    if summary.already_imported:
        out.print(f"{summary.file}: already imported as session {summary.session_name} {summary.session_id}")
        return
    counts = summary.counts
    shown = Listing("", "", title=f"{summary.file} → session {summary.session_name}", header=False)
    rows: list[tuple[str, Any]] = [
        ("session", summary.session_id),
        ("frames", f"{counts.frames:,}"),
        ("decoded frames", f"{counts.decoded:,}  ({share(counts.decoded, counts.frames)})"),
        ("frames of unknown ids", f"{counts.unknown:,}"),
    ]
    for label, number in (
        ("known but not decodable", counts.undecoded),
        ("remote frames", counts.remote),
        ("error frames", counts.error),
        ("short frames", counts.short),
        ("damaged", summary.damaged),
    ):
        if number:
            rows.append((label, f"{number:,}"))
    rows.append(("signals", f"{counts.signals:,}"))
    rows.append(("chunks", f"{summary.chunks:,}"))
    seconds = max(summary.seconds, 1e-3)
    rows.append(("seconds", f"{summary.seconds:.2f}  ({summary.signals_now / seconds:,.0f} signals/s)"))
    if summary.resumed_at:
        rows.append(("resumed at frame", f"{summary.resumed_at:,}"))
    for label, value in rows:
        shown.add(label, value)
    out.print(shown)
