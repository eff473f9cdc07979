"""What can happen to the files of a journal: each damage by its name, how it is made, and exactly what survives it.

`DAMAGES` is the table. Each damages a journal that `make` made: one stretch of several full segments, two sources; its
process was killed before anything was sent. Whoever opens it afterwards must get every frame that is not `lost` or
`untold`, once; `lost` is counted as dropped for `damage`, of the right source; and people are told where to look.
tests/unit/test_journal_damage.py checks that at the journal, tests/adversity/test_damaged_journal.py down to SQL.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID
from zlib import crc32

from ingestd.journal import Kind, Record, SessionInfo
from ingestd.journal.record import HEADER
from ingestd.journal.segment import ENDED_AT, HEADER_BYTES, read_segment
from tests.journals import CLOCK, SEGMENT_BYTES, frames, kill, numbers_of, open_journal

SEGMENTS = 4
FIRST, MIDDLE, LAST = "00000001.journal", "00000002.journal", "00000004.journal"
FOREIGN_SOURCE = "lidar"
PAGE = slice(5 * 4096, 6 * 4096)

Numbers = dict[str, set[int]]  # of frames, by source


@dataclass
class Outcome:
    """What a damage leaves. `untold` are frames of which nothing says that they ever were."""

    lost: Numbers = field(default_factory=dict)  # … and counted, as damage
    untold: Numbers = field(default_factory=dict)
    gained: int = 0  # frames of FOREIGN_SOURCE
    aside: int = 0  # files named damaged-…, once everything was read
    kept: Sequence[str] = ()  # files that are left as they are
    says: Sequence[str] = ()  # each in a warning at the start, or in a notice once it was read
    found: tuple[str, int] | None = None  # where `verify` names the loss


@dataclass(frozen=True)
class Placed:
    """A record and where it is."""

    path: Path
    offset: int
    record: Record

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.offset + self.record.size

    def flip(self, offset: int) -> None:
        """Change one bit of the byte at `offset` of the record."""
        flip(self.path, self.offset + offset)


def flip(path: Path, offset: int) -> None:
    """Change one bit of a byte."""
    change(path, offset, bytes([path.read_bytes()[offset] ^ 0x10]))


def change(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def write_version(path: Path, version: int) -> None:
    """Make a segment one of another version, all checksums being right."""
    data = bytearray(path.read_bytes())
    for each in placed(path):
        payload = bytes(each.record.payload).replace(b'"version":2', b'"version":%d' % version)
        record = replace(each.record, payload=memoryview(payload))
        data[each.offset : each.end] = record.pack(seed=2 if version > 1 else 0)
    data[12:14] = version.to_bytes(2, "little")
    data[8:12] = crc32(data[12:ENDED_AT]).to_bytes(4, "little")
    path.write_bytes(data)


def make(folder: Path, **options: Any) -> int:
    """Two sources, several segments; the process is killed. Returns the number of frames of each source."""
    journal, number = open_journal(folder, **options), 0
    while len(list(folder.glob("*.journal"))) < SEGMENTS or journal._log.segment.room > SEGMENT_BYTES // 2:  # type: ignore[union-attr]
        journal.append_frames(frames(number, 20), CLOCK)
        journal.append_frames(frames(number, 20, "gps", length=33), CLOCK)
        number += 20
    kill(journal)
    return number


def placed(path: Path) -> list[Placed]:
    """The records of an undamaged segment."""
    found, offset = [], HEADER_BYTES
    for item in read_segment(path):
        assert isinstance(item, Record)
        found.append(Placed(path, offset, item))
        offset += item.size
    return found


def in_middle(folder: Path) -> Placed:
    """A record of can0 in the middle of a segment in the middle."""
    of_can0 = [each for each in placed(folder / MIDDLE) if each.record.source == "can0"]
    return of_can0[len(of_can0) // 2]


def held(*paths: Path) -> Numbers:
    """The frames in segments."""
    return numbers([each.record for path in paths for each in placed(path)])


def numbers(records: list[Record]) -> Numbers:
    """Their frames."""
    return {source: set(numbers_of(records, source)) for source in ("can0", "gps")}


def _at(target: Placed, **more: Any) -> Outcome:
    """One record is lost, and its bytes are kept aside."""
    where = (target.path.name, target.offset)
    says = [f"damaged: {where[0]} at {where[1]}: {target.record.size} bytes"]
    return Outcome(numbers([target.record]), aside=1, says=says, found=where, **more)


def _flipped(folder: Path, offset: int) -> Outcome:
    (target := in_middle(folder)).flip(offset)
    return _at(target)


def torn_last_record(folder: Path) -> Outcome:
    """A power cut in the middle of the last write: that record was never there. No damage."""
    last = placed(folder / LAST)[-1]
    change(last.path, last.offset + last.record.size // 2, bytes(last.record.size))
    return Outcome(untold=numbers([last.record]))


def torn_first_write_of_a_segment(folder: Path) -> Outcome:
    """A power cut in the middle of a segment's header: nothing was in it."""
    (folder / "00000005.journal").write_bytes((folder / LAST).read_bytes()[:50].ljust(SEGMENT_BYTES, b"\0"))
    return Outcome(kept=["00000005.journal"], says=["the header of 00000005.journal is damaged"])


def truncated_segment(folder: Path) -> Outcome:
    """What was behind the cut is lost."""
    cut = next(each for each in placed(folder / MIDDLE) if each.end > SEGMENT_BYTES // 2)
    hit = [each.record for each in placed(folder / MIDDLE) if each.end > SEGMENT_BYTES // 2]
    os.truncate(folder / MIDDLE, SEGMENT_BYTES // 2)
    return Outcome(numbers(hit), aside=1, says=[f"damaged: {MIDDLE} at {cut.offset}"], found=(MIDDLE, cut.offset))


def zeroed_page(folder: Path) -> Outcome:
    """As a file system leaves a page that it lost: the records that it touches are lost."""
    return _overwritten(folder, bytes(4096))


def overwritten_with_records(folder: Path) -> Outcome:
    """A stale page of the same file: good records in the wrong place are not taken for new ones."""
    return _overwritten(folder, (folder / MIDDLE).read_bytes()[4096 : 2 * 4096], aside=2)


def overwritten_with_another_segment(folder: Path) -> Outcome:
    """A stale page of a file that was deleted, which a disk gives back that lost a write: none of it is taken."""
    return _overwritten(folder, (folder / "00000003.journal").read_bytes()[PAGE])


def overwritten_with_another_journal(folder: Path) -> Outcome:
    """The same, of an earlier journal, from a segment with the same number."""
    other = folder.parent / "earlier"
    make(other, session=SessionInfo(UUID(int=7), {}))
    return _overwritten(folder, (other / MIDDLE).read_bytes()[8 * 4096 : 9 * 4096])


def _overwritten(folder: Path, data: bytes, aside: int = 1) -> Outcome:
    hit = [each for each in placed(folder / MIDDLE) if each.offset < PAGE.stop and each.end > PAGE.start]
    change(folder / MIDDLE, PAGE.start, data)
    assert len(hit) > 2
    lost, where = numbers([each.record for each in hit]), (MIDDLE, hit[0].offset)
    return Outcome(lost, aside=aside, says=[f"damaged: {MIDDLE} at {where[1]}"], found=where)


def all_zero_segment(folder: Path) -> Outcome:
    """It looks like one that was allocated and never used, and is removed as such."""
    lost = held(folder / MIDDLE)
    (folder / MIDDLE).write_bytes(bytes(SEGMENT_BYTES))
    return Outcome(lost, says=["reason=damage"], found=("00000003.journal", 0))


def empty_segment(folder: Path) -> Outcome:
    """The same, without its bytes."""
    lost = held(folder / MIDDLE)
    os.truncate(folder / MIDDLE, 0)
    return Outcome(lost, says=["reason=damage"], found=("00000003.journal", 0))


def flipped_byte_in_header(folder: Path) -> Outcome:
    """Of a segment: the STATE behind it says everything that it said."""
    flip(folder / MIDDLE, 30)
    return Outcome(found=(MIDDLE, 0))


def flipped_byte_in_version(folder: Path) -> Outcome:
    """Of a segment: its checksum says that this is no other version."""
    flip(folder / MIDDLE, 12)
    return Outcome(found=(MIDDLE, 0))


def zeroed_header(folder: Path) -> Outcome:
    """Of a segment: the STATE behind it says everything that it said."""
    change(folder / MIDDLE, 0, bytes(HEADER_BYTES))
    return Outcome(found=(MIDDLE, 0))


def destroyed_first_page(folder: Path) -> Outcome:
    """Without header and STATE nobody knows whose records these are: the file is left alone."""
    lost = held(folder / MIDDLE)
    change(folder / MIDDLE, 0, b"\xff" * 4096)
    return Outcome(lost, kept=[MIDDLE], says=[f"the header of {MIDDLE} is damaged"], found=(MIDDLE, 0))


def flipped_byte_in_magic(folder: Path) -> Outcome:
    """Of a record: it is lost."""
    return _flipped(folder, 0)


def flipped_byte_in_checksum(folder: Path) -> Outcome:
    """Of a record: it is lost."""
    return _flipped(folder, 5)


def flipped_byte_in_length(folder: Path) -> Outcome:
    """Of a record, which now seems to go on for a megabyte: it is lost, and not what follows."""
    return _flipped(folder, 10)


def flipped_byte_in_kind(folder: Path) -> Outcome:
    """Of a record: it is lost."""
    return _flipped(folder, 13)


def flipped_byte_in_sequence(folder: Path) -> Outcome:
    """Of a record: it is lost, and the ones behind it are not taken for old ones."""
    return _flipped(folder, 20)


def flipped_byte_in_frames_before(folder: Path) -> Outcome:
    """Of a record: it is lost, and nothing is counted that was not."""
    return _flipped(folder, HEADER.size - 3)


def flipped_byte_in_name(folder: Path) -> Outcome:
    """Of a record: it is lost, and no other source is made."""
    return _flipped(folder, HEADER.size)


def flipped_byte_in_payload(folder: Path) -> Outcome:
    """Of a record: it is lost."""
    return _flipped(folder, in_middle(folder).record.size - 1)


def missing_segment_in_the_middle(folder: Path) -> Outcome:
    """What was in it is lost."""
    lost = held(folder / MIDDLE)
    (folder / MIDDLE).unlink()
    return Outcome(lost, says=["reason=damage"], found=("00000003.journal", 0))


def missing_first_segments(folder: Path) -> Outcome:
    """What was in them is lost."""
    lost = held(folder / FIRST, folder / MIDDLE)
    for name in (FIRST, MIDDLE):
        (folder / name).unlink()
    return Outcome(lost, says=["reason=damage"], found=("00000003.journal", 0))


def missing_last_segment(folder: Path) -> Outcome:
    """Nothing behind it tells of it: as if it had never been."""
    untold = held(folder / LAST)
    (folder / LAST).unlink()
    return Outcome(untold=untold)


def missing_last_segment_that_a_later_run_knew(folder: Path) -> Outcome:
    """The next run has written down what there was: it is lost, and counted."""
    kill(open_journal(folder))
    lost = held(folder / LAST)
    (folder / LAST).unlink()
    return Outcome(
        lost, says=["reason=damage"], found=("00000003.journal", placed(folder / "00000003.journal")[-1].end)
    )


def duplicated_segment(folder: Path) -> Outcome:
    """A copy under another number is not sent a second time."""
    shutil.copy(folder / MIDDLE, folder / "00000099.journal")
    return Outcome(kept=["00000099.journal"], says=["00000099.journal is a copy of segment 2"])


def renamed_segment(folder: Path) -> Outcome:
    """A number that is not its own: left alone, and missing where it belongs. Nobody has damaged it."""
    lost = held(folder / MIDDLE)
    (folder / MIDDLE).rename(folder / "00000099.journal")
    says = ["00000099.journal is a copy of segment 2 (it is left alone; give it that name"]
    return Outcome(lost, kept=["00000099.journal"], says=says, found=("00000003.journal", 0))


def foreign_segment(folder: Path) -> Outcome:
    """A segment of another journal under a number of ours, and files that are none at all: all are left alone."""
    _another_journal(folder.parent / "other", 0)
    shutil.copy(folder.parent / "other" / FIRST, folder / "00000050.journal")
    (folder / "notes.txt").write_text("do not touch")
    (folder / "00000052.journal").write_text("not one of ours")
    says = [
        "50.journal is a copy of segment 1",
        "notes.txt is not the journal's",
        "header of 00000052.journal is damaged",
    ]
    return Outcome(kept=["00000050.journal", "notes.txt", "00000052.journal"], says=says)


def segment_of_another_machine(folder: Path) -> Outcome:
    """Under its own number it is a stretch of that machine: sent as such, and counted from then on."""
    _another_journal(folder.parent / "other", 49)
    shutil.copy(folder.parent / "other" / "00000050.journal", folder / "00000050.journal")
    return Outcome(gained=100)


def _another_journal(folder: Path, numbers_used: int) -> None:
    folder.mkdir()
    if numbers_used:
        (folder / f"{numbers_used:08d}.journal").touch()
    other = open_journal(folder, machine_id="machine-2")
    other.append_frames(frames(0, 100, FOREIGN_SOURCE), CLOCK)
    kill(other)


def segment_in_place_of_another(folder: Path) -> Outcome:
    """Another machine's segment was renamed over ours: what was in ours is lost, and nothing else is sent for it."""
    lost = held(folder / MIDDLE)
    _another_journal(folder.parent / "other", 0)
    (folder.parent / "other" / FIRST).rename(folder / MIDDLE)
    return Outcome(lost, kept=[MIDDLE], says=[f"{MIDDLE} is a copy of segment 1"], found=("00000003.journal", 0))


def older_format(folder: Path) -> Outcome:
    """Of version 1, whose checksums did not know their segment: it is read as it always was."""
    write_version(folder / MIDDLE, 1)
    return Outcome()


def older_format_without_its_header(folder: Path) -> Outcome:
    """The same: the STATE behind it says what it said."""
    write_version(folder / MIDDLE, 1)
    return zeroed_header(folder)


def newer_format(folder: Path) -> Outcome:
    """Left to a newer ingestd, and said to be one."""
    lost = held(folder / MIDDLE)
    write_version(folder / MIDDLE, 3)
    says = [f"{MIDDLE} has format version 3, this ingestd knows 1, 2"]
    return Outcome(lost, kept=[MIDDLE], says=says, found=("00000003.journal", 0))


def folder_in_place_of_a_segment(folder: Path) -> Outcome:
    """What was in the segment is lost; the folder is left alone."""
    lost = held(folder / MIDDLE)
    (folder / MIDDLE).unlink()
    (folder / MIDDLE).mkdir()
    says = [f"{MIDDLE} is not the journal's"]
    return Outcome(lost, kept=[MIDDLE], says=says, found=("00000003.journal", 0))


def pipe_in_place_of_a_segment(folder: Path) -> Outcome:
    """Nobody waits for somebody who writes into it."""
    os.mkfifo(folder / "00000005.journal")
    return Outcome(kept=["00000005.journal"], says=["00000005.journal is not the journal's"])


def link_to_a_segment(folder: Path) -> Outcome:
    """Somebody has moved a segment to another disk and linked it: it is read there."""
    (folder / MIDDLE).rename(folder.parent / "moved")
    (folder / MIDDLE).symlink_to(folder.parent / "moved")
    return Outcome()


def link_to_nothing(folder: Path) -> Outcome:
    """The disk with the segment is not there."""
    lost = held(folder / MIDDLE)
    (folder / MIDDLE).unlink()
    (folder / MIDDLE).symlink_to(folder.parent / "not there")
    says = [f"{MIDDLE} is not the journal's"]
    return Outcome(lost, kept=[MIDDLE], says=says, found=("00000003.journal", 0))


def flipped_byte_in_the_newest_state(folder: Path) -> Outcome:
    """The one before it, and what followed, says the same."""
    state = next(each for each in placed(folder / LAST) if each.record.kind is Kind.STATE)
    state.flip(HEADER.size + 5)
    return Outcome(aside=1, says=[f"damaged: {LAST} at {state.offset}"], found=(LAST, state.offset))


def flipped_byte_in_every_state(folder: Path) -> Outcome:
    """Then all of the records say it."""
    states = [
        each for path in sorted(folder.glob("*.journal")) for each in placed(path) if each.record.kind is Kind.STATE
    ]
    for state in states:
        state.flip(HEADER.size + 5)
    return Outcome(aside=len(states), says=[f"damaged: {FIRST} at {states[0].offset}"], found=(FIRST, states[0].offset))


def several_at_once(folder: Path) -> Outcome:
    """None of them hides another: each costs what it costs."""
    third, (last_but_one, last) = folder / "00000003.journal", placed(folder / LAST)[-2:]
    hit = placed(third)[10]
    lost = numbers([*(each.record for each in placed(folder / MIDDLE)), hit.record])
    hit.flip(HEADER.size + 30)
    (folder / MIDDLE).unlink()
    flip(folder / FIRST, 20)
    shutil.copy(folder / LAST, folder / "00000077.journal")
    change(last_but_one.path, last.offset + 10, bytes(last.record.size))
    says = ["copy of segment 4", f"damaged: 00000003.journal at {hit.offset}", "reason=damage"]
    untold = numbers([last.record])
    return Outcome(lost, untold, aside=1, kept=["00000077.journal"], says=says, found=("00000003.journal", 0))


DAMAGES: tuple[Callable[[Path], Outcome], ...] = (
    torn_last_record, torn_first_write_of_a_segment, truncated_segment, zeroed_page, overwritten_with_records,
    overwritten_with_another_segment, overwritten_with_another_journal,
    all_zero_segment, empty_segment, flipped_byte_in_header, flipped_byte_in_version, zeroed_header,
    destroyed_first_page, flipped_byte_in_magic, flipped_byte_in_checksum, flipped_byte_in_length,
    flipped_byte_in_kind, flipped_byte_in_sequence, flipped_byte_in_frames_before, flipped_byte_in_name,
    flipped_byte_in_payload, missing_segment_in_the_middle, missing_first_segments, missing_last_segment,
    missing_last_segment_that_a_later_run_knew, duplicated_segment, renamed_segment, foreign_segment,
    segment_of_another_machine, segment_in_place_of_another, older_format, older_format_without_its_header,
    newer_format, folder_in_place_of_a_segment, pipe_in_place_of_a_segment, link_to_a_segment, link_to_nothing,
    flipped_byte_in_the_newest_state, flipped_byte_in_every_state, several_at_once,
)  # fmt: skip
