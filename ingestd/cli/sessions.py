"""`ingestd sessions`: the one that is recorded, which the daemon knows, and all others, which the database knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from ingestd.cli.console import Listing, complain, database, dsn_option, finite, json_option, moment, out, run, warn
from ingestd.cli.control import daemon_options, socket_of
from ingestd.cli.reading import storable
from ingestd.config import load_config
from ingestd.daemon.client import NoDaemon, ask
from ingestd.errors import IngestdError, StoreError, UsageError
from ingestd.store.sessions import ChannelSummary, SessionSummary, open_catalogue
from ingestd.store.writer import METADATA

RUNNING = "running"  # what a session is called that the daemon records, where one is to be named


@click.group("sessions")
def sessions_group() -> None:
    """What is recorded now, and what is in the database."""


@sessions_group.command("list")
@dsn_option
@daemon_options
@json_option
def sessions_list(dsn: str | None, config: Path | None, socket: Path | None, as_json: bool) -> None:
    """All sessions, newest first; the one that is recorded now also while the database is away.

    With -c the database is that of the configuration.
    """
    running = running_session(config, socket)

    async def work(dsn: str) -> list[SessionSummary]:
        async with open_catalogue(dsn) as catalogue:
            return await catalogue.summaries()

    failure = None
    try:
        found = run(work(database(dsn_of(dsn, config))))
    except StoreError as error:
        if running is None:
            raise
        found, failure = [], error
    found = with_running(found, running)
    running_id = None if running is None else UUID(running["id"])
    if as_json:
        said = [session_json(session) | {"running": session.id == running_id} for session in found]
        out.print_json(json.dumps(said), indent=None)
    else:
        print_sessions(found, running_id)
    if failure is not None:
        complain(failure, "the database is away; this is what the daemon records")
        raise click.exceptions.Exit(failure.exit_code)


def print_sessions(found: Sequence[SessionSummary], running_id: UUID | None) -> None:
    """Sessions for people."""
    listed = Listing(
        "session", "name", "begin (UTC)", "end (UTC)", "frames", "samples", "channels", "car", "driver", "track",
        whole=["session", "name"],
    )  # fmt: skip
    for session in found:
        end = RUNNING if session.id == running_id else moment(session.ended_utc)
        listed.add(
            session.id, session.name, moment(session.created_utc), end, f"{session.frames:,}",
            f"{session.samples:,}", f"{session.channels:,}", session.car_id, session.driver, session.track,
        )  # fmt: skip
    out.print(listed if found else "no sessions yet: ingestd import FILE --dbc FILE, or ingestd demo")


@sessions_group.command("start")
@daemon_options
@click.option("--name", help="What to call it. Default: the car, or the host, and the time.")
@click.option("--driver", help="Who drives. Default, as for the rest: the configuration's.")
@click.option("--track", help="Where.")
@click.option("--notes", help="Anything else.")
@click.option("--car", "car_id", help="The car, boat or rig.")
@json_option
def sessions_start(config: Path | None, socket: Path | None, as_json: bool, **given: str | None) -> None:
    """End the session that is recorded and begin another. No frame is lost, no device is opened anew."""
    body = {name: value for name, value in given.items() if value is not None}
    answer = ask(socket_of(config, socket), "POST", "/session/start", body)
    tell(answer, as_json, f"session {called(answer['ended'])} ended, {called(answer['session'])} begun")


@sessions_group.command("stop")
@daemon_options
@json_option
def sessions_stop(config: Path | None, socket: Path | None, as_json: bool) -> None:
    """End the session that is recorded.

    Recording goes on, for nothing may be lost: in another session, without a name of its own, until one is started.
    """
    answer = ask(socket_of(config, socket), "POST", "/session/stop")
    tell(answer, as_json, f"session {called(answer['ended'])} ended; recording goes on in {called(answer['session'])}")


@sessions_group.command("edit")
@click.argument("changes", nargs=-1, required=True, metavar="[SESSION] KEY=VALUE...")
@dsn_option
@daemon_options
@json_option
def sessions_edit(
    changes: tuple[str, ...], dsn: str | None, config: Path | None, socket: Path | None, as_json: bool
) -> None:
    """Change name, car, driver, track or notes; nothing behind the = takes a value away.

    Without SESSION (a name or id) it is the one that is recorded now; that works while the database is away. Any other
    is changed in the database.
    """
    session = None if "=" in changes[0] else changes[0]
    edit = changes_of(changes if session is None else changes[1:])
    running = running_session(config, socket) if session is not None else None
    if session is None or (running is not None and session in (RUNNING, running["id"], running["name"])):
        answer = ask(socket_of(config, socket), "PATCH", "/session", edit)
        tell(answer, as_json, f"session {called(answer['session'])} edited")
        return

    async def work(dsn: str, session: str) -> dict[str, Any]:
        async with open_catalogue(dsn) as catalogue:
            found = await catalogue.find(session)
            if found is None:
                raise UsageError(f"no session {session}", "ingestd sessions list shows what there is")
            await catalogue.edit(found.id, edit)
            return {"id": str(found.id), "name": found.name, **edit}

    edited = run(work(database(dsn_of(dsn, config)), session))
    tell({"session": edited}, as_json, f"session {called(edited)} edited")


@sessions_group.command("mark")
@click.argument("text")
@daemon_options
@json_option
def sessions_mark(text: str, config: Path | None, socket: Path | None, as_json: bool) -> None:
    """Record a marker at this instant: an event of the kind "marker", with TEXT."""
    answer = ask(socket_of(config, socket), "POST", "/session/mark", {"text": text})
    tell(answer, as_json, f"marked in session {called(answer['session'])}")


def tell(answer: Mapping[str, Any], as_json: bool, words: str) -> None:
    """What a command has done."""
    if answer.get("warning"):
        warn(answer["warning"])
    if as_json:
        out.print_json(json.dumps(answer), indent=None)
    else:
        out.print(words)


def called(session: Mapping[str, Any]) -> str:
    """A session in a sentence."""
    return f"{session['name']} ({session['id']})" if session["name"] else str(session["id"])


def changes_of(pairs: Sequence[str]) -> dict[str, str | None]:
    """KEY=VALUE as metadata; `car` is short for `car_id`. Raises UsageError."""
    changes: dict[str, str | None] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        name = {"car": "car_id"}.get(key, key)
        if not equals or name not in METADATA:
            raise UsageError(f"{pair}: not a change", f"write KEY=VALUE, with {', '.join(METADATA)} as the key")
        changes[name] = value or None
    if not changes:
        raise UsageError("nothing is to be edited", "write KEY=VALUE, as in driver=Kim")
    storable("KEY=VALUE", *changes.values())
    return changes


def running_session(config: Path | None, socket: Path | None) -> dict[str, Any] | None:
    """What the daemon records, or None where none runs that may be asked."""
    try:
        found: dict[str, Any] = ask(socket_of(config, socket), "GET", "/session")["session"]
    except NoDaemon:
        return None
    except IngestdError as error:
        warn(str(error))
        return None
    return found


def with_running(found: list[SessionSummary], running: Mapping[str, Any] | None) -> list[SessionSummary]:
    """The sessions, with what the daemon knows later of its own than the database does."""
    if running is None:
        return found
    ours = next((each for each in found if str(each.id) == running["id"]), None)
    if ours is None:
        created_utc = datetime.fromisoformat(running["created_utc"])
        ours = SessionSummary(UUID(running["id"]), running["name"], running["car_id"], created_utc, None, 0, 0, 0, ())
        return [replace(ours, **{name: running[name] for name in METADATA}), *found]
    later = {
        name: running[name]
        for name, at in running["edited_utc"].items()
        if ours.updated_utc is None or datetime.fromisoformat(at) > ours.updated_utc
    }
    return [replace(each, **later) if each is ours else each for each in found]


def dsn_of(dsn: str | None, config: Path | None) -> str | None:
    """The database that is meant: as named, else that of the configuration."""
    return load_config(config).database.dsn if dsn is None and config is not None else dsn


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
