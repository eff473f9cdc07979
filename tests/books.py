"""The books of a daemon under test against everything else that can be known: SQL, the journal, what was sent.

    received = committed + pending + rejected + dropped{reason}      for each source

is said in four places: /metrics while the daemon runs, `ingestd journal status --json` beside it and afterwards, and
the last lines of its log. `assert_books` compares all of them with each other, with the frames in SQL and in the
journal, and with the numbers in what the devices have said.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import subprocess
import sys
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from ingestd.journal import Kind, Record
from ingestd.journal.inspection import rejected
from ingestd.journal.segment import list_folder, read_segment
from tests.recorder import Recorder, frames_of, stored, wait_until

Frame = tuple[str, int, str]  # source, stamp, payload in hexadecimal

_LOG_LINE = re.compile(
    r"books source=(\S+) received=(\d+) committed=(\d+) pending=(\d+) rejected=(\d+) (.*) balanced=(\w+)$", re.MULTILINE
)
_METRIC = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_NUMBER = re.compile(rb"n=(\d+)\b")


@dataclass(frozen=True, slots=True)
class Said:
    """The books of one source, as one place says them."""

    received: int
    committed: int
    pending: int
    rejected: int
    dropped: dict[str, int] = field(default_factory=dict)  # without the reasons that count nothing

    @property
    def is_balanced(self) -> bool:
        return self.received == self.committed + self.pending + self.rejected + sum(self.dropped.values())


@dataclass(frozen=True, slots=True)
class Gap:
    """A gap event of a source."""

    source: str
    reason: str
    from_ns: int
    to_ns: int
    frames: int


def number_in(payload: bytes) -> int | None:
    """The number of a line of `recorder.Instrument`; None for what the end of a cut one has left."""
    found = _NUMBER.match(payload)
    return None if found is None else int(found[1])


def scrape(recorder: Recorder) -> str:
    """What /metrics says now."""
    address = re.findall(r"listening http=(\S+)", recorder.log()[recorder.begun :])
    assert address, "the daemon does not listen (yet)"
    with urllib.request.urlopen(f"http://{address[-1]}/metrics", timeout=20) as answer:
        return str(answer.read().decode())


def metric(recorder: Recorder, name: str) -> float:
    """The value of a metric without labels."""
    found = re.search(rf"^{name} (\S+)$", scrape(recorder), re.MULTILINE)
    assert found is not None, f"/metrics has no {name}"
    return float(found[1])


def in_metrics(recorder: Recorder) -> dict[str, Said]:
    """The books that /metrics says."""
    counts: dict[str, Counter[str]] = {}
    dropped: dict[str, dict[str, int]] = {}
    for name, labels, value in _METRIC.findall(scrape(recorder)):
        if name.startswith("ingestd_frames_"):
            label = dict(_LABEL.findall(labels))
            what = name.removeprefix("ingestd_frames_").removesuffix("_total")
            if what == "dropped":
                dropped.setdefault(label["source"], {})[label["reason"]] = int(float(value))
            else:
                counts.setdefault(label["source"], Counter())[what] = int(float(value))
    found: dict[str, Said] = defaultdict(lambda: Said(0, 0, 0, 0, {}))  # Whoever asks too early is told of nothing.
    for source, of in counts.items():
        if of["received"]:  # One that has given nothing is in no books.
            lost = _some(dropped.get(source, {}))
            found[source] = Said(of["received"], of["committed"], of["pending"], of["rejected"], lost)
    return found


def in_status(recorder: Recorder) -> dict[str, Said]:
    """The books that `ingestd journal status --json` says."""
    return {
        source: Said(of["received"], of["committed"], of["pending"], of["rejected"], _some(of["dropped"]))
        for source, of in status(recorder)["books"].items()
        if of["received"]
    }


def status(recorder: Recorder) -> dict[str, Any]:
    """All of `ingestd journal status --json`."""
    command = [sys.executable, "-m", "ingestd", "journal", "status", "--json", str(recorder.journal)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found: dict[str, Any] = json.loads(said)
    return found


def in_log(log: str) -> dict[str, Said]:
    """The books that the last run in a log ends with."""
    found = {}
    for source, received, committed, pending, refused, rest, balanced in _LOG_LINE.findall(log):
        assert balanced == "True", log[-10_000:]
        pairs = (each.partition("=")[::2] for each in rest.split())
        dropped = {name.removeprefix("dropped_"): int(count) for name, count in pairs if name != "dropped"}
        found[source] = Said(int(received), int(committed), int(pending), int(refused), _some(dropped))
    return found


def _some(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in counts.items() if count}


def settle(recorder: Recorder, *, seconds: float = 60.0) -> None:
    """Wait until a daemon whose devices are silent has everything that they said, and has sent all of it."""
    seen: list[dict[str, Said]] = []

    def is_quiet() -> bool:
        seen.append(in_metrics(recorder))
        quiet = len(seen) > 4 and seen[-5:] == [seen[-1]] * 5 and bool(seen[-1])
        return quiet and not any(said.pending for said in seen[-1].values())

    wait_until(is_quiet, "end of what is pending", seconds, recorder.log)


def assert_books(
    recorder: Recorder,
    dsn: str,
    sent: Mapping[str, int],
    *,
    number: Callable[[bytes], int | None] = number_in,
    is_sent: bool = True,
    is_kept: bool = True,
    seconds: float = 60.0,
) -> dict[str, Said]:
    """Compare the books, wherever they are said, with SQL, with the journal and with what was sent; and return them.

    `sent` is how many numbered frames each source's device has said, from 0 on; the devices are silent by now. A daemon
    that runs is asked while it does, and then stopped. `is_sent`: the database has taken everything there is to take.
    `is_kept`: nobody has cut the journal's files.
    """
    if recorder.process is not None:
        if is_sent:
            settle(recorder, seconds=seconds)
            # What was still on its way may come in between.
            wait_until(
                lambda: in_metrics(recorder) == in_status(recorder), "two books that are equal", seconds,
                lambda: f"{in_metrics(recorder)}\n{in_status(recorder)}\n{recorder.log()[-5000:]}",
            )  # fmt: skip
        assert all(said.is_balanced for said in in_metrics(recorder).values())
        recorder.stop()
    books = in_log(recorder.log()[recorder.begun :])
    assert books, recorder.log()[-10_000:]
    assert in_status(recorder) == books
    assert all(said.is_balanced for said in books.values()), books
    in_sql, in_journal, refused = stored(dsn), recorder.journalled(), set_aside(recorder)
    assert max(in_sql.values(), default=1) == 1, "a frame is in SQL twice"
    assert max(in_journal.values(), default=1) == 1, "a frame is in the journal twice"
    assert not set(in_sql) & set(refused), "a frame that was rejected is in SQL"
    waiting = set(in_journal) - set(in_sql) - set(refused)
    assert _by_source(in_sql) == {source: said.committed for source, said in books.items() if said.committed}
    assert _by_source(refused) == {source: said.rejected for source, said in books.items() if said.rejected}
    assert _by_source(waiting) == {source: said.pending for source, said in books.items() if said.pending}
    if is_sent:
        assert not waiting, f"{len(waiting)} frames of the journal are not in SQL"
    gone = set(in_sql) - set(in_journal)
    assert not gone or not is_kept or removed_segments(recorder), f"{len(gone)} frames in SQL were never in the journal"
    gaps, sessions = _gaps(recorder, dsn, is_sent=is_sent), _sessions(dsn)
    known = {*in_sql, *refused, *waiting}
    for source, count in sent.items():
        of_source = sorted((ts_ns, payload) for name, ts_ns, payload in known if name == source)
        _assert_sent(source, count, of_source, books[source], [gap for gap in gaps if gap.source == source], sessions,
                     number)  # fmt: skip
    return books


def _by_source(frames: Iterable[Frame]) -> dict[str, int]:
    return dict(Counter(source for source, _, _ in frames))


def set_aside(recorder: Recorder) -> Counter[Frame]:
    """Every frame that was rejected."""
    found: Counter[Frame] = Counter()
    for record, _ in rejected(recorder.journal, "", pytest.fail):
        found.update(frames_of(record))
    return found


def removed_segments(recorder: Recorder) -> int:
    """How many segments the journal has had and has no more."""
    names = [name for name in list_folder(recorder.journal)[0] if name.number]
    return max(name.number for name in names) - len(names)


def newest_segment(folder: Path) -> int:
    """The greatest number in a journal."""
    return max((name.number for name in list_folder(folder)[0]), default=0) if folder.is_dir() else 0


def journal_records(folder: Path, kind: Kind, *, after: int = 0) -> list[Record]:
    """The records of a kind that are in a journal, in segments with a greater number."""
    segments = [name.path for name in list_folder(folder)[0] if name.number > after and not name.rejected]
    items = (item for path in segments for item in read_segment(path))
    return [item for item in items if isinstance(item, Record) and item.kind is kind]


def _gaps(recorder: Recorder, dsn: str, *, is_sent: bool) -> list[Gap]:
    """The gaps in SQL and in the journal; what was sent is in SQL."""
    rows = _fetch(dsn, "SELECT session_id::text, source, kind, key, ts_mono_ns, payload::text FROM events")
    in_sql = {tuple(row[:5]): json.loads(row[5]) for row in rows}
    found = dict(in_sql)
    for record in journal_records(recorder.journal, Kind.EVENT):
        event = record.event()
        if event.kind == "resumed":  # It tells the decoding what the gap told later is for people.
            continue
        key = str(record.session_id), event.source, event.kind, event.key, event.ts_ns
        assert found.setdefault(key, dict(event.payload)) == event.payload, f"another event in SQL: {key}"
    if is_sent:
        assert found.keys() == in_sql.keys(), "events of the journal are not in SQL"
    return [
        Gap(source, key, payload.get("from_ns", at_ns), payload.get("to_ns", at_ns), payload.get("frames", 0))
        for (_, source, kind, key, at_ns), payload in found.items()
        if kind == "gap"
    ]


def _sessions(dsn: str) -> list[tuple[int, int]]:
    """Between which stamps nobody was to record: behind the last frame of a session, before the first of the next."""
    spans = _fetch(
        dsn,
        "SELECT min(mono_start_ns), max(mono_end_ns) FROM frame_chunks GROUP BY session_id ORDER BY min(mono_start_ns)",
    )
    return [(before[1], after[0]) for before, after in itertools.pairwise(spans)]


def _fetch(dsn: str, query: str) -> list[asyncpg.Record]:
    async def fetch() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetch(query)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def _assert_sent(source: str, count: int, frames: list[tuple[int, str]], said: Said, gaps: list[Gap],
                 between: list[tuple[int, int]], number: Callable[[bytes], int | None]) -> None:  # fmt: skip
    """Every number is there once, or it was dropped and counted, or said while nobody was to read and a gap says so."""
    at_ns: dict[int, int] = {}
    for ts_ns, payload in frames:
        each = number(bytes.fromhex(payload))
        if each is not None:
            assert each not in at_ns, f"line {each} of {source} is there twice"
            at_ns[each] = ts_ns
    assert at_ns, f"nothing of {source} is there"
    numbers = sorted(at_ns)
    assert numbers[-1] < count, f"line {numbers[-1]} of {source}, and only {count} were said"
    down = [(gap.from_ns, gap.to_ns) for gap in gaps if gap.reason == "down"] + between
    told = [gap for gap in gaps if gap.reason in said.dropped]
    assert Counter(gap.reason for gap in told for _ in range(gap.frames)) == said.dropped, (gaps, said)
    uncovered, covered = 0, 0
    for before, after in itertools.pairwise(numbers):
        missing = after - before - 1
        if not missing:
            continue
        from_ns, to_ns = at_ns[before], at_ns[after]
        if any(from_ns <= begin and end <= to_ns for begin, end in down):
            covered += missing
            continue
        uncovered += missing
        assert any(from_ns <= gap.from_ns and gap.to_ns <= to_ns for gap in told), (
            f"{before + 1} to {after - 1} of {source} are missing, from {from_ns} to {to_ns}, and no event says why:"
            f" {sorted(gaps, key=lambda gap: gap.from_ns)}"
        )
    # At the ends: before the first start and behind the last stop nobody was to read.
    edges = numbers[0] + count - 1 - numbers[-1]
    dropped = sum(said.dropped.values())
    assert uncovered <= dropped <= uncovered + covered + edges, (source, uncovered, dropped, covered, edges)
