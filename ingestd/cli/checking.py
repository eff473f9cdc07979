"""`ingestd check`: what a capture would give, without a database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ingestd.cli.console import ROWS_MAX, Listing, json_option, out, share, warn
from ingestd.cli.reading import reading, reading_options
from ingestd.survey import Survey, survey


@click.command("check")
@click.option("--capture", required=True, type=click.Path(path_type=Path), help="The capture to look at.")
@reading_options
@json_option
def check_command(capture: Path, as_json: bool, **how: Any) -> None:
    """Tell what a capture would give: share decoded, unknown ids, channels with their rates, GB per day."""
    result = survey(capture, reading(**how))
    for message in result.warnings:
        warn(message)
    if result.damaged:
        warn(f"{capture}: {result.damaged:,} damaged lines or records: {'; '.join(result.damage)}")
    if as_json:
        out.print_json(json.dumps(result.as_json()), indent=None)
    else:
        print_survey(capture, result)
    for name in result.suggest_pgn:
        warn(f"{name}: hardly any frame matches by id, and all its ids are extended: try --match {name}=pgn")


def print_survey(capture: Path, result: Survey) -> None:
    """The survey for people."""
    counts = result.counts
    channels = Listing("source", "channel", "unit", "samples", "per second", title="Channels", whole=["channel"])
    for (source, channel, unit), samples in sorted(result.channels.items()):
        channels.add(source, channel, unit, f"{samples:,}", f"{result.per_second(samples):,.1f}")
    unknown = Listing("source", "id", "frames", "per second", title="Ids without a message")
    for (source, number, extended), frames in result.unknown_ids.most_common(ROWS_MAX):
        rate = f"{result.per_second(frames):,.1f}"
        unknown.add(source, f"{number:0{8 if extended else 3}X}", f"{frames:,}", rate)
    if result.channels:
        out.print(channels)
    if result.unknown_ids:
        out.print(unknown)
        if len(result.unknown_ids) > ROWS_MAX:
            out.print(f"… and {len(result.unknown_ids) - ROWS_MAX:,} more ids; --json lists them all")
    out.print(
        f"{capture}: {counts.frames:,} frames in {result.seconds:,.1f} s; "
        f"decoded {counts.decoded:,} ({share(counts.decoded, counts.frames)}), unknown {counts.unknown:,}, "
        f"not decodable {counts.undecoded:,}, remote {counts.remote:,}, error {counts.error:,}, short {counts.short:,}"
    )
    out.print(
        f"{counts.signals:,} samples; a day of this is about {86_400 * result.per_second(counts.signals):,.0f} samples "
        f"and {result.gigabytes_per_day:,.2f} GB in the database"
    )
