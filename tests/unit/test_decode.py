"""The decoder's rules, on databases small enough to read. (Equality with cantools: tests/property/test_decode.py.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ingestd.decode.can import Counts, Decoded, Decoder, MessageTable
from ingestd.decode.databases import Match, MessageDefinition, SignalDatabase, SignalDefinition, load, pgn_of
from ingestd.decode.layout import float8_text
from ingestd.errors import SignalDatabaseError, UsageError
from ingestd.model import Flag, FrameBatch, Quality, SignalBatch

PREAMBLE = 'VERSION ""\n\nNS_ :\n\nBS_:\n\nBU_: ECU\n\n'

ENGINE = """
BO_ 256 Engine: 8 ECU
 SG_ Rpm : 0|16@1+ (0.25,0) [0|8000] "rpm" ECU
 SG_ Gear : 16|4@1+ (1,-1) [-1|6] "" ECU
 SG_ Ratio : 24|8@1+ (0.1,0) [0|0.3] "" ECU
VAL_ 256 Gear 0 "reverse" 1 "neutral" ;
"""

# 0x98F00421: PGN 61444 from 0x21. 0x98EA0100: PGN 59904, PDU1: 0x01 is a destination, 0x00 the sender.
TRUCK = """
BO_ 2565866529 EEC1: 8 ECU
 SG_ Mode : 0|4@1+ (1,0) [0|15] "" ECU
 SG_ Switch : 4|2@1+ (1,0) [0|3] "" ECU
 SG_ Torque : 8|8@1+ (1,-125) [-125|125] "%" ECU
 SG_ Speed : 24|16@1+ (0.125,0) [0|8031.875] "rpm" ECU
 SG_ Labelled : 40|2@1+ (1,0) [0|3] "" ECU
 SG_ Hours : 32|32@1+ (0.05,0) [0|210554060.75] "h" ECU
BO_ 2565472512 Request: 3 ECU
 SG_ Wanted : 0|24@1+ (1,0) [0|0] "" ECU
VAL_ 2565866529 Labelled 2 "reverse" 3 "not available" ;
"""


def database(tmp_path: Path, text: str, match: Match = "auto", name: str = "test.dbc") -> list:
    path = tmp_path / name
    path.write_text(PREAMBLE + text)
    return [load(path, match)]


def table(tmp_path: Path, text: str, match: Match = "auto", name: str = "test.dbc") -> MessageTable:
    return MessageTable(database(tmp_path, text, match, name))


def frame_batch(*frames: tuple[int, str], flags: int = 0) -> FrameBatch:
    """Frames of (id, hex payload); ids over 11 bits are extended; stamps 0, 1, 2 …"""
    width = max(8, *(-(-len(payload) // 16) * 8 for _, payload in frames))
    data = np.zeros((len(frames), width), np.uint8)
    for row, (_, payload) in enumerate(frames):
        data[row, : len(payload) // 2] = list(bytes.fromhex(payload))
    return FrameBatch(
        "can0",
        np.arange(len(frames), dtype=np.int64),
        np.array([identifier for identifier, _ in frames], np.uint32),
        np.array([flags | (Flag.EXTENDED if identifier > 0x7FF else 0) for identifier, _ in frames], np.uint8),
        np.array([len(payload) // 2 for _, payload in frames], np.uint16),
        data,
    )


def samples(decoded: Decoded) -> dict[str, list[tuple[int, float | None, int]]]:
    """Per `source channel`: (stamp, value, quality) in order."""
    found: dict[str, list[tuple[int, float | None, int]]] = {}
    for batch in decoded.batches:
        for row, channel in enumerate(batch.group.channels):
            for column, stamp in enumerate(batch.ts_ns.tolist()):
                value = float(batch.value[row, column])
                quality = 0 if batch.quality is None else int(batch.quality[row, column])
                key = f"{batch.group.source} {channel.name}"
                found.setdefault(key, []).append((stamp, None if np.isnan(value) else value, quality))
    return {key: sorted(values) for key, values in found.items()}


def one_of(decoded: Decoded, name: str) -> SignalBatch:
    [batch] = [batch for batch in decoded.batches if batch.group.name == name]
    return batch


def test_counts_every_frame_once(tmp_path: Path) -> None:
    """Decoded, unknown, remote and error frames add up, and only data frames of known ids are decoded."""
    decoder = Decoder("can0", table(tmp_path, ENGINE))
    counts = Counts()
    for batch in (
        frame_batch((256, "0010000000000000"), (257, "00"), (0x1FFFFFFF, "00")),
        frame_batch((256, ""), flags=Flag.REMOTE),
        frame_batch((256, "0000000000000000"), flags=Flag.ERROR),
    ):
        counts.add(decoder.decode(batch).counts)
    assert counts == Counts(frames=5, decoded=1, unknown=2, remote=1, error=1, signals=3)


def test_an_extended_id_is_not_the_standard_one(tmp_path: Path) -> None:
    """0x100 as an extended id is another message than 0x100 as a standard id."""
    decoder = Decoder("can0", table(tmp_path, ENGINE))
    assert decoder.decode(frame_batch((256, "00" * 8), flags=Flag.EXTENDED)).counts.unknown == 1


def test_values_labels_and_ranges(tmp_path: Path) -> None:
    """Scaling is applied, labels go by scaled value, and 3 x 0.1 is within a maximum of 0.3 while 4 x 0.1 is not."""
    decoder = Decoder("can0", table(tmp_path, ENGINE))
    decoded = decoder.decode(frame_batch((256, "a00f020300000000"), (256, "ffff000400000000")))
    assert samples(decoded) == {
        "can0 Engine.Rpm": [(0, 1000.0, 0), (1, 16383.75, Quality.OUT_OF_RANGE)],
        "can0 Engine.Gear": [(0, 1.0, 0), (1, -1.0, 0)],
        "can0 Engine.Ratio": [(0, 3 * 0.1, 0), (1, 0.4, Quality.OUT_OF_RANGE)],
    }
    gear = decoded.batches[0].group.channels[1]
    assert gear.choices == {"-1": "reverse", "0": "neutral"}


def test_short_frames_give_what_is_wholly_inside(tmp_path: Path) -> None:
    """Two bytes of an eight-byte message hold one signal; it is marked, the others are absent; none is no error."""
    decoder = Decoder("can0", table(tmp_path, ENGINE))
    decoded = decoder.decode(frame_batch((256, "a00f"), (256, "a0"), (256, ""), (256, "a00f0203000000000000")))
    assert samples(decoded) == {
        "can0 Engine.Rpm": [(0, 1000.0, Quality.SHORT_FRAME), (3, 1000.0, 0)],
        "can0 Engine.Gear": [(3, 1.0, 0)],
        "can0 Engine.Ratio": [(3, 3 * 0.1, 0)],
    }
    assert decoded.counts == Counts(frames=4, decoded=4, short=3, signals=4)


def test_a_classic_frame_of_a_long_message_is_a_segment(tmp_path: Path) -> None:
    """Eight classic bytes of a twelve-byte message are a transport protocol's; the same in CAN FD is a short frame."""
    text = 'BO_ 512 Long: 12 ECU\n SG_ First : 0|8@1+ (1,0) [0|0] "" ECU\n'
    decoder = Decoder("can0", table(tmp_path, text))
    assert decoder.decode(frame_batch((512, "10" * 8))).counts == Counts(frames=1, undecoded=1)
    assert decoder.decode(frame_batch((512, "10" * 8), flags=Flag.FD)).counts.short == 1
    assert decoder.decode(frame_batch((512, "10" * 12))).counts == Counts(frames=1, decoded=1, signals=1)


def test_signals_are_found_by_pgn(tmp_path: Path) -> None:
    """Priority, sender and PDU1 destination do not matter; the sender joins the source; standard ids never."""
    decoder = Decoder("can0", table(tmp_path, TRUCK, "pgn"))
    decoded = decoder.decode(
        frame_batch((0x0CF00421, "00" * 8), (0x18F004FE, "00" * 8), (0x18EAFF05, "010203"), (0x004, "00" * 8))
    )
    sources = {batch.group.source for batch in decoded.batches}
    assert sources == {"can0/0x21", "can0/0xFE", "can0/0x05"}
    assert samples(decoded)["can0/0x05 Request.Wanted"] == [(2, float(0x030201), 0)]
    assert decoded.counts.unknown == 1
    by_id = Decoder("can0", table(tmp_path, TRUCK, "id"))
    assert by_id.decode(frame_batch((0x0CF00421, "00" * 8))).counts.unknown == 1
    assert (pgn_of(0x18EAFF05), pgn_of(0x18F004FE)) == (0xEA00, 0xF004)


@pytest.mark.parametrize(
    ("payload", "channel", "expected"),
    [
        ("0f00000000000000", "Mode", Quality.NOT_AVAILABLE),
        ("0e00000000000000", "Mode", Quality.ERROR_PATTERN),
        ("0d00000000000000", "Mode", 0),
        ("3000000000000000", "Switch", Quality.NOT_AVAILABLE),
        ("2000000000000000", "Switch", Quality.ERROR_PATTERN),
        ("00ff000000000000", "Torque", Quality.NOT_AVAILABLE),
        ("00fe000000000000", "Torque", Quality.ERROR_PATTERN),
        ("00fb000000000000", "Torque", Quality.OUT_OF_RANGE),
        ("00000000ff000000", "Speed", Quality.NOT_AVAILABLE),
        ("00000001fe000000", "Speed", Quality.ERROR_PATTERN),
        ("00000000fa000000", "Speed", 0),
        ("00000000000000ff", "Hours", Quality.NOT_AVAILABLE),
        ("00000000000000fe", "Hours", Quality.ERROR_PATTERN),
        ("0000000000030000", "Labelled", Quality.NOT_AVAILABLE),
        ("0000000000020000", "Labelled", 0),
    ],
)
def test_reserved_patterns_of_j1939(tmp_path: Path, payload: str, channel: str, expected: int) -> None:
    """FE and FF in the top byte, or the two highest values, take the value away; a label of its own keeps it."""
    batch = frame_batch((0x18F00421, payload))
    [(_, value, quality)] = samples(Decoder("can0", table(tmp_path, TRUCK, "pgn")).decode(batch))[
        f"can0/0x21 EEC1.{channel}"
    ]
    gone = expected in (Quality.NOT_AVAILABLE, Quality.ERROR_PATTERN)
    assert (quality, value is None) == (expected, gone)
    keeping = Decoder("can0", table(tmp_path, TRUCK, "pgn"), keep_not_available=True)
    [(_, value, quality)] = samples(keeping.decode(batch))[f"can0/0x21 EEC1.{channel}"]
    assert (quality, value is None) == (expected, False)


def test_reserved_patterns_of_nmea_2000(tmp_path: Path) -> None:
    """In NMEA 2000 signed values have them too, and 0xFF00 is an ordinary 16-bit value."""
    text = """
BO_ 2314732030 PositionRapid: 8 ECU
 SG_ Latitude : 0|32@1- (1e-7,0) [-90|90] "deg" ECU
 SG_ Count : 32|16@1+ (1,0) [0|65535] "" ECU
"""
    decoder = Decoder("can0", table(tmp_path, text, "pgn"))
    decoded = decoder.decode(
        frame_batch(
            (0x09F80123, "ffffff7f00ff0000"), (0x09F80123, "feffff7fffff0000"), (0x09F80123, "01000000feff0000")
        )
    )
    assert samples(decoded) == {
        "can0/0x23 PositionRapid.Latitude": [
            (0, None, Quality.NOT_AVAILABLE),
            (1, None, Quality.ERROR_PATTERN),
            (2, 1e-7, 0),
        ],
        "can0/0x23 PositionRapid.Count": [
            (0, 65280.0, 0),
            (1, None, Quality.NOT_AVAILABLE),
            (2, None, Quality.ERROR_PATTERN),
        ],
    }


MULTIPLEXED = """
BO_ 768 Page: 8 ECU
 SG_ Counter : 56|8@1+ (1,0) [0|0] "" ECU
 SG_ Mux M : 0|8@1+ (1,0) [0|0] "" ECU
 SG_ A m1 : 8|16@1+ (1,0) [0|0] "" ECU
 SG_ B m2 : 8|8@1+ (1,0) [0|0] "" ECU
SG_MUL_VAL_ 768 A Mux 1-1, 4-6;
SG_MUL_VAL_ 768 B Mux 2-2;
"""


def test_pages_of_multiplexed_messages(tmp_path: Path) -> None:
    """Values that select the same signals share a group; an unknown value leaves its frame undecoded."""
    decoder = Decoder("can0", table(tmp_path, MULTIPLEXED))
    decoded = decoder.decode(
        frame_batch(
            (768, "0101000000000007"), (768, "0202000000000008"), (768, "0503000000000009"), (768, "030000000000000a")
        )
    )
    assert decoded.counts == Counts(frames=4, decoded=3, undecoded=1, signals=9)
    assert one_of(decoded, "Page[Mux=1,4-6]").ts_ns.tolist() == [0, 2]
    assert one_of(decoded, "Page[Mux=2]").ts_ns.tolist() == [1]
    assert samples(decoded)["can0 Page.Counter"] == [(0, 7.0, 0), (1, 8.0, 0), (2, 9.0, 0)]
    assert samples(decoded)["can0 Page.A"] == [(0, 1.0, 0), (2, 3.0, 0)]


def test_a_short_frame_without_its_multiplexor_selects_nothing(tmp_path: Path) -> None:
    """With the multiplexor behind its end, a short frame gives the plain signals only."""
    text = """
BO_ 768 Late: 4 ECU
 SG_ Plain : 0|8@1+ (1,0) [0|0] "" ECU
 SG_ Mux M : 16|8@1+ (1,0) [0|0] "" ECU
 SG_ A m1 : 8|8@1+ (1,0) [0|0] "" ECU
"""
    decoded = Decoder("can0", table(tmp_path, text)).decode(frame_batch((768, "0102"), (768, "01020100")))
    assert samples(decoded) == {
        "can0 Late.Plain": [(0, 1.0, Quality.SHORT_FRAME), (1, 1.0, 0)],
        "can0 Late.Mux": [(1, 1.0, 0)],
        "can0 Late.A": [(1, 2.0, 0)],
    }


def test_wide_messages_become_several_groups(tmp_path: Path) -> None:
    """Forty signals of one frame are a group of 32 and one of 8, with the same stamps."""
    signals = "".join(f' SG_ S{n} : {n}|1@1+ (1,0) [0|0] "" ECU\n' for n in range(40))
    decoded = Decoder("can0", table(tmp_path, f"BO_ 1 Wide: 8 ECU\n{signals}")).decode(frame_batch((1, "ff" * 8)))
    assert sorted(len(batch.group.channels) for batch in decoded.batches) == [8, 32]
    assert len(samples(decoded)) == 40
    assert len({batch.group.id for batch in decoded.batches}) == 2


def test_the_first_database_wins(tmp_path: Path) -> None:
    """Two databases with one id: the first decodes it, and a warning names both."""
    other = 'BO_ 256 Motor: 8 ECU\n SG_ N : 0|8@1+ (1,0) [0|0] "" ECU\n'
    both = MessageTable(database(tmp_path, ENGINE) + database(tmp_path, other, name="other.dbc"))
    decoder = Decoder("can0", both)
    assert {batch.group.name for batch in decoder.decode(frame_batch((256, "00" * 8))).batches} == {"Engine"}
    assert both.warnings == ["id 0x100 is Engine in test.dbc and Motor in other.dbc: the first is used"]


def test_two_messages_of_one_pgn(tmp_path: Path) -> None:
    """A sender that no message names gets the first; each message gets its own sender; a warning says so."""
    text = "".join(
        f'BO_ {0x80000000 | identifier} {name}: 8 ECU\n SG_ S : 0|8@1+ (1,0) [0|0] "" ECU\n'
        for identifier, name in ((0x18FEF100, "A"), (0x18FEF121, "B"))
    )
    both = table(tmp_path, text, "pgn")
    decoded = Decoder("can0", both).decode(frame_batch((0x18FEF105, "00"), (0x18FEF121, "00"), (0x18FEF100, "00")))
    assert {batch.group.source: batch.group.name for batch in decoded.batches} == {
        "can0/0x05": "A", "can0/0x21": "B", "can0/0x00": "A",
    }  # fmt: skip
    assert both.warnings == [
        "PGN 65265 is A in test.dbc and B in test.dbc: the first is used, the other only for its exact id"
    ]


def test_an_unselected_multiplexor_does_not_matter(tmp_path: Path) -> None:
    """The bits of a nested multiplexor that its page does not select are other signals': they choose nothing."""
    text = """
BO_ 768 Nested: 8 ECU
 SG_ Outer M : 0|8@1+ (1,0) [0|0] "" ECU
 SG_ Inner m1M : 8|16@1+ (1,0) [0|0] "" ECU
 SG_ Deep m7 : 24|8@1+ (1,0) [0|0] "" ECU
 SG_ Other m2 : 8|16@1+ (1,0) [0|0] "" ECU
SG_MUL_VAL_ 768 Inner Outer 1-1;
SG_MUL_VAL_ 768 Deep Inner 7-7;
SG_MUL_VAL_ 768 Other Outer 2-2;
"""
    frames = frame_batch(
        *((768, f"02{number:04x}00000000") for number in range(500)), (768, "01070005"), (768, "01080005")
    )
    decoder = Decoder("can0", table(tmp_path, text))
    decoded = decoder.decode(frames)
    assert len(one_of(decoded, "Nested[Outer=2]")) == 500
    assert samples(decoded)["can0 Nested.Deep"] == [(500, 5.0, Quality.SHORT_FRAME)]
    assert decoded.counts.undecoded == 1


def test_many_multiplexors_at_once() -> None:
    """Nine multiplexors of 128 pages each: more combinations than an int64 counts, and every one is told apart."""

    def signal(name: str, start: int, multiplexor: str | None = None, page: int = 0) -> SignalDefinition:
        values = None if multiplexor is None else frozenset({page})
        return SignalDefinition(
            name, start, 8, False, False, False, 1, 0, None, None, None, None, multiplexor is None, multiplexor, values
        )

    signals = [signal(f"M{m}", 16 * m) for m in range(9)]
    signals += [signal(f"S{m}_{page}", 16 * m + 8, f"M{m}", page) for m in range(9) for page in range(128)]
    message = MessageDefinition("Many", 768, False, False, 64, tuple(signals), "many.dbc")
    decoder = Decoder("can0", MessageTable([SignalDatabase("many.dbc", "", "id", (message,), ())]))
    last = "7f2a" * 9 + "00" * 46
    mixed = "".join(f"{m:02x}2a" for m in range(9)) + "00" * 46
    decoded = decoder.decode(frame_batch((768, last), (768, mixed), (768, last), flags=Flag.FD))
    found = samples(decoded)
    assert decoded.counts.decoded == 3
    for m in range(9):
        assert [stamp for stamp, _, _ in found[f"can0 Many.S{m}_127"]] == [0, 2]
        assert [stamp for stamp, _, _ in found[f"can0 Many.S{m}_{m}"]] == [1]
    assert len(found) == 9 * 3


def test_numbers_written_otherwise_are_the_same_definition(tmp_path: Path) -> None:
    """(0.5,1) and (0.5,1.0) give the same group."""
    ids = set()
    for offset in ("1", "1.0", "1.00"):
        text = f'BO_ 2 M: 8 ECU\n SG_ S : 0|8@1+ (0.5,{offset}) [0|0] "" ECU\n'
        ids.add(Decoder("can0", table(tmp_path, text)).decode(frame_batch((2, "00" * 8))).batches[0].group.id)
    assert len(ids) == 1


def test_definitions_that_cannot_be_decoded_are_left_out(tmp_path: Path) -> None:
    """A factor beyond float64, a signal defined twice, a NUL in a unit: each is a warning, the rest decodes."""
    text = (
        'BO_ 2 M: 8 ECU\n SG_ Huge : 0|32@1+ (1e305,0) [0|0] "" ECU\n SG_ Beyond : 0|8@1+ (1e400,0) [0|0] "" ECU\n'
        ' SG_ Twice : 32|8@1+ (1,0) [0|0] "" ECU\n SG_ Twice : 40|8@1+ (1,0) [0|0] "a\0b" ECU\n'
    )
    [loaded] = database(tmp_path, text)
    said = " ".join(loaded.warnings)
    for part in (
        "M.Huge has values beyond",
        "M.Beyond has values beyond",
        "M.Twice is defined twice",
        "NUL characters",
    ):
        assert part in said
    decoded = Decoder("can0", MessageTable([loaded])).decode(frame_batch((2, "0000000001020000")))
    assert samples(decoded) == {"can0 M.Twice": [(0, 2.0, 0)]}
    assert decoded.batches[0].group.channels[0].unit == "ab"


def test_integers_beyond_float64_keep_their_decimals(tmp_path: Path) -> None:
    """A 64-bit integer with scale 3 and offset 1 is computed in whole numbers, and its text is exact."""
    text = 'BO_ 2 Big: 8 ECU\n SG_ N : 0|64@1+ (3,1) [0|0] "" ECU\n'
    batch = Decoder("can0", table(tmp_path, text)).decode(frame_batch((2, "ff" * 8), (2, "01" + "00" * 7))).batches[0]
    exact = 3 * (2**64 - 1) + 1
    assert batch.value.tolist() == [[float(exact), 4.0]]
    assert batch.text is not None
    assert batch.text.tolist() == [[str(exact), None]]


def test_the_group_id_is_the_definition(tmp_path: Path) -> None:
    """Pinned: ids are stored. The same definition in another file is the same group; another source is another."""
    one = Decoder("can0", table(tmp_path, ENGINE)).decode(frame_batch((256, "00" * 8))).batches[0].group
    two = Decoder("can0", table(tmp_path, ENGINE, name="b.dbc")).decode(frame_batch((256, "00" * 8))).batches[0].group
    other = Decoder("can1", table(tmp_path, ENGINE)).decode(frame_batch((256, "00" * 8))).batches[0].group
    assert one.id == two.id != other.id
    assert one.id == GROUP_ID_GOLDEN


GROUP_ID_GOLDEN = -5583445959942690771


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (-0.0, "-0"), (1.0, "1"), (-1.5, "-1.5"), (0.1, "0.1"), (1e15, "1e+15"),
        (123456789012345.0, "123456789012345"),
        (1e14, "100000000000000"), (0.0001, "0.0001"), (0.00001, "1e-05"), (1.25e-7, "1.25e-07"), (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"), (float("nan"), "NaN"), (float("-inf"), "-Infinity"),
        (100.0, "100"), (1234.5678, "1234.5678"), (2.5e22, "2.5e+22"),
    ],
)  # fmt: skip
def test_float8_text(value: float, text: str) -> None:
    """Numbers as PostgreSQL prints them (tests/integration asks a real one)."""
    assert float8_text(value) == text


def test_a_database_that_needs_lenience_warns(tmp_path: Path) -> None:
    """A signal behind its message's end: loads, and the warning names the file and the reason."""
    text = 'BO_ 3 Small: 1 ECU\n SG_ Far : 8|8@1+ (1,0) [0|0] "" ECU\n'
    [loaded] = database(tmp_path, text)
    assert loaded.warnings == (
        "test.dbc: loads only without strict checks: The signal Far does not fit in message Small.",
    )
    decoded = Decoder("can0", MessageTable([loaded])).decode(frame_batch((3, "00"), (3, "0005")))
    assert samples(decoded) == {"can0 Small.Far": [(1, 5.0, 0)]}


def test_a_database_that_cannot_be_parsed_is_refused(tmp_path: Path) -> None:
    """File, line and reason; exit code 2."""
    with pytest.raises(SignalDatabaseError, match=r"test\.dbc, line 9: .*BO_ >>!<<broken") as caught:
        database(tmp_path, "BO_ broken\n")
    assert caught.value.exit_code == 2


def test_what_is_not_a_database_is_refused(tmp_path: Path) -> None:
    """A missing file, a folder and an unknown extension are told apart."""
    with pytest.raises(SignalDatabaseError, match="No such file"):
        load(tmp_path / "missing.dbc")
    with pytest.raises(SignalDatabaseError, match="directory"):
        load(tmp_path)
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(UsageError, match="unknown kind"):
        load(tmp_path / "a.xlsx")
