"""What decoders remember where a stretch begins: what they knew at the end of the stretch before it.

A logger says its header once, and goes on talking while the daemon is killed and started again, or while the database
is away and a new stretch begins. The rows of the new stretch need the header of the old one, which may not have been
sent yet, and which another transaction is only going to decode. So the journal is read for it: from the last position
at which the database knows what was remembered, to where the memory is wanted.

Limits: only what is still in the journal can be remembered. It is read once for a stretch, and nothing is sent
meanwhile: some seconds for an hour of backlog, where a source remembers anything. Decoders pass over what teaches them
nothing. A stop does not wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import takewhile

from ingestd.journal import Journal, Kind, Record, Stretch, merge
from ingestd.model import BATCH_FRAMES_MAX, FrameBatch, Memory
from ingestd.pipeline import Decoders
from ingestd.store.writer import Standing, Writer

log = logging.getLogger(__name__)


async def recall(
    journal: Journal, writer: Writer, stretch: Stretch, position: int, decoders: Decoders, machine_id: str
) -> dict[str, Memory]:
    """The memory of each source at a position of a stretch. Raises StoreError."""
    stretches = journal.stretches()
    stretches = stretches[: [each.id for each in stretches].index(stretch.id) + 1]
    if not decoders.remembering:
        return {}
    standings = await writer.standings([each.feed_id for each in stretches[:-1]])
    own = {feed_id: each for feed_id, each in standings.items() if each.machine_id == machine_id}  # Not a clone's.
    unwanted = threading.Event()
    try:
        return await asyncio.to_thread(_read_back, journal, stretches, position, own, decoders, unwanted)
    finally:
        unwanted.set()  # A thread cannot be cancelled.


def _read_back(
    journal: Journal,
    stretches: Sequence[Stretch],
    position: int,
    standings: Mapping[str, Standing],
    decoders: Decoders,
    unwanted: threading.Event,
) -> dict[str, Memory]:
    """The memory at a position of the last of `stretches`; `standings` are those of the feeds of the others."""
    memory: dict[str, Memory] = {}
    sources, first, after = decoders.remembering, 0, 0
    for number, stretch in reversed(list(enumerate(stretches[:-1]))):
        standing = standings.get(stretch.feed_id)
        known = None if standing is None else standing.decoder_state.get("memory")
        if standing is not None and known is not None:
            memory, first, after = deepcopy(known), number, standing.position
            break
    for stretch in stretches[first:]:
        through = position if stretch is stretches[-1] else stretch.last_sequence
        records = takewhile(lambda _: not unwanted.is_set(), journal.look_back(stretch.id, after, through))
        for frames in _frames_of(records, sources):
            _remember(decoders, frames, memory)
        after = 0
    return memory


def _frames_of(records: Iterable[Record], sources: frozenset[str]) -> Iterator[FrameBatch]:
    """The frames of some sources, each source's in order, in batches worth the work."""
    waiting: dict[str, list[Record]] = {}
    count: dict[str, int] = {}
    for record in records:
        if record.kind is Kind.FRAMES and record.source in sources and record.frames_count:
            waiting.setdefault(record.source, []).append(record)
            count[record.source] = count.get(record.source, 0) + record.frames_count
            if count[record.source] >= BATCH_FRAMES_MAX:
                yield merge(waiting.pop(record.source))
                del count[record.source]
    yield from map(merge, waiting.values())


def _remember(decoders: Decoders, frames: FrameBatch, memory: dict[str, Memory]) -> None:
    noted = deepcopy(memory.get(frames.source, {}))
    try:
        decoders.remember(frames, noted)
    except Exception as error:
        log.error("what came before cannot be remembered source=%s error=%r", frames.source, str(error))
        return
    if noted:
        memory[frames.source] = noted
