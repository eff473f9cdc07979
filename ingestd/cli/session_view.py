"""How sessions are shown: one, many, in a sentence; for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from ingestd.cli.console import Listing, finite, moment, out
from ingestd.store.sessions import ChannelSummary, SessionSummary

RUNNING: Final = "running"  # what a session is called that the daemon records, where one is to be named
LABELS: Final = {"name": "name", "car_id": "car", "driver": "driver", "track": "track", "notes": "notes"}
OF_PEOPLE: Final = ("car_id", "driver", "track", "notes")  # shown where there are any
UNBOUNDED: Final = 10_000  # characters: wider than any table is
NOTES_CHARACTERS_MAX: Final = 40  # in a table; `show` has all of them


def print_sessions(found: Sequence[SessionSummary], running_id: UUID | None) -> None:
    """Sessions: a table, or where a terminal is too narrow for it some lines each."""
    said = [name for name in OF_PEOPLE if any(getattr(session, name) for session in found)]
    listed = Listing(
        "session", "name", "begin (UTC)", "end (UTC)", "frames", "samples", "channels",
        *(LABELS[name] for name in said), whole=["session", "name"],
    )  # fmt: skip
    for session in found:
        listed.add(
            session.id, session.name, moment(session.created_utc), _end(session, running_id), f"{session.frames:,}",
            f"{session.samples:,}", f"{session.channels:,}", *(_short(getattr(session, name)) for name in said),
        )  # fmt: skip
    if not found:
        out.print("no sessions yet: ingestd import FILE --dbc FILE, or ingestd demo")
    elif out.measure(listed, options=out.options.update(max_width=UNBOUNDED)).maximum <= out.width:
        out.print(listed)
    else:
        for session in found:
            _print_in_lines(session, running_id)


def _print_in_lines(session: SessionSummary, running_id: UUID | None) -> None:
    out.print(session.name or "no name", style="bold")
    out.print(f"  {session.id}")
    begin, end = moment(session.created_utc)[:19], _end(session, running_id)[:19] or "?"
    out.print(f"  since {begin} UTC, running" if end == RUNNING else f"  {begin} to {end} UTC")
    out.print(f"  {session.frames:,} frames, {session.samples:,} samples of {session.channels:,} channels")
    said = [f"{LABELS[name]} {text}" for name in OF_PEOPLE if (text := _short(getattr(session, name)))]
    if said:
        out.print(f"  {', '.join(said)}")


def _end(session: SessionSummary, running_id: UUID | None) -> str:
    return RUNNING if session.id == running_id else moment(session.ended_utc)


def _short(text: str | None) -> str:
    """A text of people's as a cell: in one line, and no longer than a table bears."""
    line = " ".join((text or "").split())
    return line if len(line) <= NOTES_CHARACTERS_MAX else f"{line[: NOTES_CHARACTERS_MAX - 1]}…"


def print_session(session: SessionSummary, channels: Sequence[ChannelSummary] | None, *, is_running: bool) -> None:
    """A session, what people have said of it, and its channels; None where the database could not be asked."""
    out.print(" ".join(["session", *([session.name] if session.name else []), str(session.id)]))
    for name in OF_PEOPLE:
        if value := getattr(session, name):
            out.print(f"  {LABELS[name]:7} {value}")
    shown = Listing(
        "channel", "source", "unit", "samples", "min", "mean", "max", "first (UTC)", "last (UTC)", whole=["channel"]
    )
    for channel in channels or ():
        shown.add(
            channel.channel, channel.source, channel.unit, f"{channel.samples:,}",
            *(("" if value is None else f"{value:.6g}") for value in (channel.minimum, channel.mean, channel.maximum)),
            moment(channel.first_utc)[11:], moment(channel.last_utc)[11:],
        )  # fmt: skip
    if channels:
        out.print(shown)
    span = f"from {moment(session.created_utc)} to {moment(session.ended_utc) or '?'} UTC"
    if is_running:
        span = f"since {moment(session.created_utc)} UTC, running"
    if channels is None:
        out.print(span)
        return
    out.print(
        f"in the database: {session.frames:,} frames, {session.samples:,} samples of {len(channels):,} channels; {span}"
    )


def called(session: Mapping[str, Any]) -> str:
    """A session in a sentence."""
    return f"{session['name']} ({session['id']})" if session["name"] else str(session["id"])


def values_of(session: Mapping[str, Any], names: Iterable[str]) -> str:
    """Some of a session's metadata in a sentence."""
    return ", ".join(f"{LABELS[name]}: {session[name] or 'none'}" for name in names)


def session_json(session: SessionSummary, *, is_counted: bool = True) -> dict[str, Any]:
    """A session for programs. `is_counted`: the database could be asked how much of it there is."""
    return {
        "id": str(session.id),
        "name": session.name,
        "car_id": session.car_id,
        "created_utc": session.created_utc.isoformat(),
        "ended_utc": session.ended_utc.isoformat() if session.ended_utc else None,
        "frames": session.frames if is_counted else None,
        "samples": session.samples if is_counted else None,
        "files": list(session.files),
        "driver": session.driver,
        "track": session.track,
        "notes": session.notes,
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
