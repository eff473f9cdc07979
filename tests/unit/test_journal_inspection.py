"""Looking at a journal from outside, verifying all of it, and reading it by its description alone."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingestd.errors import IngestdError, UsageError
from ingestd.journal import Journal, Kind, Record, inspection, verification
from ingestd.journal.inspection import look, recorded, rejected, settled_items
from ingestd.journal.segment import HEADER_BYTES, Damage, list_folder, read_segment
from ingestd.journal.verification import Finding, verify
from ingestd.model import Event, FrameBatch
from tests.journals import CLOCK, frames, kill, numbers_of, open_journal, read_all, send_all

FORMAT = Path(__file__).parents[2] / "docs" / "journal-format.md"
BATCHES, BATCH_FRAMES = 120, 100


def fill(journal: Journal, batches: int = BATCHES, first: int = 0) -> None:
    """Four segments or so: two sources, one of them slower, and an event now and then."""
    for number in range(first, first + batches):
        journal.append_frames(frames(number * BATCH_FRAMES, BATCH_FRAMES), CLOCK)
        if number % 3 == 0:
            journal.append_frames(frames(number * 10, 10, "can1"), CLOCK)
            journal.append_event(Event("can1", "marker", number), CLOCK)
        journal.sync()


def segments(folder: Path) -> list[Path]:
    return [name.path for name in list_folder(folder)[0] if name.number and not name.rejected]


def places(path: Path, kind: Kind = Kind.FRAMES) -> list[tuple[int, Record]]:
    """Where the records of a kind are."""
    found, offset = [], HEADER_BYTES
    for item in read_segment(path):
        assert isinstance(item, Record)
        if item.kind is kind:
            found.append((offset, item))
        offset += item.size
    return found


def overwrite(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def lost(findings: list[Finding]) -> Counter[str]:
    return sum((finding.frames_lost for finding in findings), Counter())


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A journal of one stretch, ended cleanly."""
    journal = open_journal(tmp_path)
    fill(journal)
    journal.close(ended=True)
    return tmp_path


def test_looking_beside_the_holder_changes_nothing(tmp_path: Path) -> None:
    """A journal that is held is seen with its holder, its stretches and its books, and no file is touched."""
    journal = open_journal(tmp_path)
    fill(journal)
    journal.append_event(Event("can0", "gap", 5), CLOCK, lost={"overflow": 7})
    send_all(journal)
    journal.begin_stretch()
    journal.append_frames(frames(0, 5), CLOCK)
    before = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    sight = look(tmp_path)
    verify(tmp_path)
    assert {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    assert sight.holder is not None
    assert sight.holder.startswith("pid ")
    assert sight.books == journal.books()
    assert sight.books["can0"].dropped == {"overflow": 7}
    first, second = sight.stretches
    assert (first.is_newest, second.is_newest) == (False, True)
    assert (first.session_name, first.begun_ns) == ("shakedown", CLOCK.utc_offset_ns)
    assert (first.frames, first.pending) == ({"can0": 12000, "can1": 400}, {"can0": 0, "can1": 0})
    assert (second.frames, second.pending) == ({"can0": 5}, {"can0": 5})
    assert (first.acknowledged, second.acknowledged) == (first.records, 0)
    assert sight.bytes == sum(path.stat().st_size for path in segments(tmp_path)) == journal.bytes_used
    journal.close(ended=True)
    assert look(tmp_path).holder is None


def test_looking_reads_little(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many segments a stretch has, the newest and the beginning of the first are read."""
    read: list[str] = []
    original = read_segment

    def watched(path: Path, *more: int | None, **named: int | None) -> object:
        read.append(path.name)
        return original(path, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(inspection, "read_segment", watched)
    monkeypatch.setattr("ingestd.journal.recovery.read_segment", watched)
    look(ended)
    assert len(segments(ended)) == 4
    assert set(read) == {"00000001.journal", "00000004.journal"}


@pytest.mark.parametrize("how", ["not there", "file", "foreign"])
def test_what_is_no_journal_is_a_mistake(tmp_path: Path, how: str) -> None:
    """A folder that is not there, a file, and a folder of other things are named, with what to do."""
    folder = tmp_path / "journal"
    if how == "file":
        folder.write_text("x")
    elif how == "foreign":
        folder.mkdir()
        (folder / "notes.txt").write_text("x")
    for command in (look, verify):
        with pytest.raises(UsageError, match=re.escape(str(folder))) as refused:
            command(folder)
        assert "-c" in refused.value.hint


def test_an_empty_folder_is_an_empty_journal(tmp_path: Path) -> None:
    """Before the first start there is nothing, and nothing is wrong."""
    sight = look(tmp_path)
    assert (sight.stretches, sight.books, sight.segments) == ([], {}, 0)
    assert verify(tmp_path).findings == []
    assert list(recorded(tmp_path, "", pytest.fail)) == []


def test_a_folder_that_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's journal is an error in words."""

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inspection, "list_folder", refuse)
    with pytest.raises(IngestdError, match="Permission denied") as refused:
        look(tmp_path)
    assert refused.value.exit_code == 1


@pytest.mark.parametrize("how", ["live", "killed", "torn", "ended"])
def test_a_whole_journal_verifies(tmp_path: Path, how: str) -> None:
    """Allocated space, a process that was killed and a record that was not written whole are no damage."""
    journal = open_journal(tmp_path)
    fill(journal)
    journal.begin_stretch()
    fill(journal, 2)
    if how != "live":
        journal.close(ended=True) if how == "ended" else kill(journal)
    if how == "torn":
        path = next(path for path in reversed(segments(tmp_path)) if path.read_bytes().strip(b"\0"))
        offset, record = places(path)[-1]
        overwrite(path, offset + record.size - 100, bytes(path.stat().st_size - offset - record.size + 100))
    found = verify(tmp_path)
    assert (found.findings, found.warnings) == ([], [])
    assert found.frames == {"can0": 12200 - 100 * (how == "torn"), "can1": 410}
    assert (found.torn_bytes > 0) == (how == "torn")
    assert found.bytes == sum(name.bytes for name in list_folder(tmp_path)[0])
    if how == "live":
        journal.close(ended=True)


def test_damage_is_named_with_what_it_cost(ended: Path) -> None:
    """A flipped byte costs the frames of its record: file, offset, bytes and frames are right."""
    path = segments(ended)[1]
    offset, record = places(path)[3]
    overwrite(path, offset + 90, b"\x5a\xa5")
    (finding,) = verify(ended).findings
    assert (finding.file, finding.offset, finding.bytes) == (path.name, offset, record.size)
    assert (finding.records_lost, finding.frames_lost) == (1, {record.source: record.frames_count})
    assert str(finding).startswith(f"{path.name} at {offset}: {record.size:,} bytes are no record; lost: 1 record, ")


def test_damage_at_the_end_of_what_ended_cleanly_is_damage(ended: Path) -> None:
    """The mark of a clean end says how many records there were; without the mark it would be a torn end."""
    path = segments(ended)[-1]
    offset, record = places(path)[-1]
    overwrite(path, offset, b"\0" * record.size)
    finding = verify(ended).findings[0]
    assert finding.file == path.name
    assert finding.records_lost >= 1


def test_a_damaged_header_is_named_and_what_a_state_repeats_is_used(ended: Path) -> None:
    """A header costs nothing while the STATE behind it is whole, and else the frames of its segment."""
    path = segments(ended)[1]
    overwrite(path, 20, b"\xff\xff")
    whole = verify(ended)
    assert [(each.file, each.offset, each.frames_lost) for each in whole.findings] == [(path.name, 0, {})]
    held = Counter[str]()
    for _, record in places(path):
        held[record.source] += record.frames_count
    overwrite(path, HEADER_BYTES + 10, b"\xff\xff")
    useless = verify(ended)
    assert useless.findings[0].frames_lost == held
    assert whole.frames == useless.frames + held


def test_a_missing_segment_is_damage_unless_it_was_removed(ended: Path) -> None:
    """Somebody deleted a file: its frames are missed. What the journal deleted itself is not."""
    path = segments(ended)[1]
    held = sum(record.frames_count for _, record in places(path) if record.source == "can0")
    path.unlink()
    (finding,) = verify(ended).findings
    assert finding.frames_lost["can0"] == held
    assert "segment before it missing" in finding.what


@pytest.mark.parametrize("sent", [True, False])
def test_segments_that_made_room_are_no_damage(tmp_path: Path, sent: bool) -> None:
    """A journal that dropped its oldest segments, sent or not, is whole."""
    journal = open_journal(tmp_path, segments_max=5)
    for part in range(4):
        fill(journal, 40, part * 40)
        if sent:
            send_all(journal)
    kill(journal)
    assert segments(tmp_path)[0].name != "00000001.journal"
    assert bool(look(tmp_path).books["can0"].dropped) != sent
    assert verify(tmp_path).findings == []


def test_a_stretch_without_any_segment_is_missed(tmp_path: Path) -> None:
    """If all files of a stretch are gone, the newest STATE still knows what it held."""
    journal = open_journal(tmp_path)
    fill(journal, 4)
    journal.begin_stretch()
    journal.append_frames(frames(0, 5), CLOCK)
    journal.close(ended=True)
    segments(tmp_path)[0].unlink()
    (finding,) = verify(tmp_path).findings
    assert finding.frames_lost == {"can0": 400, "can1": 20}


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_damaged_the_frames_add_up(ended: Path, seed: int) -> None:
    """Frames that can be read and frames that are reported lost are all there were, for random damage.

    In the last segment damage can take what nothing behind it knows; then they are no fewer than the books say.
    """
    chance = random.Random(seed)
    last_too = bool(seed % 3)
    for path in segments(ended) if last_too else segments(ended)[:-1]:
        data = bytearray(path.read_bytes())
        for _ in range(chance.randrange(4)):
            at, size = chance.randrange(len(data)), chance.choice((1, 8, 600, 9000))
            data[at : at + size] = chance.randbytes(len(data[at : at + size]))
        path.write_bytes(data)
    if chance.random() < 0.3:
        chance.choice(segments(ended)[:2]).unlink()
    open_journal(ended, segments_max=100).close(ended=True)
    found, books = verify(ended), look(ended).books
    counted = found.frames + lost(found.findings)
    for source, total in {"can0": BATCHES * BATCH_FRAMES, "can1": BATCHES // 3 * 10}.items():
        assert (books[source].received if last_too else total) <= counted[source] <= total
    readable = Counter[str]()
    for record in recorded(ended, "", lambda _: None):
        readable[record.source] += record.frames_count
    assert +readable == +found.frames


def test_what_is_recorded_comes_out_once_and_in_order(tmp_path: Path) -> None:
    """Every frame of every stretch, sent or not; `stretch` selects one by the beginning of its id."""
    journal = open_journal(tmp_path)
    fill(journal, 4)
    first = journal.stretches()[0].id
    send_all(journal)
    journal.begin_stretch()
    fill(journal, 4, 4)
    kill(journal)
    records = list(recorded(tmp_path, "", pytest.fail))
    assert numbers_of(records) == list(range(800))
    assert numbers_of(list(recorded(tmp_path, first[:12].upper(), pytest.fail))) == list(range(400))
    with pytest.raises(UsageError, match="there is no stretch xyz"):
        list(recorded(tmp_path, "xyz", pytest.fail))


def test_rejected_records_come_out_with_their_reason(tmp_path: Path) -> None:
    """What PostgreSQL refused is there with the reason, and not twice with what is recorded."""
    journal = open_journal(tmp_path)
    fill(journal, 2)
    stretch = journal.stretches()[0].id
    records = [record for record in read_all(journal, stretch)[0] if record.kind is Kind.FRAMES]
    journal.reject(records[1], "22P05: no such character")
    journal.close(ended=True)
    ((record, reason),) = rejected(tmp_path, stretch[:8], pytest.fail)
    assert (record.pack(), record.stretch_id, reason) == (records[1].pack(), stretch, "22P05: no such character")
    assert len([each for each in recorded(tmp_path, "", pytest.fail) if each.kind is Kind.FRAMES]) == 3
    assert verify(tmp_path).rejected_frames == {"can1": 10}
    with pytest.raises(UsageError, match="no stretch ffff"):
        list(rejected(tmp_path, "ffffffffffff", pytest.fail))


def test_a_write_under_way_is_not_taken_for_damage(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage that a second reading does not find was a page read before it was written."""
    path, readings = segments(ended)[0], iter([True, False])
    original = read_segment

    def late(path: Path, **more: Any) -> object:
        hole = Damage(path, HEADER_BYTES, b"\0\0", False)
        return iter([*([hole] if next(readings, False) else []), *original(path, **more)])

    monkeypatch.setattr(inspection, "read_segment", late)
    assert not any(isinstance(item, Damage) for item in settled_items(path))


def test_a_segment_removed_meanwhile_is_not_missed(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder may delete what was sent while all is being read."""
    original = settled_items

    def removing(path: Path) -> list[Record | Damage]:
        segments(ended)[0].unlink(missing_ok=True)
        return original(path)

    monkeypatch.setattr(verification, "settled_items", removing)
    assert verify(ended).findings == []


def test_a_segment_begun_meanwhile_is_for_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the holder writes behind a segment that was read already, and into the next, is not missed in between."""
    journal = open_journal(tmp_path)
    fill(journal, 10)
    newest, allocated = segments(tmp_path)
    original = settled_items

    def writing(path: Path) -> list[Record | Damage]:
        items = original(path)
        if path == newest:
            fill(journal, 60, 10)
        return items

    monkeypatch.setattr(verification, "settled_items", writing)
    found = verify(tmp_path)
    assert allocated.read_bytes().strip(b"\0")
    assert (found.findings, found.frames) == ([], {"can0": 1000, "can1": 40})
    journal.close(ended=True)


def serial_line(text: bytes) -> FrameBatch:
    return replace(
        frames(0, 1, "gps", len(text)),
        flags=np.array([128 | 1], np.uint8),
        arbitration_id=np.zeros(1, np.uint32),
        data=np.frombuffer(text.ljust(-(-len(text) // 8) * 8, b"\0"), np.uint8)[None],
    )


def test_the_described_reader_reads_a_real_journal(tmp_path: Path) -> None:
    """The reader printed in docs/journal-format.md finds the same frames, in a journal that is damaged, too."""
    folder = tmp_path / "journal"
    journal = open_journal(folder)
    fill(journal)
    journal.append_frames(serial_line(b"$GPRMC,1*00"), CLOCK)
    journal.begin_stretch()
    fill(journal, 2)
    kill(journal)
    path = segments(folder)[1]
    overwrite(path, places(path)[3][0] + 50, b"\x11")
    (program,) = re.findall(r"```python\n(.*?)```", FORMAT.read_text("utf-8"), re.DOTALL)
    assert len(program.splitlines()) <= 45
    script = tmp_path / "reader.py"
    script.write_text(program, "utf-8")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=True, timeout=60)
    expected = []
    damages: list[str] = []
    for record in recorded(folder, "", damages.append):
        if record.kind is Kind.FRAMES:
            batch = record.frames()
            columns = zip(batch.ts_ns, batch.arbitration_id, batch.flags, batch.length, batch.data, strict=True)
            for ts_ns, number, flags, length, data in columns:
                utc_ns, payload = ts_ns + CLOCK.utc_offset_ns, data[:length].tobytes().hex()
                expected.append(f"{utc_ns} {record.source} {number:x} {flags} {payload}")
    assert len(expected) == verify(folder).frames.total()
    assert len(damages) == 1
    assert done.stdout.splitlines() == expected
