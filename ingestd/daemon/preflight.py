"""What `ingestd run` would meet on this machine, found out by doing what it does, without recording anything.

Each thing that is looked at gives a finding: `ok`, `note` (somebody should know) or `problem` (something would not be
recorded, or not be stored, as things stand now). Devices are opened as `run` opens them and listened to for a moment,
so what is said about them is what its log would say; where a daemon already records into the journal, they are left
alone: a serial adapter has one reader. If that daemon has the same file, what matters is whether a reload takes it.
"""

from __future__ import annotations

import asyncio
import ctypes
import shlex
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

from ingestd.clock import WallClock
from ingestd.config import Address, Can, Config, Control, Database, Http, control_socket
from ingestd.daemon.client import configuration_of, same_file
from ingestd.daemon.devices import filter_by_databases, open_sources, protocol_of, tables_of
from ingestd.decode.databases import Match, SignalDatabase
from ingestd.decode.parsing import parse
from ingestd.errors import IngestdError, StoreError
from ingestd.journal import Journal
from ingestd.journal.holder import holder_of
from ingestd.model import Clock, ClockState, Event, FrameBatch, Link, Memory, Source
from ingestd.pipeline import Binding, Decoders
from ingestd.store import embedded
from ingestd.store.privileges import missing_privileges

OPEN_SECONDS_MAX: Final = 4.0
FRAMES_KEPT_MAX: Final = 20_000  # of each source, to see how many of them the databases know
TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronised.
TIMEX_BYTES: Final = 512  # more than struct timex has anywhere

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    about: str
    text: str


class Listener:
    """A recorder that records nothing: it counts, and keeps some frames."""

    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()
        self.overflowed: Counter[str] = Counter()
        self.batches: dict[str, list[FrameBatch]] = {}

    def frames(self, batch: FrameBatch, clock: Clock) -> None:
        """Take note of frames."""
        del clock
        if self.heard[batch.source] < FRAMES_KEPT_MAX:
            self.batches.setdefault(batch.source, []).append(batch)
        self.heard[batch.source] += len(batch)

    def overflow(self, source: str, frames_count: int, from_ns: int, to_ns: int) -> None:
        """Take note of frames that came faster than they were read."""
        del from_ns, to_ns
        self.overflowed[source] += frames_count

    def event(self, event: Event) -> None:
        """What a source tells shows in its status, too."""


async def examine(config: Config, file: Path, seconds: float) -> AsyncIterator[Finding]:
    """Look at everything, the quickest things first. Raises nothing that is not a defect.

    Beside a daemon there is a finding about `run`, which would be refused, and if the daemon has this file one about
    `reload`.
    """
    yield _clock()
    holder = holder_of(config.journal.path)
    socket = control_socket(config.control, config.journal.path)
    theirs = await asyncio.to_thread(_configuration_in_force, config, socket, holder)
    is_reload = holder is not None and theirs is not None and same_file(theirs, file)
    for finding in _journal(config, holder):
        yield finding
    if holder is not None:
        yield _run(holder, theirs, is_reload=is_reload)
    elif theirs is not None:
        text = f"the daemon of {theirs} listens at {socket}: commands would reach that one alone; set control.socket"
        yield Finding("note", "control", text)
    if config.http.listen is not None:
        for finding in _http(config.http, config.http.listen, holder):
            yield finding
    broken: list[str] = []
    databases: dict[tuple[Path, Match], SignalDatabase] = {}
    for key in sorted({(each.file, cast(Match, each.match)) for bus in tables_of(config) for each in bus.dbc}):
        try:
            databases[key] = await parse(*key)
        except IngestdError as error:
            broken.append(key[0].name)
            yield Finding("problem", key[0].name, f"{error}; frames would be recorded, and not sent")
            continue
        for finding in _database_file(key[0], databases[key]):
            yield finding
    if holder is None:
        for finding in await _devices(config, databases, seconds):
            yield finding
    else:
        yield Finding("note", "devices", f"are left alone: {holder} records from them; /ready says how they are")
    for finding in await _store(config.database):
        yield finding
    if is_reload:
        yield _reload(config, broken)


def _configuration_in_force(config: Config, socket: Path, holder: str | None) -> Path | None:
    """The file that a daemon at the control socket runs with: also at the usual one, where this file has moved it."""
    usual = control_socket(Control(), config.journal.path)
    sockets = [socket] if holder is None or usual == socket else [socket, usual]
    return next((found for each in sockets if (found := configuration_of(each)) is not None), None)


def _run(holder: str, theirs: Path | None, *, is_reload: bool) -> Finding:
    text = f"would end with exit code {IngestdError.exit_code}: {holder} records into this journal"
    if is_reload:
        return Finding("note", "ingestd run", f"{text}, with this file")
    if theirs is None:
        return Finding("note", "ingestd run", f"{text}; whether with this file cannot be asked: no socket answers")
    return Finding("problem", "ingestd run", f"{text}, with {theirs}: give each daemon a journal of its own")


def _reload(config: Config, broken: Sequence[str]) -> Finding:
    """Whether the daemon that runs with this file would take it as it is now."""
    try:
        open_sources(config)
    except IngestdError as error:
        return Finding("problem", "ingestd reload", f"would be refused: {error}")
    if broken:
        return Finding("problem", "ingestd reload", f"would be refused: {', '.join(broken)}")
    return Finding("ok", "ingestd reload", "would take this file")


def _clock() -> Finding:
    clock = WallClock().now()
    if clock.state is ClockState.UNSET:
        return Finding(
            "note", "clock", "was never set: stamps are right, their dates are not; set it, or use NTP or GPS"
        )
    with suppress(AttributeError, OSError):  # Not on this operating system.
        if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(TIMEX_BYTES)) == TIME_ERROR:
            return Finding(
                "note", "clock", "is set and not synchronised (NTP, PPS): dates are this machine's idea of them"
            )
    return Finding("ok", "clock", "is set and synchronised")


def _journal(config: Config, holder: str | None) -> list[Finding]:
    path, bytes_max = config.journal.path, config.journal.max_bytes
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return [Finding("problem", "journal", f"{path}: {there} cannot be written to: {error.strerror}")]
    findings = []
    used = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) if there == path else 0
    room = shutil.disk_usage(there).free + used
    if room < bytes_max:
        text = f"{path}: may take {_gigabytes(bytes_max)}, and the disk has {_gigabytes(room)} for it: lower max_bytes"
        findings.append(Finding("note", "journal", text))
    if _is_memory(there):
        findings.append(Finding("problem", "journal", f"{path}: is in memory (tmpfs), and gone when the power is"))
    last = Journal.peek(path)
    if holder is not None:
        findings.append(Finding("note", "journal", f"{path}: held by {holder}"))
    elif last is not None and not last.ended:
        findings.append(Finding("note", "journal", f"{path}: the last run did not end by itself; nothing need be done"))
    if not findings:
        findings.append(Finding("ok", "journal", f"{path}: {_gigabytes(bytes_max)} at the most, there is room"))
    return findings


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


def _is_memory(folder: Path) -> bool:
    """Whether a folder is on a tmpfs: the longest mount point that it is under decides (proc(5))."""
    best, kind = "", ""
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            _, point, fs, *_ = line.split(" ")
            if folder.resolve().is_relative_to(point) and len(point) >= len(best):
                best, kind = point, fs
    return kind == "tmpfs"


def _http(http: Http, listen: Address, holder: str | None) -> Iterator[Finding]:
    from ingestd.daemon.access import Access

    try:
        Access(http.users, http.tls_certificate, http.tls_key).ssl_context()
    except OSError as error:
        yield Finding("problem", "http", f"{error.strerror}; recording would go on without: see http.tls_certificate")
    if listen.host not in ("127.0.0.1", "::1", "localhost"):
        if not http.users:
            yield Finding("note", "http", f"whoever reaches {listen} may read everything there: see http.users")
        elif not http.tls_certificate:
            yield Finding("note", "http", "passwords go over the network as they are: see http.tls_certificate")
    yield _address(listen, holder, "https" if http.tls_certificate else "http")


def _address(listen: Address, holder: str | None, scheme: str) -> Finding:
    url = f"{scheme}://{listen if listen.host else f'{socket.gethostname()}:{listen.port}'}/metrics"
    try:
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        with socket.create_server((listen.host, listen.port), family=family):
            return Finding("ok", "http", f"{url} is free")
    except OSError as error:
        if holder is not None:
            return Finding("ok", "http", f"{url} is in use, by the daemon that runs")
        text = f"{listen}: {error.strerror}; recording would go on without: set http.listen"
        return Finding("note", "http", text)


def _database_file(path: Path, database: SignalDatabase) -> list[Finding]:
    signals = sum(len(message.signals) for message in database.messages)
    found = [Finding("ok", path.name, f"{len(database.messages):,} messages, {signals:,} signals")]
    return found + [Finding("note", path.name, warning) for warning in database.warnings]


async def _devices(
    config: Config, databases: dict[tuple[Path, Match], SignalDatabase], seconds: float
) -> list[Finding]:
    """Open each device and listen for a moment."""
    try:
        sources = open_sources(config)
    except IngestdError as error:
        return [Finding("problem", "devices", str(error))]
    bindings: list[Binding] = []
    for bus in tables_of(config):
        of_bus = [databases[key] for each in bus.dbc if (key := (each.file, cast(Match, each.match))) in databases]
        bindings += [Binding(bus.name, database) for database in of_bus]
        if isinstance(bus, Can):
            filter_by_databases(bus, sources, of_bus)
    listener = Listener()
    tasks = [asyncio.create_task(source.run(listener), name=source.name) for source in sources]
    # Some adapters take seconds to open: python-can's slcan sleeps for two, in case it is one that has to boot.
    with suppress(TimeoutError):
        async with asyncio.timeout(OPEN_SECONDS_MAX):
            while any(source.status.link is Link.OPENING for source in sources):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    await asyncio.sleep(seconds)
    # What a source says of itself is of the time before it was told to end.
    states = {source.name: (source.status.link, source.status.reason) for source in sources}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    decoders = Decoders(bindings, protocols={line.name: protocol_of(line) for line in config.serial})
    to_decode = {bus.name for bus in config.can if bus.dbc}
    to_decode |= {line.name for line in config.serial if line.protocol != "lines"}
    return [
        _device(source, *states[source.name], listener, decoders, seconds, is_to_decode=source.name in to_decode)
        for source in sources
    ]


def _device(
    source: Source,
    link: Link,
    reason: str,
    listener: Listener,
    decoders: Decoders,
    seconds: float,
    *,
    is_to_decode: bool,
) -> Finding:
    heard = listener.heard[source.name]
    if link is not Link.OPEN:
        return Finding(
            "problem",
            source.name,
            f"{reason or f'has not opened within {OPEN_SECONDS_MAX + seconds:g} s'}; `run` would wait for it",
        )
    if not heard:
        return Finding("note", source.name, f"is open; nothing was heard for {seconds:g} s")
    text = f"is open; {heard:,} frames in {seconds:g} s"
    if lost := listener.overflowed[source.name]:
        return Finding("problem", source.name, f"{text}, and {lost:,} lost in the kernel: a larger receive_buffer")
    decoder = decoders.of(source.name)
    memory: Memory = {}
    counts = [decoder.decode(batch, memory).counts for batch in listener.batches[source.name]]
    frames, decoded = sum(each.frames for each in counts), sum(each.decoded for each in counts)
    text += f", {decoded / frames:.0%} of them become signals"
    if not decoded and is_to_decode and not reason:
        hint = "is it the right signal database, or protocol? (CSV needs its header first, or `columns`)"
        return Finding("note", source.name, f"{text}: {hint}")
    return Finding("problem" if reason else "ok", source.name, f"{text}; {reason}" if reason else text)


async def _store(database: Database) -> list[Finding]:
    """Whether what is recorded can be stored."""
    if database.dsn is None:
        if embedded.running() is None:
            return [Finding("ok", "database", f"`run` starts the embedded PostgreSQL in {embedded.data_dir()}")]
        return [Finding("ok", "database", f"the embedded PostgreSQL in {embedded.data_dir()} is running")]
    try:
        version, user, grants = await missing_privileges(database.dsn)
    except StoreError as error:
        return [Finding("problem", "database", f"{error}; until then everything waits in the journal")]
    if grants:
        remedy = f"as owner: `ingestd db grant --writer {shlex.quote(user)}`"
        text = f"this user may not write what it has to ({remedy}): {'; '.join(grants)}"
        return [Finding("problem", "database", text)]
    return [Finding("ok", "database", f"PostgreSQL {version}, schema up to date, may be written to")]


def stands_in_the_way(findings: Sequence[Finding]) -> bool:
    """Whether anything would not be recorded or not be stored."""
    return any(finding.level == "problem" for finding in findings)
