"""Where a stretch of the journal stands in the database, and from where it is to be sent.

The position in the database decides, because it moved in the transaction that stored the frames. What it may be:

    no row            the database has never had this feed: sent from the beginning, or from what is acknowledged if the
                      database is the one we know (then somebody has deleted it there, and it stays deleted)
    as acknowledged   go on
    further           a commit went through and we never heard of it, or died before we could note it: catch up
    less              an older backup was restored: sent again from there, as far as the journal still has it
    of another machine, or moved while only we could have moved it: the journal was cloned. Both copies go on, each
    under a feed id of its own; nothing of either is lost, and what neither had acknowledged may be stored twice.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from uuid import UUID

from ingestd.backoff import Backoff
from ingestd.delivery.transactions import FeedState, Prepared
from ingestd.journal import ReadResult, Stretch, StretchReader
from ingestd.pipeline import RETRY_SECONDS_MAX, RETRY_SECONDS_MIN
from ingestd.store.writer import SessionEdit, Standing

BATCH_BYTES_MIN = 250_000


class Finding(Enum):
    """What comparing the database with the journal says about a feed."""

    NEW = "new"
    CONTINUE = "continue"
    CATCH_UP = "catch_up"
    RESTORED = "restored"
    CLONED = "cloned"
    DELETED = "deleted"


@dataclass(slots=True)
class Cursor:
    """How far one stretch has been sent in this process."""

    stretch_id: str
    feed_id: str
    position: int
    acknowledged: int  # what is below is in the books already, also when it is sent again
    state: FeedState = field(default_factory=FeedState)
    reader: StretchReader | None = None
    attempt: Prepared | None = None  # prepared, and not known to be committed …
    attempt_at: float = 0.0  # … when what is in it was read, by time.monotonic, …
    attempt_is_all: bool = False  # … and whether that was all there was
    failures: int = 0  # of this attempt, with an error of the server's
    records_max: int | None = None  # while a batch that failed is being halved …
    halving_until: int = 0  # … up to this position
    bytes_max: int = BATCH_BYTES_MIN  # how much of the journal goes into a batch; follows from the signals it gives
    retry_at: float = 0.0  # not before this instant of time.monotonic
    backoff: Backoff = field(default_factory=lambda: Backoff(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX))
    confirmed: bool = False  # whether its position was compared with the database since the connection was opened
    done: bool = False  # nothing more will come of it
    restored_from: int | None = None  # whence it is sent again to a database that lacks what it had; until that is said

    @property
    def is_resent(self) -> bool:
        """Whether what comes next was acknowledged once."""
        return self.position < self.acknowledged


def judge(cursor: Cursor, standing: Standing | None, machine_id: str, *, known: bool) -> Finding:
    """What to do with a feed. `known`: the database has what we had last committed, so it is the one we know."""
    if standing is None:
        return Finding.DELETED if known and cursor.position > 0 else Finding.NEW
    if standing.machine_id != machine_id:
        return Finding.CLONED
    if standing.position == cursor.position:
        return Finding.CONTINUE
    if standing.position < cursor.position:
        return Finding.RESTORED
    attempt = None if cursor.attempt is None else cursor.attempt.batch
    if attempt is not None and standing.position == attempt.position_new:
        # A clone may be at the same position with other frames: the mark says whose commit it was.
        is_ours = standing.decoder_state.get("attempt") == attempt.decoder_state.get("attempt")
        return Finding.CATCH_UP if is_ours else Finding.CLONED
    # Before the first comparison of this process: the last commit of the one before it. Afterwards nobody but a clone
    # of this machine, with its id, moves the position.
    return Finding.CATCH_UP if cursor.reader is None else Finding.CLONED


def is_known(standings: Mapping[str, Standing], stretches: list[Stretch]) -> bool:
    """Whether the database has what was acknowledged of the newest stretch: then it is the one that we know, and whole.

    Older stretches have had a row there before the newest had its first commit; one without was deleted.
    """
    acknowledged = [stretch for stretch in stretches if stretch.acknowledged > 0]
    if not acknowledged:
        return False
    newest = acknowledged[-1]
    standing = standings.get(newest.feed_id)
    return standing is not None and standing.position >= newest.acknowledged


def new_feed_id(stretch_id: str) -> str:
    """Another id for a stretch whose own is used by a clone; it begins with the stretch's, for people."""
    return f"{stretch_id}+{secrets.token_hex(4)}"


def placeholder(session_id: UUID, boot_id: str) -> SessionEdit:
    """A session of which no more is known yet: any edit is later than this one."""
    return SessionEdit(session_id, boot_id, created_utc=datetime.now(UTC), updated_utc=datetime.fromtimestamp(0, UTC))


def read_batch(reader: StretchReader, bytes_max: int, records_max: int | None) -> ReadResult:
    """The next records. What is told to be lost was lost before or among these, and not behind them."""
    if records_max is None:
        return reader.read(bytes_max)
    result = ReadResult()
    while len(result.records) < records_max and (more := reader.read(1)).records:
        result.records += more.records
        for source, reasons in more.lost.items():
            of_source = result.lost.setdefault(source, {})
            for reason, count in reasons.items():
                of_source[reason] = of_source.get(reason, 0) + count
    return result
