"""Frames of any kind against signal databases, and signal databases that were edited by somebody in a hurry."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from ingestd.chunks import encode_frames, encode_signals
from ingestd.decode.can import Decoder, MessageTable
from ingestd.decode.databases import Match, SignalDatabase, load
from ingestd.demo import databases
from ingestd.errors import SignalDatabaseError
from ingestd.model import GROUP_CHANNELS_MAX, PAYLOAD_BYTES_MAX, Flag, FrameBatch
from tests.property.fuzz.mutations import DATA, MADE_HERE, Corpus, Seed, mutated, read
from tests.property.fuzz.serial_lines import PLACEMENT, samples
from tests.property.fuzz.target import Strategies, Target, scratch

DATABASE_BYTES_MAX = 150_000  # Larger ones take a second to parse; tests/property/test_decode.py reads them.
SMALL_BYTES_MAX = 6_000  # of those that are mutated
QUALITIES = 1 | 2 | 4 | 8

# What a database can ask for: pages in pages, floats, 64 bits, both byte orders, PGNs, 29 bits, a transport message.
EVERYTHING = b"""VERSION ""

NS_ :

BS_:

BU_: E

BO_ 256 Pages: 8 E
 SG_ Page M : 0|4@1+ (1,0) [0|15] "" E
 SG_ Inner m1M : 4|4@1+ (1,0) [0|0] "" E
 SG_ A m0 : 8|12@1- (0.5,-3) [0|100] "V" E
 SG_ B m1 : 8|16@1+ (1,0) [0|0] "" E
 SG_ C m2 : 15|16@0- (1e-3,1e6) [-1|1] "m" E

BO_ 257 Wide: 8 E
 SG_ U64 : 0|64@1+ (1,0) [0|18446744073709551615] "" E

BO_ 258 WideSigned: 8 E
 SG_ S64 : 7|64@0- (3,-1) [0|0] "" E

BO_ 259 Floats: 12 E
 SG_ F32 : 0|32@1- (1,0) [-1|1] "" E
 SG_ F64 : 39|64@0- (1e300,1) [0|0] "" E

BO_ 2566844926 Engine: 8 E
 SG_ Speed : 24|16@1+ (0.125,0) [0|8031.875] "rpm" E
 SG_ Load : 8|8@1+ (1,-125) [-125|125] "%" E
 SG_ State : 0|2@1+ (1,0) [0|3] "" E

BO_ 2566844927 Long: 300 E
 SG_ Last : 2384|16@1+ (1,0) [0|0] "" E

BA_DEF_ BO_ "VFrameFormat" ENUM "StandardCAN","ExtendedCAN","reserved","J1939PG";
BA_DEF_ "BusType" STRING ;
BA_DEF_ "ProtocolType" STRING ;
BA_DEF_DEF_ "VFrameFormat" "StandardCAN";
BA_DEF_DEF_ "BusType" "CAN";
BA_DEF_DEF_ "ProtocolType" "";
BA_ "ProtocolType" "J1939";
BA_ "VFrameFormat" BO_ 2566844926 3;
SIG_VALTYPE_ 259 F32 : 1;
SIG_VALTYPE_ 259 F64 : 2;
SG_MUL_VAL_ 256 B Inner 1-3, 7-7;
VAL_ 2566844926 State 0 "off" 1 "on" 2 "error" 3 "not available" ;
"""
TOKENS = (
    b"(0,0)", b"(1e308,1e308)", b"[0|0]", b"[nan|inf]", b"|64@1+", b"|65@0-", b"|0@1+", b"m0", b"M", b"m1M", b"3-1",
    b' "not available"', b"4294967295", b"2147483648", b"BO_ 256 Pages: 8 E\n", b"0 E\n", b"2000 E\n", b"0x", b"SG_ ",
)  # fmt: skip


class Drawn(NamedTuple):
    """One frame as it is drawn; `which` chooses a message of the database, or with `id` any."""

    which: int
    id: int
    flags: int
    payload: bytes


class Shown:
    """A database, by its name alone where an example is shown."""

    def __init__(self, it: SignalDatabase) -> None:
        self.it = it

    def __repr__(self) -> str:
        return f"<{self.it.name}, {self.it.match}>"


@cache
def _known(corpus: Corpus) -> tuple[SignalDatabase, ...]:
    """The databases of the corpus."""
    if corpus is MADE_HERE:
        path = scratch() / "everything.dbc"
        path.write_bytes(EVERYTHING)
        return (load(path), *map(load, databases().values()))
    paths = [*DATA.glob("dbc/*.dbc"), *(each for each in DATA.glob("dbc/edge/*") if each.suffix != ".json")]
    found = []
    for path in sorted(path for path in paths if path.stat().st_size <= DATABASE_BYTES_MAX):
        try:
            found += [load(path), load(path, "pgn")]
        except SignalDatabaseError:
            continue  # Some are in the data set because they cannot be used.
    return tuple(found)


_lengths = st.one_of(st.integers(0, 64), st.sampled_from([8, 8, 8, 223, PAYLOAD_BYTES_MAX]))
_payloads = st.builds(
    lambda some, length: (some * (length // (len(some) or 1) + 1) or bytes(length))[:length],
    st.one_of(st.binary(max_size=16), st.sampled_from([b"\xff", b"\0", b"\xfe\xff", b"\x7f\xff"])),
    _lengths,
)
_frames = st.lists(
    st.builds(Drawn, st.integers(0, 1 << 16), st.integers(0, 2**32 - 1), st.integers(0, 255), _payloads), max_size=24
)


def _batch(drawn: Sequence[Drawn], database: SignalDatabase) -> FrameBatch:
    """The frames, numbered by their stamps; two of three have an id that the database knows, or its PGN."""
    ids, flags = [], []
    for one in drawn:
        number, kind = one.id, one.flags
        if one.which % 3 and database.messages:
            message = database.messages[one.which // 3 % len(database.messages)]
            number = message.arbitration_id ^ (one.id & 0xFF if message.by_pgn else 0)
            kind = kind & ~(Flag.EXTENDED | Flag.REMOTE | Flag.ERROR | 128) | Flag.EXTENDED * message.extended
        ids.append(number)
        flags.append(kind)
    width = max(8, -(-max((len(one.payload) for one in drawn), default=0) // 8) * 8)
    data = b"".join(one.payload.ljust(width, b"\0") for one in drawn)
    return FrameBatch(
        "can0",
        np.arange(len(drawn), dtype=np.int64),
        np.array(ids, np.uint32),
        np.array(flags, np.uint8),
        np.array([len(one.payload) for one in drawn], np.uint16),
        np.frombuffer(data, np.uint8).reshape(len(drawn), width),
    )


def _draw_frames(corpus: Corpus) -> Strategies:
    return {
        "database": st.sampled_from(_known(corpus)).map(Shown),
        "frames": _frames,
        "at": st.integers(0, 24),
        "keep_not_available": st.booleans(),
    }


def check_frames(database: Shown, frames: list[Drawn], at: int, keep_not_available: bool) -> None:
    """Every frame is counted once; batches cut otherwise give the same samples; all of it can be stored."""
    _check_decoding(_batch(frames, database.it), MessageTable([database.it]), at, keep_not_available)


def _check_decoding(batch: FrameBatch, table: MessageTable, at: int, keep_not_available: bool) -> None:
    whole = Decoder("can0", table, keep_not_available=keep_not_available).decode(batch)
    counts = whole.counts
    assert counts.frames == len(batch)
    assert counts.frames == counts.decoded + counts.unknown + counts.undecoded + counts.remote + counts.error
    decoder = Decoder("can0", table, keep_not_available=keep_not_available)
    parts = [decoder.decode(part) for part in (batch[:at], batch[at:])]
    found = dict(samples([whole]))
    assert found == dict(samples(parts))
    assert counts.signals == len(found)
    assert counts.short <= counts.decoded + counts.undecoded
    for one in whole.batches:
        assert len(one.group.channels) <= GROUP_CHANNELS_MAX
        assert one.quality is None or not (one.quality & ~QUALITIES).any()
    encode_signals(whole.batches, PLACEMENT)
    if len(batch):
        encode_frames([batch], PLACEMENT)


def _draw_database(corpus: Corpus) -> Strategies:
    if corpus is MADE_HERE:
        seeds = [Seed("everything.dbc", EVERYTHING), *(read(path, -1) for path in databases().values())]
    else:
        paths = [*DATA.glob("dbc/*.dbc"), *(each for each in DATA.glob("dbc/edge/*") if each.suffix != ".json")]
        seeds = [read(path, -1) for path in sorted(paths) if path.stat().st_size <= SMALL_BYTES_MAX]
    by_suffix = {suffix: [one for one in seeds if one.name.endswith(suffix)] for suffix in (".dbc", ".sym", ".kcd")}
    known = {suffix: some for suffix, some in by_suffix.items() if some}
    return {
        "file": st.one_of([st.tuples(st.just(suffix), mutated(some, tokens=TOKENS)) for suffix, some in known.items()]),
        "match": st.sampled_from(["auto", "id", "pgn"]),
        "frames": _frames,
    }


def check_database(file: tuple[str, bytes], match: Match, frames: list[Drawn]) -> None:
    """It is refused with file and reason, or decodes whatever comes. NUL, which no database can store, is not in it."""
    suffix, content = file
    path = scratch() / f"mutated{suffix}"
    path.write_bytes(content)
    database = _loaded(path, match)
    if isinstance(database, SignalDatabaseError):
        assert re.match(rf"{re.escape(str(path))}(, line \d+)?: \S", str(database))
        assert database.hint
        assert "\n" not in str(database)
        return
    table = MessageTable([database])
    assert all("\n" not in said for said in (*database.warnings, *table.warnings))
    _check_decoding(_batch(frames, database), table, 5, keep_not_available=False)


def _loaded(path: Path, match: Match) -> SignalDatabase | SignalDatabaseError:
    try:
        return load(path, match)
    except SignalDatabaseError as error:
        return error


TARGETS = (
    Target("can_frames", _draw_frames, check_frames, examples=80),
    Target("signal_database", _draw_database, check_database, examples=100),
)
