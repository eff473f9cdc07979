"""The files of a journal that is held: which there are, how large, and what is done to them.

Not thread-safe by itself: the journal calls it under its lock, except where a method says otherwise.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from ingestd.journal.record import HEADER, Kind, Origin, Record, encode_json, pack
from ingestd.journal.recovery import Segment
from ingestd.journal.segment import (
    HEADER_BYTES,
    NO_STRETCH,
    Damage,
    SegmentHeader,
    allocate,
    is_another,
    is_in_place,
    list_folder,
    pack_ended,
    segment_name,
    sync_folder,
    write_at,
)

ASIDE_BYTES_MAX = 16 << 20  # of damage kept for an operator to look at, and …
PIECE_ASIDE_BYTES_MAX = 1 << 20  # … of one place


class OpenSegment:
    """The segment being written."""

    def __init__(self, descriptor: int, segment: Segment, *, is_reserve: bool = False) -> None:
        self.segment = segment
        self.is_reserve = is_reserve  # taken from what bookkeeping has to itself
        self.end = 0
        self.is_dirty = True
        self.is_suspect = False  # A sync has failed: a later one that succeeds says nothing of what came before.
        self._descriptor = descriptor

    @property
    def room(self) -> int:
        """Bytes that still fit."""
        return self.segment.bytes - self.end

    def append(self, data: bytes) -> None:
        """Write behind what is there. Raises OSError; then nothing counts as written."""
        write_at(self._descriptor, data, self.end)
        self.end += len(data)
        self.segment.end = self.end
        self.is_dirty = True

    def mark_ended(self, sequence_last: int) -> None:
        """Note in the header that writing ended cleanly. Raises OSError."""
        os.fdatasync(self._descriptor)  # The mark must not be there without what it vouches for.
        write_at(self._descriptor, pack_ended(sequence_last), HEADER_BYTES - len(pack_ended(0)))
        self.is_dirty = True

    def sync(self) -> None:
        """Make what was written durable; any thread. Raises OSError, also if the file was deleted, replaced or cut."""
        try:
            os.fdatasync(self._descriptor)
        except OSError:
            self.is_suspect = True
            raise
        if not is_in_place(self._descriptor, self.segment.path):
            raise FileNotFoundError(f"{self.segment.path} was deleted or replaced")
        if os.fstat(self._descriptor).st_size < self.segment.bytes:  # Without its beginning nobody can read the rest.
            raise FileNotFoundError(f"{self.segment.path} was cut")

    def trim(self) -> None:
        """Give back what was allocated and not used; any thread, once nobody appends any more. Raises OSError."""
        os.ftruncate(self._descriptor, self.end)
        self.segment.bytes = self.end

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class Shelf:
    """What lies in the folder."""

    def __init__(self, folder: Path, segment_bytes: int, bytes_max: int) -> None:
        self.folder = folder
        self.segment_bytes = segment_bytes
        self.bytes_max = bytes_max
        self.segments: dict[int, Segment] = {}  # of known stretches, by number
        self.by_stretch: dict[str, list[Segment]] = {}
        self.damaged_bytes = 0
        self._others: dict[Path, int] = {}  # not (yet) known, unreadable, rejected, kept aside: their sizes
        self._rejected: OpenSegment | None = None
        self._rejected_known: set[tuple[str, int]] = set()
        self._damage_known: set[tuple[str, int]] = set()
        self.number_last = 0
        names, _ = list_folder(folder)
        for name in names:
            self._others[name.path] = name.bytes
            self.number_last = max(self.number_last, name.number)

    @property
    def bytes_used(self) -> int:
        """Of all files."""
        return sum(segment.bytes for segment in self.segments.values()) + sum(self._others.values())

    def add(self, segment: Segment) -> None:
        """A segment is known, and whose it is."""
        self._others.pop(segment.path, None)
        self.segments[segment.number] = segment
        of_stretch = self.by_stretch.setdefault(segment.header.stretch_id, [])
        of_stretch.append(segment)
        of_stretch.sort(key=lambda each: each.number)

    def next_number(self) -> int:
        """A number that no file has had."""
        self.number_last += 1
        return self.number_last

    def allocate(self, number: int) -> int:
        """The descriptor of a new, empty segment; any thread. It counts once `note_allocated` was called."""
        path = self.folder / segment_name(number)
        try:
            return allocate(path, self.segment_bytes)
        except FileNotFoundError:
            self.folder.mkdir(exist_ok=True)  # Somebody has deleted it. What is mounted above it is not ours to make.
            return allocate(path, self.segment_bytes)

    def note_allocated(self, number: int) -> None:
        """The segment is there, and takes its bytes."""
        self._others[self.folder / segment_name(number)] = self.segment_bytes

    def use(self, descriptor: int, header: SegmentHeader, *, is_reserve: bool) -> OpenSegment:
        """Begin an allocated segment. Raises OSError; then it is gone, or a faulty disk would fill with them."""
        segment = Segment(self.folder / segment_name(header.number), header, self.segment_bytes, 0)
        opened = OpenSegment(descriptor, segment, is_reserve=is_reserve)
        try:
            opened.append(header.pack())
        except OSError:
            opened.close()
            with suppress(OSError):
                self.delete_other(segment.path)
            raise
        self.add(segment)
        return opened

    def delete(self, segment: Segment) -> None:
        """Delete a segment that nobody needs. Raises OSError."""
        self.unlink(segment)
        self.set_aside(segment)
        self.forget(segment)

    def set_aside(self, segment: Segment) -> None:
        """A segment is about to be deleted: nobody is to read it any more, but it still takes its bytes."""
        del self.segments[segment.number]
        of_stretch = self.by_stretch[segment.header.stretch_id]
        of_stretch.remove(segment)
        if not of_stretch:
            del self.by_stretch[segment.header.stretch_id]
        self._others[segment.path] = segment.bytes

    def unlink(self, segment: Segment) -> None:
        """Remove a segment's file, if it is there and still is the segment; any thread. Raises OSError."""
        try:
            with segment.path.open("rb") as file:
                if is_another(file.read(HEADER_BYTES), segment.header):
                    return  # Somebody has put it there, and it may have frames that nothing else has.
        except (FileNotFoundError, IsADirectoryError):
            return
        except OSError as error:
            if error.errno != errno.EIO:  # A disk that cannot read it can give its room back all the same.
                raise
        segment.path.unlink(missing_ok=True)

    def forget(self, segment: Segment) -> None:
        """A segment that was set aside is deleted: its bytes are free."""
        del self._others[segment.path]

    def delete_other(self, path: Path) -> None:
        """Delete a file that is no segment of a known stretch. Raises OSError."""
        path.unlink(missing_ok=True)
        self._others.pop(path, None)

    def oldest_rejected(self, bytes_min: int) -> Path | None:
        """The oldest file of rejected records, or of damage, if all of them take more than `bytes_min`."""
        files = [path for path in self._others if path.name.startswith(("rejected-", "damaged-"))]
        if sum(self._others[path] for path in files) <= bytes_min:
            return None
        idle = [path for path in files if self._rejected is None or path != self._rejected.segment.path]
        return min(idle, key=lambda path: path.name.partition("-")[2], default=None)

    def following(self, segment: Segment) -> Segment | None:
        """The next segment of the same stretch."""
        of_stretch = iter(self.by_stretch.get(segment.header.stretch_id, []))
        return next((each for each in of_stretch if each.number > segment.number), None)

    def note_damage(self, damage: Damage) -> bool:
        """Count damage, and keep its bytes as long as there are not too many of them; once: whether it is news."""
        if (damage.path.name, damage.offset) in self._damage_known:
            return False
        self._damage_known.add((damage.path.name, damage.offset))
        self.damaged_bytes += len(damage.data)
        number = damage.path.name.partition(".")[0]
        path = self.folder / f"damaged-{number}-{damage.offset}"
        kept = sum(size for other, size in self._others.items() if other.name.startswith("damaged-"))
        data = damage.data[:PIECE_ASIDE_BYTES_MAX]
        has_room = self.bytes_used + len(data) <= self.bytes_max
        if path not in self._others and has_room and kept + len(data) <= min(ASIDE_BYTES_MAX, self.segment_bytes):
            try:
                path.write_bytes(data)
                self._others[path] = len(data)
            except OSError:  # It is counted; a disk that is full has no room for what cannot be read.
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        return True

    def reject(self, record: Record, reason: str) -> None:
        """Copy a record to where the rejected ones are, durably. Raises OSError."""
        if (record.stretch_id, record.sequence) in self._rejected_known:
            return
        note = encode_json({"stretch": record.stretch_id, "sequence": record.sequence, "reason": reason})
        size = 2 * HEADER.size + len(record.source.encode()) + len(note) + record.size
        if self._rejected is not None and self._rejected.end + size > self.segment_bytes:
            self._rejected.close()
            self._rejected = None
        if self._rejected is None:
            self._rejected = self._begin_rejected(record.origin)
        seed = self._rejected.segment.header.seed
        told = pack(Kind.REJECTED, record.origin, record.sequence, note, source=record.source, seed=seed)
        self._rejected.append(told + record.pack(seed))
        self._others[self._rejected.segment.path] = self._rejected.end
        self._rejected.sync()
        self._rejected_known.add((record.stretch_id, record.sequence))

    def _begin_rejected(self, origin: Origin) -> OpenSegment:
        number = self.next_number()
        path = self.folder / segment_name(number, rejected=True)
        header = SegmentHeader(number, NO_STRETCH, 1, origin, 0, "")
        opened = OpenSegment(allocate(path, HEADER_BYTES), Segment(path, header, HEADER_BYTES, 0))
        opened.append(header.pack())
        sync_folder(self.folder)
        return opened

    def close(self) -> None:
        """Close the file of rejected records."""
        if self._rejected is not None:
            self._rejected.close()
            self._rejected = None
