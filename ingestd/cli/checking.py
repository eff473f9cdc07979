"""`ingestd check`: what a configuration would meet, or what a capture would give, without storing anything."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from ingestd.cli.console import ROWS_MAX, Listing, json_option, out, run, share, warn
from ingestd.cli.reading import reading, reading_options
from ingestd.config import Config, load_config
from ingestd.errors import UsageError
from ingestd.imports import ImportOptions
from ingestd.survey import Survey, survey

if TYPE_CHECKING:
    from ingestd.daemon.preflight import Finding

LISTEN_SECONDS = 2.0


@click.command("check")
@click.option(
    "-c",
    "--config",
    "config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The configuration to look at, with everything that it names.",
)
@click.option("--capture", type=click.Path(path_type=Path), help="The capture to look at.")
@click.option("--dsn", metavar="DSN", help="With -c: PostgreSQL to look at instead of the configuration's.")
@click.option(
    "--seconds", default=LISTEN_SECONDS, show_default=True, help="With -c: how long to listen to the devices."
)
@reading_options
@json_option
def check_command(
    config: Path | None, capture: Path | None, dsn: str | None, seconds: float, as_json: bool, **how: Any
) -> None:
    """Tell what `run` would meet (-c FILE), or what a capture would give (--capture FILE); stores nothing.

    \b
    -c         configuration, clock, journal, signal databases, devices, PostgreSQL.
               Exits with 1 if anything would not be recorded or stored. Beside a
               daemon with this file: if a reload would be refused, or not be stored.
    --capture  share decoded, unknown ids, channels with their rates, GB per day.
    """  # fmt: skip
    if (config is None) == (capture is None):
        raise UsageError("there is nothing to look at" if config is None else "one thing at a time",
                         "name a configuration with -c, or a capture with --capture")  # fmt: skip
    if config is not None:
        check_configuration(load_config(config, dsn=dsn), config, seconds, as_json=as_json)
    elif capture is not None:
        check_capture(capture, reading(**how), as_json=as_json)


def check_configuration(config: Config, file: Path, seconds: float, *, as_json: bool) -> None:
    """Look at everything that a configuration names, telling each finding as it is made. Exits with 1 at a problem."""
    # Here and not above: the journal's kind of lock is unknown elsewhere than on Unix.
    from ingestd.daemon.preflight import examine, stands_in_the_way

    logging.getLogger("ingestd").setLevel(logging.CRITICAL)  # What the sources would log is said here.

    async def look() -> list[Finding]:
        findings = []
        async for finding in examine(config, file, seconds):
            findings.append(finding)
            if not as_json:
                style = {"ok": "green", "note": "yellow", "problem": "red"}[finding.level]
                out.print(Text(f"{finding.level:8}", style), f"{finding.about}: {finding.text}")
        return findings

    findings = run(look())
    is_hindered = stands_in_the_way(findings)
    if as_json:
        told = [{"level": each.level, "about": each.about, "text": each.text} for each in findings]
        out.print_json(json.dumps({"ready": not is_hindered, "findings": told}), indent=None)
    else:
        out.print(conclusion(config, findings) + (", with the problems above" if is_hindered else ""))
    if is_hindered:
        raise click.exceptions.Exit(1)


def conclusion(config: Config, findings: Sequence[Finding]) -> str:
    """What would come of it, in a sentence."""
    said = {finding.about: finding.text for finding in findings if finding.about in ("ingestd run", "ingestd reload")}
    if said:
        return "; ".join(f"`{command}` {text}" for command, text in said.items())
    names = ", ".join([*(bus.name for bus in config.can), *(line.name for line in config.serial)])
    return f"`run` would record {names}"


def check_capture(capture: Path, options: ImportOptions, *, as_json: bool) -> None:
    """Tell what a capture would give."""
    result = survey(capture, options)
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
