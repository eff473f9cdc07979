"""A reload: another configuration, or other signal databases, come into force without stopping.

Everything that can be refused is looked at before anything is changed: the file, the databases it names, the drivers
of its sources. What follows is done in one go. A source is compared by what it opens: the same one is not touched,
whatever else has changed; another of the same name is reopened, and the time between is told as a gap.

Not for a reload: the journal's folder and the control socket. The daemon keeps those that it has, and says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ingestd.clock import mono_ns
from ingestd.config import Can, Config, Serial
from ingestd.daemon.decoding import Loaded, load_again
from ingestd.daemon.devices import open_source, tables_of
from ingestd.daemon.service import Daemon
from ingestd.model import Event, Source
from ingestd.store.writer import METADATA

SECTIONS = ("session", "database", "journal", "batch", "http", "metrics", "control")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Changes:
    """What a reload has changed: names of sources, of files, and keys."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    reopened: list[str] = field(default_factory=list)
    databases: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    restart: list[str] = field(default_factory=list)  # keys that come into force with the next start

    @property
    def as_json(self) -> dict[str, list[str]]:
        """Those that there are."""
        return {name: sorted(getattr(self, name)) for name in self.__slots__ if getattr(self, name)}


async def reload(daemon: Daemon, wanted: Config) -> Changes:
    """Put a configuration into force. Raises IngestdError if it cannot be, and then has changed nothing.

    One at a time: the caller sees to it.
    """
    before = daemon.config
    config = _with_what_stays(before, wanted)
    loaded = await load_again(config, daemon.loaded)
    edits = _edits(before, config)
    if edits:
        await daemon.session_known()
    then = {table.name: _opened(table) for table in tables_of(before)}
    now = {table.name: table for table in tables_of(config)}
    added = [name for name in now if name not in then]
    reopened = [name for name, table in now.items() if name in then and _opened(table) != then[name]]
    # In a thread: what a source needs may have to be imported first.
    sources = await asyncio.to_thread(lambda: [open_source(now[name]) for name in (*reopened, *added)])
    changes = Changes(
        added=added,
        removed=[name for name in then if name not in now],
        reopened=reopened,
        databases=_changed_databases(before, daemon.loaded, loaded),
        settings=list(_changed_settings(before, config)),
        restart=list(_changed_settings(config, wanted)),
    )
    daemon.journal.set_budget(config.journal.max_bytes, config.journal.when_full)  # The last that may be refused.
    await _put_into_force(daemon, config, loaded, sources, changes, edits)
    return changes


async def _put_into_force(
    daemon: Daemon, config: Config, loaded: Loaded, sources: list[Source], changes: Changes, edits: dict[str, str]
) -> None:
    before, daemon.config = daemon.config, config
    if changes.removed or changes.reopened:
        await daemon.attendance.end([*changes.removed, *changes.reopened])
    for name in changes.removed:
        del daemon.attendance.sources[name]
        daemon.recording.expect_gap(name, "reload")  # should another reload bring it back
    for source in sources:
        if source.name in changes.reopened:
            daemon.recording.expect_gap(source.name, "reload")
        daemon.attendance.begin(source)
    daemon.decode_with(loaded)
    daemon.redirect(before.database)
    if config.metrics != before.metrics:
        daemon.following.follow_channels(config.metrics.channels)
    if edits:
        daemon.session.edit(edits)
    if changes.as_json.keys() - {"restart"}:
        daemon.session.configure(config, loaded.hashes)
        daemon.journal.append_session(daemon.session.record)
        daemon.recording.event(Event("", "reload", mono_ns(), payload=changes.as_json))
    words = " ".join(f"{what}={','.join(names)}" for what, names in changes.as_json.items())
    log.info("configuration reloaded %s", words or "unchanged=True")
    if changes.restart:
        log.warning("for a restart and not for a reload: %s", ", ".join(changes.restart))
    await asyncio.to_thread(daemon.journal.sync)


def _with_what_stays(before: Config, wanted: Config) -> Config:
    """The configuration with the keys of before that only a start can change."""
    journal = msgspec.structs.replace(wanted.journal, path=before.journal.path)
    return msgspec.structs.replace(wanted, journal=journal, control=before.control)


def _opened(table: Can | Serial) -> Can | Serial:
    """Of a source's table what decides how its device is opened and read: everything but the databases."""
    return msgspec.structs.replace(table, dbc=())


def _edits(before: Config, config: Config) -> dict[str, str]:
    """What the configuration says of the session and did not say before."""
    now = {name: getattr(config.session, name) for name in METADATA}
    return {name: value for name, value in now.items() if value not in (None, getattr(before.session, name))}


def _changed_settings(one: Config, other: Config) -> Iterator[str]:
    for section in SECTIONS:
        was, is_now = getattr(one, section), getattr(other, section)
        for key in msgspec.structs.fields(was):
            if getattr(was, key.name) != getattr(is_now, key.name):
                yield f"{section}.{key.encode_name}"


def _changed_databases(config: Config, before: Loaded | None, after: Loaded) -> list[str]:
    """Files that say something else than before, are read otherwise, new or gone, of any bus; all if none was read."""

    def uses(loaded: Loaded) -> set[tuple[str, Any]]:
        return {
            (database.name, (bus.name, order, database.sha256, database.match))
            for bus in tables_of(loaded.config)
            for order, database in enumerate(loaded.of(bus))
        }

    if before is None:
        return sorted({file.file.name for bus in (*tables_of(config), *tables_of(after.config)) for file in bus.dbc})
    return sorted({name for name, _ in uses(after) ^ uses(before)})
