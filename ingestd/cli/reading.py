"""The options that decide how a capture is read and decoded, shared by `import` and `check`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import click

from ingestd.cli.console import warn
from ingestd.decode.databases import load
from ingestd.errors import UsageError
from ingestd.imports import ImportOptions
from ingestd.pipeline import Binding


def reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that decide how a capture is read and decoded."""
    for option in reversed(
        [
            click.option(
                "--dbc",
                "dbc",
                multiple=True,
                metavar="[SOURCE:]FILE",
                help="Signal database (.dbc .kcd .sym .arxml) for all sources, or for one; may be given several times.",
            ),
            click.option(
                "--match",
                "match",
                multiple=True,
                metavar="[FILE=]auto|id|pgn",
                help="Find messages by arbitration id or by PGN (J1939, NMEA 2000); auto: as the database says. "
                "FILE=… for one database.",
            ),
            click.option("--map", "source_map", multiple=True, metavar="NAME=SOURCE", help="Rename an interface."),
            click.option("--rate", type=click.FloatRange(min=0, min_open=True), metavar="FRAMES_PER_SECOND",
                         help="Stamp the frames of a capture that has no stamps."),
            click.option("--timezone", "zone", metavar="ZONE", default="UTC", show_default=True,
                         help="Zone of dates that name none (headers of ASC, BLF and TRC files)."),
            click.option("--keep-not-available", is_flag=True,
                         help="Keep the numbers of J1939 and NMEA 2000 not-available and error patterns."),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


def reading(
    dbc: Sequence[str],
    match: Sequence[str],
    source_map: Sequence[str],
    rate: float | None,
    zone: str,
    keep_not_available: bool,
) -> ImportOptions:
    """The options as one value, with every database loaded. Raises UsageError, SignalDatabaseError."""
    matches = dict(entry.rpartition("=")[::2] for entry in match)
    for entry, value in matches.items():
        if value not in ("auto", "id", "pgn"):
            raise UsageError(f"--match {entry}{'=' if entry else ''}{value}: not a way to match", "use auto, id or pgn")
    bindings = []
    for entry in dbc:
        source, path = split_binding(entry)
        how = next((v for k, v in matches.items() if k and Path(k).name == path.name), matches.get("", "auto"))
        loaded = load(path, how)  # type: ignore[arg-type]
        for message in loaded.warnings:
            warn(message)
        bindings.append(Binding(source, loaded))
    for entry in matches:
        if entry and Path(entry).name not in {b.database.name for b in bindings}:
            raise UsageError(f"--match {entry}=…: no --dbc has that name", "name the file as in --dbc")
    storable("--map", *source_map)
    names = dict(entry.partition("=")[::2] for entry in source_map)
    for name, source in names.items():
        if not name or not source:
            raise UsageError(f"--map {name}={source}: not a renaming", "write NAME=SOURCE, as in vcan0=powertrain")
    return ImportOptions(bindings, names, rate, time_zone(zone), keep_not_available)


def storable(option: str, *texts: str | None) -> None:
    """Raise UsageError for text that PostgreSQL cannot hold: what the terminal gave was not UTF-8, or has a NUL."""
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{option} {text!r}: not UTF-8", "write it in UTF-8") from error


def split_binding(entry: str) -> tuple[str | None, Path]:
    """[SOURCE:]FILE; a file whose name has a colon is taken as it is, and so is a drive letter."""
    source, colon, rest = entry.partition(":")
    if not colon or len(source) < 2 or Path(entry).exists():
        return None, Path(entry)
    return source, Path(rest)


def time_zone(name: str) -> tzinfo:
    """The zone of that name. Raises UsageError."""
    if name.upper() == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UsageError(f"--timezone {name}: no such time zone", "use a name as in Europe/Berlin") from error
