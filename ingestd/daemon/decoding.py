"""From the signal databases of a configuration to the decoders of its sources.

Databases are parsed in another process: it takes seconds, and the loop has frames to read. At the start one that cannot
be parsed is tried again when it has changed, and until then nothing is sent; a reload that names one is refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ingestd.backoff import Backoff
from ingestd.config import Can, Config, DatabaseFile, Serial
from ingestd.daemon.devices import protocol_of, tables_of
from ingestd.decode.databases import Match, SignalDatabase
from ingestd.decode.parsing import parse
from ingestd.errors import ConfigError, IngestdError
from ingestd.pipeline import Binding, Decoders

RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.5, 5.0
PARSE_AGAIN_SECONDS = 60.0  # A file that did not change is parsed again then: the reason may be elsewhere.

Key = tuple[Path, Match]
Fingerprint = tuple[int, int, int] | None

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Every signal database of a configuration, and the decoders that come of them."""

    config: Config
    databases: Mapping[Key, SignalDatabase]
    decoders: Decoders
    fingerprints: Mapping[Key, Fingerprint] = field(default_factory=dict)

    def of(self, bus: Can | Serial) -> list[SignalDatabase]:
        """The databases of a bus, in their order."""
        return [self.databases[_key(file)] for file in bus.dbc]

    @property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each file, by its path."""
        return {str(path): database.sha256 for (path, _), database in sorted(self.databases.items())}


async def load_at_start(
    config: Config, troubled: Callable[[str, str], None], cured: Callable[[str], None]
) -> Loaded:  # fmt: skip
    """Parse until all are parsed. What is wrong with a file is told to `troubled`, and to `cured` when it is over."""
    databases: dict[Key, SignalDatabase] = {}
    fingerprints: dict[Key, Fingerprint] = {}
    for key in _keys(config):
        backoff = Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX)
        while True:
            tried = fingerprints[key] = _fingerprint(key[0])
            try:
                databases[key] = await parse(*key)
                cured(str(key[0]))
                break
            except IngestdError as error:
                troubled(str(key[0]), f"{error}; recording goes on, nothing is sent until the file is corrected")
            again_at = time.monotonic() + PARSE_AGAIN_SECONDS
            while True:
                await asyncio.sleep(backoff.next_seconds())
                if _fingerprint(key[0]) != tried or time.monotonic() > again_at:
                    break
    return _loaded(config, databases, fingerprints, None)


async def load_again(config: Config, before: Loaded | None) -> Loaded:
    """Parse what is new or has changed. Raises ConfigError with a line for every file that cannot be used.

    What decodes as `before` keeps its decoder, and so does a source that is no more: its last frames may wait.
    """
    databases: dict[Key, SignalDatabase] = {}
    fingerprints: dict[Key, Fingerprint] = {}
    mistakes = []
    for key in _keys(config):
        fingerprints[key] = _fingerprint(key[0])
        if before is not None and fingerprints[key] and before.fingerprints.get(key) == fingerprints[key]:
            databases[key] = before.databases[key]
            continue
        try:
            databases[key] = await parse(*key)
        except IngestdError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n  ".join(mistakes))
    return await asyncio.to_thread(_loaded, config, databases, fingerprints, before)


def _loaded(
    config: Config, databases: Mapping[Key, SignalDatabase], fingerprints: Mapping[Key, Fingerprint],
    before: Loaded | None,
) -> Loaded:  # fmt: skip
    for database in databases.values():
        for warning in database.warnings:
            log.warning("%s", warning)
    bindings = [Binding(bus.name, databases[_key(file)]) for bus in tables_of(config) for file in bus.dbc]
    decoders = Decoders(bindings, protocols={line.name: protocol_of(line) for line in config.serial})
    loaded = Loaded(config, databases, decoders, fingerprints)
    if before is not None:
        _keep_decoders(loaded, before)
    for bus in tables_of(config):
        decoders.of(bus.name)
    for warning in decoders.warnings:
        log.warning("%s", warning)
    return loaded


def _keep_decoders(loaded: Loaded, before: Loaded) -> None:
    now = {source.name: source for source in tables_of(loaded.config)}
    then = {source.name: source for source in tables_of(before.config)}
    for name in {*before.decoders.sources, *then} - now.keys():
        loaded.decoders.keep(name, before.decoders.of(name))
    for name in now.keys() & then.keys():
        was, is_now = then[name], now[name]
        is_same = (isinstance(was, Can) and isinstance(is_now, Can)) or was == is_now
        if is_same and list(map(_identity, before.of(was))) == list(map(_identity, loaded.of(is_now))):
            loaded.decoders.keep(name, before.decoders.of(name))


def _identity(database: SignalDatabase) -> tuple[str, str]:
    return database.sha256, database.match


def _keys(config: Config) -> list[Key]:
    return sorted({_key(file) for bus in tables_of(config) for file in bus.dbc})


def _key(file: DatabaseFile) -> Key:
    return file.file, cast(Match, file.match)  # The configuration has checked it.


def _fingerprint(path: Path) -> Fingerprint:
    """What changes when somebody writes to a file or changes who may read it; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_ctime_ns
