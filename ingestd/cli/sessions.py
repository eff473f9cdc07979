"""`ingestd sessions`: what is in the database."""

from __future__ import annotations

import json
from typing import Any

import click

from ingestd.cli.console import Listing, database, dsn_option, finite, json_option, moment, out, run
from ingestd.errors import UsageError
from ingestd.store.sessions import ChannelSummary, SessionSummary, open_catalogue


@click.group("sessions")
def sessions_group() -> None:
    """What is in the database."""


@sessions_group.command("list")
@dsn_option
@json_option
def sessions_list(dsn: str | None, as_json: bool) -> None:
    """All sessions, newest first."""

    async def work(dsn: str) -> list[SessionSummary]:
        async with open_catalogue(dsn) as catalogue:
            return await catalogue.summaries()

    found = run(work(database(dsn)))
    if as_json:
        out.print_json(json.dumps([session_json(session) for session in found]), indent=None)
        return
    listed = Listing(
        "session", "name", "begin (UTC)", "end (UTC)", "frames", "samples", "channels", "car", whole=["session", "name"]
    )
    for session in found:
        listed.add(
            session.id, session.name, moment(session.created_utc), moment(session.ended_utc),
            f"{session.frames:,}", f"{session.samples:,}", f"{session.channels:,}", session.car_id,
        )  # fmt: skip
    out.print(listed if found else "no sessions yet: ingestd import FILE --dbc FILE, or ingestd demo")


@sessions_group.command("show")
@click.argument("session", required=False)
@dsn_option
@json_option
def sessions_show(session: str | None, dsn: str | None, as_json: bool) -> None:
    """One session (by name or id; default: the most recent recording) and its channels with their statistics."""
    dsn = database(dsn)
    summary, channels = run(describe_session(dsn, session))
    if as_json:
        description = session_json(summary) | {"channels": [channel_json(channel) for channel in channels]}
        out.print_json(json.dumps(description), indent=None)
    else:
        print_session(summary, channels)


async def describe_session(dsn: str, session: str | None) -> tuple[SessionSummary, list[ChannelSummary]]:
    """A session by name or id, or the newest, and its channels. Raises UsageError if there is none."""
    async with open_catalogue(dsn) as catalogue:
        found = await catalogue.summaries()
        if session is not None:
            wanted = await catalogue.find(session)
            found = [each for each in found if wanted is not None and each.id == wanted.id]
        if not found:
            raise UsageError(f"no session {session or ''}".strip(), "ingestd sessions list shows what there is")
        return found[0], await catalogue.channels(found[0].id)


def print_session(session: SessionSummary, channels: list[ChannelSummary]) -> None:
    """A session for people."""
    shown = Listing(
        "channel", "source", "unit", "samples", "min", "mean", "max", "first (UTC)", "last (UTC)",
        title=f"session {session.name} {session.id}", whole=["channel"],
    )  # fmt: skip
    for channel in channels:
        shown.add(
            channel.channel, channel.source, channel.unit, f"{channel.samples:,}",
            *(("" if value is None else f"{value:.6g}") for value in (channel.minimum, channel.mean, channel.maximum)),
            moment(channel.first_utc)[11:], moment(channel.last_utc)[11:],
        )  # fmt: skip
    out.print(shown)
    out.print(
        f"{session.frames:,} frames, {session.samples:,} samples of {len(channels):,} channels, "
        f"{moment(session.created_utc)} to {moment(session.ended_utc)} UTC"
    )


def session_json(session: SessionSummary) -> dict[str, Any]:
    """A session for programs."""
    return {
        "id": str(session.id),
        "name": session.name,
        "car_id": session.car_id,
        "created_utc": session.created_utc.isoformat(),
        "ended_utc": session.ended_utc.isoformat() if session.ended_utc else None,
        "frames": session.frames,
        "samples": session.samples,
        "files": list(session.files),
    }


def channel_json(channel: ChannelSummary) -> dict[str, Any]:
    """A channel for programs."""
    return {
        "source": channel.source,
        "channel": channel.channel,
        "unit": channel.unit,
        "samples": channel.samples,
        "first_utc": channel.first_utc.isoformat(),
        "last_utc": channel.last_utc.isoformat(),
        "minimum": finite(channel.minimum),
        "maximum": finite(channel.maximum),
        "mean": finite(channel.mean),
    }
