"""The views and functions of the schema: what they show, and that the planner can do well with them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import pytest

from ingestd.model import Flag, Quality

SESSION = UUID("01900000-0000-7000-8000-000000000001")
OTHER = UUID("01900000-0000-7000-8000-000000000002")
DAY = UUID("01900000-0000-7000-8000-00000000000d")
START_NS = 1436509052249713000
START = datetime(2015, 7, 10, 6, 17, 32, 249713, UTC)
NAN = math.nan


@pytest.fixture
async def db(migrated: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a database with the schema."""
    connection = await asyncpg.connect(migrated)
    await connection.execute("SET timezone = 'Asia/Kathmandu'")  # Nothing may depend on the zone.
    yield connection
    await connection.close()


async def add_group(
    db: asyncpg.Connection, group: int, *channels: tuple[str, dict[str, str] | None], source: str = "can0"
) -> None:
    await db.execute("INSERT INTO signal_groups VALUES ($1, $2, 'M', 'm.dbc')", group, source)
    for position, (channel, choices) in enumerate(channels, 1):
        await db.execute(
            "INSERT INTO channels VALUES ($1, $2, $3, 'rpm', NULL, NULL, $4)",
            group,
            position,
            channel,
            None if choices is None else json.dumps(choices),
        )


async def add_chunk(
    db: asyncpg.Connection,
    group: int,
    stamps: list[int],
    values: list[list[float]],
    *,
    session: UUID = SESSION,
    text: list[list[str | None]] | None = None,
    quality: list[list[int]] | None = None,
    offset_ns: int = 0,
    clock_state: int = 0,
    summary: bool = False,
) -> int:
    """Store a chunk as the writer would, and return its id."""
    numbers = [[value for value in row if not math.isnan(value)] for row in values]
    found: int = await db.fetchval(
        """INSERT INTO signal_chunks (session_id, group_id, mono_start_ns, mono_end_ns, utc_offset_ns, clock_state,
               frame_count, ts_mono_ns, value_num, value_text, quality, value_min, value_max, value_mean, value_count)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15) RETURNING id""",
        session,
        group,
        min(stamps),
        max(stamps),
        offset_ns,
        clock_state,
        len(stamps),
        stamps,
        values,
        text,
        quality,
        [min(row, default=NAN) for row in numbers] if summary else None,
        [max(row, default=NAN) for row in numbers] if summary else None,
        [sum(row) / len(row) if row else NAN for row in numbers] if summary else None,
        [len(row) for row in numbers] if summary else None,
    )
    return found


# Values.


async def test_a_sample_is_shown_with_everything(db: asyncpg.Connection) -> None:
    """Every column of `signals`: id, exact stamps, number, label, unit and quality."""
    await add_group(db, 7, ("M.Speed", None), ("M.Gear", {"1": "first", "2": "second"}))
    chunk = await add_chunk(
        db,
        7,
        [START_NS, START_NS + 10_000_999],
        [[1.5, 2.5], [1.0, 2.0]],
        quality=[[0, 1], [16, 0]],
    )
    rows = await db.fetch("SELECT * FROM signals ORDER BY id")
    base = chunk << 17
    later = START + timedelta(microseconds=10_000)
    assert [tuple(row) for row in rows] == [
        (base, SESSION, "can0", "M.Speed", START, START_NS, 1.5, None, "rpm", 0),
        (base + 1, SESSION, "can0", "M.Gear", START, START_NS, 1.0, "first", "rpm", Quality.AFTER_GAP),
        (base + 32, SESSION, "can0", "M.Speed", later, START_NS + 10_000_999, 2.5, None, "rpm", Quality.OUT_OF_RANGE),
        (base + 33, SESSION, "can0", "M.Gear", later, START_NS + 10_000_999, 2.0, "second", "rpm", 0),
    ]
    assert list(rows[0].keys()) == (
        ["id", "session_id", "source", "channel", "ts_utc", "ts_mono_ns", "value_num", "value_text", "unit", "quality"]
    )


async def test_microseconds_are_exact_and_the_offset_counts(db: asyncpg.Connection) -> None:
    """Stamps that to_timestamp(ns / 1e9) would round come out to the microsecond, and the way back is exact."""
    await add_group(db, 7, ("M.A", None))
    wall = [START_NS + step * 1_000_001_000 + 999 for step in range(1000)]
    mono = [stamp - 1_400_000_000_123_456_789 for stamp in wall]
    await add_chunk(db, 7, mono, [[float(step) for step in range(1000)]], offset_ns=1_400_000_000_123_456_789)
    rows = await db.fetch("SELECT ts_utc, ts_mono_ns, utc_ns(ts_utc) FROM signals ORDER BY id")
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert [row[0] for row in rows] == [epoch + timedelta(microseconds=stamp // 1000) for stamp in wall]
    assert [row[1] for row in rows] == mono
    assert [row[2] for row in rows] == [stamp // 1000 * 1000 for stamp in wall]


async def test_labels_of_any_number(db: asyncpg.Connection) -> None:
    """Labels are found for whole, scaled, negative and minus-zero values; NaN, infinity and huge ones raise nothing."""
    await add_group(
        db, 7, ("M.E", {"0": "zero", "0.5": "half", "-1": "minus", "10000000000000000000": "no", "1e+19": "huge"})
    )
    values = [0.0, -0.0, 0.5, -1.0, 1e19, 3.0, NAN, math.inf, -math.inf, 1.7976931348623157e308]
    await add_chunk(db, 7, [START_NS + step for step in range(10)], [values])
    rows = await db.fetch("SELECT value_num, value_text FROM signals ORDER BY id")
    assert [row["value_text"] for row in rows] == [
        "zero", "zero", "half", "minus", "huge", None, None, None, None, None,
    ]  # fmt: skip
    assert [row["value_num"] for row in rows][5:] == [3.0, None, math.inf, -math.inf, 1.7976931348623157e308]


async def test_stored_text_goes_before_a_label(db: asyncpg.Connection) -> None:
    """Text that was stored with the sample is shown; where there is none the label is."""
    await add_group(db, 7, ("M.E", {"1": "one"}), ("M.T", None))
    await add_chunk(db, 7, [1, 2], [[1.0, 1.0], [NAN, NAN]], text=[[None, "18446744073709551615"], ["a", None]])
    rows = await db.fetch("SELECT channel, value_text FROM signals ORDER BY id")
    assert [tuple(row) for row in rows] == [
        ("M.E", "one"), ("M.T", "a"), ("M.E", "18446744073709551615"), ("M.T", None),
    ]  # fmt: skip


async def test_an_unset_clock_is_in_the_quality(db: asyncpg.Connection) -> None:
    """Every sample of a chunk whose clock was not set carries bit 32, beside its own bits."""
    await add_group(db, 7, ("M.A", None))
    await add_chunk(db, 7, [1, 2], [[1.0, 2.0]], quality=[[0, 2]], clock_state=1)
    await add_chunk(db, 7, [3], [[3.0]], clock_state=1)
    rows = await db.fetch("SELECT quality FROM signals ORDER BY id")
    assert [row[0] for row in rows] == [32, 34, 32]


async def test_frames_of_every_kind(db: asyncpg.Connection) -> None:
    """Classic, FD, remote and error frames of varying lengths come back with their own payload and stamp."""
    frames: list[tuple[int, int, bytes]] = [
        (0x123, 0, b"\x01\x02\x03"),
        (0x18FEF100, Flag.EXTENDED, bytes(range(8))),
        (0x7FF, Flag.REMOTE, b""),
        (0x1FFFFFFF, Flag.EXTENDED | Flag.FD | Flag.BITRATE_SWITCH, bytes(range(64))),
        (0x4, Flag.ERROR, b"\xff" * 8),
        (0x1, Flag.EXTENDED, b"\x5a" * 1785),
    ]
    chunk = await db.fetchval(
        """INSERT INTO frame_chunks (session_id, source, mono_start_ns, mono_end_ns, utc_offset_ns, clock_state,
               frame_count, ts_mono_ns, arbitration_id, flags, lengths, data)
           VALUES ($1, 'can0', $2, $3, 0, 0, $4, $5, $6, $7, $8, $9) RETURNING id""",
        SESSION,
        START_NS,
        START_NS + 5000,
        len(frames),
        [START_NS + step * 1000 for step in range(6)],
        [frame[0] for frame in frames],
        bytes(frame[1] for frame in frames),
        b"".join(len(frame[2]).to_bytes(2, "big") for frame in frames),
        b"".join(frame[2] for frame in frames),
    )
    rows = await db.fetch("SELECT * FROM frames ORDER BY id")
    assert list(rows[0].keys()) == ["id", "session_id", "ts_utc", "ts_mono_ns", "payload_json"]
    for ordinal, (row, (arbitration_id, flags, data)) in enumerate(zip(rows, frames, strict=True)):
        assert tuple(row)[:4] == (
            (chunk << 17) + ordinal, SESSION, START + timedelta(microseconds=ordinal), START_NS + ordinal * 1000,
        )  # fmt: skip
        assert json.loads(row["payload_json"]) == {
            "source": "can0",
            "id": arbitration_id,
            "ext": bool(flags & Flag.EXTENDED),
            "fd": bool(flags & Flag.FD),
            "remote": bool(flags & Flag.REMOTE),
            "error": bool(flags & Flag.ERROR),
            "data": data.hex(),
        }


async def test_a_misaligned_chunk_is_refused(db: asyncpg.Connection) -> None:
    """Values that do not match the stamps, too many frames, and stamps outside of their span do not get in."""
    with pytest.raises(asyncpg.CheckViolationError, match="signal_chunks_shape"):
        await add_chunk(db, 7, [1, 2], [[1.0]])
    with pytest.raises(asyncpg.CheckViolationError, match="signal_chunks_frame_count"):
        await add_chunk(db, 7, list(range(4097)), [[1.0] * 4097])


async def test_an_event_is_recorded_once(db: asyncpg.Connection) -> None:
    """Recording the same event again is a no-op, a different key is another event."""
    statement = """INSERT INTO events (session_id, source, kind, key, ts_mono_ns, utc_offset_ns)
                   VALUES ($1, 'can0', 'gap', $2, 5, 0) ON CONFLICT DO NOTHING"""
    for key in ("", "", "b"):
        await db.execute(statement, SESSION, key)
    assert await db.fetchval("SELECT count(*) FROM events") == 2


# Windows of time.


async def test_a_window_is_half_open_and_open_where_null(db: asyncpg.Connection) -> None:
    """signals_between gives the samples of [from, to) of one channel, one source and one session, as the view does."""
    await add_group(db, 7, ("M.A", None), ("M.B", None))
    await add_group(db, 8, ("M.A", None), source="can1")
    stamps = [START_NS + second * 1_000_000_000 for second in range(10)]
    for session in (SESSION, OTHER):
        await add_chunk(db, 7, stamps, [[float(n) for n in range(10)], [0.0] * 10], session=session)
    await add_chunk(db, 8, stamps, [[99.0] * 10])

    async def between(begin: datetime | None, end: datetime | None) -> list[float]:
        rows = await db.fetch(
            "SELECT value_num FROM signals_between($1, 'can0', 'M.A', $2, $3) ORDER BY ts_utc", SESSION, begin, end
        )
        return [row[0] for row in rows]

    second = timedelta(seconds=1)
    assert await between(START + 2 * second, START + 5 * second) == [2, 3, 4]
    assert await between(START + 2 * second + timedelta(microseconds=1), START + 2 * second) == []
    assert await between(None, START + 3 * second) == [0, 1, 2]
    assert await between(START + 8 * second, None) == [8, 9]
    assert len(await between(None, None)) == 10
    assert await db.fetchval(
        "SELECT count(*) FROM signals_between($1, 'can0', 'M.A', '-infinity', 'infinity')", SESSION
    ) == 10  # fmt: skip
    assert await db.fetch("SELECT * FROM signals_between($1, 'can0', 'M.A', NULL, NULL) ORDER BY ts_utc", SESSION) == (
        await db.fetch(
            """SELECT ts_utc, ts_mono_ns, value_num, value_text, unit, quality FROM signals
               WHERE session_id = $1 AND source = 'can0' AND channel = 'M.A' ORDER BY ts_utc""",
            SESSION,
        )
    )


async def test_a_chunk_that_jumps_back_is_found(db: asyncpg.Connection) -> None:
    """Stamps that repeat or jump back are found by their own time."""
    await add_group(db, 7, ("M.A", None))
    await add_chunk(db, 7, [START_NS, START_NS + 5000, START_NS - 9000, START_NS - 9000], [[1.0, 2.0, 3.0, 4.0]])
    rows = await db.fetch(
        "SELECT value_num FROM signals_between($1, 'can0', 'M.A', NULL, $2) ORDER BY 1", SESSION, START
    )
    assert [row[0] for row in rows] == [3.0, 4.0]


async def test_the_latest_sample_of_every_channel(db: asyncpg.Connection) -> None:
    """The newest sample wins: within a chunk that jumps back, across chunks with offsets, and across groups."""
    await add_group(db, 7, ("M.A", None), ("M.B", {"2": "two"}))
    await add_group(db, -8, ("M.A", None))
    await add_group(db, 9, ("M.C", None), source="can1")
    await add_chunk(
        db, 7, [100_000, 300_000, 200_000], [[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]], quality=[[0, 0, 0], [0, 4, 0]]
    )
    await add_chunk(db, -8, [50_000], [[9.0]], offset_ns=1_000_000)
    await add_chunk(db, -8, [900_000], [[8.0]])
    await add_chunk(db, 9, [5000, 5000], [[1.0, NAN]], text=[[None, "x"]], clock_state=1)
    await add_chunk(db, 9, [7000], [[7.0]], session=OTHER)
    rows = await db.fetch("SELECT *, utc_ns(ts_utc) AS ns FROM latest_signals($1) ORDER BY source, channel", SESSION)
    columns = ("channel", "ts_mono_ns", "ns", "value_num", "value_text", "quality")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        ("M.A", 50_000, 1_050_000, 9.0, None, 0),
        ("M.B", 300_000, 300_000, 2.0, "two", 4),
        ("M.C", 5000, 5000, None, "x", 32),
    ]
    assert await db.fetch("SELECT * FROM latest_signals($1)", DAY) == []


# Overviews.


async def overview(db: asyncpg.Connection, begin: datetime, end: datetime, points: int) -> list[Any]:
    rows = await db.fetch(
        "SELECT * FROM signals_overview($1, 'can0', 'M.A', $2, $3, $4) ORDER BY ts_utc", SESSION, begin, end, points
    )
    return [tuple(row) for row in rows]


@pytest.mark.parametrize("summary", [True, False])
async def test_an_overview_is_what_the_samples_give(db: asyncpg.Connection, summary: bool) -> None:
    """Where chunks end with buckets, summaries and samples both give brute force over `signals`, spike included."""
    await add_group(db, 7, ("M.A", None), ("M.B", None))
    second = 1_000_000_000
    for chunk in range(20):
        stamps = [START_NS + chunk * second + step * second // 50 for step in range(50)]
        row = [float((chunk * 7 + step * 3) % 11) if step % 5 else NAN for step in range(50)]
        if chunk == 13:
            row[7] = 1e6
        await add_chunk(db, 7, stamps, [row, [1.0] * 50], summary=summary)
    got = await overview(db, START, START + timedelta(seconds=20), 5)
    expected = await db.fetch(
        """SELECT $2::timestamptz + floor(extract(epoch FROM ts_utc - $2) / 4) * interval '4 seconds',
                  min(value_num), max(value_num), avg(value_num), count(value_num)
           FROM signals WHERE session_id = $1 AND channel = 'M.A' GROUP BY 1 ORDER BY 1""",
        SESSION,
        START,
    )
    assert [row[:3] + row[4:] for row in got] == [tuple(row)[:3] + tuple(row)[4:] for row in expected]
    assert [row[3] for row in got] == pytest.approx([row[3] for row in expected], rel=1e-12)
    assert got[3][2] == 1e6
    # A step shorter than a chunk reads the samples, whether or not there is a summary.
    fine = await overview(db, START, START + timedelta(seconds=20), 200)
    assert sum(row[4] for row in fine) == 20 * 40
    assert max(row[2] for row in fine) == 1e6


class Stored(NamedTuple):
    """A chunk of M.A, in UTC nanoseconds."""

    stamps: list[int]
    values: list[float]
    has_summary: bool


def brute_force(chunks: list[Stored], begin_ns: int, end_ns: int, points: int) -> dict[int, list[float]]:
    """The samples of each point, by number. Of a chunk that is shorter than a point all belong to that it begins in."""
    step_ns = max(-(-(end_ns - begin_ns) // max(points, 1)), 1)
    found: dict[int, list[float]] = {}
    for stamps, values, has_summary in chunks:
        if stamps[-1] < begin_ns or stamps[0] >= end_ns:
            continue
        whole = has_summary and stamps[-1] - stamps[0] < step_ns
        for stamp, value in zip(stamps, values, strict=True):
            if not math.isnan(value) and (whole or begin_ns <= stamp < end_ns):
                point = max((stamps[0] if whole else stamp) - begin_ns, 0) // step_ns
                found.setdefault(point, []).append(value)
    return {point: [min(values), max(values), math.fsum(values) / len(values), len(values)]
            for point, values in found.items()}  # fmt: skip


async def test_overviews_of_anything_are_those_of_brute_force(db: asyncpg.Connection) -> None:
    """Chunks of every length, with and without summaries, in two groups, of clocks that were set; any window."""
    dice = random.Random(6)
    await add_group(db, 6, ("M.B", None), ("M.A", None))
    await add_group(db, 7, ("M.A", None))
    await add_group(db, 8, ("M.A", None), source="can1")
    chunks: list[Stored] = []
    for _ in range(120):
        begin, count = START_NS + dice.randrange(60_000) * 1_000_000, dice.choice((1, 2, 5, 30))
        every, offset = dice.choice((1, 1_000_000, 150_000_000)), dice.choice((0, 1, -5_000_000_000))
        stamps = [begin + number * every for number in range(count)]
        values = [dice.choice((NAN, 0.0, dice.gauss(0, 1e3))) for _ in stamps]
        group, has_summary = dice.choice((6, 7, 8)), dice.random() < 0.6
        rows = [[7e9] * count, values] if group == 6 else [values]
        session = dice.choice((SESSION, SESSION, SESSION, OTHER))
        mono = [stamp - offset for stamp in stamps]
        await add_chunk(db, group, mono, rows, session=session, offset_ns=offset, summary=has_summary)
        if group != 8 and session == SESSION:
            chunks.append(Stored(stamps, values, has_summary))
    seen = 0
    for _ in range(60):
        begin = START + timedelta(microseconds=dice.randrange(-5_000_000, 60_000_000))
        end = begin + timedelta(microseconds=dice.choice((1, 1000, 777_777, 10_000_000, 70_000_000)))
        points = dice.choice((1, 2, 7, 100, 1000))
        begin_ns = START_NS + (begin - START) // timedelta(microseconds=1) * 1000
        end_ns = START_NS + (end - START) // timedelta(microseconds=1) * 1000
        expected = brute_force(chunks, begin_ns, end_ns, points)
        step_ns = max(-(-(end_ns - begin_ns) // points), 1)
        found = {}
        for row in await db.fetch(
            "SELECT utc_ns(ts_utc) AS ns, * FROM signals_overview($1, 'can0', 'M.A', $2, $3, $4)",
            SESSION, begin, end, points,
        ):  # fmt: skip
            # An instant of PostgreSQL has microseconds.
            point = -(-(row["ns"] - begin_ns) // step_ns) if step_ns >= 1000 else (row["ns"] - begin_ns) // step_ns
            found[point] = [row["value_min"], row["value_max"], row["value_mean"], row["value_count"]]
        assert found.keys() == expected.keys()
        for point, numbers in found.items():
            assert numbers == pytest.approx(expected[point], rel=1e-9, abs=1e-9)
        seen += sum(int(numbers[3]) for numbers in found.values())
    assert seen > 1000


async def test_an_overview_leaves_out_what_is_empty(db: asyncpg.Connection) -> None:
    """Channels without a number in a chunk, empty buckets, windows that are empty or not given: no row, no error."""
    await add_group(db, 7, ("M.A", None))
    await add_chunk(db, 7, [START_NS], [[NAN]], summary=True)
    await add_chunk(db, 7, [START_NS + 1000], [[NAN]])
    hour = timedelta(hours=1)
    assert await overview(db, START, START + hour, 10) == []
    await add_chunk(db, 7, [START_NS, START_NS + 2000], [[1.0, NAN]], summary=True)
    assert await overview(db, START, START + hour, 10) == [(START, 1.0, 1.0, 1.0, 1)]
    assert await overview(db, START + hour, START, 10) == []
    assert len(await overview(db, START, START + hour, 0)) == 1
    assert await db.fetch("SELECT * FROM signals_overview($1, 'can0', 'M.A', NULL, NULL)", SESSION) == []


async def test_an_overview_of_any_float(db: asyncpg.Connection) -> None:
    """Sums that no float8 can hold make the mean infinite and nothing else."""
    await add_group(db, 7, ("M.A", None))
    big, tiny = 1.7976931348623157e308, 5e-324
    await add_chunk(db, 7, [START_NS, START_NS + 1], [[big, big]])
    await add_chunk(db, 7, [START_NS + 10**9, START_NS + 10**9 + 1], [[tiny, -math.inf]])
    rows = await overview(db, START, START + timedelta(seconds=2), 2)
    assert [row[1:] for row in rows] == [(big, big, math.inf, 2), (-math.inf, tiny, -math.inf, 2)]


# Plans.


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", []):
        yield from nodes(below)


async def explain(db: asyncpg.Connection, query: str, *arguments: Any) -> list[dict[str, Any]]:
    text = await db.fetchval(f"EXPLAIN (ANALYZE, VERBOSE, FORMAT JSON) {query}", *arguments)
    return list(nodes(json.loads(text)[0]["Plan"]))


def of_chunks(plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [node for node in plan if node.get("Relation Name") == "signal_chunks"]


@pytest.fixture
async def day(db: asyncpg.Connection) -> asyncpg.Connection:
    """24 hours of two groups at 1 Hz in chunks of 40 s, and as much of another session."""
    for group in (1, 2):
        await add_group(db, group, (f"M{group}.A", None), (f"M{group}.B", None))
    for session in (DAY, OTHER):
        await db.execute(
            """INSERT INTO signal_chunks (session_id, group_id, mono_start_ns, mono_end_ns, utc_offset_ns, clock_state,
                   frame_count, ts_mono_ns, value_num, value_min, value_max, value_mean, value_count)
               SELECT $1, g, $2 + c * 40000000000, $2 + c * 40000000000 + 39000000000, 0, 0, 40,
                      ARRAY(SELECT $2::bigint + c * 40000000000 + s * 1000000000::bigint FROM generate_series(0, 39) s),
                      ARRAY[array_fill(c::float8, ARRAY[40]), array_fill(1::float8, ARRAY[40])],
                      ARRAY[c, 1], ARRAY[c, 1], ARRAY[c, 1], ARRAY[40, 40]
               FROM generate_series(0, 2159::bigint) c, generate_series(1, 2) g""",
            session,
            START_NS,
        )
    await db.execute("ANALYZE")
    return db


async def test_a_short_window_of_a_day_reads_three_chunks_at_most(day: asyncpg.Connection) -> None:
    """signals_between is inlined and finds 10 s of 24 h through the index on UTC."""
    begin = START + timedelta(hours=11, seconds=15)
    plan = await explain(
        day,
        f"""SELECT * FROM signals_between('{DAY}', 'can0', 'M1.A', '{begin.isoformat()}',
                                          '{(begin + timedelta(seconds=10)).isoformat()}')""",
    )
    assert not [node for node in plan if node["Node Type"] == "Function Scan"]
    assert plan[0]["Actual Rows"] == 10
    (scan,) = of_chunks(plan)
    assert "Index" in scan["Node Type"] or "Bitmap" in scan["Node Type"]
    assert 1 <= scan["Actual Rows"] * scan["Actual Loops"] <= 3
    assert any("signal_chunks_utc" in node.get("Index Name", "") for node in plan)
    assert any("utc_offset_ns" in node.get("Index Cond", "") for node in plan)


async def test_a_window_that_ends_now_is_inlined_too(day: asyncpg.Connection) -> None:
    """now() as a limit does not keep the function from being inlined or the index from being used."""
    plan = await explain(
        day, f"SELECT * FROM signals_between('{DAY}', 'can0', 'M1.A', now() - interval '1 hour', now())"
    )
    assert not [node for node in plan if node["Node Type"] == "Function Scan"]
    assert any("utc_offset_ns" in node.get("Index Cond", "") for node in plan)


async def test_session_source_and_channel_push_down(day: asyncpg.Connection) -> None:
    """The view reads the chunks of one session and one group, also when the session comes out of a join."""
    await day.execute("INSERT INTO sessions (id, name, created_utc, time_base) VALUES ($1, 'x', now(), 'capture')", DAY)
    await day.execute("ANALYZE sessions")
    direct = f"SELECT count(*) FROM signals WHERE session_id = '{DAY}' AND source = 'can0' AND channel = 'M2.B'"
    joined = """SELECT count(*) FROM signals JOIN sessions s ON s.id = session_id
                WHERE s.name = 'x' AND source = 'can0' AND channel = 'M2.B'"""
    for query in (direct, joined):
        plan = await explain(day, query)
        assert await day.fetchval(query) == 86_400
        (unfolded,) = [node for node in plan if node["Node Type"] == "ProjectSet"]
        assert unfolded["Actual Loops"] == 2160


async def test_an_overview_reads_no_sample_where_there_are_summaries(day: asyncpg.Connection) -> None:
    """A day in 1,000 points is inlined, goes through the index and unfolds no array."""
    plan = await explain(
        day,
        f"""SELECT * FROM signals_overview('{DAY}', 'can0', 'M1.A', '{START.isoformat()}',
                                           '{(START + timedelta(days=1)).isoformat()}')""",
    )
    assert not [node for node in plan if node["Node Type"] == "Function Scan"]
    assert all(node["Actual Loops"] == 0 for node in plan if node["Node Type"] == "ProjectSet")
    assert plan[0]["Actual Rows"] == 1000
    assert not [node for node in of_chunks(plan) if node["Node Type"] == "Seq Scan"]


async def test_the_latest_samples_need_one_chunk_a_group(day: asyncpg.Connection) -> None:
    """latest_signals never scans: whatever it reads of the chunks, it finds by index, a row a group."""
    plan = await explain(day, f"SELECT * FROM latest_signals('{DAY}')")
    scans = of_chunks(plan)
    assert scans
    for scan in scans:
        assert scan["Node Type"] in {"Index Scan", "Index Only Scan"}
        assert scan["Actual Rows"] * scan["Actual Loops"] <= 2
    assert plan[0]["Actual Rows"] == 4


async def test_summaries_stay_in_the_row(db: asyncpg.Connection) -> None:
    """The summary columns are stored in the main table, and only then is an overview quick."""
    rows = await db.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'signal_chunks'::regclass AND attstorage = 'm' ORDER BY 1"
    )
    assert [row[0] for row in rows] == ["value_count", "value_max", "value_mean", "value_min"]
