"""`ingestd sessions`: the one that is recorded, which the daemon knows, and all others, which the database knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

import click

from ingestd.cli.console import complain, database, dsn_option, json_option, out, run, warn
from ingestd.cli.control import daemon_options, socket_of
from ingestd.cli.journal import folder_of
from ingestd.cli.reading import storable
from ingestd.cli.session_view import (
    RUNNING,
    called,
    channel_json,
    print_session,
    print_sessions,
    session_json,
    values_of,
)
from ingestd.config import load_config
from ingestd.daemon.client import NoDaemon, ask
from ingestd.errors import ConfigError, IngestdError, StoreError, UsageError
from ingestd.store.sessions import ChannelSummary, Session, SessionSummary, open_catalogue
from ingestd.store.writer import METADATA


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
        found = run(work(database_of(dsn, config, socket)))
    except (StoreError, ConfigError) as error:
        if running is None:
            raise
        found, failure = [], error
    found = with_running(found, running)
    running_id = None if running is None else UUID(running["id"])
    if as_json:
        said = [
            session_json(session, is_counted=failure is None) | {"running": session.id == running_id}
            for session in found
        ]
        out.print_json(json.dumps(said), indent=None)
    else:
        print_sessions(found, running_id)
    if failure is not None:
        end_without_database(failure)


@sessions_group.command("start")
@daemon_options
@click.option("--name", help="What to call it. Default: the car, or the host, and the time.")
@click.option("--driver", help="Who drives. Default, as for the rest: the configuration's.")
@click.option("--track", help="Where.")
@click.option("--notes", help="Anything else.")
@click.option("--car", "--car-id", "car_id", help="The car, boat or rig.")
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
    wanted = None if session in (None, RUNNING) else session_to_edit(session, dsn, config, socket)
    if wanted is None:
        answer = ask(socket_of(config, socket, is_told=session is None), "PATCH", "/session", edit)
    else:
        answer = {"session": run(edit_stored(database_of(dsn, config, socket), wanted, edit))}
    edited = answer["session"]
    tell(answer, as_json, f"session {called(edited)} edited: {values_of(edited, edit)}")


def session_to_edit(session: str, dsn: str | None, config: Path | None, socket: Path | None) -> Session | None:
    """The session that is meant, by its name or id; None for the one that is recorded. Raises IngestdError."""
    running = running_session(config, socket)
    if running is not None and session.lower() == running["id"]:
        return None
    try:
        stored = run(stored_as(database_of(dsn, config, socket), session))
    except (StoreError, ConfigError) as error:
        if running is None or session != running["name"]:
            raise
        warn(f"whether other sessions are called {session} cannot be known, the running one is taken: {error}")
        return None
    wanted = the_one(session, stored, running)
    if wanted is None:
        raise no_session(session, dsn, config, socket)
    if running is not None and str(wanted) == running["id"]:
        return None
    return next(each for each in stored if each.id == wanted)


async def edit_stored(dsn: str, session: Session, changes: Mapping[str, str | None]) -> dict[str, Any]:
    """Change a session in the database; what it is called then, and what was changed."""
    async with open_catalogue(dsn) as catalogue:
        await catalogue.edit(session.id, changes)
    return {"id": str(session.id), "name": session.name, **changes}


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


def end_without_database(failure: IngestdError) -> NoReturn:
    """Say why only what the daemon knows was shown, and end with the exit code of that."""
    why = "away" if isinstance(failure, StoreError) else "not known"
    complain(failure, f"the database is {why}; this is what the daemon records")
    raise click.exceptions.Exit(failure.exit_code)


def running_session(config: Path | None, socket: Path | None, *, is_needed: bool = False) -> dict[str, Any] | None:
    """What the daemon records, or None where none runs that may be asked; if it `is_needed` that is an error."""
    try:
        found: dict[str, Any] = ask(socket_of(config, socket), "GET", "/session")["session"]
    except IngestdError as error:
        if is_needed:
            raise
        if not isinstance(error, NoDaemon):
            warn(str(error))
        return None
    return found


def summary_of(running: Mapping[str, Any]) -> SessionSummary:
    """The session that is recorded, as the daemon knows it: how much of it is stored only the database can say."""
    created_utc = datetime.fromisoformat(running["created_utc"])
    session = SessionSummary(UUID(running["id"]), running["name"], running["car_id"], created_utc, None, 0, 0, 0, ())
    return replace(session, **{name: running[name] for name in METADATA})


def with_running(found: list[SessionSummary], running: Mapping[str, Any] | None) -> list[SessionSummary]:
    """The sessions, with what the daemon knows later of its own than the database does."""
    if running is None:
        return found
    ours = next((each for each in found if str(each.id) == running["id"]), None)
    if ours is None:
        return [summary_of(running), *found]
    later = {
        name: running[name]
        for name, at in running["edited_utc"].items()
        if ours.updated_utc is None or datetime.fromisoformat(at) > ours.updated_utc
    }
    return [replace(each, **later) if each is ours else each for each in found]


def database_of(dsn: str | None, config: Path | None, socket: Path | None) -> str:
    """The DSN of the database that is meant: as named, else that of the configuration, else the embedded one.

    Raises ConfigError where only the daemon knows which one that is.
    """
    if dsn is None and config is not None:
        dsn = load_config(config).database.dsn
    elif dsn is None and socket is not None and not uses_embedded(socket):
        raise ConfigError("only the daemon knows which database is meant", "name it with --dsn, or with -c FILE")
    return database(dsn)


def uses_embedded(socket: Path) -> bool:
    """Whether the daemon at this socket stores into the embedded server; yes where there is no daemon."""
    try:
        return bool(ask(socket, "GET", "/daemon")["embedded"])
    except NoDaemon:
        return True
    except (IngestdError, KeyError, TypeError):
        return False


@sessions_group.command("show")
@click.argument("session", required=False)
@dsn_option
@daemon_options
@json_option
def sessions_show(
    session: str | None, dsn: str | None, config: Path | None, socket: Path | None, as_json: bool
) -> None:
    """One session and its channels with their statistics.

    SESSION is a name, an id, or `running` for the one that is recorded now. Default: the most recent recording.
    """
    running = running_session(config, socket, is_needed=session == RUNNING)
    found: tuple[SessionSummary, list[ChannelSummary] | None] | None
    failure = None
    try:
        found = run(describe_session(database_of(dsn, config, socket), session, running))
    except (StoreError, ConfigError) as error:
        if running is None or session not in (RUNNING, running["id"], running["name"]):
            raise
        found, failure = (summary_of(running), None), error
    if found is None:
        raise no_session(session, dsn, config, socket)
    summary, channels = found
    is_running = running is not None and str(summary.id) == running["id"]
    if as_json:
        description = session_json(summary, is_counted=channels is not None) | {
            "running": is_running,
            "channels": None if channels is None else [*map(channel_json, channels)],
        }
        out.print_json(json.dumps(description), indent=None)
    else:
        print_session(summary, channels, is_running=is_running)
    if failure is not None:
        end_without_database(failure)


async def describe_session(
    dsn: str, session: str | None, running: Mapping[str, Any] | None
) -> tuple[SessionSummary, list[ChannelSummary]] | None:
    """A session by name or id, or the newest, and its channels; None if there is none."""
    async with open_catalogue(dsn) as catalogue:
        found = with_running(await catalogue.summaries(), running)
        if session is not None:
            wanted = the_one(session, await catalogue.called(session), running)
            found = [each for each in found if each.id == wanted]
        return (found[0], await catalogue.channels(found[0].id)) if found else None


def the_one(wanted: str, stored: Sequence[Session], running: Mapping[str, Any] | None) -> UUID | None:
    """The id of the session that is meant: of those in the database with this name or id, and the running one.

    Raises UsageError if several are.
    """
    if running is None:
        ids = [each.id for each in stored]
    else:  # What that is called now the daemon knows, and the database not yet.
        ours = UUID(running["id"])
        if wanted == RUNNING or wanted.lower() == str(ours):
            return ours
        ids = [each.id for each in stored if each.id != ours] + [ours] * (wanted == running["name"])
    if len(ids) > 1:
        which = [f"{each} (running)" if running and str(each) == running["id"] else str(each) for each in ids]
        raise UsageError(f"{len(ids)} sessions are called {wanted!r}", f"give the id of one: {', '.join(which)}")
    return ids[0] if ids else None


async def stored_as(dsn: str, session: str) -> list[Session]:
    """The sessions with this name or id that the database has."""
    async with open_catalogue(dsn) as catalogue:
        return await catalogue.called(session)


def no_session(session: str | None, dsn: str | None, config: Path | None, socket: Path | None) -> IngestdError:
    """Why the database has no such session: there is none, or it is still in the journal."""
    # Here and not above: the journal's kind of lock is unknown elsewhere than on Unix.
    from ingestd.journal.inspection import look

    with suppress(IngestdError):
        for stretch in look(folder_of(socket and socket.with_suffix(""), config)).stretches:
            names = stretch.session_name, str(stretch.session_id)
            # One that the database has was called so once, and is not any more.
            if session in names and not run(stored_as(database_of(dsn, config, socket), names[1])):
                hint = "it is in the journal until then: ingestd journal status says how much waits"
                return IngestdError(f"session {session} has ended, and the database does not have it yet", hint)
    return UsageError(f"no session {session or ''}".strip(), "ingestd sessions list shows what there is")
